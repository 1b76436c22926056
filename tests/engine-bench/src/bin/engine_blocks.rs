//! W20: the engine's building blocks one by one, and W12, the cutting of large packets, which is the kernel's
//! (`kernel/src/offload.rs`). `engine_blocks BLOCK` runs one of them, checks what came of
//! it and prints how often it ran; callgrind counts `engine_blocks::measured::*`, the turn of the loop included.
//!
//! A program of its own, because a function that is called from two places may be compiled differently.

#![forbid(unsafe_code)]

use std::hint::black_box;

use std::num::NonZeroU16;

use engine_bench::Failure;
use engine_bench::workload::Plan;
use firewall::Time;
use firewall::blocks::Table;
use kernel::blocks::Large;
use xen::DomId;
use xen::fake::FakeMachine;

/// Flows in the table.
const FLOWS: u32 = 65_536;

/// Turns of the loop.
const TURNS: u32 = 4096;

/// Large packets that are cut, and the payload of a segment of theirs.
const LARGE: u32 = 64;
const MSS: u16 = 1448;

const NOW: Time = Time::from_secs(1000);

fn main() -> Result<(), Failure> {
    let name = std::env::args().nth(1).unwrap_or_default();
    if let "cut-blank" | "cut-summed" = name.as_str() {
        return cut(name == "cut-blank");
    }
    let mut table = Table::new(2 * FLOWS);
    for i in 0..FLOWS {
        table.insert(i, NOW).ok_or("no room")?;
    }
    let mut frame = vec![0x61; 1460];
    frame.splice(0..20, HEADER);
    let found = match name.as_str() {
        "hash" => measured::hash(&table),
        "lookup" => measured::look_up(&table, 0),
        "lookup-absent" => TURNS - measured::look_up(&table, FLOWS),
        "insert" => measured::insert(&mut table),
        "remove" => measured::remove(&mut table),
        "port" => measured::choose_port(&mut table, FLOWS, true),
        "port-taken" => measured::choose_port(&mut table, 0, false),
        "header-check" => measured::check(&frame),
        "checksum-update" => measured::update(),
        "checksum-1460" => measured::sum(&frame),
        _ => return Err(format!("no block {name:?}").into()),
    };
    if found != TURNS {
        return Err(format!("{name}: {found} of {TURNS} did what they should").into());
    }
    println!("{TURNS}");
    Ok(())
}

/// W12: cuts the packet of W11.
fn cut(blank: bool) -> Result<(), Failure> {
    let mut hv = FakeMachine::new().domain(DomId(1));
    let mut frame = Plan::new("gso", 1, 1, 1)?.arrivals().swap_remove(0).bytes;
    // As long as a frame can be between domains, Ethernet header included.
    frame.resize(usize::from(u16::MAX), 0x61);
    frame.splice(16..18, (u16::MAX - 14).to_be_bytes());
    let mss = NonZeroU16::new(MSS).ok_or("no payload")?;
    let large = Large::new(&mut hv, &frame, mss).ok_or("no pages")?;
    let segments = measured::cut(&large, blank);
    large.release(&mut hv);
    let expected = usize::from(u16::MAX - 14 - 40).div_ceil(usize::from(MSS));
    if segments != expected * usize::try_from(LARGE)? {
        return Err(format!("{segments} segments, not {expected} of each").into());
    }
    println!("{LARGE}");
    Ok(())
}

/// A header whose checksum is right.
const HEADER: [u8; 20] = [
    0x45, 0, 0, 0x32, 0, 1, 0x40, 0, 64, 6, 0xd3, 0x39, 10, 137, 0, 2, 93, 0, 0, 1,
];

mod measured {
    use super::{LARGE, Large, NOW, TURNS, black_box};
    use firewall::blocks::{self, Table};

    #[inline(never)]
    pub(super) fn hash(table: &Table) -> u32 {
        for i in 0..TURNS {
            black_box(table.hash(black_box(i)));
        }
        TURNS
    }

    #[inline(never)]
    pub(super) fn look_up(table: &Table, from: u32) -> u32 {
        let mut found = 0;
        for i in from..from + TURNS {
            found += u32::from(table.find(black_box(i)).is_some());
        }
        found
    }

    #[inline(never)]
    pub(super) fn insert(table: &mut Table) -> u32 {
        let mut done = 0;
        for i in super::FLOWS..super::FLOWS + TURNS {
            done += u32::from(table.insert(black_box(i), NOW).is_some());
        }
        done
    }

    #[inline(never)]
    pub(super) fn remove(table: &mut Table) -> u32 {
        for number in 0..TURNS {
            table.remove(black_box(number));
        }
        TURNS
    }

    #[inline(never)]
    pub(super) fn choose_port(table: &mut Table, from: u32, own: bool) -> u32 {
        let mut right = 0;
        for i in from..from + TURNS {
            let port = table.choose_port(black_box(i), NOW).map(u32::from);
            right += u32::from(port.is_some_and(|port| (port == 1024 + (i & 0x7fff)) == own));
        }
        right
    }

    #[inline(never)]
    pub(super) fn check(frame: &[u8]) -> u32 {
        let Some(header) = frame.first_chunk() else {
            return 0;
        };
        (0..TURNS)
            .map(|_| u32::from(blocks::header_is_right(black_box(header))))
            .sum()
    }

    #[inline(never)]
    pub(super) fn update() -> u32 {
        for i in 0..TURNS {
            black_box(blocks::update(
                black_box(0x1234),
                u64::from(black_box(i)),
                77,
            ));
        }
        TURNS
    }

    #[inline(never)]
    pub(super) fn sum(frame: &[u8]) -> u32 {
        for _ in 0..TURNS {
            black_box(blocks::field(black_box(frame)));
        }
        TURNS
    }

    #[inline(never)]
    pub(super) fn cut(large: &Large, blank: bool) -> usize {
        (0..LARGE).map(|_| black_box(large).cut(blank)).sum()
    }
}
