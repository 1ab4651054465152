//! MSR and I/O bitmaps of L2: merged by words, kept true at every entry.

use nvmx::controls::primary;
use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit};

use crate::rig::{IO_BITMAPS02, MSR_BITMAP02, MSR_BITMAP12, Rig};

const IO_A: u64 = 0x2_4000;
const IO_B: u64 = 0x2_8000;

fn io_rig() -> Rig {
    let mut rig = Rig::filled();
    let controls = rig.plus(Field::PrimaryControls, primary::IO_BITMAPS.into());
    rig.set(&[controls, (Field::IoBitmapA, IO_A), (Field::IoBitmapB, IO_B)]);
    rig.vmcs01.poke(Field::PrimaryControls, rig.vmcs01.peek(Field::PrimaryControls) | u64::from(primary::IO_BITMAPS));
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    rig
}

fn rdmsr(rig: &mut Rig, msr: u64) -> L2Exit {
    rig.regs.gprs[1] = msr;
    rig.l2(r::RDMSR)
}

fn wrmsr(rig: &mut Rig, msr: u64) -> L2Exit {
    rig.regs.gprs[1] = msr;
    rig.l2(r::WRMSR)
}

/// An access of `size` bytes at `port`.
fn port(rig: &mut Rig, port: u64, size: u64) -> L2Exit {
    rig.vmcs02.poke(Field::ExitQualification, port << 16 | (size - 1));
    rig.l2(r::IO)
}

/// Sets the bit of `n` in the bitmap at `base`.
fn set_bit(rig: &Rig, base: u64, n: u64) {
    let at = base + n / 8;
    let [old] = rig.read(at);
    rig.write(at, &[old | 1 << (n % 8)]);
}

/// L1 is back and resumes.
fn resume(rig: &mut Rig) {
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
}

const EMBEDDER_READ: L2Exit = L2Exit::Embedder { reason: r::RDMSR };

#[test]
fn the_processor_reads_the_merged_bitmaps() {
    let rig = io_rig();
    assert_eq!(rig.vmcs02.peek(Field::MsrBitmap), MSR_BITMAP02);
    assert_eq!(rig.vmcs02.peek(Field::IoBitmapA), IO_BITMAPS02);
    assert_eq!(rig.vmcs02.peek(Field::IoBitmapB), IO_BITMAPS02 + 0x1000);
    assert!(rig.msr_bitmap02.iter().all(|word| *word == u64::MAX));
}

#[test]
fn an_msr_that_nobody_wants_becomes_l2s() {
    let mut rig = Rig::running(&[]);
    assert_eq!(rdmsr(&mut rig, 0x174), L2Exit::Resume);
    assert_eq!(rig.msr_bitmap02[0x174 / 64], 0);
    assert_eq!(rig.msr_bitmap02[256 + 0x174 / 64], u64::MAX, "writes still exit");
    assert_eq!(wrmsr(&mut rig, 0xC000_0102), L2Exit::Resume);
    assert_eq!(rig.msr_bitmap02[256 + 128 + 0x102 / 64], 0);
}

#[test]
fn msrs_that_l1_wants() {
    for (msr, byte) in [(0x174, 0), (0x1FFF, 0), (0xC000_0080, 0x400), (0xC000_1FFF, 0x400)] {
        let mut rig = Rig::running(&[]);
        set_bit(&rig, MSR_BITMAP12 + byte, msr & 0x1FFF);
        assert_eq!(rdmsr(&mut rig, msr), L2Exit::ToL1, "{msr:#x}");
        let mut rig = Rig::running(&[]);
        set_bit(&rig, MSR_BITMAP12 + byte, msr & 0x1FFF);
        assert_eq!(wrmsr(&mut rig, msr), L2Exit::Resume, "the other direction of {msr:#x}");
        let mut rig = Rig::running(&[]);
        set_bit(&rig, MSR_BITMAP12 + 0x800 + byte, msr & 0x1FFF);
        assert_eq!(wrmsr(&mut rig, msr), L2Exit::ToL1);
    }
}

#[test]
fn msrs_outside_the_bitmap_are_l1s() {
    for msr in [0x2000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF] {
        assert_eq!(rdmsr(&mut Rig::running(&[]), msr), L2Exit::ToL1, "{msr:#x}");
    }
}

#[test]
fn without_a_bitmap_all_msrs_are_l1s() {
    let mut rig = Rig::filled();
    let without = rig.nested.vmcs12().get(Field::PrimaryControls) & !u64::from(primary::MSR_BITMAPS);
    rig.set(&[(Field::PrimaryControls, without)]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PrimaryControls) & u64::from(primary::MSR_BITMAPS), 0);
    assert_eq!(rdmsr(&mut rig, 0x174), L2Exit::ToL1);
}

#[test]
fn msrs_that_the_embedder_wants() {
    let mut rig = Rig::running(&[]);
    rig.msr_bitmap01[0x3A / 64] |= 1 << 0x3A;
    assert_eq!(rdmsr(&mut rig, 0x3A), EMBEDDER_READ);
    assert_eq!(rdmsr(&mut rig, 0x3B), L2Exit::Resume);
    assert_eq!(rig.msr_bitmap02[0], 1 << 0x3A, "the hot word has the embedder's bit");
    // An embedder without bitmaps wants all of them.
    let mut rig = Rig::filled();
    let own = rig.vmcs01.peek(Field::PrimaryControls) & !u64::from(primary::MSR_BITMAPS);
    rig.vmcs01.poke(Field::PrimaryControls, own);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rdmsr(&mut rig, 0x174), EMBEDDER_READ);
}

#[test]
fn a_change_of_l1s_counts_at_the_next_entry() {
    let mut rig = Rig::running(&[]);
    assert_eq!(rdmsr(&mut rig, 0x174), L2Exit::Resume);
    set_bit(&rig, MSR_BITMAP12, 0x174);
    assert_eq!(rig.msr_bitmap02[0x174 / 64], 0);
    resume(&mut rig);
    assert_eq!(rig.msr_bitmap02[0x174 / 64], 1 << (0x174 % 64));
    rig.msr_bitmap01[0x174 / 64] = 1;
    rig.call(|nested, m| nested.own_bitmaps_changed(m));
    assert!(rig.msr_bitmap02.iter().all(|word| *word == u64::MAX));
}

#[test]
fn at_most_eight_words_are_hot() {
    let mut rig = Rig::running(&[]);
    for n in 0..9 {
        assert_eq!(rdmsr(&mut rig, n * 64), L2Exit::Resume);
    }
    assert_eq!(rig.msr_bitmap02.iter().filter(|word| **word == 0).count(), 8);
    assert_eq!(rig.msr_bitmap02[0], u64::MAX, "the first made room");
    assert_eq!(rig.msr_bitmap02[8], 0);
}

#[test]
fn the_enlightened_bitmap_is_not_read_while_l1_calls_it_clean() {
    for (enlightened, clean, read_again) in [(true, true, false), (true, false, true), (false, true, true)] {
        let mut rig = Rig::announced();
        rig.write(crate::rig::EVMCS + 0x344, &[u8::from(enlightened) << 1]);
        assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
        rig.run();
        assert_eq!(rdmsr(&mut rig, 0x174), L2Exit::Resume);
        set_bit(&rig, MSR_BITMAP12, 0x174);
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        if !clean {
            rig.write(crate::rig::EVMCS + 0x338, &0xFFFDu32.to_le_bytes());
        }
        assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
        let expected = if read_again { 1 << (0x174 % 64) } else { 0 };
        assert_eq!(rig.msr_bitmap02[0x174 / 64], expected, "{enlightened} {clean}");
    }
}

#[test]
fn ports_that_l1_wants() {
    for (at, base, n) in [(0x60, IO_A, 0x60), (0x7FFF, IO_A, 0x7FFF), (0x8000, IO_B, 0), (0xFFFF, IO_B, 0x7FFF)] {
        let mut rig = io_rig();
        set_bit(&rig, base, n);
        assert_eq!(port(&mut rig, at, 1), L2Exit::ToL1, "{at:#x}");
        let mut rig = io_rig();
        set_bit(&rig, base, n);
        assert_eq!(port(&mut rig, at ^ 1, 1), L2Exit::Resume);
        assert_eq!(rig.io_bitmaps02[at as usize / 64], 1 << (at % 64), "admitted with L1's bit");
    }
}

#[test]
fn wide_accesses_touch_every_port_they_cover() {
    for (first, size) in [(0x5D, 4), (0x5F, 2), (0x60, 1)] {
        let mut rig = io_rig();
        set_bit(&rig, IO_A, 0x60);
        assert_eq!(port(&mut rig, first, size), L2Exit::ToL1, "{first:#x} {size}");
    }
    let mut rig = io_rig();
    set_bit(&rig, IO_A, 0x60);
    assert_eq!(port(&mut rig, 0x5C, 4), L2Exit::Resume);
    // Across two words.
    let mut rig = io_rig();
    assert_eq!(port(&mut rig, 0x3E, 4), L2Exit::Resume);
    assert_eq!((rig.io_bitmaps02[0], rig.io_bitmaps02[1]), (0, 0));
    let mut rig = io_rig();
    set_bit(&rig, IO_A, 0x41);
    assert_eq!(port(&mut rig, 0x3E, 4), L2Exit::ToL1);
}

#[test]
fn an_access_beyond_the_last_port_exits() {
    assert_eq!(port(&mut io_rig(), 0xFFFE, 4), L2Exit::ToL1);
    assert_eq!(port(&mut io_rig(), 0xFFFC, 4), L2Exit::Resume);
}

#[test]
fn ports_without_bitmaps() {
    const EMBEDDER: L2Exit = L2Exit::Embedder { reason: r::IO };
    let mut rig = Rig::running(&[]);
    assert_eq!(port(&mut rig, 0x60, 1), EMBEDDER);
    let mut rig = Rig::filled();
    let all = rig.plus(Field::PrimaryControls, primary::UNCONDITIONAL_IO_EXITING.into());
    rig.set(&[all]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(port(&mut rig, 0x60, 1), L2Exit::ToL1);
    // The embedder's port.
    let mut rig = io_rig();
    rig.io_bitmaps01[1] = 1 << (0x64 - 64);
    assert_eq!(port(&mut rig, 0x64, 1), EMBEDDER);
    // An embedder that has every port exit.
    let mut rig = Rig::filled();
    let controls = rig.plus(Field::PrimaryControls, primary::IO_BITMAPS.into());
    rig.set(&[controls, (Field::IoBitmapA, IO_A), (Field::IoBitmapB, IO_B)]);
    let own = rig.vmcs01.peek(Field::PrimaryControls) | u64::from(primary::UNCONDITIONAL_IO_EXITING);
    rig.vmcs01.poke(Field::PrimaryControls, own);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(port(&mut rig, 0x60, 1), EMBEDDER);
    set_bit(&rig, IO_A, 0x60);
    assert_eq!(port(&mut rig, 0x60, 1), L2Exit::ToL1);
}
