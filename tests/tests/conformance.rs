//! The conformance suite on the model's embedder, and on implementations that each break one sentence of the contract.

use std::cell::Cell;
use std::rc::Rc;

use hvcore::addr::{Hpa, L1Gpa, Level};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping, PageSize};
use tests::conformance::{guest_memory, kick, l1_map};
use tests::embedder::memory::{Home, L1View};
use tests::embedder::{HOST, L1_BYTES, Shape, Storage, World};
use tests::model::mem::PhysMem;
use tests::model::svm::{Features, Op};

const RAM: L1Gpa = L1Gpa::new(0x4000);
const NOTHING: L1Gpa = L1Gpa::new(0x7000_0000);

fn view() -> L1View {
    L1View::new(Rc::new(PhysMem::starting_at(HOST, 0x40_0000)), HOST)
}

#[test]
fn the_models_memory_conforms() {
    let memory = view();
    assert_eq!(guest_memory(&memory, RAM, NOTHING), Ok(()));
    // Also when the two pages do not lie side by side.
    memory.set_home(0x5000, Home { frame: HOST + 0x20_0000, present: true, writable: true });
    assert_eq!(guest_memory(&memory, RAM, NOTHING), Ok(()));
    assert_eq!(guest_memory(&&memory, RAM, NOTHING), Ok(()));
}

#[test]
fn the_models_map_conforms() {
    let map = view();
    map.set_home(0x9000, Home { frame: HOST + 0x20_9000, present: false, writable: true });
    let pages = || (0..L1_BYTES + 0x4000).step_by(4096).map(|gpa| L1Gpa::new(gpa | 0x123));
    let own = |hpa: u64| hpa >= HOST + 2 * L1_BYTES;
    assert_eq!(l1_map(&map, pages(), own), Ok(()));
    assert_eq!(map.map(L1Gpa::new(0x9000)), None);
    map.set_home(0xA000, Home { frame: HOST + 2 * L1_BYTES, present: true, writable: true });
    assert!(l1_map(&map, pages(), own).is_err(), "memory of the embedder's own");
}

/// Memory that breaks one sentence.
struct Broken {
    memory: L1View,
    how: u32,
}

impl GuestMemory for Broken {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        match self.how {
            // Reads of nothing are ones.
            0 if gpa.raw() >= L1_BYTES => {
                buf.fill(0xFF);
                Ok(())
            }
            // Wraps.
            1 if gpa.raw() > u64::MAX - 8 => self.memory.read(L1Gpa::new(0), buf),
            // Stops at the page.
            2 => {
                let n = buf.len().min(4096 - gpa.page_offset() as usize);
                self.memory.read(gpa, &mut buf[..n])
            }
            _ => self.memory.read(gpa, buf),
        }
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        match self.how {
            3 if gpa.raw() >= L1_BYTES => Ok(()),
            // Whole words.
            4 if buf.len() < 8 => {
                let mut word = [0; 8];
                word[..buf.len()].copy_from_slice(buf);
                self.memory.write(gpa, &word)
            }
            _ => self.memory.write(gpa, buf),
        }
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        match self.how {
            5 => self.memory.write(gpa, &[new]).map(|()| Ok(current)),
            _ => self.memory.compare_exchange_u8(gpa, current, new),
        }
    }
    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        match self.how {
            6 => Ok(self.memory.compare_exchange_u32(gpa, current, new)?.map(|_| new)),
            _ => self.memory.compare_exchange_u32(gpa, current, new),
        }
    }
    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        match self.how {
            7 => Ok(self.memory.compare_exchange_u64(gpa, current, new)?.map_err(|_| current)),
            _ => self.memory.compare_exchange_u64(gpa, current, new),
        }
    }
}

#[test]
fn broken_memory_is_found() {
    for how in 0..8 {
        assert!(guest_memory(&Broken { memory: view(), how }, RAM, NOTHING).is_err(), "{how}");
    }
    assert_eq!(guest_memory(&Broken { memory: view(), how: 8 }, RAM, NOTHING), Ok(()));
}

struct Map(Mapping);

impl L1Map for Map {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        // A page of 2 MiB whose middle is missing.
        (gpa.raw() < 0x1F_F000).then_some(self.0)
    }
}

#[test]
fn broken_maps_are_found() {
    let good = Mapping { hpa: Hpa::new(0), size: PageSize::Size4K, writable: true, executable: true, memory_type: 6 };
    let check = |mapping| l1_map(&Map(mapping), [L1Gpa::new(0x3010)], |_| false);
    assert_eq!(check(good), Ok(()));
    assert!(check(Mapping { hpa: Hpa::new(0x10), ..good }).is_err(), "an address inside the page");
    assert!(check(Mapping { memory_type: 8, ..good }).is_err(), "no memory type");
    assert!(check(Mapping { size: PageSize::Size2M, ..good }).is_err(), "a page that is not whole");
}

/// The kick window on the model: an NMI raised before VMRUN is taken right after it.
fn kicks(lost: bool) -> Result<(), String> {
    let shape = Shape { partitions: 1, vps: 1, cpus: 1, features: Features::TCG, seed: 1, mistake: None };
    let mut storage = Storage::new(shape.partitions, shape.vps);
    let mut world = World::new(&shape, &mut storage);
    world.off(0, 0);
    // A VP of the flush engine beside the world's: its guest is L1 of the world's VP.
    let vps = [const { hvcore::flush::VpFlush::new() }; 1];
    let buckets: Vec<_> = (0..16).map(|_| hvcore::flush::AtomicU64::new(0)).collect();
    let groups: Vec<_> = (0..18).map(|_| hvcore::flush::AtomicU64::new(0)).collect();
    let index = hvcore::flush::TargetIndex::new(1, &buckets, &groups).expect("an index");
    let mut local = hvcore::flush::FlushDomain::new(&vps, index).local(0).expect("a slot");
    let lines = world.cpus[0].hw.lines.clone();
    let sent = Cell::new(0);
    let send = || {
        sent.set(sent.get() + 1);
        if !lost {
            lines.nmi();
        }
    };
    kick(&mut local, Level::L1, send, || {
        let entered = world.enter(0, 0, 0);
        world.step(0, Op::Nop);
        let left = world.cpus[0].running.is_none();
        world.off(0, 0);
        entered && left
    })
}

#[test]
fn the_models_kicks_conform() {
    assert_eq!(kicks(false), Ok(()));
    assert!(kicks(true).is_err(), "kicks that get lost are found");
}
