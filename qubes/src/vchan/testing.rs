//! Pages shared between two ends of a host test, also between threads.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::memory::SharedBytes;

/// Indices and orders: what is accessed as whole words.
const WORDS: usize = 5;

/// A page that clones share.
///
/// The first words are kept apart from the bytes: in a control page nobody reads an index as bytes, and ring pages
/// have no words.
#[derive(Clone)]
pub(crate) struct TestPage {
    words: Arc<[AtomicU32; WORDS]>,
    bytes: Arc<Vec<AtomicU8>>,
}

impl TestPage {
    pub(crate) fn new() -> Self {
        Self {
            words: Arc::new(core::array::from_fn(|_| AtomicU32::new(0))),
            bytes: Arc::new((0..4096).map(|_| AtomicU8::new(0)).collect()),
        }
    }
}

impl SharedBytes for TestPage {
    fn read_u32(&self, offset: usize) -> u32 {
        if let Some(word) = self.words.get(offset / 4) {
            return word.load(Ordering::Relaxed);
        }
        let mut bytes = [0; 4];
        self.read_bytes(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write_u32(&self, offset: usize, value: u32) {
        match self.words.get(offset / 4) {
            Some(word) => word.store(value, Ordering::Relaxed),
            None => self.write_bytes(offset, &value.to_le_bytes()),
        }
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        for (byte, at) in to.iter_mut().zip(offset..) {
            *byte = self.bytes[at].load(Ordering::Relaxed);
        }
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        for (byte, at) in from.iter().zip(offset..) {
            self.bytes[at].store(*byte, Ordering::Relaxed);
        }
    }
}
