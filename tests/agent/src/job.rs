//! Commands that the host has started and not yet seen the end of.

use std::collections::HashMap;
use std::io::{self, PipeReader, Read as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::protocol::{Exit, Reply};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::agent::milliseconds;
use crate::port::Port;

/// Largest output message, in bytes before escaping.
const CHUNK: usize = 8 * 1024;

/// How long output is awaited after the shell's end when a background child
/// still holds the pipe.
const STRAGGLERS: Duration = Duration::from_millis(100);

/// A running command, as far as killing it needs.
#[derive(Debug, Clone)]
struct Running {
    group: Pid,
    killed: Arc<AtomicBool>,
}

/// The table of running commands.
#[derive(Debug, Clone)]
pub(crate) struct Jobs {
    port: Arc<Port>,
    running: Arc<Mutex<HashMap<u64, Running>>>,
}

impl Jobs {
    /// An empty table that reports to `port`.
    pub(crate) fn new(port: Arc<Port>) -> Self {
        Self {
            port,
            running: Arc::default(),
        }
    }

    /// Starts a shell command; its end is reported whatever happens.
    pub(crate) fn start(&self, id: u64, timeout_s: u64, command: String) {
        let jobs = self.clone();
        thread::spawn(move || {
            let begun = Instant::now();
            let exit = jobs
                .run(id, Duration::from_secs(timeout_s), &command)
                .unwrap_or_else(|error| {
                    let bytes = format!("lab agent: {error}\n").into_bytes();
                    jobs.port.reply(&Reply::Out { id, bytes });
                    Exit::Code(126)
                });
            jobs.port.reply(&Reply::End {
                id,
                exit,
                guest_ms: milliseconds(begun),
            });
        });
    }

    /// Kills the process group of a job; an unknown number has ended already.
    pub(crate) fn kill(&self, id: u64) {
        let found = self
            .running
            .lock()
            .ok()
            .and_then(|running| running.get(&id).cloned());
        if let Some(job) = found {
            job.killed.store(true, Ordering::Relaxed);
            let _ = killpg(job.group, Signal::SIGKILL);
        }
    }

    fn run(&self, id: u64, timeout: Duration, command: &str) -> io::Result<Exit> {
        let (reader, writer) = io::pipe()?;
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            // A group of its own, so that a pipeline dies as a whole.
            .process_group(0)
            .spawn()?;
        let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let killed = Arc::new(AtomicBool::new(false));
        if let Ok(mut running) = self.running.lock() {
            running.insert(
                id,
                Running {
                    group,
                    killed: Arc::clone(&killed),
                },
            );
        }
        let output = self.forward(id, reader);
        let (ended, end) = mpsc::channel();
        thread::spawn(move || ended.send(child.wait()));
        let mut timed_out = false;
        let status = end.recv_timeout(timeout).or_else(|_| {
            timed_out = true;
            let _ = killpg(group, Signal::SIGKILL);
            end.recv()
        });
        if let Ok(mut running) = self.running.lock() {
            running.remove(&id);
        }
        output.finish();
        Ok(match status.map_err(io::Error::other)?? {
            _ if timed_out => Exit::Timeout,
            _ if killed.load(Ordering::Relaxed) => Exit::Killed,
            status => Exit::Code(shell_code(status)),
        })
    }

    /// Sends what the command writes, piece by piece, from a thread of its own.
    fn forward(&self, id: u64, mut reader: PipeReader) -> Forwarding {
        let muted = Arc::new(Mutex::new(false));
        let (done, drained) = mpsc::channel::<()>();
        let port = Arc::clone(&self.port);
        let muted_there = Arc::clone(&muted);
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                let bytes = buffer.get(..len).unwrap_or_default().to_vec();
                // Held while sending: nothing may follow the job's last message.
                let Ok(muted) = muted_there.lock() else { break };
                if !*muted {
                    port.reply(&Reply::Out { id, bytes });
                }
            }
            drop(done);
        });
        Forwarding { muted, drained }
    }
}

/// The output side of a job.
struct Forwarding {
    muted: Arc<Mutex<bool>>,
    drained: mpsc::Receiver<()>,
}

impl Forwarding {
    /// Waits for the rest of the output, but not for background children.
    fn finish(self) {
        let _ = self.drained.recv_timeout(STRAGGLERS);
        if let Ok(mut muted) = self.muted.lock() {
            *muted = true;
        }
    }
}

/// The number a shell would show for this end.
fn shell_code(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| signal.saturating_add(128)))
        .unwrap_or(255)
}
