//! A model of x86 hardware with virtualization, for tests and fuzz targets. It shares no code with the library crates:
//! plain `u64`, written from the AMD APM and the Intel SDM, so that a mistake there is not repeated here.
//!
//! Emulators empty their TLB at every world switch; the model does not, so a missing invalidation shows.
//!
//! | module | what it is | from threads |
//! |---|---|---|
//! | [`mem`] | physical memory of atomic words | shared by `&` |
//! | [`tlb`] | tagged TLB; entries leave only by an invalidation or seeded eviction | one per CPU, `&mut` |
//! | [`walk`] | page walks: 32-bit, PAE, 4- and 5-level; nested paging and EPT; exact faults | pure |
//! | [`mmu`] | TLB in front of the walks; finds stale hits | one per CPU, `&mut` |
//! | [`cpu`] | what CPUs have in common: registers, events, interrupt lines | lines: any |
//! | [`svm`] | an AMD-V CPU that honours a VMCB | one per thread, `&mut` |
//! | [`vmx`] | a VT-x CPU that honours a VMCS | one per thread, `&mut` |
//! | [`machine`] | several CPUs around one memory | CPUs are split among threads |
//! | [`rng`] | seeded numbers | one per user |
//! | [`tables`] | builds page tables for tests | one per user |
//!
//! The whole model is deterministic for a seed and an order of calls.
//!
//! ```
//! use tests::model::tlb::{Entry, Tag, Tlb};
//!
//! let mut tlb = Tlb::new(64, 1); // 64 entries, seed 1
//! let tag = Tag::amd(5, true); // ASID 5, nested paging
//! tlb.insert(tag, 0x7000, Entry::plain(0x12_3000, "made by walk 1"));
//! assert_eq!(tlb.lookup(tag, 0x7ABC).unwrap().base, 0x12_3000);
//! tlb.invlpga(4, 0x7000); // another ASID
//! assert!(tlb.lookup(tag, 0x7000).is_some());
//! tlb.invlpga(5, 0x7FFF);
//! assert!(tlb.lookup(tag, 0x7000).is_none());
//! ```

pub mod cpu;
pub mod machine;
pub mod mem;
pub mod mmu;
pub mod rng;
pub mod svm;
pub mod tables;
pub mod tlb;
pub mod vmx;
pub mod walk;
