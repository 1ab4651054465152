//! VM-entry checks: each fires with the right kind of failure, and its nearest neighbour enters.

use tests::model::vmx::fields::*;
use tests::model::vmx::{Op, Status, Step, reason};

use super::{Bench, VMCS, VMXON};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Enters,
    /// VMfailValid with a number.
    Fails(u64),
    /// Exit 0x80000021 with a qualification.
    Guest(u64),
}

fn outcome(b: &mut Bench) -> Outcome {
    match b.enter() {
        Step::Exit(reason::GUEST_STATE) => {
            assert_eq!(b.get(EXIT_REASON), 0x8000_0021);
            Outcome::Guest(b.get(QUALIFICATION))
        }
        _ if b.cpu.in_guest() => Outcome::Enters,
        Step::Done(0) => {
            assert_eq!(b.cpu.state.rflags & 0x41, 0x40, "ZF, not CF");
            Outcome::Fails(b.get(INSTRUCTION_ERROR))
        }
        other => panic!("{other:?}"),
    }
}

type Sets = &'static [(u32, u64)];

/// Runs a table of (name of the check, settings that fail, settings just short), each on top of `base`.
fn table(want: Outcome, base: Sets, rows: &[(&str, Sets, Sets)]) {
    let run = |sets: Sets| {
        let mut b = Bench::new();
        base.iter().chain(sets).for_each(|(field, value)| b.set(*field, *value));
        let got = outcome(&mut b);
        (got, b.cpu.why)
    };
    for (why, bad, good) in rows {
        assert_eq!(run(bad), (want, *why), "{bad:#x?}");
        let (got, refused) = run(good);
        assert_eq!(got, Outcome::Enters, "{why}: {good:#x?} was refused: {refused}");
    }
}

const P: u64 = 0x0400_6172;
const SEC: u64 = P | 1 << 31;
const X: u64 = 0x3_6FFB;
const TOP: u64 = 1 << 46;

#[test]
fn the_minimal_vmcs_enters() {
    assert_eq!(outcome(&mut Bench::new()), Outcome::Enters);
    assert_eq!(outcome(&mut Bench::nested()), Outcome::Enters);
}

#[test]
fn controls() {
    table(
        Outcome::Fails(7),
        &[],
        &[
            ("pin-based reserved bits", &[(PIN, 0x12)], &[(PIN, 0x17)]),
            ("pin-based reserved bits", &[(PIN, 0x96)], &[(PIN, 0x56)]),
            ("processor-based reserved bits", &[(PROC, P & !2)], &[(PROC, P | 4)]),
            ("processor-based reserved bits", &[(PROC, P | 1 << 17)], &[(PROC, P | 1 << 16)]),
            ("secondary reserved bits", &[(PROC, SEC), (PROC2, 1)], &[(PROC, P), (PROC2, 1)]),
            ("CR3-target count", &[(CR3_TARGETS, 5)], &[(CR3_TARGETS, 4)]),
            ("IO bitmap address", &[(PROC, P | 1 << 25), (IO_BITMAP_A, 1)], &[(PROC, P), (IO_BITMAP_A, 1)]),
            (
                "IO bitmap address",
                &[(PROC, P | 1 << 25), (IO_BITMAP_B, TOP)],
                &[(PROC, P | 1 << 25), (IO_BITMAP_B, TOP / 2)],
            ),
            (
                "MSR bitmap address",
                &[(PROC, P | 1 << 28), (MSR_BITMAP, 0x800)],
                &[(PROC, P | 1 << 28), (MSR_BITMAP, 0x1000)],
            ),
            (
                "virtual-APIC address",
                &[(PROC, P | 1 << 21), (VIRTUAL_APIC, 8)],
                &[(PROC, P | 1 << 21), (VIRTUAL_APIC, 0x1000)],
            ),
            (
                "TPR threshold reserved bits",
                &[(PROC, P | 1 << 21), (TPR_THRESHOLD, 16)],
                &[(PROC, P), (TPR_THRESHOLD, 16)],
            ),
            (
                "TPR threshold above VTPR",
                &[(PROC, P | 1 << 21), (TPR_THRESHOLD, 1)],
                &[(PROC, P | 1 << 21), (TPR_THRESHOLD, 0)],
            ),
            ("virtual NMIs without NMI exiting", &[(PIN, 0x36)], &[(PIN, 0x3E)]),
            ("NMI window without virtual NMIs", &[(PIN, 0x1E), (PROC, P | 1 << 22)], &[(PIN, 0x3E), (PROC, P)]),
            ("VPID 0", &[(PROC, SEC), (PROC2, 1 << 5)], &[(PROC, SEC), (PROC2, 1 << 5), (VPID, 1)]),
            (
                "unrestricted guest without EPT",
                &[(PROC, SEC), (PROC2, 1 << 7)],
                &[(PROC, SEC), (PROC2, 1 << 7 | 2), (EPTP, 0x1E)],
            ),
            ("TSC multiplier 0", &[(PROC, SEC), (PROC2, 1 << 25)], &[(PROC, P), (PROC2, 1 << 25)]),
            ("exit reserved bits", &[(EXIT, X & !1)], &[(EXIT, X | 4)]),
            ("exit reserved bits", &[(EXIT, X | 1 << 12)], &[(EXIT, X | 1 << 15)]),
            ("save timer without timer", &[(EXIT, X | 1 << 22)], &[(EXIT, X | 1 << 22), (PIN, 0x56)]),
            ("exit MSR-store area", &[(EXIT_MSR_STORE_COUNT, 1), (EXIT_MSR_STORE, 8)], &[(EXIT_MSR_STORE, 8)]),
            ("exit MSR-load area", &[(EXIT_MSR_LOAD_COUNT, 2), (EXIT_MSR_LOAD, TOP - 16)], &[(EXIT_MSR_LOAD, TOP)]),
            ("entry reserved bits", &[(ENTRY, 0x13FA)], &[(ENTRY, 0x13FF)]),
            ("entry reserved bits", &[(ENTRY, 0x13FB | 1 << 10)], &[(ENTRY, 0x13FB)]),
            ("entry MSR-load area", &[(ENTRY_MSR_LOAD_COUNT, 1), (ENTRY_MSR_LOAD, 4)], &[(ENTRY_MSR_LOAD, 4)]),
        ],
    );
}

#[test]
fn eptp() {
    let wants: Sets = &[(PROC, SEC), (PROC2, 2)];
    table(
        Outcome::Fails(7),
        wants,
        &[
            ("EPTP", &[(EPTP, 0x1D)], &[(EPTP, 0x1E)]),
            ("EPTP", &[(EPTP, 0x16)], &[(EPTP, 0x18)]),
            ("EPTP", &[(EPTP, 0x9E)], &[(EPTP, 0x5E)]),
            ("EPTP", &[(EPTP, TOP | 0x1E)], &[(EPTP, (TOP / 2) | 0x1E)]),
        ],
    );
}

#[test]
fn injection() {
    const V: u64 = 1 << 31;
    let info = |value: u64, extra: Sets| {
        let mut b = Bench::new();
        extra.iter().for_each(|(field, value)| b.set(*field, *value));
        b.set(ENTRY_INFO, value);
        (outcome(&mut b), b.cpu.why)
    };
    for (value, why) in [
        (V | 0x100 | 0x20, "injection type 1"),
        (V | 0x200 | 3, "injection vector"),
        (V | 0x300 | 32, "injection vector"),
        (V | 0x700 | 1, "injection vector"),
        (V | 0x300 | 13, "injection error-code bit"),
        (V | 0xB00 | 6, "injection error-code bit"),
        (V | 0x800 | 0x20, "injection error-code bit"),
        (V | 1 << 12 | 0x300 | 6, "injection reserved bits"),
        (V | 1 << 30 | 0x300 | 6, "injection reserved bits"),
    ] {
        assert_eq!(info(value, &[]), (Outcome::Fails(7), why), "{value:#x}");
        assert_eq!(info(value & !V, &[]).0, Outcome::Enters, "not valid");
    }
    for value in [V | 0x202, V | 0x300 | 6, V | 0xB00 | 13, V | 0x700] {
        assert_eq!(info(value, &[]).0, Outcome::Enters, "{value:#x}");
    }
    assert_eq!(info(V | 0xB00 | 13, &[(ENTRY_ERROR, 1 << 16)]), (Outcome::Fails(7), "injection error code"));
    assert_eq!(info(V | 0xB00 | 13, &[(ENTRY_ERROR, 0xFFFF)]).0, Outcome::Enters);
    for (length, ok) in [(0, false), (1, true), (15, true), (16, false)] {
        let mut b = Bench::new();
        b.set(ENTRY_INFO, V | 0x480);
        b.set(ENTRY_LENGTH, length);
        assert_eq!(outcome(&mut b) == Outcome::Enters, ok, "{length}");
    }
}

#[test]
fn host_state() {
    table(
        Outcome::Fails(8),
        &[],
        &[
            ("host CR0", &[(HOST_CR0, 0x8001_0030)], &[(HOST_CR0, 0x8000_0021)]),
            ("host CR0", &[(HOST_CR0, 0x1_8001_0031)], &[(HOST_CR0, 0xE001_0031)]),
            ("host CR4", &[(HOST_CR4, 0xA0)], &[(HOST_CR4, 0x2020)]),
            ("host CR4", &[(HOST_CR4, 0x20A0 | 1 << 14)], &[(HOST_CR4, 0x20A0 | 1 << 20)]),
            ("host CR3", &[(HOST_CR3, TOP)], &[(HOST_CR3, TOP / 2)]),
            ("host SYSENTER", &[(HOST_SYSENTER_ESP, 1 << 47)], &[(HOST_SYSENTER_ESP, 1 << 46)]),
            ("host PAT", &[(EXIT, X | 1 << 19), (HOST_PAT, 2)], &[(EXIT, X), (HOST_PAT, 2)]),
            ("host EFER", &[(EXIT, X | 1 << 21), (HOST_EFER, 0x400)], &[(EXIT, X | 1 << 21), (HOST_EFER, 0x500)]),
            ("host EFER", &[(EXIT, X | 1 << 21), (HOST_EFER, 0x1500)], &[(EXIT, X | 1 << 21), (HOST_EFER, 0xD01)]),
            ("host selector", &[(HOST_DS, 3)], &[(HOST_DS, 8)]),
            ("host selector", &[(HOST_TR, 0x1C)], &[(HOST_TR, 0x20)]),
            ("host CS or TR null", &[(HOST_CS, 0)], &[(HOST_SS, 0)]),
            ("host base", &[(HOST_GS_BASE, 1 << 63)], &[(HOST_GS_BASE, 0xFFFF_8000_0000_0000)]),
            ("host address-space size", &[(EXIT, X & !0x200)], &[]),
            ("64-bit host without PAE", &[(HOST_CR4, 0x2080)], &[(HOST_CR4, 0x20A0)]),
            ("host RIP", &[(HOST_RIP, 1 << 47)], &[(HOST_RIP, (1 << 47) - 1)]),
        ],
    );
}

#[test]
fn guest_registers() {
    table(
        Outcome::Guest(0),
        &[],
        &[
            ("CR0 fixed bits", &[(GUEST_CR0, 0x8001_0011)], &[(GUEST_CR0, 0x8001_0021)]),
            ("CR4 fixed bits", &[(GUEST_CR4, 0xA0)], &[(GUEST_CR4, 0x2020)]),
            ("DEBUGCTL", &[(ENTRY, 0x13FF), (GUEST_DEBUGCTL, 4)], &[(ENTRY, 0x13FB), (GUEST_DEBUGCTL, 4)]),
            ("DR7", &[(ENTRY, 0x13FF), (GUEST_DR7, 1 << 32)], &[(ENTRY, 0x13FB), (GUEST_DR7, 1 << 32)]),
            ("IA-32e mode without paging or PAE", &[(GUEST_CR4, 0x2080)], &[(GUEST_CR4, 0x2020)]),
            ("CR3", &[(GUEST_CR3, TOP)], &[(GUEST_CR3, TOP / 2)]),
            ("SYSENTER", &[(GUEST_SYSENTER_EIP, 1 << 47)], &[(GUEST_SYSENTER_EIP, (1 << 47) - 1)]),
            ("PAT", &[(ENTRY, 0x53FB), (GUEST_PAT, 3 << 56)], &[(ENTRY, 0x53FB), (GUEST_PAT, 7 << 56)]),
            ("EFER", &[(ENTRY, 0x93FB), (GUEST_EFER, 0x100)], &[(ENTRY, 0x93FB), (GUEST_EFER, 0x500)]),
            ("EFER", &[(ENTRY, 0x93FB), (GUEST_EFER, 0x1500)], &[(ENTRY, 0x93FB), (GUEST_EFER, 0xD01)]),
            ("EFER LMA and LME", &[(ENTRY, 0x93FB), (GUEST_EFER, 0x400)], &[(ENTRY, 0x93FB), (GUEST_EFER, 0xD00)]),
            ("RIP", &[(GUEST_RIP, 1 << 47)], &[(GUEST_RIP, u64::MAX)]),
            ("RFLAGS reserved bits", &[(GUEST_RFLAGS, 0)], &[(GUEST_RFLAGS, 0x202)]),
            ("RFLAGS reserved bits", &[(GUEST_RFLAGS, 0x8002)], &[(GUEST_RFLAGS, 0x4002)]),
            ("RFLAGS reserved bits", &[(GUEST_RFLAGS, 0x40_0002)], &[(GUEST_RFLAGS, 0x20_0002)]),
            (
                "interrupt injected with IF = 0",
                &[(ENTRY_INFO, 0x8000_0030)],
                &[(ENTRY_INFO, 0x8000_0030), (GUEST_RFLAGS, 0x202)],
            ),
            ("GDTR or IDTR base", &[(GUEST_GDTR_BASE, 1 << 50)], &[(GUEST_GDTR_BASE, 1 << 40)]),
            ("GDTR or IDTR limit", &[(GUEST_IDTR_LIMIT, 0x1_0000)], &[(GUEST_IDTR_LIMIT, 0xFFFF)]),
        ],
    );
}

#[test]
fn guest_segments() {
    table(
        Outcome::Guest(0),
        &[],
        &[
            ("TR selector", &[(GUEST_TR, 4)], &[(GUEST_TR, 3)]),
            ("LDTR selector", &[(GUEST_LDTR_AR, 0x82), (GUEST_LDTR_LIMIT, 7), (GUEST_LDTR, 4)], &[(GUEST_LDTR, 4)]),
            ("SS RPL", &[(GUEST_CS, 11)], &[(GUEST_CS, 12)]),
            ("TR, FS or GS base", &[(GUEST_FS_BASE, 1 << 47)], &[(GUEST_FS_BASE, 1 << 46)]),
            ("CS base", &[(GUEST_CS_BASE, 1 << 32)], &[(GUEST_CS_BASE, 1 << 31)]),
            ("SS, DS or ES base", &[(GUEST_DS_BASE, 1 << 32)], &[(GUEST_DS_BASE, 1 << 32), (GUEST_DS_AR, 1 << 16)]),
            ("segment type", &[(GUEST_CS_AR, 0xA093)], &[(GUEST_CS_AR, 0xA099)]),
            ("segment type", &[(GUEST_SS_AR, 0xC091)], &[(GUEST_SS_AR, 0xC097)]),
            ("segment type", &[(GUEST_ES_AR, 0xC092)], &[(GUEST_ES_AR, 0xC091)]),
            ("segment type", &[(GUEST_ES_AR, 0xC099)], &[(GUEST_ES_AR, 0xC09B)]),
            ("segment S, P or reserved bits", &[(GUEST_CS_AR, 0xA08B)], &[]),
            ("segment S, P or reserved bits", &[(GUEST_DS_AR, 0xC013)], &[(GUEST_DS_AR, 0x1_C013)]),
            ("segment S, P or reserved bits", &[(GUEST_DS_AR, 0xC193)], &[(GUEST_DS_AR, 0xD093)]),
            (
                "segment granularity",
                &[(GUEST_CS_LIMIT, 0xFFFF_FFFE)],
                &[(GUEST_CS_AR, 0x209B), (GUEST_CS_LIMIT, 0xFFFFE)],
            ),
            ("segment granularity", &[(GUEST_CS_AR, 0x209B)], &[(GUEST_CS_AR, 0x209B), (GUEST_CS_LIMIT, 0xFFFFF)]),
            ("CS DPL", &[(GUEST_CS_AR, 0xA0BB)], &[(GUEST_CS_AR, 0xA09F)]),
            ("CS L and D", &[(GUEST_CS_AR, 0xE09B)], &[(GUEST_CS_AR, 0xC09B)]),
            (
                "SS DPL and RPL",
                &[(GUEST_SS_AR, 0x1_C0F3), (GUEST_CS_AR, 0xA0FB)],
                &[(GUEST_SS_AR, 0x1_C0F3), (GUEST_CS_AR, 0xA0FB), (GUEST_SS, 3), (GUEST_CS, 3)],
            ),
            ("data segment DPL", &[(GUEST_DS, 3)], &[(GUEST_DS, 3), (GUEST_DS_AR, 0xC0F3)]),
            ("TR rights", &[(GUEST_TR_AR, 0x83)], &[(GUEST_TR_AR, 0x8B)]),
            ("TR rights", &[(GUEST_TR_AR, 0x1_008B)], &[]),
            ("TR granularity", &[(GUEST_TR_LIMIT, 0x10_0000)], &[(GUEST_TR_LIMIT, 0xF_FFFF)]),
            ("LDTR rights", &[(GUEST_LDTR_AR, 0x83)], &[(GUEST_LDTR_AR, 0x1_0083)]),
        ],
    );
}

#[test]
fn guest_activity_and_shadows() {
    const NMI: (u32, u64) = (ENTRY_INFO, 0x8000_0202);
    const PF: (u32, u64) = (ENTRY_INFO, 0x8000_0B0E);
    let iff: Sets = &[(GUEST_RFLAGS, 0x202)];
    table(
        Outcome::Guest(0),
        iff,
        &[
            ("activity state", &[(ACTIVITY, 4)], &[(ACTIVITY, 3)]),
            (
                "HLT at a user's privilege",
                &[(ACTIVITY, 1), (GUEST_SS_AR, 0xC0F3), (GUEST_SS, 3), (GUEST_CS, 3), (GUEST_CS_AR, 0xA0FB)],
                &[(ACTIVITY, 0), (GUEST_SS_AR, 0xC0F3), (GUEST_SS, 3), (GUEST_CS, 3), (GUEST_CS_AR, 0xA0FB)],
            ),
            ("inactive in an interrupt shadow", &[(ACTIVITY, 1), (INTERRUPTIBILITY, 1)], &[(INTERRUPTIBILITY, 1)]),
            ("injection into this activity state", &[(ACTIVITY, 1), PF], &[(ACTIVITY, 1), NMI]),
            ("injection into this activity state", &[(ACTIVITY, 2), PF], &[(ACTIVITY, 2), NMI]),
            ("injection into this activity state", &[(ACTIVITY, 3), NMI], &[(ACTIVITY, 3)]),
            ("interruptibility reserved bits", &[(INTERRUPTIBILITY, 0x10)], &[(INTERRUPTIBILITY, 8)]),
            ("both shadows", &[(INTERRUPTIBILITY, 3)], &[(INTERRUPTIBILITY, 2)]),
            ("STI shadow with IF = 0", &[(INTERRUPTIBILITY, 1), (GUEST_RFLAGS, 2)], &[(INTERRUPTIBILITY, 1)]),
            ("blocking by SMI outside SMM", &[(INTERRUPTIBILITY, 4)], &[]),
            (
                "interrupt injected in a shadow",
                &[(INTERRUPTIBILITY, 1), (ENTRY_INFO, 0x8000_0030)],
                &[(ENTRY_INFO, 0x8000_0030)],
            ),
            (
                "NMI injected while NMIs are blocked",
                &[NMI, (INTERRUPTIBILITY, 8), (PIN, 0x3E)],
                &[NMI, (INTERRUPTIBILITY, 8)],
            ),
            ("pending debug reserved bits", &[(PENDING_DEBUG, 0x10)], &[(PENDING_DEBUG, 0x100F)]),
            (
                "pending debug BS",
                &[(INTERRUPTIBILITY, 2), (GUEST_RFLAGS, 0x302)],
                &[(INTERRUPTIBILITY, 2), (GUEST_RFLAGS, 0x302), (PENDING_DEBUG, 0x4000)],
            ),
        ],
    );
    table(Outcome::Guest(0), &[], &[("NMI injected in the shadow of MOV SS", &[NMI, (INTERRUPTIBILITY, 2)], &[NMI])]);
    table(Outcome::Guest(3), iff, &[("NMI injected in the shadow of STI", &[NMI, (INTERRUPTIBILITY, 1)], &[NMI])]);
    table(
        Outcome::Guest(4),
        &[],
        &[
            ("link pointer", &[(LINK, 0x31_1008)], &[]),
            ("link to the current VMCS", &[(LINK, VMCS)], &[(LINK, VMXON)]),
            ("link revision", &[(LINK, 0x5000)], &[(LINK, VMXON)]),
        ],
    );
}

#[test]
fn pae_guests_need_good_pdptes() {
    for (ept, pdpte, want) in [
        (true, 0x5002 | 1, Outcome::Guest(2)),
        (true, 0x5002, Outcome::Enters),
        (true, 0x5001, Outcome::Enters),
        (false, 0x5003, Outcome::Guest(2)),
        (false, 0x5001, Outcome::Enters),
    ] {
        let mut b = if ept { Bench::nested() } else { Bench::new() };
        b.set(ENTRY, 0x11FB);
        b.set(GUEST_CS_AR, 0xC09B);
        b.set(GUEST_CR3, 0x7000);
        b.set(PDPTE2, pdpte);
        b.mem.write(0x7010, 8, if ept { 0 } else { pdpte });
        assert_eq!(outcome(&mut b), want, "{ept} {pdpte:#x} {}", b.cpu.why);
    }
}

#[test]
fn unrestricted_guests_may_be_in_real_mode() {
    let mut b = Bench::nested();
    b.set(ENTRY, 0x11FB);
    b.set(GUEST_CS_AR, 0xC09B);
    b.set(GUEST_CR0, 0x30);
    assert_eq!(outcome(&mut b), Outcome::Guest(0));
    b.or(PROC2, 1 << 7);
    assert_eq!(outcome(&mut b), Outcome::Enters, "{}", b.cpu.why);
}

#[test]
fn launch_state_and_vmfail() {
    let mut b = Bench::new();
    assert_eq!(b.step(Op::Vmresume), Step::Done(0));
    assert_eq!(b.get(INSTRUCTION_ERROR), 5, "VMRESUME of a clear VMCS");
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Exit(10));
    assert_eq!(b.step(Op::Vmlaunch), Step::Done(0));
    assert_eq!(b.get(INSTRUCTION_ERROR), 4, "VMLAUNCH of a launched VMCS");
    assert_eq!(b.enter(), Step::Done(0));
    let mut b = Bench::new();
    b.cpu.shadow_ss = true;
    assert_eq!(outcome(&mut b), Outcome::Fails(26));
    let mut b = Bench::new();
    assert_eq!(b.cpu.vmclear(&b.mem, VMCS), Status::Ok);
    assert_eq!(b.step(Op::Vmlaunch), Step::Done(0));
    assert_eq!(b.cpu.state.rflags & 0x41, 1, "no current VMCS: VMfailInvalid");
}

#[test]
fn vmx_instructions_fail_with_their_numbers() {
    let mut b = Bench::new();
    let mem = &b.mem;
    assert_eq!(b.cpu.vmxon(mem, VMXON), Status::Fail(15));
    assert_eq!(b.cpu.vmclear(mem, VMCS + 8), Status::Fail(2));
    assert_eq!(b.cpu.vmclear(mem, VMXON), Status::Fail(3));
    assert_eq!(b.cpu.vmptrld(mem, 1 << 46), Status::Fail(9));
    assert_eq!(b.cpu.vmptrld(mem, VMXON), Status::Fail(10));
    assert_eq!(b.cpu.vmptrld(mem, 0x5000), Status::Fail(11));
    assert_eq!(b.cpu.vmread(0x2FFE), Err(Status::Fail(12)));
    assert_eq!(b.cpu.vmwrite(0x6C18, 0), Status::Fail(12));
    assert_eq!(b.cpu.vmwrite(EXIT_REASON, 0), Status::Fail(13));
    assert_eq!(b.cpu.invept(3, 0x1E), Status::Fail(28));
    assert_eq!(b.cpu.invept(1, 0x1D), Status::Fail(28));
    assert_eq!((b.cpu.invept(1, 0x1E), b.cpu.invept(2, 0)), (Status::Ok, Status::Ok));
    assert_eq!(b.cpu.invvpid(1, 0, 0), Status::Fail(28));
    assert_eq!(b.cpu.invvpid(0, 1, 1 << 47), Status::Fail(28));
    assert_eq!((b.cpu.invvpid(0, 1, 1 << 46), b.cpu.invvpid(2, 0, 0)), (Status::Ok, Status::Ok));
}

#[test]
fn an_active_vmcs_lives_in_the_cpu() {
    let mut b = Bench::new();
    b.set(VPID, 7);
    let mut other = tests::model::vmx::Cpu::new(tests::model::vmx::Caps::FULL, 2);
    b.mem.write(0x31_8000, 4, b.mem.read(VMCS, 4));
    assert_eq!(other.vmxon(&b.mem, 0x31_8000), Status::Ok);
    assert_eq!(other.vmptrld(&b.mem, VMCS), Status::Ok);
    assert_eq!(other.vmread(VPID), Ok(0), "moved without VMCLEAR");
    assert_eq!(other.vmclear(&b.mem, VMCS), Status::Ok);
    assert_eq!(b.cpu.vmclear(&b.mem, VMCS), Status::Ok);
    assert_eq!(other.vmptrld(&b.mem, VMCS), Status::Ok);
    assert_eq!(other.vmread(VPID), Ok(7));
}

#[test]
fn msr_areas() {
    let area = 0x31_9000;
    let load = |msr: u64, value: u64| {
        let mut b = Bench::new();
        b.set(ENTRY_MSR_LOAD, area);
        b.set(ENTRY_MSR_LOAD_COUNT, 2);
        for (n, (msr, value)) in [(0xC000_0102, 0x1234), (msr, value)].into_iter().enumerate() {
            b.mem.write(area + n as u64 * 16, 8, msr);
            b.mem.write(area + n as u64 * 16 + 8, 8, value);
        }
        let step = b.enter();
        (step, b.cpu.state.sys[4], b.get(QUALIFICATION))
    };
    assert_eq!(load(0x277, 0), (Step::Done(0), 0x1234, 0));
    for (msr, value) in [(0x277, 2), (0xC000_0100, 0), (0x1_0000_0277, 0), (0x800, 0), (0x1234, 0)] {
        assert_eq!(load(msr, value), (Step::Exit(reason::MSR_LOADING), 0x1234, 2), "{msr:#x}");
    }
    // Exit: store, then load.
    let mut b = Bench::new();
    b.set(EXIT_MSR_STORE, area);
    b.set(EXIT_MSR_STORE_COUNT, 1);
    b.set(EXIT_MSR_LOAD, area + 16);
    b.set(EXIT_MSR_LOAD_COUNT, 1);
    b.mem.write(area, 8, 0xC000_0102);
    b.mem.write(area + 16, 8, 0xC000_0102);
    b.mem.write(area + 24, 8, 0x55);
    b.cpu.state.sys[4] = 0x44;
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Exit(10));
    assert_eq!((b.mem.read(area + 8, 8), b.cpu.state.sys[4]), (0x44, 0x55));
    b.mem.write(area + 16, 8, 0x1234);
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Shutdown, "VMX abort");
    assert_eq!(b.step(Op::Nop), Step::Shutdown);
}

#[test]
fn real_mode_exceptions_have_no_error_code() {
    for (cr0, info, want) in [
        (0x30, 0x8000_0B0D, Outcome::Fails(7)),
        (0x30, 0x8000_030D, Outcome::Enters),
        (0x8001_0031, 0x8000_0B0D, Outcome::Enters),
        (0x8001_0031, 0x8000_030D, Outcome::Fails(7)),
    ] {
        let mut b = Bench::nested();
        b.or(PROC2, 1 << 7);
        b.set(GUEST_CR0, cr0);
        if cr0 == 0x30 {
            b.set(ENTRY, 0x11FB);
            b.set(GUEST_CS_AR, 0xC09B);
            b.set(GUEST_IDTR_BASE, 0);
        }
        b.set(ENTRY_INFO, info);
        assert_eq!(outcome(&mut b), want, "{cr0:#x} {info:#x} {}", b.cpu.why);
    }
}
