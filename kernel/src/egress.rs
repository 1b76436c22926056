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

/// Sends a frame to the netvm. Returns whether its driver took it.
pub(crate) fn to_uplink<H: Hypervisor>(hv: &mut H, uplink: &mut Uplink, frame: &mut Frame) -> bool {
    uplink.send(hv, frame).is_ok()
}

/// Sends a frame to a client. Returns whether its driver took it, to send it or to queue it.
pub(crate) fn to_client<H: Hypervisor>(
    hv: &mut H,
    vif: &mut Vif,
    batch: &mut Batch,
    frame: &mut Frame,
) -> bool {
    vif.send(hv, batch, frame).is_ok()
}
