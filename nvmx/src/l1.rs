//! Exits of L1: the VMX instructions and MSRs.

/// What the embedder does after an exit of L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Exit {
    /// Dealt with. Go on with `NestedVmx::prepare_entry`.
    Resume,
    /// L2 runs next. If L1 uses EPT ([`crate::Context::eptp`]), put the root of the shadow page table in VMCS02's EPT
    /// pointer. VPIDs are taken care of.
    EnterL2,
    /// L1 executed INVEPT: mappings that derive from its EPT go.
    InvEpt(InvEpt),
    /// Not a VMX matter: the embedder's own exit, with this exit reason, in VMCS01.
    NotMine {
        /// The exit-reason field.
        reason: u32,
    },
    /// L1 shuts down: a VMX abort, or its memory is gone.
    Shutdown,
}

/// What INVEPT names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvEpt {
    /// Type 1, single context: mappings of this EPT pointer (as L1 wrote it; bits 51:12 and the A/D flag count).
    Context {
        /// The EPT pointer.
        eptp: u64,
    },
    /// Type 2, global: mappings of all EPT pointers.
    Global,
}

/// An exception to be raised in place of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The vector.
    pub vector: u8,
    /// The error code, where the vector has one.
    pub error_code: Option<u32>,
    /// The new CR2, for a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// #UD.
    pub const UD: Self = Self { vector: 6, error_code: None, cr2: None };
    /// #SS(0).
    pub const SS: Self = Self { vector: 12, error_code: Some(0), cr2: None };
    /// #GP(0).
    pub const GP: Self = Self { vector: 13, error_code: Some(0), cr2: None };
}
