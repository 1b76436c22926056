use super::segment::{ACK, FIN, RST, SYN, URG, highest_sack};
use super::*;

const PS: u8 = 0x08;

/// The sides that a flow starts with.
fn start(segment: &Segment, options: &[u8]) -> Result<(Side, Side), DropReason> {
    segment.may_start()?;
    let (mut sender, mut receiver) = (Side::default(), Side::default());
    segment.start(options, &mut sender, &mut receiver);
    Ok((sender, receiver))
}

fn segment(seq: u32, ack: u32, flags: u8, payload: u32) -> Segment {
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&seq.to_be_bytes());
    header[8..12].copy_from_slice(&ack.to_be_bytes());
    header[12] = 0x50;
    header[13] = flags;
    header[14..16].copy_from_slice(&1000_u16.to_be_bytes());
    Segment::new(&header, 20 + payload)
}

/// A flow with both sides, driven as the engine drives it.
struct Flow {
    sides: [Side; 2],
    last: Last,
    state: State,
    patience: Patience,
    replied: bool,
    assured: bool,
}

impl Flow {
    fn open(first: &Segment) -> Self {
        let (sender, receiver) = start(first, &[]).unwrap();
        let mut flow = Self {
            sides: [sender, receiver],
            last: Last::default(),
            state: State::None,
            patience: Patience::default(),
            replied: false,
            assured: false,
        };
        assert_eq!(flow.step(first, false), Tracked::Accept);
        flow
    }

    fn step(&mut self, segment: &Segment, reply: bool) -> Tracked {
        self.step_with(segment, &[], reply)
    }

    fn step_with(&mut self, segment: &Segment, options: &[u8], reply: bool) -> Tracked {
        let [original, replying] = &mut self.sides;
        let (sender, receiver) = match reply {
            false => (original, replying),
            true => (replying, original),
        };
        let tracked = Track {
            sender,
            receiver,
            last: &mut self.last,
            state: &mut self.state,
            patience: &mut self.patience,
            replied: self.replied,
            assured: &mut self.assured,
        }
        .follow(segment, options, reply);
        self.replied |= reply;
        tracked
    }

    /// Client at 1000, server at 5000, one byte of SYN each.
    fn established() -> Self {
        let mut flow = Self::open(&segment(1000, 0, SYN, 0));
        assert_eq!(
            flow.step(&segment(5000, 1001, SYN | ACK, 0), true),
            Tracked::Accept
        );
        assert_eq!(
            flow.step(&segment(1001, 5001, ACK, 0), false),
            Tracked::Accept
        );
        assert_eq!(flow.state, State::Established);
        assert!(flow.assured);
        flow
    }
}

#[test]
fn handshake_data_and_close_walk_through_the_states() {
    let mut flow = Flow::established();
    assert_eq!(flow.patience, Patience::Established);
    assert_eq!(
        flow.step(&segment(1001, 5001, ACK | PS, 100), false),
        Tracked::Accept
    );
    assert_eq!(flow.patience, Patience::Unacknowledged);
    assert_eq!(
        flow.step(&segment(5001, 1101, ACK, 0), true),
        Tracked::Accept
    );
    assert_eq!(flow.patience, Patience::Established);
    for (seg, reply, state) in [
        (segment(1101, 5001, FIN | ACK, 0), false, State::FinWait),
        (segment(5001, 1102, ACK, 0), true, State::CloseWait),
        (segment(5001, 1102, FIN | ACK, 0), true, State::LastAck),
        (segment(1102, 5002, ACK, 0), false, State::TimeWait),
    ] {
        assert_eq!(flow.step(&seg, reply), Tracked::Accept);
        assert_eq!(flow.state, state);
    }
    // The client opens the same connection again.
    assert_eq!(
        flow.step(&segment(90_000, 0, SYN, 0), false),
        Tracked::Restart
    );
}

#[test]
fn segments_outside_the_window_are_invalid_or_prove_nothing() {
    let mut flow = Flow::established();
    let window = Tracked::Invalid(DropReason::TcpWindow);
    assert_eq!(flow.step(&segment(1_000_000, 5001, ACK, 10), false), window);
    assert_eq!(flow.step(&segment(1001, 9_000_000, ACK, 10), false), window);
    // Old data once more: a retransmission.
    assert_eq!(
        flow.step(&segment(1001_u32.wrapping_sub(2000), 5001, ACK, 10), false),
        Tracked::Ignore
    );
    // A little more than the window.
    assert_eq!(
        flow.step(&segment(2002, 5001, ACK, 10), false),
        Tracked::Ignore
    );
}

#[test]
fn impossible_flags_and_first_segments_are_refused() {
    for flags in [0, SYN | FIN, SYN | RST, FIN, 0x3f, URG] {
        let first = segment(1, 0, flags, 0);
        assert_eq!(
            start(&first, &[]).err(),
            Some(DropReason::TcpFlags),
            "{flags:x}"
        );
    }
    for flags in [SYN | ACK, RST, RST | ACK, FIN | ACK] {
        let first = segment(1, 0, flags, 0);
        assert_eq!(
            start(&first, &[]).err(),
            Some(DropReason::TcpState),
            "{flags:x}"
        );
    }
    assert!(start(&segment(1, 0, SYN | 0xc0, 0), &[]).is_ok());
}

#[test]
fn reset_must_match_what_was_acknowledged() {
    let mut flow = Flow::established();
    // Behind: invalid. Ahead: passes, but the flow stays. Exact: closes.
    assert!(matches!(
        flow.step(&segment(4000, 0, RST, 0), true),
        Tracked::Invalid(_)
    ));
    assert_eq!(flow.step(&segment(5500, 0, RST, 0), true), Tracked::Accept);
    assert_eq!(
        (flow.state, flow.patience),
        (State::Established, Patience::Closed)
    );
    assert_eq!(flow.step(&segment(5001, 0, RST, 0), true), Tracked::Accept);
    assert_eq!(flow.state, State::Closed);
}

#[test]
fn refused_connection_is_over_at_once() {
    let mut flow = Flow::open(&segment(1000, 0, SYN, 0));
    assert_eq!(
        flow.step(&segment(0, 1001, RST | ACK, 0), true),
        Tracked::Last
    );
}

#[test]
fn pickup_in_the_middle_is_liberal() {
    let mut flow = Flow::open(&segment(77, 88, ACK, 5));
    assert_eq!(
        (flow.state, flow.patience),
        (State::Established, Patience::Unacknowledged)
    );
    assert_eq!(flow.step(&segment(88, 82, ACK, 5), true), Tracked::Accept);
    assert_eq!(
        flow.step(&segment(1 << 30, 93, ACK, 5), false),
        Tracked::Accept
    );
    assert!(flow.assured);
}

#[test]
fn new_syn_in_an_established_flow_resynchronises_when_the_server_agrees() {
    let mut flow = Flow::established();
    assert_eq!(
        flow.step(&segment(70_000, 0, SYN, 0), false),
        Tracked::Ignore
    );
    assert_eq!(flow.state, State::Established);
    assert_eq!(
        flow.step(&segment(90_000, 70_001, SYN | ACK, 0), true),
        Tracked::Accept
    );
    assert_eq!(flow.state, State::SynReceived);
    assert_eq!(
        flow.step(&segment(70_001, 90_001, ACK, 0), false),
        Tracked::Accept
    );
    assert_eq!(flow.state, State::Established);
}

#[test]
fn window_scale_counts_only_if_both_sides_announce_it() {
    let options = [3, 3, 7, 1, 4, 2, 0, 0];
    assert_eq!(announced(&options), (7, SIDE_SCALES | SIDE_SACK));
    assert_eq!(announced(&[3, 3, 200]), (14, SIDE_SCALES));
    assert_eq!(announced(&[3, 4, 7]), (0, 0));
    let (mut sender, _) = start(&segment(1, 0, SYN, 0), &options).unwrap();
    assert_eq!(sender.scale, 7);
    let mut other = Side::default();
    let mut track = Track {
        sender: &mut other,
        receiver: &mut sender,
        last: &mut Last::default(),
        state: &mut State::SynSent,
        patience: &mut Patience::default(),
        replied: false,
        assured: &mut false,
    };
    assert_eq!(
        track.follow(&segment(9, 2, SYN | ACK, 0), &[], true),
        Tracked::Accept
    );
    assert_eq!(sender.scale, 0);
}

#[test]
fn selective_acknowledgement_raises_the_highest() {
    let mut options = alloc::vec![1, 1, 5, 18];
    for edge in [100_u32, 200, 50, 80] {
        options.extend(edge.to_be_bytes());
    }
    assert_eq!(highest_sack(&options, 60), 200);
    assert_eq!(highest_sack(&[1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0], 60), 60);
}

#[test]
fn beginning_with_a_syn_is_a_shortcut_for_tracking_it() {
    for window in [0_u16, 1, 502, 65_535] {
        let mut first = segment(1000, 0, SYN, 0);
        first.window = window;
        let followed = Flow::open(&first);
        let (sender, mut receiver) = start(&first, &[]).unwrap();
        let mut last = Last::default();
        let state = begin_with_syn(&first, &mut receiver, &mut last);
        assert_eq!(followed.state, state);
        assert_eq!(followed.patience, Patience::SynSent);
        // The sender has sent its SYN and nothing else: unacknowledged is noted either way.
        let [own, other] = followed.sides;
        assert_eq!(
            (own.end, own.max_end, own.max_window),
            (sender.end, sender.max_end, sender.max_window)
        );
        assert_eq!(
            (other.end, other.max_end, other.max_window),
            (0, receiver.max_end, 0)
        );
        assert_eq!((own.flags, other.flags), (sender.flags, receiver.flags));
        assert_eq!(
            (followed.last.kind, followed.last.reply),
            (last.kind, last.reply)
        );
    }
}

// Below: sequences that the comparison with Linux 6.18 has shown.

#[test]
fn reset_of_a_closing_flow_passes_whatever_its_number() {
    let mut flow = Flow::established();
    let fin = segment(1001, 5001, FIN | ACK, 0);
    assert_eq!(flow.step(&fin, false), Tracked::Accept);
    assert_eq!(flow.step(&segment(7, 0, RST, 0), true), Tracked::Accept);
    assert_eq!(flow.state, State::Closed);
    // And once more, from the other side.
    let far = segment(1 << 31, 0, RST, 0);
    assert_eq!(flow.step(&far, false), Tracked::Accept);
}

#[test]
fn reset_refuses_an_ignored_syn_only_from_the_other_side() {
    let syn = segment(90_000, 0, SYN, 0);
    for (reply, expected) in [
        (false, Tracked::Invalid(DropReason::TcpWindow)),
        (true, Tracked::Accept),
    ] {
        let mut flow = Flow::established();
        assert_eq!(flow.step(&syn, false), Tracked::Ignore);
        let reset = segment(900_000, 90_001, RST | ACK, 0);
        assert_eq!(flow.step(&reset, reply), expected);
    }
}

#[test]
fn reset_after_an_ignored_syn_is_not_held_against_older_acknowledgements() {
    let behind = segment(4900, 1001, RST | ACK, 0);
    let mut flow = Flow::established();
    assert_eq!(
        flow.step(&behind, true),
        Tracked::Invalid(DropReason::TcpWindow)
    );
    let mut flow = Flow::established();
    assert_eq!(
        flow.step(&segment(90_000, 0, SYN, 0), false),
        Tracked::Ignore
    );
    assert_eq!(flow.step(&behind, true), Tracked::Accept);
    assert_eq!(flow.state, State::Closed);
}

#[test]
fn refused_fin_stands_between_an_ignored_syn_and_its_answer() {
    let mut flow = Flow::established();
    assert_eq!(flow.step(&segment(1001, 0, SYN, 0), false), Tracked::Ignore);
    let fin = segment(1001, 9_000_000, FIN | ACK, 0);
    assert_eq!(
        flow.step(&fin, false),
        Tracked::Invalid(DropReason::TcpWindow)
    );
    let answer = segment(5001, 1002, SYN | ACK, 0);
    assert_eq!(flow.step(&answer, true), Tracked::Ignore);
    assert_eq!(flow.state, State::Established);
}

#[test]
fn refused_ends_from_both_sides_shorten_the_patience() {
    let mut flow = Flow::established();
    let fin = segment(1001, 9_000_000, FIN | ACK, 0);
    let reset = segment(9_000_000, 9_000_000, FIN | ACK, 0);
    assert!(matches!(flow.step(&fin, false), Tracked::Invalid(_)));
    assert_eq!(flow.patience, Patience::Established);
    assert!(matches!(flow.step(&reset, true), Tracked::Invalid(_)));
    assert_eq!(flow.patience, Patience::Unacknowledged);
}

#[test]
fn newer_syn_before_any_answer_keeps_its_window_scale() {
    let options = [3, 3, 7, 1];
    let mut flow = Flow::open(&segment(1000, 0, SYN, 0));
    // Newer, so it replaces the first; nobody knows yet whether the other side scales.
    assert_eq!(
        flow.step_with(&segment(2000, 0, SYN, 0), &options, false),
        Tracked::Ignore
    );
    assert_eq!(flow.sides[0].scale, 7);
    let answer = segment(5000, 2001, SYN | ACK, 0);
    assert_eq!(flow.step_with(&answer, &options, true), Tracked::Accept);
    assert_eq!((flow.sides[0].scale, flow.sides[1].scale), (7, 7));
}

#[test]
fn newer_syn_without_options_leaves_what_was_announced() {
    let mut flow = Flow::open(&segment(1000, 0, SYN, 0));
    let options = [3, 3, 7, 1];
    flow.step_with(&segment(2000, 0, SYN, 0), &options, false);
    flow.step_with(&segment(3000, 0, SYN, 0), &[], false);
    assert_eq!({ flow.sides[0].end }, 3001);
    assert_eq!(
        (flow.sides[0].scale, flow.sides[0].flags & SIDE_SCALES),
        (7, SIDE_SCALES)
    );
}

#[test]
fn repeated_syn_does_not_keep_a_flow_alive_that_nobody_answers() {
    let syn = segment(1000, 0, SYN, 0);
    let mut flow = Flow::open(&syn);
    assert_eq!(flow.step(&syn, false), Tracked::Ignore);
    assert_eq!(flow.state, State::SynSent);
}

#[test]
fn server_of_a_flow_picked_up_stays_liberal_after_a_new_handshake() {
    let mut flow = Flow::open(&segment(77, 88, ACK, 5));
    assert_eq!(
        flow.step(&segment(70_000, 0, SYN, 0), false),
        Tracked::Ignore
    );
    let answer = segment(90_000, 70_001, SYN | ACK, 0);
    assert_eq!(flow.step_with(&answer, &[4, 2], true), Tracked::Accept);
    let far = segment(1 << 30, 70_001, ACK, 5);
    assert_eq!(flow.step(&far, true), Tracked::Accept);
    let far = segment(1 << 30, 90_001, ACK, 5);
    assert!(matches!(flow.step(&far, false), Tracked::Invalid(_)));
}

#[test]
fn only_the_first_well_formed_selective_acknowledgement_counts() {
    let block = |edge: u32| [[0; 4], edge.to_be_bytes()].concat();
    let options = [
        &[5, 11][..],
        &block(900),
        &[0x01, 5, 10],
        &block(100),
        &[5, 10],
        &block(500),
    ]
    .concat();
    assert_eq!(highest_sack(&options, 60), 100);
}
