//! The synthetic MSRs: numbers and layouts (TLFS: "Hypercall Interface", "Virtual Processor Properties", "Timers",
//! "Partition Properties", "Inter-Partition Communication", "Nested Virtualization").
//!
//! Used by the partition interface and the client; uses nothing.

macro_rules! msrs {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = $number;)*

        /// The TLFS's name of the MSR, when this crate knows it.
        pub const fn name(msr: u32) -> Option<&'static str> {
            match msr {
                $($number => Some($text),)*
                _ => None,
            }
        }

        /// Every synthetic MSR that this crate knows.
        pub const ALL: &[u32] = &[$($number),*];
    };
}

msrs! {
    /// Guest OS identity. Partition-wide.
    GUEST_OS_ID = 0x4000_0000, "HV_X64_MSR_GUEST_OS_ID";
    /// Hypercall page: [`PageMsr`] with lock bit. Partition-wide.
    HYPERCALL = 0x4000_0001, "HV_X64_MSR_HYPERCALL";
    /// VP index. Read-only.
    VP_INDEX = 0x4000_0002, "HV_X64_MSR_VP_INDEX";
    /// System reset: [`ResetMsr`]. Partition-wide.
    RESET = 0x4000_0003, "HV_X64_MSR_RESET";
    /// Run time of the VP in 100 ns. Read-only.
    VP_RUNTIME = 0x4000_0010, "HV_X64_MSR_VP_RUNTIME";
    /// Reference counter in 100 ns. Read-only, partition-wide.
    TIME_REF_COUNT = 0x4000_0020, "HV_X64_MSR_TIME_REF_COUNT";
    /// Reference TSC page: [`PageMsr`]. Partition-wide.
    REFERENCE_TSC = 0x4000_0021, "HV_X64_MSR_REFERENCE_TSC";
    /// TSC frequency in Hz. Read-only.
    TSC_FREQUENCY = 0x4000_0022, "HV_X64_MSR_TSC_FREQUENCY";
    /// Frequency of the APIC timer in Hz. Read-only.
    APIC_FREQUENCY = 0x4000_0023, "HV_X64_MSR_APIC_FREQUENCY";
    /// NPIEP configuration.
    NPIEP_CONFIG = 0x4000_0040, "HV_X64_MSR_NPIEP_CONFIG";
    /// EOI. Write-only, bits 63:32 zero.
    EOI = 0x4000_0070, "HV_X64_MSR_EOI";
    /// Both halves of the interrupt command register.
    ICR = 0x4000_0071, "HV_X64_MSR_ICR";
    /// Task priority, bits 63:8 zero.
    TPR = 0x4000_0072, "HV_X64_MSR_TPR";
    /// VP assist page: [`PageMsr`].
    VP_ASSIST_PAGE = 0x4000_0073, "HV_X64_MSR_VP_ASSIST_PAGE";
    /// SynIC control: bit 0 enable.
    SCONTROL = 0x4000_0080, "HV_X64_MSR_SCONTROL";
    /// SynIC version. Read-only.
    SVERSION = 0x4000_0081, "HV_X64_MSR_SVERSION";
    /// Event flags page: [`PageMsr`].
    SIEFP = 0x4000_0082, "HV_X64_MSR_SIEFP";
    /// Message page: [`PageMsr`].
    SIMP = 0x4000_0083, "HV_X64_MSR_SIMP";
    /// End of message.
    EOM = 0x4000_0084, "HV_X64_MSR_EOM";
    /// First of 16 synthetic interrupt sources: [`SintMsr`].
    SINT0 = 0x4000_0090, "HV_X64_MSR_SINT0";
    /// Last synthetic interrupt source.
    SINT15 = 0x4000_009F, "HV_X64_MSR_SINT15";
    /// Configuration of synthetic timer 0; the four timers have two MSRs each.
    STIMER0_CONFIG = 0x4000_00B0, "HV_X64_MSR_STIMER0_CONFIG";
    /// Count of synthetic timer 0.
    STIMER0_COUNT = 0x4000_00B1, "HV_X64_MSR_STIMER0_COUNT";
    /// Configuration of synthetic timer 3.
    STIMER3_CONFIG = 0x4000_00B6, "HV_X64_MSR_STIMER3_CONFIG";
    /// Count of synthetic timer 3.
    STIMER3_COUNT = 0x4000_00B7, "HV_X64_MSR_STIMER3_COUNT";
    /// A read enters the guest idle state.
    GUEST_IDLE = 0x4000_00F0, "HV_X64_MSR_GUEST_IDLE";
    /// First of five crash parameters. Partition-wide.
    CRASH_P0 = 0x4000_0100, "HV_X64_MSR_CRASH_P0";
    /// Second crash parameter.
    CRASH_P1 = 0x4000_0101, "HV_X64_MSR_CRASH_P1";
    /// Third crash parameter.
    CRASH_P2 = 0x4000_0102, "HV_X64_MSR_CRASH_P2";
    /// Fourth crash parameter: GPA of the message.
    CRASH_P3 = 0x4000_0103, "HV_X64_MSR_CRASH_P3";
    /// Fifth crash parameter: length of the message in bytes, at most 4,096.
    CRASH_P4 = 0x4000_0104, "HV_X64_MSR_CRASH_P4";
    /// Crash control: [`CrashControl`].
    CRASH_CTL = 0x4000_0105, "HV_X64_MSR_CRASH_CTL";
    /// Re-enlightenment after migration: [`ReenlightenmentControl`]. Partition-wide.
    REENLIGHTENMENT_CONTROL = 0x4000_0106, "HV_X64_MSR_REENLIGHTENMENT_CONTROL";
    /// TSC emulation opt-in: bit 0. Partition-wide.
    TSC_EMULATION_CONTROL = 0x4000_0107, "HV_X64_MSR_TSC_EMULATION_CONTROL";
    /// TSC emulation in progress: bit 0. Partition-wide.
    TSC_EMULATION_STATUS = 0x4000_0108, "HV_X64_MSR_TSC_EMULATION_STATUS";
    /// Time-unhalted timer: vector 7:0, enable 8.
    STIME_UNHALTED_TIMER_CONFIG = 0x4000_0114, "HV_X64_MSR_STIME_UNHALTED_TIMER_CONFIG";
    /// Time-unhalted timer: period in 100 ns.
    STIME_UNHALTED_TIMER_COUNT = 0x4000_0115, "HV_X64_MSR_STIME_UNHALTED_TIMER_COUNT";
    /// VP index of the underlying VP, for a nested root. Read-only.
    NESTED_VP_INDEX = 0x4000_1002, "HV_X64_MSR_NESTED_VP_INDEX";
    /// SCONTROL of the L0.
    NESTED_SCONTROL = 0x4000_1080, "HV_X64_MSR_NESTED_SCONTROL";
    /// SVERSION of the L0.
    NESTED_SVERSION = 0x4000_1081, "HV_X64_MSR_NESTED_SVERSION";
    /// SIEFP of the L0.
    NESTED_SIEFP = 0x4000_1082, "HV_X64_MSR_NESTED_SIEFP";
    /// SIMP of the L0.
    NESTED_SIMP = 0x4000_1083, "HV_X64_MSR_NESTED_SIMP";
    /// EOM of the L0.
    NESTED_EOM = 0x4000_1084, "HV_X64_MSR_NESTED_EOM";
    /// SINT0 of the L0.
    NESTED_SINT0 = 0x4000_1090, "HV_X64_MSR_NESTED_SINT0";
    /// SINT15 of the L0.
    NESTED_SINT15 = 0x4000_109F, "HV_X64_MSR_NESTED_SINT15";
}

/// Number of synthetic interrupt sources.
pub const SINT_COUNT: u32 = 16;
/// Number of synthetic timers of a VP.
pub const STIMER_COUNT: u32 = 4;

/// The MSR of synthetic interrupt source `index`, below 16 (the low four bits are kept).
pub const fn sint(index: u32) -> u32 {
    SINT0 | index & 0xF
}

bits! {
    /// An MSR that places a page: HYPERCALL, REFERENCE_TSC, VP_ASSIST_PAGE, SIEFP, SIMP.
    pub struct PageMsr(u64);
    /// Bit 0: the page is enabled.
    pub enable, set_enable: 0;
    /// Bit 1, of HYPERCALL only: the MSR is immutable until reset. Reserved, preserved, in the others.
    pub locked, set_locked: 1;
    u64;
    /// Bits 63:12: page number in the GPA space.
    pub page_number, set_page_number: 63, 12;
}

impl PageMsr {
    /// Bit 0 as a mask.
    pub const ENABLE: u64 = 1 << 0;
    /// Bit 1 as a mask.
    pub const LOCKED: u64 = 1 << 1;
    /// Bits 63:12 as a mask.
    pub const PAGE: u64 = !0xFFF;

    /// GPA of the page's first byte.
    #[inline]
    pub const fn gpa(self) -> u64 {
        self.0 & Self::PAGE
    }
}

bits! {
    /// HV_X64_MSR_GUEST_OS_ID in the encoding for open source systems.
    pub struct OpenSourceOsId(u64);
    u64;
    /// Bits 15:0: additional information.
    pub build, set_build: 15, 0;
    /// Bits 47:16: kernel version.
    pub version, set_version: 47, 16;
    /// Bits 55:48: additional vendor information.
    pub os_id, set_os_id: 55, 48;
    /// Bits 62:56: 1 Linux, 2 FreeBSD, 3 Xen, 4 Illumos.
    pub os_type, set_os_type: 62, 56;
    /// Bit 63: open source.
    pub open_source, set_open_source: 63;
}

bits! {
    /// HV_X64_MSR_GUEST_OS_ID in the encoding for proprietary systems.
    pub struct ProprietaryOsId(u64);
    u64;
    /// Bits 15:0: build number.
    pub build, set_build: 15, 0;
    /// Bits 23:16: service version.
    pub service_version, set_service_version: 23, 16;
    /// Bits 31:24: minor version.
    pub minor, set_minor: 31, 24;
    /// Bits 39:32: major version.
    pub major, set_major: 39, 32;
    /// Bits 47:40: variant; for Microsoft 4 is Windows NT.
    pub os_id, set_os_id: 47, 40;
    /// Bits 62:48: vendor; 1 is Microsoft, 0 is reserved.
    pub vendor, set_vendor: 62, 48;
    /// Bit 63: clear for a proprietary system.
    pub open_source, set_open_source: 63;
}

bits! {
    /// HV_X64_MSR_RESET.
    pub struct ResetMsr(u64);
    /// Bit 0: reset the partition.
    pub reset, set_reset: 0;
}

bits! {
    /// HV_X64_MSR_SINT0 to SINT15. 0x10000 after reset.
    pub struct SintMsr(u64);
    u8;
    /// Bits 7:0: vector, 16 to 255.
    pub vector, set_vector: 7, 0;
    /// Bit 16: masked.
    pub masked, set_masked: 16;
    /// Bit 17: implicit EOI at delivery.
    pub auto_eoi, set_auto_eoi: 17;
    /// Bit 18: polling mode.
    pub polling, set_polling: 18;
}

bits! {
    /// HV_X64_MSR_STIMER0_CONFIG to STIMER3_CONFIG.
    pub struct StimerConfig(u64);
    /// Bit 0: enabled.
    pub enabled, set_enabled: 0;
    /// Bit 1: periodic.
    pub periodic, set_periodic: 1;
    /// Bit 2: lazy.
    pub lazy, set_lazy: 2;
    /// Bit 3: writing the count enables.
    pub auto_enable, set_auto_enable: 3;
    u8;
    /// Bits 11:4: vector in direct mode.
    pub apic_vector, set_apic_vector: 11, 4;
    /// Bit 12: an interrupt instead of a message.
    pub direct_mode, set_direct_mode: 12;
    /// Bits 19:16: which SINT.
    pub sintx, set_sintx: 19, 16;
}

bits! {
    /// HV_CRASH_CTL_REG_CONTENTS. A read gives the supported actions.
    pub struct CrashControl(u64);
    /// Bit 62: P3 and P4 name a message. Only together with bit 63.
    pub crash_message, set_crash_message: 62;
    /// Bit 63: log the crash parameters.
    pub crash_notify, set_crash_notify: 63;
}

bits! {
    /// HV_REENLIGHTENMENT_CONTROL.
    pub struct ReenlightenmentControl(u64);
    u8;
    /// Bits 7:0: vector of the interrupt after a migration.
    pub vector, set_vector: 7, 0;
    /// Bit 16: enabled.
    pub enabled, set_enabled: 16;
    u32;
    /// Bits 63:32: VP index of the target.
    pub target_vp, set_target_vp: 63, 32;
}

impl ReenlightenmentControl {
    /// Bits 15:8 and 31:17: must be zero.
    pub const RESERVED: u64 = 0xFFFE_FF00;
}

/// HV_TSC_EMULATION_CONTROL and HV_TSC_EMULATION_STATUS: bit 0, the rest zero.
pub const TSC_EMULATION_BIT: u64 = 1;

abi_struct! {
    /// HV_REFERENCE_TSC_PAGE: the defined head of the page; the rest of its 4,096 bytes is reserved.
    pub struct ReferenceTscPage, 24 {
        /// 0: the page is invalid, read the reference counter MSR instead.
        0x00 tsc_sequence: u32,
        /// Reserved.
        0x04 reserved_04: u32,
        /// Multiplier, as a fraction of 2^64.
        0x08 tsc_scale: u64,
        /// Offset in 100 ns, signed.
        0x10 tsc_offset: u64,
    }
}

impl ReferenceTscPage {
    /// The reference time in 100 ns for a TSC value, or `None` when the page is invalid.
    pub const fn time(&self, tsc: u64) -> Option<u64> {
        if self.tsc_sequence == 0 {
            return None;
        }
        let scaled = (tsc as u128).wrapping_mul(self.tsc_scale as u128) >> 64;
        Some((scaled as u64).wrapping_add(self.tsc_offset))
    }
}
