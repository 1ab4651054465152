//! Operands of the VMX instructions, decoded from the VM-exit instruction-information field and the displacement in
//! the exit qualification (SDM volume 3, "Information for VM Exits Due to Instruction Execution").
//!
//! Called by `instructions` and by the exit routing of L2; uses L1's linear memory.

use hvcore::addr::Gva;

use crate::bits::{access_rights as ar, cr4};
use crate::field::Field;
use crate::l1::Fault;
use crate::machine::{Gprs, Linear, PageFault, Vmcs};
use crate::step::{in_64bit_code, register};

/// Number of SS among the segment registers.
const SS: u32 = 2;
/// Number of FS among the segment registers; GS follows.
const FS: u32 = 4;

impl From<PageFault> for Fault {
    fn from(fault: PageFault) -> Self {
        Self { vector: 14, error_code: Some(fault.error_code), cr2: Some(fault.address.raw()) }
    }
}

/// The VM-exit instruction-information field of a VMX instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Info(u32);

impl Info {
    /// As the exit left it.
    pub(crate) fn of<V: Vmcs + ?Sized>(vmcs: &V) -> Self {
        Self(vmcs.read32(Field::ExitInstructionInfo))
    }

    /// Bit 10 of VMREAD and VMWRITE: the operand is a register, not memory.
    pub(crate) const fn is_register(self) -> bool {
        self.0 & 1 << 10 != 0
    }

    /// Bits 6:3, the register operand when there is one.
    pub(crate) const fn reg1(self) -> u8 {
        (self.0 >> 3 & 0xF) as u8
    }

    /// Bits 31:28, the second register operand.
    pub(crate) const fn reg2(self) -> u8 {
        (self.0 >> 28) as u8
    }

    const fn scaling(self) -> u32 {
        self.0 & 3
    }

    /// Bits 9:7 as a mask of the address size; the undefined encodings count as 64 bits.
    const fn address_mask(self) -> u64 {
        match self.0 >> 7 & 7 {
            0 => 0xFFFF,
            1 => 0xFFFF_FFFF,
            _ => u64::MAX,
        }
    }

    const fn segment(self) -> u32 {
        self.0 >> 15 & 7
    }

    const fn index(self) -> Option<u8> {
        if self.0 & 1 << 22 != 0 { None } else { Some((self.0 >> 18 & 0xF) as u8) }
    }

    const fn base(self) -> Option<u8> {
        if self.0 & 1 << 27 != 0 { None } else { Some((self.0 >> 23 & 0xF) as u8) }
    }
}

/// What is done to the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// The fields of a segment register.
struct Segment {
    base: Field,
    limit: Field,
    access_rights: Field,
}

/// Segment register `n` of the instruction information; the undefined 6 and 7 count as DS.
const fn segment(n: u32) -> Segment {
    let (base, limit, access_rights) = match n {
        0 => (Field::GuestEsBase, Field::GuestEsLimit, Field::GuestEsAccessRights),
        1 => (Field::GuestCsBase, Field::GuestCsLimit, Field::GuestCsAccessRights),
        2 => (Field::GuestSsBase, Field::GuestSsLimit, Field::GuestSsAccessRights),
        4 => (Field::GuestFsBase, Field::GuestFsLimit, Field::GuestFsAccessRights),
        5 => (Field::GuestGsBase, Field::GuestGsLimit, Field::GuestGsAccessRights),
        _ => (Field::GuestDsBase, Field::GuestDsLimit, Field::GuestDsAccessRights),
    };
    Segment { base, limit, access_rights }
}

/// The linear address of the memory operand, `size` bytes (1 to 16), after the checks of segmentation.
pub(crate) fn linear_address<V: Vmcs + ?Sized, G: Gprs + ?Sized>(
    vmcs: &V,
    gprs: &G,
    info: Info,
    size: u64,
    access: Access,
) -> Result<Gva, Fault> {
    let mut offset = vmcs.read(Field::ExitQualification);
    if let Some(base) = info.base() {
        offset = offset.wrapping_add(register(vmcs, gprs, base));
    }
    if let Some(index) = info.index() {
        offset = offset.wrapping_add(register(vmcs, gprs, index) << info.scaling());
    }
    offset &= info.address_mask();
    let last = size.wrapping_sub(1);
    let address = if in_64bit_code(vmcs) {
        let based = if info.segment() >= FS { vmcs.read(segment(info.segment()).base) } else { 0 };
        let address = offset.wrapping_add(based);
        (is_canonical(vmcs, address) && is_canonical(vmcs, address.wrapping_add(last))).then_some(address)
    } else {
        legacy_address(vmcs, &segment(info.segment()), offset & 0xFFFF_FFFF, last, access)
    };
    address.map(Gva::new).ok_or(if info.segment() == SS { Fault::SS } else { Fault::GP })
}

/// True when `address` is canonical for the guest: 48 bits, or 57 with CR4.LA57.
pub(crate) fn is_canonical<V: Vmcs + ?Sized>(vmcs: &V, address: u64) -> bool {
    let unused = if vmcs.read(Field::GuestCr4) & cr4::LA57 != 0 { 7 } else { 16 };
    (address as i64) << unused >> unused == address as i64
}

/// Linear address in protected mode; `None` when the segment does not allow the access to `offset` and the `last`
/// bytes that follow.
fn legacy_address<V: Vmcs + ?Sized>(
    vmcs: &V,
    segment: &Segment,
    offset: u64,
    last: u64,
    access: Access,
) -> Option<u64> {
    let rights = vmcs.read32(segment.access_rights);
    if rights & ar::UNUSABLE != 0 {
        return None;
    }
    let code = rights & ar::CODE != 0;
    let allowed = match access {
        Access::Read => !code || rights & ar::WRITABLE != 0,
        Access::Write => !code && rights & ar::WRITABLE != 0,
    };
    if !allowed {
        return None;
    }
    let end = offset.wrapping_add(last);
    let limit = vmcs.read(segment.limit);
    let inside = if !code && rights & ar::EXPAND_DOWN != 0 {
        let top = if rights & ar::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && end <= top
    } else {
        end <= limit
    };
    inside.then(|| vmcs.read(segment.base).wrapping_add(offset) & 0xFFFF_FFFF)
}

/// Reads a memory operand of `N` bytes.
pub(crate) fn read<const N: usize, V, G, L>(vmcs: &V, gprs: &G, linear: &L, info: Info) -> Result<[u8; N], Fault>
where
    V: Vmcs + ?Sized,
    G: Gprs + ?Sized,
    L: Linear + ?Sized,
{
    let address = linear_address(vmcs, gprs, info, N as u64, Access::Read)?;
    let mut bytes = [0; N];
    linear.read(vmcs, address, &mut bytes)?;
    Ok(bytes)
}

/// Writes a memory operand.
pub(crate) fn write<V, G, L>(vmcs: &V, gprs: &G, linear: &L, info: Info, bytes: &[u8]) -> Result<(), Fault>
where
    V: Vmcs + ?Sized,
    G: Gprs + ?Sized,
    L: Linear + ?Sized,
{
    let address = linear_address(vmcs, gprs, info, bytes.len() as u64, Access::Write)?;
    Ok(linear.write(vmcs, address, bytes)?)
}
