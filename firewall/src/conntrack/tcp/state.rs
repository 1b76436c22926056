//! The states of a connection, what leads from one to another, and how long each may last.
//!
//! Source: the states and transitions of Linux connection tracking, observed with Linux 6.18; RFC 9293
//! 3.3.2.

use crate::view::FlowState;

/// TCP states, with Linux's numbers; they select the column of [`TRANSITIONS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    #[default]
    None = 0,
    SynSent = 1,
    SynReceived = 2,
    Established = 3,
    FinWait = 4,
    CloseWait = 5,
    LastAck = 6,
    TimeWait = 7,
    Closed = 8,
    SynSent2 = 9,
}

/// What a segment does to the state, by the flags that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Event {
    Syn = 0,
    SynAck = 1,
    Fin = 2,
    Ack = 3,
    Rst = 4,
    Nothing = 5,
}

/// Where a transition leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    To(State),
    /// Let it pass, believe nothing.
    Ignore,
    Invalid,
}

/// The transitions, one row for each event: original direction first, then replies.
pub(super) const TRANSITIONS: [[[Next; 10]; 6]; 2] = {
    use Next::{Ignore as IG, Invalid as IV, To};
    const SS: Next = To(State::SynSent);
    const SR: Next = To(State::SynReceived);
    const ES: Next = To(State::Established);
    const FW: Next = To(State::FinWait);
    const CW: Next = To(State::CloseWait);
    const LA: Next = To(State::LastAck);
    const TW: Next = To(State::TimeWait);
    const CL: Next = To(State::Closed);
    const S2: Next = To(State::SynSent2);
    [
        // none, syn-sent, syn-recv, established, fin-wait, close-wait, last-ack, time-wait, close, syn-sent2
        [
            [SS, SS, IG, IG, IG, IG, IG, SS, SS, S2],
            [IV, IV, SR, IV, IV, IV, IV, IV, IV, SR],
            [IV, IV, FW, FW, LA, LA, LA, TW, CL, IV],
            [ES, IV, ES, ES, CW, CW, TW, TW, CL, IV],
            [IV, CL, CL, CL, CL, CL, CL, CL, CL, CL],
            [IV; 10],
        ],
        [
            [IV, S2, IV, IV, IV, IV, IV, SS, IV, S2],
            [IV, SR, IG, IG, IG, IG, IG, IG, IG, SR],
            [IV, IV, FW, FW, LA, LA, LA, TW, CL, IV],
            [IV, IG, SR, ES, CW, CW, TW, TW, CL, IG],
            [IV, CL, CL, CL, CL, CL, CL, CL, CL, CL],
            [IV; 10],
        ],
    ]
};

/// How long a flow may be idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Patience {
    #[default]
    SynSent,
    SynReceived,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Closed,
    /// Data was not acknowledged, or nothing was seen of the other side, or its window is closed.
    Unacknowledged,
    UdpUnreplied,
    UdpStream,
    Icmp,
    Generic,
}

impl Patience {
    /// In seconds; Linux's defaults (`qubes-policy.md` 3.3).
    pub(crate) const fn seconds(self) -> u32 {
        match self {
            Self::Established => 432_000,
            Self::SynSent | Self::FinWait | Self::TimeWait | Self::UdpStream => 120,
            Self::SynReceived | Self::CloseWait => 60,
            Self::LastAck | Self::UdpUnreplied | Self::Icmp => 30,
            Self::Closed => 10,
            Self::Unacknowledged => 300,
            Self::Generic => 600,
        }
    }
}

impl State {
    pub(super) const fn patience(self) -> Patience {
        match self {
            Self::None | Self::SynSent | Self::SynSent2 => Patience::SynSent,
            Self::SynReceived => Patience::SynReceived,
            Self::Established => Patience::Established,
            Self::FinWait => Patience::FinWait,
            Self::CloseWait => Patience::CloseWait,
            Self::LastAck => Patience::LastAck,
            Self::TimeWait => Patience::TimeWait,
            Self::Closed => Patience::Closed,
        }
    }

    /// For views.
    pub(crate) const fn view(self) -> FlowState {
        match self {
            Self::None | Self::SynSent => FlowState::SynSent,
            Self::SynSent2 => FlowState::SynSent2,
            Self::SynReceived => FlowState::SynReceived,
            Self::Established => FlowState::Established,
            Self::FinWait => FlowState::FinWait,
            Self::CloseWait => FlowState::CloseWait,
            Self::LastAck => FlowState::LastAck,
            Self::TimeWait => FlowState::TimeWait,
            Self::Closed => FlowState::Closed,
        }
    }

    /// Whether the flow is on its way out.
    pub(crate) const fn is_closing(self) -> bool {
        matches!(
            self,
            Self::FinWait | Self::CloseWait | Self::LastAck | Self::TimeWait | Self::Closed
        )
    }
}
