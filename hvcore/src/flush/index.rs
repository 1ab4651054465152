//! Which VPs may hold translations of a nested context: found by VM_ID and VP_ID, or by VM_ID alone.
//!
//! Kept by the VPs at a change of their context, read by initiators; used by `vp.rs` and `domain.rs`. Everything here
//! is a hint that is verified against the VP's own [`VpIdentity`]. What orders an addition is one SeqCst fence on each
//! side, the VP's after its change and before its guest runs, the initiator's before its look-up.
//! If the VP's fence comes first, the initiator sees all of the change; if the initiator's does, the VP's guest sees
//! the page tables as they were written before the flush, and holds nothing stale. What orders a removal is Release on
//! the VP's side and Acquire on the initiator's: one that does not find the VP any more is behind the last use of the
//! translations that the VP gave up.

use super::sync::{AtomicU64, Ordering, const_outside_loom};
use tlfs_abi::vp_set::MAX_VP_INDEX;

/// VM_ID and VP_ID of a nested context, as L1 wrote them into its enlightened VMCS or VMCB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedIds {
    /// The L2 VM. Means nothing outside L1's partition.
    pub vm_id: u64,
    /// The L2 VP. Any value; one at or above 4,096 is reached only by a flush of all processors.
    pub vp_id: u32,
}

/// What tells one set of L2's cached translations from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedContext {
    /// VM_ID and VP_ID, wherever L1's VMCS or VMCB has them, direct flush on or off; `None` where there are no such
    /// fields: then no direct flush means this context.
    pub ids: Option<NestedIds>,
    /// L1's tag for it: the ASID of the VMCB, the VPID of the VMCS (0 without VPID).
    pub tag: u64,
    /// L1's second-stage root: nCR3 or EPTP as L1 wrote it (0 without one).
    pub root: u64,
}

/// The ids a VP is found by.
#[derive(Debug)]
pub struct VpIdentity {
    vm_id: AtomicU64,
    /// VP_ID + 1, or zero when there is no context.
    vp_id: AtomicU64,
}

/// How a VP_ID is kept.
#[inline]
const fn key(vp_id: u32) -> u64 {
    (vp_id as u64).wrapping_add(1)
}

impl VpIdentity {
    const_outside_loom! {
        pub(super) fn new() -> Self {
            Self { vm_id: AtomicU64::new(0), vp_id: AtomicU64::new(0) }
        }
    }

    pub(super) fn publish(&self, ids: NestedIds) {
        self.vm_id.store(ids.vm_id, Ordering::Release);
        self.vp_id.store(key(ids.vp_id), Ordering::Relaxed);
    }

    pub(super) fn withdraw(&self) {
        self.vp_id.store(0, Ordering::Release);
    }

    /// True when the VP's context has this VM_ID. (Of a VP without a context, any answer is right.)
    #[inline]
    pub(super) fn is_of_vm(&self, vm_id: u64) -> bool {
        self.vm_id.load(Ordering::Acquire) == vm_id
    }

    /// True when the VP's context has these ids.
    #[inline]
    pub(super) fn is(&self, vm_id: u64, vp_id: u32) -> bool {
        self.is_of_vm(vm_id) && self.vp_id.load(Ordering::Acquire) == key(vp_id)
    }

    /// The VP_ID, when there is a context.
    #[inline]
    pub(super) fn vp_id(&self) -> Option<u32> {
        self.vp_id.load(Ordering::Acquire).checked_sub(1).map(|vp_id| vp_id as u32)
    }
}

/// Storage of the index does not fit the number of VPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexError {
    /// There are no buckets, or their number is not a power of two.
    Buckets,
    /// There is no room for the bitmaps of two groups, or the number of groups is not a power of two.
    Groups,
    /// More than 4,096 VPs.
    Vps,
}

/// Where a VP's entry in the bucket table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    None,
    Lane(u32),
    Overflow,
}

impl Place {
    pub(super) const NONE: Self = Self::None;
}

/// Lanes of 16 bits in a bucket, each [`TAKEN`] and the slot of a VP, or zero.
const LANES: u32 = 4;
const TAKEN: u64 = 1 << 15;
const SLOT: u16 = 0xFFF;

/// The index, over storage of the embedder. All zero at the start.
///
/// - **Buckets**, one word each, a power of two of them; twice the number of VPs is a good number. VP_ID `n` of a VM is
///   in bucket `hash(VM_ID) + n`, so that the VPs of one VM do not collide. VPs that find their bucket full go into a
///   bitmap that every look-up also reads.
/// - **Groups**, [`group_words`](Self::group_words) words each, a power of two of them, and the first beyond those is
///   the bitmap of the overflow: `(2^n + 1) * group_words` words. A group is a count and a bitmap of the VPs whose
///   VM_ID hashes to it.
#[derive(Clone, Copy, Debug)]
pub struct TargetIndex<'a> {
    buckets: &'a [AtomicU64],
    groups: &'a [AtomicU64],
    overflow: &'a [AtomicU64],
    group_words: usize,
    group_mask: u64,
    bucket_mask: u64,
}

/// Mixes a VM_ID; the upper half is well spread.
#[inline]
const fn mix(vm_id: u64) -> u64 {
    let x = vm_id.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ x >> 32
}

impl<'a> TargetIndex<'a> {
    /// Words of a group's storage for a number of VPs.
    pub const fn group_words(vps: usize) -> usize {
        vps.div_ceil(64).wrapping_add(1)
    }

    /// An index for `vps` VPs.
    pub fn new(vps: usize, buckets: &'a [AtomicU64], groups: &'a [AtomicU64]) -> Result<Self, IndexError> {
        if vps > MAX_VP_INDEX as usize {
            return Err(IndexError::Vps);
        }
        if !buckets.len().is_power_of_two() {
            return Err(IndexError::Buckets);
        }
        let group_words = Self::group_words(vps);
        let Some(own) = groups.len().checked_sub(group_words) else { return Err(IndexError::Groups) };
        let count = own.checked_div(group_words).unwrap_or(0);
        let (Some(overflow), Some(own)) = (groups.get(own..), groups.get(..own)) else {
            return Err(IndexError::Groups);
        };
        if !count.is_power_of_two() || count.checked_mul(group_words) != Some(own.len()) {
            return Err(IndexError::Groups);
        }
        let group_mask = (count as u64).wrapping_sub(1);
        let bucket_mask = (buckets.len() as u64).wrapping_sub(1);
        Ok(Self { buckets, groups: own, overflow, group_words, group_mask, bucket_mask })
    }

    /// The part of the index that is about one VM.
    #[inline]
    pub(super) fn vm(&self, vm_id: u64) -> VmIndex<'a> {
        let base = mix(vm_id);
        let first = ((base >> 32 & self.group_mask) as usize).wrapping_mul(self.group_words);
        let group = self.groups.get(first..first.wrapping_add(self.group_words)).unwrap_or_default();
        VmIndex { buckets: self.buckets, base, mask: self.bucket_mask, group }
    }

    /// Adds the VP in `slot`, under ids that it has published. For the VP itself.
    pub(super) fn insert(&self, slot: u16, ids: NestedIds) -> Place {
        let vm = self.vm(ids.vm_id);
        Self::mark(vm.group, slot, true);
        if ids.vp_id >= MAX_VP_INDEX || u32::from(slot) >= MAX_VP_INDEX {
            return Place::None;
        }
        if let Some(lane) = vm.bucket(ids.vp_id).and_then(|bucket| Self::take_lane(bucket, slot)) {
            return Place::Lane(lane);
        }
        Self::mark(self.overflow, slot, true);
        Place::Overflow
    }

    /// Removes the VP in `slot`, which was inserted at `place` under `ids`. For the VP itself.
    pub(super) fn remove(&self, slot: u16, ids: NestedIds, place: Place) {
        let vm = self.vm(ids.vm_id);
        Self::mark(vm.group, slot, false);
        match (place, vm.bucket(ids.vp_id)) {
            (Place::Lane(lane), Some(bucket)) => {
                bucket.fetch_and(!(0xFFFF << lane.wrapping_mul(16)), Ordering::Release);
            }
            (Place::Overflow, _) => Self::mark(self.overflow, slot, false),
            _ => (),
        }
    }

    /// Puts `slot` into a free lane. Tries anew when others change the bucket meanwhile, a bounded number of times.
    fn take_lane(bucket: &AtomicU64, slot: u16) -> Option<u32> {
        let mut seen = bucket.load(Ordering::Relaxed);
        for _ in 0..16 {
            let lane = (0..LANES).find(|lane| seen >> lane.wrapping_mul(16) & 0xFFFF == 0)?;
            let new = seen | (TAKEN | u64::from(slot & SLOT)) << lane.wrapping_mul(16);
            match bucket.compare_exchange(seen, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(lane),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Sets or clears the slot's bit in a group, and counts.
    fn mark(group: &[AtomicU64], slot: u16, present: bool) {
        let Some((count, words)) = group.split_first() else { return };
        let Some(word) = words.get(usize::from(slot >> 6)) else { return };
        let bit = 1u64 << (slot & 63);
        if present {
            word.fetch_or(bit, Ordering::Relaxed);
            count.fetch_add(1, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Release);
            count.fetch_sub(1, Ordering::Release);
        }
    }

    /// The bitmap of slots that found their bucket full, or nothing when there is none.
    #[inline]
    pub(super) fn overflow(&self) -> &'a [AtomicU64] {
        match self.overflow.split_first() {
            Some((count, words)) if count.load(Ordering::Acquire) != 0 => words,
            _ => &[],
        }
    }
}

/// The index of one VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct VmIndex<'a> {
    buckets: &'a [AtomicU64],
    base: u64,
    mask: u64,
    group: &'a [AtomicU64],
}

impl<'a> VmIndex<'a> {
    #[inline]
    fn bucket(&self, vp_id: u32) -> Option<&'a AtomicU64> {
        self.buckets.get((self.base.wrapping_add(u64::from(vp_id)) & self.mask) as usize)
    }

    /// Number of VPs in the VM's group: at least those of the VM.
    #[inline]
    pub(super) fn count(&self) -> u64 {
        self.group.first().map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The bitmap of slots that may be of this VM.
    #[inline]
    pub(super) fn slots(&self) -> &'a [AtomicU64] {
        self.group.get(1..).unwrap_or_default()
    }

    /// Hands `each` the slots that may have this VP_ID, the overflow excepted.
    #[inline(always)]
    pub(super) fn named(&self, vp_id: u32, mut each: impl FnMut(u16)) {
        let Some(bucket) = self.bucket(vp_id) else { return };
        let mut lanes = bucket.load(Ordering::Acquire);
        while lanes != 0 {
            // An empty lane below a full one reads as slot 0, which is verified like any other.
            each(lanes as u16 & SLOT);
            lanes >>= 16;
        }
    }
}
