//! The screen about a VP that cannot go on.

use nvmx::Vmcs;
use nvmx::field::Field;

use crate::debug::print_dying;
use crate::fatal::{self, Failure};
use crate::vmx::vmcs::HwVmcs;
use crate::vmx::vp::Vp;

/// Ends the run with a screen about `vp`.
pub fn report(vp: &mut Vp, failure: Failure) -> ! {
    let exits = vp.counters.l1_exits.get() + vp.counters.l2_exits.get();
    print_dying(format_args!("l0: GAVE UP: {failure:?} on cpu {} after {exits} exits", vp.id));
    print_dying(format_args!("l0: VMCS01:"));
    vmcs(vp.m.vmcs01);
    print_dying(format_args!("l0: {:x?}", vp.m.gprs.0.gprs));
    let (bytes, n) = vp.instruction();
    print_dying(format_args!("l0: code: {:02x?}", bytes.get(..n).unwrap_or(&[])));
    fatal::end()
}

fn vmcs(v: &HwVmcs) {
    const ROWS: [&[Field]; 6] = [
        &[
            Field::ExitReason,
            Field::ExitQualification,
            Field::GuestPhysicalAddress,
            Field::GuestLinearAddress,
            Field::InstructionError,
            Field::ExitInterruptionInfo,
            Field::IdtVectoringInfo,
        ],
        &[
            Field::PinBasedControls,
            Field::PrimaryControls,
            Field::SecondaryControls,
            Field::ExitControls,
            Field::EntryControls,
            Field::EntryInterruptionInfo,
        ],
        &[Field::GuestRip, Field::GuestRsp, Field::GuestRflags, Field::GuestActivity, Field::GuestInterruptibility],
        &[Field::GuestCr0, Field::GuestCr3, Field::GuestCr4, Field::GuestEfer, Field::GuestPat, Field::GuestDr7],
        &[
            Field::GuestCsSelector,
            Field::GuestCsBase,
            Field::GuestCsLimit,
            Field::GuestCsAccessRights,
            Field::GuestSsAccessRights,
            Field::GuestTrAccessRights,
            Field::GuestLdtrAccessRights,
        ],
        &[Field::VirtualProcessorId, Field::EptPointer, Field::GuestPendingDebugExceptions, Field::VmcsLinkPointer],
    ];
    for row in ROWS {
        print_dying(format_args!("l0: {}", Row(v, row)));
    }
}

struct Row<'v>(&'v HwVmcs, &'v [Field]);

impl core::fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.1.iter().try_for_each(|field| write!(f, " {field:?} {:#x}", self.0.read(*field)))
    }
}
