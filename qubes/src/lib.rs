#![no_std]
#![forbid(unsafe_code)]
//! To be written.

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod address_text;
pub mod excerpt;
pub mod firewall_tree;
pub mod qrexec;
pub mod qubesdb;
pub mod reload;
pub mod rule_text;
pub mod settings;
pub mod store;
pub mod tree_store;
pub mod vchan;
