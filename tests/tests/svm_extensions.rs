//! SVM's extensions on the model: what L1 is offered does for L2 what the processor would, by the processor or in
//! software.

use nsvm::caps::Features as Offer;
use tests::embedder::guests::{Ended, vmcb12};
use tests::embedder::vp::OWN_TSC_OFFSET;
use tests::embedder::{Shape, Storage, World, layout};
use tests::model::svm::vmcb::{ctl, exit, misc1, save, vintr};
use tests::model::svm::{Features, Op};

/// Runs `test` in a world of one VP in L1.
fn with(features: Features, test: impl FnOnce(&mut World<'_>)) {
    let shape = Shape { partitions: 1, vps: 1, cpus: 1, features, seed: 5, mistake: None };
    let mut storage = Storage::new(shape.partitions, shape.vps);
    let mut world = World::new(&shape, &mut storage);
    test(&mut world);
    assert_eq!(world.verdict(), Ok(()));
}

/// L1 writes a field of its VMCB.
fn put(world: &World<'_>, off: u64, size: u64, value: u64) {
    world.mem.write(world.frame(0, vmcb12(0, 0) + off), size, value);
}

fn get(world: &World<'_>, off: u64, size: u64) -> u64 {
    world.mem.read(world.frame(0, vmcb12(0, 0) + off), size)
}

#[test]
fn l2s_time_is_l1s_scaled_and_shifted() {
    // Without a ratio, one and a half as fast, half as fast.
    for ratio in [1u64 << 32, 3 << 31, 1 << 31] {
        with(Features::FULL, |world| {
            assert!(matches!(world.exec(0, 0, Op::Wrmsr(0xC000_0104, ratio)), Ended::Done(_)));
            put(world, ctl::TSC_OFFSET, 8, 77);
            assert!(world.to_l2(0, 0, 0));
            for _ in 0..3 {
                let Ended::Done(time) = world.exec(0, 0, Op::Rdtsc) else { panic!("RDTSC of L2") };
                let l1 = (world.cpus[0].hw.tsc + OWN_TSC_OFFSET) as u128;
                let wanted = ((l1 * u128::from(ratio)) >> 32) as u64 + 77;
                assert!(time.abs_diff(wanted) <= 1, "{time:#x} {wanted:#x}");
                // L1's own time is not scaled; it passes meanwhile.
                world.to_l1(0, 0);
                let Ended::Done(time) = world.exec(0, 0, Op::Rdtsc) else { panic!("RDTSC of L1") };
                assert_eq!(time, world.cpus[0].hw.tsc + OWN_TSC_OFFSET);
                assert!(world.to_l2(0, 0, 0));
            }
        });
    }
}

#[test]
fn vmload_and_vmsave_of_l2_name_l2s_memory() {
    for (features, by_software) in [(Features::FULL, false), (Features::TCG, true)] {
        with(features, |world| {
            let offered = world.partitions[0].vps[0].nested.config().features();
            assert!(offered.has(Offer::V_VMSAVE_VMLOAD));
            put(world, ctl::VIRT_EXT, 8, 2);
            let (from, to) = (layout::WINDOW + 0x1000, layout::WINDOW + 0x2000);
            let frame = world.frame(0, layout::DATA + 0x1000);
            world.mem.write(frame + save::SEGMENTS + 4 * 16 + 8, 8, 0x1234_5000);
            world.mem.write(frame + save::STAR, 8, 0x77);
            let before = world.partitions[0].counts.entered;
            assert!(world.to_l2(0, 0, 0));
            assert!(matches!(world.exec(0, 0, Op::Vmload(from)), Ended::Done(_)));
            assert!(matches!(world.exec(0, 0, Op::Vmsave(to)), Ended::Done(_)));
            let exits = world.partitions[0].vps[0].on.is_none();
            assert_eq!(exits, by_software, "who did it");
            let frame = world.frame(0, layout::DATA + 0x2000);
            assert_eq!(world.mem.read(frame + save::SEGMENTS + 4 * 16 + 8, 8), 0x1234_5000);
            assert_eq!(world.mem.read(frame + save::STAR, 8), 0x77);
            assert_eq!(world.partitions[0].counts.entered, before + 1);
            // Where L1's tables have nothing, the fault is L1's.
            world.npt_edit(0, 0, 0, 3, None, false);
            assert!(world.to_l2(0, 0, 0));
            let ended = world.exec(0, 0, Op::Vmsave(layout::WINDOW + 0x3000));
            assert_eq!(ended, Ended::ToL1(exit::NPF));
            // User, write, final address; not present.
            assert_eq!(get(world, ctl::EXITINFO1, 8), 1 << 32 | 6);
            assert_eq!(get(world, ctl::EXITINFO2, 8), layout::WINDOW + 0x3000);
        });
    }
}

#[test]
fn vmload_of_l2_without_the_bit_names_l1s_memory() {
    for features in [Features::FULL, Features::TCG] {
        with(features, |world| {
            let frame = world.frame(0, layout::DATA + 0x1000);
            world.mem.write(frame + save::STAR, 8, 0x77);
            assert!(world.to_l2(0, 0, 0));
            assert!(matches!(world.exec(0, 0, Op::Vmload(layout::DATA + 0x1000)), Ended::Done(_)));
            world.off(0, 0);
            assert_eq!(world.partitions[0].vps[0].hw.vmcb01.save.star, 0x77);
        });
    }
}

const HANDLER: u64 = 0x5_1000;

/// An IDT for L2 whose NMI handler is at [`HANDLER`], and virtual NMIs.
fn virtual_nmis(world: &World<'_>) {
    let idt = layout::INPUT + 0x3000;
    let gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E << 40 | HANDLER >> 16 << 48;
    world.mem.write(world.frame(0, idt) + 2 * 16, 8, gate);
    world.mem.write(world.frame(0, idt) + 2 * 16 + 8, 8, 0);
    put(world, save::SEGMENTS + 8 * 16 + 4, 4, 0xFFF);
    put(world, save::SEGMENTS + 8 * 16 + 8, 8, idt);
    put(world, save::RSP, 8, layout::STACK + 0x800);
    put(world, ctl::MISC1, 4, get(world, ctl::MISC1, 4) | 1 << misc1::NMI);
    put(world, ctl::VINTR, 8, vintr::NMI_ENABLE | vintr::NMI);
}

fn nmis_come_one_at_a_time(world: &mut World<'_>) {
    let nmi = vintr::NMI | vintr::NMI_MASK;
    assert!(world.partitions[0].vps[0].nested.config().features().has(Offer::VNMI));
    virtual_nmis(world);
    let rip = get(world, save::RIP, 8);
    assert!(world.to_l2(0, 0, 0));
    world.exec(0, 0, Op::Nop);
    world.to_l1(0, 0);
    // In its handler: what was pending is not any more, and masks.
    assert_eq!(get(world, ctl::VINTR, 8) & nmi, vintr::NMI_MASK);
    let inside = get(world, save::RIP, 8);
    assert!((HANDLER..HANDLER + 8).contains(&inside), "{inside:#x}");
    // Another one waits.
    put(world, ctl::VINTR, 8, get(world, ctl::VINTR, 8) | vintr::NMI);
    assert!(world.to_l2(0, 0, 0));
    assert!(matches!(world.exec(0, 0, Op::Nop), Ended::Done(_)));
    world.to_l1(0, 0);
    assert_eq!(get(world, ctl::VINTR, 8) & nmi, nmi);
    assert!(get(world, save::RIP, 8) > inside);
    // Until the handler has returned.
    assert!(world.to_l2(0, 0, 0));
    world.exec(0, 0, Op::Iret);
    // The model has no single step, by which software comes back at once.
    world.off(0, 0);
    world.exec(0, 0, Op::Nop);
    world.to_l1(0, 0);
    assert_eq!(get(world, ctl::VINTR, 8) & nmi, vintr::NMI_MASK);
    assert!((HANDLER..HANDLER + 8).contains(&get(world, save::RIP, 8)));
    // The last IRET ends it all.
    assert!(world.to_l2(0, 0, 0));
    world.exec(0, 0, Op::Iret);
    world.to_l1(0, 0);
    assert_eq!(get(world, ctl::VINTR, 8) & nmi, 0);
    assert!((rip..rip + 8).contains(&get(world, save::RIP, 8)));
}

#[test]
fn virtual_nmis_come_one_at_a_time() {
    with(Features::FULL, nmis_come_one_at_a_time);
    with(Features::TCG, nmis_come_one_at_a_time);
    with(Features { vgif: false, ..Features::TCG }, nmis_come_one_at_a_time);
}

#[test]
fn without_the_enable_bit_nothing_comes() {
    let test = |world: &mut World<'_>| {
        virtual_nmis(world);
        put(world, ctl::VINTR, 8, vintr::NMI);
        let rip = get(world, save::RIP, 8);
        assert!(world.to_l2(0, 0, 0));
        assert!(matches!(world.exec(0, 0, Op::Nop), Ended::Done(_)));
        world.to_l1(0, 0);
        assert_eq!(get(world, ctl::VINTR, 8) & vintr::NMI, vintr::NMI);
        assert!((rip..rip + 8).contains(&get(world, save::RIP, 8)));
    };
    with(Features::FULL, test);
    with(Features::TCG, test);
}
