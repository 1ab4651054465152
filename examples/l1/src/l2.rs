//! What L2's processors do in the flush scenarios: one remaps a page and flushes, the others read it all the time.
//!
//! These functions run in L2, at ring 0, in the image's address space but under page tables of their own. They talk
//! with the scenario through [`Shared`] alone.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};
use hvcore::client::{HypercallPort, INPUT_WORDS, XMM_WORDS};
use tlfs_abi::flush::FlushFlags;
use tlfs_abi::hypercall::{CallCode, HypercallInput, HypercallResult};
use tlfs_abi::vp_set::VpSetFormat;

/// Bit 11 of an extended entry: its page is a large one.
const EXTENDED_LARGE_PAGE: u64 = 1 << 11;

/// What L2's processors and the scenario share. One initiator, one reader per slot.
#[repr(C)]
pub struct Shared {
    /// The generation that every read after now must see at least.
    pub epoch: AtomicU64,
    /// Not zero: readers stop.
    pub stop: AtomicU64,
    /// The address that the readers read.
    pub address: AtomicU64,
}

/// A reader's slot.
#[repr(C)]
pub struct Reader {
    pub shared: *const Shared,
    /// Reads done.
    pub reads: AtomicU64,
    /// Reads that saw a generation older than the epoch.
    pub stale: AtomicU64,
}

/// Reads the shared address until told to stop, and counts what is stale. RDI is its [`Reader`].
///
/// The epoch is read before the page: a read that is ordered after the epoch was raised must see the new page.
#[unsafe(naked)]
pub unsafe extern "C" fn reader() {
    naked_asm!(
        "mov rsi, [rdi + {shared}]",
        "mov rdx, [rsi + {address}]",
        "2:",
        "mov r8, [rsi + {epoch}]",
        "mov rax, [rdx]",
        "inc qword ptr [rdi + {reads}]",
        "cmp rax, r8",
        "jae 3f",
        "inc qword ptr [rdi + {stale}]",
        "3:",
        "cmp qword ptr [rsi + {stop}], 0",
        "je 2b",
        "hlt",
        shared = const offset_of!(Reader, shared),
        reads = const offset_of!(Reader, reads),
        stale = const offset_of!(Reader, stale),
        epoch = const offset_of!(Shared, epoch),
        stop = const offset_of!(Shared, stop),
        address = const offset_of!(Shared, address),
    )
}

/// L2's way to the host: VMMCALL or VMCALL in the three conventions.
pub struct Vmmcall {
    /// The input page; its address is the same in L2 physical memory.
    pub page: &'static mut [u64; INPUT_WORDS],
}

impl HypercallPort for Vmmcall {
    fn input_page(&mut self) -> &mut [u64; INPUT_WORDS] {
        self.page
    }

    fn call_memory(&mut self, input: HypercallInput) -> HypercallResult {
        vmmcall(input, self.page.as_ptr() as u64, 0)
    }

    fn call_fast(&mut self, input: HypercallInput, [first, second]: [u64; 2]) -> HypercallResult {
        vmmcall(input, first, second)
    }

    fn call_xmm(&mut self, input: HypercallInput, words: &[u64; XMM_WORDS]) -> HypercallResult {
        let (result, save) = (0u64, [0u128; 6]);
        let mut frame = XmmFrame { words: *words, save, result };
        // SAFETY: XMM0 to XMM5 are saved and restored around the call; the rest is declared.
        unsafe {
            asm!(
                "movups [r9 + 112], xmm0", "movups [r9 + 128], xmm1", "movups [r9 + 144], xmm2",
                "movups [r9 + 160], xmm3", "movups [r9 + 176], xmm4", "movups [r9 + 192], xmm5",
                "movups xmm0, [r9 + 16]", "movups xmm1, [r9 + 32]", "movups xmm2, [r9 + 48]",
                "movups xmm3, [r9 + 64]", "movups xmm4, [r9 + 80]", "movups xmm5, [r9 + 96]",
                "mov rdx, [r9]",
                "mov r8, [r9 + 8]",
                "test {vmx:e}, {vmx:e}",
                "jnz 2f",
                "vmmcall",
                "jmp 3f",
                "2: vmcall",
                "3:",
                "mov [r9 + 208], rax",
                "movups xmm0, [r9 + 112]", "movups xmm1, [r9 + 128]", "movups xmm2, [r9 + 144]",
                "movups xmm3, [r9 + 160]", "movups xmm4, [r9 + 176]", "movups xmm5, [r9 + 192]",
                vmx = in(reg) u32::from(crate::vmx::is_on()),
                in("r9") &raw mut frame,
                inout("rcx") input.raw() => _,
                out("rax") _, out("rdx") _, out("r8") _,
            );
        }
        result_of(frame.result)
    }
}

/// Where a call with XMM input keeps its words, the caller's registers and the result.
#[repr(C)]
struct XmmFrame {
    words: [u64; XMM_WORDS],
    save: [u128; 6],
    result: u64,
}

const _: () = assert!(offset_of!(XmmFrame, save) == 112 && offset_of!(XmmFrame, result) == 208);

fn vmmcall(input: HypercallInput, rdx: u64, r8: u64) -> HypercallResult {
    let result;
    // SAFETY: a hypercall changes RAX and RCX and reads the input page.
    unsafe {
        asm!(
            "test {vmx:e}, {vmx:e}", "jnz 2f", "vmmcall", "jmp 3f", "2: vmcall", "3:",
            vmx = in(reg) u32::from(crate::vmx::is_on()),
            inout("rcx") input.raw() => _, inout("rdx") rdx => _, inout("r8") r8 => _, out("rax") result,
        );
    }
    result_of(result)
}

fn result_of(raw: u64) -> HypercallResult {
    let status = tlfs_abi::status::HvStatus(raw as u16);
    HypercallResult::new(status, (raw >> 32) as u16 & 0xFFF)
}

/// Raises the epoch: from here on every read must see `generation`.
pub fn raise(shared: &Shared, generation: u64) {
    shared.epoch.store(generation, Ordering::SeqCst);
}

/// How the initiator flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Not at all: the control that shows that the check can fail.
    Not,
    /// The whole address space.
    Space,
    /// The changed page and, before it, this many pages that have nothing to do with it.
    List(u16),
    /// The changed page as the whole 2 MiB around it, in an entry of 512 pages.
    Large,
    /// The same in one entry of the extended format, which names the 2 MiB page.
    Extended,
    /// A call with a VP set that names nobody, which is no flush at all.
    EmptySet,
}

/// A call that the client would not make: by memory, with these words.
fn raw(port: &mut Vmmcall, input: HypercallInput, words: &[u64]) -> Result<(), hvcore::client::UseNative> {
    port.page[..words.len()].copy_from_slice(words);
    match port.call_memory(input) {
        result if result.status() == tlfs_abi::status::HvStatus::SUCCESS => Ok(()),
        _ => Err(hvcore::client::UseNative::NotOffered),
    }
}

/// The initiator's orders and its report.
#[repr(C)]
pub struct Initiator {
    pub shared: *const Shared,
    pub readers: &'static [&'static Reader],
    /// The entry of L2's page tables that maps the shared address.
    pub entry: *mut u64,
    /// Two pages that take turns behind it.
    pub pages: [u64; 2],
    pub rounds: u64,
    pub how: How,
    pub offer: hvcore::client::HostOffer,
    pub targets: Option<&'static [u32]>,
    pub page: *mut [u64; INPUT_WORDS],
    /// Address space, as the flush calls name it: CR3.
    pub space: u64,
    /// 0, or 1 and the reason for failing.
    pub failed: AtomicU64,
    /// Flush calls made.
    pub calls: AtomicU64,
}

/// Polls that the initiator waits for a reader before it gives up.
const PATIENCE: u64 = 50_000_000;

/// Remaps the page `rounds` times, flushes, raises the epoch and lets every reader read under it.
pub unsafe extern "C" fn initiator(orders: *mut Initiator) -> ! {
    // SAFETY: the scenario hands over its orders, which live as long as the guest runs.
    let orders = unsafe { &mut *orders };
    // SAFETY: as above.
    let shared = unsafe { &*orders.shared };
    // SAFETY: as above; the input page is the initiator's alone.
    let mut port = Vmmcall { page: unsafe { &mut *orders.page } };
    for generation in 1..=orders.rounds {
        if !readers_go_on(orders.readers) {
            orders.failed.store(2, Ordering::SeqCst);
            break;
        }
        let next = orders.pages[generation as usize & 1];
        // SAFETY: both pages and the entry are the scenario's, mapped one to one.
        unsafe {
            (next as *mut u64).write_volatile(generation);
            orders.entry.write_volatile(next | crate::npt::ALL);
        }
        if orders.how != How::Not {
            orders.calls.fetch_add(1, Ordering::Relaxed);
            if flush(orders, &mut port, shared.address.load(Ordering::Relaxed)).is_err() {
                orders.failed.store(1, Ordering::SeqCst);
                break;
            }
        }
        raise(shared, generation);
    }
    readers_go_on(orders.readers);
    shared.stop.store(1, Ordering::SeqCst);
    loop {
        // SAFETY: HLT ends the guest's part: the hypervisor intercepts it.
        unsafe { asm!("hlt") };
    }
}

/// Waits until every reader has read a few more times; false when one does not.
fn readers_go_on(readers: &[&Reader]) -> bool {
    readers.iter().all(|reader| {
        let start = reader.reads.load(Ordering::SeqCst);
        (0..PATIENCE).any(|_| {
            core::hint::spin_loop();
            reader.reads.load(Ordering::SeqCst) > start + 20
        })
    })
}

fn flush(orders: &Initiator, port: &mut Vmmcall, address: u64) -> Result<(), hvcore::client::UseNative> {
    use hvcore::client::{FlushScope, Targets, flush};
    use tlfs_abi::flush::GvaSpan;
    let targets = match orders.targets {
        None => Targets::All,
        Some(indexes) => Targets::Only(indexes.iter().copied().map(Some)),
    };
    let page = GvaSpan { start: address, pages: 1, page_size: 4096 };
    let space = Some(orders.space);
    match orders.how {
        How::Not => Ok(()),
        How::Space => flush(port, &orders.offer, space, targets, FlushScope::Space { non_global_only: false }),
        How::Large => {
            let large = GvaSpan { start: address & !0x1F_FFFF, pages: 1, page_size: 1 << 21 };
            flush(port, &orders.offer, space, targets, FlushScope::Spans(&[large]))
        }
        How::Extended => {
            let entry = address & !0x1F_FFFF | EXTENDED_LARGE_PAGE;
            let input = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_LIST).with_reps(1, 0);
            let flags = FlushFlags::ALL_PROCESSORS | FlushFlags::EXTENDED_RANGE_FORMAT;
            raw(port, input, &[orders.space, flags, 0, entry])
        }
        How::EmptySet => {
            let input = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX);
            raw(port, input, &[orders.space, 0, VpSetFormat::SPARSE_4K.0, 0])
        }
        How::List(others) => {
            let mut spans = [GvaSpan { start: 0x6000_0000, ..page }; 509];
            for (n, span) in spans.iter_mut().enumerate() {
                span.start += n as u64 * 8192;
            }
            let count = usize::from(others).min(508);
            spans[count] = page;
            flush(port, &orders.offer, space, targets, FlushScope::Spans(&spans[..=count]))
        }
    }
}
