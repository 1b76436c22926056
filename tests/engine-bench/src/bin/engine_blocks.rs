//! W20: the engine's building blocks one by one. `engine_blocks BLOCK` runs one of them, checks what came of
//! it and prints how often it ran; callgrind counts `engine_blocks::measured::*`, the turn of the loop included.
//!
//! A program of its own, because a function that is called from two places may be compiled differently.

#![forbid(unsafe_code)]

use std::hint::black_box;

use engine_bench::Failure;
use firewall::Time;
use firewall::blocks::Table;

/// Flows in the table.
const FLOWS: u32 = 65_536;

/// Turns of the loop.
const TURNS: u32 = 4096;

const NOW: Time = Time::from_secs(1000);

fn main() -> Result<(), Failure> {
    let name = std::env::args().nth(1).unwrap_or_default();
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

/// A header whose checksum is right.
const HEADER: [u8; 20] = [
    0x45, 0, 0, 0x32, 0, 1, 0x40, 0, 64, 6, 0xd3, 0x39, 10, 137, 0, 2, 93, 0, 0, 1,
];

mod measured {
    use super::{NOW, TURNS, black_box};
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
}
