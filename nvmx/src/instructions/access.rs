//! VMREAD and VMWRITE of L1 in VMX root operation.

use super::{Done, Outcome, error};
use crate::caps::misc;
use crate::field::{Encoding, Field};
use crate::groups;
use crate::l1::Fault;
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::operand::{self, Info};
use crate::state::{Current, NestedVmx};
use crate::step::{in_64bit_code, register, set_register};
use crate::vmcs12::AccessError;

impl From<AccessError> for Done {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Unsupported => Self::Fail(error::UNSUPPORTED_FIELD),
            AccessError::ReadOnly => Self::Fail(error::READ_ONLY_FIELD),
        }
    }
}

/// The encoding in register `n`: bits beyond 32 name nothing in 64-bit code and are not there in other code.
fn encoding<V: Vmcs + ?Sized, G: Gprs + ?Sized>(vmcs: &V, gprs: &G, n: u8, wide: bool) -> Option<Encoding> {
    let value = register(vmcs, gprs, n);
    if wide { u32::try_from(value).ok() } else { Some(value as u32) }.map(Encoding)
}

impl NestedVmx {
    /// VMREAD.
    pub(crate) fn vmread<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        if self.current == Current::None {
            return Ok(Done::FailInvalid);
        }
        let info = Info::of(m.vmcs01);
        let wide = in_64bit_code(m.vmcs01);
        let Some(encoding) = encoding(m.vmcs01, m.gprs, info.reg2(), wide) else {
            return Ok(Done::Fail(error::UNSUPPORTED_FIELD));
        };
        let field = Field::from_encoding(encoding);
        if let Current::Enlightened(_) = self.current
            && field.is_none_or(|field| field.evmcs().is_none())
        {
            return Ok(Done::Fail(error::UNSUPPORTED_FIELD));
        }
        if let Some(field) = field {
            self.fetch_field(m.vmcs02, field);
        }
        let value = match self.vmcs12.vmread(encoding) {
            Ok(value) => value,
            Err(error) => return Ok(error.into()),
        };
        let value = if wide { value } else { value & 0xFFFF_FFFF };
        store(m, info, wide, value)?;
        Ok(Done::Succeed)
    }

    /// VMWRITE. An enlightened VMCS is written in memory: for VMWRITE there is no current VMCS then.
    pub(crate) fn vmwrite<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        let Current::Plain(_) = self.current else {
            return Ok(Done::FailInvalid);
        };
        let info = Info::of(m.vmcs01);
        let wide = in_64bit_code(m.vmcs01);
        let value = load(m, info, wide)?;
        let Some(encoding) = encoding(m.vmcs01, m.gprs, info.reg2(), wide) else {
            return Ok(Done::Fail(error::UNSUPPORTED_FIELD));
        };
        let any_field = self.config.misc() & misc::VMWRITE_ANY != 0;
        let field = Field::from_encoding(encoding);
        if let (Some(field), true) = (field, encoding.is_high()) {
            // The lower half stays.
            self.fetch_field(m.vmcs02, field);
        }
        if let Err(error) = self.vmcs12.vmwrite(encoding, value, any_field) {
            return Ok(error.into());
        }
        self.changed |= field.map_or(groups::ALL, Field::group);
        if let Some(field) = field {
            self.wrote(field);
        }
        Ok(Done::Succeed)
    }
}

/// Puts VMREAD's result in its operand: 8 bytes in 64-bit code, else 4.
pub(crate) fn store<V, G, M, L>(
    m: &mut Machine<'_, V, G, M, L>,
    info: Info,
    wide: bool,
    value: u64,
) -> Result<(), Fault>
where
    V: Vmcs + ?Sized,
    G: Gprs + ?Sized,
    M: ?Sized,
    L: Linear + ?Sized,
{
    if info.is_register() {
        set_register(m.vmcs01, m.gprs, info.reg1(), value);
        return Ok(());
    }
    let bytes = value.to_le_bytes();
    let bytes = if wide { &bytes[..] } else { bytes.get(..4).unwrap_or_default() };
    operand::write(m.vmcs01, m.gprs, m.linear, info, bytes)
}

/// VMWRITE's value.
pub(crate) fn load<V, G, M, L>(m: &Machine<'_, V, G, M, L>, info: Info, wide: bool) -> Result<u64, Fault>
where
    V: Vmcs + ?Sized,
    G: Gprs + ?Sized,
    M: ?Sized,
    L: Linear + ?Sized,
{
    if info.is_register() {
        let value = register(m.vmcs01, m.gprs, info.reg1());
        return Ok(if wide { value } else { value & 0xFFFF_FFFF });
    }
    if wide {
        operand::read(m.vmcs01, m.gprs, m.linear, info).map(u64::from_le_bytes)
    } else {
        operand::read(m.vmcs01, m.gprs, m.linear, info).map(u32::from_le_bytes).map(u64::from)
    }
}
