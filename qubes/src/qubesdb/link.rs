//! The client and its vchan: connecting, and connecting again when dom0 closed.
//!
//! A connection is closed only when its stream is over; never because the dump takes long (see [`super::client`]).
//! Between connections the sink keeps everything that it has.

use core::time::Duration;

use xen::stream::ByteStream;
use xen::{DomId, Time};

use super::PORT;
use super::client::{Client, Sink};
use crate::vchan::channels::{Activity, Channels, Phase};

/// The pause before connecting again after a connection that never became ready; doubled each time.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// QubesDB over whatever channels there are. `C` is the channel type.
#[derive(Debug)]
pub struct Link<C> {
    client: Client,
    channel: Option<C>,
    /// Whether the client was told of the connection.
    greeted: bool,
    pause: Duration,
    retry_at: Time,
}

impl<C: ByteStream> Link<C> {
    /// A link that connects at its first poll.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            client: Client::new(),
            channel: None,
            greeted: false,
            pause: PAUSE_FIRST,
            retry_at: Time(0),
        }
    }

    /// The client, to write keys of ours and to read counters.
    pub const fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// What happened, since the start.
    #[must_use]
    pub const fn counters(&self) -> super::Counters {
        self.client.counters()
    }

    /// The channel, to learn its port.
    pub const fn channel(&self) -> Option<&C> {
        self.channel.as_ref()
    }

    /// Whether keys are current: connected, and the dump is whole.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.client.is_ready()
    }

    /// Whether [`Link::poll`] should be called before sleeping, because a key was written since.
    #[must_use]
    pub fn wants_poll(&self) -> bool {
        self.client.wants_poll()
    }

    /// Connects, reads and writes as far as possible. Call it before anything else in each iteration.
    pub fn poll<N>(&mut self, channels: &mut N, sink: &mut impl Sink) -> Activity
    where
        N: Channels<Channel = C>,
    {
        let Some(channel) = &mut self.channel else {
            return self.connect(channels);
        };
        if channels.progress(channel) == Phase::Opening {
            return Activity::at(channels.deadline(channel));
        }
        if !self.greeted {
            self.greeted = true;
            self.client.connected(sink);
        }
        let was_ready = self.client.is_ready();
        // A channel that the peer closed still gives what arrived before; then the stream says that it is over.
        let polled = self.client.poll(channel, sink);
        channels.flush(channel);
        if self.client.is_ready() && !was_ready {
            self.pause = PAUSE_FIRST;
            let counters = self.client.counters();
            xen::info!("qubesdb: in step with dom0 (dump {})", counters.dumps);
        }
        match polled {
            Ok(activity) => activity,
            Err(_) => {
                xen::warn!("qubesdb: dom0 has closed; what is in force stays, connecting again");
                self.close(channels);
                Activity::at(Some(self.retry_at))
            }
        }
    }

    /// Closes the connection, for the end of the program. In the middle of a dump this ends dom0's daemon.
    pub fn close<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        if let Some(channel) = self.channel.take() {
            channels.close(channel);
        }
        self.client.disconnected();
        self.greeted = false;
        self.back_off(channels.now());
    }

    fn connect<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Activity {
        let now = channels.now();
        if now < self.retry_at {
            return Activity::at(Some(self.retry_at));
        }
        match channels.connect(DomId::DOM0, PORT) {
            Ok(channel) => {
                self.channel = Some(channel);
                Activity::again()
            }
            Err(_) => {
                self.back_off(now);
                Activity::at(Some(self.retry_at))
            }
        }
    }

    fn back_off(&mut self, now: Time) {
        self.retry_at = now.plus(self.pause);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_LONGEST);
    }
}

impl<C: ByteStream> Default for Link<C> {
    fn default() -> Self {
        Self::new()
    }
}
