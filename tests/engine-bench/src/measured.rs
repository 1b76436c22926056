//! The measured parts. callgrind counts instructions inside the functions of this module and nowhere
//! else (`--toggle-collect`), so they do nothing but the work.

use std::hint::black_box;

use firewall::ruleset::CompiledRules;
use firewall::{Engine, Time, Work};

use crate::lookup::Query;

/// Frames in a batch.
pub(crate) const BATCH: usize = 32;

/// Decides frames in batches, and takes what the engine made itself.
#[inline(never)]
pub fn decide(engine: &mut Engine, work: &mut [Work<'_>], now: Time) {
    for batch in work.chunks_mut(BATCH) {
        engine.process_batch(batch, now);
        while let Some(frame) = engine.next_generated() {
            black_box(frame.bytes.len());
        }
    }
}

/// Lets everything that is due expire.
#[inline(never)]
pub fn expire(engine: &mut Engine, now: Time) {
    while engine.tick(now, 256) {}
}

/// Looks every query up.
#[inline(never)]
pub fn look_up(rules: &CompiledRules, queries: &[Query]) {
    for &(destination, upper) in queries {
        black_box(rules.decide4(destination, upper));
    }
}

/// What smoltcp takes to read a TCP packet over IPv4 and to write it again elsewhere: a floor for an
/// engine made of library parts. Returns how many packets it understood.
#[inline(never)]
pub fn smoltcp(frames: &[&[u8]], out: &mut [u8]) -> usize {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Ipv4Packet, Ipv4Repr, TcpPacket, TcpRepr};
    let caps = ChecksumCapabilities::default();
    let mut rewrite = |frame: &&[u8]| {
        let packet = Ipv4Packet::new_checked(frame.get(14..)?).ok()?;
        let ip = Ipv4Repr::parse(&packet, &caps).ok()?;
        let (src, dst) = (ip.src_addr.into(), ip.dst_addr.into());
        let segment = TcpPacket::new_checked(packet.payload()).ok()?;
        let tcp = TcpRepr::parse(&segment, &src, &dst, &caps).ok()?;
        let len = ip.buffer_len() + tcp.buffer_len();
        let mut to = Ipv4Packet::new_unchecked(out.get_mut(..len)?);
        ip.emit(&mut to, &caps);
        let mut to = TcpPacket::new_unchecked(to.payload_mut());
        tcp.emit(&mut to, &src, &dst, &caps);
        Some(())
    };
    frames
        .iter()
        .filter(|frame| rewrite(frame).is_some())
        .count()
}

/// The same with etherparse.
#[inline(never)]
pub fn etherparse(frames: &[&[u8]], out: &mut [u8]) -> usize {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let mut rewrite = |frame: &&[u8]| {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (&packet.net, &packet.transport)
        else {
            return None;
        };
        let mut to = &mut *out;
        let header = ip.header().to_header();
        header.write(&mut to).ok()?;
        let mut segment = tcp.to_header();
        segment.checksum = segment.calc_checksum_ipv4(&header, tcp.payload()).ok()?;
        segment.write(&mut to).ok()?;
        to.get_mut(..tcp.payload().len())?
            .copy_from_slice(tcp.payload());
        Some(())
    };
    frames
        .iter()
        .filter(|frame| rewrite(frame).is_some())
        .count()
}
