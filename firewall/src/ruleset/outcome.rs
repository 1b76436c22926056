//! The result of a lookup in 16 bits: which rule matched, and what it does.

use super::{Decision, RuleRef};
use crate::rule::{Action, Rule, RuleNumber};

/// A matching rule, or none. Earlier rules compare as less; no rule is greater than all.
///
/// Twice the rule number, plus one if the rule drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Outcome(u16);

impl Outcome {
    /// No rule matches.
    pub(super) const NONE: Self = Self(u16::MAX);

    /// The outcome when `rule` is the first to match.
    pub(super) fn of(rule: &Rule) -> Self {
        // A rule number is below 10,000: no overflow, and never equal to `NONE`.
        Self(rule.number.get() << 1 | u16::from(rule.action == Action::Drop))
    }

    /// The representation, for tables.
    pub(super) const fn to_bits(self) -> u16 {
        self.0
    }

    /// The outcome with this representation.
    pub(super) const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The decision that this outcome stands for in a chain with `policy`.
    #[inline]
    pub(super) fn decision(self, policy: Action) -> Decision {
        match RuleNumber::new(self.0 >> 1) {
            Some(number) => Decision {
                action: if self.0 & 1 == 0 {
                    Action::Accept
                } else {
                    Action::Drop
                },
                rule: RuleRef::Number(number),
            },
            None => Decision {
                action: policy,
                rule: RuleRef::Policy,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Destination, Traffic};

    fn rule(number: u16, action: Action) -> Rule {
        Rule {
            number: RuleNumber::new(number).unwrap(),
            action,
            destination: Destination::Any,
            traffic: Traffic::Any,
        }
    }

    #[test]
    fn outcome_keeps_number_and_action() {
        for (number, action) in [(0, Action::Accept), (0, Action::Drop), (9999, Action::Drop)] {
            let decision = Outcome::of(&rule(number, action)).decision(Action::Accept);
            assert_eq!(decision.action, action);
            assert_eq!(
                decision.rule,
                RuleRef::Number(RuleNumber::new(number).unwrap())
            );
        }
    }

    #[test]
    fn earlier_rules_are_less_and_no_rule_is_greatest() {
        let early = Outcome::of(&rule(4, Action::Drop));
        let late = Outcome::of(&rule(5, Action::Accept));
        assert!(early < late && late < Outcome::NONE);
        assert_eq!(Outcome::NONE.decision(Action::Drop).rule, RuleRef::Policy);
    }
}
