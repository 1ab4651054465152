//! Instruction counts of the hot paths. `cargo xtask bench` runs the files in `benches/` and prints a table.
//!
//! A benchmark's stable name is made of its function's name and its case: `fn hypercall__flush_list__xmm` with
//! `#[bench::_11(...)]` is `hypercall.flush_list.xmm.11`; a double underscore stands for a dot, a leading one of the
//! case is dropped. To add a group, add a file in `benches/` and a `[[bench]]` to the manifest.
//!
//! What is measured is the body of the function: the arguments are made before it and the result is dropped after it.
