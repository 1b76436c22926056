//! How a page shared with a peer is reached.
//!
//! Same operations as [`xen::SharedPage`], as a trait: pages of the hypervisor are the one implementation, pages
//! shared between two threads or two programs of a host test the other.

use xen::page::RingMemory;
use xen::{GrantedPage, MappedPage};

/// A 4,096-byte page that a peer reads and writes at the same time, reached by single copies.
///
/// Every access happens exactly once. What lies outside the page reads as zero or is not written.
pub trait SharedBytes {
    /// Reads the native-endian `u32` at `offset` bytes, a multiple of four.
    fn read_u32(&self, offset: usize) -> u32;
    /// Writes the native-endian `u32` at `offset` bytes, a multiple of four.
    fn write_u32(&self, offset: usize, value: u32);
    /// Copies bytes out of the page, each read once, as single bytes.
    fn read_bytes(&self, offset: usize, to: &mut [u8]);
    /// Copies bytes into the page, each written once, as single bytes.
    fn write_bytes(&self, offset: usize, from: &[u8]);
}

impl SharedBytes for GrantedPage {
    fn read_u32(&self, offset: usize) -> u32 {
        self.shared().read_u32(offset)
    }
    fn write_u32(&self, offset: usize, value: u32) {
        self.shared().write_u32(offset, value);
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.shared().read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.shared().write_bytes(offset, from);
    }
}

impl SharedBytes for MappedPage {
    fn read_u32(&self, offset: usize) -> u32 {
        self.shared().read_u32(offset)
    }
    fn write_u32(&self, offset: usize, value: u32) {
        self.shared().write_u32(offset, value);
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.shared().read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.shared().write_bytes(offset, from);
    }
}

/// Reads one byte.
pub(crate) fn read_byte<M: SharedBytes>(page: &M, offset: usize) -> u8 {
    let mut byte = [0u8];
    page.read_bytes(offset, &mut byte);
    byte[0]
}
