//! Models of the interface's atomics: GUEST_OS_ID against HYPERCALL, and the reference time.
//! `RUSTFLAGS="--cfg loom" cargo test --release -p hvcore --test partition_loom`
#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use hvcore::partition::{Interface, MsrRead, Overlay, PartitionConfig, Vendor};
use loom::sync::Arc;
use loom::thread;
use tlfs_abi::msr;

fn interface() -> Arc<Interface> {
    Arc::new(PartitionConfig::new(Vendor::Intel, 4, 40).reference_counter().build().unwrap())
}

fn write(interface: &Interface, vp: u32, number: u32, value: u64) {
    let _ = interface.msr_write(&interface.vp(vp).unwrap(), number, value);
}

/// One VP clears the OS id while another enables the hypercall page: the page never outlives the id.
#[test]
fn the_page_goes_with_the_id() {
    loom::model(|| {
        let shared = interface();
        write(&shared, 0, msr::GUEST_OS_ID, 1);
        let other = shared.clone();
        let enabling = thread::spawn(move || write(&other, 1, msr::HYPERCALL, 0x5001));
        write(&shared, 0, msr::GUEST_OS_ID, 0);
        enabling.join().unwrap();
        assert_eq!(shared.overlay(Overlay::HypercallPage), None);
        // Nor does it come back with the next id.
        write(&shared, 0, msr::GUEST_OS_ID, 2);
        assert_eq!(shared.overlay(Overlay::HypercallPage), None);
    });
}

/// Two VPs place the page: one of the two places wins, and a lock is never lost.
#[test]
fn a_lock_is_never_lost() {
    loom::model(|| {
        let shared = interface();
        write(&shared, 0, msr::GUEST_OS_ID, 1);
        let other = shared.clone();
        let locking = thread::spawn(move || write(&other, 1, msr::HYPERCALL, 0x5003));
        write(&shared, 0, msr::HYPERCALL, 0x7001);
        locking.join().unwrap();
        let vp = shared.vp(0).unwrap();
        let value = shared.msr_read(&vp, msr::HYPERCALL, 0);
        assert!(value == MsrRead::Value(0x5003) || value == MsrRead::Value(0x7001), "{value:?}");
        if value == MsrRead::Value(0x5003) {
            write(&shared, 0, msr::HYPERCALL, 0x7001);
            assert_eq!(shared.msr_read(&vp, msr::HYPERCALL, 0), value);
        }
    });
}

/// Three reads by two VPs at the same time give three times, each VP's in order.
#[test]
fn no_two_reads_give_one_time() {
    loom::model(|| {
        let shared = interface();
        let read =
            |interface: &Interface, vp| match interface.msr_read(&interface.vp(vp).unwrap(), msr::TIME_REF_COUNT, 9) {
                MsrRead::Value(time) => time,
                _ => 0,
            };
        let other = shared.clone();
        let reader = thread::spawn(move || read(&other, 1));
        let (first, second) = (read(&shared, 0), read(&shared, 0));
        let third = reader.join().unwrap();
        assert!(first < second && third != first && third != second && third >= 9, "{first} {second} {third}");
    });
}

/// The model can fail: the same race without taking the bit back.
#[test]
#[should_panic(expected = "outlives")]
fn control_a_page_that_outlives_the_id_is_found() {
    use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
    loom::model(|| {
        let id = Arc::new(AtomicBool::new(true));
        let page = Arc::new(AtomicBool::new(false));
        let (other_id, other_page) = (id.clone(), page.clone());
        let enabling = thread::spawn(move || {
            if other_id.load(Relaxed) {
                other_page.store(true, Relaxed);
            }
        });
        id.store(false, Relaxed);
        page.store(false, Relaxed);
        enabling.join().unwrap();
        assert!(!page.load(Relaxed), "the page outlives the id");
    });
}
