//! See `fuzz_targets::targets::sequence`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_targets::targets::sequence(data);
});
