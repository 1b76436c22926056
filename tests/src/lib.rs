//! The kit for tests of the drivers: frames, fake peers, and a router between them.
//!
//! | module | what |
//! | --- | --- |
//! | [`attack`] | what a hostile client writes, and what must become of it |
//! | [`frames`] | frames with a recognisable payload |
//! | [`raw`] | rings as bytes: indices and slots at their offsets, checked by nobody |
//! | [`client`] | a client qube's frontend, correct by default, hostile on request |
//! | [`netvm`] | the uplink's backend, the same |
//! | [`router`] | `netback` and `netfront` joined by the main loop that the kernel uses |
//! | [`whole`] | the whole kernel in a whole computer: xenstore, dom0 with both daemons, a netvm, clients |
//!
//! The peers are written against the protocol, not against the drivers' ring code, so that a mistake in
//! one is not repeated by the other. They live in domains of one [`xen::fake::FakeMachine`], whose accounts
//! show at the end of a test that nothing leaked.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a mistake found here is one of a test, or what the test is looking for, and must stop it"
)]

pub mod attack;
pub mod client;
pub mod frames;
pub mod netvm;
pub mod raw;
pub mod router;
pub mod whole;
