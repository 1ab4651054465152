use tlfs_abi::evmcb::VmcbEnlightenmentsControl;

/// EnlightenmentsControl.MsrBitmap.
const ENLIGHTEN_MSR_BITMAP: u32 = 1 << 1;
use nsvm::vmcb::bits::{clean, misc1};
use nsvm::{L2Exit, exit_code};

use crate::rig::{IOPM12, L2_RIP, MSRPM12, Rig};

fn entered() -> Rig {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::MSR_PROT | misc1::IOIO_PROT | misc1::HLT;
    rig.enter();
    rig.prepare();
    rig
}

fn msr(rig: &mut Rig, index: u32, write: bool) -> L2Exit {
    rig.regs.rcx = index.into();
    rig.l2_with(exit_code::MSR, write.into(), 0)
}

/// An OUT of `size` bytes at `port`.
fn out(rig: &mut Rig, port: u16, size: u64) -> L2Exit {
    rig.l2_with(exit_code::IOIO, u64::from(port) << 16 | size << 4, L2_RIP + 1)
}

#[test]
fn each_msr_has_its_two_bits() {
    for (index, byte) in [(0u32, 0x000), (0x1FFF, 0x7FF), (0xC000_0000, 0x800), (0xC001_1FFF, 0x17FF)] {
        for write in [false, true] {
            let bit = (index & 3) * 2 + u32::from(write);
            let mut rig = entered();
            rig.write(MSRPM12 + byte, &[1 << bit]);
            assert_eq!(msr(&mut rig, index, write), L2Exit::ToL1);
            // Every other bit of the byte set: not this one.
            let mut rig = entered();
            rig.write(MSRPM12 + byte, &[!(1 << bit)]);
            assert_eq!(msr(&mut rig, index, write), L2Exit::Resume, "{index:#x} {write}");
        }
    }
    // Outside the map.
    for index in [0x2000, 0xC000_2000, 0xC001_2000, 0x4000_0000] {
        assert_eq!(msr(&mut entered(), index, false), L2Exit::ToL1);
    }
}

#[test]
fn a_word_in_use_is_the_union_of_both_maps() {
    let mut rig = entered();
    rig.msrpm01[256 + 8] = 1 << 40;
    rig.write(MSRPM12 + 0x840, &4u64.to_le_bytes());
    assert!(rig.msrpm02.iter().all(|word| *word == u64::MAX));
    // 0xC000_0102 is in that word, wanted by none.
    assert_eq!(msr(&mut rig, 0xC000_0102, true), L2Exit::Resume);
    assert_eq!(rig.msrpm02[256 + 8], 1 << 40 | 4);
    assert_eq!(rig.msrpm02.iter().filter(|word| **word != u64::MAX).count(), 1);
    // Wanted by the embedder: 0xC000_0114.
    assert_eq!(msr(&mut rig, 0xC000_0114, false), L2Exit::Embedder);
    assert_eq!(msr(&mut rig, 0xC000_0101, false), L2Exit::ToL1);
}

#[test]
fn a_change_of_l1s_map_counts_at_the_next_vmrun() {
    for (enlightened, bits, expected) in [
        (0, 0, u64::MAX),
        (0, u32::MAX, u64::MAX), // the VMCB's own clean bit covers the address alone
        (ENLIGHTEN_MSR_BITMAP, !clean::ENLIGHTENMENTS, u64::MAX),
        (ENLIGHTEN_MSR_BITMAP, clean::ENLIGHTENMENTS, 0),
    ] {
        let mut rig = entered();
        assert_eq!(msr(&mut rig, 0x10, false), L2Exit::Resume);
        assert_eq!(rig.msrpm02[0], 0);
        rig.l2_to_l1(exit_code::HLT);
        rig.write(MSRPM12, &[0xFF; 8]);
        rig.vmcb12.enlightenments.enlightenments_control = VmcbEnlightenmentsControl::new(enlightened);
        rig.vmcb12.control.clean = bits;
        rig.enter();
        assert_eq!(rig.msrpm02[0], expected, "{enlightened} {bits:#x}");
    }
}

#[test]
fn words_beyond_the_bound_go_cold_again() {
    let mut rig = entered();
    for word in 0..20 {
        assert_eq!(msr(&mut rig, word * 32, false), L2Exit::Resume);
        let cold = rig.msrpm02.iter().filter(|word| **word == u64::MAX).count();
        assert_eq!(cold, 1024 - usize::min(word as usize + 1, 8));
        assert_eq!(rig.msrpm02[word as usize], 0);
    }
    rig.call(|nested, m| nested.own_maps_changed(&mut m.msrpm02, &mut m.iopm02));
    assert!(rig.msrpm02.iter().all(|word| *word == u64::MAX));
}

#[test]
fn without_l1s_intercept_the_embedders_map_rules() {
    let mut rig = Rig::ready();
    rig.enter();
    rig.prepare();
    rig.write(MSRPM12, &[0xFF; 8192]);
    assert_eq!(msr(&mut rig, 0x10, false), L2Exit::Embedder);
}

#[test]
fn efer_of_l2_is_emulated_when_l1_does_not_want_it() {
    let mut rig = entered();
    rig.write(L2_RIP, &[0x0F, 0x32]);
    assert_eq!(msr(&mut rig, nsvm::msr::EFER, false), L2Exit::Resume);
    assert_eq!(rig.vmcb02.save.rax, 0x1500);
    assert_eq!(rig.vmcb02.save.rip, L2_RIP + 2);
}

#[test]
fn ports_by_size() {
    // L1 wants port 0x40 alone.
    for (port, size, expected) in [
        (0x40, 1, L2Exit::ToL1),
        (0x3F, 1, L2Exit::Resume),
        (0x3F, 2, L2Exit::ToL1),
        (0x3E, 2, L2Exit::Resume),
        (0x3D, 4, L2Exit::ToL1),
        (0x3C, 4, L2Exit::Resume),
        (0x41, 4, L2Exit::Resume),
    ] {
        let mut rig = entered();
        rig.write(IOPM12 + 8, &[1]);
        assert_eq!(out(&mut rig, port, size), expected, "{port:#x} {size}");
    }
    // The last port: its neighbour's bit is in the third page.
    let mut rig = entered();
    assert_eq!(out(&mut rig, 0xFFFF, 4), L2Exit::Resume);
    let mut rig = entered();
    rig.write(IOPM12 + 0x2000, &[1]);
    assert_eq!(out(&mut rig, 0xFFFF, 2), L2Exit::ToL1);
    assert_eq!(out(&mut entered(), 0xFFFF, 1), L2Exit::Resume);
}

#[test]
fn ports_of_the_embedder() {
    let mut rig = entered();
    rig.iopm01[0xE9 / 64] = 1 << (0xE9 % 64);
    assert_eq!(out(&mut rig, 0xE9, 1), L2Exit::Embedder);
    assert_eq!(out(&mut rig, 0xE8, 1), L2Exit::Resume);
    assert_eq!(rig.iopm02[3], 1 << (0xE9 % 64));
}

#[test]
fn a_map_without_memory_wants_everything() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::MSR_PROT | misc1::IOIO_PROT;
    (rig.vmcb12.control.msrpm_base, rig.vmcb12.control.iopm_base) = (1 << 30, 1 << 30);
    rig.enter();
    rig.prepare();
    assert_eq!(msr(&mut rig, 0x10, false), L2Exit::ToL1);
}
