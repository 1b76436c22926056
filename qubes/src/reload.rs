//! Reading a committed tree in slices, while packets keep flowing.

use alloc::sync::Arc;

use firewall::rule::{Family, RuleChain};

use crate::firewall_tree::{ChainReader, TreeError};
use crate::tree_store::{OwnedKey, Tree};

/// A committed tree that is being read. Later changes in the store do not affect it.
#[derive(Debug)]
pub struct Reload {
    tree: Arc<Tree>,
    /// The last key that was read.
    previous: Option<OwnedKey>,
    reader: ChainReader,
}

/// What a step has achieved.
#[derive(Debug)]
pub enum ReloadProgress {
    /// There are more keys.
    Working(Reload),
    /// The whole tree was understood.
    Done(RuleChain),
    /// The tree was not understood: refuse everything from its client in this family.
    Failed(TreeError),
}

impl Reload {
    /// Keys for [`Self::step`] that take well under 100 microseconds on current machines.
    pub const STEP_KEYS: usize = 100;

    /// Starts to read the tree of a client address of `family`.
    pub fn new(family: Family, tree: Arc<Tree>) -> Self {
        Self {
            tree,
            previous: None,
            reader: ChainReader::new(family),
        }
    }

    /// Reads at most `keys` keys.
    pub fn step(mut self, keys: usize) -> ReloadProgress {
        if self.tree.is_incomplete() {
            return ReloadProgress::Failed(TreeError::Incomplete);
        }
        for _ in 0..keys {
            let Some((key, value)) = self.tree.after(self.previous.as_ref()) else {
                return match self.reader.finish() {
                    Ok(chain) => ReloadProgress::Done(chain),
                    Err(error) => ReloadProgress::Failed(error),
                };
            };
            if let Err(error) = self.reader.read(key.as_key(), value) {
                return ReloadProgress::Failed(error);
            }
            self.previous = Some(key);
        }
        ReloadProgress::Working(self)
    }

    /// Reads to the end.
    ///
    /// # Errors
    ///
    /// [`TreeError`]; the client must then be blocked in this family.
    pub fn finish(self) -> Result<RuleChain, TreeError> {
        let mut reload = self;
        loop {
            match reload.step(usize::MAX) {
                ReloadProgress::Working(more) => reload = more,
                ReloadProgress::Done(chain) => return Ok(chain),
                ReloadProgress::Failed(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall_tree::TreeKey;
    use std::format;

    fn tree(rules: u16) -> Arc<Tree> {
        let mut tree = Tree::default();
        tree.write(TreeKey::Policy, b"drop");
        for number in 0..rules {
            tree.write(TreeKey::new(&format!("{number:04}")), b"action=accept");
        }
        Arc::new(tree)
    }

    #[test]
    fn slices_read_the_same_chain_as_one_go() {
        let tree = tree(250);
        let whole = Reload::new(Family::Ipv4, Arc::clone(&tree))
            .finish()
            .unwrap();
        assert_eq!(whole.rules().len(), 250);
        let mut reload = Reload::new(Family::Ipv4, tree);
        let mut steps = 1;
        let sliced = loop {
            match reload.step(Reload::STEP_KEYS) {
                ReloadProgress::Working(more) => reload = more,
                ReloadProgress::Done(chain) => break chain,
                ReloadProgress::Failed(error) => panic!("{error}"),
            }
            steps += 1;
        };
        assert_eq!(sliced, whole);
        assert_eq!(steps, 3);
    }

    #[test]
    fn incomplete_tree_is_not_understood() {
        let mut tree = Arc::unwrap_or_clone(tree(1));
        tree.mark_incomplete();
        let result = Reload::new(Family::Ipv4, Arc::new(tree)).finish();
        assert_eq!(result, Err(TreeError::Incomplete));
    }
}
