//! The lab's hand inside dom0 and the guests.
//!
//! One static program with a few commands; `lab agent` is started by the init
//! script of every lab domain, the others are used by scenarios.
//!
//! Trusted: whoever calls it, as root. Nothing here is part of the firewall.
#![forbid(unsafe_code)]

mod agent;
mod capture;
mod dns;
mod frame;
mod heartbeat;
mod job;
mod links;
mod port;
mod probe;
mod relay;
mod services;

use std::error::Error;
use std::process::ExitCode;

/// Any failure of a command: it is printed and ends the program with status 1.
type Outcome = Result<ExitCode, Box<dyn Error + Send + Sync>>;

const HELP: &str = "\
lab agent (--port NAME | --tty DEVICE) [--name NAME]   serve the control channel
lab links SCRIPT                       run SCRIPT IFACE for each new eth* interface
lab serve [--dns ADDR].. [--record NAME=ADDR].. [--echo ADDR:PORT].. [--sink ..] [--flood ..] [--whoami ..]
lab resolve NAME --server ADDR [--tcp] [--aaaa] [--timeout-ms N]
lab connect ADDR PORT [--timeout-ms N]   try TCP, say what came back and when
lab udp ADDR PORT TEXT [--timeout-ms N]  send a datagram, say what came back and when
lab heartbeat ADDR PORT [--interval-ms N] [--count N]   one TCP connection to an echo server
lab frame IFACE HEX                      send one Ethernet frame as it stands
lab forge IFACE --src IP --dst IP (--udp SPORT:DPORT | --syn SPORT:DPORT | --echo ID)
          [--src-mac MAC] [--dst-mac MAC] [--count N]
lab capture IFACE [--count N] [--seconds N]   print a line for each frame
";

fn main() -> ExitCode {
    let mut arguments = lexopt::Parser::from_env();
    let outcome = match arguments.next() {
        Ok(Some(lexopt::Arg::Value(command))) => match command.to_str() {
            Some("agent") => agent::command(arguments),
            Some("links") => links::command(arguments),
            Some("serve") => services::command(arguments),
            Some("resolve") => dns::command(arguments),
            Some("connect") => probe::connect_command(arguments),
            Some("udp") => probe::udp_command(arguments),
            Some("heartbeat") => heartbeat::command(arguments),
            Some("frame") => frame::frame_command(arguments),
            Some("forge") => frame::forge_command(arguments),
            Some("capture") => capture::command(arguments),
            _ => help(),
        },
        _ => help(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("lab: {error}");
        ExitCode::FAILURE
    })
}

fn help() -> Outcome {
    eprint!("{HELP}");
    Ok(ExitCode::from(2))
}
