//! What the uplink counts. Plain increments, kept always; the kernel puts them into its snapshot.

/// Counters of one connected uplink. They start at zero with each connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkCounters {
    /// Frames received from the netvm.
    pub received_frames: u64,
    /// Bytes in them, Ethernet headers included.
    pub received_bytes: u64,
    /// Rx responses consumed, those of dropped frames and extras included.
    pub received_slots: u64,
    /// Received frames that are GSO frames.
    pub received_gso: u64,
    /// GSO frames whose sender forgot the blank-checksum flag; it was set.
    pub gso_without_blank: u64,
    /// Rx responses whose id was not the posted one; ignored, as the slot decides.
    pub receive_id_mismatches: u64,
    /// Received frames that were dropped, by reason.
    pub receive_drops: ReceiveDrops,
    /// Times that fewer rx buffers were posted than wanted, for want of pages or grants.
    pub refill_short: u64,
    /// Frames handed to the netvm (segments count one each).
    pub sent_frames: u64,
    /// Bytes in them, Ethernet headers included.
    pub sent_bytes: u64,
    /// Tx slots used, extras included.
    pub sent_slots: u64,
    /// Sent frames that are GSO frames.
    pub sent_gso: u64,
    /// GSO frames that were cut into segments for the netvm.
    pub segmented: u64,
    /// Data slots that the netvm answered with an error or dropped.
    pub send_errors: u64,
    /// Frames not sent because the ring was full.
    pub send_full: u64,
    /// Frames not sent for want of grant references or pages.
    pub send_no_grants: u64,
    /// Pages that the netvm still held when it had answered.
    pub held_grants: u64,
    /// Notifications that the netvm's event indices asked for.
    pub notifications: u64,
}

/// Frames of the netvm that were dropped by the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReceiveDrops {
    /// The netvm reported an error for a slot.
    pub status: u64,
    /// A fragment that leaves its page.
    pub crosses_page: u64,
    /// More data slots, or more bytes, than a frame may have.
    pub too_long: u64,
    /// Shorter than an Ethernet header.
    pub too_short: u64,
    /// Not whole within the published responses.
    pub incomplete: u64,
    /// An unusable or unknown extra, or the obsolete GSO prefix.
    pub extra: u64,
    /// A page of the frame was still held by the netvm.
    pub held: u64,
}
