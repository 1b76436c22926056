#![no_std]
#![forbid(unsafe_code)]
//! What Qubes OS tells a network-providing qube, and what it is told.
//!
//! | module | what |
//! | --- | --- |
//! | [`vchan`], [`qubesdb`] | how dom0's keys get here |
//! | [`store`], [`tree_store`] | all of dom0's keys, and which rule trees are committed |
//! | [`rule_text`], [`firewall_tree`], [`reload`] | rules out of texts, keys and whole trees |
//! | [`settings`] | addresses, resolvers and neighbours out of keys |
//! | [`address_text`], [`excerpt`] | addresses as keys spell them, texts as errors show them |
//! | [`dns_report`] | what we write about names in rules |
//! | [`qrexec`] | calls from dom0 |
//!
//! The modules about rules and settings are pure: bytes in, typed values or reasons out. dom0 is trusted to
//! decide, not to be free of mistakes: whatever is not understood is an error with a reason, and an error in
//! rules blocks the client that they are for.

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod address_text;
pub mod dns_report;
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
