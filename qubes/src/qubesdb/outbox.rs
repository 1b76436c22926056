//! Our own writes and removals, and which of our keys dom0 holds.
//!
//! A removal of something that dom0 does not hold ends its daemon. So removals take their turn: one is sent only
//! when everything before it was answered, and only if the shadow knows a key that it would remove. The shadow never
//! claims a key that dom0 lacks: keys enter it with the dump, with a push of dom0's, or with the `RESP_OK` to our write,
//! and leave it with the push of a removal or when our own removal is sent.
//!
//! One gap is left: somebody in dom0 removes one of *our* keys in the moment in which our removal is under way. Nothing
//! in the protocol closes it.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::message::{self, Value};
use super::path::Path;

/// Operations that may wait.
pub const QUEUE_MAX: usize = 512;
/// Bytes of values that may wait.
pub const QUEUE_BYTES: usize = 64 * 1024;
/// Keys of ours that dom0 may hold.
pub const SHADOW_MAX: usize = 2048;
/// The directories whose keys are ours, and in which we may remove.
pub const OWN_DIRECTORIES: [&str; 2] = ["/dns", "/qubes-firewall-handled"];

/// Why an operation was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteError {
    /// The path is malformed or too long, or (removals only) not below one of [`OWN_DIRECTORIES`].
    Path,
    /// The value is too long or contains a NUL.
    Value,
    /// Too much waits, or too many keys are ours.
    Full,
}

#[derive(Debug)]
enum Operation {
    Write {
        path: Path,
        value: Value,
    },
    /// Everything below the path, not the path itself.
    RemoveBelow(Path),
}

impl Operation {
    const fn path(&self) -> &Path {
        match self {
            Self::Write { path, .. } | Self::RemoveBelow(path) => path,
        }
    }
}

/// Keys, in order. A sorted vector: a tree would be several times the code.
#[derive(Debug, Default)]
struct Paths(Vec<Path>);

impl Paths {
    fn contains(&self, path: &Path) -> bool {
        self.0.binary_search(path).is_ok()
    }

    fn insert(&mut self, path: Path) {
        if let Err(at) = self.0.binary_search(&path) {
            self.0.insert(at, path);
        }
    }

    const fn len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn retain(&mut self, stays: impl Fn(&Path) -> bool) {
        self.0.retain(stays);
    }
}

/// What waits to be sent or answered, and the shadow of our keys in dom0.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Operation>,
    /// How many at the front of the queue were sent on this connection and await their answer.
    sent: usize,
    bytes: usize,
    shadow: Paths,
    /// The shadow of the dump that is arriving.
    incoming: Paths,
}

fn is_ours(path: &Path) -> bool {
    OWN_DIRECTORIES
        .iter()
        .any(|directory| path.is_below(directory))
}

impl Outbox {
    /// Nothing to do and nothing known.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            sent: 0,
            bytes: 0,
            shadow: Paths(Vec::new()),
            incoming: Paths(Vec::new()),
        }
    }

    /// Takes a write. A write to the same key that was not sent yet is replaced.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing was taken.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), WriteError> {
        let path = Path::new(path).map_err(|_| WriteError::Path)?;
        let value = Value::new(value).ok_or(WriteError::Value)?;
        let added = value.as_bytes().len();
        let replaced = self.unsent_write(&path);
        let freed = match replaced.and_then(|index| self.queue.get(index)) {
            Some(Operation::Write { value, .. }) => value.as_bytes().len(),
            _ => 0,
        };
        let bytes = self.bytes.saturating_sub(freed).saturating_add(added);
        if bytes > QUEUE_BYTES {
            return Err(WriteError::Full);
        }
        if let Some(place) = replaced.and_then(|index| self.queue.get_mut(index)) {
            *place = Operation::Write { path, value };
        } else {
            let new_key = is_ours(&path) && !self.shadow.contains(&path);
            let keys = self.shadow.len().saturating_add(self.queue.len());
            if self.queue.len() >= QUEUE_MAX || (new_key && keys >= SHADOW_MAX) {
                return Err(WriteError::Full);
            }
            self.queue.push_back(Operation::Write { path, value });
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Takes the removal of everything below `directory` (without a slash at its end).
    ///
    /// Writes below it that were not sent yet are dropped. Whether dom0 holds anything there is looked at when its
    /// turn comes; if not, nothing is sent.
    ///
    /// # Errors
    ///
    /// [`WriteError::Path`] unless it is one of, or lies below, [`OWN_DIRECTORIES`] and leaves room for the slash;
    /// [`WriteError::Full`].
    pub fn remove_below(&mut self, directory: &str) -> Result<(), WriteError> {
        let path = Path::new(directory).map_err(|_| WriteError::Path)?;
        let ours = is_ours(&path) || OWN_DIRECTORIES.contains(&directory);
        if !ours || directory.len() >= super::path::PATH_MAX {
            return Err(WriteError::Path);
        }
        let sent = self.sent;
        let mut index = 0usize;
        self.queue.retain(|operation| {
            let keep = index < sent || !operation.path().is_below(directory);
            index = index.wrapping_add(1);
            keep
        });
        self.count_bytes();
        if self.queue.len() >= QUEUE_MAX {
            return Err(WriteError::Full);
        }
        self.queue.push_back(Operation::RemoveBelow(path));
        Ok(())
    }

    /// Operations that wait to be sent or answered.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// Whether the next operation need not wait for an answer.
    #[must_use]
    pub fn can_send(&self) -> bool {
        match self.queue.get(self.sent) {
            Some(Operation::Write { .. }) => true,
            Some(Operation::RemoveBelow(_)) => self.sent == 0,
            None => false,
        }
    }

    /// Keys of ours that dom0 is known to hold.
    #[must_use]
    pub fn held(&self) -> usize {
        self.shadow.len()
    }

    /// A connection was lost: what was not answered is to be sent again.
    pub fn disconnected(&mut self) {
        self.sent = 0;
        self.incoming.clear();
    }

    /// dom0 holds this key, says the dump.
    pub fn dumped(&mut self, path: &str) {
        if let Ok(path) = Path::new(path)
            && is_ours(&path)
            && self.incoming.len() < SHADOW_MAX
        {
            self.incoming.insert(path);
        }
    }

    /// The dump is over: what it did not mention is not there.
    pub fn dump_ended(&mut self) {
        self.shadow = core::mem::take(&mut self.incoming);
    }

    /// dom0 wrote a key.
    pub fn pushed(&mut self, path: &str) {
        if let Ok(path) = Path::new(path) {
            self.note_held(path);
        }
    }

    /// dom0 removed a key, or everything below it when the path ends with `/`.
    pub fn removed(&mut self, path: &str) {
        let stays = |key: &Path| match path.strip_suffix('/') {
            Some(directory) => !key.is_below(directory),
            None => key.as_str() != path,
        };
        self.shadow.retain(stays);
        self.incoming.retain(stays);
    }

    /// dom0 answered one of our operations. Returns false when it answered nothing that we sent.
    pub fn answered(&mut self, path: &str, carried_out: bool) -> bool {
        let path = path.strip_suffix('/').unwrap_or(path);
        let mut waiting = self.queue.iter().take(self.sent);
        let Some(position) = waiting.position(|operation| operation.path().as_str() == path) else {
            return false;
        };
        // Answers come in order: what was passed over will not be answered any more, and did nothing for sure.
        for _ in 0..position {
            self.finish(false);
        }
        self.finish(carried_out);
        true
    }

    /// Appends operations to `out` while it is shorter than `limit` and their turn has come.
    ///
    /// `out` grows beyond `limit` by at most one message.
    pub fn send(&mut self, out: &mut Vec<u8>, limit: usize) {
        while out.len() < limit {
            let Some(operation) = self.queue.get(self.sent) else {
                return;
            };
            match operation {
                Operation::Write { path, value } => message::push_write(out, path, value),
                Operation::RemoveBelow(_) if self.sent > 0 => return,
                Operation::RemoveBelow(path) => {
                    let directory = path.as_str();
                    let before = self.shadow.len();
                    self.shadow.retain(|key| !key.is_below(directory));
                    if self.shadow.len() == before {
                        self.queue.pop_front();
                        continue;
                    }
                    message::push_remove_below(out, path);
                }
            }
            self.sent = self.sent.saturating_add(1);
        }
    }

    /// The front operation is over.
    fn finish(&mut self, carried_out: bool) {
        self.sent = self.sent.saturating_sub(1);
        if let Some(Operation::Write { path, value }) = self.queue.pop_front() {
            self.bytes = self.bytes.saturating_sub(value.as_bytes().len());
            if carried_out {
                self.note_held(path);
            }
        }
    }

    fn note_held(&mut self, path: Path) {
        if is_ours(&path) && self.shadow.len() < SHADOW_MAX {
            self.shadow.insert(path);
        }
    }

    /// A write to `path` that was not sent yet and that no later removal undoes.
    fn unsent_write(&self, path: &Path) -> Option<usize> {
        let last_removal = self
            .queue
            .iter()
            .rposition(|operation| matches!(operation, Operation::RemoveBelow(_)));
        let first = last_removal
            .map_or(0, |index| index.saturating_add(1))
            .max(self.sent);
        let mut rest = self.queue.iter().enumerate().skip(first);
        rest.find(|(_, operation)| operation.path() == path)
            .map(|(index, _)| index)
    }

    fn count_bytes(&mut self) {
        self.bytes = self
            .queue
            .iter()
            .map(|operation| match operation {
                Operation::Write { value, .. } => value.as_bytes().len(),
                Operation::RemoveBelow(_) => 0,
            })
            .sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qubesdb::message::HEADER;
    use alloc::format;
    use alloc::string::{String, ToString};

    /// What is sent now: `W /path` or `R /path/`.
    fn sent(outbox: &mut Outbox) -> Vec<String> {
        let mut bytes = Vec::new();
        outbox.send(&mut bytes, usize::MAX);
        let mut out = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let path: Vec<u8> = rest[1..65]
                .iter()
                .copied()
                .take_while(|byte| *byte != 0)
                .collect();
            let kind = if rest[0] == 1 { 'W' } else { 'R' };
            out.push(format!("{kind} {}", String::from_utf8(path).unwrap()));
            let payload = u32::from_le_bytes(rest[68..72].try_into().unwrap());
            rest = &rest[HEADER + usize::try_from(payload).unwrap()..];
        }
        out
    }

    #[test]
    fn q7_a_removal_of_what_dom0_never_held_is_not_sent() {
        let mut outbox = Outbox::new();
        outbox.remove_below("/dns/10.137.0.9").unwrap();
        outbox.write("/dns/10.137.0.9/example.com", b"{}").unwrap();
        assert_eq!(sent(&mut outbox), ["W /dns/10.137.0.9/example.com"]);
    }

    #[test]
    fn q7_a_removal_waits_for_the_answers_before_it() {
        let mut outbox = Outbox::new();
        outbox.write("/dns/a/x", b"1").unwrap();
        assert_eq!(sent(&mut outbox), ["W /dns/a/x"]);
        outbox.remove_below("/dns/a").unwrap();
        outbox.write("/dns/a/y", b"2").unwrap();
        assert!(sent(&mut outbox).is_empty());
        assert!(outbox.answered("/dns/a/x", true));
        assert_eq!(sent(&mut outbox), ["R /dns/a/", "W /dns/a/y"]);
        assert!(outbox.answered("/dns/a/", true));
        assert!(outbox.answered("/dns/a/y", true));
        assert_eq!((outbox.pending(), outbox.held()), (0, 1));
    }

    #[test]
    fn q7_a_write_that_was_refused_does_not_count_as_held() {
        let mut outbox = Outbox::new();
        outbox.write("/dns/a/x", b"1").unwrap();
        let _ = sent(&mut outbox);
        assert!(outbox.answered("/dns/a/x", false));
        outbox.remove_below("/dns/a").unwrap();
        assert!(sent(&mut outbox).is_empty());
        assert_eq!(outbox.pending(), 0);
    }

    #[test]
    fn q7_what_the_dump_does_not_mention_is_not_removed() {
        let mut outbox = Outbox::new();
        outbox.write("/dns/a/x", b"1").unwrap();
        let _ = sent(&mut outbox);
        outbox.answered("/dns/a/x", true);
        outbox.disconnected();
        outbox.dumped("/dns/b/x");
        outbox.dump_ended();
        outbox.remove_below("/dns/a").unwrap();
        assert!(sent(&mut outbox).is_empty());
        outbox.remove_below("/dns/b").unwrap();
        assert_eq!(sent(&mut outbox), ["R /dns/b/"]);
    }

    #[test]
    fn q7_a_removal_pushed_by_dom0_is_not_repeated() {
        let mut outbox = Outbox::new();
        for key in ["/dns/a/x", "/dns/a/y", "/dns/b/z"] {
            outbox.dumped(key);
        }
        outbox.dump_ended();
        outbox.removed("/dns/a/");
        outbox.remove_below("/dns/a").unwrap();
        assert!(sent(&mut outbox).is_empty());
        outbox.removed("/dns/b/z");
        outbox.remove_below("/dns").unwrap();
        assert!(sent(&mut outbox).is_empty());
    }

    #[test]
    fn only_our_own_directories_can_be_removed() {
        let mut outbox = Outbox::new();
        for bad in [
            "/",
            "/dns/",
            "/qubes-firewall/10.0.0.1",
            "/name",
            "",
            "/dnsx",
            "/qubes-firewall-handledx",
        ] {
            assert_eq!(outbox.remove_below(bad), Err(WriteError::Path), "{bad}");
        }
    }

    #[test]
    fn a_write_that_was_not_sent_is_replaced() {
        let mut outbox = Outbox::new();
        for number in 0..1000 {
            outbox
                .write(
                    "/qubes-firewall-handled/10.0.0.1",
                    number.to_string().as_bytes(),
                )
                .unwrap();
        }
        assert_eq!(outbox.pending(), 1);
        let mut bytes = Vec::new();
        outbox.send(&mut bytes, usize::MAX);
        assert!(bytes.ends_with(b"999"));
        outbox
            .write("/qubes-firewall-handled/10.0.0.1", b"1000")
            .unwrap();
        assert_eq!(outbox.pending(), 2, "what was sent is not replaced");
    }

    #[test]
    fn what_was_not_answered_is_sent_again_after_a_reconnect() {
        let mut outbox = Outbox::new();
        outbox.write("/dns/a/x", b"1").unwrap();
        outbox.write("/qubes-iptables-error", b"").unwrap();
        assert_eq!(sent(&mut outbox).len(), 2);
        outbox.answered("/dns/a/x", true);
        outbox.disconnected();
        outbox.dump_ended();
        assert_eq!(sent(&mut outbox), ["W /qubes-iptables-error"]);
    }

    #[test]
    fn answers_to_nothing_are_noticed_and_change_nothing() {
        let mut outbox = Outbox::new();
        outbox.write("/dns/a/x", b"1").unwrap();
        assert!(!outbox.answered("/dns/a/x", true), "not sent yet");
        let _ = sent(&mut outbox);
        assert!(!outbox.answered("/other", true));
        assert_eq!((outbox.pending(), outbox.held()), (1, 0));
    }

    #[test]
    fn queue_and_shadow_are_bounded() {
        let mut outbox = Outbox::new();
        let mut refused = false;
        for number in 0..QUEUE_MAX + 1 {
            refused |= outbox.write(&format!("/dns/a/{number}"), b"") == Err(WriteError::Full);
        }
        assert!(refused);
        let mut outbox = Outbox::new();
        for number in 0..SHADOW_MAX + 50 {
            outbox.dumped(&format!("/dns/a/{number}"));
        }
        outbox.dump_ended();
        assert_eq!(outbox.held(), SHADOW_MAX);
        assert_eq!(outbox.write("/dns/b/new", b""), Err(WriteError::Full));
        assert_eq!(outbox.write("/dns/a/7", b"again"), Ok(()));
        let mut outbox = Outbox::new();
        let written =
            (0..100).filter(|number| outbox.write(&format!("/x/{number}"), &[b'v'; 3000]).is_ok());
        assert_eq!(written.count(), QUEUE_BYTES / 3000);
    }
}
