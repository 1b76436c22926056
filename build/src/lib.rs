//! `cargo xtask`: builds the image, runs the lab and the tests.
//!
//! Everything here runs on the developer's machine. The library exists so that
//! commands and scenarios share one lab; its parts, from the bottom up:
//! [`workspace`] and [`host`] know this clone and this machine, [`assets`] makes
//! what the lab boots, [`lab`] runs it; [`image`] builds what all this is for, and
//! [`package`] makes of it what dom0 takes.
#![forbid(unsafe_code)]

pub mod assets;
pub mod bench_command;
pub mod claims;
pub mod demo_command;
pub mod engine_bench;
pub mod fwsim;
pub mod host;
pub mod image;
pub mod lab;
pub mod lab_check;
pub mod lab_command;
pub mod observe;
pub mod package;
pub mod scenario;
pub mod screen;
pub mod test_command;
pub mod workspace;
