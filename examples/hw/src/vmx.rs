//! VMX instructions and the world switch (SDM volume 3, "VMX Instruction Reference", "VM Entries", "VM Exits").
//!
//! VMX has no GIF: NMIs arrive in the program at any time. A flag of the processor, which its NMI handler sets, tells
//! [`enter`] that one came. `enter` looks at the flag in its last instructions; an NMI behind that look finds its
//! interrupted RIP moved by [`redirect`], so that the entry does not happen. Either way `enter` returns
//! [`Entered::Kicked`], and no NMI is lost between the look and the guest, where it is an exit.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::AtomicU8;

use nvmx::field::Field;

pub use crate::gprs::Gprs;
use crate::{cpu, msr};

/// How a VMX instruction failed (SDM volume 3, "Conventions" of the VMX instructions).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fail {
    /// VMfailInvalid: there is no current VMCS. RFLAGS.CF was set.
    Invalid,
    /// VMfailValid: the current VMCS's [`Field::InstructionError`] has the number. RFLAGS.ZF was set.
    Valid,
}

/// What a VMX instruction returns.
pub type Outcome = Result<(), Fail>;

/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;

fn outcome(carry: u8, zero: u8) -> Outcome {
    match (carry, zero) {
        (0, 0) => Ok(()),
        (0, _) => Err(Fail::Valid),
        _ => Err(Fail::Invalid),
    }
}

/// An instruction that sets the VMX status flags.
macro_rules! vmx {
    ($instruction:literal $(, $direction:ident(reg) $operand:expr)*) => {{
        let (carry, zero): (u8, u8);
        asm!($instruction, "setc {carry}", "setz {zero}", $($direction(reg) $operand,)*
            carry = out(reg_byte) carry, zero = out(reg_byte) zero, options(nostack));
        outcome(carry, zero)
    }};
}

/// True when the processor has VMX: CPUID leaf 1, ECX bit 5.
pub fn supported() -> bool {
    cpu::cpuid(1, 0).ecx & 1 << 5 != 0
}

/// Why VMX operation could not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotEnabled {
    /// IA32_FEATURE_CONTROL is locked without VMXON outside SMX operation.
    Forbidden,
    /// VMXON failed.
    Failed(Fail),
}

/// The VMCS revision identifier: IA32_VMX_BASIC bits 30:0.
///
/// # Safety
/// [`supported`].
pub unsafe fn revision() -> u32 {
    // SAFETY: processors with VMX have the MSR.
    unsafe { msr::rdmsr(msr::VMX_BASIC) as u32 & 0x7fff_ffff }
}

/// Begins VMX operation: IA32_FEATURE_CONTROL locked with VMXON allowed if it was unlocked, the fixed bits of CR0 and
/// CR4, CR4.VMXE, the revision in `region`, VMXON.
///
/// # Safety
/// [`supported`], and not in VMX operation. `region` is the 4 KiB page at physical address `pa`, the processor's from
/// now on.
pub unsafe fn enable(region: *mut [u32; 1024], pa: u64) -> Result<(), NotEnabled> {
    // SAFETY: processors with VMX have these MSRs; the fixed bits are what VMX operation demands, and harmless to
    // 64-bit code with paging; the region is the caller's gift.
    unsafe {
        let control = msr::rdmsr(msr::FEATURE_CONTROL);
        match control & 0b101 {
            0b101 => {}
            0b001 => return Err(NotEnabled::Forbidden),
            _ => msr::wrmsr(msr::FEATURE_CONTROL, control | 0b101),
        }
        cpu::write_cr0((cpu::cr0() | msr::rdmsr(msr::VMX_CR0_FIXED0)) & msr::rdmsr(msr::VMX_CR0_FIXED1));
        cpu::write_cr4((cpu::cr4() | CR4_VMXE | msr::rdmsr(msr::VMX_CR4_FIXED0)) & msr::rdmsr(msr::VMX_CR4_FIXED1));
        (*region)[0] = revision();
        vmxon(pa).map_err(NotEnabled::Failed)
    }
}

/// VMXON with the region at physical address `pa`.
///
/// # Safety
/// CR4.VMXE and the fixed bits are set, IA32_FEATURE_CONTROL allows it; the region is the processor's from now on.
pub unsafe fn vmxon(pa: u64) -> Outcome {
    // SAFETY: the caller vouches for the region.
    unsafe { vmx!("vmxon [{}]", in(reg) &raw const pa) }
}

/// VMXOFF.
///
/// # Safety
/// In VMX root operation; no VMCS is to be used again before another VMXON.
pub unsafe fn vmxoff() -> Outcome {
    // SAFETY: the caller vouches for the mode.
    unsafe { vmx!("vmxoff") }
}

/// VMCLEAR of the VMCS at physical address `pa`: its data is in memory, its launch state "clear".
///
/// # Safety
/// In VMX root operation; the page is the caller's.
pub unsafe fn vmclear(pa: u64) -> Outcome {
    // SAFETY: the caller vouches for the page.
    unsafe { vmx!("vmclear [{}]", in(reg) &raw const pa) }
}

/// VMPTRLD: the VMCS at physical address `pa` is the current one.
///
/// # Safety
/// In VMX root operation; the page is the processor's until VMCLEAR, and nothing else writes it.
pub unsafe fn vmptrld(pa: u64) -> Outcome {
    // SAFETY: the caller vouches for the page.
    unsafe { vmx!("vmptrld [{}]", in(reg) &raw const pa) }
}

/// VMPTRST: physical address of the current VMCS, all ones without one.
///
/// # Safety
/// In VMX root operation.
pub unsafe fn vmptrst() -> u64 {
    let mut pa = 0u64;
    // SAFETY: stores eight bytes to a local variable of eight bytes.
    unsafe { asm!("vmptrst [{}]", in(reg) &raw mut pa, options(nostack)) };
    pa
}

/// VMREAD of any encoding.
///
/// # Safety
/// In VMX root operation.
pub unsafe fn vmread(encoding: u64) -> Result<u64, Fail> {
    let mut value = 0u64;
    // SAFETY: only a register is written.
    unsafe { vmx!("vmread {}, {}", inout(reg) value, in(reg) encoding) }.map(|()| value)
}

/// VMWRITE of any encoding.
///
/// # Safety
/// In VMX root operation; an entry with the current VMCS is sound with this value in place, or does not happen.
pub unsafe fn vmwrite(encoding: u64, value: u64) -> Outcome {
    // SAFETY: the caller vouches for the value.
    unsafe { vmx!("vmwrite {}, {}", in(reg) encoding, in(reg) value) }
}

/// The value of `field` in the current VMCS; zero where the processor has no such field. For hot paths: the status
/// flags are not looked at.
///
/// # Safety
/// In VMX root operation, with a current VMCS.
#[inline(always)]
pub unsafe fn read(field: Field) -> u64 {
    let mut value = 0u64;
    // SAFETY: only a register is written.
    unsafe {
        asm!("vmread {}, {}", inout(reg) value, in(reg) u64::from(field.encoding().0), options(nostack));
    }
    value
}

/// Writes `field` in the current VMCS; no effect where the processor has no such field. For hot paths: the status flags
/// are not looked at.
///
/// # Safety
/// As [`vmwrite`], with a current VMCS.
#[inline(always)]
pub unsafe fn write(field: Field, value: u64) {
    // SAFETY: the caller vouches for the value.
    unsafe { asm!("vmwrite {}, {}", in(reg) u64::from(field.encoding().0), in(reg) value, options(nostack)) };
}

/// What INVEPT drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvEpt {
    /// Type 1: mappings of this EPT pointer.
    Single(u64),
    /// Type 2: mappings of all EPT pointers.
    All,
}

/// INVEPT.
///
/// # Safety
/// In VMX root operation. Dropping translations is harmless.
pub unsafe fn invept(what: InvEpt) -> Outcome {
    let (kind, eptp) = match what {
        InvEpt::Single(eptp) => (1u64, eptp),
        InvEpt::All => (2, 0),
    };
    // SAFETY: only cached translations are dropped.
    unsafe { raw_invept(kind, [eptp, 0]) }
}

/// INVEPT of any type and descriptor.
///
/// # Safety
/// As [`invept`].
pub unsafe fn raw_invept(kind: u64, descriptor: [u64; 2]) -> Outcome {
    // SAFETY: only cached translations are dropped.
    unsafe { vmx!("invept {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr()) }
}

/// What INVVPID drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvVpid {
    /// Type 0: one linear address of this VPID.
    Address(u16, u64),
    /// Type 1: all of this VPID.
    Single(u16),
    /// Type 2: all of all VPIDs but 0.
    All,
    /// Type 3: all of this VPID but global translations.
    SingleRetainingGlobals(u16),
}

/// INVVPID.
///
/// # Safety
/// In VMX root operation. Dropping translations is harmless.
pub unsafe fn invvpid(what: InvVpid) -> Outcome {
    let (kind, vpid, address) = match what {
        InvVpid::Address(vpid, address) => (0u64, vpid, address),
        InvVpid::Single(vpid) => (1, vpid, 0),
        InvVpid::All => (2, 0, 0),
        InvVpid::SingleRetainingGlobals(vpid) => (3, vpid, 0),
    };
    // SAFETY: only cached translations are dropped.
    unsafe { raw_invvpid(kind, [u64::from(vpid), address]) }
}

/// INVVPID of any type and descriptor.
///
/// # Safety
/// As [`invvpid`].
pub unsafe fn raw_invvpid(kind: u64, descriptor: [u64; 2]) -> Outcome {
    // SAFETY: only cached translations are dropped.
    unsafe { vmx!("invvpid {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr()) }
}

/// A guest's registers, and what [`enter`] keeps of the host. [`World::bind`] tells a VMCS of it.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct World {
    /// The guest's registers.
    pub gprs: Gprs,
    /// RSP of the program while the guest runs.
    host_rsp: u64,
    /// Non-zero when an NMI came: set by the processor's NMI handler, cleared by whoever looks what it was for.
    kicked: *const AtomicU8,
}

impl World {
    /// A world whose entries the NMI handler stops through `kicked`.
    pub const fn new(kicked: &'static AtomicU8) -> Self {
        const ZERO: Gprs = Gprs {
            rax: 0,
            rcx: 0,
            rdx: 0,
            rbx: 0,
            rsp: 0,
            rbp: 0,
            rsi: 0,
            rdi: 0,
            r8: 0,
            r9: 0,
            r10: 0,
            r11: 0,
            r12: 0,
            r13: 0,
            r14: 0,
            r15: 0,
        };
        Self { gprs: ZERO, host_rsp: 0, kicked }
    }

    /// Writes host RSP and RIP of the current VMCS: an exit stores the guest's registers here and returns from the
    /// [`enter`] that entered. Once per VMCS and place of the world: it must not move afterwards.
    ///
    /// # Safety
    /// In VMX root operation with a current VMCS, whose other host-state fields describe the program. Exceptions, NMIs
    /// and machine checks of the program run on stacks of the interrupt stack table: for the first instructions after
    /// an exit, RSP points here.
    pub unsafe fn bind(&mut self) {
        // SAFETY: the exit point is code of `enter`, which expects RSP to be this.
        unsafe {
            let [(rsp, to_rsp), (rip, to_rip)] = self.host_fields();
            write(rsp, to_rsp);
            write(rip, to_rip);
        }
    }

    /// What [`World::bind`] writes, for a VMCS that is not written by VMWRITE.
    pub fn host_fields(&mut self) -> [(Field, u64); 2] {
        [(Field::HostRsp, (&raw mut *self) as u64), (Field::HostRip, (&raw const hw_vmx_exit_point) as u64)]
    }
}

/// How [`enter`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The guest ran, or the entry failed late: the exit reason says which and why.
    Exited,
    /// VMLAUNCH or VMRESUME failed.
    Failed(Fail),
    /// An NMI came before the entry, which did not happen.
    Kicked,
}

/// VMLAUNCH (`launched` false) or VMRESUME with the current VMCS, until the guest exits.
///
/// # Safety
/// In VMX root operation with a current VMCS that `world` was bound to; its guest is confined to memory that is not the
/// program's; interrupts are off. What VMX does not switch (x87, SSE and AVX registers, CR2, DR0 to DR3, DR6, MSRs
/// without a field) is the guest's before and after: the program does not use it.
#[inline]
pub unsafe fn enter(world: &mut World, launched: bool) -> Entered {
    // SAFETY: the caller's promise.
    match unsafe { switch(world, u64::from(launched)) } {
        0 => Entered::Exited,
        1 => Entered::Failed(Fail::Invalid),
        2 => Entered::Failed(Fail::Valid),
        _ => Entered::Kicked,
    }
}

#[unsafe(naked)]
#[allow(named_asm_labels, reason = "a naked function is assembled once; only older compilers warn")]
unsafe extern "C" fn switch(world: *mut World, launched: u64) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + {host_rsp}], rsp",
        "mov rax, [rdi + {kicked}]",
        ".globl hw_vmx_window_start",
        ".globl hw_vmx_window_end",
        ".globl hw_vmx_exit_point",
        ".globl hw_vmx_kicked",
        // From here to the entry an NMI moves RIP to hw_vmx_kicked.
        "hw_vmx_window_start:",
        "cmp byte ptr [rax], 0",
        "jne hw_vmx_kicked",
        // The loads leave ZF, which chooses the instruction, alone.
        "test rsi, rsi",
        "mov rax, [rdi + {rax}]",
        "mov rcx, [rdi + {rcx}]",
        "mov rdx, [rdi + {rdx}]",
        "mov rbx, [rdi + {rbx}]",
        "mov rbp, [rdi + {rbp}]",
        "mov rsi, [rdi + {rsi}]",
        "mov r8, [rdi + {r8}]",
        "mov r9, [rdi + {r9}]",
        "mov r10, [rdi + {r10}]",
        "mov r11, [rdi + {r11}]",
        "mov r12, [rdi + {r12}]",
        "mov r13, [rdi + {r13}]",
        "mov r14, [rdi + {r14}]",
        "mov r15, [rdi + {r15}]",
        "mov rdi, [rdi + {rdi}]",
        "jz 2f",
        "vmresume",
        "jmp 3f",
        "2:",
        "vmlaunch",
        "hw_vmx_window_end:",
        // Not entered: RSP is the host's still.
        "3:",
        "mov eax, 2",
        "mov ecx, 1",
        "cmovc eax, ecx",
        "jmp 4f",
        "hw_vmx_kicked:",
        "mov eax, 3",
        "jmp 4f",
        // RSP is the world's address, as `bind` said.
        "hw_vmx_exit_point:",
        "mov [rsp + {rax}], rax",
        "mov [rsp + {rcx}], rcx",
        "mov [rsp + {rdx}], rdx",
        "mov [rsp + {rbx}], rbx",
        "mov [rsp + {rbp}], rbp",
        "mov [rsp + {rsi}], rsi",
        "mov [rsp + {rdi}], rdi",
        "mov [rsp + {r8}], r8",
        "mov [rsp + {r9}], r9",
        "mov [rsp + {r10}], r10",
        "mov [rsp + {r11}], r11",
        "mov [rsp + {r12}], r12",
        "mov [rsp + {r13}], r13",
        "mov [rsp + {r14}], r14",
        "mov [rsp + {r15}], r15",
        "xor eax, eax",
        "mov rsp, [rsp + {host_rsp}]",
        "4:",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        host_rsp = const offset_of!(World, host_rsp),
        kicked = const offset_of!(World, kicked),
        rax = const offset_of!(Gprs, rax),
        rcx = const offset_of!(Gprs, rcx),
        rdx = const offset_of!(Gprs, rdx),
        rbx = const offset_of!(Gprs, rbx),
        rbp = const offset_of!(Gprs, rbp),
        rsi = const offset_of!(Gprs, rsi),
        rdi = const offset_of!(Gprs, rdi),
        r8 = const offset_of!(Gprs, r8),
        r9 = const offset_of!(Gprs, r9),
        r10 = const offset_of!(Gprs, r10),
        r11 = const offset_of!(Gprs, r11),
        r12 = const offset_of!(Gprs, r12),
        r13 = const offset_of!(Gprs, r13),
        r14 = const offset_of!(Gprs, r14),
        r15 = const offset_of!(Gprs, r15),
    )
}

const _: () = assert!(offset_of!(World, gprs) == 0);

/// Halts until an NMI comes, unless `kicked` is set already.
///
/// # Safety
/// RFLAGS.IF is clear; the NMI handler sets the flag and calls [`redirect`].
#[unsafe(naked)]
#[allow(named_asm_labels, reason = "a naked function is assembled once; only older compilers warn")]
pub unsafe extern "C" fn wait_for_nmi(kicked: *const AtomicU8) {
    naked_asm!(
        ".globl hw_vmx_wait_start",
        ".globl hw_vmx_wait_end",
        "hw_vmx_wait_start:",
        "cmp byte ptr [rdi], 0",
        "jne hw_vmx_wait_end",
        "hlt",
        "hw_vmx_wait_end:",
        "ret",
    )
}

unsafe extern "C" {
    static hw_vmx_window_start: u8;
    static hw_vmx_window_end: u8;
    static hw_vmx_kicked: u8;
    static hw_vmx_exit_point: u8;
    static hw_vmx_wait_start: u8;
    static hw_vmx_wait_end: u8;
}

/// The instructions of [`enter`] in which an NMI makes it return [`Entered::Kicked`] through [`redirect`]: first
/// address, and the address behind the last.
pub fn window() -> core::ops::Range<u64> {
    (&raw const hw_vmx_window_start) as u64..(&raw const hw_vmx_window_end) as u64
}

/// Runs the program's NMI handler, behind an exit that was caused by an NMI: the processor blocks NMIs from there on,
/// until the handler's IRET.
///
/// # Safety
/// An interrupt table with an NMI handler is loaded.
#[inline]
pub unsafe fn take_nmi() {
    // SAFETY: the handler returns as from an interrupt.
    unsafe { asm!("int 2") };
}

/// The same of [`wait_for_nmi`]: those before its end.
pub fn wait_window() -> core::ops::Range<u64> {
    (&raw const hw_vmx_wait_start) as u64..(&raw const hw_vmx_wait_end) as u64
}

/// Where code goes on that an NMI interrupted at `rip`, for the end of the NMI handler: out of the entry if it was
/// about to enter, behind the HLT if it was about to halt.
pub fn redirect(rip: u64) -> u64 {
    let wait = wait_window();
    if window().contains(&rip) {
        (&raw const hw_vmx_kicked) as u64
    } else if wait.contains(&rip) {
        wait.end
    } else {
        rip
    }
}
