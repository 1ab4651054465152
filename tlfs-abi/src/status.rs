//! Hypercall statuses (TLFS, "Hypercall Status Codes"): what a guest sees, an open set.
//!
//! Used everywhere; uses nothing.

/// A hypercall status. The doc comment of each constant is its text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[must_use]
pub struct HvStatus(pub u16);

macro_rules! statuses {
    ($(#[doc = $text:literal] $name:ident = $code:literal;)*) => {
        impl HvStatus {
            $(#[doc = $text] pub const $name: Self = Self($code);)*

            /// The constant's name and its text, when this crate knows the status.
            pub const fn describe(self) -> Option<(&'static str, &'static str)> {
                match self.0 {
                    $($code => Some((stringify!($name), $text)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The operation succeeded.
    SUCCESS = 0x00;
    /// The hypervisor does not support the call code.
    INVALID_HYPERCALL_CODE = 0x02;
    /// The rep count, the rep start index, the variable header or a reserved field of the input value is wrong.
    INVALID_HYPERCALL_INPUT = 0x03;
    /// A parameter's address is not aligned to 8 bytes or crosses a page.
    INVALID_ALIGNMENT = 0x04;
    /// A parameter is invalid.
    INVALID_PARAMETER = 0x05;
    /// The caller lacks the privilege.
    ACCESS_DENIED = 0x06;
    /// The partition's state does not allow the operation.
    INVALID_PARTITION_STATE = 0x07;
    /// The operation is not allowed now.
    OPERATION_DENIED = 0x08;
    /// The property is unknown.
    UNKNOWN_PROPERTY = 0x09;
    /// The property's value is out of range.
    PROPERTY_VALUE_OUT_OF_RANGE = 0x0A;
    /// There is not enough memory.
    INSUFFICIENT_MEMORY = 0x0B;
    /// The maximum depth of partitions is reached.
    PARTITION_TOO_DEEP = 0x0C;
    /// The partition id is invalid.
    INVALID_PARTITION_ID = 0x0D;
    /// The VP index is invalid.
    INVALID_VP_INDEX = 0x0E;
    /// Nothing was found.
    NOT_FOUND = 0x10;
    /// The port id is invalid.
    INVALID_PORT_ID = 0x11;
    /// The connection id is invalid.
    INVALID_CONNECTION_ID = 0x12;
    /// There are not enough buffers to send the message.
    INSUFFICIENT_BUFFERS = 0x13;
    /// The previous interrupt was not acknowledged.
    NOT_ACKNOWLEDGED = 0x14;
    /// The VP's state does not allow the operation.
    INVALID_VP_STATE = 0x15;
    /// The operation was acknowledged already.
    ACKNOWLEDGED = 0x16;
    /// The saved state is invalid.
    INVALID_SAVE_RESTORE_STATE = 0x17;
    /// The SynIC's state is invalid.
    INVALID_SYNIC_STATE = 0x18;
    /// The object is in use.
    OBJECT_IN_USE = 0x19;
    /// A resource is missing.
    NO_RESOURCES = 0x1D;
    /// The processor lacks the feature.
    PROCESSOR_FEATURE_NOT_SUPPORTED = 0x20;
    /// The logical processor index is invalid.
    INVALID_LP_INDEX = 0x41;
    /// The register's value is invalid.
    INVALID_REGISTER_VALUE = 0x50;
    /// The operation failed.
    OPERATION_FAILED = 0x71;
    /// The operation timed out.
    TIME_OUT = 0x78;
    /// The call is pending.
    CALL_PENDING = 0x79;
    /// The VTL is enabled already.
    VTL_ALREADY_ENABLED = 0x86;
}

impl HvStatus {
    /// True for [`HvStatus::SUCCESS`].
    #[inline]
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }
}

impl core::fmt::Debug for HvStatus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.describe() {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "HvStatus({:#x})", self.0),
        }
    }
}

impl core::fmt::Display for HvStatus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.describe() {
            Some((_, text)) => f.write_str(text),
            None => write!(f, "unknown hypercall status {:#x}", self.0),
        }
    }
}
