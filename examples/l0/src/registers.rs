//! The registers of a guest that a VMCB does not hold, as the library asks for them.

/// General-purpose registers.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub struct Gprs(pub hw::svm::Gprs);

impl core::ops::Deref for Gprs {
    type Target = hw::svm::Gprs;

    #[inline]
    fn deref(&self) -> &hw::svm::Gprs {
        &self.0
    }
}

impl core::ops::DerefMut for Gprs {
    #[inline]
    fn deref_mut(&mut self) -> &mut hw::svm::Gprs {
        &mut self.0
    }
}

impl nsvm::Gprs for Gprs {
    #[inline]
    fn rcx(&self) -> u64 {
        self.0.rcx
    }

    #[inline]
    fn rdx(&self) -> u64 {
        self.0.rdx
    }

    #[inline]
    fn set_rdx(&mut self, value: u64) {
        self.0.rdx = value;
    }
}
