//! The PVH start info: command line and memory map, copied out before anything else uses the memory.
//!
//! Written by the domain builder in dom0 into ordinary RAM. It is trusted to be true, but every length is bounded
//! and every address checked, so that a wrong one gives an error or a shorter copy.
//!
//! Source: Xen `docs/misc/pvh.pandoc`, `public/arch-x86/hvm/start_info.h`.

use crate::abi::start_info::{
    HvmMemmapEntry, HvmStartInfo, XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_START_MAGIC_VALUE,
};
use crate::memory::{MAP_ENTRIES, MapEntry, MemoryMap};
use core::fmt;
use core::mem::offset_of;

/// Bytes of command line that are kept; the rest is cut off.
pub const COMMAND_LINE_BYTES: usize = 4096;

/// The command line: printable ASCII, anything else replaced by `?`.
pub(crate) type CommandLine = heapless::String<COMMAND_LINE_BYTES>;

/// Reads guest-physical memory.
pub(crate) trait PhysicalMemory {
    /// Fills `buffer` from `address`, or does nothing and returns `None` when these bytes cannot be read.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()>;
}

/// Why a start info is unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartInfoError {
    /// The structure does not lie in readable memory.
    Unreadable,
    /// It does not start with the magic number: we were not booted as a PVH guest.
    WrongMagic(u32),
    /// Version 0 has no memory map.
    OldVersion,
    /// The memory map does not lie in readable memory, or is empty.
    NoMemoryMap,
}

impl fmt::Display for StartInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable => f.write_str("not in readable memory"),
            Self::WrongMagic(magic) => write!(f, "magic number {magic:#x}"),
            Self::OldVersion => f.write_str("version 0"),
            Self::NoMemoryMap => f.write_str("no memory map"),
        }
    }
}

/// What we keep of it.
#[derive(Debug)]
pub(crate) struct StartInfo {
    pub(crate) memory_map: MemoryMap,
    pub(crate) command_line: CommandLine,
}

/// Reads the start info at `address`. At most [`MAP_ENTRIES`] map entries are kept.
pub(crate) fn parse(
    memory: &impl PhysicalMemory,
    address: u64,
) -> Result<StartInfo, StartInfoError> {
    let mut bytes = [0; size_of::<HvmStartInfo>()];
    // Version 0 is 40 bytes long, but ends in RAM too, so that reading 56 is harmless.
    memory
        .read(address, &mut bytes)
        .ok_or(StartInfoError::Unreadable)?;
    let magic = read_u32(&bytes, offset_of!(HvmStartInfo, magic));
    if magic != XEN_HVM_START_MAGIC_VALUE {
        return Err(StartInfoError::WrongMagic(magic));
    }
    if read_u32(&bytes, offset_of!(HvmStartInfo, version)) == 0 {
        return Err(StartInfoError::OldVersion);
    }
    let memory_map = parse_memory_map(
        memory,
        read_u64(&bytes, offset_of!(HvmStartInfo, memmap_paddr)),
        read_u32(&bytes, offset_of!(HvmStartInfo, memmap_entries)),
    )?;
    let command_line = parse_command_line(
        memory,
        read_u64(&bytes, offset_of!(HvmStartInfo, cmdline_paddr)),
    );
    Ok(StartInfo {
        memory_map,
        command_line,
    })
}

fn parse_memory_map(
    memory: &impl PhysicalMemory,
    address: u64,
    entries: u32,
) -> Result<MemoryMap, StartInfoError> {
    let entries = usize::try_from(entries)
        .unwrap_or(MAP_ENTRIES)
        .min(MAP_ENTRIES);
    let mut map = MemoryMap::new();
    let mut at = address;
    for _ in 0..entries {
        let mut bytes = [0; size_of::<HvmMemmapEntry>()];
        memory
            .read(at, &mut bytes)
            .ok_or(StartInfoError::NoMemoryMap)?;
        let entry = MapEntry {
            address: read_u64(&bytes, offset_of!(HvmMemmapEntry, addr)),
            size: read_u64(&bytes, offset_of!(HvmMemmapEntry, size)),
            is_ram: read_u32(&bytes, offset_of!(HvmMemmapEntry, kind)) == XEN_HVM_MEMMAP_TYPE_RAM,
        };
        // Cannot be full: both are bounded by the same number.
        let _ = map.push(entry);
        at = at.saturating_add(size_of::<HvmMemmapEntry>() as u64);
    }
    if map.is_empty() {
        return Err(StartInfoError::NoMemoryMap);
    }
    Ok(map)
}

/// Reads up to the first NUL, the end of readable memory, or [`COMMAND_LINE_BYTES`]. Address 0: none.
fn parse_command_line(memory: &impl PhysicalMemory, address: u64) -> CommandLine {
    let mut line = CommandLine::new();
    let mut at = address;
    while address != 0 && line.len() < COMMAND_LINE_BYTES {
        let mut byte = [0];
        if memory.read(at, &mut byte).is_none() || byte == [0] {
            break;
        }
        let [byte] = byte;
        let character = if matches!(byte, b' '..=b'~') {
            char::from(byte)
        } else {
            '?'
        };
        // Cannot be full: the loop's condition.
        let _ = line.push(character);
        at = at.saturating_add(1);
    }
    line
}

/// The `N` bytes at `offset`; zeros where there are none.
fn array<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array(bytes, offset))
}

fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array(bytes, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that starts at `BASE`.
    struct Image(Vec<u8>);
    const BASE: u64 = 0x17_8000;

    impl PhysicalMemory for Image {
        fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()> {
            let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
            let bytes = self.0.get(start..start.checked_add(buffer.len())?)?;
            buffer.copy_from_slice(bytes);
            Some(())
        }
    }

    /// What libxl writes for `memory=16`, with a command line: struct at 0, command line at 56, map at 96.
    fn image(command_line: &[u8]) -> Image {
        let mut bytes = Vec::new();
        for word in [0x336E_C578u32, 1, 0, 0] {
            bytes.extend(word.to_le_bytes());
        }
        for word in [0, BASE + 56, 0xFC00_8000, BASE + 96] {
            bytes.extend(word.to_le_bytes());
        }
        for word in [3u32, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(command_line);
        bytes.resize(96, 0);
        for (address, size, kind) in [
            (0u64, 16u64 << 20, 1u64),
            (0xFC00_0000, 0x9000, 3),
            (0xFEFF_8000, 0x8000, 2),
        ] {
            for word in [address, size, kind] {
                bytes.extend(word.to_le_bytes());
            }
        }
        Image(bytes)
    }

    fn patched(offset: usize, bytes: &[u8]) -> Image {
        let mut image = image(b"");
        image.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn a_builders_start_info_is_read() {
        let info = parse(&image(b"policy=deny verbose\0junk"), BASE).unwrap();
        assert_eq!(info.command_line.as_str(), "policy=deny verbose");
        assert_eq!(info.memory_map.len(), 3);
        assert_eq!(
            info.memory_map[0],
            MapEntry {
                address: 0,
                size: 16 << 20,
                is_ram: true,
            }
        );
        assert!(!info.memory_map[2].is_ram);
    }

    #[test]
    fn a_wrong_magic_and_version_zero_are_refused() {
        let wrong = patched(0, &[0xDE, 0xAD, 0xBE, 0xEF]);
        assert_eq!(
            parse(&wrong, BASE).unwrap_err(),
            StartInfoError::WrongMagic(0xEFBE_ADDE)
        );
        assert_eq!(
            parse(&patched(4, &[0]), BASE).unwrap_err(),
            StartInfoError::OldVersion
        );
        assert!(
            parse(&patched(4, &[9]), BASE).is_ok(),
            "newer versions only add to the tail"
        );
    }

    #[test]
    fn addresses_outside_memory_are_refused() {
        let image = image(b"");
        for address in [0, BASE - 1, BASE + 5000, u64::MAX - 10] {
            assert_eq!(
                parse(&image, address).unwrap_err(),
                StartInfoError::Unreadable
            );
        }
        let no_map = patched(40, &u64::MAX.to_le_bytes());
        assert_eq!(
            parse(&no_map, BASE).unwrap_err(),
            StartInfoError::NoMemoryMap
        );
        let empty_map = patched(48, &[0; 4]);
        assert_eq!(
            parse(&empty_map, BASE).unwrap_err(),
            StartInfoError::NoMemoryMap
        );
    }

    #[test]
    fn an_absurd_map_count_is_bounded() {
        let mut image = patched(48, &u32::MAX.to_le_bytes());
        assert_eq!(
            parse(&image, BASE).unwrap_err(),
            StartInfoError::NoMemoryMap,
            "the map leaves memory"
        );
        image.0.resize(100_000, 0);
        assert_eq!(parse(&image, BASE).unwrap().memory_map.len(), MAP_ENTRIES);
    }

    #[test]
    fn an_unterminated_command_line_is_cut() {
        let mut image = image(b"");
        let end = image.0.len();
        let address = BASE + end as u64;
        image.0[24..32].copy_from_slice(&address.to_le_bytes());
        image.0.extend([b'x'; 10_000]);
        let info = parse(&image, BASE).unwrap();
        assert_eq!(info.command_line.len(), COMMAND_LINE_BYTES);

        image.0.truncate(end + 7);
        let info = parse(&image, BASE).unwrap();
        assert_eq!(info.command_line.as_str(), "xxxxxxx", "memory ends first");
    }

    #[test]
    fn command_line_bytes_that_are_not_text_are_replaced() {
        let info = parse(&image(b"a\xFFb\x1b[2J\tc\0"), BASE).unwrap();
        assert_eq!(info.command_line.as_str(), "a?b?[2J?c");
        let none = patched(24, &[0; 8]);
        assert_eq!(parse(&none, BASE).unwrap().command_line.as_str(), "");
    }
}
