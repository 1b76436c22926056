//! dom0 talks to itself: shows that the devices are used rightly, without a VM that could be at fault.
//!
//! Xen lets a domain map its own grants and bind its own ports, so both ends of a vchan can be dom0's. Each size of
//! ring that Qubes uses carries more than it holds in both directions; then the client closes in the middle of data
//! that the server must still find.

use std::time::{Duration, Instant};

use qubes::vchan::{Channels, Orders, Phase};
use xen::DomId;
use xen::stream::ByteStream;

use super::channels::{LinuxChannel, LinuxChannels};

/// A port that nothing of Qubes uses.
const PORT: u32 = 999;
/// Bytes carried each way.
const LEN: usize = 300_000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to sleep at most; an event ends it.
const TICK: Duration = Duration::from_millis(200);

/// One end and what it does.
struct End {
    channel: LinuxChannel,
    sent: usize,
    received: Vec<u8>,
}

/// Bytes that differ in every page and in both directions.
fn pattern(salt: u8) -> Vec<u8> {
    (0u32..)
        .map(|index| {
            let [low, middle, high, _] = (index / 7).to_le_bytes();
            low ^ middle ^ high ^ salt
        })
        .take(LEN)
        .collect()
}

impl End {
    const fn new(channel: LinuxChannel) -> Self {
        Self {
            channel,
            sent: 0,
            received: Vec::new(),
        }
    }

    /// Moves on; true if anything was possible.
    fn step(&mut self, channels: &mut LinuxChannels, data: &[u8]) -> Result<bool, String> {
        let rest = data.get(self.sent..).unwrap_or_default();
        let sent = self.channel.write(rest).map_err(|_| "writing fails")?;
        self.sent += sent;
        let mut buffer = [0; 8192];
        let read = self
            .channel
            .read(&mut buffer)
            .map_err(|_| "reading fails")?;
        self.received
            .extend_from_slice(buffer.get(..read).unwrap_or_default());
        channels.flush(&mut self.channel);
        Ok(sent > 0 || read > 0)
    }
}

/// Carries data through every size of ring; a line for each.
///
/// # Errors
///
/// What went wrong.
pub fn check(channels: &mut LinuxChannels) -> Result<Vec<String>, String> {
    let in_page = Orders::for_sizes(1024, 2048).ok_or("no orders")?;
    [
        ("in the control page", in_page),
        ("a page each", Orders::PAGES),
        ("16 pages each", Orders::QREXEC_DATA),
    ]
    .into_iter()
    .map(|(name, orders)| {
        let begun = Instant::now();
        one(channels, orders).map_err(|error| format!("rings {name}: {error}"))?;
        Ok(format!(
            "rings {name}: {LEN} bytes each way in {} ms",
            begun.elapsed().as_millis()
        ))
    })
    .collect()
}

fn one(channels: &mut LinuxChannels, orders: Orders) -> Result<(), String> {
    let begun = Instant::now();
    let late = || begun.elapsed() > PATIENCE;
    let exhausted = |_| "cannot be opened".to_owned();
    let server = channels
        .listen(DomId::DOM0, PORT, orders)
        .map_err(exhausted)?;
    let client = channels.connect(DomId::DOM0, PORT).map_err(exhausted)?;
    let (mut server, mut client) = (End::new(server), End::new(client));
    while channels.progress(&mut client.channel) != Phase::Open
        || channels.progress(&mut server.channel) != Phase::Open
    {
        if late() {
            return Err("the ends do not meet".into());
        }
        channels
            .wait(None, TICK)
            .map_err(|error| error.to_string())?;
    }
    let (down, up) = (pattern(0x55), pattern(0xaa));
    let mut sleeps = 0u32;
    while server.received.len() < LEN || client.received.len() < LEN {
        if late() {
            return Err(format!(
                "{} and {} bytes arrived",
                server.received.len(),
                client.received.len()
            ));
        }
        // One end at a time, so that each must be woken by the other's event.
        let moved = server.step(channels, &down)? | client.step(channels, &up)?;
        if !moved {
            sleeps += 1;
            channels
                .wait(None, TICK)
                .map_err(|error| error.to_string())?;
        }
    }
    if server.received != up || client.received != down {
        return Err("bytes were changed on their way".into());
    }
    if sleeps > 50 {
        return Err(format!("{sleeps} sleeps: events get lost"));
    }
    // The last words of an end that closes are still heard.
    let said = client
        .channel
        .write(b"goodbye")
        .map_err(|_| "cannot say goodbye")?;
    channels.close(client.channel);
    let mut buffer = [0; 64];
    let heard = server
        .channel
        .read(&mut buffer)
        .map_err(|_| "the last words were lost")?;
    if heard != said || server.channel.read(&mut buffer).is_ok() {
        return Err("the end was not noticed".into());
    }
    channels.close(server.channel);
    Ok(())
}
