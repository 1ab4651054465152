//! The VMCB as plain memory (APM volume 2, appendix B): layout, offsets and typed fields.
//!
//! Everything in this crate reads and writes VMCBs through these types; they know nothing of the state machine. A
//! hypervisor that runs SVM guests may use them alone.

pub mod bits;

use bits::Intercepts;
use static_assertions::const_assert_eq;
pub use tlfs_abi::evmcb::{ENLIGHTENED_VMCB_OFFSET, EnlightenedVmcbFields};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A 16-byte segment descriptor of the state save area (APM table B-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// Selector; reserved in GDTR and IDTR.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40, packed in 12 bits: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11.
    pub attrib: u16,
    /// Limit in bytes, scaled by the granularity.
    pub limit: u32,
    /// Base, linear address.
    pub base: u64,
}

/// Offset of the state save area in the VMCB.
pub const SAVE_OFFSET: u64 = 0x400;

/// The head of the control area, offsets 0x000 to 0x0DF: all that the state machine uses (APM table B-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Control {
    /// 0x000: what exits.
    pub intercepts: Intercepts,
    /// 0x018: reserved.
    pub reserved_18: [u32; 9],
    /// 0x03C: PAUSE filter threshold, TSC ticks.
    pub pause_threshold: u16,
    /// 0x03E: PAUSE filter count.
    pub pause_count: u16,
    /// 0x040: physical address of the IO permission map (12 KiB, page aligned; low 12 bits ignored).
    pub iopm_base: u64,
    /// 0x048: physical address of the MSR permission map (8 KiB, page aligned; low 12 bits ignored).
    pub msrpm_base: u64,
    /// 0x050: added to the TSC.
    pub tsc_offset: u64,
    /// 0x058: address space identifier.
    pub asid: u32,
    /// 0x05C: TLB_CONTROL, see [`bits::tlb`].
    pub tlb_control: u8,
    /// 0x05D: reserved.
    pub reserved_5d: [u8; 3],
    /// 0x060: virtual interrupt control, see [`bits::int_ctl`].
    pub int_ctl: u64,
    /// 0x068: bit 0 interrupt shadow, bit 1 guest interrupt mask.
    pub int_state: u64,
    /// 0x070: EXITCODE, see [`crate::exit_code`].
    pub exit_code: u64,
    /// 0x078: EXITINFO1.
    pub exit_info_1: u64,
    /// 0x080: EXITINFO2.
    pub exit_info_2: u64,
    /// 0x088: EXITINTINFO, the event whose delivery the exit cut short, see [`bits::Event`].
    pub exit_int_info: u64,
    /// 0x090: bit 0 NP_ENABLE, see [`bits::np`].
    pub np_control: u64,
    /// 0x098: AVIC APIC_BAR.
    pub avic_bar: u64,
    /// 0x0A0: GHCB guest physical address.
    pub ghcb: u64,
    /// 0x0A8: EVENTINJ, see [`bits::Event`].
    pub event_inj: u64,
    /// 0x0B0: nCR3, root of the nested page table.
    pub n_cr3: u64,
    /// 0x0B8: bit 0 LBR virtualization, bit 1 virtual VMLOAD and VMSAVE, see [`bits::virt_ext`].
    pub virt_ext: u64,
    /// 0x0C0: VMCB clean bits, see [`bits::clean`].
    pub clean: u32,
    /// 0x0C4: reserved.
    pub reserved_c4: u32,
    /// 0x0C8: nRIP, the address of the next instruction, where the processor saves it.
    pub next_rip: u64,
    /// 0x0D0: number of instruction bytes fetched (decode assists).
    pub insn_len: u8,
    /// 0x0D1: the instruction bytes (decode assists).
    pub insn_bytes: [u8; 15],
}

/// The head of the state save area, offsets 0x400 to 0x697 of the VMCB (APM table B-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Save {
    /// 0x400: ES.
    pub es: Segment,
    /// 0x410: CS.
    pub cs: Segment,
    /// 0x420: SS.
    pub ss: Segment,
    /// 0x430: DS.
    pub ds: Segment,
    /// 0x440: FS. VMLOAD and VMSAVE only.
    pub fs: Segment,
    /// 0x450: GS. VMLOAD and VMSAVE only.
    pub gs: Segment,
    /// 0x460: GDTR.
    pub gdtr: Segment,
    /// 0x470: LDTR. VMLOAD and VMSAVE only.
    pub ldtr: Segment,
    /// 0x480: IDTR.
    pub idtr: Segment,
    /// 0x490: TR. VMLOAD and VMSAVE only.
    pub tr: Segment,
    /// 0x4A0: reserved.
    pub reserved_4a0: [u8; 43],
    /// 0x4CB: current privilege level.
    pub cpl: u8,
    /// 0x4CC: reserved.
    pub reserved_4cc: u32,
    /// 0x4D0: EFER.
    pub efer: u64,
    /// 0x4D8: reserved.
    pub reserved_4d8: [u64; 14],
    /// 0x548: CR4.
    pub cr4: u64,
    /// 0x550: CR3.
    pub cr3: u64,
    /// 0x558: CR0.
    pub cr0: u64,
    /// 0x560: DR7.
    pub dr7: u64,
    /// 0x568: DR6.
    pub dr6: u64,
    /// 0x570: RFLAGS.
    pub rflags: u64,
    /// 0x578: RIP.
    pub rip: u64,
    /// 0x580: reserved.
    pub reserved_580: [u64; 11],
    /// 0x5D8: RSP.
    pub rsp: u64,
    /// 0x5E0: S_CET.
    pub s_cet: u64,
    /// 0x5E8: SSP.
    pub ssp: u64,
    /// 0x5F0: ISST_ADDR.
    pub isst_addr: u64,
    /// 0x5F8: RAX.
    pub rax: u64,
    /// 0x600: STAR. VMLOAD and VMSAVE only.
    pub star: u64,
    /// 0x608: LSTAR. VMLOAD and VMSAVE only.
    pub lstar: u64,
    /// 0x610: CSTAR. VMLOAD and VMSAVE only.
    pub cstar: u64,
    /// 0x618: SFMASK. VMLOAD and VMSAVE only.
    pub sfmask: u64,
    /// 0x620: KernelGSbase. VMLOAD and VMSAVE only.
    pub kernel_gs_base: u64,
    /// 0x628: SYSENTER_CS. VMLOAD and VMSAVE only.
    pub sysenter_cs: u64,
    /// 0x630: SYSENTER_ESP. VMLOAD and VMSAVE only.
    pub sysenter_esp: u64,
    /// 0x638: SYSENTER_EIP. VMLOAD and VMSAVE only.
    pub sysenter_eip: u64,
    /// 0x640: CR2.
    pub cr2: u64,
    /// 0x648: reserved.
    pub reserved_648: [u64; 4],
    /// 0x668: G_PAT, used with nested paging only.
    pub g_pat: u64,
    /// 0x670: DBGCTL, with LBR virtualization only (as the four that follow).
    pub dbgctl: u64,
    /// 0x678: LastBranchFromIP.
    pub br_from: u64,
    /// 0x680: LastBranchToIP.
    pub br_to: u64,
    /// 0x688: LastIntFromIP.
    pub last_excp_from: u64,
    /// 0x690: LastIntToIP.
    pub last_excp_to: u64,
}

/// One VMCB: 4 KiB, page aligned.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// 0x000: the head of the control area.
    pub control: Control,
    /// 0x0E0: AVIC, SEV-ES and reserved fields, which nested guests do not use.
    pub control_tail: [u64; 96],
    /// 0x3E0: the Hyper-V fields.
    pub enlightenments: EnlightenedVmcbFields,
    /// 0x400: the head of the state save area.
    pub save: Save,
    /// 0x698: the rest of the state save area.
    pub save_tail: [u64; 301],
}

macro_rules! assert_offsets {
    ($ty:ty, $base:expr, { $($field:ident: $off:expr),* $(,)? }) => {
        $(const_assert_eq!(core::mem::offset_of!($ty, $field).wrapping_add($base), $off);)*
    };
}

assert_offsets!(Control, 0, {
    intercepts: 0x000, pause_threshold: 0x03C, pause_count: 0x03E, iopm_base: 0x040, msrpm_base: 0x048,
    tsc_offset: 0x050, asid: 0x058, tlb_control: 0x05C, int_ctl: 0x060, int_state: 0x068, exit_code: 0x070,
    exit_info_1: 0x078, exit_info_2: 0x080, exit_int_info: 0x088, np_control: 0x090, avic_bar: 0x098, ghcb: 0x0A0,
    event_inj: 0x0A8, n_cr3: 0x0B0, virt_ext: 0x0B8, clean: 0x0C0, next_rip: 0x0C8, insn_len: 0x0D0,
    insn_bytes: 0x0D1,
});
assert_offsets!(Save, 0x400, {
    es: 0x400, cs: 0x410, ss: 0x420, ds: 0x430, fs: 0x440, gs: 0x450, gdtr: 0x460, ldtr: 0x470, idtr: 0x480,
    tr: 0x490, cpl: 0x4CB, efer: 0x4D0, cr4: 0x548, cr3: 0x550, cr0: 0x558, dr7: 0x560, dr6: 0x568, rflags: 0x570,
    rip: 0x578, rsp: 0x5D8, s_cet: 0x5E0, ssp: 0x5E8, isst_addr: 0x5F0, rax: 0x5F8, star: 0x600, lstar: 0x608,
    cstar: 0x610, sfmask: 0x618, kernel_gs_base: 0x620, sysenter_cs: 0x628, sysenter_esp: 0x630,
    sysenter_eip: 0x638, cr2: 0x640, g_pat: 0x668, dbgctl: 0x670, br_from: 0x678, br_to: 0x680,
    last_excp_from: 0x688, last_excp_to: 0x690,
});
assert_offsets!(Vmcb, 0, { control: 0x000, enlightenments: 0x3E0, save: 0x400, save_tail: 0x698 });
const_assert_eq!(size_of::<Control>(), 0x0E0);
const_assert_eq!(size_of::<Save>(), 0x298);
const_assert_eq!(size_of::<Segment>(), 16);
const_assert_eq!(size_of::<Vmcb>(), 0x1000);

impl Save {
    /// Takes over DBGCTL and the last-branch registers of `from`.
    #[inline]
    pub const fn set_branches(&mut self, from: &Self) {
        self.dbgctl = from.dbgctl;
        self.br_from = from.br_from;
        self.br_to = from.br_to;
        self.last_excp_from = from.last_excp_from;
        self.last_excp_to = from.last_excp_to;
    }
}

impl Vmcb {
    /// True when the guest described here runs 64-bit code: long mode active and CS.L set.
    #[inline]
    pub const fn in_64bit_code(&self) -> bool {
        self.save.efer & bits::efer::LMA != 0 && self.save.cs.attrib & bits::seg::L != 0
    }

    /// Ends the instruction at RIP: RIP becomes `next_rip`, the interrupt shadow ends, and with RFLAGS.TF a
    /// single-step #DB follows (DR6.BS set) unless another event is being injected.
    #[inline]
    pub const fn complete_instruction(&mut self, next_rip: u64) {
        self.save.rip = next_rip;
        self.control.int_state &= !bits::int_state::SHADOW;
        if self.save.rflags & bits::rflags::TF != 0 {
            self.trap_single_step();
        }
    }

    #[cold]
    const fn trap_single_step(&mut self) {
        self.save.dr6 = self.save.dr6 | bits::DR6_BS;
        if self.control.event_inj & bits::Event::VALID == 0 {
            self.control.event_inj = bits::Event::exception(1, None).raw();
        }
    }

    /// Asks for exception `vector` to be injected at the next VMRUN, with `error_code` where the vector has one.
    #[inline]
    pub const fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) {
        self.control.event_inj = bits::Event::exception(vector, error_code).raw();
    }
}
