//! Sorting in slices: heap sort that can stop after any element and go on later.
//!
//! Ten thousand rules take longer to sort than packets may wait. Heap sort needs no memory of its
//! own, has no bad inputs, and its state between two elements is one number.

use super::compile::Budget;

/// How far the sort of one slice has come.
#[derive(Clone, Copy, Debug)]
pub(super) enum HeapSort {
    /// Elements from this position on are roots of heaps; the ones before are not yet.
    Heaping(usize),
    /// Elements before this position are a heap; the ones from it on are in their final place.
    Draining(usize),
}

impl HeapSort {
    /// Starts to sort a slice of `len` elements.
    pub(super) const fn new(len: usize) -> Self {
        Self::Heaping(len / 2)
    }

    /// Sorts on, in ascending order; returns whether the slice is sorted.
    ///
    /// `items` must be the same slice at every call. One unit of the budget moves one element
    /// through at most log2(len) levels.
    pub(super) fn step<T: Copy + Ord>(&mut self, items: &mut [T], budget: &mut Budget) -> bool {
        loop {
            match *self {
                Self::Heaping(0) => *self = Self::Draining(items.len()),
                Self::Draining(0 | 1) => return true,
                Self::Heaping(_) | Self::Draining(_) if !budget.spend() => return false,
                Self::Heaping(position) => {
                    sift_down(items, position - 1);
                    *self = Self::Heaping(position - 1);
                }
                Self::Draining(end) => {
                    if let Some(heap) = items.get_mut(..end)
                        && let Some((last, rest)) = heap.split_last_mut()
                        && let Some(greatest) = rest.first_mut()
                    {
                        core::mem::swap(last, greatest);
                        sift_down(rest, 0);
                    }
                    *self = Self::Draining(end - 1);
                }
            }
        }
    }
}

/// Moves the element at `position` down until no child is greater.
fn sift_down<T: Copy + Ord>(heap: &mut [T], mut position: usize) {
    let Some(&moving) = heap.get(position) else {
        return;
    };
    loop {
        let left = 2 * position + 1;
        let Some(&left_value) = heap.get(left) else {
            break;
        };
        let (child, value) = match heap.get(left + 1) {
            Some(&right_value) if right_value > left_value => (left + 1, right_value),
            _ => (left, left_value),
        };
        if moving >= value {
            break;
        }
        if let Some(slot) = heap.get_mut(position) {
            *slot = value;
        }
        position = child;
    }
    if let Some(slot) = heap.get_mut(position) {
        *slot = moving;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sorts_like_the_standard_library_in_any_slices(
            mut items in proptest::collection::vec(any::<u16>(), 0..300),
            slice in 1u32..50,
        ) {
            let mut expected: Vec<u16> = items.clone();
            expected.sort_unstable();
            let mut sort = HeapSort::new(items.len());
            let mut steps = 0;
            while !sort.step(&mut items, &mut Budget::new(slice)) {
                steps += 1;
                prop_assert!(steps <= 2 * items.len());
            }
            prop_assert_eq!(items, expected);
        }
    }
}
