//! The nested state of a VP as a versioned structure: saved at any point between two entries, restored on any machine
//! with the same offer to L1.
//!
//! It holds L1's and L2's registers as far as a VMCS does, so after [`NestedVmx::restore`] both VMCSs are complete
//! except for the embedder's own controls in VMCS01. General-purpose registers, CR2, the other debug registers, MSRs
//! that no VMCS holds and extended state are the embedder's to save. Hardware tags are not saved: a restored VP starts
//! with fresh ones, so every flush that was pending is done. Restoring trusts nothing: what a guest or a hostile file
//! could have put there is checked as at VMPTRLD and VMLAUNCH.

use hvcore::addr::{L1Gpa, Level};
use hvcore::memory::GuestMemory;
use static_assertions::const_assert_eq;
use tlfs_abi::evmcs::EvmcsEnlightenmentsControl;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::bits::{efer, interruption};
use crate::caps::Config;
use crate::check::{self, Refusal, Root};
use crate::controls::{entry, pin, primary, secondary};
use crate::events::Injection;
use crate::evmcs::Enlightenments;
use crate::exit_reason;
use crate::field::{Area, Field};
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr::feature_control;
use crate::msr_list::Msrs;
use crate::state::{Context, Current, NestedVmx};
use crate::vmcs12::{LaunchState, REVISION, Vmcs12};

/// Version of [`SavedState`]. It changes with the structure, and with the table of VMCS fields.
pub const VERSION: u32 = 1;

/// Number of guest-state fields.
pub const GUEST_FIELDS: usize = {
    let (mut count, mut rest) = (0usize, Field::ALL);
    while let [field, tail @ ..] = rest {
        if matches!(field.area(), Area::Guest) {
            count = count.wrapping_add(1);
        }
        rest = tail;
    }
    count
};

/// The guest-state fields in slot order.
pub const GUEST: [Field; GUEST_FIELDS] = {
    let mut fields = [Field::GuestRip; GUEST_FIELDS];
    let mut to: &mut [Field] = &mut fields;
    let mut rest = Field::ALL;
    while let [field, tail @ ..] = rest {
        if matches!(field.area(), Area::Guest)
            && let [slot, more @ ..] = to
        {
            *slot = *field;
            to = more;
        }
        rest = tail;
    }
    fields
};

/// Bits of [`SavedState::flags`].
pub mod flag {
    /// L1 is in VMX operation.
    pub const VMXON: u32 = 1;
    /// A plain VMCS is current.
    pub const CURRENT: u32 = 1 << 1;
    /// An enlightened VMCS is active.
    pub const ENLIGHTENED: u32 = 1 << 2;
    /// L2 runs.
    pub const IN_L2: u32 = 1 << 3;
    /// L1 has executed VMLAUNCH or VMRESUME and L2 has not run since.
    pub const RUN_PENDING: u32 = 1 << 4;
    /// An NMI is pending for L1.
    pub const NMI: u32 = 1 << 5;
    /// An INIT is pending for L1.
    pub const INIT: u32 = 1 << 6;
    /// A start-up IPI is pending for L1.
    pub const SIPI: u32 = 1 << 7;
    /// An interrupt is pending for L1.
    pub const INTERRUPT: u32 = 1 << 8;
    /// L2's IRET ended NMI blocking, and faulted.
    pub const NMI_UNBLOCKED: u32 = 1 << 9;
    /// L1's preemption timer runs.
    pub const TIMER: u32 = 1 << 10;
    /// With [`RUN_PENDING`]: the instruction was VMLAUNCH.
    pub const LAUNCHING: u32 = 1 << 11;
    /// All of them.
    pub const ALL: u32 = 0xFFF;
}

/// An event that the next entry injects: VM-entry interruption information, error code, instruction length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedEvent {
    /// VM-entry interruption information; zero without an event.
    pub info: u32,
    /// Error code, where the information says that there is one.
    pub error_code: u32,
    /// Instruction length, for software events.
    pub length: u32,
}

/// The registers of one level as its hardware VMCS has them.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedLevel {
    /// The guest-state fields in the order of [`GUEST`]; VMCS link pointer, PML index, SMBASE and preemption timer are
    /// zero and not used.
    pub guest: [u64; GUEST_FIELDS],
    /// CR0 and CR4 read shadow.
    pub shadows: [u64; 2],
}

/// The nested state of one VP.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedState {
    /// [`VERSION`].
    pub version: u32,
    /// See [`flag`].
    pub flags: u32,
    /// Vector of the pending start-up IPI, bits 7:0, and of the pending interrupt, bits 15:8.
    pub vectors: u32,
    /// What is left of L1's preemption timer.
    pub timer: u32,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// VMXON pointer, zero outside VMX operation.
    pub vmxon: u64,
    /// Address of the current or enlightened VMCS, zero when there is none.
    pub current: u64,
    /// VmId of the enlightened VMCS.
    pub vm_id: u64,
    /// PartitionAssistPage of the enlightened VMCS.
    pub partition_assist_page: u64,
    /// VpId of the enlightened VMCS.
    pub vp_id: u32,
    /// EnlightenmentsControl of the enlightened VMCS.
    pub enlightenments_control: u32,
    /// What the next entry of L1 injects.
    pub event1: SavedEvent,
    /// What the next entry of L2 injects.
    pub event2: SavedEvent,
    /// L1.
    pub l1: SavedLevel,
    /// L2; zero while L1 runs.
    pub l2: SavedLevel,
    /// L0's copy of the current VMCS; zero when there is none.
    pub vmcs12: Vmcs12,
}

const_assert_eq!(size_of::<SavedLevel>(), size_of::<[u64; GUEST_FIELDS]>().wrapping_add(16));
const_assert_eq!(core::mem::offset_of!(SavedState, l1), 88);
const_assert_eq!(core::mem::offset_of!(SavedState, l2), size_of::<SavedLevel>().wrapping_add(88));
const_assert_eq!(core::mem::offset_of!(SavedState, vmcs12), size_of::<[SavedLevel; 2]>().wrapping_add(88));

/// Why a state cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// Another version.
    Version,
    /// Undefined flags, flags that exclude each other, or values without their flag.
    Flags,
    /// IA32_FEATURE_CONTROL holds what WRMSR would refuse, or does not allow VMX operation.
    FeatureControl,
    /// The VMXON pointer is none.
    VmxonPointer,
    /// The address of the current VMCS is none.
    CurrentPointer,
    /// The enlightened VMCS, which L1 is not offered.
    Enlightened,
    /// The VMCS has a revision identifier, a launch state or bits of fields that it cannot have.
    Vmcs12,
    /// A check of VM entries fails for L2.
    L2(Refusal),
    /// A check of VM entries fails for L1's registers.
    L1(check::Guest),
    /// An event that cannot be injected.
    Event,
}

/// Guest-state fields that are the embedder's, or kept elsewhere.
const NOT_SAVED: [Field; 4] = [Field::VmcsLinkPointer, Field::PmlIndex, Field::GuestSmbase, Field::PreemptionTimer];

impl SavedEvent {
    fn of(event: &Injection) -> Self {
        Self { info: event.info, error_code: event.error_code, length: event.length }
    }

    fn injection(&self) -> Option<Injection> {
        (self.info != 0).then_some(Injection { info: self.info, error_code: self.error_code, length: self.length })
    }

    /// Puts the event in the fields that a VM entry takes it from.
    fn put(&self, mut write: impl FnMut(Field, u64)) {
        write(Field::EntryInterruptionInfo, self.info.into());
        write(Field::EntryExceptionErrorCode, self.error_code.into());
        write(Field::EntryInstructionLength, self.length.into());
    }
}

impl SavedLevel {
    fn of<V: Vmcs + ?Sized>(vmcs: &V) -> Self {
        Self {
            guest: GUEST.map(|field| if NOT_SAVED.contains(&field) { 0 } else { vmcs.read(field) }),
            shadows: [vmcs.read(Field::Cr0ReadShadow), vmcs.read(Field::Cr4ReadShadow)],
        }
    }

    /// The saved fields that belong to the level itself.
    fn fields(&self) -> impl Iterator<Item = (Field, u64)> {
        GUEST.into_iter().zip(self.guest).filter(|(field, _)| !NOT_SAVED.contains(field))
    }

    fn get(&self, field: Field) -> u64 {
        self.fields().find(|(each, _)| *each == field).map_or(0, |(_, value)| value)
    }

    fn long_mode(&self) -> bool {
        self.get(Field::GuestEfer) & efer::LMA != 0
    }

    /// `vmcs` with this level's registers, and what goes with them at an entry.
    fn image(&self, mut vmcs: Vmcs12, event: &SavedEvent) -> Vmcs12 {
        for (field, value) in self.fields() {
            vmcs.set(field, value);
        }
        let mode = if self.long_mode() { entry::IA32E_MODE_GUEST } else { 0 };
        let entries = vmcs.get32(Field::EntryControls) & !entry::IA32E_MODE_GUEST | mode;
        vmcs.set(Field::EntryControls, entries.into());
        event.put(|field, value| vmcs.set(field, value));
        vmcs
    }
}

impl NestedVmx {
    /// The state as it is now. Call it before [`prepare_entry`](Self::prepare_entry), not after.
    pub fn save<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> SavedState
    where
        V: Vmcs + ?Sized,
        G: ?Sized,
        M: ?Sized,
        L: ?Sized,
    {
        self.fetch_all(m.vmcs02);
        let in_l2 = self.level == Level::L2;
        let run_pending = in_l2 && self.l2.events.run_pending;
        let timer = self.timer_left(m.vmcs02).filter(|_| in_l2);
        let (nmi, init, sipi, interrupt) = self.l2.events.parts();
        let mut flags = 0;
        for (set, bit) in [
            (self.vmxon.is_some(), flag::VMXON),
            (matches!(self.current, Current::Plain(_)), flag::CURRENT),
            (matches!(self.current, Current::Enlightened(_)), flag::ENLIGHTENED),
            (in_l2, flag::IN_L2),
            (run_pending, flag::RUN_PENDING),
            (run_pending && m.vmcs01.read32(Field::ExitReason) == exit_reason::VMLAUNCH, flag::LAUNCHING),
            (nmi, flag::NMI),
            (init, flag::INIT),
            (sipi.is_some(), flag::SIPI),
            (interrupt.is_some(), flag::INTERRUPT),
            (in_l2 && self.l2.events.nmi_unblocked, flag::NMI_UNBLOCKED),
            (timer.is_some(), flag::TIMER),
        ] {
            if set {
                flags |= bit;
            }
        }
        let current = match self.current {
            Current::None => 0,
            Current::Plain(gpa) | Current::Enlightened(gpa) => gpa.raw(),
        };
        let hv = self.evmcs.enlightenments();
        let has_current = self.current != Current::None;
        let event2 = self.l2.events.injection.filter(|_| in_l2);
        SavedState {
            version: VERSION,
            flags,
            vectors: u32::from(sipi.unwrap_or_default()) | u32::from(interrupt.unwrap_or_default()) << 8,
            timer: timer.unwrap_or_default(),
            feature_control: self.feature_control,
            vmxon: self.vmxon.map_or(0, L1Gpa::raw),
            current,
            vm_id: hv.vm_id,
            partition_assist_page: hv.partition_assist_page,
            vp_id: hv.vp_id,
            enlightenments_control: hv.control.raw(),
            event1: event_of(m.vmcs01),
            event2: event2.as_ref().map(SavedEvent::of).unwrap_or_default(),
            l1: SavedLevel::of(m.vmcs01),
            l2: if in_l2 { SavedLevel::of(m.vmcs02) } else { SavedLevel::new_zeroed() },
            vmcs12: if has_current { self.vmcs12.clone() } else { Vmcs12::new_zeroed() },
        }
    }

    /// The VP that `saved` describes. `m` gets the registers of both VMCSs and all of VMCS02; VMCS01's controls are the
    /// embedder's and must be set before.
    ///
    /// With L2 running and EPT, the embedder puts the root of a shadow page table in VMCS02 as after
    /// [`crate::L1Exit::EnterL2`].
    ///
    /// L2's registers of a VM entry that has not happened yet may be ones that the processor would refuse. Then the
    /// entry fails here: L1 runs, and is told so.
    ///
    /// # Errors
    /// See [`RestoreError`]. `m` is as it was.
    pub fn restore<V, G, M, L>(
        config: Config,
        saved: &SavedState,
        m: &mut Machine<'_, V, G, M, L>,
    ) -> Result<Self, RestoreError>
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let refused = validate(&config, saved, m.memory)?;
        let mut nested = Self::new(config, &mut m.msr_bitmap02, &mut m.io_bitmaps02);
        let has = |bit| saved.flags & bit != 0;
        nested.feature_control = saved.feature_control;
        nested.vmxon = has(flag::VMXON).then_some(L1Gpa::new(saved.vmxon));
        let gpa = L1Gpa::new(saved.current);
        let enlightenments = Enlightenments {
            control: EvmcsEnlightenmentsControl::new(saved.enlightenments_control),
            vp_id: saved.vp_id,
            vm_id: saved.vm_id,
            partition_assist_page: saved.partition_assist_page,
        };
        if has(flag::CURRENT) {
            nested.current = Current::Plain(gpa);
        } else if has(flag::ENLIGHTENED) {
            nested.current = Current::Enlightened(gpa);
            nested.evmcs.restore(gpa, enlightenments);
        }
        if nested.current != Current::None {
            nested.vmcs12 = saved.vmcs12.clone();
        }
        let [sipi, interrupt, ..] = saved.vectors.to_le_bytes();
        let events = &mut nested.l2.events;
        let (sipi, interrupt) = (has(flag::SIPI).then_some(sipi), has(flag::INTERRUPT).then_some(interrupt));
        events.set_parts(has(flag::NMI), has(flag::INIT), sipi, interrupt);
        saved.l1.put_l1(m.vmcs01);
        saved.event1.put(|field, value| m.vmcs01.write(field, value));
        if has(flag::IN_L2) {
            nested.restore_l2(saved, m);
        }
        if let Some(refusal) = refused {
            if has(flag::LAUNCHING) {
                nested.vmcs12.set_launch_state(LaunchState::Clear);
            }
            nested.last_refusal = Some(Refusal::Guest(refusal));
            let _ = nested.refuse(m, exit_reason::INVALID_GUEST_STATE, refusal.qualification());
        }
        Ok(nested)
    }

    fn restore_l2<V, G, M, L>(&mut self, saved: &SavedState, m: &mut Machine<'_, V, G, M, L>)
    where
        V: Vmcs + ?Sized,
        G: ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let own = self.own(m.vmcs01);
        self.restore_context();
        let inherited = self.inherit(m.vmcs01);
        self.load_vmcs02(m, &own, &inherited);
        let cache = &mut self.l2.cache;
        for (field, value) in saved.l2.fields() {
            let value = match field {
                Field::GuestCr0 => value & !own.cr0_mask | own.cr0,
                Field::GuestCr4 => value & !own.cr4_mask | own.cr4,
                _ => value,
            };
            cache.write(m.vmcs02, field, value);
        }
        for (field, value) in [Field::Cr0ReadShadow, Field::Cr4ReadShadow].into_iter().zip(saved.l2.shadows) {
            cache.write(m.vmcs02, field, value);
        }
        let mode = if saved.l2.long_mode() { entry::IA32E_MODE_GUEST } else { 0 };
        let entries = cache.read(m.vmcs02, Field::EntryControls) & !u64::from(entry::IA32E_MODE_GUEST);
        cache.write(m.vmcs02, Field::EntryControls, entries | u64::from(mode));
        let timer = (saved.flags & flag::TIMER != 0).then_some(saved.timer);
        self.set_timer(m.vmcs02, timer);
        let events = &mut self.l2.events;
        events.injection = saved.event2.injection();
        events.run_pending = saved.flags & flag::RUN_PENDING != 0;
        events.nmi_unblocked = saved.flags & flag::NMI_UNBLOCKED != 0;
        self.level = Level::L2;
    }

    /// The context of the VMCS12 and the enlightened fields.
    fn restore_context(&mut self) {
        let hv = self.evmcs.enlightenments();
        let vpid = if self.has12(secondary::VPID) { self.vmcs12.get(Field::VirtualProcessorId) as u16 } else { 0 };
        self.context = Context {
            vpid,
            eptp: self.has12(secondary::EPT).then(|| self.vmcs12.get(Field::EptPointer)),
            vm_id: hv.vm_id,
            vp_id: hv.vp_id,
        };
    }

    /// What is left of L1's preemption timer, `None` when it is off.
    fn timer_left<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) -> Option<u32> {
        self.release_timer(vmcs02);
        if !self.pin12(pin::PREEMPTION_TIMER) {
            return None;
        }
        Some(match self.l2.timer.left() {
            Some(left) => left,
            None => vmcs02.read32(Field::PreemptionTimer),
        })
    }

    fn set_timer<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, left: Option<u32>) {
        self.l2.timer.start(left);
        if let Some(left) = left
            && self.l2.timer.in_hardware()
        {
            self.l2.cache.write(vmcs02, Field::PreemptionTimer, left.into());
        }
    }
}

impl SavedLevel {
    /// Puts L1's registers in VMCS01: bits of CR0 and CR4 that the embedder masks stay as it needs them.
    fn put_l1<V: Vmcs + ?Sized>(&self, vmcs01: &mut V) {
        for (field, value) in self.fields() {
            let masked = match field {
                Field::GuestCr0 => vmcs01.read(Field::Cr0Mask),
                Field::GuestCr4 => vmcs01.read(Field::Cr4Mask),
                _ => 0,
            };
            let kept = if masked != 0 { vmcs01.read(field) & masked } else { 0 };
            vmcs01.write(field, value & !masked | kept);
        }
        for (field, value) in [Field::Cr0ReadShadow, Field::Cr4ReadShadow].into_iter().zip(self.shadows) {
            vmcs01.write(field, value);
        }
        let mode = if self.long_mode() { entry::IA32E_MODE_GUEST } else { 0 };
        let entries = vmcs01.read32(Field::EntryControls) & !entry::IA32E_MODE_GUEST | mode;
        vmcs01.write(Field::EntryControls, entries.into());
    }
}

/// The event that the next entry with `vmcs` injects.
fn event_of<V: Vmcs + ?Sized>(vmcs: &V) -> SavedEvent {
    let info = vmcs.read32(Field::EntryInterruptionInfo);
    if info & interruption::VALID == 0 {
        return SavedEvent::default();
    }
    SavedEvent {
        info,
        error_code: vmcs.read32(Field::EntryExceptionErrorCode),
        length: vmcs.read32(Field::EntryInstructionLength),
    }
}

/// Checks everything. The refusal of a VM entry that has not happened yet.
fn validate<M: GuestMemory + ?Sized>(
    config: &Config,
    saved: &SavedState,
    memory: &M,
) -> Result<Option<check::Guest>, RestoreError> {
    if saved.version != VERSION {
        return Err(RestoreError::Version);
    }
    flags(saved)?;
    let value = saved.feature_control;
    let vmxon = saved.flags & flag::VMXON != 0;
    if value & !feature_control::ENABLED != 0 || (vmxon && !feature_control::allows_vmxon(value)) {
        return Err(RestoreError::FeatureControl);
    }
    let legal = |address: u64| address & 0xFFF == 0 && config.legal_gpa(address);
    if !legal(saved.vmxon) {
        return Err(RestoreError::VmxonPointer);
    }
    let plain = saved.flags & flag::CURRENT != 0;
    let has_current = saved.flags & (flag::CURRENT | flag::ENLIGHTENED) != 0;
    if !legal(saved.current) || (plain && saved.current == saved.vmxon) {
        return Err(RestoreError::CurrentPointer);
    }
    if saved.flags & flag::ENLIGHTENED != 0 && !config.enlightened() {
        return Err(RestoreError::Enlightened);
    }
    level1(config, saved, memory)?;
    if has_current {
        let mut vmcs = saved.vmcs12.clone();
        vmcs.sanitize();
        if vmcs != saved.vmcs12 || vmcs.revision != REVISION || !vmcs.launch_state_is_defined() {
            return Err(RestoreError::Vmcs12);
        }
    }
    if saved.flags & flag::IN_L2 != 0 { level2(config, saved, memory) } else { Ok(None) }
}

/// Flags, and values whose flag is clear.
fn flags(saved: &SavedState) -> Result<(), RestoreError> {
    let has = |bit| saved.flags & bit != 0;
    let (current, enlightened, in_l2) = (has(flag::CURRENT), has(flag::ENLIGHTENED), has(flag::IN_L2));
    let only_in_l2 = flag::RUN_PENDING | flag::NMI_UNBLOCKED | flag::TIMER | flag::LAUNCHING;
    let synthetic = (saved.vm_id, saved.partition_assist_page, saved.vp_id, saved.enlightenments_control);
    let [sipi, interrupt, rest @ ..] = saved.vectors.to_le_bytes();
    let ok = saved.flags & !flag::ALL == 0
        && !(current && enlightened)
        && (has(flag::VMXON) || !(current || enlightened || saved.vmxon != 0))
        && (current || enlightened || !(in_l2 || saved.current != 0))
        && (in_l2 || !(has(only_in_l2) || saved.event2 != SavedEvent::default()))
        && (enlightened || synthetic == (0, 0, 0, 0))
        && (has(flag::SIPI) || sipi == 0)
        && (has(flag::INTERRUPT) || interrupt == 0)
        && rest == [0, 0]
        && (has(flag::RUN_PENDING) || !has(flag::LAUNCHING))
        && (has(flag::TIMER) || saved.timer == 0);
    if ok { Ok(()) } else { Err(RestoreError::Flags) }
}

/// L1's registers pass the checks of a VM entry with unrestricted guest.
fn level1<M: GuestMemory + ?Sized>(config: &Config, saved: &SavedState, memory: &M) -> Result<(), RestoreError> {
    let mut vmcs = Vmcs12::default();
    vmcs.set(Field::PrimaryControls, primary::SECONDARY_CONTROLS.into());
    vmcs.set(Field::SecondaryControls, (secondary::EPT | secondary::UNRESTRICTED_GUEST).into());
    vmcs.set(Field::EntryControls, (entry::LOAD_EFER | entry::LOAD_DEBUG_CONTROLS | entry::LOAD_PAT).into());
    vmcs.set(Field::VmcsLinkPointer, u64::MAX);
    let vmcs = saved.l1.image(vmcs, &saved.event1);
    let root = Root { long_mode: true, current: L1Gpa::new(0) };
    check::event(&vmcs, config).map_err(|_| RestoreError::Event)?;
    check::guest(&vmcs, config, root, memory).map_err(RestoreError::L1)?;
    Ok(())
}

/// L1's VMCS passes the checks of VMLAUNCH, and L2's registers those of a VM entry.
fn level2<M: GuestMemory + ?Sized>(
    config: &Config,
    saved: &SavedState,
    memory: &M,
) -> Result<Option<check::Guest>, RestoreError> {
    let root = Root { long_mode: saved.l1.long_mode(), current: L1Gpa::new(saved.current) };
    let wrong = RestoreError::L2;
    // The event that L1 injected has had its turn.
    let mut vmcs = saved.vmcs12.clone();
    vmcs.set(Field::EntryInterruptionInfo, 0);
    check::controls(&vmcs, config, memory).map_err(|error| wrong(Refusal::Controls(error)))?;
    check::host(&vmcs, config, root).map_err(|error| wrong(Refusal::Host(error)))?;
    let vmcs = saved.l2.image(vmcs, &saved.event2);
    check::event(&vmcs, config).map_err(|_| RestoreError::Event)?;
    match check::guest(&vmcs, config, root, memory) {
        Err(refusal) if saved.flags & flag::RUN_PENDING != 0 => Ok(Some(refusal)),
        Err(refusal) => Err(wrong(Refusal::Guest(refusal))),
        Ok(_) => Ok(None),
    }
}
