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
use segment::{announced, before};
use state::{Event, Next, TRANSITIONS};
use window::Window;

pub(crate) mod segment;
pub(crate) mod state;
pub(crate) mod steady;
mod window;

pub(crate) use segment::Segment;
pub(crate) use state::{Patience, State};

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
                self.settle_established();
                Tracked::Accept
            }
            Window::Ignore => Tracked::Ignore,
            Window::Invalid => Tracked::Invalid(DropReason::TcpWindow),
        }
    }

    /// Timeout and assurance after an acknowledgement in the established state.
    #[inline(always)]
    fn settle_established(&mut self) {
        *self.patience = if !self.replied || self.is_stuck() {
            Patience::Unacknowledged
        } else {
            Patience::Established
        };
        *self.assured |= self.replied;
    }

    /// Whether one side waits: for an acknowledgement, or for the other one's window to open.
    #[inline(always)]
    const fn is_stuck(&self) -> bool {
        (self.sender.flags | self.receiver.flags) & SIDE_UNACKNOWLEDGED != 0
            || self.last.window == 0
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
                    return self.settle(reply, event, old, new);
                }
            }
            _ => {}
        }
        match self.window(segment, options, reply) {
            Window::Accept => self.settle(reply, event, old, new),
            Window::Ignore => Tracked::Ignore,
            Window::Invalid => {
                self.note_refused(reply, event);
                Tracked::Invalid(DropReason::TcpWindow)
            }
        }
    }

    /// Remembers a reset or FIN that does not fit the windows of a connection which was alive. It must
    /// not pass, but is a sign that the connection is over, more so if both sides send one.
    fn note_refused(&mut self, reply: bool, event: Event) {
        let ends = |kind: u8| kind == Event::Fin as u8 || kind == Event::Rst as u8;
        if !*self.assured || !ends(event as u8) {
            return;
        }
        if self.last.reply == reply || !ends(self.last.kind) {
            self.last.kind = event as u8;
            self.last.reply = reply;
        } else if *self.patience == Patience::Established {
            *self.patience = Patience::Unacknowledged;
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
        *self.sender = Side {
            flags: self.sender.flags & SIDE_LIBERAL,
            ..Side::default()
        };
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
        // The ports may belong to the next connection already, of which nothing is known here.
        if old.is_closing() {
            return (Reset::Believe, true);
        }
        let established = old == State::Established && *self.assured;
        let mut verdict = Reset::Believe;
        // After a SYN that was let through, what was acknowledged before it says nothing.
        if self.receiver.flags & SIDE_ACK_KNOWN != 0 && self.last.kind != Event::Syn as u8 {
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
        let after_syn = self.last.kind == Event::Syn as u8 && self.last.reply != reply;
        let refuses =
            (self.replied && after_syn) || (!*self.assured && self.last.kind == Event::Ack as u8);
        (verdict, refuses && segment.ack == self.last.end)
    }

    /// The segment is in the window: the flow changes.
    fn settle(&mut self, reply: bool, event: Event, old: State, new: State) -> Tracked {
        self.last.kind = event as u8;
        self.last.reply = reply;
        *self.state = new;
        if old != new && new == State::FinWait {
            self.sender.flags |= SIDE_CLOSED_FIRST;
        }
        if !self.replied && event == Event::Rst {
            return Tracked::Last;
        }
        // A SYN that is sent again does not keep a flow alive that nobody answers.
        if !self.replied && event == Event::Syn && old == State::SynSent {
            return Tracked::Ignore;
        }
        let usual = if event == Event::Rst {
            Patience::Closed
        } else {
            new.patience()
        };
        *self.patience = if usual == Patience::Established && (!self.replied || self.is_stuck()) {
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
