//! Where the linker put things: the symbols of `build/image/portcullis.ld`, as addresses.
//!
//! Only addresses are taken; nothing is read through these symbols.

use super::page_tables::{Part, Protection};
use crate::memory::Region;

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static stack_guard: u8;
    static exception_stack_guard: u8;
    static exception_stack_top: u8;
    static sealed_start: u8;
    static sealed_end: u8;
    static image_end: u8;
}

/// The address of a linker symbol.
macro_rules! symbol {
    ($name:ident) => {
        (&raw const $name).expose_provenance() as u64
    };
}

/// Bytes of a guard below a stack.
const GUARD: u64 = 4096;

/// The memory that the image occupies, stacks and tables included.
pub(super) fn region() -> Option<Region> {
    Region::inside(symbol!(image_start), symbol!(image_end))
}

/// The top of the stack that exceptions run on.
pub(super) fn exception_stack_top_address() -> u64 {
    symbol!(exception_stack_top)
}

/// Whether an address lies in a guard below a stack.
pub(super) fn is_in_guard(address: u64) -> bool {
    [symbol!(stack_guard), symbol!(exception_stack_guard)]
        .into_iter()
        .any(|guard| (guard..guard + GUARD).contains(&address))
}

/// The image's parts and their protection, most particular first.
pub(super) fn parts() -> [Part; 6] {
    let part = |start, end, protection| Part {
        start,
        end,
        protection,
    };
    let (guard, exception_guard) = (symbol!(stack_guard), symbol!(exception_stack_guard));
    [
        part(guard, guard + GUARD, Protection::Absent),
        part(exception_guard, exception_guard + GUARD, Protection::Absent),
        part(
            symbol!(sealed_start),
            symbol!(sealed_end),
            Protection::ReadOnly,
        ),
        part(symbol!(image_start), symbol!(text_end), Protection::Text),
        part(symbol!(text_end), symbol!(rodata_end), Protection::ReadOnly),
        part(symbol!(rodata_end), symbol!(image_end), Protection::Data),
    ]
}
