//! What hardware would do for a receiver that cannot: finish checksums, cut large TCP packets.
//!
//! Only for frames that the engine has passed: Ethernet without a tag, then IPv4 or IPv6 without extension headers, then
//! TCP or UDP. Anything else is not for offload and is refused. This is the cold path: receivers that matter take
//! unfinished checksums and GSO. Headers are read and written with smoltcp's wire types after one length check.
//!
//! Guards (`xen-netif.md` 6.3): at most [`MAX_SEGMENTS`](netback::MAX_SEGMENTS) segments of at least [`MIN_MSS`] bytes,
//! so that one large frame cannot become thousands of small ones; no SYN, RST or URG.

use smoltcp::wire::{Ipv4Packet, Ipv6Packet, TcpPacket, TcpSeqNumber};
use xen::packet::{HEADER_LEN, Segments};
use xen::{Checksum, Frame};

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of an IPv6 header.
const IPV6: usize = 40;
/// The smallest segment that a large frame is cut into, in bytes of payload.
pub(crate) const MIN_MSS: u16 = 256;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where the parts of a frame are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    ipv6: bool,
    udp: bool,
    /// Offset of the transport header.
    transport: usize,
    /// Offset behind the last byte of the IP packet; what follows is padding.
    end: usize,
}

impl Place {
    /// Looks at the headers of a frame of `frame_len` bytes.
    fn of(header: &[u8], frame_len: usize) -> Option<Self> {
        let kind = header.get(12..ETHERNET)?;
        let ip = header.get(ETHERNET..)?;
        let (ipv6, protocol, transport, len) = match kind {
            [0x08, 0x00] => {
                let ip = Ipv4Packet::new_unchecked(ip.get(..20)?);
                let header_len = usize::from(ip.header_len());
                if ip.version() != 4 || header_len < 20 || ip.more_frags() || ip.frag_offset() != 0
                {
                    return None;
                }
                let len = usize::from(ip.total_len());
                (false, u8::from(ip.next_header()), header_len, len)
            }
            [0x86, 0xdd] => {
                let ip = Ipv6Packet::new_unchecked(ip.get(..IPV6)?);
                let len = IPV6.wrapping_add(usize::from(ip.payload_len()));
                (true, u8::from(ip.next_header()), IPV6, len)
            }
            _ => return None,
        };
        let place = Self {
            ipv6,
            udp: protocol == UDP,
            transport: ETHERNET.wrapping_add(transport),
            end: ETHERNET.wrapping_add(len),
        };
        let least = if place.udp { 8 } else { 20 };
        let known = place.udp || protocol == TCP;
        let whole = place.transport.wrapping_add(least) <= place.end.min(header.len());
        (known && whole && place.end <= frame_len).then_some(place)
    }

    /// Offset of the transport's checksum field.
    const fn checksum(&self) -> usize {
        self.transport + if self.udp { 6 } else { 16 }
    }
}

/// The ones'-complement sum of bytes, folded to 16 bits, not inverted. An odd last byte counts as the high one.
fn sum(bytes: &[u8]) -> u16 {
    let mut pairs = bytes.chunks_exact(2);
    let mut total: u64 = 0;
    for pair in &mut pairs {
        if let [high, low] = pair {
            total = total.wrapping_add(u64::from(u16::from_be_bytes([*high, *low])));
        }
    }
    if let [last] = pairs.remainder() {
        total = total.wrapping_add(u64::from(u16::from_be_bytes([*last, 0])));
    }
    fold(total)
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    u16::try_from(total).unwrap_or(0xffff)
}

fn add(one: u16, other: u16) -> u16 {
    fold(u64::from(one).wrapping_add(u64::from(other)))
}

/// The sum of bytes `from..to` of a frame, across its fragments.
fn sum_of_range(frame: &Frame, from: usize, to: usize) -> u16 {
    let (mut at, mut total, mut odd) = (0usize, 0u16, false);
    for bytes in frame.bytes() {
        let start = from.saturating_sub(at).min(bytes.len());
        let end = to.saturating_sub(at).min(bytes.len());
        at = at.wrapping_add(bytes.len());
        let part = bytes.get(start..end).unwrap_or_default();
        let value = sum(part);
        total = add(total, if odd { value.swap_bytes() } else { value });
        odd ^= part.len() % 2 == 1;
    }
    total
}

/// Finishes the checksum of a frame that has only the pseudo-header sum in its place. Reads all of the payload.
///
/// Returns whether the frame was one that can have such a checksum; if not, it is unchanged.
pub(crate) fn complete(frame: &mut Frame) -> bool {
    let Some(place) = Place::of(frame.header(), frame.len()) else {
        return false;
    };
    let mut value = !sum_of_range(frame, place.transport, place.end);
    if place.udp && value == 0 {
        value = 0xffff;
    }
    let field = place.checksum();
    let header = frame.header_mut(field.wrapping_add(2));
    if let Some(bytes) = header.get_mut(field..) {
        bytes.copy_from_slice(&value.to_be_bytes());
    }
    frame.checksum = Checksum::Validated;
    true
}

/// Finishes the checksum of a frame in one piece that has only the pseudo-header sum in its place.
///
/// Returns whether the frame was one that can have such a checksum; if not, it is unchanged.
pub fn complete_bytes(frame: &mut [u8]) -> bool {
    let Some(place) = Place::of(frame, frame.len()) else {
        return false;
    };
    let mut value = !sum(frame.get(place.transport..place.end).unwrap_or_default());
    if place.udp && value == 0 {
        value = 0xffff;
    }
    let field = place.checksum();
    match frame.get_mut(field..).and_then(<[u8]>::first_chunk_mut) {
        Some(bytes) => {
            *bytes = value.to_be_bytes();
            true
        }
        None => false,
    }
}

/// How a large TCP packet is cut: what the driver must know, and what is needed to write each header.
pub(crate) struct Cut {
    pub(crate) segments: Segments,
    place: Place,
    template: [u8; HEADER_LEN],
    header_len: usize,
    payload: usize,
    mss: usize,
    count: usize,
    /// Sums of the segments' payloads, when their checksums must be finished here.
    sums: Option<[u16; netback::MAX_SEGMENTS]>,
}

impl Cut {
    /// Plans the cutting of a GSO frame. With `blank` the receiver finishes checksums itself; without, all of the
    /// payload is read here.
    ///
    /// `None` for a frame that cannot or must not be cut; see the module.
    pub(crate) fn plan(frame: &Frame, blank: bool) -> Option<Self> {
        let mss = frame.gso?.size.get();
        let place = Place::of(frame.header(), frame.len()).filter(|place| !place.udp)?;
        let tcp = TcpPacket::new_unchecked(frame.header().get(place.transport..)?);
        let header_len = place.transport.checked_add(usize::from(tcp.header_len()))?;
        let payload = place.end.checked_sub(header_len)?;
        let refused = tcp.header_len() < 20 || tcp.syn() || tcp.rst() || tcp.urg();
        let count = payload.div_ceil(usize::from(mss));
        if refused || mss < MIN_MSS || payload == 0 || count > netback::MAX_SEGMENTS {
            return None;
        }
        let mut template = [0u8; HEADER_LEN];
        template
            .get_mut(..header_len)?
            .copy_from_slice(frame.header().get(..header_len)?);
        let mut cut = Self {
            segments: Segments {
                header_len: u16::try_from(header_len).ok()?,
                payload_len: mss,
                checksum: if blank {
                    Checksum::Blank
                } else {
                    Checksum::Validated
                },
            },
            place,
            template,
            header_len,
            payload,
            mss: usize::from(mss),
            count,
            sums: None,
        };
        if !blank {
            cut.sums = Some(cut.payload_sums(frame));
        }
        Some(cut)
    }

    fn payload_sums(&self, frame: &Frame) -> [u16; netback::MAX_SEGMENTS] {
        let mut sums = [0; netback::MAX_SEGMENTS];
        for (index, sum) in sums.iter_mut().take(self.count).enumerate() {
            let from = self
                .header_len
                .saturating_add(index.saturating_mul(self.mss));
            let to = from.saturating_add(self.mss).min(self.place.end);
            *sum = sum_of_range(frame, from, to);
        }
        sums
    }

    /// Writes the header of segment `index` into `header`, which is as long as [`Segments::header_len`] says.
    pub(crate) fn write_header(&self, index: usize, header: &mut [u8]) {
        let Some(template) = self.template.get(..self.header_len) else {
            return;
        };
        if header.len() != template.len() || index >= self.count {
            return;
        }
        header.copy_from_slice(template);
        let before = index.saturating_mul(self.mss);
        let payload = self.payload.saturating_sub(before).min(self.mss);
        let transport_len = self
            .header_len
            .wrapping_sub(self.place.transport)
            .wrapping_add(payload);
        let (link_and_ip, tcp) = header.split_at_mut(self.place.transport);
        let pseudo = self.write_ip(link_and_ip, index, transport_len);
        self.write_tcp(tcp, index, before, pseudo);
    }

    /// Writes lengths and identification; returns the sum of the pseudo-header.
    fn write_ip(&self, link_and_ip: &mut [u8], index: usize, transport_len: usize) -> u16 {
        let Some(ip) = link_and_ip.get_mut(ETHERNET..) else {
            return 0;
        };
        let ip_len = ip.len();
        let len16 = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
        let addresses = if self.place.ipv6 {
            Ipv6Packet::new_unchecked(&mut *ip).set_payload_len(len16(transport_len));
            ip.get(8..IPV6)
        } else {
            let mut packet = Ipv4Packet::new_unchecked(&mut *ip);
            packet.set_total_len(len16(ip_len.wrapping_add(transport_len)));
            packet.set_ident(packet.ident().wrapping_add(len16(index)));
            packet.fill_checksum();
            ip.get(12..20)
        };
        let addresses = sum(addresses.unwrap_or_default());
        add(add(addresses, u16::from(TCP)), len16(transport_len))
    }

    /// Writes sequence number, flags and checksum.
    fn write_tcp(&self, tcp: &mut [u8], index: usize, before: usize, pseudo: u16) {
        let mut packet = TcpPacket::new_unchecked(&mut *tcp);
        let offset = i32::try_from(before).unwrap_or(0);
        let TcpSeqNumber(first) = packet.seq_number();
        packet.set_seq_number(TcpSeqNumber(first.wrapping_add(offset)));
        if index.wrapping_add(1) < self.count {
            packet.set_fin(false);
            packet.set_psh(false);
        }
        if index > 0 {
            packet.set_cwr(false);
        }
        packet.set_checksum(0);
        let value = match &self.sums {
            None => pseudo,
            Some(sums) => {
                let payload = sums.get(index).copied().unwrap_or(0);
                !add(add(pseudo, sum(tcp)), payload)
            }
        };
        TcpPacket::new_unchecked(tcp).set_checksum(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use core::num::NonZeroU16;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::IpProtocol;
    use smoltcp::wire::{
        IpAddress, Ipv4Address, Ipv4Repr, Ipv6Address, Ipv6Repr, TcpControl, TcpRepr, UdpPacket,
    };
    use xen::fake::{FakeHypervisor, FakeMachine};
    use xen::netif::GsoType;
    use xen::{DomId, Gso, Hypervisor};

    fn hypervisor() -> FakeHypervisor {
        FakeMachine::new().domain(DomId(1))
    }

    /// A frame over as many pages as it takes, `first` bytes in the first one.
    fn frame_of(hv: &mut FakeHypervisor, bytes: &[u8], first: usize) -> Frame {
        let mut frame = Frame::new();
        let (head, rest) = bytes.split_at(first.min(bytes.len()));
        for part in core::iter::once(head).chain(rest.chunks(4096)) {
            if part.is_empty() {
                continue;
            }
            let mut page = hv.allocate().unwrap();
            page.bytes_mut(0..part.len()).copy_from_slice(part);
            frame
                .push(page, 0, u16::try_from(part.len()).unwrap())
                .unwrap();
        }
        frame
    }

    fn payload(len: usize) -> Vec<u8> {
        (0..len)
            .map(|index| u8::try_from(index * 7 % 251).unwrap())
            .collect()
    }

    /// An Ethernet frame with a TCP segment whose checksum is complete.
    fn tcp_frame(ipv6: bool, payload: &[u8]) -> Vec<u8> {
        let tcp = TcpRepr {
            src_port: 80,
            dst_port: 40000,
            control: TcpControl::Psh,
            seq_number: TcpSeqNumber(0x7fff_ff00),
            ack_number: Some(TcpSeqNumber(5)),
            window_len: 500,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let caps = ChecksumCapabilities::default();
        if ipv6 {
            let (from, to) = (
                "2001:db8::1".parse::<Ipv6Address>().unwrap(),
                "fd09:24ef:4179::a89:6".parse::<Ipv6Address>().unwrap(),
            );
            let ip = Ipv6Repr {
                src_addr: from,
                dst_addr: to,
                next_header: IpProtocol::Tcp,
                payload_len: tcp.buffer_len(),
                hop_limit: 63,
            };
            let mut bytes = alloc::vec![0; ETHERNET + 40 + tcp.buffer_len()];
            bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
            ip.emit(&mut Ipv6Packet::new_unchecked(&mut bytes[ETHERNET..]));
            let mut packet = TcpPacket::new_unchecked(&mut bytes[ETHERNET + 40..]);
            tcp.emit(
                &mut packet,
                &IpAddress::Ipv6(from),
                &IpAddress::Ipv6(to),
                &caps,
            );
            return bytes;
        }
        let (from, to) = (
            Ipv4Address::new(198, 51, 100, 1),
            Ipv4Address::new(10, 137, 0, 6),
        );
        let ip = Ipv4Repr {
            src_addr: from,
            dst_addr: to,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 63,
        };
        let mut bytes = alloc::vec![0; ETHERNET + 20 + tcp.buffer_len()];
        bytes[12..14].copy_from_slice(&[0x08, 0x00]);
        ip.emit(
            &mut Ipv4Packet::new_unchecked(&mut bytes[ETHERNET..]),
            &caps,
        );
        let mut packet = TcpPacket::new_unchecked(&mut bytes[ETHERNET + 20..]);
        tcp.emit(
            &mut packet,
            &IpAddress::Ipv4(from),
            &IpAddress::Ipv4(to),
            &caps,
        );
        bytes
    }

    /// The addresses of a frame, for smoltcp to verify checksums with.
    fn addresses(frame: &[u8]) -> (IpAddress, IpAddress) {
        match frame[12] {
            0x08 => {
                let ip = Ipv4Packet::new_checked(&frame[ETHERNET..]).unwrap();
                assert!(ip.verify_checksum(), "IPv4 header checksum");
                (ip.src_addr().into(), ip.dst_addr().into())
            }
            _ => {
                let ip = Ipv6Packet::new_checked(&frame[ETHERNET..]).unwrap();
                (ip.src_addr().into(), ip.dst_addr().into())
            }
        }
    }

    /// Replaces the transport checksum by the pseudo-header sum, as a sender that offloads does.
    fn blank(bytes: &mut [u8]) {
        let place = Place::of(bytes, bytes.len()).unwrap();
        let transport = sum(&bytes[place.transport..place.end]);
        let field = place.checksum();
        let complete = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
        // What is left of a good packet without its own sum is the inverse of the pseudo-header sum.
        let without_field = add(transport, !complete);
        let pseudo = !add(without_field, complete);
        bytes[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
    }

    #[test]
    fn a_blank_checksum_is_completed_across_odd_fragments() {
        let mut hv = hypervisor();
        for ipv6 in [false, true] {
            for (len, first) in [(1000, 200), (1001, 101), (5000, 77), (0, 54)] {
                let good = tcp_frame(ipv6, &payload(len));
                let mut bytes = good.clone();
                blank(&mut bytes);
                let mut frame = frame_of(&mut hv, &bytes, first.max(74));
                frame.checksum = Checksum::Blank;
                assert!(complete(&mut frame));
                let mut out = alloc::vec![0; frame.len()];
                frame.copy_to(0, &mut out);
                assert_eq!(out, good, "ipv6 {ipv6}, {len} bytes");
                frame.release(&mut hv);
            }
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_all_ones() {
        let mut hv = hypervisor();
        let mut bytes = alloc::vec![0u8; ETHERNET + 20 + 8 + 2];
        bytes[12..14].copy_from_slice(&[0x08, 0x00]);
        let caps = ChecksumCapabilities::default();
        let ip = Ipv4Repr {
            src_addr: Ipv4Address::new(0, 0, 0, 0),
            dst_addr: Ipv4Address::new(0, 0, 0, 0),
            next_header: IpProtocol::Udp,
            payload_len: 10,
            hop_limit: 64,
        };
        ip.emit(
            &mut Ipv4Packet::new_unchecked(&mut bytes[ETHERNET..]),
            &caps,
        );
        let mut udp = UdpPacket::new_unchecked(&mut bytes[ETHERNET + 20..]);
        udp.set_len(10);
        // The pseudo-header sum is 17 + 10; the header says 10 once more; the payload makes it up to 0xffff.
        udp.set_checksum(27);
        let rest = 0xffff - 27 - 10;
        udp.payload_mut().copy_from_slice(&u16::to_be_bytes(rest));
        let mut frame = frame_of(&mut hv, &bytes, 4096);
        assert!(complete(&mut frame));
        assert_eq!(
            frame.header()[ETHERNET + 20 + 6..ETHERNET + 20 + 8],
            [0xff, 0xff]
        );
    }

    #[test]
    fn segments_of_a_large_packet_are_right_in_every_field() {
        let mut hv = hypervisor();
        for ipv6 in [false, true] {
            for takes_blank in [false, true] {
                let data = payload(10_001);
                let bytes = tcp_frame(ipv6, &data);
                let mut frame = frame_of(&mut hv, &bytes, 4096);
                frame.gso = Some(Gso {
                    size: NonZeroU16::new(1448).unwrap(),
                    family: if ipv6 { GsoType::TcpV6 } else { GsoType::TcpV4 },
                });
                let cut = Cut::plan(&frame, takes_blank).unwrap();
                let header_len = usize::from(cut.segments.header_len);
                assert_eq!(cut.segments.count(frame.len()), 7);
                let mut received: Vec<u8> = Vec::new();
                for index in 0..7 {
                    let chunk = data.chunks(1448).nth(index).unwrap();
                    let mut segment = alloc::vec![0; header_len];
                    cut.write_header(index, &mut segment);
                    segment.extend(chunk);
                    if takes_blank {
                        // The receiver finishes it, as `complete` does.
                        let mut one = frame_of(&mut hv, &segment, 4096);
                        assert!(complete(&mut one));
                        one.copy_to(0, &mut segment);
                        one.release(&mut hv);
                    }
                    let (from, to) = addresses(&segment);
                    let place = Place::of(&segment, segment.len()).unwrap();
                    assert_eq!(place.end, segment.len());
                    let tcp = TcpPacket::new_checked(&segment[place.transport..]).unwrap();
                    assert!(tcp.verify_checksum(&from, &to), "segment {index}");
                    let TcpSeqNumber(number) = tcp.seq_number();
                    let offset = i32::try_from(index * 1448).unwrap();
                    assert_eq!(number, 0x7fff_ff00_i32.wrapping_add(offset));
                    assert_eq!(tcp.psh(), index == 6);
                    received.extend(tcp.payload());
                }
                assert_eq!(received, data);
                frame.release(&mut hv);
            }
        }
    }

    #[test]
    fn frames_that_must_not_be_cut_are_refused() {
        let mut hv = hypervisor();
        let with_mss = |hv: &mut FakeHypervisor, bytes: &[u8], mss: u16| {
            let mut frame = frame_of(hv, bytes, 4096);
            frame.gso = Some(Gso {
                size: NonZeroU16::new(mss).unwrap(),
                family: GsoType::TcpV4,
            });
            frame
        };
        let good = tcp_frame(false, &payload(4000));
        assert!(Cut::plan(&with_mss(&mut hv, &good, 1448), true).is_some());
        assert!(
            Cut::plan(&with_mss(&mut hv, &good, 255), true).is_none(),
            "tiny segments"
        );
        let huge = tcp_frame(false, &payload(65_000));
        assert!(
            Cut::plan(&with_mss(&mut hv, &huge, 256), true).is_none(),
            "too many segments"
        );
        let mut syn = good.clone();
        syn[ETHERNET + 20 + 13] |= 2;
        assert!(
            Cut::plan(&with_mss(&mut hv, &syn, 1448), true).is_none(),
            "SYN"
        );
        let mut fragment = good;
        fragment[ETHERNET + 6] |= 0x20;
        assert!(
            Cut::plan(&with_mss(&mut hv, &fragment, 1448), true).is_none(),
            "fragment"
        );
        assert!(
            !complete(&mut frame_of(&mut hv, &[0; 60], 4096)),
            "no IP at all"
        );
    }
}
