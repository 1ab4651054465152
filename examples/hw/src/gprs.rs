//! The general-purpose registers of a guest. Used by the world switches of [`crate::svm`] and [`crate::vmx`].

/// The registers that the processor does not switch, in the order of their encoding.
///
/// RSP is in the VMCB or VMCS; so is RAX in the VMCB. Those slots are kept in step by whoever wants a whole file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gprs {
    /// RAX: not touched by SVM's world switch, switched by VMX's.
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    /// RSP: not touched by a world switch.
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}
