//! A small guest memory and configurations for the partition's tests.
#![allow(dead_code)]

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::partition::{EvmcsVersions, NestedCapabilities, PartitionConfig, ReferenceTsc, Vendor};
use std::cell::{Cell, RefCell};
use tlfs_abi::hypercall::CallCode;

/// RAM from GPA 0 on. Counts reads.
pub struct Ram {
    bytes: RefCell<Vec<u8>>,
    pub reads: Cell<usize>,
    pub bytes_read: Cell<usize>,
}

impl Ram {
    pub fn new(pages: usize) -> Self {
        Self { bytes: RefCell::new(vec![0; pages * 4096]), reads: Cell::new(0), bytes_read: Cell::new(0) }
    }

    pub fn filled(pages: usize, byte: u8) -> Self {
        Self { bytes: RefCell::new(vec![byte; pages * 4096]), reads: Cell::new(0), bytes_read: Cell::new(0) }
    }

    fn at<T>(&self, gpa: L1Gpa, length: usize, access: impl FnOnce(&mut [u8]) -> T) -> Result<T, MemoryError> {
        let start = usize::try_from(gpa.raw()).map_err(|_| MemoryError)?;
        let end = start.checked_add(length).ok_or(MemoryError)?;
        Ok(access(self.bytes.borrow_mut().get_mut(start..end).ok_or(MemoryError)?))
    }
}

impl GuestMemory for Ram {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.set(self.reads.get() + 1);
        self.bytes_read.set(self.bytes_read.get() + buf.len());
        self.at(gpa, buf.len(), |bytes| buf.copy_from_slice(bytes))
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.at(gpa, buf.len(), |bytes| bytes.copy_from_slice(buf))
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        self.at(gpa, 1, |bytes| {
            let old = bytes[0];
            if old == current {
                bytes[0] = new;
                Ok(old)
            } else {
                Err(old)
            }
        })
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        self.at(gpa, 4, |bytes| {
            let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if old == current {
                bytes.copy_from_slice(&new.to_le_bytes());
                Ok(old)
            } else {
                Err(old)
            }
        })
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        let old = self.read_u64(gpa)?;
        if old == current { self.write_u64(gpa, new).map(|()| Ok(old)) } else { Ok(Err(old)) }
    }
}

/// Every call that a CPUID bit stands for.
pub const EVERY_CALL: &[CallCode] = &[
    CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE,
    CallCode::FLUSH_VIRTUAL_ADDRESS_LIST,
    CallCode::NOTIFY_LONG_SPIN_WAIT,
    CallCode::SEND_SYNTHETIC_CLUSTER_IPI,
    CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
    CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX,
    CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX,
    CallCode::GET_VP_REGISTERS,
    CallCode::SET_VP_REGISTERS,
    CallCode::POST_MESSAGE,
    CallCode::SIGNAL_EVENT,
    CallCode::START_VIRTUAL_PROCESSOR,
    CallCode::GET_VP_INDEX_FROM_APIC_ID,
    CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE,
    CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST,
    CallCode::EXT_QUERY_CAPABILITIES,
];

/// What an Intel engine could export.
pub const INTEL: NestedCapabilities = NestedCapabilities {
    evmcs: Some(EvmcsVersions { low: 1, high: 1 }),
    direct_flush: true,
    msr_bitmap: true,
    perf_global_ctrl: true,
    nonzero_debug_ctl: true,
    npt_tlb: false,
};

/// What an AMD engine could export.
pub const AMD: NestedCapabilities = NestedCapabilities {
    evmcs: None,
    direct_flush: true,
    msr_bitmap: true,
    perf_global_ctrl: false,
    nonzero_debug_ctl: false,
    npt_tlb: true,
};

/// Everything registered: 16 VPs, 40 bits of GPA.
pub fn everything(vendor: Vendor) -> PartitionConfig {
    PartitionConfig::new(vendor, 16, 40)
        .hypercalls(EVERY_CALL)
        .spin_retries(0xFFF)
        .logical_processors(8)
        .xmm_input()
        .xmm_output()
        .reference_counter()
        .reference_tsc(ReferenceTsc { scale: 1 << 60, offset: 7 })
        .frequencies(3_000_000_000, 200_000_000)
        .apic_msrs()
        .crash(true)
        .reset()
        .reenlightenment()
        .nested_root()
        .nested(match vendor {
            Vendor::Intel => INTEL,
            Vendor::Amd => AMD,
        })
}
