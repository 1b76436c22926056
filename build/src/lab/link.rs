//! A way to an agent, and the jobs that run over it.
//!
//! The same for dom0, whose agent is reached by the control port, and for a
//! guest, whose agent is reached by its console through dom0. Several jobs may
//! run over one link at once.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use data_encoding::BASE64;
use lab_agent::protocol::{Exit, LineAssembler, MAX_PIECE, Reply, Request};

/// How much longer than its own timeout a job is waited for: the guest kills it
/// and reports, which takes a moment on a busy host.
const GRACE: Duration = Duration::from_secs(30);

/// How often an agent that may not be there yet is called.
const CALL_EVERY: Duration = Duration::from_millis(500);

type SendLine = Box<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

struct Shared {
    name: String,
    send: SendLine,
    waiting: Mutex<Waiting>,
    lines: Mutex<LineAssembler>,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: HashMap<u64, Sender<Reply>>,
    lost: bool,
}

/// A way to an agent; clones share it.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.0.name)
    }
}

/// How a command went.
#[derive(Debug, Clone)]
pub struct Output {
    /// What it wrote, standard output and error as they came.
    pub stdout: String,
    /// Its exit code; 124 after a timeout.
    pub code: i32,
    /// How it ended.
    pub exit: Exit,
    /// Milliseconds by the guest's clock.
    pub guest_ms: u64,
}

impl Output {
    /// Whether the command ended with status 0.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.exit == Exit::Code(0)
    }

    /// The value of `key=value` in the output, as the probes of the agent print it.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.stdout
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

impl Link {
    /// A link that sends its lines by `send`.
    pub fn new(
        name: impl Into<String>,
        send: impl Fn(&str) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            name: name.into(),
            send: Box::new(send),
            waiting: Mutex::default(),
            lines: Mutex::default(),
        }))
    }

    /// Sends a request without waiting for an answer.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn send(&self, request: &Request) -> Result<()> {
        (self.0.send)(&format!("{request}\n"))
            .with_context(|| format!("the channel to {} is gone", self.0.name))
    }

    /// Takes bytes from the other end and passes on what belongs to nobody's job.
    pub fn feed(&self, bytes: &[u8], mut other: impl FnMut(Reply)) {
        let mut replies = Vec::new();
        let mut lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.feed(bytes, |line| replies.extend(Reply::parse(line)));
        drop(lines);
        for reply in replies {
            match &reply {
                Reply::Pong(id) | Reply::Out { id, .. } | Reply::End { id, .. } => {
                    let job = self.waiting().jobs.get(id).cloned();
                    if let Some(job) = job {
                        // Nobody may be interested any more.
                        let _ = job.send(reply);
                    }
                }
                Reply::Ready(_) | Reply::Console { .. } => other(reply),
            }
        }
    }

    /// The other end is gone: every job fails, now and later.
    pub fn lose(&self) {
        let mut waiting = self.waiting();
        waiting.lost = true;
        waiting.jobs.clear();
    }

    /// Starts a command; it is killed after `timeout` of guest time.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn start(&self, command: &str, timeout: Duration) -> Result<Job> {
        let job = self.job()?;
        let timeout_s = timeout.as_secs().max(1);
        self.send(&Request::Run {
            id: job.id,
            timeout_s,
            command: command.to_owned(),
        })?;
        Ok(job.limited(timeout))
    }

    /// Runs a command and waits for it.
    ///
    /// # Errors
    ///
    /// If the other end is gone; a command that fails is an [`Output`].
    pub fn run(&self, command: &str, timeout: Duration) -> Result<Output> {
        self.start(command, timeout)?.wait()
    }

    /// Runs a command that must succeed and returns what it wrote.
    ///
    /// # Errors
    ///
    /// If it does not; the error quotes command and output.
    pub fn ask(&self, command: &str, timeout: Duration) -> Result<String> {
        let output = self.run(command, timeout)?;
        if output.is_success() {
            return Ok(output.stdout);
        }
        let said = super::console::last_lines(&output.stdout, 20);
        bail!(
            "{}: `{command}` ended with {:?}: {said}",
            self.0.name,
            output.exit
        )
    }

    /// Writes a file in the domain.
    ///
    /// # Errors
    ///
    /// If it cannot be written or the other end is gone.
    pub fn put(&self, path: &str, mode: u32, content: &[u8], timeout: Duration) -> Result<()> {
        let job = self.job()?;
        self.send(&Request::Put {
            id: job.id,
            mode,
            path: path.to_owned(),
        })?;
        for piece in content.chunks(MAX_PIECE) {
            self.send(&Request::Data {
                id: job.id,
                bytes: piece.to_vec(),
            })?;
        }
        self.send(&Request::Done(job.id))?;
        let output = job.limited(timeout).wait()?;
        if !output.is_success() {
            bail!("{}: cannot write {path}: {}", self.0.name, output.stdout);
        }
        Ok(())
    }

    /// Reads a file of the domain.
    ///
    /// # Errors
    ///
    /// If it cannot be read or the other end is gone.
    pub fn get(&self, path: &str, timeout: Duration) -> Result<Vec<u8>> {
        let text = self.ask(&format!("base64 '{path}'"), timeout)?;
        let digits: Vec<u8> = text
            .bytes()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        BASE64
            .decode(&digits)
            .with_context(|| format!("{path} arrived damaged"))
    }

    /// Calls the agent until it answers.
    ///
    /// # Errors
    ///
    /// If it does not within `timeout`, or `alive` says why it never will.
    pub fn wait_ready(&self, timeout: Duration, alive: impl Fn() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let job = self.job()?;
        while Instant::now() < deadline {
            alive()?;
            self.send(&Request::Ping(job.id))?;
            match job.replies.recv_timeout(CALL_EVERY) {
                Ok(_) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        alive()?;
        bail!("the agent in {} does not answer", self.0.name)
    }

    fn job(&self) -> Result<Job> {
        let (tell, replies) = mpsc::channel();
        let id = fresh_id();
        let mut waiting = self.waiting();
        if waiting.lost {
            bail!("the channel to {} is gone", self.0.name);
        }
        waiting.jobs.insert(id, tell);
        drop(waiting);
        Ok(Job {
            id,
            link: self.clone(),
            replies,
            limit: None,
            written: Vec::new(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job number that no earlier process used either: an agent that comes out of
/// a snapshot may still report jobs of the process that made it.
fn fresh_id() -> u64 {
    static NEXT: OnceLock<AtomicU64> = OnceLock::new();
    let start = || {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        AtomicU64::new(u64::try_from(since.as_millis()).unwrap_or_default() << 16)
    };
    NEXT.get_or_init(start).fetch_add(1, Ordering::Relaxed)
}

/// A command that has been started.
#[derive(Debug)]
pub struct Job {
    id: u64,
    link: Link,
    replies: Receiver<Reply>,
    limit: Option<Duration>,
    written: Vec<u8>,
}

/// What a running command does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It wrote something.
    Wrote(Vec<u8>),
    /// It ended; with milliseconds of guest time.
    Ended(Exit, u64),
    /// Nothing happened in the time given.
    Quiet,
}

impl Job {
    fn limited(mut self, timeout: Duration) -> Self {
        self.limit = Some(timeout);
        self
    }

    /// Waits for the end; the output is all of it, also what was seen before.
    ///
    /// # Errors
    ///
    /// If the other end is gone or does not even report the timeout.
    pub fn wait(mut self) -> Result<Output> {
        let deadline = self.limit.map(|limit| Instant::now() + limit + GRACE);
        loop {
            let left = deadline.map_or(GRACE, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            match self.next(left)? {
                Progress::Wrote(_) => {}
                Progress::Ended(exit, guest_ms) => {
                    let stdout = String::from_utf8_lossy(&self.written).into_owned();
                    return Ok(Output {
                        stdout,
                        code: exit.code(),
                        exit,
                        guest_ms,
                    });
                }
                Progress::Quiet => bail!("{} does not report the end of a job", self.link.0.name),
            }
        }
    }

    /// Waits for the next thing that happens.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn next(&mut self, timeout: Duration) -> Result<Progress> {
        match self.replies.recv_timeout(timeout) {
            Ok(Reply::Out { bytes, .. }) => {
                self.written.extend_from_slice(&bytes);
                Ok(Progress::Wrote(bytes))
            }
            Ok(Reply::End { exit, guest_ms, .. }) => Ok(Progress::Ended(exit, guest_ms)),
            Ok(_) | Err(RecvTimeoutError::Timeout) => Ok(Progress::Quiet),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the channel to {} is gone", self.link.0.name)
            }
        }
    }

    /// Waits until the output holds `needle`.
    ///
    /// # Errors
    ///
    /// If the command ends before, or the time is over.
    pub fn wait_output(&mut self, needle: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !String::from_utf8_lossy(&self.written).contains(needle) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next(left)? {
                Progress::Wrote(_) => {}
                Progress::Ended(exit, _) => {
                    bail!("the command ended with {exit:?} before it said {needle:?}")
                }
                Progress::Quiet => bail!("the command did not say {needle:?}"),
            }
        }
        Ok(())
    }

    /// Has the command killed; its end is still to be waited for.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn kill(&self) -> Result<()> {
        self.link.send(&Request::Kill(self.id))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.link.waiting().jobs.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link to an agent that answers every command with its own text.
    fn echo_link() -> Link {
        let (tell, told) = mpsc::channel::<String>();
        let link = Link::new("echo", move |line| {
            tell.send(line.to_owned()).map_err(io::Error::other)
        });
        let answering = link.clone();
        std::thread::spawn(move || {
            for line in told {
                let Some(Request::Run { id, command, .. }) = Request::parse(line.trim_end()) else {
                    continue;
                };
                let out = Reply::Out {
                    id,
                    bytes: command.into_bytes(),
                };
                let end = Reply::End {
                    id,
                    exit: Exit::Code(3),
                    guest_ms: 5,
                };
                answering.feed(format!("noise {out}\r\n{end}\n").as_bytes(), |_| {});
            }
        });
        link
    }

    #[test]
    fn output_and_status_reach_the_job_that_asked() {
        let output = echo_link()
            .run("icmp=3/13 from=10.137.0.5", Duration::from_secs(9))
            .unwrap();
        assert_eq!((output.code, output.guest_ms), (3, 5));
        assert_eq!(output.value("icmp"), Some("3/13"));
        assert_eq!(output.value("error"), None);
        assert!(!output.is_success());
    }

    #[test]
    fn a_lost_link_fails_every_job() {
        let link = Link::new("nobody", |_| Ok(()));
        let job = link.start("true", Duration::from_secs(9)).unwrap();
        link.lose();
        assert!(job.wait().is_err());
        assert!(link.run("true", Duration::from_secs(9)).is_err());
    }
}
