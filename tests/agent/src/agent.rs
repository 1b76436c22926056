//! `lab agent`: serves the control channel until the domain ends.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use lab_agent::protocol::{Exit, LineAssembler, Reply, Request};
use lexopt::prelude::*;

use crate::Outcome;
use crate::job::Jobs;
use crate::port::{self, Port};
use crate::relay::Relays;

/// A file that is being received.
struct Upload {
    path: PathBuf,
    mode: u32,
    partial: File,
    begun: Instant,
}

/// Everything the agent keeps between two messages.
struct Agent {
    port: Arc<Port>,
    jobs: Jobs,
    relays: Relays,
    uploads: HashMap<u64, Upload>,
}

/// Runs `lab agent (--port NAME | --tty DEVICE) [--name NAME]`.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let mut device = None;
    let mut name = String::from("agent");
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("port") => {
                device = Some(
                    File::options()
                        .read(true)
                        .write(true)
                        .open(port::find_virtio_port(&arguments.value()?.string()?)?)?,
                );
            }
            Long("tty") => device = Some(port::open_raw_tty(Path::new(&arguments.value()?))?),
            Long("name") => name = arguments.value()?.string()?,
            other => return Err(other.unexpected().into()),
        }
    }
    let port = Arc::new(Port::new(device.ok_or("--port or --tty is needed")?)?);
    port.reply(&Reply::Ready(name));
    let mut agent = Agent {
        jobs: Jobs::new(Arc::clone(&port)),
        relays: Relays::new(Arc::clone(&port)),
        uploads: HashMap::new(),
        port,
    };
    let mut lines = LineAssembler::default();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let len = agent.port.read(&mut buffer)?;
        let mut requests = Vec::new();
        lines.feed(buffer.get(..len).unwrap_or_default(), |line| {
            requests.extend(Request::parse(line));
        });
        for request in requests {
            agent.serve(request);
        }
    }
}

impl Agent {
    fn serve(&mut self, request: Request) {
        match request {
            Request::Ping(id) => self.port.reply(&Reply::Pong(id)),
            Request::Run {
                id,
                timeout_s,
                command,
            } => self.jobs.start(id, timeout_s, command),
            Request::Kill(id) => self.jobs.kill(id),
            Request::Put { id, mode, path } => self.begin_upload(id, mode, PathBuf::from(path)),
            Request::Data { id, bytes } => self.continue_upload(id, &bytes),
            Request::Done(id) => self.end_upload(id),
            Request::Open { domid, tty } => self.relays.open(domid, Path::new(&tty)),
            Request::Send { domid, bytes } => self.relays.send(domid, bytes),
        }
    }

    /// Files arrive beside their place and are moved there when complete, so
    /// that a program that is being replaced may still be running.
    fn begin_upload(&mut self, id: u64, mode: u32, path: PathBuf) {
        if let Some(folder) = path.parent() {
            let _ = fs::create_dir_all(folder);
        }
        match File::create(partial_path(&path, id)) {
            Ok(partial) => {
                self.uploads.insert(
                    id,
                    Upload {
                        path,
                        mode,
                        partial,
                        begun: Instant::now(),
                    },
                );
            }
            Err(error) => self.upload_failed(id, &format!("{}: {error}", path.display())),
        }
    }

    fn continue_upload(&mut self, id: u64, bytes: &[u8]) {
        let Some(upload) = self.uploads.get_mut(&id) else {
            return;
        };
        if let Err(error) = upload.partial.write_all(bytes) {
            let path = upload.path.clone();
            self.uploads.remove(&id);
            let _ = fs::remove_file(partial_path(&path, id));
            self.upload_failed(id, &format!("{}: {error}", path.display()));
        }
    }

    fn end_upload(&mut self, id: u64) {
        // A missing entry has been reported when it failed.
        let Some(upload) = self.uploads.remove(&id) else {
            return;
        };
        let partial = partial_path(&upload.path, id);
        let placed = upload
            .partial
            .set_permissions(fs::Permissions::from_mode(upload.mode))
            .and_then(|()| fs::rename(&partial, &upload.path));
        match placed {
            Ok(()) => self.port.reply(&Reply::End {
                id,
                exit: Exit::Code(0),
                guest_ms: milliseconds(upload.begun),
            }),
            Err(error) => {
                self.upload_failed(id, &format!("{}: {error}", upload.path.display()));
            }
        }
    }

    fn upload_failed(&self, id: u64, why: &str) {
        self.port.reply(&Reply::Out {
            id,
            bytes: why.as_bytes().to_vec(),
        });
        self.port.reply(&Reply::End {
            id,
            exit: Exit::Code(1),
            guest_ms: 0,
        });
    }
}

fn partial_path(path: &Path, id: u64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".part{id}"));
    PathBuf::from(name)
}

/// Whole milliseconds since `begun` by the guest's monotonic clock.
pub(crate) fn milliseconds(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}
