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
use crate::controls::{entry, exit, pin, primary, secondary};
use crate::events::Events;
use crate::field::Field;
use crate::groups::{self, Groups};
use crate::machine::{Machine, Vmcs};
use crate::state::{Current, NestedVmx};
use crate::timer::Timer;
use tlfs_abi::evmcs::CleanFields;

/// Vector of #PF, as a bit of the exception bitmap.
pub(crate) const PF: u32 = 1 << 14;
/// The TSC multiplier that changes nothing: 1.0 with 48 fraction bits.
const ONE: u64 = 1 << 48;

/// The embedder's own controls, as VMCS01 has them: read once, and again when the embedder says that they changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Own {
    pub(crate) pin: u32,
    pub(crate) primary: u32,
    pub(crate) secondary: u32,
    pub(crate) exit: u32,
    pub(crate) entry: u32,
    pub(crate) exceptions: u32,
    pf_mask: u32,
    pf_match: u32,
    pub(crate) cr0_mask: u64,
    pub(crate) cr4_mask: u64,
    /// What the processor is to have in the masked bits of CR0 and CR4, whatever the guest believes.
    pub(crate) cr0: u64,
    pub(crate) cr4: u64,
    tsc_offset: u64,
    tsc_multiplier: u64,
    pub(crate) xss_bitmap: u64,
    ple: (u32, u32),
    io_bitmaps: (u64, u64),
    virtual_apic: u64,
    apic_access: u64,
    tpr_threshold: u32,
}

impl Own {
    fn read<V: Vmcs + ?Sized>(vmcs01: &V) -> Self {
        let windows = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
        let primary = vmcs01.read32(Field::PrimaryControls) & !windows;
        let with_secondary = primary & primary::SECONDARY_CONTROLS != 0;
        let secondary = if with_secondary { vmcs01.read32(Field::SecondaryControls) } else { 0 };
        let read_if = |condition: bool, field| if condition { vmcs01.read(field) } else { 0 };
        let (scaling, ple) = (secondary & secondary::TSC_SCALING != 0, secondary & secondary::PAUSE_LOOP_EXITING != 0);
        let (cr0_mask, cr4_mask) = (vmcs01.read(Field::Cr0Mask), vmcs01.read(Field::Cr4Mask));
        Self {
            pin: vmcs01.read32(Field::PinBasedControls),
            primary,
            secondary,
            exit: vmcs01.read32(Field::ExitControls),
            entry: vmcs01.read32(Field::EntryControls),
            exceptions: vmcs01.read32(Field::ExceptionBitmap),
            pf_mask: vmcs01.read32(Field::PageFaultErrorCodeMask),
            pf_match: vmcs01.read32(Field::PageFaultErrorCodeMatch),
            cr0_mask,
            cr4_mask,
            cr0: vmcs01.read(Field::GuestCr0) & cr0_mask,
            cr4: vmcs01.read(Field::GuestCr4) & cr4_mask,
            tsc_offset: read_if(primary & primary::TSC_OFFSETTING != 0, Field::TscOffset),
            tsc_multiplier: if scaling { vmcs01.read(Field::TscMultiplier) } else { ONE },
            xss_bitmap: read_if(secondary & secondary::XSAVES != 0, Field::XssExitingBitmap),
            ple: (read_if(ple, Field::PleGap) as u32, read_if(ple, Field::PleWindow) as u32),
            io_bitmaps: match primary & primary::IO_BITMAPS != 0 {
                true => (vmcs01.read(Field::IoBitmapA), vmcs01.read(Field::IoBitmapB)),
                false => (0, 0),
            },
            virtual_apic: read_if(primary & primary::TPR_SHADOW != 0, Field::VirtualApicAddress),
            apic_access: read_if(secondary & secondary::VIRTUALIZE_APIC_ACCESSES != 0, Field::ApicAccessAddress),
            tpr_threshold: read_if(primary & primary::TPR_SHADOW != 0, Field::TprThreshold) as u32,
        }
    }

    /// True when physical interrupts go to the guest, not to the embedder.
    #[inline]
    pub(crate) const fn passes_interrupts(&self) -> bool {
        self.pin & pin::EXTERNAL_INTERRUPT_EXITING == 0
    }
}

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

    /// The embedder changed a control field of VMCS01, or wrote a control field of VMCS02 itself: both are read and
    /// made anew at the next VM entry of L1's.
    pub fn own_controls_changed(&mut self) {
        self.l2.own = None;
        self.l2.cache.forget_all();
        self.l2.vpid01 = None;
        self.changed = groups::ALL;
    }

    /// The embedder's MSR or I/O bitmaps changed: merged words are made anew.
    pub fn own_bitmaps_changed<V: ?Sized, G: ?Sized, M: ?Sized, L: ?Sized>(&mut self, m: &mut Machine<'_, V, G, M, L>) {
        self.l2.msr_words.clear(m.msr_bitmap02.words);
        self.l2.io_words.clear(m.io_bitmaps02.words);
    }

    /// The embedder's controls.
    #[inline]
    pub(crate) fn own<V: Vmcs + ?Sized>(&mut self, vmcs01: &V) -> Own {
        match self.l2.own {
            Some(own) => own,
            None => {
                let own = Own::read(vmcs01);
                self.l2.own = Some(own);
                own
            }
        }
    }

    /// The embedder's controls as last read; zero before any entry.
    #[inline]
    pub(crate) fn own_known(&self) -> Own {
        self.l2.own.unwrap_or_default()
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

    fn copy<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, field: Field) {
        if !self.l2.stale.contains(field) {
            let value = self.vmcs12.get(field);
            self.l2.cache.write(vmcs02, field, value);
        }
    }

    fn copy_all<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, fields: &[Field]) {
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

    /// Controls of VMCS02.
    fn load_controls<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        let host = &self.config.host;
        let (allowed_pin, required_pin) = (host.pin.allowed, host.pin.required);
        let pin12 = self.vmcs12.get32(Field::PinBasedControls);
        let mut pins = (own.pin | pin12) & (pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING) | required_pin;
        if pins & pin::NMI_EXITING != 0 {
            // Bit 3 of the interruptibility state is then L2's blocking, whichever way L1 sees NMIs.
            pins |= allowed_pin & pin::VIRTUAL_NMIS;
        }
        let hardware_timer = self.l2.timer.choose(own.pin, allowed_pin, host.exit.allowed);
        if own.pin & pin::PREEMPTION_TIMER != 0 || (hardware_timer && pin12 & pin::PREEMPTION_TIMER != 0) {
            pins |= pin::PREEMPTION_TIMER;
        }
        self.l2.pin = pins;
        let exits = self.merged_exit(own, pins);
        let entries = self.merged_entry(own);
        self.load_primary(vmcs02, own);
        self.put(vmcs02, Field::PinBasedControls, pins.into());
        self.put(vmcs02, Field::ExitControls, exits.into());
        self.put(vmcs02, Field::EntryControls, entries.into());
        self.load_exceptions(vmcs02, own);
        self.load_fixed(vmcs02);
    }

    fn merged_exit(&self, own: &Own, pins: u32) -> u32 {
        let allowed = self.config.host.exit.allowed;
        let mut exits = own.exit | allowed & (exit::SAVE_DEBUG_CONTROLS | exit::SAVE_EFER | exit::SAVE_PAT);
        if own.passes_interrupts() {
            exits &= !exit::ACKNOWLEDGE_INTERRUPT;
            exits |= self.vmcs12.get32(Field::ExitControls) & exit::ACKNOWLEDGE_INTERRUPT;
        }
        if own.pin & pin::PREEMPTION_TIMER == 0 {
            exits &= !exit::SAVE_PREEMPTION_TIMER;
            if pins & pin::PREEMPTION_TIMER != 0 {
                // An exit to the embedder does not start the timer anew.
                exits |= allowed & exit::SAVE_PREEMPTION_TIMER;
            }
        }
        exits
    }

    fn merged_entry(&self, own: &Own) -> u32 {
        const FROM_L1: u32 = entry::IA32E_MODE_GUEST | entry::LOAD_PERF_GLOBAL_CTRL | entry::LOAD_BNDCFGS;
        own.entry & !entry::IA32E_MODE_GUEST
            | self.vmcs12.get32(Field::EntryControls) & FROM_L1
            | self.config.host.entry.allowed & entry::LOAD_DEBUG_CONTROLS
    }

    fn load_primary<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        const SEPARATE: u32 = primary::IO_BITMAPS
            | primary::UNCONDITIONAL_IO_EXITING
            | primary::MSR_BITMAPS
            | primary::TPR_SHADOW
            | primary::CR8_LOAD_EXITING
            | primary::CR8_STORE_EXITING;
        const CR8: u32 = primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING;
        let primary12 = self.vmcs12.get32(Field::PrimaryControls);
        let mut merged = (own.primary | primary12) & !SEPARATE | primary12 & (CR8 | primary::TPR_SHADOW);
        let (mut apic, mut threshold) = (None, self.vmcs12.get32(Field::TprThreshold));
        if primary12 & primary::TPR_SHADOW != 0 {
            // The embedder puts the address of L1's page there.
            self.l2.cache.forget(Field::VirtualApicAddress);
        } else {
            // CR8 is L1's then, and the embedder's business.
            merged |= own.primary & (CR8 | primary::TPR_SHADOW);
            apic = (own.primary & primary::TPR_SHADOW != 0).then_some(own.virtual_apic);
            threshold = own.tpr_threshold;
        }
        merged |= primary12 & own.primary & primary::MSR_BITMAPS;
        merged |= match primary12 & primary::IO_BITMAPS {
            0 if primary12 & primary::UNCONDITIONAL_IO_EXITING != 0 => primary::UNCONDITIONAL_IO_EXITING,
            0 => own.primary & (primary::IO_BITMAPS | primary::UNCONDITIONAL_IO_EXITING),
            _ if own.primary & primary::IO_BITMAPS == 0 && own.primary & primary::UNCONDITIONAL_IO_EXITING != 0 => {
                primary::UNCONDITIONAL_IO_EXITING
            }
            bitmaps => bitmaps,
        };
        let secondary = self.merged_secondary(own);
        if own.primary & primary::SECONDARY_CONTROLS != 0 {
            merged |= primary::SECONDARY_CONTROLS;
            self.put(vmcs02, Field::SecondaryControls, secondary.into());
        }
        self.l2.primary = merged;
        if let Some(address) = apic {
            self.put(vmcs02, Field::VirtualApicAddress, address);
        }
        if merged & primary::TPR_SHADOW != 0 {
            self.put(vmcs02, Field::TprThreshold, threshold.into());
        }
        if merged & primary::CR3_LOAD_EXITING != 0 {
            self.load_cr3_targets(vmcs02, own);
        }
        self.load_secondary(vmcs02, own, secondary);
    }

    fn load_cr3_targets<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        // A target of L1's is none of the embedder's.
        let count =
            if own.primary & primary::CR3_LOAD_EXITING != 0 { 0 } else { self.vmcs12.get(Field::Cr3TargetCount) };
        self.put(vmcs02, Field::Cr3TargetCount, count);
        if count != 0 {
            self.copy_all(vmcs02, &[Field::Cr3Target0, Field::Cr3Target1, Field::Cr3Target2, Field::Cr3Target3]);
        }
    }

    fn merged_secondary(&self, own: &Own) -> u32 {
        /// What the embedder's alone decides, or wants as well.
        const OWN: u32 = secondary::EPT
            | secondary::VPID
            | secondary::DESCRIPTOR_TABLE_EXITING
            | secondary::WBINVD_EXITING
            | secondary::PAUSE_LOOP_EXITING
            | secondary::RDRAND_EXITING
            | secondary::RDSEED_EXITING
            | secondary::ENCLS_EXITING
            | secondary::CONCEAL_VMX_FROM_PT
            | secondary::TSC_SCALING;
        /// What L1 asks for.
        const L1: u32 = secondary::VIRTUALIZE_APIC_ACCESSES
            | secondary::DESCRIPTOR_TABLE_EXITING
            | secondary::RDTSCP
            | secondary::VIRTUALIZE_X2APIC_MODE
            | secondary::WBINVD_EXITING
            | secondary::UNRESTRICTED_GUEST
            | secondary::APIC_REGISTER_VIRTUALIZATION
            | secondary::VIRTUAL_INTERRUPT_DELIVERY
            | secondary::PAUSE_LOOP_EXITING
            | secondary::RDRAND_EXITING
            | secondary::INVPCID
            | secondary::VM_FUNCTIONS
            | secondary::RDSEED_EXITING
            | secondary::XSAVES
            | secondary::TSC_SCALING;
        let secondary12 = self.secondary12();
        let mut merged = own.secondary & OWN | secondary12 & L1;
        if secondary12 & (secondary::VIRTUALIZE_APIC_ACCESSES | secondary::VIRTUALIZE_X2APIC_MODE) == 0 {
            merged |= own.secondary & secondary::VIRTUALIZE_APIC_ACCESSES;
        }
        merged & self.config.host.secondary
    }

    fn load_secondary<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own, merged: u32) {
        let secondary12 = self.secondary12();
        if secondary12 & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
            // The embedder puts the address of L1's page there.
            self.l2.cache.forget(Field::ApicAccessAddress);
        } else if merged & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
            self.put(vmcs02, Field::ApicAccessAddress, own.apic_access);
        }
        if merged & secondary::PAUSE_LOOP_EXITING != 0 {
            let (gap, window) = match secondary12 & secondary::PAUSE_LOOP_EXITING != 0 {
                true => (self.vmcs12.get32(Field::PleGap), self.vmcs12.get32(Field::PleWindow)),
                false => own.ple,
            };
            self.put(vmcs02, Field::PleGap, gap.into());
            self.put(vmcs02, Field::PleWindow, window.into());
        }
        if merged & secondary::XSAVES != 0 {
            let bitmap = own.xss_bitmap | self.vmcs12.get(Field::XssExitingBitmap);
            self.put(vmcs02, Field::XssExitingBitmap, bitmap);
        }
        if merged & secondary::VIRTUAL_INTERRUPT_DELIVERY != 0 {
            let bitmaps = [Field::EoiExitBitmap0, Field::EoiExitBitmap1, Field::EoiExitBitmap2, Field::EoiExitBitmap3];
            self.copy_all(vmcs02, &bitmaps);
        }
        if merged & secondary::VM_FUNCTIONS != 0 {
            // No function is the processor's to do: each VMFUNC exits.
            self.put(vmcs02, Field::VmFunctionControls, 0);
        }
        self.load_tsc(vmcs02, own, merged);
    }

    /// L2's TSC: L1's, scaled and offset as L1 says, which is the embedder's, scaled and offset.
    fn load_tsc<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own, merged: u32) {
        let (mut offset, mut multiplier) = (own.tsc_offset, own.tsc_multiplier);
        if self.primary12(primary::TSC_OFFSETTING) {
            if self.has12(secondary::TSC_SCALING) {
                let multiplier12 = self.vmcs12.get(Field::TscMultiplier);
                offset = scale_signed(offset, multiplier12);
                multiplier = scale(multiplier, multiplier12);
            }
            offset = offset.wrapping_add(self.vmcs12.get(Field::TscOffset));
        }
        if self.l2.primary & primary::TSC_OFFSETTING != 0 {
            self.put(vmcs02, Field::TscOffset, offset);
        }
        if merged & secondary::TSC_SCALING != 0 {
            self.put(vmcs02, Field::TscMultiplier, multiplier);
        }
    }

    /// The exception bitmap, and which page faults it means. When the embedder wants page faults too, all of them exit
    /// and the routing applies L1's mask and match.
    fn load_exceptions<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        let bitmap = own.exceptions | self.vmcs12.get32(Field::ExceptionBitmap);
        let (mask, matching) = if self.own_takes_page_faults() {
            (0, 0)
        } else {
            (self.vmcs12.get32(Field::PageFaultErrorCodeMask), self.vmcs12.get32(Field::PageFaultErrorCodeMatch))
        };
        let bitmap = if self.own_takes_page_faults() { bitmap | PF } else { bitmap };
        self.put(vmcs02, Field::ExceptionBitmap, bitmap.into());
        self.put(vmcs02, Field::PageFaultErrorCodeMask, mask.into());
        self.put(vmcs02, Field::PageFaultErrorCodeMatch, matching.into());
    }

    /// True when the embedder's exception bitmap, mask and match let any page fault exit.
    pub(crate) fn own_takes_page_faults(&self) -> bool {
        let own = self.own_known();
        // With bit 14 clear a fault exits that does not match: none if everything matches.
        own.exceptions & PF != 0 || own.pf_mask != 0 || own.pf_match != 0
    }

    /// True when the embedder's exception bitmap wants an exception.
    pub(crate) fn own_takes(&self, vector: u32, error_code: u32) -> bool {
        let own = self.own_known();
        let bit = own.exceptions >> (vector & 31) & 1 != 0;
        if vector & 31 == 14 { (error_code & own.pf_mask == own.pf_match) == bit } else { bit }
    }

    /// Fields that are the same for every L2.
    fn load_fixed<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) {
        self.put(vmcs02, Field::VmcsLinkPointer, u64::MAX);
        for field in [Field::ExitMsrStoreCount, Field::ExitMsrLoadCount, Field::EntryMsrLoadCount] {
            // L1's lists are executed in software; the embedder switches its own MSRs itself.
            self.put(vmcs02, field, 0);
        }
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

/// `value` times `multiplier` with 48 fraction bits.
const fn scale(value: u64, multiplier: u64) -> u64 {
    ((value as u128).wrapping_mul(multiplier as u128) >> 48) as u64
}

/// The same for a signed value, rounded towards zero.
const fn scale_signed(value: u64, multiplier: u64) -> u64 {
    if (value as i64) < 0 { scale(value.wrapping_neg(), multiplier).wrapping_neg() } else { scale(value, multiplier) }
}
