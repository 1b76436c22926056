//! Grant copies: from our elements to Xen's, in batches, and the results back.
//!
//! Every element of Xen's array starts with a status that no copy can have, so that one that Xen never reached, because
//! it stopped part-way, is noticed. Ends are checked here as well as by Xen.
//!
//! Source: Xen `public/grant_table.h` (`gnttab_copy`).

use alloc::boxed::Box;
use alloc::vec;

use crate::abi::grant::{CopyEnd, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GnttabCopy};
use crate::hypervisor::{CopyDirection, CopyOp};
use crate::page::{PAGE_SIZE, Page};
use crate::types::{DomId, Errno, GrantStatus};

/// Elements given to Xen in one call: 10 KiB, and short enough not to be preempted much.
pub(crate) const BATCH: usize = 256;

/// What was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct CopyCounts {
    pub(crate) batches: u64,
    pub(crate) elements: u64,
    pub(crate) bytes: u64,
}

/// The array that Xen reads and writes.
#[derive(Debug)]
pub(crate) struct CopyBuffer {
    elements: Box<[GnttabCopy]>,
}

impl CopyBuffer {
    pub(crate) fn new() -> Self {
        Self {
            elements: vec![GnttabCopy::default(); BATCH].into_boxed_slice(),
        }
    }

    /// Carries out all of `ops` by calls of `copy`, at most [`BATCH`] elements each, and fills in their status.
    ///
    /// An element that names no page or leaves one gets `BAD_COPY_ARG` and is not given to `copy`. A call that fails
    /// leaves `NOT_DONE` where Xen did not get to; later batches are tried all the same.
    pub(crate) fn run(
        &mut self,
        ops: &mut [CopyOp],
        pages: &mut [Page],
        mut copy: impl FnMut(&mut [GnttabCopy]) -> Result<(), Errno>,
    ) -> CopyCounts {
        let mut counts = CopyCounts::default();
        for chunk in ops.chunks_mut(BATCH) {
            let mut used = 0usize;
            for op in chunk.iter_mut() {
                match (encode(op, pages), self.elements.get_mut(used)) {
                    (Some(element), Some(slot)) => {
                        *slot = element;
                        op.status = GrantStatus::NOT_DONE;
                        used = used.saturating_add(1);
                        counts.bytes = counts.bytes.wrapping_add(u64::from(op.len));
                    }
                    _ => op.status = GrantStatus::BAD_COPY_ARG,
                }
            }
            let elements = self.elements.get_mut(..used).unwrap_or_default();
            if elements.is_empty() {
                continue;
            }
            counts.batches = counts.batches.wrapping_add(1);
            counts.elements = counts.elements.wrapping_add(elements.len() as u64);
            // A failed call is told by the sentinels that it leaves.
            let _ = copy(elements);
            let given = chunk
                .iter_mut()
                .filter(|op| op.status == GrantStatus::NOT_DONE);
            for (op, element) in given.zip(elements) {
                op.status = GrantStatus(element.status);
            }
        }
        counts
    }
}

/// Xen's form of one element, noting in our page that it will be written.
///
/// `None` when it names no page of ours, leaves a page, or copies nothing.
fn encode(op: &CopyOp, pages: &mut [Page]) -> Option<GnttabCopy> {
    let page = pages.get_mut(usize::from(op.page))?;
    let fits = |offset: u16| usize::from(offset) + usize::from(op.len) <= PAGE_SIZE;
    if op.len == 0 || !fits(op.offset) || !fits(op.peer_offset) {
        return None;
    }
    let theirs = CopyEnd {
        frame: u64::from(op.gref.0),
        domid: op.peer.0,
        offset: op.peer_offset,
        padding: 0,
    };
    let ours = CopyEnd {
        frame: page.frame(),
        domid: DomId::SELF.0,
        offset: op.offset,
        padding: 0,
    };
    let (source, dest, flags) = match op.direction {
        CopyDirection::FromPeer => {
            page.mark_dirty(usize::from(op.offset) + usize::from(op.len));
            (theirs, ours, GNTCOPY_SOURCE_GREF)
        }
        CopyDirection::ToPeer => (ours, theirs, GNTCOPY_DEST_GREF),
    };
    Some(GnttabCopy {
        source,
        dest,
        len: op.len,
        flags,
        status: GrantStatus::NOT_DONE.0,
        padding: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::host_page;
    use crate::types::GrantRef;

    fn op(page: u16, len: u16) -> CopyOp {
        CopyOp {
            direction: CopyDirection::FromPeer,
            peer: DomId(3),
            gref: GrantRef(77),
            peer_offset: 16,
            page,
            offset: 64,
            len,
            status: GrantStatus::OKAY,
        }
    }

    #[test]
    fn both_directions_name_both_ends() {
        let mut pages = [host_page()];
        let frame = pages[0].as_ptr() as u64 / 4096;
        let mut ops = [op(0, 100), op(0, 100)];
        ops[1].direction = CopyDirection::ToPeer;
        let mut seen = Vec::new();
        CopyBuffer::new().run(&mut ops, &mut pages, |elements| {
            seen.extend_from_slice(elements);
            Ok(())
        });
        let theirs = CopyEnd {
            frame: 77,
            domid: 3,
            offset: 16,
            padding: 0,
        };
        let ours = CopyEnd {
            frame,
            domid: 0x7FF0,
            offset: 64,
            padding: 0,
        };
        assert_eq!((seen[0].source, seen[0].dest, seen[0].flags), (theirs, ours, 1));
        assert_eq!((seen[1].source, seen[1].dest, seen[1].flags), (ours, theirs, 2));
        assert_eq!((seen[0].len, seen[0].status), (100, i16::MIN));
    }

    #[test]
    fn elements_that_leave_a_page_never_reach_xen() {
        let mut pages = [host_page()];
        let mut ops = [op(0, 4096 - 64), op(0, 0), op(1, 10), op(0, 4096 - 63), op(0, 1)];
        ops[4].peer_offset = 4096;
        let mut given = 0;
        let counts = CopyBuffer::new().run(&mut ops, &mut pages, |elements| {
            given += elements.len();
            elements[0].status = 0;
            Ok(())
        });
        assert_eq!(given, 1);
        let bad = GrantStatus::BAD_COPY_ARG;
        assert_eq!(ops.map(|op| op.status), [GrantStatus::OKAY, bad, bad, bad, bad]);
        assert_eq!((counts.elements, counts.bytes), (1, 4096 - 64));
    }

    /// P6: mixed results, a call that stops midway, and elements of ours between them.
    #[test]
    fn every_element_gets_its_own_status_once() {
        let mut pages = [host_page()];
        let mut ops = vec![op(0, 10); 600];
        ops[3].page = 9;
        let mut sizes = Vec::new();
        let counts = CopyBuffer::new().run(&mut ops, &mut pages, |elements| {
            sizes.push(elements.len());
            let reached = if sizes.len() == 2 { 100 } else { elements.len() };
            for (index, element) in elements[..reached].iter_mut().enumerate() {
                element.status = if index % 5 == 4 { -8 } else { 0 };
            }
            if reached < elements.len() { Err(Errno::EFAULT) } else { Ok(()) }
        });
        assert_eq!(sizes, [255, 256, 88]);
        assert_eq!((counts.batches, counts.elements), (3, 599));
        assert_eq!(ops[3].status, GrantStatus::BAD_COPY_ARG);
        // Element 4 of Xen's array is element 5 of ours, since number 3 was left out.
        assert_eq!(ops[4].status, GrantStatus::OKAY);
        assert_eq!(ops[5].status, GrantStatus::PERMISSION_DENIED);
        assert_eq!(ops[256 + 99].status, GrantStatus::PERMISSION_DENIED);
        assert!(ops[256 + 100..512].iter().all(|op| op.status == GrantStatus::NOT_DONE));
        assert_eq!(ops[512].status, GrantStatus::OKAY);
    }
}
