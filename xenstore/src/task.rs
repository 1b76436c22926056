//! The tiny executor: one clock, one queue of events, a bounded list of tasks.
//!
//! Tasks wait for conditions, not for wakers: `Context::until` looks at its condition each time the task is
//! polled, and every task is polled again whenever something happened that could concern any of them
//! (`Context::wake`). See the crate documentation for why.
//!
//! Single threaded; all sharing is by `Rc`, `Cell` and `RefCell`. A `RefCell` is only ever borrowed within one method of
//! this crate that calls nothing which could borrow it again, so borrows cannot collide.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::future::{Future, poll_fn};
use core::pin::Pin;
use core::task::{Poll, Waker};
use core::time::Duration;

use xen::Time;

use crate::client::Client;
use crate::control_plane::Event;
use crate::{MAX_TASKS, MAX_TRANSACTIONS};

/// How often all tasks are polled in one call before the main loop gets its turn again. Tasks that feed each other
/// settle within a few rounds.
const MAX_ROUNDS: usize = 16;

/// Events that one task may have waiting for the kernel.
const EVENT_BATCH: usize = 64;

type Job = Pin<Box<dyn Future<Output = ()>>>;

/// There is no room for another task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooManyTasks;

/// What all tasks and the control plane share.
pub(crate) struct Context {
    pub(crate) client: RefCell<Client>,
    clock: Cell<Time>,
    /// The earliest time that some task waits for, gathered anew in every round.
    deadline: Cell<Option<Time>>,
    woken: Cell<bool>,
    events: RefCell<VecDeque<Event>>,
    /// Events ever queued, and ever taken.
    emitted: Cell<u64>,
    taken: Cell<u64>,
    /// Transactions that may still be started.
    pub(crate) transactions: Cell<usize>,
    /// Tasks that were spawned since the last round.
    newborn: RefCell<Vec<Job>>,
    alive: Cell<usize>,
}

impl Context {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            client: RefCell::new(Client::new()),
            clock: Cell::default(),
            deadline: Cell::new(None),
            woken: Cell::new(true),
            events: RefCell::default(),
            emitted: Cell::new(0),
            taken: Cell::new(0),
            transactions: Cell::new(MAX_TRANSACTIONS),
            newborn: RefCell::default(),
            alive: Cell::new(0),
        })
    }

    pub(crate) fn now(&self) -> Time {
        self.clock.get()
    }

    pub(crate) fn set_now(&self, now: Time) {
        self.clock.set(now);
    }

    /// Tells that a condition which some task waits for may have changed.
    pub(crate) fn wake(&self) {
        self.woken.set(true);
    }

    /// Waits until `probe` yields something, or for `deadline`, then `None`.
    ///
    /// `probe` is called once per round, and must only look at things whose changes call [`Context::wake`].
    pub(crate) async fn until<T>(
        &self,
        deadline: Option<Time>,
        mut probe: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        poll_fn(|_| {
            if let Some(found) = probe() {
                return Poll::Ready(Some(found));
            }
            if let Some(deadline) = deadline {
                if deadline <= self.now() {
                    return Poll::Ready(None);
                }
                let sooner = self.deadline.get().is_none_or(|other| deadline < other);
                if sooner {
                    self.deadline.set(Some(deadline));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Waits for a time.
    pub(crate) async fn sleep_until(&self, time: Time) {
        self.until::<()>(Some(time), || None).await;
    }

    /// Waits for this long.
    pub(crate) async fn sleep(&self, duration: Duration) {
        self.sleep_until(self.now().plus(duration)).await;
    }

    /// Hands an event to the kernel and waits until the kernel has taken it, and so promised to obey.
    pub(crate) async fn emit(&self, event: Event) {
        self.emit_all([event]).await;
    }

    /// Hands events to the kernel, in this order, and waits until it has taken the last.
    ///
    /// The queue is bounded because every task waits here, with at most [`EVENT_BATCH`] events.
    pub(crate) async fn emit_all(&self, events: impl IntoIterator<Item = Event>) {
        let mut events = events.into_iter().peekable();
        while events.peek().is_some() {
            let mut number = self.emitted.get();
            for event in events.by_ref().take(EVENT_BATCH) {
                self.events.borrow_mut().push_back(event);
                number = number.saturating_add(1);
            }
            self.emitted.set(number);
            self.until(None, || (self.taken.get() >= number).then_some(()))
                .await;
        }
    }

    /// The next event for the kernel.
    pub(crate) fn take_event(&self) -> Option<Event> {
        let event = self.events.borrow_mut().pop_front()?;
        self.taken.set(self.taken.get().saturating_add(1));
        self.wake();
        Some(event)
    }

    /// Adds a task; it runs in the next round.
    pub(crate) fn spawn(
        &self,
        job: impl Future<Output = ()> + 'static,
    ) -> Result<(), TooManyTasks> {
        if self.alive.get() >= MAX_TASKS {
            return Err(TooManyTasks);
        }
        self.alive.set(self.alive.get().saturating_add(1));
        self.newborn.borrow_mut().push(Box::pin(job));
        self.wake();
        Ok(())
    }

    fn is_due(&self) -> bool {
        self.deadline
            .get()
            .is_some_and(|deadline| deadline <= self.now())
    }

    /// When tasks must run even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Time> {
        if self.woken.get() || self.client.borrow().has_news() {
            Some(self.now())
        } else {
            self.deadline.get()
        }
    }
}

/// The tasks themselves; apart from [`Context`] so that running one may use the context freely.
#[derive(Default)]
pub(crate) struct Tasks {
    jobs: Vec<Job>,
}

impl Tasks {
    /// Polls all tasks for as long as something concerns them. Returns whether any was polled.
    pub(crate) fn run(&mut self, context: &Context) -> bool {
        let mut ran = false;
        for _ in 0..MAX_ROUNDS {
            let news = context.client.borrow_mut().take_news();
            let woken = context.woken.replace(false);
            if !(news || woken || context.is_due()) {
                break;
            }
            ran = true;
            context.deadline.set(None);
            self.jobs.append(&mut context.newborn.borrow_mut());
            let before = self.jobs.len();
            let mut task_context = core::task::Context::from_waker(Waker::noop());
            self.jobs
                .retain_mut(|job| job.as_mut().poll(&mut task_context).is_pending());
            let ended = before.saturating_sub(self.jobs.len());
            if ended > 0 {
                context.alive.set(context.alive.get().saturating_sub(ended));
                context.wake();
            }
        }
        ran
    }
}
