//! Fills a [`Snapshot`] from the live parts.
//!
//! The only place that knows how the parts name what they count. Runs on the control plane and allocates;
//! its size is bounded by the number of clients and by the scope.

use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::net::IpAddr;

use firewall::resolver::Resolver;
use firewall::ruleset::HostState;
use firewall::{DropCounters, FlowCursor, FlowView};
use netback::VifCounters;
use netfront::UplinkCounters;
use xen::HypervisorCounters;
use xenstore::client::Counters as StoreCounters;

use crate::data_path::LoopCounters;
use crate::snapshot::{Counter, Flow};

/// Names in rules, each family's for itself.
pub(crate) const NAMES: &str = "resolver.names";
/// Those of them that are not resolved.
pub(crate) const UNRESOLVED: &str = "resolver.unresolved";

/// Makes named counters out of the fields of a struct.
macro_rules! named {
    ($prefix:literal, $counters:expr, { $($name:literal: $($field:ident).+,)* }) => {{
        let counters = $counters;
        list(&[$(concat!($prefix, $name)),*], &[$(counters.$($field).+),*])
    }};
}

/// Names and values as counters. Not inlined: there are more than a hundred.
#[inline(never)]
fn list(names: &[&'static str], values: &[u64]) -> Vec<Counter> {
    let counter = |(name, value): (&&'static str, &u64)| Counter {
        name: Cow::Borrowed(*name),
        value: *value,
    };
    names.iter().zip(values).map(counter).collect()
}

/// The hypervisor interface's counters.
pub(crate) fn hypervisor(counters: &HypervisorCounters) -> Vec<Counter> {
    named!("xen.", counters, {
        "hypercalls": hypercalls,
        "copy-batches": copy_batches,
        "copy-elements": copy_elements,
        "copy-bytes": copy_bytes,
        "events-sent": events_sent,
        "events-received": events_received,
        "polls": polls,
        "grants": grants,
        "revokes": revokes,
        "revokes-busy": revokes_busy,
        "maps": maps,
        "unmaps": unmaps,
    })
}

/// QubesDB's counters.
pub(crate) fn qubesdb(counters: &qubes::qubesdb::Counters) -> Vec<Counter> {
    named!("qubesdb.", counters, {
        "dumps": dumps,
        "entries": entries,
        "writes": writes,
        "removals": removals,
        "carried-out": carried_out,
        "refused": refused,
        "oversize": oversize,
        "unexpected": unexpected,
    })
}

/// The counters of qrexec.
pub(crate) fn qrexec(counters: &qubes::qrexec::Counters) -> Vec<Counter> {
    named!("qrexec.", counters, {
        "connections": connections,
        "calls": calls,
        "done": done,
        "never-came": never_came,
        "lost": lost,
        "stalled": stalled,
        "terminated": terminated,
        "unexpected": unexpected,
        "output-lost": output_lost,
    })
}

/// The main loop's counters.
pub(crate) fn main_loop(counters: &LoopCounters) -> Vec<Counter> {
    named!("loop.", counters, {
        "busy-iterations": busy_iterations,
        "idle-iterations": idle_iterations,
        "from-clients": from_clients,
        "from-uplink": from_uplink,
        "to-uplink": to_uplink,
        "to-clients": to_clients,
        "packets": packets,
        "refused": refused,
        "unreachable": unreachable,
        "no-page": no_page,
    })
}

/// The engine's counters.
pub(crate) fn engine(counters: &firewall::Counters) -> Vec<Counter> {
    counters
        .iter()
        .map(|(name, value)| Counter {
            name: Cow::Owned(alloc::format!("engine.{name}")),
            value,
        })
        .collect()
}

/// The resolver's counters.
pub(crate) fn resolver(resolver: &Resolver) -> Vec<Counter> {
    let mut counters = named!("resolver.", resolver.counters(), {
        "lookups": lookups,
        "resolved": resolved,
        "failed": failed,
        "unexpected": unexpected,
        "refused-names": refused_names,
        "learned": learned,
    });
    let (mut names, mut unresolved) = (0u64, 0u64);
    for name in resolver.names() {
        names = names.wrapping_add(1);
        unresolved = unresolved.wrapping_add(u64::from(name.state == HostState::Unresolved));
    }
    for (name, value) in [(NAMES, names), (UNRESOLVED, unresolved)] {
        counters.push(Counter {
            name: Cow::Borrowed(name),
            value,
        });
    }
    counters
}

/// The xenstore client's counters.
pub(crate) fn store(counters: &StoreCounters) -> Vec<Counter> {
    named!("store.", counters, {
        "requests": requests,
        "watch-events": watch_events,
    })
}

/// A client vif's counters.
pub(crate) fn vif(counters: &VifCounters) -> Vec<Counter> {
    named!("", counters, {
        "received-frames": received_frames,
        "received-bytes": received_bytes,
        "received-slots": received_slots,
        "received-gso": received_gso,
        "gso-without-blank": gso_without_blank,
        "receive-too-short": receive_errors.too_short,
        "receive-too-long": receive_errors.too_long,
        "receive-inconsistent-sizes": receive_errors.inconsistent_sizes,
        "receive-too-many-slots": receive_errors.too_many_slots,
        "receive-multicast-extras": receive_errors.multicast,
        "receive-copy-failed": receive_errors.copy_failed,
        "receive-pool-low": receive_pool_low,
        "sent-frames": sent_frames,
        "sent-bytes": sent_bytes,
        "sent-slots": sent_slots,
        "sent-gso": sent_gso,
        "segmented": segmented,
        "send-copy-failed": send_copy_failed,
        "queued": queued,
        "send-no-scatter-gather": send_drops.no_scatter_gather,
        "send-no-gso": send_drops.no_gso,
        "send-bad-segments": send_drops.bad_segments,
        "send-queue-full": send_drops.queue_full,
        "send-expired": send_drops.expired,
        "send-stalled": send_drops.stalled,
        "send-pool-low": send_drops.pool_low,
        "send-broken": send_drops.broken,
        "stalls": stalls,
        "notifications": notifications,
    })
}

/// The uplink's counters.
pub(crate) fn uplink(counters: &UplinkCounters) -> Vec<Counter> {
    named!("", counters, {
        "received-frames": received_frames,
        "received-bytes": received_bytes,
        "received-slots": received_slots,
        "received-gso": received_gso,
        "gso-without-blank": gso_without_blank,
        "receive-id-mismatches": receive_id_mismatches,
        "receive-bad-status": receive_drops.status,
        "receive-crosses-page": receive_drops.crosses_page,
        "receive-too-long": receive_drops.too_long,
        "receive-too-short": receive_drops.too_short,
        "receive-incomplete": receive_drops.incomplete,
        "receive-bad-extra": receive_drops.extra,
        "receive-held": receive_drops.held,
        "refill-short": refill_short,
        "sent-frames": sent_frames,
        "sent-bytes": sent_bytes,
        "sent-slots": sent_slots,
        "sent-gso": sent_gso,
        "segmented": segmented,
        "send-errors": send_errors,
        "send-full": send_full,
        "send-no-grants": send_no_grants,
        "held-grants": held_grants,
        "notifications": notifications,
    })
}

/// Drops by reason; `all` includes reasons that never occurred.
pub(crate) fn drops(counters: &DropCounters, all: bool) -> Vec<Counter> {
    counters
        .iter()
        .filter(|(_, value)| all || *value > 0)
        .map(|(reason, value)| Counter {
            name: Cow::Borrowed(reason.name()),
            value,
        })
        .collect()
}

/// At most `most` of the engine's flows, only those of `client` if one is named.
pub(crate) fn flows(
    engine: &firewall::Engine,
    most: usize,
    client: Option<IpAddr>,
    now: firewall::Time,
) -> Vec<Flow> {
    /// Flows looked at in one call of the engine.
    const PAGE: usize = 64;
    let mut list = Vec::new();
    let mut cursor = Some(FlowCursor::default());
    while let Some(from) = cursor
        && list.len() < most
    {
        cursor = engine.flows(from, PAGE, now, &mut |view| {
            if list.len() < most && client.is_none_or(|client| client == view.source.0) {
                list.push(flow(&view));
            }
        });
    }
    list
}

fn flow(view: &FlowView) -> Flow {
    Flow {
        protocol: view.protocol,
        source: view.source,
        destination: view.destination,
        translated: view.translated_source,
        state: Cow::Borrowed(view.state.name()),
        rule: view.rule,
        expires_seconds: view.expires_seconds,
        packets: u64::from(view.packets_up).wrapping_add(view.packets_down.into()),
    }
}
