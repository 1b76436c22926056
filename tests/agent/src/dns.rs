//! A name server with fixed names, and a client for it.
//!
//! The client exists because busybox asks over UDP only, and a firewall must
//! carry both. Source: RFC 1035, 4.2 (transports).

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lexopt::prelude::*;
use simple_dns::rdata::{A, AAAA, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, Question, RCODE, ResourceRecord, TYPE};

use crate::Outcome;
use crate::agent::milliseconds;
use crate::services;

/// The port of the service.
pub(crate) const PORT: u16 = 53;

/// Life of every answer, in seconds.
const TTL: u32 = 60;

/// Longest message over UDP without EDNS, in bytes (RFC 1035, 2.3.4).
const UDP_LIMIT: usize = 512;

type Failure = Box<dyn Error + Send + Sync>;

/// The names the server knows, in lower case.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    names: BTreeMap<String, Vec<IpAddr>>,
}

impl Zone {
    /// Adds `NAME=ADDRESS`; a name may have several addresses.
    ///
    /// # Errors
    ///
    /// If the text has another form.
    pub(crate) fn add(&mut self, record: &str) -> Result<(), Failure> {
        let (name, address) = record.split_once('=').ok_or("a record is NAME=ADDRESS")?;
        self.names
            .entry(name.to_ascii_lowercase())
            .or_default()
            .push(address.parse()?);
        Ok(())
    }

    /// Builds the answer to a query; `None` if it is not one.
    fn answer(&self, query: &[u8], limit: usize) -> Option<(String, Vec<u8>)> {
        let query = Packet::parse(query).ok()?;
        if query.has_flags(PacketFlag::RESPONSE) {
            return None;
        }
        let question = query.questions.first()?.clone().into_owned();
        let name = question.qname.to_string().to_ascii_lowercase();
        let mut reply = Packet::new_reply(query.id());
        reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
        match self.names.get(&name) {
            None => *reply.rcode_mut() = RCODE::NameError,
            Some(addresses) => reply.answers.extend(
                addresses
                    .iter()
                    .filter_map(|address| record(&question, *address)),
            ),
        }
        let what = format!("{:?} {name}", question.qtype);
        reply.questions.push(question);
        let mut bytes = reply.build_bytes_vec_compressed().ok()?;
        if bytes.len() > limit {
            reply.answers.clear();
            reply.set_flags(PacketFlag::TRUNCATION);
            bytes = reply.build_bytes_vec_compressed().ok()?;
        }
        Some((what, bytes))
    }
}

fn record(question: &Question<'static>, address: IpAddr) -> Option<ResourceRecord<'static>> {
    let data = match (question.qtype, address) {
        (QTYPE::TYPE(TYPE::A), IpAddr::V4(address)) => RData::A(A {
            address: address.to_bits(),
        }),
        (QTYPE::TYPE(TYPE::AAAA), IpAddr::V6(address)) => RData::AAAA(AAAA {
            address: address.to_bits(),
        }),
        _ => return None,
    };
    Some(ResourceRecord::new(
        question.qname.clone(),
        CLASS::IN,
        TTL,
        data,
    ))
}

/// Starts the server's two threads for one address.
///
/// # Errors
///
/// If the address cannot be bound.
pub(crate) fn serve(
    address: SocketAddr,
    zone: &Arc<Zone>,
    servers: &mut Vec<JoinHandle<()>>,
) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    let names = Arc::clone(zone);
    servers.push(thread::spawn(move || {
        let mut buffer = vec![0; 4096];
        loop {
            let Ok((len, peer)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let query = buffer.get(..len).unwrap_or_default();
            if let Some((what, reply)) = names.answer(query, UDP_LIMIT) {
                services::log("dns", "udp", peer, &what);
                let _ = socket.send_to(&reply, peer);
            }
        }
    }));
    let listener = TcpListener::bind(address)?;
    let names = Arc::clone(zone);
    servers.push(thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let names = Arc::clone(&names);
            thread::spawn(move || serve_stream(stream, &names));
        }
    }));
    Ok(())
}

fn serve_stream(mut stream: TcpStream, zone: &Zone) -> io::Result<()> {
    let peer = stream.peer_addr()?;
    loop {
        let query = read_message(&mut stream)?;
        let Some((what, reply)) = zone.answer(&query, usize::from(u16::MAX)) else {
            return Ok(());
        };
        services::log("dns", "tcp", peer, &what);
        write_message(&mut stream, &reply)?;
    }
}

/// Reads one message with its two-byte length, big endian (RFC 1035, 4.2.2).
fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    // One write, so that the message is one segment.
    stream.write_all(&[&len.to_be_bytes(), message].concat())
}

/// Runs `lab resolve NAME --server ADDR [--tcp] [--aaaa] [--timeout-ms N]`.
///
/// Prints one address per line and the time; status 1 with a reason otherwise.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let mut name = None;
    let mut server: Option<IpAddr> = None;
    let mut over_tcp = false;
    let mut kind = TYPE::A;
    let mut timeout = Duration::from_secs(10);
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(value) => name = Some(value.string()?),
            Long("server") => server = Some(arguments.value()?.parse()?),
            Long("tcp") => over_tcp = true,
            Long("aaaa") => kind = TYPE::AAAA,
            Long("timeout-ms") => timeout = Duration::from_millis(arguments.value()?.parse()?),
            other => return Err(other.unexpected().into()),
        }
    }
    let name = name.ok_or("which name?")?;
    let server = SocketAddr::new(server.ok_or("--server is needed")?, PORT);
    let begun = Instant::now();
    // Enough for telling our own answers apart; nobody attacks this client.
    let id = u16::try_from(std::process::id() & 0xffff).unwrap_or_default();
    let mut query = Packet::new_query(id);
    query.set_flags(PacketFlag::RECURSION_DESIRED);
    query.questions.push(Question::new(
        Name::new(&name)?,
        kind.into(),
        CLASS::IN.into(),
        false,
    ));
    let query = query.build_bytes_vec()?;
    let reply = if over_tcp {
        let mut stream = TcpStream::connect_timeout(&server, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        write_message(&mut stream, &query)?;
        read_message(&mut stream)?
    } else {
        ask_by_datagram(server, &query, timeout)?
    };
    let reply = Packet::parse(&reply)?;
    if reply.id() != id || reply.rcode() != RCODE::NoError {
        return Err(format!("server {server} says {:?}", reply.rcode()).into());
    }
    for answer in &reply.answers {
        match &answer.rdata {
            RData::A(A { address }) => println!("{}", std::net::Ipv4Addr::from_bits(*address)),
            RData::AAAA(AAAA { address }) => {
                println!("{}", std::net::Ipv6Addr::from_bits(*address));
            }
            _ => {}
        }
    }
    println!("ms={}", milliseconds(begun));
    Ok(ExitCode::SUCCESS)
}

fn ask_by_datagram(server: SocketAddr, query: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(query)?;
    let mut reply = vec![0; 4096];
    let len = socket.recv(&mut reply)?;
    reply.truncate(len);
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A query for `www.lab`, type A, id 0x1234, recursion desired.
    const QUERY: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x03lab\x00\x00\x01\x00\x01";

    fn zone(addresses: u32) -> Zone {
        let mut zone = Zone::default();
        for number in 0..addresses {
            let address = std::net::Ipv4Addr::from_bits(0xc633_6401 + number);
            zone.add(&format!("WWW.lab={address}")).unwrap();
        }
        zone
    }

    #[test]
    fn a_known_name_is_answered_with_its_address() {
        let (what, reply) = zone(1).answer(QUERY, UDP_LIMIT).unwrap();
        assert_eq!(what, "TYPE(A) www.lab");
        assert_eq!(&reply[..2], b"\x12\x34");
        assert!(reply.ends_with(&[0, 4, 198, 51, 100, 1]));
    }

    #[test]
    fn an_unknown_name_is_a_name_error() {
        let (_, reply) = Zone::default().answer(QUERY, UDP_LIMIT).unwrap();
        assert_eq!(reply[3] & 0x0f, 3);
    }

    #[test]
    fn an_answer_too_long_for_a_datagram_is_truncated() {
        let (_, reply) = zone(60).answer(QUERY, UDP_LIMIT).unwrap();
        assert!(reply.len() <= UDP_LIMIT);
        assert_eq!(reply[2] & 0x02, 0x02);
        let (_, whole) = zone(60).answer(QUERY, 65_535).unwrap();
        assert!(whole.len() > UDP_LIMIT);
    }

    #[test]
    fn noise_and_replies_are_not_answered() {
        assert!(zone(1).answer(b"", UDP_LIMIT).is_none());
        assert!(zone(1).answer(&QUERY[..14], UDP_LIMIT).is_none());
        let mut reply = QUERY.to_vec();
        reply[2] |= 0x80;
        assert!(zone(1).answer(&reply, UDP_LIMIT).is_none());
    }
}
