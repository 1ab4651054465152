//! The bits of the VM-execution, VM-exit and VM-entry controls (SDM volume 3, "VM-Execution Control Fields", "VM-Exit
//! Control Fields", "VM-Entry Control Fields"), as masks.
//!
//! Every module of this crate uses it; it uses nothing.

macro_rules! bits {
    ($(#[$doc:meta])* $module:ident: $ty:ty { $($(#[$bit_doc:meta])* $name:ident = $bit:literal;)* }) => {
        $(#[$doc])*
        pub mod $module {
            $($(#[$bit_doc])* pub const $name: $ty = 1 << $bit;)*

            /// Every bit that has a name here.
            pub const KNOWN: $ty = $($name)|*;

            /// The names of the bits set in `value`, lowest first.
            pub fn names(value: $ty) -> impl Iterator<Item = &'static str> {
                [$(($name, stringify!($name)),)*].into_iter().filter(move |(bit, _)| value & bit != 0).map(|(_, name)| name)
            }
        }
    };
}

bits! {
    /// Pin-based VM-execution controls.
    pin: u32 {
        /// External-interrupt exiting.
        EXTERNAL_INTERRUPT_EXITING = 0;
        /// NMI exiting.
        NMI_EXITING = 3;
        /// Virtual NMIs.
        VIRTUAL_NMIS = 5;
        /// Activate VMX-preemption timer.
        PREEMPTION_TIMER = 6;
        /// Process posted interrupts.
        POSTED_INTERRUPTS = 7;
    }
}

bits! {
    /// Primary processor-based VM-execution controls.
    primary: u32 {
        /// Interrupt-window exiting.
        INTERRUPT_WINDOW_EXITING = 2;
        /// Use TSC offsetting.
        TSC_OFFSETTING = 3;
        /// HLT exiting.
        HLT_EXITING = 7;
        /// INVLPG exiting.
        INVLPG_EXITING = 9;
        /// MWAIT exiting.
        MWAIT_EXITING = 10;
        /// RDPMC exiting.
        RDPMC_EXITING = 11;
        /// RDTSC exiting.
        RDTSC_EXITING = 12;
        /// CR3-load exiting.
        CR3_LOAD_EXITING = 15;
        /// CR3-store exiting.
        CR3_STORE_EXITING = 16;
        /// CR8-load exiting.
        CR8_LOAD_EXITING = 19;
        /// CR8-store exiting.
        CR8_STORE_EXITING = 20;
        /// Use TPR shadow.
        TPR_SHADOW = 21;
        /// NMI-window exiting.
        NMI_WINDOW_EXITING = 22;
        /// MOV-DR exiting.
        MOV_DR_EXITING = 23;
        /// Unconditional I/O exiting.
        UNCONDITIONAL_IO_EXITING = 24;
        /// Use I/O bitmaps.
        IO_BITMAPS = 25;
        /// Monitor trap flag.
        MONITOR_TRAP_FLAG = 27;
        /// Use MSR bitmaps.
        MSR_BITMAPS = 28;
        /// MONITOR exiting.
        MONITOR_EXITING = 29;
        /// PAUSE exiting.
        PAUSE_EXITING = 30;
        /// Activate secondary controls.
        SECONDARY_CONTROLS = 31;
    }
}

bits! {
    /// Secondary processor-based VM-execution controls.
    secondary: u32 {
        /// Virtualize APIC accesses.
        VIRTUALIZE_APIC_ACCESSES = 0;
        /// Enable EPT.
        EPT = 1;
        /// Descriptor-table exiting.
        DESCRIPTOR_TABLE_EXITING = 2;
        /// Enable RDTSCP.
        RDTSCP = 3;
        /// Virtualize x2APIC mode.
        VIRTUALIZE_X2APIC_MODE = 4;
        /// Enable VPID.
        VPID = 5;
        /// WBINVD exiting.
        WBINVD_EXITING = 6;
        /// Unrestricted guest.
        UNRESTRICTED_GUEST = 7;
        /// APIC-register virtualization.
        APIC_REGISTER_VIRTUALIZATION = 8;
        /// Virtual-interrupt delivery.
        VIRTUAL_INTERRUPT_DELIVERY = 9;
        /// PAUSE-loop exiting.
        PAUSE_LOOP_EXITING = 10;
        /// RDRAND exiting.
        RDRAND_EXITING = 11;
        /// Enable INVPCID.
        INVPCID = 12;
        /// Enable VM functions.
        VM_FUNCTIONS = 13;
        /// VMCS shadowing.
        VMCS_SHADOWING = 14;
        /// Enable ENCLS exiting.
        ENCLS_EXITING = 15;
        /// RDSEED exiting.
        RDSEED_EXITING = 16;
        /// Enable PML.
        PML = 17;
        /// EPT-violation #VE.
        EPT_VIOLATION_VE = 18;
        /// Conceal VMX from PT.
        CONCEAL_VMX_FROM_PT = 19;
        /// Enable XSAVES/XRSTORS.
        XSAVES = 20;
        /// Mode-based execute control for EPT.
        MODE_BASED_EXECUTE = 22;
        /// Sub-page write permissions for EPT.
        SUB_PAGE_PERMISSIONS = 23;
        /// Use TSC scaling.
        TSC_SCALING = 25;
        /// Enable user wait and pause.
        USER_WAIT_PAUSE = 26;
    }
}

bits! {
    /// VM-exit controls.
    exit: u32 {
        /// Save debug controls.
        SAVE_DEBUG_CONTROLS = 2;
        /// Host address-space size.
        HOST_ADDRESS_SPACE_SIZE = 9;
        /// Load IA32_PERF_GLOBAL_CTRL.
        LOAD_PERF_GLOBAL_CTRL = 12;
        /// Acknowledge interrupt on exit.
        ACKNOWLEDGE_INTERRUPT = 15;
        /// Save IA32_PAT.
        SAVE_PAT = 18;
        /// Load IA32_PAT.
        LOAD_PAT = 19;
        /// Save IA32_EFER.
        SAVE_EFER = 20;
        /// Load IA32_EFER.
        LOAD_EFER = 21;
        /// Save VMX-preemption timer value.
        SAVE_PREEMPTION_TIMER = 22;
        /// Clear IA32_BNDCFGS.
        CLEAR_BNDCFGS = 23;
    }
}

bits! {
    /// VM-entry controls.
    entry: u32 {
        /// Load debug controls.
        LOAD_DEBUG_CONTROLS = 2;
        /// IA-32e mode guest.
        IA32E_MODE_GUEST = 9;
        /// Entry to SMM.
        ENTRY_TO_SMM = 10;
        /// Deactivate dual-monitor treatment.
        DEACTIVATE_DUAL_MONITOR = 11;
        /// Load IA32_PERF_GLOBAL_CTRL.
        LOAD_PERF_GLOBAL_CTRL = 13;
        /// Load IA32_PAT.
        LOAD_PAT = 14;
        /// Load IA32_EFER.
        LOAD_EFER = 15;
        /// Load IA32_BNDCFGS.
        LOAD_BNDCFGS = 16;
    }
}
