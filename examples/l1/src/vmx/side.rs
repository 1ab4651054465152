//! What a guest has on VT-x beside its VMCB: two VMCSs, plain and enlightened, and the world switch.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use hvcore::addr::L1Gpa;
use hw::vmx::{self, Entered, Gprs, World};
use hw::vmx_host;
use nvmx::evmcs::client::{Evmcs, SharedPage};
use nvmx::field::{Area, Field};
use rt::cpu::MAX_CPUS;

use super::{from_exit, to_vmcs};
use crate::guest::Exit;
use crate::vmcb::{Vmcb, exit};
use crate::{frames, hyperv};

/// No NMI is to stop an entry: none comes but for a guest, where it is an exit.
static KICKED: AtomicU8 = AtomicU8::new(0);

/// Makes this processor one that can run guests.
pub fn enable() -> bool {
    let region = frames::page();
    // SAFETY: VMX is there and off; the page is given away, mapped one to one.
    match unsafe { vmx::enable(region as *mut [u32; 1024], region) } {
        Ok(()) => {
            super::set_on();
            true
        }
        Err(why) => {
            rt::println!("VMX: {why:?}");
            false
        }
    }
}

/// Which VMCS a processor's next entry would use: 0 for none, its address, with bit 0 for an enlightened one. Each
/// processor has its own: Relaxed.
static CURRENT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

fn current() -> &'static AtomicU64 {
    &CURRENT[rt::cpu::current().index as usize]
}

/// A guest's VT-x half.
pub struct Side {
    world: World,
    /// The plain VMCS, 0 before the first run.
    plain: u64,
    plain_launched: bool,
    /// The enlightened one, once the guest has been described to the host.
    enlightened: Option<Evmcs<'static>>,
    enlightened_launched: bool,
}

/// The VMCS that a run uses.
pub enum Fields<'a> {
    /// The current one.
    Plain,
    /// A page.
    Enlightened(&'a mut Evmcs<'static>),
}

impl Fields<'_> {
    /// Writes a field; one that the enlightened VMCS lacks is left out.
    pub fn write(&mut self, field: Field, value: u64) {
        match self {
            // SAFETY: VMX operation with a current VMCS, whose guest is this image's own.
            Fields::Plain => unsafe { vmx::write(field, value) },
            Fields::Enlightened(page) => _ = page.write(field, value),
        }
    }

    /// Reads a field.
    pub fn read(&self, field: Field) -> u64 {
        match self {
            // SAFETY: VMX operation with a current VMCS.
            Fields::Plain => unsafe { vmx::read(field) },
            Fields::Enlightened(page) => page.read(field).unwrap_or(0),
        }
    }
}

impl Side {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            world: World::new(&KICKED),
            plain: 0,
            plain_launched: false,
            enlightened: None,
            enlightened_launched: false,
        }
    }

    /// Runs the guest that `vmcb` describes until its next exit, which goes back there. With `translate` false the VMCS
    /// is taken as it is; `change` is applied last.
    pub fn run(
        &mut self,
        gprs: &mut Gprs,
        vmcb: &mut Vmcb,
        translate: bool,
        change: impl FnOnce(&mut Fields<'_>),
    ) -> Exit {
        let enlightened = vmcb.hv_partition_assist() != 0 && hyperv::has_assist_page();
        let launched = if enlightened { self.use_enlightened() } else { self.use_plain() };
        let mut fields = match &mut self.enlightened {
            Some(page) if enlightened => Fields::Enlightened(page),
            _ => Fields::Plain,
        };
        if translate {
            to_vmcs::write(&mut fields, vmcb);
        }
        if let Fields::Enlightened(page) = &mut fields {
            page.set_context(vmcb.hv_vm_id(), vmcb.hv_vp_id(), L1Gpa::new(vmcb.hv_partition_assist()));
            page.set_direct_flush(vmcb.hv_control() & 1 != 0).expect("a partition assist page");
        }
        if vmcb.tlb_control() != 0 {
            // SAFETY: VMX operation; translations are only dropped. A processor without VPIDs refuses the second.
            unsafe {
                _ = vmx::invept(vmx::InvEpt::All);
                _ = vmx::invvpid(vmx::InvVpid::All);
            }
        }
        change(&mut fields);
        self.world.gprs = *gprs;
        // SAFETY: the VMCS is bound to this world; its guest is this image's own code, or sees what its EPT maps.
        let entered = unsafe { vmx::enter(&mut self.world, launched) };
        if entered != Entered::Exited {
            let number = fields.read(Field::InstructionError);
            return Exit { code: exit::INVALID, info1: number, info2: 0 };
        }
        *gprs = self.world.gprs;
        let seen = from_exit::read(&mut fields, vmcb);
        let ran = fields.read(Field::ExitReason) >> 31 == 0;
        let launched = if enlightened { &mut self.enlightened_launched } else { &mut self.plain_launched };
        *launched |= ran;
        seen
    }

    /// The plain VMCS was cleared by other means.
    pub fn cleared(&mut self) {
        self.plain_launched = false;
    }

    /// A field of the VMCS that the last run used.
    pub fn field(&mut self, field: Field) -> u64 {
        let now = current().load(Ordering::Relaxed);
        match &mut self.enlightened {
            Some(page) if now == page.gpa().raw() | 1 => Fields::Enlightened(page).read(field),
            _ => Fields::Plain.read(field),
        }
    }

    /// Where the enlightened VMCS is, once there is one.
    pub fn evmcs(&self) -> Option<u64> {
        self.enlightened.as_ref().map(|page| page.gpa().raw())
    }

    /// Makes the plain VMCS current; true when it was launched.
    pub fn use_plain(&mut self) -> bool {
        if self.plain == 0 {
            leave_enlightened();
            let region = frames::page();
            // SAFETY: VMX operation; the page is given away; this image's state is good host state.
            unsafe {
                (region as *mut u32).write(vmx::revision());
                vmx::vmclear(region).expect("VMCLEAR");
                vmx::vmptrld(region).expect("VMPTRLD");
                vmx_host::write_host_state();
                self.world.bind();
            }
            self.plain = region;
            current().store(region, Ordering::Relaxed);
        } else if current().load(Ordering::Relaxed) != self.plain {
            leave_enlightened();
            // SAFETY: VMX operation; the VMCS is this guest's.
            unsafe { vmx::vmptrld(self.plain) }.expect("VMPTRLD");
            current().store(self.plain, Ordering::Relaxed);
        }
        self.plain_launched
    }

    /// Announces the enlightened VMCS for the next entry; true when it was launched.
    fn use_enlightened(&mut self) -> bool {
        let known = self.enlightened.as_ref().map(|page| page.gpa().raw());
        if known.is_some_and(|gpa| current().load(Ordering::Relaxed) == gpa | 1) {
            return self.enlightened_launched;
        }
        // The host's half is as in the plain one.
        self.use_plain();
        let gpa = known.unwrap_or_else(frames::page);
        // SAFETY: the page is this guest's, mapped one to one, and active on no processor.
        let mut page = Evmcs::new(unsafe { &*(gpa as *const SharedPage) }, L1Gpa::new(gpa));
        for field in Field::ALL {
            if field.area() == Area::Host {
                // SAFETY: VMX operation with a current VMCS.
                _ = page.write(*field, unsafe { vmx::read(*field) });
            }
        }
        self.enlightened = Some(page);
        self.enlightened_launched = false;
        hyperv::set_current_evmcs(Some(gpa));
        current().store(gpa | 1, Ordering::Relaxed);
        false
    }
}

/// Ends the use of an enlightened VMCS on this processor.
fn leave_enlightened() {
    let now = current().load(Ordering::Relaxed);
    if now & 1 != 0 {
        // SAFETY: VMX operation; the page is an enlightened VMCS of this processor.
        unsafe { vmx::vmclear(now & !1) }.expect("VMCLEAR of an enlightened VMCS");
        hyperv::set_current_evmcs(None);
        current().store(0, Ordering::Relaxed);
    }
}

/// To be called when this processor's current VMCS was changed by other means: none is taken for current.
pub fn forget_current() {
    leave_enlightened();
    current().store(0, Ordering::Relaxed);
}
