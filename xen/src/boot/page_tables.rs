//! Page tables: every address below 4 GiB maps to itself, and nothing is both writable and executable.
//!
//! The entry code fills the directories with 2 MiB entries, writable and not executable, but for the first, which the
//! image runs from. [`fill_low`] then describes the first 2 MiB page by page: page 0 and the stack's guards
//! absent, text executable, constants and tables read-only, the rest writable. No table changes after boot, so
//! the tables themselves end up read-only too (the processor walks them by physical address).
//!
//! Pure; activation is the entry code's.

use crate::memory::LARGE_PAGE;
use crate::page::PAGE_SIZE;

/// Entries in a table.
pub(crate) const ENTRIES: usize = 512;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// Set by the processor on first use; set in advance, which saves it the write.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

/// One page table: maps 2 MiB in pages of 4 KiB.
pub(crate) type Table = [u64; ENTRIES];

/// What may be done with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Protection {
    /// Nothing: any access faults.
    Absent,
    /// Read and execute.
    Text,
    /// Read.
    ReadOnly,
    /// Read and write.
    Data,
}

impl Protection {
    const fn entry(self, address: u64) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Text => address | PRESENT | ACCESSED,
            Self::ReadOnly => address | PRESENT | ACCESSED | NO_EXECUTE,
            Self::Data => address | PRESENT | WRITABLE | ACCESSED | DIRTY | NO_EXECUTE,
        }
    }
}

/// A range of the image with one protection, in bytes: whole pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) protection: Protection,
}

/// The protection of the page at `address`: that of the first part that it touches, else plain data.
///
/// Page 0 is never there, so that a null pointer faults.
fn protection(address: u64, parts: &[Part]) -> Protection {
    let end = address + PAGE_SIZE as u64;
    if address == 0 {
        return Protection::Absent;
    }
    parts
        .iter()
        .find(|part| part.start < end && address < part.end)
        .map_or(Protection::Data, |part| part.protection)
}

/// Fills the table of the first 2 MiB. Earlier parts win over later ones.
pub(crate) fn fill_low(table: &mut Table, parts: &[Part]) {
    for (entry, address) in table.iter_mut().zip((0..LARGE_PAGE).step_by(PAGE_SIZE)) {
        *entry = protection(address, parts).entry(address);
    }
}

/// The directory entry for a table at `address`. Rights are the table's: both must allow.
pub(crate) const fn directory_entry(address: u64) -> u64 {
    address | PRESENT | WRITABLE | ACCESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: [Part; 4] = [
        Part {
            start: 0x18_0000,
            end: 0x18_1000,
            protection: Protection::Absent,
        },
        Part {
            start: 0x10_0000,
            end: 0x14_0000,
            protection: Protection::Text,
        },
        Part {
            start: 0x14_0000,
            end: 0x15_0000,
            protection: Protection::ReadOnly,
        },
        Part {
            start: 0x15_0000,
            end: 0x19_0000,
            protection: Protection::Data,
        },
    ];

    fn filled() -> Table {
        let mut table = [u64::MAX; ENTRIES];
        fill_low(&mut table, &PARTS);
        table
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        for entry in filled() {
            let writable = entry & WRITABLE != 0;
            let executable = entry & PRESENT != 0 && entry & NO_EXECUTE == 0;
            assert!(!(writable && executable), "{entry:#x}");
        }
    }

    #[test]
    fn every_part_has_its_rights_to_the_page() {
        let table = filled();
        let flags = |address: usize| {
            let entry = table[address / 4096];
            assert!(entry == 0 || entry & 0x000F_FFFF_FFFF_F000 == address as u64);
            (
                entry & PRESENT != 0,
                entry & WRITABLE != 0,
                entry & NO_EXECUTE != 0,
            )
        };
        let (absent, data) = ((false, false, false), (true, true, true));
        let (text, constants) = ((true, false, false), (true, false, true));
        let expected = [
            (0, absent),
            (0x1000, data),
            (0xF_F000, data),
            (0x10_0000, text),
            (0x13_F000, text),
            (0x14_0000, constants),
            (0x14_F000, constants),
            (0x15_0000, data),
            (0x17_F000, data),
            (0x18_0000, absent),
            (0x18_1000, data),
            (0x1F_F000, data),
        ];
        for (address, rights) in expected {
            assert_eq!(flags(address), rights, "{address:#x}");
        }
    }

    #[test]
    fn page_zero_is_absent_whatever_the_parts_say() {
        let mut table = [0; ENTRIES];
        fill_low(
            &mut table,
            &[Part {
                start: 0,
                end: 0x1000,
                protection: Protection::Data,
            }],
        );
        assert_eq!(table[0], 0);
    }
}
