//! Reference models and the machine model that the tests and fuzz targets run on.

pub mod model;
