//! Event channel operations and the limits of the 2-level ABI.
//!
//! Source: Xen `public/event_channel.h`.

use super::assert_layout;
pub(crate) use xen_sys::{
    EVTCHNOP_alloc_unbound, EVTCHNOP_bind_interdomain, EVTCHNOP_close, EVTCHNOP_send,
    evtchn_alloc_unbound, evtchn_bind_interdomain, evtchn_close, evtchn_send,
};

/// Ports of the 2-level ABI: 64 words of 64 bits.
pub(crate) const PORTS: u32 = 4096;

assert_layout!(evtchn_alloc_unbound, size 8, dom at 0, remote_dom at 2, port at 4);
assert_layout!(evtchn_bind_interdomain, size 12, remote_dom at 0, remote_port at 4, local_port at 8);
assert_layout!(evtchn_close, size 4, port at 0);
assert_layout!(evtchn_send, size 4, port at 0);
