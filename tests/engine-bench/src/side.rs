//! What happens beside the measured part: the same work as in [`crate::measured`], and never counted.

use firewall::{Engine, Time, Work};

use crate::measured::BATCH;

/// Decides frames in batches; returns how many frames the engine made itself.
///
/// Not the same function as the measured one, or the compiler would make one of both.
#[inline(never)]
pub fn decide(engine: &mut Engine, work: &mut [Work<'_>], now: Time) -> usize {
    let mut made = 0;
    for batch in work.chunks_mut(BATCH) {
        engine.process_batch(batch, now);
        while let Some(frame) = engine.next_generated() {
            made += frame.bytes.len().min(1);
        }
    }
    made
}
