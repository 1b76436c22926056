//! From the first instruction to [`Boot`], which the image's `main` gets.
//!
//! | module | what |
//! | --- | --- |
//! | `entry` | the PVH note, 32-bit entry, long mode |
//! | `page_tables` | identity map of 4 GiB, nothing both writable and executable |
//! | `traps` | processor exceptions, all fatal, all reported |
//! | `start_info` | command line and memory map from the builder |
//! | `image` | the linker's symbols |
//! | `memory_functions` | `memcpy` and the like |
//!
//! `main` is declared with [`crate::entry_point!`]. It sizes the heap by [`Boot::usable_bytes`], takes it with
//! [`Boot::take_heap`], gives it to its global allocator, and then calls [`crate::guest::BootContext::new`].

#[cfg(not(test))]
mod cell;
pub(crate) mod memory_functions;
pub(crate) mod page_tables;
pub mod start_info;

#[cfg(not(test))]
mod entry;
#[cfg(not(test))]
mod image;
#[cfg(not(test))]
mod traps;

use crate::discovery::{Discovery, DiscoveryError, discover};
use crate::memory::{HeapMemory, MapEntry, Region, Regions, heap_memory, unbacked_bytes};
use crate::{cpu, hole, hypercall};
use start_info::{CommandLine, StartInfo};

/// What a booted image has before it has set anything up with Xen.
#[derive(Debug)]
pub struct Boot {
    pub(crate) regions: Regions,
    /// RAM in the memory map that Xen backs, in bytes, whatever occupies it.
    pub(crate) ram_bytes: u64,
    /// Xen, if it is there. Hypercalls work from here on.
    pub(crate) found: Result<Discovery, DiscoveryError>,
    /// First frame of the hole for Xen's pages and peers' pages.
    pub(crate) hole: Option<u64>,
    /// The time stamp counter at the first instruction.
    pub(crate) entry_tsc: u64,
    command_line: &'static str,
    image: Region,
}

impl Boot {
    /// Finds Xen and sorts out what memory is whose.
    ///
    /// # Safety
    ///
    /// 1. The memory map of `info` is that of this machine, and nothing uses RAM outside of `image`.
    /// 2. All of it is mapped writable at its own address.
    unsafe fn new(
        info: &StartInfo,
        command_line: &'static CommandLine,
        image: Region,
        entry_tsc: u64,
    ) -> Self {
        let found = discover(cpu::cpuid);
        let mut regions = Regions::usable(&info.memory_map, image);
        let mut ram_bytes = ram_bytes(&info.memory_map);
        if let Ok(found) = &found {
            hypercall::select(found.instruction);
            if let Ok(pages) = hypercall::current_reservation() {
                let unbacked = unbacked_bytes(ram_bytes, pages);
                regions.give_up(unbacked);
                ram_bytes = ram_bytes.saturating_sub(unbacked);
            }
        }
        Self {
            regions,
            ram_bytes,
            found,
            hole: hole::find(&info.memory_map),
            entry_tsc,
            command_line: command_line.as_str(),
            image,
        }
    }

    /// The command line: printable ASCII, at most 4,096 bytes.
    #[must_use]
    pub const fn command_line(&self) -> &'static str {
        self.command_line
    }

    /// RAM of the domain in bytes: what the memory map has and Xen backs.
    #[must_use]
    pub const fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// RAM that nothing occupies yet, in bytes: what heap and page pool share.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.regions.total()
    }

    /// Memory that the image itself occupies, in bytes, stacks and page tables included.
    #[must_use]
    pub const fn image_bytes(&self) -> u64 {
        self.image.len()
    }

    /// Takes `bytes`, rounded up to whole pages, for the heap. `None` when no stretch of memory is that long.
    pub fn take_heap(&mut self, bytes: u64) -> Option<HeapMemory> {
        let region = self.regions.carve(bytes)?;
        // SAFETY: the region is mapped RAM that nothing uses (`Boot::new`), and `carve` has given it to us alone.
        unsafe { heap_memory(region) }
    }
}

fn ram_bytes(map: &[MapEntry]) -> u64 {
    map.iter()
        .filter(|entry| entry.is_ram)
        .fold(0, |sum, entry| sum.saturating_add(entry.size))
}

/// Declares the image's `main`: a function `fn(Boot) -> !` that runs with paging, stacks and exceptions set up.
///
/// Use it once, in the binary.
#[macro_export]
macro_rules! entry_point {
    ($main:path) => {
        /// Called by the entry code, once.
        #[unsafe(no_mangle)]
        extern "Rust" fn portcullis_main(boot: $crate::boot::Boot) -> ! {
            let main: fn($crate::boot::Boot) -> ! = $main;
            main(boot)
        }
    };
}

#[cfg(not(test))]
use guest_only::start;

#[cfg(not(test))]
mod guest_only {
    use core::arch::asm;

    use super::cell::BootCell;
    use super::entry::{ENTRY_TSC, START_INFO, TABLES};
    use super::start_info::{CommandLine, PhysicalMemory, parse};
    use super::{Boot, image, page_tables, traps};
    use crate::memory::ADDRESS_LIMIT;
    use crate::shutdown::die;

    unsafe extern "Rust" {
        /// Defined by [`crate::entry_point!`].
        fn portcullis_main(boot: Boot) -> !;
    }

    /// Guest-physical memory through the identity map.
    struct Identity;

    impl PhysicalMemory for Identity {
        fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()> {
            let end = address.checked_add(buffer.len() as u64)?;
            // Page 0 is still there, and `qemu -kernel` uses it. Address 0 itself means "none" everywhere.
            if address == 0 || end > ADDRESS_LIMIT {
                return None;
            }
            let mut source: *const u8 =
                core::ptr::with_exposed_provenance(usize::try_from(address).ok()?);
            for byte in buffer {
                // SAFETY: mapped; where there is no memory, all ones are read. Nothing writes it meanwhile.
                *byte = unsafe { source.read_volatile() };
                source = source.wrapping_add(1);
            }
            Some(())
        }
    }

    /// The first Rust function: sets up tables, reads the start info and calls `main`.
    pub(super) extern "C" fn start() -> ! {
        // SAFETY: once, at boot, and the tables are sealed only below.
        unsafe { traps::install() };
        // SAFETY: written by the entry code before this, and never again.
        let entry_tsc = unsafe { ENTRY_TSC.get().read() };
        // SAFETY: as above.
        let address = unsafe { START_INFO.get().read() };
        let info = match parse(&Identity, u64::from(address)) {
            Ok(info) => info,
            Err(error) => die(format_args!(
                "\nportcullis: no usable PVH start info at {address:#x}: {error}"
            )),
        };
        seal();
        let Some(image) = image::region() else {
            die(format_args!("\nportcullis: the image has no extent"))
        };
        static COMMAND_LINE: BootCell<CommandLine> = BootCell::new(CommandLine::new());
        let line = COMMAND_LINE.get();
        // SAFETY: this function runs once, so nothing else refers to it.
        unsafe { line.write(info.command_line.clone()) };
        // SAFETY: initialised above and never written again.
        let line = unsafe { &*line };
        // SAFETY: the builder's map of this machine; we are all that runs in it; everything is mapped to itself.
        let boot = unsafe { Boot::new(&info, line, image, entry_tsc) };
        // SAFETY: defined by `entry_point!` with this very signature.
        unsafe { portcullis_main(boot) }
    }

    /// Gives the first 2 MiB their final protection, and so makes the tables read-only.
    fn seal() {
        let tables = TABLES.get();
        // SAFETY: the static's own memory; the processor does not walk this table yet, and nothing else refers to it.
        let low = unsafe { &mut (*tables).low };
        page_tables::fill_low(low, &image::parts());
        let entry = page_tables::directory_entry((&raw const *low).expose_provenance() as u64);
        // SAFETY: only an address in the static.
        let directories = unsafe { &raw mut (*tables).directories };
        // SAFETY: the first entry of the first directory. The new mapping covers the same addresses with the rights
        // that code and data have by the linker script.
        unsafe { directories.cast::<u64>().write_volatile(entry) };
        // SAFETY: the same root again, which drops cached translations.
        unsafe {
            asm!(
                "mov {scratch}, cr3",
                "mov cr3, {scratch}",
                scratch = out(reg) _,
                options(nostack, preserves_flags),
            );
        }
    }
}
