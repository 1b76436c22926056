//! What is printed: one line of JSON for each frame.
//!
//! The lines of input frames come in the order of the frames. What became of a fragment is known only when its datagram
//! is, so lines wait for that and all behind them, too.

use std::collections::VecDeque;
use std::io::Write;
use std::net::IpAddr;

use anyhow::Result;
use serde::Serialize;
use serde_json::value::RawValue;

use super::packet::{Content, Datagram, Packet, Upper};
use firewall::FlowView;

/// What a value was and what it has become.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Turn<T> {
    from: T,
    to: T,
}

impl<T: PartialEq + Copy> Turn<T> {
    fn of(from: T, to: T) -> Option<Self> {
        (from != to).then_some(Self { from, to })
    }
}

/// What was translated; only what changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Nat {
    #[serde(skip_serializing_if = "Option::is_none")]
    src: Option<Turn<IpAddr>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sport: Option<Turn<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<Turn<IpAddr>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dport: Option<Turn<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Turn<u16>>,
}

impl Nat {
    fn if_any(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }

    /// The difference between a packet as it came and as it left.
    #[must_use]
    pub fn between(came: &Packet, left: &Packet) -> Option<Self> {
        let mut nat = Self {
            src: Turn::of(came.src, left.src),
            dst: Turn::of(came.dst, left.dst),
            ..Self::default()
        };
        match (came.upper, left.upper) {
            (Upper::Ports(sport, dport), Upper::Ports(new_sport, new_dport)) => {
                nat.sport = Turn::of(sport, new_sport);
                nat.dport = Turn::of(dport, new_dport);
            }
            (Upper::Icmp(_, _, Some(id)), Upper::Icmp(_, _, Some(new_id))) => {
                nat.id = Turn::of(id, new_id);
            }
            _ => {}
        }
        nat.if_any()
    }

    /// What a flow's packets are turned into, from its client or back to it.
    #[must_use]
    pub fn of_flow(flow: &FlowView, is_reply: bool) -> Option<Self> {
        let FlowView {
            source,
            destination,
            translated_source,
            translated_destination,
            ..
        } = *flow;
        let (src, dst) = if is_reply {
            (
                (translated_destination, destination),
                (translated_source, source),
            )
        } else {
            (
                (source, translated_source),
                (destination, translated_destination),
            )
        };
        let mut nat = Self {
            src: Turn::of(src.0.0, src.1.0),
            dst: Turn::of(dst.0.0, dst.1.0),
            ..Self::default()
        };
        if matches!(flow.protocol, 1 | 58) {
            let id = if is_reply { dst } else { src };
            nat.id = Turn::of(id.0.1, id.1.1);
        } else {
            nat.sport = Turn::of(src.0.1, src.1.1);
            nat.dport = Turn::of(dst.0.1, dst.1.1);
        }
        nat.if_any()
    }
}

/// The part of a rule list that decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum RuleName {
    /// The rule with that number.
    Number(u16),
    /// The policy: the word `policy`.
    Policy(&'static str),
}

/// What became of a frame.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Fate {
    /// `accept`, `reject`, `drop` or `local`.
    pub verdict: &'static str,
    /// Why; always there unless the frame was accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Which rule decided, if rules did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleName>,
    /// What was translated.
    pub nat: Option<Nat>,
    /// The interface on which it, or what it carried, left.
    pub out: Option<String>,
}

impl Fate {
    /// A frame that ends here.
    #[must_use]
    pub const fn end(verdict: &'static str, reason: &'static str) -> Self {
        Self {
            verdict,
            reason: Some(reason),
            rule: None,
            nat: None,
            out: None,
        }
    }
}

#[derive(Serialize)]
struct FrameLine<'a> {
    n: u64,
    time: &'a RawValue,
    iface: &'a str,
    #[serde(flatten)]
    fate: &'a Fate,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_by: Option<u64>,
}

#[derive(Serialize)]
struct GeneratedLine<'a> {
    generated: &'static str,
    time: Box<RawValue>,
    cause: Option<u64>,
    out: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    src: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp: Option<(u8, u8)>,
    len: usize,
}

/// An input frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its number, from 1.
    pub number: u64,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Where it came in.
    pub iface: String,
}

/// A frame of ours.
#[derive(Clone, Copy, Debug)]
pub struct Made<'a> {
    /// What it is, in a word.
    pub kind: &'static str,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// The input frame that caused it.
    pub cause: Option<u64>,
    /// Where it goes out.
    pub out: &'a str,
    /// What is in it.
    pub content: Content,
    /// Its length in bytes.
    pub len: usize,
}

/// A line that waits.
enum Waiting {
    Ready(String),
    /// A fragment whose datagram is not complete.
    Held(Frame, Option<Datagram>),
}

/// The lines on their way out.
pub struct Report<W> {
    out: W,
    lines: VecDeque<Waiting>,
    nanoseconds: bool,
}

impl<W: Write> Report<W> {
    /// An empty report; `nanoseconds` tells how many digits times have.
    pub const fn new(out: W, nanoseconds: bool) -> Self {
        Self {
            out,
            lines: VecDeque::new(),
            nanoseconds,
        }
    }

    /// A time as a decimal number of seconds.
    fn time(&self, time: u64) -> Result<Box<RawValue>> {
        let (seconds, nanos) = (time / 1_000_000_000, time % 1_000_000_000);
        let text = if self.nanoseconds {
            format!("{seconds}.{nanos:09}")
        } else {
            format!("{seconds}.{:06}", nanos / 1000)
        };
        Ok(RawValue::from_string(text)?)
    }

    fn frame_line(&self, frame: &Frame, fate: &Fate, completed_by: Option<u64>) -> Result<String> {
        let time = self.time(frame.time)?;
        Ok(serde_json::to_string(&FrameLine {
            n: frame.number,
            time: &time,
            iface: &frame.iface,
            fate,
            completed_by,
        })?)
    }

    /// Prints what became of a frame. If it is a fragment, its datagram has the same fate.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn frame(&mut self, frame: &Frame, datagram: Option<Datagram>, fate: &Fate) -> Result<()> {
        if datagram.is_some() {
            self.settle(Some(frame.number), fate, |_, held| held == datagram)?;
        }
        let line = self.frame_line(frame, fate, None)?;
        self.lines.push_back(Waiting::Ready(line));
        self.flush()
    }

    /// Notes a fragment that waits for its datagram.
    pub fn held(&mut self, frame: Frame, datagram: Option<Datagram>) {
        self.lines.push_back(Waiting::Held(frame, datagram));
    }

    /// Gives up on fragments whose time is over at `now`.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn expire(&mut self, now: u64) -> Result<()> {
        if !matches!(self.lines.front(), Some(Waiting::Held(..))) {
            return Ok(());
        }
        let fate = Fate::end("drop", "fragment-timeout");
        // The time of a datagram begins with its first fragment, and that is the one found first.
        let over: Vec<_> = self
            .lines
            .iter()
            .filter_map(|line| match line {
                Waiting::Held(frame, datagram) => {
                    let patience = datagram.map_or(0, |datagram| datagram.patience());
                    (frame.time.saturating_add(patience) <= now).then_some(*datagram)
                }
                Waiting::Ready(_) => None,
            })
            .collect();
        if !over.is_empty() {
            self.settle(None, &fate, |_, held| over.contains(&held))?;
        }
        self.flush()
    }

    /// Prints what became of fragments that waited.
    fn settle(
        &mut self,
        completed_by: Option<u64>,
        fate: &Fate,
        wanted: impl Fn(&Frame, Option<Datagram>) -> bool,
    ) -> Result<()> {
        let mut lines = std::mem::take(&mut self.lines);
        for line in &mut lines {
            if let Waiting::Held(frame, datagram) = line
                && wanted(frame, *datagram)
            {
                *line = Waiting::Ready(self.frame_line(frame, fate, completed_by)?);
            }
        }
        self.lines = lines;
        Ok(())
    }

    /// Prints a frame of ours.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn made(&mut self, made: &Made<'_>) -> Result<()> {
        let packet = made.content.packet();
        let line = GeneratedLine {
            generated: made.kind,
            time: self.time(made.time)?,
            cause: made.cause,
            out: made.out,
            src: packet.map(|packet| packet.src),
            dst: packet.map(|packet| packet.dst),
            icmp: packet.and_then(|packet| match packet.upper {
                Upper::Icmp(number, code, _) => Some((number, code)),
                _ => None,
            }),
            len: made.len,
        };
        let line = serde_json::to_string(&line)?;
        self.lines.push_back(Waiting::Ready(line));
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        while let Some(Waiting::Ready(line)) = self.lines.front() {
            writeln!(self.out, "{line}")?;
            self.lines.pop_front();
        }
        Ok(())
    }

    /// Prints what still waits: fragments whose datagram never came.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn finish(mut self) -> Result<W> {
        self.settle(None, &Fate::end("drop", "fragment-incomplete"), |_, _| true)?;
        self.flush()?;
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: u64, seconds: u64) -> Frame {
        Frame {
            number,
            time: seconds * 1_000_000_000 + 1_500,
            iface: "c1".into(),
        }
    }

    /// The identity of a fragment with that id.
    fn datagram(id: u8) -> Option<Datagram> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 28, 0, id, 0x20, 0, 64, 17, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
        let datagram = Content::of(&frame).fragment();
        assert!(datagram.is_some());
        datagram
    }

    fn lines(report: Report<Vec<u8>>) -> Vec<String> {
        let bytes = report.finish().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn lines_have_the_documented_form() {
        let mut report = Report::new(Vec::new(), false);
        let fate = Fate {
            verdict: "accept",
            reason: None,
            rule: Some(RuleName::Number(3)),
            nat: Some(Nat {
                src: Turn::of("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()),
                sport: Turn::of(1, 2),
                ..Nat::default()
            }),
            out: Some("uplink".into()),
        };
        report.frame(&frame(1, 1_700_000_000), None, &fate).unwrap();
        let fate = Fate::end("drop", "spoofed-source");
        report.frame(&frame(2, 5), None, &fate).unwrap();
        assert_eq!(
            lines(report),
            [
                r#"{"n":1,"time":1700000000.000001,"iface":"c1","verdict":"accept","rule":3,"nat":{"src":{"from":"10.0.0.1","to":"10.0.0.2"},"sport":{"from":1,"to":2}},"out":"uplink"}"#,
                r#"{"n":2,"time":5.000001,"iface":"c1","verdict":"drop","reason":"spoofed-source","nat":null,"out":null}"#,
            ]
        );
    }

    #[test]
    fn fragments_share_the_fate_of_their_datagram_and_lines_keep_their_order() {
        let mut report = Report::new(Vec::new(), true);
        report.held(frame(1, 1), datagram(1));
        report.held(frame(2, 1), datagram(2));
        let accept = Fate {
            verdict: "accept",
            ..Fate::end("", "")
        };
        report.frame(&frame(3, 2), None, &accept).unwrap();
        report.frame(&frame(4, 3), datagram(1), &accept).unwrap();
        report.expire(30_000_000_000).unwrap();
        assert!(report.out.starts_with(br#"{"n":1,"#));
        report.expire(31_000_001_500).unwrap();
        report.held(frame(5, 40), datagram(3));
        let lines = lines(report);
        let expected = [
            (1, "accept", Some(4)),
            (2, "drop", None),
            (3, "accept", None),
            (4, "accept", None),
            (5, "drop", None),
        ];
        assert_eq!(lines.len(), expected.len());
        for (line, (n, verdict, by)) in lines.iter().zip(expected) {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["n"], n);
            assert_eq!(value["verdict"], verdict);
            assert_eq!(value.get("completed_by").and_then(|by| by.as_u64()), by);
        }
        assert!(lines[1].contains("fragment-timeout"));
        assert!(lines[4].contains("fragment-incomplete"));
    }
}
