//! The nested state of one virtual processor.

use hvcore::addr::{L1Gpa, Level};
use zerocopy::FromZeros;

use crate::asid::Tag;
use crate::caps::Config;
use crate::check::Refusal;
use crate::events::Events;
use crate::machine::MergedMap;
use crate::maps::HotWords;
use crate::vmcb::bits::{TSC_RATIO_ONE, np, rflags};
use crate::vmcb::{Control, EnlightenedVmcbFields, Save, Vmcb};

/// What tells one nested context from another: entries made under one are no good for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// L1's ASID for L2.
    pub asid: u32,
    /// nCR3, an L1 GPA, when nested paging is on.
    pub n_cr3: Option<u64>,
    /// VM_ID of the enlightened VMCB, 0 without.
    pub vm_id: u64,
    /// VP_ID of the enlightened VMCB, 0 without.
    pub vp_id: u32,
}

/// L1's nested paging for the L2 that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedPaging {
    /// Root of L1's nested page table, with whatever L1 wrote in the low bits.
    pub n_cr3: L1Gpa,
    /// L1's ASID for L2.
    pub asid: u32,
    /// L1's CR0 at VMRUN.
    pub cr0: u64,
    /// L1's CR4 at VMRUN: with `efer`, the format of the nested page table.
    pub cr4: u64,
    /// L1's EFER at VMRUN, as L1 sees it.
    pub efer: u64,
    /// EnlightenedNptTlb: an ASID flush keeps what derives from the nested page table.
    pub enlightened_tlb: bool,
}

/// Whether the next entry is the last one over again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Something has happened since that an entry depends on.
    No,
    /// The last one is prepared, and has not happened yet as far as is known.
    Prepared,
    /// It is.
    Yes,
}

/// The nested SVM state of one virtual processor; its VP alone uses it.
#[derive(Clone, Debug)]
pub struct NestedSvm {
    pub(crate) config: Config,
    /// L1's EFER.SVME; the real one is always set.
    pub(crate) svme: bool,
    pub(crate) vm_cr: u64,
    pub(crate) hsave_pa: u64,
    /// TSC_RATIO of L1.
    pub(crate) tsc_ratio: u64,
    pub(crate) gif: bool,
    pub(crate) level: Level,
    /// The VMCB that `control` and `memory_save` are copies of. `None` before the first VMRUN and whenever the copies
    /// must not be trusted.
    pub(crate) vmcb12: Option<u64>,
    /// L1's control area as read at VMRUN, unsupported bits cleared.
    pub(crate) control: Control,
    pub(crate) enlightenments: EnlightenedVmcbFields,
    /// L1's state save area as L1's memory has it: last read or written.
    pub(crate) memory_save: Save,
    /// `memory_save` is not what L1's memory has: the next exit writes everything.
    pub(crate) memory_stale: bool,
    pub(crate) context: Context,
    /// The event that VMRUN injected and that has not been seen delivered.
    pub(crate) injected: u64,
    pub(crate) events: Events,
    pub(crate) last_refusal: Option<Refusal>,
    pub(crate) tag1: Tag,
    pub(crate) tag2: Tag,
    pub(crate) settled: Settled,
    pub(crate) msr_words: HotWords,
    pub(crate) io_words: HotWords,
}

impl NestedSvm {
    /// A VP after reset: GIF set, SVM off. Both merged maps become all ones.
    pub fn new(config: Config, msrpm02: &mut MergedMap<'_, 1024>, iopm02: &mut MergedMap<'_, 1536>) -> Self {
        msrpm02.words.fill(u64::MAX);
        iopm02.words.fill(u64::MAX);
        Self {
            config,
            svme: false,
            vm_cr: 0,
            hsave_pa: 0,
            tsc_ratio: TSC_RATIO_ONE,
            gif: true,
            level: Level::L1,
            vmcb12: None,
            control: Control::new_zeroed(),
            enlightenments: EnlightenedVmcbFields::default(),
            memory_save: Save::new_zeroed(),
            memory_stale: false,
            context: Context::default(),
            injected: 0,
            events: Events::default(),
            last_refusal: None,
            tag1: Tag::default(),
            tag2: Tag::default(),
            settled: Settled::No,
            msr_words: HotWords::default(),
            io_words: HotWords::default(),
        }
    }

    /// Puts the VP in the state after INIT: SVM off, L1 runs, GIF set, no event pending. Tags are retired.
    ///
    /// The embedder sets `vmcb01` to its reset state itself.
    pub fn reset(&mut self) {
        self.svme = false;
        self.vm_cr = 0;
        self.hsave_pa = 0;
        self.tsc_ratio = TSC_RATIO_ONE;
        self.gif = true;
        self.level = Level::L1;
        self.vmcb12 = None;
        self.injected = 0;
        self.events = Events::default();
        self.tag1.retire();
        self.tag2.retire();
        self.settled = Settled::No;
    }

    /// Which level runs next.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// L1's global interrupt flag.
    #[inline]
    pub const fn gif(&self) -> bool {
        self.gif
    }

    /// L1's EFER.SVME.
    #[inline]
    pub const fn svm_enabled(&self) -> bool {
        self.svme
    }

    /// What L1 is offered.
    #[inline]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The enlightened fields of the VMCB last entered; zero when they are not offered.
    ///
    /// They stay valid while L1 runs: the VP retains its nested context.
    #[inline]
    pub const fn enlightenments(&self) -> &EnlightenedVmcbFields {
        &self.enlightenments
    }

    /// The consistency check that the last refused VMRUN failed. For traces.
    #[inline]
    pub const fn last_refusal(&self) -> Option<Refusal> {
        self.last_refusal
    }

    /// The nested context that this VP's L2 tag stands for.
    #[inline]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// L1's control area as read at the last VMRUN, unsupported bits cleared.
    #[inline]
    pub const fn vmcb12_control(&self) -> &Control {
        &self.control
    }

    /// L1's nested paging for the running L2, `None` when L1 does without. `vmcb01` holds L1's registers.
    #[inline]
    pub fn nested_paging(&self, vmcb01: &Vmcb) -> Option<NestedPaging> {
        (self.control.np_control & np::ENABLE != 0).then(|| NestedPaging {
            n_cr3: L1Gpa::new(self.control.n_cr3),
            asid: self.control.asid,
            cr0: vmcb01.save.cr0,
            cr4: vmcb01.save.cr4,
            efer: vmcb01.save.efer,
            enlightened_tlb: self.enlightenments.enlightenments_control.enlightened_npt_tlb(),
        })
    }

    /// Gives up the hardware tag of `level`: nothing cached under it is used again. The answer to a flush request, and
    /// to a shadow page table that changed in a way that takes permissions away.
    #[inline]
    pub const fn retire_tag(&mut self, level: Level) {
        match level {
            Level::L1 => self.tag1.invalidate(),
            Level::L2 => self.tag2.invalidate(),
        }
    }

    /// The embedder changed what VMCB01's controls say of L1: intercepts, interrupt control. The next entry is prepared
    /// anew.
    #[inline]
    pub const fn own_controls_changed(&mut self) {
        self.settled = Settled::No;
    }

    /// The embedder's MSR or IO permission map changed: merged words are made anew.
    pub fn own_maps_changed(&mut self, msrpm02: &mut MergedMap<'_, 1024>, iopm02: &mut MergedMap<'_, 1536>) {
        self.msr_words.clear(msrpm02.words);
        self.io_words.clear(iopm02.words);
    }

    /// Nothing copied from L1's VMCB is trusted at the next VMRUN. For an embedder that changed L1's memory.
    #[inline]
    pub const fn forget_vmcb12(&mut self) {
        self.vmcb12 = None;
    }

    /// L1's RFLAGS.IF: its own while it runs, the one at VMRUN while L2 runs.
    #[inline]
    pub(crate) const fn l1_if(vmcb01: &Vmcb) -> bool {
        vmcb01.save.rflags & rflags::IF != 0
    }
}
