//! SipHash-1-3: a keyed hash that clients cannot predict, fast for keys of a few words.
//!
//! Flow keys are chosen by clients. With a hash they could predict they would fill single buckets of
//! the flow index, so every table that traffic fills is hashed with keys drawn at boot.
//!
//! Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (one compression round, three
//! finalisation rounds).

/// A secret key, as the state that it makes of the hash, with as much of the first round done as does
/// not depend on the message.
#[derive(Clone, Copy)]
pub(crate) struct HashKey {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

/// Keys are not shown.
impl core::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("HashKey")
    }
}

struct State {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl State {
    #[inline(always)]
    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.rotate_left(32);
    }

    /// The first round, from where [`HashKey::new`] left it.
    #[inline(always)]
    fn begin(key: &HashKey, word: u64) -> Self {
        let (mut v0, mut v1, mut v2, mut v3) = (key.v0, key.v1, key.v2, key.v3 ^ word);
        v2 = v2.wrapping_add(v3);
        v3 = v3.rotate_left(16) ^ v2;
        v2 = v2.wrapping_add(v1);
        v0 = v0.wrapping_add(v3);
        v1 = v1.rotate_left(17) ^ v2;
        v3 = v3.rotate_left(21) ^ v0;
        v2 = v2.rotate_left(32);
        v0 ^= word;
        Self { v0, v1, v2, v3 }
    }

    #[inline(always)]
    fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.v0 ^= word;
    }
}

impl HashKey {
    pub(crate) const fn new(k0: u64, k1: u64) -> Self {
        let v0 = k0 ^ 0x736f_6d65_7073_6575;
        let v1 = k1 ^ 0x646f_7261_6e64_6f6d;
        let v0 = v0.wrapping_add(v1);
        Self {
            v0: v0.rotate_left(32),
            v1: v1.rotate_left(13) ^ v0,
            v2: k0 ^ 0x6c79_6765_6e65_7261,
            v3: k1 ^ 0x7465_6462_7974_6573,
        }
    }

    /// The hash of a message of full words and a `tail` of `8 * N` to `8 * N + 7` bytes: the caller
    /// puts the bytes that are left over in the low bytes of `tail` and the length of the whole
    /// message, modulo 256, in its highest byte.
    #[inline(always)]
    pub(crate) fn hash<const N: usize>(&self, words: [u64; N], tail: u64) -> u64 {
        let mut state = match words.split_first() {
            Some((first, rest)) => {
                let mut state = State::begin(self, *first);
                for word in rest {
                    state.absorb(*word);
                }
                state.absorb(tail);
                state
            }
            None => State::begin(self, tail),
        };
        state.v2 ^= 0xff;
        state.round();
        state.round();
        state.round();
        state.v0 ^ state.v1 ^ state.v2 ^ state.v3
    }
}

/// A stream of numbers that nobody can predict without the seed. Not for keys.
#[derive(Debug)]
pub(crate) struct Random {
    key: HashKey,
    counter: u64,
}

impl Random {
    pub(crate) const fn new(key: HashKey) -> Self {
        Self { key, counter: 0 }
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        self.key.hash([self.counter], 8 << 56)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::hash::Hasher;
    use std::collections::hash_map::DefaultHasher;

    /// The standard library's default hasher is SipHash-1-3 with a zero key.
    #[test]
    fn agrees_with_the_standard_library() {
        let key = HashKey::new(0, 0);
        for seed in 0..100_u64 {
            let words = [seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), !seed];
            let tail = seed & 0xff_ffff;
            let mut reference = DefaultHasher::new();
            reference.write(&words[0].to_le_bytes());
            reference.write(&words[1].to_le_bytes());
            reference.write(&tail.to_le_bytes()[..7]);
            assert_eq!(key.hash(words, tail | 23 << 56), reference.finish());
        }
    }

    #[test]
    fn key_changes_the_hash() {
        let tail = 4 << 56 | 1;
        assert_ne!(
            HashKey::new(1, 2).hash([], tail),
            HashKey::new(1, 3).hash([], tail)
        );
    }
}
