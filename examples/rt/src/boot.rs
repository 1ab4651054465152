//! From the boot loader to `main`: the multiboot header, the 32-bit entry, long mode, and the panic handler.

use crate::multiboot::{BootInfo, MAGIC, PhysicalMemory};
use crate::{ExitCode, apic, cpu, exit, frames, idt, serial};
use core::arch::global_asm;
use core::panic::PanicInfo;
use spin::Once;

// The header has the address fields (flags bit 16): without them QEMU refuses a 64-bit ELF file. It maps the first
// 4 GiB to themselves with 2 MiB pages, the first 2 GiB also at 0xFFFF_FFFF_8000_0000, and enables SSE, which compiled
// code may use from the first instruction on. Symbols in `_pa` are physical addresses (see link.ld): the image runs at
// its own addresses from the call on.
global_asm!(
    ".globl rt_multiboot, rt_pml4, rt_pdpt, rt_directories, rt_boot_stack_top, rt_boot_gdt, rt_boot_gdt_pointer, rt_long",
    ".section .multiboot, \"a\"",
    ".balign 4",
    "rt_multiboot:",
    ".long 0x1BADB002",
    ".long 0x00010003", // address fields; memory map; modules on page boundaries
    ".long -(0x1BADB002 + 0x00010003)",
    ".long rt_multiboot_pa",
    ".long rt_image_start_pa",
    ".long rt_load_end_pa",
    ".long rt_image_end_pa",
    ".long rt_start_pa",
    ".section .bss.rt_boot, \"aw\", @nobits",
    ".balign 4096",
    "rt_pml4: .skip 4096",
    "rt_pdpt: .skip 4096",
    "rt_directories: .skip 4 * 4096",
    "rt_boot_stack: .skip 65536",
    "rt_boot_stack_top:",
    ".section .boot, \"ax\"",
    ".code32",
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    "movl $rt_boot_stack_top_pa, %esp",
    "movl %eax, %ebp",
    // 2048 large pages: present, writable, 2 MiB.
    "movl $rt_directories_pa, %edi",
    "movl $0x83, %eax",
    "movl $2048, %ecx",
    "2:",
    "movl %eax, (%edi)",
    "movl $0, 4(%edi)",
    "addl $0x200000, %eax",
    "addl $8, %edi",
    "decl %ecx",
    "jnz 2b",
    "movl $rt_directories_pa + 0x0003, rt_pdpt_pa",
    "movl $rt_directories_pa + 0x1003, rt_pdpt_pa + 8",
    "movl $rt_directories_pa + 0x2003, rt_pdpt_pa + 16",
    "movl $rt_directories_pa + 0x3003, rt_pdpt_pa + 24",
    "movl $rt_directories_pa + 0x0003, rt_pdpt_pa + 8 * 510",
    "movl $rt_directories_pa + 0x1003, rt_pdpt_pa + 8 * 511",
    "movl $rt_pdpt_pa + 0x0003, rt_pml4_pa",
    "movl $rt_pdpt_pa + 0x0003, rt_pml4_pa + 8 * 511",
    "movl $0x620, %eax", // CR4: PAE, OSFXSR, OSXMMEXCPT
    "movl %eax, %cr4",
    "movl $rt_pml4_pa, %eax",
    "movl %eax, %cr3",
    "movl $0xC0000080, %ecx", // EFER: LME
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl $0x80000033, %eax", // CR0: PE, MP, ET, NE, PG
    "movl %eax, %cr0",
    "lgdtl rt_boot_gdt_pointer_pa",
    "ljmpl $0x08, $rt_long_pa",
    ".balign 8",
    "rt_boot_gdt:",
    ".quad 0",
    ".quad 0x00AF9B000000FFFF",
    ".quad 0x00CF93000000FFFF",
    "rt_boot_gdt_pointer:",
    ".word 23",
    ".long rt_boot_gdt_pa",
    ".code64",
    "rt_long:",
    "movl $0x10, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movabsq $rt_boot_stack_top, %rsp",
    "movl %ebp, %edi",
    "movl %ebx, %esi",
    "xorl %ebp, %ebp",
    "movabsq ${start}, %rax",
    "call *%rax",
    "ud2",
    ".section .rodata.rt_image_end, \"a\"",
    ".balign 8",
    "rt_image_end: .quad rt_image_end_pa",
    ".text",
    start = sym start,
    options(att_syntax),
);

unsafe extern "C" {
    /// Where the image ends, a physical address.
    static rt_image_end: u64;
}

unsafe extern "Rust" {
    fn rt_main(boot: &'static BootInfo) -> ExitCode;
}

struct Mapped;

impl PhysicalMemory for Mapped {
    fn byte(&self, address: u32) -> Option<u8> {
        // SAFETY: memory below 4 GiB is mapped to itself; a read of RAM or of nothing does no harm, and the loader's
        // structures are RAM. Address 0 would be a null pointer, and holds none of them.
        (address != 0).then(|| unsafe { (address as usize as *const u8).read_volatile() })
    }
}

/// Copied out of the loader's memory before anything is allocated.
static BOOT: Once<BootInfo> = Once::new();

static mut BOOT_CPU: cpu::Cpu = cpu::Cpu::new();

extern "C" fn start(magic: u32, info: u32) -> ! {
    // SAFETY: the only use of BOOT_CPU, in ring 0 with interrupts off.
    unsafe { cpu::Cpu::load(&raw mut BOOT_CPU, 0, apic::id()) };
    idt::init();
    idt::load();
    serial::init();
    assert!(magic == MAGIC, "not started by a multiboot loader: eax is {magic:#x}");
    let boot = BOOT.call_once(|| BootInfo::read(&Mapped, info));
    if boot.argument("debug-port") == Some("e9") {
        serial::also_to_port_e9();
    }
    // SAFETY: a constant, in the assembly above.
    frames::init(boot, unsafe { rt_image_end });
    apic::enable();
    // SAFETY: `entry!` defines it with this signature.
    let code = unsafe { rt_main(boot) };
    exit::exit(code)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::print_dying(format_args!("\ncpu {}: {info}\n", cpu::current().index));
    exit::exit(ExitCode::Failure)
}
