//! The VMCB by its offsets (APM volume 2, appendix B), written down here once more on purpose: this hypervisor is the
//! other side of what the library emulates, and a layout error shared by both would show in no scenario.
//!
//! Used by `guest` and the scenarios; uses nothing.

/// One VMCB page.
#[repr(C, align(4096))]
pub struct Vmcb([u8; 4096]);

macro_rules! fields {
    ($($(#[$doc:meta])* $get:ident, $set:ident: $ty:ty = $offset:expr;)*) => {
        impl Vmcb {
            $(
                $(#[$doc])*
                pub fn $get(&self) -> $ty {
                    let mut bytes = [0; size_of::<$ty>()];
                    bytes.copy_from_slice(&self.0[$offset..$offset + size_of::<$ty>()]);
                    <$ty>::from_le_bytes(bytes)
                }

                $(#[$doc])*
                pub fn $set(&mut self, value: $ty) {
                    self.0[$offset..$offset + size_of::<$ty>()].copy_from_slice(&value.to_le_bytes());
                }
            )*
        }
    };
}

fields! {
    /// Bits 15:0 reads of CR0 to CR15, bits 31:16 writes.
    cr_intercepts, set_cr_intercepts: u32 = 0x000;
    /// Bits 15:0 reads of DR0 to DR15, bits 31:16 writes.
    dr_intercepts, set_dr_intercepts: u32 = 0x004;
    /// Bit n: exception n.
    exception_intercepts, set_exception_intercepts: u32 = 0x008;
    /// INTR, NMI, CPUID, HLT, IOIO, MSR and others.
    misc1, set_misc1: u32 = 0x00C;
    /// VMRUN, VMMCALL, VMLOAD and others.
    misc2, set_misc2: u32 = 0x010;
    iopm_base, set_iopm_base: u64 = 0x040;
    msrpm_base, set_msrpm_base: u64 = 0x048;
    tsc_offset, set_tsc_offset: u64 = 0x050;
    asid, set_asid: u32 = 0x058;
    tlb_control, set_tlb_control: u8 = 0x05C;
    /// V_TPR 7:0, V_IRQ 8, V_GIF 9, V_INTR_PRIO 19:16, V_IGN_TPR 20, V_INTR_MASKING 24, V_INTR_VECTOR 39:32.
    int_ctl, set_int_ctl: u64 = 0x060;
    /// Bit 0: interrupt shadow.
    int_state, set_int_state: u64 = 0x068;
    exit_code, set_exit_code: u64 = 0x070;
    exit_info1, set_exit_info1: u64 = 0x078;
    exit_info2, set_exit_info2: u64 = 0x080;
    exit_int_info, set_exit_int_info: u64 = 0x088;
    /// Bit 0: nested paging.
    np_enable, set_np_enable: u64 = 0x090;
    event_inj, set_event_inj: u64 = 0x0A8;
    n_cr3, set_n_cr3: u64 = 0x0B0;
    clean, set_clean: u32 = 0x0C0;
    next_rip, set_next_rip: u64 = 0x0C8;
    /// HV_VMCB_ENLIGHTENMENTS: bit 0 direct flush, bit 1 MSR bitmap, bit 2 NPT TLB.
    hv_control, set_hv_control: u32 = 0x3E0;
    hv_vp_id, set_hv_vp_id: u32 = 0x3E4;
    hv_vm_id, set_hv_vm_id: u64 = 0x3E8;
    hv_partition_assist, set_hv_partition_assist: u64 = 0x3F0;
    gdtr_limit, set_gdtr_limit: u32 = 0x464;
    gdtr_base, set_gdtr_base: u64 = 0x468;
    idtr_limit, set_idtr_limit: u32 = 0x484;
    idtr_base, set_idtr_base: u64 = 0x488;
    cpl, set_cpl: u8 = 0x4CB;
    efer, set_efer: u64 = 0x4D0;
    cr4, set_cr4: u64 = 0x548;
    cr3, set_cr3: u64 = 0x550;
    cr0, set_cr0: u64 = 0x558;
    dr7, set_dr7: u64 = 0x560;
    dr6, set_dr6: u64 = 0x568;
    rflags, set_rflags: u64 = 0x570;
    rip, set_rip: u64 = 0x578;
    rsp, set_rsp: u64 = 0x5D8;
    rax, set_rax: u64 = 0x5F8;
    cr2, set_cr2: u64 = 0x640;
    g_pat, set_g_pat: u64 = 0x668;
}

/// A segment register's slot in the save area.
#[derive(Clone, Copy)]
pub enum Segment {
    Es = 0x400,
    Cs = 0x410,
    Ss = 0x420,
    Ds = 0x430,
    Fs = 0x440,
    Gs = 0x450,
    Ldtr = 0x470,
    Tr = 0x490,
}

impl Vmcb {
    /// A page of zeros.
    pub const fn new() -> Self {
        Self([0; 4096])
    }

    /// Sets a segment: `attributes` are descriptor bits 47:40 and 55:52 packed into 12 bits.
    pub fn set_segment(&mut self, segment: Segment, selector: u16, attributes: u16, limit: u32, base: u64) {
        let slot = &mut self.0[segment as usize..segment as usize + 16];
        slot[0..2].copy_from_slice(&selector.to_le_bytes());
        slot[2..4].copy_from_slice(&attributes.to_le_bytes());
        slot[4..8].copy_from_slice(&limit.to_le_bytes());
        slot[8..16].copy_from_slice(&base.to_le_bytes());
    }

    /// A segment as [`set_segment`](Self::set_segment) set it: selector, attributes, limit, base.
    pub fn segment(&self, segment: Segment) -> (u16, u16, u32, u64) {
        let mut slot = [0; 16];
        slot.copy_from_slice(&self.0[segment as usize..segment as usize + 16]);
        let word = u128::from_le_bytes(slot);
        (word as u16, (word >> 16) as u16, (word >> 32) as u32, (word >> 64) as u64)
    }

    /// Raw bytes, for scenarios that damage a VMCB on purpose.
    pub fn bytes_mut(&mut self) -> &mut [u8; 4096] {
        &mut self.0
    }
}

/// Bits of [`Vmcb::misc1`].
pub mod misc1 {
    pub const INTR: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    pub const VINTR: u32 = 1 << 4;
    pub const CR0_SEL_WRITE: u32 = 1 << 5;
    pub const RDTSC: u32 = 1 << 14;
    pub const CPUID: u32 = 1 << 18;
    pub const INTN: u32 = 1 << 21;
    pub const PAUSE: u32 = 1 << 23;
    pub const HLT: u32 = 1 << 24;
    pub const INVLPG: u32 = 1 << 25;
    pub const INVLPGA: u32 = 1 << 26;
    pub const IOIO_PROT: u32 = 1 << 27;
    pub const MSR_PROT: u32 = 1 << 28;
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Bits of [`Vmcb::misc2`].
pub mod misc2 {
    pub const VMRUN: u32 = 1 << 0;
    pub const VMMCALL: u32 = 1 << 1;
    pub const VMLOAD: u32 = 1 << 2;
    pub const VMSAVE: u32 = 1 << 3;
    pub const STGI: u32 = 1 << 4;
    pub const CLGI: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 9;
}

/// Exit codes (APM volume 2, appendix C).
pub mod exit {
    pub const CR0_READ: u64 = 0x000;
    pub const CR3_READ: u64 = 0x003;
    pub const CR0_WRITE: u64 = 0x010;
    pub const CR3_WRITE: u64 = 0x013;
    pub const CR4_WRITE: u64 = 0x014;
    pub const CR8_WRITE: u64 = 0x018;
    pub const DR0_READ: u64 = 0x020;
    pub const DR7_WRITE: u64 = 0x037;
    pub const EXCP_DE: u64 = 0x040;
    pub const EXCP_UD: u64 = 0x046;
    pub const EXCP_GP: u64 = 0x04D;
    pub const EXCP_PF: u64 = 0x04E;
    pub const INTR: u64 = 0x060;
    pub const NMI: u64 = 0x061;
    pub const INIT: u64 = 0x063;
    pub const VINTR: u64 = 0x064;
    pub const CR0_SEL_WRITE: u64 = 0x065;
    pub const RDTSC: u64 = 0x06E;
    pub const CPUID: u64 = 0x072;
    pub const INTN: u64 = 0x075;
    pub const PAUSE: u64 = 0x077;
    pub const HLT: u64 = 0x078;
    pub const INVLPG: u64 = 0x079;
    pub const INVLPGA: u64 = 0x07A;
    pub const IOIO: u64 = 0x07B;
    pub const MSR: u64 = 0x07C;
    pub const SHUTDOWN: u64 = 0x07F;
    pub const VMRUN: u64 = 0x080;
    pub const VMMCALL: u64 = 0x081;
    pub const VMLOAD: u64 = 0x082;
    pub const VMSAVE: u64 = 0x083;
    pub const STGI: u64 = 0x084;
    pub const CLGI: u64 = 0x085;
    pub const WBINVD: u64 = 0x089;
    pub const NPF: u64 = 0x400;
    pub const INVALID: u64 = u64::MAX;
    /// HV_SVM_EXITCODE_ENL: the synthetic exit after a direct flush.
    pub const HV_ENLIGHTENED: u64 = 0xF000_0000;
}

/// EVENTINJ and EXITINTINFO: valid, with error code, and the types.
pub mod event {
    pub const VALID: u64 = 1 << 31;
    pub const ERROR_CODE: u64 = 1 << 11;
    pub const TYPE_INTR: u64 = 0 << 8;
    pub const TYPE_NMI: u64 = 2 << 8;
    pub const TYPE_EXCEPTION: u64 = 3 << 8;
    pub const TYPE_SOFTWARE: u64 = 4 << 8;
    /// The bits that say what was delivered: vector, type, valid.
    pub const WHAT: u64 = 0xFF | 7 << 8 | VALID;
}
