//! Fits frames to what their receiver can take, and hands them to its driver.
//!
//! A frame from a peer that offloads work may have an unfinished checksum, or be one large TCP packet. Where the
//! receiver takes that, it goes on as it is. Where it does not, the checksum is completed here (the only case in which
//! our CPU reads payload), and the large packet is cut: headers are written here, payload moves by grant copy.
//!
//! Source: `xen-netif.md` 6.2, 6.3; Xen `public/io/netif.h`.

use core::num::NonZeroU16;

use firewall::GsoFamily;
use netback::{Batch, Vif};
use netfront::Uplink;
use xen::netif::GsoType;
use xen::{Checksum, Frame, Gso, Hypervisor};

use crate::offload::{self, Cut};

/// What the driver says of a frame's checksum, in the engine's terms.
pub(crate) fn checksum_in(frame: &Frame) -> firewall::Checksum {
    match frame.checksum {
        Checksum::Blank => firewall::Checksum::Blank,
        Checksum::Validated => firewall::Checksum::Validated,
        Checksum::Unverified => firewall::Checksum::Unverified,
    }
}

/// What the driver says of a frame's segmentation, in the engine's terms.
pub(crate) fn gso_in(frame: &Frame) -> Option<firewall::Gso> {
    frame.gso.map(|gso| firewall::Gso {
        mss: gso.size.get(),
        family: match gso.family {
            GsoType::TcpV4 => GsoFamily::V4,
            GsoType::TcpV6 => GsoFamily::V6,
        },
    })
}

/// Puts the engine's word on checksum and segmentation into the frame.
pub(crate) fn state_out(
    frame: &mut Frame,
    checksum: firewall::Checksum,
    gso: Option<firewall::Gso>,
) {
    frame.checksum = match checksum {
        firewall::Checksum::Blank => Checksum::Blank,
        firewall::Checksum::Validated => Checksum::Validated,
        firewall::Checksum::Unverified => Checksum::Unverified,
    };
    frame.gso = gso.and_then(|gso| {
        Some(Gso {
            size: NonZeroU16::new(gso.mss)?,
            family: match gso.family {
                GsoFamily::V4 => GsoType::TcpV4,
                GsoFamily::V6 => GsoType::TcpV6,
            },
        })
    });
}

/// What a receiver takes without our doing.
#[derive(Clone, Copy)]
struct Takes {
    blank4: bool,
    blank6: bool,
    gso4: bool,
    gso6: bool,
}

/// How a frame must go.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives on the stack for one frame; nothing is allocated per packet"
)]
enum Fit {
    /// As it is now.
    Whole,
    /// Cut into segments.
    Cut(Cut),
    /// Not at all: the receiver cannot take it and we cannot help.
    Never,
}

/// Fits a frame to a receiver. May complete its checksum.
fn fit(frame: &mut Frame, takes: Takes) -> Fit {
    let ipv6 = frame.header().get(12..14) == Some(&[0x86, 0xdd]);
    let (blank, gso) = if ipv6 {
        (takes.blank6, takes.gso6)
    } else {
        (takes.blank4, takes.gso4)
    };
    // A frame with GSO is always blank; whoever takes the one takes the other.
    if frame.gso.is_some() && !(gso && blank) {
        return match Cut::plan(frame, blank) {
            Some(cut) => Fit::Cut(cut),
            None => Fit::Never,
        };
    }
    if frame.checksum == Checksum::Blank && !blank && !offload::complete(frame) {
        return Fit::Never;
    }
    Fit::Whole
}

/// Sends a frame to the netvm. Returns whether its driver took it.
pub(crate) fn to_uplink<H: Hypervisor>(hv: &mut H, uplink: &mut Uplink, frame: &mut Frame) -> bool {
    let features = uplink.features();
    let takes = Takes {
        blank4: true,
        blank6: features.ipv6_csum_offload,
        gso4: features.gso_tcpv4,
        gso6: features.gso_tcpv6,
    };
    match fit(frame, takes) {
        Fit::Whole => uplink.send(hv, frame).is_ok(),
        Fit::Cut(cut) => uplink
            .send_segments(hv, frame, cut.segments, |index, header| {
                cut.write_header(index, header);
            })
            .is_ok(),
        Fit::Never => false,
    }
}

/// Sends a frame to a client. Returns whether its driver took it, to send it or to queue it.
pub(crate) fn to_client<H: Hypervisor>(
    hv: &mut H,
    vif: &mut Vif,
    batch: &mut Batch,
    frame: &mut Frame,
) -> bool {
    let features = vif.features();
    let takes = Takes {
        blank4: !features.no_csum_offload,
        blank6: features.ipv6_csum_offload,
        gso4: features.gso_tcpv4 && features.sg,
        gso6: features.gso_tcpv6 && features.sg,
    };
    match fit(frame, takes) {
        Fit::Whole => vif.send(hv, batch, frame).is_ok(),
        Fit::Cut(cut) => vif
            .send_segments(hv, batch, frame, cut.segments, |index, header| {
                cut.write_header(index, header);
            })
            .is_ok(),
        Fit::Never => false,
    }
}
