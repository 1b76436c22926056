//! Cutting a large packet for a receiver without GSO, for benches (workload W12 of `performance.md`).
//!
//! Behind the feature `blocks`, which only `cargo xtask bench` turns on: nothing else may call this. The pages
//! and rings on the way are the drivers' and are not in it.

use core::num::NonZeroU16;

use xen::netif::GsoType;
use xen::packet::HEADER_LEN;
use xen::{Checksum, Frame, Gso, Hypervisor, PAGE_SIZE};

use crate::offload::Cut;

/// A large TCP packet.
#[derive(Debug)]
pub struct Large(Frame);

impl Large {
    /// Fills pages with a frame; its segments are to have at most `mss` bytes of payload. `None` if pages run out.
    pub fn new<H: Hypervisor>(hv: &mut H, bytes: &[u8], mss: NonZeroU16) -> Option<Self> {
        let mut frame = Frame::new();
        for part in bytes.chunks(PAGE_SIZE) {
            let mut page = hv.allocate()?;
            page.bytes_mut(0..part.len()).copy_from_slice(part);
            frame.push(page, 0, u16::try_from(part.len()).ok()?).ok()?;
        }
        frame.checksum = Checksum::Blank;
        frame.gso = Some(Gso {
            size: mss,
            family: GsoType::TcpV4,
        });
        Some(Self(frame))
    }

    /// Plans the cutting and writes every header; returns how many segments there are. With `blank` the receiver
    /// finishes checksums itself; without, all of the payload is read.
    #[inline(never)]
    pub fn cut(&self, blank: bool) -> usize {
        let Some(cut) = Cut::plan(&self.0, blank) else {
            return 0;
        };
        let count = cut.segments.count(self.0.len());
        let mut header = [0; HEADER_LEN];
        let len = usize::from(cut.segments.header_len);
        for index in 0..count {
            if let Some(header) = header.get_mut(..len) {
                cut.write_header(index, header);
                core::hint::black_box(header);
            }
        }
        count
    }

    /// Gives the pages back.
    pub fn release<H: Hypervisor>(mut self, hv: &mut H) {
        self.0.release(hv);
    }
}
