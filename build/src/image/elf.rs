//! What an image's ELF file must be like, and how the file to ship is cut out of the linked one.
//!
//! The linker script asserts most of this for itself; here it is checked again on the result, since Xen's domain builder
//! reads nothing but this: program headers, entry and note.

use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};
use object::LittleEndian;
use object::elf::{
    EM_X86_64, ET_EXEC, FileHeader64, NoteType, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE, ProgramHeader64,
};
use object::read::elf::{FileHeader as _, ProgramHeader as _};

/// Where the image is linked to, and the end of what page tables describe page by page.
const PLACE: Range<u64> = 0x10_0000..0x20_0000;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Note type of the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
const PHYS32_ENTRY: NoteType = NoteType(18);

/// Bytes of the file header, and where its fields about other headers stand.
const HEADER_BYTES: usize = 64;
const PROGRAM_TABLE_OFFSET: usize = 32;
const SECTION_TABLE_OFFSET: usize = 40;
const SECTION_TABLE_SHAPE: Range<usize> = 58..64;
/// Where a program header says where its segment is in the file, and of what that and the address are a multiple.
const SEGMENT_OFFSET: usize = 8;
const SEGMENT_ALIGNMENT: usize = 48;
/// Of how many bytes the place of every segment in a finished image is a multiple.
const ALIGNMENT: usize = 16;

const E: LittleEndian = LittleEndian;

/// Sizes of an image in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Code: readable and executable.
    pub text: u64,
    /// Constants and the note: readable.
    pub rodata: u64,
    /// Initialised data: readable and writable, in the file.
    pub data: u64,
    /// Zeroed data, page tables and stacks: readable and writable, not in the file.
    pub bss: u64,
}

fn program_headers(file: &[u8]) -> Result<&[ProgramHeader64<LittleEndian>]> {
    let header = FileHeader64::<LittleEndian>::parse(file).context("not an ELF file of 64 bits")?;
    Ok(header.program_headers(E, file)?)
}

/// Checks an image, linked or cut, and measures it.
///
/// # Errors
///
/// Says what is wrong: a segment that is writable and executable, or misplaced; a segment of an unknown kind; a
/// missing or wrong PVH note.
pub fn examine(file: &[u8]) -> Result<Sizes> {
    let header = FileHeader64::<LittleEndian>::parse(file).context("not an ELF file of 64 bits")?;
    ensure!(
        header.e_type.get(E) == ET_EXEC && header.e_machine.get(E) == EM_X86_64,
        "not a static x86-64 executable"
    );
    let mut sizes = Sizes {
        text: 0,
        rodata: 0,
        data: 0,
        bss: 0,
    };
    let mut end = PLACE.start;
    let mut notes = Vec::new();
    for segment in program_headers(file)? {
        match segment.p_type(E) {
            PT_LOAD => {
                check_place(segment, &mut end)?;
                let in_file = segment.p_filesz(E);
                match segment.p_flags(E) {
                    flags if flags == PF_R | PF_X => sizes.text += in_file,
                    PF_R => sizes.rodata += in_file,
                    flags if flags == PF_R | PF_W => {
                        sizes.data += in_file;
                        sizes.bss += segment.p_memsz(E) - in_file;
                    }
                    flags => bail!(
                        "a segment has rights {:#b}: only RX, R and RW may be",
                        flags.0
                    ),
                }
                ensure!(
                    segment.p_flags(E).contains(PF_W) || segment.p_memsz(E) == in_file,
                    "a segment that nobody may write has bytes that are not in the file"
                );
            }
            PT_NOTE => notes.extend(entries(segment, file)?),
            other => bail!("a program header has the unexpected type {:#x}", other.0),
        }
    }
    ensure!(sizes.text > 0, "there is no code");
    let entry = header.e_entry.get(E);
    ensure!(
        notes == [entry],
        "the PVH notes name {notes:x?}, the entry is {entry:#x}"
    );
    let code = PLACE.start..PLACE.start + sizes.text;
    ensure!(
        code.contains(&entry),
        "the entry {entry:#x} is not in the code"
    );
    Ok(sizes)
}

/// Checks one segment's place; `end` is where the one before ended.
fn check_place(segment: &ProgramHeader64<LittleEndian>, end: &mut u64) -> Result<()> {
    let (start, len) = (segment.p_vaddr(E), segment.p_memsz(E));
    ensure!(
        segment.p_paddr(E) == start,
        "a segment has two addresses; every address must map to itself"
    );
    ensure!(
        start.is_multiple_of(PAGE),
        "the segment at {start:#x} does not start with a page"
    );
    ensure!(
        start >= *end,
        "the segment at {start:#x} shares a page with the one before"
    );
    ensure!(
        segment.p_filesz(E) <= len,
        "the segment at {start:#x} is longer in the file than in memory"
    );
    *end = start
        .checked_add(len)
        .and_then(|end| end.checked_next_multiple_of(PAGE))
        .filter(|end| *end <= PLACE.end)
        .with_context(|| format!("the segment at {start:#x} ends beyond {:#x}", PLACE.end))?;
    Ok(())
}

/// The entry addresses in the PVH notes of a segment.
fn entries(segment: &ProgramHeader64<LittleEndian>, file: &[u8]) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    let mut notes = segment
        .notes(E, file)?
        .context("a note segment without notes")?;
    while let Some(note) = notes.next()? {
        if note.name() == b"Xen" && note.n_type(E) == PHYS32_ENTRY {
            // Xen takes shorter ones; `qemu -kernel` reads eight bytes whatever the note says.
            let address: [u8; 8] = note
                .desc()
                .try_into()
                .context("the PVH note's address must have eight bytes")?;
            found.push(u64::from_le_bytes(address));
        }
    }
    Ok(found)
}

/// Cuts the image out of a linked file: its headers and what its segments hold, close together. No symbols, no debug
/// information, no sections.
///
/// A linker keeps every segment in pages of its own in the file too, for systems that map files. Xen's domain builder
/// copies, so what fills those pages up would only make the file longer.
///
/// # Errors
///
/// If the file is not what [`examine`] takes.
pub fn cut(linked: &[u8]) -> Result<Vec<u8>> {
    let segments = program_headers(linked)?;
    let headers = HEADER_BYTES + size_of_val(segments);
    let mut file = linked
        .get(..headers)
        .context("the file is shorter than its headers")?
        .to_vec();
    put(&mut file, PROGRAM_TABLE_OFFSET, HEADER_BYTES)?;
    put(&mut file, SECTION_TABLE_OFFSET, 0)?;
    file.get_mut(SECTION_TABLE_SHAPE)
        .context("the file is shorter than its header")?
        .fill(0);

    // Where segments that are loaded lay, and how far they moved towards the front. They come before the note.
    let mut moved: Vec<(Range<u64>, u64)> = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        let old = segment.p_offset(E);
        let bytes = segment
            .data(E, linked)
            .ok()
            .context("a segment ends beyond the file")?;
        if segment.p_type(E) == PT_LOAD {
            file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
            let distance = old.checked_sub(u64::try_from(file.len())?);
            let distance = distance.context("the segments of the file are not in order")?;
            moved.push((old..old.saturating_add(segment.p_filesz(E)), distance));
            file.extend(bytes);
        }
        let (_, distance) = moved
            .iter()
            .find(|(place, _)| place.contains(&old))
            .context("a note is in no segment that is loaded, or a segment is empty")?;
        let header = HEADER_BYTES + index * size_of_val(segment);
        put(
            &mut file,
            header + SEGMENT_OFFSET,
            usize::try_from(old - distance)?,
        )?;
        if segment.p_type(E) == PT_LOAD {
            put(&mut file, header + SEGMENT_ALIGNMENT, ALIGNMENT)?;
        }
    }
    examine(&file)?;
    Ok(file)
}

/// Overwrites a field of eight bytes in a header.
fn put(file: &mut [u8], at: usize, value: usize) -> Result<()> {
    let field = file.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    *field.context("a header ends early")? = u64::try_from(value)?.to_le_bytes();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program header: type, flags, file offset, address, bytes in file and in memory.
    type Segment = (u32, u32, u64, u64, u64, u64);

    const GOOD: [Segment; 4] = [
        (1, 5, 0x1000, 0x10_0000, 0x1800, 0x1800),
        (1, 4, 0x3000, 0x10_2000, 0x100, 0x100),
        (1, 6, 0x4000, 0x10_3000, 0x10, 0x3_0000),
        (4, 4, 0x3000, 0x10_2000, 24, 24),
    ];

    /// An ELF file with these segments, a PVH note at 0x3000, and some sections behind them.
    fn file(segments: &[Segment]) -> Vec<u8> {
        let mut file = Vec::from(*b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2u16, 62] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        for word in [0x10_0010u64, 64, 0x5000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64, 56, u16::try_from(segments.len()).unwrap(), 64, 7, 6] {
            file.extend(half.to_le_bytes());
        }
        for (kind, flags, offset, address, in_file, in_memory) in segments {
            file.extend(kind.to_le_bytes());
            file.extend(flags.to_le_bytes());
            let align = if *kind == 4 { 4 } else { 0x1000 };
            for word in [offset, address, address, in_file, in_memory, &align] {
                file.extend(word.to_le_bytes());
            }
        }
        file.resize(0x3000, 0xCC);
        for word in [4u32, 8, 18] {
            file.extend(word.to_le_bytes());
        }
        file.extend(b"Xen\0");
        file.extend(0x10_0010u64.to_le_bytes());
        file.resize(0x5400, 0xDD);
        file
    }

    fn refusal(segments: &[Segment]) -> String {
        format!("{:#}", examine(&file(segments)).unwrap_err())
    }

    #[test]
    fn a_good_image_is_measured() {
        assert_eq!(
            examine(&file(&GOOD)).unwrap(),
            Sizes {
                text: 0x1800,
                rodata: 0x100,
                data: 0x10,
                bss: 0x3_0000 - 0x10,
            }
        );
    }

    #[test]
    fn a_writable_and_executable_segment_is_refused() {
        for segment in 0..3 {
            let mut segments = GOOD;
            segments[segment].1 = 7;
            assert!(refusal(&segments).contains("rights 0b111"));
            segments[segment].1 = 3;
            assert!(refusal(&segments).contains("rights 0b11"));
        }
    }

    #[test]
    fn misplaced_segments_are_refused() {
        let with = |index: usize, change: fn(&mut Segment)| {
            let mut segments = GOOD;
            change(&mut segments[index]);
            refusal(&segments)
        };
        assert!(with(1, |segment| segment.3 = 0x10_1000).contains("shares a page"));
        assert!(with(1, |segment| segment.3 += 8).contains("start with a page"));
        assert!(with(0, |segment| segment.3 = 0x1000).contains("shares a page"));
        assert!(with(2, |segment| segment.5 = 0x10_0000).contains("ends beyond"));
        assert!(with(2, |segment| segment.5 = u64::MAX).contains("ends beyond"));
        assert!(with(0, |segment| segment.5 += 1).contains("not in the file"));
    }

    #[test]
    fn loaders_and_dynamic_segments_are_refused() {
        for kind in [2, 3, 7] {
            let mut segments = GOOD;
            segments[3].0 = kind;
            assert!(refusal(&segments).contains("unexpected type"));
        }
    }

    #[test]
    fn the_note_must_name_the_entry_in_eight_bytes() {
        let mut without = GOOD;
        without[3] = GOOD[1];
        assert!(examine(&file(&without)).is_err());
        assert!(refusal(&GOOD[..3]).contains("notes name []"));
        let mut elsewhere = file(&GOOD);
        elsewhere[0x3010] = 0x20;
        assert!(examine(&elsewhere).is_err());
        let mut short = file(&GOOD);
        short[0x3004] = 4;
        assert!(examine(&short).is_err());
    }

    #[test]
    fn a_cut_image_holds_the_segments_close_together_and_nothing_else() {
        let linked = file(&GOOD);
        let image = cut(&linked).unwrap();
        // Four program headers; segments of 0x1800, 0x100 and 0x10 bytes.
        assert_eq!(image.len(), 0x120 + 0x1800 + 0x100 + 0x10);
        assert_eq!(examine(&image).unwrap(), examine(&linked).unwrap());
        assert_eq!(image[0x120..0x1920], linked[0x1000..0x2800]);
        assert_eq!(image[0x1920..0x1A20], linked[0x3000..0x3100]);
        assert_eq!(image[0x1A20..], linked[0x4000..0x4010]);
        assert_eq!(image[40..48], [0; 8], "no section table");
        assert_eq!(image[60..64], [0; 4], "no sections, no names");
        assert_eq!(cut(&image).unwrap(), image);
        for (old, new) in program_headers(&linked)
            .unwrap()
            .iter()
            .zip(program_headers(&image).unwrap())
        {
            assert_eq!(old.data(E, &*linked), new.data(E, &*image));
            assert_eq!(
                new.p_offset(E) % new.p_align(E),
                new.p_vaddr(E) % new.p_align(E)
            );
        }
    }

    #[test]
    fn a_truncated_image_is_refused() {
        let linked = file(&GOOD);
        assert!(cut(&linked[..0x4010]).is_ok());
        let error = cut(&linked[..0x400F]).unwrap_err();
        assert!(format!("{error:#}").contains("beyond the file"));
        for len in [0, 10, 63, 64, 100] {
            assert!(cut(&linked[..len]).is_err());
        }
    }
}
