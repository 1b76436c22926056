//! P19, from the machine code: what the packet path can reach holds no lock and does not calculate with
//! floating-point numbers.
//!
//! The walk starts at the measured functions and follows direct calls and jumps through the engine's own
//! functions. What it calls elsewhere (`memcpy`, the unreachable ends of bounds checks, the growth of vectors
//! that never grow) is listed by name and not followed; that nothing is allocated is measured. Indirect jumps
//! are the tables of `match`, which stay within their function; the engine has no indirect calls but to the
//! C library's memory functions. SSE registers move bytes, which is no arithmetic.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use crate::host;

/// Where the packet path begins.
const ROOTS: [&str; 2] = [
    "engine_bench::measured::decide",
    "engine_bench::measured::expire",
];

/// Fewer functions than this are not the engine.
const LEAST_FUNCTIONS: usize = 30;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct MachineCode {
    /// Functions of the engine that the packet path can reach.
    functions: usize,
    /// Instructions that lock the bus, with their functions.
    locks: Vec<String>,
    /// Instructions of floating-point arithmetic, with their functions.
    floats: Vec<String>,
    /// Functions of others that are called.
    elsewhere: BTreeSet<String>,
}

impl MachineCode {
    /// Looks at a program.
    ///
    /// # Errors
    ///
    /// If there is no `objdump`, or the engine is not in the program.
    pub(super) fn of(program: &Path) -> Result<Self> {
        let objdump = host::find_program("objdump").context("objdump (of binutils) is missing")?;
        let mut command = Command::new(objdump);
        command.args(["--disassemble", "--demangle", "--no-show-raw-insn"]);
        Self::read(&host::output_of(command.arg(program))?)
    }

    fn read(listing: &str) -> Result<Self> {
        let functions = functions(listing);
        let mut found = Self::default();
        let roots = functions
            .iter()
            .filter(|(_, function)| ROOTS.contains(&function.name));
        let mut waiting: Vec<u64> = roots.map(|(start, _)| *start).collect();
        let mut seen = BTreeSet::new();
        while let Some(start) = waiting.pop() {
            if !seen.insert(start) {
                continue;
            }
            let Some(function) = functions.get(&start) else {
                continue;
            };
            for line in &function.lines {
                if is_lock(line) {
                    found.locks.push(format!("{}: {line}", function.name));
                }
                if is_float(line) {
                    found.floats.push(format!("{}: {line}", function.name));
                }
                let target = target(line)
                    .and_then(|at| functions.range(..=at).next_back())
                    .filter(|(at, _)| **at != start);
                match target {
                    Some((at, callee)) if callee.is_ours() => waiting.push(*at),
                    Some((_, callee)) => {
                        found.elsewhere.insert(callee.name.to_owned());
                    }
                    None => {}
                }
            }
        }
        found.functions = seen.len();
        if seen.len() < LEAST_FUNCTIONS {
            bail!("only {} functions of the engine were found", seen.len());
        }
        Ok(found)
    }

    /// What must not be there, a line for each.
    pub(super) fn faults(&self) -> impl Iterator<Item = String> + '_ {
        let locks = self.locks.iter().map(|line| format!("P19: a lock: {line}"));
        let floats = self.floats.iter();
        locks.chain(floats.map(|line| format!("P19: floating point: {line}")))
    }

    /// Functions, locks, floating-point instructions.
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        (self.functions, self.locks.len(), self.floats.len())
    }
}

struct Function<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
}

impl Function<'_> {
    fn is_ours(&self) -> bool {
        self.name.contains("firewall::") || self.name.contains("engine_bench::")
    }
}

/// The functions of a listing, by address.
fn functions(listing: &str) -> BTreeMap<u64, Function<'_>> {
    let mut functions = BTreeMap::new();
    let mut current = None;
    for line in listing.lines() {
        if let Some((address, name)) = line
            .strip_suffix(">:")
            .and_then(|line| line.split_once(" <"))
        {
            current = u64::from_str_radix(address, 16).ok();
            if let Some(at) = current {
                let lines = Vec::new();
                functions.insert(at, Function { name, lines });
            }
        } else if let Some((_, instruction)) = line.split_once(":\t") {
            let function = current.and_then(|at| functions.get_mut(&at));
            if let Some(function) = function {
                function.lines.push(instruction.trim());
            }
        }
    }
    functions
}

/// Where a direct call or jump goes.
fn target(instruction: &str) -> Option<u64> {
    let instruction = instruction.strip_prefix("bnd ").unwrap_or(instruction);
    let (mnemonic, rest) = instruction.split_once(' ')?;
    if !mnemonic.starts_with("call") && !mnemonic.starts_with('j') {
        return None;
    }
    u64::from_str_radix(rest.split_whitespace().next()?, 16).ok()
}

/// `lock`, and `xchg` with memory, which locks by itself.
fn is_lock(instruction: &str) -> bool {
    instruction.starts_with("lock ") || instruction.starts_with("xchg") && instruction.contains('(')
}

/// Scalar and packed arithmetic, comparisons and conversions of SSE and AVX, and all of the x87.
fn is_float(instruction: &str) -> bool {
    const OPERATIONS: [&str; 14] = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "rcp", "rsqrt",
        "round", "hadd",
    ];
    let mnemonic = instruction.split_whitespace().next().unwrap_or_default();
    let plain = mnemonic.strip_prefix('v').unwrap_or(mnemonic);
    let is_sse = ["ss", "sd", "ps", "pd"].iter().any(|kind| {
        plain
            .strip_suffix(kind)
            .is_some_and(|operation| OPERATIONS.contains(&operation))
    });
    is_sse || plain.starts_with("cvt") || plain.starts_with("fma") || mnemonic.starts_with('f')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(tail: &str) -> String {
        let mut text =
            String::from("0000000000001000 <engine_bench::measured::decide>:\n    1000:\tnop\n");
        for number in 0..LEAST_FUNCTIONS {
            let at = 0x1000 + 0x100 * (number + 1);
            // Each calls the next one.
            text += &format!("    {:x}:\tcall   {at:x} <x>\n", at - 0x10);
            text += &format!("\n{at:016x} <firewall::engine::f{number}>:\n");
        }
        text + tail
    }

    #[test]
    fn locks_and_floats_are_found_where_the_packet_path_gets_to() {
        let found = MachineCode::read(&listing(
            "    9000:\tlock xadd %eax,(%rdi)\n    9004:\tmulsd  %xmm0,%xmm1\n    9008:\tmovups (%rsi),%xmm0\n",
        ))
        .unwrap();
        assert_eq!(found.counts(), (LEAST_FUNCTIONS + 1, 1, 1));
        assert_eq!(found.faults().count(), 2);
    }

    #[test]
    fn functions_of_others_are_named_and_not_followed() {
        let found = MachineCode::read(&listing(
            "    9000:\tjmp    a000 <alloc::f>\n\n000000000000a000 <alloc::f>:\n    a000:\tlock decl (%rax)\n",
        ))
        .unwrap();
        assert_eq!(found.counts().1, 0);
        assert!(found.elsewhere.contains("alloc::f"));
    }

    #[test]
    fn program_without_the_engine_is_an_error() {
        assert!(MachineCode::read("0000000000001000 <main>:\n    1000:\tret\n").is_err());
    }

    #[test]
    fn instructions_are_told_apart() {
        for line in [
            "addss  %xmm0,%xmm1",
            "cvtsi2sd %rax,%xmm0",
            "fldcw  (%rax)",
            "vmulpd %ymm0",
        ] {
            assert!(is_float(line), "{line}");
        }
        for line in [
            "add    %eax,%ebx",
            "movaps %xmm0,(%rax)",
            "cmp    $1,%eax",
            "movsd  (%rsi),%xmm0",
        ] {
            assert!(!is_float(line), "{line}");
        }
        assert!(is_lock("xchg   %eax,(%rdi)") && !is_lock("xchg   %ax,%ax"));
    }
}
