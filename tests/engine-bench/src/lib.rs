//! The engine's workloads of `performance.md` section 2, on the host.
//!
//! `cargo xtask bench --engine` builds the program of this package, runs each workload under callgrind and
//! compares with the goals; the test `no_allocation` runs them all for P19; `differential --speed` lets the
//! Linux kernel decide the same frames by the same rules.
//!
//! Everything is deterministic. Every run checks what became of each frame, so a workload that is dropped
//! early cannot look cheap.

#![forbid(unsafe_code)]

pub mod calibration;
pub mod control;
pub mod lookup;
pub mod measured;
mod packet;
pub mod rules;
pub mod runs;
pub mod side;
pub mod workload;
mod world;

/// What goes wrong in a bench: said once, then it ends.
pub type Failure = Box<dyn std::error::Error>;
