//! Reference models: slow, obvious, and written from the TLFS without any type or constant of the library. Property
//! tests and fuzz targets compare the library with them.

pub mod evmcs;
pub mod hypercall;
pub mod ranges;
pub mod vp_set;
