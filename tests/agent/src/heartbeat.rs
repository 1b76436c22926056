//! `lab heartbeat`: one TCP connection that shows every disturbance.
//!
//! A block goes to an echo server and must come back before the next is sent.
//! That costs next to no CPU, unlike a paced bulk transfer, whose timers alone
//! fill an emulated machine; so what is tested meanwhile is not slowed down.
//!
//! Output: `beat=1 ms=12` for each block; the longest gap of all is the answer
//! to "did they notice?". A broken connection ends with status 1.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use lexopt::prelude::*;

use crate::Outcome;
use crate::agent::milliseconds;

/// Bytes in a block: three full segments, so that it is more than one packet.
const BLOCK: usize = 3 * 1400;

/// How long an answer may take before the connection counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `lab heartbeat ADDR PORT [--interval-ms N] [--count N]`.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let mut values = Vec::new();
    let mut interval = Duration::from_millis(200);
    let mut count = u64::MAX;
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(value) => values.push(value.string()?),
            Long("interval-ms") => interval = Duration::from_millis(arguments.value()?.parse()?),
            Long("count") => count = arguments.value()?.parse()?,
            other => return Err(other.unexpected().into()),
        }
    }
    let [address, port] = values.as_slice() else {
        return Err("an address and a port are needed".into());
    };
    let target = SocketAddr::new(address.parse::<IpAddr>()?, port.parse()?);
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    for beat in 1..=count {
        // Every block differs, so that an old one is not taken for its answer.
        let byte = u8::try_from(beat % 251).unwrap_or_default();
        let sent = vec![byte; BLOCK];
        let mut back = vec![0; BLOCK];
        let begun = Instant::now();
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        if back != sent {
            return Err(format!("block {beat} came back damaged").into());
        }
        println!("beat={beat} ms={}", milliseconds(begun));
        thread::sleep(interval);
    }
    Ok(ExitCode::SUCCESS)
}
