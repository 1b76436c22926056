//! For host tests: pages shared between two ends, also between threads; and plain pipes.

use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use xen::stream::{ByteStream, StreamError};

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

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    closed: bool,
}

/// One end of a pair of pipes, each holding at most `capacity` bytes. Dropping an end closes both pipes.
pub(crate) struct End {
    incoming: Rc<RefCell<Pipe>>,
    outgoing: Rc<RefCell<Pipe>>,
    capacity: usize,
}

/// Two connected ends.
pub(crate) fn pipes(capacity: usize) -> (End, End) {
    let (one, other) = (
        Rc::<RefCell<Pipe>>::default(),
        Rc::<RefCell<Pipe>>::default(),
    );
    let end = |incoming: &Rc<_>, outgoing: &Rc<_>| End {
        incoming: Rc::clone(incoming),
        outgoing: Rc::clone(outgoing),
        capacity,
    };
    (end(&one, &other), end(&other, &one))
}

impl End {
    /// Everything that has arrived.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.incoming.borrow_mut().bytes.drain(..).collect()
    }

    /// Writes all of it, past the capacity if need be.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.outgoing.borrow_mut().bytes.extend(bytes);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.incoming.borrow_mut().closed = true;
        self.outgoing.borrow_mut().closed = true;
    }
}

impl ByteStream for End {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let mut pipe = self.incoming.borrow_mut();
        if pipe.bytes.is_empty() && pipe.closed {
            return Err(StreamError);
        }
        let read = buffer.len().min(pipe.bytes.len());
        for (to, from) in buffer.iter_mut().zip(pipe.bytes.drain(..read)) {
            *to = from;
        }
        Ok(read)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        let mut pipe = self.outgoing.borrow_mut();
        if pipe.closed {
            return Err(StreamError);
        }
        let written = bytes
            .len()
            .min(self.capacity.saturating_sub(pipe.bytes.len()));
        pipe.bytes.extend(&bytes[..written]);
        Ok(written)
    }
}
