//! The double of dom0 as a program for the lab's dom0.
//!
//! `dom0-double --domid N [--greeting 3|4|echo] --scenario FILE` carries a scenario out and ends. With `--socket PATH`
//! instead it keeps both daemons running, with what the scenario `--database FILE` has written before they are offered, and each `dom0-double --send PATH FILE` carries a scenario out there.
//! `dom0-double --cycles COUNT --domid N --address CLIENT --gateway FIREWALL` has clients come and go behind domain N.
//! `dom0-double --loopback` needs no VM: it has dom0 talk to itself, to see that Xen's devices are used rightly.
//!
//! Every statement that is done prints a line `did …`. The last line is one of `SUCCESS`, `FAILURE …` (the firewall
//! did something wrong) and `ERROR …` (the double or the lab did); the exit codes are 0, 1 and 2.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use dom0_double::dom0::Dom0;
use dom0_double::linux::channels::{LinuxChannel, LinuxChannels};
use dom0_double::linux::cycles;
use dom0_double::linux::loopback;
use dom0_double::qrexec::Greeting;
use dom0_double::scenario::{Progress, Runner, Scenario};
use xen::DomId;

const HELP: &str = "\
dom0-double --domid N [--greeting 3|4|echo] --scenario FILE   carry a scenario out
dom0-double --domid N [--greeting 3|4|echo] --socket PATH [--database FILE]   keep dom0's daemons running
dom0-double --send PATH FILE                                  carry a scenario out there
dom0-double --cycles COUNT --domid N --address CLIENT --gateway FIREWALL   have clients come and go behind domain N
dom0-double --loopback                                        have dom0 talk to itself over every size of ring
";

/// How long to sleep at most: deadlines of the daemons are whole seconds.
const TICK: Duration = Duration::from_millis(20);

/// What the last line says.
enum Verdict {
    Success,
    Failure(String),
    Error(String),
}

impl Verdict {
    fn line(&self) -> String {
        match self {
            Self::Success => "SUCCESS".into(),
            Self::Failure(what) => format!("FAILURE {what}"),
            Self::Error(what) => format!("ERROR {what}"),
        }
    }

    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Success => 0,
            Self::Failure(_) => 1,
            Self::Error(_) => 2,
        })
    }
}

struct Arguments {
    domid: Option<u16>,
    greeting: Greeting,
    scenario: Option<PathBuf>,
    socket: Option<PathBuf>,
    send: Option<PathBuf>,
    database: Option<PathBuf>,
    loopback: bool,
    cycles: Option<u32>,
    address: String,
    gateway: String,
}

fn arguments() -> Result<Arguments, lexopt::Error> {
    use lexopt::prelude::*;
    let mut parser = lexopt::Parser::from_env();
    let mut all = Arguments {
        domid: None,
        greeting: Greeting::Echo,
        scenario: None,
        socket: None,
        send: None,
        database: None,
        loopback: false,
        cycles: None,
        address: String::new(),
        gateway: String::new(),
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("domid") => all.domid = Some(parser.value()?.parse()?),
            Long("greeting") => {
                all.greeting = match parser.value()?.string()?.as_str() {
                    "echo" => Greeting::Echo,
                    number => Greeting::Version(number.parse().map_err(|_| "not a version")?),
                };
            }
            Long("scenario") => all.scenario = Some(parser.value()?.into()),
            Long("socket") => all.socket = Some(parser.value()?.into()),
            Long("send") => all.send = Some(parser.value()?.into()),
            Long("database") => all.database = Some(parser.value()?.into()),
            Long("cycles") => all.cycles = Some(parser.value()?.parse()?),
            Long("address") => all.address = parser.value()?.string()?,
            Long("gateway") => all.gateway = parser.value()?.string()?,
            Long("loopback") => all.loopback = true,
            Value(file) => all.scenario = Some(file.into()),
            other => return Err(other.unexpected()),
        }
    }
    Ok(all)
}

fn main() -> ExitCode {
    let verdict = match arguments() {
        Ok(arguments) => run(&arguments).unwrap_or_else(|error| Verdict::Error(error.to_string())),
        Err(error) => {
            eprint!("{HELP}");
            Verdict::Error(error.to_string())
        }
    };
    println!("{}", verdict.line());
    verdict.exit_code()
}

fn run(arguments: &Arguments) -> io::Result<Verdict> {
    if let (Some(socket), Some(file)) = (&arguments.send, &arguments.scenario) {
        return send(socket, file);
    }
    if arguments.loopback {
        return match loopback::check(&mut LinuxChannels::open()?) {
            Ok(lines) => {
                lines.iter().for_each(|line| println!("did {line}"));
                Ok(Verdict::Success)
            }
            Err(error) => Ok(Verdict::Error(error)),
        };
    }
    let Some(domid) = arguments.domid else {
        eprint!("{HELP}");
        return Err(io::Error::other("--domid is missing"));
    };
    if let Some(count) = arguments.cycles {
        let [address, gateway] = [&arguments.address, &arguments.gateway]
            .map(|text| text.parse().map_err(io::Error::other));
        return Ok(match cycles::run(count, domid, address?, gateway?) {
            Ok(longest) => {
                println!("did the longest of {count} [{} ms]", longest.as_millis());
                Verdict::Success
            }
            Err(error) => Verdict::Failure(error.to_string()),
        });
    }
    let channels = LinuxChannels::open()?;
    let dom0 = Dom0::new(DomId(domid), arguments.greeting);
    let mut world = World { channels, dom0 };
    if let Some(file) = &arguments.database
        && let Some(verdict) = world.fill(&fs::read_to_string(file)?)
    {
        return Ok(verdict);
    }
    match (&arguments.scenario, &arguments.socket) {
        (Some(file), _) => world.play(&fs::read_to_string(file)?, &mut io::stdout()),
        (None, Some(socket)) => world.keep(socket),
        (None, None) => Err(io::Error::other("--scenario or --socket is missing")),
    }
}

/// Sends a scenario to a running double and prints what it says.
fn send(socket: &Path, file: &Path) -> io::Result<Verdict> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(fs::read_to_string(file)?.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut last = String::new();
    for line in BufReader::new(stream).lines() {
        if !last.is_empty() {
            println!("{last}");
        }
        last = line?;
    }
    Ok(match last.split_once(' ') {
        None if last == "SUCCESS" => Verdict::Success,
        Some(("FAILURE", what)) => Verdict::Failure(what.into()),
        Some(("ERROR", what)) => Verdict::Error(what.into()),
        _ => Verdict::Error(format!("the double said {last:?} and no more")),
    })
}

struct World {
    channels: LinuxChannels,
    dom0: Dom0<LinuxChannel>,
}

impl World {
    /// Carries a scenario out.
    fn play(&mut self, text: &str, out: &mut impl Write) -> io::Result<Verdict> {
        let scenario = match Scenario::parse(text) {
            Ok(scenario) => scenario,
            Err(error) => return Ok(Verdict::Error(error)),
        };
        let mut runner = Runner::new(scenario);
        loop {
            match runner.poll(&mut self.dom0, &mut self.channels) {
                Ok(Progress::Finished) => return Ok(Verdict::Success),
                // Whoever reads this may have gone; the scenario goes on.
                Ok(Progress::Did(line)) => drop(writeln!(out, "did {line}")),
                Ok(Progress::Going) => self.channels.wait(None, TICK)?,
                Err(error) => return Ok(Verdict::Failure(error)),
            }
            if let Err(fatal) = self.dom0.poll(&mut self.channels) {
                return Ok(Verdict::Failure(fatal.to_string()));
            }
        }
    }

    /// Carries out statements that need no VM, before any can connect. The verdict if that fails.
    fn fill(&mut self, text: &str) -> Option<Verdict> {
        let scenario = match Scenario::parse(text) {
            Ok(scenario) => scenario,
            Err(error) => return Some(Verdict::Error(error)),
        };
        let mut runner = Runner::new(scenario);
        loop {
            match runner.poll(&mut self.dom0, &mut self.channels) {
                Ok(Progress::Finished) => return None,
                Ok(Progress::Did(_)) => {}
                Ok(Progress::Going) => {
                    return Some(Verdict::Error("a database cannot wait for a VM".into()));
                }
                Err(error) => return Some(Verdict::Error(error)),
            }
        }
    }

    /// Keeps the daemons running and carries out what comes by the socket, which is there when they are offered.
    fn keep(&mut self, socket: &Path) -> io::Result<Verdict> {
        let _ = fs::remove_file(socket);
        if let Err(fatal) = self.dom0.poll(&mut self.channels) {
            return Ok(Verdict::Failure(fatal.to_string()));
        }
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        loop {
            if let Err(fatal) = self.dom0.poll(&mut self.channels) {
                return Ok(Verdict::Failure(fatal.to_string()));
            }
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.set_nonblocking(false)?;
                    let mut text = String::new();
                    stream.read_to_string(&mut text)?;
                    let verdict = self.play(&text, &mut stream)?;
                    let _ = writeln!(stream, "{}", verdict.line());
                    println!("{}", verdict.line());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let descriptor: &dyn AsFd = &listener;
                    self.channels.wait(Some(descriptor), TICK)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}
