//! Faults that L0 commits on purpose, so that the auditor can show that it finds them.
//!
//! Named by `mutant=NAME` on L0's command line, together with `test-hooks`. Called where each fault is committed.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// TLB_CONTROL, or INVVPID, is never used.
    NoTlbControl,
    /// Every context runs under ASID, or VPID, 1.
    OneAsid,
    /// INVEPT is never used (VT-x).
    NoInvEpt,
    /// What was requested of a VP is taken from its queues and forgotten.
    DrainSkipped,
    /// Targets are neither kicked nor waited for.
    NoKick,
}

impl Mutant {
    /// The fault with this name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "no-tlb-control" => Self::NoTlbControl,
            "one-asid" => Self::OneAsid,
            "no-invept" => Self::NoInvEpt,
            "drain-skipped" => Self::DrainSkipped,
            "no-kick" => Self::NoKick,
            _ => return None,
        })
    }
}
