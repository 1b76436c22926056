//! `differential`: the packet engine against the Linux kernel.

use std::process::ExitCode;

use clap::Parser as _;
use differential::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
