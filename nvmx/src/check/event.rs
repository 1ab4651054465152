//! Checks on the event that an entry injects (SDM volume 3, "Checks on VM-Entry Control Fields").

use super::{Controls, ensure, unrestricted};
use crate::bits::cr0;
use crate::bits::interruption::{ERROR_CODE, HARDWARE_EXCEPTION, NMI, OTHER, SOFTWARE_INTERRUPT, TYPE, VALID, VECTOR};
use crate::caps::{Config, misc};
use crate::controls::primary;
use crate::field::Field;
use crate::vmcs12::Vmcs12;

/// Interruption information that is valid: type and vector.
#[inline]
pub(crate) fn injected(vmcs: &Vmcs12) -> Option<(u32, u32)> {
    let info = vmcs.get32(Field::EntryInterruptionInfo);
    if info & VALID == 0 { None } else { Some((info & TYPE, info & VECTOR)) }
}

/// Type 1 is no event.
const RESERVED: u32 = 1 << 8;

/// Vectors of exceptions with an error code: 8, 10 to 14, 17.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1F << 10 | 1 << 17;

pub(crate) fn check(vmcs: &Vmcs12, config: &Config) -> Result<(), Controls> {
    match injected(vmcs) {
        None => Ok(()),
        Some((kind, vector)) => valid(vmcs, config, kind, vector),
    }
}

fn valid(vmcs: &Vmcs12, config: &Config, kind: u32, vector: u32) -> Result<(), Controls> {
    let info = vmcs.get32(Field::EntryInterruptionInfo);
    let mtf = config.primary.allowed & primary::MONITOR_TRAP_FLAG != 0;
    ensure(kind != RESERVED && (kind != OTHER || mtf), Controls::EventType)?;
    let vector_fits = match kind {
        NMI => vector == 2,
        HARDWARE_EXCEPTION => vector <= 31,
        OTHER => vector == 0,
        _ => true,
    };
    ensure(vector_fits, Controls::EventVector)?;
    // In real mode no exception has an error code.
    let protected = !unrestricted(vmcs) || vmcs.get(Field::GuestCr0) & cr0::PE != 0;
    let has_code = protected && kind == HARDWARE_EXCEPTION && WITH_ERROR_CODE >> (vector & 31) & 1 != 0;
    let delivers = info & ERROR_CODE != 0;
    ensure(delivers == has_code, Controls::EventErrorCodeBit)?;
    ensure(info & 0x7FFF_F000 == 0, Controls::EventReserved)?;
    ensure(!delivers || vmcs.get32(Field::EntryExceptionErrorCode) >> 16 == 0, Controls::EventErrorCode)?;
    let software = kind >= SOFTWARE_INTERRUPT && kind != OTHER;
    let shortest = if config.misc() & misc::LENGTH_0 != 0 { 0 } else { 1 };
    let length = vmcs.get32(Field::EntryInstructionLength);
    ensure(!software || shortest <= length && length <= 15, Controls::EventLength)
}
