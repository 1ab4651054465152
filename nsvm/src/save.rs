//! The nested state of a VP as a versioned structure: saved at any point between two entries, restored on any machine
//! with the same offer to L1.
//!
//! It holds L1's and L2's registers as well, so after [`NestedSvm::restore`] both VMCBs are complete except for the
//! embedder's own controls in VMCB01. Hardware tags are not saved: a restored VP starts with fresh ones, so every
//! flush that was pending is done. Restoring trusts nothing: what a guest or a hostile file could have put there is
//! checked as at VMRUN.

use hvcore::addr::Level;
use hvcore::memory::GuestMemory;
use static_assertions::const_assert_eq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::caps::{Config, Features};
use crate::check::{self, Refusal};
use crate::events::Events;
use crate::machine::Machine;
use crate::msr::TSC_RATIO_RESERVED;
use crate::state::{Context, NestedSvm};
use crate::vmcb::bits::{Event, TSC_RATIO_ONE, efer, int_ctl, int_state, np, tlb};
use crate::vmcb::{Control, EnlightenedVmcbFields, Save, Vmcb};

/// Version of [`SavedState`].
pub const VERSION: u32 = 2;

/// Bits of [`SavedState::flags`].
mod flag {
    pub const SVME: u32 = 1;
    pub const GIF: u32 = 1 << 1;
    pub const IN_L2: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const INIT: u32 = 1 << 4;
    pub const INTERRUPT: u32 = 1 << 5;
    pub const NMI_BLOCKED: u32 = 1 << 6;
    pub const ALL: u32 = 0x7F;
}

/// What one VMCB adds to its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedLevel {
    /// Registers.
    pub save: Save,
    /// EVENTINJ: what the next entry injects.
    pub event_inj: u64,
    /// EXITINTINFO of an exit that is not dealt with.
    pub exit_int_info: u64,
    /// EXITCODE, EXITINFO1 and EXITINFO2 of the last exit.
    pub exit: [u64; 3],
    /// Interrupt shadow, bit 0.
    pub int_state: u64,
    /// V_TPR, bits 7:0.
    pub tpr: u64,
}

/// The nested state of one VP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedState {
    /// [`VERSION`].
    pub version: u32,
    /// Bit 0 EFER.SVME of L1, 1 GIF, 2 L2 runs, 3 NMI pending, 4 INIT pending, 5 interrupt pending (vector below),
    /// 6 NMIs blocked.
    pub flags: u32,
    /// Vector of the pending interrupt.
    pub vector: u32,
    /// Zero.
    pub reserved: u32,
    /// VM_CR.
    pub vm_cr: u64,
    /// VM_HSAVE_PA.
    pub hsave_pa: u64,
    /// TSC_RATIO.
    pub tsc_ratio: u64,
    /// L1 GPA of the VMCB that L2 runs on, 0 while L1 runs.
    pub vmcb12: u64,
    /// The event that L1's VMRUN injected and that may be injected again.
    pub injected: u64,
    /// L1's control area, unsupported bits cleared, interrupt control brought up to date.
    pub control: Control,
    /// The enlightened fields, of the context that is retained even while L1 runs.
    pub enlightenments: EnlightenedVmcbFields,
    /// L1.
    pub l1: SavedLevel,
    /// L2; of no meaning while L1 runs.
    pub l2: SavedLevel,
}

const_assert_eq!(size_of::<SavedLevel>(), 0x298 + 56);
const_assert_eq!(size_of::<SavedState>(), 56 + 0xE0 + 0x20 + 2 * (0x298 + 56));

/// Why a state cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// Another version.
    Version,
    /// Undefined flags, a non-zero reserved field, or flags that exclude each other.
    Flags,
    /// VM_CR, VM_HSAVE_PA or TSC_RATIO hold what WRMSR would refuse.
    Msr,
    /// The VMCB's address is none.
    VmcbAddress,
    /// L1's control area has what L1 is not offered.
    Controls,
    /// The enlightened fields, which L1 is not offered.
    Enlightenments,
    /// A consistency check of VMRUN fails for L2.
    L2(Refusal),
    /// A consistency check fails for L1's registers.
    L1(Refusal),
    /// An event that cannot be injected.
    Event,
}

impl NestedSvm {
    /// The state as it is now. Call it before [`prepare_entry`](Self::prepare_entry), not after. VMCB01's intercepts are
    /// the embedder's own then, and the VP may go on.
    pub fn save(&mut self, vmcb01: &mut Vmcb, vmcb02: &mut Vmcb) -> SavedState {
        // A step of the library's own is no guest state.
        let vmcb = match self.level {
            Level::L1 => &mut *vmcb01,
            Level::L2 => &mut *vmcb02,
        };
        self.cancel_step(vmcb);
        self.settle_blocking(vmcb);
        if self.level == Level::L2 {
            self.settle_vnmi(vmcb);
        }
        self.unwatch_l1(vmcb01);
        let (nmi, init, interrupt, blocked) = self.events.parts();
        let mut flags = 0;
        for (set, bit) in [
            (self.svme, flag::SVME),
            (self.gif, flag::GIF),
            (self.level == Level::L2, flag::IN_L2),
            (nmi, flag::NMI),
            (init, flag::INIT),
            (interrupt.is_some(), flag::INTERRUPT),
            (blocked, flag::NMI_BLOCKED),
        ] {
            if set {
                flags |= bit;
            }
        }
        let vmcb12 = if self.level == Level::L2 { self.vmcb12.unwrap_or_default() } else { 0 };
        SavedState {
            version: VERSION,
            flags,
            vector: interrupt.unwrap_or_default().into(),
            reserved: 0,
            vm_cr: self.vm_cr,
            hsave_pa: self.hsave_pa,
            tsc_ratio: self.tsc_ratio,
            vmcb12,
            injected: self.injected,
            control: self.control,
            enlightenments: self.enlightenments,
            l1: SavedLevel::of(vmcb01),
            l2: SavedLevel::of(vmcb02),
        }
    }

    /// The VP that `saved` describes. `m` gets both VMCBs' registers and all of VMCB02; VMCB01's controls are the
    /// embedder's and must be set before.
    ///
    /// With L2 running and nested paging on, the embedder puts the root of a shadow page table in VMCB02 as after
    /// [`crate::L1Exit::EnterL2`].
    ///
    /// # Errors
    /// See [`RestoreError`]. `m` is as it was.
    pub fn restore<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        config: Config,
        saved: &SavedState,
        m: &mut Machine<'_, G, M, C>,
    ) -> Result<Self, RestoreError> {
        validate(&config, saved)?;
        let mut nested = Self::new(config, &mut m.msrpm02, &mut m.iopm02);
        let has = |bit| saved.flags & bit != 0;
        nested.svme = has(flag::SVME);
        nested.gif = has(flag::GIF);
        nested.vm_cr = saved.vm_cr;
        nested.hsave_pa = saved.hsave_pa;
        nested.tsc_ratio = saved.tsc_ratio;
        let interrupt = has(flag::INTERRUPT).then_some(saved.vector as u8);
        nested.events = Events::from_parts(has(flag::NMI), has(flag::INIT), interrupt, has(flag::NMI_BLOCKED));
        nested.control = saved.control;
        nested.enlightenments = saved.enlightenments;
        nested.context = Context {
            asid: saved.control.asid,
            n_cr3: (saved.control.np_control & np::ENABLE != 0).then_some(saved.control.n_cr3),
            vm_id: saved.enlightenments.vm_id,
            vp_id: saved.enlightenments.vp_id,
        };
        saved.l1.put(m.vmcb01);
        if has(flag::IN_L2) {
            nested.level = Level::L2;
            nested.vmcb12 = Some(saved.vmcb12);
            nested.memory_stale = true;
            nested.load_control(m);
            nested.merge_maps(m, 0);
            saved.l2.put(m.vmcb02);
            nested.injected = saved.injected;
        }
        Ok(nested)
    }
}

impl SavedLevel {
    fn of(vmcb: &Vmcb) -> Self {
        let control = &vmcb.control;
        Self {
            save: vmcb.save,
            event_inj: control.event_inj,
            exit_int_info: control.exit_int_info,
            exit: [control.exit_code, control.exit_info_1, control.exit_info_2],
            int_state: control.int_state & int_state::SHADOW,
            tpr: control.int_ctl & int_ctl::V_TPR,
        }
    }

    fn put(&self, vmcb: &mut Vmcb) {
        vmcb.save = self.save;
        let control = &mut vmcb.control;
        control.event_inj = self.event_inj;
        control.exit_int_info = self.exit_int_info;
        [control.exit_code, control.exit_info_1, control.exit_info_2] = self.exit;
        control.int_state = self.int_state;
        control.int_ctl = control.int_ctl & !int_ctl::V_TPR | self.tpr;
        control.tlb_control = tlb::NONE;
    }

    /// Checks what any level may hold: its events and small fields.
    fn check(&self) -> Result<(), RestoreError> {
        for raw in [self.event_inj, self.exit_int_info] {
            let event = Event::from_raw(raw).corrected();
            if event.is_valid() && !check::event_is_possible(event, &self.save) {
                return Err(RestoreError::Event);
            }
        }
        if self.event_inj & !Event::DEFINED != 0 || self.int_state & !int_state::SHADOW != 0 || self.tpr > 0xFF {
            return Err(RestoreError::Controls);
        }
        Ok(())
    }
}

fn validate(config: &Config, saved: &SavedState) -> Result<(), RestoreError> {
    if saved.version != VERSION {
        return Err(RestoreError::Version);
    }
    let in_l2 = saved.flags & flag::IN_L2 != 0;
    let impossible = in_l2 && saved.flags & flag::SVME == 0;
    if saved.flags & !flag::ALL != 0 || saved.reserved != 0 || saved.vector > 0xFF || impossible {
        return Err(RestoreError::Flags);
    }
    if saved.vm_cr & !0x1F != 0 || saved.hsave_pa & 0xFFF != 0 || !config.legal_gpa(saved.hsave_pa) {
        return Err(RestoreError::Msr);
    }
    let scalable = config.offered.has(Features::TSC_RATE) && saved.tsc_ratio & TSC_RATIO_RESERVED == 0;
    if saved.tsc_ratio != TSC_RATIO_ONE && !scalable {
        return Err(RestoreError::Msr);
    }
    if saved.vmcb12 & 0xFFF != 0 || !config.legal_gpa(saved.vmcb12) || (!in_l2 && saved.vmcb12 != 0) {
        return Err(RestoreError::VmcbAddress);
    }
    if !config.enlightened && saved.enlightenments != EnlightenedVmcbFields::default() {
        return Err(RestoreError::Enlightenments);
    }
    // VMCB01 always has SVME set; the rest of the rules are those of any state that VMRUN loads.
    if saved.l1.save.efer & efer::SVME == 0 {
        return Err(RestoreError::L1(Refusal::Svme));
    }
    check::save(config, &saved.l1.save).map_err(RestoreError::L1)?;
    // Both run under nested paging of the embedder's, so their PATs count even where L1 has no nested paging.
    if !check::pat_is_valid(saved.l1.save.g_pat) {
        return Err(RestoreError::L1(Refusal::GuestPat));
    }
    saved.l1.check()?;
    if in_l2 {
        let mut control = saved.control;
        crate::vmrun::sanitize(config, &mut control);
        if control != saved.control {
            return Err(RestoreError::Controls);
        }
        check::control(config, &saved.control, &saved.l2.save, saved.l1.save.cr0).map_err(RestoreError::L2)?;
        check::save(config, &saved.l2.save).map_err(RestoreError::L2)?;
        if !check::pat_is_valid(saved.l2.save.g_pat) {
            return Err(RestoreError::L2(Refusal::GuestPat));
        }
        saved.l2.check()?;
    }
    Ok(())
}
