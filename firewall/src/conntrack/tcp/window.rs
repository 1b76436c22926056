//! Windows: whether the numbers of a segment fit what both sides have said before (van Rooij's
//! conditions), and what is learnt from it.

use super::segment::{ACK, RST, SYN, Segment, after, announced, before, highest_sack};
use super::state::{Event, State};
use super::{SIDE_ACK_KNOWN, SIDE_LIBERAL, SIDE_SACK, SIDE_SCALES, SIDE_UNACKNOWLEDGED, Track};

/// Acknowledgements may lag behind by a window, or by this much if that is more.
pub(super) const MIN_ACK_WINDOW: u32 = 66_000;

/// What the windows say about a segment.
pub(super) enum Window {
    Accept,
    Ignore,
    Invalid,
}

impl Track<'_> {
    /// The sender's first SYN, or a new one that replaces it.
    fn begin_sender(&mut self, segment: &Segment, options: &[u8], reply: bool) {
        self.sender.end = segment.end;
        self.sender.max_end = segment.end;
        self.sender.max_window = u32::from(segment.window).max(1);
        // A SYN without any option leaves standing what was announced before.
        if !options.is_empty() {
            let (scale, flags) = announced(options);
            self.sender.scale = scale;
            self.sender.flags = self.sender.flags & SIDE_LIBERAL | flags;
        }
        // Both must want scaling, which is known once the other side has answered.
        if reply && self.sender.flags & self.receiver.flags & SIDE_SCALES == 0 {
            self.sender.scale = 0;
            self.receiver.scale = 0;
        }
    }

    /// Checks the segment against the windows and learns from it.
    #[inline(always)]
    pub(super) fn window(&mut self, segment: &Segment, options: &[u8], reply: bool) -> Window {
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
                self.begin_sender(segment, options, reply);
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
            self.begin_sender(segment, options, reply);
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
