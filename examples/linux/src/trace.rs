//! What L1's own kernel counted: exits of L2, and the Hyper-V hypercalls of L2 that reached its KVM.

use std::fs;
use std::path::Path;

const EXITS: &str = "/sys/kernel/debug/kvm/exits";
const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_hv_hypercall/enable";
const PER_CPU: &str = "/sys/kernel/tracing/per_cpu";

/// Counts at one moment; `None` where the kernel does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Exits of all guests that exist.
    pub exits: Option<u64>,
    /// Hyper-V hypercalls that KVM was asked to do.
    pub hypercalls: Option<u64>,
}

impl Counts {
    /// Counts now.
    pub fn now() -> Self {
        Self { exits: fs::read_to_string(EXITS).ok().and_then(|text| text.trim().parse().ok()), hypercalls: events() }
    }
}

/// Starts tracing hypercalls.
pub fn start() {
    let _ = fs::write(EVENT, "1");
}

/// Events in all buffers, also those that newer ones have overwritten.
fn events() -> Option<u64> {
    let enabled = fs::read_to_string(EVENT).ok()?;
    if enabled.trim() != "1" {
        return None;
    }
    let mut sum = 0;
    for cpu in fs::read_dir(Path::new(PER_CPU)).ok()? {
        let stats = fs::read_to_string(cpu.ok()?.path().join("stats")).ok()?;
        for line in stats.lines() {
            if let Some((name @ ("entries" | "overrun"), value)) = line.split_once(": ") {
                sum += value.trim().parse::<u64>().map_err(|e| format!("{name}: {e}")).ok()?;
            }
        }
    }
    Some(sum)
}
