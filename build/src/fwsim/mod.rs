//! `cargo xtask fwsim`: what would the firewall do with this capture?
//!
//! The composition that the kernel runs ([`kernel::filter`]), without its drivers, between capture files. The
//! README's section of that name documents what goes in and what comes out; both are stable.

pub mod capture;
pub mod config;
pub mod packet;
pub mod replay;
pub mod report;

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{ArgAction, Args};
use firewall::GATEWAY_MAC;
use kernel::filter::Options;
use kernel::plan::MemoryPlan;

use self::capture::{Capture, Writer};
use self::config::{Keys, Vif};
use self::replay::{Event, Replay, Setup};
use self::report::Report;
use crate::host::Unusable;

/// Our MAC address on the uplink if nothing says another one.
const UPLINK_MAC: [u8; 6] = [0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x00];

/// What image and Xen take of a domain's memory, in MiB, about.
const IMAGE_MIB: usize = 1;

/// Arguments of `cargo xtask fwsim`.
#[derive(Debug, Args)]
#[command(after_help = "\
Configuration: DIR/vifs has a line for each client vif: name, domain id, MAC, then its addresses;
DIR/qubesdb/ a file for each key, its path the key. One newline at the end of a file does not belong
to the value. The interface `uplink` is the other one.

Captures: pcap or pcapng with whole Ethernet frames, taken in the order of their time stamps, which
are the firewall's clock. To clients the firewall is fe:ff:ff:ff:ff:ff, as every backend in Qubes.

Standard output: one JSON object a line. For each input frame: n (from 1), time, iface, verdict
(accept, reject, drop, local), reason and rule (a number, or \"policy\"), nat (what changed, from and
to, or null), out (an interface, or null). For each frame that the firewall sends by itself:
generated (what it is), time, cause (the n of an input frame, or null), out, src, dst, icmp, len.
OUTDIR/IFACE.pcap: what was sent on each interface.

Exit status: 0 done, 2 if anything is wrong with the arguments or the files.")]
pub struct FwsimArguments {
    /// The configuration: a folder with `vifs` and `qubesdb/`
    #[arg(long, value_name = "DIR")]
    config: PathBuf,
    /// A capture of what comes in on an interface; may be repeated
    #[arg(long = "in", value_name = "IFACE=FILE", required = true)]
    inputs: Vec<String>,
    /// Where IFACE.pcap is written for every interface; made if needed
    #[arg(long, value_name = "OUTDIR")]
    out: PathBuf,
    /// At SECONDS after the first frame dom0 replaces all keys by those in DIR2/qubesdb/, or changes only
    /// these if qubes-ip is not among them; may be repeated
    #[arg(long, num_args = 2, value_names = ["SECONDS", "DIR2"], action = ArgAction::Append, allow_negative_numbers = true)]
    at: Vec<String>,
    /// All randomness comes from this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Our MAC address on the uplink [default: the key /qubes-mac, else the destination of the first
    /// unicast frame that comes in there, else 00:16:3e:5e:6c:00]
    #[arg(long, value_name = "MAC")]
    uplink_mac: Option<String>,
    /// The kernel command line: `dns-learn=off`, `parity=strict`
    #[arg(long, value_name = "WORDS", default_value = "")]
    cmdline: String,
    /// Memory of the firewall in MiB, which sets the sizes of its tables
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u32).range(8..=1024))]
    memory: u32,
}

/// Runs the command.
///
/// # Errors
///
/// [`Unusable`] if anything is wrong with arguments or files.
pub fn run(arguments: &FwsimArguments) -> Result<ExitCode> {
    tell_warnings();
    let done = replay(arguments, BufWriter::new(io::stdout().lock()));
    match done {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Unusable(format!("{error:#}")).into()),
    }
}

/// Runs the command with another standard output, which is returned.
///
/// # Errors
///
/// If anything is wrong with arguments or files.
pub fn replay<W: Write>(arguments: &FwsimArguments, out: W) -> Result<W> {
    let vifs = config::read_vifs(&arguments.config)?;
    let keys = Keys::read(&arguments.config)?;
    let names = replay::names(&vifs);
    let captures = read_inputs(arguments, &names)?;
    let changes = read_changes(arguments)?;
    let uplink_mac = uplink_mac(arguments, &keys, &captures, names.len() - 1)?;
    let nanoseconds = captures.iter().any(|(_, capture, _)| capture.nanoseconds);
    let writers = create_outputs(arguments, &names, &captures, nanoseconds)?;

    let frames = captures.into_iter().flat_map(|(index, capture, _)| {
        let frames = capture.frames.into_iter();
        frames.map(move |frame| Event::Frame(index, frame))
    });
    let mut events: Vec<_> = frames.collect();
    let origin = events.iter().map(Event::time).min().unwrap_or(0);
    // A change comes before frames of the same time: the order of events is kept where times are equal.
    let mut all: Vec<Event> = Vec::with_capacity(events.len() + changes.len());
    let mut current = keys.clone();
    for (seconds, new) in changes {
        let time = origin.saturating_add(seconds);
        ensure!(
            u32::try_from(time / 1_000_000_000).is_ok(),
            "--at {}: beyond the times that captures can hold",
            seconds / 1_000_000_000
        );
        if events.iter().all(|event| event.time() < time) {
            anstream::eprintln!(
                "note: --at {}: after the last frame; SECONDS count from the first one",
                seconds / 1_000_000_000
            );
        }
        let new = current.changed_by(new);
        all.push(Event::Change(time, current.changes(&new)));
        current = new;
    }
    all.append(&mut events);
    all.sort_by_key(Event::time);

    let setup = setup(arguments, &vifs, uplink_mac);
    let report = Report::new(out, nanoseconds);
    let mut replay = Replay::new(&setup, keys.dump(), origin, report, writers)?;
    for event in all {
        replay.happen(event)?;
    }
    replay.finish()
}

fn setup<'a>(arguments: &FwsimArguments, vifs: &'a [Vif], uplink_mac: [u8; 6]) -> Setup<'a> {
    let mib = usize::try_from(arguments.memory).unwrap_or(usize::MAX);
    let plan = MemoryPlan::new(mib.saturating_sub(IMAGE_MIB) << 20);
    let mut limits = plan.limits();
    limits.clients = limits
        .clients
        .max(u16::try_from(vifs.len()).unwrap_or(u16::MAX));
    let mut seed = [0; 32];
    for (word, part) in seed.as_chunks_mut::<8>().0.iter_mut().zip(1_u64..) {
        // Numbers that are close to each other shall not give keys that are.
        let mixed = arguments
            .seed
            .wrapping_add(part)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *word = (mixed ^ mixed >> 29).to_le_bytes();
    }
    Setup {
        limits,
        seed,
        options: Options::from_command_line(&arguments.cmdline),
        vifs,
        uplink_mac,
    }
}

/// The captures with the numbers of their interfaces and their paths.
type Inputs<'a> = Vec<(usize, Capture, &'a Path)>;

fn read_inputs<'a>(arguments: &'a FwsimArguments, names: &[String]) -> Result<Inputs<'a>> {
    let read = |input: &'a String| {
        let (name, path) = input
            .split_once('=')
            .with_context(|| format!("--in {input}: not of the form IFACE=FILE"))?;
        let index = names.iter().position(|known| known == name);
        let index = index.with_context(|| {
            format!(
                "--in {input}: there is no interface {name:?} (there are {})",
                names.join(", ")
            )
        })?;
        let path = Path::new(path);
        Ok((index, capture::read(path)?, path))
    };
    arguments.inputs.iter().map(read).collect()
}

/// The changes of keys in the order of their times: nanoseconds after the first frame, all keys from then on.
fn read_changes(arguments: &FwsimArguments) -> Result<Vec<(u64, Keys)>> {
    let mut changes = Vec::new();
    for pair in arguments.at.chunks(2) {
        let [seconds, folder] = pair else {
            bail!("--at takes SECONDS and a folder");
        };
        let nanos = parse_seconds(seconds)
            .with_context(|| format!("--at {seconds}: not a number of seconds"))?;
        let folder = Path::new(folder);
        let keys = Keys::read(folder)?;
        if let (Ok(vifs), Ok(old)) = (
            config::read_vifs(folder),
            config::read_vifs(&arguments.config),
        ) && vifs != old
        {
            anstream::eprintln!(
                "note: {}: vifs do not change during a run",
                folder.join("vifs").display()
            );
        }
        changes.push((nanos, keys));
    }
    changes.sort_by_key(|(nanos, _)| *nanos);
    Ok(changes)
}

/// A decimal number of seconds, in nanoseconds, without rounding what can be said exactly.
fn parse_seconds(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let nanos: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    whole
        .checked_mul(1_000_000_000)?
        .checked_add(nanos.parse().ok()?)
}

fn uplink_mac(
    arguments: &FwsimArguments,
    keys: &Keys,
    inputs: &Inputs<'_>,
    uplink: usize,
) -> Result<[u8; 6]> {
    if let Some(text) = &arguments.uplink_mac {
        return config::parse_mac(text)
            .with_context(|| format!("--uplink-mac {text}: not a MAC address"));
    }
    let said = keys.get("/qubes-mac").and_then(|value| {
        let text = str::from_utf8(value).ok()?;
        config::parse_mac(text.trim())
    });
    if let Some(mac) = said {
        return Ok(mac);
    }
    let frames = inputs
        .iter()
        .filter(|(index, ..)| *index == uplink)
        .flat_map(|(_, capture, _)| &capture.frames);
    // A capture of both directions has frames to the netvm, too.
    let mut first = None;
    for mac in frames.filter_map(|frame| frame.bytes.first_chunk::<6>()) {
        if mac[0] & 1 == 0 {
            first = first.or(Some(*mac));
            if *mac != GATEWAY_MAC {
                return Ok(*mac);
            }
        }
    }
    Ok(first.unwrap_or(UPLINK_MAC))
}

/// Creates a capture file for every interface, but never over an input.
fn create_outputs(
    arguments: &FwsimArguments,
    names: &[String],
    inputs: &Inputs<'_>,
    nanoseconds: bool,
) -> Result<Vec<Writer>> {
    let folder = &arguments.out;
    fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    let create = |name: &String| {
        let path = folder.join(format!("{name}.pcap"));
        let real = fs::canonicalize(&path).ok();
        let is_input = |input: &Path| real.is_some() && fs::canonicalize(input).ok() == real;
        ensure!(
            !inputs.iter().any(|(_, _, input)| is_input(input)),
            "{}: is an input and would be overwritten",
            path.display()
        );
        Ok(path)
    };
    let paths = names.iter().map(create).collect::<Result<Vec<_>>>()?;
    paths
        .iter()
        .map(|path| Writer::create(path, nanoseconds))
        .collect()
}

/// Shows what the firewall would log as a warning.
fn tell_warnings() {
    static LOGGER: Warnings = Warnings;
    // Another logger is as good.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

struct Warnings;

impl log::Log for Warnings {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            anstream::eprintln!("note: {}", record.args());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_read_exactly() {
        for (text, nanos) in [
            ("0", 0),
            ("2", 2_000_000_000),
            ("1.5", 1_500_000_000),
            (".000000001", 1),
            ("3.", 3_000_000_000),
            ("1.0000000009", 1_000_000_000),
        ] {
            assert_eq!(parse_seconds(text), Some(nanos), "{text}");
        }
        for text in ["", ".", "-1", "1e3", "1,5", "99999999999999999999"] {
            assert_eq!(parse_seconds(text), None, "{text}");
        }
    }
}
