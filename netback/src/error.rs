//! Why a vif cannot be connected, is given up, or drops a frame.

use core::fmt;

use xen::{Errno, GrantStatus};

/// One of the two rings of a vif. Tx and rx are the client's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ring {
    /// Frames from the client.
    Tx,
    /// Frames to the client.
    Rx,
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tx => "tx",
            Self::Rx => "rx",
        })
    }
}

/// Why a vif was not connected. Everything done before the error is undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectError {
    /// The client does not ask for `request-rx-copy`: it expects page flipping, which is no more.
    NoRxCopy,
    /// Both rings name the same page, which only an attacker does.
    SameRing,
    /// A ring page could not be mapped.
    Map {
        /// Which ring.
        ring: Ring,
        /// What Xen said.
        status: GrantStatus,
    },
    /// The indices in a ring page are further apart than the ring is long.
    Indices {
        /// Which ring.
        ring: Ring,
    },
    /// The event channel could not be bound.
    Bind(Errno),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRxCopy => f.write_str("frontend does not request rx copy"),
            Self::SameRing => f.write_str("one page for both rings"),
            Self::Map { ring, status } => write!(f, "mapping the {ring} ring: {status}"),
            Self::Indices { ring } => write!(f, "impossible indices in the {ring} ring"),
            Self::Bind(errno) => write!(f, "binding the event channel: {errno}"),
        }
    }
}

/// What a client did that no correct frontend does. Its vif is given up; nobody else is affected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerError {
    /// A producer index too far ahead, or going backwards.
    ImpossibleProducer(Ring),
    /// A frame that is not whole within the published requests.
    IncompleteFrame,
    /// A frame of more data slots than even a careless frontend makes.
    TooManySlots,
    /// A fragment that leaves its page.
    CrossesPage,
    /// More extra-info slots on one frame than there are sensible ones.
    TooManyExtras,
    /// An extra-info slot of a type that the protocol does not know.
    UnknownExtra(u8),
    /// Two extra-info slots of one type on one frame.
    DuplicateExtra(u8),
    /// A GSO slot with segment size 0 or an unknown family.
    BadGso,
    /// Too many copies in a row failed: the client is gone or plays.
    CopyFailures,
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ImpossibleProducer(ring) => {
                write!(f, "impossible producer index in the {ring} ring")
            }
            Self::IncompleteFrame => f.write_str("incomplete frame in the tx ring"),
            Self::TooManySlots => f.write_str("frame of too many slots"),
            Self::CrossesPage => f.write_str("fragment leaves its page"),
            Self::TooManyExtras => f.write_str("too many extra slots"),
            Self::UnknownExtra(kind) => write!(f, "unknown extra type {kind}"),
            Self::DuplicateExtra(kind) => write!(f, "two extras of type {kind}"),
            Self::BadGso => f.write_str("malformed GSO extra"),
            Self::CopyFailures => f.write_str("too many failed copies in a row"),
        }
    }
}

/// Why a frame was not sent to a client. The frame is gone and counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendDrop {
    /// More than one slot, and the client takes no scatter-gather.
    NoScatterGather,
    /// A GSO frame of a family that the client does not take; segment it.
    NoGso,
    /// Segments that cannot be sent: none, too many, or longer than a page.
    BadSegments,
    /// The queue is full.
    QueueFull,
    /// The client has posted no usable buffers for long.
    Stalled,
    /// The page pool is too low to queue anything.
    PoolLow,
    /// The vif's rings are not served any more, or there was no frame.
    Broken,
}

/// What became of a frame that was accepted for a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// Its copies are in the batch.
    Copying,
    /// It waits for the client's buffers.
    Queued,
}
