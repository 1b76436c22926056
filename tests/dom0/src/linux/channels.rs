//! Both roles of a vchan over Linux's devices.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use qubes::vchan::{Channels, OpenError, Orders, Phase};
use xen::stream::{ByteStream, StreamError};
use xen::{DomId, Time};

use super::device::{Devices, Page};
use super::ring::{CLIENT_LIVE, Peer, Rings, SERVER_LIVE};
use super::xenstore::Xenstore;

/// How often a client without a server looks into xenstore.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A channel in any phase.
#[derive(Debug)]
pub struct LinuxChannel {
    state: State,
}

#[derive(Debug)]
enum State {
    Searching {
        server: DomId,
        port: u32,
        look_at: Time,
    },
    There {
        rings: Box<Rings<Page>>,
        port: u32,
        /// What is still advertised in xenstore.
        advertised: Option<String>,
    },
}

impl ByteStream for LinuxChannel {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        match &mut self.state {
            State::Searching { .. } => Ok(0),
            State::There { rings, .. } => rings.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        match &mut self.state {
            State::Searching { .. } => Ok(0),
            State::There { rings, .. } => rings.write(bytes),
        }
    }
}

/// dom0's channels.
#[derive(Debug)]
pub struct LinuxChannels {
    devices: Devices,
    xenstore: Xenstore,
    start: Instant,
}

impl LinuxChannels {
    /// Opens the devices and xenstore, and lifts the limit on granted pages: twenty calls need 660.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn open() -> io::Result<Self> {
        let devices = Devices::open()?;
        // A kernel with the driver built in has the same file; one that does not let us lift it has its own limit.
        let _ = std::fs::write("/sys/module/xen_gntalloc/parameters/limit", "65536");
        Ok(Self {
            devices,
            xenstore: Xenstore::connect()?,
            start: Instant::now(),
        })
    }

    /// Sleeps until a channel has an event, `other` is readable, or the time is over.
    ///
    /// # Errors
    ///
    /// The devices'.
    pub fn wait(&self, other: Option<&dyn AsFd>, longest: Duration) -> io::Result<()> {
        let events = self.devices.events();
        let mut descriptors = vec![PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        descriptors.extend(other.map(|other| PollFd::new(other.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = descriptors.first().and_then(PollFd::revents);
        if ready.is_some_and(|ready| ready.contains(PollFlags::POLLIN)) {
            self.devices.take_events()?;
        }
        Ok(())
    }

    fn serve(&mut self, peer: DomId, port: u32, orders: Orders) -> io::Result<LinuxChannel> {
        let control = self.devices.grant(peer.0)?;
        let mut pages = Vec::new();
        for _ in 0..orders.pages() {
            pages.push(self.devices.grant(peer.0)?);
        }
        let local = self.devices.allocate_port(peer.0)?;
        let base = format!("/local/domain/0/data/vchan/{peer}/{port}");
        let nodes = [("ring-ref", control.gref()), ("event-channel", local)];
        let ready = control.notify_when_gone(SERVER_LIVE, local);
        let grants: Vec<u32> = pages.iter().map(Page::gref).collect();
        let orders = (orders.left().get(), orders.right().get());
        let rings = Box::new(Rings::serve(control, pages, &grants, orders));
        let published = ready.and_then(|()| {
            nodes.iter().try_for_each(|(name, number)| {
                let path = format!("{base}/{name}");
                self.xenstore.publish(&path, &number.to_string(), peer.0)
            })
        });
        if let Err(error) = published {
            drop(rings);
            self.devices.close_port(local);
            return Err(error);
        }
        Ok(LinuxChannel {
            state: State::There {
                rings,
                port: local,
                advertised: Some(base),
            },
        })
    }

    /// Looks for a server and joins it.
    fn search(&mut self, server: DomId, port: u32) -> io::Result<Option<State>> {
        let base = format!("/local/domain/{server}/data/vchan/0/{port}");
        let mut number = |name: &str| -> io::Result<Option<u32>> {
            let value = self.xenstore.read(&format!("{base}/{name}"))?;
            let text = value.and_then(|value| String::from_utf8(value).ok());
            Ok(text
                .and_then(|text| text.parse().ok())
                .filter(|number| *number != 0))
        };
        let (Some(event_channel), Some(ring_ref)) = (number("event-channel")?, number("ring-ref")?)
        else {
            return Ok(None);
        };
        let local = self.devices.bind_port(server.0, event_channel)?;
        match self.join(server, ring_ref, local) {
            Ok(rings) => Ok(Some(State::There {
                rings: Box::new(rings),
                port: local,
                advertised: None,
            })),
            Err(error) => {
                self.devices.close_port(local);
                Err(error)
            }
        }
    }

    fn join(&self, server: DomId, ring_ref: u32, local: u32) -> io::Result<Rings<Page>> {
        let control = self.devices.map(server.0, ring_ref)?;
        let (orders, grants) =
            Rings::announced(&control).ok_or_else(|| io::Error::other("impossible orders"))?;
        let mut pages = Vec::new();
        for gref in grants {
            pages.push(self.devices.map(server.0, gref)?);
        }
        control.notify_when_gone(CLIENT_LIVE, local)?;
        let mut rings = Rings::join(control, pages, orders);
        if rings.take_due() {
            self.devices.notify(local);
        }
        Ok(rings)
    }
}

impl Channels for LinuxChannels {
    type Channel = LinuxChannel;

    fn listen(
        &mut self,
        peer: DomId,
        port: u32,
        orders: Orders,
    ) -> Result<LinuxChannel, OpenError> {
        self.serve(peer, port, orders).map_err(|error| {
            eprintln!("dom0-double: cannot serve port {port}: {error}");
            OpenError::Exhausted
        })
    }

    fn connect(&mut self, server: DomId, port: u32) -> Result<LinuxChannel, OpenError> {
        Ok(LinuxChannel {
            state: State::Searching {
                server,
                port,
                look_at: Time(0),
            },
        })
    }

    fn progress(&mut self, channel: &mut LinuxChannel) -> Phase {
        let now = self.now();
        if let State::Searching {
            server,
            port,
            look_at,
        } = &mut channel.state
            && now >= *look_at
        {
            *look_at = now.plus(LOOK_AGAIN);
            match self.search(*server, *port) {
                Ok(Some(state)) => channel.state = state,
                Ok(None) => {}
                // Most likely an advertisement whose server is gone; the next one will do.
                Err(error) => eprintln!("dom0-double: cannot join port {port}: {error}"),
            }
        }
        let State::There {
            rings, advertised, ..
        } = &mut channel.state
        else {
            return Phase::Opening;
        };
        let phase = match rings.peer() {
            Peer::Awaited => return Phase::Opening,
            Peer::There => Phase::Open,
            Peer::Gone => Phase::Closed,
        };
        if let Some(base) = advertised.take() {
            let _ = self.xenstore.remove(&base);
        }
        phase
    }

    fn flush(&mut self, channel: &mut LinuxChannel) {
        if let State::There { rings, port, .. } = &mut channel.state
            && rings.take_due()
        {
            self.devices.notify(*port);
        }
    }

    fn close(&mut self, channel: LinuxChannel) {
        if let State::There {
            rings,
            port,
            advertised,
        } = channel.state
        {
            rings.leave();
            self.devices.notify(port);
            if let Some(base) = advertised {
                let _ = self.xenstore.remove(&base);
            }
            // The pages first: the kernel's notification for the control page needs the port.
            drop(rings);
            self.devices.close_port(port);
        }
    }

    fn now(&self) -> Time {
        let nanos = self.start.elapsed().as_nanos();
        Time(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn deadline(&self, channel: &LinuxChannel) -> Option<Time> {
        match &channel.state {
            State::Searching { look_at, .. } => Some(*look_at),
            State::There { .. } => None,
        }
    }
}
