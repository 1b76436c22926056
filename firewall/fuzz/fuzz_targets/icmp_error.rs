//! See `fuzz_targets::targets::icmp_error`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_targets::targets::icmp_error(data);
});
