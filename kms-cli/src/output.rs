//! Results on standard output: tables for people, JSON for programs.

use std::io::{IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, CellAlignment, ColumnConstraint, ContentArrangement, Table, TableStyle};
use serde_json::Value;

/// The form of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// One JSON value: field names as in the proto files, octets as upper-case hex, times in RFC 3339.
    Json,
}

/// Shows results.
pub(crate) struct Output {
    format: Format,
}

impl Output {
    pub(crate) const fn new(format: Format) -> Self {
        Self { format }
    }

    pub(crate) const fn is_json(&self) -> bool {
        matches!(self.format, Format::Json)
    }

    /// Shows a result in the form that was asked for; only that form is made.
    pub(crate) fn show(&self, json: impl FnOnce() -> Value, tables: impl FnOnce() -> String) {
        let text = if self.is_json() { format!("{:#}\n", json()) } else { tables() };
        // A reader that has gone away (`kms … | head`) is not a failure.
        let _ = std::io::stdout().write_all(text.as_bytes());
    }
}

/// Rows under headings. Only columns of sentences are broken into lines: a title, name, digest or time stays whole, so that it can be copied.
pub(crate) struct Rows {
    table: Table,
    sentences: Vec<usize>,
}

impl Rows {
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        let style = TableStyle::new().header_separator(comfy_table::LineStyle::none().fill('-').junction(' '));
        table.load_style(style).set_content_arrangement(ContentArrangement::Dynamic);
        let emphasis = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        table.set_header(headings.iter().map(|heading| if emphasis { Cell::new(heading).add_attribute(Attribute::Bold) } else { Cell::new(heading) }));
        // Columns start where lines start, and stand two apart: one of padding, one of the separator.
        table.column_iter_mut().for_each(|column| {
            column.set_padding((0, 1));
        });
        Self { table, sentences: Vec::new() }
    }

    /// Aligns columns (from 0) to the right.
    pub(crate) fn numbers(mut self, columns: &[usize]) -> Self {
        for column in columns {
            if let Some(column) = self.table.column_mut(*column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self
    }

    /// Columns (from 0) that hold sentences, to be broken into lines where the terminal is narrow.
    pub(crate) fn sentences(mut self, columns: &[usize]) -> Self {
        self.sentences = columns.to_vec();
        self
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.table.add_row(cells);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The table with a line feed at its end, or `otherwise` where it has no rows.
    pub(crate) fn text_or(mut self, otherwise: &str) -> String {
        if self.is_empty() {
            return format!("{otherwise}\n");
        }
        self.arrange();
        format!("{}\n", self.table.trim_fmt())
    }

    /// Breaks sentences only, and nothing at all where too little room would be left for them: long lines are better than words cut to pieces.
    fn arrange(&mut self) {
        let Some(terminal) = self.table.width().map(usize::from) else { return };
        let widths = self.table.column_max_content_widths();
        let is_sentence = |column: &usize| self.sentences.contains(column);
        let whole: usize = widths.iter().enumerate().filter(|(column, _)| !is_sentence(column)).map(|(_, width)| usize::from(*width)).sum();
        let room = terminal.saturating_sub(whole + GAP * widths.len());
        let wanted = widths.iter().enumerate().filter(|(column, width)| is_sentence(column) && usize::from(**width) > NARROWEST_SENTENCE).count();
        if wanted == 0 || room < NARROWEST_SENTENCE * wanted {
            self.table.set_content_arrangement(ContentArrangement::Disabled);
            return;
        }
        for (index, column) in self.table.column_iter_mut().enumerate() {
            if !self.sentences.contains(&index) {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
    }
}

/// Names and values, a line each.
pub(crate) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let facts: Vec<_> = facts.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    facts.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// A time in milliseconds (Unix time) in RFC 3339, to the second; empty for 0.
pub(crate) fn time(milliseconds: i64) -> String {
    written(milliseconds, 0)
}

/// A time in milliseconds (Unix time) in RFC 3339, to the millisecond; empty for 0.
pub(crate) fn exact_time(milliseconds: i64) -> String {
    written(milliseconds, 3)
}

fn written(milliseconds: i64, digits: usize) -> String {
    if milliseconds == 0 {
        return String::new();
    }
    jiff::Timestamp::from_millisecond(milliseconds).map_or_else(|_| format!("{milliseconds} ms"), |time| format!("{time:.digits$}"))
}

/// A number with its thousands apart.
pub(crate) fn number(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// `1 meter`, `2 meters`.
pub(crate) fn plural(count: u64, noun: &str) -> String {
    format!("{} {noun}{}", number(count), if count == 1 { "" } else { "s" })
}

/// Upper-case hex.
pub(crate) fn octets(octets: &[u8]) -> String {
    hex::encode_upper(octets)
}

/// An OBIS code in dotted form; hex where it has not 6 octets.
pub(crate) fn obis(code: &[u8]) -> String {
    if code.len() == 6 { code.iter().map(u8::to_string).collect::<Vec<_>>().join(".") } else { octets(code) }
}

/// A UUID in its usual form; hex where it has not 16 octets.
pub(crate) fn uuid(id: &[u8]) -> String {
    kms_client::GrantId::from_octets(id).map_or_else(|_| octets(id), |id| id.to_string())
}

/// What a key is granted for, as `--purpose` names it.
pub(crate) fn purpose(purpose: kms_client::proto::Purpose) -> String {
    purpose.as_str_name().trim_start_matches("PURPOSE_").to_lowercase().replace('_', "-")
}

/// `yes` or nothing.
pub(crate) fn yes(value: bool) -> String {
    if value { "yes".into() } else { String::new() }
}

/// Between two columns: one of padding, one of the separator.
const GAP: usize = 2;
/// Fewer characters make no readable sentence.
const NARROWEST_SENTENCE: usize = 24;
