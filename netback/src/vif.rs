//! One connected client vif.

use core::time::Duration;

use xen::{Checksum, DomId, Frame, GrantRef, Hypervisor, Port, PortNumber, Time};

use crate::batch::{Batch, Failure, VifTag};
use crate::counters::VifCounters;
use crate::error::{ConnectError, PeerError, SendDrop, Sent};

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

/// How a GSO frame is cut into segments for a client that does not take GSO.
///
/// The caller checks the frame's headers and says where the payload starts; the driver moves payload by copy
/// operations and asks the caller for one header per segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segments {
    /// Bytes of each segment's header, Ethernet to TCP; the frame's payload starts there.
    pub header_len: u16,
    /// Payload bytes of each segment but the last, which has the rest.
    pub payload_len: u16,
    /// What to say of the segments' checksums.
    pub checksum: Checksum,
}

impl Segments {
    /// The number of segments that a frame of `frame_len` bytes becomes; 0 if the description makes no sense.
    #[must_use]
    pub fn count(&self, frame_len: usize) -> usize {
        let payload = frame_len.saturating_sub(usize::from(self.header_len));
        match usize::from(self.payload_len) {
            0 => 0,
            each => payload.div_ceil(each),
        }
    }
}

/// One client's connected vif. Lives from [`Vif::connect`] to [`Vif::disconnect`].
#[derive(Debug)]
pub struct Vif {
    tag: VifTag,
    peer: DomId,
    port: Port,
    features: FrontendFeatures,
    failed: Option<PeerError>,
    counters: VifCounters,
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
        let port = hv
            .bind_port(parameters.peer, parameters.event_channel)
            .map_err(ConnectError::Bind)?;
        Ok(Self {
            tag: parameters.tag,
            peer: parameters.peer,
            port,
            features: parameters.features,
            failed: None,
            counters: VifCounters::default(),
        })
    }

    /// Unmaps the rings, closes the port and gives the queue's pages back.
    ///
    /// A batch may still hold copies and frames of this vif; they end harmlessly.
    pub fn disconnect<H: Hypervisor + ?Sized>(self, hv: &mut H) {
        hv.close_port(self.port);
    }

    /// Takes frames out of the tx ring: appends their copies to `batch`, and writes their responses.
    ///
    /// Returns how many frames wait in the batch for [`Batch::next_frame`] by this call. Takes nothing
    /// that does not fit into the batch, the uplink's slots or the page pool.
    ///
    /// # Errors
    ///
    /// [`PeerError`] at the first thing that no correct client does, now or in an earlier call. Frames taken before
    /// it stay in the batch. The rings are not served any more: disconnect.
    pub fn receive<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        budget: Budget,
    ) -> Result<u32, PeerError> {
        let _ = (hv, batch, budget);
        self.failed.map_or(Ok(0), Err)
    }

    /// Sends a frame to the client, or queues it when the client has too few buffers posted.
    ///
    /// Always takes the frame out of the container.
    ///
    /// # Errors
    ///
    /// [`SendDrop`], counted; the frame's pages are back in the pool.
    pub fn send<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
    ) -> Result<Sent, SendDrop> {
        let _ = batch;
        frame.release(hv);
        Err(SendDrop::Broken)
    }

    /// Sends a GSO frame as segments. `write_header(k, header)` writes the header of segment `k`, of exactly
    /// `segments.header_len` bytes; it is called for all segments before anything is sent.
    ///
    /// Always takes the frame out of the container.
    ///
    /// # Errors
    ///
    /// As [`Vif::send`].
    pub fn send_segments<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
        segments: Segments,
        write_header: impl FnMut(usize, &mut [u8]),
    ) -> Result<Sent, SendDrop> {
        let _ = (batch, segments, write_header);
        frame.release(hv);
        Err(SendDrop::Broken)
    }

    /// Sends queued frames as far as the client has buffers, and drops those that waited too long.
    ///
    /// # Errors
    ///
    /// As [`Vif::receive`].
    pub fn flush<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
    ) -> Result<(), PeerError> {
        let _ = (hv, batch);
        self.failed.map_or(Ok(()), Err)
    }

    /// Corrects the responses of a frame or slot whose copy failed. Ignores failures of other vifs.
    pub fn amend(&mut self, failure: &Failure<'_>) {
        let _ = failure;
    }

    /// Shows the client all responses whose copies are done. Returns the port to notify, if the client wants it.
    ///
    /// `batch` is the one that this vif's copies go into.
    pub fn publish(&mut self, batch: &Batch) -> Option<PortNumber> {
        let _ = batch;
        None
    }

    /// Asks the client for a notification of new requests, and of buffers if frames wait for them.
    ///
    /// Returns whether there is something to do already: then do not sleep.
    ///
    /// # Errors
    ///
    /// As [`Vif::receive`].
    pub fn arm(&mut self) -> Result<bool, PeerError> {
        self.failed.map_or(Ok(false), Err)
    }

    /// When [`Vif::flush`] should be called at the latest; `None` while nothing is queued.
    #[must_use]
    pub const fn deadline(&self) -> Option<Time> {
        None
    }

    /// Whether the client has not taken a waiting frame for [`crate::STALL_AFTER`]. It is tried again with each send.
    #[must_use]
    pub const fn is_stalled(&self) -> bool {
        false
    }

    /// Why the rings are not served any more, if so.
    #[must_use]
    pub const fn failed(&self) -> Option<PeerError> {
        self.failed
    }

    /// Frames that wait for the client's buffers.
    #[must_use]
    pub const fn queued_frames(&self) -> usize {
        0
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

const _: Duration = crate::QUEUE_EXPIRY;
