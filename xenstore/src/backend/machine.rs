//! The backend's decision table: what to do next, given our state, the frontend's, and the toolstack's wish.
//!
//! Pure. Events only cause the inputs to be read again; intermediate states of the peer may never be seen, so
//! decisions depend on what is the case and never on what happened.
//!
//! Source: Linux `drivers/net/xen-netback/xenbus.c` and libxl for the behaviour expected; see the rows.

use crate::state::XenbusState::{
    self, Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured,
    Reconfiguring, Unknown,
};

/// Everything that a decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// The state that we wrote last. `Initialising` is a device that we have not offered yet.
    pub own: XenbusState,
    /// The frontend's state as read last.
    pub peer: XenbusState,
    /// Whether the toolstack wants the device to exist.
    pub online: bool,
    /// Whether the device cannot be served (see its log line): it waits to be removed.
    pub refused: bool,
    /// Whether the frontend's last attempt was faulty: it must start anew before it is connected again.
    pub barred: bool,
    /// Whether the frontend has had the time that it may take to close.
    pub expired: bool,
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing, until something changes.
    Wait,
    /// Write the features and state 2.
    Offer,
    /// Read the frontend's keys, connect, and write state 4.
    Connect,
    /// The frontend began anew without closing: stop the data path, write 5, then 6, then offer again.
    Restart,
    /// Stop the data path and write 5.
    Close,
    /// Stop the data path if it runs, write 5 unless that is our state, then 6.
    Finish,
    /// Remove our folder: the device is gone.
    Remove,
}

/// Decides. Every combination of inputs has an answer.
#[must_use]
pub const fn next_step(view: &View) -> Step {
    if !view.online {
        return removal(view);
    }
    if view.refused {
        return Step::Wait;
    }
    match (view.own, view.peer) {
        // A device that we have just found. The frontend may be anywhere, even connected (OpenBSD does not wait).
        (Initialising, _) => Step::Offer,

        // The frontend has not begun, or begins again.
        (InitWait, Initialising) => Step::Wait,
        (Connected, Initialising) => Step::Restart,
        (Closing | Closed, Initialising) => Step::Offer,

        // The frontend wants to connect.
        (InitWait, Connected) => Step::Connect,
        (Connected, Connected) => Step::Wait,
        (Closed, Connected) if view.barred => Step::Wait,
        (Closed, Connected) => Step::Offer,

        // The frontend closes.
        (InitWait | Connected, Closing) => Step::Close,
        (InitWait | Connected | Closing, Closed) => Step::Finish,

        // The frontend's folder is gone: its domain died, or it gave the device up. In state 2 it has not started yet,
        // perhaps never will: the usual state of a second vif of an HVM domain.
        (Connected | Closing, Unknown) => Step::Finish,
        (InitWait, Unknown) => Step::Wait,

        // We are closing and the frontend is slow.
        (Closing, _) if view.expired => Step::Finish,

        // Nothing to do, or states that other device classes and extensions use.
        (InitWait | Connected | Closing, InitWait | Initialised | Reconfiguring | Reconfigured) => {
            Step::Wait
        }
        (Closing, Connected | Closing) => Step::Wait,
        (Closed, _) => Step::Wait,

        // States that we never write.
        (Unknown | Initialised | Reconfiguring | Reconfigured, _) => Step::Finish,
    }
}

/// The toolstack has asked for removal: it waits 10 s for state 6 and then 10 s for the folder to vanish. Only
/// a frontend that is still connected is worth waiting for.
const fn removal(view: &View) -> Step {
    match (view.own, view.peer) {
        (Closed, _) => Step::Remove,
        (Closing, Connected) if !view.expired => Step::Wait,
        (Closing, _) => Step::Finish,
        _ => Step::Close,
    }
}

/// Whether the peer's state ends a ban: it has let go of the attempt that failed.
#[must_use]
pub const fn lifts_ban(peer: XenbusState) -> bool {
    matches!(peer, Unknown | Initialising | Closed)
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
    const OWN: [XenbusState; 5] = [Initialising, InitWait, Connected, Closing, Closed];

    fn view(own: XenbusState, peer: XenbusState) -> View {
        View {
            own,
            peer,
            online: true,
            refused: false,
            barred: false,
            expired: false,
        }
    }

    fn step(own: XenbusState, peer: XenbusState) -> Step {
        next_step(&view(own, peer))
    }

    #[test]
    fn row_any_none_a_new_device_is_offered_whatever_the_frontend_is() {
        for peer in STATES {
            assert_eq!(step(Initialising, peer), Step::Offer);
        }
    }

    #[test]
    fn row_1_2_an_offer_waits_for_the_frontend() {
        assert_eq!(step(InitWait, Initialising), Step::Wait);
    }

    #[test]
    fn row_1_4_a_frontend_that_restarts_gets_three_writes() {
        assert_eq!(step(Connected, Initialising), Step::Restart);
    }

    #[test]
    fn row_1_56_a_frontend_that_returns_is_offered_the_device_again() {
        assert_eq!(step(Closing, Initialising), Step::Offer);
        assert_eq!(step(Closed, Initialising), Step::Offer);
    }

    #[test]
    fn row_23_78_foreign_states_are_ignored() {
        for peer in [InitWait, Initialised, Reconfiguring, Reconfigured] {
            for own in [InitWait, Connected, Closing, Closed] {
                assert_eq!(step(own, peer), Step::Wait, "{own} {peer}");
            }
        }
    }

    #[test]
    fn row_4_2_a_ready_frontend_is_connected() {
        assert_eq!(step(InitWait, Connected), Step::Connect);
    }

    #[test]
    fn row_4_4_a_connected_frontend_is_left_alone() {
        assert_eq!(step(Connected, Connected), Step::Wait);
    }

    #[test]
    fn row_4_6_a_frontend_that_connects_late_goes_back_through_the_offer() {
        assert_eq!(step(Closed, Connected), Step::Offer);
    }

    #[test]
    fn row_4_6_barred_a_faulty_frontend_must_start_anew_first() {
        assert_eq!(
            next_step(&View {
                barred: true,
                ..view(Closed, Connected)
            }),
            Step::Wait
        );
        assert_eq!(
            next_step(&View {
                barred: true,
                ..view(Closed, Initialising)
            }),
            Step::Offer
        );
        for peer in STATES {
            assert_eq!(
                lifts_ban(peer),
                [Unknown, Initialising, Closed].contains(&peer)
            );
        }
    }

    #[test]
    fn row_4_5_a_closing_device_waits_for_the_frontend_but_not_for_ever() {
        assert_eq!(step(Closing, Connected), Step::Wait);
        assert_eq!(
            next_step(&View {
                expired: true,
                ..view(Closing, Connected)
            }),
            Step::Finish
        );
    }

    #[test]
    fn row_5_24_a_closing_frontend_is_mirrored() {
        assert_eq!(step(InitWait, Closing), Step::Close);
        assert_eq!(step(Connected, Closing), Step::Close);
        assert_eq!(step(Closing, Closing), Step::Wait);
        assert_eq!(step(Closed, Closing), Step::Wait);
    }

    #[test]
    fn row_6_245_a_closed_frontend_finishes_the_device() {
        for own in [InitWait, Connected, Closing] {
            assert_eq!(step(own, Closed), Step::Finish);
        }
        assert_eq!(step(Closed, Closed), Step::Wait);
    }

    #[test]
    fn row_0_45_a_vanished_frontend_finishes_the_device_but_keeps_the_folder() {
        assert_eq!(step(Connected, Unknown), Step::Finish);
        assert_eq!(step(Closing, Unknown), Step::Finish);
        assert_eq!(step(Closed, Unknown), Step::Wait);
    }

    #[test]
    fn row_0_2_an_unused_device_stays_offered() {
        assert_eq!(step(InitWait, Unknown), Step::Wait);
    }

    #[test]
    fn removal_reaches_the_end_from_every_state_whatever_the_frontend_does() {
        for peer in STATES {
            for refused in [false, true] {
                let mut own = Initialising;
                for start in OWN {
                    own = start;
                    let mut steps = 0;
                    loop {
                        let base = View {
                            online: false,
                            refused,
                            ..view(own, peer)
                        };
                        let now = next_step(&base);
                        let later = next_step(&View {
                            expired: true,
                            ..base
                        });
                        match if now == Step::Wait { later } else { now } {
                            Step::Close => own = Closing,
                            Step::Finish => own = Closed,
                            Step::Remove => break,
                            step => panic!("{base:?} gave {step:?}"),
                        }
                        steps += 1;
                        assert!(steps <= 3, "{base:?}");
                    }
                }
                assert_eq!(own, Closed);
            }
        }
    }

    #[test]
    fn removal_waits_only_for_a_connected_frontend() {
        for peer in STATES {
            let view = View {
                online: false,
                ..view(Closing, peer)
            };
            let waits = next_step(&view) == Step::Wait;
            assert_eq!(waits, peer == Connected, "{peer}");
        }
    }

    #[test]
    fn the_folder_is_only_removed_when_the_toolstack_asked_and_we_are_closed() {
        for own in STATES {
            for peer in STATES {
                for bits in 0..16_u8 {
                    let view = View {
                        own,
                        peer,
                        online: bits & 1 != 0,
                        refused: bits & 2 != 0,
                        barred: bits & 4 != 0,
                        expired: bits & 8 != 0,
                    };
                    let removed = next_step(&view) == Step::Remove;
                    assert_eq!(removed, !view.online && own == Closed, "{view:?}");
                }
            }
        }
    }

    #[test]
    fn a_refused_device_waits_for_its_removal() {
        for peer in STATES {
            assert_eq!(
                next_step(&View {
                    refused: true,
                    ..view(Initialising, peer)
                }),
                Step::Wait
            );
        }
    }
}
