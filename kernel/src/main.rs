//! The image's binary: entry, heap, panic hook, and the loop around [`kernel::machine::Firewall`].
//!
//! Linked by `build/image/portcullis.ld`; built by `cargo xtask image`. Boot failures end the domain with a line on port
//! 0xE9 and, as soon as there is one, on the console.
#![no_std]
#![no_main]

extern crate alloc;

#[cfg(feature = "crash-commands")]
mod crash;

use alloc::vec::Vec;
use core::fmt;
use core::panic::PanicInfo;
use core::time::Duration;

use kernel::filter;
use kernel::logger;
use kernel::machine::{Firewall, Setup, Step};
use kernel::plan::MemoryPlan;
use kernel::source::Source;
use talc::TalcLock;
use talc::source::Manual;
use xen::Hypervisor;
use xen::boot::Boot;
use xen::console::ConsoleRing;
use xen::entropy::EntropyQuality;
use xen::guest::{BootContext, Guest};
use xen::shutdown::{ShutdownReason, die, shut_down};
use xenstore::{ControlPlane, Options, Shutdown};

/// Time that the console daemon gets to take the last lines of an orderly end.
const LAST_LINES: Duration = Duration::from_millis(100);

/// The heap. The lock is never contended: there is one processor and no interrupt.
#[global_allocator]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

xen::entry_point!(main);

/// Ends the domain with file, line and reason, after the log lines that nobody has seen yet.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    die(format_args!("\n{WaitingLines}portcullis: {info}"))
}

/// The log lines that the main loop did not get around to print.
struct WaitingLines;

impl fmt::Display for WaitingLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        while let Some(line) = logger::LOGGER.try_take() {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

/// Precompiled code names this symbol in unwind tables, which the linker script drops. Never called.
// SAFETY: no other object defines it, since nothing else brings a runtime.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Precompiled code ends its landing pads with this. Never called: a panic does not unwind here.
// SAFETY: as above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    die(format_args!("\nportcullis: unwinding"))
}

/// Shares out the memory, finds Xen, and runs.
fn main(mut boot: Boot) -> ! {
    let plan = MemoryPlan::new(usize::try_from(boot.usable_bytes()).unwrap_or(usize::MAX));
    let image_bytes = boot.image_bytes();
    let Some(heap) = boot.take_heap(plan.heap_bytes as u64) else {
        die(format_args!(
            "\nportcullis: no {} bytes in one piece for the heap",
            plan.heap_bytes
        ))
    };
    // SAFETY: `take_heap` gives memory that nothing else uses, for good.
    if unsafe { HEAP.lock().claim(heap.as_mut_ptr().cast(), heap.len()) }.is_none() {
        die(format_args!(
            "\nportcullis: {} bytes are too few for the heap",
            heap.len()
        ));
    }
    match BootContext::new(boot) {
        Ok(context) => {
            logger::install();
            greet(&context, image_bytes, heap.len());
            run(context, &plan)
        }
        Err(error) => die(format_args!("\nportcullis: {error}")),
    }
}

/// Logs what was found.
fn greet(context: &BootContext, image_bytes: u64, heap_bytes: usize) {
    let guest = &context.guest;
    logger::LOGGER.set_uptime(guest.now().since(context.entry_time));
    let (major, minor) = context.xen_version;
    xen::info!(
        "Portcullis {} on Xen {major}.{minor}, domain {}, {} hypercalls so far",
        env!("CARGO_PKG_VERSION"),
        guest.own_domid(),
        guest.counters().hypercalls
    );
    xen::info!(
        "memory: {} KiB, of these image {}, heap {}, packet pool {}; {} grants",
        guest.ram_bytes() / 1024,
        image_bytes / 1024,
        heap_bytes / 1024,
        guest.free_pages() * 4,
        guest.free_grants()
    );
    if let Some(wall_clock) = context.wall_clock {
        xen::info!("wall clock {} s since 1970", wall_clock.as_secs());
    }
    match context.entropy.quality {
        EntropyQuality::Source => xen::info!("seed from the processor's entropy source"),
        EntropyQuality::Generator => xen::info!("seed from the processor's generator"),
        EntropyQuality::Timing => xen::warn!("seed from timing only: hash keys are guessable"),
    }
    if context.tsc_emulated {
        xen::warn!("reading the clock traps into Xen: set tsc_mode=\"native\"");
    }
    if !context.command_line.is_empty() {
        xen::info!("command line: {}", context.command_line);
    }
}

/// Runs the firewall until dom0 ends it.
fn run(context: BootContext, plan: &MemoryPlan) -> ! {
    let BootContext {
        mut guest,
        mut console,
        mut store,
        entry_time,
        entropy,
        command_line,
        ..
    } = context;
    let mut ports = Vec::from([store.port()]);
    ports.extend(console.port());
    // Nothing has waited so far, so what exceeds the time since entry is older.
    let since_entry = guest.refresh_time().since(entry_time);
    let running = guest.running_time().unwrap_or_default();
    let setup = Setup {
        limits: plan.limits(),
        rx_buffers: plan.rx_buffers,
        seed: entropy.seed,
        started: entry_time,
        running_at_start: running.saturating_sub(since_entry),
        pool_pages: guest.free_pages(),
        ports,
        options: filter::Options::from_command_line(&command_line),
        source: Source::from_command_line(&command_line),
    };
    let control = ControlPlane::new(Options::default());
    let mut firewall = Firewall::new(setup, control, heap_use);
    guest.refresh_time();
    loop {
        #[cfg(feature = "crash-commands")]
        let step = firewall.step(&mut guest, &mut store, &mut crash::Crashing(&mut console));
        #[cfg(not(feature = "crash-commands"))]
        let step = firewall.step(&mut guest, &mut store, &mut console);
        match step {
            Step::Continue => {}
            Step::End(end) => {
                drain(&mut guest, &console);
                shut_down(match end {
                    Shutdown::Poweroff | Shutdown::Halt => ShutdownReason::PowerOff,
                    Shutdown::Reboot => ShutdownReason::Reboot,
                })
            }
            Step::StoreLost => die(format_args!(
                "\nportcullis: the connection to xenstore is lost"
            )),
        }
    }
}

/// Bytes of the heap, and how many of them are allocated.
fn heap_use() -> (u64, u64) {
    let heap = HEAP.lock();
    let counters = heap.counters();
    (
        counters.claimed_bytes as u64,
        counters.allocated_bytes as u64,
    )
}

/// Gives the console daemon a moment to take the last lines.
fn drain(guest: &mut Guest, console: &ConsoleRing) {
    let deadline = guest.refresh_time().plus(LAST_LINES);
    let ports: Vec<_> = console.port().into_iter().collect();
    while !console.is_drained() && guest.now() < deadline {
        for port in &ports {
            guest.take_pending(*port);
        }
        guest.wait(&ports, Some(deadline));
    }
}
