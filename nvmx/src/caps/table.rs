//! Every control bit and how it is offered to L1: one table, from which the capability MSRs, the filter for the
//! enlightened VMCS and the documentation's table (by a test) follow.

use crate::controls::{entry, exit, pin, primary, secondary};
use crate::field::Field;

/// How a control is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// On every processor: the library does it, with the hardware's help or without.
    Emulated,
    /// Where the processor has it.
    Offered,
    /// Never.
    Refused,
}

/// One control.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// Its bit, as a mask.
    pub bit: u32,
    /// How it is offered.
    pub treatment: Treatment,
    /// The fields it gives a meaning to. The enlightened VMCS can carry the control when its layout has all of them.
    pub fields: &'static [Field],
}

const fn emulated(bit: u32, fields: &'static [Field]) -> Control {
    Control { bit, treatment: Treatment::Emulated, fields }
}

const fn offered(bit: u32, fields: &'static [Field]) -> Control {
    Control { bit, treatment: Treatment::Offered, fields }
}

const fn refused(bit: u32) -> Control {
    Control { bit, treatment: Treatment::Refused, fields: &[] }
}

/// Pin-based VM-execution controls.
pub const PIN: &[Control] = &[
    emulated(pin::EXTERNAL_INTERRUPT_EXITING, &[]),
    emulated(pin::NMI_EXITING, &[]),
    offered(pin::VIRTUAL_NMIS, &[]),
    emulated(pin::PREEMPTION_TIMER, &[Field::PreemptionTimer]),
    refused(pin::POSTED_INTERRUPTS),
];

/// Primary processor-based VM-execution controls.
pub const PRIMARY: &[Control] = &[
    offered(primary::INTERRUPT_WINDOW_EXITING, &[]),
    offered(primary::TSC_OFFSETTING, &[Field::TscOffset]),
    offered(primary::HLT_EXITING, &[]),
    offered(primary::INVLPG_EXITING, &[]),
    offered(primary::MWAIT_EXITING, &[]),
    offered(primary::RDPMC_EXITING, &[]),
    offered(primary::RDTSC_EXITING, &[]),
    offered(primary::CR3_LOAD_EXITING, &[]),
    offered(primary::CR3_STORE_EXITING, &[]),
    offered(primary::CR8_LOAD_EXITING, &[]),
    offered(primary::CR8_STORE_EXITING, &[]),
    offered(primary::TPR_SHADOW, &[Field::VirtualApicAddress, Field::TprThreshold]),
    offered(primary::NMI_WINDOW_EXITING, &[]),
    offered(primary::MOV_DR_EXITING, &[]),
    offered(primary::UNCONDITIONAL_IO_EXITING, &[]),
    offered(primary::IO_BITMAPS, &[Field::IoBitmapA, Field::IoBitmapB]),
    offered(primary::MONITOR_TRAP_FLAG, &[]),
    offered(primary::MSR_BITMAPS, &[Field::MsrBitmap]),
    offered(primary::MONITOR_EXITING, &[]),
    offered(primary::PAUSE_EXITING, &[]),
    offered(primary::SECONDARY_CONTROLS, &[Field::SecondaryControls]),
];

/// Secondary processor-based VM-execution controls.
pub const SECONDARY: &[Control] = &[
    offered(secondary::VIRTUALIZE_APIC_ACCESSES, &[Field::ApicAccessAddress]),
    offered(secondary::EPT, &[Field::EptPointer]),
    offered(secondary::DESCRIPTOR_TABLE_EXITING, &[]),
    offered(secondary::RDTSCP, &[]),
    offered(secondary::VIRTUALIZE_X2APIC_MODE, &[Field::VirtualApicAddress]),
    offered(secondary::VPID, &[Field::VirtualProcessorId]),
    offered(secondary::WBINVD_EXITING, &[]),
    offered(secondary::UNRESTRICTED_GUEST, &[]),
    offered(secondary::APIC_REGISTER_VIRTUALIZATION, &[Field::VirtualApicAddress]),
    offered(
        secondary::VIRTUAL_INTERRUPT_DELIVERY,
        &[
            Field::GuestInterruptStatus,
            Field::EoiExitBitmap0,
            Field::EoiExitBitmap1,
            Field::EoiExitBitmap2,
            Field::EoiExitBitmap3,
        ],
    ),
    offered(secondary::PAUSE_LOOP_EXITING, &[Field::PleGap, Field::PleWindow]),
    offered(secondary::RDRAND_EXITING, &[]),
    offered(secondary::INVPCID, &[]),
    offered(secondary::VM_FUNCTIONS, &[Field::VmFunctionControls, Field::EptpListAddress]),
    refused(secondary::VMCS_SHADOWING),
    refused(secondary::ENCLS_EXITING),
    offered(secondary::RDSEED_EXITING, &[]),
    emulated(secondary::PML, &[Field::PmlAddress, Field::PmlIndex]),
    refused(secondary::EPT_VIOLATION_VE),
    refused(secondary::CONCEAL_VMX_FROM_PT),
    offered(secondary::XSAVES, &[Field::XssExitingBitmap]),
    refused(secondary::MODE_BASED_EXECUTE),
    refused(secondary::SUB_PAGE_PERMISSIONS),
    offered(secondary::TSC_SCALING, &[Field::TscMultiplier]),
    refused(secondary::USER_WAIT_PAUSE),
];

/// VM-exit controls.
pub const EXIT: &[Control] = &[
    offered(exit::SAVE_DEBUG_CONTROLS, &[Field::GuestDr7, Field::GuestDebugctl]),
    offered(exit::HOST_ADDRESS_SPACE_SIZE, &[]),
    offered(exit::LOAD_PERF_GLOBAL_CTRL, &[Field::HostPerfGlobalCtrl]),
    emulated(exit::ACKNOWLEDGE_INTERRUPT, &[]),
    offered(exit::SAVE_PAT, &[Field::GuestPat]),
    offered(exit::LOAD_PAT, &[Field::HostPat]),
    offered(exit::SAVE_EFER, &[Field::GuestEfer]),
    offered(exit::LOAD_EFER, &[Field::HostEfer]),
    emulated(exit::SAVE_PREEMPTION_TIMER, &[Field::PreemptionTimer]),
    offered(exit::CLEAR_BNDCFGS, &[]),
];

/// VM-entry controls.
pub const ENTRY: &[Control] = &[
    offered(entry::LOAD_DEBUG_CONTROLS, &[Field::GuestDr7, Field::GuestDebugctl]),
    offered(entry::IA32E_MODE_GUEST, &[]),
    refused(entry::ENTRY_TO_SMM),
    refused(entry::DEACTIVATE_DUAL_MONITOR),
    offered(entry::LOAD_PERF_GLOBAL_CTRL, &[Field::GuestPerfGlobalCtrl]),
    offered(entry::LOAD_PAT, &[Field::GuestPat]),
    offered(entry::LOAD_EFER, &[Field::GuestEfer]),
    offered(entry::LOAD_BNDCFGS, &[Field::GuestBndcfgs]),
];

/// The bits of `table` that can be offered on a processor that allows `host` to be 1.
pub(super) const fn possible(table: &[Control], host: u32) -> u32 {
    let (mut bits, mut rest) = (0, table);
    while let [control, tail @ ..] = rest {
        bits |= match control.treatment {
            Treatment::Emulated => control.bit,
            Treatment::Offered => control.bit & host,
            Treatment::Refused => 0,
        };
        rest = tail;
    }
    bits
}

/// The bits of `table` that the enlightened VMCS, version 1, can carry.
pub(super) fn carried(table: &[Control]) -> u32 {
    let whole = |control: &&Control| control.fields.iter().all(|field| field.evmcs().is_some());
    table.iter().filter(whole).fold(0, |bits, control| bits | control.bit)
}
