//! Channels as the protocols see them: opened in either role, moved on by polling, closed.
//!
//! [`Channels`] has two implementations: [`XenChannels`], and the pipes of host tests. A [`Registry`] keeps what
//! outlives a call: requests to xenstore and its answers, and grants that a peer has not let go of.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use xen::stream::{ByteStream, StreamError};
use xen::{DomId, GrantRef, GrantedPage, Hypervisor, PortNumber, Time};

use super::OpenError;
use super::client::Client;
use super::directory::{self, StoreRequest, Token};
use super::duplex::Peer;
use super::layout::Orders;
use super::server::{Server, take_back};

/// How often a client that waits for its server looks into xenstore again without being told.
pub const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How often grants that a peer still holds are tried again.
pub const REVOKE_AGAIN: Duration = Duration::from_millis(500);
/// Requests to xenstore that may wait. Above half of it no new channel is begun.
pub const REQUESTS_MAX: usize = 256;
/// Pages that peers may hold beyond the end of their channel before we refuse to serve another one.
pub const PARKED_MAX: usize = 128;

/// Where a channel stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Waiting for the peer.
    Opening,
    /// Both ends are there.
    Open,
    /// Over: the peer is gone, or the channel could not be set up. What arrived before can still be read.
    Closed,
}

/// What a poll wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Activity {
    /// There is more to do at once; poll again before sleeping.
    pub more: bool,
    /// Poll again at this time even if nothing happens.
    pub deadline: Option<Time>,
}

impl Activity {
    /// Nothing to do before `deadline` unless something happens.
    #[must_use]
    pub const fn at(deadline: Option<Time>) -> Self {
        Self {
            more: false,
            deadline,
        }
    }

    /// More to do at once.
    #[must_use]
    pub const fn again() -> Self {
        Self {
            more: true,
            deadline: None,
        }
    }

    /// Both wishes in one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            more: self.more || other.more,
            deadline: earlier(self.deadline, other.deadline),
        }
    }
}

/// The earlier of two times, if there are any.
fn earlier(one: Option<Time>, other: Option<Time>) -> Option<Time> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Where channels come from.
pub trait Channels {
    /// A channel in any phase. Reads and writes before it is open move nothing.
    type Channel: ByteStream;

    /// Offers a channel to `peer` under `port` and waits for it as its server.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exhausted`]; try again later.
    fn listen(
        &mut self,
        peer: DomId,
        port: u32,
        orders: Orders,
    ) -> Result<Self::Channel, OpenError>;

    /// Looks for the channel that `server` offers to us under `port` and connects as its client.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exhausted`]; try again later.
    fn connect(&mut self, server: DomId, port: u32) -> Result<Self::Channel, OpenError>;

    /// Acknowledges the channel's event and moves set-up on. Call it before the channel is used in an iteration.
    fn progress(&mut self, channel: &mut Self::Channel) -> Phase;

    /// Sends the event that reads and writes made due. Call it after the channel was used.
    ///
    /// Not part of [`Channels::progress`]: acknowledging an event that came after the last read would lose it.
    fn flush(&mut self, channel: &mut Self::Channel);

    /// Ends a channel in any phase.
    fn close(&mut self, channel: Self::Channel);

    /// The time of this iteration.
    fn now(&self) -> Time;

    /// When the channel wants [`Channels::progress`] without an event.
    fn deadline(&self, channel: &Self::Channel) -> Option<Time>;
}

/// What a client without a server is doing.
#[derive(Debug)]
struct Search {
    server: DomId,
    base: String,
    watch: Token,
    /// The read under way.
    reading: Option<(Token, Reading)>,
    look_at: Time,
}

/// Which of the two nodes is being read.
#[derive(Clone, Copy, Debug)]
enum Reading {
    EventChannel,
    RingRef { event_channel: u32 },
}

#[derive(Debug)]
enum State {
    Serving {
        server: Server,
        peer: DomId,
        port: u32,
        advertised: bool,
    },
    Searching(Search),
    Connected(Client),
}

/// A vchan in any phase.
#[derive(Debug)]
pub struct Channel {
    state: State,
}

impl Channel {
    /// The event channel port to wait for, once there is one.
    #[must_use]
    pub const fn port(&self) -> Option<PortNumber> {
        match &self.state {
            State::Serving { server, .. } => Some(server.port()),
            State::Connected(client) => Some(client.port()),
            State::Searching(_) => None,
        }
    }

    /// When the channel wants [`Channels::progress`] without an event.
    #[must_use]
    pub const fn deadline(&self) -> Option<Time> {
        match &self.state {
            // While a read is under way its answer is the next event.
            State::Searching(search) if search.reading.is_none() => Some(search.look_at),
            _ => None,
        }
    }
}

impl ByteStream for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        match &mut self.state {
            State::Serving { server, .. } => server.read(buffer),
            State::Connected(client) => client.read(buffer),
            State::Searching(_) => Ok(0),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        match &mut self.state {
            State::Serving { server, .. } => server.write(bytes),
            State::Connected(client) => client.write(bytes),
            State::Searching(_) => Ok(0),
        }
    }
}

/// What xenstore answered to a read or a watch.
#[derive(Debug)]
enum Awaited {
    /// A watch; whether it fired since the last look.
    Watch { fired: bool },
    /// A read under way.
    Read,
    /// A read that was answered: the number that the node holds, if it holds one.
    Answered(Option<u32>),
}

/// What outlives a call: requests to xenstore, its answers, and grants to take back.
///
/// The kernel empties [`Registry::next_request`] and feeds [`Registry::answer`] and [`Registry::fired`].
#[derive(Debug, Default)]
pub struct Registry {
    requests: VecDeque<StoreRequest>,
    awaited: Vec<(Token, Awaited)>,
    next_token: u32,
    /// Channels that we advertise: to whom, and how many.
    offers: Vec<(DomId, usize)>,
    parked: Vec<GrantedPage>,
    revoke_at: Time,
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            requests: VecDeque::new(),
            awaited: Vec::new(),
            next_token: 0,
            offers: Vec::new(),
            parked: Vec::new(),
            revoke_at: Time(0),
        }
    }

    /// The next thing to do in xenstore.
    pub fn next_request(&mut self) -> Option<StoreRequest> {
        self.requests.pop_front()
    }

    /// Tells the content of a node that was to be read; `None` when it does not exist or may not be read.
    pub fn answer(&mut self, token: Token, content: Option<&[u8]>) {
        let number = content.and_then(directory::parse_number);
        if let Some(awaited) = self.find(token)
            && matches!(awaited, Awaited::Read)
        {
            *awaited = Awaited::Answered(number);
        }
    }

    /// Tells that a watch fired.
    pub fn fired(&mut self, token: Token) {
        if let Some(Awaited::Watch { fired }) = self.find(token) {
            *fired = true;
        }
    }

    /// Pages of ours that peers still hold although their channel is over.
    #[must_use]
    pub const fn parked_pages(&self) -> usize {
        self.parked.len()
    }

    /// Watches and reads under way.
    #[must_use]
    pub const fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Tries again to take back grants, if it is time. Call it once per iteration.
    pub fn tend<H: Hypervisor>(&mut self, hypervisor: &mut H) {
        if self.parked.is_empty() || hypervisor.now() < self.revoke_at {
            return;
        }
        let again = core::mem::take(&mut self.parked);
        take_back(hypervisor, again, &mut self.parked);
        self.revoke_at = hypervisor.now().plus(REVOKE_AGAIN);
    }

    /// When [`Registry::tend`] wants to be called without an event.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        (!self.parked.is_empty()).then_some(self.revoke_at)
    }

    fn find(&mut self, token: Token) -> Option<&mut Awaited> {
        self.awaited
            .iter_mut()
            .find(|(other, _)| *other == token)
            .map(|(_, awaited)| awaited)
    }

    fn await_with(&mut self, awaited: Awaited) -> Token {
        let token = Token(self.next_token);
        self.next_token = self.next_token.wrapping_add(1);
        self.awaited.push((token, awaited));
        token
    }

    fn forget(&mut self, token: Token) {
        self.awaited.retain(|(other, _)| *other != token);
    }

    fn is_congested(&self) -> bool {
        self.requests.len() > REQUESTS_MAX / 2
    }

    fn watch(&mut self, path: String) -> Token {
        let token = self.await_with(Awaited::Watch { fired: false });
        self.requests.push_back(StoreRequest::Watch { path, token });
        token
    }

    fn read(&mut self, path: String) -> Token {
        let token = self.await_with(Awaited::Read);
        self.requests.push_back(StoreRequest::Read { path, token });
        token
    }

    /// Whether the watch fired since this was asked last.
    fn take_fired(&mut self, token: Token) -> bool {
        match self.find(token) {
            Some(Awaited::Watch { fired }) => core::mem::replace(fired, false),
            _ => false,
        }
    }

    /// The answer to a read, once: `Some(None)` when there is no number there.
    fn take_answer(&mut self, token: Token) -> Option<Option<u32>> {
        match self.find(token) {
            Some(Awaited::Answered(number)) => {
                let number = *number;
                self.forget(token);
                Some(number)
            }
            _ => None,
        }
    }

    fn publish(&mut self, server: &Server, peer: DomId, port: u32) {
        let nodes = directory::advertisement(peer, port, server.ring_ref().0, server.port().0);
        for (path, value) in nodes {
            self.requests.push_back(StoreRequest::Publish {
                path,
                value,
                reader: peer,
            });
        }
        match self.offers.iter_mut().find(|(other, _)| *other == peer) {
            Some((_, count)) => *count = count.saturating_add(1),
            None => self.offers.push((peer, 1)),
        }
    }

    /// Removes an advertisement, and the directory above it when it was the last one there.
    fn withdraw(&mut self, peer: DomId, port: u32) {
        let path = directory::offer_path(peer, port);
        self.requests.push_back(StoreRequest::Remove { path });
        if let Some((_, count)) = self.offers.iter_mut().find(|(other, _)| *other == peer) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.offers.retain(|(other, _)| *other != peer);
                let path = directory::peer_path(peer);
                self.requests.push_back(StoreRequest::Remove { path });
            }
        }
    }

    /// Ends a search: its watch is taken back and its read forgotten.
    fn abandon(&mut self, search: &Search) {
        self.forget(search.watch);
        if let Some((token, _)) = search.reading {
            self.forget(token);
        }
        self.requests.push_back(StoreRequest::Unwatch {
            path: format!("{}/event-channel", search.base),
            token: search.watch,
        });
    }
}

/// Channels over Xen, for the length of one call.
#[derive(Debug)]
pub struct XenChannels<'a, H> {
    /// To grant, map and notify.
    pub hypervisor: &'a mut H,
    /// What outlives the call.
    pub registry: &'a mut Registry,
}

impl<H: Hypervisor> XenChannels<'_, H> {
    /// Moves a search on. Returns the client once the server was found and everything is mapped.
    fn search(&mut self, search: &mut Search) -> Option<Client> {
        let now = self.hypervisor.now();
        let fired = self.registry.take_fired(search.watch);
        let Some((token, reading)) = search.reading else {
            if fired || now >= search.look_at {
                self.look(search);
            }
            return None;
        };
        if fired {
            // The node changed while it is being read: look again as soon as the read is over.
            search.look_at = now;
        }
        let number = self.registry.take_answer(token)?;
        search.reading = None;
        let number = number?;
        match reading {
            Reading::EventChannel => {
                let token = self.registry.read(format!("{}/ring-ref", search.base));
                let reading = Reading::RingRef {
                    event_channel: number,
                };
                search.reading = Some((token, reading));
                None
            }
            Reading::RingRef { event_channel } => Client::connect(
                self.hypervisor,
                search.server,
                GrantRef(number),
                PortNumber(event_channel),
            )
            .ok(),
        }
    }

    /// Begins to read the advertisement.
    fn look(&mut self, search: &mut Search) {
        let token = self.registry.read(format!("{}/event-channel", search.base));
        search.reading = Some((token, Reading::EventChannel));
        search.look_at = self.hypervisor.now().plus(LOOK_AGAIN);
    }
}

impl<H: Hypervisor> Channels for XenChannels<'_, H> {
    type Channel = Channel;

    fn listen(&mut self, peer: DomId, port: u32, orders: Orders) -> Result<Channel, OpenError> {
        if self.registry.is_congested() || self.registry.parked.len() > PARKED_MAX {
            return Err(OpenError::Exhausted);
        }
        let server = Server::open(self.hypervisor, peer, orders)?;
        self.registry.publish(&server, peer, port);
        Ok(Channel {
            state: State::Serving {
                server,
                peer,
                port,
                advertised: true,
            },
        })
    }

    fn connect(&mut self, server: DomId, port: u32) -> Result<Channel, OpenError> {
        if self.registry.is_congested() || server == self.hypervisor.own_domid() {
            return Err(OpenError::Exhausted);
        }
        let base = directory::advertised_path(server, self.hypervisor.own_domid(), port);
        let watch = self.registry.watch(format!("{base}/event-channel"));
        let mut search = Search {
            server,
            base,
            watch,
            reading: None,
            look_at: Time(0),
        };
        self.look(&mut search);
        Ok(Channel {
            state: State::Searching(search),
        })
    }

    fn progress(&mut self, channel: &mut Channel) -> Phase {
        if let State::Searching(search) = &mut channel.state
            && let Some(client) = self.search(search)
        {
            self.registry.abandon(search);
            channel.state = State::Connected(client);
        }
        match &mut channel.state {
            State::Serving {
                server,
                peer,
                port,
                advertised,
            } => {
                let _ = self.hypervisor.take_pending(server.port());
                let phase = match server.peer() {
                    Peer::Waiting => return Phase::Opening,
                    Peer::Alive => Phase::Open,
                    Peer::Gone => Phase::Closed,
                };
                // A peer that reconnects must never find the advertisement of a channel that is taken.
                if core::mem::replace(advertised, false) {
                    self.registry.withdraw(*peer, *port);
                }
                phase
            }
            State::Connected(client) => {
                let _ = self.hypervisor.take_pending(client.port());
                match client.peer() {
                    Peer::Alive | Peer::Waiting => Phase::Open,
                    Peer::Gone => Phase::Closed,
                }
            }
            State::Searching(_) => Phase::Opening,
        }
    }

    fn flush(&mut self, channel: &mut Channel) {
        match &mut channel.state {
            State::Serving { server, .. } => server.flush(self.hypervisor),
            State::Connected(client) => client.flush(self.hypervisor),
            State::Searching(_) => {}
        }
    }

    fn close(&mut self, channel: Channel) {
        match channel.state {
            State::Serving {
                server,
                peer,
                port,
                advertised,
            } => {
                server.close(self.hypervisor, &mut self.registry.parked);
                self.registry.revoke_at = self.hypervisor.now().plus(REVOKE_AGAIN);
                if advertised {
                    self.registry.withdraw(peer, port);
                }
            }
            State::Searching(search) => self.registry.abandon(&search),
            State::Connected(client) => client.close(self.hypervisor),
        }
    }

    fn now(&self) -> Time {
        self.hypervisor.now()
    }

    fn deadline(&self, channel: &Channel) -> Option<Time> {
        channel.deadline()
    }
}
