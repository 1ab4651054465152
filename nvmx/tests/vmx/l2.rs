//! What tests of L2's side need: an L1 that has entered L2, and exits of L2.

use hvcore::addr::L1Gpa;
use hvcore::tlfs_abi::assist::vp_assist_offset;
use nvmx::caps::Config;
use nvmx::field::Field;
use nvmx::vmcs12::REVISION;
use nvmx::{Entry, EntryPlan, L1Exit, L2Exit, exit_reason};

use crate::rig::{ASSIST, EVMCS, End, FakeVmcs, Rig, VMCS12, VMXON, valid};

impl Rig {
    /// A rig whose L1 has filled in its VMCS, not launched.
    pub fn filled() -> Self {
        Self::filled_with(*Self::new().nested.config())
    }

    /// The same with another offer.
    pub fn filled_with(config: Config) -> Self {
        let mut rig = Self::with(config);
        assert_eq!(rig.vmxon(VMXON), End::Succeed);
        rig.region(VMCS12, REVISION);
        assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
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

impl Rig {
    /// A rig whose L1 has announced an enlightened VMCS that passes every check.
    pub fn announced() -> Self {
        let mut rig = Self::enlightened();
        assert_eq!(rig.vmxon(VMXON), End::Succeed);
        rig.assist_page = Some(L1Gpa::new(ASSIST));
        rig.write(ASSIST + vp_assist_offset::ENLIGHTEN_VM_ENTRY, &1u64.to_le_bytes());
        rig.write(ASSIST + vp_assist_offset::CURRENT_NESTED_VMCS, &EVMCS.to_le_bytes());
        rig.write(EVMCS, &1u32.to_le_bytes());
        for (field, value) in valid(rig.nested.config()) {
            rig.set_evmcs(field, value);
        }
        rig
    }

    /// Writes a field of the enlightened VMCS, as L1 does; clean fields stay.
    pub fn set_evmcs(&self, field: Field, value: u64) {
        let place = field.evmcs().unwrap();
        self.write(EVMCS + u64::from(place.offset), &value.to_le_bytes()[..place.size.into()]);
    }

    /// A field of the enlightened VMCS in L1's memory.
    pub fn evmcs(&self, field: Field) -> u64 {
        let place = field.evmcs().unwrap();
        let bytes: [u8; 8] = self.read(EVMCS + u64::from(place.offset));
        u64::from_le_bytes(bytes) & u64::MAX >> (64 - 8 * u32::from(place.size))
    }

    /// VMREADs and VMWRITEs of both VMCSs, and bytes of L1's memory read, since the last call.
    pub fn spent(&mut self) -> Spent {
        let reads = |vmcs: &FakeVmcs| vmcs.reads.replace(Vec::new());
        Spent {
            reads: [reads(&self.vmcs01), reads(&self.vmcs02)],
            writes: [&mut self.vmcs01, &mut self.vmcs02].map(|vmcs| std::mem::take(&mut vmcs.writes)),
            bytes: self.memory.bytes_read.take(),
            vmptrlds: {
                let (current, switches) = self.vmcs01.current.get();
                self.vmcs01.current.set((current, 0));
                switches
            },
        }
    }
}

/// What a step cost L0; VMCS01 first.
#[derive(Debug)]
pub struct Spent {
    pub reads: [Vec<Field>; 2],
    pub writes: [Vec<Field>; 2],
    pub bytes: usize,
    pub vmptrlds: usize,
}

impl Spent {
    pub fn vmreads(&self) -> usize {
        self.reads.iter().map(Vec::len).sum()
    }

    pub fn vmwrites(&self) -> usize {
        self.writes.iter().map(Vec::len).sum()
    }
}
