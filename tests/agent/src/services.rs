//! `lab serve`: the small servers of the lab's "internet", in one process.
//!
//! * `--echo`: TCP and UDP; what arrives goes back.
//! * `--whoami`: TCP and UDP; answers with the peer's address and port as the
//!   server sees them, which is how a scenario sees address translation.
//! * `--sink`: TCP; reads and forgets. `--flood`: TCP; writes until refused.
//! * `--dns`: UDP and TCP on port 53 with the fixed names given by `--record`.
//!
//! Every request is a line on standard output: service, transport, peer.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use lexopt::prelude::*;

use crate::Outcome;
use crate::dns::{self, Zone};

/// A TCP service: called in a thread of its own for each connection.
type Serve = fn(TcpStream, SocketAddr) -> io::Result<()>;

/// A UDP service: the answer to one datagram.
type Answer = fn(&[u8], SocketAddr) -> Vec<u8>;

/// Runs `lab serve ...`, for ever.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let mut zone = Zone::default();
    let mut resolvers: Vec<IpAddr> = Vec::new();
    let mut services: Vec<(&'static str, SocketAddr)> = Vec::new();
    while let Some(argument) = arguments.next()? {
        let name = match argument {
            Long("record") => {
                zone.add(&arguments.value()?.string()?)?;
                continue;
            }
            Long("dns") => {
                resolvers.push(arguments.value()?.parse()?);
                continue;
            }
            Long("echo") => "echo",
            Long("whoami") => "whoami",
            Long("sink") => "sink",
            Long("flood") => "flood",
            other => return Err(other.unexpected().into()),
        };
        services.push((name, arguments.value()?.parse()?));
    }
    let zone = Arc::new(zone);
    let mut servers = Vec::new();
    for address in resolvers {
        dns::serve(SocketAddr::new(address, dns::PORT), &zone, &mut servers)?;
    }
    for (name, address) in services {
        let (stream, datagram): (Serve, Option<Answer>) = match name {
            "echo" => (echo, Some(|data, _| data.to_vec())),
            "whoami" => (whoami, Some(|_, peer| seen(peer).into_bytes())),
            "sink" => (sink, None),
            _ => (flood, None),
        };
        let listener = TcpListener::bind(address)?;
        servers.push(thread::spawn(move || accept(name, &listener, stream)));
        if let Some(answer) = datagram {
            let socket = UdpSocket::bind(address)?;
            servers.push(thread::spawn(move || {
                answer_datagrams(name, &socket, answer)
            }));
        }
    }
    println!("serving");
    for server in servers {
        let _ = server.join();
    }
    Ok(ExitCode::FAILURE)
}

/// Writes the request log's line.
pub(crate) fn log(service: &str, transport: &str, peer: SocketAddr, detail: &str) {
    println!(
        "{service} {transport} {} {} {detail}",
        peer.ip(),
        peer.port()
    );
}

fn accept(name: &'static str, listener: &TcpListener, serve: Serve) {
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                log(name, "tcp", peer, "");
                // The peer ends connections as it likes; that is no event here.
                thread::spawn(move || serve(stream, peer));
            }
            Err(error) => eprintln!("{name}: {error}"),
        }
    }
}

fn answer_datagrams(name: &'static str, socket: &UdpSocket, answer: Answer) {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, peer)) => {
                log(name, "udp", peer, "");
                let data = buffer.get(..len).unwrap_or_default();
                let _ = socket.send_to(&answer(data, peer), peer);
            }
            // An ICMP error for an earlier answer is reported here.
            Err(error) => eprintln!("{name}: {error}"),
        }
    }
}

fn echo(mut stream: TcpStream, _: SocketAddr) -> io::Result<()> {
    let mut back = stream.try_clone()?;
    io::copy(&mut stream, &mut back).map(drop)
}

fn whoami(mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
    stream.write_all(seen(peer).as_bytes())
}

fn seen(peer: SocketAddr) -> String {
    format!("{} {}\n", peer.ip(), peer.port())
}

fn sink(mut stream: TcpStream, _: SocketAddr) -> io::Result<()> {
    let mut buffer = vec![0; 65_536];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

fn flood(mut stream: TcpStream, _: SocketAddr) -> io::Result<()> {
    let block = vec![b'.'; 65_536];
    loop {
        stream.write_all(&block)?;
    }
}
