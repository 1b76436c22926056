//! The Internet checksum: sums, incremental updates, verification.
//!
//! A *sum* is a ones' complement sum that is not folded yet; a *field* is what stands in a header,
//! folded and inverted. Updates follow RFC 1624 equation 3, which never turns a right field into a
//! wrong one and leaves a wrong one wrong.
//!
//! Source: RFC 1071, RFC 1624.

use super::{low16, low32};

/// Folds a sum to sixteen bits. Zero only for a sum of nothing but zeroes.
#[inline]
pub(crate) const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    low16(low32(sum))
}

/// Adds `bytes` to a sum; an odd last byte counts as the high half of a word.
///
/// Words are added as they lie in memory, with the carry brought round: a ones' complement sum of
/// exchanged bytes is the sum with its bytes exchanged (RFC 1071 2 (B)).
pub(crate) fn add_bytes(sum: u64, bytes: &[u8]) -> u64 {
    sum.wrapping_add(u64::from(u16::from_be(fold(native_sum(bytes)))))
}

/// Whether `bytes`, checksum included, sum to all ones together with a pseudo-header that sums to
/// `pseudo`, which is below 2^48.
#[inline]
pub(crate) fn is_right(pseudo: u64, bytes: &[u8]) -> bool {
    let own = native_sum(bytes);
    let own = (own >> 32) + (own & 0xffff_ffff);
    // Exchanging bytes is multiplying by 256, as far as multiples of 0xffff do not count. All ones are
    // such a multiple, but zero, the sum of nothing but zeroes, is not all ones.
    let pseudo = if cfg!(target_endian = "little") {
        pseudo << 8
    } else {
        pseudo
    };
    let sum = pseudo + own;
    sum != 0 && sum.is_multiple_of(0xffff)
}

/// The sum of `bytes` as words of this machine's byte order.
#[inline(always)]
fn native_sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut own = 0_u64;
    for word in words {
        own = add_around(own, u64::from_ne_bytes(*word));
    }
    let rest = match rest.split_first_chunk::<4>() {
        Some((word, rest)) => {
            own = add_around(own, u64::from(u32::from_ne_bytes(*word)));
            rest
        }
        None => rest,
    };
    let last = match rest {
        [] => 0,
        [a] => u32::from_ne_bytes([*a, 0, 0, 0]),
        [a, b] => u32::from_ne_bytes([*a, *b, 0, 0]),
        [a, b, c, ..] => u32::from_ne_bytes([*a, *b, *c, 0]),
    };
    add_around(own, u64::from(last))
}

/// The ones' complement sum of two numbers.
#[inline(always)]
const fn add_around(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    // The sum is not the largest number if there was a carry.
    sum.wrapping_add(carry as u64)
}

/// The field for a sum.
#[inline]
pub(crate) const fn field(sum: u64) -> u16 {
    !fold(sum)
}

/// The change of a sum when words that sum to `old` become words that sum to `new`. Never zero.
#[inline]
pub(crate) const fn delta(old: u64, new: u64) -> u16 {
    // A multiple of 0xffff that is larger than every old sum changes nothing.
    match ((0xffff << 40) - old + new) % 0xffff {
        0 => 0xffff,
        change => low16(low32(change)),
    }
}

/// The change of a sum when both changes happen.
#[inline]
pub(crate) const fn join(first: u16, second: u16) -> u16 {
    let sum = first as u32 + second as u32;
    low16((sum >> 16) + (sum & 0xffff))
}

/// A field after a change of the sum.
#[inline]
pub(crate) const fn apply(field: u16, delta: u16) -> u16 {
    let sum = !field as u32 + delta as u32;
    let sum = (sum >> 16) + (sum & 0xffff);
    !low16(sum)
}

/// Whether a header of twenty bytes with its field in place sums to all ones.
#[inline]
pub(crate) fn header_is_right(header: &[u8; 20]) -> bool {
    // A ones' complement sum does not depend on the byte order. Sums that fold to all ones are the
    // multiples of 0xffff, but for zero, which no header with a version sums to.
    let (words, rest) = header.as_chunks::<8>();
    let sum = words
        .iter()
        .fold(0, |sum, word| add_around(sum, u64::from_ne_bytes(*word)));
    let last = rest
        .first_chunk()
        .map_or(0, |word| u32::from_ne_bytes(*word));
    add_around(sum, u64::from(last)).is_multiple_of(0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One 16-bit word at a time, with the carry brought round at once.
    fn slow_sum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn known_header_is_right() {
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8,
            0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert!(header_is_right(&header));
        assert_eq!(fold(add_bytes(0, &header)), 0xffff);
    }

    proptest! {
        #[test]
        fn sums_agree(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(fold(add_bytes(0, &bytes)), slow_sum(&bytes));
        }

        #[test]
        fn right_means_that_all_words_sum_to_ones(
            pseudo in prop_oneof![Just(0), 0_u64..1 << 40], mut bytes in prop::collection::vec(any::<u8>(), 2..100), wrong in any::<bool>()
        ) {
            bytes[0] = 0;
            bytes[1] = 0;
            let right = field(add_bytes(pseudo, &bytes)) ^ u16::from(wrong);
            bytes[..2].copy_from_slice(&right.to_be_bytes());
            prop_assert_eq!(is_right(pseudo, &bytes), fold(add_bytes(pseudo, &bytes)) == 0xffff);
            prop_assert_eq!(is_right(pseudo, &bytes), !wrong);
            bytes.fill(0);
            prop_assert!(!is_right(0, &bytes));
        }

        #[test]
        fn incremental_update_equals_full_computation(
            words in prop::collection::vec(any::<u16>(), 1..20), position in any::<prop::sample::Index>(), new in any::<u16>()
        ) {
            let total = |words: &[u16]| words.iter().map(|w| u64::from(*w)).sum::<u64>();
            let old_field = field(total(&words));
            let mut changed = words.clone();
            let at = position.index(words.len());
            let change = delta(u64::from(words[at]), u64::from(new));
            changed[at] = new;
            let updated = apply(old_field, change);
            // All words zero has two right fields.
            let full = field(total(&changed));
            prop_assert!(updated == full || (updated ^ full == 0xffff && total(&changed) == 0));
        }
    }
}
