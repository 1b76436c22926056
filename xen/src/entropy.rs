//! The seed for hash keys and port choice: 32 bytes out of what this processor has.
//!
//! Everything goes through the ChaCha20 permutation used as a sponge, so that inputs of any quality can be added in
//! any order and none can take away from the others. [`EntropyQuality`] says honestly what the seed is worth: with
//! counter jitter alone it keeps two boots apart, and does not keep a secret.
//!
//! Source: RFC 8439 section 2.1-2.3 for the permutation.

use crate::abi::cpuid::{CPUID_1_ECX_RDRAND, CPUID_7_EBX_RDSEED};
use crate::cpu;

/// Words of 64 bits asked for from each source.
const WORDS: usize = 8;
/// Times that a source may say "not yet" for one word.
const RETRIES: usize = 10;
/// Samples of the counter.
const SAMPLES: usize = 16;

/// What a seed is worth, worst first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum EntropyQuality {
    /// Only the time stamp counter and the wall clock: different at each boot, not secret.
    Timing,
    /// The processor's generator (RDRAND).
    Generator,
    /// The processor's entropy source itself (RDSEED).
    Source,
}

/// A seed and what it is worth.
#[derive(Clone, Debug)]
pub struct Entropy {
    /// The seed.
    pub seed: [u8; 32],
    /// What it is worth.
    pub quality: EntropyQuality,
}

/// Gathers a seed; `extra` is mixed in and adds nothing to the quality.
pub(crate) fn gather(extra: &[u64]) -> Entropy {
    let mut sponge = Sponge::new();
    let mut quality = EntropyQuality::Timing;
    for word in extra {
        sponge.absorb(*word);
    }
    let [highest_leaf, ..] = cpu::cpuid(0, 0);
    let has_rdseed = highest_leaf >= 7 && cpu::cpuid(7, 0)[1] & CPUID_7_EBX_RDSEED != 0;
    if has_rdseed {
        // SAFETY: the processor has the instruction.
        if sponge.absorb_all(|| unsafe { cpu::rdseed() }) {
            quality = EntropyQuality::Source;
        }
    }
    if quality < EntropyQuality::Source && cpu::cpuid(1, 0)[2] & CPUID_1_ECX_RDRAND != 0 {
        // SAFETY: the processor has the instruction.
        if sponge.absorb_all(|| unsafe { cpu::rdrand() }) {
            quality = EntropyQuality::Generator;
        }
    }
    if quality == EntropyQuality::Timing {
        for _ in 0..SAMPLES {
            sponge.absorb(cpu::tsc());
        }
    }
    sponge.absorb(cpu::tsc());
    Entropy {
        seed: sponge.squeeze(),
        quality,
    }
}

/// The 16 words of the permutation: the first two take input, all are permuted after each.
struct Sponge([u32; 16]);

impl Sponge {
    const fn new() -> Self {
        let mut state = [0; 16];
        // "expand 32-byte k", as in the RFC: any start that is not all zero does.
        [state[0], state[5], state[10], state[15]] =
            [0x6170_7865, 0x3320_646E, 0x7962_2D32, 0x6B20_6574];
        Self(state)
    }

    fn absorb(&mut self, word: u64) {
        let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
        self.0[1] ^= u32::from_le_bytes([a, b, c, d]);
        self.0[2] ^= u32::from_le_bytes([e, f, g, h]);
        permute(&mut self.0);
    }

    /// Absorbs [`WORDS`] words of a source. Whether it gave all of them.
    fn absorb_all(&mut self, mut source: impl FnMut() -> Option<u64>) -> bool {
        (0..WORDS).all(|_| {
            let word = (0..RETRIES).find_map(|_| source());
            if let Some(word) = word {
                self.absorb(word);
            }
            word.is_some()
        })
    }

    fn squeeze(mut self) -> [u8; 32] {
        // What was absorbed last reaches every bit of the output, and the output does not tell the state.
        permute(&mut self.0);
        let mut seed = [0; 32];
        let bytes = self.0.iter().skip(8).flat_map(|word| word.to_le_bytes());
        for (to, from) in seed.iter_mut().zip(bytes) {
            *to = from;
        }
        seed
    }
}

/// The 20 rounds of ChaCha20, without the addition of the input.
fn permute(state: &mut [u32; 16]) {
    for _ in 0..10 {
        quarter_round::<0, 4, 8, 12>(state);
        quarter_round::<1, 5, 9, 13>(state);
        quarter_round::<2, 6, 10, 14>(state);
        quarter_round::<3, 7, 11, 15>(state);
        quarter_round::<0, 5, 10, 15>(state);
        quarter_round::<1, 6, 11, 12>(state);
        quarter_round::<2, 7, 8, 13>(state);
        quarter_round::<3, 4, 9, 14>(state);
    }
}

#[expect(
    clippy::indexing_slicing,
    reason = "A, B, C and D are constants below 16, checked when compiling"
)]
fn quarter_round<const A: usize, const B: usize, const C: usize, const D: usize>(
    state: &mut [u32; 16],
) {
    const { assert!(A < 16 && B < 16 && C < 16 && D < 16) };
    state[A] = state[A].wrapping_add(state[B]);
    state[D] = (state[D] ^ state[A]).rotate_left(16);
    state[C] = state[C].wrapping_add(state[D]);
    state[B] = (state[B] ^ state[C]).rotate_left(12);
    state[A] = state[A].wrapping_add(state[B]);
    state[D] = (state[D] ^ state[A]).rotate_left(8);
    state[C] = state[C].wrapping_add(state[D]);
    state[B] = (state[B] ^ state[C]).rotate_left(7);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8439 section 2.1.1.
    #[test]
    fn quarter_round_matches_the_rfc() {
        let mut state = [0; 16];
        state[..4].copy_from_slice(&[0x1111_1111, 0x0102_0304, 0x9b8d_6f43, 0x0123_4567]);
        quarter_round::<0, 1, 2, 3>(&mut state);
        assert_eq!(
            state[..4],
            [0xea2a_92f4, 0xcb1c_f8ce, 0x4581_472e, 0x5881_c4bb]
        );
    }

    /// RFC 8439 section 2.3.2: the state before and after the 20 rounds.
    #[test]
    fn permutation_matches_the_rfc() {
        let mut state = [
            0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574, 0x0302_0100, 0x0706_0504,
            0x0b0a_0908, 0x0f0e_0d0c, 0x1312_1110, 0x1716_1514, 0x1b1a_1918, 0x1f1e_1d1c,
            0x0000_0001, 0x0900_0000, 0x4a00_0000, 0x0000_0000,
        ];
        permute(&mut state);
        let expected = [
            0x8377_78ab, 0xe238_d763, 0xa67a_e21e, 0x5950_bb2f, 0xc4f2_d0c7, 0xfc62_bb2f,
            0x8fa0_18fc, 0x3f5e_c7b7, 0x3352_71c2, 0xf294_89f3, 0xeabd_a8fc, 0x82e4_6ebd,
            0xd19c_12b4, 0xb04e_16de, 0x9e83_d0cb, 0x4e3c_50a2,
        ];
        assert_eq!(state, expected);
    }

    #[test]
    fn every_input_bit_changes_about_half_of_the_seed() {
        let seed = |word: u64| {
            let mut sponge = Sponge::new();
            sponge.absorb(word);
            sponge.absorb(1);
            sponge.squeeze()
        };
        let reference = seed(0);
        for bit in 0..64 {
            let other = seed(1 << bit);
            let differing: u32 = reference
                .iter()
                .zip(other)
                .map(|(one, two)| (one ^ two).count_ones())
                .sum();
            assert!((80..176).contains(&differing), "bit {bit}: {differing}");
        }
    }

    #[test]
    fn a_source_that_dries_up_does_not_count() {
        let mut left = 5;
        let mut sponge = Sponge::new();
        assert!(!sponge.absorb_all(|| {
            left -= 1;
            (left >= 0).then_some(0)
        }));
        let mut calls = 0;
        assert!(sponge.absorb_all(|| {
            calls += 1;
            (calls % RETRIES == 0).then_some(1)
        }));
    }

    #[test]
    fn two_seeds_of_this_machine_differ() {
        assert_ne!(gather(&[]).seed, gather(&[]).seed);
    }
}
