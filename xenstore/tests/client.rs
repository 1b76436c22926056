//! The client and the store handle, over the fake store and over hostile bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use kit::{Bench, SELF, client_vif};
use proptest::prelude::*;
use xen::stream::{ByteStream, StreamError};
use xen::{DomId, Time};
use xenstore::client::{Client, Dirty, Fatal};
use xenstore::fake::{Access, Chunking, FakeFrontend};
use xenstore::wire::{ErrorCode, Header, Request, RequestError, kind};
use xenstore::{
    Error, MAX_OUTSTANDING, MAX_QUEUED, MAX_WATCHES, NodeAnswer, NodeRequest, Options,
    SILENCE_LIMIT, Store,
};

/// A bench with no tasks of its own.
fn bare() -> Bench {
    let mut bench = Bench::new(Options {
        backend: false,
        uplink: false,
        control: false,
        config: None,
    });
    bench.settle();
    bench
}

/// Runs a task to its end and returns its result.
fn run<T: 'static>(bench: &mut Bench, task: impl AsyncFnOnce(Store) -> T + 'static) -> T {
    let result = Rc::new(RefCell::new(None));
    let place = Rc::clone(&result);
    let store = bench.plane.store();
    bench
        .plane
        .store()
        .spawn(async move { *place.borrow_mut() = Some(task(store).await) })
        .unwrap();
    bench.settle();
    result.take().expect("the task has ended")
}

/// A stream of prepared bytes that takes everything.
struct Script {
    bytes: Vec<u8>,
    piece: usize,
    sent: Vec<u8>,
}

impl Script {
    fn new(bytes: Vec<u8>, piece: usize) -> Self {
        Self {
            bytes,
            piece,
            sent: Vec::new(),
        }
    }
}

impl ByteStream for Script {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let count = self.bytes.len().min(buffer.len()).min(self.piece);
        buffer[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes.drain(..count);
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        self.sent.extend_from_slice(bytes);
        Ok(bytes.len())
    }
}

fn message(kind: u32, request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let mut bytes = Header {
        kind,
        request,
        transaction: 0,
        len,
    }
    .encode()
    .to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// A client that has sent one READ (request 1) and is pumped over `bytes`.
fn after(bytes: Vec<u8>) -> (Client, xenstore::client::Ticket, Result<(), Fatal>) {
    let mut client = Client::new();
    let ticket = client
        .submit(Request::Read("a").encode(0).unwrap())
        .unwrap();
    let mut stream = Script::new(Vec::new(), usize::MAX);
    client.pump(&mut stream, Time(0)).unwrap();
    stream.bytes = bytes;
    let result = client.pump(&mut stream, Time(0)).map(|_| ());
    (client, ticket, result)
}

#[test]
fn p8_a_reply_is_understood_at_every_chunking_with_events_around_it() {
    let mut bytes = Vec::new();
    for part in [
        message(kind::WATCH_EVENT, 0, b"x\x0099\0"),
        message(kind::READ, 1, b"value"),
        message(kind::WATCH_EVENT, 0, b"no token"),
        message(kind::ERROR, 2, b"ENOENT\0"),
    ] {
        bytes.extend(part);
    }
    for piece in 1..=bytes.len() {
        let mut client = Client::new();
        let mut stream = Script::new(Vec::new(), piece);
        let first = client
            .submit(Request::Read("a").encode(0).unwrap())
            .unwrap();
        let second = client
            .submit(Request::Read("b").encode(0).unwrap())
            .unwrap();
        client.pump(&mut stream, Time(0)).unwrap();
        stream.bytes.clone_from(&bytes);
        client.pump(&mut stream, Time(0)).unwrap();
        assert_eq!(client.take_reply(&first), Some(Ok(b"value".to_vec())));
        assert_eq!(client.take_reply(&second), Some(Err(ErrorCode::NotFound)));
        assert_eq!(client.counters().stray_events, 2);
        assert!(client.is_idle());
    }
}

#[test]
fn p8_replies_that_cannot_be_are_fatal_and_stay_so() {
    let oversize = Header {
        kind: kind::READ,
        request: 1,
        transaction: 0,
        len: 4097,
    }
    .encode()
    .to_vec();
    for (bytes, fatal) in [
        (oversize, Fatal::Oversize { len: 4097 }),
        (
            message(kind::READ, 2, b""),
            Fatal::UnknownRequest { request: 2 },
        ),
        (
            message(kind::READ, 0, b""),
            Fatal::UnknownRequest { request: 0 },
        ),
        (
            message(kind::ERROR, 7, b"EIO\0"),
            Fatal::UnknownRequest { request: 7 },
        ),
        (
            message(kind::WRITE, 1, b"OK\0"),
            Fatal::WrongType {
                expected: kind::READ,
                found: kind::WRITE,
            },
        ),
        (message(77, 1, b""), Fatal::UnknownType { kind: 77 }),
    ] {
        let (mut client, ticket, result) = after(bytes);
        assert_eq!(result, Err(fatal));
        assert_eq!(client.take_reply(&ticket), None);
        let again = client.pump(&mut Script::new(Vec::new(), 1), Time(0));
        assert_eq!(again, Err(fatal));
    }
    // A second reply to the same request.
    let (_, _, result) =
        after([message(kind::READ, 1, b"v"), message(kind::READ, 1, b"v")].concat());
    assert_eq!(result, Err(Fatal::UnknownRequest { request: 1 }));
}

#[test]
fn a_broken_ring_is_fatal() {
    let mut bench = bare();
    bench.link.break_stream();
    assert_eq!(
        bench.plane.poll(&mut bench.link, bench.now),
        Err(Fatal::Stream)
    );
}

#[test]
fn a_minute_of_silence_is_fatal_but_a_pause_of_the_domain_is_not() {
    let mut bench = bare();
    bench.store.freeze(true);
    drop(bench.plane.store().read("name"));
    let start = bench.now;
    bench.plane.poll(&mut bench.link, bench.now).unwrap();
    // The whole domain stands still for an hour: one long gap between two calls.
    bench.now = bench.now.plus(Duration::from_secs(3600));
    bench.plane.poll(&mut bench.link, bench.now).unwrap();
    let mut end = None;
    for _ in 0..100 {
        bench.now = bench.plane.deadline().unwrap();
        if let Err(fatal) = bench.plane.poll(&mut bench.link, bench.now) {
            end = Some(fatal);
            break;
        }
    }
    assert_eq!(end, Some(Fatal::Silence));
    let waited = bench.now.since(start.plus(Duration::from_secs(3600)));
    assert!(
        waited <= SILENCE_LIMIT && waited > SILENCE_LIMIT / 2,
        "{waited:?}"
    );
    // Without a request outstanding silence is normal.
    let mut bench = bare();
    bench.store.freeze(true);
    bench.pass(Duration::from_secs(600));
}

#[test]
fn no_more_than_the_limit_is_outstanding_and_a_full_queue_gives_the_message_back() {
    let mut client = Client::new();
    let mut stream = Script::new(Vec::new(), usize::MAX);
    let read = || Request::Read("a").encode(0).unwrap();
    for _ in 0..MAX_QUEUED {
        client.submit(read()).unwrap();
    }
    assert_eq!(client.submit(read()), Err(read()));
    client.pump(&mut stream, Time(0)).unwrap();
    assert_eq!(client.outstanding(), MAX_OUTSTANDING);
    assert_eq!(stream.sent.len(), MAX_OUTSTANDING * 18);
    for _ in 0..MAX_OUTSTANDING {
        client.submit(read()).unwrap();
    }
    assert!(client.submit(read()).is_err());
    // What gives a resource back always finds room.
    client.submit_release(Request::TransactionEnd(false).encode(9).unwrap());
    stream.bytes = message(kind::READ, 1, b"");
    client.pump(&mut stream, Time(0)).unwrap();
    assert_eq!(client.outstanding(), MAX_OUTSTANDING);
}

#[test]
fn tasks_wait_for_room_in_a_full_queue() {
    let mut bench = bare();
    bench.store.set_pace(Some(1));
    let found = run(&mut bench, async |store| {
        let replies: Vec<_> = (0..500)
            .map(|number| store.write(&format!("data/{number}"), b"x"))
            .collect();
        let mut written = 0;
        for reply in replies {
            written += usize::from(reply.await.is_ok());
        }
        (written, store.list("data").await.map(|names| names.len()))
    });
    assert_eq!(found, (500, Ok(500)));
    assert!(bench.store.most_outstanding(SELF) <= MAX_OUTSTANDING);
}

#[test]
fn b24_events_without_end_cost_bounded_memory() {
    let mut client = Client::new();
    let mut stream = Script::new(Vec::new(), usize::MAX);
    let (coarse, _) = client.watch("c", false).unwrap();
    let (fine, _) = client.watch("f", true).unwrap();
    client.pump(&mut stream, Time(0)).unwrap();
    for number in 0..100_000_u32 {
        stream.bytes.extend(message(
            kind::WATCH_EVENT,
            0,
            format!("c/{number}\x001\0").as_bytes(),
        ));
        stream.bytes.extend(message(
            kind::WATCH_EVENT,
            0,
            format!("f/{}\x002\0", number % 60).as_bytes(),
        ));
        client.pump(&mut stream, Time(0)).unwrap();
    }
    assert_eq!(client.take_dirty(coarse), Dirty::Anything);
    let Dirty::Paths(paths) = client.take_dirty(fine) else {
        panic!()
    };
    assert_eq!(paths.len(), 60);
    assert_eq!(client.take_dirty(fine), Dirty::Clean);
    for number in 0..65 {
        stream.bytes.extend(message(
            kind::WATCH_EVENT,
            0,
            format!("f/{number}\x002\0").as_bytes(),
        ));
    }
    client.pump(&mut stream, Time(0)).unwrap();
    assert_eq!(client.take_dirty(fine), Dirty::Anything);
    let long = format!("f/{}\x002\0", "x".repeat(2000));
    stream.bytes = message(kind::WATCH_EVENT, 0, long.as_bytes());
    client.pump(&mut stream, Time(0)).unwrap();
    assert_eq!(client.take_dirty(fine), Dirty::Anything);
}

#[test]
fn an_event_that_comes_before_the_reply_to_its_cause_is_kept() {
    for event_first in [false, true] {
        let mut bench = bare();
        bench.store.set_event_before_watch_reply(event_first);
        let seen = run(&mut bench, async |store| {
            let watch = store.watch_paths("data").await.unwrap();
            let first = watch.changed().await;
            store.write("data/x", b"1").await.unwrap();
            (first, watch.is_dirty(), watch.take())
        });
        let paths = |path: &str| Dirty::Paths(vec![path.to_owned()]);
        assert_eq!(seen, (paths("data"), true, paths("data/x")));
        assert_eq!(bench.store.watches(SELF), 0, "released when dropped");
    }
}

#[test]
fn p10_the_watch_over_the_quota_is_refused_and_the_others_work() {
    for (quota, ours) in [(20, 20), (1000, MAX_WATCHES)] {
        let mut bench = bare();
        bench.store.set_watch_quota(quota);
        let (set, error) = run(&mut bench, async |store| {
            let mut watches = Vec::new();
            loop {
                match store.watch("data").await {
                    Ok(watch) => watches.push(watch),
                    Err(error) => return (watches.len(), error),
                }
            }
        });
        assert_eq!((set, error), (ours, Error::Refused(ErrorCode::TooBig)));
        assert_eq!(bench.store.watches(SELF), 0);
        assert_eq!(bench.plane.watch_count(), 0);
    }
}

#[test]
fn impossible_requests_fail_without_reaching_the_store() {
    let mut bench = bare();
    let before = bench.store.requests(SELF);
    let errors = run(&mut bench, async |store| {
        (
            store.read("a.b").await,
            store.write("a", &[0; 5000]).await,
            store.watch("").await.map(drop),
        )
    });
    assert_eq!(errors.0, Err(Error::Request(RequestError::InvalidPath)));
    assert_eq!(errors.1, Err(Error::Request(RequestError::PayloadTooLong)));
    assert_eq!(errors.2, Err(Error::Request(RequestError::InvalidPath)));
    assert_eq!(bench.store.requests(SELF), before);
}

#[test]
fn a_transaction_is_tried_again_after_conflicts_and_given_up_after_ten() {
    for (conflicts, expected) in [
        (0, Ok(0)),
        (9, Ok(9)),
        (10, Err(Error::Conflict)),
        (1000, Err(Error::Conflict)),
    ] {
        let mut bench = bare();
        let mut left = conflicts;
        bench.store.on_request(move |store, kind, _| {
            if kind == kind::TRANSACTION_END && left > 0 {
                left -= 1;
                let path = format!("/local/domain/{SELF}/data");
                store.write(&path, &left.to_string());
            }
        });
        let result = run(&mut bench, async |store| {
            let attempts = std::cell::Cell::new(0);
            store
                .transaction(async |transaction| {
                    let _ = transaction.read("data").await?;
                    transaction.write("data/x", b"1").await?;
                    attempts.set(attempts.get() + 1);
                    Ok(attempts.get() - 1)
                })
                .await
        });
        assert_eq!(result, expected);
        assert_eq!(bench.store.transactions(SELF), 0);
        assert_eq!(
            bench.store.exists(&format!("/local/domain/{SELF}/data/x")),
            expected.is_ok()
        );
    }
}

#[test]
fn a_transaction_whose_body_fails_is_thrown_away() {
    let mut bench = bare();
    let result = run(&mut bench, async |store| {
        store
            .transaction(async |transaction| {
                transaction.write("data/x", b"1").await?;
                transaction.read("data/missing").await
            })
            .await
    });
    assert_eq!(result, Err(Error::NOT_FOUND));
    bench.settle();
    assert_eq!(bench.store.transactions(SELF), 0);
    assert!(!bench.store.exists(&format!("/local/domain/{SELF}/data/x")));
}

#[test]
fn fewer_transactions_are_open_than_the_daemon_allows() {
    let mut bench = bare();
    for number in 0..50 {
        let store = bench.plane.store();
        let task = async move {
            let path = format!("data/{number}");
            store
                .transaction(async |transaction| transaction.write(&path, b"x").await)
                .await
                .unwrap();
        };
        bench.plane.store().spawn(task).unwrap();
    }
    bench.settle();
    assert_eq!(
        bench
            .store
            .list(&format!("/local/domain/{SELF}/data"))
            .len(),
        50
    );
}

#[test]
fn a_list_longer_than_a_message_is_gathered_from_parts_also_while_it_changes() {
    let mut bench = bare();
    for number in 0..3000 {
        bench
            .store
            .write(&format!("/local/domain/{SELF}/data/name-{number:05}"), "");
    }
    let mut parts = 0;
    bench.store.on_request(move |store, kind, _| {
        if kind == kind::DIRECTORY_PART {
            parts += 1;
            if parts == 3 {
                store.remove(&format!("/local/domain/{SELF}/data/name-00000"));
            }
        }
    });
    let names = run(&mut bench, async |store| store.list("data").await.unwrap());
    assert_eq!(names.len(), 2999);
    assert_eq!(names.last().map(String::as_str), Some("name-02999"));
    // One that never rests is given up.
    let mut number = 0;
    bench.store.on_request(move |store, kind, _| {
        if kind == kind::DIRECTORY_PART {
            number += 1;
            store.write(&format!("/local/domain/{SELF}/data/more-{number}"), "");
        }
    });
    let names = run(&mut bench, async |store| store.list("data").await);
    assert_eq!(names, Err(Error::Conflict));
}

#[test]
fn lists_of_any_length_around_the_limit_are_whole() {
    // 4,096 bytes are 64 names of 64 bytes with their ends.
    for count in 60..70 {
        let mut bench = bare();
        for number in 0..count {
            bench
                .store
                .write(&format!("/local/domain/{SELF}/data/{number:063}"), "");
        }
        let names = run(&mut bench, async |store| store.list("data").await.unwrap());
        assert_eq!(names.len(), count);
    }
}

#[test]
fn a_whole_life_of_a_vif_works_at_every_chunking() {
    let chunkings = (1..40)
        .map(Chunking::Bytes)
        .chain((1..40).map(Chunking::Random));
    for chunking in chunkings {
        let mut bench = Bench::backend();
        bench.link.set_chunking(chunking);
        bench.store.set_event_before_watch_reply(
            matches!(chunking, Chunking::Random(seed) if seed % 2 == 0),
        );
        let vif = client_vif(7);
        bench.toolstack.attach(&vif);
        let settle = |bench: &mut Bench| {
            for _ in 0..200 {
                bench.pass_millis(1);
            }
        };
        settle(&mut bench);
        assert_eq!(bench.own_state(&vif).as_deref(), Some("2"), "{chunking:?}");
        let frontend = FakeFrontend::new(bench.store.clone(), vif.clone());
        frontend.connect();
        settle(&mut bench);
        assert_eq!(bench.own_state(&vif).as_deref(), Some("4"), "{chunking:?}");
        bench.toolstack.request_detach(&vif);
        settle(&mut bench);
        frontend.set_state(6);
        settle(&mut bench);
        assert!(!bench.store.exists(&vif.backend_folder()), "{chunking:?}");
        assert_eq!(bench.store.watches(SELF), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn p8_arbitrary_bytes_from_the_store_are_parsed_or_fatal(
        junk in prop::collection::vec(any::<u8>(), 0..300),
        messages in prop::collection::vec((0..30_u32, 0..4_u32, prop::collection::vec(any::<u8>(), 0..40)), 0..20),
        piece in 1..64_usize,
    ) {
        let mut bytes = Vec::new();
        for (kind, request, payload) in messages {
            bytes.extend(message(kind, request, &payload));
        }
        bytes.extend(junk);
        let mut client = Client::new();
        let (watch, _) = client.watch("a", true).unwrap();
        let ticket = client.submit(Request::Read("a").encode(0).unwrap()).unwrap();
        let mut stream = Script::new(Vec::new(), usize::MAX);
        client.pump(&mut stream, Time(0)).unwrap();
        stream.bytes = bytes;
        stream.piece = piece;
        let _ = client.pump(&mut stream, Time(0));
        let _ = (client.take_dirty(watch), client.take_reply(&ticket));
        client.unwatch(watch);
        prop_assert!(client.outstanding() <= 2);
    }

    #[test]
    fn p8_arbitrary_bytes_do_not_upset_running_tasks(
        kinds in prop::collection::vec((0..30_u32, 0..30_u32, prop::collection::vec(any::<u8>(), 0..40)), 1..20),
    ) {
        let mut bench = Bench::new(Options::default());
        let vif = client_vif(7);
        bench.toolstack.attach(&vif);
        for (kind, request, payload) in kinds {
            bench.store.inject(SELF, &message(kind, request, &payload));
            for _ in 0..3 {
                let _ = bench.plane.poll(&mut bench.link, bench.now);
                while bench.plane.next_event().is_some() {}
            }
        }
    }
}

#[test]
fn nodes_are_published_read_watched_and_removed_on_behalf_of_the_kernel() {
    let mut bench = bare();
    let home = format!("/local/domain/{SELF}");
    bench
        .store
        .create(&format!("{home}/data"), "", SELF, &[], Access::None);
    for request in [
        NodeRequest::Publish {
            path: "data/vchan/0/512/event-channel".into(),
            value: "14".into(),
            owner: SELF,
            reader: DomId::DOM0,
        },
        NodeRequest::Watch {
            path: "data/watched".into(),
            token: 7,
        },
        NodeRequest::Read {
            path: "data/vchan/0/512/event-channel".into(),
            token: 8,
        },
        NodeRequest::Read {
            path: "data/absent".into(),
            token: 9,
        },
    ] {
        bench.plane.submit(request);
    }
    bench.settle();
    let mut answers = Vec::new();
    while let Some(answer) = bench.plane.next_answer() {
        answers.push(answer);
    }
    assert!(answers.contains(&NodeAnswer::Fired(7)), "{answers:?}");
    assert!(answers.contains(&NodeAnswer::Read(8, Some(b"14".to_vec()))));
    assert!(answers.contains(&NodeAnswer::Read(9, None)));

    bench.store.write(&format!("{home}/data/watched"), "x");
    bench.settle();
    assert_eq!(bench.plane.next_answer(), Some(NodeAnswer::Fired(7)));
    assert_eq!(bench.plane.next_answer(), None);
    let held = bench.plane.watch_count();
    bench.plane.submit(NodeRequest::Unwatch { token: 7 });
    bench.plane.submit(NodeRequest::Remove {
        path: "data/vchan/0/512".into(),
    });
    bench.settle();
    assert_eq!(bench.plane.watch_count(), held - 1);
    bench.plane.submit(NodeRequest::Read {
        path: "data/vchan/0/512/event-channel".into(),
        token: 10,
    });
    bench.settle();
    assert_eq!(bench.plane.next_answer(), Some(NodeAnswer::Read(10, None)));
}
