//! The nested state of one virtual processor.

use hvcore::addr::{L1Gpa, Level};

use crate::caps::Config;
use crate::check::Refusal;
use crate::evmcs::{Enlightenments, EvmcsCache};
use crate::field::Field;
use crate::groups::{self, Groups};
use crate::machine::{MergedMap, Vmcs};
use crate::msr::feature_control;
use crate::vmcs02::L2;
use crate::vmcs12::Vmcs12;
use crate::vpid::Tag;

/// What tells one nested context from another: entries made under one are no good for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// L1's VPID for L2, 0 when L1 uses none.
    pub vpid: u16,
    /// The EPT pointer, as L1 wrote it, when L1 uses EPT.
    pub eptp: Option<u64>,
    /// VM_ID of the enlightened VMCS, 0 without.
    pub vm_id: u64,
    /// VP_ID of the enlightened VMCS, 0 without.
    pub vp_id: u32,
}

/// The current VMCS of L1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Current {
    /// None: instructions that need one end in VMfailInvalid.
    #[default]
    None,
    /// The one at this address, made current by VMPTRLD.
    Plain(L1Gpa),
    /// The enlightened VMCS at this address, made active by VMLAUNCH or VMRESUME.
    Enlightened(L1Gpa),
}

/// The nested VMX state of one virtual processor; its VP alone uses it.
#[derive(Clone, Debug)]
pub struct NestedVmx {
    pub(crate) config: Config,
    pub(crate) feature_control: u64,
    /// The VMXON pointer, in VMX operation.
    pub(crate) vmxon: Option<L1Gpa>,
    pub(crate) level: Level,
    pub(crate) current: Current,
    /// L0's copy of the current VMCS. While [`Current::None`] its contents are left-overs.
    pub(crate) vmcs12: Vmcs12,
    /// Groups of `vmcs12` that L1 changed since VMCS02 was made of it; all while VMCS02 is of another VMCS.
    pub(crate) changed: Groups,
    pub(crate) evmcs: EvmcsCache,
    pub(crate) context: Context,
    pub(crate) last_refusal: Option<Refusal>,
    pub(crate) tag1: Tag,
    pub(crate) tag2: Tag,
    pub(crate) l2: L2,
}

impl NestedVmx {
    /// A VP after power-up: VMX off, IA32_FEATURE_CONTROL as firmware leaves it, with VMX enabled outside SMX and locked.
    /// The bitmaps for L2 become all ones.
    pub fn new(config: Config, msr_bitmap02: &mut MergedMap<'_, 512>, io_bitmaps02: &mut MergedMap<'_, 1024>) -> Self {
        msr_bitmap02.words.fill(u64::MAX);
        io_bitmaps02.words.fill(u64::MAX);
        Self {
            config,
            feature_control: feature_control::ENABLED,
            vmxon: None,
            level: Level::L1,
            current: Current::None,
            vmcs12: Vmcs12::default(),
            changed: groups::ALL,
            evmcs: EvmcsCache::new(),
            context: Context::default(),
            last_refusal: None,
            tag1: Tag::default(),
            tag2: Tag::default(),
            l2: L2::default(),
        }
    }

    /// Puts the VP in the state after INIT: VMX off, L1 runs, no event pending. Tags are retired.
    /// IA32_FEATURE_CONTROL stays.
    ///
    /// The embedder sets VMCS01 to its reset state itself.
    pub fn reset(&mut self) {
        self.leave_vmx();
        self.l2.reset();
        self.level = Level::L1;
        self.tag1.retire();
        self.tag2.retire();
    }

    /// VMX operation ends: no VMCS is current any more. What L1's memory does not have of the current one is lost, as
    /// after VMXOFF of the processor.
    pub(crate) const fn leave_vmx(&mut self) {
        self.l2.forget();
        self.vmxon = None;
        self.evmcs.release();
        self.current = Current::None;
        self.changed = groups::ALL;
    }

    /// Which level runs next.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// What L1 is offered.
    #[inline]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The VMXON pointer; `None` outside VMX operation.
    #[inline]
    pub const fn vmxon_pointer(&self) -> Option<L1Gpa> {
        self.vmxon
    }

    /// IA32_FEATURE_CONTROL of L1.
    #[inline]
    pub const fn feature_control(&self) -> u64 {
        self.feature_control
    }

    /// Sets IA32_FEATURE_CONTROL as firmware would, lock or no lock: for embedders whose guest firmware does it itself.
    #[inline]
    pub const fn set_feature_control(&mut self, value: u64) {
        self.feature_control = value;
    }

    /// L1's current VMCS.
    #[inline]
    pub const fn current(&self) -> Current {
        self.current
    }

    /// L0's copy of L1's current VMCS.
    #[inline]
    pub const fn vmcs12(&self) -> &Vmcs12 {
        &self.vmcs12
    }

    /// The embedder logged page modifications for L2 ([`crate::ept::Pml`]): the PML index from now on.
    #[inline]
    pub fn set_pml_index(&mut self, index: u16) {
        self.vmcs12.set(Field::PmlIndex, index.into());
    }

    /// The nested context that this VP's L2 tag stands for.
    #[inline]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// The synthetic fields of the enlightened VMCS last entered; zero when none is active. They stay valid while L1
    /// runs: the VP retains its nested context.
    #[inline]
    pub const fn enlightenments(&self) -> &Enlightenments {
        self.evmcs.enlightenments()
    }

    /// The check that the last refused VM entry failed. For traces.
    #[inline]
    pub const fn last_refusal(&self) -> Option<Refusal> {
        self.last_refusal
    }

    /// True when L1 may load `value` into CR0: in VMX operation some bits are fixed, else #GP(0). For the embedder's
    /// CR0 intercept.
    #[inline]
    pub const fn allows_cr0(&self, value: u64) -> bool {
        self.vmxon.is_none() || self.config.allows_cr0(value, false)
    }

    /// True when L1 may load `value` into CR4, as [`allows_cr0`](Self::allows_cr0); VMXE is one of the fixed bits.
    #[inline]
    pub const fn allows_cr4(&self, value: u64) -> bool {
        self.vmxon.is_none() || self.config.allows_cr4(value)
    }

    /// Gives up the hardware tag of `level`: nothing cached under it is used again. The answer to a flush request of
    /// linear addresses.
    #[inline]
    pub const fn retire_tag(&mut self, level: Level) {
        match level {
            Level::L1 => self.tag1.invalidate(),
            Level::L2 => self.tag2.invalidate(),
        }
    }

    /// L1's CR4 as L1 reads it: bits that the embedder masks come from the read shadow.
    pub fn l1_cr4<V: Vmcs + ?Sized>(vmcs01: &V) -> u64 {
        let mask = vmcs01.read(Field::Cr4Mask);
        vmcs01.read(Field::GuestCr4) & !mask | vmcs01.read(Field::Cr4ReadShadow) & mask
    }

    /// L1's CR0 as L1 reads it.
    pub fn l1_cr0<V: Vmcs + ?Sized>(vmcs01: &V) -> u64 {
        let mask = vmcs01.read(Field::Cr0Mask);
        vmcs01.read(Field::GuestCr0) & !mask | vmcs01.read(Field::Cr0ReadShadow) & mask
    }
}
