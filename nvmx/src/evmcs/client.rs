//! L1's half of the enlightened VMCS: a hypervisor on Hyper-V, on Linux's KVM or on this library finds it, announces it
//! in the VP assist page and writes its VMCS fields as memory.
//!
//! L1's own code calls this module; it uses the field table and `tlfs-abi`. The pages are L1's own memory, which L0
//! reads and writes while L1 is not running: hence atomic words, all relaxed. The VM entry and the exit, on the same
//! processor, order L0's accesses after and before L1's; an embedder's VMLAUNCH and VMRESUME are compiler fences.
//!
//! # The life of an enlightened VMCS
//!
//! 1. [`EvmcsOffer::from_leaves`]: is it there?
//! 2. Once per VP: the VP assist page is enabled by its MSR, and [`AssistPage::new`] writes to it.
//! 3. Per VP of a guest: a page, [`Evmcs::new`], [`Evmcs::set_context`] before the first entry when flushes are to be
//!    direct, the fields by [`Evmcs::write`].
//! 4. Per entry: [`AssistPage::set_current`], VMLAUNCH the first time, VMRESUME after; no VMPTRLD.
//! 5. Before the page is used on another VP, or freed: VMCLEAR of it on the VP where it is active.

use core::sync::atomic::{AtomicU64, Ordering};

use hvcore::addr::L1Gpa;
use tlfs_abi::assist::vp_assist_offset;
use tlfs_abi::cpuid::{NestedOptimizationsEax, NestedOptimizationsEbx, RecommendationsEax};
use tlfs_abi::evmcs::{CleanFields, EVMCS_VERSION, EnlightenedVmcs, EvmcsEnlightenmentsControl, EvmcsUse};

use crate::field::Field;

/// A page of L1's memory that L0 reads and writes.
pub type SharedPage = [AtomicU64; 512];

/// What the host offers a nested hypervisor on VT-x, from its CPUID leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvmcsOffer {
    /// 0x40000004 EAX bit 14 and 0x4000000A EAX bits 15:0: version 1 of the enlightened VMCS.
    pub evmcs: bool,
    /// 0x4000000A EAX bit 17: direct virtual flush.
    pub direct_flush: bool,
    /// 0x4000000A EAX bit 19: the enlightened MSR bitmap.
    pub msr_bitmap: bool,
    /// 0x4000000A EAX bit 21: guest IA32_DEBUGCTL may be other than zero.
    pub guest_debugctl: bool,
    /// 0x4000000A EBX bit 0: guest and host IA32_PERF_GLOBAL_CTRL.
    pub perf_global_ctrl: bool,
}

impl EvmcsOffer {
    /// Reads the offer: EAX of 0x40000004, EAX and EBX of 0x4000000A (0 where the host has no such leaf). Without the
    /// enlightened VMCS nothing else counts.
    pub fn from_leaves(recommendations_eax: u32, nested_eax: u32, nested_ebx: u32) -> Self {
        let nested = NestedOptimizationsEax::new(nested_eax);
        let versions = u32::from(nested.evmcs_version_low())..=u32::from(nested.evmcs_version_high());
        if !RecommendationsEax::new(recommendations_eax).enlightened_vmcs() || !versions.contains(&EVMCS_VERSION) {
            return Self::default();
        }
        Self {
            evmcs: true,
            direct_flush: nested.direct_virtual_flush(),
            msr_bitmap: nested.enlightened_msr_bitmap(),
            guest_debugctl: nested.nonzero_guest_debug_ctl(),
            perf_global_ctrl: NestedOptimizationsEbx::new(nested_ebx).perf_global_ctrl(),
        }
    }
}

/// The field has no place in the enlightened VMCS, version 1: the control that needs it must stay off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotCarried;

/// The nested part of one VP's assist page. The page is enabled by HV_X64_MSR_VP_ASSIST_PAGE.
#[derive(Debug)]
pub struct AssistPage<'a> {
    page: &'a SharedPage,
}

impl<'a> AssistPage<'a> {
    /// The page, with no enlightened VMCS announced and no direct flush granted. The rest of it stays as it is.
    pub fn new(page: &'a SharedPage) -> Self {
        let mut assist = Self { page };
        assist.set_current(None);
        assist.grant_direct_flush(false);
        assist
    }

    /// CurrentNestedVmcs and EnlightenVmEntry: the next VM entries of this VP use the page at `gpa`, or with `None` the
    /// VMCS that VMPTRLD made current.
    #[inline]
    pub fn set_current(&mut self, gpa: Option<L1Gpa>) {
        if let Some(gpa) = gpa {
            store(self.page, vp_assist_offset::CURRENT_NESTED_VMCS as usize, 8, gpa.raw());
        }
        store(self.page, vp_assist_offset::ENLIGHTEN_VM_ENTRY as usize, 1, u64::from(gpa.is_some()));
    }

    /// DirectHypercall: L0 may serve flush hypercalls of the guests on this VP. Each guest's enlightened VMCS decides for
    /// itself with [`Evmcs::set_direct_flush`].
    pub fn grant_direct_flush(&mut self, grant: bool) {
        let old = load(self.page, vp_assist_offset::NESTED_FEATURES as usize, 4);
        store(self.page, vp_assist_offset::NESTED_FEATURES as usize, 4, old & !1 | u64::from(grant));
    }
}

/// What L1 must do before a direct flush can be turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoContext;

/// An enlightened VMCS, as L1 writes it.
///
/// A write that changes a field clears the clean bit of the field's group and no other; L0 sets the bits again when it
/// has read the groups.
#[derive(Debug)]
pub struct Evmcs<'a> {
    page: &'a SharedPage,
    gpa: L1Gpa,
}

const CLEAN_FIELDS: usize = core::mem::offset_of!(EnlightenedVmcs, clean_fields);
const CONTROL: usize = core::mem::offset_of!(EnlightenedVmcs, enlightenments_control);
const VP_ID: usize = core::mem::offset_of!(EnlightenedVmcs, vp_id);
const VM_ID: usize = core::mem::offset_of!(EnlightenedVmcs, vm_id);
const PARTITION_ASSIST: usize = core::mem::offset_of!(EnlightenedVmcs, partition_assist_page);

impl<'a> Evmcs<'a> {
    /// A new enlightened VMCS in the page at `gpa`, which is active on no VP: all zero but the version, nothing clean.
    pub fn new(page: &'a SharedPage, gpa: L1Gpa) -> Self {
        for word in page {
            word.store(0, Ordering::Relaxed);
        }
        store(page, 0, 4, u64::from(EVMCS_VERSION));
        Self { page, gpa }
    }

    /// Where the page is, for [`AssistPage::set_current`] and VMCLEAR.
    #[inline]
    pub const fn gpa(&self) -> L1Gpa {
        self.gpa
    }

    /// VMREAD: the value of `field`.
    #[inline]
    pub fn read(&self, field: Field) -> Result<u64, NotCarried> {
        let place = field.evmcs().ok_or(NotCarried)?;
        Ok(load(self.page, usize::from(place.offset), place.size))
    }

    /// VMWRITE of `value`, cut to the field's width, and the clean bit of its group cleared if it is another value.
    #[inline]
    pub fn write(&mut self, field: Field, value: u64) -> Result<(), NotCarried> {
        let place = field.evmcs().ok_or(NotCarried)?;
        let group = match place.usage {
            EvmcsUse::Group(group) => group,
            EvmcsUse::ReadOnly => CleanFields::NONE,
            EvmcsUse::Unmapped => return Err(NotCarried),
        };
        self.put(usize::from(place.offset), place.size, value & field.mask(), group);
        Ok(())
    }

    #[inline]
    fn put(&mut self, offset: usize, size: u8, value: u64, group: u32) {
        if load(self.page, offset, size) != value {
            store(self.page, offset, size, value);
            self.soil(group);
        }
    }

    /// Clears clean bits.
    #[inline]
    fn soil(&mut self, groups: u32) {
        let clean = load(self.page, CLEAN_FIELDS, 4);
        if clean & u64::from(groups) != 0 {
            store(self.page, CLEAN_FIELDS, 4, clean & !u64::from(groups));
        }
    }

    /// The clean fields as they are.
    #[inline]
    pub fn clean_fields(&self) -> CleanFields {
        CleanFields::new(load(self.page, CLEAN_FIELDS, 4) as u32)
    }

    /// Everything is to be read at the next entry: after VMCLEAR, or when the page was written by other means.
    pub fn reload(&mut self) {
        self.soil(CleanFields::ALL);
    }

    /// Names the nested context that direct flushes go by: the guest `vm_id`, its virtual processor `vp_id`, and the
    /// guest's partition assist page (zeroed, page aligned). To be called before the first entry and on every change.
    pub fn set_context(&mut self, vm_id: u64, vp_id: u32, partition_assist_page: L1Gpa) {
        let group = CleanFields::ENLIGHTENMENTSCONTROL;
        self.put(VM_ID, 8, vm_id, group);
        self.put(VP_ID, 4, u64::from(vp_id), group);
        self.put(PARTITION_ASSIST, 8, partition_assist_page.raw(), group);
    }

    /// NestedFlushVirtualHypercall: L0 serves the guest's flush hypercalls, where [`AssistPage::grant_direct_flush`]
    /// allows it on the VP. Refused while [`set_context`](Self::set_context) has named no partition assist page.
    pub fn set_direct_flush(&mut self, on: bool) -> Result<(), NoContext> {
        if on && load(self.page, PARTITION_ASSIST, 8) == 0 {
            return Err(NoContext);
        }
        let mut control = self.control();
        control.set_nested_flush_virtual_hypercall(on);
        self.set_control(control);
        Ok(())
    }

    /// MsrBitmap: L0 takes changes of the MSR bitmap's contents from [`msr_bitmap_changed`](Self::msr_bitmap_changed)
    /// only. For hosts that offer it.
    pub fn set_enlightened_msr_bitmap(&mut self, on: bool) {
        let mut control = self.control();
        control.set_msr_bitmap(on);
        self.set_control(control);
        self.msr_bitmap_changed();
    }

    /// The contents of the MSR bitmap changed.
    #[inline]
    pub fn msr_bitmap_changed(&mut self) {
        self.soil(CleanFields::MSR_BITMAP);
    }

    fn control(&self) -> EvmcsEnlightenmentsControl {
        EvmcsEnlightenmentsControl::new(load(self.page, CONTROL, 4) as u32)
    }

    fn set_control(&mut self, control: EvmcsEnlightenmentsControl) {
        self.put(CONTROL, 4, u64::from(control.raw()), CleanFields::ENLIGHTENMENTSCONTROL);
    }
}

/// Where `size` bytes at `offset`, naturally aligned, lie in their word: the shift, and their mask at bit 0.
#[inline]
const fn part(offset: usize, size: u8) -> (u32, u64) {
    let mask = if size < 8 { 1u64.wrapping_shl(8u32.wrapping_mul(size as u32)).wrapping_sub(1) } else { u64::MAX };
    (((offset & 7) as u32).wrapping_mul(8), mask)
}

#[inline]
fn load(page: &SharedPage, offset: usize, size: u8) -> u64 {
    let (shift, mask) = part(offset, size);
    let word = page.get(offset >> 3).map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed)));
    word.wrapping_shr(shift) & mask
}

#[inline]
fn store(page: &SharedPage, offset: usize, size: u8, value: u64) {
    let (shift, mask) = part(offset, size);
    let Some(word) = page.get(offset >> 3) else { return };
    // Nobody else writes while L1 runs on this VP, so the word may be taken, changed and put back.
    let rest = u64::from_le(word.load(Ordering::Relaxed)) & !mask.wrapping_shl(shift);
    word.store((rest | (value & mask).wrapping_shl(shift)).to_le(), Ordering::Relaxed);
}
