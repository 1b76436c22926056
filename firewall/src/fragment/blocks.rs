//! The memory that fragments wait in: blocks of [`BLOCK`] bytes, chained to pieces.
//!
//! A piece is the payload of one fragment: one block or several, linked by [`Block::next`]. The block that it starts in
//! also says where in the datagram it belongs and which piece comes after it.
//!
//! Bounds: all memory is reserved at the start and nothing is allocated later. It is touched only when a block is used for
//! the first time, so that a firewall that sees few fragments neither clears nor holds it.

use alloc::vec::Vec;

use crate::wire::copy;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;

/// No block.
pub(super) const NONE: u16 = u16::MAX;

/// A block, and the piece that starts in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// The next block of the same piece, or of the free list.
    next: u16,
    /// The piece after this one.
    pub(super) next_piece: u16,
    /// Where the piece belongs in the datagram, in bytes.
    pub(super) offset: u16,
    /// Bytes of the piece.
    pub(super) len: u16,
}

/// All blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    /// The content of the blocks that were ever used, [`BLOCK`] bytes each.
    data: Vec<u8>,
    /// The same blocks' heads.
    heads: Vec<Block>,
    /// How many blocks there may be.
    capacity: u16,
    /// The first of those that were given back.
    free: u16,
    in_use: u16,
}

impl Blocks {
    /// As many blocks as fit in about `bytes` bytes, at least 256 and at most 65,534.
    pub(super) fn new(bytes: u32) -> Self {
        let wanted = usize::try_from(bytes).unwrap_or(0) / (BLOCK + size_of::<Block>());
        let count = wanted.clamp(256, usize::from(NONE) - 1);
        Self {
            data: Vec::with_capacity(count * BLOCK),
            heads: Vec::with_capacity(count),
            capacity: u16::try_from(count).unwrap_or(NONE - 1),
            free: NONE,
            in_use: 0,
        }
    }

    /// How many blocks there are.
    pub(super) const fn capacity(&self) -> u16 {
        self.capacity
    }

    /// How many of them hold nothing.
    pub(super) const fn free_count(&self) -> u16 {
        self.capacity.saturating_sub(self.in_use)
    }

    /// A block's head; `None` for [`NONE`], the end of every chain.
    pub(super) fn head(&self, number: u16) -> Option<&Block> {
        self.heads.get(usize::from(number))
    }

    pub(super) fn head_mut(&mut self, number: u16) -> Option<&mut Block> {
        self.heads.get_mut(usize::from(number))
    }

    /// Takes a block for at most [`BLOCK`] bytes and chains it behind the block `previous`, if there is one.
    fn take(&mut self, content: &[u8], previous: u16) -> Option<u16> {
        let empty = Block {
            next: NONE,
            next_piece: NONE,
            offset: 0,
            len: 0,
        };
        let number = if let Some(head) = self.heads.get_mut(usize::from(self.free)) {
            let next = core::mem::replace(head, empty).next;
            core::mem::replace(&mut self.free, next)
        } else if self.heads.len() < usize::from(self.capacity) {
            let number = u16::try_from(self.heads.len()).ok()?;
            // Both stay within the capacity that was reserved.
            self.heads.push(empty);
            self.data.resize(self.heads.len() * BLOCK, 0);
            number
        } else {
            return None;
        };
        self.in_use = self.in_use.saturating_add(1);
        let start = usize::from(number) * BLOCK;
        copy(self.data.get_mut(start..start + BLOCK)?, content);
        if let Some(head) = self.head_mut(previous) {
            head.next = number;
        }
        Some(number)
    }

    /// Copies a payload into a new piece for a place in the datagram; returns the block that it starts in.
    ///
    /// `None` if there are not enough blocks; the caller makes sure of that before, and what was taken is given back.
    pub(super) fn store(&mut self, offset: u16, payload: &[u8]) -> Option<u16> {
        let mut first = NONE;
        let mut previous = NONE;
        for chunk in payload.chunks(BLOCK) {
            let Some(number) = self.take(chunk, previous) else {
                self.give_back(first);
                return None;
            };
            if first == NONE {
                first = number;
            }
            previous = number;
        }
        let head = self.head_mut(first)?;
        head.offset = offset;
        head.len = u16::try_from(payload.len()).unwrap_or(0);
        Some(first)
    }

    /// Appends a piece's bytes; returns the piece after it.
    pub(super) fn read(&self, piece: u16, to: &mut Vec<u8>) -> u16 {
        let Some(first) = self.head(piece) else {
            return NONE;
        };
        let mut left = usize::from(first.len);
        let mut number = piece;
        while let Some(block) = self.head(number) {
            let start = usize::from(number) * BLOCK;
            let len = left.min(BLOCK);
            to.extend_from_slice(self.data.get(start..start + len).unwrap_or_default());
            left -= len;
            number = block.next;
        }
        first.next_piece
    }

    /// Gives a piece's blocks back; returns the piece after it.
    pub(super) fn give_back(&mut self, piece: u16) -> u16 {
        let next_piece = self.head(piece).map_or(NONE, |first| first.next_piece);
        let mut number = piece;
        let free = &mut self.free;
        while let Some(block) = self.heads.get_mut(usize::from(number)) {
            let next = core::mem::replace(&mut block.next, *free);
            *free = number;
            self.in_use = self.in_use.saturating_sub(1);
            number = next;
        }
        next_piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reserved_at_once_and_touched_only_when_used() {
        let mut blocks = Blocks::new(0);
        let reserved = blocks.data.capacity();
        assert!(reserved >= 256 * BLOCK);
        assert!(blocks.data.is_empty() && blocks.heads.is_empty());
        for _ in 0..3 {
            let piece = blocks.store(0, &[7; 2 * BLOCK]).unwrap();
            assert_eq!(blocks.data.len(), 2 * BLOCK);
            assert_eq!(blocks.give_back(piece), NONE);
        }
        while blocks.store(0, &[7; BLOCK]).is_some() {}
        assert_eq!(blocks.data.capacity(), reserved);
        assert_eq!(blocks.heads.len(), usize::from(blocks.capacity()));
    }

    #[test]
    fn piece_without_enough_blocks_leaves_none_taken() {
        let mut blocks = Blocks::new(0);
        let large = [1; 200 * BLOCK];
        assert!(blocks.store(0, &large).is_some());
        assert_eq!(blocks.store(0, &large), None);
        assert_eq!(blocks.free_count(), 56);
        assert!(blocks.store(0, &[2; 56 * BLOCK]).is_some());
        assert_eq!(blocks.free_count(), 0);
    }

    #[test]
    fn piece_comes_back_whole_from_blocks_that_were_used_before() {
        let mut blocks = Blocks::new(0);
        let before = blocks.store(0, &[9; 3 * BLOCK]).unwrap();
        blocks.give_back(before);
        let payload: Vec<u8> = (0..1300_u32)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let piece = blocks.store(8, &payload).unwrap();
        let mut read = Vec::new();
        assert_eq!(blocks.read(piece, &mut read), NONE);
        assert_eq!(read, payload);
        assert_eq!(blocks.head(piece).unwrap().offset, 8);
    }
}
