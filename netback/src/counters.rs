//! What a vif counts. Plain increments, kept always; the kernel puts them into its snapshot.

/// Counters of one connected client vif. They start at zero with each connection.
///
/// "Received" is what the client transmitted, "sent" is what was put into its receive buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VifCounters {
    /// Frames taken from the client.
    pub received_frames: u64,
    /// Bytes in them, Ethernet headers included.
    pub received_bytes: u64,
    /// Tx ring slots consumed, those of refused frames and extras included.
    pub received_slots: u64,
    /// Received frames that are GSO frames.
    pub received_gso: u64,
    /// GSO frames whose sender forgot the blank-checksum flag; it was set.
    pub gso_without_blank: u64,
    /// Received frames that were refused or lost, by reason.
    pub receive_errors: ReceiveErrors,
    /// Times that requests were left in the ring because the page pool was low.
    pub receive_pool_low: u64,
    /// Frames put into the client's buffers (segments count one each).
    pub sent_frames: u64,
    /// Bytes in them, Ethernet headers included.
    pub sent_bytes: u64,
    /// Rx ring slots consumed, extras included.
    pub sent_slots: u64,
    /// Sent frames that are GSO frames.
    pub sent_gso: u64,
    /// GSO frames that were cut into segments for this client.
    pub segmented: u64,
    /// Rx slots whose copy failed; the client lost those frames.
    pub send_copy_failed: u64,
    /// Frames that waited in the queue for the client's buffers.
    pub queued: u64,
    /// Frames that were not sent, by reason.
    pub send_drops: SendDrops,
    /// Times that the client was declared stalled.
    pub stalls: u64,
    /// Notifications that the client's event indices asked for.
    pub notifications: u64,
}

/// Frames of the client that were answered with an error instead of being taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReceiveErrors {
    /// Shorter than an Ethernet header.
    pub too_short: u64,
    /// Longer than the MTU allows without GSO.
    pub too_long: u64,
    /// Fragments longer together than the frame.
    pub inconsistent_sizes: u64,
    /// More data slots than are accepted, but not so many that the peer must be hostile.
    pub too_many_slots: u64,
    /// A multicast filter request, which was not offered.
    pub multicast: u64,
    /// Xen could not copy out of the client's page.
    pub copy_failed: u64,
}

/// Frames towards the client that were dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendDrops {
    /// More than one slot, and the client takes no scatter-gather.
    pub no_scatter_gather: u64,
    /// A GSO frame of a family that the client does not take.
    pub no_gso: u64,
    /// Segments that cannot be sent: none, too many, or longer than a page.
    pub bad_segments: u64,
    /// Segments of a cut frame for which the client had no buffers, while it had for others.
    pub segments_lost: u64,
    /// The queue is full.
    pub queue_full: u64,
    /// Waited in the queue for longer than a frame may.
    pub expired: u64,
    /// The client has posted no usable buffers for long.
    pub stalled: u64,
    /// The page pool is too low to hold frames for a client that does not take them.
    pub pool_low: u64,
    /// The vif's rings are not served any more, or the container was empty.
    pub broken: u64,
}
