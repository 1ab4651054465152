//! The bodies of the fuzz targets, as functions: a fuzzer calls them with bytes that it invents, the seed replay with
//! the committed ones. To add a target: a function here, a line in [`TARGETS`], a file in `fuzz_targets`, a `[[bin]]`
//! in the manifest, and seeds in `seeds/NAME`.

use tests::harness::decode::{self, Bytes};
use tests::harness::{evmcs as enlightened, hypercall, lists};

/// A fuzz target.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("hypercall_intake", hypercall_intake),
    ("vp_set", vp_set),
    ("gva_list", gva_list),
    ("nsvm_actions", nsvm_actions),
    ("nvmx_actions", nvmx_actions),
    ("evmcs", evmcs),
];

/// One hypercall in any convention, from any mode and level, with any registers and memory: the intake against the
/// reference model.
pub fn hypercall_intake(bytes: &[u8]) {
    hypercall::compare(&decode::hypercall(bytes));
}

/// A VP set, its members, and their translation by a VP-index map: against the reference model.
pub fn vp_set(bytes: &[u8]) {
    let mut b = Bytes(bytes);
    let mask = b.word();
    // Mostly as many words as the mask asks for.
    let count = match b.u8() {
        n if n < 224 => mask.count_ones() as usize,
        n => usize::from(n % 66),
    };
    let words: Vec<u64> = (0..count).map(|_| b.word()).collect();
    let online: Vec<u16> = (0..b.u8()).map(|_| b.u16()).collect();
    lists::compare_vp_set(mask, &words, &online);
}

/// A list of GVA ranges in both formats: against the reference model.
pub fn gva_list(bytes: &[u8]) {
    let mut b = Bytes(bytes);
    // More entries show no more, and cost time.
    for _ in 0..8 {
        let entry = b.word();
        lists::compare_range(entry, false);
        lists::compare_range(entry, true);
    }
}

/// Up to 48 actions of two L1s on shared processors of the machine model, one hostile (VMRUN with mutated VMCBs, any
/// instruction of L1 or L2, register changes, NMI, INIT), one orderly (table changes with their flushes, memory that
/// moves, save and restore, other processors). The rules that must hold are listed in [`tests::embedder`].
pub fn nsvm_actions(bytes: &[u8]) {
    if let Err(why) = tests::embedder::actions::run(bytes) {
        panic!("{why}");
    }
}

/// Up to 40 actions on enlightened VMCSs: L1 writes fields, clean bits, versions and bytes, enters and is left; L0 is
/// refused memory, saves and restores. Against the reference model.
pub fn evmcs(bytes: &[u8]) {
    enlightened::compare(bytes);
}

/// Up to 48 actions of two hostile L1s on one processor of the machine model with VT-x: VM entries with mutated VMCSs,
/// enlightened ones included, any instruction of L1 or L2, events, save and restore. The rules that must hold are listed
/// in [`tests::vmx_embedder`].
pub fn nvmx_actions(bytes: &[u8]) {
    if let Err(why) = tests::vmx_embedder::actions::run(bytes) {
        panic!("{why}");
    }
}
