//! The image's binary: heap, panic hook, and the hand-over from the boot code to the kernel.
//!
//! Linked by `build/image/portcullis.ld`; see `cargo xtask image`.
#![no_std]
#![no_main]

extern crate alloc;

use core::panic::PanicInfo;

use talc::TalcLock;
use talc::source::Manual;
use xen::boot::Boot;
use xen::guest::BootContext;
use xen::shutdown::die;
use xen::stream::ByteStream;
use xen::{Hypervisor, Time};

/// The heap. The lock is never contended: there is one processor and no interrupt.
#[global_allocator]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

xen::entry_point!(main);

/// Ends the domain with file, line and reason.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    die(format_args!("\nportcullis: {info}"))
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

/// Sets up the heap, finds Xen, and runs.
fn main(mut boot: Boot) -> ! {
    let heap_bytes = boot.usable_bytes() / 3;
    let Some(heap) = boot.take_heap(heap_bytes) else {
        die(format_args!("\nportcullis: no memory for the heap"))
    };
    // SAFETY: `take_heap` gives memory that nothing else uses, for good.
    if unsafe { HEAP.lock().claim(heap.as_mut_ptr().cast(), heap.len()) }.is_none() {
        die(format_args!(
            "\nportcullis: {} bytes are too few for the heap",
            heap.len()
        ));
    }
    match BootContext::new(boot) {
        Ok(context) => run(context),
        Err(error) => die(format_args!("\nportcullis: {error}")),
    }
}

fn run(mut context: BootContext) -> ! {
    use core::fmt::Write as _;
    struct Out<'a>(&'a mut xen::console::ConsoleRing);
    impl core::fmt::Write for Out<'_> {
        fn write_str(&mut self, text: &str) -> core::fmt::Result {
            self.0.write_or_drop(text.as_bytes());
            Ok(())
        }
    }
    let guest = &mut context.guest;
    let uptime = guest.refresh_time().since(context.entry_time);
    let hypercalls = guest.counters().hypercalls;
    let text = alloc::format!(
        "portcullis on Xen {}.{}, domain {}, {} KiB RAM, {} free pages, {} grants\r\nup {} us after entry, {} hypercalls, entropy {:?}, wall clock {:?}, tsc emulated {}, command line {:?}\r\n",
        context.xen_version.0,
        context.xen_version.1,
        guest.own_domid(),
        guest.ram_bytes() / 1024,
        guest.free_pages(),
        guest.free_grants(),
        uptime.as_micros(),
        hypercalls,
        context.entropy.quality,
        context.wall_clock,
        context.tsc_emulated,
        context.command_line,
    );
    let _ = Out(&mut context.console).write_str(&text);
    let mut request = alloc::vec::Vec::new();
    for word in [2u32, 7, 0, 5] {
        request.extend_from_slice(&word.to_le_bytes());
    }
    request.extend_from_slice(b"name\0");
    let _ = context.store.write(&request);
    let mut ports = alloc::vec::Vec::from([context.store.port()]);
    ports.extend(context.console.port());
    loop {
        let now = context.guest.now();
        context
            .guest
            .wait(&ports, Some(Time(now.0 + 5_000_000_000)));
        let mut buffer = [0u8; 512];
        if context.guest.take_pending(context.store.port()) {
            let count = context.store.read(&mut buffer).unwrap_or(0);
            let _ = write!(
                Out(&mut context.console),
                "store says {:?} at {} us\r\n",
                buffer
                    .get(..count)
                    .map(|b| b.escape_ascii().collect::<alloc::vec::Vec<u8>>())
                    .map(|v| alloc::string::String::from_utf8_lossy(&v).into_owned()),
                context.guest.now().since(context.entry_time).as_micros()
            );
        }
        if let Some(port) = context.console.port()
            && context.guest.take_pending(port)
        {
            let count = context.console.read(&mut buffer).unwrap_or(0);
            let line = buffer.get(..count).unwrap_or_default().trim_ascii();
            #[cfg(feature = "crash-commands")]
            crash(line);
            let _ = write!(
                Out(&mut context.console),
                "read {:?}, {:?}\r\n",
                line.escape_ascii().collect::<alloc::vec::Vec<u8>>().len(),
                context.guest.counters()
            );
        }
    }
}

/// Crashes as the command says.
#[cfg(feature = "crash-commands")]
fn crash(command: &[u8]) {
    #[expect(clippy::panic, reason = "on request")]
    if command == b"panic" {
        panic!("as requested");
    }
    if command == b"null" {
        // SAFETY: none: this is to fault.
        let _ = unsafe { core::ptr::null::<u64>().read_volatile() };
    }
    if command == b"text" {
        let pointer = crash as *mut u8;
        // SAFETY: none: this is to fault.
        unsafe { pointer.write_volatile(0) };
    }
    if command == b"data" {
        let code = [0xC3u8; 16];
        // SAFETY: none: this is to fault.
        let function: extern "C" fn() = unsafe { core::mem::transmute(code.as_ptr()) };
        function();
    }
    if command == b"stack" {
        fn deeper(depth: u64) -> u64 {
            let filler = core::hint::black_box([depth; 100]);
            filler.iter().sum::<u64>() + deeper(depth + 1)
        }
        core::hint::black_box(deeper(0));
    }
    if command == b"invalid" {
        // SAFETY: none: this is to fault.
        unsafe { core::arch::asm!("ud2") };
    }
}
