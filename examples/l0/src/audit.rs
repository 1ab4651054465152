//! The TLB auditor: what the processors' TLBs may hold if they never forget anything by themselves.
//!
//! Emulated processors empty their TLB at every world switch and so forgive every missing invalidation. The auditor
//! does not: it sits between the run loop and VMRUN, remembers for each processor under which ASID which context has
//! run, and ends the run when a context is entered
//!
//! - under an ASID that another context has used without a flush since;
//! - under an ASID that it has used itself, with a flush request completed, or a shadow entry taken away or weakened,
//!   since the ASID was last flushed;
//!
//! or when a flush request is called complete while a target still runs on translations from before it. It takes the
//! word of nobody: what changed in the shadow tables it finds by comparing them with its own copy.
//!
//! On VT-x a VPID is what an ASID is here, and INVVPID what TLB_CONTROL is. What hardware remembers of second-stage
//! tables it forgets by INVEPT of their root alone.
//!
//! On with `audit` on L0's command line. Called by the run loop and the flush path; calls nothing of them.

use hvcore::addr::Level;
use spin::{Mutex, MutexGuard};

use crate::fatal::give_up;
use crate::memory::phys_to_virt;

/// Processors, and VPs: one for one here.
const CPUS: usize = 16;
/// ASIDs that are modelled; the emulators have 16.
const ASIDS: usize = 64;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Permissions that an entry gives when set: writable, user; of EPT readable (where the other format has "present"),
/// writable, executable.
const GIVEN: u64 = 1 << 1 | 1 << 2;
const EPT_GIVEN: u64 = PRESENT | GIVEN;
/// The permission that an entry takes away when set: no-execute.
const TAKEN: u64 = 1 << 63;

/// Who runs under an ASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The VP.
    pub vp: usize,
    /// Which of its levels.
    pub level: Level,
    /// What tells nested contexts of one VP apart: VM_ID, VP_ID, L1's ASID and nCR3.
    pub nested: (u64, u32, u32, u64),
    /// The root that the hardware walks.
    pub root: u64,
}

/// What VMRUN is told.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The processor.
    pub cpu: usize,
    /// Who is entered.
    pub context: Context,
    /// ASID field of the VMCB.
    pub asid: u32,
    /// TLB_CONTROL field of the VMCB; on VT-x its counterpart: 1 all VPIDs, 3 this one.
    pub tlb_control: u8,
    /// On VT-x, whether INVEPT of the root has been executed since the last entry. Elsewhere the ASID's flush counts.
    pub invept: Option<bool>,
}

/// One ASID of one processor.
#[derive(Clone, Copy, Debug)]
struct Tag {
    /// Who has run under it since it was last empty.
    owner: Option<Context>,
    /// When it was last empty.
    empty_at: u64,
}

/// A copy of one page of shadow tables, as it was at the last entry.
#[repr(C, align(4096))]
struct Copy {
    words: [u64; 512],
}

/// The tables that a VP's L2 ran on last.
struct Snapshot {
    pages: &'static mut [Copy],
    addresses: &'static mut [u64],
    used: usize,
    asid: u32,
    root: u64,
}

struct Auditor {
    on: bool,
    /// Counts what happens; every event has a number of its own.
    clock: u64,
    tags: [[Tag; ASIDS]; CPUS],
    running: [Option<(Context, u32)>; CPUS],
    /// The tags as they were before an entry that flushes, for the case that VMRUN is refused.
    before: [[Tag; ASIDS]; CPUS],
    flushing: [bool; CPUS],
    /// When the last completed request for L1 and for L2 of each VP was made.
    due: [[u64; 2]; CPUS],
    /// VM_ID and VP_ID of the nested context that each VP entered last.
    last: [Option<(u64, u32)>; CPUS],
    snapshots: [Option<Snapshot>; CPUS],
    entries: u64,
    requests: u64,
}

// In static memory from the start: it is larger than a stack.
static AUDITOR: Mutex<Auditor> = Mutex::new(Auditor {
    on: false,
    clock: 1,
    tags: [[Tag { owner: None, empty_at: 0 }; ASIDS]; CPUS],
    running: [None; CPUS],
    before: [[Tag { owner: None, empty_at: 0 }; ASIDS]; CPUS],
    flushing: [false; CPUS],
    due: [[0; 2]; CPUS],
    last: [None; CPUS],
    snapshots: [const { None }; CPUS],
    entries: 0,
    requests: 0,
});

/// Turns the auditor on for `cpus` processors whose shadows have at most `pages` pages each.
pub fn start(cpus: usize, pages: usize) {
    let mut auditor = AUDITOR.lock();
    for slot in auditor.snapshots.iter_mut().take(cpus) {
        // SAFETY: zero is valid for words and addresses.
        let memory = unsafe {
            rt::frames::allocate_slice::<Copy>(pages, 4096).zip(rt::frames::allocate_slice::<u64>(pages, 4096))
        };
        let Some((pages, addresses)) = memory else { give_up(format_args!("no memory for the auditor")) };
        *slot = Some(Snapshot { pages, addresses, used: 0, asid: 0, root: 0 });
    }
    auditor.on = true;
}

/// The auditor, when it is on.
fn auditor() -> Option<MutexGuard<'static, Auditor>> {
    let auditor = AUDITOR.lock();
    auditor.on.then_some(auditor)
}

/// Right before VMRUN, GIF clear.
pub fn enter(run: &Run) {
    if let Some(mut auditor) = auditor() {
        auditor.enter(run);
    }
}

/// Right after #VMEXIT, GIF clear. `entered`: VMRUN was not refused.
pub fn leave(cpu: usize, entered: bool) {
    if let Some(mut auditor) = auditor() {
        auditor.leave(cpu, entered);
    }
}

/// A flush request: when it was made, and of whom.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    at: u64,
    level: Level,
    /// Bit n: VP n.
    vps: u32,
}

/// A flush of `level` is about to be requested of the VPs that `names` names: by VP index for L1; for L2 those whose
/// last nested context has the caller's `vm_id`, by its VP_ID.
pub fn request(level: Level, vm_id: u64, names: impl Fn(u32) -> bool) -> Option<Request> {
    auditor().map(|mut auditor| auditor.request(level, vm_id, names))
}

/// The request is complete: nothing may use what it flushed.
pub fn complete(request: Request) {
    if let Some(mut auditor) = auditor() {
        auditor.complete(request);
    }
}

/// Entries and requests so far, when the auditor is on.
pub fn counts() -> Option<(u64, u64)> {
    auditor().map(|auditor| (auditor.entries, auditor.requests))
}

const fn index(level: Level) -> usize {
    match level {
        Level::L1 => 0,
        Level::L2 => 1,
    }
}

impl Auditor {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn enter(&mut self, run: &Run) {
        let now = self.tick();
        self.entries += 1;
        let Run { cpu, context, asid, tlb_control, invept } = *run;
        if asid == 0 || asid as usize >= ASIDS {
            give_up(format_args!("audit: {context:x?} enters with ASID {asid}"));
        }
        self.flushing[cpu] = tlb_control != 0;
        if self.flushing[cpu] {
            self.before[cpu] = self.tags[cpu];
        }
        match tlb_control {
            0 => {}
            1 => self.tags[cpu].fill(Tag { owner: None, empty_at: now }),
            3 | 7 => self.tags[cpu][asid as usize] = Tag { owner: None, empty_at: now },
            _ => give_up(format_args!("audit: TLB_CONTROL {tlb_control:#x} is reserved")),
        }
        let tag = &mut self.tags[cpu][asid as usize];
        match tag.owner {
            Some(owner) if owner != context => {
                give_up(format_args!("audit: ASID {asid} of {owner:x?} is entered by {context:x?} without a flush"))
            }
            Some(_) if self.due[context.vp][index(context.level)] > tag.empty_at => {
                give_up(format_args!("audit: {context:x?} enters on translations from before a flush request"))
            }
            _ => {}
        }
        let fresh = tag.owner.is_none();
        if fresh {
            // Nobody has used the ASID since it was emptied: it is empty still.
            tag.empty_at = now;
        }
        tag.owner = Some(context);
        self.running[cpu] = Some((context, asid));
        if context.level == Level::L1 {
            return;
        }
        self.last[context.vp] = Some((context.nested.0, context.nested.1));
        if let Some(snapshot) = self.snapshots[context.vp].as_mut() {
            let remembered = match invept {
                None => !fresh && snapshot.asid == asid,
                Some(done) => !done && snapshot.root == context.root,
            };
            if remembered {
                snapshot.compare(&context, invept.is_some());
            }
            snapshot.take(context.root, asid, invept.is_some());
        }
    }

    fn leave(&mut self, cpu: usize, entered: bool) {
        self.running[cpu] = None;
        // A refused VMRUN flushes nothing that one could count on.
        if !entered && self.flushing[cpu] {
            self.tags[cpu] = self.before[cpu];
        }
    }

    fn request(&mut self, level: Level, vm_id: u64, names: impl Fn(u32) -> bool) -> Request {
        self.requests += 1;
        let at = self.tick();
        let named = |vp: usize| match level {
            Level::L1 => names(vp as u32),
            Level::L2 => self.last[vp].is_some_and(|(vm, id)| vm == vm_id && names(id)),
        };
        let vps = (0..CPUS).filter(|vp| named(*vp)).fold(0, |vps, vp| vps | 1 << vp);
        Request { at, level, vps }
    }

    fn complete(&mut self, request: Request) {
        let named = |vp: usize| request.vps >> vp & 1 != 0;
        for (_, due) in self.due.iter_mut().enumerate().filter(|(vp, _)| named(*vp)) {
            let due = &mut due[index(request.level)];
            *due = request.at.max(*due);
        }
        for (cpu, running) in self.running.iter().enumerate() {
            if let Some((context, asid)) = running
                && context.level == request.level
                && named(context.vp)
                && self.tags[cpu][*asid as usize].empty_at < request.at
            {
                give_up(format_args!("audit: a flush request is complete while {context:x?} runs on from before it"));
            }
        }
    }
}

impl Snapshot {
    /// Ends the run if the tables took away or weakened what they gave at the last entry under this ASID or root.
    fn compare(&self, context: &Context, ept: bool) {
        for (page, address) in self.pages.iter().zip(self.addresses.iter()).take(self.used) {
            let now = table(*address);
            for (n, old) in page.words.iter().enumerate() {
                // SAFETY: `table` leads to a page of 512 entries.
                let new = unsafe { now.add(n).read_volatile() };
                if weaker(*old, new, ept) {
                    give_up(format_args!(
                        "audit: {context:x?} enters without a flush though entry {n} of the table at {address:#x} \
                         went from {old:#x} to {new:#x}"
                    ));
                }
            }
        }
    }

    /// Copies the tables below `root`.
    fn take(&mut self, root: u64, asid: u32, ept: bool) {
        let present = if ept { EPT_GIVEN } else { PRESENT };
        self.asid = asid;
        self.root = root;
        self.used = 0;
        // Tables are pushed behind those that lead to them, level by level: 4, 3, 2, 1.
        let mut level_end = 0;
        self.push(root);
        for level in (1..=4u32).rev() {
            let (start, end) = (level_end, self.used);
            level_end = end;
            for at in start..end {
                let now = table(self.addresses[at]);
                for n in 0..512 {
                    // SAFETY: `table` leads to a page of 512 entries.
                    let entry = unsafe { now.add(n).read_volatile() };
                    self.pages[at].words[n] = entry;
                    if level > 1 && entry & present != 0 && entry & LARGE == 0 {
                        self.push(entry & ADDRESS);
                    }
                }
            }
        }
    }

    fn push(&mut self, address: u64) {
        // Tables beyond the shadow's own pages cannot be: if they are, they are not watched.
        if let Some(slot) = self.addresses.get_mut(self.used) {
            *slot = address;
            self.used += 1;
        }
    }
}

fn table(address: u64) -> *const u64 {
    phys_to_virt::<u64>(address)
}

/// True when a translation that `old` gave is not what `new` gives.
const fn weaker(old: u64, new: u64, ept: bool) -> bool {
    if ept {
        return old & EPT_GIVEN != 0 && ((old ^ new) & (ADDRESS | LARGE) != 0 || old & EPT_GIVEN & !new != 0);
    }
    old & PRESENT != 0
        && (new & PRESENT == 0
            || (old ^ new) & (ADDRESS | LARGE) != 0
            || old & GIVEN & !new != 0
            || new & TAKEN & !old != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weaker_is_what_a_stale_entry_could_show() {
        let old = 0x5000 | PRESENT | 2 | 4;
        assert!(!weaker(old, old, false));
        assert!(!weaker(0, old, false));
        assert!(!weaker(old & !2, old, false), "gaining a permission needs no flush");
        assert!(!weaker(old, old | 1 << 5 | 1 << 6, false), "accessed and dirty are not permissions");
        assert!(weaker(old, 0, false));
        assert!(weaker(old, old & !2, false));
        assert!(weaker(old, old & !4, false));
        assert!(weaker(old, old | TAKEN, false));
        assert!(!weaker(old | TAKEN, old, false));
        assert!(weaker(old, old + 0x1000, false));
        assert!(weaker(old, old | LARGE, false));
    }

    #[test]
    fn ept_may_be_executable_and_nothing_else() {
        let old = 0x5000 | 1 << 2;
        assert!(!weaker(old, old | 1, true));
        assert!(weaker(old, 0x5000 | 1, true));
        assert!(weaker(old, 0, true));
        assert!(!weaker(0x5000, 0x6000, true), "nothing was given");
        assert!(weaker(old, old + 0x1000, true));
        assert!(!weaker(old | TAKEN, old, true) && !weaker(old, old | TAKEN, true), "the bit has no say in EPT");
    }
}
