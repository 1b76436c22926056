//! From sorted entries to the index: one line per prefix, intervals per line, borders between lines.
//!
//! Entries come sorted by address and from shorter to longer prefixes, so the prefixes around the
//! current one always form a stack.

use alloc::vec::Vec;

use super::DNS_PORT;
use super::compile::Budget;
use super::expand::{AddressBits, Entry};
use super::index::{Cell, Index, Intervals, Line};
use super::outcome::Outcome;
use super::paint::Painter;
use crate::rule::{Action, DnsTransport, PortRange, Rule, Traffic};

/// The protocols whose rules distinguish numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Tcp,
    Udp,
    Icmp,
}

impl Class {
    /// The highest number: a port, or an ICMP type.
    const fn last(self) -> u16 {
        match self {
            Self::Tcp | Self::Udp => u16::MAX,
            Self::Icmp => 255,
        }
    }

    /// First and last number of this class that `traffic` covers.
    fn span(self, traffic: Traffic) -> Option<(u16, u16)> {
        let range = |ports: Option<PortRange>| {
            let ports = ports.unwrap_or(PortRange::ALL);
            Some((ports.first(), ports.last()))
        };
        match (self, traffic) {
            (_, Traffic::Any) => Some((0, self.last())),
            (Self::Tcp, Traffic::Tcp { ports }) | (Self::Udp, Traffic::Udp { ports }) => {
                range(ports)
            }
            (Self::Tcp | Self::Udp, Traffic::TcpOrUdp { ports }) => range(Some(ports)),
            (Self::Tcp, Traffic::Dns(DnsTransport::Both | DnsTransport::Tcp))
            | (Self::Udp, Traffic::Dns(DnsTransport::Both | DnsTransport::Udp)) => {
                Some((DNS_PORT, DNS_PORT))
            }
            (Self::Icmp, Traffic::Icmp { icmp_type }) => {
                let first = icmp_type.unwrap_or(0);
                Some((u16::from(first), u16::from(icmp_type.unwrap_or(u8::MAX))))
            }
            _ => None,
        }
    }
}

/// The line in work.
#[derive(Debug)]
struct Draft {
    /// Its outcomes so far.
    line: Line,
    /// The earliest rule of the line.
    best: Outcome,
    /// One past its last entry, once known; until then, the entry to look at next.
    end: usize,
    /// What happens next.
    task: Task,
}

/// The parts of the work on one line, in order.
#[derive(Debug)]
enum Task {
    /// Find the entries of the line.
    Collect,
    /// Paint the entry at a position, and those after it.
    Paint(Class, usize, Painter),
    /// Move the painted ranges into the list whose head is at a place.
    Emit(Class, usize, Painter),
    /// Put the line in its place.
    Place,
}

/// Builds an index from sorted entries, in slices.
#[derive(Debug)]
pub(super) struct Builder<A> {
    entries: Vec<Entry<A>>,
    /// The first entry that is not part of a finished line.
    next: usize,
    /// The lines that hold the current address: last address, line, and the earliest rule in it and
    /// around it. From the outermost to the innermost.
    open: Vec<(A, u16, Outcome)>,
    draft: Option<Draft>,
    index: Index<A>,
}

impl<A: AddressBits> Builder<A> {
    /// Starts with sorted entries, at most [`super::MAX_LINES`].
    pub(super) fn new(entries: Vec<Entry<A>>) -> Self {
        // Growing these later would copy all of them within one step.
        let count = entries.len();
        let index = Index {
            starts: Vec::with_capacity(2 * count),
            responsible: Vec::with_capacity(2 * count + 1),
            lines: Vec::with_capacity(count + 1),
            cells: Vec::with_capacity(CELLS_PER_ENTRY * count),
        };
        let mut builder = Self {
            entries,
            next: 0,
            open: Vec::new(),
            draft: None,
            index,
        };
        if builder.entries.first().is_none_or(|entry| entry.length > 0) {
            // No rule is about all addresses: the outermost line is empty.
            builder.place(A::default(), 0, EMPTY_LINE, Outcome::NONE);
        }
        builder
    }

    /// Works on; returns whether the index is complete. `rules` are those of the chain.
    pub(super) fn step(&mut self, rules: &[Rule], budget: &mut Budget) -> bool {
        while let Some(&first) = self.entries.get(self.next) {
            let mut draft = self.draft.take().unwrap_or(Draft {
                line: EMPTY_LINE,
                best: Outcome::NONE,
                end: self.next,
                task: Task::Collect,
            });
            if !self.work(&mut draft, first, rules, budget) {
                self.draft = Some(draft);
                return false;
            }
            self.place(first.address, first.length, draft.line, draft.best);
            self.next = draft.end;
        }
        true
    }

    /// Ends the work, once [`Self::step`] has returned true.
    pub(super) fn finish(mut self) -> Index<A> {
        self.close(None);
        give_back(&mut self.index.starts);
        give_back(&mut self.index.responsible);
        give_back(&mut self.index.lines);
        give_back(&mut self.index.cells);
        self.index
    }

    /// Works on one line; returns whether it can be placed.
    fn work(
        &mut self,
        draft: &mut Draft,
        first: Entry<A>,
        rules: &[Rule],
        budget: &mut Budget,
    ) -> bool {
        loop {
            match core::mem::replace(&mut draft.task, Task::Place) {
                Task::Collect => {
                    if !self.collect(draft, first, rules, budget) {
                        draft.task = Task::Collect;
                        return false;
                    }
                    if draft.end - self.next == 1 {
                        self.single(draft, rules);
                    } else {
                        draft.task = self.start_class(Class::Tcp);
                    }
                }
                Task::Paint(class, mut position, mut painter) => {
                    while position < draft.end && !painter.is_full() {
                        let rule = self.rule(position, rules);
                        let span = rule.and_then(|rule| class.span(rule.traffic));
                        let painted = match (rule, span) {
                            (Some(rule), Some(span)) => {
                                painter.paint(span, Outcome::of(rule), budget)
                            }
                            _ => budget.spend(),
                        };
                        if !painted {
                            draft.task = Task::Paint(class, position, painter);
                            return false;
                        }
                        position += 1;
                    }
                    let place = self.index.cells.len();
                    self.index.cells.push(HEAD);
                    draft.task = Task::Emit(class, place, painter);
                }
                Task::Emit(class, place, mut painter) => {
                    while let Some((start, outcome)) = painter.take_first() {
                        self.push_cell(place, Cell { start, outcome });
                        if !budget.spend() {
                            draft.task = Task::Emit(class, place, painter);
                            return false;
                        }
                    }
                    let list = self.close_list(place);
                    draft.task = match class {
                        Class::Tcp => {
                            draft.line.tcp = list;
                            self.start_class(Class::Udp)
                        }
                        Class::Udp => {
                            draft.line.udp = list;
                            self.start_class(Class::Icmp)
                        }
                        Class::Icmp => {
                            draft.line.icmp = list;
                            Task::Place
                        }
                    };
                }
                Task::Place => return true,
            }
        }
    }

    fn start_class(&self, class: Class) -> Task {
        Task::Paint(class, self.next, Painter::new(class.last()))
    }

    /// The rule of an entry.
    fn rule<'r>(&self, position: usize, rules: &'r [Rule]) -> Option<&'r Rule> {
        let entry = self.entries.get(position)?;
        rules.get(usize::from(entry.rule))
    }

    /// Finds the end of the line and what needs no intervals.
    fn collect(
        &self,
        draft: &mut Draft,
        first: Entry<A>,
        rules: &[Rule],
        budget: &mut Budget,
    ) -> bool {
        while let Some(entry) = self.entries.get(draft.end)
            && (entry.address, entry.length) == (first.address, first.length)
        {
            if !budget.spend() {
                return false;
            }
            if let Some(rule) = self.rule(draft.end, rules) {
                let outcome = Outcome::of(rule);
                draft.best = draft.best.min(outcome);
                if rule.traffic == Traffic::Any {
                    draft.line.other = draft.line.other.min(outcome);
                }
                if rule.traffic == Traffic::Any || rule.action == Action::Drop {
                    draft.line.unknown = draft.line.unknown.min(outcome);
                }
            }
            draft.end += 1;
        }
        true
    }

    /// The lists of a line with one rule, which most lines are.
    fn single(&mut self, draft: &mut Draft, rules: &[Rule]) {
        let Some(rule) = self.rule(self.next, rules) else {
            return;
        };
        draft.line.tcp = self.single_list(Class::Tcp, rule);
        draft.line.udp = self.single_list(Class::Udp, rule);
        draft.line.icmp = self.single_list(Class::Icmp, rule);
    }

    fn single_list(&mut self, class: Class, rule: &Rule) -> Intervals {
        let Some((first, last)) = class.span(rule.traffic) else {
            return Intervals::constant(Outcome::NONE);
        };
        let outcome = Outcome::of(rule);
        if (first, last) == (0, class.last()) {
            return Intervals::constant(outcome);
        }
        let place = self.index.cells.len();
        self.index.cells.push(HEAD);
        let none = |start| Cell {
            start,
            outcome: Outcome::NONE,
        };
        if first > 0 {
            self.push_cell(place, none(0));
        }
        self.push_cell(
            place,
            Cell {
                start: first,
                outcome,
            },
        );
        if last < class.last() {
            self.push_cell(place, none(last + 1));
        }
        self.close_list(place)
    }

    /// Appends to the list whose head is at `place`, unless nothing changes at the cell.
    fn push_cell(&mut self, place: usize, cell: Cell) {
        let cells = &mut self.index.cells;
        let is_first = cells.len() == place + 1;
        if is_first
            || cells
                .last()
                .is_some_and(|last| last.outcome != cell.outcome)
        {
            cells.push(cell);
        }
    }

    /// Ends the list whose head is at `place`.
    fn close_list(&mut self, place: usize) -> Intervals {
        let cells = &mut self.index.cells;
        let count = cells.len() - place - 1;
        if let (1, Some(cell)) = (count, cells.last()) {
            let constant = Intervals::constant(cell.outcome);
            cells.truncate(place);
            return constant;
        }
        if let Some(head) = cells.get_mut(place) {
            // Each entry adds at most two cells to a list, so their number fits in 16 bits.
            head.start = u16::try_from(count).unwrap_or(u16::MAX);
        }
        Intervals::at(place)
    }

    /// Puts a line in its place among the others.
    fn place(&mut self, address: A, length: u8, mut line: Line, best: Outcome) {
        self.close(Some(address));
        let (around, best_around) = match self.open.last() {
            Some(&(_, around, best_around)) => (around, best_around),
            None => (0, Outcome::NONE),
        };
        line.around = around;
        line.best_around = best_around;
        // At most one line per entry and the outermost one, so the number fits in 16 bits.
        let number = u16::try_from(self.index.lines.len()).unwrap_or(u16::MAX);
        self.index.lines.push(line);
        self.border(address, number);
        let last = address.last_of_prefix(length);
        self.open.push((last, number, best.min(best_around)));
    }

    /// Leaves the open lines that end before `address`, or all of them.
    fn close(&mut self, address: Option<A>) {
        while let Some(&(last, ..)) = self.open.last()
            && address.is_none_or(|address| last < address)
        {
            self.open.pop();
            if let (Some(after), Some(&(_, around, _))) = (last.next(), self.open.last()) {
                self.border(after, around);
            }
        }
    }

    /// From `start` on, `line` is the innermost. Of several borders at one address the last one counts.
    fn border(&mut self, start: A, line: u16) {
        match self.index.responsible.last() {
            // The outermost line begins at address 0, which is not listed.
            None => self.index.responsible.push(line),
            Some(&last) if last == line => {}
            Some(_) => {
                self.index.starts.push(start);
                self.index.responsible.push(line);
            }
        }
    }
}

/// Cells to expect per entry. A range of ports takes up to four in each protocol it is for: a head and
/// three intervals.
const CELLS_PER_ENTRY: usize = 6;

/// Gives unused capacity back if it is a quarter or more; that may copy what is used.
fn give_back<T>(items: &mut Vec<T>) {
    if items.capacity() - items.len() >= items.capacity() / 4 {
        items.shrink_to_fit();
    }
}

/// A line in which nothing matches.
const EMPTY_LINE: Line = Line {
    tcp: Intervals::NONE,
    udp: Intervals::NONE,
    icmp: Intervals::NONE,
    other: Outcome::NONE,
    unknown: Outcome::NONE,
    best_around: Outcome::NONE,
    around: 0,
};

/// The head of an open list.
const HEAD: Cell = Cell {
    start: 0,
    outcome: Outcome::NONE,
};
