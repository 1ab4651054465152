//! What an embedder registers, and which sets of it cannot work.
//!
//! Used by the embedder; `leaves` derives the CPUID leaves from it.

use crate::hypercall::Offer;
use tlfs_abi::cpuid::{HardwareEax, RecommendationsEax, SPIN_RETRIES_NEVER};
use tlfs_abi::evmcs::EVMCS_VERSION;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::vp_set::MAX_VP_INDEX;

/// Whose virtualization extensions the partition sees: decides the hypercall instruction and the nested features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// VMX: VMCALL, enlightened VMCS.
    Intel,
    /// SVM: VMMCALL, enlightened VMCB fields.
    Amd,
}

/// The version in leaf 0x40000002.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Version {
    /// Major version.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// Build number.
    pub build: u32,
}

/// Which versions of the enlightened VMCS are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvmcsVersions {
    /// Lowest.
    pub low: u8,
    /// Highest.
    pub high: u8,
}

/// The enlightenments that a nested-virtualization engine implements; the engine exports its set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NestedCapabilities {
    /// The enlightened VMCS (Intel).
    pub evmcs: Option<EvmcsVersions>,
    /// Direct flush: L2's flush calls are done by L0.
    pub direct_flush: bool,
    /// The enlightened MSR bitmap.
    pub msr_bitmap: bool,
    /// GuestPerfGlobalCtrl and HostPerfGlobalCtrl of the enlightened VMCS (Intel).
    pub perf_global_ctrl: bool,
    /// A non-zero GuestIa32DebugCtl of the enlightened VMCS (Intel).
    pub nonzero_debug_ctl: bool,
    /// EnlightenedNptTlb of the VMCB (AMD).
    pub npt_tlb: bool,
}

impl NestedCapabilities {
    /// No enlightenment.
    pub const NONE: Self = Self {
        evmcs: None,
        direct_flush: false,
        msr_bitmap: false,
        perf_global_ctrl: false,
        nonzero_debug_ctl: false,
        npt_tlb: false,
    };
}

/// Parameters of the reference TSC page: time = (tsc * scale >> 64) + offset, in 100 ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReferenceTsc {
    /// Multiplier as a fraction of 2^64.
    pub scale: u64,
    /// Offset in 100 ns.
    pub offset: i64,
}

/// A set of registered capabilities that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// No VP, or more than 4,096.
    VpCount,
    /// Guest physical addresses of fewer than 20 or more than 52 bits.
    GpaBits,
    /// A call is offered without this one, which the same CPUID bit advertises or which it extends.
    MissingCall(CallCode),
    /// A spin retry count without HvCallNotifyLongSpinWait, or 0, which no guest understands.
    SpinRetries,
    /// Recommendation bits that come from registered capabilities, are reserved, or lack theirs.
    Recommendations(u32),
    /// The reference TSC page without the reference counter that guests fall back to.
    ReferenceTscWithoutCounter,
    /// Enlightened VMCS or one of its features on AMD.
    EvmcsOnAmd,
    /// Enlightened NPT TLB on Intel.
    NptTlbOnIntel,
    /// Versions of the enlightened VMCS that do not exist.
    EvmcsVersion,
    /// A feature of the enlightened VMCS without it; on Intel, direct flush and enlightened MSR bitmap are such.
    WithoutEvmcs,
    /// Direct flush or enlightened VMCS without the VP assist page.
    WithoutAssistPage,
}

/// What one partition is offered, registered piece by piece.
#[derive(Clone, Copy, Debug)]
pub struct PartitionConfig {
    pub(super) vendor: Vendor,
    pub(super) max_vps: u32,
    pub(super) gpa_bits: u8,
    pub(super) codes: &'static [CallCode],
    pub(super) version: Version,
    pub(super) logical_processors: u32,
    pub(super) hardware: u32,
    pub(super) recommendations: u32,
    pub(super) spin_retries: u32,
    pub(super) xmm_input: bool,
    pub(super) xmm_output: bool,
    pub(super) reference_counter: bool,
    pub(super) reference_tsc: Option<ReferenceTsc>,
    pub(super) frequencies: Option<(u64, u64)>,
    pub(super) apic_msrs: bool,
    pub(super) crash: Option<bool>,
    pub(super) reset: bool,
    pub(super) reenlightenment: bool,
    pub(super) nested_root: bool,
    pub(super) nested: NestedCapabilities,
}

/// Recommendations that need nothing of the host, or whose capability is checked: APIC MSRs, reset MSR, relaxed
/// timing, no AutoEOI, nested in a Hyper-V partition, CR4.PGE for local flushes, no core sharing.
const RECOMMENDABLE: u32 = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 17 | 1 << 18;

impl PartitionConfig {
    /// A partition of up to `max_vps` VPs (1 to 4,096) with guest physical addresses of `gpa_bits` bits (20 to 52).
    /// It has the hypercall MSRs and VP_INDEX, which "Hv#1" implies, and nothing else.
    pub const fn new(vendor: Vendor, max_vps: u32, gpa_bits: u8) -> Self {
        Self {
            vendor,
            max_vps,
            gpa_bits,
            codes: &[],
            version: Version { major: 10, minor: 0, build: 0 },
            logical_processors: 0,
            hardware: 0,
            recommendations: 0,
            spin_retries: SPIN_RETRIES_NEVER,
            xmm_input: false,
            xmm_output: false,
            reference_counter: false,
            reference_tsc: None,
            frequencies: None,
            apic_msrs: false,
            crash: None,
            reset: false,
            reenlightenment: false,
            nested_root: false,
            nested: NestedCapabilities::NONE,
        }
    }

    /// The hypercalls that `H` dispatches.
    pub const fn offer<H: Offer + ?Sized>(self) -> Self {
        self.hypercalls(H::CODES)
    }

    /// The hypercalls in this list; [`offer`](Self::offer) takes it from the dispatcher itself.
    pub const fn hypercalls(mut self, codes: &'static [CallCode]) -> Self {
        self.codes = codes;
        self
    }

    /// What leaf 0x40000002 says.
    pub const fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// How many logical processors leaf 0x40000005 reports; 0, the default, reports none.
    pub const fn logical_processors(mut self, count: u32) -> Self {
        self.logical_processors = count;
        self
    }

    /// Hardware features in use, as leaf 0x40000006 reports them.
    pub fn hardware(mut self, features: HardwareEax) -> Self {
        self.hardware = features.raw();
        self
    }

    /// Recommendations that no other method implies: [`ConfigError::Recommendations`] for others.
    pub fn recommend(mut self, bits: RecommendationsEax) -> Self {
        self.recommendations = bits.raw();
        self
    }

    /// After how many spins a guest calls HvCallNotifyLongSpinWait.
    pub const fn spin_retries(mut self, count: u32) -> Self {
        self.spin_retries = count;
        self
    }

    /// The embedder's [`Registers`](crate::hypercall::Registers) hold the caller's XMM registers.
    pub const fn xmm_input(mut self) -> Self {
        self.xmm_input = true;
        self
    }

    /// The embedder's [`Registers`](crate::hypercall::Registers) write the caller's XMM registers.
    pub const fn xmm_output(mut self) -> Self {
        self.xmm_output = true;
        self
    }

    /// The embedder passes its reference time, in 100 ns, to [`super::Interface::msr_read`].
    pub const fn reference_counter(mut self) -> Self {
        self.reference_counter = true;
        self
    }

    /// The reference TSC page, with its parameters on this host.
    pub const fn reference_tsc(mut self, parameters: ReferenceTsc) -> Self {
        self.reference_tsc = Some(parameters);
        self
    }

    /// The frequencies of the TSC and of the APIC timer in Hz.
    pub const fn frequencies(mut self, tsc: u64, apic: u64) -> Self {
        self.frequencies = Some((tsc, apic));
        self
    }

    /// The embedder performs EOI, ICR and TPR accesses. The VP assist page comes with them: one privilege covers both.
    pub const fn apic_msrs(mut self) -> Self {
        self.apic_msrs = true;
        self
    }

    /// The embedder logs crash parameters, and with `messages` also a crash message.
    pub const fn crash(mut self, messages: bool) -> Self {
        self.crash = Some(messages);
        self
    }

    /// The embedder resets the partition when told to.
    pub const fn reset(mut self) -> Self {
        self.reset = true;
        self
    }

    /// The embedder calls [`super::Interface::migrated`] after a migration, and can emulate the TSC.
    pub const fn reenlightenment(mut self) -> Self {
        self.reenlightenment = true;
        self
    }

    /// A nested hypervisor's root may call this host with bit 31 of the input value, and read its VP index here.
    pub const fn nested_root(mut self) -> Self {
        self.nested_root = true;
        self
    }

    /// The enlightenments of the nested-virtualization engine in use.
    pub const fn nested(mut self, capabilities: NestedCapabilities) -> Self {
        self.nested = capabilities;
        self
    }

    /// Checks that the set is one that can be offered.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.max_vps == 0 || self.max_vps > MAX_VP_INDEX {
            return Err(ConfigError::VpCount);
        }
        if !(20..=52).contains(&self.gpa_bits) {
            return Err(ConfigError::GpaBits);
        }
        self.check_calls()?;
        if self.spin_retries == 0 || (self.spin_retries != SPIN_RETRIES_NEVER && !self.has_spin_wait()) {
            return Err(ConfigError::SpinRetries);
        }
        self.check_recommendations()?;
        if self.reference_tsc.is_some() && !self.reference_counter {
            return Err(ConfigError::ReferenceTscWithoutCounter);
        }
        self.check_nested()
    }

    pub(super) fn has(&self, code: CallCode) -> bool {
        self.codes.contains(&code)
    }

    fn has_spin_wait(&self) -> bool {
        self.has(CallCode::NOTIFY_LONG_SPIN_WAIT)
    }

    pub(super) fn has_ex_masks(&self) -> bool {
        self.has(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX) || self.has(CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX)
    }

    /// Calls that one CPUID bit advertises come together.
    fn check_calls(&self) -> Result<(), ConfigError> {
        use CallCode as C;
        let needs = [
            (C::FLUSH_VIRTUAL_ADDRESS_SPACE, C::FLUSH_VIRTUAL_ADDRESS_LIST),
            (C::FLUSH_VIRTUAL_ADDRESS_LIST, C::FLUSH_VIRTUAL_ADDRESS_SPACE),
            (C::FLUSH_VIRTUAL_ADDRESS_SPACE_EX, C::FLUSH_VIRTUAL_ADDRESS_LIST_EX),
            (C::FLUSH_VIRTUAL_ADDRESS_LIST_EX, C::FLUSH_VIRTUAL_ADDRESS_SPACE_EX),
            (C::FLUSH_VIRTUAL_ADDRESS_SPACE_EX, C::FLUSH_VIRTUAL_ADDRESS_SPACE),
            (C::SEND_SYNTHETIC_CLUSTER_IPI_EX, C::SEND_SYNTHETIC_CLUSTER_IPI),
            (C::GET_VP_REGISTERS, C::SET_VP_REGISTERS),
            (C::SET_VP_REGISTERS, C::GET_VP_REGISTERS),
            (C::START_VIRTUAL_PROCESSOR, C::GET_VP_INDEX_FROM_APIC_ID),
            (C::GET_VP_INDEX_FROM_APIC_ID, C::START_VIRTUAL_PROCESSOR),
            (C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE, C::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST),
            (C::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST, C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE),
        ];
        for (code, needed) in needs {
            self.require(self.has(code), needed)?;
        }
        // One bit says that all calls with processor masks have Ex forms.
        let ex = self.has_ex_masks();
        self.require(ex && self.has(C::FLUSH_VIRTUAL_ADDRESS_SPACE), C::FLUSH_VIRTUAL_ADDRESS_SPACE_EX)?;
        self.require(ex && self.has(C::SEND_SYNTHETIC_CLUSTER_IPI), C::SEND_SYNTHETIC_CLUSTER_IPI_EX)?;
        let extended = self.codes.iter().any(|code| code.0 >= 0x8000);
        self.require(extended, C::EXT_QUERY_CAPABILITIES)?;
        self.require(self.nested.direct_flush, C::FLUSH_VIRTUAL_ADDRESS_SPACE)?;
        self.require(self.nested.npt_tlb, C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE)
    }

    fn require(&self, condition: bool, needed: CallCode) -> Result<(), ConfigError> {
        if condition && !self.has(needed) { Err(ConfigError::MissingCall(needed)) } else { Ok(()) }
    }

    fn check_recommendations(&self) -> Result<(), ConfigError> {
        let mut unfounded = self.recommendations & !RECOMMENDABLE;
        let recommended = RecommendationsEax::new(self.recommendations);
        if recommended.msrs_for_apic() && !self.apic_msrs {
            unfounded |= 1 << 3;
        }
        if recommended.msr_for_reset() && !self.reset {
            unfounded |= 1 << 4;
        }
        if unfounded != 0 { Err(ConfigError::Recommendations(unfounded)) } else { Ok(()) }
    }

    fn check_nested(&self) -> Result<(), ConfigError> {
        let nested = &self.nested;
        let of_evmcs = nested.perf_global_ctrl || nested.nonzero_debug_ctl;
        match self.vendor {
            Vendor::Amd if nested.evmcs.is_some() || of_evmcs => return Err(ConfigError::EvmcsOnAmd),
            Vendor::Intel if nested.npt_tlb => return Err(ConfigError::NptTlbOnIntel),
            Vendor::Intel if nested.evmcs.is_none() && (of_evmcs || nested.direct_flush || nested.msr_bitmap) => {
                return Err(ConfigError::WithoutEvmcs);
            }
            _ => {}
        }
        if let Some(EvmcsVersions { low, high }) = nested.evmcs {
            // Version 1 is the only one, so both ends of the range are 1.
            if u32::from(low) != EVMCS_VERSION || u32::from(high) != EVMCS_VERSION {
                return Err(ConfigError::EvmcsVersion);
            }
        }
        if (nested.direct_flush || nested.evmcs.is_some()) && !self.apic_msrs {
            return Err(ConfigError::WithoutAssistPage);
        }
        Ok(())
    }
}
