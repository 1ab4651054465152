//! What tests of L2's side need: an L1 that has entered L2, and exits of L2.

use nvmx::field::Field;
use nvmx::{Entry, EntryPlan, L1Exit, L2Exit, exit_reason};

use crate::rig::{End, Rig};

impl Rig {
    /// A rig whose L1 has filled in its VMCS, not launched.
    pub fn filled() -> Self {
        let mut rig = Self::loaded();
        rig.vmwrite_valid();
        rig
    }

    /// A rig whose L1 has launched L2, with these fields in place of the usual ones.
    pub fn launched(fields: &[(Field, u64)]) -> Self {
        let mut rig = Self::filled();
        rig.set(fields);
        assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
        rig
    }

    /// The same, and L2 has run.
    pub fn running(fields: &[(Field, u64)]) -> Self {
        let mut rig = Self::launched(fields);
        rig.run();
        rig
    }

    /// VMWRITEs.
    pub fn set(&mut self, fields: &[(Field, u64)]) {
        for (field, value) in fields {
            assert_eq!(self.vmwrite(field.encoding(), *value), End::Succeed, "{field:?}");
        }
    }

    /// The bits of a field of L1's VMCS, set in addition.
    pub fn plus(&self, field: Field, bits: u64) -> (Field, u64) {
        (field, self.nested.vmcs12().get(field) | bits)
    }

    /// The plan for the next entry, which the test takes to happen.
    pub fn run(&mut self) -> EntryPlan {
        match self.call(|nested, m| nested.prepare_entry(m)) {
            Entry::Run(plan) => plan,
            other => panic!("{other:?}"),
        }
    }

    /// L2 exits with `reason` at an instruction of 2 bytes.
    pub fn l2(&mut self, reason: u32) -> L2Exit {
        self.vmcs02.poke(Field::ExitReason, reason.into());
        self.vmcs02.poke(Field::ExitInstructionLength, 2);
        let info = self.vmcs02.peek(Field::EntryInterruptionInfo) & 0x7FFF_FFFF;
        if reason >> 31 == 0 {
            self.vmcs02.poke(Field::EntryInterruptionInfo, info);
        }
        self.call(|nested, m| nested.l2_exit(m, |_, _, _| false))
    }

    /// A field of L1's VMCS, as VMREAD shows it.
    pub fn told(&mut self, field: Field) -> u64 {
        let (end, value) = self.vmread(field.encoding());
        assert_eq!(end, End::Succeed, "{field:?}");
        value
    }
}
