//! Where the settings come from: QubesDB in Qubes OS, xenstore on plain Xen.
//!
//! Decided once, by who is there first: dom0's QubesDB daemon offers its channel before a qube's first instruction runs, and
//! plain Xen has no such channel but nodes below our `vm-data`, which Qubes OS does not make. `config=qubesdb` or
//! `config=xenstore` on the kernel command line decides without looking; with the latter no calls of Qubes OS are served either.

/// Where the settings come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Source {
    /// Neither was seen so far.
    #[default]
    Open,
    /// Nodes below `vm-data`.
    Xenstore,
    /// dom0's QubesDB daemon.
    QubesDb,
}

impl Source {
    /// What the command line decides; [`Source::Open`] if it says nothing. Other words on it are for others.
    #[must_use]
    pub fn from_command_line(line: &str) -> Self {
        line.split_ascii_whitespace()
            .fold(Self::Open, |source, word| match word {
                "config=xenstore" => Self::Xenstore,
                "config=qubesdb" => Self::QubesDb,
                _ => source,
            })
    }

    /// The name that people see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "nobody so far",
            Self::Xenstore => "xenstore",
            Self::QubesDb => "qubesdb",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn l11_command_line_words_for_linux_decide_nothing() {
        let line = "root=/dev/mapper/dmroot ro nomodeset console=hvc0 swiotlb=2048";
        assert_eq!(Source::from_command_line(line), Source::Open);
        let forced = "ro config=xenstore quiet";
        assert_eq!(Source::from_command_line(forced), Source::Xenstore);
        assert_eq!(Source::from_command_line("config=qubesdb"), Source::QubesDb);
        assert_eq!(Source::from_command_line("config=other"), Source::Open);
    }
}
