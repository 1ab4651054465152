//! A load of TLB shootdowns for L2, and a check for stale translations.
//!
//! `workload THREADS PAGES REPEATS`: every thread maps PAGES pages, touches and unmaps them, REPEATS times with tiny
//! random sleeps; each unmapping makes the kernel flush the other processors. Beside them one thread maps another page
//! at one address again and again, and one reads there: it must never see the old page once the new one is in place.
//! The last line is `workload: passed` or `workload: FAILED`.

use std::process::ExitCode;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// Maps anonymous memory, touches every page, unmaps it.
fn churn(pages: usize) -> Result<(), String> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory.
    let memory = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err("no memory".into());
    }
    for page in 0..pages {
        // SAFETY: inside the mapping.
        unsafe { memory.cast::<u8>().add(page * PAGE).write_volatile(page as u8) };
    }
    // SAFETY: the mapping made above, which nothing else uses.
    match unsafe { libc::munmap(memory, pages * PAGE) } {
        0 => Ok(()),
        _ => Err("munmap failed".into()),
    }
}

/// Sleeps 0 to 63 microseconds.
fn nap(random: &mut u64) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    thread::sleep(Duration::from_micros(*random & 63));
}

/// One address behind which two pages of a file take turns.
struct Switched {
    file: i32,
    address: *mut libc::c_void,
    /// The generation that every read after now must see at least.
    epoch: AtomicU64,
    stop: AtomicBool,
}

// SAFETY: the address is only ever mapped anew as a whole, and read by volatile loads.
unsafe impl Sync for Switched {}

impl Switched {
    fn new() -> Result<Self, String> {
        // SAFETY: a name that ends in zero.
        let file = unsafe { libc::memfd_create(c"pages".as_ptr(), 0) };
        // SAFETY: a file of this process.
        if file < 0 || unsafe { libc::ftruncate(file, 2 * PAGE as i64) } != 0 {
            return Err("no memory file".into());
        }
        let address = map(ptr::null_mut(), file, 0)?;
        Ok(Self { file, address, epoch: AtomicU64::new(0), stop: AtomicBool::new(false) })
    }

    /// Writes `generation` to the other page and puts it at the address.
    fn switch(&self, generation: u64) -> Result<(), String> {
        let offset = (generation & 1) as i64 * PAGE as i64;
        // SAFETY: 8 bytes of this frame, into the file.
        let written = unsafe { libc::pwrite(self.file, ptr::from_ref(&generation).cast(), 8, offset) };
        if written != 8 {
            return Err("cannot write the page".into());
        }
        map(self.address, self.file, offset)?;
        self.epoch.store(generation, SeqCst);
        Ok(())
    }

    /// Reads until told to stop: reads, and how many saw an old generation.
    fn watch(&self) -> (u64, u64) {
        let (mut reads, mut stale) = (0, 0);
        while !self.stop.load(SeqCst) {
            let epoch = self.epoch.load(SeqCst);
            // SAFETY: always mapped.
            let seen = unsafe { self.address.cast::<u64>().read_volatile() };
            reads += 1;
            stale += u64::from(seen < epoch);
        }
        (reads, stale)
    }
}

fn map(at: *mut libc::c_void, file: i32, offset: i64) -> Result<*mut libc::c_void, String> {
    let fixed = if at.is_null() { 0 } else { libc::MAP_FIXED };
    // SAFETY: a new place, or the one that `Switched` owns.
    let address = unsafe { libc::mmap(at, PAGE, libc::PROT_READ, libc::MAP_SHARED | fixed, file, offset) };
    if address == libc::MAP_FAILED { Err("cannot map the page".into()) } else { Ok(address) }
}

fn run() -> Result<(), String> {
    let mut numbers = std::env::args().skip(1).map(|word| word.parse::<usize>().map_err(|e| format!("{word}: {e}")));
    let mut number = |default| numbers.next().unwrap_or(Ok(default));
    let (threads, pages, repeats) = (number(4)?, number(16_384)?, number(50)?);
    let (switched, start) = (Switched::new()?, Instant::now());
    let (mut switches, mut seen) = (0, (0, 0));
    thread::scope(|scope| -> Result<(), String> {
        let churners: Vec<_> = (0..threads)
            .map(|n| {
                scope.spawn(move || {
                    let mut random = 0x9E37_79B9_7F4A_7C15 ^ n as u64;
                    (0..repeats).try_for_each(|_| {
                        nap(&mut random);
                        churn(pages)
                    })
                })
            })
            .collect();
        let watcher = scope.spawn(|| switched.watch());
        let mut result = Ok(());
        while result.is_ok() && !churners.iter().all(|churner| churner.is_finished()) {
            switches += 1;
            result = switched.switch(switches);
        }
        switched.stop.store(true, SeqCst);
        for churner in churners {
            result = result.and(churner.join().map_err(|_| "a thread panicked")?);
        }
        seen = watcher.join().map_err(|_| "a thread panicked")?;
        result
    })?;
    let ((reads, stale), milliseconds) = (seen, start.elapsed().as_millis());
    println!("workload: {threads} threads, {pages} pages, {repeats} times: {milliseconds} ms");
    println!("workload: {switches} switches, {reads} reads, {stale} stale");
    if stale > 0 { Err(format!("{stale} stale reads")) } else { Ok(()) }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("workload: passed");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("workload: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
