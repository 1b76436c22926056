//! The store as device code sees it: requests that are awaited, watches that are released when dropped.
//!
//! A request is sent when the method is called, not when its [`Reply`] is awaited: calling several and
//! awaiting them afterwards sends them in one go. A `Reply` that is dropped is no cancellation; its request is
//! carried out and the answer ignored.

use alloc::borrow::ToOwned;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context as TaskContext, Poll};
use core::time::Duration;

use xen::{DomId, Time};

use crate::client::{Dirty, Ticket, WatchError, WatchId};
use crate::task::{Context, TooManyTasks};
use crate::wire::{Encoded, ErrorCode, Request, RequestError, strings};
use crate::{MAX_DIRECTORY_LEN, TRANSACTION_ATTEMPTS};

/// Why a request gave no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// The store refused it.
    Refused(ErrorCode),
    /// It could not be sent.
    Request(RequestError),
    /// The reply cannot be understood: a transaction id or child name that is no text, or too long a listing.
    Reply,
    /// The transaction met a conflict each of [`TRANSACTION_ATTEMPTS`] times.
    Conflict,
}

impl Error {
    /// The node, or one of its parents, does not exist.
    pub const NOT_FOUND: Self = Self::Refused(ErrorCode::NotFound);
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(code) => write!(f, "xenstore refused: {code:?}"),
            Self::Request(error) => write!(f, "xenstore request impossible: {error:?}"),
            Self::Reply => f.write_str("xenstore reply not understood"),
            Self::Conflict => f.write_str("xenstore transaction conflicts"),
        }
    }
}

/// A handle to the store, to be cloned freely.
#[derive(Clone)]
pub struct Store {
    pub(crate) context: Rc<Context>,
}

impl Store {
    /// Reads a node's value.
    pub fn read(&self, path: &str) -> Reply<Vec<u8>> {
        self.request(&Request::Read(path), 0, Ok)
    }

    /// Writes a node's value.
    pub fn write(&self, path: &str, value: &[u8]) -> Reply<()> {
        self.request(&Request::Write(path, value), 0, |_| Ok(()))
    }

    /// Removes a node and everything below it.
    pub fn remove(&self, path: &str) -> Reply<()> {
        self.request(&Request::Remove(path), 0, |_| Ok(()))
    }

    /// Lets `owner` own a node, `reader` read it, and nobody else do anything with it.
    pub fn share(&self, path: &str, owner: DomId, reader: DomId) -> Reply<()> {
        self.request(&Request::Share(path, owner, reader), 0, |_| Ok(()))
    }

    /// Creates an empty node.
    pub fn make_directory(&self, path: &str) -> Reply<()> {
        self.request(&Request::MakeDirectory(path), 0, |_| Ok(()))
    }

    /// Removes what watches and transactions a predecessor of ours may have left behind.
    pub fn reset_watches(&self) -> Reply<()> {
        self.request(&Request::ResetWatches, 0, |_| Ok(()))
    }

    /// Lists the names of a node's children, if they fit into one reply; else the error is `E2BIG`.
    pub fn list_short(&self, path: &str) -> Reply<Vec<String>> {
        self.request(&Request::Directory(path), 0, |payload| names(&payload))
    }

    /// Lists the names of a node's children, in parts when they do not fit into one reply.
    ///
    /// # Errors
    ///
    /// [`Error::Reply`] when they exceed [`MAX_DIRECTORY_LEN`] or are no text, else [`Error::Refused`].
    pub async fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        match self.list_short(path).await {
            Err(Error::Refused(ErrorCode::TooBig)) => self.list_parts(path).await,
            other => other,
        }
    }

    /// Gathers a long list. It starts anew when the list changes meanwhile, a bounded number of times.
    async fn list_parts(&self, path: &str) -> Result<Vec<String>, Error> {
        let mut generation = Vec::new();
        let mut list = Vec::new();
        let mut restarts = 0_usize;
        loop {
            let request = Request::DirectoryPart(path, list.len());
            let part = self.request(&request, 0, Ok).await?;
            let end_of_generation = part
                .iter()
                .position(|&byte| byte == 0)
                .ok_or(Error::Reply)?;
            let (current, names_part) = part.split_at(end_of_generation);
            let names_part = names_part.get(1..).unwrap_or_default();
            if !list.is_empty() && current != generation {
                restarts = restarts.saturating_add(1);
                if restarts >= TRANSACTION_ATTEMPTS {
                    return Err(Error::Conflict);
                }
                list.clear();
                continue;
            }
            generation.clear();
            generation.extend_from_slice(current);
            // An empty string after the last name marks the end of the list.
            let last = names_part.ends_with(b"\0\0") || names_part == b"\0";
            let names_part = if last {
                names_part.strip_suffix(b"\0").unwrap_or_default()
            } else {
                names_part
            };
            list.extend_from_slice(names_part);
            if last {
                return names(&list);
            }
            if names_part.is_empty() || list.len() > MAX_DIRECTORY_LEN {
                return Err(Error::Reply);
            }
        }
    }

    /// Watches a node and everything below it. Dropping the [`Watch`] ends that.
    ///
    /// # Errors
    ///
    /// `E2BIG` when we, or the store for us, hold too many already.
    pub async fn watch(&self, path: &str) -> Result<Watch, Error> {
        self.set_watch(path, false).await
    }

    /// As [`Store::watch`], and the watch remembers which paths changed.
    ///
    /// # Errors
    ///
    /// As [`Store::watch`].
    pub async fn watch_paths(&self, path: &str) -> Result<Watch, Error> {
        self.set_watch(path, true).await
    }

    async fn set_watch(&self, path: &str, hints: bool) -> Result<Watch, Error> {
        let attempt = || match self.context.client.borrow_mut().watch(path, hints) {
            Err(WatchError::Full) => None,
            result => Some(result),
        };
        let (id, ticket) = match self.context.until(None, attempt).await {
            Some(Ok(set)) => set,
            Some(Err(WatchError::Request(error))) => return Err(Error::Request(error)),
            Some(Err(WatchError::TooManyWatches | WatchError::Full)) | None => {
                return Err(Error::Refused(ErrorCode::TooBig));
            }
        };
        let watch = Watch {
            context: Rc::clone(&self.context),
            id,
        };
        let state = ReplyState::Waiting(ticket);
        let reply = Reply {
            context: Rc::clone(&self.context),
            state,
            read: |_| Ok(()),
        };
        reply.await.map(|()| watch)
    }

    /// Carries out `body` in a transaction and commits, trying again after a conflict.
    ///
    /// # Errors
    ///
    /// Those of `body`, after which the transaction is thrown away; [`Error::Conflict`]; [`Error::Refused`].
    pub async fn transaction<T>(
        &self,
        body: impl AsyncFn(&Transaction) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..TRANSACTION_ATTEMPTS {
            let permit = Permit::wait(&self.context).await;
            let start = self.request(&Request::TransactionStart, 0, |payload| {
                transaction_id(&payload)
            });
            let transaction = Transaction {
                store: self.clone(),
                id: start.await?,
                open: true,
                _permit: permit,
            };
            let result = body(&transaction).await?;
            match transaction.commit().await {
                Ok(()) => return Ok(result),
                Err(Error::Refused(ErrorCode::Again)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Conflict)
    }

    /// The time of the current iteration of the main loop.
    #[must_use]
    pub fn now(&self) -> Time {
        self.context.now()
    }

    /// Waits for this long.
    pub async fn sleep(&self, duration: Duration) {
        self.context.sleep(duration).await;
    }

    /// Adds a task of the caller's own. It may wait for nothing but what this handle offers: there are no wakers.
    ///
    /// # Errors
    ///
    /// [`TooManyTasks`]; the task is dropped.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) -> Result<(), TooManyTasks> {
        self.context.spawn(task)
    }

    fn request<T>(
        &self,
        request: &Request<'_>,
        transaction: u32,
        read: fn(Vec<u8>) -> Result<T, Error>,
    ) -> Reply<T> {
        let state = match request.encode(transaction) {
            Ok(message) => ReplyState::submit(&self.context, message),
            Err(error) => ReplyState::Failed(Error::Request(error)),
        };
        Reply {
            context: Rc::clone(&self.context),
            state,
            read,
        }
    }
}

fn names(payload: &[u8]) -> Result<Vec<String>, Error> {
    let text = |name: &[u8]| {
        core::str::from_utf8(name)
            .map(ToOwned::to_owned)
            .map_err(|_| Error::Reply)
    };
    strings(payload).map(text).collect()
}

fn transaction_id(payload: &[u8]) -> Result<u32, Error> {
    let text = core::str::from_utf8(payload.strip_suffix(&[0]).unwrap_or(payload))
        .map_err(|_| Error::Reply)?;
    text.parse().ok().filter(|&id| id != 0).ok_or(Error::Reply)
}

/// A transaction: what is read is one moment, what is written happens at once or not at all.
pub struct Transaction {
    store: Store,
    id: u32,
    open: bool,
    _permit: Permit,
}

/// The right to have one transaction open.
struct Permit(Rc<Context>);

impl Permit {
    async fn wait(context: &Rc<Context>) -> Self {
        let take = || {
            let left = context.transactions.get().checked_sub(1)?;
            context.transactions.set(left);
            Some(Self(Rc::clone(context)))
        };
        loop {
            if let Some(permit) = context.until(None, take).await {
                return permit;
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let left = self.0.transactions.get();
        self.0.transactions.set(left.saturating_add(1));
        self.0.wake();
    }
}

impl Transaction {
    /// Reads a node's value.
    pub fn read(&self, path: &str) -> Reply<Vec<u8>> {
        self.store.request(&Request::Read(path), self.id, Ok)
    }

    /// Writes a node's value.
    pub fn write(&self, path: &str, value: &[u8]) -> Reply<()> {
        self.store
            .request(&Request::Write(path, value), self.id, |_| Ok(()))
    }

    /// Removes a node and everything below it.
    pub fn remove(&self, path: &str) -> Reply<()> {
        self.store
            .request(&Request::Remove(path), self.id, |_| Ok(()))
    }

    async fn commit(mut self) -> Result<(), Error> {
        self.open = false;
        self.store
            .request(&Request::TransactionEnd(true), self.id, |_| Ok(()))
            .await
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        let end = Request::TransactionEnd(false).encode(self.id);
        if let Ok(message) = end
            && self.open
        {
            self.store
                .context
                .client
                .borrow_mut()
                .submit_release(message);
        }
    }
}

/// A watch that is set; dropping it removes it.
pub struct Watch {
    context: Rc<Context>,
    id: WatchId,
}

impl Watch {
    /// Waits until something at or below the watched path may have changed, and forgets it.
    pub async fn changed(&self) -> Dirty {
        let probe = || self.is_dirty().then(|| self.take());
        self.context.until(None, probe).await.unwrap_or_default()
    }

    /// Whether something may have changed.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.context.client.borrow().is_dirty(self.id)
    }

    /// What changed, and forgets it.
    #[must_use]
    pub fn take(&self) -> Dirty {
        self.context.client.borrow_mut().take_dirty(self.id)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.context.client.borrow_mut().unwatch(self.id);
    }
}

/// The reply to a request that is on its way.
#[must_use = "a request whose reply is not awaited may have failed"]
pub struct Reply<T> {
    context: Rc<Context>,
    state: ReplyState,
    read: fn(Vec<u8>) -> Result<T, Error>,
}

enum ReplyState {
    /// The queue was full.
    Unsent(Encoded),
    Waiting(Ticket),
    Failed(Error),
    Finished,
}

impl ReplyState {
    fn submit(context: &Context, message: Encoded) -> Self {
        match context.client.borrow_mut().submit(message) {
            Ok(ticket) => Self::Waiting(ticket),
            Err(message) => Self::Unsent(message),
        }
    }
}

impl<T> Future for Reply<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<Self::Output> {
        // A request that found no room goes out now. The order of one task's requests is kept: while there is no
        // room there is none for its later ones either, and it awaits them in order.
        self.state = match core::mem::replace(&mut self.state, ReplyState::Finished) {
            ReplyState::Unsent(message) => ReplyState::submit(&self.context, message),
            state => state,
        };
        let reply = match &self.state {
            ReplyState::Unsent(_) | ReplyState::Finished => return Poll::Pending,
            ReplyState::Failed(error) => return Poll::Ready(Err(*error)),
            ReplyState::Waiting(ticket) => self.context.client.borrow_mut().take_reply(ticket),
        };
        let Some(reply) = reply else {
            return Poll::Pending;
        };
        self.state = ReplyState::Finished;
        Poll::Ready(reply.map_err(Error::Refused).and_then(self.read))
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let ReplyState::Waiting(ticket) = &self.state {
            self.context.client.borrow_mut().abandon(ticket);
        }
    }
}
