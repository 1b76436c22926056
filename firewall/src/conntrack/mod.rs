//! Connection tracking: which packets belong together, and what they may do.

pub(crate) mod flow;
pub(crate) mod index;
pub(crate) mod table;
pub(crate) mod tcp;
