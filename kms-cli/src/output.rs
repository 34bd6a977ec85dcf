//! Results on standard output: tables for people, JSON for programs.

use std::io::{IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, CellAlignment, ColumnConstraint, ContentArrangement, Table, TableStyle};
use serde_json::Value;

/// The format of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// One JSON value: field names as in the proto files, octets as upper-case hex, times in RFC
    /// 3339.
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

    /// Shows a result in the requested format. Only this format is made.
    pub(crate) fn show(&self, json: impl FnOnce() -> Value, tables: impl FnOnce() -> String) {
        let text = if self.is_json() { format!("{:#}\n", json()) } else { tables() };
        // It is no failure if the reader has closed the pipe (`kms … | head`).
        let _ = std::io::stdout().write_all(text.as_bytes());
    }
}

/// A table with headings. Only columns of sentences are broken into lines. A title, name, digest or
/// time stays whole, so that it can be copied.
pub(crate) struct Rows {
    headings: Vec<String>,
    numbers: Vec<usize>,
    sentences: Vec<usize>,
    rows: Vec<Vec<String>>,
}

impl Rows {
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self {
            headings: headings.iter().map(|heading| (*heading).to_owned()).collect(),
            numbers: Vec::new(),
            sentences: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Aligns columns (from 0) to the right.
    pub(crate) fn numbers(mut self, columns: &[usize]) -> Self {
        self.numbers = columns.to_vec();
        self
    }

    /// Columns (from 0) that hold sentences: broken into lines where the terminal is narrow, left
    /// out where they are empty in all rows.
    pub(crate) fn sentences(mut self, columns: &[usize]) -> Self {
        self.sentences = columns.to_vec();
        self
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// The table with a line feed at its end, or `otherwise` where it has no rows.
    pub(crate) fn text_or(&self, otherwise: &str) -> String {
        if self.rows.is_empty() {
            return format!("{otherwise}\n");
        }
        let (sentences, whole): (Vec<usize>, Vec<usize>) = (0..self.headings.len())
            .filter(|column| !self.is_left_out(*column))
            .partition(|column| self.sentences.contains(column));
        let mut columns = [whole.as_slice(), &sentences].concat();
        columns.sort_unstable();
        let mut table = self.table(&columns);
        let Some(terminal) = table.width().map(usize::from) else { return format!("{}\n", table.trim_fmt()) };
        let widths = table.column_max_content_widths();
        let (long, short): (Vec<usize>, Vec<usize>) = (0..columns.len()).partition(|at| {
            columns.get(*at).is_some_and(|column| sentences.contains(column))
                && widths.get(*at).is_some_and(|width| usize::from(*width) > NARROWEST_SENTENCE)
        });
        let taken = short.iter().filter_map(|at| widths.get(*at)).map(|width| usize::from(*width)).sum::<usize>()
            + GAP * columns.len();
        if !long.is_empty() && terminal < taken + NARROWEST_SENTENCE * long.len() {
            return self.below_each_other(&whole, &sentences, terminal);
        }
        for at in short {
            if let Some(column) = table.column_mut(at) {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
        format!("{}\n", table.trim_fmt())
    }

    /// The table for a narrow terminal: the sentences of a row are below its other cells.
    fn below_each_other(&self, whole: &[usize], sentences: &[usize], terminal: usize) -> String {
        let mut table = self.table(whole);
        table.set_content_arrangement(ContentArrangement::Disabled);
        let text = table.trim_fmt();
        let mut lines = text.lines();
        let mut result: String = lines.by_ref().take(HEAD_LINES).map(|line| format!("{line}\n")).collect();
        for (row, line) in self.rows.iter().zip(lines) {
            result.push_str(line);
            result.push('\n');
            for column in sentences {
                let (Some(heading), Some(cell)) =
                    (self.headings.get(*column), row.get(*column).filter(|cell| !cell.is_empty()))
                else {
                    continue;
                };
                for part in cell.lines() {
                    result.push_str(&indented(&format!("{heading}: {part}"), terminal));
                }
            }
        }
        result
    }

    fn table(&self, columns: &[usize]) -> Table {
        let mut table = Table::new();
        let style = TableStyle::new().header_separator(comfy_table::LineStyle::none().fill('-').junction(' '));
        table.load_style(style).set_content_arrangement(ContentArrangement::Dynamic);
        let emphasis = is_emphasised();
        let headings = columns.iter().filter_map(|column| self.headings.get(*column));
        table.set_header(headings.map(|heading| {
            if emphasis { Cell::new(heading).add_attribute(Attribute::Bold) } else { Cell::new(heading) }
        }));
        for row in &self.rows {
            table.add_row(columns.iter().filter_map(|column| row.get(*column)));
        }
        // Columns start where lines start, and stand two apart: one of padding, one of the
        // separator.
        for (column, number) in table.column_iter_mut().zip(columns) {
            column.set_padding((0, 1));
            if self.numbers.contains(number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    fn is_left_out(&self, column: usize) -> bool {
        self.sentences.contains(&column) && self.rows.iter().all(|row| row.get(column).is_none_or(String::is_empty))
    }
}

/// A table whose rows are shown while they come. A column is as wide as its widest cell so far:
/// rows that come later and are wider move the columns behind them.
pub(crate) struct StreamedRows {
    headings: &'static [&'static str],
    widths: Vec<usize>,
    begun: bool,
}

impl StreamedRows {
    pub(crate) fn new(headings: &'static [&'static str]) -> Self {
        Self { headings, widths: headings.iter().map(|heading| heading.len()).collect(), begun: false }
    }

    /// Whether no row was shown.
    pub(crate) const fn is_empty(&self) -> bool {
        !self.begun
    }

    /// Shows more rows; the headings with the first.
    pub(crate) fn show(&mut self, rows: Vec<Vec<String>>) {
        let text = self.text(&rows);
        let _ = std::io::stdout().write_all(text.as_bytes());
    }

    fn text(&mut self, rows: &[Vec<String>]) -> String {
        if rows.is_empty() {
            return String::new();
        }
        for row in rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        if !self.begun {
            self.begun = true;
            let headings: Vec<String> = self.headings.iter().map(|heading| (*heading).to_owned()).collect();
            let line = self.line(&headings);
            text.push_str(&if is_emphasised() { format!("\u{1b}[1m{line}\u{1b}[0m\n") } else { format!("{line}\n") });
            let last = self.headings.len().saturating_sub(1);
            let rules = self.widths.iter().enumerate().map(|(at, width)| {
                // The last column has no end that could be seen.
                let rule = if at == last { (*width).min(LONGEST_RULE) } else { *width };
                "-".repeat(rule)
            });
            text.push_str(&format!("{}\n", rules.collect::<Vec<_>>().join("  ")));
        }
        for row in rows {
            text.push_str(&self.line(row));
            text.push('\n');
        }
        text
    }

    fn line(&self, cells: &[String]) -> String {
        let padded = cells.iter().zip(&self.widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    }
}

/// Whether headings are bold.
fn is_emphasised() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Words in lines of at most `width` characters, indented; a longer word has a line of its own.
fn indented(text: &str, width: usize) -> String {
    let (mut result, mut line) = (String::new(), String::new());
    for word in text.split(' ') {
        if !line.is_empty() && INDENT.len() + line.chars().count() + 1 + word.chars().count() > width {
            result.push_str(&format!("{INDENT}{line}\n"));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    format!("{result}{INDENT}{line}\n")
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

/// The time of an end, as [`time`] shows it, and the number of days that are left, if it is 30 or
/// less.
pub(crate) fn end(milliseconds: i64) -> String {
    end_as_of(milliseconds, jiff::Timestamp::now().as_millisecond())
}

/// The warning about an end that is within 30 days, or has passed; `None`: no warning.
pub(crate) fn ends_soon(milliseconds: i64, now: i64) -> Option<String> {
    let text = end_as_of(milliseconds, now);
    text.split_once(", ").map(|(_, soon)| soon.to_owned())
}

fn end_as_of(milliseconds: i64, now: i64) -> String {
    let text = time(milliseconds);
    match (milliseconds - now).div_euclid(86_400_000) {
        _ if milliseconds == 0 => text,
        ..0 => format!("{text}, has ended"),
        days @ 0..30 => format!("{text}, ends in {days} day{}", if days == 1 { "" } else { "s" }),
        _ => text,
    }
}

/// A time in milliseconds (Unix time) in RFC 3339, to the millisecond; empty for 0.
pub(crate) fn exact_time(milliseconds: i64) -> String {
    written(milliseconds, 3)
}

fn written(milliseconds: i64, digits: usize) -> String {
    if milliseconds == 0 {
        return String::new();
    }
    jiff::Timestamp::from_millisecond(milliseconds)
        .map_or_else(|_| format!("{milliseconds} ms"), |time| format!("{time:.digits$}"))
}

/// A number with separated thousands.
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

/// The purpose of a grant, as `--purpose` names it.
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
const INDENT: &str = "    ";
/// Below the heading of the last column.
const LONGEST_RULE: usize = 40;
/// Headings and the line below them.
const HEAD_LINES: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_come_later_stand_below_the_first() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let mut rows = StreamedRows::new(&["owner", "how"]);
        assert_eq!(rows.text(&[]), "");
        assert!(rows.is_empty());
        assert_eq!(rows.text(&[row(["4B41", "grant"])]), "owner  how\n-----  -----\n4B41   grant\n");
        assert_eq!(rows.text(&[row(["4B414D", ""])]), "4B414D\n");
        assert_eq!(rows.text(&[row(["4B41", "grant"])]), "4B41    grant\n");
    }

    #[test]
    fn an_end_that_is_near_is_told_in_days() {
        const DAY: i64 = 86_400_000;
        let now = 1_795_165_200_000;
        assert_eq!(end_as_of(0, now), "");
        assert!(end_as_of(now - 1, now).ends_with(", has ended"));
        assert!(end_as_of(now + DAY, now).ends_with(", ends in 1 day"));
        assert!(end_as_of(now + 29 * DAY, now).ends_with(", ends in 29 days"));
        assert_eq!(end_as_of(now + 30 * DAY, now), time(now + 30 * DAY));
        assert_eq!(ends_soon(now + 29 * DAY, now).as_deref(), Some("ends in 29 days"));
        assert_eq!((ends_soon(now - 1, now).as_deref(), ends_soon(now + 30 * DAY, now)), (Some("has ended"), None));
    }
}
