//! What the processor has, what L1 is offered, and the capability MSRs that say so (SDM volume 3, appendix A).
//!
//! Built once by the embedder; read by the state machine and the entry checks. An impossible offer is an error here,
//! not a surprise later. Uses the field and control tables.

mod host;
pub mod table;

use crate::bits::cr0;
use crate::controls::{entry, exit, pin, primary, secondary};
use crate::field::Field;
use crate::vmcs12::{REGION_SIZE, REVISION};
pub use host::Host;

/// IA32_VMX_MISC bits (appendix A.6).
pub mod misc {
    /// Bits 4:0: the preemption timer counts down when this bit of the TSC changes.
    pub const TIMER_SHIFT: u64 = 0x1F;
    /// VM exits store IA32_EFER.LMA in the "IA-32e mode guest" control.
    pub const STORES_LMA: u64 = 1 << 5;
    /// Activity state HLT.
    pub const HLT: u64 = 1 << 6;
    /// Activity state shutdown.
    pub const SHUTDOWN: u64 = 1 << 7;
    /// Activity state wait-for-SIPI.
    pub const WAIT_FOR_SIPI: u64 = 1 << 8;
    /// Bits 24:16: number of CR3-target values.
    pub const CR3_TARGETS: u64 = 0x1FF << 16;
    /// VMWRITE may write every supported field.
    pub const VMWRITE_ANY: u64 = 1 << 29;
    /// Software events may be injected with instruction length 0.
    pub const LENGTH_0: u64 = 1 << 30;
}

/// IA32_VMX_EPT_VPID_CAP bits (appendix A.10).
pub mod ept_vpid {
    /// Execute-only translations.
    pub const EXECUTE_ONLY: u64 = 1;
    /// Page-walk length 4.
    pub const WALK_4: u64 = 1 << 6;
    /// EPT paging structures in uncacheable memory.
    pub const UC: u64 = 1 << 8;
    /// EPT paging structures in write-back memory.
    pub const WB: u64 = 1 << 14;
    /// 2 MiB pages.
    pub const PAGES_2M: u64 = 1 << 16;
    /// 1 GiB pages.
    pub const PAGES_1G: u64 = 1 << 17;
    /// INVEPT.
    pub const INVEPT: u64 = 1 << 20;
    /// Accessed and dirty flags.
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    /// Advanced information in the exit qualification of EPT violations.
    pub const ADVANCED: u64 = 1 << 22;
    /// INVEPT, single context.
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    /// INVEPT, all contexts.
    pub const INVEPT_ALL: u64 = 1 << 26;
    /// INVVPID.
    pub const INVVPID: u64 = 1 << 32;
    /// INVVPID, individual address.
    pub const INVVPID_ADDRESS: u64 = 1 << 40;
    /// INVVPID, single context.
    pub const INVVPID_SINGLE: u64 = 1 << 41;
    /// INVVPID, all contexts.
    pub const INVVPID_ALL: u64 = 1 << 42;
    /// INVVPID, single context retaining globals.
    pub const INVVPID_GLOBALS: u64 = 1 << 43;

    /// What counts only with "enable EPT".
    pub const OF_EPT: u64 = EMULATED_EPT | EXECUTE_ONLY | ADVANCED;
    /// What counts only with "enable VPID".
    pub const OF_VPID: u64 = INVVPID | INVVPID_ADDRESS | INVVPID_SINGLE | INVVPID_ALL | INVVPID_GLOBALS;
    /// Of EPT, what the shadow tables do on every processor that has EPT.
    pub const EMULATED_EPT: u64 =
        WALK_4 | UC | WB | PAGES_2M | PAGES_1G | INVEPT | ACCESSED_DIRTY | INVEPT_SINGLE | INVEPT_ALL;
}

/// The settings of a control field: bits that must be 1 and bits that may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Must be 1 (the allowed 0-settings).
    pub required: u32,
    /// May be 1 (the allowed 1-settings).
    pub allowed: u32,
}

impl Allowed {
    /// From a capability MSR.
    #[inline]
    pub const fn from_msr(value: u64) -> Self {
        Self { required: value as u32, allowed: (value >> 32) as u32 }
    }

    /// As a capability MSR.
    #[inline]
    pub const fn msr(self) -> u64 {
        self.required as u64 | (self.allowed as u64) << 32
    }

    /// True when `value` has every required and no forbidden bit.
    #[inline]
    pub const fn permits(self, value: u32) -> bool {
        (value & self.required) ^ self.required | value & !self.allowed == 0
    }
}

/// Bits that are reserved and 1 in every control field, with the "true" capability MSRs (appendix A.3 to A.5).
mod default1 {
    pub const PIN: u32 = 0x16;
    pub const PRIMARY: u32 = 0x0400_6172;
    pub const EXIT: u32 = 0x0003_6DFB;
    pub const ENTRY: u32 = 0x0000_11FB;
    /// The default1 bits that only the true MSRs let be 0: CR3-load and -store exiting, save and load debug controls.
    pub const OLD_PRIMARY: u32 = 0x0401_E172;
    pub const OLD_EXIT: u32 = 0x0003_6DFF;
    pub const OLD_ENTRY: u32 = 0x0000_11FF;
}

/// A set of controls and features to offer; [`Offer::all`] is everything, from which bits may be cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Pin-based controls that may be 1.
    pub pin: u32,
    /// Primary processor-based controls that may be 1.
    pub primary: u32,
    /// Secondary processor-based controls that may be 1.
    pub secondary: u32,
    /// VM-exit controls that may be 1.
    pub exit: u32,
    /// VM-entry controls that may be 1.
    pub entry: u32,
    /// [`ept_vpid`] bits. Those of EPT and VPID count only where the control is offered.
    pub ept_vpid: u64,
    /// VM functions, IA32_VMX_VMFUNC: bit 0, EPTP switching.
    pub vmfunc: u64,
    /// L1 may use the enlightened VMCS, version 1.
    pub enlightened: bool,
}

impl Offer {
    /// Everything that can be offered on `host`. With `enlightened`, only what the enlightened VMCS can carry;
    /// `perf_global_ctrl` says that CPUID 0x4000_000A EBX bit 0 (its IA32_PERF_GLOBAL_CTRL fields) is set, too.
    pub fn all(host: &Host, enlightened: bool, perf_global_ctrl: bool) -> Self {
        let all = Self {
            pin: table::possible(table::PIN, host.pin.allowed),
            primary: table::possible(table::PRIMARY, host.primary.allowed),
            secondary: table::possible(table::SECONDARY, host.secondary),
            exit: table::possible(table::EXIT, host.exit.allowed),
            entry: table::possible(table::ENTRY, host.entry.allowed),
            ept_vpid: host.ept_vpid & (ept_vpid::EXECUTE_ONLY | ept_vpid::ADVANCED)
                | ept_vpid::EMULATED_EPT
                | ept_vpid::OF_VPID,
            vmfunc: host.vmfunc & 1,
            enlightened,
        };
        if !enlightened {
            return all;
        }
        let (exits, entries) = match perf_global_ctrl {
            true => (0, 0),
            false => (exit::LOAD_PERF_GLOBAL_CTRL, entry::LOAD_PERF_GLOBAL_CTRL),
        };
        let carried = all.carried();
        Self { exit: carried.exit & !exits, entry: carried.entry & !entries, ..carried }
    }

    /// This offer, without what the enlightened VMCS cannot carry.
    pub fn carried(&self) -> Self {
        let secondary = self.secondary & table::carried(table::SECONDARY);
        Self {
            pin: self.pin & table::carried(table::PIN),
            primary: self.primary & table::carried(table::PRIMARY),
            secondary,
            exit: self.exit & table::carried(table::EXIT),
            entry: self.entry & table::carried(table::ENTRY),
            vmfunc: if secondary & secondary::VM_FUNCTIONS != 0 { self.vmfunc } else { 0 },
            ..*self
        }
    }

    /// The bits of each field that are here and not in `other`.
    const fn beyond(&self, other: &Self) -> Option<ConfigError> {
        let (control, bits) = match () {
            () if self.pin & !other.pin != 0 => (Group::Pin, self.pin & !other.pin),
            () if self.primary & !other.primary != 0 => (Group::Primary, self.primary & !other.primary),
            () if self.secondary & !other.secondary != 0 => (Group::Secondary, self.secondary & !other.secondary),
            () if self.exit & !other.exit != 0 => (Group::Exit, self.exit & !other.exit),
            () if self.entry & !other.entry != 0 => (Group::Entry, self.entry & !other.entry),
            () if self.ept_vpid & !other.ept_vpid != 0 => {
                return Some(ConfigError::EptVpid(self.ept_vpid & !other.ept_vpid));
            }
            () if self.vmfunc & !other.vmfunc != 0 => return Some(ConfigError::VmFunctions),
            () => return None,
        };
        Some(ConfigError::NotPossible(control, bits))
    }
}

/// A field of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Pin-based VM-execution controls.
    Pin,
    /// Primary processor-based VM-execution controls.
    Primary,
    /// Secondary processor-based VM-execution controls.
    Secondary,
    /// VM-exit controls.
    Exit,
    /// VM-entry controls.
    Entry,
}

/// Controls of one field.
pub type Bits = (Group, u32);

/// Why an offer is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// The processor has no EPT with 4 levels in write-back memory; the library needs it for L1.
    NoEpt,
    /// The processor has no MSR bitmaps or no secondary controls; the library needs them.
    TooOld,
    /// These controls are neither in the processor nor emulated.
    NotPossible(Group, u32),
    /// The enlightened VMCS cannot carry these controls.
    NotCarried(Group, u32),
    /// These bits of IA32_VMX_EPT_VPID_CAP are neither in the processor nor emulated.
    EptVpid(u64),
    /// A VM function is offered that the processor lacks, or functions without the control or the reverse.
    VmFunctions,
    /// The first control is of no use without the second.
    Needs(Bits, Bits),
    /// A control that is used needs this bit of IA32_VMX_EPT_VPID_CAP.
    NeedsEptVpid(u64),
    /// The processor requires a control that cannot be offered to be 1.
    Required(Group, u32),
    /// Physical addresses are 32 to 52 bits wide, linear ones 48 or 57.
    AddressWidth,
    /// CR4.VMXE is not among the bits that a guest may set.
    NoVmxe,
}

/// Controls that are refused without another (SDM volume 3, "VM-Execution Control Fields", "VM-Exit Control Fields").
const NEEDS: &[(Bits, Bits)] = &[
    ((Group::Pin, pin::VIRTUAL_NMIS), (Group::Pin, pin::NMI_EXITING)),
    ((Group::Primary, primary::NMI_WINDOW_EXITING), (Group::Pin, pin::VIRTUAL_NMIS)),
    ((Group::Secondary, u32::MAX), (Group::Primary, primary::SECONDARY_CONTROLS)),
    ((Group::Secondary, secondary::UNRESTRICTED_GUEST), (Group::Secondary, secondary::EPT)),
    ((Group::Secondary, secondary::VM_FUNCTIONS), (Group::Secondary, secondary::EPT)),
    ((Group::Secondary, secondary::PML), (Group::Secondary, secondary::EPT)),
    ((Group::Secondary, secondary::VIRTUALIZE_X2APIC_MODE), (Group::Primary, primary::TPR_SHADOW)),
    ((Group::Secondary, secondary::APIC_REGISTER_VIRTUALIZATION), (Group::Primary, primary::TPR_SHADOW)),
    ((Group::Secondary, secondary::VIRTUAL_INTERRUPT_DELIVERY), (Group::Primary, primary::TPR_SHADOW)),
    ((Group::Secondary, secondary::VIRTUAL_INTERRUPT_DELIVERY), (Group::Pin, pin::EXTERNAL_INTERRUPT_EXITING)),
    ((Group::Exit, exit::SAVE_PREEMPTION_TIMER), (Group::Pin, pin::PREEMPTION_TIMER)),
];

/// What one L1 is offered.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub(crate) pin: Allowed,
    pub(crate) primary: Allowed,
    pub(crate) secondary: Allowed,
    pub(crate) exit: Allowed,
    pub(crate) entry: Allowed,
    misc: u64,
    pub(crate) ept_vpid: u64,
    pub(crate) vmfunc: u64,
    pub(crate) host: Host,
    enlightened: bool,
}

impl Config {
    /// Offers `offer` to L1 on `host`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new(host: Host, offer: Offer) -> Result<Self, ConfigError> {
        host.check()?;
        if let Some(error) = offer.beyond(&Offer::all(&host, false, true)) {
            return Err(error);
        }
        if offer.enlightened
            && let Some(error) = offer.beyond(&offer.carried())
        {
            return Err(match error {
                ConfigError::NotPossible(group, bits) => ConfigError::NotCarried(group, bits),
                other => other,
            });
        }
        needs(&offer)?;
        let mut bits = offer.ept_vpid;
        if offer.secondary & secondary::EPT == 0 {
            bits &= !ept_vpid::OF_EPT;
        }
        if offer.secondary & secondary::VPID == 0 {
            bits &= !ept_vpid::OF_VPID;
        }
        Ok(Self {
            pin: allowed(Group::Pin, default1::PIN | host.pin.required, offer.pin)?,
            primary: allowed(Group::Primary, default1::PRIMARY | host.primary.required, offer.primary)?,
            secondary: Allowed { required: 0, allowed: offer.secondary },
            exit: allowed(Group::Exit, default1::EXIT | host.exit.required, offer.exit)?,
            entry: allowed(Group::Entry, default1::ENTRY | host.entry.required, offer.entry)?,
            misc: misc(&host, offer.enlightened),
            ept_vpid: bits,
            vmfunc: offer.vmfunc,
            host,
            enlightened: offer.enlightened,
        })
    }

    /// Everything that `host` and the library can offer; see [`Offer::all`].
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn all(host: Host, enlightened: bool, perf_global_ctrl: bool) -> Result<Self, ConfigError> {
        Self::new(host, Offer::all(&host, enlightened, perf_global_ctrl))
    }

    /// RDMSR of a VMX capability MSR, 0x480 to 0x493, by L1; `None` for one that L1 has not: #GP(0).
    pub fn read(&self, msr: u32) -> Option<u64> {
        let old = |controls: Allowed, default1| Allowed { required: controls.required | default1, ..controls }.msr();
        let has_secondary = self.primary.allowed & primary::SECONDARY_CONTROLS != 0;
        let ept_or_vpid = self.secondary.allowed & (secondary::EPT | secondary::VPID) != 0;
        match msr {
            0x480 => Some(self.basic()),
            0x481 => Some(self.pin.msr()),
            0x482 => Some(old(self.primary, default1::OLD_PRIMARY)),
            0x483 => Some(old(self.exit, default1::OLD_EXIT)),
            0x484 => Some(old(self.entry, default1::OLD_ENTRY)),
            0x485 => Some(self.misc),
            0x486 => Some(self.host.cr0_fixed0),
            0x487 => Some(self.host.cr0_fixed1),
            0x488 => Some(self.host.cr4_fixed0),
            0x489 => Some(self.host.cr4_fixed1),
            0x48A => Some((Field::HIGHEST_INDEX as u64) << 1),
            0x48B if has_secondary => Some(self.secondary.msr()),
            0x48C if ept_or_vpid => Some(self.ept_vpid),
            0x48D => Some(self.pin.msr()),
            0x48E => Some(self.primary.msr()),
            0x48F => Some(self.exit.msr()),
            0x490 => Some(self.entry.msr()),
            0x491 if self.secondary.allowed & secondary::VM_FUNCTIONS != 0 => Some(self.vmfunc),
            _ => None,
        }
    }

    /// IA32_VMX_BASIC: write-back memory, information on INS and OUTS as the processor gives it, true controls.
    const fn basic(&self) -> u64 {
        REVISION as u64 | (REGION_SIZE as u64) << 32 | 6 << 50 | self.host.basic & 1 << 54 | 1 << 55
    }

    /// IA32_VMX_MISC.
    #[inline]
    pub const fn misc(&self) -> u64 {
        self.misc
    }

    /// Number of CR3-target values that L1 may use.
    #[inline]
    pub const fn cr3_targets(&self) -> u64 {
        (self.misc & misc::CR3_TARGETS) >> 16
    }

    /// Pin-based VM-execution controls.
    #[inline]
    pub const fn pin(&self) -> Allowed {
        self.pin
    }

    /// Primary processor-based VM-execution controls.
    #[inline]
    pub const fn primary(&self) -> Allowed {
        self.primary
    }

    /// Secondary processor-based VM-execution controls.
    #[inline]
    pub const fn secondary(&self) -> Allowed {
        self.secondary
    }

    /// VM-exit controls.
    #[inline]
    pub const fn exit(&self) -> Allowed {
        self.exit
    }

    /// VM-entry controls.
    #[inline]
    pub const fn entry(&self) -> Allowed {
        self.entry
    }

    /// IA32_VMX_EPT_VPID_CAP: see [`ept_vpid`].
    #[inline]
    pub const fn ept_vpid(&self) -> u64 {
        self.ept_vpid
    }

    /// IA32_VMX_VMFUNC.
    #[inline]
    pub const fn vmfunc(&self) -> u64 {
        self.vmfunc
    }

    /// The processor, as the embedder gave it.
    #[inline]
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// True when L1 may use the enlightened VMCS.
    #[inline]
    pub const fn enlightened(&self) -> bool {
        self.enlightened
    }

    /// True when `address` lies within the physical addresses that L1 is shown.
    #[inline]
    pub const fn legal_gpa(&self, address: u64) -> bool {
        address >> (self.host.phys_bits & 63) == 0
    }

    /// True when `address` is canonical for the processor's linear-address width.
    #[inline]
    pub const fn canonical(&self, address: u64) -> bool {
        let unused = 64u8.wrapping_sub(self.host.linear_bits) as u32;
        ((address as i64).wrapping_shl(unused).wrapping_shr(unused)) as u64 == address
    }

    /// True for a CR0 that VMX operation allows; an unrestricted guest's may have PE and PG clear.
    #[inline]
    pub const fn allows_cr0(&self, value: u64, unrestricted: bool) -> bool {
        let exempt = if unrestricted { cr0::PE | cr0::PG } else { 0 };
        let required = self.host.cr0_fixed0 & !exempt;
        (value & required) ^ required | value & !self.host.cr0_fixed1 == 0
    }

    /// True for a CR4 that VMX operation allows.
    #[inline]
    pub const fn allows_cr4(&self, cr4: u64) -> bool {
        let required = self.host.cr4_fixed0;
        (cr4 & required) ^ required | cr4 & !self.host.cr4_fixed1 == 0
    }
}

fn allowed(group: Group, required: u32, offered: u32) -> Result<Allowed, ConfigError> {
    let default1 = match group {
        Group::Pin => default1::PIN,
        Group::Primary => default1::PRIMARY,
        Group::Secondary => 0,
        Group::Exit => default1::EXIT,
        Group::Entry => default1::ENTRY,
    };
    match required & !(default1 | offered) {
        0 => Ok(Allowed { required, allowed: required | offered }),
        bits => Err(ConfigError::Required(group, bits)),
    }
}

fn needs(offer: &Offer) -> Result<(), ConfigError> {
    let bits = |group| match group {
        Group::Pin => offer.pin,
        Group::Primary => offer.primary,
        Group::Secondary => offer.secondary,
        Group::Exit => offer.exit,
        Group::Entry => offer.entry,
    };
    for (control, other) in NEEDS {
        if bits(control.0) & control.1 != 0 && bits(other.0) & other.1 == 0 {
            return Err(ConfigError::Needs(*control, *other));
        }
    }
    let has = |control| offer.secondary & control != 0;
    for (control, bit) in [
        (secondary::EPT, ept_vpid::WALK_4),
        (secondary::EPT, ept_vpid::WB),
        (secondary::EPT, ept_vpid::INVEPT),
        (secondary::VPID, ept_vpid::INVVPID),
        (secondary::PML, ept_vpid::ACCESSED_DIRTY),
    ] {
        if has(control) && offer.ept_vpid & bit == 0 {
            return Err(ConfigError::NeedsEptVpid(bit));
        }
    }
    if has(secondary::VM_FUNCTIONS) != (offer.vmfunc != 0) {
        return Err(ConfigError::VmFunctions);
    }
    Ok(())
}

/// IA32_VMX_MISC for L1.
const fn misc(host: &Host, enlightened: bool) -> u64 {
    // Without a timer in hardware any rate will do: every 32 ticks.
    let shift = if host.pin.allowed & pin::PREEMPTION_TIMER != 0 { host.misc & misc::TIMER_SHIFT } else { 5 };
    // There are four fields; the enlightened VMCS carries none of them.
    let most = if enlightened { 0 } else { 4 << 16 };
    let targets = match host.misc & misc::CR3_TARGETS {
        fewer if fewer < most => fewer,
        _ => most,
    };
    let kept = misc::STORES_LMA | misc::HLT | misc::SHUTDOWN | misc::WAIT_FOR_SIPI | misc::LENGTH_0;
    shift | host.misc & kept | targets | misc::VMWRITE_ANY
}
