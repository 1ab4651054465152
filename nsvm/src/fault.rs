//! An exception that an instruction ends in. Used by whatever emulates one.

/// An exception to be raised in place of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The vector.
    pub vector: u8,
    /// The error code, where the vector has one.
    pub error_code: Option<u32>,
}

impl Fault {
    /// #UD.
    pub const UD: Self = Self { vector: 6, error_code: None };
    /// #GP(0).
    pub const GP: Self = Self { vector: 13, error_code: Some(0) };
}
