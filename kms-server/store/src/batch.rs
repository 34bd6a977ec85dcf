//! Many rows as two parameters of one statement, whose text never changes: it is prepared once.
//!
//! Numbers and text are a JSON array of arrays. Octets follow each other in one blob, which the
//! statement divides. Both databases read that form, and a row costs a hundredth of a statement.

use std::fmt::Write;

/// SQL for integer `$n` of a row.
macro_rules! int {
    ($n:literal) => {
        concat!("CAST(j.value->>", $n, " AS BIGINT)")
    };
}

/// SQL for text `$n` of a row.
macro_rules! text {
    ($n:literal) => {
        concat!("(j.value->>", $n, ")")
    };
}

/// SQL for octets of a row, which take two places: start and length.
macro_rules! octets {
    ($n:literal, $m:literal) => {
        concat!("substr($2, CAST(j.value->>", $n, " AS INTEGER), CAST(j.value->>", $m, " AS INTEGER))")
    };
}

/// Rows being collected.
pub(crate) struct RowBatch {
    json: String,
    blob: Vec<u8>,
    rows: u64,
}

impl RowBatch {
    /// A batch with one row for each item.
    pub(crate) fn of<T>(items: impl IntoIterator<Item = T>, mut fill: impl FnMut(&mut BatchRow<'_>, T)) -> Self {
        let mut batch = Self { json: String::from("["), blob: Vec::new(), rows: 0 };
        for item in items {
            batch.json.push_str(if batch.rows == 0 { "[" } else { ",[" });
            fill(&mut BatchRow { batch: &mut batch, empty: true }, item);
            batch.json.push(']');
            batch.rows += 1;
        }
        batch.json.push(']');
        batch
    }

    /// How many rows there are.
    pub(crate) const fn rows(&self) -> u64 {
        self.rows
    }

    /// Parameters `$1` and `$2`.
    pub(crate) fn into_parameters(self) -> (String, Vec<u8>) {
        (self.json, self.blob)
    }
}

/// One row being filled, from left to right.
pub(crate) struct BatchRow<'a> {
    batch: &'a mut RowBatch,
    empty: bool,
}

impl BatchRow<'_> {
    /// An integer: one place.
    pub(crate) fn int(&mut self, value: i64) -> &mut Self {
        self.separate();
        // Writing to a String cannot fail.
        let _ = write!(self.batch.json, "{value}");
        self
    }

    /// An unsigned integer: one place. A value above the range of the column becomes its maximum.
    /// No counter gets that high.
    pub(crate) fn unsigned(&mut self, value: u64) -> &mut Self {
        self.int(i64::try_from(value).unwrap_or(i64::MAX))
    }

    /// An integer or NULL: one place.
    pub(crate) fn optional(&mut self, value: Option<i64>) -> &mut Self {
        match value {
            Some(value) => self.int(value),
            None => {
                self.separate();
                self.batch.json.push_str("null");
                self
            }
        }
    }

    /// An array of integers: one place.
    pub(crate) fn ints(&mut self, values: &[i64]) -> &mut Self {
        self.separate();
        self.batch.json.push('[');
        for (index, value) in values.iter().enumerate() {
            let _ = write!(self.batch.json, "{}{value}", if index == 0 { "" } else { "," });
        }
        self.batch.json.push(']');
        self
    }

    /// Text: one place. PostgreSQL's text cannot hold NUL, so NUL is replaced.
    pub(crate) fn text(&mut self, value: &str) -> &mut Self {
        self.separate();
        self.batch.json.push_str(&serde_json::Value::String(value.replace('\0', "\u{FFFD}")).to_string());
        self
    }

    /// Octets: two places.
    pub(crate) fn octets(&mut self, value: &[u8]) -> &mut Self {
        let start = self.batch.blob.len() + 1;
        self.batch.blob.extend_from_slice(value);
        self.unsigned(start as u64).unsigned(value.len() as u64)
    }

    fn separate(&mut self) {
        if !std::mem::take(&mut self.empty) {
            self.batch.json.push(',');
        }
    }
}
