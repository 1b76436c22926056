//! The world of these tests: a configuration, captures that come in, and what comes out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use serde_json::Value;

pub(crate) type Mac = [u8; 6];

pub(crate) const FIREWALL: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
pub(crate) const UPLINK: Mac = [0, 0x16, 0x3e, 0x5e, 0x6c, 5];
pub(crate) const C1: Mac = [0, 0x16, 0x3e, 0x5e, 0x6c, 10];
pub(crate) const C1_IP: [u8; 4] = [10, 137, 0, 10];
pub(crate) const OWN: [u8; 4] = [10, 137, 0, 5];
pub(crate) const WEB: [u8; 4] = [198, 51, 100, 1];

pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = 0x12;

/// A folder with a configuration, captures, and what came out.
pub(crate) struct World {
    pub(crate) folder: PathBuf,
    /// Frames that come in: seconds and microseconds, interface, bytes.
    pub(crate) frames: Vec<(u32, u32, &'static str, Vec<u8>)>,
    pub(crate) arguments: Vec<String>,
}

pub(crate) struct Run {
    pub(crate) lines: Vec<Value>,
    pub(crate) folder: PathBuf,
}

impl World {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("fwsim-{}-{number}", std::process::id());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&folder);
        let world = Self {
            folder,
            frames: Vec::new(),
            arguments: Vec::new(),
        };
        world.file(
            "config/vifs",
            "# name domid mac addresses\n\
             c1 7 00:16:3e:5e:6c:0a 10.137.0.10 fd09:24ef:4179::a89:a\n\
             c2 8 00:16:3e:5e:6c:0b 10.137.0.11\n",
        );
        for (key, value) in [
            ("qubes-ip", "10.137.0.5\n"),
            ("qubes-mac", "00:16:3e:5e:6c:05"),
            ("qubes-gateway", "10.137.0.1"),
            ("qubes-ip6", "fd09:24ef:4179::a89:5"),
            ("qubes-gateway6", "fd09:24ef:4179::a89:1"),
            ("qubes-netvm-gateway", "10.137.0.5"),
            ("qubes-netvm-gateway6", "fd09:24ef:4179::a89:5"),
            ("qubes-primary-dns", "192.168.1.1"),
            ("qubes-netvm-primary-dns", "10.139.1.1"),
            ("qubes-netvm-secondary-dns", "10.139.1.2"),
            ("connected-ips", "10.137.0.10 10.137.0.11"),
        ] {
            world.file(&format!("config/qubesdb/{key}"), value);
        }
        world
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Rules of an address, below a configuration folder.
    pub(crate) fn rules(&self, config: &str, address: &str, rules: &[&str]) {
        let tree = format!("{config}/qubesdb/qubes-firewall/{address}");
        self.file(&format!("{tree}/policy"), "drop\n");
        for (number, rule) in rules.iter().enumerate() {
            self.file(&format!("{tree}/{number:04}"), rule);
        }
    }

    pub(crate) fn frame(&mut self, seconds: u32, micros: u32, iface: &'static str, bytes: Vec<u8>) {
        self.frames.push((1000 + seconds, micros, iface, bytes));
    }

    pub(crate) fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let mut arguments = vec!["fwsim".to_owned(), "--config".into(), path("config")];
        arguments.extend(["--out".to_owned(), path("out")]);
        for iface in ["c1", "c2", "uplink"] {
            let frames = self.frames.iter().filter(|(_, _, on, _)| *on == iface);
            let frames: Vec<_> = frames.collect();
            if frames.is_empty() {
                continue;
            }
            let frames: Vec<_> = frames
                .iter()
                .map(|(seconds, micros, _, bytes)| (*seconds, *micros, &bytes[..]))
                .collect();
            let file = pcap(&frames);
            let name = format!("in-{iface}.pcap");
            fs::write(self.folder.join(&name), file).unwrap();
            arguments.extend(["--in".to_owned(), format!("{iface}={}", path(&name))]);
        }
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }

    pub(crate) fn output(&self) -> Output {
        let program = env!("CARGO_BIN_EXE_xtask");
        Command::new(program)
            .args(self.arguments())
            .output()
            .unwrap()
    }

    pub(crate) fn run(&self) -> Run {
        let output = self.output();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        Run {
            lines: lines.collect(),
            folder: self.folder.join("out"),
        }
    }

    /// The error line of a run that must fail.
    pub(crate) fn error(&self) -> String {
        let output = self.output();
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty());
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text.replace(&self.folder.display().to_string(), "~")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Run {
    /// The line of an input frame.
    pub(crate) fn frame(&self, number: u64) -> &Value {
        let mut lines = self.lines.iter().filter(|line| line["n"] == number);
        let line = lines.next().unwrap();
        assert!(lines.next().is_none());
        line
    }

    /// `verdict`, then what decided, then `out`.
    pub(crate) fn verdict(&self, number: u64) -> String {
        let line = self.frame(number);
        let words = ["verdict", "reason", "rule", "out"].map(|key| &line[key]);
        let words = words.into_iter().filter(|word| !word.is_null());
        let words: Vec<_> = words
            .map(|word| word.to_string().replace('"', ""))
            .collect();
        words.join(" ")
    }

    /// What was made because of an input frame: kind, interface.
    pub(crate) fn made(&self, cause: u64) -> Vec<(&str, &str)> {
        let lines = self.lines.iter().filter(|line| line["cause"] == cause);
        lines
            .map(|line| {
                (
                    line["generated"].as_str().unwrap(),
                    line["out"].as_str().unwrap(),
                )
            })
            .collect()
    }

    /// The frames that left on an interface.
    pub(crate) fn sent(&self, iface: &str) -> Vec<Vec<u8>> {
        let file = fs::read(self.folder.join(format!("{iface}.pcap"))).unwrap();
        assert_eq!(file[..4], 0xa1b2_c3d4_u32.to_le_bytes());
        let mut frames = Vec::new();
        let mut rest = &file[24..];
        while let Some((header, more)) = rest.split_first_chunk::<16>() {
            let len = u32::from_le_bytes(*header[8..].first_chunk().unwrap());
            let (frame, more) = more.split_at(usize::try_from(len).unwrap());
            frames.push(frame.to_vec());
            rest = more;
        }
        frames
    }
}

pub(crate) fn ethernet(
    from: Mac,
    to: Mac,
) -> etherparse::PacketBuilderStep<etherparse::Ethernet2Header> {
    PacketBuilder::ethernet2(from, to)
}

pub(crate) fn tcp(
    macs: (Mac, Mac),
    ends: ([u8; 4], u16),
    to: ([u8; 4], u16),
    flags: u8,
    ack: u32,
) -> Vec<u8> {
    let mut builder = ethernet(macs.0, macs.1).ipv4(ends.0, to.0, 64).tcp(
        ends.1,
        to.1,
        if flags == SYN_ACK {
            500
        } else {
            100 + u32::from(flags != SYN)
        },
        8192,
    );
    if flags & SYN != 0 {
        builder = builder.syn();
    }
    if flags & ACK != 0 {
        builder = builder.ack(ack);
    }
    if flags & RST != 0 {
        builder = builder.rst();
    }
    let mut frame = Vec::new();
    builder.write(&mut frame, &[]).unwrap();
    frame
}

/// From the client to somebody.
pub(crate) fn up(port: u16, to: ([u8; 4], u16), flags: u8, ack: u32) -> Vec<u8> {
    tcp((C1, FIREWALL), (C1_IP, port), to, flags, ack)
}

pub(crate) fn udp(
    macs: (Mac, Mac),
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    ethernet(macs.0, macs.1)
        .ipv4(from.0, to.0, 64)
        .udp(from.1, to.1)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// Checks both checksums of a frame with another implementation.
pub(crate) fn checksums_are_right(frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match (packet.net.unwrap(), packet.transport.unwrap()) {
        (etherparse::NetSlice::Ipv4(ip), transport) => {
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            match transport {
                TransportSlice::Tcp(tcp) => {
                    let sum = tcp
                        .calc_checksum_ipv4(header.source, header.destination)
                        .unwrap();
                    assert_eq!(sum, tcp.checksum());
                }
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload());
                    assert_eq!(sum.unwrap(), udp.checksum());
                }
                _ => {}
            }
        }
        (etherparse::NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            let sum = tcp
                .calc_checksum_ipv6(ip.header().source(), ip.header().destination())
                .unwrap();
            assert_eq!(sum, tcp.checksum());
        }
        other => panic!("{other:?}"),
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A DNS message about `www.example.org`, type A, with an answer if there is an address.
pub(crate) fn dns(id: u16, address: Option<[u8; 4]>) -> Vec<u8> {
    let mut message = Vec::from(id.to_be_bytes());
    let flags = if address.is_some() {
        [0x81, 0x80]
    } else {
        [1, 0]
    };
    message.extend(flags);
    message.extend([0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    message.extend(b"\x03www\x07example\x03org\0\0\x01\0\x01");
    if let Some(address) = address {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        message.extend(address);
    }
    message
}

pub(crate) const C2: Mac = [0, 0x16, 0x3e, 0x5e, 0x6c, 11];
pub(crate) const C2_IP: [u8; 4] = [10, 137, 0, 11];
pub(crate) const C1_IP6: &str = "fd09:24ef:4179::a89:a";
pub(crate) const OWN6: &str = "fd09:24ef:4179::a89:5";
pub(crate) const WEB6: &str = "2001:db8::1";

/// The sum of the Internet checksum over some bytes.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2);
    let mut sum: u32 = pairs
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// A frame between two MACs.
pub(crate) fn framed(macs: (Mac, Mac), ethertype: u16, content: &[u8]) -> Vec<u8> {
    [&macs.1[..], &macs.0, &ethertype.to_be_bytes(), content].concat()
}

/// An IPv4 packet without options; `place` is the field of flags and fragment offset.
pub(crate) fn ipv4(
    from: [u8; 4],
    to: [u8; 4],
    protocol: u8,
    place: u16,
    content: &[u8],
) -> Vec<u8> {
    let len = u16::try_from(20 + content.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([0, 9]);
    packet.extend(place.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from);
    packet.extend(to);
    let check = !sum(&packet);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    packet.extend(content);
    packet
}

/// An ICMP message over IPv4, with its checksum.
pub(crate) fn icmp(kind: [u8; 2], second_word: [u8; 4], content: &[u8]) -> Vec<u8> {
    let mut message = [&kind[..], &[0, 0], &second_word, content].concat();
    let check = !sum(&message);
    message[2..4].copy_from_slice(&check.to_be_bytes());
    message
}

/// An IPv6 packet; `next` names the first header in `content`.
pub(crate) fn ipv6(from: &str, to: &str, next: u8, content: &[u8]) -> Vec<u8> {
    let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let len = u16::try_from(content.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, len[0], len[1], next, 64];
    packet.extend(octets(from));
    packet.extend(octets(to));
    packet.extend(content);
    packet
}

/// The checksum over a pseudo header and a transport with its own checksum in it: zero if that is right.
pub(crate) fn transport_check(addresses: &[u8], protocol: u8, transport: &[u8]) -> u16 {
    let len = u16::try_from(transport.len()).unwrap();
    let mut bytes = addresses.to_vec();
    bytes.extend([0, protocol]);
    bytes.extend(len.to_be_bytes());
    bytes.extend(transport);
    !sum(&bytes)
}

/// UDP over IPv6, with its checksum.
pub(crate) fn udp6(from: (&str, u16), to: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = Vec::new();
    for number in [from.1, to.1, len, 0] {
        datagram.extend(number.to_be_bytes());
    }
    datagram.extend(payload);
    let addresses = &ipv6(from.0, to.0, 17, &[])[8..];
    let check = transport_check(addresses, 17, &datagram);
    datagram[6..8].copy_from_slice(&check.to_be_bytes());
    datagram
}

/// A capture file: seconds, microseconds and bytes of frames.
pub(crate) fn pcap(frames: &[(u32, u32, &[u8])]) -> Vec<u8> {
    let mut file = Vec::from(0xa1b2_c3d4_u32.to_le_bytes());
    file.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(65_535_u32.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for (seconds, micros, bytes) in frames {
        let len = u32::try_from(bytes.len()).unwrap();
        for number in [*seconds, *micros, len, len] {
            file.extend(number.to_le_bytes());
        }
        file.extend(*bytes);
    }
    file
}
