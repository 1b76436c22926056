//! The world before a workload: an engine with its clients and their rules, and every flow that must exist.

use std::net::Ipv4Addr;

use firewall::rule::Action;
use firewall::{ClientConfig, ClientId, Downstream, Engine, IcmpRate, Limits, Time, UplinkConfig};

use crate::Failure;
use crate::packet::{FIRST_CLIENT, OWN_MAC, UPLINK4, UPLINK6, source};
use crate::rules::compiled;
use crate::workload::{Arrival, BUSY_FLOWS, Kind, PACKETS, Plan, RESOLVERS};

/// When the first flow that must exist before is made.
const BEGIN: Time = Time::from_secs(1000);

/// Milliseconds in which the flows are made that idle out later: less than UDP's timeout.
pub(crate) const IDLE_SPREAD_MILLIS: u64 = 25_000;

impl Plan {
    /// An engine with its clients and their rules, and every flow that must exist before.
    ///
    /// # Errors
    ///
    /// If anything becomes of a packet but what must.
    pub fn world(&self) -> Result<Engine, Failure> {
        let mut engine = self.empty_world()?;
        for (mut arrival, now) in self.before() {
            let fate = arrival.fate;
            let mut work = arrival.work();
            work.verdict = engine.process(work.ingress, &mut work.frame, now);
            fate.check(work.verdict)?;
        }
        Ok(engine)
    }

    /// The same without flows.
    fn empty_world(&self) -> Result<Engine, Failure> {
        let room = match self.kind {
            Kind::Full => self.flows,
            _ => (self.flows + 4 * PACKETS).next_multiple_of(65_536),
        };
        let mut engine = Engine::new(
            Limits {
                flows4: if self.is_v6() { 1024 } else { room },
                flows6: if self.is_v6() { room } else { 1024 },
                clients: 256,
                outbox_bytes: 1 << 20,
                icmp_rate: (self.kind == Kind::Refused { limited: true }).then(IcmpRate::default),
                ..Limits::default()
            },
            [42; 32],
        );
        engine.set_uplink(Some(UplinkConfig {
            ip6: Some(UPLINK6),
            gateway6: Some("fd09:24ef:4179::a8a:2".parse()?),
            ..UplinkConfig::new(OWN_MAC, UPLINK4)
        }));
        engine.set_downstream(Downstream {
            gateway4: Some(UPLINK4),
            gateway6: Some(UPLINK6),
        });
        engine.set_dns(&RESOLVERS[..1], &RESOLVERS[1..]);
        let last = match self.kind {
            Kind::Refused { .. } => Action::Drop,
            _ => Action::Accept,
        };
        for id in 0..self.clients {
            let addresses = [false, true].map(|v6| source(u32::from(id), v6)).to_vec();
            engine.attach_client(ClientConfig {
                id: ClientId(id),
                domid: id + 1,
                mac: OWN_MAC,
                addresses: addresses.clone(),
                mtu: 1500,
            })?;
            for address in addresses {
                engine.set_rules(address, compiled(self.rules, last, address)?);
            }
        }
        Ok(engine)
    }

    /// The packets that make the flows that exist before.
    pub fn warm_up(&self) -> impl Iterator<Item = Arrival> + '_ {
        self.before().map(|(arrival, _)| arrival)
    }

    /// The IPv4 address of a client.
    pub fn client_address(client: u16) -> Ipv4Addr {
        Ipv4Addr::from_bits(FIRST_CLIENT + u32::from(client))
    }

    /// What makes the flows that exist before, and when.
    fn before(&self) -> Box<dyn Iterator<Item = (Arrival, Time)> + '_> {
        let flows = 0..self.flows;
        let at_once = |arrival| (arrival, BEGIN);
        match self.kind {
            Kind::Refused { .. } | Kind::Spoof | Kind::Life | Kind::Fragments(_) => {
                Box::new(std::iter::empty())
            }
            Kind::Idle => {
                let idle = flows.flat_map(|i| {
                    let late = u64::from(i) * IDLE_SPREAD_MILLIS / u64::from(self.flows);
                    let now = Time::from_millis(1_000_000 + late);
                    [self.udp(i, false), self.udp(i, true)].map(|arrival| (arrival, now))
                });
                let busy = self.flows..self.flows + BUSY_FLOWS;
                let now = Time::from_millis(1_000_000 + IDLE_SPREAD_MILLIS);
                let busy = busy.flat_map(|i| self.handshake(i));
                Box::new(idle.chain(busy.map(move |arrival| (arrival, now))))
            }
            _ if self.is_udp() => Box::new(
                flows
                    .flat_map(|i| [self.udp(i, false), self.udp(i, true)])
                    .map(at_once),
            ),
            Kind::Echo { .. } => Box::new(flows.map(|i| self.echo(i, false)).map(at_once)),
            _ => Box::new(flows.flat_map(|i| self.handshake(i)).map(at_once)),
        }
    }
}
