//! An embedder whose answers the optimiser cannot foresee.

use core::hint::black_box;
use core::sync::atomic::AtomicU64;
use hvcore::addr::{Gva, Hpa, L1Gpa, L2Gpa, Level};
use hvcore::client::{HypercallPort, INPUT_WORDS, XMM_WORDS};
use hvcore::hypercall::calls::*;
use hvcore::hypercall::{Answer, Gpr, Registers, Xmm};
use hvcore::memory::{Access, GuestMemory, MemoryError, SecondStage, TranslateError};
use hvcore::shadow::{EntryFormat, L1Map, Mapping, PageSize, Rights};
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};
use tlfs_abi::inputs::{ApicId, ExtendedCapabilities, InitialVpContext, RegisterName, RegisterValue, VpIndex};
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::VpSet;

/// Some number.
pub fn word() -> u64 {
    black_box(0)
}

/// Yes or no.
pub fn yes() -> bool {
    word() != 0
}

/// Success or failure.
pub fn may<E>(error: E) -> Result<(), E> {
    if yes() { Ok(()) } else { Err(error) }
}

/// Guest memory that holds anything.
pub struct Memory;

impl GuestMemory for Memory {
    fn read(&self, _: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        black_box(buf);
        may(MemoryError)
    }
    fn write(&self, _: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        black_box(buf);
        may(MemoryError)
    }
    fn page(&self, _: L1Gpa) -> Option<&[AtomicU64; 512]> {
        static PAGE: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];
        yes().then_some(&PAGE)
    }
    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        may(MemoryError).map(|()| if yes() { Ok(word() as u8) } else { Err(word() as u8) })
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        may(MemoryError).map(|()| if yes() { Ok(word() as u32) } else { Err(word() as u32) })
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        may(MemoryError).map(|()| if yes() { Ok(word()) } else { Err(word()) })
    }
}

impl SecondStage for Memory {
    fn walk(&self, _: L2Gpa, _: Access) -> Result<L1Gpa, TranslateError> {
        may(TranslateError).map(|()| L1Gpa::new(word()))
    }
}

/// Registers that hold anything.
pub struct Regs;

impl Registers for Regs {
    fn gpr(&self, _: Gpr) -> u64 {
        word()
    }
    fn set_gpr(&mut self, _: Gpr, value: u64) {
        black_box(value);
    }
    fn xmm(&self, _: Xmm) -> u128 {
        black_box(0)
    }
    fn set_xmm(&mut self, _: Xmm, value: u128) {
        black_box(value);
    }
}

/// A way to a host that answers anything.
pub struct Port([u64; INPUT_WORDS]);

impl HypercallPort for Port {
    fn input_page(&mut self) -> &mut [u64; INPUT_WORDS] {
        &mut self.0
    }
    fn call_memory(&mut self, input: HypercallInput) -> HypercallResult {
        black_box(input);
        HypercallResult(word())
    }
    fn call_fast(&mut self, input: HypercallInput, words: [u64; 2]) -> HypercallResult {
        black_box((input, words));
        HypercallResult(word())
    }
    fn call_xmm(&mut self, input: HypercallInput, words: &[u64; XMM_WORDS]) -> HypercallResult {
        black_box((input, words));
        HypercallResult(word())
    }
}

/// A host physical address.
pub fn hpa() -> Hpa {
    Hpa::new(word())
}

/// VP indexes, known or not, as long as it likes.
pub struct Indexes;

impl Iterator for Indexes {
    type Item = Option<u32>;
    fn next(&mut self) -> Option<Self::Item> {
        yes().then(|| yes().then(|| word() as u32))
    }
}

/// Answers every hypercall in any way.
pub struct Calls;

fn answer() -> Answer {
    match word() {
        0 => Answer::Done,
        1 => Answer::Failed { status: HvStatus(word() as u16), completed: word() as u16 },
        2 => Answer::Retry { completed: word() as u16 },
        _ => Answer::Suspend,
    }
}

impl FlushVirtual for Calls {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        black_box(target);
        answer()
    }
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        black_box((target, ranges));
        answer()
    }
}

impl FlushGuestPhysical for Calls {
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer {
        black_box(address_space);
        answer()
    }
    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        black_box((address_space, ranges));
        answer()
    }
}

impl LongSpinWait for Calls {
    fn notify_long_spin_wait(&mut self, spins: u32) -> Answer {
        black_box(spins);
        answer()
    }
}

impl ClusterIpi for Calls {
    fn send_ipi(&mut self, level: Level, vector: u8, vps: &VpSet<'_>) -> Answer {
        black_box((level, vector, vps));
        answer()
    }
}

impl Messages for Calls {
    fn post_message(&mut self, connection_id: u32, message_type: u32, payload: &[u8]) -> Answer {
        black_box((connection_id, message_type, payload));
        answer()
    }
}

impl Events for Calls {
    fn signal_event(&mut self, connection_id: u32, flag_number: u16) -> Answer {
        black_box((connection_id, flag_number));
        answer()
    }
}

impl ExtendedCalls for Calls {
    fn extended_capabilities(&mut self) -> ExtendedCapabilities {
        ExtendedCapabilities::new(word())
    }
}

impl VpRegisters for Calls {
    fn get_vp_register(&mut self, vp: NamedVp, name: RegisterName) -> Result<RegisterValue, HvStatus> {
        black_box((vp, name));
        may(HvStatus(word() as u16)).map(|()| RegisterValue { low: word(), high: word() })
    }
    fn set_vp_register(&mut self, vp: NamedVp, name: RegisterName, value: RegisterValue) -> Result<(), HvStatus> {
        black_box((vp, name, value));
        may(HvStatus(word() as u16))
    }
}

impl ApicIds for Calls {
    fn vp_index_of(&mut self, apic_id: ApicId) -> Result<VpIndex, HvStatus> {
        black_box(apic_id);
        may(HvStatus(word() as u16)).map(|()| word() as VpIndex)
    }
}

impl StartVp for Calls {
    fn start_vp(&mut self, vp_index: u32, context: &InitialVpContext) -> Answer {
        black_box((vp_index, context));
        answer()
    }
}

hvcore::offer_hypercalls!(impl for Calls {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
    NotifyLongSpinWait,
    SendSyntheticClusterIpi,
    SendSyntheticClusterIpiEx,
    PostMessage,
    SignalEvent,
    ExtQueryCapabilities,
    GetVpRegisters,
    SetVpRegisters,
    GetVpIndexFromApicId,
    StartVirtualProcessor,
});

/// Some page size.
fn page_size() -> PageSize {
    match word() {
        0 => PageSize::Size4K,
        1 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

impl L1Map for Memory {
    fn map(&self, _: L1Gpa) -> Option<Mapping> {
        yes().then(|| Mapping {
            hpa: hpa(),
            size: page_size(),
            writable: yes(),
            executable: yes(),
            memory_type: word() as u8,
        })
    }
}

/// Second-stage entries of any form.
pub struct Entries;

impl EntryFormat for Entries {
    fn table(table: Hpa) -> u64 {
        black_box(table).raw()
    }
    fn leaf(page: Hpa, size: PageSize, rights: Rights) -> u64 {
        black_box((page, size, rights)).0.raw()
    }
    fn read_only(leaf: u64) -> u64 {
        black_box(leaf)
    }
    fn keeps(old: u64, new: u64) -> bool {
        black_box(old) == black_box(new)
    }
}

/// Shadow tables with four roots.
pub type Tables = hvcore::shadow::Tables<'static, Entries, u64, 4>;

impl nsvm::Gprs for Regs {
    fn rcx(&self) -> u64 {
        word()
    }
    fn rdx(&self) -> u64 {
        word()
    }
    fn set_rdx(&mut self, value: u64) {
        black_box(value);
    }
}

/// Instruction bytes of any kind; the count may be any number, as an embedder may be wrong.
pub struct Bytes;

impl nsvm::Code for Bytes {
    fn fetch(&self, level: Level, vmcb: &nsvm::vmcb::Vmcb, bytes: &mut [u8; 15]) -> usize {
        black_box((level, vmcb, bytes));
        word() as usize
    }
}

impl nvmx::Gprs for Regs {
    fn get(&self, n: u8) -> u64 {
        black_box(n);
        word()
    }
    fn set(&mut self, n: u8, value: u64) {
        black_box((n, value));
    }
    fn set_cr2(&mut self, value: u64) {
        black_box(value);
    }
}

impl nvmx::Msrs for Regs {
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        black_box(index);
        yes().then(word)
    }
    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        black_box((index, value));
        yes()
    }
}

/// A hardware VMCS whose fields hold anything.
pub struct Fields;

impl nvmx::Vmcs for Fields {
    fn read(&self, field: nvmx::field::Field) -> u64 {
        black_box(field);
        word()
    }
    fn write(&mut self, field: nvmx::field::Field, value: u64) {
        black_box((field, value));
    }
}

/// Linear memory that holds anything or faults.
impl nvmx::Linear for Memory {
    fn read<V: nvmx::Vmcs + ?Sized>(&self, _: &V, address: Gva, buf: &mut [u8]) -> Result<(), nvmx::PageFault> {
        black_box(buf);
        may(nvmx::PageFault { address, error_code: word() as u32 })
    }
    fn write<V: nvmx::Vmcs + ?Sized>(&self, _: &V, address: Gva, bytes: &[u8]) -> Result<(), nvmx::PageFault> {
        black_box(bytes);
        may(nvmx::PageFault { address, error_code: word() as u32 })
    }
}
