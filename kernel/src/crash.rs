//! Console commands that crash the image, each in another way, for tests of how that is reported.
//!
//! Only with the feature `crash-commands`, which no image that anybody uses has.

use core::arch::asm;

use xen::console::ConsoleRing;
use xen::stream::{ByteStream, StreamError};

/// The console, with an eye on what is typed.
pub(crate) struct Crashing<'a>(pub(crate) &'a mut ConsoleRing);

impl ByteStream for Crashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let count = self.0.read(buffer)?;
        crash(buffer.get(..count).unwrap_or_default().trim_ascii());
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        self.0.write(bytes)
    }
}

/// Crashes if `line` is one of the commands.
fn crash(line: &[u8]) {
    match line {
        b"crash panic" => requested(),
        b"crash null" => write(core::ptr::null_mut()),
        b"crash text" => write(crash as *mut u8),
        b"crash data" => run_data(),
        b"crash stack" => {
            let _ = descend(1);
        }
        b"crash opcode" => invalid_opcode(),
        _ => {}
    }
}

#[expect(clippy::panic, reason = "this is the command")]
fn requested() {
    panic!("as requested");
}

/// Faults: the address is unmapped or read-only.
fn write(address: *mut u8) {
    // SAFETY: the store does not happen: page tables forbid it, and the domain ends in the exception handler.
    unsafe { asm!("mov byte ptr [{}], 0", in(reg) address, options(nostack)) };
}

/// Faults: data is not executable.
fn run_data() {
    // A lone return instruction, should it ever be executed.
    let code = [0xC3u8; 16];
    // SAFETY: the call does not happen, or returns at once.
    unsafe { asm!("call {}", in(reg) code.as_ptr(), clobber_abi("C")) };
}

/// Faults: the stack ends in its guard.
fn descend(depth: u64) -> u64 {
    let frame = core::hint::black_box([depth; 64]);
    let deeper = match frame.first() {
        Some(0) | None => 0,
        Some(depth) => descend(depth.wrapping_add(1)),
    };
    frame.iter().fold(deeper, |sum, word| sum ^ word)
}

/// Faults: there is no such instruction.
fn invalid_opcode() {
    // SAFETY: the domain ends in the exception handler.
    unsafe { asm!("ud2", options(nostack)) };
}
