//! The DNS messages of clients, seen in the frames that carry them.
//!
//! [`sight`] tells frames that may matter from all others by a few bytes, so that it can be asked about every
//! frame. What it finds is shown to the resolver after the engine has decided it: the engine knows the
//! flow, and with it who asks whom, whatever was translated.
//!
//! Only whole UDP datagrams are read. Answers in fragments, over TCP or over anything encrypted teach nothing.
//!
//! Source: `qubes-policy.md` 4.4; RFC 768.

use core::net::IpAddr;

use super::exchange::SERVER_PORT;
use super::{Resolver, Transport};
use crate::address::Address;
use crate::frame::{Checksum, Frame, Iface, Time};
use crate::rule::Family;
use crate::view::FlowView;
use crate::wire::ipv4::Parts;
use crate::wire::{ethernet, get_u16, ipv4, ipv6, protocol, transport};

/// Bytes of a UDP header.
const UDP_HEADER: usize = 8;

/// A frame that may carry DNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The family of the packet.
    pub family: Family,
    /// What carries the message.
    pub transport: Transport,
}

/// Tells frames to port 53 of somebody (from clients) and from port 53 (from the uplink) from all others. Fragments and
/// packets with extension headers count as others.
#[inline]
pub fn sight(ingress: Iface, frame: &Frame<'_>) -> Option<Sight> {
    let head = &*frame.head;
    let (family, number, start) = match get_u16(head, 12)? {
        ethernet::TYPE_IPV4 => {
            let ip = head.get(ethernet::HEADER..)?.first_chunk::<20>()?;
            if u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0 {
                return None;
            }
            (Family::Ipv4, ip[9], usize::from(ip[0] & 0xf) * 4)
        }
        ethernet::TYPE_IPV6 => {
            let ip = head
                .get(ethernet::HEADER..)?
                .first_chunk::<{ ipv6::HEADER }>()?;
            (Family::Ipv6, ip[6], ipv6::HEADER)
        }
        _ => return None,
    };
    let transport = match number {
        protocol::UDP => Transport::Udp,
        protocol::TCP => Transport::Tcp,
        _ => return None,
    };
    let port = match ingress {
        Iface::Client(_) => 2,
        Iface::Uplink => 0,
    };
    let port = get_u16(head, ethernet::HEADER + start + port)?;
    (port == u16::from(SERVER_PORT)).then_some(Sight { family, transport })
}

impl Resolver {
    /// Whether something was asked, so that frames from the uplink may be answers.
    pub fn is_waiting(&self) -> bool {
        !self.exchanges.is_empty()
    }

    /// Whether clients' DNS messages are worth a look: rules have names, and answers count.
    pub fn is_watching(&self) -> bool {
        self.learner.is_some() && !self.users.is_empty()
    }

    /// Sees a frame with a client's query as it leaves, that belongs to `flow`. `users` are all addresses of the client.
    pub fn see_query(&mut self, frame: &Frame<'_>, flow: &FlowView, users: &[IpAddr], now: Time) {
        if let Some((message, _)) = message(frame) {
            let server = flow.translated_destination.0;
            self.client_query(flow.source, users, server, message, now);
        }
    }

    /// Sees a frame with an answer to a client as it leaves, that belongs to `flow`. Returns whether
    /// [`Self::next_changed`] has news, as [`Self::client_answer`] does.
    pub fn see_answer(&mut self, frame: &Frame<'_>, flow: &FlowView, now: Time) -> bool {
        match message(frame) {
            Some((message, true)) => {
                let server = flow.translated_destination.0;
                self.client_answer(flow.source, server, message, now)
            }
            _ => false,
        }
    }
}

/// The UDP payload of a whole packet, and whether its checksum is right or vouched for.
fn message<'f>(frame: &'f Frame<'_>) -> Option<(&'f [u8], bool)> {
    match get_u16(frame.head, 12)? {
        ethernet::TYPE_IPV4 => payload(
            &ipv4::take_apart(frame.head, frame.len).ok()?,
            frame.checksum,
        ),
        ethernet::TYPE_IPV6 => payload(
            &ipv6::take_apart(frame.head, frame.len).ok()?,
            frame.checksum,
        ),
        _ => None,
    }
}

fn payload<'f, A: Address>(parts: &Parts<'f, A>, state: Checksum) -> Option<(&'f [u8], bool)> {
    let network = &parts.network;
    let bytes = parts.transport;
    let whole = usize::try_from(network.transport_len()) == Ok(bytes.len());
    if network.protocol != protocol::UDP || network.is_fragment || network.opaque || !whole {
        return None;
    }
    let len = usize::from(get_u16(bytes, 4)?);
    let is_right = match state {
        Checksum::Blank | Checksum::Validated => true,
        Checksum::Unverified => transport::checksum_is_right(
            (network.src, network.dst),
            network.protocol,
            network.transport_len(),
            bytes,
        ),
    };
    Some((bytes.get(UDP_HEADER..len)?, is_right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::ClientId;
    use alloc::vec::Vec;

    const CLIENT: Iface = Iface::Client(ClientId(0));

    /// A frame with an IPv4 header of `words` words and ports from 40000 to 53.
    fn frame4(number: u8, words: u8, fragment: u16) -> Vec<u8> {
        let mut frame = Vec::from([0; 12]);
        frame.extend([8, 0, 0x40 | words, 0, 0, 0, 0, 0]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, number]);
        frame.resize(14 + usize::from(words) * 4, 0);
        frame.extend([0x9c, 0x40, 0, 53]);
        frame
    }

    fn seen(ingress: Iface, frame: &[u8]) -> Option<Sight> {
        sight(ingress, &Frame::whole(&mut frame.to_vec()))
    }

    #[test]
    fn port_53_is_seen_from_the_side_it_matters() {
        let udp4 = Some(Sight {
            family: Family::Ipv4,
            transport: Transport::Udp,
        });
        assert_eq!(seen(CLIENT, &frame4(17, 5, 0)), udp4);
        assert_eq!(seen(CLIENT, &frame4(17, 7, 0x4000)), udp4);
        // To port 53 of ours, which nobody may.
        assert_eq!(seen(Iface::Uplink, &frame4(17, 5, 0)), None);
        let mut answer = frame4(6, 5, 0);
        answer[34..38].rotate_left(2);
        assert_eq!(seen(CLIENT, &answer), None);
        let tcp4 = seen(Iface::Uplink, &answer).unwrap();
        assert_eq!(tcp4.transport, Transport::Tcp);
        let mut frame6 = Vec::from([0; 12]);
        frame6.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 17, 64]);
        frame6.resize(54, 0);
        frame6.extend([0x9c, 0x40, 0, 53]);
        assert_eq!(seen(CLIENT, &frame6).unwrap().family, Family::Ipv6);
    }

    #[test]
    fn other_frames_are_not_worth_a_look() {
        for (claim, frame) in [
            ("first fragment", frame4(17, 5, 0x2000)),
            ("later fragment", frame4(17, 5, 1)),
            ("another protocol", frame4(1, 5, 0)),
            ("cut before the port", frame4(17, 5, 0)[..36].to_vec()),
            ("cut in the header", frame4(17, 5, 0)[..30].to_vec()),
            ("nothing", Vec::new()),
        ] {
            assert_eq!(seen(CLIENT, &frame), None, "{claim}");
        }
    }
}
