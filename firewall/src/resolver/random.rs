//! Numbers that an attacker who has not seen the seed cannot predict.
//!
//! Ids and ports of queries keep forged answers out, and servers see all of them. So they come from a
//! generator whose output says nothing about what follows: ChaCha with eight rounds.
//!
//! Source: RFC 8439 section 2.3 (with its 96-bit nonce as zero, and fewer rounds), Aumasson, "Too much
//! crypto" (why eight are enough).

/// Double rounds of ChaCha8.
const DOUBLE_ROUNDS: usize = 4;

/// The words `expand 32-byte k`.
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// A generator of unpredictable numbers. The same seed gives the same numbers.
pub(super) struct Random {
    key: [u32; 8],
    counter: u32,
    block: [u32; 16],
    /// Words of the block that were given out.
    used: usize,
}

/// Its state is not shown.
impl core::fmt::Debug for Random {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Random")
    }
}

impl Random {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        let (words, _) = seed.as_chunks::<4>();
        let mut key = [0; 8];
        for (word, bytes) in key.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        Self {
            key,
            counter: 0,
            block: [0; 16],
            used: 16,
        }
    }

    /// A number of 32 random bits. They begin to repeat after 2^36 of them, centuries of lookups.
    pub(super) fn next_u32(&mut self) -> u32 {
        if self.used >= self.block.len() {
            self.block = block(&self.key, self.counter, DOUBLE_ROUNDS);
            self.counter = self.counter.wrapping_add(1);
            self.used = 0;
        }
        let word = self.block.get(self.used).copied().unwrap_or(0);
        self.used += 1;
        word
    }

    /// A number of 16 random bits.
    pub(super) fn next_u16(&mut self) -> u16 {
        let [low, high, ..] = self.next_u32().to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// A number below `limit`, which should be small against 2^32; zero if `limit` is.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        u64::from(self.next_u32()).checked_rem(limit).unwrap_or(0)
    }
}

/// One block of key stream.
fn block(key: &[u32; 8], counter: u32, double_rounds: usize) -> [u32; 16] {
    let [c0, c1, c2, c3] = CONSTANTS;
    let [k0, k1, k2, k3, k4, k5, k6, k7] = *key;
    let start = [
        c0, c1, c2, c3, k0, k1, k2, k3, k4, k5, k6, k7, counter, 0, 0, 0,
    ];
    let [mut a, mut b, mut c, mut d] = [
        [c0, c1, c2, c3],
        [k0, k1, k2, k3],
        [k4, k5, k6, k7],
        [counter, 0, 0, 0],
    ];
    for _ in 0..double_rounds {
        quarter_rounds(&mut a, &mut b, &mut c, &mut d);
        // Columns become diagonals, and then columns again.
        b.rotate_left(1);
        c.rotate_left(2);
        d.rotate_left(3);
        quarter_rounds(&mut a, &mut b, &mut c, &mut d);
        b.rotate_right(1);
        c.rotate_right(2);
        d.rotate_right(3);
    }
    let mut end = start;
    for (word, mixed) in end.iter_mut().zip([a, b, c, d].into_iter().flatten()) {
        *word = word.wrapping_add(mixed);
    }
    end
}

/// The quarter round on four columns at once.
fn quarter_rounds(a: &mut [u32; 4], b: &mut [u32; 4], c: &mut [u32; 4], d: &mut [u32; 4]) {
    for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
        *a = a.wrapping_add(*b);
        *d = (*d ^ *a).rotate_left(16);
        *c = c.wrapping_add(*d);
        *b = (*b ^ *c).rotate_left(12);
        *a = a.wrapping_add(*b);
        *d = (*d ^ *a).rotate_left(8);
        *c = c.wrapping_add(*d);
        *b = (*b ^ *c).rotate_left(7);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_bytes(double_rounds: usize) -> [u8; 8] {
        let [first, second, ..] = block(&[0; 8], 0, double_rounds);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&first.to_le_bytes());
        bytes[4..].copy_from_slice(&second.to_le_bytes());
        bytes
    }

    /// RFC 8439 appendix A.1, vector 1; and the vector of eight rounds for the same key that ChaCha's
    /// implementations share.
    #[test]
    fn key_stream_is_that_of_chacha() {
        assert_eq!(
            first_bytes(10),
            [0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90]
        );
        assert_eq!(
            first_bytes(4),
            [0x3e, 0x00, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6]
        );
    }

    #[test]
    fn seeds_decide_and_blocks_differ() {
        let mut one = Random::new([1; 32]);
        let mut same = Random::new([1; 32]);
        let mut other = Random::new([2; 32]);
        let first = one.next_u32();
        assert_eq!(first, same.next_u32());
        assert_ne!(first, other.next_u32());
        let second_block = (0..16).map(|_| one.next_u32()).last();
        assert_ne!(Some(first), second_block);
        assert!((0..1000).all(|_| one.below(10) < 10));
        assert_eq!(one.below(0), 0);
    }
}
