//! Capture files in and out.
//!
//! Read are pcap (both byte orders, microseconds and nanoseconds) and pcapng; written is pcap. Frames must be Ethernet and
//! whole: a capture that was cut off at a snapshot length cannot be replayed.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapTsResolution, PcapWriter};
use pcap_file::pcapng::{Block, PcapNgReader};
use pcap_file::{DataLink, Endianness};

/// The longest frame that a vif carries, in bytes (`netif.h`: a 16-bit length).
const MAX_FRAME: usize = 65_535;

/// How pcapng files begin.
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// What is written as the longest frame.
const SNAPLEN: u32 = 262_144;

const BILLION: u64 = 1_000_000_000;

/// A frame of a capture.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Captured {
    /// When it was captured, in nanoseconds since 1970.
    pub time: u64,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// A capture.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Capture {
    /// Its frames, in the order of the file.
    pub frames: Vec<Captured>,
    /// Whether time stamps have nanoseconds.
    pub nanoseconds: bool,
}

/// Reads a capture file.
///
/// # Errors
///
/// If it cannot be read, is neither pcap nor pcapng, is damaged, holds something else than Ethernet, or frames that are
/// not whole. The error names the file and the frame.
pub fn read(path: &Path) -> Result<Capture> {
    let bytes = fs::read(path).with_context(|| format!("{}", path.display()))?;
    let capture = if bytes.starts_with(&PCAPNG) {
        read_pcapng(&bytes)
    } else {
        read_pcap(&bytes)
    };
    capture.with_context(|| format!("{}", path.display()))
}

fn read_pcap(bytes: &[u8]) -> Result<Capture> {
    let room = bytes.len().max(1);
    let mut reader = PcapReader::with_capacity(bytes, room)
        .map_err(|_| anyhow!("neither a pcap nor a pcapng file"))?;
    let header = reader.header();
    check_link(header.datalink)?;
    let nanoseconds = header.ts_resolution == PcapTsResolution::NanoSecond;
    let (unit, most) = if nanoseconds {
        (1, BILLION)
    } else {
        (1000, 1_000_000)
    };
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_raw_packet() {
        let number = frames.len() + 1;
        let packet = packet.map_err(|_| anyhow!("frame {number}: the file ends in the middle"))?;
        ensure!(
            u64::from(packet.ts_frac) < most,
            "frame {number}: the time stamp makes no sense"
        );
        let time = u64::from(packet.ts_sec) * BILLION + u64::from(packet.ts_frac) * unit;
        frames.push(frame(number, time, packet.orig_len, &packet.data)?);
    }
    Ok(Capture {
        frames,
        nanoseconds,
    })
}

fn read_pcapng(bytes: &[u8]) -> Result<Capture> {
    let mut reader = PcapNgReader::with_capacity(bytes, bytes.len().max(1))
        .map_err(|error| anyhow!("a damaged pcapng file: {error}"))?;
    let mut frames = Vec::new();
    while let Some(block) = reader.next_block() {
        let number = frames.len() + 1;
        let (block, state) =
            block.map_err(|error| anyhow!("frame {number}: a damaged pcapng file: {error}"))?;
        match block {
            Block::EnhancedPacket(packet) => {
                let interface = usize::try_from(packet.interface_id)
                    .ok()
                    .and_then(|index| state.interfaces().get(index))
                    .with_context(|| format!("frame {number}: its interface is not described"))?;
                check_link(interface.linktype)?;
                let time = u64::try_from(packet.timestamp.as_nanos()).unwrap_or(u64::MAX);
                frames.push(frame(number, time, packet.original_len, &packet.data)?);
            }
            Block::Packet(_) | Block::SimplePacket(_) => {
                bail!("frame {number}: a kind of block without a usable time stamp");
            }
            _ => {}
        }
    }
    let nanoseconds = frames.iter().any(|frame| frame.time % 1000 != 0);
    Ok(Capture {
        frames,
        nanoseconds,
    })
}

fn check_link(link: DataLink) -> Result<()> {
    ensure!(
        link == DataLink::ETHERNET,
        "link type {} is not Ethernet",
        u32::from(link)
    );
    Ok(())
}

fn frame(number: usize, time: u64, on_wire: u32, bytes: &[u8]) -> Result<Captured> {
    let on_wire = usize::try_from(on_wire).unwrap_or(usize::MAX);
    ensure!(
        bytes.len() >= on_wire,
        "frame {number}: only {} of {on_wire} bytes were captured",
        bytes.len()
    );
    ensure!(
        bytes.len() <= MAX_FRAME,
        "frame {number}: {} bytes, a vif carries {MAX_FRAME} at most",
        bytes.len()
    );
    ensure!(
        u32::try_from(time / BILLION).is_ok(),
        "frame {number}: the time stamp is beyond what pcap can hold"
    );
    Ok(Captured {
        time,
        bytes: bytes.to_owned(),
    })
}

/// A capture file that is being written.
pub struct Writer(PcapWriter<BufWriter<File>>);

impl Writer {
    /// Creates the file, in place of what was there.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn create(path: &Path, nanoseconds: bool) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("{}", path.display()))?;
        let header = PcapHeader {
            snaplen: SNAPLEN,
            datalink: DataLink::ETHERNET,
            ts_resolution: if nanoseconds {
                PcapTsResolution::NanoSecond
            } else {
                PcapTsResolution::MicroSecond
            },
            endianness: Endianness::Little,
            ..PcapHeader::default()
        };
        let writer = PcapWriter::with_header(BufWriter::new(file), header);
        Ok(Self(writer.with_context(|| format!("{}", path.display()))?))
    }

    /// Appends a frame, `time` in nanoseconds since 1970.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn write(&mut self, time: u64, bytes: &[u8]) -> Result<()> {
        let len = u32::try_from(bytes.len())?;
        let packet = PcapPacket::new(Duration::from_nanos(time), len, bytes)?;
        self.0.write_packet(&packet)?;
        Ok(())
    }

    /// Writes everything out.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn finish(mut self) -> Result<()> {
        self.0.flush()?;
        self.0
            .into_inner()
            .into_inner()
            .map(drop)
            .map_err(|error| io::Error::from(error.error().kind()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one frame of three bytes at second 5 and a fraction of 7.
    fn pcap(magic: [u8; 4], little: bool) -> Vec<u8> {
        let number = |value: u32| match little {
            true => value.to_le_bytes(),
            false => value.to_be_bytes(),
        };
        let version = if little { [2, 0, 4, 0] } else { [0, 2, 0, 4] };
        let mut file = [magic, version].concat();
        for value in [0, 0, 65_535, 1, 5, 7, 3, 3] {
            file.extend(number(value));
        }
        file.extend([1, 2, 3]);
        file
    }

    #[test]
    fn every_kind_of_pcap_is_read() {
        for (magic, little, time) in [
            ([0xd4, 0xc3, 0xb2, 0xa1], true, 5_000_007_000),
            ([0xa1, 0xb2, 0xc3, 0xd4], false, 5_000_007_000),
            ([0x4d, 0x3c, 0xb2, 0xa1], true, 5_000_000_007),
            ([0xa1, 0xb2, 0x3c, 0x4d], false, 5_000_000_007),
        ] {
            let bytes = vec![1, 2, 3];
            let capture = read_pcap(&pcap(magic, little)).unwrap();
            assert_eq!(capture.frames, [Captured { time, bytes }]);
            assert_eq!(capture.nanoseconds, time % 1000 != 0);
        }
    }

    #[test]
    fn files_that_cannot_be_replayed_say_why() {
        let good = pcap([0xd4, 0xc3, 0xb2, 0xa1], true);
        let with = |position: usize, byte: u8| {
            let mut file = good.clone();
            file[position] = byte;
            file
        };
        for (file, reason) in [
            (Vec::new(), "neither a pcap nor a pcapng file"),
            (
                b"GIF89a, or whatever else".to_vec(),
                "neither a pcap nor a pcapng file",
            ),
            (with(20, 101), "link type 101 is not Ethernet"),
            (with(36, 9), "frame 1: only 3 of 9 bytes were captured"),
            (with(31, 0x77), "frame 1: the time stamp makes no sense"),
            (good[..42].to_vec(), "frame 1: the file ends in the middle"),
            (good[..30].to_vec(), "frame 1: the file ends in the middle"),
            (with(35, 0x7f), "frame 1: the file ends in the middle"),
        ] {
            assert_eq!(read_pcap(&file).unwrap_err().to_string(), reason);
        }
        assert!(read_pcap(&good[..24]).unwrap().frames.is_empty());
    }

    #[test]
    fn pcapng_is_read_in_its_own_resolution() {
        let block = |kind: u32, body: &[u8]| {
            let len = u32::try_from(body.len() + 12).unwrap().to_le_bytes();
            [&kind.to_le_bytes(), &len, body, &len].concat()
        };
        let section = [
            &0x1a2b_3c4d_u32.to_le_bytes()[..],
            &[1, 0, 0, 0],
            &[0xff; 8],
        ]
        .concat();
        // Ethernet, no snapshot length, time stamps in nanoseconds.
        let interface = [1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        let time = 5_000_000_007_u64;
        let mut packet = vec![0; 4];
        packet.extend(u32::try_from(time >> 32).unwrap().to_le_bytes());
        packet.extend(&time.to_le_bytes()[..4]);
        packet.extend([3, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 0]);
        let file = [
            block(0x0a0d_0d0a, &section),
            block(1, &interface),
            block(6, &packet),
        ]
        .concat();
        let bytes = vec![1, 2, 3];
        let capture = read_pcapng(&file).unwrap();
        assert_eq!(capture.frames, [Captured { time, bytes }]);
        assert!(read_pcapng(&file[..file.len() - 1]).is_err());
    }
}
