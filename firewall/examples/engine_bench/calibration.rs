//! The two loops of `performance.md` section 3, to compare machines with.

use std::hash::Hasher;
use std::hint::black_box;
use std::time::Instant;

/// Nanoseconds of one SipHash-1-3 of a word in a chain.
pub(crate) fn hash_nanos() -> f64 {
    const ROUNDS: u32 = 1_000_000;
    let start = Instant::now();
    let mut chain = 1_u64;
    for _ in 0..ROUNDS {
        let mut hasher = std::collections::hash_map::DefaultHasher::new();
        hasher.write_u64(chain);
        chain = hasher.finish();
    }
    black_box(chain);
    start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
}

/// Nanoseconds of one load that depends on the one before, over 64 MiB.
pub(crate) fn load_nanos() -> f64 {
    const ROUNDS: u32 = 1_000_000;
    let len = (64_usize << 20) / 8;
    let mut links: Vec<usize> = (0..len).collect();
    let mut x = 1_u64;
    // Sattolo's shuffle: one cycle through everything.
    for at in (1..len).rev() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        links.swap(at, usize::try_from(x >> 33).unwrap_or(0) % at);
    }
    let start = Instant::now();
    let mut at = 0;
    for _ in 0..ROUNDS {
        at = links.get(at).copied().unwrap_or(0);
    }
    black_box(at);
    start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
}
