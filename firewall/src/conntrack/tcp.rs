//! TCP tracking: states and windows, so that only segments that a real endpoint would take pass.
//!
//! The semantics are those of Linux connection tracking, as far as a verdict depends on them: the
//! state of a flow follows flags in both directions, sequence and acknowledgement numbers must lie in
//! windows learnt from the other side (van Rooij's conditions), a flow may be picked up in the middle
//! and is then tracked liberally. Not tracked, because only timeouts would depend on it: how often a
//! segment was retransmitted.
//!
//! Trust: every number here was chosen by a client or a server. All arithmetic wraps on purpose.
//!
//! Source: G. van Rooij, "Real Stateful TCP Packet Filtering in IP Filter"; RFC 9293; RFC 5961
//! (challenge acknowledgements); RFC 7323 (window scaling); observed behaviour of Linux 6.18.

use crate::verdict::DropReason;
use crate::view::FlowState;

pub(crate) mod steady;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;

/// Flags that say nothing about the state: PSH and the two of congestion notification.
const NEUTRAL: u8 = 0x08 | 0x40 | 0x80;

/// A bit for every combination of the other flags that a segment may have.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const POSSIBLE_FLAGS: u64 = {
    let combinations = [
        SYN,
        SYN | URG,
        SYN | ACK,
        RST,
        RST | ACK,
        FIN | ACK,
        FIN | ACK | URG,
        ACK,
        ACK | URG,
    ];
    let mut bits = 0;
    let mut at = 0;
    while at < combinations.len() {
        bits |= 1 << combinations[at];
        at += 1;
    }
    bits
};

/// Acknowledgements may lag behind by a window, or by this much if that is more.
const MIN_ACK_WINDOW: u32 = 66_000;

/// Largest window scale (RFC 7323 2.3).
const MAX_SCALE: u8 = 14;

// Flags of a side.
const SIDE_SCALES: u8 = 1;
const SIDE_SACK: u8 = 2;
const SIDE_CLOSED_FIRST: u8 = 4;
const SIDE_LIBERAL: u8 = 8;
const SIDE_ACK_KNOWN: u8 = 16;
const SIDE_UNACKNOWLEDGED: u8 = 32;

// Flags of what was seen last, beside the side flags that a SYN announces.
const LAST_SIMULTANEOUS_OPEN: u8 = 64;
const LAST_CHALLENGE_EXPECTED: u8 = 128;

/// What is known about one endpoint. Packed, so that two bytes are left in the half of a flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, packed(2))]
pub(crate) struct Side {
    /// Highest sequence number it has sent, plus one.
    end: u32,
    /// Highest sequence number that the other side allows it to send, plus one.
    max_end: u32,
    /// Largest window it has announced; zero while nothing was seen of it.
    max_window: u32,
    /// Highest acknowledgement it has sent.
    max_ack: u32,
    scale: u8,
    flags: u8,
}

/// What the flow did last, to come back into step with endpoints that know better. Packed, so that two
/// bytes are left in a flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, packed(2))]
pub(crate) struct Last {
    end: u32,
    window: u16,
    scale: u8,
    flags: u8,
    kind: u8,
    reply: bool,
}

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
enum Event {
    Syn = 0,
    SynAck = 1,
    Fin = 2,
    Ack = 3,
    Rst = 4,
    Nothing = 5,
}

/// Where a transition leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    To(State),
    /// Let it pass, believe nothing.
    Ignore,
    Invalid,
}

/// The transitions, one row for each event: original direction first, then replies.
const TRANSITIONS: [[[Next; 10]; 6]; 2] = {
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
    const fn patience(self) -> Patience {
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

/// A segment, as far as tracking reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    seq: u32,
    ack: u32,
    /// Sequence number after the segment.
    end: u32,
    window: u16,
    flags: u8,
}

#[inline(always)]
const fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > 0x7fff_ffff
}

#[inline(always)]
const fn after(a: u32, b: u32) -> bool {
    before(b, a)
}

impl Segment {
    /// Reads the header, whose length was checked; `len` is that of header and payload.
    #[inline(always)]
    pub(crate) fn new(header: &[u8; 20], len: u32) -> Self {
        let h = header;
        let seq = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
        let flags = h[13];
        let payload = len.wrapping_sub(u32::from(h[12] >> 4) * 4);
        let end = seq
            .wrapping_add(payload)
            .wrapping_add(u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0));
        Self {
            seq,
            ack: u32::from_be_bytes([h[8], h[9], h[10], h[11]]),
            end,
            window: u16::from_be_bytes([h[14], h[15]]),
            flags,
        }
    }

    /// Whether the flags can be on a segment at all.
    #[inline(always)]
    pub(crate) const fn flags_are_possible(&self) -> bool {
        POSSIBLE_FLAGS >> (self.flags & !NEUTRAL & 0x3f) & 1 != 0
    }

    /// Whether the segment only asks for a connection.
    pub(crate) const fn is_first(&self) -> bool {
        self.flags & (FIN | SYN | RST | ACK) == SYN
    }

    /// Whether the segment only asks for a connection, with nothing unusual about it.
    #[inline(always)]
    pub(crate) const fn is_plain_first(&self) -> bool {
        self.flags & (FIN | SYN | RST | ACK | URG) == SYN
    }

    /// Whether the segment starts or ends something.
    #[inline(always)]
    pub(crate) const fn is_control(&self) -> bool {
        self.flags & (SYN | FIN | RST) != 0
    }

    /// Whether the segment is one that segmentation offload makes no sense for.
    pub(crate) const fn is_unfit_for_gso(&self) -> bool {
        self.flags & (SYN | RST | URG) != 0
    }

    #[inline(always)]
    const fn event(&self) -> Event {
        if self.flags & (SYN | FIN | RST) == 0 {
            return if self.flags & ACK != 0 {
                Event::Ack
            } else {
                Event::Nothing
            };
        }
        if self.flags & RST != 0 {
            Event::Rst
        } else if self.flags & SYN != 0 {
            if self.flags & ACK != 0 {
                Event::SynAck
            } else {
                Event::Syn
            }
        } else {
            Event::Fin
        }
    }
}

/// What a SYN announces: window scale and selective acknowledgement.
fn announced(options: &[u8]) -> (u8, u8) {
    let (mut scale, mut flags) = (0, 0);
    for (kind, value) in Options(options) {
        match (kind, value) {
            (3, [shift]) => {
                scale = (*shift).min(MAX_SCALE);
                flags |= SIDE_SCALES;
            }
            (4, []) => flags |= SIDE_SACK,
            _ => {}
        }
    }
    (scale, flags)
}

/// The highest sequence number that a segment acknowledges selectively, or `ack`.
#[inline(always)]
fn highest_sack(options: &[u8], ack: u32) -> u32 {
    // By far most segments carry nothing but timestamps.
    if options.len() == 12 && options.first_chunk() == Some(&[1, 1, 8, 10]) {
        return ack;
    }
    scan_sack(options, ack)
}

fn scan_sack(options: &[u8], ack: u32) -> u32 {
    let mut highest = ack;
    for (kind, value) in Options(options) {
        if kind != 5 {
            continue;
        }
        let (blocks, _) = value.as_chunks::<8>();
        for [_, _, _, _, right @ ..] in blocks {
            let right = u32::from_be_bytes(*right);
            if after(right, highest) {
                highest = right;
            }
        }
    }
    highest
}

/// Walks TCP options; stops at anything that makes no sense.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0 {
                [] | [0, ..] => return None,
                [1, rest @ ..] => self.0 = rest,
                [kind, len, ..] => {
                    let value = self.0.get(2..usize::from(*len))?;
                    self.0 = self.0.get(usize::from(*len)..)?;
                    return Some((*kind, value));
                }
                [_] => return None,
            }
        }
    }
}

/// What tracking says about a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tracked {
    /// It belongs to the flow.
    Accept,
    /// It may pass, but proves nothing: the flow does not live longer for it.
    Ignore,
    /// It may pass and is the flow's last: it refused a connection that was never answered.
    Last,
    /// It must not pass.
    Invalid(DropReason),
    /// It opens the connection anew: forget this flow and take the segment as the first of another.
    Restart,
}

/// The tracked state of one TCP flow, borrowed from its entry.
#[derive(Debug)]
pub(crate) struct Track<'a> {
    pub(crate) sender: &'a mut Side,
    pub(crate) receiver: &'a mut Side,
    pub(crate) last: &'a mut Last,
    pub(crate) state: &'a mut State,
    pub(crate) patience: &'a mut Patience,
    /// Whether a reply was seen before this segment.
    pub(crate) replied: bool,
    /// Set once data has passed both ways.
    pub(crate) assured: &'a mut bool,
}

impl Segment {
    /// Whether the segment may start a flow.
    pub(crate) const fn may_start(&self) -> Result<(), DropReason> {
        if !self.flags_are_possible() {
            return Err(DropReason::TcpFlags);
        }
        match self.event() {
            Event::Syn | Event::Ack => Ok(()),
            Event::SynAck | Event::Fin | Event::Rst | Event::Nothing => Err(DropReason::TcpState),
        }
    }

    /// Sets the sides that a flow starts with, if the segment may start one.
    pub(crate) fn start(&self, options: &[u8], sender: &mut Side, receiver: &mut Side) {
        let window = u32::from(self.window).max(1);
        sender.end = self.end;
        sender.max_end = self.end;
        sender.max_window = window;
        if self.is_first() {
            (sender.scale, sender.flags) = announced(options);
        } else {
            // Picked up in the middle: scaling is unknown, so windows prove little.
            sender.max_end = self.end.wrapping_add(window);
            sender.flags = SIDE_SACK | SIDE_LIBERAL;
            receiver.flags = SIDE_SACK | SIDE_LIBERAL;
        }
    }
}

/// What a flow is after its first SYN: the receiver may send as much as that SYN announced.
pub(crate) fn begin_with_syn(segment: &Segment, receiver: &mut Side, last: &mut Last) -> State {
    let window = u32::from(segment.window);
    receiver.max_end = window.max(1);
    last.kind = Event::Syn as u8;
    last.reply = false;
    State::SynSent
}

enum Window {
    Accept,
    Ignore,
    Invalid,
}

impl Track<'_> {
    /// Tracks one segment; `reply` is its direction.
    pub(crate) fn follow(&mut self, segment: &Segment, options: &[u8], reply: bool) -> Tracked {
        if !segment.flags_are_possible() {
            return Tracked::Invalid(DropReason::TcpFlags);
        }
        let event = segment.event();
        let old = *self.state;
        if old == State::Established && event == Event::Ack {
            return self.follow_established(segment, options, reply);
        }
        self.follow_change(segment, options, reply, event, old)
    }

    /// Tracks data or an acknowledgement of an established connection: the bulk of all traffic.
    fn follow_established(&mut self, segment: &Segment, options: &[u8], reply: bool) -> Tracked {
        match self.window(segment, options, reply) {
            Window::Accept => {
                self.last.kind = Event::Ack as u8;
                self.last.reply = reply;
                self.settle_established(segment);
                Tracked::Accept
            }
            Window::Ignore => Tracked::Ignore,
            Window::Invalid => Tracked::Invalid(DropReason::TcpWindow),
        }
    }

    /// Timeout and assurance after an acknowledgement in the established state.
    #[inline(always)]
    fn settle_established(&mut self, segment: &Segment) {
        let unacknowledged = (self.sender.flags | self.receiver.flags) & SIDE_UNACKNOWLEDGED != 0;
        *self.patience = if !self.replied || unacknowledged || segment.window == 0 {
            Patience::Unacknowledged
        } else {
            Patience::Established
        };
        *self.assured |= self.replied;
    }

    #[inline(never)]
    fn follow_change(
        &mut self,
        segment: &Segment,
        options: &[u8],
        reply: bool,
        event: Event,
        mut old: State,
    ) -> Tracked {
        let next = TRANSITIONS
            .get(usize::from(reply))
            .and_then(|rows| rows.get(event as usize))
            .and_then(|row| row.get(old as usize))
            .copied()
            .unwrap_or(Next::Invalid);
        let mut new = match next {
            Next::To(state) => state,
            Next::Ignore => match self.resynchronise(segment, reply, event) {
                Some(state) => {
                    old = State::SynSent;
                    state
                }
                None => return self.ignore(segment, options, reply, event, old),
            },
            Next::Invalid => return Tracked::Invalid(DropReason::TcpState),
        };
        match new {
            State::SynSent if old as u8 >= State::TimeWait as u8 => {
                let closed = (self.sender.flags | self.receiver.flags) & SIDE_CLOSED_FIRST != 0;
                let reset = self.last.reply == reply && self.last.kind == Event::Rst as u8;
                if closed || reset {
                    return Tracked::Restart;
                }
                return self.ignore(segment, options, reply, event, old);
            }
            State::SynSent2 => self.last.flags |= LAST_SIMULTANEOUS_OPEN,
            State::SynReceived
                if reply
                    && event == Event::Ack
                    && self.last.flags & LAST_SIMULTANEOUS_OPEN != 0 =>
            {
                new = State::Established;
            }
            State::TimeWait
                if old == State::LastAck
                    && event == Event::Ack
                    && self.last.reply != reply
                    && self.last.kind == Event::Syn as u8
                    && self.last.flags & LAST_CHALLENGE_EXPECTED != 0 =>
            {
                self.last.flags &= !LAST_CHALLENGE_EXPECTED;
                return Tracked::Ignore;
            }
            State::Closed if event == Event::Rst => {
                let (reset, in_window) = self.reset(segment, reply, old);
                match reset {
                    Reset::Believe => {}
                    Reset::Doubt => new = old,
                    Reset::Invalid => return Tracked::Invalid(DropReason::TcpWindow),
                }
                if in_window {
                    return self.settle(segment, reply, event, old, new);
                }
            }
            _ => {}
        }
        match self.window(segment, options, reply) {
            Window::Accept => self.settle(segment, reply, event, old, new),
            Window::Ignore => Tracked::Ignore,
            Window::Invalid => Tracked::Invalid(DropReason::TcpWindow),
        }
    }

    /// A SYN/ACK that answers a SYN which was let through without belief: the endpoints agree with
    /// each other and not with us. Takes over what that SYN said.
    fn resynchronise(&mut self, segment: &Segment, reply: bool, event: Event) -> Option<State> {
        let answers = event == Event::SynAck
            && self.last.kind == Event::Syn as u8
            && self.last.reply != reply
            && segment.ack == self.last.end;
        if !answers {
            return None;
        }
        self.last.flags &= !LAST_CHALLENGE_EXPECTED;
        *self.receiver = Side {
            end: self.last.end,
            max_end: self.last.end,
            max_window: u32::from(self.last.window).max(1),
            max_ack: self.receiver.max_ack,
            scale: self.last.scale,
            flags: self.last.flags & (SIDE_SCALES | SIDE_SACK),
        };
        *self.sender = Side::default();
        Some(State::SynReceived)
    }

    /// Lets a segment pass and remembers what it said.
    fn ignore(
        &mut self,
        segment: &Segment,
        options: &[u8],
        reply: bool,
        event: Event,
        old: State,
    ) -> Tracked {
        self.last.kind = event as u8;
        self.last.reply = reply;
        self.last.end = segment.end;
        self.last.window = segment.window;
        if event == Event::Ack && reply && old == State::SynSent {
            // A server that knows of an older connection challenges the new SYN with this.
            self.sender.max_ack = segment.ack;
        }
        if event == Event::Syn && !reply {
            let (scale, flags) = announced(options);
            self.last.scale = scale;
            self.last.flags = flags;
            if old == State::LastAck {
                self.last.flags |= LAST_CHALLENGE_EXPECTED;
            }
        }
        Tracked::Ignore
    }

    /// How far a reset is to be believed, and whether to do so without looking at the window.
    fn reset(&self, segment: &Segment, reply: bool, old: State) -> (Reset, bool) {
        let established = old == State::Established && *self.assured;
        let mut verdict = Reset::Believe;
        if self.receiver.flags & SIDE_ACK_KNOWN != 0 {
            let expected = self.receiver.max_ack;
            // A reset that answers a SYN has no sequence number.
            if segment.seq == 0 && !established {
                return (Reset::Believe, false);
            }
            if before(segment.seq, expected) {
                return (Reset::Invalid, false);
            }
            let in_train = self.last.kind == Event::Ack as u8
                && self.last.reply == reply
                && segment.seq == self.last.end;
            if !established || segment.seq == expected || in_train {
                return (Reset::Believe, false);
            }
            // The endpoint may answer with a challenge, so the flow must live on.
            verdict = Reset::Doubt;
        }
        // It answers a challenge, with the number that the challenge asks for.
        if old == State::SynSent
            && !reply
            && self.last.reply
            && self.last.kind == Event::Ack as u8
            && segment.seq == self.receiver.max_ack
        {
            return (Reset::Believe, true);
        }
        // It refuses a segment that was let through without belief, and may acknowledge more than
        // is known here.
        let refuses = (self.replied && self.last.kind == Event::Syn as u8)
            || (!*self.assured && self.last.kind == Event::Ack as u8);
        (verdict, refuses && segment.ack == self.last.end)
    }

    /// The segment is in the window: the flow changes.
    fn settle(
        &mut self,
        segment: &Segment,
        reply: bool,
        event: Event,
        old: State,
        new: State,
    ) -> Tracked {
        self.last.kind = event as u8;
        self.last.reply = reply;
        *self.state = new;
        if old != new && new == State::FinWait {
            self.sender.flags |= SIDE_CLOSED_FIRST;
        }
        if !self.replied && event == Event::Rst {
            return Tracked::Last;
        }
        let unacknowledged = (self.sender.flags | self.receiver.flags) & SIDE_UNACKNOWLEDGED != 0;
        let usual = if event == Event::Rst {
            Patience::Closed
        } else {
            new.patience()
        };
        let doubtful = unacknowledged
            || (event == Event::Ack && segment.window == 0)
            || (!self.replied && new == State::Established);
        *self.patience = if doubtful && usual == Patience::Established {
            Patience::Unacknowledged
        } else {
            usual
        };
        if self.replied
            && matches!(old, State::SynReceived | State::Established)
            && new == State::Established
        {
            *self.assured = true;
        }
        Tracked::Accept
    }

    /// The sender's first SYN, or a new one that replaces it.
    fn begin_sender(&mut self, segment: &Segment, options: &[u8]) {
        let (scale, flags) = announced(options);
        self.sender.end = segment.end;
        self.sender.max_end = segment.end;
        self.sender.max_window = u32::from(segment.window).max(1);
        self.sender.scale = scale;
        self.sender.flags = flags;
        if flags & self.receiver.flags & SIDE_SCALES == 0 {
            self.sender.scale = 0;
            self.receiver.scale = 0;
        }
    }

    /// Checks the segment against the windows and learns from it.
    #[inline(always)]
    fn window(&mut self, segment: &Segment, options: &[u8], reply: bool) -> Window {
        let mut seq = segment.seq;
        let mut end = segment.end;
        let mut ack = segment.ack;
        let mut sack = ack;
        if !options.is_empty() && self.receiver.flags & SIDE_SACK != 0 {
            sack = highest_sack(options, ack);
        }
        let syn = segment.flags & SYN != 0;
        if self.sender.max_window == 0 {
            if syn {
                self.begin_sender(segment, options);
                if segment.flags & ACK == 0 {
                    return Window::Accept;
                }
            } else {
                self.meet_sender(segment, sack);
            }
        } else if syn
            && after(end, self.sender.end)
            && matches!(*self.state, State::SynSent | State::SynReceived)
        {
            self.begin_sender(segment, options);
            if reply && segment.flags & ACK == 0 {
                return Window::Accept;
            }
        }
        // No acknowledgement, or a reset with a broken one: take it as right.
        if segment.flags & ACK == 0 || (segment.flags & RST != 0 && ack == 0) {
            ack = self.receiver.end;
            sack = ack;
        }
        if segment.flags & RST != 0 && seq == 0 && *self.state == State::SynSent {
            seq = self.sender.end;
            end = seq;
        }
        let ack_window = self.sender.max_window.max(MIN_ACK_WINDOW);
        let lowest_end = self
            .sender
            .end
            .wrapping_sub(self.receiver.max_window)
            .wrapping_sub(1);
        let lowest_ack = self.receiver.end.wrapping_sub(ack_window).wrapping_sub(1);
        if !before(seq, self.sender.max_end.wrapping_add(1)) {
            return self.overshoot(end, sack, lowest_end, lowest_ack);
        }
        if !before(sack, self.receiver.end.wrapping_add(1)) {
            return self.judge(Window::Invalid);
        }
        if self.receiver.max_window != 0 && !after(end, lowest_end) {
            return self.judge(Window::Ignore);
        }
        if !after(sack, lowest_ack) {
            return self.judge(Window::Ignore);
        }
        let scale = if syn { 0 } else { self.sender.scale };
        let window = u32::from(segment.window) << (scale & 15);
        // What was acknowledged selectively is part of the window.
        let swept = window.wrapping_add(sack.wrapping_sub(ack));
        if self.sender.max_window < swept {
            self.sender.max_window = swept;
        }
        if after(end, self.sender.end) {
            self.sender.end = end;
            self.sender.flags |= SIDE_UNACKNOWLEDGED;
        }
        if segment.flags & ACK != 0
            && (self.sender.flags & SIDE_ACK_KNOWN == 0 || after(ack, self.sender.max_ack))
        {
            self.sender.max_ack = ack;
            self.sender.flags |= SIDE_ACK_KNOWN;
        }
        if self.receiver.max_window != 0 && after(end, self.sender.max_end) {
            let beyond = end.wrapping_sub(self.sender.max_end);
            self.receiver.max_window = self.receiver.max_window.wrapping_add(beyond);
        }
        let allowed = sack.wrapping_add(window);
        if after(allowed, self.receiver.max_end.wrapping_sub(1)) {
            // A closed window may be probed with one byte.
            self.receiver.max_end = allowed.wrapping_add(u32::from(window == 0));
        }
        if ack == self.receiver.end {
            self.receiver.flags &= !SIDE_UNACKNOWLEDGED;
        }
        if segment.event() == Event::Ack {
            self.last.end = segment.end;
            self.last.window = segment.window;
        }
        Window::Accept
    }

    /// Liberal flows pass whatever the windows say, and learn nothing from it.
    fn judge(&self, verdict: Window) -> Window {
        if self.sender.flags & SIDE_LIBERAL != 0 {
            Window::Accept
        } else {
            verdict
        }
    }

    /// A segment of a side that was not seen before, in a flow picked up in the middle.
    #[inline(never)]
    fn meet_sender(&mut self, segment: &Segment, sack: u32) {
        let window = (u32::from(segment.window) << (self.sender.scale & 15)).max(1);
        self.sender.end = segment.end;
        self.sender.max_window = window;
        self.sender.max_end = segment.end.wrapping_add(window);
        if self.receiver.max_window == 0 {
            self.receiver.end = sack;
            self.receiver.max_end = sack;
        } else if sack == self.receiver.end.wrapping_add(1) {
            // Most likely the answer to a keep-alive.
            self.receiver.end = sack;
        }
    }

    /// More data than the window allows. Some endpoints do that by a little: then the segment may
    /// pass, so that its acknowledgement does not look wrong later.
    #[inline(never)]
    fn overshoot(&mut self, end: u32, sack: u32, lowest_end: u32, lowest_ack: u32) -> Window {
        let beyond = end.wrapping_sub(self.sender.max_end).wrapping_add(1);
        let by_a_little = self.receiver.max_window != 0
            && after(end, lowest_end)
            && after(sack, lowest_ack)
            && beyond <= self.receiver.max_window
            && before(sack, self.receiver.end.wrapping_add(1));
        if by_a_little {
            self.sender.end = end;
            self.sender.flags |= SIDE_UNACKNOWLEDGED;
            return self.judge(Window::Ignore);
        }
        self.judge(Window::Invalid)
    }
}

/// What a reset is worth.
enum Reset {
    /// It closes the flow.
    Believe,
    /// It may pass, but the flow stays as it is.
    Doubt,
    /// It must not pass.
    Invalid,
}

#[cfg(test)]
mod tests;
