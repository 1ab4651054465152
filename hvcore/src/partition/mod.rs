//! The Hyper-V interface that a partition sees: CPUID leaves, privileges, synthetic MSRs and overlay pages.
//!
//! Called by the embedder on exits for CPUID, RDMSR and WRMSR, and by `nsvm`, `nvmx` and [`direct`](crate::direct) for
//! the VP assist page. Calls nothing: what the embedder must do comes back as a value.
//!
//! An embedder registers what it implements in a [`PartitionConfig`]; [`PartitionConfig::build`] derives every CPUID
//! bit from that, and refuses sets that cannot work. The [`Interface`] is shared by the partition's VPs; its state is
//! in atomics, and no method waits. Each VP has a [`VpInterface`].
//!
//! ```
//! use hvcore::partition::{MsrRead, MsrWrite, PartitionConfig, Vendor};
//! use tlfs_abi::{cpuid, msr};
//!
//! let interface = PartitionConfig::new(Vendor::Amd, 64, 40).reference_counter().build().unwrap();
//! let vp = interface.vp(3).unwrap();
//! assert_eq!(interface.cpuid(cpuid::LEAF_INTERFACE).unwrap().eax, cpuid::INTERFACE_HV1);
//! assert_eq!(interface.msr_read(&vp, msr::VP_INDEX, 0), MsrRead::Value(3));
//! assert_eq!(interface.msr_write(&vp, msr::VP_INDEX, 3), MsrWrite::Fault);
//! ```

mod config;
mod interface;
mod leaves;
mod msr;
mod overlay;
mod saved;
mod sync;

pub use config::{ConfigError, EvmcsVersions, NestedCapabilities, PartitionConfig, ReferenceTsc, Vendor, Version};
pub use interface::{Interface, ReenlightenmentInterrupt, VpInterface};
pub use msr::{Action, CrashMessage, EmbedderRead, MsrRead, MsrWrite};
pub use overlay::{Overlay, OverlayChange, OverlayMemory};
pub use saved::{RestoreError, SAVED_VERSION, SavedPartition, SavedVp};
