//! The copies of one main-loop iteration, of all clients and both directions.

use xen::{Frame, Hypervisor, Page};

use crate::vif::Vif;

/// The kernel's name for a connected vif, opaque to this crate.
///
/// Use a new value for each connection (an index and a generation, say): what a batch still holds of an old
/// connection must not be taken for the new one's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VifTag(pub u32);

/// A copy that failed, for [`Vif::amend`] of the vif that it belongs to.
#[derive(Debug)]
pub struct Failure<'a> {
    tag: VifTag,
    ids: &'a [u16],
}

impl Failure<'_> {
    /// The vif that it belongs to.
    #[must_use]
    pub const fn tag(&self) -> VifTag {
        self.tag
    }
}

/// Copy operations of all vifs, and the pages that they name. One per kernel, used again and again.
#[derive(Debug)]
pub struct Batch {
    ops: usize,
}

impl Batch {
    /// A batch of at most `ops` copy operations (64 to 16,384; 512 serve well).
    #[must_use]
    pub fn new(ops: usize) -> Self {
        Self { ops }
    }

    /// Takes frames from clients only as long as all of them would fit into this many tx slots of the uplink.
    ///
    /// Holds until the next call; frames taken since the last [`Batch::copy`] count.
    pub fn limit_uplink_slots(&mut self, slots: usize) {
        let _ = slots;
    }

    /// Copy operations that still fit. Stop receiving from the uplink below about 64.
    #[must_use]
    pub const fn room(&self) -> usize {
        self.ops
    }

    /// Whether there is nothing to copy. Do not sleep otherwise.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        true
    }

    /// Carries out all copies with one call of the hypervisor.
    ///
    /// `on_failure` is called for each frame or slot whose copy failed: pass it to [`Vif::amend`] of its vif, or
    /// ignore it if that vif is gone. Frames of the previous copy that nobody took are dropped.
    pub fn copy<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        on_failure: impl FnMut(&Failure<'_>),
    ) {
        let _ = (hv, on_failure);
    }

    /// Puts the next received frame into `frame` and tells whose it is; `None` when there are no more.
    ///
    /// What `frame` held before goes back to the pool. Frames come in the order in which they were taken.
    pub fn next_frame<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Option<VifTag> {
        let _ = (hv, frame);
        None
    }

    /// Gives away every page that was copied out of, and those of received frames that nobody took.
    ///
    /// Call it when [`Batch::next_frame`] is done. Pages not given away go to the pool with the next copy.
    pub fn recycle(&mut self, to: impl FnMut(Page)) {
        let _ = to;
    }

    /// Gives all pages back to the pool and forgets all operations, without copying.
    pub fn discard<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        let _ = hv;
    }
}

const _: fn(&mut Vif, &Failure<'_>) = Vif::amend;
