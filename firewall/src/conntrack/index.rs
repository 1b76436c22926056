//! The index of the flow table: from the hash of a key to the flow that has it.
//!
//! Buckets of one cache line hold twelve references, each with an eight-bit tag. A key belongs in one of
//! two buckets; the first one counts how many of its keys had to go to their second, so that a lookup
//! reads the second bucket only when that count is not zero. The size is fixed at boot: no rehashing.
//! When both buckets are full, one of their entries is moved to its other bucket; if that fails too,
//! the insertion is refused, and the caller makes room.
//!
//! Tags are compared eight at a time in one machine word. A tag matches by chance in one of 256 cases;
//! the caller compares the whole key. Twelve short tags instead of eight long ones make a bucket hold
//! half as much again, and need no vector instructions.
//!
//! An insertion tells [where](Location) the reference lies, so that a removal need not hash the key again.
//!
//! The hash is keyed (see [`crate::hash`]), tag and buckets use different parts of it. A lookup reads
//! at most two buckets, whatever clients send.

use alloc::boxed::Box;
use alloc::vec;

use crate::wire::low32;

/// References in a bucket.
const SLOTS: usize = 12;

/// Slots whose tags are compared first.
const LOW_SLOTS: u32 = 8;

/// Slots of a bucket, to count with.
const SLOT_COUNT: u32 = 12;

/// Where a reference lies, in 24 bits: the number of its bucket above four bits with that of its slot.
///
/// Known only for a reference in the first bucket of its key, because a removal from the second one must
/// tell the first; and only in the first 2^20 buckets, which is all of them up to four million flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location(u32);

impl Location {
    /// The key must be hashed to find the reference. No slot has this number.
    pub(crate) const UNKNOWN: Self = Self(0x00ff_ffff);

    #[inline(always)]
    const fn new(bucket: u32, slot: u32) -> Self {
        if bucket < 1 << 20 {
            Self(bucket << 4 | slot)
        } else {
            Self::UNKNOWN
        }
    }

    /// As a number of at most 24 bits.
    #[inline(always)]
    pub(crate) const fn to_bits(self) -> u32 {
        self.0
    }

    /// From [`Self::to_bits`].
    #[inline(always)]
    pub(crate) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// A one in every byte.
const ONES: u64 = 0x0101_0101_0101_0101;

/// The highest bit of every byte.
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// Load of the index when the table is full, in percent. Lower than what two choices can carry, so
/// that second buckets are rare: one key of fifty in a full table.
const DESIGN_LOAD: u64 = 55;

/// A flow and one of its directions: twice the entry's number, plus one for replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference(u32);

impl Reference {
    #[inline]
    pub(crate) const fn new(entry: u32, reply: bool) -> Self {
        Self(entry << 1 | reply as u32)
    }

    #[inline]
    pub(crate) const fn entry(self) -> u32 {
        self.0 >> 1
    }

    #[inline]
    pub(crate) const fn is_reply(self) -> bool {
        self.0 & 1 != 0
    }
}

/// One cache line. An empty slot has tag zero.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
struct Bucket {
    tags: [u8; SLOTS],
    /// Keys that belong here and went to their second bucket.
    overflowed: u32,
    references: [u32; SLOTS],
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// The highest bit of every byte of `tags` that equals `tag`. Bytes above the lowest one that is
/// equal may be marked too.
#[inline(always)]
const fn matching(tags: u64, tag: u8) -> u64 {
    let difference = tags ^ (ONES.wrapping_mul(tag as u64));
    difference.wrapping_sub(ONES) & !difference & HIGHS
}

impl Bucket {
    /// The tags of the first eight slots, the first one in the lowest byte, and those of the other four.
    #[inline(always)]
    fn tag_words(&self) -> (u64, u32) {
        let [a, b, c, d, e, f, g, h, rest @ ..] = self.tags;
        (
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u32::from_le_bytes(rest),
        )
    }

    /// The first slot from `from` on that may have this tag.
    #[inline(always)]
    fn slot_from(&self, tag: u8, from: u32) -> Option<u32> {
        let (low_tags, high_tags) = self.tag_words();
        if from < LOW_SLOTS {
            let marks = matching(low_tags, tag) >> (from * 8) << (from * 8);
            if marks != 0 {
                return Some(marks.trailing_zeros() >> 3);
            }
        }
        let skipped = from.saturating_sub(LOW_SLOTS) * 8;
        // The four bytes above hold no tags, and no tag is like them.
        let tags = u64::from(high_tags) | 0xffff_ffff << 32;
        let marks = (matching(tags, tag) & 0x8080_8080).checked_shr(skipped)?;
        let marks = marks << skipped;
        (marks != 0).then(|| LOW_SLOTS + (marks.trailing_zeros() >> 3))
    }

    #[inline(always)]
    fn reference(&self, slot: u32) -> Reference {
        let at = usize::try_from(slot).unwrap_or(SLOTS);
        Reference(self.references.get(at).copied().unwrap_or(0))
    }

    #[inline(always)]
    fn set(&mut self, slot: u32, tag: u8, reference: Reference) {
        let at = usize::try_from(slot).unwrap_or(SLOTS);
        if let (Some(own_tag), Some(own)) = (self.tags.get_mut(at), self.references.get_mut(at)) {
            *own_tag = tag;
            *own = reference.0;
        }
    }
}

/// Where a key belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    first: u32,
    hash: u64,
}

impl Place {
    /// Never zero. Its bits select neither of the two buckets.
    #[inline(always)]
    const fn tag(self) -> u8 {
        let [tag, ..] = self.hash.to_le_bytes();
        // The carry, without a branch.
        tag + (tag == 0) as u8
    }
}

/// The index.
#[derive(Debug)]
pub(crate) struct Index {
    buckets: Box<[Bucket]>,
    /// How many buckets there are.
    count: u32,
}

impl Index {
    /// An index for `flows` flows with two directions each.
    pub(crate) fn new(flows: u32) -> Self {
        let slots = u64::from(flows) * 2 * 100 / DESIGN_LOAD;
        let count = low32((slots / 12).clamp(2, 1 << 29)) + 1;
        let buckets = vec![Bucket::default(); usize::try_from(count).unwrap_or(2)];
        Self {
            buckets: buckets.into_boxed_slice(),
            count,
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val::<[Bucket]>(&self.buckets)
    }

    /// Where a key with this hash can be.
    #[inline(always)]
    pub(crate) fn place(&self, hash: u64) -> Place {
        Place {
            first: self.scale(low32(hash >> 32)),
            hash,
        }
    }

    /// The other bucket of a key: from bits that neither the first nor the tag is made of.
    fn second(&self, place: Place) -> u32 {
        self.scale(low32(place.hash >> 8).wrapping_mul(0x9e37_79b1))
    }

    #[inline(always)]
    const fn scale(&self, value: u32) -> u32 {
        low32((value as u64 * self.count as u64) >> 32)
    }

    #[inline(always)]
    fn bucket(&self, number: u32) -> Option<&Bucket> {
        self.buckets.get(usize::try_from(number).ok()?)
    }

    fn bucket_mut(&mut self, number: u32) -> Option<&mut Bucket> {
        self.buckets.get_mut(usize::try_from(number).ok()?)
    }

    /// The most likely reference for a key, if there is any: nearly always the right one.
    #[inline(always)]
    pub(crate) fn likely(&self, place: Place) -> Option<Reference> {
        let bucket = self.bucket(place.first)?;
        let slot = bucket.slot_from(place.tag(), 0)?;
        Some(bucket.reference(slot))
    }

    /// Whether a key that [`Self::likely`] has nothing for can be elsewhere.
    #[inline(always)]
    pub(crate) fn is_overflowed(&self, place: Place) -> bool {
        self.bucket(place.first)
            .is_some_and(|bucket| bucket.overflowed != 0)
    }

    /// Finds the reference that `is_it` recognises.
    pub(crate) fn find(
        &self,
        place: Place,
        mut is_it: impl FnMut(Reference) -> bool,
    ) -> Option<Reference> {
        let bucket = self.bucket(place.first)?;
        if let Some(found) = Self::find_in(bucket, place.tag(), &mut is_it) {
            return Some(found);
        }
        if bucket.overflowed == 0 {
            return None;
        }
        Self::find_in(self.bucket(self.second(place))?, place.tag(), &mut is_it)
    }

    fn find_in(
        bucket: &Bucket,
        tag: u8,
        is_it: &mut impl FnMut(Reference) -> bool,
    ) -> Option<Reference> {
        let mut from = 0;
        loop {
            let slot = bucket.slot_from(tag, from)?;
            let reference = bucket.reference(slot);
            if is_it(reference) {
                return Some(reference);
            }
            from = slot + 1;
        }
    }

    /// Adds a key; says where its reference lies. `hash_of` gives the hash of a reference's key, to move
    /// it to its other bucket.
    ///
    /// Returns `None` if there is no room; nothing has changed then.
    #[inline(always)]
    pub(crate) fn insert(
        &mut self,
        place: Place,
        reference: Reference,
        hash_of: impl Fn(Reference) -> u64,
    ) -> Option<Location> {
        match self.put(place.first, place, reference) {
            Some(slot) => Some(Location::new(place.first, slot)),
            None => self.insert_elsewhere(place, reference, hash_of),
        }
    }

    /// Adds a key whose first bucket is full.
    #[cold]
    #[inline(never)]
    fn insert_elsewhere(
        &mut self,
        place: Place,
        reference: Reference,
        hash_of: impl Fn(Reference) -> u64,
    ) -> Option<Location> {
        if self.put_second(place, reference) {
            return Some(Location::UNKNOWN);
        }
        if self.make_room(place.first, &hash_of)
            && let Some(slot) = self.put(place.first, place, reference)
        {
            return Some(Location::new(place.first, slot));
        }
        let second = self.second(place);
        (self.make_room(second, &hash_of) && self.put_second(place, reference))
            .then_some(Location::UNKNOWN)
    }

    fn put_second(&mut self, place: Place, reference: Reference) -> bool {
        if self.put(self.second(place), place, reference).is_none() {
            return false;
        }
        if let Some(first) = self.bucket_mut(place.first) {
            first.overflowed += 1;
        }
        true
    }

    /// Puts a reference into a free slot of a bucket; says in which.
    #[inline(always)]
    fn put(&mut self, bucket: u32, place: Place, reference: Reference) -> Option<u32> {
        let bucket = self.bucket_mut(bucket)?;
        let slot = bucket.slot_from(0, 0)?;
        bucket.set(slot, place.tag(), reference);
        Some(slot)
    }

    /// Moves one key of a full bucket to its other bucket.
    #[cold]
    fn make_room(&mut self, number: u32, hash_of: &impl Fn(Reference) -> u64) -> bool {
        for slot in 0..SLOT_COUNT {
            let Some(bucket) = self.bucket(number) else {
                return false;
            };
            let reference = bucket.reference(slot);
            let place = self.place(hash_of(reference));
            if place.first == self.second(place) {
                continue;
            }
            let moved = if place.first == number {
                self.put_second(place, reference)
            } else {
                let back = self.put(place.first, place, reference).is_some();
                if let (true, Some(first)) = (back, self.bucket_mut(place.first)) {
                    first.overflowed = first.overflowed.saturating_sub(1);
                }
                back
            };
            if moved {
                if let Some(bucket) = self.bucket_mut(number) {
                    bucket.set(slot, 0, Reference(0));
                }
                return true;
            }
        }
        false
    }

    /// Removes a reference from where it was put; false if it has moved meanwhile.
    #[inline(always)]
    pub(crate) fn remove_at(&mut self, at: Location, reference: Reference) -> bool {
        let slot = usize::try_from(at.0 & 0xf).unwrap_or(SLOTS);
        let Some(bucket) = self.bucket_mut(at.0 >> 4) else {
            return false;
        };
        match (bucket.tags.get_mut(slot), bucket.references.get(slot)) {
            (Some(tag), Some(own)) if *own == reference.0 && *tag != 0 => {
                *tag = 0;
                true
            }
            _ => false,
        }
    }

    /// Removes a key that is in the index.
    #[cold]
    pub(crate) fn remove(&mut self, place: Place, reference: Reference) {
        if self.take(place.first, place.tag(), reference) {
            return;
        }
        if self.take(self.second(place), place.tag(), reference)
            && let Some(first) = self.bucket_mut(place.first)
        {
            first.overflowed = first.overflowed.saturating_sub(1);
        }
    }

    fn take(&mut self, number: u32, tag: u8, reference: Reference) -> bool {
        let Some(bucket) = self.bucket_mut(number) else {
            return false;
        };
        let mut from = 0;
        while let Some(slot) = bucket.slot_from(tag, from) {
            if bucket.reference(slot) == reference {
                bucket.set(slot, 0, Reference(0));
                return true;
            }
            from = slot + 1;
        }
        false
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.buckets.fill(Bucket::default());
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let used = |bucket: &Bucket| bucket.tags.iter().filter(|tag| **tag != 0).count();
        self.buckets.iter().map(used).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashKey;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    fn hash(reference: Reference) -> u64 {
        HashKey::new(3, 4).hash([u64::from(reference.0)], 8 << 56)
    }

    fn present(index: &Index, reference: Reference) -> bool {
        let place = index.place(hash(reference));
        index.find(place, |found| found == reference).is_some()
    }

    #[test]
    fn takes_the_design_load_and_finds_every_key() {
        let flows = 20_000;
        let mut index = Index::new(flows);
        for number in 0..2 * flows {
            let reference = Reference(number);
            let inserted = index.insert(index.place(hash(reference)), reference, hash);
            assert!(inserted.is_some(), "{number}");
        }
        assert!((0..2 * flows).all(|number| present(&index, Reference(number))));
        assert!(!present(&index, Reference(2 * flows)));
    }

    #[test]
    fn is_empty_and_counts_no_overflow_after_everything_is_removed() {
        let mut index = Index::new(1000);
        let mut inside = alloc::vec::Vec::new();
        for number in 0..10_000 {
            let reference = Reference(number);
            if let Some(inserted) = index.insert(index.place(hash(reference)), reference, hash) {
                inside.push((reference, inserted));
            }
        }
        for (reference, at) in inside {
            // What has moved meanwhile is found by its hash.
            if !index.remove_at(at, reference) {
                index.remove(index.place(hash(reference)), reference);
            }
        }
        assert_eq!(index.len(), 0);
        assert!(index.buckets.iter().all(|bucket| bucket.overflowed == 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn behaves_as_a_set(steps in prop::collection::vec((any::<bool>(), 0_u32..200), 1..1000)) {
            let mut index = Index::new(40);
            let mut model = BTreeSet::new();
            for (insert, number) in steps {
                let reference = Reference(number);
                let place = index.place(hash(reference));
                if !insert {
                    if model.remove(&number) {
                        index.remove(place, reference);
                    }
                } else if !model.contains(&number) && index.insert(place, reference, hash).is_some() {
                    model.insert(number);
                }
                prop_assert_eq!(index.len(), model.len());
            }
            for number in 0..200 {
                prop_assert_eq!(present(&index, Reference(number)), model.contains(&number));
            }
        }
    }
}
