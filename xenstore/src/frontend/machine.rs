//! The frontend's decision table: what to do next, given our state and the backend's.
//!
//! Pure. As in the backend's table, decisions depend on what is the case, not on what happened; the little history
//! that matters is in the inputs.
//!
//! Source: Linux `drivers/net/xen-netfront.c` and `drivers/net/xen-netback/xenbus.c` for the behaviour met.

use crate::state::XenbusState::{
    self, Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured,
    Reconfiguring, Unknown,
};

/// Everything that a decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// The state that we wrote last.
    pub own: XenbusState,
    /// The backend's state as read last.
    pub peer: XenbusState,
    /// Whether the backend was seen connected since we connected.
    pub carrier: bool,
    /// Whether the backend's `Closed` is what it was already when we began anew: no news.
    pub stale: bool,
    /// Whether the pause after the last attempt is over.
    pub may_retry: bool,
    /// Whether the backend has had the time that one step of closing, or of beginning anew, may take.
    pub expired: bool,
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing, until something changes.
    Wait,
    /// Read the features, let the kernel create the rings, write our keys and state 4.
    Connect,
    /// The backend has connected: tell the kernel.
    RaiseCarrier,
    /// Stop the data path and write 5.
    Close,
    /// Stop the data path if it runs and write 6.
    Finish,
    /// Write 1: begin anew.
    Reopen,
}

/// Decides. Every combination of inputs has an answer.
#[must_use]
pub const fn next_step(view: &View) -> Step {
    match view.own {
        Initialising => beginning(view),
        Connected => connected(view),
        Closing => closing(view),
        Closed => closed(view),
        // States that we never write: end in one that we do.
        Unknown | InitWait | Initialised | Reconfiguring | Reconfigured => Step::Finish,
    }
}

const fn beginning(view: &View) -> Step {
    match view.peer {
        InitWait if view.may_retry => Step::Connect,
        // A backend that does not answer our new beginning: pause, then try again.
        Closed if view.stale && !view.expired => Step::Wait,
        Closing | Closed => Step::Finish,
        Unknown | Initialising | InitWait | Initialised | Connected | Reconfiguring
        | Reconfigured => Step::Wait,
    }
}

const fn connected(view: &View) -> Step {
    match view.peer {
        Connected if view.carrier => Step::Wait,
        Connected => Step::RaiseCarrier,
        // Not seen connected yet: the backend is still busy connecting. Seen: it dropped us without closing.
        Initialising | InitWait if view.carrier => Step::Close,
        Initialising | InitWait => Step::Wait,
        // Closed: the backend gave up. Missing: it crashed, or the device was detached.
        Closing | Closed | Unknown => Step::Finish,
        Initialised | Reconfiguring | Reconfigured => Step::Wait,
    }
}

const fn closing(view: &View) -> Step {
    match view.peer {
        Closing | Closed | Unknown => Step::Finish,
        _ if view.expired => Step::Finish,
        // It has let go of us already.
        Initialising | InitWait => Step::Finish,
        Initialised | Connected | Reconfiguring | Reconfigured => Step::Wait,
    }
}

const fn closed(view: &View) -> Step {
    match view.peer {
        Closed | InitWait | Initialising if view.may_retry => Step::Reopen,
        // The backend does not notice that we closed. Beginning anew makes it restart.
        Closing | Connected if view.may_retry && view.expired => Step::Reopen,
        _ => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [XenbusState; 9] = [
        Unknown,
        Initialising,
        InitWait,
        Initialised,
        Connected,
        Closing,
        Closed,
        Reconfiguring,
        Reconfigured,
    ];

    fn view(peer: XenbusState, own: XenbusState) -> View {
        View {
            own,
            peer,
            carrier: false,
            stale: false,
            may_retry: true,
            expired: false,
        }
    }

    fn step(peer: XenbusState, own: XenbusState) -> Step {
        next_step(&view(peer, own))
    }

    #[test]
    fn row_1_1_a_backend_that_has_not_begun_is_waited_for() {
        assert_eq!(step(Initialising, Initialising), Step::Wait);
        assert_eq!(step(Unknown, Initialising), Step::Wait);
    }

    #[test]
    fn row_2_1_an_offer_is_taken_when_the_pause_is_over() {
        assert_eq!(step(InitWait, Initialising), Step::Connect);
        assert_eq!(
            next_step(&View {
                may_retry: false,
                ..view(InitWait, Initialising)
            }),
            Step::Wait
        );
    }

    #[test]
    fn row_2_4_a_backend_that_is_still_connecting_is_waited_for() {
        assert_eq!(step(InitWait, Connected), Step::Wait);
        assert_eq!(
            next_step(&View {
                expired: true,
                ..view(InitWait, Connected)
            }),
            Step::Wait
        );
    }

    #[test]
    fn row_12_4_a_backend_that_dropped_us_is_left_and_joined_again() {
        for peer in [Initialising, InitWait] {
            assert_eq!(
                next_step(&View {
                    carrier: true,
                    ..view(peer, Connected)
                }),
                Step::Close
            );
            assert_eq!(step(peer, Closing), Step::Finish);
            assert_eq!(step(peer, Closed), Step::Reopen);
        }
    }

    #[test]
    fn row_4_4_the_carrier_rises_once() {
        assert_eq!(step(Connected, Connected), Step::RaiseCarrier);
        assert_eq!(
            next_step(&View {
                carrier: true,
                ..view(Connected, Connected)
            }),
            Step::Wait
        );
    }

    #[test]
    fn row_378_foreign_states_are_ignored() {
        for peer in [Initialised, Reconfiguring, Reconfigured] {
            for own in [Initialising, Connected, Closing, Closed] {
                assert_eq!(step(peer, own), Step::Wait, "{peer} {own}");
            }
        }
    }

    #[test]
    fn row_56_14_a_closing_backend_is_followed_to_6_directly() {
        for peer in [Closing, Closed] {
            for own in [Initialising, Connected] {
                assert_eq!(step(peer, own), Step::Finish);
            }
        }
    }

    #[test]
    fn row_6_1_stale_a_backend_gets_time_to_answer_a_new_beginning() {
        let view = View {
            stale: true,
            ..view(Closed, Initialising)
        };
        assert_eq!(next_step(&view), Step::Wait);
        assert_eq!(
            next_step(&View {
                expired: true,
                ..view
            }),
            Step::Finish
        );
    }

    #[test]
    fn row_6_6_we_begin_anew_after_a_pause() {
        assert_eq!(step(Closed, Closed), Step::Reopen);
        assert_eq!(
            next_step(&View {
                may_retry: false,
                ..view(Closed, Closed)
            }),
            Step::Wait
        );
    }

    #[test]
    fn row_0_4_a_vanished_backend_ends_the_connection() {
        assert_eq!(step(Unknown, Connected), Step::Finish);
        assert_eq!(step(Unknown, Closed), Step::Wait);
    }

    #[test]
    fn the_reset_sequence_waits_for_the_backend_at_each_step_but_not_for_ever() {
        assert_eq!(step(Connected, Closing), Step::Wait);
        assert_eq!(
            next_step(&View {
                expired: true,
                ..view(Connected, Closing)
            }),
            Step::Finish
        );
        assert_eq!(step(Connected, Closed), Step::Wait);
        assert_eq!(
            next_step(&View {
                expired: true,
                ..view(Connected, Closed)
            }),
            Step::Reopen
        );
    }

    #[test]
    fn nothing_is_tried_again_before_its_pause_is_over() {
        for own in STATES {
            for peer in STATES {
                for bits in 0..8_u8 {
                    let view = View {
                        own,
                        peer,
                        carrier: bits & 1 != 0,
                        stale: bits & 2 != 0,
                        may_retry: false,
                        expired: bits & 4 != 0,
                    };
                    assert!(
                        !matches!(next_step(&view), Step::Connect | Step::Reopen),
                        "{view:?}"
                    );
                }
            }
        }
    }
}
