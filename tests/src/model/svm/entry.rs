//! VMRUN and #VMEXIT (APM volume 2, 15.5, 15.6 and 15.25.3).

use super::state::{State, bit::*, seg};
use super::vmcb::{Image, ctl, exit, misc2, save, vintr};
use super::{Control, Cpu, Event, GP, Guest, Op, Step, Trap};
use crate::model::cpu::idt::Core;
use crate::model::mem::PhysMem;
use crate::model::walk::{Kind, Npt, Vendor};

impl Cpu {
    /// VMRUN by the host. On success the guest runs; a refusal is an exit with code -1.
    pub(super) fn vmrun(&mut self, mem: &PhysMem, pa: u64) -> Result<u64, Trap> {
        if pa & 0xFFF != 0 || pa >> self.features.maxphyaddr != 0 {
            return Err(GP);
        }
        let image = self.cache.load(mem, pa, self.features.clean_bits);
        let host = State { rip: self.state.rip.wrapping_add(Op::Vmrun(pa).len()), ..self.state.clone() };
        let host_if = host.rflags & FLAG_IF != 0;
        let ctl = self.control(&image, pa);
        let (nested, lbr) = (image.get(ctl::NP, 8) & 1 != 0, ctl.lbr);
        let mut state = self.state.clone();
        state.load(&image, nested, lbr);
        let refused = !self.consistent(&image, &state, &ctl);
        let asid = ctl.asid;
        self.guest = Some(Guest { ctl, host, host_if });
        if refused {
            self.leave(mem, exit::INVALID, 0, 0, None, false);
            return Ok(0);
        }
        match image.get(ctl::TLB_CONTROL, 1) {
            1 => drop(self.mmu.tlb.flush_all()),
            3 => drop(self.mmu.tlb.flush_asid(asid)),
            7 => drop(self.mmu.tlb.flush_asid_non_global(asid)),
            _ => {}
        }
        self.state = state;
        self.gif = true;
        self.shadow = image.get(ctl::SHADOW, 8) & 1 != 0;
        self.halted = false;
        if self.guest.as_ref().is_some_and(|g| g.ctl.vintr & vintr::MASKING == 0) {
            // Without V_INTR_MASKING, V_TPR is loaded into the real TPR.
            self.cr8 = image.get(ctl::VINTR, 8) & 0xF;
        }
        Ok(0)
    }

    fn control(&self, image: &Image, pa: u64) -> Control {
        let f = &self.features;
        let nested = image.get(ctl::NP, 8) & 1 != 0;
        let npt = nested.then(|| Npt {
            cr3: image.get(ctl::NCR3, 8),
            // A user access: what protects supervisors plays no part.
            smep: false,
            smap: false,
            ..self.state.linear(Vendor::Amd, f.maxphyaddr, f.pages_1g)
        });
        let count = if f.pause_filter { image.get(ctl::PAUSE_COUNT, 2) as u16 } else { 0 };
        Control {
            vmcb: pa,
            cr: image.get(ctl::CR, 4) as u32,
            dr: image.get(ctl::DR, 4) as u32,
            exceptions: image.get(ctl::EXCEPTIONS, 4) as u32,
            misc: [ctl::MISC1, ctl::MISC2, ctl::MISC3].map(|off| image.get(off, 4) as u32),
            // The low 12 bits are ignored.
            iopm: image.get(ctl::IOPM, 8) & !0xFFF,
            msrpm: image.get(ctl::MSRPM, 8) & !0xFFF,
            tsc_offset: image.get(ctl::TSC_OFFSET, 8),
            asid: image.get(ctl::ASID, 4) as u32,
            vintr: image.get(ctl::VINTR, 8),
            npt,
            virt_ext: image.get(ctl::VIRT_EXT, 8),
            pause_count: count,
            pause_left: count,
            lbr: f.lbr_virt && image.get(ctl::VIRT_EXT, 8) & 1 != 0,
            inject: image.get(ctl::EVENTINJ, 8),
            nrip: image.get(ctl::NRIP, 8),
        }
    }

    /// The consistency checks of 15.5.1, 15.20 and 15.25.3.
    fn consistent(&self, image: &Image, s: &State, c: &Control) -> bool {
        let f = &self.features;
        let beyond = !0u64 << f.maxphyaddr;
        let efer = image.get(save::EFER, 8);
        let long = efer & EFER_LME != 0 && s.cr0 & CR0_PG != 0;
        let cs = s.seg[seg::CS].attributes;
        let state = efer & EFER_SVME != 0
            && efer & !EFER_KNOWN == 0
            && !(s.cr0 & CR0_CD == 0 && s.cr0 & CR0_NW != 0)
            && s.cr0 >> 32 == 0
            && s.cr3 & beyond == 0
            && s.cr4 & !f.cr4 == 0
            && image.get(save::DR6, 8) >> 32 == 0
            && image.get(save::DR7, 8) >> 32 == 0
            && !(long && s.cr4 & CR4_PAE == 0)
            && !(long && s.cr0 & CR0_PE == 0)
            && !(long && cs & (1 << 9) != 0 && cs & (1 << 10) != 0);
        let control = c.misc[1] & (1 << misc2::VMRUN) != 0
            && c.asid != 0
            && c.asid < f.asids
            && self.tlb_control_valid(image.get(ctl::TLB_CONTROL, 1))
            // The maps' last bytes: 12 KiB and 8 KiB.
            && (c.iopm + 0x2FFF) & beyond == 0
            && (c.msrpm + 0x1FFF) & beyond == 0
            && !(f.vnmi && c.vintr & vintr::NMI_ENABLE != 0 && c.misc[0] & 2 == 0);
        let nested = c.npt.is_none_or(|npt| {
            f.nested_paging
                && self.state.cr0 & CR0_PG != 0
                && npt.cr3 & beyond == 0
                && image.get(save::PAT, 8).to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
        });
        state && control && nested && injection_valid(c.inject, s)
    }

    fn tlb_control_valid(&self, value: u64) -> bool {
        match value {
            0 | 1 => true,
            3 | 7 => self.features.flush_by_asid,
            _ => false,
        }
    }

    /// After a successful VMRUN: the injected event, before any instruction. After a refused one: the exit.
    pub(super) fn entered(&mut self, mem: &PhysMem) -> Step {
        let Some(g) = &self.guest else { return Step::Exit(exit::INVALID) };
        let nrip = self.features.nrip_save.then_some(g.ctl.nrip);
        match Event::decode(g.ctl.inject) {
            None => Step::Done(0),
            Some(event) => {
                self.nmi_mask |= event == Event::Nmi;
                self.deliver(mem, event, nrip)
            }
        }
    }

    /// #VMEXIT.
    pub(super) fn exit(&mut self, mem: &PhysMem, trap: (u64, u64, u64), during: Option<Event>, op: Option<Op>) -> Step {
        let (code, info1, info2) = trap;
        let assists = self.features.decode_assists && (code == exit::NPF || code == exit::EXCEPTION + 14);
        let bytes = if assists && op.is_some() { self.instruction_bytes(mem) } else { (0, [0; 15]) };
        if let Some(vmcb) = self.guest() {
            if self.features.nrip_save {
                let nrip = op.filter(|_| exits_with_nrip(code));
                let next = nrip.map_or(0, |op| self.wrap(self.state.rip.wrapping_add(self.length(op))));
                self.cache.store(mem, vmcb, [(ctl::NRIP, 8, next)]);
            }
            if self.features.decode_assists {
                mem.write(vmcb + ctl::FETCHED, 1, bytes.0);
                mem.write_bytes(vmcb + ctl::FETCHED + 1, &bytes.1);
            }
        }
        self.leave(mem, code, info1, info2, during, true);
        Step::Exit(code)
    }

    /// Back to the host: exit information, and the guest's state unless the entry was refused.
    fn leave(&mut self, mem: &PhysMem, code: u64, info1: u64, info2: u64, during: Option<Event>, ran: bool) {
        let Some(Guest { ctl: c, host, .. }) = self.guest.take() else { return };
        let head = [
            (ctl::EXITCODE, 8, code),
            (ctl::EXITINFO1, 8, info1),
            (ctl::EXITINFO2, 8, info2),
            (ctl::EXITINTINFO, 8, during.map_or(0, Event::encode)),
            (ctl::EVENTINJ, 8, 0),
        ];
        self.cache.store(mem, c.vmcb, head);
        if ran {
            let tpr = if c.vintr & vintr::MASKING == 0 { self.cr8 } else { c.vintr & 0xF };
            let tail = [(ctl::SHADOW, 8, u64::from(self.shadow)), (ctl::VINTR, 8, c.vintr & !0xF | tpr)];
            self.cache.store(mem, c.vmcb, self.state.stored(c.npt.is_some(), c.lbr).chain(tail));
        }
        // FS, GS, TR, LDTR, the SYSCALL and SYSENTER registers, CR2, DR0-3, DR6 and CR8 stay the guest's.
        let kept = [seg::FS, seg::GS, seg::LDTR, seg::TR].map(|n| (n, self.state.seg[n]));
        let (sys, pat, lbr) = (self.state.sys, host.pat, if c.lbr { host.lbr } else { self.state.lbr });
        let (cr2, dr6) = (self.state.cr2, self.state.dr6);
        self.state = State { sys, pat, lbr, cr2, dr6, dr7: 0x400, cpl: 0, ..host };
        for (n, segment) in kept {
            self.state.seg[n] = segment;
        }
        self.gif = false;
        self.shadow = false;
        self.halted = false;
    }

    /// The bytes at RIP, as far as they can be fetched.
    fn instruction_bytes(&mut self, mem: &PhysMem) -> (u64, [u8; 15]) {
        let mut bytes = [0; 15];
        let base = if self.state.bits64() { 0 } else { self.state.seg[seg::CS].base };
        for (n, byte) in (0..).zip(&mut bytes) {
            let addr = self.state.rip.wrapping_add(base).wrapping_add(n);
            match self.translate(mem, addr, Kind::Fetch, self.state.cpl == 3) {
                Ok(pa) => *byte = mem.read(pa, 1) as u8,
                Err(_) => return (n, bytes),
            }
        }
        (15, bytes)
    }

    /// VMSAVE and VMLOAD.
    pub(super) fn vmsave(&mut self, mem: &PhysMem, pa: u64) {
        let segments = [seg::FS, seg::GS, seg::LDTR, seg::TR].into_iter().flat_map(|n| self.state.stored_segment(n));
        let sys = (0..).zip(self.state.sys).map(|(n, value)| (save::STAR + n * 8, 8, value));
        self.cache.store(mem, pa, segments.chain(sys));
    }

    /// See [`Self::vmsave`].
    pub(super) fn vmload(&mut self, mem: &PhysMem, pa: u64) {
        let image = Image::for_vmload(mem, pa);
        for n in [seg::FS, seg::GS, seg::LDTR, seg::TR] {
            self.state.load_segment(&image, n);
        }
        self.state.sys = std::array::from_fn(|n| image.get(save::STAR + n as u64 * 8, 8));
    }
}

/// SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE.
pub(super) const EFER_KNOWN: u64 = 1 | EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME | 7 << 13;

/// Whether EVENTINJ names something that can be injected into this state.
fn injection_valid(value: u64, s: &State) -> bool {
    let (valid, kind, vector) = (value >> 31 & 1 != 0, value >> 8 & 7, value & 0xFF);
    !valid
        || match kind {
            0 | 2 | 4 => true,
            // #BR cannot happen in 64-bit mode; 2 is NMI, not an exception.
            3 => vector < 32 && vector != 2 && !(vector == 5 && s.bits64()),
            _ => false,
        }
}

/// NRIP is saved for instruction intercepts, and is 0 for others (15.7.1).
fn exits_with_nrip(code: u64) -> bool {
    matches!(code, 0x00..=0x3F | 0x43 | 0x44 | 0x65..=0x7C | 0x80..=0x8E | 0xA0..=0xA3)
}
