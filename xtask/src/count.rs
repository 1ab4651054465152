//! One measured number, as `cargo xtask bench` prints and writes it. Made by the benchmarks, shown by the command.

use serde::Serialize;

/// One measured number.
#[derive(Serialize)]
pub struct Count {
    /// Its stable name, with dots.
    pub name: String,
    /// How much.
    pub value: u64,
    /// Of what: "instructions" or "exits".
    pub unit: &'static str,
}
