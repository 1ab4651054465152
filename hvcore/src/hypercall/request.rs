//! One hypercall from its input value to its handler: privileges, shape, placement, the private copy of the input.
//!
//! Called through the list of offered calls; calls `registers`, `output`, guest memory and the call's own checks.

use super::declare::{Declaration, Hypercall};
use super::registers::{self, BLOCK, BLOCK_GPRS, Registers, Step, Width};
use super::{Answer, Caller, Output, Privileges, Reply};
use crate::addr::{L1Gpa, Level, PAGE_SIZE};
use crate::memory::{Access, CallerMemory, GuestMemory};
use tlfs_abi::hypercall::{CallCode, HypercallInput};
use tlfs_abi::status::HvStatus;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

// The ABI is little-endian and the input is parsed in place.
const _: () = assert!(cfg!(target_endian = "little"));

/// Where long input is copied to: a page that belongs to one VP. Never cleared, and never read beyond what was copied.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Scratch([u64; 512]);

impl Scratch {
    /// A scratch page.
    pub const fn new() -> Self {
        Self([0; 512])
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// The private copy of a call's input, in its parts.
#[derive(Debug)]
pub struct Input<'a, D: Declaration> {
    level: Level,
    privileges: Privileges,
    header: D::Header,
    variable: &'a [u64],
    elements: &'a [D::Element],
}

impl<'a, D: Declaration> Input<'a, D> {
    /// Whose code the call comes from.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// What the caller's partition may do.
    #[inline]
    pub const fn privileges(&self) -> Privileges {
        self.privileges
    }

    /// The fixed input.
    #[inline]
    pub const fn header(&self) -> &D::Header {
        &self.header
    }

    /// The variable header.
    #[inline]
    pub const fn variable(&self) -> &'a [u64] {
        self.variable
    }

    /// The elements still to do: the list from the rep start index on. Empty for a simple call.
    #[inline]
    pub const fn elements(&self) -> &'a [D::Element] {
        self.elements
    }
}

/// A hypercall whose input value has no reserved bit set, not yet looked up.
#[derive(Debug)]
pub struct Request<'a, R, C: ?Sized> {
    input: HypercallInput,
    caller: &'a Caller,
    registers: &'a mut R,
    memory: &'a C,
    scratch: &'a mut Scratch,
}

/// Sizes of one call's input in bytes, none above 64 KiB.
struct Layout {
    variable: usize,
    count: usize,
    start: usize,
    /// Where the input list begins.
    list: usize,
    /// All of the input.
    input: usize,
    /// All of the output.
    output: usize,
}

impl<'a, R: Registers, C: CallerMemory + ?Sized> Request<'a, R, C> {
    #[inline]
    pub(super) fn new(
        input: HypercallInput,
        caller: &'a Caller,
        registers: &'a mut R,
        memory: &'a C,
        scratch: &'a mut Scratch,
    ) -> Self {
        Self { input, caller, registers, memory, scratch }
    }

    /// The call code.
    #[inline]
    pub fn code(&self) -> CallCode {
        self.input.call_code()
    }

    /// Checks, copies and parses the call as a `D` and lets `host` serve it.
    pub fn serve<D: Hypercall<H>, H: ?Sized>(self, host: &mut H) -> Reply {
        match self.try_serve::<D, H>(host) {
            Ok(reply) | Err(reply) => reply,
        }
    }

    #[inline]
    fn try_serve<D: Hypercall<H>, H: ?Sized>(self, host: &mut H) -> Step<Reply> {
        if !self.caller.privileges.contains(D::NEEDS) {
            return Err(Reply::status(HvStatus::ACCESS_DENIED));
        }
        let layout = shape::<D>(self.input)?;
        let fast = self.input.fast();
        if fast {
            check_fast(self.caller, &layout)?;
        }
        let Self { caller, registers, memory, scratch, .. } = self;
        let mut block = [0; BLOCK];
        let (bytes, mut output): (&[u8], Output<'_, C>) = if fast {
            registers::read_block(registers, caller.mode.width, &mut block, layout.input.div_ceil(8));
            let output = fast_output(registers, caller.mode.width, &layout, D::OUTPUT, D::OUTPUT_ELEMENT);
            (block.as_bytes(), output)
        } else {
            let places = Places::find(registers, caller.mode.width, memory, &layout)?;
            let output = match places.output {
                Some(gpa) => Output::memory(memory, gpa, output_start(&layout, D::OUTPUT, D::OUTPUT_ELEMENT)),
                None => Output::nowhere(),
            };
            let room =
                if layout.input <= size_of::<[u64; BLOCK]>() { block.as_mut_bytes() } else { scratch.0.as_mut_bytes() };
            (places.copy_input(memory, room, layout.input)?, output)
        };
        let input = parse::<D>(bytes, caller, &layout)?;
        let answer = D::serve(host, &input, &mut output);
        if layout.output != 0 && answer != Answer::Suspend {
            output.finish(registers, output_start(&layout, D::OUTPUT, D::OUTPUT_ELEMENT));
        }
        Ok(reply::<D>(answer, &layout))
    }
}

const INVALID_INPUT: Reply = Reply::status(HvStatus::INVALID_HYPERCALL_INPUT);

/// Checks the variable header size, rep count and rep start index against the declaration.
#[inline]
fn shape<D: Declaration>(input: HypercallInput) -> Step<Layout> {
    const {
        assert!(size_of::<D::Header>() % 8 == 0 && size_of::<D::Header>() <= PAGE_SIZE as usize);
        assert!(size_of::<D::Element>() != 0 && size_of::<D::Element>() <= 64 && align_of::<D::Element>() <= 8);
        assert!(D::OUTPUT % 8 == 0 && D::OUTPUT <= PAGE_SIZE as usize && D::OUTPUT_ELEMENT <= 64);
        assert!(D::REP || D::OUTPUT_ELEMENT == 0);
    }
    let (variable, count, start) = (input.variable_header_size(), input.rep_count(), input.rep_start());
    let reps_fit = if D::REP { start < count } else { count == 0 && start == 0 };
    if variable > D::MAX_VARIABLE_HEADER || !reps_fit {
        return Err(INVALID_INPUT);
    }
    let (variable, count, start) = (usize::from(variable), usize::from(count), usize::from(start));
    // At most 4,096 + 8 * 1,023 + 64 * 4,095: nothing wraps.
    let variable = if D::MAX_VARIABLE_HEADER != 0 { variable } else { 0 };
    let list = size_of::<D::Header>().wrapping_add(variable.wrapping_mul(8));
    let list_bytes = if D::REP { count.wrapping_mul(size_of::<D::Element>()) } else { 0 };
    let output = D::OUTPUT.wrapping_add(count.wrapping_mul(D::OUTPUT_ELEMENT));
    Ok(Layout { variable, count, start, list, input: list.wrapping_add(list_bytes), output })
}

/// Where output begins that an earlier part of the same call has not written.
#[inline]
const fn output_start(layout: &Layout, fixed: usize, element: usize) -> usize {
    if layout.start == 0 { 0 } else { fixed.wrapping_add(layout.start.wrapping_mul(element)) }
}

/// The first quadword of the register block that can carry output: input is rounded up to 16 bytes.
#[inline]
const fn first_output_quadword(layout: &Layout) -> usize {
    layout.input.div_ceil(16).wrapping_mul(2)
}

#[inline]
fn check_fast(caller: &Caller, layout: &Layout) -> Step<()> {
    let may_xmm_in = caller.privileges.contains(Privileges::XMM_INPUT);
    let may_output = caller.privileges.contains(Privileges::XMM_OUTPUT) && caller.mode.width == Width::Bits64;
    if layout.input > BLOCK_GPRS.wrapping_mul(8) && !may_xmm_in || layout.output != 0 && !may_output {
        return Err(Reply::InjectUd);
    }
    let used = first_output_quadword(layout).wrapping_mul(8).wrapping_add(layout.output);
    let total = if layout.output == 0 { layout.input } else { used };
    if total > size_of::<[u64; BLOCK]>() { Err(INVALID_INPUT) } else { Ok(()) }
}

#[inline]
fn fast_output<'a, R: Registers, C: CallerMemory + ?Sized>(
    registers: &R,
    width: Width,
    layout: &Layout,
    fixed: usize,
    element: usize,
) -> Output<'a, C> {
    if layout.output == 0 {
        return Output::nowhere();
    }
    // What an element does not fill of its register keeps its value.
    let mut block = [0; BLOCK];
    registers::read_block(registers, width, &mut block, BLOCK);
    Output::registers(block, first_output_quadword(layout), output_start(layout, fixed, element))
}

/// The L1 GPAs of the parameters in memory; `None` where there is none and the caller's GPA is ignored.
struct Places {
    input: Option<L1Gpa>,
    output: Option<L1Gpa>,
}

impl Places {
    #[inline]
    fn find<R: Registers, C: CallerMemory + ?Sized>(
        registers: &R,
        width: Width,
        memory: &C,
        layout: &Layout,
    ) -> Step<Self> {
        let (input, output) = (registers::first(registers, width), registers::second(registers, width));
        check_placement(input, layout.input)?;
        check_placement(output, layout.output)?;
        // Neither crosses a page, so neither end wraps.
        let overlap = layout.input != 0
            && layout.output != 0
            && input < output.wrapping_add(layout.output as u64)
            && output < input.wrapping_add(layout.input as u64);
        if overlap {
            return Err(Reply::status(HvStatus::INVALID_ALIGNMENT));
        }
        let input = translate(memory, input, layout.input, Access::Read)?;
        let output = translate(memory, output, layout.output, Access::Write)?;
        if let Some(gpa) = output {
            // Writable is found out before the handler acts: an exchange of zero for zero changes nothing.
            let _ = memory.memory().compare_exchange_u8(gpa, 0, 0).map_err(|_| INVALID_INPUT)?;
        }
        Ok(Self { input, output })
    }

    /// Copies the `len` bytes of input to `room`.
    #[inline]
    fn copy_input<'b, C: CallerMemory + ?Sized>(&self, memory: &C, room: &'b mut [u8], len: usize) -> Step<&'b [u8]> {
        let bytes = room.get_mut(..len).ok_or(INVALID_INPUT)?;
        if let Some(gpa) = self.input {
            memory.memory().read(gpa, bytes).map_err(|_| INVALID_INPUT)?;
        }
        Ok(bytes)
    }
}

#[inline]
fn check_placement(gpa: u64, len: usize) -> Step<()> {
    let crosses = (gpa & (PAGE_SIZE - 1)).wrapping_add(len as u64) > PAGE_SIZE;
    if len != 0 && (gpa & 7 != 0 || crosses) { Err(Reply::status(HvStatus::INVALID_ALIGNMENT)) } else { Ok(()) }
}

#[inline]
fn translate<C: CallerMemory + ?Sized>(memory: &C, gpa: u64, len: usize, access: Access) -> Step<Option<L1Gpa>> {
    if len == 0 {
        return Ok(None);
    }
    memory.translate(gpa, access).map(Some).map_err(|_| INVALID_INPUT)
}

/// Takes the copied input apart.
#[inline]
fn parse<'b, D: Declaration>(bytes: &'b [u8], caller: &Caller, layout: &Layout) -> Step<Input<'b, D>> {
    let (header, _) = D::Header::read_from_prefix(bytes).map_err(|_| INVALID_INPUT)?;
    let variable: &[u64] = if D::MAX_VARIABLE_HEADER != 0 {
        part(bytes, size_of::<D::Header>(), 0, layout.variable)?
    } else {
        Default::default()
    };
    let elements: &[D::Element] =
        if D::REP { part(bytes, layout.list, layout.start, layout.count)? } else { Default::default() };
    Ok(Input { level: caller.level, privileges: caller.privileges, header, variable, elements })
}

/// Elements `start..count` of the list of `T` that begins `at` bytes into `bytes`.
#[inline]
fn part<T: FromBytes + Immutable + KnownLayout>(bytes: &[u8], at: usize, start: usize, count: usize) -> Step<&[T]> {
    let from = at.wrapping_add(start.wrapping_mul(size_of::<T>()));
    let to = at.wrapping_add(count.wrapping_mul(size_of::<T>()));
    let list = bytes.get(from..to).ok_or(INVALID_INPUT)?;
    <[T]>::ref_from_bytes(list).map_err(|_| INVALID_INPUT)
}

/// An answer for the elements from the start index on, in total reps.
#[inline]
fn reply<D: Declaration>(answer: Answer, layout: &Layout) -> Reply {
    let (start, count) = (layout.start as u16, layout.count as u16);
    let total = |completed: u16| if D::REP { start.saturating_add(completed).min(count) } else { 0 };
    match answer {
        Answer::Done => Reply::Complete { status: HvStatus::SUCCESS, reps: count },
        Answer::Failed { status, completed } => Reply::Complete { status, reps: total(completed) },
        Answer::Retry { completed } if D::REP && total(completed) == count => {
            Reply::Complete { status: HvStatus::SUCCESS, reps: count }
        }
        Answer::Retry { completed } => Reply::Retry { start: total(completed) },
        Answer::Suspend => Reply::Suspend,
    }
}
