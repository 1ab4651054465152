//! What the library says of a VMCS12.

use crate::machine::Machine;
use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;
use nvmx::check::{self, MsrEntry, MsrRefusal, Refusal};
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;
use zerocopy::FromBytes;

/// What an entry comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ran.
    Enters,
    /// VMfailValid with a number.
    Fails(u64),
    /// Exit reason 0x8000_0021 with a qualification.
    Guest(u64),
    /// Exit reason 0x8000_0022 with an index.
    Msr(u64),
    /// Some other exit reason of a failed entry.
    Odd(u64),
}

/// All checks, in the order of VMLAUNCH.
pub fn judge(vmcs: &Vmcs12, machine: &Machine) -> Result<(), Refusal> {
    let (config, memory) = (&machine.config, &machine.memory);
    check::controls(vmcs, config, memory).map_err(Refusal::Controls)?;
    check::host(vmcs, config, machine.root).map_err(Refusal::Host)?;
    check::guest(vmcs, config, machine.root, memory).map_err(Refusal::Guest)?;
    let at = vmcs.get(Field::EntryMsrLoadAddress);
    for n in 0..vmcs.get32(Field::EntryMsrLoadCount) {
        let mut bytes = [0; size_of::<MsrEntry>()];
        let read = memory.read(L1Gpa::new(at + u64::from(n) * 16), &mut bytes);
        let entry = read.ok().and_then(|()| MsrEntry::read_from_bytes(&bytes).ok());
        let legal = entry.map_or(Err(MsrRefusal::Memory), |entry| check::msr_load(&entry));
        legal.map_err(|why| Refusal::Msr(n + 1, why))?;
    }
    Ok(())
}

/// What L1 would see.
pub fn outcome(verdict: &Result<(), Refusal>) -> Outcome {
    match verdict {
        Ok(()) => Outcome::Enters,
        Err(Refusal::Controls(_)) => Outcome::Fails(7),
        Err(Refusal::Host(_)) => Outcome::Fails(8),
        Err(Refusal::Guest(why)) => Outcome::Guest(why.qualification()),
        Err(Refusal::Msr(n, _)) => Outcome::Msr(u64::from(*n)),
    }
}
