//! First match over a line of numbers: ports 0 to 65535, or ICMP types 0 to 255.
//!
//! Rules are painted in order, each only over numbers that nothing has painted yet, so a number ends
//! up with the first rule that covers it. The unpainted gaps are kept as disjoint ranges; painting a
//! range replaces each gap it meets by at most two smaller ones, so the number of steps is proportional to
//! the number of rules, however their ranges overlap.

use alloc::vec;
use alloc::vec::Vec;

use super::compile::Budget;
use super::outcome::Outcome;

/// Entries that move aside for the price of one unit of work, when one is inserted before them.
const MOVED_PER_UNIT: usize = 1024;

/// Numbers partly painted with outcomes.
///
/// Both lists are in descending order of the number that comes first in each entry: the lowest is taken off the end.
#[derive(Debug, Default)]
pub(super) struct Painter {
    /// First and last number of every gap. Disjoint.
    gaps: Vec<(u16, u16)>,
    /// First number and outcome (as bits) of every painted range. A range ends where the next one or the next gap begins.
    painted: Vec<(u16, u16)>,
}

/// Where in a descending list the first entry is that begins at `number` or below.
fn place(list: &[(u16, u16)], number: u16) -> usize {
    list.partition_point(|(start, _)| *start > number)
}

impl Painter {
    /// A line of numbers from 0 to `last`, nothing painted.
    pub(super) fn new(last: u16) -> Self {
        Self {
            gaps: vec![(0, last)],
            painted: Vec::new(),
        }
    }

    /// Whether every number is painted.
    pub(super) fn is_full(&self) -> bool {
        self.gaps.is_empty()
    }

    /// Paints what is unpainted of `first..=last`; returns whether that is all done.
    ///
    /// If the budget ends first, the same call continues the work. One unit finds and fills one gap,
    /// so any budget but none makes progress.
    pub(super) fn paint(
        &mut self,
        (first, last): (u16, u16),
        outcome: Outcome,
        budget: &mut Budget,
    ) -> bool {
        while budget.spend() {
            // Gaps are taken from the right, so that what is left of one is never met again.
            let at = place(&self.gaps, last);
            let gap = self.gaps.get(at).copied();
            let Some((start, end)) = gap.filter(|(_, end)| *end >= first) else {
                return true;
            };
            self.gaps.remove(at);
            if start < first {
                self.gaps.insert(at, (start, first - 1));
            }
            if end > last {
                self.gaps.insert(at, (last + 1, end));
            }
            let start = start.max(first);
            let at_painted = place(&self.painted, start);
            self.painted.insert(at_painted, (start, outcome.to_bits()));
            let moved = self.gaps.len() - at + self.painted.len() - at_painted;
            for _ in 0..moved / MOVED_PER_UNIT {
                budget.spend();
            }
        }
        false
    }

    /// Takes the range with the lowest numbers off the line: its first number and its outcome.
    pub(super) fn take_first(&mut self) -> Option<(u16, Outcome)> {
        let gap = self.gaps.last().map(|(start, _)| *start);
        let painted = self.painted.last().map(|(start, _)| *start);
        match (gap, painted) {
            (Some(start), painted) if painted.is_none_or(|painted| painted >= start) => {
                self.gaps.pop();
                Some((start, Outcome::NONE))
            }
            _ => {
                let (start, bits) = self.painted.pop()?;
                Some((start, Outcome::from_bits(bits)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_number_has_the_first_range_that_covers_it(
            ranges in proptest::collection::vec((0u16..256, 0u16..256), 0..40),
            slice in 1u32..4,
        ) {
            let mut painter = Painter::new(255);
            let mut expected = vec![Outcome::NONE; 256];
            for (index, &(one, other)) in ranges.iter().enumerate() {
                let range = (one.min(other), one.max(other));
                let outcome = Outcome::from_bits(u16::try_from(index).unwrap());
                while !painter.paint(range, outcome, &mut Budget::new(slice)) {}
                for number in range.0..=range.1 {
                    let slot = &mut expected[usize::from(number)];
                    *slot = (*slot).min(outcome);
                }
            }
            prop_assert_eq!(painter.is_full(), expected.iter().all(|&o| o != Outcome::NONE));
            let mut actual: Vec<Outcome> = Vec::new();
            let mut current = None;
            let mut next = painter.take_first();
            for number in 0..256u16 {
                if next.is_some_and(|(start, _)| start == number) {
                    current = next.map(|(_, outcome)| outcome);
                    next = painter.take_first();
                }
                actual.push(current.unwrap());
            }
            prop_assert_eq!(next, None);
            prop_assert_eq!(actual, expected);
        }
    }
}
