//! The VMCB: where its fields are (APM volume 2, appendix B), which clean bit covers them (15.15.3), and the CPU's
//! cached copies.

use crate::model::mem::PhysMem;
use crate::model::rng::Rng;
use crate::model::tlb::FxMap;

/// Offsets of the control area.
pub mod ctl {
    /// CR reads 15:0 and writes 31:16 to intercept.
    pub const CR: u64 = 0x000;
    /// DR reads 15:0 and writes 31:16 to intercept.
    pub const DR: u64 = 0x004;
    /// Exceptions to intercept.
    pub const EXCEPTIONS: u64 = 0x008;
    /// Intercepts, third vector: INTR (0) to SHUTDOWN (31).
    pub const MISC1: u64 = 0x00C;
    /// Intercepts, fourth vector: VMRUN (0) onwards.
    pub const MISC2: u64 = 0x010;
    /// Intercepts, fifth vector: INVLPGB (0) onwards.
    pub const MISC3: u64 = 0x014;
    /// PAUSE filter threshold, 16 bits.
    pub const PAUSE_THRESHOLD: u64 = 0x03C;
    /// PAUSE filter count, 16 bits.
    pub const PAUSE_COUNT: u64 = 0x03E;
    /// IO permission map.
    pub const IOPM: u64 = 0x040;
    /// MSR permission map.
    pub const MSRPM: u64 = 0x048;
    /// TSC offset.
    pub const TSC_OFFSET: u64 = 0x050;
    /// ASID, 32 bits.
    pub const ASID: u64 = 0x058;
    /// TLB control, 8 bits.
    pub const TLB_CONTROL: u64 = 0x05C;
    /// V_TPR 7:0, V_IRQ 8, V_GIF 9, V_NMI 11, V_NMI_MASK 12, V_INTR_PRIO 19:16, V_IGN_TPR 20, V_INTR_MASKING 24,
    /// V_GIF enable 25, V_NMI enable 26, V_INTR_VECTOR 39:32.
    pub const VINTR: u64 = 0x060;
    /// Interrupt shadow (0), guest interrupt mask (1).
    pub const SHADOW: u64 = 0x068;
    /// Exit code.
    pub const EXITCODE: u64 = 0x070;
    /// Exit information 1.
    pub const EXITINFO1: u64 = 0x078;
    /// Exit information 2.
    pub const EXITINFO2: u64 = 0x080;
    /// The event whose delivery the exit interrupted.
    pub const EXITINTINFO: u64 = 0x088;
    /// Nested paging enable (0).
    pub const NP: u64 = 0x090;
    /// Event injection.
    pub const EVENTINJ: u64 = 0x0A8;
    /// Root of the nested tables.
    pub const NCR3: u64 = 0x0B0;
    /// LBR virtualization (0), virtual VMLOAD and VMSAVE (1).
    pub const VIRT_EXT: u64 = 0x0B8;
    /// Clean bits, 32 bits.
    pub const CLEAN: u64 = 0x0C0;
    /// Next RIP.
    pub const NRIP: u64 = 0x0C8;
    /// Number of bytes fetched, 8 bits, and then 15 bytes.
    pub const FETCHED: u64 = 0x0D0;
}

/// Offsets of the state save area, from the start of the VMCB.
pub mod save {
    /// ES, and each 16 bytes further CS, SS, DS, FS, GS, GDTR, LDTR, IDTR, TR: selector, attributes, limit, base.
    pub const SEGMENTS: u64 = 0x400;
    /// CPL, 8 bits.
    pub const CPL: u64 = 0x4CB;
    /// EFER.
    pub const EFER: u64 = 0x4D0;
    /// CR4.
    pub const CR4: u64 = 0x548;
    /// CR3.
    pub const CR3: u64 = 0x550;
    /// CR0.
    pub const CR0: u64 = 0x558;
    /// DR7.
    pub const DR7: u64 = 0x560;
    /// DR6.
    pub const DR6: u64 = 0x568;
    /// RFLAGS.
    pub const RFLAGS: u64 = 0x570;
    /// RIP.
    pub const RIP: u64 = 0x578;
    /// RSP.
    pub const RSP: u64 = 0x5D8;
    /// RAX.
    pub const RAX: u64 = 0x5F8;
    /// STAR, and each 8 bytes further LSTAR, CSTAR, SFMASK, KernelGsBase, SYSENTER_CS, _ESP, _EIP.
    pub const STAR: u64 = 0x600;
    /// CR2.
    pub const CR2: u64 = 0x640;
    /// Guest PAT.
    pub const PAT: u64 = 0x668;
    /// DEBUGCTL, and each 8 bytes further BR_FROM, BR_TO, LASTEXCPFROM, LASTEXCPTO.
    pub const DEBUGCTL: u64 = 0x670;
}

/// Exit codes that are not in a run of their own.
pub mod exit {
    /// Exceptions: 0x40 + vector.
    pub const EXCEPTION: u64 = 0x40;
    /// First code of the third intercept vector (bit n exits with 0x60 + n).
    pub const MISC1: u64 = 0x60;
    /// First code of the fourth intercept vector.
    pub const MISC2: u64 = 0x80;
    /// Shutdown.
    pub const SHUTDOWN: u64 = 0x7F;
    /// Nested page fault.
    pub const NPF: u64 = 0x400;
    /// VMRUN refused.
    pub const INVALID: u64 = u64::MAX;
}

/// Bits of the third intercept vector; the exit code is 0x60 + bit.
#[allow(missing_docs)]
pub mod misc1 {
    pub const INTR: u32 = 0;
    pub const NMI: u32 = 1;
    pub const SMI: u32 = 2;
    pub const INIT: u32 = 3;
    pub const VINTR: u32 = 4;
    pub const CR0_SELECTIVE: u32 = 5;
    pub const IDTR_READ: u32 = 6;
    pub const RDTSC: u32 = 14;
    pub const RDPMC: u32 = 15;
    pub const PUSHF: u32 = 16;
    pub const POPF: u32 = 17;
    pub const CPUID: u32 = 18;
    pub const RSM: u32 = 19;
    pub const IRET: u32 = 20;
    pub const SOFTINT: u32 = 21;
    pub const INVD: u32 = 22;
    pub const PAUSE: u32 = 23;
    pub const HLT: u32 = 24;
    pub const INVLPG: u32 = 25;
    pub const INVLPGA: u32 = 26;
    pub const IOIO: u32 = 27;
    pub const MSR: u32 = 28;
    pub const SHUTDOWN: u32 = 31;
}

/// Bits of the fourth intercept vector; the exit code is 0x80 + bit.
#[allow(missing_docs)]
pub mod misc2 {
    pub const VMRUN: u32 = 0;
    pub const VMMCALL: u32 = 1;
    pub const VMLOAD: u32 = 2;
    pub const VMSAVE: u32 = 3;
    pub const STGI: u32 = 4;
    pub const CLGI: u32 = 5;
    pub const SKINIT: u32 = 6;
    pub const RDTSCP: u32 = 7;
    pub const ICEBP: u32 = 8;
    pub const WBINVD: u32 = 9;
    pub const MONITOR: u32 = 10;
    pub const MWAIT: u32 = 11;
    pub const XSETBV: u32 = 13;
}

/// Bits of [`ctl::VINTR`].
#[allow(missing_docs)]
pub mod vintr {
    pub const IRQ: u64 = 1 << 8;
    pub const GIF: u64 = 1 << 9;
    pub const NMI: u64 = 1 << 11;
    pub const NMI_MASK: u64 = 1 << 12;
    pub const IGN_TPR: u64 = 1 << 20;
    pub const MASKING: u64 = 1 << 24;
    pub const GIF_ENABLE: u64 = 1 << 25;
    pub const NMI_ENABLE: u64 = 1 << 26;
}

/// What each clean bit covers: bit, first offset, end.
const GROUPS: [(u32, u64, u64); 20] = [
    (0, ctl::CR, 0x018),
    (0, ctl::PAUSE_THRESHOLD, 0x040),
    (0, ctl::TSC_OFFSET, 0x058),
    (1, ctl::IOPM, 0x050),
    (2, ctl::ASID, 0x05C),
    (3, ctl::VINTR, 0x068),
    (4, ctl::NCR3, 0x0B8),
    (4, save::PAT, 0x670),
    (5, save::CR4, 0x560),
    (5, save::EFER, 0x4D8),
    (6, save::DR7, 0x570),
    (7, 0x460, 0x470),
    (7, 0x480, 0x490),
    (8, 0x400, 0x440),
    (8, save::CPL, 0x4CC),
    (9, save::CR2, 0x648),
    (10, save::DEBUGCTL, 0x698),
    // Beyond what the model has: AVIC, CET.
    (11, 0x098, 0x0A0),
    (11, 0x0E0, 0x0E8),
    (12, 0x5E0, 0x5F8),
];

/// The parts of a VMCB that a CPU reads, as bytes.
#[derive(Clone)]
pub(super) struct Image([u8; 0x6A0]);

/// The control area and save area as far as they are defined.
const PARTS: [(usize, usize); 2] = [(0, 0x0E8), (0x400, 0x6A0)];
/// What VMLOAD reads: FS to TR, and STAR to SYSENTER_EIP.
const VMLOAD_PARTS: [(usize, usize); 2] = [(0x440, 0x4A0), (0x600, 0x640)];

impl Image {
    /// Copies these parts of the VMCB at `pa` once.
    fn read(mem: &PhysMem, pa: u64, parts: [(usize, usize); 2]) -> Self {
        let mut image = [0; 0x6A0];
        for (from, to) in parts {
            mem.read_bytes(pa + from as u64, &mut image[from..to]);
        }
        Self(image)
    }

    /// What VMLOAD reads, which no clean bit covers.
    pub(super) fn for_vmload(mem: &PhysMem, pa: u64) -> Self {
        Self::read(mem, pa, VMLOAD_PARTS)
    }

    /// A field of `size` bytes.
    pub(super) fn get(&self, off: u64, size: usize) -> u64 {
        let mut word = [0; 8];
        word[..size].copy_from_slice(&self.0[off as usize..off as usize + size]);
        u64::from_le_bytes(word)
    }

    fn set(&mut self, off: u64, size: usize, value: u64) {
        self.0[off as usize..off as usize + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

/// The CPU's cached copies of VMCBs, by physical address.
#[derive(Clone)]
pub(super) struct Cache {
    copies: FxMap<u64, Image>,
    rng: Rng,
    /// How often, of 1,024, a clean group is taken from the copy.
    pub(super) use_copy: u32,
}

impl Cache {
    pub(super) fn new(seed: u64) -> Self {
        Self { copies: FxMap::default(), rng: Rng::new(seed), use_copy: 512 }
    }

    /// Loads the VMCB at `pa`: a group whose clean bit is set may come from the copy of an earlier run.
    pub(super) fn load(&mut self, mem: &PhysMem, pa: u64, clean_bits: bool) -> Image {
        let mut image = Image::read(mem, pa, PARTS);
        if !clean_bits {
            return image;
        }
        let clean = image.get(ctl::CLEAN, 4) as u32;
        if let Some(copy) = self.copies.get_mut(&pa) {
            for bit in 0..=12 {
                if clean & (1 << bit) != 0 && self.rng.chance(self.use_copy) {
                    for (_, from, to) in GROUPS.iter().filter(|g| g.0 == bit) {
                        let range = *from as usize..*to as usize;
                        image.0[range.clone()].copy_from_slice(&copy.0[range]);
                    }
                }
            }
            copy.0 = image.0;
            return image;
        }
        if self.copies.len() >= 16 {
            self.copies.clear();
        }
        self.copies.insert(pa, image.clone());
        image
    }

    /// Writes fields back (offset, size, value), to memory and to the copy.
    pub(super) fn store(&mut self, mem: &PhysMem, pa: u64, fields: impl IntoIterator<Item = (u64, usize, u64)>) {
        let mut copy = self.copies.get_mut(&pa);
        for (off, size, value) in fields {
            mem.write(pa + off, size as u64, value);
            if let Some(copy) = &mut copy {
                copy.set(off, size, value);
            }
        }
    }
}

/// Writes a VMCB that enters: a 64-bit guest without nested paging, CPL 0, interrupts off, ASID 1, tables at `cr3`, and
/// only VMRUN intercepted.
pub fn write_minimal(mem: &PhysMem, pa: u64, cr3: u64) {
    (0..512).for_each(|n| mem.write(pa + n * 8, 8, 0));
    mem.write(pa + ctl::MISC2, 4, 1 << misc2::VMRUN);
    mem.write(pa + ctl::ASID, 4, 1);
    for (n, attributes) in [(0, 0xC93), (1, 0x29B), (2, 0xC93), (3, 0xC93), (6, 0), (8, 0)] {
        mem.write(pa + save::SEGMENTS + n * 16 + 2, 2, attributes);
        mem.write(pa + save::SEGMENTS + n * 16 + 4, 4, 0xFFFF_FFFF);
    }
    for (off, value) in [
        (save::EFER, 0x1D00),
        (save::CR0, 0x8001_0031),
        (save::CR3, cr3),
        (save::CR4, 0xA0),
        (save::DR6, 0xFFFF_0FF0),
        (save::DR7, 0x400),
        (save::RFLAGS, 2),
        (save::RIP, 0x1000),
        (save::RSP, 0x8000),
        (save::PAT, super::state::PAT_RESET),
    ] {
        mem.write(pa + off, 8, value);
    }
}
