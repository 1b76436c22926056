//! Compilation in slices, so that packets never wait for a long rule list.
//!
//! The work has three parts: expand the rules into pairs of rule and destination, sort these, build
//! the index. Each can stop anywhere and go on later.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;

use super::expand::{AddressBits, Entry, expand};
use super::heap_sort::HeapSort;
use super::index::FamilyIndex;
use super::index::Index;
use super::lines::Builder;
use super::{CompileError, CompiledRules, RuleEnvironment};
use crate::rule::{Family, RuleChain};

/// How much work one step may do, in units of about 100 instructions to a few hundred.
#[derive(Debug)]
pub(super) struct Budget(u32);

impl Budget {
    pub(super) const fn new(units: u32) -> Self {
        Self(units)
    }

    /// Takes one unit; false if there is none left.
    pub(super) fn spend(&mut self) -> bool {
        match self.0.checked_sub(1) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }
}

/// A compilation under way.
///
/// `C` is how the caller shares the chain: a reference, or an `Arc` to keep the compiler in a
/// structure of its own.
#[derive(Debug)]
pub struct Compiler<C> {
    chain: C,
    work: Work,
}

#[derive(Debug)]
enum Work {
    V4(Stage<u32>),
    V6(Stage<u128>),
}

/// What a step has achieved.
#[derive(Debug)]
pub enum Progress<C> {
    /// There is more to do.
    Working(Compiler<C>),
    /// The rules are ready.
    Done(CompiledRules),
    /// The chain cannot be compiled: refuse everything.
    Failed(CompileError),
}

impl<C: Deref<Target = RuleChain>> Compiler<C> {
    /// A budget for [`Self::step`] that keeps a step well under 100 microseconds on current machines.
    pub const STEP_BUDGET: u32 = 400;

    /// Prepares to compile `chain`.
    pub fn new(chain: C) -> Self {
        let rules = chain.rules().len();
        let work = match chain.family() {
            Family::Ipv4 => Work::V4(Stage::new(rules)),
            Family::Ipv6 => Work::V6(Stage::new(rules)),
        };
        Self { chain, work }
    }

    /// Works for at most `budget` units.
    ///
    /// The environment is read only while rules are expanded. If it changes before the compilation is
    /// done, drop the compiler and start again, or some rules see the old state and some the new one.
    pub fn step(self, environment: &RuleEnvironment<'_>, budget: u32) -> Progress<C> {
        let mut budget = Budget::new(budget);
        let chain = &*self.chain;
        let result = match self.work {
            Work::V4(stage) => stage
                .step(chain, environment, &mut budget)
                .map(|result| result.map(FamilyIndex::V4).map_err(Work::V4)),
            Work::V6(stage) => stage
                .step(chain, environment, &mut budget)
                .map(|result| result.map(FamilyIndex::V6).map_err(Work::V6)),
        };
        match result {
            Ok(Ok(index)) => Progress::Done(CompiledRules::new(chain.policy(), index)),
            Ok(Err(work)) => Progress::Working(Self { work, ..self }),
            Err(error) => Progress::Failed(error),
        }
    }

    /// Works to the end.
    ///
    /// # Errors
    ///
    /// [`CompileError`]; the caller must then refuse everything.
    pub fn finish(self, environment: &RuleEnvironment<'_>) -> Result<CompiledRules, CompileError> {
        let mut compiler = self;
        loop {
            match compiler.step(environment, u32::MAX) {
                Progress::Working(more) => compiler = more,
                Progress::Done(rules) => return Ok(rules),
                Progress::Failed(error) => return Err(error),
            }
        }
    }
}

/// The parts of the work, in order.
#[derive(Debug)]
enum Stage<A> {
    /// Rules before the position are expanded.
    Expand(usize, Vec<Entry<A>>),
    /// The entries are being sorted.
    Sort(HeapSort, Vec<Entry<A>>),
    /// The index is being built.
    Build(Box<Builder<A>>),
}

impl<A: AddressBits> Stage<A> {
    fn new(rules: usize) -> Self {
        Self::Expand(0, Vec::with_capacity(rules))
    }

    /// Works on: the finished index, or what there is to go on with.
    fn step(
        self,
        chain: &RuleChain,
        environment: &RuleEnvironment<'_>,
        budget: &mut Budget,
    ) -> Result<Result<Index<A>, Self>, CompileError> {
        let mut stage = self;
        loop {
            stage = match stage {
                Self::Expand(position, mut entries) => {
                    let Some(rule) = chain.rules().get(position) else {
                        stage = Self::Sort(HeapSort::new(entries.len()), entries);
                        continue;
                    };
                    // A rule may have many addresses; each costs about as much as a unit.
                    let before = entries.len();
                    if !budget.spend() {
                        return Ok(Err(Self::Expand(position, entries)));
                    }
                    // A chain has at most 10,000 rules.
                    let number = u16::try_from(position).unwrap_or(u16::MAX);
                    expand(rule, number, environment, &mut entries)?;
                    for _ in before..entries.len() {
                        budget.spend();
                    }
                    Self::Expand(position + 1, entries)
                }
                Self::Sort(mut sort, mut entries) => {
                    if !sort.step(&mut entries, budget) {
                        return Ok(Err(Self::Sort(sort, entries)));
                    }
                    Self::Build(Box::new(Builder::new(entries)))
                }
                Self::Build(mut builder) => {
                    if !builder.step(chain.rules(), budget) {
                        return Ok(Err(Self::Build(builder)));
                    }
                    return Ok(Ok(builder.finish()));
                }
            }
        }
    }
}
