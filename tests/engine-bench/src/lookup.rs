//! W19, P14, P15: rule lookup alone, and what it takes to compile rules.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Duration;

use firewall::rule::{Action, Destination, Family, RuleChain, Traffic};
use firewall::ruleset::{Compiler, Progress, UpperLayer, linear};

use crate::calibration::processor_time;
use crate::rules::{chain, compile, environment};
use crate::{Failure, measured};

const QUERIES: usize = 1_024;
const BATCHES: usize = 11;

/// A destination, and what a packet to it carries.
pub type Query = (Ipv4Addr, UpperLayer);

/// The generator of `performance.md` section 2.
struct Lcg(u32);

impl Lcg {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % limit
    }
}

/// What compiling `Rules(n)` takes.
#[derive(Clone, Copy, Debug)]
pub struct Compilation {
    /// Bytes of the result, for each rule.
    pub bytes_per_rule: usize,
    /// All in one go, at best of several.
    pub whole: Duration,
    /// How many slices the main loop makes of it.
    pub steps: usize,
    /// The longest slice, each slice at its best of several: what is left is ours and not an interruption
    /// by the host.
    pub longest_step: Duration,
}

/// Alternately a destination of some rule with a port that it names, and a random address.
fn queries(chain: &RuleChain) -> Result<Vec<Query>, Failure> {
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

/// Looks addresses up in `Rules(n)`, after comparing every answer with the linear reference. Returns how
/// many there were.
///
/// # Errors
///
/// If an answer is wrong.
pub fn count(rules: u16) -> Result<usize, Failure> {
    let chain = chain(rules, Action::Accept, Family::Ipv4)?;
    let compiled = compile(&chain)?;
    let queries = queries(&chain)?;
    for &(destination, upper) in &queries {
        let expected = linear::decide4(&chain, &environment(), destination, upper);
        if compiled.decide4(destination, upper) != expected {
            return Err(format!("{rules} rules: wrong answer for {destination} {upper:?}").into());
        }
    }
    measured::look_up(&compiled, &queries);
    Ok(queries.len())
}

/// Compiles `Rules(n)` in one go and in slices.
///
/// # Errors
///
/// If the rules cannot be compiled.
pub fn time(rules: u16) -> Result<Compilation, Failure> {
    let chain = chain(rules, Action::Accept, Family::Ipv4)?;
    let mut whole = Duration::MAX;
    let mut best = steps(&chain)?;
    for _ in 0..BATCHES {
        let start = processor_time();
        black_box(compile(&chain)?);
        whole = whole.min(processor_time() - start);
        for (best, new) in best.iter_mut().zip(steps(&chain)?) {
            *best = new.min(*best);
        }
    }
    Ok(Compilation {
        bytes_per_rule: compile(&chain)?.memory_bytes() / usize::from(rules.max(1)),
        whole,
        steps: best.len(),
        longest_step: best.into_iter().max().unwrap_or_default(),
    })
}

/// The duration of every step when the chain is compiled in slices.
fn steps(chain: &RuleChain) -> Result<Vec<Duration>, Failure> {
    let mut steps = Vec::new();
    let mut compiler = Compiler::new(chain);
    loop {
        let start = processor_time();
        let progress = compiler.step(&environment(), Compiler::<&RuleChain>::STEP_BUDGET);
        steps.push(processor_time() - start);
        match progress {
            Progress::Working(more) => compiler = more,
            Progress::Done(_) => return Ok(steps),
            Progress::Failed(error) => return Err(error.to_string().into()),
        }
    }
}
