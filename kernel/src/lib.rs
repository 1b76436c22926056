#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
//! Thin composition of the drivers and the engine.

extern crate alloc;

pub mod command;
pub mod logger;
pub mod snapshot;
pub mod terminal;
