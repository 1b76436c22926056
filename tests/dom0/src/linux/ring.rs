//! The byte rings of a vchan as the reference has them: with atomic instructions on the notification bytes, and an event
//! for each bit that was set.
//!
//! Written without a look at the product's, so that a mistake in one of them shows.

use std::sync::atomic::{Ordering, fence};

use xen::stream::{ByteStream, StreamError};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Where the grant references begin.
const GRANTS: usize = 0x18;
/// "Tell me when you have written".
const WRITTEN: u8 = 1;
/// "Tell me when you have read".
const READ: u8 = 2;

/// A page shared with a peer.
pub trait Memory {
    /// One word.
    fn read_u32(&self, offset: usize) -> u32;
    /// One word.
    fn write_u32(&self, offset: usize, value: u32);
    /// Bytes.
    fn read_bytes(&self, offset: usize, to: &mut [u8]);
    /// Bytes.
    fn write_bytes(&self, offset: usize, from: &[u8]);
    /// Sets bits of a byte, atomically.
    fn or_byte(&self, offset: usize, bits: u8);
    /// Clears bits of a byte, atomically; returns those that were set.
    fn take_bits(&self, offset: usize, bits: u8) -> u8;
}

/// Offsets in the control page as one role sees them.
#[derive(Clone, Copy, Debug)]
struct View {
    /// Consumer and producer index of the ring that we read.
    in_cons: usize,
    in_prod: usize,
    /// Consumer and producer index of the ring that we write.
    out_cons: usize,
    out_prod: usize,
    own_live: usize,
    peer_live: usize,
    /// Where we ask, and where the peer asks.
    own_wishes: usize,
    peer_wishes: usize,
}

const SERVER: View = View {
    in_cons: 0x00,
    in_prod: 0x04,
    out_cons: 0x08,
    out_prod: 0x0c,
    own_live: 0x15,
    peer_live: 0x14,
    own_wishes: 0x16,
    peer_wishes: 0x17,
};

const CLIENT: View = View {
    in_cons: 0x08,
    in_prod: 0x0c,
    out_cons: 0x00,
    out_prod: 0x04,
    own_live: 0x14,
    peer_live: 0x15,
    own_wishes: 0x17,
    peer_wishes: 0x16,
};

/// Offset of `srv_live`, for the notification when a server goes.
pub const SERVER_LIVE: u64 = 0x15;
/// Offset of `cli_live`.
pub const CLIENT_LIVE: u64 = 0x14;

/// What the peer's live byte says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// No client yet.
    Awaited,
    /// There.
    There,
    /// Gone.
    Gone,
}

/// Where a ring's bytes lie.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the control page, from this offset.
    Control(usize),
    /// In pages from this index on.
    Pages(usize),
}

/// Both rings, from one end.
#[derive(Debug)]
pub struct Rings<M> {
    control: M,
    pages: Vec<M>,
    view: View,
    /// Size in bytes and place of the ring that we read, and of the one that we write.
    input: (usize, Place),
    output: (usize, Place),
    /// Events that are due.
    due: bool,
}

/// Pages of a ring's own, by the logarithm of its size.
#[must_use]
pub const fn pages_of(order: u8) -> usize {
    if order < 12 { 0 } else { 1 << (order - 12) }
}

fn places(left: u8, right: u8) -> [(usize, Place); 2] {
    let place = |order: u8, first| match order {
        10 => Place::Control(1024),
        11 => Place::Control(2048),
        _ => Place::Pages(first),
    };
    [
        (1 << left, place(left, 0)),
        (1 << right, place(right, pages_of(left))),
    ]
}

impl<M: Memory> Rings<M> {
    /// The server's end of zeroed pages: the control page, then the left ring's, then the right ring's.
    pub fn serve(control: M, pages: Vec<M>, grants: &[u32], (left, right): (u8, u8)) -> Self {
        control.write_u32(0x10, u32::from(left) | u32::from(right) << 16);
        for (index, gref) in grants.iter().enumerate() {
            control.write_u32(GRANTS + index * 4, *gref);
        }
        control.write_bytes(0x14, &[2, 1, WRITTEN, 0]);
        fence(Ordering::SeqCst);
        let [input, output] = places(left, right);
        Self {
            control,
            pages,
            view: SERVER,
            input,
            output,
            due: false,
        }
    }

    /// The orders and grant references that a server's control page announces; `None` when it cannot be served.
    pub fn announced(control: &M) -> Option<((u8, u8), Vec<u32>)> {
        let orders = control.read_u32(0x10);
        let left = u8::try_from(orders & 0xffff).ok()?;
        let right = u8::try_from(orders >> 16).ok()?;
        let known = 10..=20;
        if !known.contains(&left) || !known.contains(&right) || (left == right && left < 12) {
            return None;
        }
        let count = pages_of(left) + pages_of(right);
        let grants = (0..count).map(|index| control.read_u32(GRANTS + index * 4));
        Some(((left, right), grants.collect()))
    }

    /// The client's end. Tells the server.
    pub fn join(control: M, pages: Vec<M>, (left, right): (u8, u8)) -> Self {
        let [output, input] = places(left, right);
        control.write_bytes(CLIENT.own_live, &[1]);
        control.or_byte(CLIENT.own_wishes, WRITTEN);
        Self {
            control,
            pages,
            view: CLIENT,
            input,
            output,
            due: true,
        }
    }

    /// The control page.
    pub const fn control(&self) -> &M {
        &self.control
    }

    /// What the peer's live byte says.
    pub fn peer(&self) -> Peer {
        let mut live = [0];
        self.control.read_bytes(self.view.peer_live, &mut live);
        match live {
            [0] => Peer::Gone,
            [2] if self.view.peer_live == 0x14 => Peer::Awaited,
            _ => Peer::There,
        }
    }

    /// Whether an event is due.
    pub const fn take_due(&mut self) -> bool {
        core::mem::replace(&mut self.due, false)
    }

    /// Says goodbye; the event must be sent and the pages dropped afterwards.
    pub fn leave(&self) {
        self.control.write_bytes(self.view.own_live, &[0]);
        fence(Ordering::SeqCst);
    }

    /// The page and offset of a ring position, and bytes up to the end of the page or ring.
    fn locate(&self, (size, place): (usize, Place), index: u32) -> (&M, usize, usize) {
        let position = usize::try_from(index).unwrap_or_default() % size;
        match place {
            Place::Control(base) => (&self.control, base + position, size - position),
            Place::Pages(first) => {
                let page = self
                    .pages
                    .get(first + position / PAGE)
                    .unwrap_or(&self.control);
                (page, position % PAGE, PAGE - position % PAGE)
            }
        }
    }

    /// Bytes that wait; with a wish for an event if there are none.
    fn fill(&self) -> Result<usize, StreamError> {
        let look = || {
            let fill = self
                .control
                .read_u32(self.view.in_prod)
                .wrapping_sub(self.control.read_u32(self.view.in_cons));
            usize::try_from(fill)
                .ok()
                .filter(|fill| *fill <= self.input.0)
                .ok_or(StreamError)
        };
        if look()? == 0 {
            self.control.or_byte(self.view.own_wishes, WRITTEN);
        }
        look()
    }

    /// Bytes that fit; with a wish for an event if they are fewer than `wanted`.
    fn space(&self, wanted: usize) -> Result<usize, StreamError> {
        let look = || {
            let fill = self
                .control
                .read_u32(self.view.out_prod)
                .wrapping_sub(self.control.read_u32(self.view.out_cons));
            let fill = usize::try_from(fill).map_err(|_| StreamError)?;
            self.output.0.checked_sub(fill).ok_or(StreamError)
        };
        if look()? < wanted {
            self.control.or_byte(self.view.own_wishes, READ);
        }
        look()
    }

    fn tell(&mut self, bit: u8) {
        fence(Ordering::SeqCst);
        self.due |= self.control.take_bits(self.view.peer_wishes, bit) != 0;
    }
}

impl<M: Memory> ByteStream for Rings<M> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        // Liveness first, data second: what came before the end is still found.
        let peer = self.peer();
        fence(Ordering::SeqCst);
        let fill = self.fill()?;
        if fill == 0 {
            return if peer == Peer::Gone {
                Err(StreamError)
            } else {
                Ok(0)
            };
        }
        let wanted = fill.min(buffer.len());
        let mut index = self.control.read_u32(self.view.in_cons);
        let mut done = 0;
        while done < wanted {
            let (page, offset, run) = self.locate(self.input, index);
            let len = run.min(wanted - done);
            page.read_bytes(offset, buffer.get_mut(done..done + len).unwrap_or_default());
            done += len;
            index = index.wrapping_add(u32::try_from(len).unwrap_or_default());
        }
        fence(Ordering::SeqCst);
        self.control.write_u32(self.view.in_cons, index);
        self.tell(READ);
        Ok(done)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.peer() == Peer::Gone {
            return Err(StreamError);
        }
        let wanted = self.space(bytes.len())?.min(bytes.len());
        fence(Ordering::SeqCst);
        let mut index = self.control.read_u32(self.view.out_prod);
        let mut done = 0;
        while done < wanted {
            let (page, offset, run) = self.locate(self.output, index);
            let len = run.min(wanted - done);
            page.write_bytes(offset, bytes.get(done..done + len).unwrap_or_default());
            done += len;
            index = index.wrapping_add(u32::try_from(len).unwrap_or_default());
        }
        if done > 0 {
            fence(Ordering::SeqCst);
            self.control.write_u32(self.view.out_prod, index);
            self.tell(WRITTEN);
        }
        Ok(done)
    }
}
