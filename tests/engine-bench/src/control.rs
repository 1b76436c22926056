//! The measured parts of the control plane: what packets wait for. callgrind counts each call by itself
//! (`--toggle-collect`, `--dump-after`), so that the longest one is known, too.

use std::net::IpAddr;
use std::sync::Arc;

use firewall::rule::RuleChain;
use firewall::ruleset::{CompileError, CompiledRules, Compiler, Progress};
use firewall::{Engine, Time};

use crate::rules::environment;

/// A compilation that has come somewhere.
#[derive(Debug)]
pub enum Stage {
    /// Not done.
    Working(Compiler<Arc<RuleChain>>),
    /// Done.
    Done(CompiledRules),
}

/// One slice of a compilation, as long as the kernel lets one be.
///
/// # Errors
///
/// If the rules cannot be compiled.
#[inline(never)]
pub fn step(compiler: Compiler<Arc<RuleChain>>) -> Result<Stage, CompileError> {
    let budget = Compiler::<Arc<RuleChain>>::STEP_BUDGET;
    match compiler.step(&environment(), budget) {
        Progress::Working(more) => Ok(Stage::Working(more)),
        Progress::Done(rules) => Ok(Stage::Done(rules)),
        Progress::Failed(error) => Err(error),
    }
}

/// Puts rules in force; drops the ones before.
#[inline(never)]
pub fn replace(engine: &mut Engine, address: IpAddr, rules: CompiledRules) {
    engine.set_rules(address, rules);
}

/// What the main loop does about expiry in one iteration. Returns whether there is more to do at once.
#[inline(never)]
pub fn tick(engine: &mut Engine, now: Time, budget: u32) -> bool {
    engine.tick(now, budget)
}
