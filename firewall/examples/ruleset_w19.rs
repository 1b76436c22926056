//! Workload W19 of `performance.md`: rule lookup alone, and what it takes to compile the rules.
//!
//! `cargo run --profile bench -p firewall --example ruleset_w19` prints, for every number of rules,
//! instructions per lookup (callgrind, difference method: two runs that differ only in the number of
//! lookups), bytes per rule, the time to compile in one go, and the longest step when compiling in
//! slices. Every answer is compared with the linear reference before anything is measured.
//! `ruleset_w19 lookup RULES COUNT` is one run of the difference method.

#![allow(missing_docs, reason = "a program, not a library")]

use std::error::Error;
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use firewall::rule::{
    Action, Destination, Family, PortRange, Prefix4, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{
    CompiledRules, Compiler, HostPolicy, NoHosts, Progress, RuleEnvironment, UpperLayer, linear,
};

const RULE_COUNTS: [u16; 5] = [1, 50, 250, 1_000, 10_000];
const QUERIES: usize = 1_024;
const SHORT_RUN: usize = 8;
const LONG_RUN: usize = 24;
const BATCHES: usize = 11;

type Query = (Ipv4Addr, UpperLayer);

/// The generator of `performance.md` section 2.
struct Lcg(u32);

impl Lcg {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % limit
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "lookup", rules, count] => lookup(rules.parse()?, count.parse()?),
        [program] => RULE_COUNTS
            .iter()
            .try_for_each(|&rules| report(program, rules)),
        _ => Err("usage: ruleset_w19 [lookup RULES COUNT]".into()),
    }
}

/// `Rules(n)` of `performance.md` section 2.
fn chain(count: u16) -> Result<RuleChain, Box<dyn Error>> {
    let mut rules = Vec::new();
    for r in 0..count.saturating_sub(1) {
        let n = u32::from(r);
        let (base, offset, length) = match r % 10 {
            9 => (Ipv4Addr::new(198, 18, 0, 0), n.wrapping_mul(256), 24),
            8 => (Ipv4Addr::new(172, 0, 0, 0), n.wrapping_mul(65_536), 16),
            _ => (
                Ipv4Addr::new(198, 51, 0, 0),
                n.wrapping_mul(2_654_435_761),
                32,
            ),
        };
        let address = Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset));
        let port = r % 40_000;
        let (width, wrap): (u16, fn(PortRange) -> Traffic) = match r % 3 {
            0 => (0, |ports| Traffic::Tcp { ports: Some(ports) }),
            1 => (0, |ports| Traffic::Udp { ports: Some(ports) }),
            _ => (1_000, |ports| Traffic::TcpOrUdp { ports }),
        };
        let ports = PortRange::new(port, port + width).ok_or("port range")?;
        let prefix = Prefix4::new(address, length).ok_or("prefix")?;
        rules.push(rule(r, Destination::Prefix4(prefix), wrap(ports))?);
    }
    rules.push(rule(
        count.saturating_sub(1),
        Destination::Any,
        Traffic::Any,
    )?);
    RuleChain::new(Family::Ipv4, Action::Drop, rules).map_err(|error| error.to_string().into())
}

fn rule(number: u16, destination: Destination, traffic: Traffic) -> Result<Rule, Box<dyn Error>> {
    Ok(Rule {
        number: RuleNumber::new(number).ok_or("rule number")?,
        action: Action::Accept,
        destination,
        traffic,
    })
}

/// Alternately a destination of some rule with a port that it names, and a random address.
fn queries(chain: &RuleChain) -> Result<Vec<Query>, Box<dyn Error>> {
    let mut random = Lcg(1);
    let mut queries = Vec::new();
    let count = u32::try_from(chain.rules().len())?;
    for i in 0..QUERIES {
        let address = Ipv4Addr::from_bits(random.below(1 << 16) << 16 | random.below(1 << 16));
        let picked = chain.rules().get(usize::try_from(random.below(count))?);
        let query = match picked.map(|rule| (&rule.destination, rule.traffic)) {
            Some((Destination::Prefix4(prefix), traffic)) if i % 2 == 0 => {
                let upper = match traffic {
                    Traffic::Udp { ports: Some(ports) } => UpperLayer::Udp { port: ports.last() },
                    Traffic::Tcp { ports: Some(ports) } | Traffic::TcpOrUdp { ports } => {
                        UpperLayer::Tcp { port: ports.last() }
                    }
                    _ => UpperLayer::Other,
                };
                (prefix.address(), upper)
            }
            _ => (address, UpperLayer::Tcp { port: 443 }),
        };
        queries.push(query);
    }
    Ok(queries)
}

fn environment() -> RuleEnvironment<'static> {
    RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    }
}

fn compile(chain: &RuleChain) -> Result<CompiledRules, Box<dyn Error>> {
    CompiledRules::compile(chain, &environment()).map_err(|error| error.to_string().into())
}

/// Looks every query up `count` times.
fn lookup(rules: u16, count: usize) -> Result<(), Box<dyn Error>> {
    let chain = chain(rules)?;
    let compiled = compile(&chain)?;
    let queries = queries(&chain)?;
    for _ in 0..count {
        look_up_all(&compiled, &queries);
    }
    Ok(())
}

#[inline(never)]
fn look_up_all(compiled: &CompiledRules, queries: &[Query]) {
    for &(destination, upper) in queries {
        black_box(compiled.decide4(destination, upper));
    }
}

fn report(program: &str, rules: u16) -> Result<(), Box<dyn Error>> {
    let chain = chain(rules)?;
    let compiled = compile(&chain)?;
    let queries = queries(&chain)?;
    for &(destination, upper) in &queries {
        let expected = linear::decide4(&chain, &environment(), destination, upper);
        if compiled.decide4(destination, upper) != expected {
            return Err(format!("{rules} rules: wrong answer for {destination} {upper:?}").into());
        }
    }
    let short = instructions(program, rules, SHORT_RUN)?;
    let long = instructions(program, rules, LONG_RUN)?;
    let lookups = u64::try_from((LONG_RUN - SHORT_RUN) * QUERIES)?;
    let per_lookup = (long - short) / lookups;
    println!(
        "rules {rules:>5}: {per_lookup:>4} instructions/lookup and turn of the loop, \
         {:>3} bytes/rule, compile {:>9.1} us, longest of {} steps {:.1} us",
        compiled.memory_bytes() / usize::from(rules),
        micros(fastest_compile(&chain)?),
        steps(&chain)?.len(),
        micros(longest_step(&chain)?),
    );
    Ok(())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The total instruction count of one run under callgrind.
fn instructions(program: &str, rules: u16, count: usize) -> Result<u64, Box<dyn Error>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args([program, "lookup", &rules.to_string(), &count.to_string()])
        .output()?;
    let text = String::from_utf8(output.stderr)?;
    let line = text.lines().find(|line| line.contains("Collected :"));
    let number = line
        .and_then(|line| line.rsplit(' ').next())
        .ok_or("no count from valgrind")?;
    Ok(number.parse()?)
}

fn fastest_compile(chain: &RuleChain) -> Result<Duration, Box<dyn Error>> {
    let mut fastest = Duration::MAX;
    for _ in 0..BATCHES {
        let start = Instant::now();
        black_box(compile(chain)?);
        fastest = fastest.min(start.elapsed());
    }
    Ok(fastest)
}

/// The duration of every step when the chain is compiled in slices.
fn steps(chain: &RuleChain) -> Result<Vec<Duration>, Box<dyn Error>> {
    let mut steps = Vec::new();
    let mut compiler = Compiler::new(chain);
    loop {
        let start = Instant::now();
        let progress = compiler.step(&environment(), Compiler::<&RuleChain>::STEP_BUDGET);
        steps.push(start.elapsed());
        match progress {
            Progress::Working(more) => compiler = more,
            Progress::Done(_) => return Ok(steps),
            Progress::Failed(error) => return Err(error.to_string().into()),
        }
    }
}

/// The longest step, each step taken at its fastest of several compilations: what is left is ours and
/// not an interruption by the host.
fn longest_step(chain: &RuleChain) -> Result<Duration, Box<dyn Error>> {
    let mut fastest = steps(chain)?;
    for _ in 1..BATCHES {
        for (best, new) in fastest.iter_mut().zip(steps(chain)?) {
            *best = new.min(*best);
        }
    }
    Ok(fastest.into_iter().max().unwrap_or_default())
}
