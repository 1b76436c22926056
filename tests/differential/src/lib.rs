//! The packet engine against the Linux kernel: the same packets through both, and no difference that is
//! not on a list.
//!
//! Each seed stands for a *script*: rules for every client, and packets of clients and of the outside
//! (new, established, related, invalid, fragments, ICMP errors, forged sources, both families). It runs
//! through a network namespace that filters as `qubes-policy.md` says the Linux agent does
//! ([`kernel`], [`ruleset`]), and through the engine ([`engine`]). What leaves must agree byte for byte,
//! but for what [`seen`] names and but for the intended [`differences`].
//!
//! In some scripts rules and resolvers change under running flows; what new rules forbid goes on in the
//! kernel and must be over in the engine (D5). In others time passes, with timeouts divided ([`pace`]).
//!
//! Not compared: ARP and Ethernet addresses (TUN devices have none), rate limits (D8), timeouts of
//! established connections (five days), of simultaneous opens (no setting divides them) and of fragments,
//! and that Linux lets an established connection idle for five minutes only after three segments that
//! repeat the one before: the engine does not count those.

#![forbid(unsafe_code)]
#![allow(
    clippy::indexing_slicing,
    reason = "a test program on packets of its own making: a wrong index is its own bug and must stop it"
)]

mod differences;
mod engine;
mod errors;
mod kernel;
mod pace;
mod packet;
mod replay;
mod report;
mod rules;
mod ruleset;
mod script;
mod seen;
mod shrink;
mod speed;
mod strays;
mod talk;
mod work;
mod world;

pub use work::{Options, run};
