//! Why the uplink cannot be connected, is given up, or does not send a frame.

use core::fmt;

use xen::Errno;

/// Why the uplink was not connected. Everything done before the error is undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectError {
    /// The backend does not offer `feature-rx-copy`.
    NoRxCopy,
    /// The page pool is empty.
    NoPages,
    /// No grant reference is free.
    NoGrants,
    /// No event channel could be allocated.
    Port(Errno),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRxCopy => f.write_str("backend does not offer rx copy"),
            Self::NoPages => f.write_str("no pages for the rings"),
            Self::NoGrants => f.write_str("no grant references for the rings"),
            Self::Port(errno) => write!(f, "allocating the event channel: {errno}"),
        }
    }
}

/// What the netvm did that no correct backend does. Disconnect, and connect anew after a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceBroken {
    /// More tx responses than requests, or an index going backwards.
    TxProducer,
    /// More rx responses than requests, or an index going backwards.
    RxProducer,
    /// A tx response for an id that is not in flight.
    TxId(u16),
    /// More tx responses for extra slots than there were extra slots.
    TxExtra,
    /// An rx response in a slot without a buffer.
    RxSlot,
    /// Too many pages still held after they were answered.
    HeldGrants,
}

impl fmt::Display for DeviceBroken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TxProducer => f.write_str("impossible tx response index"),
            Self::RxProducer => f.write_str("impossible rx response index"),
            Self::TxId(id) => write!(f, "tx response for id {id}, which is not in flight"),
            Self::TxExtra => f.write_str("tx response for an extra that was not sent"),
            Self::RxSlot => f.write_str("rx response without a buffer"),
            Self::HeldGrants => f.write_str("pages still held after they were answered"),
        }
    }
}

/// Why a frame was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TxError {
    /// Too few free slots at the moment. The frame stays in the container.
    Full,
    /// More than one slot, and the netvm takes no scatter-gather. The frame stays in the container.
    NoScatterGather,
    /// A GSO frame of a family that the netvm does not take: segment it. The frame stays in the container.
    NoGso,
    /// Segments that cannot be sent: none, too many, or longer than a page. The frame stays in the container.
    BadSegments,
    /// No grant reference or page is free. The frame is dropped, its pages are back in the pool.
    NoResources,
    /// The rings are not served any more, or there was no frame. The frame stays in the container.
    Broken,
}
