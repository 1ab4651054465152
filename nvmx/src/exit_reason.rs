//! Basic exit reasons, bits 15:0 of the exit-reason field (SDM volume 3, appendix C), and the field's other bits.
//!
//! Every module of this crate uses it; it uses nothing.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = $value;)*

        /// The name of a basic exit reason; `None` for one that is not defined.
        pub const fn name(basic: u32) -> Option<&'static str> {
            match basic {
                $($value => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

reasons! {
    /// An exception that the exception bitmap names, or an NMI.
    EXCEPTION_OR_NMI = 0;
    /// External interrupt.
    EXTERNAL_INTERRUPT = 1;
    /// Triple fault.
    TRIPLE_FAULT = 2;
    /// INIT signal.
    INIT = 3;
    /// Start-up IPI.
    SIPI = 4;
    /// I/O system-management interrupt.
    IO_SMI = 5;
    /// Other system-management interrupt.
    OTHER_SMI = 6;
    /// Interrupt window.
    INTERRUPT_WINDOW = 7;
    /// NMI window.
    NMI_WINDOW = 8;
    /// Task switch.
    TASK_SWITCH = 9;
    /// CPUID.
    CPUID = 10;
    /// GETSEC.
    GETSEC = 11;
    /// HLT.
    HLT = 12;
    /// INVD.
    INVD = 13;
    /// INVLPG.
    INVLPG = 14;
    /// RDPMC.
    RDPMC = 15;
    /// RDTSC.
    RDTSC = 16;
    /// RSM in SMM.
    RSM = 17;
    /// VMCALL.
    VMCALL = 18;
    /// VMCLEAR.
    VMCLEAR = 19;
    /// VMLAUNCH.
    VMLAUNCH = 20;
    /// VMPTRLD.
    VMPTRLD = 21;
    /// VMPTRST.
    VMPTRST = 22;
    /// VMREAD.
    VMREAD = 23;
    /// VMRESUME.
    VMRESUME = 24;
    /// VMWRITE.
    VMWRITE = 25;
    /// VMXOFF.
    VMXOFF = 26;
    /// VMXON.
    VMXON = 27;
    /// Control-register access.
    CR_ACCESS = 28;
    /// MOV DR.
    MOV_DR = 29;
    /// I/O instruction.
    IO = 30;
    /// RDMSR.
    RDMSR = 31;
    /// WRMSR.
    WRMSR = 32;
    /// VM-entry failure: invalid guest state.
    INVALID_GUEST_STATE = 33;
    /// VM-entry failure: MSR loading.
    MSR_LOADING = 34;
    /// MWAIT.
    MWAIT = 36;
    /// Monitor trap flag.
    MONITOR_TRAP_FLAG = 37;
    /// MONITOR.
    MONITOR = 39;
    /// PAUSE.
    PAUSE = 40;
    /// VM-entry failure: machine-check event.
    MACHINE_CHECK = 41;
    /// TPR below threshold.
    TPR_BELOW_THRESHOLD = 43;
    /// APIC access.
    APIC_ACCESS = 44;
    /// Virtualized EOI.
    VIRTUALIZED_EOI = 45;
    /// Access to GDTR or IDTR.
    GDTR_IDTR_ACCESS = 46;
    /// Access to LDTR or TR.
    LDTR_TR_ACCESS = 47;
    /// EPT violation.
    EPT_VIOLATION = 48;
    /// EPT misconfiguration.
    EPT_MISCONFIGURATION = 49;
    /// INVEPT.
    INVEPT = 50;
    /// RDTSCP.
    RDTSCP = 51;
    /// VMX-preemption timer expired.
    PREEMPTION_TIMER = 52;
    /// INVVPID.
    INVVPID = 53;
    /// WBINVD or WBNOINVD.
    WBINVD = 54;
    /// XSETBV.
    XSETBV = 55;
    /// APIC write.
    APIC_WRITE = 56;
    /// RDRAND.
    RDRAND = 57;
    /// INVPCID.
    INVPCID = 58;
    /// VMFUNC.
    VMFUNC = 59;
    /// ENCLS.
    ENCLS = 60;
    /// RDSEED.
    RDSEED = 61;
    /// Page-modification log full.
    PML_FULL = 62;
    /// XSAVES.
    XSAVES = 63;
    /// XRSTORS.
    XRSTORS = 64;
    /// UMWAIT.
    UMWAIT = 67;
    /// TPAUSE.
    TPAUSE = 68;
}

/// Bits 15:0: the basic exit reason.
pub const BASIC: u32 = 0xFFFF;

/// Bit 31: the VM entry failed.
pub const ENTRY_FAILURE: u32 = 1 << 31;

/// The exit that Hyper-V synthesizes after a direct flush while the caller's TLB is locked (TLFS, "Synthetic VM-Exit").
pub const SYNTHETIC: u32 = 0x1000_0031;
