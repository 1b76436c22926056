//! From the keys below `/qubes-firewall/<address>/` to a rule chain.
//!
//! A tree is `policy` and any number of rules whose keys are four digits. Anything else in it is an
//! error, and an error means that the client is blocked in this family: a list that is half understood
//! is not what its author meant.
//!
//! Reading goes key by key, so that a long list can be read in slices between packets.
//!
//! Source: `qubes-policy.md` 1.4 and 2.5.

use alloc::vec::Vec;
use core::fmt;

use firewall::rule::{Action, ChainError, Family, Rule, RuleChain, RuleNumber};

use crate::excerpt::Excerpt;
use crate::rule_text::{RuleError, parse_rule};

/// A key of a tree, relative to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeKey<'a> {
    /// `policy`.
    Policy,
    /// Four digits.
    Rule(RuleNumber),
    /// Anything else; a tree with such a key is not understood.
    Other(&'a str),
}

impl<'a> TreeKey<'a> {
    /// Classifies the part of a path after `/qubes-firewall/<address>/`.
    pub fn new(text: &'a str) -> Self {
        if text == "policy" {
            return Self::Policy;
        }
        let is_number = text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = is_number.then(|| text.parse().ok()).flatten();
        match number.and_then(RuleNumber::new) {
            Some(number) => Self::Rule(number),
            None => Self::Other(text),
        }
    }
}

/// Why a tree is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeError {
    /// There is no `policy`.
    NoPolicy,
    /// `policy` is neither `accept` nor `drop`.
    BadPolicy(Excerpt),
    /// A key is neither `policy` nor four digits.
    BadKey(Excerpt),
    /// A rule is not understood.
    Rule(RuleError),
    /// A rule was given twice.
    Chain(ChainError),
    /// Part of the tree was refused for want of memory.
    Incomplete,
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicy => f.write_str("no policy"),
            Self::BadPolicy(value) => write!(f, "bad value {value} for policy"),
            Self::BadKey(key) => write!(f, "bad key {key}"),
            Self::Rule(error) => error.fmt(f),
            Self::Chain(error) => error.fmt(f),
            Self::Incomplete => f.write_str("rules do not fit in memory"),
        }
    }
}

/// Reads the keys of one tree, one at a time, in any order.
#[derive(Debug)]
pub struct ChainReader {
    family: Family,
    policy: Option<Action>,
    rules: Vec<Rule>,
}

impl ChainReader {
    /// Starts on the tree of a client address of `family`.
    pub const fn new(family: Family) -> Self {
        Self {
            family,
            policy: None,
            rules: Vec::new(),
        }
    }

    /// Reads one key.
    ///
    /// # Errors
    ///
    /// [`TreeError`]; the tree is then not understood and the rest of it need not be read.
    pub fn read(&mut self, key: TreeKey<'_>, value: &[u8]) -> Result<(), TreeError> {
        match key {
            TreeKey::Policy => {
                self.policy = Some(match value {
                    b"accept" => Action::Accept,
                    b"drop" => Action::Drop,
                    _ => return Err(TreeError::BadPolicy(Excerpt::new(value))),
                });
            }
            TreeKey::Rule(number) => {
                let rule = parse_rule(number, self.family, value).map_err(TreeError::Rule)?;
                if let Some(rule) = rule {
                    // Keys come in order, so this is nearly always the end.
                    let at = self.rules.partition_point(|known| known.number <= number);
                    self.rules.insert(at, rule);
                }
            }
            TreeKey::Other(key) => return Err(TreeError::BadKey(Excerpt::new(key.as_bytes()))),
        }
        Ok(())
    }

    /// Puts the chain together after the last key.
    ///
    /// # Errors
    ///
    /// [`TreeError`] if the tree as a whole makes no sense.
    pub fn finish(self) -> Result<RuleChain, TreeError> {
        let policy = self.policy.ok_or(TreeError::NoPolicy)?;
        RuleChain::new(self.family, policy, self.rules).map_err(TreeError::Chain)
    }
}

/// Reads a whole tree: keys relative to it, with their values.
///
/// # Errors
///
/// The first [`TreeError`] found; the client must then be blocked in this family.
pub fn read_tree<'a>(
    family: Family,
    keys: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Result<RuleChain, TreeError> {
    let mut reader = ChainReader::new(family);
    for (key, value) in keys {
        reader.read(TreeKey::new(key), value)?;
    }
    reader.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule_text::{RuleErrorKind, RuleText};
    use std::string::ToString;

    fn read(keys: &[(&'static str, &'static str)]) -> Result<RuleChain, TreeError> {
        let keys = keys.iter().map(|&(key, value)| (key, value.as_bytes()));
        read_tree(Family::Ipv4, keys)
    }

    fn texts(chain: &RuleChain) -> Vec<std::string::String> {
        chain
            .rules()
            .iter()
            .map(|rule| RuleText(rule).to_string())
            .collect()
    }

    #[test]
    fn gaps_and_order_of_keys_do_not_matter() {
        let chain = read(&[
            ("policy", "drop"),
            ("9999", "action=accept"),
            ("0003", "action=drop proto=tcp"),
        ])
        .unwrap();
        assert_eq!(chain.policy(), Action::Drop);
        assert_eq!(texts(&chain), ["action=drop proto=tcp", "action=accept"]);
    }

    #[test]
    fn policy_alone_is_a_chain() {
        let chain = read(&[("policy", "accept")]).unwrap();
        assert_eq!(chain.policy(), Action::Accept);
        assert!(chain.rules().is_empty());
    }

    #[test]
    fn policy_must_be_there_and_known() {
        assert_eq!(read(&[]), Err(TreeError::NoPolicy));
        assert_eq!(read(&[("0000", "action=accept")]), Err(TreeError::NoPolicy));
        for value in ["", "DROP", "reject", " drop", "drop\n"] {
            let expected = TreeError::BadPolicy(Excerpt::new(value.as_bytes()));
            assert_eq!(read(&[("policy", value)]), Err(expected));
        }
    }

    #[test]
    fn keys_are_policy_or_four_digits() {
        for key in [
            "000", "00000", "10000", "abcd", "0000/x", "", "+001", "Policy", "policy/x",
        ] {
            let expected = TreeError::BadKey(Excerpt::new(key.as_bytes()));
            assert_eq!(
                read(&[("policy", "drop"), (key, "action=accept")]),
                Err(expected)
            );
        }
    }

    #[test]
    fn one_bad_rule_spoils_the_tree_and_is_named() {
        let error = read(&[
            ("policy", "accept"),
            ("0000", "action=accept"),
            ("0001", "action=accept dst6=::/0"),
        ])
        .unwrap_err();
        let TreeError::Rule(rule) = error else {
            panic!("{error:?}");
        };
        assert!(matches!(rule.kind, RuleErrorKind::WrongFamily(_)));
        assert_eq!(
            error.to_string(),
            "rule 0001: dst6 for the other address family"
        );
    }

    #[test]
    fn rules_that_never_match_leave_a_gap() {
        let chain = read(&[
            ("policy", "drop"),
            ("0000", "action=accept proto=icmp specialtarget=dns"),
            ("0001", "action=accept"),
        ])
        .unwrap();
        assert_eq!(texts(&chain), ["action=accept"]);
    }
}
