//! Which registers VMRUN loads from the save area and #VMEXIT writes to it (APM volume 2, 15.5 and 15.6).

use super::vmcb::{Image, save};
use crate::model::cpu::state::{Segment, State, bit::*, seg, sign_extend};

impl State {
    pub(super) fn load_segment(&mut self, image: &Image, n: usize) {
        let off = save::SEGMENTS + n as u64 * 16;
        self.seg[n] = Segment {
            selector: image.get(off, 2) as u16,
            attributes: image.get(off + 2, 2) as u16 & 0xFFF,
            limit: image.get(off + 4, 4) as u32,
            base: sign_extend(image.get(off + 8, 8), 48),
        };
    }

    /// What VMRUN loads from the save area; the rest is VMLOAD's.
    pub(super) fn load(&mut self, image: &Image, nested: bool, lbr: bool) {
        for n in [seg::ES, seg::CS, seg::SS, seg::DS, seg::GDTR, seg::IDTR] {
            self.load_segment(image, n);
        }
        let get = |off| image.get(off, 8);
        self.efer = get(save::EFER);
        self.cr0 = get(save::CR0) | CR0_ET;
        self.cr2 = get(save::CR2);
        self.cr3 = get(save::CR3);
        self.cr4 = get(save::CR4);
        self.dr6 = get(save::DR6) & !(1 << 12) | 0xFFFF_0FF0;
        self.dr7 = get(save::DR7) & !0xD800 | 0x400;
        self.rflags = get(save::RFLAGS) & 0x3F_7FD5 | 2;
        self.rip = get(save::RIP);
        self.rsp = get(save::RSP);
        self.rax = get(save::RAX);
        // LMA follows from the rest, whatever the VMCB says.
        let lma = self.efer & EFER_LME != 0 && self.cr0 & CR0_PG != 0;
        self.efer = self.efer & !EFER_LMA | if lma { EFER_LMA } else { 0 };
        self.cpl = match (self.cr0 & CR0_PE != 0, self.rflags & FLAG_VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => image.get(save::CPL, 1) as u8 & 3,
        };
        if nested {
            self.pat = get(save::PAT);
        }
        if lbr {
            self.lbr = std::array::from_fn(|n| get(save::DEBUGCTL + n as u64 * 8));
        }
    }

    /// What #VMEXIT writes to the save area: offset, size, value.
    pub(super) fn stored(&self, nested: bool, lbr: bool) -> impl Iterator<Item = (u64, usize, u64)> {
        let segments = [seg::ES, seg::CS, seg::SS, seg::DS, seg::GDTR, seg::IDTR];
        let registers = [
            (save::EFER, self.efer),
            (save::CR0, self.cr0),
            (save::CR2, self.cr2),
            (save::CR3, self.cr3),
            (save::CR4, self.cr4),
            (save::DR6, self.dr6),
            (save::DR7, self.dr7),
            (save::RFLAGS, self.rflags),
            (save::RIP, self.rip),
            (save::RSP, self.rsp),
            (save::RAX, self.rax),
        ];
        let branches = (0..).zip(self.lbr).map(|(n, value)| (save::DEBUGCTL + n * 8, value));
        segments
            .into_iter()
            .flat_map(|n| self.stored_segment(n))
            .chain([(save::CPL, 1, u64::from(self.cpl))])
            .chain(registers.into_iter().map(|(off, value)| (off, 8, value)))
            .chain(nested.then_some((save::PAT, 8, self.pat)))
            .chain(branches.filter(move |_| lbr).map(|(off, value)| (off, 8, value)))
    }

    pub(super) fn stored_segment(&self, n: usize) -> [(u64, usize, u64); 2] {
        let (off, s) = (save::SEGMENTS + n as u64 * 16, self.seg[n]);
        let low = u64::from(s.selector) | u64::from(s.attributes) << 16 | u64::from(s.limit) << 32;
        [(off, 8, low), (off + 8, 8, s.base)]
    }
}
