//! Scripts in which time passes, so that flows idle out.
//!
//! The kernel's clock cannot be put forward, but its timeouts can be cut: in the namespace of a timed
//! script each is its default divided by a factor, one second at least, and the engine's clock runs faster
//! by the same factor. Two packets of a flow are never so far apart that it would be a close thing: the
//! times near every timeout, and those where a whole second is more than the divided timeout, are left
//! out. A packet that leaves late by more than [`LATE`] makes the run void, and it is run again.
//!
//! What Linux has as a constant is not divided: that a UDP flow counts as a stream after two seconds, and
//! the timeout of simultaneous opens, which therefore are left out.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fastrand::Rng;

use crate::packet::{Body, UDP};
use crate::script::{Flow, Step};

// TCP flags.
const SYN: u8 = 2;
const ACK: u8 = 16;

/// How much faster the engine's clock runs: for timeouts up to three minutes, and for the longer ones.
pub(crate) const FACTORS: [u64; 2] = [10, 60];

/// The longest that a packet may be late.
pub(crate) const LATE: Duration = Duration::from_millis(120);

/// How far from a timeout packets keep, in milliseconds of the kernel: twice as much as they may be late.
const MARGIN_MILLIS: u64 = 250;

/// The same for the engine, whose clock is exact; its timers have ticks of 0.27 seconds.
const ENGINE_MARGIN_MILLIS: u64 = 1000;

/// Linux's own names and defaults, in seconds (`qubes-policy.md` 3.3). Left out is that of established
/// connections, five days.
const TIMEOUTS: [(&str, u64); 16] = [
    ("generic_timeout", 600),
    ("gre_timeout", 30),
    ("gre_timeout_stream", 180),
    ("icmp_timeout", 30),
    ("icmpv6_timeout", 30),
    ("tcp_timeout_close", 10),
    ("tcp_timeout_close_wait", 60),
    ("tcp_timeout_fin_wait", 120),
    ("tcp_timeout_last_ack", 30),
    ("tcp_timeout_max_retrans", 300),
    ("tcp_timeout_syn_recv", 60),
    ("tcp_timeout_syn_sent", 120),
    ("tcp_timeout_time_wait", 120),
    ("tcp_timeout_unacknowledged", 300),
    ("udp_timeout", 30),
    ("udp_timeout_stream", 120),
];

/// What the kernel has instead of a timeout of so many seconds.
const fn divided(seconds: u64, factor: u64) -> u64 {
    let short = seconds / factor;
    if short == 0 { 1 } else { short }
}

/// Divides the timeouts of this thread's namespace.
///
/// # Errors
///
/// If the kernel does not take one.
pub(crate) fn divide_timeouts(factor: u64) -> Result<()> {
    for (name, seconds) in TIMEOUTS {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        fs::write(&path, divided(seconds, factor).to_string())
            .with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}

/// Whether it is clear what has idled out after this time, in milliseconds of the engine.
fn is_clear(gap: u64, factor: u64, udp: bool) -> bool {
    let margin = MARGIN_MILLIS * factor;
    let near = TIMEOUTS.iter().any(|(_, seconds)| {
        let engine = seconds * 1000;
        let kernel = divided(*seconds, factor) * 1000 * factor;
        let from = (engine - ENGINE_MARGIN_MILLIS).min(kernel - margin);
        let to = (engine + ENGINE_MARGIN_MILLIS).max(kernel + margin);
        (from..to).contains(&gap)
    });
    let half_a_stream = (1500..2000 * factor + margin).contains(&gap);
    !(near || udp && half_a_stream)
}

/// Whether the other side opens the connection too.
fn opens_from_outside(step: &Step) -> bool {
    matches!(&step.packet.body, Body::Tcp(tcp) if step.port == 0 && tcp.flags & (SYN | ACK) == SYN)
}

/// Gives the packets of a flow their times; those for which there is none are left out.
pub(crate) fn spread(rng: &mut Rng, flow: &Flow, factor: u64, steps: Vec<Step>) -> Vec<Step> {
    // Past the longest timeout that this factor is for.
    let end = if factor == FACTORS[0] {
        170_000
    } else {
        680_000
    };
    let mut spread: Vec<Step> = Vec::new();
    let mut now = rng.u64(..3000);
    for mut step in steps
        .into_iter()
        .take_while(|step| !opens_from_outside(step))
    {
        let is_first = spread.is_empty();
        let clear = (0..40).find_map(|_| {
            let gap = match rng.u8(..10) {
                _ if is_first => 0,
                0..4 => rng.u64(50..600),
                4..7 => rng.u64(600..end / 4),
                _ => rng.u64(600..end),
            };
            let at = now + gap;
            let clear = |own: &Step| is_clear(at - own.at, factor, flow.protocol == UDP);
            (at < end && spread.iter().all(clear)).then_some(at)
        });
        if let Some(at) = clear {
            now = at;
            step.at = at;
            spread.push(step);
        }
    }
    spread
}
