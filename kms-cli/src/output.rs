//! Results on standard output: tables for people, JSON for programs.

use std::io::{IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, Table, TableStyle};
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

/// Rows under headings.
pub(crate) struct Rows {
    table: Table,
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
        Self { table }
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

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.table.add_row(cells);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The table with a line feed at its end, or `otherwise` where it has no rows.
    pub(crate) fn text_or(&self, otherwise: &str) -> String {
        if self.is_empty() { format!("{otherwise}\n") } else { format!("{}\n", self.table.trim_fmt()) }
    }
}

/// Names and values, a line each.
pub(crate) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let facts: Vec<_> = facts.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    facts.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// A time in milliseconds (Unix time) in RFC 3339; empty for 0.
pub(crate) fn time(milliseconds: i64) -> String {
    if milliseconds == 0 {
        return String::new();
    }
    jiff::Timestamp::from_millisecond(milliseconds).map_or_else(|_| format!("{milliseconds} ms"), |time| time.to_string())
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

/// `yes` or nothing.
pub(crate) fn yes(value: bool) -> String {
    if value { "yes".into() } else { String::new() }
}
