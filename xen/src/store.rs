//! The xenstore ring: a byte stream to the store daemon in dom0, and the port that goes with it.
//!
//! Only bytes; messages are the `xenstore` crate's. A message may be longer than the ring (1,024 bytes each way):
//! write what fits, read what came, wait for the port, go on. Keep reading while writing, since the daemon takes no
//! requests while its answers find no room.
//!
//! Source: Xen `public/io/xs_wire.h`, `docs/misc/xenstore-ring.txt`.

use crate::byte_ring::{Incoming, Outgoing, RingPlace};
use crate::hypercall;
use crate::shared::SharedPage;
use crate::stream::{ByteStream, StreamError};
use crate::types::PortNumber;

/// Requests to the daemon: `req[1024]`, `req_cons`, `req_prod`.
const REQUESTS: RingPlace = RingPlace {
    data: 0,
    size: 1024,
    consumer: 2048,
    producer: 2052,
};
/// Replies and watch events from it: `rsp[1024]`, `rsp_cons`, `rsp_prod`.
const REPLIES: RingPlace = RingPlace {
    data: 1024,
    size: 1024,
    consumer: 2056,
    producer: 2060,
};

/// The stream to xenstore. Notifies the daemon by itself, with one hypercall per write that wrote something.
#[derive(Debug)]
pub struct StoreRing {
    page: SharedPage,
    port: PortNumber,
    requests: Outgoing,
    replies: Incoming,
}

impl StoreRing {
    pub(crate) fn attach(page: SharedPage, port: PortNumber) -> Self {
        Self {
            requests: Outgoing::attach(&page, REQUESTS),
            replies: Incoming::attach(&page, REPLIES),
            page,
            port,
        }
    }

    /// The port that becomes pending when the daemon has written or read. Never close it.
    #[must_use]
    pub const fn port(&self) -> PortNumber {
        self.port
    }

    /// Tells the daemon to look. An error means a port that Xen itself set up is gone: nothing can be done here, and
    /// the silence is noticed by whoever waits for a reply.
    fn notify(&self) {
        let _ = hypercall::send_event(self.port);
    }
}

impl ByteStream for StoreRing {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let received = self.replies.read(&self.page, buffer)?;
        if received.was_full {
            self.notify();
        }
        Ok(received.count)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        let count = self.requests.write(&self.page, bytes)?;
        if count > 0 {
            self.notify();
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    #[test]
    fn requests_and_replies_use_their_own_halves_of_the_page() {
        let memory = SharedMemory::new();
        let daemon = memory.page();
        let mut store = StoreRing::attach(memory.page(), PortNumber(1));
        assert_eq!(store.write(b"request"), Ok(7));
        assert_eq!(daemon.read_u32(2052), 7);
        let mut bytes = [0; 7];
        daemon.read_bytes(0, &mut bytes);
        assert_eq!(&bytes, b"request");

        daemon.write_bytes(1024, b"reply");
        daemon.write_u32(2060, 5);
        let mut buffer = [0; 16];
        assert_eq!(store.read(&mut buffer), Ok(5));
        assert_eq!(&buffer[..5], b"reply");
        assert_eq!(daemon.read_u32(2056), 5);
        assert_eq!(store.read(&mut buffer), Ok(0));
    }
}
