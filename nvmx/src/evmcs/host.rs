//! L0's half of the enlightened VMCS: L1's page to VMCS12 at VM entry, VMCS12 to L1's page after an exit.
//!
//! Called by VMLAUNCH, VMRESUME, VMCLEAR and the exits to L1; reads and writes the page through [`GuestMemory`], in
//! whole words of 8 bytes where it reads, byte-exact where it writes: what an exit does not save is L1's alone.
//!
//! No byte is read twice in one entry. The copies in `image` follow L1's memory word by word; a field goes on to the
//! VMCS12 only when its group is not clean, so that a group is either wholly the old one or wholly the new.

use core::sync::atomic::{AtomicU64, Ordering};

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use tlfs_abi::assist::vp_assist_offset;
use tlfs_abi::evmcs::{CleanFields, EVMCS_VERSION, EnlightenedVmcs, EvmcsEnlightenmentsControl};
use zerocopy::IntoBytes;

use super::active::{ActivePage, Claim};
use super::layout::{GROUP_WORDS, put, take, take_groups};
use crate::field::Field;
use crate::groups::{self, Groups};
use crate::vmcs12::{REVISION, Vmcs12};

/// Offset of VersionNumber.
const VERSION: usize = core::mem::offset_of!(EnlightenedVmcs, version_number);
/// Offset of CleanFields.
const CLEAN_FIELDS: u64 = core::mem::offset_of!(EnlightenedVmcs, clean_fields) as u64;
/// Offset of the VM-instruction error.
const INSTRUCTION_ERROR: u64 = core::mem::offset_of!(EnlightenedVmcs, exit_instruction_error) as u64;
/// The words from TprThreshold's to PartitionAssistPage's: what is read at every entry, the version apart.
const LIVE: core::ops::Range<usize> = 0x328..0x360;

static_assertions::const_assert_eq!(VERSION, 0);
static_assertions::const_assert!(core::mem::offset_of!(EnlightenedVmcs, tpr_threshold) >= LIVE.start);
static_assertions::const_assert_eq!(core::mem::offset_of!(EnlightenedVmcs, reserved_360), LIVE.end);

/// The words of [`LIVE`] and of the version, as bits.
const READ_ALWAYS: u128 = 1 | 0x7F << (LIVE.start >> 3);

/// The synthetic fields of the enlightened VMCS that was entered last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enlightenments {
    /// EnlightenmentsControl.
    pub control: EvmcsEnlightenmentsControl,
    /// VpId: which VP of the nested VM this is.
    pub vp_id: u32,
    /// VmId: which nested VM this is.
    pub vm_id: u64,
    /// PartitionAssistPage, an L1 GPA as L1 wrote it.
    pub partition_assist_page: u64,
}

/// Why VMLAUNCH or VMRESUME cannot use L1's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The GPA is not page aligned, or L1 has no memory there: #UD, as Linux's KVM answers.
    Unreadable,
    /// L2 runs on the page on another VP: VMfailInvalid.
    Busy,
    /// VersionNumber is neither 1 nor the revision identifier of IA32_VMX_BASIC: VMfailInvalid.
    Revision,
}

impl From<MemoryError> for LoadError {
    fn from(_: MemoryError) -> Self {
        Self::Unreadable
    }
}

/// What a load brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The groups whose fields in the VMCS12 were replaced; [`groups::OTHER`] when that is true of all fields or of the
    /// TPR threshold. Guest RIP is replaced at every load.
    pub changed: Groups,
    /// The page was not the one in use, or VMLAUNCH asked for everything: the VMCS12 is a new one.
    pub reloaded: bool,
}

/// The GPA of the enlightened VMCS that L1's next VM entry is to use: CurrentNestedVmcs, while EnlightenVmEntry is set.
/// `assist` is L1's VP assist page; one that cannot be read counts as one that asks for nothing. Reads 16 bytes.
#[inline]
pub fn current_evmcs<M: GuestMemory + ?Sized>(memory: &M, assist: Option<L1Gpa>) -> Option<L1Gpa> {
    const { assert!(vp_assist_offset::CURRENT_NESTED_VMCS == vp_assist_offset::ENLIGHTEN_VM_ENTRY + 8) };
    let mut head = [0u8; 16];
    memory.read(assist?.checked_add(vp_assist_offset::ENLIGHTEN_VM_ENTRY)?, &mut head).ok()?;
    let [enlighten, gpa @ ..] = head;
    let gpa = gpa.last_chunk::<8>().copied().map_or(0, u64::from_le_bytes);
    (enlighten != 0).then(|| L1Gpa::new(gpa))
}

/// L0's copy of the enlightened VMCS that is active on one VP.
#[derive(Clone, Debug)]
pub struct EvmcsCache {
    /// The active page. `None` when there is none, or when the copies must not be trusted.
    gpa: Option<L1Gpa>,
    /// L1's memory as last read or written, as far as it was.
    image: EnlightenedVmcs,
    /// The page is claimed in the partition's table, with L2 running on it.
    claimed: bool,
    /// `image` says nothing about memory: the next store writes all of its ranges.
    image_unknown: bool,
    enlightenments: Enlightenments,
}

impl Default for EvmcsCache {
    fn default() -> Self {
        Self::new()
    }
}

impl EvmcsCache {
    /// No enlightened VMCS is active.
    pub const fn new() -> Self {
        Self {
            gpa: None,
            image: EnlightenedVmcs::ZERO,
            claimed: false,
            image_unknown: true,
            enlightenments: Enlightenments {
                control: EvmcsEnlightenmentsControl::new(0),
                vp_id: 0,
                vm_id: 0,
                partition_assist_page: 0,
            },
        }
    }

    /// The page that is active.
    #[inline]
    pub const fn active(&self) -> Option<L1Gpa> {
        self.gpa
    }

    /// The synthetic fields as read at the last entry. They stay while L1 runs: the VP retains its nested context.
    #[inline]
    pub const fn enlightenments(&self) -> &Enlightenments {
        &self.enlightenments
    }

    /// VMCLEAR of the page, VMXOFF, an entry with a plain VMCS: nothing is active, VmId and VpId are forgotten.
    pub const fn release(&mut self) {
        self.gpa = None;
        self.image_unknown = true;
        self.enlightenments = Self::new().enlightenments;
    }

    /// Takes `gpa` as active with the synthetic fields of a saved state; the VMCS12 that goes with it is the saved one.
    /// The next exit writes everything that exits write, the next entry reads everything.
    pub const fn restore(&mut self, gpa: L1Gpa, enlightenments: Enlightenments) {
        self.gpa = Some(gpa);
        // Should L2 be running, the claim of the VP's former life is its own.
        self.claimed = true;
        self.image_unknown = true;
        self.enlightenments = enlightenments;
    }

    /// [`load`](Self::load) for a VM entry on a VP that has `place` in the partition's table: a page that L2 runs on
    /// elsewhere is refused, and one that has been active elsewhere meanwhile is read whole.
    #[inline]
    pub fn enter<M: GuestMemory + ?Sized>(
        &mut self,
        memory: &M,
        place: Option<ActivePage<'_>>,
        gpa: L1Gpa,
        launch: bool,
        vmcs12: &mut Vmcs12,
    ) -> Result<Loaded, LoadError> {
        let claim = match place {
            Some(place) if gpa.page_offset() == 0 => place.pages.claim(place.vp, gpa),
            _ => Claim::Kept,
        };
        if claim == Claim::Refused {
            self.gpa = None;
            return Err(LoadError::Busy);
        }
        self.claimed = place.is_some();
        self.load(memory, gpa, launch || claim == Claim::Taken, vmcs12)
    }

    /// L1 runs again: the page may be used on another VP.
    #[inline]
    pub fn leave(&mut self, place: Option<ActivePage<'_>>) {
        if self.claimed {
            self.claimed = false;
            if let Some(place) = place {
                place.pages.leave(place.vp);
            }
        }
    }

    /// Reads the page at `gpa` into `vmcs12`: version, clean fields and what is always live, then each group that is
    /// not clean. `launch` (VMLAUNCH), another page than the active one or a restored one reads every group and starts
    /// from a VMCS12 of zeroes, so that what the layout lacks is zero.
    ///
    /// On an error nothing is active and `vmcs12` is not to be used.
    #[inline]
    pub fn load<M: GuestMemory + ?Sized>(
        &mut self,
        memory: &M,
        gpa: L1Gpa,
        launch: bool,
        vmcs12: &mut Vmcs12,
    ) -> Result<Loaded, LoadError> {
        let known = self.gpa.take() == Some(gpa) && !self.image_unknown;
        let page = Page::new(memory, gpa)?;
        let image = self.image.as_mut_bytes();
        page.read(image, VERSION..8)?;
        page.read(image, LIVE)?;
        let version = self.image.version_number;
        if version != EVMCS_VERSION && version != REVISION {
            return Err(LoadError::Revision);
        }
        let reloaded = launch || !known;
        let clean = if reloaded { 0 } else { self.image.clean_fields.raw() & CleanFields::ALL };
        let mut changed = if reloaded { groups::ALL } else { CleanFields::ALL & !clean };
        if reloaded {
            *vmcs12 = Vmcs12::default();
        }
        if changed != 0 {
            self.read_groups(&page, changed, vmcs12)?;
        }
        if vmcs12.get32(Field::TprThreshold) != self.image.tpr_threshold {
            changed |= groups::OTHER;
        }
        take::<{ CleanFields::NONE }>(&self.image, vmcs12);
        let image = &self.image;
        self.enlightenments = Enlightenments {
            control: image.enlightenments_control,
            vp_id: image.vp_id,
            vm_id: image.vm_id,
            partition_assist_page: image.partition_assist_page,
        };
        self.gpa = Some(gpa);
        self.image_unknown = false;
        Ok(Loaded { changed, reloaded })
    }

    /// Reads the words of the groups in `changed` that were not read yet, each once, in runs; then takes the fields.
    fn read_groups<M: GuestMemory + ?Sized>(
        &mut self,
        page: &Page<'_, M>,
        changed: Groups,
        vmcs12: &mut Vmcs12,
    ) -> Result<(), MemoryError> {
        let mut words = 0;
        for (group, more) in (0u32..).zip(&GROUP_WORDS) {
            words |= if changed >> group & 1 != 0 { *more } else { 0 };
        }
        words &= !READ_ALWAYS;
        let image = self.image.as_mut_bytes();
        // Each turn takes one run of set bits away.
        while words != 0 {
            let first = words.trailing_zeros();
            let past = first.saturating_add(words.wrapping_shr(first).trailing_ones());
            page.read(image, (first as usize).wrapping_mul(8)..(past as usize).wrapping_mul(8))?;
            words &= u128::MAX.checked_shl(past).unwrap_or(0);
        }
        take_groups(&self.image, changed, vmcs12);
        Ok(())
    }

    /// The entry is prepared: sets all clean bits in L1's page, unless they are.
    #[inline]
    pub fn entered<M: GuestMemory + ?Sized>(&mut self, memory: &M) -> Result<(), MemoryError> {
        let clean = self.image.clean_fields;
        if clean.all_clean(CleanFields::ALL) {
            return Ok(());
        }
        self.image.clean_fields = CleanFields::new(clean.raw() | CleanFields::ALL);
        self.write(memory, CLEAN_FIELDS, &self.image.clean_fields.raw().to_le_bytes())
    }

    /// Writes what an exit to L1 saves of `vmcs12`, guest state and exit information, to L1's page, each range in
    /// one copy: exit information always, guest state that memory does not have already. Between the ranges lies what
    /// is L1's alone.
    pub fn store<M: GuestMemory + ?Sized>(&mut self, memory: &M, vmcs12: &Vmcs12) -> Result<(), MemoryError> {
        let page = Page::new(memory, self.gpa.ok_or(MemoryError)?).map_err(|_| MemoryError)?;
        let all = core::mem::replace(&mut self.image_unknown, true);
        // Exit information, RSP, RFLAGS, interruptibility. What memory has of the first is never read.
        self.store_range::<0x2A8, 0x314, M>(&page, vmcs12, true)?;
        // RIP.
        self.store_range::<0x330, 0x338, M>(&page, vmcs12, all)?;
        // Segments and descriptor tables.
        self.store_range::<0x080, 0x128, M>(&page, vmcs12, all)?;
        // DEBUGCTL to SYSENTER_CS.
        self.store_range::<0x1A8, 0x200, M>(&page, vmcs12, all)?;
        // CR0, CR3, CR4, DR7.
        self.store_range::<0x220, 0x240, M>(&page, vmcs12, all)?;
        // Entry controls (IA-32e mode guest follows EFER.LMA) and the event, which is no longer valid.
        self.store_range::<0x31C, 0x324, M>(&page, vmcs12, all)?;
        // BNDCFGS.
        self.store_range::<0x380, 0x388, M>(&page, vmcs12, all)?;
        self.image_unknown = false;
        Ok(())
    }

    #[inline]
    fn store_range<const FROM: usize, const TO: usize, M: GuestMemory + ?Sized>(
        &mut self,
        page: &Page<'_, M>,
        vmcs12: &Vmcs12,
        always: bool,
    ) -> Result<(), MemoryError> {
        let differ = put::<FROM, TO>(&mut self.image, vmcs12);
        if differ || always { page.write(self.image.as_bytes(), FROM..TO) } else { Ok(()) }
    }

    /// VMfailValid: writes the VM-instruction error of `vmcs12`, nothing else.
    pub fn store_error<M: GuestMemory + ?Sized>(&mut self, memory: &M, vmcs12: &Vmcs12) -> Result<(), MemoryError> {
        let error = vmcs12.get32(Field::InstructionError);
        self.image.exit_instruction_error = error;
        self.write(memory, INSTRUCTION_ERROR, &error.to_le_bytes())
    }

    fn write<M: GuestMemory + ?Sized>(&self, memory: &M, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        memory.write(self.gpa.and_then(|gpa| gpa.checked_add(offset)).ok_or(MemoryError)?, bytes)
    }
}

/// L1's page: in place where the memory lends it, else by copies.
struct Page<'a, M: ?Sized> {
    memory: &'a M,
    gpa: L1Gpa,
    words: Option<&'a [AtomicU64; 512]>,
}

impl<'a, M: GuestMemory + ?Sized> Page<'a, M> {
    #[inline]
    fn new(memory: &'a M, gpa: L1Gpa) -> Result<Self, LoadError> {
        if gpa.page_offset() != 0 {
            return Err(LoadError::Unreadable);
        }
        Ok(Self { memory, gpa, words: memory.page(gpa) })
    }

    /// Reads the bytes at `range`, whole words, to the same place in `image`.
    #[inline]
    fn read(&self, image: &mut [u8], range: core::ops::Range<usize>) -> Result<(), MemoryError> {
        let first = range.start;
        let to = image.get_mut(range).unwrap_or_default();
        let Some(words) = self.words else {
            return self.memory.read(self.gpa.checked_add(first as u64).ok_or(MemoryError)?, to);
        };
        for (to, from) in to.as_chunks_mut::<8>().0.iter_mut().zip(words.get(first >> 3..).unwrap_or_default()) {
            // Relaxed: L1 wrote the page on this VP, before the instruction that enters; no other order is promised.
            *to = from.load(Ordering::Relaxed).to_ne_bytes();
        }
        Ok(())
    }

    /// Writes the bytes at `range`, whole halves of words, from the same place in `image`.
    #[inline]
    fn write(&self, image: &[u8], range: core::ops::Range<usize>) -> Result<(), MemoryError> {
        let Some(words) = self.words else {
            return self.copy_out(image, range);
        };
        // A half at the end shares its word with what is L1's.
        let (from, to) = (range.start.next_multiple_of(8), range.end & !7);
        if range.start < from {
            self.copy_out(image, range.start..from)?;
        }
        let whole = image.get(from..to).unwrap_or_default().as_chunks::<8>().0;
        for (from, to) in whole.iter().zip(words.get(from >> 3..).unwrap_or_default()) {
            // Relaxed: L1 reads the page on this VP, after the entry that follows.
            to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
        if to < range.end { self.copy_out(image, to..range.end) } else { Ok(()) }
    }

    fn copy_out(&self, image: &[u8], range: core::ops::Range<usize>) -> Result<(), MemoryError> {
        let at = self.gpa.checked_add(range.start as u64).ok_or(MemoryError)?;
        self.memory.write(at, image.get(range).unwrap_or_default())
    }
}
