//! INVEPT and INVVPID of L1.

use super::{Done, Outcome, error};
use crate::caps::ept_vpid;
use crate::check;
use crate::controls::secondary;
use crate::l1::{Fault, InvEpt};
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::operand::{self, Info};
use crate::state::NestedVmx;
use crate::step::{in_64bit_code, register};

/// The instruction's operands: its type and its descriptor, which is read only for a type that exists.
struct Operands {
    kind: u64,
    info: Info,
}

impl Operands {
    fn of<V, G, M, L>(m: &Machine<'_, V, G, M, L>) -> Self
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: ?Sized,
    {
        let info = Info::of(m.vmcs01);
        let kind = register(m.vmcs01, m.gprs, info.reg2());
        Self { kind: if in_64bit_code(m.vmcs01) { kind } else { kind & 0xFFFF_FFFF }, info }
    }

    fn descriptor<V, G, M, L>(&self, m: &Machine<'_, V, G, M, L>) -> Result<(u64, u64), Fault>
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        let descriptor = u128::from_le_bytes(operand::read(m.vmcs01, m.gprs, m.linear, self.info)?);
        Ok((descriptor as u64, (descriptor >> 64) as u64))
    }
}

/// INVEPT's and INVVPID's invalid operand.
const INVALID: Outcome = Ok(Done::Fail(error::INVALIDATE_OPERAND));

impl NestedVmx {
    /// INVEPT. What the embedder is to do to the shadow of L1's tables comes back with the outcome.
    pub(crate) fn invept<V, G, M, L>(&mut self, m: &Machine<'_, V, G, M, L>) -> (Outcome, Option<InvEpt>)
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        match self.invept_request(m) {
            Ok(Some(request)) => (Ok(Done::Succeed), Some(request)),
            Ok(None) => (INVALID, None),
            Err(fault) => (Err(fault), None),
        }
    }

    fn invept_request<V, G, M, L>(&mut self, m: &Machine<'_, V, G, M, L>) -> Result<Option<InvEpt>, Fault>
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        let caps = self.config.ept_vpid();
        if caps & ept_vpid::INVEPT == 0 {
            return Err(Fault::UD);
        }
        self.permit(m.vmcs01)?;
        let operands = Operands::of(m);
        let supported = match operands.kind {
            1 => caps & ept_vpid::INVEPT_SINGLE != 0,
            2 => caps & ept_vpid::INVEPT_ALL != 0,
            _ => false,
        };
        if !supported {
            return Ok(None);
        }
        let (eptp, reserved) = operands.descriptor(m)?;
        if reserved != 0 {
            return Ok(None);
        }
        if operands.kind == 2 {
            self.tag2.invalidate();
            return Ok(Some(InvEpt::Global));
        }
        if !check::eptp_is_valid(&self.config, eptp) {
            return Ok(None);
        }
        self.tag2.invalidate();
        Ok(Some(InvEpt::Context { eptp }))
    }

    /// INVVPID. L1's VPID for L2 stands for one tag, which goes as a whole: more than was asked for is always right.
    pub(crate) fn invvpid<V, G, M, L>(&mut self, m: &Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        let caps = self.config.ept_vpid();
        if caps & ept_vpid::INVVPID == 0 || self.config.secondary().allowed & secondary::VPID == 0 {
            return Err(Fault::UD);
        }
        self.permit(m.vmcs01)?;
        let operands = Operands::of(m);
        let supported = match operands.kind {
            0 => caps & ept_vpid::INVVPID_ADDRESS != 0,
            1 => caps & ept_vpid::INVVPID_SINGLE != 0,
            2 => caps & ept_vpid::INVVPID_ALL != 0,
            3 => caps & ept_vpid::INVVPID_GLOBALS != 0,
            _ => false,
        };
        if !supported {
            return INVALID;
        }
        let (vpid, address) = operands.descriptor(m)?;
        let Ok(vpid) = u16::try_from(vpid) else { return INVALID };
        if operands.kind == 2 {
            self.tag2.invalidate();
            return Ok(Done::Succeed);
        }
        if vpid == 0 || (operands.kind == 0 && !operand::is_canonical(m.vmcs01, address)) {
            return INVALID;
        }
        if vpid == self.context.vpid {
            self.tag2.invalidate();
        }
        Ok(Done::Succeed)
    }
}
