//! Byte streams to a peer: the xenstore ring, the console ring, later vchan.
//!
//! Each is a pair of byte rings in a shared page with free-running indices. Writers take what fits, readers
//! what is there; nobody blocks here.

/// A stream of bytes to and from a peer.
pub trait ByteStream {
    /// Reads what has arrived, at most `buffer.len()` bytes. Returns how many; 0 when there is nothing.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when the peer's indices are impossible: the stream is unusable.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError>;

    /// Writes what fits. Returns how many bytes were taken.
    ///
    /// # Errors
    ///
    /// As [`ByteStream::read`].
    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError>;
}

/// The peer's indices are impossible, or the peer closed the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamError;
