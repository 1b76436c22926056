//! Nodes that are nobody's device: advertised to a peer, read, or watched on behalf of the kernel.
//!
//! vchan finds its peers by them. Requests go in by [`crate::ControlPlane::submit`], answers come out by
//! [`crate::ControlPlane::next_answer`]; one task works through them in order, so that two nodes of which one must be
//! written last are.
//!
//! # Bounds
//!
//! Requests are the caller's, who bounds them; a watch gives at most one waiting answer, and a read exactly one. A watch that
//! the store refuses is logged and gives none.

use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;

use xen::{DomId, warn};

use crate::store::{Store, Watch};

/// Something to do in the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeRequest {
    /// Write a node that `owner` (we) owns, `reader` may read, and nobody else may see.
    Publish {
        /// Relative to our home, or absolute.
        path: String,
        /// What to write.
        value: String,
        /// Us.
        owner: DomId,
        /// The peer.
        reader: DomId,
    },
    /// Remove a node and what is below it; it may be gone already.
    Remove {
        /// Relative to our home, or absolute.
        path: String,
    },
    /// Watch a node, which need not exist, until [`NodeRequest::Unwatch`].
    Watch {
        /// Relative to our home, or absolute.
        path: String,
        /// Names the watch in answers.
        token: u32,
    },
    /// End a watch.
    Unwatch {
        /// As in the watch.
        token: u32,
    },
    /// Read a node.
    Read {
        /// Relative to our home, or absolute.
        path: String,
        /// Names the read in the answer.
        token: u32,
    },
}

/// What came of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeAnswer {
    /// Something at or below the node of this watch may have changed. Comes at least once for each watch.
    Fired(u32),
    /// The content of the node of this read; `None` if it cannot be read.
    Read(u32, Option<Vec<u8>>),
}

/// Requests and answers on their way.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    requests: RefCell<VecDeque<NodeRequest>>,
    answers: RefCell<VecDeque<NodeAnswer>>,
}

impl Nodes {
    pub(crate) fn submit(&self, request: NodeRequest) {
        self.requests.borrow_mut().push_back(request);
    }

    pub(crate) fn next_answer(&self) -> Option<NodeAnswer> {
        self.answers.borrow_mut().pop_front()
    }

    fn answer(&self, answer: NodeAnswer) {
        let mut answers = self.answers.borrow_mut();
        if !answers.contains(&answer) {
            answers.push_back(answer);
        }
    }
}

/// What the task does next.
enum Next {
    Request(NodeRequest),
    Fired(u32),
}

/// The task. Never ends.
pub(crate) async fn run(store: Store, nodes: Rc<Nodes>) {
    let mut watches: Vec<(u32, Watch)> = Vec::new();
    loop {
        let probe = || {
            if let Some(request) = nodes.requests.borrow_mut().pop_front() {
                return Some(Next::Request(request));
            }
            let dirty = watches.iter().find(|(_, watch)| watch.is_dirty());
            dirty.map(|(token, _)| Next::Fired(*token))
        };
        match store.context.until(None, probe).await {
            Some(Next::Request(request)) => {
                carry_out(&store, &nodes, &mut watches, request).await;
            }
            Some(Next::Fired(token)) => {
                for (_, watch) in watches.iter().filter(|(own, _)| *own == token) {
                    let _ = watch.take();
                }
                nodes.answer(NodeAnswer::Fired(token));
            }
            None => {}
        }
    }
}

async fn carry_out(
    store: &Store,
    nodes: &Nodes,
    watches: &mut Vec<(u32, Watch)>,
    request: NodeRequest,
) {
    match request {
        NodeRequest::Publish {
            path,
            value,
            owner,
            reader,
        } => {
            let written = store.write(&path, value.as_bytes());
            let shared = store.share(&path, owner, reader);
            if let Err(reason) = written.await.and(shared.await) {
                warn!("xenstore: cannot publish {path}: {reason}");
            }
        }
        NodeRequest::Remove { path } => drop(store.remove(&path).await),
        NodeRequest::Watch { path, token } => match store.watch(&path).await {
            Ok(watch) => watches.push((token, watch)),
            Err(reason) => warn!("xenstore: cannot watch {path}: {reason}"),
        },
        NodeRequest::Unwatch { token } => watches.retain(|(own, _)| *own != token),
        NodeRequest::Read { path, token } => {
            let content = store.read(&path).await.ok();
            nodes.answer(NodeAnswer::Read(token, content));
        }
    }
}
