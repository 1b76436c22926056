//! The two byte rings of a channel, for both roles.
//!
//! # Notification without atomic instructions
//!
//! Either side keeps a byte in which it asks the other for events; the asker sets bits, the other clears them. The
//! reference uses locked instructions on that byte. Plain single-byte copies serve as well, for these reasons:
//!
//! * Only the asker sets bits. Asking reads the byte and writes it back with one bit more; if the peer cleared a
//!   bit in between, writing it back costs a needless event later. Asking is followed by a full fence and another
//!   look at the index, so an index that moved before the peer could see the bit is noticed.
//! * Telling reads the byte after the index was published and a full fence. If the bit is not there, the peer has yet
//!   to ask, and will look at the index after that. If it is there, the whole byte is cleared **and then** an event
//!   is sent; a bit that the peer set in between is lost, but the peer finds the event pending when it goes to
//!   sleep, and whoever wakes evaluates everything and asks again.
//!
//! The bytes beside it belong to others (liveness), so nothing wider than a byte is ever written there.
//!
//! # Events
//!
//! An event that became due is remembered and sent by the owner of the port ([`Duplex::take_event`]), so that
//! several reads and writes cost one hypercall. It must be sent before the domain sleeps.

use alloc::vec::Vec;

use xen::PAGE_SIZE;
use xen::shared::{full_fence, read_fence, write_fence};
use xen::stream::{ByteStream, StreamError};

use super::layout::{
    CLIENT_LIVE, CLIENT_NOTIFY, GRANTS, LEFT_CONS, LEFT_PROD, NOTIFY_READ, NOTIFY_WRITE, ORDERS,
    Order, Orders, RIGHT_CONS, RIGHT_PROD, SERVER_LIVE, SERVER_NOTIFY,
};
use super::memory::{SharedBytes, read_byte};

/// Which end of a channel this is. The server owns the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Reads the left ring, writes the right one.
    Server,
    /// Reads the right ring, writes the left one.
    Client,
}

/// What the peer's live byte says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// No client has come yet. Only a server sees this.
    Waiting,
    /// Connected.
    Alive,
    /// Gone, or the byte holds something that the protocol does not have.
    Gone,
}

/// Where a ring's bytes are.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the control page, from this offset on.
    Control(usize),
    /// In pages of its own: the first one's index in the channel's list.
    Pages(usize),
}

/// One direction: a ring, and our private copy of the index that we move.
#[derive(Clone, Copy, Debug)]
struct Ring {
    order: Order,
    place: Place,
    /// The index that we move: consumer when reading, producer when writing. Never read back from the page.
    own: u32,
    /// Where `own` is published, bytes into the control page.
    own_at: usize,
    /// Where the peer publishes the other index.
    peer_at: usize,
}

/// A channel whose memory is in place: two byte rings, liveness and notification bits.
#[derive(Debug)]
pub struct Duplex<M> {
    role: Role,
    control: M,
    pages: Vec<M>,
    incoming: Ring,
    outgoing: Ring,
    event_due: bool,
    broken: bool,
}

/// The left and the right ring's orders, places and index offsets (`prod`, `cons`).
const fn rings(orders: Orders) -> [(Order, Place, usize, usize); 2] {
    let left = match orders.left().in_page_offset() {
        Some(offset) => Place::Control(offset),
        None => Place::Pages(0),
    };
    let right = match orders.right().in_page_offset() {
        Some(offset) => Place::Control(offset),
        None => Place::Pages(orders.left().pages()),
    };
    [
        (orders.left(), left, LEFT_PROD, LEFT_CONS),
        (orders.right(), right, RIGHT_PROD, RIGHT_CONS),
    ]
}

impl<M: SharedBytes> Duplex<M> {
    fn new(role: Role, control: M, pages: Vec<M>, orders: Orders) -> Self {
        let [left, right] = rings(orders);
        let (read, write) = match role {
            Role::Server => (left, right),
            Role::Client => (right, left),
        };
        let incoming = Ring {
            order: read.0,
            place: read.1,
            own: control.read_u32(read.3),
            own_at: read.3,
            peer_at: read.2,
        };
        let outgoing = Ring {
            order: write.0,
            place: write.1,
            own: control.read_u32(write.2),
            own_at: write.2,
            peer_at: write.3,
        };
        Self {
            role,
            control,
            pages,
            incoming,
            outgoing,
            event_due: false,
            broken: false,
        }
    }

    /// Lays out a server's control page, which must be zeroed, and takes its end.
    ///
    /// `pages` are the left ring's pages, then the right ring's; `grants` their references in the same order.
    pub(crate) fn serve(control: M, pages: Vec<M>, grants: &[u32], orders: Orders) -> Self {
        for (index, gref) in grants.iter().enumerate() {
            control.write_u32(GRANTS.wrapping_add(index.wrapping_mul(4)), *gref);
        }
        control.write_u32(ORDERS, orders.word());
        control.write_bytes(SERVER_NOTIFY, &[0]);
        control.write_bytes(CLIENT_NOTIFY, &[NOTIFY_WRITE]);
        control.write_bytes(SERVER_LIVE, &[1]);
        control.write_bytes(CLIENT_LIVE, &[2]);
        write_fence();
        Self::new(Role::Server, control, pages, orders)
    }

    /// Takes the client's end of mapped memory and tells the server. The event becomes due.
    pub(crate) fn join(control: M, pages: Vec<M>, orders: Orders) -> Self {
        let mut duplex = Self::new(Role::Client, control, pages, orders);
        duplex.control.write_bytes(CLIENT_LIVE, &[1]);
        duplex.control.write_bytes(SERVER_NOTIFY, &[NOTIFY_WRITE]);
        full_fence();
        duplex.event_due = true;
        duplex
    }

    /// Which end this is.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// What the peer's live byte says now.
    #[must_use]
    pub fn peer(&self) -> Peer {
        let (offset, waiting) = match self.role {
            Role::Server => (CLIENT_LIVE, true),
            Role::Client => (SERVER_LIVE, false),
        };
        match read_byte(&self.control, offset) {
            1 => Peer::Alive,
            2 if waiting => Peer::Waiting,
            _ => Peer::Gone,
        }
    }

    /// Whether an event became due since the last call. Then the peer must be notified before we sleep.
    #[must_use]
    pub const fn take_event(&mut self) -> bool {
        core::mem::replace(&mut self.event_due, false)
    }

    /// Says goodbye in the live byte and gives the memory back: the control page, then the ring pages.
    ///
    /// The caller notifies the peer afterwards, whatever the notification bits say. What the peer has not read
    /// yet it may still read for as long as it has the memory.
    pub(crate) fn close(self) -> (M, Vec<M>) {
        let offset = match self.role {
            Role::Server => SERVER_LIVE,
            Role::Client => CLIENT_LIVE,
        };
        write_fence();
        self.control.write_bytes(offset, &[0]);
        full_fence();
        (self.control, self.pages)
    }

    /// Asks the peer for an event after it has moved an index.
    fn ask(&self, bit: u8) {
        let offset = match self.role {
            Role::Server => CLIENT_NOTIFY,
            Role::Client => SERVER_NOTIFY,
        };
        let asked = read_byte(&self.control, offset);
        self.control.write_bytes(offset, &[asked | bit]);
        full_fence();
    }

    /// Notes that the peer must be told of an index that we have moved, if it asked for that.
    fn tell(&mut self, bit: u8) {
        full_fence();
        let offset = match self.role {
            Role::Server => SERVER_NOTIFY,
            Role::Client => CLIENT_NOTIFY,
        };
        if read_byte(&self.control, offset) & bit != 0 {
            self.control.write_bytes(offset, &[0]);
            self.event_due = true;
        }
    }

    /// Bytes that wait to be read.
    fn fill(&mut self) -> Result<u32, StreamError> {
        let produced = self.control.read_u32(self.incoming.peer_at);
        let fill = produced.wrapping_sub(self.incoming.own);
        if fill > self.incoming.order.bytes() {
            self.broken = true;
            return Err(StreamError);
        }
        read_fence();
        Ok(fill)
    }

    /// Bytes that can be written.
    fn space(&mut self) -> Result<u32, StreamError> {
        let consumed = self.control.read_u32(self.outgoing.peer_at);
        let fill = self.outgoing.own.wrapping_sub(consumed);
        match self.outgoing.order.bytes().checked_sub(fill) {
            Some(space) => {
                full_fence();
                Ok(space)
            }
            None => {
                self.broken = true;
                Err(StreamError)
            }
        }
    }

    /// The page that holds ring position `index`, the offset in it, and how many ring bytes follow there.
    fn locate(&self, ring: &Ring, index: u32) -> Option<(&M, usize, usize)> {
        let size = ring.order.bytes();
        let position = index & size.wrapping_sub(1);
        let to_wrap = usize::try_from(size.wrapping_sub(position)).ok()?;
        let position = usize::try_from(position).ok()?;
        match ring.place {
            Place::Control(base) => Some((&self.control, base.wrapping_add(position), to_wrap)),
            Place::Pages(first) => {
                let page = self.pages.get(first.wrapping_add(position / PAGE_SIZE))?;
                let offset = position % PAGE_SIZE;
                Some((page, offset, PAGE_SIZE.wrapping_sub(offset)))
            }
        }
    }
}

/// The smaller of a buffer's length and `limit`.
fn bounded(len: usize, limit: u32) -> usize {
    usize::try_from(limit).map_or(len, |limit| len.min(limit))
}

impl<M: SharedBytes> ByteStream for Duplex<M> {
    /// What has arrived is read even when the peer is gone; the error comes when nothing is left.
    ///
    /// A return of 0 for a buffer that is not empty also asks the peer for an event.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        if self.broken {
            return Err(StreamError);
        }
        let mut fill = self.fill()?;
        if fill == 0 {
            self.ask(NOTIFY_WRITE);
            fill = self.fill()?;
        }
        if fill == 0 {
            if self.peer() != Peer::Gone {
                return Ok(0);
            }
            // The last bytes may have come between our look at the index and our look at the live byte.
            full_fence();
            fill = self.fill()?;
            if fill == 0 {
                return Err(StreamError);
            }
        }
        let wanted = bounded(buffer.len(), fill);
        let mut done = 0usize;
        while done < wanted {
            let Some((page, offset, run)) = self.locate(&self.incoming, self.incoming.own) else {
                return Err(StreamError);
            };
            let end = done.saturating_add(run).min(wanted);
            let Some(piece) = buffer.get_mut(done..end) else {
                return Err(StreamError);
            };
            page.read_bytes(offset, piece);
            let moved = u32::try_from(piece.len()).map_err(|_| StreamError)?;
            self.incoming.own = self.incoming.own.wrapping_add(moved);
            done = end;
        }
        if done > 0 {
            full_fence();
            self.control
                .write_u32(self.incoming.own_at, self.incoming.own);
            self.tell(NOTIFY_READ);
        }
        Ok(done)
    }

    /// Fails at once when the peer is gone. Taking less than everything also asks the peer for an event.
    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.broken || self.peer() == Peer::Gone {
            return Err(StreamError);
        }
        let mut space = self.space()?;
        if bounded(bytes.len(), space) < bytes.len() {
            self.ask(NOTIFY_READ);
            space = self.space()?;
        }
        let wanted = bounded(bytes.len(), space);
        let mut done = 0usize;
        while done < wanted {
            let Some((page, offset, run)) = self.locate(&self.outgoing, self.outgoing.own) else {
                return Err(StreamError);
            };
            let end = done.saturating_add(run).min(wanted);
            let Some(piece) = bytes.get(done..end) else {
                return Err(StreamError);
            };
            page.write_bytes(offset, piece);
            let moved = u32::try_from(piece.len()).map_err(|_| StreamError)?;
            self.outgoing.own = self.outgoing.own.wrapping_add(moved);
            done = end;
        }
        if done > 0 {
            write_fence();
            self.control
                .write_u32(self.outgoing.own_at, self.outgoing.own);
            self.tell(NOTIFY_WRITE);
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
