//! What became of an attack.

use std::fmt;

/// Whether an attack was held, and what was measured.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    /// Which attack: A1 to A17, or `flood`.
    pub(crate) row: &'static str,
    /// What was tried.
    pub(crate) attack: String,
    /// Whether what must be true stayed true.
    pub(crate) held: bool,
    /// What was measured, with its unit.
    pub(crate) figure: Figure,
    /// What else was seen.
    pub(crate) detail: String,
}

/// A number and what it counts.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    /// The number.
    pub(crate) value: f64,
    /// What it counts, such as `of 200 replays changed content`.
    pub(crate) unit: String,
}

impl Figure {
    /// A count.
    pub(crate) fn count(value: usize, unit: impl Into<String>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "counts of tests are small")]
        Self { value: value as f64, unit: unit.into() }
    }

    /// Anything measured.
    pub(crate) fn of(value: f64, unit: impl Into<String>) -> Self {
        Self { value, unit: unit.into() }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.value.fract() == 0.0 || self.value.abs() >= 100.0 { 0 } else { 1 };
        write!(f, "{:.digits$} {}", self.value, self.unit)
    }
}

impl Verdict {
    /// What was tried and measured.
    pub(crate) fn new(row: &'static str, attack: impl Into<String>, held: bool, figure: Figure) -> Self {
        Self { row, attack: attack.into(), held, figure, detail: String::new() }
    }

    /// Adds what else was seen.
    pub(crate) fn with(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// An attack that could not be played proves nothing, so it is not held.
    pub(crate) fn not_played(name: &'static str, why: &str) -> Self {
        Self::new("?", name, false, Figure::count(0, "times played")).with(why)
    }

    const fn word(&self) -> &'static str {
        if self.held { "held" } else { "NOT HELD" }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "    {:<9} {}: {}", self.word(), self.attack, self.figure)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, "; {}", self.detail) }
    }
}

/// All verdicts, one a line, aligned.
pub(crate) fn table(verdicts: &[Verdict]) -> String {
    let width = verdicts.iter().map(|verdict| verdict.attack.chars().count()).max().unwrap_or_default();
    let line = |verdict: &Verdict| {
        let (row, word) = (verdict.row, verdict.word());
        format!("{row:<5}  {:<width$}  {word:<8}  {}", verdict.attack, verdict.figure)
    };
    verdicts.iter().map(line).collect::<Vec<_>>().join("\n")
}
