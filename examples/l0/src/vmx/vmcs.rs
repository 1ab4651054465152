//! The hardware's VMCSs of one VP. One is current at a time; an access to another makes that one current first.

use core::cell::Cell;

use hw::vmx;
use nvmx::field::{Area, Field};
use nvmx::{Vmcs, exit_reason};

use crate::counters::Counters;

/// Which VMCS is current on this processor, and what accesses are counted.
#[derive(Debug)]
pub struct Current {
    pa: Cell<u64>,
    counters: &'static Counters,
}

impl Current {
    /// None is current.
    pub const fn new(counters: &'static Counters) -> Self {
        Self { pa: Cell::new(u64::MAX), counters }
    }
}

/// A VMCS of the processor that made it.
#[derive(Debug)]
pub struct HwVmcs {
    pa: u64,
    current: &'static Current,
    /// The next entry is VMRESUME.
    launched: bool,
}

impl HwVmcs {
    /// The VMCS at physical address `pa`, whose page is `page`: cleared, its launch state "clear".
    ///
    /// # Safety
    /// In VMX operation. The page is at that address, is this processor's from now on, and is not used otherwise; so is
    /// `current`.
    pub unsafe fn new(page: &mut [u32; 1024], pa: u64, current: &'static Current) -> Result<Self, vmx::Fail> {
        // SAFETY: VMX operation; the page is the caller's gift.
        unsafe {
            page[0] = vmx::revision();
            vmx::vmclear(pa)?;
        }
        Ok(Self { pa, current, launched: false })
    }

    /// Makes this VMCS the current one.
    #[inline]
    pub fn load(&self) {
        if self.current.pa.get() != self.pa {
            self.switch();
        }
    }

    #[cold]
    fn switch(&self) {
        self.current.counters.vmptrlds.add(1);
        // SAFETY: VMX operation, as at `new`; the page is this VMCS's. It cannot fail: the address is aligned, the
        // revision was written and the page is not the VMXON region.
        let loaded = unsafe { vmx::vmptrld(self.pa) };
        debug_assert!(loaded.is_ok());
        self.current.pa.set(self.pa);
    }

    /// Overwrites all that it holds: whoever uses it next writes what it needs.
    pub fn destroy(&mut self) {
        for field in Field::ALL {
            self.write(*field, 0xa5a5_a5a5_a5a5_a5a5);
        }
        // SAFETY: VMX operation; the page is this VMCS's. It cannot fail: see `switch`.
        let cleared = unsafe { vmx::vmclear(self.pa) };
        debug_assert!(cleared.is_ok());
        self.current.pa.set(u64::MAX);
        self.launched = false;
    }

    /// Zeroes all controls and guest state: what a processor finds in a VMCS that was never written is its own affair.
    pub fn zero(&mut self) {
        for field in Field::ALL.iter().filter(|field| matches!(field.area(), Area::Control | Area::Guest)) {
            self.write(*field, 0);
        }
        self.write(Field::VmcsLinkPointer, u64::MAX);
    }

    /// Enters the guest.
    ///
    /// # Safety
    /// As for [`vmx::enter`], with this VMCS.
    #[inline]
    pub unsafe fn enter(&mut self, world: &mut vmx::World) -> vmx::Entered {
        self.load();
        // SAFETY: the caller's promise.
        let entered = unsafe { vmx::enter(world, self.launched) };
        if entered == vmx::Entered::Exited && !self.launched {
            // An entry that failed late leaves the launch state alone.
            self.launched = self.read32(Field::ExitReason) & exit_reason::ENTRY_FAILURE == 0;
        }
        entered
    }
}

impl Vmcs for HwVmcs {
    #[inline]
    fn read(&self, field: Field) -> u64 {
        self.load();
        self.current.counters.vmreads.add(1);
        // SAFETY: VMX operation with a current VMCS.
        unsafe { vmx::read(field) }
    }

    #[inline]
    fn write(&mut self, field: Field, value: u64) {
        self.load();
        self.current.counters.vmwrites.add(1);
        // SAFETY: VMX operation with a current VMCS. Whoever enters with it vouches for what is in it.
        unsafe { vmx::write(field, value) };
    }
}
