//! Physical CPUs around one memory.
//!
//! Single-threaded use steps any CPU in any order. With threads, each takes one CPU by `&mut` (see the test below) and
//! all share the memory and the CPUs' interrupt lines.

use std::sync::Arc;

use super::mem::PhysMem;
use super::{svm, vmx};

/// `C` is a CPU of one vendor.
pub struct Machine<C> {
    /// Memory, shared.
    pub mem: Arc<PhysMem>,
    /// The CPUs.
    pub cpus: Vec<C>,
}

impl Machine<svm::Cpu> {
    /// `cpus` CPUs with AMD-V and `bytes` of memory; each CPU's chance follows `seed` and its number.
    pub fn amd(cpus: usize, bytes: u64, features: svm::Features, seed: u64) -> Self {
        let cpu = |n: u64| svm::Cpu::new(features, seed.wrapping_add(n << 32));
        Self { mem: Arc::new(PhysMem::new(bytes)), cpus: (0..cpus as u64).map(cpu).collect() }
    }

    /// The interrupt lines of every CPU, for threads that kick others.
    pub fn lines(&self) -> Vec<Arc<svm::Lines>> {
        self.cpus.iter().map(|cpu| cpu.lines.clone()).collect()
    }

    /// One step of CPU `n`.
    pub fn step(&mut self, n: usize, op: svm::Op) -> svm::Step {
        self.cpus[n].step(&self.mem, op)
    }
}

impl Machine<vmx::Cpu> {
    /// `cpus` CPUs with VT-x and `bytes` of memory; each CPU's chance follows `seed` and its number.
    pub fn intel(cpus: usize, bytes: u64, caps: vmx::Caps, seed: u64) -> Self {
        let cpu = |n: u64| vmx::Cpu::new(caps, seed.wrapping_add(n << 32));
        Self { mem: Arc::new(PhysMem::new(bytes)), cpus: (0..cpus as u64).map(cpu).collect() }
    }

    /// The interrupt lines of every CPU, for threads that kick others.
    pub fn lines(&self) -> Vec<Arc<vmx::Lines>> {
        self.cpus.iter().map(|cpu| cpu.lines.clone()).collect()
    }

    /// One step of CPU `n`.
    pub fn step(&mut self, n: usize, op: vmx::Op) -> vmx::Step {
        self.cpus[n].step(&self.mem, op)
    }
}
