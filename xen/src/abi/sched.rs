//! Scheduler operations: poll, yield, shutdown.
//!
//! Source: Xen `public/sched.h`.

use super::assert_layout;
pub(crate) use xen_sys::{
    SCHEDOP_poll, SCHEDOP_shutdown, SCHEDOP_yield, SHUTDOWN_crash, SHUTDOWN_poweroff,
    SHUTDOWN_reboot, sched_poll, sched_shutdown,
};

/// Ports that one poll may list.
pub(crate) const POLL_PORTS: usize = 128;

assert_layout!(sched_poll, size 24, ports at 0, nr_ports at 8, timeout at 16);
assert_layout!(sched_shutdown, size 4, reason at 0);
