//! Plain values that show what the engine holds, for snapshots.

use alloc::vec::Vec;
use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::frame::{ClientId, Mac};
use crate::verdict::DropCounters;

/// An attached client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientView {
    /// Its number.
    pub id: ClientId,
    /// The domain behind the vif.
    pub domid: u16,
    /// Where its frames go.
    pub mac: Mac,
    /// Its real addresses.
    pub addresses: Vec<IpAddr>,
    /// Flows that its addresses own.
    pub flows: u32,
    /// Frames from the client that went on.
    pub frames_up: u64,
    /// Bytes of IP packet in them.
    pub bytes_up: u64,
    /// Frames that went on to the client.
    pub frames_down: u64,
    /// Bytes of IP packet in them.
    pub bytes_down: u64,
    /// What was dropped of the client's frames, and of frames for it.
    pub drops: DropCounters,
}

/// The state of a flow, as far as its timeout depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlowState {
    /// TCP: the first SYN was seen.
    SynSent,
    /// TCP: both sides sent a SYN, none acknowledged.
    SynSent2,
    /// TCP: the SYN was answered.
    SynReceived,
    /// TCP: data may flow.
    Established,
    /// TCP: one side has sent a FIN.
    FinWait,
    /// TCP: that FIN was acknowledged.
    CloseWait,
    /// TCP: both sides have sent a FIN.
    LastAck,
    /// TCP: both FINs were acknowledged.
    TimeWait,
    /// TCP: reset.
    Closed,
    /// No reply was seen.
    Unreplied,
    /// A reply was seen.
    Replied,
    /// Replies were seen for a while.
    Stream,
}

impl FlowState {
    /// The name that Linux tools use, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SynSent => "syn-sent",
            Self::SynSent2 => "syn-sent2",
            Self::SynReceived => "syn-recv",
            Self::Established => "established",
            Self::FinWait => "fin-wait",
            Self::CloseWait => "close-wait",
            Self::LastAck => "last-ack",
            Self::TimeWait => "time-wait",
            Self::Closed => "close",
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::Stream => "stream",
        }
    }
}

/// A flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// IP protocol number.
    pub protocol: u8,
    /// The client's address and port, or identifier of an ICMP query.
    pub source: (IpAddr, u16),
    /// Where the client sends to.
    pub destination: (IpAddr, u16),
    /// What the outside sees as the source.
    pub translated_source: (IpAddr, u16),
    /// Where the packets really go: differs from `destination` for DNS.
    pub translated_destination: (IpAddr, u16),
    /// Its state.
    pub state: FlowState,
    /// Seconds until it idles out.
    pub expires_seconds: u32,
    /// Packets from the client, modulo 2^32.
    pub packets_up: u32,
    /// Packets to the client, modulo 2^32.
    pub packets_down: u32,
    /// The rule that let it start, or `None` for the policy.
    pub rule: Option<u16>,
}

/// A place in the list of flows, to go on from. The default is the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCursor(pub(crate) u32);
