//! The connected uplink: connect, publish, arm, disconnect.
//!
//! The two directions are in `transmit` and `receive`.

use alloc::vec::Vec;
use core::time::Duration;

use xen::netif::{GsoType, RX_WORDS, TX_WORDS};
use xen::ring::{FrontRing, RING_SIZE};
use xen::{Access, DomId, GrantRef, GrantedPage, Hypervisor, Page, Port, PortNumber, Time};

use crate::counters::UplinkCounters;
use crate::error::{ConnectError, DeviceBroken};
use crate::quarantine::Quarantine;
use crate::{
    MAX_HELD_GRANTS, MAX_SWEEP_INTERVAL, MIN_RX_BUFFERS, SWEEP_INTERVAL, TX_EVENT_AFTER,
    TX_RESUME_SLOTS,
};

/// Slots of a ring, as a count of things in memory.
pub(crate) const SLOTS: usize = RING_SIZE as usize;

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

impl BackendFeatures {
    /// Whether the netvm takes GSO frames of this family.
    #[must_use]
    pub const fn takes(&self, family: GsoType) -> bool {
        match family {
            GsoType::TcpV4 => self.gso_tcpv4,
            GsoType::TcpV6 => self.gso_tcpv6,
        }
    }
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
    pub(crate) backend: DomId,
    pub(crate) features: BackendFeatures,
    port: Port,
    pub(crate) tx: FrontRing<GrantedPage, TX_WORDS>,
    pub(crate) rx: FrontRing<GrantedPage, RX_WORDS>,
    /// Pages that the netvm reads, by the id of their request.
    pub(crate) in_flight: Vec<Option<GrantedPage>>,
    /// Ids that are not in flight.
    pub(crate) free_ids: Vec<u8>,
    /// Tx slots in flight that are extra-info slots, which have no id.
    pub(crate) extras_in_flight: u32,
    /// Pages that the netvm writes, by the slot of their request.
    pub(crate) posted: Vec<Option<GrantedPage>>,
    /// How many of them there should be.
    pub(crate) rx_wanted: u32,
    /// Pages to post next. Together with those posted no more than `rx_wanted`.
    pub(crate) spare: Vec<Page>,
    /// Rx responses that were seen and not consumed.
    pub(crate) rx_seen: u32,
    /// When to look for tx responses, and how long to wait after that.
    pub(crate) next_sweep: Option<Time>,
    pub(crate) sweep_interval: Duration,
    /// Pages that the netvm held too long.
    pub(crate) quarantine: Quarantine,
    pub(crate) failed: Option<DeviceBroken>,
    pub(crate) counters: UplinkCounters,
}

impl Uplink {
    /// Makes the rings, grants them, allocates the event channel and posts receive buffers.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]; everything done before it is undone. (Only a netvm that guesses a grant reference in the instant
    /// before it is taken back could keep one page from us; that page is then never used again.)
    pub fn connect<H: Hypervisor + ?Sized>(
        hv: &mut H,
        parameters: &UplinkParameters,
    ) -> Result<Self, ConnectError> {
        if !parameters.features.rx_copy {
            return Err(ConnectError::NoRxCopy);
        }
        let backend = parameters.backend;
        // Grants come last, because they are the only step that a peer could keep us from undoing.
        let port = hv.allocate_port(backend).map_err(ConnectError::Port)?;
        let (tx, rx) = match grant_rings(hv, backend) {
            Ok(rings) => rings,
            Err(error) => {
                hv.close_port(port);
                return Err(error);
            }
        };
        let mut uplink = Self::new(parameters, port, tx, rx);
        uplink.refill(hv);
        Ok(uplink)
    }

    fn new(parameters: &UplinkParameters, port: Port, tx: GrantedPage, rx: GrantedPage) -> Self {
        let mut in_flight = Vec::with_capacity(SLOTS);
        in_flight.resize_with(SLOTS, || None);
        let mut posted = Vec::with_capacity(SLOTS);
        posted.resize_with(SLOTS, || None);
        Self {
            backend: parameters.backend,
            features: parameters.features,
            port,
            tx: FrontRing::new(tx),
            rx: FrontRing::new(rx),
            in_flight,
            free_ids: (0..=u8::MAX).rev().collect(),
            extras_in_flight: 0,
            posted,
            rx_wanted: parameters.rx_buffers.clamp(MIN_RX_BUFFERS, RING_SIZE),
            spare: Vec::with_capacity(SLOTS),
            rx_seen: 0,
            next_sweep: None,
            sweep_interval: SWEEP_INTERVAL,
            quarantine: Quarantine::with_room(2 * SLOTS),
            failed: None,
            counters: UplinkCounters::default(),
        }
    }

    /// What to publish in xenstore.
    #[must_use]
    pub const fn keys(&self) -> UplinkKeys {
        UplinkKeys {
            tx_ring_ref: self.tx.memory().gref(),
            rx_ring_ref: self.rx.memory().gref(),
            event_channel: self.port.number(),
        }
    }

    /// Takes everything back: pages that the netvm still holds go into `quarantine`, the others to the pool.
    pub fn disconnect<H: Hypervisor + ?Sized>(self, hv: &mut H, quarantine: &mut Quarantine) {
        hv.close_port(self.port);
        for page in self.spare {
            hv.release(page);
        }
        let granted = self.in_flight.into_iter().chain(self.posted).flatten();
        let rings = [self.tx.into_memory(), self.rx.into_memory()];
        for page in granted.chain(rings) {
            quarantine.take_back(hv, page);
        }
        quarantine.absorb(self.quarantine);
    }

    /// Shows the netvm all requests written so far. Returns the port to notify, if the netvm wants it.
    pub fn publish(&mut self) -> Option<PortNumber> {
        if self.failed.is_some() {
            return None;
        }
        let notify = self.tx.publish() | self.rx.publish();
        if !notify {
            return None;
        }
        self.counters.notifications = self.counters.notifications.wrapping_add(1);
        Some(self.port.number())
    }

    /// Asks the netvm for a notification of the next received frame, and of tx responses when most slots are used.
    ///
    /// A completed transmission does not wake us while there are slots enough ([`TX_RESUME_SLOTS`]); with fewer we are
    /// woken when there are that many. See also [`Uplink::deadline`].
    /// Returns whether there is something to do already: then do not sleep.
    ///
    /// # Errors
    ///
    /// As [`Uplink::receive`].
    pub fn arm(&mut self) -> Result<bool, DeviceBroken> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let received = self.rx.arm(1);
        let received = received.map_err(|_| self.give_up(DeviceBroken::RxProducer))?;
        let outstanding = self.tx.outstanding();
        let wanted = match TX_RESUME_SLOTS.checked_sub(self.tx_free_slots()) {
            Some(missing @ 1..) => u32::try_from(missing).unwrap_or(1),
            _ => TX_EVENT_AFTER.max(outstanding / 4 * 3),
        };
        let completed = self.tx.arm(wanted);
        let completed = completed.map_err(|_| self.give_up(DeviceBroken::TxProducer))?;
        Ok(received || completed)
    }

    /// When [`Uplink::reclaim`] should be called at the latest; `None` while nothing is in flight.
    #[must_use]
    pub const fn deadline(&self) -> Option<Time> {
        self.next_sweep
    }

    /// Plans the next look at tx responses; further and further apart while there are none.
    pub(crate) fn plan_sweep(&mut self, now: Time, progress: bool) {
        let due = self.next_sweep.is_none_or(|due| now >= due);
        if progress {
            self.sweep_interval = SWEEP_INTERVAL;
        } else if !due {
            return;
        } else if self.next_sweep.is_some() {
            self.sweep_interval = self
                .sweep_interval
                .saturating_mul(2)
                .min(MAX_SWEEP_INTERVAL);
        }
        self.next_sweep = Some(now.plus(self.sweep_interval));
    }

    /// Puts a page aside that the netvm holds although it has answered.
    ///
    /// # Errors
    ///
    /// [`DeviceBroken::HeldGrants`] when that happened too often.
    #[cold]
    pub(crate) fn put_aside(&mut self, granted: GrantedPage) -> Result<(), DeviceBroken> {
        self.quarantine.hold(granted);
        self.counters.held_grants = self.counters.held_grants.wrapping_add(1);
        if self.counters.held_grants >= u64::from(MAX_HELD_GRANTS) {
            return Err(self.give_up(DeviceBroken::HeldGrants));
        }
        Ok(())
    }

    /// Ends all service for the netvm.
    #[cold]
    pub(crate) const fn give_up(&mut self, error: DeviceBroken) -> DeviceBroken {
        self.failed = Some(error);
        error
    }

    /// Tx slots that are free now. A frame needs one per fragment, and one more if it is GSO.
    #[must_use]
    pub fn tx_free_slots(&self) -> usize {
        usize::try_from(self.tx.free()).unwrap_or(usize::MAX)
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

/// Makes and grants both ring pages; all or nothing.
fn grant_rings<H: Hypervisor + ?Sized>(
    hv: &mut H,
    backend: DomId,
) -> Result<(GrantedPage, GrantedPage), ConnectError> {
    let tx = zeroed(hv).ok_or(ConnectError::NoPages)?;
    let Some(rx) = zeroed(hv) else {
        hv.release(tx);
        return Err(ConnectError::NoPages);
    };
    let tx = match hv.grant(backend, tx, Access::ReadWrite) {
        Ok(tx) => tx,
        Err(tx) => {
            hv.release(tx);
            hv.release(rx);
            return Err(ConnectError::NoGrants);
        }
    };
    match hv.grant(backend, rx, Access::ReadWrite) {
        Ok(rx) => Ok((tx, rx)),
        Err(rx) => {
            hv.release(rx);
            if let Ok(tx) = hv.revoke(tx) {
                hv.release(tx);
            }
            Err(ConnectError::NoGrants)
        }
    }
}

fn zeroed<H: Hypervisor + ?Sized>(hv: &mut H) -> Option<Page> {
    let mut page = hv.allocate()?;
    page.fill(0);
    Some(page)
}
