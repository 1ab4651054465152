//! Hypercalls by the library's intake, from real processor registers and back: an interrupt stands for VMCALL, its
//! handler for the exit handler of a hypervisor.

use crate::caller::{INSTRUCTION, Mode, Registers, VECTOR, interrupt};
use crate::host::{Double, Flush, FrameRegisters, Host, WINDOW_BYTES, Window};
use hvcore::addr::{L1Gpa, Level};
use hvcore::hypercall::{Caller, CallerMode, Declaration, Outcome, Privileges, Scratch, handle};
use hvcore::memory::{GuestMemory, L1Caller};
use rt::idt::{self, Frame};
use rt::{BootInfo, ExitCode, println};
use spin::Mutex;
use tlfs_abi::flush::FlushFlags;
use tlfs_abi::hypercall::{CallCode, HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;

struct State {
    host: Host,
    window: Option<Window>,
    enabled: bool,
    /// The control: change a register that no call may change.
    corrupt: bool,
    scratch: Scratch,
    last: Option<Outcome>,
    calls: u32,
}

static STATE: Mutex<State> = Mutex::new(State {
    host: Host::new(),
    window: None,
    enabled: true,
    corrupt: false,
    scratch: Scratch::new(),
    last: None,
    calls: 0,
});

/// CS.L of the interrupted code, from its descriptor.
fn long_mode_segment(selector: u64) -> bool {
    let rights: u32;
    // SAFETY: LAR only reads the descriptor.
    unsafe { core::arch::asm!("lar {:e}, {:e}", out(reg) rights, in(reg) selector as u32, options(nomem, nostack)) };
    rights >> 21 & 1 != 0
}

fn exit_handler(frame: &mut Frame) {
    let mut state = STATE.lock();
    let State { host, window, enabled, corrupt, scratch, last, calls } = &mut *state;
    // SAFETY: reading EFER and CR0 in ring 0.
    let (efer, cr0) = unsafe { (x86::msr::rdmsr(x86::msr::IA32_EFER), x86::controlregs::cr0().bits() as u64) };
    let caller = Caller {
        mode: CallerMode::new(efer, cr0, long_mode_segment(frame.cs), (frame.cs & 3) as u8),
        level: Level::L1,
        enabled: *enabled,
        privileges: Privileges::ALL.without(Privileges::NESTED_CALLS),
    };
    let window = window.expect("a window");
    let outcome = handle(host, &caller, &mut FrameRegisters(frame), &L1Caller(&window), scratch);
    if outcome == Outcome::Retry {
        frame.rip -= INSTRUCTION;
    }
    if *corrupt {
        frame.fx.xmm[5] ^= 1;
    }
    *last = Some(outcome);
    *calls += 1;
}

/// One caller: a mode, the registers before the call, and memory for its input.
struct Call {
    mode: Mode,
    before: Registers,
}

impl Call {
    fn new(mode: Mode, input: HypercallInput, block: &[u64]) -> Call {
        let mut before = Registers::distinct();
        let low = |value: u64| value & 0xFFFF_FFFF;
        // In a register of a 32-bit caller, the high half means nothing: it keeps its filling.
        let half = |register: &mut u64, value: u64| *register = *register & !0xFFFF_FFFF | low(value);
        let word = |i: usize| block.get(i).copied().unwrap_or(0);
        match mode {
            Mode::Long => {
                before.rcx = input.raw();
                before.rdx = word(0);
                before.r8 = word(1);
            }
            Mode::Compatibility => {
                half(&mut before.rdx, input.raw() >> 32);
                half(&mut before.rax, input.raw());
                half(&mut before.rbx, word(0) >> 32);
                half(&mut before.rcx, word(0));
                half(&mut before.rdi, word(1) >> 32);
                half(&mut before.rsi, word(1));
            }
        }
        for (i, value) in block.iter().enumerate().skip(2) {
            before.xmm[(i - 2) / 2][i % 2] = *value;
        }
        Call { mode, before }
    }

    /// Executes the call; checks the result and that nothing but the result's registers, and what `allow` changes,
    /// has changed.
    fn check(&self, status: HvStatus, reps: u16, allow: impl FnOnce(&mut Registers)) {
        let mut expected = self.before;
        let result = HypercallResult::new(status, reps);
        match self.mode {
            Mode::Long => expected.rax = result.raw(),
            Mode::Compatibility => {
                expected.rdx = result.raw() >> 32;
                expected.rax = result.raw() & 0xFFFF_FFFF;
            }
        }
        allow(&mut expected);
        let after = self.execute();
        assert_eq!(after, expected, "{:?} {status:?}", self.mode);
        assert_eq!(STATE.lock().last, Some(Outcome::Complete(result)));
    }

    fn execute(&self) -> Registers {
        let mut registers = self.before;
        interrupt(self.mode, &mut registers);
        registers
    }
}

/// Runs every check in every mode it applies to. With `corrupt=yes` on the command line the first check must fail.
pub fn run(boot: &'static BootInfo) -> ExitCode {
    let window = Window::new();
    STATE.lock().window = Some(window);
    STATE.lock().corrupt = boot.argument("corrupt") == Some("yes");
    idt::on(VECTOR, exit_handler);
    for mode in Mode::ALL {
        fast(mode);
        memory(mode, window);
        refused(mode, window);
    }
    fast_output();
    continuation();
    println!("hypercall-selftest: {} calls from registers", STATE.lock().calls);
    ExitCode::Success
}

fn last_flush() -> Option<Flush> {
    STATE.lock().host.flush.take()
}

fn fast(mode: Mode) {
    let spin = HypercallInput::new(CallCode::NOTIFY_LONG_SPIN_WAIT).with_fast();
    Call::new(mode, spin, &[0x1234_5678_9ABC_DEF0]).check(HvStatus::SUCCESS, 0, |_| ());
    assert_eq!(STATE.lock().host.spins, 0x9ABC_DEF0);

    let space = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE).with_fast();
    let all_spaces = FlushFlags::ALL_VIRTUAL_ADDRESS_SPACES;
    Call::new(mode, space, &[0x0123_4567_89AB_C000, all_spaces, 0b1011]).check(HvStatus::SUCCESS, 0, |_| ());
    let seen = Flush { address_space: 0x0123_4567_89AB_C000, flags: all_spaces, vps: Some(3), ranges: (0, 0) };
    assert_eq!(last_flush(), Some(seen));

    // All 112 bytes: a header of 24 and 11 ranges.
    let list = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_LIST).with_fast().with_reps(11, 0);
    let block: [u64; 14] = core::array::from_fn(|i| match i {
        0 => 0x1000,
        1 => FlushFlags::ALL_PROCESSORS,
        2 => 0,
        n => 0xFFFF_8000_0000_0000 | 1 << (12 + n),
    });
    Call::new(mode, list, &block).check(HvStatus::SUCCESS, 11, |_| ());
    let ranges = (11, block[3..].iter().fold(0, |all, range| all ^ range));
    assert_eq!(
        last_flush(),
        Some(Flush { address_space: 0x1000, flags: FlushFlags::ALL_PROCESSORS, vps: None, ranges })
    );
}

/// 64 banks and as many ranges as fit in the page.
fn memory(mode: Mode, window: Window) {
    const RANGES: usize = 444;
    let mut page = [0_u64; 512];
    page[0] = 0x2000;
    page[3] = u64::MAX;
    page[4..68].fill(0x8000_0000_0000_0001);
    for (i, range) in page[68..].iter_mut().enumerate() {
        *range = (i as u64) << 12;
    }
    put(window, 0, &page);
    let input = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX);
    let input = input.with_variable_header_size(64).with_reps(RANGES as u16, 0);
    Call::new(mode, input, &[window.start()]).check(HvStatus::SUCCESS, RANGES as u16, |_| ());
    let ranges = (RANGES, page[68..].iter().fold(0, |all, range| all ^ range));
    assert_eq!(last_flush(), Some(Flush { address_space: 0x2000, flags: 0, vps: Some(128), ranges }));

    let double = HypercallInput::new(Double::CODE).with_reps(3, 0);
    put(window, 4096, &[100, 1, 2, 3]);
    Call::new(mode, double, &[window.start() + 4096, window.start() + 8192]).check(HvStatus::SUCCESS, 3, |_| ());
    assert_eq!(get(window, 8192), [102, 104, 106, 0]);
    put(window, 8192, &[0; 3]);
}

/// Every kind of refusal that comes before a handler.
fn refused(mode: Mode, window: Window) {
    let flush = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE);
    let at = |address: u64| [address];
    let raw = |bits: u64| HypercallInput(flush.raw() | bits);
    let cases: [(HypercallInput, u64, HvStatus); 8] = [
        (raw(1 << 27), window.start(), HvStatus::INVALID_HYPERCALL_INPUT),
        (raw(1 << 31), window.start(), HvStatus::INVALID_HYPERCALL_INPUT),
        (HypercallInput::new(CallCode(0x7FFF)), window.start(), HvStatus::INVALID_HYPERCALL_CODE),
        (flush.with_reps(1, 0), window.start(), HvStatus::INVALID_HYPERCALL_INPUT),
        (flush.with_variable_header_size(1), window.start(), HvStatus::INVALID_HYPERCALL_INPUT),
        (flush, window.start() + 4, HvStatus::INVALID_ALIGNMENT),
        (flush, window.start() + 4096 - 16, HvStatus::INVALID_ALIGNMENT),
        (flush, window.start() + WINDOW_BYTES, HvStatus::INVALID_HYPERCALL_INPUT),
    ];
    for (input, address, status) in cases {
        Call::new(mode, input, &at(address)).check(status, 0, |_| ());
        assert_eq!(last_flush(), None, "a refused call reached the handler");
    }
    // The same call, well formed, does reach it.
    put(window, 0, &[0x3000, 0, 1]);
    Call::new(mode, flush, &at(window.start())).check(HvStatus::SUCCESS, 0, |_| ());
    assert!(last_flush().is_some());

    STATE.lock().enabled = false;
    let call = Call::new(mode, flush, &at(window.start()));
    assert_eq!(call.execute(), call.before, "a call that is #UD changed a register");
    assert_eq!(STATE.lock().last, Some(Outcome::InjectUd));
    STATE.lock().enabled = true;
}

/// Input in RDX, R8, XMM0 and XMM1; output from the next 16-byte register on.
fn fast_output() {
    let input = HypercallInput::new(Double::CODE).with_fast().with_reps(5, 0);
    Call::new(Mode::Long, input, &[1000, 1, 2, 3, 4, 5]).check(HvStatus::SUCCESS, 5, |expected| {
        expected.xmm[2] = [1002, 1004];
        expected.xmm[3] = [1006, 1008];
        // The high half is beyond the output.
        expected.xmm[4][0] = 1010;
    });
}

/// A handler that does two elements at a time is called again by the caller's own instruction.
fn continuation() {
    STATE.lock().host.portion = 2;
    let calls = core::mem::take(&mut STATE.lock().host.portions);
    let input = HypercallInput::new(Double::CODE).with_fast().with_reps(5, 0);
    Call::new(Mode::Long, input, &[1000, 1, 2, 3, 4, 5]).check(HvStatus::SUCCESS, 5, |expected| {
        expected.rcx = input.with_reps(5, 4).raw();
        expected.xmm[2] = [1002, 1004];
        expected.xmm[3] = [1006, 1008];
        expected.xmm[4][0] = 1010;
    });
    assert!(calls > 0);
    assert_eq!(STATE.lock().host.portions, 3);
}

fn put(window: Window, at: u64, words: &[u64]) {
    for (i, word) in words.iter().enumerate() {
        let gpa = L1Gpa::new(window.start() + at + 8 * i as u64);
        window.write_u64(gpa, *word).expect("inside the window");
    }
}

fn get(window: Window, at: u64) -> [u64; 4] {
    let word = |i: usize| window.read_u64(L1Gpa::new(window.start() + at + 8 * i as u64));
    core::array::from_fn(|i| word(i).expect("inside the window"))
}
