//! `cargo xtask`: see `cargo xtask --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::bench_command::{self, BenchArguments};
use xtask::demo_command::{self, DemoArguments};
use xtask::fwsim::{self, FwsimArguments};
use xtask::host::Unusable;
use xtask::image::{self, ImageArguments};
use xtask::lab_command::{self, LabArguments};
use xtask::package::{self, PackageArguments};
use xtask::screen::{BAD, Screen, paint};
use xtask::test_command::{self, TestArguments};
use xtask::workspace::Workspace;

/// Status when a check failed.
const FAILED: u8 = 1;
/// Status after wrong use or with a missing tool, as clap has it too.
const UNUSABLE: u8 = 2;

/// Builds the firewall image, runs it in a Xen lab, and tests it.
///
/// Exit status: 0 good, 1 a check failed, 2 wrong use or a missing tool.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the main job: real guests, real traffic, step by step.
    Demo(DemoArguments),
    /// Runs every test, on the host and in the lab, with one summary.
    #[command(visible_alias = "ci")]
    Test(TestArguments),
    /// Measures the engine, and transfers with and without the firewall.
    Bench(BenchArguments),
    /// Tells what the firewall would do with captured frames.
    Fwsim(FwsimArguments),
    /// Builds the bootable image and says what it is.
    Image(ImageArguments),
    /// Makes what a Qubes user carries into dom0: kernel, installer, Salt state, one archive.
    Package(PackageArguments),
    /// Boots Xen in QEMU with a firewall and clients, and gives you its dom0 shell.
    Lab(LabArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let screen = Screen::new();
    let outcome = match &arguments.command {
        // Needs nothing of the clone.
        Command::Fwsim(arguments) => fwsim::run(arguments),
        command => Workspace::find().and_then(|workspace| run(&workspace, &screen, command)),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            anstream::eprintln!("{} {error:#}", paint(BAD, "error:"));
            let unusable = error.chain().any(|cause| cause.is::<Unusable>());
            ExitCode::from(if unusable { UNUSABLE } else { FAILED })
        }
    }
}

fn run(workspace: &Workspace, screen: &Screen, command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(arguments) => demo_command::run(workspace, screen, arguments),
        Command::Test(arguments) => test_command::run(workspace, screen, arguments),
        Command::Bench(arguments) => bench_command::run(workspace, screen, arguments),
        Command::Image(arguments) => image::run(workspace, screen, arguments),
        Command::Package(arguments) => package::run(workspace, screen, arguments),
        Command::Lab(arguments) => lab_command::run(workspace, screen, arguments),
        Command::Fwsim(arguments) => fwsim::run(arguments),
    }
}
