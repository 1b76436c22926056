//! The packet engine against the Linux kernel: the same packets through both, and no difference that is
//! not on a list.
//!
//! Each seed stands for a *script*: rules for every client, and packets of clients and of the outside
//! (new, established, related, invalid, fragments, ICMP errors, forged sources, both families). It runs
//! through a network namespace that filters as `qubes-policy.md` says the Linux agent does
//! ([`kernel`], [`ruleset`]), and through the engine ([`engine`]). What leaves must agree byte for byte,
//! but for what [`seen`] names and but for the intended [`differences`].
//!
//! Not compared: ARP and Ethernet addresses (TUN devices have none), timeouts (the kernel's clock is
//! not ours), rate limits (D8), what happens when rules change under running flows (D5).

#![forbid(unsafe_code)]
#![allow(
    clippy::indexing_slicing,
    reason = "a test program on packets of its own making: a wrong index is its own bug and must stop it"
)]

mod differences;
mod engine;
mod errors;
mod kernel;
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
