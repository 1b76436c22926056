//! `lab frame` and `lab forge`: frames that no well-behaved stack would send.
//!
//! A packet socket bypasses the guest's own routing and source checks, so a
//! client can claim any source address, which is what the firewall must see
//! through.

use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;

use data_encoding::HEXLOWER_PERMISSIVE;
use etherparse::{PacketBuilder, PacketBuilderStep, err::packet::BuildWriteError};
use lexopt::prelude::*;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike as _, sendto, socket,
};

use crate::Outcome;

/// MAC address of every backend vif in Qubes, and so of every next hop.
const PEER_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

/// The link-layer address of an interface, which also names it for sending.
///
/// # Errors
///
/// If there is no such interface.
pub(crate) fn interface_address(name: &str) -> Result<LinkAddr, String> {
    nix::ifaddrs::getifaddrs()
        .map_err(|error| error.to_string())?
        .filter(|entry| entry.interface_name == name)
        .filter_map(|entry| entry.address)
        .filter(|address| address.family() == Some(AddressFamily::Packet))
        .find_map(|address| address.as_link_addr().copied())
        .ok_or_else(|| format!("no interface {name}"))
}

/// Sends frames as they stand, `count` times.
fn send(
    interface: &str,
    frame: &[u8],
    count: u64,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let target = interface_address(interface)?;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    for _ in 0..count {
        sendto(socket.as_raw_fd(), frame, &target, MsgFlags::empty())?;
    }
    println!("sent={count} bytes={}", frame.len());
    Ok(())
}

/// Runs `lab frame IFACE HEX`.
pub(crate) fn frame_command(mut arguments: lexopt::Parser) -> Outcome {
    let interface = arguments.value()?.string()?;
    let digits = arguments.value()?.string()?;
    let frame = HEXLOWER_PERMISSIVE.decode(digits.as_bytes())?;
    send(&interface, &frame, 1)?;
    Ok(ExitCode::SUCCESS)
}

/// What a forged packet carries.
enum Content {
    Udp(u16, u16),
    Syn(u16, u16),
    Echo(u16),
}

/// Runs `lab forge IFACE --src IP --dst IP ...`.
pub(crate) fn forge_command(mut arguments: lexopt::Parser) -> Outcome {
    let mut interface = None;
    let (mut source, mut destination) = (None, None);
    let mut content = None;
    let mut source_mac = None;
    let mut destination_mac = PEER_MAC;
    let mut count = 1;
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(value) => interface = Some(value.string()?),
            Long("src") => source = Some(arguments.value()?.parse::<IpAddr>()?),
            Long("dst") => destination = Some(arguments.value()?.parse::<IpAddr>()?),
            Long("udp") => {
                let (from, to) = arguments.value()?.parse_with(port_pair)?;
                content = Some(Content::Udp(from, to));
            }
            Long("syn") => {
                let (from, to) = arguments.value()?.parse_with(port_pair)?;
                content = Some(Content::Syn(from, to));
            }
            Long("echo") => content = Some(Content::Echo(arguments.value()?.parse()?)),
            Long("src-mac") => source_mac = Some(arguments.value()?.parse_with(mac)?),
            Long("dst-mac") => destination_mac = arguments.value()?.parse_with(mac)?,
            Long("count") => count = arguments.value()?.parse()?,
            other => return Err(other.unexpected().into()),
        }
    }
    let interface = interface.ok_or("which interface?")?;
    let own_mac = interface_address(&interface)?.addr().unwrap_or_default();
    let link = PacketBuilder::ethernet2(source_mac.unwrap_or(own_mac), destination_mac);
    let (source, destination) = (source.ok_or("--src?")?, destination.ok_or("--dst?")?);
    let content = content.ok_or("--udp, --syn or --echo?")?;
    let frame = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            build(link.ipv4(from.octets(), to.octets(), 64), &content, false)?
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            build(link.ipv6(from.octets(), to.octets(), 64), &content, true)?
        }
        _ => return Err("both addresses must be of one family".into()),
    };
    send(&interface, &frame, count)?;
    Ok(ExitCode::SUCCESS)
}

fn build(
    network: PacketBuilderStep<etherparse::IpHeaders>,
    content: &Content,
    v6: bool,
) -> Result<Vec<u8>, BuildWriteError> {
    const PAYLOAD: &[u8] = b"forged by the lab";
    let mut frame = Vec::new();
    match *content {
        Content::Udp(from, to) => network.udp(from, to).write(&mut frame, PAYLOAD),
        Content::Syn(from, to) => network
            .tcp(from, to, 0x1234_5678, 64_240)
            .syn()
            .write(&mut frame, &[]),
        Content::Echo(id) if v6 => network
            .icmpv6_echo_request(id, 1)
            .write(&mut frame, PAYLOAD),
        Content::Echo(id) => network
            .icmpv4_echo_request(id, 1)
            .write(&mut frame, PAYLOAD),
    }?;
    Ok(frame)
}

fn port_pair(text: &str) -> Result<(u16, u16), String> {
    text.split_once(':')
        .and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)))
        .ok_or_else(|| String::from("ports are SOURCE:DESTINATION"))
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .ok_or_else(|| String::from("a MAC address has six parts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_and_ports_are_read_strictly() {
        assert_eq!(mac("00:16:3e:5e:6c:06"), Ok([0, 0x16, 0x3e, 0x5e, 0x6c, 6]));
        assert!(mac("00:16:3e:5e:6c").is_err());
        assert_eq!(port_pair("1:65535"), Ok((1, 65_535)));
        assert!(port_pair("1:65536").is_err());
    }

    #[test]
    fn a_forged_packet_carries_the_claimed_source() {
        let link = PacketBuilder::ethernet2([2; 6], PEER_MAC);
        let network = link.ipv4([10, 137, 0, 99], [198, 51, 100, 1], 64);
        let frame = build(network, &Content::Udp(1000, 7), false).unwrap();
        assert_eq!(&frame[..6], &PEER_MAC);
        assert_eq!(&frame[26..30], &[10, 137, 0, 99]);
        assert_eq!(&frame[34..38], &[0x03, 0xe8, 0, 7]);
    }
}
