//! VMRUN of L1: the VMCB is copied once from L1's memory, checked, and merged into VMCB02.
//!
//! Called by [`crate::l1`] only. What it leaves open (the root of the shadow page table, ASID, TLB_CONTROL, interrupt
//! masking) the embedder and [`NestedSvm::prepare_entry`] fill in.

use hvcore::addr::Level;
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::IntoBytes;

use crate::caps::{Config, Features};
use crate::check::{self, Refusal};
use crate::machine::Machine;
use crate::state::{Context, NestedSvm, Settled};
use crate::view::View;
use crate::vmcb::bits::{
    Event, Intercepts, TSC_RATIO_ONE, clean, cr4, int_ctl, int_state, misc1, misc2, np, rflags, tlb, virt_ext,
};
use crate::vmcb::{Control, ENLIGHTENED_VMCB_OFFSET, EnlightenedVmcbFields, SAVE_OFFSET, Vmcb};

/// What L1's TLB_CONTROL asks of the translations that derive from L1's nested page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidate {
    /// Nothing.
    None,
    /// Those of L1's ASID for this L2 (and with it the nested context that is entered).
    Asid(u32),
    /// Those of all ASIDs.
    All,
}

/// Why a VMRUN did not enter L2.
pub(crate) enum Failure {
    /// L1's VMCB cannot be read.
    Memory,
    /// A consistency check failed.
    Refused(Refusal),
}

impl From<MemoryError> for Failure {
    fn from(_: MemoryError) -> Self {
        Self::Memory
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Clears what L1 was not offered, and reserved bits that VMRUN ignores.
pub(crate) fn sanitize(config: &Config, control: &mut Control) {
    let offered = config.offered;
    control.intercepts = control.intercepts.intersection(config.host.intercepts);
    control.int_ctl &= config.int_ctl;
    control.int_state &= int_state::SHADOW;
    control.np_control &= if offered.has(Features::NP) { np::ENABLE } else { 0 };
    control.virt_ext &= config.virt_ext;
    if control.event_inj & Event::VALID == 0 {
        control.event_inj = 0;
    }
    if !offered.has(Features::PAUSE_FILTER) {
        control.pause_count = 0;
    }
    if !offered.has(Features::PAUSE_THRESHOLD) {
        control.pause_threshold = 0;
    }
}

impl NestedSvm {
    /// Reads the VMCB at `gpa`, checks it and makes VMCB02 of it. On failure the copies are forgotten.
    pub(crate) fn vmrun<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        gpa: u64,
    ) -> Result<Invalidate, Failure> {
        // Until all is checked the copies are of nothing.
        let known = self.vmcb12.take() == Some(gpa);
        let mut enlightenments = EnlightenedVmcbFields::default();
        let unchanged = self.copy_in(m.memory, gpa, known, &mut enlightenments)?;
        check::control(&self.config, &self.control, &self.memory_save, m.vmcb01.save.cr0)?;
        check::save(&self.config, &self.memory_save)?;
        self.enlightenments = enlightenments;
        self.vmcb12 = Some(gpa);
        self.memory_stale = false;
        let invalidate = self.switch_context();
        self.load_save(m.vmcb02, m.vmcb01, unchanged);
        self.load_control(m);
        self.merge_maps(m, unchanged);
        self.settled = Settled::No;
        self.level = Level::L2;
        self.gif = true;
        self.events.attend(self.attends_vnmi());
        Ok(invalidate)
    }

    /// Copies what L1 wrote. The clean bits that count: those of L1 if the same VMCB was entered last, else none.
    ///
    /// The enlightened fields go to `hv`: the old ones name the context that is retained, should VMRUN be refused.
    fn copy_in<M: GuestMemory + ?Sized>(
        &mut self,
        memory: &M,
        gpa: u64,
        known: bool,
        hv: &mut EnlightenedVmcbFields,
    ) -> Result<u32, MemoryError> {
        let head = self.control.as_mut_bytes().get_mut(..0xC8).unwrap_or_default();
        let view = View::new(memory, gpa);
        view.read::<0>(head)?;
        let unchanged = if known && self.config.offered.has(Features::VMCB_CLEAN) { self.control.clean } else { 0 };
        sanitize(&self.config, &mut self.control);
        if self.control.event_inj & Event::VALID != 0 && self.config.offered.has(Features::NRIPS) {
            // What an injected INTn, INT3 or INTO pushes.
            let mut next_rip = [0; 8];
            view.read::<0xC8>(&mut next_rip)?;
            self.control.next_rip = u64::from_ne_bytes(next_rip);
        }
        let save = &mut self.memory_save;
        if self.config.enlightened {
            // VM_ID, VP_ID and the assist address are read at every entry, whatever clean bit 31 says: Linux writes
            // its VP_ID after the first run and leaves the bit set.
            view.read::<0x3E0>(hv.as_mut_bytes().get_mut(..24).unwrap_or_default())?;
        }
        if unchanged & clean::SEG == 0 {
            view.read_save::<0x400, 0x440>(save)?;
        }
        if unchanged & clean::DT == 0 {
            view.read_save::<0x460, 0x490>(save)?;
        }
        if unchanged & (clean::SEG | clean::CRX) != clean::SEG | clean::CRX {
            view.read_save::<0x4C8, 0x4D8>(save)?;
        }
        view.read_save::<0x548, 0x580>(save)?;
        view.read_save::<0x5D8, 0x600>(save)?;
        if unchanged & clean::CR2 == 0 {
            view.read_save::<0x640, 0x648>(save)?;
        }
        if unchanged & clean::NP == 0 && self.control.np_control & np::ENABLE != 0 {
            view.read_save::<0x668, 0x670>(save)?;
        }
        if unchanged & clean::LBR == 0 && self.control.virt_ext & virt_ext::LBR != 0 {
            view.read_save::<0x670, 0x698>(save)?;
        }
        Ok(unchanged)
    }

    /// Retires the L2 tag if it stands for another context or L1 asks for a flush.
    fn switch_context(&mut self) -> Invalidate {
        let control = &self.control;
        let hv = &self.enlightenments;
        let context = Context {
            asid: control.asid,
            n_cr3: (control.np_control & np::ENABLE != 0).then_some(control.n_cr3),
            vm_id: hv.vm_id,
            vp_id: hv.vp_id,
        };
        if context != self.context {
            self.context = context;
            self.tag2.invalidate();
        }
        match control.tlb_control {
            tlb::NONE => Invalidate::None,
            tlb::ASID | tlb::ASID_NON_GLOBAL if self.config.offered.has(Features::FLUSH_BY_ASID) => {
                self.tag2.invalidate();
                Invalidate::Asid(control.asid)
            }
            // ALL, and what is reserved: flushing more is always right.
            _ => {
                self.tag1.invalidate();
                self.tag2.invalidate();
                Invalidate::All
            }
        }
    }

    /// Puts L2's registers in VMCB02. Groups that L1 calls unchanged are there already, as the last exit left them.
    fn load_save(&self, vmcb02: &mut Vmcb, vmcb01: &Vmcb, unchanged: u32) {
        let from = &self.memory_save;
        let to = &mut vmcb02.save;
        if unchanged & clean::SEG == 0 {
            (to.es, to.cs, to.ss, to.ds) = (from.es, from.cs, from.ss, from.ds);
        }
        if unchanged & clean::DT == 0 {
            (to.gdtr, to.idtr) = (from.gdtr, from.idtr);
        }
        to.cpl = from.cpl;
        to.efer = from.efer;
        (to.cr0, to.cr3, to.cr4) = (from.cr0, from.cr3, from.cr4);
        (to.dr6, to.dr7) = (from.dr6, from.dr7);
        to.rflags = from.rflags & RFLAGS_DEFINED | rflags::FIXED;
        (to.rip, to.rsp, to.rax, to.cr2) = (from.rip, from.rsp, from.rax, from.cr2);
        // Without nested paging L2 shares L1's PAT.
        to.g_pat = if self.control.np_control & np::ENABLE != 0 { from.g_pat } else { vmcb01.save.g_pat };
        if to.cr4 & cr4::CET != 0 {
            (to.s_cet, to.ssp, to.isst_addr) = (from.s_cet, from.ssp, from.isst_addr);
        }
        if self.control.virt_ext & virt_ext::LBR != 0 {
            to.set_branches(from);
        } else if vmcb01.control.virt_ext & virt_ext::LBR != 0 {
            // L2 goes on with L1's.
            to.set_branches(&vmcb01.save);
        }
    }

    /// Puts the merged controls in VMCB02.
    pub(crate) fn load_control<G: ?Sized, M: ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>) {
        let from = &self.control;
        let own = &m.vmcb01.control;
        let to = &mut m.vmcb02.control;
        to.intercepts = self.merge_intercepts(&own.intercepts);
        (to.pause_count, to.pause_threshold) = if from.intercepts.misc1 & misc1::PAUSE != 0 {
            (from.pause_count, from.pause_threshold)
        } else {
            (own.pause_count, own.pause_threshold)
        };
        to.tsc_offset = self.tsc_offset(own.tsc_offset);
        to.int_state = from.int_state;
        to.exit_int_info = 0;
        to.event_inj = Event::from_raw(from.event_inj).raw();
        self.injected = to.event_inj;
        to.np_control = own.np_control;
        // With nested paging the embedder puts the root of the shadow page table here.
        to.n_cr3 = own.n_cr3;
        to.virt_ext = (from.virt_ext | own.virt_ext) & virt_ext::LBR;
        if self.hardware_vmload() {
            to.virt_ext |= virt_ext::VMLOAD_VMSAVE;
        }
        to.next_rip = from.next_rip;
    }

    /// L0's intercepts and L1's. Those that L0 set in VMCB01 for L1's sake alone do not concern L2.
    pub(crate) fn merge_intercepts(&self, own: &Intercepts) -> Intercepts {
        let control = &self.control;
        let mut own = *own;
        own.misc1 &= !(misc1::VINTR | self.events.watched_misc1());
        if control.int_ctl & int_ctl::V_INTR_MASKING != 0 {
            // CR8 is L2's V_TPR then.
            own.cr &= !(1 << 8 | 1 << 24);
        }
        let mut merged = own.union(control.intercepts);
        // VMLOAD and VMSAVE name L1's memory: never the processor's to do. STGI and CLGI are, with a virtual GIF.
        merged.misc2 |= misc2::VMLOAD | misc2::VMSAVE | misc2::SKINIT | misc2::VMRUN | misc2::STGI | misc2::CLGI;
        if self.hardware_vgif() {
            merged.misc2 &= !(misc2::STGI | misc2::CLGI) | control.intercepts.misc2;
        }
        if self.hardware_vmload() {
            // They name L2's memory, by way of the shadow page table.
            merged.misc2 &= !(misc2::VMLOAD | misc2::VMSAVE) | control.intercepts.misc2;
        }
        merged.misc1 |= misc1::INVLPGA;
        merged
    }

    /// True when L2 has a virtual GIF that the processor keeps.
    pub(crate) fn hardware_vgif(&self) -> bool {
        self.control.int_ctl & int_ctl::V_GIF_ENABLE != 0 && self.config.host.features.has(Features::VGIF)
    }

    /// True when L1 gives L2 VMLOAD and VMSAVE on L2's own physical addresses.
    pub(crate) const fn virtual_vmload(&self) -> bool {
        self.control.virt_ext & virt_ext::VMLOAD_VMSAVE != 0 && self.control.np_control & np::ENABLE != 0
    }

    /// True when the processor does that.
    pub(crate) const fn hardware_vmload(&self) -> bool {
        self.virtual_vmload() && self.config.host.features.has(Features::V_VMSAVE_VMLOAD)
    }

    /// TSC offset of L2, whose TSC is L1's, scaled and shifted as L1 says. `own` is the offset of L1's TSC.
    pub(crate) fn tsc_offset(&self, own: u64) -> u64 {
        let own = if self.tsc_ratio == TSC_RATIO_ONE { own } else { scale(own, self.tsc_ratio) };
        own.wrapping_add(self.control.tsc_offset)
    }

    /// What the processor's TSC_RATIO must be while the level runs that is entered next, for an embedder that offers
    /// [`Features::TSC_RATE`]; `own` is the ratio that the embedder gives L1 (8.32 fixed point). It may change with
    /// every change of level and when L1 or L2 writes the MSR.
    pub const fn hardware_tsc_ratio(&self, own: u64) -> u64 {
        match self.level {
            Level::L1 => own,
            Level::L2 => ((own as u128).wrapping_mul(self.tsc_ratio as u128) >> 32) as u64,
        }
    }

    /// Chooses and refreshes the permission maps of L2.
    pub(crate) fn merge_maps<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        unchanged: u32,
    ) {
        let control = &self.control;
        let to = &mut m.vmcb02.control;
        if control.intercepts.misc1 & misc1::MSR_PROT != 0 {
            to.msrpm_base = m.msrpm02.base.raw();
            // The enlightened bitmap's clean bit covers the contents; the VMCB's own covers only the address.
            let kept =
                self.enlightenments.enlightenments_control.msr_bitmap() && unchanged & clean::ENLIGHTENMENTS != 0;
            if !kept {
                self.msr_words.refresh(m.msrpm02.words, m.msrpm01, m.memory, control.msrpm_base & !0xFFF);
            }
        } else {
            to.msrpm_base = m.vmcb01.control.msrpm_base;
        }
        if control.intercepts.misc1 & misc1::IOIO_PROT != 0 {
            to.iopm_base = m.iopm02.base.raw();
            self.io_words.refresh(m.iopm02.words, m.iopm01, m.memory, control.iopm_base & !0xFFF);
        } else {
            to.iopm_base = m.vmcb01.control.iopm_base;
        }
    }
}

/// The signed `offset` times `ratio` (8.32 fixed point).
fn scale(offset: u64, ratio: u64) -> u64 {
    // 64 bits times 40: no overflow of 128.
    ((offset as i64 as i128).wrapping_mul(ratio as i128) >> 32) as u64
}

/// Bits of RFLAGS that exist: all others read as zero, bit 1 as one.
const RFLAGS_DEFINED: u64 = 0x003F_7FD5;

const _: () = assert!(SAVE_OFFSET == 0x400 && ENLIGHTENED_VMCB_OFFSET == 0x3E0);
