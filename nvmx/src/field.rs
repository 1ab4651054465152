//! The VMCS fields: one table that yields encodings, slots of the VMCS12, widths, and the enlightened VMCS's place of
//! each (SDM volume 3, appendix B).
//!
//! Every module of this crate uses it; it uses the enlightened layout of `tlfs-abi`.

use tlfs_abi::evmcs::{self, EvmcsUse};

/// Width of a field: encoding bits 14:13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 16 bits.
    U16,
    /// 64 bits; the field also has a "high" encoding for its upper half.
    U64,
    /// 32 bits.
    U32,
    /// 64 bits on processors with Intel 64, 32 bits elsewhere.
    Natural,
}

/// Area of a field: encoding bits 11:10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Control fields.
    Control,
    /// VM-exit information, read-only.
    ExitInformation,
    /// Guest state.
    Guest,
    /// Host state.
    Host,
}

/// The encoding of a VMCS field, as VMREAD and VMWRITE take it; any 32-bit value, known or not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Encoding(pub u32);

impl Encoding {
    /// Bits 31:15 and bit 12: must be zero.
    pub const RESERVED: u32 = 0xFFFF_9000;

    /// The width that the encoding states.
    #[inline]
    pub const fn width(self) -> Width {
        match self.0 >> 13 & 3 {
            0 => Width::U16,
            1 => Width::U64,
            2 => Width::U32,
            _ => Width::Natural,
        }
    }

    /// The area that the encoding states.
    #[inline]
    pub const fn area(self) -> Area {
        match self.0 >> 10 & 3 {
            0 => Area::Control,
            1 => Area::ExitInformation,
            2 => Area::Guest,
            _ => Area::Host,
        }
    }

    /// Bit 0: the upper 32 bits of a 64-bit field.
    #[inline]
    pub const fn is_high(self) -> bool {
        self.0 & 1 != 0
    }

    /// The encoding without the high bit.
    #[inline]
    pub const fn full(self) -> Self {
        Self(self.0 & !1)
    }

    /// Bits 9:1, the index within width and area.
    #[inline]
    pub const fn index(self) -> u32 {
        self.0 >> 1 & 0x1FF
    }
}

impl core::fmt::Debug for Encoding {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match Field::from_encoding(*self) {
            Some(field) => write!(f, "{field:?}{}", if self.is_high() { " (high)" } else { "" }),
            None => write!(f, "Encoding({:#06x})", self.0),
        }
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $encoding:literal;)*) => {
        /// A VMCS field that this library knows. The discriminant is the field's slot in a VMCS12.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Field {
            $($(#[$doc])* $name,)*
        }

        impl Field {
            /// All fields, in slot order.
            pub const ALL: &'static [Field] = &[$(Field::$name,)*];

            /// The encoding that VMREAD and VMWRITE take.
            #[inline]
            pub const fn encoding(self) -> Encoding {
                match self {
                    $(Field::$name => Encoding($encoding),)*
                }
            }

            /// The field of an encoding, high or full; `None` for one that this library does not know.
            #[inline]
            pub const fn from_encoding(encoding: Encoding) -> Option<Field> {
                if encoding.is_high() && !matches!(encoding.width(), Width::U64) {
                    return None;
                }
                match encoding.full().0 {
                    $($encoding => Some(Field::$name),)*
                    _ => None,
                }
            }
        }
    };
}

fields! {
    // 16-bit control fields.
    /// Virtual-processor identifier (VPID).
    VirtualProcessorId = 0x0000;
    /// Posted-interrupt notification vector.
    PostedInterruptVector = 0x0002;
    /// EPTP index, written by a #VE.
    EptpIndex = 0x0004;
    // 16-bit guest-state fields.
    /// Guest ES selector.
    GuestEsSelector = 0x0800;
    /// Guest CS selector.
    GuestCsSelector = 0x0802;
    /// Guest SS selector.
    GuestSsSelector = 0x0804;
    /// Guest DS selector.
    GuestDsSelector = 0x0806;
    /// Guest FS selector.
    GuestFsSelector = 0x0808;
    /// Guest GS selector.
    GuestGsSelector = 0x080A;
    /// Guest LDTR selector.
    GuestLdtrSelector = 0x080C;
    /// Guest TR selector.
    GuestTrSelector = 0x080E;
    /// Guest interrupt status: RVI 7:0, SVI 15:8.
    GuestInterruptStatus = 0x0810;
    /// PML index.
    PmlIndex = 0x0812;
    // 16-bit host-state fields.
    /// Host ES selector.
    HostEsSelector = 0x0C00;
    /// Host CS selector.
    HostCsSelector = 0x0C02;
    /// Host SS selector.
    HostSsSelector = 0x0C04;
    /// Host DS selector.
    HostDsSelector = 0x0C06;
    /// Host FS selector.
    HostFsSelector = 0x0C08;
    /// Host GS selector.
    HostGsSelector = 0x0C0A;
    /// Host TR selector.
    HostTrSelector = 0x0C0C;
    // 64-bit control fields.
    /// Address of I/O bitmap A.
    IoBitmapA = 0x2000;
    /// Address of I/O bitmap B.
    IoBitmapB = 0x2002;
    /// Address of the MSR bitmaps.
    MsrBitmap = 0x2004;
    /// VM-exit MSR-store address.
    ExitMsrStoreAddress = 0x2006;
    /// VM-exit MSR-load address.
    ExitMsrLoadAddress = 0x2008;
    /// VM-entry MSR-load address.
    EntryMsrLoadAddress = 0x200A;
    /// Executive-VMCS pointer.
    ExecutiveVmcsPointer = 0x200C;
    /// PML address.
    PmlAddress = 0x200E;
    /// TSC offset.
    TscOffset = 0x2010;
    /// Virtual-APIC address.
    VirtualApicAddress = 0x2012;
    /// APIC-access address.
    ApicAccessAddress = 0x2014;
    /// Posted-interrupt descriptor address.
    PostedInterruptDescriptor = 0x2016;
    /// VM-function controls.
    VmFunctionControls = 0x2018;
    /// EPT pointer.
    EptPointer = 0x201A;
    /// EOI-exit bitmap 0: vectors 0 to 63.
    EoiExitBitmap0 = 0x201C;
    /// EOI-exit bitmap 1: vectors 64 to 127.
    EoiExitBitmap1 = 0x201E;
    /// EOI-exit bitmap 2: vectors 128 to 191.
    EoiExitBitmap2 = 0x2020;
    /// EOI-exit bitmap 3: vectors 192 to 255.
    EoiExitBitmap3 = 0x2022;
    /// EPTP-list address.
    EptpListAddress = 0x2024;
    /// VMREAD-bitmap address.
    VmreadBitmap = 0x2026;
    /// VMWRITE-bitmap address.
    VmwriteBitmap = 0x2028;
    /// Virtualization-exception information address.
    VirtualizationExceptionAddress = 0x202A;
    /// XSS-exiting bitmap.
    XssExitingBitmap = 0x202C;
    /// ENCLS-exiting bitmap.
    EnclsExitingBitmap = 0x202E;
    /// TSC multiplier.
    TscMultiplier = 0x2032;
    // 64-bit read-only field.
    /// Guest-physical address.
    GuestPhysicalAddress = 0x2400;
    // 64-bit guest-state fields.
    /// VMCS link pointer.
    VmcsLinkPointer = 0x2800;
    /// Guest IA32_DEBUGCTL.
    GuestDebugctl = 0x2802;
    /// Guest IA32_PAT.
    GuestPat = 0x2804;
    /// Guest IA32_EFER.
    GuestEfer = 0x2806;
    /// Guest IA32_PERF_GLOBAL_CTRL.
    GuestPerfGlobalCtrl = 0x2808;
    /// Guest PDPTE 0.
    GuestPdpte0 = 0x280A;
    /// Guest PDPTE 1.
    GuestPdpte1 = 0x280C;
    /// Guest PDPTE 2.
    GuestPdpte2 = 0x280E;
    /// Guest PDPTE 3.
    GuestPdpte3 = 0x2810;
    /// Guest IA32_BNDCFGS.
    GuestBndcfgs = 0x2812;
    // 64-bit host-state fields.
    /// Host IA32_PAT.
    HostPat = 0x2C00;
    /// Host IA32_EFER.
    HostEfer = 0x2C02;
    /// Host IA32_PERF_GLOBAL_CTRL.
    HostPerfGlobalCtrl = 0x2C04;
    // 32-bit control fields.
    /// Pin-based VM-execution controls.
    PinBasedControls = 0x4000;
    /// Primary processor-based VM-execution controls.
    PrimaryControls = 0x4002;
    /// Exception bitmap.
    ExceptionBitmap = 0x4004;
    /// Page-fault error-code mask.
    PageFaultErrorCodeMask = 0x4006;
    /// Page-fault error-code match.
    PageFaultErrorCodeMatch = 0x4008;
    /// CR3-target count.
    Cr3TargetCount = 0x400A;
    /// VM-exit controls.
    ExitControls = 0x400C;
    /// VM-exit MSR-store count.
    ExitMsrStoreCount = 0x400E;
    /// VM-exit MSR-load count.
    ExitMsrLoadCount = 0x4010;
    /// VM-entry controls.
    EntryControls = 0x4012;
    /// VM-entry MSR-load count.
    EntryMsrLoadCount = 0x4014;
    /// VM-entry interruption-information field.
    EntryInterruptionInfo = 0x4016;
    /// VM-entry exception error code.
    EntryExceptionErrorCode = 0x4018;
    /// VM-entry instruction length.
    EntryInstructionLength = 0x401A;
    /// TPR threshold.
    TprThreshold = 0x401C;
    /// Secondary processor-based VM-execution controls.
    SecondaryControls = 0x401E;
    /// PLE gap.
    PleGap = 0x4020;
    /// PLE window.
    PleWindow = 0x4022;
    // 32-bit read-only fields.
    /// VM-instruction error.
    InstructionError = 0x4400;
    /// Exit reason.
    ExitReason = 0x4402;
    /// VM-exit interruption information.
    ExitInterruptionInfo = 0x4404;
    /// VM-exit interruption error code.
    ExitInterruptionErrorCode = 0x4406;
    /// IDT-vectoring information.
    IdtVectoringInfo = 0x4408;
    /// IDT-vectoring error code.
    IdtVectoringErrorCode = 0x440A;
    /// VM-exit instruction length.
    ExitInstructionLength = 0x440C;
    /// VM-exit instruction information.
    ExitInstructionInfo = 0x440E;
    // 32-bit guest-state fields.
    /// Guest ES limit.
    GuestEsLimit = 0x4800;
    /// Guest CS limit.
    GuestCsLimit = 0x4802;
    /// Guest SS limit.
    GuestSsLimit = 0x4804;
    /// Guest DS limit.
    GuestDsLimit = 0x4806;
    /// Guest FS limit.
    GuestFsLimit = 0x4808;
    /// Guest GS limit.
    GuestGsLimit = 0x480A;
    /// Guest LDTR limit.
    GuestLdtrLimit = 0x480C;
    /// Guest TR limit.
    GuestTrLimit = 0x480E;
    /// Guest GDTR limit.
    GuestGdtrLimit = 0x4810;
    /// Guest IDTR limit.
    GuestIdtrLimit = 0x4812;
    /// Guest ES access rights.
    GuestEsAccessRights = 0x4814;
    /// Guest CS access rights.
    GuestCsAccessRights = 0x4816;
    /// Guest SS access rights.
    GuestSsAccessRights = 0x4818;
    /// Guest DS access rights.
    GuestDsAccessRights = 0x481A;
    /// Guest FS access rights.
    GuestFsAccessRights = 0x481C;
    /// Guest GS access rights.
    GuestGsAccessRights = 0x481E;
    /// Guest LDTR access rights.
    GuestLdtrAccessRights = 0x4820;
    /// Guest TR access rights.
    GuestTrAccessRights = 0x4822;
    /// Guest interruptibility state.
    GuestInterruptibility = 0x4824;
    /// Guest activity state.
    GuestActivity = 0x4826;
    /// Guest SMBASE.
    GuestSmbase = 0x4828;
    /// Guest IA32_SYSENTER_CS.
    GuestSysenterCs = 0x482A;
    /// VMX-preemption timer value.
    PreemptionTimer = 0x482E;
    // 32-bit host-state field.
    /// Host IA32_SYSENTER_CS.
    HostSysenterCs = 0x4C00;
    // Natural-width control fields.
    /// CR0 guest/host mask.
    Cr0Mask = 0x6000;
    /// CR4 guest/host mask.
    Cr4Mask = 0x6002;
    /// CR0 read shadow.
    Cr0ReadShadow = 0x6004;
    /// CR4 read shadow.
    Cr4ReadShadow = 0x6006;
    /// CR3-target value 0.
    Cr3Target0 = 0x6008;
    /// CR3-target value 1.
    Cr3Target1 = 0x600A;
    /// CR3-target value 2.
    Cr3Target2 = 0x600C;
    /// CR3-target value 3.
    Cr3Target3 = 0x600E;
    // Natural-width read-only fields.
    /// Exit qualification.
    ExitQualification = 0x6400;
    /// I/O RCX.
    IoRcx = 0x6402;
    /// I/O RSI.
    IoRsi = 0x6404;
    /// I/O RDI.
    IoRdi = 0x6406;
    /// I/O RIP.
    IoRip = 0x6408;
    /// Guest-linear address.
    GuestLinearAddress = 0x640A;
    // Natural-width guest-state fields.
    /// Guest CR0.
    GuestCr0 = 0x6800;
    /// Guest CR3.
    GuestCr3 = 0x6802;
    /// Guest CR4.
    GuestCr4 = 0x6804;
    /// Guest ES base.
    GuestEsBase = 0x6806;
    /// Guest CS base.
    GuestCsBase = 0x6808;
    /// Guest SS base.
    GuestSsBase = 0x680A;
    /// Guest DS base.
    GuestDsBase = 0x680C;
    /// Guest FS base.
    GuestFsBase = 0x680E;
    /// Guest GS base.
    GuestGsBase = 0x6810;
    /// Guest LDTR base.
    GuestLdtrBase = 0x6812;
    /// Guest TR base.
    GuestTrBase = 0x6814;
    /// Guest GDTR base.
    GuestGdtrBase = 0x6816;
    /// Guest IDTR base.
    GuestIdtrBase = 0x6818;
    /// Guest DR7.
    GuestDr7 = 0x681A;
    /// Guest RSP.
    GuestRsp = 0x681C;
    /// Guest RIP.
    GuestRip = 0x681E;
    /// Guest RFLAGS.
    GuestRflags = 0x6820;
    /// Guest pending debug exceptions.
    GuestPendingDebugExceptions = 0x6822;
    /// Guest IA32_SYSENTER_ESP.
    GuestSysenterEsp = 0x6824;
    /// Guest IA32_SYSENTER_EIP.
    GuestSysenterEip = 0x6826;
    // Natural-width host-state fields.
    /// Host CR0.
    HostCr0 = 0x6C00;
    /// Host CR3.
    HostCr3 = 0x6C02;
    /// Host CR4.
    HostCr4 = 0x6C04;
    /// Host FS base.
    HostFsBase = 0x6C06;
    /// Host GS base.
    HostGsBase = 0x6C08;
    /// Host TR base.
    HostTrBase = 0x6C0A;
    /// Host GDTR base.
    HostGdtrBase = 0x6C0C;
    /// Host IDTR base.
    HostIdtrBase = 0x6C0E;
    /// Host IA32_SYSENTER_ESP.
    HostSysenterEsp = 0x6C10;
    /// Host IA32_SYSENTER_EIP.
    HostSysenterEip = 0x6C12;
    /// Host RSP.
    HostRsp = 0x6C14;
    /// Host RIP.
    HostRip = 0x6C16;
}

/// Where the enlightened VMCS keeps a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvmcsPlace {
    /// Byte offset in the page.
    pub offset: u16,
    /// Size in bytes: 2, 4 or 8.
    pub size: u8,
    /// Who reads or writes it, and when.
    pub usage: EvmcsUse,
}

const EVMCS: [Option<EvmcsPlace>; Field::COUNT] = {
    let mut places = [None; Field::COUNT];
    let mut slots: &mut [Option<EvmcsPlace>] = &mut places;
    let mut fields = Field::ALL;
    while let ([slot, more_slots @ ..], [field, more_fields @ ..]) = (slots, fields) {
        if let Some(found) = evmcs::field(field.encoding().0) {
            *slot = Some(EvmcsPlace { offset: found.offset, size: found.size, usage: found.used });
        }
        slots = more_slots;
        fields = more_fields;
    }
    places
};

impl Field {
    /// Number of fields, and of slots in a VMCS12.
    pub const COUNT: usize = Self::ALL.len();

    /// The field's slot in a VMCS12.
    #[inline]
    pub const fn slot(self) -> usize {
        self as usize
    }

    /// The field's width.
    #[inline]
    pub const fn width(self) -> Width {
        self.encoding().width()
    }

    /// The field's area.
    #[inline]
    pub const fn area(self) -> Area {
        self.encoding().area()
    }

    /// The bits that the field holds; a write's others are dropped (access rights: bits 31:17 and 11:8 read as zero).
    #[inline]
    pub const fn mask(self) -> u64 {
        match self.width() {
            Width::U16 => 0xFFFF,
            Width::U32 => match self.encoding().0 {
                0x4814..=0x4822 => 0x0001_F0FF,
                _ => 0xFFFF_FFFF,
            },
            Width::U64 | Width::Natural => u64::MAX,
        }
    }

    /// Where the enlightened VMCS, version 1, keeps the field; `None` when its layout lacks it.
    #[inline]
    pub fn evmcs(self) -> Option<EvmcsPlace> {
        EVMCS.get(self.slot()).copied().flatten()
    }

    /// The highest index of any encoding, as IA32_VMX_VMCS_ENUM reports it in bits 9:1.
    pub const HIGHEST_INDEX: u32 = {
        let mut highest = 0;
        let mut rest = Self::ALL;
        while let [field, tail @ ..] = rest {
            if field.encoding().index() > highest {
                highest = field.encoding().index();
            }
            rest = tail;
        }
        highest
    };
}
