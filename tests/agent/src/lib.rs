//! The lab's helper program, as a library: only the line protocol is shared.
//!
//! The program itself (`src/main.rs`) runs inside the lab's dom0 and in every
//! guest; `cargo xtask lab` on the host speaks to it through [`protocol`].
//!
//! What is trusted: the host. The program runs whatever command the host
//! sends, as root, because it is the lab's remote hand and nothing else; it is
//! never part of the firewall image.
#![forbid(unsafe_code)]

pub mod protocol;
