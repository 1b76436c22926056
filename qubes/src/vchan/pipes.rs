//! Channels in memory, for host tests of what runs over a vchan.
//!
//! A [`Net`] is a machine with domains; each domain gets its own [`PipeChannels`]. What a server offers, one client can
//! take, once. Ring sizes are those of the orders, so a writer finds a full ring as it would over Xen. Time stands
//! still until the test moves it.

use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::time::Duration;

use xen::stream::{ByteStream, StreamError};
use xen::{DomId, Time};

use super::OpenError;
use super::channels::{Channels, LOOK_AGAIN, Phase};
use super::layout::Orders;

#[derive(Debug)]
struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// The other end is there.
    connected: bool,
    closed: bool,
}

/// One end of a pair of pipes. Dropping an end closes both.
#[derive(Debug)]
pub struct End {
    incoming: Rc<RefCell<Pipe>>,
    outgoing: Rc<RefCell<Pipe>>,
}

/// Two ends; `to_one` and `to_other` are the sizes of the pipes towards them in bytes.
fn ends(to_one: usize, to_other: usize) -> (End, End) {
    let pipe = |capacity| {
        Rc::new(RefCell::new(Pipe {
            bytes: VecDeque::new(),
            capacity,
            connected: false,
            closed: false,
        }))
    };
    let (one, other) = (pipe(to_one), pipe(to_other));
    let end = |incoming: &Rc<_>, outgoing: &Rc<_>| End {
        incoming: Rc::clone(incoming),
        outgoing: Rc::clone(outgoing),
    };
    (end(&one, &other), end(&other, &one))
}

/// Two connected ends, each pipe holding `capacity` bytes.
#[must_use]
pub fn pipes(capacity: usize) -> (End, End) {
    ends(capacity, capacity)
}

impl End {
    /// Everything that has arrived.
    pub fn take(&mut self) -> Vec<u8> {
        self.incoming.borrow_mut().bytes.drain(..).collect()
    }

    /// Writes all of it, past the capacity if need be.
    pub fn put(&mut self, bytes: &[u8]) {
        self.outgoing.borrow_mut().bytes.extend(bytes);
    }

    /// Whether the other end was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.incoming.borrow().closed
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
        let room = pipe.capacity.saturating_sub(pipe.bytes.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        pipe.bytes.extend(taken);
        Ok(taken.len())
    }
}

/// A channel that its server offers and nobody has taken.
#[derive(Debug)]
struct Offer {
    server: DomId,
    client: DomId,
    port: u32,
    end: End,
}

/// A machine whose domains are connected by pipes.
#[derive(Clone, Debug, Default)]
pub struct Net {
    offers: Rc<RefCell<Vec<Offer>>>,
    now: Rc<Cell<Time>>,
    /// Channels that are open or being opened, both ends counted.
    channels: Rc<Cell<usize>>,
}

impl Net {
    /// The channels of one of the domains.
    #[must_use]
    pub fn domain(&self, own: DomId) -> PipeChannels {
        PipeChannels {
            net: self.clone(),
            own,
        }
    }

    /// Lets time pass.
    pub fn pass(&self, duration: Duration) {
        self.now.set(self.now.get().plus(duration));
    }

    /// Ends of channels that were not closed yet.
    #[must_use]
    pub fn open_ends(&self) -> usize {
        self.channels.get()
    }

    /// Whether `server` offers a channel to `client` under `port` now.
    #[must_use]
    pub fn is_offered(&self, server: DomId, client: DomId, port: u32) -> bool {
        let offers = self.offers.borrow();
        offers
            .iter()
            .any(|offer| (offer.server, offer.client, offer.port) == (server, client, port))
    }
}

/// The channels of one domain.
#[derive(Clone, Debug)]
pub struct PipeChannels {
    net: Net,
    own: DomId,
}

/// A channel of a domain.
#[derive(Debug)]
pub enum PipeChannel {
    /// Looks for its server.
    Searching {
        /// The domain that offers it.
        server: DomId,
        /// Under this port.
        port: u32,
    },
    /// Has its other end, or waits for it.
    There {
        /// This end.
        end: End,
        /// The other domain and the port, while it is offered.
        offered: Option<(DomId, u32)>,
    },
}

impl ByteStream for PipeChannel {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        match self {
            Self::Searching { .. } => Ok(0),
            Self::There { end, .. } => end.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        match self {
            Self::Searching { .. } => Ok(0),
            Self::There { end, .. } => end.write(bytes),
        }
    }
}

/// A ring's size.
fn size(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Channels for PipeChannels {
    type Channel = PipeChannel;

    fn listen(&mut self, peer: DomId, port: u32, orders: Orders) -> Result<PipeChannel, OpenError> {
        let (server, client) = ends(size(orders.left().bytes()), size(orders.right().bytes()));
        self.net.offers.borrow_mut().push(Offer {
            server: self.own,
            client: peer,
            port,
            end: client,
        });
        self.net
            .channels
            .set(self.net.channels.get().saturating_add(1));
        Ok(PipeChannel::There {
            end: server,
            offered: Some((peer, port)),
        })
    }

    fn connect(&mut self, server: DomId, port: u32) -> Result<PipeChannel, OpenError> {
        self.net
            .channels
            .set(self.net.channels.get().saturating_add(1));
        Ok(PipeChannel::Searching { server, port })
    }

    fn progress(&mut self, channel: &mut PipeChannel) -> Phase {
        if let PipeChannel::Searching { server, port } = channel {
            let wanted = (*server, self.own, *port);
            let mut offers = self.net.offers.borrow_mut();
            let found = offers
                .iter()
                .position(|offer| (offer.server, offer.client, offer.port) == wanted);
            let Some(found) = found else {
                return Phase::Opening;
            };
            let end = offers.swap_remove(found).end;
            end.incoming.borrow_mut().connected = true;
            end.outgoing.borrow_mut().connected = true;
            *channel = PipeChannel::There { end, offered: None };
        }
        let PipeChannel::There { end, offered } = channel else {
            return Phase::Opening;
        };
        let incoming = end.incoming.borrow();
        if incoming.closed {
            *offered = None;
            Phase::Closed
        } else if incoming.connected {
            *offered = None;
            Phase::Open
        } else {
            Phase::Opening
        }
    }

    fn flush(&mut self, _: &mut PipeChannel) {}

    fn close(&mut self, channel: PipeChannel) {
        self.net
            .channels
            .set(self.net.channels.get().saturating_sub(1));
        if let PipeChannel::There {
            offered: Some((peer, port)),
            ..
        } = channel
        {
            let withdrawn = (self.own, peer, port);
            let mut offers = self.net.offers.borrow_mut();
            offers.retain(|offer| (offer.server, offer.client, offer.port) != withdrawn);
        }
    }

    fn now(&self) -> Time {
        self.net.now.get()
    }

    fn deadline(&self, channel: &PipeChannel) -> Option<Time> {
        match channel {
            PipeChannel::Searching { .. } => Some(self.now().plus(LOOK_AGAIN)),
            PipeChannel::There { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: DomId = DomId(7);

    #[test]
    fn an_offer_is_taken_once_and_its_rings_have_their_sizes() {
        let net = Net::default();
        let (mut dom0, mut vm) = (net.domain(DomId::DOM0), net.domain(VM));
        let mut client = vm.connect(DomId::DOM0, 111).unwrap();
        assert_eq!(vm.progress(&mut client), Phase::Opening);
        let orders = Orders::for_sizes(1024, 4096).unwrap();
        let mut server = dom0.listen(VM, 111, orders).unwrap();
        assert_eq!(dom0.progress(&mut server), Phase::Opening);
        assert!(net.is_offered(DomId::DOM0, VM, 111));
        assert_eq!(vm.progress(&mut client), Phase::Open);
        assert_eq!(dom0.progress(&mut server), Phase::Open);
        assert!(!net.is_offered(DomId::DOM0, VM, 111));
        assert_eq!(client.write(&[1; 9999]), Ok(size(orders.left().bytes())));
        assert_eq!(server.write(&[1; 9999]), Ok(size(orders.right().bytes())));
        vm.close(client);
        let mut buffer = [0; 9999];
        assert_eq!(server.read(&mut buffer), Ok(size(orders.left().bytes())));
        assert_eq!(server.read(&mut buffer), Err(StreamError));
        assert_eq!(dom0.progress(&mut server), Phase::Closed);
        dom0.close(server);
        assert_eq!(net.open_ends(), 0);
    }

    #[test]
    fn closing_an_offer_withdraws_it() {
        let net = Net::default();
        let mut dom0 = net.domain(DomId::DOM0);
        let server = dom0.listen(VM, 513, Orders::PAGES).unwrap();
        dom0.close(server);
        assert!(!net.is_offered(DomId::DOM0, VM, 513));
    }
}
