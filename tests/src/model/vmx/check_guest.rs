//! VM-entry checks on guest state (SDM volume 3, "Checks on the guest state area").

use super::caps::{entryc, pin, proc2};
use super::check::{Check, Checks, EFER_INTEL, ensure};
use super::fields::{self as f, REVISION};
use crate::model::cpu::state::bit::*;
use crate::model::walk::{Linear, Mode, Vendor, pdpte_reserved};

/// Access rights of a guest segment.
#[derive(Clone, Copy)]
struct Rights(u64);

impl Rights {
    fn kind(self) -> u64 {
        self.0 & 15
    }
    fn code_or_data(self) -> bool {
        self.0 & (1 << 4) != 0
    }
    fn dpl(self) -> u64 {
        (self.0 >> 5) & 3
    }
    fn present(self) -> bool {
        self.0 & (1 << 7) != 0
    }
    fn usable(self) -> bool {
        self.0 & (1 << 16) == 0
    }
    fn reserved(self) -> bool {
        self.0 & 0xFFFE_0F00 != 0
    }
    fn granularity(self, limit: u64) -> bool {
        let g = self.0 & (1 << 15) != 0;
        (limit & 0xFFF == 0xFFF || !g) && (limit >> 20 == 0 || g)
    }
}

/// Field offsets from GUEST_ES: selector and limit and rights are 2 apart per segment.
const CS: u32 = 2;
const SS: u32 = 4;
const LDTR: u32 = 12;
const TR: u32 = 14;

impl Checks<'_> {
    fn rights(&self, n: u32) -> Rights {
        Rights(self.get(f::GUEST_ES_AR + n))
    }
    fn selector(&self, n: u32) -> u64 {
        self.get(f::GUEST_ES + n)
    }
    fn limit(&self, n: u32) -> u64 {
        self.get(f::GUEST_ES_LIMIT + n)
    }
    fn base(&self, n: u32) -> u64 {
        self.get(f::GUEST_ES_BASE + n)
    }
    fn ia32e(&self) -> bool {
        self.c.entry(entryc::IA32E)
    }
    fn v86(&self) -> bool {
        self.get(f::GUEST_RFLAGS) & FLAG_VM != 0
    }
    fn unrestricted(&self) -> bool {
        self.c.proc2(proc2::UNRESTRICTED)
    }

    /// Failing exit 0x80000021; the error carries the qualification.
    pub(super) fn guest(&self) -> Result<(), (u64, &'static str)> {
        let plain = |e| (0, e);
        self.registers().map_err(plain)?;
        self.segments().map_err(plain)?;
        self.tables().map_err(plain)?;
        self.rip_rflags().map_err(plain)?;
        self.activity()?;
        self.interruptibility()?;
        self.pending_debug().map_err(plain)?;
        self.link().map_err(|e| (4, e))?;
        self.pdptes().map_err(|e| (2, e))
    }

    fn registers(&self) -> Check {
        let (cr0, cr4) = (self.get(f::GUEST_CR0), self.get(f::GUEST_CR4));
        let exempt = if self.unrestricted() { CR0_PE | CR0_PG } else { 0 };
        let fixed0 = self.caps.cr0_fixed0 & !exempt;
        ensure(cr0 & fixed0 == fixed0 && cr0 >> 32 == 0, "CR0 fixed bits")?;
        ensure(cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0, "paging without protection")?;
        ensure(cr4 & CR4_VMXE != 0 && cr4 & !self.caps.cr4 == 0, "CR4 fixed bits")?;
        if self.c.entry(entryc::LOAD_DEBUG) {
            ensure(self.get(f::GUEST_DEBUGCTL) & !0xDFC3 == 0, "DEBUGCTL")?;
            ensure(self.get(f::GUEST_DR7) >> 32 == 0, "DR7")?;
        }
        if self.ia32e() {
            ensure(cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0, "IA-32e mode without paging or PAE")?;
        } else {
            ensure(cr4 & CR4_PCIDE == 0, "PCID outside IA-32e mode")?;
        }
        ensure(self.get(f::GUEST_CR3) >> self.caps.maxphyaddr == 0, "CR3")?;
        for field in [f::GUEST_SYSENTER_ESP, f::GUEST_SYSENTER_EIP] {
            ensure(Self::canonical(self.get(field)), "SYSENTER")?;
        }
        ensure(!self.c.entry(entryc::LOAD_PAT) || Self::pat(self.get(f::GUEST_PAT)), "PAT")?;
        if self.c.entry(entryc::LOAD_EFER) {
            let efer = self.get(f::GUEST_EFER);
            let (lma, lme) = (efer & EFER_LMA != 0, efer & EFER_LME != 0);
            ensure(efer & !EFER_INTEL == 0 && lma == self.ia32e(), "EFER")?;
            ensure(cr0 & CR0_PG == 0 || lma == lme, "EFER LMA and LME")?;
        }
        Ok(())
    }

    fn segments(&self) -> Check {
        ensure(self.selector(TR) & 4 == 0, "TR selector")?;
        ensure(!self.rights(LDTR).usable() || self.selector(LDTR) & 4 == 0, "LDTR selector")?;
        let rpl = |n| self.selector(n) & 3;
        ensure(self.v86() || self.unrestricted() || rpl(SS) == rpl(CS), "SS RPL")?;
        self.bases()?;
        for n in (0..12).step_by(2) {
            if self.v86() {
                ensure(self.limit(n) == 0xFFFF, "virtual-8086 limit")?;
                ensure(self.rights(n).0 == 0xF3, "virtual-8086 rights")?;
            } else {
                self.segment(n)?;
            }
        }
        self.system_segments()
    }

    fn bases(&self) -> Check {
        for n in (0..12).step_by(2) {
            ensure(!self.v86() || self.base(n) == self.selector(n) << 4, "virtual-8086 base")?;
        }
        for n in [8, 10, TR] {
            ensure(Self::canonical(self.base(n)), "TR, FS or GS base")?;
        }
        ensure(!self.rights(LDTR).usable() || Self::canonical(self.base(LDTR)), "LDTR base")?;
        ensure(self.base(CS) >> 32 == 0, "CS base")?;
        for n in [0, SS, 6] {
            ensure(!self.rights(n).usable() || self.base(n) >> 32 == 0, "SS, DS or ES base")?;
        }
        Ok(())
    }

    /// CS, SS, DS, ES, FS, GS outside virtual-8086 mode.
    fn segment(&self, n: u32) -> Check {
        let r = self.rights(n);
        if n != CS && !r.usable() {
            // Only the DPL of SS still counts.
            return if n == SS { self.stack_dpl(r) } else { Ok(()) };
        }
        let kind = match n {
            CS => r.kind() & 9 == 9 || (self.unrestricted() && r.kind() == 3),
            SS => matches!(r.kind(), 3 | 7),
            // Accessed, and if code then readable.
            _ => r.kind() & 1 != 0 && (r.kind() & 8 == 0 || r.kind() & 2 != 0),
        };
        ensure(kind, "segment type")?;
        ensure(r.code_or_data() && r.present() && !r.reserved(), "segment S, P or reserved bits")?;
        ensure(r.granularity(self.limit(n)), "segment granularity")?;
        let ss = self.rights(SS).dpl();
        match n {
            CS => {
                let dpl = match r.kind() {
                    3 => r.dpl() == 0,
                    9 | 11 => r.dpl() == ss,
                    _ => r.dpl() <= ss,
                };
                ensure(dpl, "CS DPL")?;
                ensure(!(self.ia32e() && r.0 & (1 << 13) != 0 && r.0 & (1 << 14) != 0), "CS L and D")
            }
            SS => self.stack_dpl(r),
            _ => {
                let free = self.unrestricted() || r.kind() >= 12;
                ensure(free || r.dpl() >= self.selector(n) & 3, "data segment DPL")
            }
        }
    }

    fn stack_dpl(&self, r: Rights) -> Check {
        ensure(self.unrestricted() || r.dpl() == self.selector(SS) & 3, "SS DPL and RPL")?;
        let zero = self.rights(CS).kind() == 3 || self.get(f::GUEST_CR0) & CR0_PE == 0;
        ensure(!zero || r.dpl() == 0, "SS DPL")
    }

    fn system_segments(&self) -> Check {
        let tr = self.rights(TR);
        let kind = tr.kind() == 11 || (tr.kind() == 3 && !self.ia32e());
        ensure(kind && !tr.code_or_data() && tr.present() && tr.usable() && !tr.reserved(), "TR rights")?;
        ensure(tr.granularity(self.limit(TR)), "TR granularity")?;
        let ldtr = self.rights(LDTR);
        if !ldtr.usable() {
            return Ok(());
        }
        ensure(ldtr.kind() == 2 && !ldtr.code_or_data() && ldtr.present() && !ldtr.reserved(), "LDTR rights")?;
        ensure(ldtr.granularity(self.limit(LDTR)), "LDTR granularity")
    }

    fn tables(&self) -> Check {
        for (base, limit) in [(f::GUEST_GDTR_BASE, f::GUEST_GDTR_LIMIT), (f::GUEST_IDTR_BASE, f::GUEST_IDTR_LIMIT)] {
            ensure(Self::canonical(self.get(base)), "GDTR or IDTR base")?;
            ensure(self.get(limit) >> 16 == 0, "GDTR or IDTR limit")?;
        }
        Ok(())
    }

    fn rip_rflags(&self) -> Check {
        let rip = self.get(f::GUEST_RIP);
        let bits64 = self.ia32e() && self.rights(CS).0 & (1 << 13) != 0;
        ensure(if bits64 { Self::canonical(rip) } else { rip >> 32 == 0 }, "RIP")?;
        let flags = self.get(f::GUEST_RFLAGS);
        ensure(flags & 0xFFFF_FFFF_FFC0_802A == 2, "RFLAGS reserved bits")?;
        let real = self.get(f::GUEST_CR0) & CR0_PE == 0;
        ensure(flags & FLAG_VM == 0 || !(self.ia32e() || real), "RFLAGS.VM")?;
        ensure(self.injected() != Some(0) || flags & FLAG_IF != 0, "interrupt injected with IF = 0")
    }

    /// The type of the event that is injected.
    fn injected(&self) -> Option<u64> {
        let info = self.get(f::ENTRY_INFO);
        (info >> 31 & 1 != 0).then_some((info >> 8) & 7)
    }

    fn activity(&self) -> Result<(), (u64, &'static str)> {
        let ok = |ok, what| ensure(ok, what).map_err(|e| (0, e));
        let state = self.get(f::ACTIVITY);
        ok(state <= 3, "activity state")?;
        ok(state != 1 || self.rights(SS).dpl() == 0, "HLT at a user's privilege")?;
        ok(state == 0 || self.get(f::INTERRUPTIBILITY) & 3 == 0, "inactive in an interrupt shadow")?;
        let Some(kind) = self.injected() else { return Ok(()) };
        let vector = self.get(f::ENTRY_INFO) & 0xFF;
        let machine_check = kind == 3 && vector == 18;
        let wakes = match state {
            0 => true,
            1 => matches!(kind, 0 | 2 | 7) || machine_check || (kind == 3 && vector == 1),
            2 => kind == 2 || machine_check,
            _ => false,
        };
        ok(wakes, "injection into this activity state")
    }

    fn interruptibility(&self) -> Result<(), (u64, &'static str)> {
        let ok = |ok, what| ensure(ok, what).map_err(|e| (0, e));
        let state = self.get(f::INTERRUPTIBILITY);
        let (sti, mov_ss) = (state & 1 != 0, state & 2 != 0);
        ok(state & !0xF == 0, "interruptibility reserved bits")?;
        ok(!(sti && mov_ss), "both shadows")?;
        ok(!sti || self.get(f::GUEST_RFLAGS) & FLAG_IF != 0, "STI shadow with IF = 0")?;
        ok(state & 4 == 0, "blocking by SMI outside SMM")?;
        match self.injected() {
            Some(0) => ok(!sti && !mov_ss, "interrupt injected in a shadow"),
            Some(2) => {
                ok(!mov_ss, "NMI injected in the shadow of MOV SS")?;
                // A processor may allow this one; where it does not, it says why.
                ensure(!sti, "NMI injected in the shadow of STI").map_err(|e| (3, e))?;
                ok(!self.c.pin(pin::VIRTUAL_NMIS) || state & 8 == 0, "NMI injected while NMIs are blocked")
            }
            _ => Ok(()),
        }
    }

    fn pending_debug(&self) -> Check {
        let pending = self.get(f::PENDING_DEBUG);
        ensure(pending & !0x500F == 0, "pending debug reserved bits")?;
        let held = self.get(f::INTERRUPTIBILITY) & 3 != 0 || self.get(f::ACTIVITY) == 1;
        let single = self.get(f::GUEST_RFLAGS) & FLAG_TF != 0 && self.get(f::GUEST_DEBUGCTL) & 2 == 0;
        ensure(!held || (pending & (1 << 14) != 0) == single, "pending debug BS")
    }

    fn link(&self) -> Check {
        let link = self.get(f::LINK);
        if link == u64::MAX {
            return Ok(());
        }
        ensure(self.address(link, 12), "link pointer")?;
        ensure(link != self.current, "link to the current VMCS")?;
        ensure(self.mem.read(link, 4) == u64::from(REVISION), "link revision")
    }

    /// PDPTEs that will be used: from the VMCS with EPT, else from memory at CR3.
    fn pdptes(&self) -> Check {
        let pae = self.get(f::GUEST_CR0) & CR0_PG != 0 && self.get(f::GUEST_CR4) & CR4_PAE != 0 && !self.ia32e();
        if !pae {
            return Ok(());
        }
        let linear = Linear { mode: Mode::Pae, maxphyaddr: self.caps.maxphyaddr, ..Linear::off(Vendor::Intel) };
        let reserved = pdpte_reserved(&linear);
        ensure(self.pdpte_values().iter().all(|e| e & 1 == 0 || e & reserved == 0), "PDPTE")
    }

    pub(super) fn pdpte_values(&self) -> [u64; 4] {
        if self.c.proc2(proc2::EPT) {
            return [f::PDPTE0, f::PDPTE1, f::PDPTE2, f::PDPTE3].map(|field| self.get(field));
        }
        let at = self.get(f::GUEST_CR3) & 0xFFFF_FFE0;
        std::array::from_fn(|n| self.mem.read(at + n as u64 * 8, 8))
    }
}
