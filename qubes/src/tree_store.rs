//! The raw text of one firewall tree: kept compactly, shared cheaply, dropped quickly.
//!
//! A tree may have ten thousand rules. Values lie one after another in a few blocks of memory and rules
//! in one queue, so that throwing a tree away takes microseconds and packets do not wait for it. The
//! queue grows at both ends alike: dom0 writes rules in ascending order and dumps them in descending
//! order.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use firewall::rule::RuleNumber;
use litemap::LiteMap;

use crate::firewall_tree::TreeKey;

/// Largest block in bytes; at least as large as the largest value.
const MAX_BLOCK_LEN: usize = 4096;

/// Smallest block in bytes.
const MIN_BLOCK_LEN: usize = 64;

/// What a key costs besides its value, in bytes: its share of queue and map nodes, rounded up.
const KEY_COST: usize = 32;

/// A key that outlives the path it came from. Rules come first, in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OwnedKey {
    Rule(RuleNumber),
    Policy,
    Other(Box<str>),
}

impl OwnedKey {
    fn new(key: TreeKey<'_>) -> Self {
        match key {
            TreeKey::Rule(number) => Self::Rule(number),
            TreeKey::Policy => Self::Policy,
            TreeKey::Other(text) => Self::Other(Box::from(text)),
        }
    }

    pub(crate) fn as_key(&self) -> TreeKey<'_> {
        match self {
            Self::Rule(number) => TreeKey::Rule(*number),
            Self::Policy => TreeKey::Policy,
            Self::Other(text) => TreeKey::Other(text),
        }
    }
}

/// Where a value lies.
#[derive(Clone, Copy, Debug)]
struct Span {
    block: u32,
    start: u16,
    len: u16,
}

/// The keys of one tree with their values.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// In ascending order.
    rules: VecDeque<(RuleNumber, Span)>,
    /// Everything that is not a rule.
    others: LiteMap<OwnedKey, Span>,
    /// Never grown past the capacity they were made with.
    blocks: Vec<Vec<u8>>,
    /// Bytes of all blocks.
    block_bytes: usize,
    /// Bytes in blocks that no key refers to any more.
    dead_bytes: usize,
    is_incomplete: bool,
}

impl Tree {
    /// Whether a part of the tree could not be kept. Such a tree must not be enforced.
    pub const fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    /// Whether there are no keys and none were refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && !self.is_incomplete
    }

    /// The keys in order, rules first, with their values.
    pub fn iter(&self) -> impl Iterator<Item = (TreeKey<'_>, &[u8])> {
        let rules = self.rules.iter();
        let rules = rules.map(|&(number, span)| (TreeKey::Rule(number), span));
        let others = self.others.iter().map(|(key, span)| (key.as_key(), *span));
        rules
            .chain(others)
            .map(|(key, span)| (key, self.value(span)))
    }

    /// The value of one key.
    pub fn get(&self, key: TreeKey<'_>) -> Option<&[u8]> {
        let span = match key {
            TreeKey::Rule(number) => {
                let index = self.place_of(number).ok()?;
                self.rules.get(index).map(|&(_, span)| span)
            }
            other => self.others.get(&OwnedKey::new(other)).copied(),
        };
        Some(self.value(span?))
    }

    /// The first key after `previous`, or of all, with its value.
    pub(crate) fn after(&self, previous: Option<&OwnedKey>) -> Option<(OwnedKey, &[u8])> {
        let rule = match previous {
            None => self.rules.front(),
            Some(OwnedKey::Rule(number)) => {
                let next = self.rules.partition_point(|(known, _)| known <= number);
                self.rules.get(next)
            }
            Some(_) => None,
        };
        if let Some(&(number, span)) = rule {
            return Some((OwnedKey::Rule(number), self.value(span)));
        }
        // Rules come before everything else.
        let next = match previous.map(|previous| self.others.find_index(previous)) {
            None => 0,
            Some(Ok(index)) => index + 1,
            Some(Err(index)) => index,
        };
        let (key, span) = self.others.get_indexed(next)?;
        Some((key.clone(), self.value(*span)))
    }

    fn len(&self) -> usize {
        self.rules.len() + self.others.len()
    }

    /// The index of a rule, or where it would have to be.
    fn place_of(&self, number: RuleNumber) -> Result<usize, usize> {
        self.rules
            .binary_search_by_key(&number, |&(number, _)| number)
    }

    /// Memory in bytes, about.
    pub(crate) fn cost(&self) -> usize {
        self.block_bytes + self.len() * KEY_COST
    }

    /// The most that writing a value of `len` bytes adds to [`Self::cost`].
    pub(crate) fn cost_of(&self, len: usize) -> usize {
        if self.block_has_room(len) {
            KEY_COST
        } else {
            self.next_block_len(len) + KEY_COST
        }
    }

    /// Sets a key. The value is at most [`MAX_BLOCK_LEN`] bytes, or the tree becomes incomplete.
    pub(crate) fn write(&mut self, key: TreeKey<'_>, value: &[u8]) {
        self.remove(key);
        match self.store(value) {
            Some(span) => self.insert(OwnedKey::new(key), span),
            None => self.is_incomplete = true,
        }
        // A key that is written over and over again must not use up memory.
        if self.dead_bytes > MAX_BLOCK_LEN && self.dead_bytes > self.block_bytes / 2 {
            self.compact();
        }
    }

    /// Removes a key, if it is there.
    pub(crate) fn remove(&mut self, key: TreeKey<'_>) {
        let old = match key {
            TreeKey::Rule(number) => {
                let index = self.place_of(number).ok();
                index
                    .and_then(|index| self.rules.remove(index))
                    .map(|(_, span)| span)
            }
            other => self.others.remove(&OwnedKey::new(other)),
        };
        self.dead_bytes += old.map_or(0, |span| usize::from(span.len));
    }

    /// Adds a key that is not there.
    fn insert(&mut self, key: OwnedKey, span: Span) {
        match key {
            OwnedKey::Rule(number) => {
                if let Err(index) = self.place_of(number) {
                    self.rules.insert(index, (number, span));
                }
            }
            other => {
                self.others.insert(other, span);
            }
        }
    }

    /// Removes the keys below `directory`, a key with a slash at its end.
    pub(crate) fn remove_below(&mut self, directory: &str) {
        let dead_bytes = &mut self.dead_bytes;
        self.others.retain(|key, span| {
            let stays = !matches!(key, OwnedKey::Other(text) if text.starts_with(directory));
            if !stays {
                *dead_bytes += usize::from(span.len);
            }
            stays
        });
    }

    /// Notes that a key was refused.
    pub(crate) fn mark_incomplete(&mut self) {
        self.is_incomplete = true;
    }

    fn value(&self, span: Span) -> &[u8] {
        let start = usize::from(span.start);
        usize::try_from(span.block)
            .ok()
            .and_then(|block| self.blocks.get(block))
            .and_then(|block| block.get(start..start + usize::from(span.len)))
            .unwrap_or(&[])
    }

    fn block_has_room(&self, len: usize) -> bool {
        self.blocks
            .last()
            .is_some_and(|block| block.capacity() - block.len() >= len)
    }

    /// Blocks double in size, so that small trees stay small.
    fn next_block_len(&self, len: usize) -> usize {
        self.block_bytes
            .clamp(MIN_BLOCK_LEN, MAX_BLOCK_LEN)
            .max(len)
    }

    fn store(&mut self, value: &[u8]) -> Option<Span> {
        let len = u16::try_from(value.len()).ok()?;
        if value.len() > MAX_BLOCK_LEN {
            return None;
        }
        if !self.block_has_room(value.len()) {
            let block = Vec::with_capacity(self.next_block_len(value.len()));
            self.block_bytes += block.capacity();
            self.blocks.push(block);
        }
        let index = self.blocks.len().checked_sub(1)?;
        let block = self.blocks.get_mut(index)?;
        let start = u16::try_from(block.len()).ok()?;
        block.extend_from_slice(value);
        Some(Span {
            block: u32::try_from(index).ok()?,
            start,
            len,
        })
    }

    fn compact(&mut self) {
        let old = core::mem::take(self);
        self.is_incomplete = old.is_incomplete;
        let mut previous = None;
        while let Some((key, value)) = old.after(previous.as_ref()) {
            if let Some(span) = self.store(value) {
                self.insert(key.clone(), span);
            }
            previous = Some(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::String;
    use std::vec;

    fn rule(number: u16) -> TreeKey<'static> {
        TreeKey::Rule(RuleNumber::new(number).unwrap())
    }

    #[test]
    fn rules_come_in_order_before_everything_else() {
        let mut tree = Tree::default();
        for key in ["policy", "0002", "zzz", "0001/x", "0001"] {
            tree.write(TreeKey::new(key), key.as_bytes());
        }
        let values: Vec<&[u8]> = tree.iter().map(|(_, value)| value).collect();
        let expected: [&[u8]; 5] = [b"0001", b"0002", b"policy", b"0001/x", b"zzz"];
        assert_eq!(values, expected);
    }

    #[test]
    fn writing_one_key_for_ever_takes_bounded_memory() {
        let mut tree = Tree::default();
        for length in 0..3000 {
            tree.write(rule(1), &vec![b'x'; length % 3071]);
            assert!(tree.cost() < 8 * MAX_BLOCK_LEN, "{}", tree.cost());
        }
        assert_eq!(tree.get(rule(1)).map(<[u8]>::len), Some(2999));
    }

    #[test]
    fn value_that_does_not_fit_a_block_marks_the_tree() {
        let mut tree = Tree::default();
        tree.write(rule(1), &[b'x'; MAX_BLOCK_LEN]);
        assert!(!tree.is_incomplete());
        tree.write(rule(2), &[b'x'; MAX_BLOCK_LEN + 1]);
        assert!(tree.is_incomplete());
        assert_eq!(tree.get(rule(2)), None);
    }

    proptest! {
        #[test]
        fn tree_holds_what_a_plain_map_holds(
            operations in proptest::collection::vec(
                (0u16..12, proptest::option::of(0usize..3000)),
                0..60,
            ),
        ) {
            let mut tree = Tree::default();
            let mut map = std::collections::BTreeMap::new();
            for (index, (number, write)) in operations.into_iter().enumerate() {
                match write {
                    Some(len) => {
                        let value = vec![u8::try_from(index).unwrap(); len];
                        let before = tree.cost();
                        let bound = tree.cost_of(len);
                        tree.write(rule(number), &value);
                        prop_assert!(tree.cost() <= before + bound);
                        map.insert(number, value);
                    }
                    None => {
                        tree.remove(rule(number));
                        map.remove(&number);
                    }
                }
            }
            let mut actual = Vec::new();
            let mut previous = None;
            while let Some((key, value)) = tree.after(previous.as_ref()) {
                let OwnedKey::Rule(number) = key else {
                    panic!("{key:?}");
                };
                actual.push((number.get(), Vec::from(value)));
                previous = Some(key);
            }
            prop_assert_eq!(actual, map.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn removing_a_directory_leaves_its_siblings(
            keys in proptest::collection::vec("[ab]/?[ab]?/?[ab]?", 0..10),
        ) {
            let mut tree = Tree::default();
            for key in &keys {
                tree.write(TreeKey::new(key), b"");
            }
            tree.remove_below("a/");
            let mut expected: Vec<&String> =
                keys.iter().filter(|key| !key.starts_with("a/")).collect();
            expected.sort();
            expected.dedup();
            let mut left = Vec::new();
            for (key, _) in tree.iter() {
                let TreeKey::Other(text) = key else { panic!("{key:?}") };
                left.push(text);
            }
            prop_assert_eq!(left, expected);
        }
    }
}
