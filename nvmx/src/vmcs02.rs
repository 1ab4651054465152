//! VMCS02, the VMCS that L2 runs on, made of VMCS12 (L1's wishes) and VMCS01 (the embedder's).
//!
//! Called by the VM entry; writes through a [`Cache`], so that what VMCS02 holds already costs nothing. What it leaves
//! open (the EPT pointer, the addresses of L1's APIC pages, VPID, event injection) the embedder and
//! [`NestedVmx::prepare_entry`] fill in.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

use crate::bitmaps::{HotWords, Source};
use crate::bits::{activity, cr0, cr4, efer};
use crate::cache::{Cache, FieldSet};
use crate::controls::{entry, primary, secondary};
use crate::events::Events;
use crate::field::Field;
use crate::groups::{self, Groups};
use crate::machine::{Machine, Vmcs};
use crate::own::Own;
use crate::state::{Current, NestedVmx};
use crate::timer::Timer;
use tlfs_abi::evmcs::CleanFields;

/// Vector of #PF, as a bit of the exception bitmap.
pub(crate) const PF: u32 = 1 << 14;
/// What the state machine knows of VMCS02.
#[derive(Clone, Debug, Default)]
pub(crate) struct L2 {
    /// What VMCS02 holds.
    pub(crate) cache: Cache,
    /// Guest-state fields of VMCS12 whose value is in VMCS02 alone.
    pub(crate) stale: FieldSet,
    /// The embedder's controls; `None` before the first entry and after a change.
    pub(crate) own: Option<Own>,
    /// Fields of group [`groups::OTHER`] that VMCS02's controls depend on were written by L1.
    pub(crate) touched: bool,
    /// The controls, of those that matter to them, with which the guest-state checks were made last.
    pub(crate) judged: Option<(u32, u32)>,
    /// Primary controls of VMCS02 without windows of the library's own.
    pub(crate) primary: u32,
    /// Pin-based controls of VMCS02 without a timer of the library's own.
    pub(crate) pin: u32,
    /// VMCS01's interruptibility state at L1's VM entry, when it is known.
    pub(crate) blocking01: Option<u32>,
    /// The VPID that VMCS01 holds, when it is known.
    pub(crate) vpid01: Option<u16>,
    /// The last entry was merged with this MSR bitmap of L1's.
    pub(crate) msr_source: Option<u64>,
    pub(crate) msr_words: HotWords,
    pub(crate) io_words: HotWords,
    pub(crate) events: Events,
    pub(crate) timer: Timer,
}

/// Groups that VMCS02's controls depend on.
const CONTROLS: Groups = CleanFields::IO_BITMAP
    | CleanFields::MSR_BITMAP
    | CleanFields::CONTROL_GRP2
    | CleanFields::CONTROL_GRP1
    | CleanFields::CONTROL_PROC
    | CleanFields::CONTROL_ENTRY
    | CleanFields::CONTROL_EXCPN
    | CleanFields::CONTROL_XLAT;

/// Group GUEST_GRP2: segments and descriptor tables; first the two fields that tell mode and CPL.
pub(crate) const SEGMENTS: &[Field] = &[
    Field::GuestCsAccessRights,
    Field::GuestSsAccessRights,
    Field::GuestEsSelector,
    Field::GuestCsSelector,
    Field::GuestSsSelector,
    Field::GuestDsSelector,
    Field::GuestFsSelector,
    Field::GuestGsSelector,
    Field::GuestLdtrSelector,
    Field::GuestTrSelector,
    Field::GuestEsLimit,
    Field::GuestCsLimit,
    Field::GuestSsLimit,
    Field::GuestDsLimit,
    Field::GuestFsLimit,
    Field::GuestGsLimit,
    Field::GuestLdtrLimit,
    Field::GuestTrLimit,
    Field::GuestGdtrLimit,
    Field::GuestIdtrLimit,
    Field::GuestEsAccessRights,
    Field::GuestDsAccessRights,
    Field::GuestFsAccessRights,
    Field::GuestGsAccessRights,
    Field::GuestLdtrAccessRights,
    Field::GuestTrAccessRights,
    Field::GuestEsBase,
    Field::GuestCsBase,
    Field::GuestSsBase,
    Field::GuestDsBase,
    Field::GuestFsBase,
    Field::GuestGsBase,
    Field::GuestLdtrBase,
    Field::GuestTrBase,
    Field::GuestGdtrBase,
    Field::GuestIdtrBase,
];

/// Of group GUEST_GRP1, what VMCS02 takes over as it is.
pub(crate) const MISCELLANEOUS: &[Field] = &[
    Field::GuestSysenterCs,
    Field::GuestSysenterEsp,
    Field::GuestSysenterEip,
    Field::GuestPendingDebugExceptions,
    Field::GuestActivity,
];

/// Group GUEST_BASIC.
const BASIC: &[Field] = &[Field::GuestRsp, Field::GuestRflags, Field::GuestInterruptibility];

/// The four PDPTEs.
pub(crate) const PDPTES: [Field; 4] = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];

/// Fields of group [`groups::OTHER`] that no control of VMCS02 depends on.
const UNTOUCHING: FieldSet = FieldSet::of(&[
    Field::GuestRip,
    Field::TprThreshold,
    Field::PreemptionTimer,
    Field::GuestInterruptStatus,
    Field::PmlIndex,
    Field::ExitMsrStoreCount,
    Field::ExitMsrStoreAddress,
    Field::ExitMsrLoadCount,
    Field::ExitMsrLoadAddress,
    Field::EntryMsrLoadCount,
    Field::EntryMsrLoadAddress,
]);

impl L2 {
    /// VMCS02 is of another VMCS12 now, or of none: nothing in it is of use, but for the controls.
    pub(crate) const fn forget(&mut self) {
        self.stale = FieldSet::EMPTY;
        self.touched = true;
        self.judged = None;
    }

    /// INIT: nothing waits, and VMCS01 is about to be written anew.
    pub(crate) fn reset(&mut self) {
        self.forget();
        self.events = Events::fresh();
        self.timer = Timer::default();
        self.own = None;
        self.vpid01 = None;
    }

    /// L1 wrote `field` of its VMCS.
    #[inline]
    pub(crate) fn wrote(&mut self, field: Field) {
        self.stale.remove(field);
        self.touched |= field.group() == groups::OTHER && !UNTOUCHING.contains(field);
    }
}

impl NestedVmx {
    /// L1's virtual-APIC page, if L2 has a TPR shadow: the embedder puts its host physical address in VMCS02's
    /// virtual-APIC address before L2's entry; a page of zeros of its own where L1 has no memory.
    pub fn virtual_apic_page(&self) -> Option<L1Gpa> {
        self.primary12(primary::TPR_SHADOW).then(|| L1Gpa::new(self.vmcs12.get(Field::VirtualApicAddress)))
    }

    /// L1's APIC-access page, if its accesses are virtualized: as [`virtual_apic_page`](Self::virtual_apic_page), in
    /// VMCS02's APIC-access address.
    pub fn apic_access_page(&self) -> Option<L1Gpa> {
        let virtualized = self.has12(secondary::VIRTUALIZE_APIC_ACCESSES);
        virtualized.then(|| L1Gpa::new(self.vmcs12.get(Field::ApicAccessAddress)))
    }

    /// The embedder's MSR or I/O bitmaps changed: merged words are made anew.
    pub fn own_bitmaps_changed<V: ?Sized, G: ?Sized, M: ?Sized, L: ?Sized>(&mut self, m: &mut Machine<'_, V, G, M, L>) {
        self.l2.msr_words.clear(m.msr_bitmap02.words);
        self.l2.io_words.clear(m.io_bitmaps02.words);
    }

    /// Secondary controls of VMCS12, 0 where they are not activated.
    #[inline]
    pub(crate) fn secondary12(&self) -> u32 {
        let active = self.vmcs12.get32(Field::PrimaryControls) & primary::SECONDARY_CONTROLS != 0;
        if active { self.vmcs12.get32(Field::SecondaryControls) } else { 0 }
    }

    /// True when VMCS12 has `bit` of the secondary controls set and in force.
    #[inline]
    pub(crate) fn has12(&self, bit: u32) -> bool {
        self.secondary12() & bit != 0
    }

    /// True when VMCS12 has `bit` of the primary controls set.
    #[inline]
    pub(crate) fn primary12(&self, bit: u32) -> bool {
        self.vmcs12.get32(Field::PrimaryControls) & bit != 0
    }

    /// True when VMCS12 has `bit` of the pin-based controls set.
    #[inline]
    pub(crate) fn pin12(&self, bit: u32) -> bool {
        self.vmcs12.get32(Field::PinBasedControls) & bit != 0
    }

    /// Writes a field of VMCS02. If VMCS12 has yet to learn its value, it does so first.
    pub(crate) fn put<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, field: Field, value: u64) {
        if self.l2.stale.contains(field) {
            let saved = self.l2.cache.read(vmcs02, field);
            self.vmcs12.set(field, saved);
            self.l2.stale.remove(field);
        }
        self.l2.cache.write(vmcs02, field, value);
    }

    pub(crate) fn copy<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, field: Field) {
        if !self.l2.stale.contains(field) {
            let value = self.vmcs12.get(field);
            self.l2.cache.write(vmcs02, field, value);
        }
    }

    pub(crate) fn copy_all<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, fields: &[Field]) {
        for field in fields {
            self.copy(vmcs02, *field);
        }
    }

    /// Makes VMCS02 of VMCS12 where L1 changed something; `own` are the embedder's controls.
    pub(crate) fn load_vmcs02<V, G: ?Sized, M, L: ?Sized>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        own: &Own,
        inherited: &Inherited,
    ) where
        V: Vmcs + ?Sized,
        M: GuestMemory + ?Sized,
    {
        let changed = self.changed;
        if changed & CONTROLS != 0 || self.l2.touched {
            self.load_controls(m.vmcs02, own);
            self.l2.touched = false;
        }
        self.load_bitmaps(m, own, changed);
        let vmcs02 = &mut *m.vmcs02;
        if changed & CleanFields::GUEST_GRP2 != 0 {
            self.copy_all(vmcs02, SEGMENTS);
        }
        if changed & CleanFields::GUEST_GRP1 != 0 {
            self.copy_all(vmcs02, MISCELLANEOUS);
        }
        if changed & CleanFields::GUEST_BASIC != 0 {
            self.copy_all(vmcs02, BASIC);
        }
        if changed & CleanFields::CRDR != 0 {
            self.load_cr(vmcs02, own);
        }
        self.copy(vmcs02, Field::GuestRip);
        self.load_conditional(vmcs02, inherited);
        if let Some(root) = inherited.ept_pointer {
            // The embedder's own second stage serves L2 as it serves L1. It writes the field itself at other times.
            vmcs02.write(Field::EptPointer, root);
        }
        self.changed = 0;
    }

    /// Control registers with masks and read shadows. L1 believes what VMCS12 says to be in the processor; the bits that
    /// the embedder masks are as the embedder needs them.
    fn load_cr<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        for (real, mask, shadow, own_mask, own_value) in [
            (Field::GuestCr0, Field::Cr0Mask, Field::Cr0ReadShadow, own.cr0_mask, own.cr0),
            (Field::GuestCr4, Field::Cr4Mask, Field::Cr4ReadShadow, own.cr4_mask, own.cr4),
        ] {
            let (value, mask12, shadow12) = (self.vmcs12.get(real), self.vmcs12.get(mask), self.vmcs12.get(shadow));
            self.put(vmcs02, real, value & !own_mask | own_value);
            self.put(vmcs02, mask, mask12 | own_mask);
            // Where the embedder alone has a mask L2 reads what L1 believes the register to be.
            self.put(vmcs02, shadow, shadow12 & mask12 | value & own_mask & !mask12);
        }
        self.copy(vmcs02, Field::GuestCr3);
    }

    /// Where L1 keeps its MSR bitmap.
    pub(crate) fn msr_source(&self) -> Source {
        let a = self.vmcs12.get(Field::MsrBitmap);
        Source { a, b: a }
    }

    /// Where L1 keeps its I/O bitmaps.
    pub(crate) fn io_source(&self) -> Source {
        Source { a: self.vmcs12.get(Field::IoBitmapA), b: self.vmcs12.get(Field::IoBitmapB) }
    }

    /// True when L1 promises to tell of changes of its MSR bitmap's contents.
    fn enlightened_msr_bitmap(&self) -> bool {
        matches!(self.current, Current::Enlightened(_)) && self.evmcs.enlightenments().control.msr_bitmap()
    }

    /// Chooses and refreshes the bitmaps of L2.
    fn load_bitmaps<V, G: ?Sized, M, L: ?Sized>(&mut self, m: &mut Machine<'_, V, G, M, L>, own: &Own, changed: Groups)
    where
        V: Vmcs + ?Sized,
        M: GuestMemory + ?Sized,
    {
        if self.l2.primary & primary::MSR_BITMAPS != 0 {
            self.put(m.vmcs02, Field::MsrBitmap, m.msr_bitmap02.base.raw());
            let source = self.msr_source();
            // The enlightened bitmap's clean bit covers the contents; without the enlightenment only the address.
            let kept = self.enlightened_msr_bitmap()
                && changed & CleanFields::MSR_BITMAP == 0
                && self.l2.msr_source == Some(source.a);
            if !kept {
                self.l2.msr_words.refresh(m.msr_bitmap02.words, m.msr_bitmap01, m.memory, source);
                self.l2.msr_source = Some(source.a);
            }
        }
        if self.l2.primary & primary::IO_BITMAPS == 0 {
            return;
        }
        if self.primary12(primary::IO_BITMAPS) {
            let base = m.io_bitmaps02.base.raw();
            self.put(m.vmcs02, Field::IoBitmapA, base);
            self.put(m.vmcs02, Field::IoBitmapB, base.wrapping_add(4096));
            let source = self.io_source();
            self.l2.io_words.refresh(m.io_bitmaps02.words, m.io_bitmaps01, m.memory, source);
        } else {
            self.put(m.vmcs02, Field::IoBitmapA, own.io_bitmaps.0);
            self.put(m.vmcs02, Field::IoBitmapB, own.io_bitmaps.1);
        }
    }

    /// What L2 takes over from L1 where VMCS12 does not load it.
    pub(crate) fn inherit<V: Vmcs + ?Sized>(&self, vmcs01: &V) -> Inherited {
        let entry12 = self.vmcs12.get32(Field::EntryControls);
        let read_unless = |control: u32, field| if entry12 & control == 0 { vmcs01.read(field) } else { 0 };
        Inherited {
            efer: read_unless(entry::LOAD_EFER, Field::GuestEfer),
            pat: read_unless(entry::LOAD_PAT, Field::GuestPat),
            dr7: read_unless(entry::LOAD_DEBUG_CONTROLS, Field::GuestDr7),
            debugctl: read_unless(entry::LOAD_DEBUG_CONTROLS, Field::GuestDebugctl),
            ept_pointer: (!self.has12(secondary::EPT)).then(|| vmcs01.read(Field::EptPointer)),
        }
    }

    /// Registers that VMCS12 loads or L1 leaves in place. What an exit saved nowhere has to be written every time.
    fn load_conditional<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, l1: &Inherited) {
        let entry12 = self.vmcs12.get32(Field::EntryControls);
        let long = entry12 & entry::IA32E_MODE_GUEST != 0;
        // Without paging, LME stays as L1 has it.
        let paging = self.vmcs12.get(Field::GuestCr0) & cr0::PG != 0;
        let kept = if paging { !(efer::LME | efer::LMA) } else { !efer::LMA };
        let modes = if long { efer::LME | efer::LMA } else { 0 };
        self.load_or(vmcs02, entry12 & entry::LOAD_EFER != 0, Field::GuestEfer, l1.efer & kept | modes);
        self.load_or(vmcs02, entry12 & entry::LOAD_PAT != 0, Field::GuestPat, l1.pat);
        let debug = entry12 & entry::LOAD_DEBUG_CONTROLS != 0;
        self.load_or(vmcs02, debug, Field::GuestDr7, l1.dr7);
        self.load_or(vmcs02, debug, Field::GuestDebugctl, l1.debugctl);
        if entry12 & entry::LOAD_PERF_GLOBAL_CTRL != 0 {
            self.copy(vmcs02, Field::GuestPerfGlobalCtrl);
        }
        if entry12 & entry::LOAD_BNDCFGS != 0 {
            self.copy(vmcs02, Field::GuestBndcfgs);
        }
        if self.primary12(primary::TPR_SHADOW) {
            self.copy(vmcs02, Field::TprThreshold);
        }
        if self.has12(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
            self.copy(vmcs02, Field::GuestInterruptStatus);
        }
    }

    fn load_or<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, load: bool, field: Field, otherwise: u64) {
        if load {
            self.copy(vmcs02, field);
        } else {
            self.put(vmcs02, field, otherwise);
        }
    }

    /// True when L2 is about to run with PAE paging, so that the processor has PDPTEs.
    pub(crate) fn pae_paging12(&self) -> bool {
        let long = self.vmcs12.get32(Field::EntryControls) & entry::IA32E_MODE_GUEST != 0;
        let (paging, pae) = (self.vmcs12.get(Field::GuestCr0) & cr0::PG, self.vmcs12.get(Field::GuestCr4) & cr4::PAE);
        !long && paging != 0 && pae != 0
    }

    /// L2's PDPTEs: L1's VMCS has them with EPT, else they are in L1's memory. With the embedder's EPT in use the
    /// processor takes them from VMCS02 in both cases.
    pub(crate) fn load_pdptes<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, pdptes: [u64; 4]) {
        for (field, value) in PDPTES.into_iter().zip(pdptes) {
            self.put(vmcs02, field, value);
        }
    }

    /// True while L2 is in an activity state that the processor is never put in: it waits in software.
    pub(crate) fn sleeps(&self) -> bool {
        matches!(self.vmcs12.get32(Field::GuestActivity), activity::SHUTDOWN | activity::WAIT_FOR_SIPI)
    }
}

/// L1's registers at the VM entry that L2 may take over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    efer: u64,
    pat: u64,
    dr7: u64,
    debugctl: u64,
    /// The embedder's EPT pointer, where L1 uses no EPT.
    ept_pointer: Option<u64>,
}
