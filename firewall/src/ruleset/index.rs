//! The compiled chain and the lookup in it.

use alloc::vec::Vec;
use core::mem::size_of;
use core::net::{Ipv4Addr, Ipv6Addr};

use super::expand::AddressBits;
use super::outcome::Outcome;
use super::{CompileError, Compiler, Decision, RuleEnvironment, RuleRef, UpperLayer};
use crate::rule::{Action, Family, RuleChain};

/// A rule chain compiled for lookups. Built by [`Compiler`] or, in one go, [`CompiledRules::compile`].
#[derive(Debug)]
pub struct CompiledRules {
    policy: Action,
    index: FamilyIndex,
}

/// The index in the family of the chain.
#[derive(Debug)]
pub(super) enum FamilyIndex {
    V4(Index<u32>),
    V6(Index<u128>),
}

impl CompiledRules {
    pub(super) const fn new(policy: Action, index: FamilyIndex) -> Self {
        Self { policy, index }
    }

    /// Compiles a whole chain at once. Milliseconds for thousands of rules: while packets wait, use
    /// [`Compiler`] instead.
    ///
    /// # Errors
    ///
    /// [`CompileError`]; the caller must then refuse everything.
    pub fn compile(
        chain: &RuleChain,
        environment: &RuleEnvironment<'_>,
    ) -> Result<Self, CompileError> {
        Compiler::new(chain).finish(environment)
    }

    /// Rules that refuse everything: what a client gets whose chain cannot be read or compiled.
    pub const fn deny_all(family: Family) -> Self {
        let index = match family {
            Family::Ipv4 => FamilyIndex::V4(Index::EMPTY),
            Family::Ipv6 => FamilyIndex::V6(Index::EMPTY),
        };
        Self::new(Action::Drop, index)
    }

    /// The family of the chain.
    pub const fn family(&self) -> Family {
        match self.index {
            FamilyIndex::V4(_) => Family::Ipv4,
            FamilyIndex::V6(_) => Family::Ipv6,
        }
    }

    /// Decides a new flow to an IPv4 address. Does not allocate.
    ///
    /// The destination is the one after DNS translation (`qubes-policy.md` 2.2). An IPv6 chain has no
    /// rules about IPv4 and drops.
    #[inline]
    pub fn decide4(&self, destination: Ipv4Addr, upper: UpperLayer) -> Decision {
        match &self.index {
            FamilyIndex::V4(index) => index
                .first_match(destination.to_bits(), upper)
                .decision(self.policy),
            FamilyIndex::V6(_) => NOT_THIS_FAMILY,
        }
    }

    /// Decides a new flow to an IPv6 address. Does not allocate.
    ///
    /// An IPv4 chain has no rules about IPv6 and drops.
    #[inline]
    pub fn decide6(&self, destination: Ipv6Addr, upper: UpperLayer) -> Decision {
        match &self.index {
            FamilyIndex::V6(index) => index
                .first_match(destination.to_bits(), upper)
                .decision(self.policy),
            FamilyIndex::V4(_) => NOT_THIS_FAMILY,
        }
    }

    /// Heap memory of the compiled chain in bytes.
    pub const fn memory_bytes(&self) -> usize {
        match &self.index {
            FamilyIndex::V4(index) => index.memory_bytes(),
            FamilyIndex::V6(index) => index.memory_bytes(),
        }
    }
}

/// The answer to a question of the other family.
const NOT_THIS_FAMILY: Decision = Decision {
    action: Action::Drop,
    rule: RuleRef::Policy,
};

/// The lines of a chain by address.
#[derive(Debug)]
pub(super) struct Index<A> {
    /// Where the responsible line changes, ascending; equal addresses are possible.
    pub(super) starts: Vec<A>,
    /// The longest prefix's line before the first start, then from each start on. One more than
    /// `starts`.
    pub(super) responsible: Vec<u16>,
    /// Every line. Line 0 is the prefix of length 0; a line stands after the one around it.
    pub(super) lines: Vec<Line>,
    /// The interval lists of all lines.
    pub(super) cells: Vec<Cell>,
}

/// The rules of one destination prefix, 20 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    pub(super) tcp: Intervals,
    pub(super) udp: Intervals,
    pub(super) icmp: Intervals,
    /// For every other protocol.
    pub(super) other: Outcome,
    /// For packets whose protocol cannot be told.
    pub(super) unknown: Outcome,
    /// The earliest rule in all lines around this one.
    pub(super) best_around: Outcome,
    /// The line of the next shorter prefix around this one.
    pub(super) around: u16,
}

/// A list of intervals, 4 bytes: either one outcome for all numbers, or a place in [`Index::cells`].
///
/// The cell at that place holds the number of cells after it that belong to the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Intervals(u32);

impl Intervals {
    const CONSTANT: u32 = 1 << 31;

    /// No rule for any number.
    pub(super) const NONE: Self = Self(Self::CONSTANT | u16::MAX as u32);

    /// The same outcome for every number.
    pub(super) fn constant(outcome: Outcome) -> Self {
        Self(Self::CONSTANT | u32::from(outcome.to_bits()))
    }

    /// The list whose head is at `place` in the cells. A chain's cells are far fewer than 2^31.
    pub(super) fn at(place: usize) -> Self {
        debug_assert!(place < 1 << 31, "cells are bounded by MAX_LINES");
        Self(u32::try_from(place).unwrap_or(u32::MAX))
    }
}

/// Numbers from `start` up to the next cell have `outcome`. 4 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    /// First number; in the head of a list, the number of cells that follow.
    pub(super) start: u16,
    pub(super) outcome: Outcome,
}

impl<A> Index<A> {
    /// The index of a chain without rules: every lookup finds none.
    pub(super) const EMPTY: Self = Self {
        starts: Vec::new(),
        responsible: Vec::new(),
        lines: Vec::new(),
        cells: Vec::new(),
    };

    const fn memory_bytes(&self) -> usize {
        self.starts.capacity() * size_of::<A>()
            + self.responsible.capacity() * size_of::<u16>()
            + self.lines.capacity() * size_of::<Line>()
            + self.cells.capacity() * size_of::<Cell>()
    }

    /// The outcome that a list gives to `number`.
    #[inline]
    fn in_intervals(&self, list: Intervals, number: u16) -> Outcome {
        if list.0 & Intervals::CONSTANT != 0 {
            let [low, high, ..] = list.0.to_le_bytes();
            return Outcome::from_bits(u16::from_le_bytes([low, high]));
        }
        let cells = usize::try_from(list.0)
            .ok()
            .and_then(|place| self.cells.get(place..))
            .and_then(<[Cell]>::split_first)
            .and_then(|(head, rest)| rest.get(..usize::from(head.start)))
            .unwrap_or(&[]);
        let after = cells.partition_point(|cell| cell.start <= number);
        cells
            .get(after.wrapping_sub(1))
            .map_or(Outcome::NONE, |cell| cell.outcome)
    }
}

impl<A: AddressBits> Index<A> {
    /// The first rule that matches.
    #[inline]
    fn first_match(&self, destination: A, upper: UpperLayer) -> Outcome {
        match upper {
            UpperLayer::Tcp { port } => {
                self.outwards(destination, |line| self.in_intervals(line.tcp, port))
            }
            UpperLayer::Udp { port } => {
                self.outwards(destination, |line| self.in_intervals(line.udp, port))
            }
            UpperLayer::Icmp { icmp_type } => self.outwards(destination, |line| {
                self.in_intervals(line.icmp, u16::from(icmp_type))
            }),
            UpperLayer::Other => self.outwards(destination, |line| line.other),
            UpperLayer::Unknown => self.outwards(destination, |line| line.unknown),
        }
    }

    /// Asks every line that holds `destination`, from the longest prefix outwards, for as long as an
    /// earlier rule may be found.
    #[inline]
    fn outwards(&self, destination: A, ask: impl Fn(&Line) -> Outcome) -> Outcome {
        let piece = self.starts.partition_point(|start| *start <= destination);
        let mut next = self.responsible.get(piece).copied();
        let mut best = Outcome::NONE;
        // A line points to one before it; the outermost, which is the first, has nothing better around
        // it by construction. So the loop ends there at the latest.
        while let Some(line) = next.and_then(|line| self.lines.get(usize::from(line))) {
            best = best.min(ask(line));
            if best <= line.best_around {
                break;
            }
            next = Some(line.around);
        }
        best
    }
}
