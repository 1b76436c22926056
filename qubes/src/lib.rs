#![no_std]
#![forbid(unsafe_code)]
//! To be written.

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod qubesdb;
pub mod vchan;
