//! See `fuzz_targets::targets::rule_text`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_targets::targets::rule_text(data);
});
