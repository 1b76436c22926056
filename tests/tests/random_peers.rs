//! Peers that write anything anywhere: the drivers neither panic nor loop nor leak, and answer each slot once.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use tests::client::{Client, Piece};
use tests::frames::pattern;
use tests::netvm::Netvm;
use tests::raw::{self, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use tests::router::{FIRST_CLIENT, NETVM, ROUTER, Router, assert_nothing_left, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::{Extra, GsoType, RxFlags, TxFlags, TxRequest, TxResponse};
use xen::page::RingMemory;
use xen::{Access, GrantRef, GrantStatus, GrantedPage};

/// One thing that a hostile client does.
#[derive(Clone, Debug)]
enum ClientStep {
    /// A data slot; the page is one that it lent, or none at all.
    Slot {
        lent: bool,
        offset: u16,
        flags: u16,
        id: u16,
        size: u16,
    },
    Extra {
        kind: u8,
        more: bool,
        size: u16,
        family: u8,
    },
    Frame {
        len: usize,
        gso: bool,
    },
    Buffers(usize),
    BadBuffer {
        id: u16,
        read_only: bool,
    },
    Publish,
    /// Claims this many more (or fewer) requests than there are.
    Lie {
        rx: bool,
        by: i8,
    },
    Index {
        rx: bool,
        at: usize,
        value: u32,
    },
    Run,
}

fn client_step() -> impl Strategy<Value = ClientStep> {
    let near = prop_oneof![
        Just(0u16),
        Just(14),
        Just(60),
        Just(1514),
        Just(4096),
        any::<u16>()
    ];
    let size = prop_oneof![4 => 0u16..2000, 1 => any::<u16>()];
    prop_oneof![
        8 => (any::<bool>(), near, 0u16..16, any::<u16>(), size).prop_map(
            |(lent, offset, flags, id, size)| ClientStep::Slot {
                lent,
                offset: if offset > 4095 { offset } else { offset % 2600 },
                flags,
                id,
                size,
            }
        ),
        2 => (0u8..8, any::<bool>(), any::<u16>(), 0u8..4)
            .prop_map(|(kind, more, size, family)| ClientStep::Extra { kind, more, size, family }),
        4 => (14usize..20_000, any::<bool>()).prop_map(|(len, gso)| ClientStep::Frame {
            len: if gso { len } else { len % 1500 + 14 },
            gso,
        }),
        2 => (1usize..40).prop_map(ClientStep::Buffers),
        1 => (any::<u16>(), any::<bool>())
            .prop_map(|(id, read_only)| ClientStep::BadBuffer { id, read_only }),
        4 => Just(ClientStep::Publish),
        1 => (any::<bool>(), any::<i8>()).prop_map(|(rx, by)| ClientStep::Lie { rx, by }),
        1 => (any::<bool>(), prop_oneof![Just(REQ_EVENT), Just(RSP_EVENT)], any::<u32>())
            .prop_map(|(rx, at, value)| ClientStep::Index { rx, at, value }),
        6 => Just(ClientStep::Run),
    ]
}

/// Does a step; pages lent for good slots are kept in `lent`.
fn step(client: &mut Client, lent: &mut Vec<GrantedPage>, step: &ClientStep) {
    match *step {
        ClientStep::Slot {
            lent: real,
            offset,
            flags,
            id,
            size,
        } => {
            let page = client.grant_page(Access::ReadOnly);
            let gref = if real {
                page.gref()
            } else {
                GrantRef(u32::MAX)
            };
            lent.push(page);
            client.put_request(TxRequest {
                gref,
                offset,
                flags: TxFlags(flags),
                id,
                size,
            });
        }
        ClientStep::Extra {
            kind,
            more,
            size,
            family,
        } => {
            let [low, high] = size.to_le_bytes();
            let head = u32::from_le_bytes([kind, u8::from(more), low, high]);
            client.put_extra([head, family.into(), 0]);
        }
        ClientStep::Frame { len, gso } => {
            let frame = pattern(len, 1);
            let pieces: Vec<Piece> = frame
                .chunks(4096)
                .map(|bytes| Piece {
                    offset: 0,
                    bytes: bytes.to_vec(),
                })
                .collect();
            if client.tx_free() > pieces.len() {
                client.put_frame(
                    &pieces,
                    TxFlags::CSUM_BLANK,
                    gso.then_some((1448, GsoType::TcpV4)),
                );
            }
        }
        ClientStep::Buffers(count) => {
            client.post(count.min(250usize.saturating_sub(client.posted())))
        }
        ClientStep::BadBuffer { id, read_only } => {
            let access = if read_only {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            let page = client.grant_page(access);
            let gref = if read_only { page.gref() } else { GrantRef(3) };
            client.post_buffer(id, gref, page);
        }
        ClientStep::Publish | ClientStep::Run => client.publish(),
        ClientStep::Lie { rx, by } => {
            let (ring, index) = if rx {
                (client.rx_ring(), client.rx_prod)
            } else {
                (client.tx_ring(), client.tx_prod)
            };
            ring.shared()
                .write_u32(REQ_PROD, index.wrapping_add_signed(by.into()));
        }
        ClientStep::Index { rx, at, value } => {
            let ring = if rx {
                client.rx_ring()
            } else {
                client.tx_ring()
            };
            ring.shared().write_u32(at, value);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 5 } else { 300 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_hostile_client_breaks_at_most_itself(
        steps in prop::collection::vec(client_step(), 1..120),
        failing_copy in prop::option::of(0u64..40),
    ) {
        let machine = FakeMachine::new();
        let mut router = Router::new(&machine);
        let mut netvm = router.connect_uplink(&machine, tests::router::LINUX);
        let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
        router.connect_client(&client);
        let mut lent = Vec::new();
        if let Some(skip) = failing_copy {
            machine.fail(ROUTER, Operation::Copy(GrantStatus::GENERAL_ERROR), skip);
        }
        for (seed, one) in (0u32..).zip(&steps) {
            step(&mut client, &mut lent, one);
            if matches!(one, ClientStep::Run) {
                if netvm.buffers() > 0 {
                    netvm.deliver(&pattern(100, seed));
                }
                router.run(straight);
                for frame in netvm.take() {
                    prop_assert!((14..=65_535).contains(&frame.bytes.len()));
                    prop_assert!(frame.slots.len() <= 18);
                }
                netvm.answer_all();
            }
        }
        router.run(straight);
        netvm.take();
        netvm.answer_all();
        if let Some(vif) = router.vifs.first().and_then(Option::as_ref) {
            let consumed = vif.counters().received_slots;
            let answered = client.tx_ring().shared().read_u32(RSP_PROD);
            prop_assert_eq!(u64::from(answered), consumed, "one response for each slot");
            let answered = client.rx_ring().shared().read_u32(RSP_PROD);
            prop_assert_eq!(u64::from(answered), vif.counters().sent_slots);
        }
        prop_assert_eq!(router.uplink_error, None);
        netvm.close();
        router.close();
        for page in lent {
            client.take_back(page);
        }
        client.close();
        assert_nothing_left(&machine, ROUTER);
        assert_nothing_left(&machine, NETVM);
        assert_nothing_left(&machine, FIRST_CLIENT);
    }
}

/// A well-formed frame, into whose buffers nothing is written.
fn put_frame(netvm: &mut Netvm, len: usize, gso: bool) {
    let mut left = len;
    let mut first = gso;
    while left > 0 {
        let slot = left.min(4096);
        left -= slot;
        let mut flags = if left > 0 { RxFlags::MORE_DATA } else { 0 };
        if first {
            flags |= RxFlags::EXTRA_INFO;
        }
        let buffer = netvm.take_buffer();
        let status = i16::try_from(slot).unwrap();
        netvm.put_rx_words(tests::attack::response(buffer.id, 0, flags, status));
        if std::mem::take(&mut first) {
            netvm.take_buffer();
            netvm.put_rx_words(Extra::encode_gso(1448, GsoType::TcpV6));
        }
    }
}

/// One thing that a hostile netvm does.
#[derive(Clone, Debug)]
enum NetvmStep {
    Frame {
        len: usize,
        gso: bool,
    },
    /// An rx response of any words to the next buffer.
    Response {
        id: u16,
        offset: u16,
        flags: u16,
        status: i16,
    },
    Extra {
        kind: u8,
        more: bool,
        size: u16,
        family: u8,
    },
    TxResponse {
        id: u16,
        status: i16,
    },
    Answer(usize),
    Lie {
        rx: bool,
        by: i8,
    },
    Index {
        rx: bool,
        at: usize,
        value: u32,
    },
    Hold(bool),
    ClientSends(usize),
    Run,
}

fn netvm_step() -> impl Strategy<Value = NetvmStep> {
    let status = prop_oneof![4 => 0i16..2000, 1 => any::<i16>()];
    let offset = prop_oneof![3 => Just(0u16), 1 => 0u16..4096, 1 => any::<u16>()];
    prop_oneof![
        4 => (14usize..20_000, any::<bool>()).prop_map(|(len, gso)| NetvmStep::Frame { len, gso }),
        8 => (any::<u16>(), offset, 0u16..32, status)
            .prop_map(|(id, offset, flags, status)| NetvmStep::Response { id, offset, flags, status }),
        2 => (0u8..8, any::<bool>(), any::<u16>(), 0u8..4)
            .prop_map(|(kind, more, size, family)| NetvmStep::Extra { kind, more, size, family }),
        1 => (0u16..300, -3i16..3).prop_map(|(id, status)| NetvmStep::TxResponse { id, status }),
        4 => (0usize..40).prop_map(NetvmStep::Answer),
        1 => (any::<bool>(), any::<i8>()).prop_map(|(rx, by)| NetvmStep::Lie { rx, by }),
        1 => (any::<bool>(), prop_oneof![Just(REQ_EVENT), Just(RSP_EVENT)], any::<u32>())
            .prop_map(|(rx, at, value)| NetvmStep::Index { rx, at, value }),
        1 => any::<bool>().prop_map(NetvmStep::Hold),
        4 => (1usize..20).prop_map(NetvmStep::ClientSends),
        8 => Just(NetvmStep::Run),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 5 } else { 300 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_hostile_netvm_breaks_at_most_itself(
        steps in prop::collection::vec(netvm_step(), 1..120),
        failing_grant in prop::option::of(128u64..300),
    ) {
        let machine = FakeMachine::new();
        let mut router = Router::new(&machine);
        let mut netvm = router.connect_uplink(&machine, tests::router::LINUX);
        let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
        router.connect_client(&client);
        client.post(200);
        netvm.reads = false;
        if let Some(skip) = failing_grant {
            machine.fail(ROUTER, Operation::Grant, skip);
        }
        for (seed, one) in (0u32..).zip(&steps) {
            match *one {
                NetvmStep::Frame { len, gso } => {
                    let slots = u32::try_from(len.div_ceil(4096)).unwrap();
                    if netvm.buffers() > slots {
                        put_frame(&mut netvm, len, gso);
                    }
                }
                NetvmStep::Response { id, offset, flags, status } if netvm.buffers() > 0 => {
                    netvm.take_buffer();
                    netvm.put_rx_words(tests::attack::response(id, offset, flags, status));
                }
                NetvmStep::Extra { kind, more, size, family } if netvm.buffers() > 0 => {
                    let [low, high] = size.to_le_bytes();
                    netvm.take_buffer();
                    let head = u32::from_le_bytes([kind, u8::from(more), low, high]);
                    netvm.put_rx_words([head, family.into()]);
                }
                NetvmStep::TxResponse { id, status } => {
                    netvm.put_tx_response(TxResponse { id, status });
                }
                NetvmStep::Answer(count) => netvm.answer(count),
                NetvmStep::Lie { rx, by } => {
                    let (ring, index) = if rx {
                        (netvm.rx_ring(), netvm.rx_rsp)
                    } else {
                        (netvm.tx_ring(), netvm.tx_rsp)
                    };
                    ring.shared().write_u32(RSP_PROD, index.wrapping_add_signed(by.into()));
                }
                NetvmStep::Index { rx, at, value } => {
                    let ring = if rx { netvm.rx_ring() } else { netvm.tx_ring() };
                    ring.shared().write_u32(at, value);
                }
                NetvmStep::Hold(held) => machine.hold_all(ROUTER, held),
                NetvmStep::ClientSends(count) => {
                    for _ in 0..count.min(client.tx_free()) {
                        client.put_frame(
                            &[Piece { offset: 0, bytes: pattern(70, seed) }],
                            0,
                            None,
                        );
                    }
                    client.publish();
                }
                _ => {
                    netvm.publish();
                    router.run(straight);
                    client.reap();
                    for frame in client.receive() {
                        prop_assert!(frame.failed || (14..=65_535).contains(&frame.bytes.len()));
                    }
                    client.post(200 - client.posted());
                    if router.uplink.is_some() {
                        netvm.take();
                    }
                }
            }
        }
        prop_assert_eq!(&router.client_errors, &[]);
        // The device is given up or whole: nothing is in between.
        if let Some(uplink) = &router.uplink {
            prop_assert_eq!(uplink.failed(), None);
            prop_assert!(uplink.tx_free_slots() <= raw::SLOTS as usize);
        }
        netvm.close();
        machine.hold_all(ROUTER, false);
        machine.heal(ROUTER);
        router.close();
        client.close();
        assert_nothing_left(&machine, ROUTER);
        assert_nothing_left(&machine, NETVM);
        assert_nothing_left(&machine, FIRST_CLIENT);
    }
}
