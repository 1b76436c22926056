//! How the domain's memory is shared out, from 8 MiB upward.
//!
//! | part | 8 MiB domain | 16 MiB domain | bound |
//! | --- | --- | --- | --- |
//! | packet pool: uplink buffers, frames in flight, clients' queues | 2.9 MiB | 5.9 MiB | 64 MiB |
//! | control plane: devices, settings, rules, console text | 1.5 MiB | 2.2 MiB | a quarter of the heap |
//! | engine: flows, fragments, generated frames | the rest | the rest | |
//!
//! Everything is taken once at boot. What a part does when its memory is used up is stated where the part is: the
//! engine evicts or refuses flows, drivers drop frames, the control plane refuses devices or rule sets.

use firewall::Limits;

const MIB: usize = 1024 * 1024;

/// Least pool with which the uplink's rings, one GSO frame and some clients work.
const POOL_MIN: usize = 2 * MIB;
/// Most that frames in flight can use.
const POOL_MAX: usize = 64 * MIB;
/// Least memory for the control plane.
const CONTROL_MIN: usize = 3 * MIB / 2;

/// The shares of the parts, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryPlan {
    /// The heap: engine and control plane.
    pub heap_bytes: usize,
    /// The engine's share of the heap.
    pub engine_bytes: usize,
    /// Receive buffers towards the uplink, one page each.
    pub rx_buffers: u32,
}

impl MemoryPlan {
    /// Shares out `usable` bytes: all RAM but the image and what Xen put there. What the heap does not
    /// get is the packet pool.
    #[must_use]
    pub fn new(usable: usize) -> Self {
        let pool = (usable / 5 * 2).clamp(POOL_MIN, POOL_MAX);
        let heap_bytes = usable.saturating_sub(pool);
        let control = (heap_bytes / 4).max(CONTROL_MIN);
        Self {
            heap_bytes,
            engine_bytes: heap_bytes.saturating_sub(control),
            rx_buffers: if pool < 4 * MIB { 128 } else { 256 },
        }
    }

    /// The sizes of the engine's tables.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits::for_memory(u64::try_from(self.engine_bytes).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m5_eight_mebibytes_hold_the_smallest_tables_and_both_rings() {
        // 8 MiB less the image and Xen's pages.
        let plan = MemoryPlan::new(7 * MIB);
        let limits = plan.limits();
        assert!(limits.flows4 >= 4096 && limits.flows6 >= 1024);
        let pool_pages = (7 * MIB - plan.heap_bytes) / 4096;
        // Receive buffers, a full transmit ring, and a burst of clients' frames.
        assert!(pool_pages > usize::try_from(plan.rx_buffers).unwrap() + 256 + 64);
        assert!(plan.heap_bytes - plan.engine_bytes >= CONTROL_MIN);
    }

    #[test]
    fn more_memory_means_more_flows_and_the_pool_stops_growing() {
        let small = MemoryPlan::new(15 * MIB);
        let large = MemoryPlan::new(400 * MIB);
        assert!(small.limits().flows4 >= 16_384, "{}", small.limits().flows4);
        assert!(large.limits().flows4 > 10 * small.limits().flows4);
        assert_eq!(400 * MIB - large.heap_bytes, POOL_MAX);
    }
}
