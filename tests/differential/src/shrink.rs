//! The shortest part of a script that still shows a disagreement.

use anyhow::Result;

use crate::replay::{self, Disagreement};
use crate::rules::Tree;
use crate::script::Script;

/// Runs that shrinking may take.
const MOST_RUNS: usize = 400;

/// Leaves all flows but one out of a timed script, if that shows the disagreement too: every run of it
/// takes its time.
///
/// # Errors
///
/// If the kernel cannot be set up.
pub(crate) fn to_one_flow(script: &Script, found: Disagreement) -> Result<(Script, Disagreement)> {
    let mut trial = script.clone();
    let flow = script.steps.get(found.step).and_then(|step| step.flow);
    trial.steps.retain(|step| step.flow == flow);
    match replay::run(&trial)?.disagreement {
        Some(still) => Ok((trial, still)),
        None => Ok((script.clone(), found)),
    }
}

/// Leaves out steps and rules for as long as something disagrees.
///
/// # Errors
///
/// If the kernel cannot be set up.
pub(crate) fn shrink(script: &Script, found: Disagreement) -> Result<(Script, Disagreement)> {
    let mut best = script.clone();
    best.steps.truncate(found.step + 1);
    let mut found = found;
    let mut runs = 0;
    let mut size = best.steps.len().div_ceil(2);
    while size > 0 && runs < MOST_RUNS {
        let mut at = 0;
        let mut shorter = false;
        while at < best.steps.len() && runs < MOST_RUNS {
            let mut trial = best.clone();
            trial.steps.drain(at..(at + size).min(best.steps.len()));
            runs += 1;
            match replay::run(&trial)?.disagreement {
                Some(still) => {
                    trial.steps.truncate(still.step + 1);
                    best = trial;
                    found = still;
                    shorter = true;
                }
                None => at += size,
            }
        }
        if !shorter || size > 1 {
            size = if size == 1 {
                0
            } else {
                size.div_ceil(2).min(size - 1)
            };
        }
    }
    for tree in 0..best.world.trees.len() {
        let mut at = 0;
        while runs < MOST_RUNS {
            let mut trial = best.clone();
            match &mut trial.world.trees[tree].1 {
                Tree::Rules { rules, .. } if at < rules.len() => {
                    rules.remove(at);
                }
                _ => break,
            }
            runs += 1;
            match replay::run(&trial)?.disagreement {
                Some(still) => (best, found) = (trial, still),
                None => at += 1,
            }
        }
    }
    Ok((best, found))
}
