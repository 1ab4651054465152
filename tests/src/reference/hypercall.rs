//! A hypercall from registers to registers, step by step as the TLFS tells it.

use super::vp_set;

/// The caller's registers.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub xmm: [u128; 6],
}

/// What the caller's partition is offered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offered {
    pub post_messages: bool,
    pub signal_events: bool,
    pub vp_registers: bool,
    pub extended: bool,
    pub start_vp: bool,
    pub flush: bool,
    pub ipi: bool,
    pub ex: bool,
    pub spin: bool,
    pub gpa_flush: bool,
    pub xmm_input: bool,
    pub xmm_output: bool,
    pub extended_ranges: bool,
    pub nested: bool,
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Caller {
    pub long_mode_64: bool,
    pub protected: bool,
    pub cpl: u8,
    pub enabled: bool,
    pub from_l2: bool,
    pub offered: Offered,
}

/// The caller's memory by page: `None` for a page that cannot be reached.
pub trait Memory {
    /// The bytes of the caller's page `number`, if they can be read.
    fn read_page(&self, number: u64) -> Option<Vec<u8>>;
    /// Whether the caller's page can be written.
    fn can_write(&self, number: u64) -> bool;
    /// Writes bytes at the caller's address, within one page.
    fn write(&mut self, address: u64, bytes: &[u8]);
    /// True when the two addresses, of which one is to be read and one written, are the same byte.
    fn same(&self, a: u64, b: u64) -> bool {
        a == b
    }
}

/// What the handler of a call is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Flush {
        from_l2: bool,
        space: u64,
        flags: u64,
        /// `None`: all.
        vps: Option<Vec<u32>>,
        /// `None` for the whole space; else whether the format is extended, and the entries.
        ranges: Option<(bool, Vec<u64>)>,
    },
    FlushGuestPhysical {
        space: u64,
        ranges: Option<Vec<u64>>,
    },
    Ipi {
        vector: u8,
        vps: Option<Vec<u32>>,
    },
    Spin(u32),
    PostMessage {
        connection: u32,
        kind: u32,
        payload: Vec<u8>,
    },
    SignalEvent {
        connection: u32,
        flag: u16,
    },
    ApicId(u32),
    GetRegister {
        vp: u32,
        name: u32,
    },
    SetRegister {
        vp: u32,
        name: u32,
        value: u128,
    },
    StartVp {
        vp: u32,
        context: Vec<u8>,
    },
    Capabilities,
}

/// What the handler says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Say {
    Done,
    /// With output.
    Value(u128),
    /// A status other than 0, after so many elements.
    Fail(u16, u16),
    /// Not finished, after so many elements.
    Again(u16),
    Suspend,
}

/// How the instruction ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Undefined,
    Suspend,
    Again,
    Result { status: u16, reps: u16 },
}

const CODE: u16 = 2;
const INPUT: u16 = 3;
const ALIGNMENT: u16 = 4;
const PARAMETER: u16 = 5;
const DENIED: u16 = 6;
const PARTITION_ID: u16 = 0xD;

/// A call's row in the TLFS.
struct Row {
    allowed: bool,
    fixed: usize,
    variable: bool,
    element: Option<usize>,
    out: usize,
    out_element: usize,
}

fn row(code: u16, o: &Offered) -> Option<Row> {
    let simple = |allowed, fixed| Row { allowed, fixed, variable: false, element: None, out: 0, out_element: 0 };
    let rep = |allowed, fixed, element| Row { element: Some(element), ..simple(allowed, fixed) };
    Some(match code {
        0x0002 => simple(o.flush, 24),
        0x0003 => rep(o.flush, 24, 8),
        0x0008 => simple(o.spin, 8),
        0x000B => simple(o.ipi, 16),
        0x0013 => Row { variable: true, ..simple(o.flush && o.ex, 32) },
        0x0014 => Row { variable: true, ..rep(o.flush && o.ex, 32, 8) },
        0x0015 => Row { variable: true, ..simple(o.ipi && o.ex, 24) },
        0x0050 => Row { out_element: 16, ..rep(o.vp_registers, 16, 4) },
        0x0051 => rep(o.vp_registers, 16, 32),
        0x005C => simple(o.post_messages, 256),
        0x005D => simple(o.signal_events, 8),
        0x0099 => simple(o.start_vp, 240),
        0x009A => Row { out_element: 4, ..rep(o.start_vp, 16, 4) },
        0x00AF => simple(o.gpa_flush, 16),
        0x00B0 => rep(o.gpa_flush, 16, 8),
        0x8001 => Row { out: 8, ..simple(o.extended, 0) },
        _ => return None,
    })
}

/// Everything about a call after its words were read.
struct Call<'a> {
    caller: &'a Caller,
    code: u16,
    header: &'a [u8],
    banks: Vec<u64>,
    /// The elements from the start index on.
    elements: Vec<&'a [u8]>,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Performs the hypercall instruction.
pub fn hypercall(
    caller: &Caller,
    r: &mut Registers,
    memory: &mut dyn Memory,
    handler: &mut dyn FnMut(&Ask) -> Say,
) -> End {
    if !caller.enabled || !caller.protected || caller.cpl != 0 {
        return End::Undefined;
    }
    let join = |high: u64, low: u64| (high % (1 << 32)) * (1 << 32) + low % (1 << 32);
    let (control, a, b) = if caller.long_mode_64 {
        (r.rcx, r.rdx, r.r8)
    } else {
        (join(r.rdx, r.rax), join(r.rbx, r.rcx), join(r.rdi, r.rsi))
    };
    let end = perform(caller, control, [a, b], r, memory, handler);
    let mut set = |value: u64, again: bool| {
        if !caller.long_mode_64 {
            r.rdx = value / (1 << 32);
            r.rax = value % (1 << 32);
        } else if again {
            r.rcx = value;
        } else {
            r.rax = value;
        }
    };
    match end {
        Fin::Result(status, reps) => {
            set(u64::from(status) + u64::from(reps) * (1 << 32), false);
            End::Result { status, reps }
        }
        Fin::Again(start) => {
            if control >> 32 & 0xFFF != 0 {
                set(control & !(0xFFF << 48) | u64::from(start) << 48, true);
            }
            End::Again
        }
        Fin::Suspend => End::Suspend,
        Fin::Undefined => End::Undefined,
    }
}

enum Fin {
    Undefined,
    Suspend,
    Again(u16),
    Result(u16, u16),
}

/// The register block as bytes.
fn block(ab: [u64; 2], r: &Registers) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(ab[0].to_le_bytes());
    bytes.extend(ab[1].to_le_bytes());
    for x in r.xmm {
        bytes.extend(x.to_le_bytes());
    }
    bytes
}

fn set_block(r: &mut Registers, bytes: &[u8]) {
    r.rdx = u64_at(bytes, 0);
    r.r8 = u64_at(bytes, 8);
    for (i, x) in r.xmm.iter_mut().enumerate() {
        *x = u128::from_le_bytes(bytes[16 + 16 * i..][..16].try_into().expect("sixteen bytes"));
    }
}

fn perform(
    caller: &Caller,
    control: u64,
    ab: [u64; 2],
    r: &mut Registers,
    memory: &mut dyn Memory,
    handler: &mut dyn FnMut(&Ask) -> Say,
) -> Fin {
    let field = |low: u32, high: u32| (control >> low & ((1u64 << (high - low + 1)) - 1)) as usize;
    let nested = field(31, 31) == 1;
    if field(27, 30) != 0 || field(44, 47) != 0 || field(60, 63) != 0 {
        return Fin::Result(INPUT, 0);
    }
    if nested && (caller.from_l2 || !caller.offered.nested) {
        return Fin::Result(INPUT, 0);
    }
    let code = field(0, 15) as u16;
    let Some(row) = row(code, &caller.offered) else { return Fin::Result(CODE, 0) };
    if !row.allowed {
        return Fin::Result(DENIED, 0);
    }
    let (fast, variable, count, start) = (field(16, 16) == 1, field(17, 26), field(32, 43), field(48, 59));
    if variable > if row.variable { 64 } else { 0 } {
        return Fin::Result(INPUT, 0);
    }
    match row.element {
        None if count != 0 || start != 0 => return Fin::Result(INPUT, 0),
        Some(_) if start >= count => return Fin::Result(INPUT, 0),
        _ => {}
    }
    let list = row.fixed + 8 * variable;
    let input_len = list + count * row.element.unwrap_or(0);
    let output_len = row.out + count * row.out_element;
    let fast_out = input_len.div_ceil(16) * 16;
    let input: Vec<u8> = if fast {
        if input_len > 16 && !caller.offered.xmm_input {
            return Fin::Undefined;
        }
        if output_len > 0 && !(caller.offered.xmm_output && caller.long_mode_64) {
            return Fin::Undefined;
        }
        if input_len > 112 || output_len > 0 && fast_out + output_len > 112 {
            return Fin::Result(INPUT, 0);
        }
        block(ab, r)[..input_len].to_vec()
    } else {
        for (gpa, len) in [(ab[0], input_len), (ab[1], output_len)] {
            if len > 0 && (gpa % 8 != 0 || gpa % 4096 + len as u64 > 4096) {
                return Fin::Result(ALIGNMENT, 0);
            }
        }
        let inside = |gpa: u64| (0..output_len as u64).any(|n| ab[1] + n == gpa);
        if (0..input_len as u64).any(|n| inside(ab[0] + n)) {
            return Fin::Result(ALIGNMENT, 0);
        }
        if output_len > 0 && !memory.can_write(ab[1] / 4096) {
            return Fin::Result(INPUT, 0);
        }
        if input_len == 0 {
            Vec::new()
        } else {
            let Some(page) = memory.read_page(ab[0] / 4096) else { return Fin::Result(INPUT, 0) };
            page[(ab[0] % 4096) as usize..][..input_len].to_vec()
        }
    };
    let call = Call {
        caller,
        code,
        header: &input[..row.fixed],
        banks: (0..variable).map(|n| u64_at(&input, row.fixed + 8 * n)).collect(),
        elements: match row.element {
            None => Vec::new(),
            Some(size) => (start..count).map(|n| &input[list + n * size..][..size]).collect(),
        },
    };
    let mut out = Vec::new();
    let say = serve(&call, handler, &mut out);
    let out_at = if start == 0 { 0 } else { row.out + start * row.out_element };
    if !out.is_empty() && fast {
        let mut bytes = block(ab, r);
        bytes[fast_out + out_at..][..out.len()].copy_from_slice(&out);
        set_block(r, &bytes);
    } else if !out.is_empty() {
        memory.write(ab[1] + out_at as u64, &out);
    }
    let total = |done: u16| match row.element {
        Some(_) => (start + usize::from(done)).min(count) as u16,
        None => 0,
    };
    match say {
        Say::Done | Say::Value(_) => Fin::Result(0, count as u16),
        Say::Fail(status, done) => Fin::Result(status, total(done)),
        Say::Again(done) if row.element.is_some() && usize::from(total(done)) == count => Fin::Result(0, count as u16),
        Say::Again(done) => Fin::Again(total(done)),
        Say::Suspend => Fin::Suspend,
    }
}

fn serve(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say, out: &mut Vec<u8>) -> Say {
    match call.code {
        0x02 | 0x03 | 0x13 | 0x14 => flush(call, handler),
        0xAF | 0xB0 => flush_guest_physical(call, handler),
        0x0B | 0x15 => ipi(call, handler),
        0x08 => handler(&Ask::Spin(u32_at(call.header, 0))),
        0x5C => post_message(call, handler),
        0x5D => {
            let flag = u32_at(call.header, 4) as u16;
            handler(&Ask::SignalEvent { connection: u32_at(call.header, 0), flag })
        }
        0x8001 => match handler(&Ask::Capabilities) {
            Say::Value(value) => {
                out.extend((value as u64).to_le_bytes());
                Say::Done
            }
            other => other,
        },
        _ => vp_calls(call, handler, out),
    }
}

const FAIL_PARAMETER: Say = Say::Fail(PARAMETER, 0);

fn flush(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say) -> Say {
    let list = call.code == 0x03 || call.code == 0x14;
    let ex = call.code >= 0x13;
    let space = u64_at(call.header, 0);
    let flags = u64_at(call.header, 8);
    let flag = |n: u32| flags >> n & 1 == 1;
    let mut members = None;
    if ex {
        match vp_set::members(u64_at(call.header, 24), &call.banks) {
            None => return Say::Fail(INPUT, 0),
            some => members = some,
        }
    }
    if flags >= 16 || list && flag(2) || flag(3) && !call.caller.offered.extended_ranges {
        return FAIL_PARAMETER;
    }
    let vps = if flag(0) {
        None
    } else if ex {
        match u64_at(call.header, 16) {
            0 if u64_at(call.header, 24) == 0 => return Say::Done,
            0 => members,
            1 => None,
            _ => return FAIL_PARAMETER,
        }
    } else {
        let mask = u64_at(call.header, 16);
        if mask == 0 { None } else { vp_set::members(1, &[mask]) }
    };
    let ranges = list.then(|| (flag(3), call.elements.iter().map(|e| u64_at(e, 0)).collect()));
    handler(&Ask::Flush { from_l2: call.caller.from_l2, space, flags, vps, ranges })
}

fn flush_guest_physical(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say) -> Say {
    if u64_at(call.header, 8) != 0 {
        return FAIL_PARAMETER;
    }
    let ranges = (call.code == 0xB0).then(|| call.elements.iter().map(|e| u64_at(e, 0)).collect());
    handler(&Ask::FlushGuestPhysical { space: u64_at(call.header, 0), ranges })
}

/// A target VTL is none (0) or VTL 0 said outright (0x10).
fn vtl_is_wrong(byte: u8) -> bool {
    byte != 0 && byte != 0x10
}

fn ipi(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say) -> Say {
    let vector = u32_at(call.header, 0);
    let members = if call.code == 0x0B {
        vp_set::members(1, &[u64_at(call.header, 8)])
    } else {
        vp_set::members(u64_at(call.header, 16), &call.banks)
    };
    if members.is_none() {
        return Say::Fail(INPUT, 0);
    }
    if !(0x10..=0xFF).contains(&vector) || vtl_is_wrong(call.header[4]) {
        return FAIL_PARAMETER;
    }
    let mut vps = members;
    if call.code == 0x15 {
        match u64_at(call.header, 8) {
            0 if u64_at(call.header, 16) == 0 => return Say::Done,
            0 => {}
            1 => vps = None,
            _ => return FAIL_PARAMETER,
        }
    } else if u64_at(call.header, 8) == 0 {
        return Say::Done;
    }
    handler(&Ask::Ipi { vector: vector as u8, vps })
}

fn post_message(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say) -> Say {
    let kind = u32_at(call.header, 8);
    let len = u32_at(call.header, 12);
    if len > 240 || kind == 0 || kind >= 1 << 31 {
        return FAIL_PARAMETER;
    }
    let payload = call.header[16..][..len as usize].to_vec();
    handler(&Ask::PostMessage { connection: u32_at(call.header, 0), kind, payload })
}

fn vp_calls(call: &Call<'_>, handler: &mut dyn FnMut(&Ask) -> Say, out: &mut Vec<u8>) -> Say {
    if u64_at(call.header, 0) != u64::MAX {
        return Say::Fail(PARTITION_ID, 0);
    }
    let vtl = if call.code == 0x9A { call.header[8] } else { call.header[12] };
    if vtl_is_wrong(vtl) {
        return FAIL_PARAMETER;
    }
    let vp = u32_at(call.header, 8);
    if call.code == 0x99 {
        return handler(&Ask::StartVp { vp, context: call.header[16..].to_vec() });
    }
    for (done, element) in call.elements.iter().enumerate() {
        let name = u32_at(element, 0);
        let ask = match call.code {
            0x50 => Ask::GetRegister { vp, name },
            0x51 => {
                let value = u128::from(u64_at(element, 24)) << 64 | u128::from(u64_at(element, 16));
                Ask::SetRegister { vp, name, value }
            }
            _ => Ask::ApicId(name),
        };
        match handler(&ask) {
            Say::Value(value) if call.code == 0x50 => out.extend(value.to_le_bytes()),
            Say::Value(value) if call.code == 0x9A => out.extend((value as u32).to_le_bytes()),
            Say::Fail(status, _) => return Say::Fail(status, done as u16),
            _ => {}
        }
    }
    Say::Done
}
