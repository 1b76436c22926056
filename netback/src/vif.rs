//! One connected client vif: connect, publish, arm, disconnect.
//!
//! The two directions are in `receive` and `send`.

use xen::netif::{GsoType, RX_WORDS, TX_WORDS};
use xen::ring::BackRing;
use xen::{DomId, GrantRef, Hypervisor, MappedPage, Port, PortNumber, Time};

use crate::batch::{Batch, Failure, FailureKind, VifTag};
use crate::counters::VifCounters;
use crate::error::{ConnectError, PeerError, Ring};
use crate::queue::Queue;
use crate::{LINK_HEADER_LEN, MAX_COPY_FAILURES};

/// What the client's frontend says it can do. All from its own xenstore folder: claims, which only decide what
/// it is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontendFeatures {
    /// `request-rx-copy`: must be 1.
    pub rx_copy: bool,
    /// `feature-rx-notify`: it sends events when it posts buffers. Otherwise its ring is polled.
    pub rx_notify: bool,
    /// `feature-sg`: it takes frames of more than one slot.
    pub sg: bool,
    /// `feature-gso-tcpv4`: it takes GSO frames over IPv4.
    pub gso_tcpv4: bool,
    /// `feature-gso-tcpv6`: it takes GSO frames over IPv6.
    pub gso_tcpv6: bool,
    /// `feature-no-csum-offload`: it does not take blank checksums over IPv4.
    pub no_csum_offload: bool,
    /// `feature-ipv6-csum-offload`: it takes blank checksums over IPv6.
    pub ipv6_csum_offload: bool,
}

impl FrontendFeatures {
    /// Whether the client takes GSO frames of this family.
    #[must_use]
    pub const fn takes(&self, family: GsoType) -> bool {
        match family {
            GsoType::TcpV4 => self.gso_tcpv4,
            GsoType::TcpV6 => self.gso_tcpv6,
        }
    }
}

/// What it takes to connect a client's vif.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnectParameters {
    /// The kernel's name for this connection.
    pub tag: VifTag,
    /// The client's domain, from the path of our own backend folder.
    pub peer: DomId,
    /// The page of the tx ring.
    pub tx_ref: GrantRef,
    /// The page of the rx ring.
    pub rx_ref: GrantRef,
    /// The client's event channel port.
    pub event_channel: PortNumber,
    /// What the frontend can do.
    pub features: FrontendFeatures,
    /// The link's MTU in bytes, without Ethernet header.
    pub mtu: u16,
}

/// How much a vif may take in one turn of the deficit round robin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    /// Frames at most.
    pub frames: u32,
    /// Bytes that this turn adds to what the vif may take. What a ring with frames left could not use
    /// carries over, up to [`crate::MAX_DEFICIT`].
    pub bytes: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            frames: 32,
            bytes: 64 * 1024,
        }
    }
}

/// One client's connected vif. Lives from [`Vif::connect`] to [`Vif::disconnect`].
#[derive(Debug)]
pub struct Vif {
    pub(crate) tag: VifTag,
    pub(crate) peer: DomId,
    port: Port,
    pub(crate) features: FrontendFeatures,
    /// The longest frame without GSO that the client may send, in bytes.
    pub(crate) max_plain: u16,
    pub(crate) tx: BackRing<MappedPage, TX_WORDS>,
    pub(crate) rx: BackRing<MappedPage, RX_WORDS>,
    /// Rx requests that were seen and not consumed.
    pub(crate) rx_seen: u32,
    /// The batch's generation in which the rings were last worked on.
    generation: u64,
    /// The responses that were written before it, whose copies are done in any case.
    tx_ready: u32,
    rx_ready: u32,
    /// Bytes that the client may still send this turn.
    pub(crate) deficit: u32,
    /// See [`Vif::is_held_back`].
    pub(crate) held_back: bool,
    pub(crate) queue: Queue,
    /// Since when no waiting frame could be sent for want of buffers.
    pub(crate) blocked_since: Option<Time>,
    pub(crate) stalled: bool,
    /// When to look for buffers of a client that does not notify.
    pub(crate) next_poll: Option<Time>,
    /// Frames and slots whose copy was tried, and failed, in `generation`.
    pub(crate) copies_tried: u32,
    pub(crate) copies_failed: u32,
    /// Failed copies since the last that succeeded.
    failures_in_row: u32,
    pub(crate) failed: Option<PeerError>,
    pub(crate) counters: VifCounters,
}

impl Vif {
    /// Maps the client's rings and binds its event channel.
    ///
    /// The port starts pending, so requests that wait already are noticed by the usual way.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]; every step before the failing one is undone.
    pub fn connect<H: Hypervisor + ?Sized>(
        hv: &mut H,
        parameters: &ConnectParameters,
    ) -> Result<Self, ConnectError> {
        if !parameters.features.rx_copy {
            return Err(ConnectError::NoRxCopy);
        }
        if parameters.tx_ref == parameters.rx_ref {
            return Err(ConnectError::SameRing);
        }
        let peer = parameters.peer;
        let tx = attach(hv, peer, parameters.tx_ref, Ring::Tx)?;
        let rx = match attach(hv, peer, parameters.rx_ref, Ring::Rx) {
            Ok(rx) => rx,
            Err(error) => {
                hv.unmap(tx.into_memory());
                return Err(error);
            }
        };
        let port = match hv.bind_port(peer, parameters.event_channel) {
            Ok(port) => port,
            Err(errno) => {
                hv.unmap(rx.into_memory());
                hv.unmap(tx.into_memory());
                return Err(ConnectError::Bind(errno));
            }
        };
        Ok(Self::new(parameters, tx, rx, port))
    }

    fn new(
        parameters: &ConnectParameters,
        tx: BackRing<MappedPage, TX_WORDS>,
        rx: BackRing<MappedPage, RX_WORDS>,
        port: Port,
    ) -> Self {
        let max_plain = usize::from(parameters.mtu).saturating_add(LINK_HEADER_LEN);
        Self {
            tag: parameters.tag,
            peer: parameters.peer,
            port,
            features: parameters.features,
            max_plain: u16::try_from(max_plain).unwrap_or(u16::MAX),
            tx_ready: tx.produced(),
            rx_ready: rx.produced(),
            tx,
            rx,
            rx_seen: 0,
            generation: u64::MAX,
            deficit: 0,
            held_back: false,
            queue: Queue::new(),
            blocked_since: None,
            stalled: false,
            next_poll: None,
            copies_tried: 0,
            copies_failed: 0,
            failures_in_row: 0,
            failed: None,
            counters: VifCounters::default(),
        }
    }

    /// Unmaps the rings, closes the port and gives the queue's pages back.
    ///
    /// A batch may still hold copies and frames of this vif; they end harmlessly.
    pub fn disconnect<H: Hypervisor + ?Sized>(mut self, hv: &mut H) {
        self.queue.clear(hv);
        hv.unmap(self.rx.into_memory());
        hv.unmap(self.tx.into_memory());
        hv.close_port(self.port);
    }

    /// Notes which responses are ready, before anything is added to the batch.
    pub(crate) fn enter(&mut self, batch: &Batch) {
        if self.generation == batch.generation() {
            return;
        }
        self.generation = batch.generation();
        self.tx_ready = self.tx.produced();
        self.rx_ready = self.rx.produced();
        if self.copies_failed < self.copies_tried {
            self.failures_in_row = 0;
        } else {
            self.failures_in_row = self.failures_in_row.saturating_add(self.copies_failed);
        }
        self.copies_tried = 0;
        self.copies_failed = 0;
    }

    /// Gives the client up when nothing can be copied from or to it any more.
    pub(crate) const fn check_copy_failures(&self) -> Result<(), PeerError> {
        if self.failures_in_row >= MAX_COPY_FAILURES {
            return Err(PeerError::CopyFailures);
        }
        Ok(())
    }

    /// Corrects the responses of a frame or slot whose copy failed. Ignores failures of other vifs.
    pub fn amend(&mut self, failure: &Failure<'_>) {
        if failure.tag() != self.tag {
            return;
        }
        match &failure.kind {
            FailureKind::Received { frame, ids } => self.amend_received(frame, ids),
            FailureKind::Sending(slot) => self.amend_sent(slot),
        }
    }

    /// Shows the client all responses whose copies are done. Returns the port to notify, if the client wants it.
    ///
    /// `batch` is the one that this vif's copies go into.
    pub fn publish(&mut self, batch: &Batch) -> Option<PortNumber> {
        if self.failed.is_some() {
            return None;
        }
        // Operations added since the last copy hold back the responses written since.
        let pending = self.generation == batch.generation() && !batch.is_empty();
        let (tx, rx) = if pending {
            (self.tx_ready, self.rx_ready)
        } else {
            (self.tx.produced(), self.rx.produced())
        };
        let notify = self.tx.publish_until(tx) | self.rx.publish_until(rx);
        if !notify {
            return None;
        }
        self.counters.notifications = self.counters.notifications.wrapping_add(1);
        Some(self.port.number())
    }

    /// Asks the client for a notification of new requests, and of buffers if frames wait for them.
    ///
    /// Returns whether there is something to do already: then do not sleep, unless the vif [is held
    /// back](Vif::is_held_back).
    ///
    /// # Errors
    ///
    /// As [`Vif::receive`].
    pub fn arm(&mut self) -> Result<bool, PeerError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let requests = self.tx.arm(1);
        let requests =
            requests.map_err(|_| self.give_up(PeerError::ImpossibleProducer(Ring::Tx)))?;
        let Some(needed) = self.queue.needed_slots() else {
            return Ok(requests);
        };
        let buffers = self.rx.arm(needed);
        let buffers = buffers.map_err(|_| self.give_up(PeerError::ImpossibleProducer(Ring::Rx)))?;
        Ok(requests || buffers)
    }

    /// Whether the last [`Vif::receive`] left frames in the ring because the uplink has too few tx slots or the pool
    /// too few pages.
    ///
    /// Nothing that the client does changes that, so this is no reason to stay awake: the uplink notifies when slots come
    /// free (`netfront`'s `arm` asks for it), and pages come with them. Call [`Vif::receive`] after each wake-up as long as
    /// this holds.
    #[must_use]
    pub const fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Ends all service for the client.
    #[cold]
    pub(crate) const fn give_up(&mut self, error: PeerError) -> PeerError {
        self.failed = Some(error);
        error
    }

    /// When [`Vif::flush`] should be called at the latest; `None` while nothing is queued.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let deadline = self.queue.deadline()?;
        Some(self.next_poll.map_or(deadline, |poll| poll.min(deadline)))
    }

    /// Whether the client has not taken a waiting frame for [`crate::STALL_AFTER`]. It is tried again with each send.
    #[must_use]
    pub const fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Why the rings are not served any more, if so.
    #[must_use]
    pub const fn failed(&self) -> Option<PeerError> {
        self.failed
    }

    /// Frames that wait for the client's buffers.
    #[must_use]
    pub fn queued_frames(&self) -> usize {
        self.queue.len()
    }

    /// Our end of the event channel, to take its pending bit and to wait for.
    #[must_use]
    pub const fn port(&self) -> PortNumber {
        self.port.number()
    }

    /// The kernel's name for this connection.
    #[must_use]
    pub const fn tag(&self) -> VifTag {
        self.tag
    }

    /// The client's domain.
    #[must_use]
    pub const fn peer(&self) -> DomId {
        self.peer
    }

    /// What the frontend can do.
    #[must_use]
    pub const fn features(&self) -> FrontendFeatures {
        self.features
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> &VifCounters {
        &self.counters
    }
}

/// Maps a ring and takes it over as the client left it; nothing stays mapped on error.
fn attach<H: Hypervisor + ?Sized, const WORDS: usize>(
    hv: &mut H,
    peer: DomId,
    gref: GrantRef,
    ring: Ring,
) -> Result<BackRing<MappedPage, WORDS>, ConnectError> {
    let mapped = hv.map(peer, gref);
    let mapped = mapped.map_err(|status| ConnectError::Map { ring, status })?;
    BackRing::attach(mapped).map_err(|mapped| {
        hv.unmap(mapped);
        ConnectError::Indices { ring }
    })
}
