//! The shortest way through TCP tracking: data and acknowledgements of a connection in good order.
//!
//! Nearly every segment carries neither SYN, FIN nor RST, lies in the windows that both sides have
//! announced, and acknowledges nothing selectively. For such a segment [`advance`] does what
//! [`super::Track::follow_established`] does, with everything left out that cannot happen. For any
//! other it changes nothing and says so, and the segment takes the long way.

use super::segment::{ACK, FIN, RST, SYN, after};
use super::state::{Event, Patience};
use super::window::MIN_ACK_WINDOW;
use super::{Last, SIDE_ACK_KNOWN, SIDE_UNACKNOWLEDGED, Side};

/// Bytes of a TCP header from the acknowledgement on.
pub(crate) type Tail = [u8; 12];

/// Whether a segment is nothing but data or an acknowledgement.
#[inline(always)]
pub(crate) const fn is_plain(tail: &Tail) -> bool {
    tail[5] & (FIN | SYN | RST | ACK) == ACK
}

/// Whether a segment only asks for a connection.
#[inline(always)]
pub(crate) const fn is_first(tail: &Tail) -> bool {
    tail[5] & (FIN | SYN | RST | ACK) == SYN
}

/// Bytes of the TCP header.
#[inline(always)]
pub(crate) const fn header_len(tail: &Tail) -> u32 {
    (tail[4] >> 4) as u32 * 4
}

/// A plain segment, without a selective acknowledgement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain {
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) window: u16,
    /// Bytes of data.
    pub(crate) payload: u32,
}

/// Tracks a plain segment of an assured flow in the established state, if it is in good order. If not,
/// returns false, and nothing has changed.
#[inline(always)]
pub(crate) fn advance(
    sender: &mut Side,
    receiver: &mut Side,
    last: &mut Last,
    patience: &mut Patience,
    segment: &Plain,
    reply: bool,
) -> bool {
    let Plain { seq, ack, .. } = *segment;
    let end = seq.wrapping_add(segment.payload);
    let ack_window = sender.max_window.max(MIN_ACK_WINDOW);
    // Each is negative if the segment is on the right side of one edge of the windows.
    let edges = seq.wrapping_add(!sender.max_end)
        & ack.wrapping_add(!receiver.end)
        & sender
            .end
            .wrapping_add(!receiver.max_window)
            .wrapping_sub(end)
        & receiver.end.wrapping_add(!ack_window).wrapping_sub(ack);
    if edges >> 31 == 0 || sender.max_window == 0 || receiver.max_window == 0 {
        return false;
    }
    // A closed window has a timeout and a probe of its own.
    if segment.window == 0 || sender.flags & SIDE_ACK_KNOWN == 0 {
        return false;
    }
    let window = u32::from(segment.window) << (sender.scale & 15);
    if sender.max_window < window {
        sender.max_window = window;
    }
    if after(ack, sender.max_ack) {
        sender.max_ack = ack;
    }
    if after(end, sender.max_end) {
        let beyond = end.wrapping_sub(sender.max_end);
        receiver.max_window = receiver.max_window.wrapping_add(beyond);
    }
    let allowed = ack.wrapping_add(window);
    if after(allowed, receiver.max_end.wrapping_sub(1)) {
        receiver.max_end = allowed;
    }
    if ack == receiver.end {
        receiver.flags &= !SIDE_UNACKNOWLEDGED;
    }
    if after(end, sender.end) {
        sender.end = end;
        sender.flags |= SIDE_UNACKNOWLEDGED;
    }
    last.end = end;
    last.window = segment.window;
    last.kind = Event::Ack as u8;
    last.reply = reply;
    let unacknowledged = (sender.flags | receiver.flags) & SIDE_UNACKNOWLEDGED != 0;
    *patience = if unacknowledged {
        Patience::Unacknowledged
    } else {
        Patience::Established
    };
    true
}

#[cfg(test)]
mod tests {
    use super::super::{SIDE_LIBERAL, SIDE_SACK, SIDE_SCALES, Segment, State, Track, Tracked};
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    /// Numbers near each other and near where they wrap.
    fn number() -> impl Strategy<Value = u32> {
        prop_oneof![0..200_000_u32, (0..200_000_u32).prop_map(|below| !below)]
    }

    fn side() -> impl Strategy<Value = Side> {
        let all = vec![
            SIDE_SCALES,
            SIDE_SACK,
            SIDE_LIBERAL,
            SIDE_ACK_KNOWN,
            SIDE_UNACKNOWLEDGED,
        ];
        let flags = prop::sample::subsequence(all, 0..=5);
        let numbers = (number(), 0..100_000_u32, 0..100_000_u32, number());
        (numbers, 0..=14_u8, flags).prop_map(|((end, ahead, window, ack), scale, flags)| Side {
            end,
            max_end: end.wrapping_add(ahead),
            max_window: if window % 8 == 0 { 0 } else { window },
            max_ack: ack,
            scale,
            flags: flags.into_iter().sum(),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn advance_is_the_long_way_or_nothing(
            before in (side(), side()),
            (behind, lag, payload) in (-2000..2000_i32, -2000..2000_i32, 0..3000_u32),
            window in prop_oneof![Just(0_u16), any::<u16>()],
            reply in any::<bool>(),
        ) {
            let (sender, receiver) = before;
            let seq = sender.end.wrapping_add_signed(behind);
            let ack = receiver.end.wrapping_add_signed(lag);
            let plain = Plain { seq, ack, window, payload };
            let (mut short, mut last, mut patience) = (before, Last::default(), Patience::SynSent);
            let (s, r) = (&mut short.0, &mut short.1);
            let taken = advance(s, r, &mut last, &mut patience, &plain, reply);
            if !taken {
                prop_assert_eq!(alloc::format!("{short:?}{last:?}{patience:?}"),
                    alloc::format!("{before:?}{:?}{:?}", Last::default(), Patience::SynSent));
                return Ok(());
            }
            let segment = Segment { seq, ack, end: seq.wrapping_add(payload), window, flags: ACK };
            let (mut long, mut long_last, mut long_patience) =
                (before, Last::default(), Patience::SynSent);
            let tracked = Track {
                sender: &mut long.0,
                receiver: &mut long.1,
                last: &mut long_last,
                state: &mut State::Established,
                patience: &mut long_patience,
                replied: true,
                assured: &mut true,
            }
            .follow(&segment, &[], reply);
            prop_assert_eq!(tracked, Tracked::Accept);
            prop_assert_eq!(alloc::format!("{short:?}{last:?}{patience:?}"),
                alloc::format!("{long:?}{long_last:?}{long_patience:?}"));
        }
    }

    /// So that the property above is not about nothing.
    #[test]
    fn data_in_the_middle_of_its_window_is_taken() {
        let side = Side {
            end: 1000,
            max_end: 5000,
            max_window: 4000,
            max_ack: 1000,
            scale: 0,
            flags: SIDE_ACK_KNOWN,
        };
        let plain = Plain {
            seq: 1000,
            ack: 1000,
            window: 4000,
            payload: 100,
        };
        let (mut sender, mut receiver) = (side, side);
        let (mut last, mut patience) = (Last::default(), Patience::SynSent);
        let mut advance = |plain: &Plain| {
            let (s, r) = (&mut sender, &mut receiver);
            advance(s, r, &mut last, &mut patience, plain, false)
        };
        assert!(advance(&plain));
        assert!(!advance(&Plain { window: 0, ..plain }));
        assert!(!advance(&Plain { seq: 9000, ..plain }));
        assert!(!advance(&Plain { ack: 1001, ..plain }));
        assert_eq!({ sender.end }, 1100);
    }
}
