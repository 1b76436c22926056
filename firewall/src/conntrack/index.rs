//! The index of the flow table: from the hash of a key to the flow that has it.
//!
//! Buckets of one cache line hold eight pairs of a 32-bit tag and a reference. A key belongs in one of
//! two buckets; the first one counts how many of its keys had to go to their second, so that a lookup
//! reads the second bucket only when that count is not zero. The size is fixed at boot: no rehashing.
//! When both buckets are full, one of their entries is moved to its other bucket; if that fails too,
//! the insertion is refused, and the caller makes room.
//!
//! The hash is keyed (see [`crate::hash`]), tag and buckets use different parts of it. A lookup reads
//! at most two buckets, whatever clients send.

use alloc::boxed::Box;
use alloc::vec;

use crate::wire::low32;

/// Pairs in a bucket.
const SLOTS: usize = 8;

/// References use the low bits of their word; the rest of the first one holds the overflow count.
const REFERENCE_BITS: u32 = 24;
const REFERENCE_MASK: u32 = (1 << REFERENCE_BITS) - 1;
const COUNT_ONE: u32 = 1 << REFERENCE_BITS;
const COUNT_MAX: u32 = u32::MAX >> REFERENCE_BITS;

/// Load of the index when the table is full, in percent. Lower than what two choices can carry, so
/// that second buckets are rare.
const DESIGN_LOAD: u64 = 65;

/// A flow and one of its directions: twice the entry's number, plus one for replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference(u32);

impl Reference {
    #[inline]
    pub(crate) const fn new(entry: u32, reply: bool) -> Self {
        Self((entry << 1 | reply as u32) & REFERENCE_MASK)
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
    tags: [u32; SLOTS],
    references: [u32; SLOTS],
}

impl Bucket {
    /// A bit for every slot with this tag.
    #[inline(always)]
    fn matches(&self, tag: u32) -> u32 {
        let mut mask = 0;
        for (slot, own) in self.tags.iter().enumerate() {
            mask |= u32::from(*own == tag) << slot;
        }
        mask
    }

    #[inline(always)]
    fn reference(&self, slot: usize) -> Reference {
        let bits = self.references.get(slot & (SLOTS - 1)).copied();
        Reference(bits.unwrap_or(0) & REFERENCE_MASK)
    }

    fn set(&mut self, slot: usize, tag: u32, reference: Reference) {
        if let (Some(own_tag), Some(own)) = (self.tags.get_mut(slot), self.references.get_mut(slot))
        {
            *own_tag = tag;
            *own = *own & !REFERENCE_MASK | reference.0;
        }
    }

    #[inline(always)]
    const fn overflowed(&self) -> u32 {
        self.references[0] >> REFERENCE_BITS
    }

    /// Counts a key that went to its second bucket. Saturates: a count that was lost keeps the second
    /// bucket in use for ever, which is only slower.
    fn count_up(&mut self) {
        if self.overflowed() < COUNT_MAX {
            self.references[0] += COUNT_ONE;
        }
    }

    fn count_down(&mut self) {
        if (1..COUNT_MAX).contains(&self.overflowed()) {
            self.references[0] -= COUNT_ONE;
        }
    }
}

/// The buckets and the tag of a hash.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    first: u32,
    second: u32,
    tag: u32,
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
        let count = low32((slots / 8).clamp(2, 1 << 29)) + 1;
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

    /// Where a key with this hash can be. Tag and first bucket come from different halves of it, the
    /// second bucket from both.
    #[inline(always)]
    pub(crate) fn place(&self, hash: u64) -> Place {
        let low = low32(hash);
        let high = low32(hash >> 32);
        let scale = |value: u32| low32((u64::from(value) * u64::from(self.count)) >> 32);
        Place {
            first: scale(high),
            second: scale(low.rotate_left(16) ^ high.wrapping_mul(0x9e37_79b1)),
            tag: low | 1,
        }
    }

    #[inline(always)]
    fn bucket(&self, number: u32) -> Option<&Bucket> {
        self.buckets.get(usize::try_from(number).ok()?)
    }

    fn bucket_mut(&mut self, number: u32) -> Option<&mut Bucket> {
        self.buckets.get_mut(usize::try_from(number).ok()?)
    }

    /// Finds the reference that `is_it` recognises.
    #[inline(always)]
    pub(crate) fn find(
        &self,
        place: Place,
        mut is_it: impl FnMut(Reference) -> bool,
    ) -> Option<Reference> {
        let bucket = self.bucket(place.first)?;
        if let Some(found) = Self::find_in(bucket, place.tag, &mut is_it) {
            return Some(found);
        }
        if bucket.overflowed() == 0 {
            return None;
        }
        self.find_second(place, is_it)
    }

    #[inline(always)]
    fn find_in(
        bucket: &Bucket,
        tag: u32,
        is_it: &mut impl FnMut(Reference) -> bool,
    ) -> Option<Reference> {
        let mut mask = bucket.matches(tag);
        while mask != 0 {
            let reference = bucket.reference(mask.trailing_zeros() as usize);
            if is_it(reference) {
                return Some(reference);
            }
            mask &= mask - 1;
        }
        None
    }

    #[inline(never)]
    fn find_second(
        &self,
        place: Place,
        mut is_it: impl FnMut(Reference) -> bool,
    ) -> Option<Reference> {
        Self::find_in(self.bucket(place.second)?, place.tag, &mut is_it)
    }

    /// Reads one word of the first bucket, so that it is in the cache when it is needed.
    #[inline(always)]
    pub(crate) fn touch(&self, place: Place) -> u32 {
        self.bucket(place.first).map_or(0, |bucket| bucket.tags[0])
    }

    /// Adds a key. `hash_of` gives the hash of a reference's key, to move it to its other bucket.
    ///
    /// Returns false if there is no room; nothing has changed then.
    pub(crate) fn insert(
        &mut self,
        place: Place,
        reference: Reference,
        hash_of: impl Fn(Reference) -> u64,
    ) -> bool {
        self.put_first(place, reference)
            || self.put_second(place, reference)
            || (self.make_room(place.first, &hash_of) && self.put_first(place, reference))
            || (self.make_room(place.second, &hash_of) && self.put_second(place, reference))
    }

    #[inline]
    fn put_first(&mut self, place: Place, reference: Reference) -> bool {
        self.put(place.first, place.tag, reference)
    }

    fn put_second(&mut self, place: Place, reference: Reference) -> bool {
        if !self.put(place.second, place.tag, reference) {
            return false;
        }
        if let Some(first) = self.bucket_mut(place.first) {
            first.count_up();
        }
        true
    }

    #[inline]
    fn put(&mut self, bucket: u32, tag: u32, reference: Reference) -> bool {
        let Some(bucket) = self.bucket_mut(bucket) else {
            return false;
        };
        let free = bucket.matches(0);
        if free == 0 {
            return false;
        }
        bucket.set(free.trailing_zeros() as usize, tag, reference);
        true
    }

    /// Moves one key of a full bucket to its other bucket.
    #[cold]
    fn make_room(&mut self, number: u32, hash_of: &impl Fn(Reference) -> u64) -> bool {
        for slot in 0..SLOTS {
            let Some(bucket) = self.bucket(number) else {
                return false;
            };
            let reference = bucket.reference(slot);
            let place = self.place(hash_of(reference));
            if place.first == place.second {
                continue;
            }
            let moved = if place.first == number {
                self.put_second(place, reference)
            } else if self.put_first(place, reference) {
                if let Some(first) = self.bucket_mut(place.first) {
                    first.count_down();
                }
                true
            } else {
                false
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

    /// Removes a key that is in the index.
    pub(crate) fn remove(&mut self, place: Place, reference: Reference) {
        if self.take(place.first, place.tag, reference) {
            return;
        }
        if self.take(place.second, place.tag, reference)
            && let Some(first) = self.bucket_mut(place.first)
        {
            first.count_down();
        }
    }

    fn take(&mut self, number: u32, tag: u32, reference: Reference) -> bool {
        let Some(bucket) = self.bucket_mut(number) else {
            return false;
        };
        let mut mask = bucket.matches(tag);
        while mask != 0 {
            let slot = mask.trailing_zeros() as usize;
            if bucket.reference(slot) == reference {
                bucket.set(slot, 0, Reference(0));
                return true;
            }
            mask &= mask - 1;
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
            assert!(
                index.insert(index.place(hash(reference)), reference, hash),
                "{number}"
            );
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
            if index.insert(index.place(hash(reference)), reference, hash) {
                inside.push(reference);
            }
        }
        for reference in inside {
            index.remove(index.place(hash(reference)), reference);
        }
        assert_eq!(index.len(), 0);
        assert!(index.buckets.iter().all(|bucket| bucket.overflowed() == 0));
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
                } else if !model.contains(&number) && index.insert(place, reference, hash) {
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
