//! What the fuzzers do with their bytes.
//!
//! Each function of [`targets`] takes any bytes and checks what must hold whatever they are. `cargo fuzz` (see `firewall/fuzz`) calls
//! them with bytes that it breeds for coverage; `cargo test -p fuzz-targets` calls the same with random ones and with what
//! the fuzzers found before. A panic is a finding.
//!
//! The subject is [`kernel::filter::Filter`]: engine, resolver and settings as the image composes them. What leaves it is judged by
//! [`judge`] with smoltcp's packet types, which share no code with ours.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test support: a panic is how a finding is reported"
)]

pub mod bytes;
pub mod judge;
pub mod packets;
pub mod targets;
pub mod world;
