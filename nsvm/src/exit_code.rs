//! Exit codes (APM volume 2, appendix C), as the VMCB's EXITCODE holds them.

/// Reads of CR0 to CR15 are 0x000 to 0x00F.
pub const CR_READ: u64 = 0x000;
/// Writes of CR0 to CR15 are 0x010 to 0x01F.
pub const CR_WRITE: u64 = 0x010;
/// Reads of DR0 to DR15 are 0x020 to 0x02F.
pub const DR_READ: u64 = 0x020;
/// Writes of DR0 to DR15 are 0x030 to 0x03F.
pub const DR_WRITE: u64 = 0x030;
/// Exceptions 0 to 31 are 0x040 to 0x05F.
pub const EXCEPTION: u64 = 0x040;
/// Physical interrupt. The codes from here to 0x07F are the bits of intercept vector 3.
pub const INTR: u64 = 0x060;
/// NMI.
pub const NMI: u64 = 0x061;
/// SMI.
pub const SMI: u64 = 0x062;
/// INIT.
pub const INIT: u64 = 0x063;
/// Virtual interrupt.
pub const VINTR: u64 = 0x064;
/// Selective CR0 write.
pub const CR0_SEL_WRITE: u64 = 0x065;
/// CPUID.
pub const CPUID: u64 = 0x072;
/// IRET.
pub const IRET: u64 = 0x074;
/// HLT.
pub const HLT: u64 = 0x078;
/// INVLPGA.
pub const INVLPGA: u64 = 0x07A;
/// IN, OUT, INS, OUTS. EXITINFO1 describes the access, EXITINFO2 is the next RIP.
pub const IOIO: u64 = 0x07B;
/// RDMSR (EXITINFO1 = 0) or WRMSR (1).
pub const MSR: u64 = 0x07C;
/// Task switch.
pub const TASK_SWITCH: u64 = 0x07D;
/// Shutdown.
pub const SHUTDOWN: u64 = 0x07F;
/// VMRUN. The codes from here to 0x08F are the bits 15:0 of intercept vector 4.
pub const VMRUN: u64 = 0x080;
/// VMMCALL.
pub const VMMCALL: u64 = 0x081;
/// VMLOAD.
pub const VMLOAD: u64 = 0x082;
/// VMSAVE.
pub const VMSAVE: u64 = 0x083;
/// STGI.
pub const STGI: u64 = 0x084;
/// CLGI.
pub const CLGI: u64 = 0x085;
/// SKINIT.
pub const SKINIT: u64 = 0x086;
/// XSETBV.
pub const XSETBV: u64 = 0x08D;
/// Trap after a write of EFER.
pub const EFER_WRITE_TRAP: u64 = 0x08F;
/// Traps after writes of CR0 to CR15 are 0x090 to 0x09F.
pub const CR_WRITE_TRAP: u64 = 0x090;
/// INVLPGB. The codes from here to 0x0A6 are the bits of intercept vector 5.
pub const INVLPGB: u64 = 0x0A0;
/// Nested page fault. EXITINFO1 is the error code, EXITINFO2 the guest physical address.
pub const NPF: u64 = 0x400;
/// Hyper-V's synthetic exit; EXITINFO1 = [`SYNTHETIC_FLUSH`] after a direct flush.
pub const SYNTHETIC: u64 = 0xF000_0000;
/// EXITINFO1 of the synthetic exit after a direct flush with the TLB locked.
pub const SYNTHETIC_FLUSH: u64 = 1;
/// VMRUN failed: -1 in 64 bits.
pub const INVALID: u64 = u64::MAX;
/// What QEMU's TCG writes in place of [`INVALID`].
pub const INVALID_32: u64 = 0xFFFF_FFFF;

/// True when EXITCODE says that VMRUN failed, in the processor's spelling or in QEMU's: the low half tells.
#[inline]
pub const fn is_invalid(code: u64) -> bool {
    code as u32 == INVALID_32 as u32
}
