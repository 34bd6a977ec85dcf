//! Files of work orders: CSV and JSON Lines. Every line is checked here, before anything goes to
//! the network.

use std::path::Path;

use jiff::Timestamp;
use kms_client::SystemTitle;
use kms_domain::{ParseError, PersonName, Place, UnixMillis, WorkOrderContent, WorkOrderId, WorkOrderTask};
use kms_proto::v1 as proto;
use serde::Deserialize;

use crate::{arguments::work_order::FileFormat, commands::octets, failure::Failure};

/// A line of a file that is a work order.
#[derive(Debug)]
pub(super) struct OrderLine {
    /// From 1.
    pub(super) line: u64,
    pub(super) order: proto::NewWorkOrder,
    pub(super) meters: usize,
}

/// A line of a file that is no work order.
#[derive(Debug)]
pub(super) struct BadLine {
    /// From 1.
    pub(super) line: u64,
    /// The id that it names; empty: none.
    pub(super) id: String,
    pub(super) reason: String,
}

/// The orders of a file, and the lines that are none.
#[derive(Debug, Default)]
pub(super) struct OrderFile {
    pub(super) orders: Vec<OrderLine>,
    pub(super) bad: Vec<BadLine>,
}

impl OrderFile {
    /// The orders of a file's content.
    ///
    /// # Errors
    /// The CSV has no usable headings.
    pub(super) fn parse(content: &[u8], format: FileFormat, path: &Path) -> Result<Self, Failure> {
        let mut file = Self::default();
        match format {
            FileFormat::Csv => file.read_csv(content, path)?,
            FileFormat::Jsonl => file.read_lines(content),
        }
        if file.orders.is_empty() && file.bad.is_empty() {
            return Err(Failure::usage(format!("`{}` has no work order", path.display())));
        }
        Ok(file)
    }

    fn read_csv(&mut self, content: &[u8], path: &Path) -> Result<(), Failure> {
        // Between carriage return and line feed the reader counts the line before.
        let content: Vec<u8> = content.iter().copied().filter(|octet| *octet != b'\r').collect();
        let headings = content.split(|octet| *octet == b'\n').next().unwrap_or_default();
        // Spreadsheets write semicolons where numbers have a decimal comma.
        let delimiter = if headings.contains(&b';') { b';' } else { b',' };
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .trim(csv::Trim::All)
            .flexible(false)
            .from_reader(content.as_slice());
        let headings = reader.headers().map_err(|error| Failure::usage(format!("`{}`: {error}", path.display())))?;
        let headings = headings.clone();
        let known = |heading: &str| CSV_HEADINGS.contains(&heading);
        let unknown = headings.iter().find(|heading| !known(heading));
        let missing = CSV_HEADINGS
            .iter()
            .filter(|heading| **heading != "place")
            .find(|heading| !headings.iter().any(|found| found == **heading));
        let wrong = match (unknown, missing) {
            (Some(unknown), _) => Some(format!("the heading `{unknown}` is unknown")),
            (None, Some(missing)) => Some(format!("the heading `{missing}` is missing")),
            (None, None) => None,
        };
        if let Some(wrong) = wrong {
            return Err(Failure::usage(format!("`{}`, line 1: {wrong}", path.display()))
                .with_hint(format!("the headings are {}", CSV_HEADINGS.join(","))));
        }
        for record in reader.records() {
            match record {
                Ok(record) => {
                    let line = record.position().map_or(0, csv::Position::line);
                    let fields = record.deserialize::<CsvOrder>(Some(&headings)).map(Fields::from);
                    self.add(line, fields.map_err(|error| error.to_string()));
                }
                Err(error) => {
                    let line = error.position().map_or(0, csv::Position::line);
                    let reason = match error.kind() {
                        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                            format!("{len} fields, and the headings are {expected_len}")
                        }
                        csv::ErrorKind::Utf8 { .. } => "it is not UTF-8".to_owned(),
                        _ => error.to_string(),
                    };
                    self.bad.push(BadLine { line, id: String::new(), reason });
                }
            }
        }
        Ok(())
    }

    fn read_lines(&mut self, content: &[u8]) {
        for (line, text) in (1..).zip(content.split(|octet| *octet == b'\n')) {
            if !text.trim_ascii().is_empty() {
                let fields = serde_json::from_slice::<JsonOrder>(text).map(Fields::from);
                self.add(line, fields.map_err(|error| error.to_string()));
            }
        }
    }

    fn add(&mut self, line: u64, fields: Result<Fields, String>) {
        match fields {
            Ok(fields) => {
                let id = fields.id.clone();
                match fields.order() {
                    Ok((order, meters)) => self.orders.push(OrderLine { line, order, meters }),
                    Err(reason) => self.bad.push(BadLine { line, id, reason }),
                }
            }
            Err(reason) => self.bad.push(BadLine { line, id: String::new(), reason }),
        }
    }
}

/// A line of a CSV file.
#[derive(Deserialize)]
struct CsvOrder {
    id: String,
    technician: String,
    meters: String,
    tasks: String,
    from: String,
    until: String,
    #[serde(default)]
    place: String,
}

/// A line of a file of JSON Lines.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonOrder {
    id: String,
    technician: String,
    meters: Vec<String>,
    tasks: Vec<String>,
    from: String,
    until: String,
    #[serde(default)]
    place: String,
}

/// The fields of an order, as texts.
struct Fields {
    id: String,
    technician: String,
    meters: Vec<String>,
    tasks: Vec<String>,
    from: String,
    until: String,
    place: String,
}

impl From<CsvOrder> for Fields {
    fn from(order: CsvOrder) -> Self {
        let list = |text: &str| {
            let parts = text.split(|letter: char| letter.is_whitespace() || letter == ';' || letter == ',');
            parts.filter(|part| !part.is_empty()).map(str::to_owned).collect()
        };
        Self {
            id: order.id,
            technician: order.technician,
            meters: list(&order.meters),
            tasks: list(&order.tasks),
            from: order.from,
            until: order.until,
            place: order.place,
        }
    }
}

impl From<JsonOrder> for Fields {
    fn from(order: JsonOrder) -> Self {
        let JsonOrder { id, technician, meters, tasks, from, until, place } = order;
        Self { id, technician, meters, tasks, from, until, place }
    }
}

impl Fields {
    /// The order, and the number of its meters; or the first field that is wrong.
    fn order(self) -> Result<(proto::NewWorkOrder, usize), String> {
        let because = |error: ParseError| error.to_string();
        let id = WorkOrderId::parse(&self.id).map_err(because)?;
        let technician =
            PersonName::parse(&self.technician).map_err(|error| format!("technician: {}", error.reason()))?;
        let title = |title: &String| SystemTitle::parse(title).map_err(|error| format!("meters: {}", error.reason()));
        let meters = self.meters.iter().map(title).collect::<Result<Vec<_>, _>>()?;
        let tasks = self.tasks.iter().map(|task| WorkOrderTask::parse(task)).collect::<Result<_, _>>();
        let tasks = tasks.map_err(because)?;
        let time = (moment("from", &self.from)?, moment("until", &self.until)?);
        let place = Place::parse(&self.place).map_err(because)?;
        let content = WorkOrderContent::new(technician, meters, tasks, time, place).map_err(because)?;
        let meters = content.meters().len();
        let content = proto::WorkOrderContent {
            technician: content.technician.as_str().to_owned(),
            meters: content.meters().iter().map(|title| octets(title.octets())).collect(),
            tasks: content.tasks.names(),
            from_ms: content.from.0,
            until_ms: content.until.0,
            place: content.place.as_str().to_owned(),
        };
        Ok((proto::NewWorkOrder { work_order_id: id.to_string(), content: Some(content) }, meters))
    }
}

fn moment(field: &str, text: &str) -> Result<UnixMillis, String> {
    let time: Timestamp = text.parse().map_err(|_| {
        format!(
            "{field}: `{text}` is not a time with its zone, such as 2026-12-01T07:00:00Z or 2026-12-01T08:00:00+01:00"
        )
    })?;
    Ok(UnixMillis(time.as_millisecond()))
}

const CSV_HEADINGS: [&str; 7] = ["id", "technician", "meters", "tasks", "from", "until", "place"];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(content: &str, format: FileFormat) -> OrderFile {
        OrderFile::parse(content.as_bytes(), format, Path::new("orders")).unwrap()
    }

    fn bad(file: &OrderFile) -> Vec<(u64, &str, &str)> {
        file.bad.iter().map(|bad| (bad.line, bad.id.as_str(), bad.reason.as_str())).collect()
    }

    #[test]
    fn both_formats_say_the_same() {
        let csv = parse(
            "id,technician,meters,tasks,from,until,place\n\
             WO-1,Ida Berg,4B414D0000000002 4B414D0000000001,read firmware,2026-12-01T07:00:00Z,2026-12-01T18:00:00+01:00,\"Harbour Street 7, cellar\"\n",
            FileFormat::Csv,
        );
        let semicolons = parse(
            "\u{FEFF}place;id;technician;tasks;meters;from;until\r\n\
             Harbour Street 7, cellar;WO-1;Ida Berg;read,firmware;4B414D0000000002,4B414D0000000001;2026-12-01T07:00:00Z;2026-12-01T17:00:00Z\r\n",
            FileFormat::Csv,
        );
        let lines = parse(
            "\n{\"id\":\"WO-1\",\"technician\":\"Ida Berg\",\"meters\":[\"4B414D0000000001\",\"4B414D0000000002\"],\"tasks\":[\"firmware\",\"read\"],\
             \"from\":\"2026-12-01T07:00:00Z\",\"until\":\"2026-12-01T17:00:00Z\",\"place\":\"Harbour Street 7, cellar\"}\n\n",
            FileFormat::Jsonl,
        );
        for file in [&csv, &semicolons, &lines] {
            assert_eq!((file.orders.len(), bad(file)), (1, Vec::new()));
            assert_eq!(file.orders[0].order, csv.orders[0].order);
            assert_eq!((file.orders[0].line, file.orders[0].meters), (2, 2));
        }
        let without_place = parse(
            "id,technician,meters,tasks,from,until\nWO-1,Ida,4B414D0000000001,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n",
            FileFormat::Csv,
        );
        assert_eq!(without_place.orders[0].order.content.as_ref().unwrap().place, "");
    }

    #[test]
    fn a_bad_line_is_named_and_the_others_are_orders() {
        let file = parse(
            "id,technician,meters,tasks,from,until\n\
             WO-1,Ida,4B414D0000000001,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n\
             WO-2,Ida,4B41,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n\
             WO-3,Ida,4B414D0000000001,dance,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n\
             WO-4,Ida,4B414D0000000001,read,2026-12-01 07:00,2026-12-02T07:00:00Z\n\
             WO-5,Ida,4B414D0000000001\n\
             WO-6,Ida,4B414D0000000001 4B414D0000000001,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n\
             WO-7,,4B414D0000000001,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n\
             WO-8,Ida,4B414D0000000001,read,2026-12-01T07:00:00Z,2027-12-02T07:00:00Z\n\
             WO-9,Ida,4B414D0000000002,read,2026-12-01T07:00:00Z,2026-12-02T07:00:00Z\n",
            FileFormat::Csv,
        );
        assert_eq!(file.orders.iter().map(|order| order.line).collect::<Vec<_>>(), [2, 10]);
        let expected = [
            (3, "WO-2", "meters: 2 octets"),
            (4, "WO-3", "task: `dance` is not read"),
            (5, "WO-4", "from: `2026-12-01 07:00` is not a time with its zone"),
            (6, "", "3 fields, and the headings are 6"),
            (7, "WO-6", "meters: 4B414D0000000001 occurs twice"),
            (8, "WO-7", "technician: not 1 to 64 octets"),
            (9, "WO-8", "until: the end is more than 31 days"),
        ];
        let found = bad(&file);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for ((line, id, reason), (at, of, begin)) in found.into_iter().zip(expected) {
            assert!((line, id) == (at, of) && reason.starts_with(begin), "{line} {id}: {reason}");
        }
        let lines = parse("{\"id\":\"WO-1\"}\nnonsense\n{\"id\":\"WO-1\",\"colour\":\"red\"}\n", FileFormat::Jsonl);
        assert_eq!(lines.bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn headings_are_checked_and_an_empty_file_is_refused() {
        for (content, expected) in [
            ("id,technician,meters,tasks,from\n", "the heading `until` is missing"),
            ("id,technician,meters,tasks,from,until,color\n", "the heading `color` is unknown"),
            ("id,technician,meters,tasks,from,until\n", "has no work order"),
            ("", "the heading `id` is missing"),
        ] {
            let refusal = OrderFile::parse(content.as_bytes(), FileFormat::Csv, Path::new("orders.csv")).unwrap_err();
            assert!(refusal.to_string().contains(expected), "{refusal}");
        }
        assert!(OrderFile::parse(b"\n", FileFormat::Jsonl, Path::new("orders.jsonl")).is_err());
    }
}
