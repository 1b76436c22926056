//! Takes the bare Linux ELF out of a distribution's `vmlinuz`.
//!
//! Xen and libxl could unpack it themselves, but under emulation that takes
//! seconds, for dom0 and again for every guest.
//!
//! Trusted: the package, whose signature apt has checked. A file that is not
//! what it should be is an error, not a panic.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst` (`setup_sects`,
//! `payload_offset`, `payload_length`).

use std::io::Read;

use anyhow::{Context as _, Result, bail, ensure};

/// Offset of the number of 512-byte setup sectors, one byte.
const SETUP_SECTORS: usize = 0x1f1;
/// Offset of the magic number `HdrS`.
const MAGIC: usize = 0x202;
/// Offset of the payload's place after the setup sectors, 4 bytes.
const PAYLOAD_OFFSET: usize = 0x248;
/// Offset of the payload's length, 4 bytes.
const PAYLOAD_LENGTH: usize = 0x24c;

/// First bytes of an ELF file.
const ELF: &[u8] = b"\x7fELF";

/// Returns the uncompressed kernel of a `bzImage`.
///
/// # Errors
///
/// If the file is no `bzImage`, or compressed in a way that is not known here.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    let magic = image.get(MAGIC..MAGIC + 4);
    ensure!(
        magic == Some(b"HdrS".as_slice()),
        "this kernel is no bzImage"
    );
    let sectors = match image.get(SETUP_SECTORS) {
        // Zero means four, for kernels older than any we will meet.
        None | Some(0) => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + field(image, PAYLOAD_OFFSET)?;
    let len = field(image, PAYLOAD_LENGTH)?;
    let payload = image
        .get(start..start.saturating_add(len))
        .context("the kernel's payload is cut off")?;
    let kernel = decompress(payload).context("cannot unpack the kernel")?;
    ensure!(
        kernel.starts_with(ELF),
        "the kernel's payload is no ELF file"
    );
    Ok(kernel)
}

fn field(image: &[u8], offset: usize) -> Result<usize> {
    let bytes = image
        .get(offset..offset + 4)
        .context("the kernel's header is cut off")?;
    Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
}

/// Unpacks by the first bytes: gzip, xz, zstd, lz4 (its legacy frame) or plain ELF.
///
/// # Errors
///
/// If the format is another one or the data is damaged.
pub fn decompress(data: &[u8]) -> Result<Vec<u8>> {
    // All but gzip have the unpacked size appended (4 bytes), which their
    // formats know nothing of.
    let body = data.get(..data.len().saturating_sub(4)).unwrap_or_default();
    let mut out = Vec::new();
    match data {
        [0x7f, b'E', b'L', b'F', ..] => out.extend_from_slice(data),
        [0x1f, 0x8b, ..] => read_all(flate2::read::GzDecoder::new(data), &mut out)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            read_all(lzma_rust2::XzReader::new(data, false), &mut out)?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            read_all(ruzstd::decoding::StreamingDecoder::new(data)?, &mut out)?;
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            read_all(lz4_flex::frame::FrameDecoder::new(body), &mut out)?;
        }
        _ => bail!(
            "unknown compression, first bytes {:02x?}",
            data.get(..6).unwrap_or(data)
        ),
    }
    Ok(out)
}

fn read_all(mut reader: impl Read, out: &mut Vec<u8>) -> Result<()> {
    reader.read_to_end(out).context("damaged data")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        let len = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&len.to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows the payload");
        image
    }

    #[test]
    fn a_gzip_kernel_is_unpacked() {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(b"\x7fELF kernel").unwrap();
        let image = bzimage(&packer.finish().unwrap());
        assert_eq!(extract_vmlinux(&image).unwrap(), b"\x7fELF kernel");
    }

    #[test]
    fn an_lz4_kernel_is_unpacked_without_its_appended_size() {
        let block = lz4_flex::block::compress(b"\x7fELF kernel");
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend_from_slice(&block);
        payload.extend_from_slice(&11_u32.to_le_bytes());
        assert_eq!(
            extract_vmlinux(&bzimage(&payload)).unwrap(),
            b"\x7fELF kernel"
        );
    }

    #[test]
    fn other_files_are_refused() {
        assert!(extract_vmlinux(b"").is_err());
        assert!(extract_vmlinux(&bzimage(b"no known magic")).is_err());
        let mut cut = bzimage(b"\x7fELF kernel");
        cut.truncate(1044);
        assert!(extract_vmlinux(&cut).is_err());
    }
}
