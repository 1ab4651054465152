//! A virtual machine on KVM: memory, processors in long mode, and running them until they halt.

use crate::Result;
use crate::guest::{self, CODE, INPUT, MEMORY, PML4, PORT_ROUND, PORT_VERDICT, Program, SHARED, Shared};
use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_DIRECT_TLBFLUSH, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::ptr;
use tlfs_abi::{cpuid, msr};

/// CR0: PE, MP, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0033;
/// CR4: PAE, OSFXSR.
const CR4: u64 = 0x220;
/// EFER: LME, LMA.
const EFER: u64 = 0x500;
/// Top of the only stack.
const STACK: u64 = 0x1_8000;
/// What L2 calls itself: open source, no registered type.
const OS_ID: u64 = 1 << 63 | 0x7F << 56 | 2;

/// What one processor did.
#[derive(Debug, Default)]
pub struct Seen {
    /// What it wrote to the port of rounds.
    pub rounds: Vec<u8>,
    /// What it wrote to the port of verdicts.
    pub verdict: Option<u8>,
}

/// A virtual machine, its memory not yet given back.
pub struct Vm {
    kvm: Kvm,
    vm: VmFd,
    memory: *mut u8,
    processors: u32,
    hyper_v: bool,
}

fn failed(what: &str) -> impl Fn(kvm_ioctls::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

impl Vm {
    /// Makes a machine with the programs and page tables in its memory.
    pub fn new(processors: u32, hyper_v: bool) -> Result<Self> {
        let kvm = Kvm::new().map_err(failed("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new anonymous memory.
        let memory = unsafe { libc::mmap(ptr::null_mut(), MEMORY, protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return Err("no memory for the guest".into());
        }
        let memory = memory.cast::<u8>();
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory as u64,
            ..Default::default()
        };
        // SAFETY: the memory is this machine's and stays mapped until it is dropped.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("give memory"))?;
        let made = Self { kvm, vm, memory, processors, hyper_v };
        guest::page_tables(|address, value| made.put(address, value));
        for (n, byte) in guest::code().into_iter().enumerate() {
            // SAFETY: the programs are a page at most, inside the memory.
            unsafe { made.memory.add(CODE as usize + n).write(byte) };
        }
        Ok(made)
    }

    /// Writes 8 bytes of memory.
    fn put(&self, address: u64, value: u64) {
        assert!(address as usize + 8 <= MEMORY);
        // SAFETY: inside the memory, and no processor runs yet.
        unsafe { self.memory.add(address as usize).cast::<u64>().write(value) };
    }

    /// Writes the hypercall input page.
    pub fn put_input(&self, words: &[u64]) {
        for (n, word) in words.iter().take(512).enumerate() {
            self.put(INPUT + 8 * n as u64, *word);
        }
    }

    /// What is shared with the programs.
    pub fn shared(&self) -> &Shared {
        // SAFETY: inside the memory, aligned, and all atomic.
        unsafe { &*self.memory.add(SHARED as usize).cast::<Shared>() }
    }

    /// True when KVM does L2's flush hypercalls by the host's direct flush.
    pub fn has_direct_flush(&self) -> bool {
        self.kvm.check_extension_raw(u64::from(KVM_CAP_HYPERV_DIRECT_TLBFLUSH)) > 0
    }

    /// Runs `first` on processor 0 and `others` on the rest, each in its thread, until all have halted.
    pub fn run(&self, first: Program, others: Program, direct: bool) -> Result<Vec<Seen>> {
        let mut vcpus = Vec::new();
        for n in 0..self.processors {
            vcpus.push(self.processor(n, if n == 0 { first } else { others }, direct)?);
        }
        // KVM on VT-x grants direct flush when it loads a processor's VMCS, not when it is asked for: one more
        // processor, which never runs, takes the place of the one that is loaded here.
        let _last = self.vm.create_vcpu(u64::from(self.processors)).map_err(failed("create a processor"))?;
        std::thread::scope(|scope| {
            let running: Vec<_> = vcpus.into_iter().map(|vcpu| scope.spawn(|| run(vcpu))).collect();
            running.into_iter().map(|thread| thread.join().map_err(|_| "a processor's thread panicked")?).collect()
        })
    }

    fn processor(&self, n: u32, program: Program, direct: bool) -> Result<VcpuFd> {
        let vcpu = self.vm.create_vcpu(u64::from(n)).map_err(failed("create a processor"))?;
        let mut leaves = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("get CPUID"))?;
        if self.hyper_v {
            leaves = with_hyper_v(&leaves)?;
        }
        vcpu.set_cpuid2(&leaves).map_err(failed("set CPUID"))?;
        if self.hyper_v {
            let os_id = kvm_msr_entry { index: msr::GUEST_OS_ID, data: OS_ID, ..Default::default() };
            let list = Msrs::from_entries(&[os_id]).map_err(|e| format!("{e:?}"))?;
            let set = vcpu.set_msrs(&list).map_err(failed("set GUEST_OS_ID"))?;
            if set != 1 {
                return Err("KVM refuses GUEST_OS_ID".into());
            }
        }
        if direct {
            let capability = kvm_enable_cap { cap: KVM_CAP_HYPERV_DIRECT_TLBFLUSH, ..Default::default() };
            vcpu.enable_cap(&capability).map_err(failed("enable direct flush"))?;
        }
        long_mode(&vcpu)?;
        let rip = guest::entry(program);
        let regs = kvm_regs { rip, rflags: 2, rsp: STACK, rdi: u64::from(n), ..Default::default() };
        vcpu.set_regs(&regs).map_err(failed("set registers"))?;
        Ok(vcpu)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; all processors have stopped.
        unsafe { libc::munmap(self.memory.cast(), MEMORY) };
    }
}

fn long_mode(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(failed("get system registers"))?;
    let flat = kvm_segment {
        limit: 0xFFFF_FFFF,
        selector: 0x10,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, db: 0, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(failed("set system registers"))
}

/// The processor's leaves without those of another hypervisor, and with the ones that offer the flush hypercalls.
fn with_hyper_v(leaves: &CpuId) -> Result<CpuId> {
    let mut all: Vec<_> = leaves.as_slice().iter().filter(|leaf| leaf.function >> 28 != 4).copied().collect();
    let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
    let [ebx, ecx, edx] = cpuid::VENDOR_MICROSOFT;
    // Hypercall MSRs and VP index; XMM input; remote flush, Ex calls.
    let (privileges, features, recommendations) = (1 << 5 | 1 << 6, 1 << 4, 1 << 2 | 1 << 11);
    all.extend([
        leaf(cpuid::LEAF_RANGE, cpuid::LEAF_LIMITS, ebx, ecx, edx),
        leaf(cpuid::LEAF_INTERFACE, cpuid::INTERFACE_HV1, 0, 0, 0),
        leaf(cpuid::LEAF_VERSION, 0, 0, 0, 0),
        leaf(cpuid::LEAF_FEATURES, privileges, 0, 0, features),
        leaf(cpuid::LEAF_RECOMMENDATIONS, recommendations, cpuid::SPIN_RETRIES_NEVER, 0, 0),
        leaf(cpuid::LEAF_LIMITS, 64, 64, 0, 0),
    ]);
    CpuId::from_entries(&all).map_err(|e| format!("{e:?}"))
}

/// Runs a processor until it halts.
fn run(mut vcpu: VcpuFd) -> Result<Seen> {
    let mut seen = Seen::default();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(seen),
            Ok(VcpuExit::IoOut(PORT_ROUND, [byte])) => seen.rounds.push(*byte),
            Ok(VcpuExit::IoOut(PORT_VERDICT, [byte])) => seen.verdict = Some(*byte),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => {
                let exit = format!("{other:?}");
                let regs = vcpu.get_regs().map_err(failed("get registers"))?;
                return Err(format!("unexpected exit {exit} at {:#x}", regs.rip));
            }
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
            Err(error) => return Err(format!("run: {error}")),
        }
    }
}
