//! `kms exposure`. Answers can be long: lines are shown while further pages are read.

mod tally;
mod text;

use std::{collections::HashSet, io::Write as _};

use kms_client::PrincipalId;
use kms_proto::v1::{self as proto, list_exposures_request::Subject as Asked};
use serde_json::{Value, json};

use self::{
    tally::Tally,
    text::{Columns, owner_text, summary},
};
use super::octets;
use crate::{
    arguments::exposure::{ExposureCommand, ShowExposure, Subject},
    context::Context,
    failure::Failure,
    json,
    output::StreamedRows,
    progress::waiting,
};

pub(crate) async fn run(command: ExposureCommand, context: &Context) -> Result<(), Failure> {
    match command {
        ExposureCommand::Show(arguments) => show(arguments, context).await,
    }
}

async fn show(arguments: ShowExposure, context: &Context) -> Result<(), Failure> {
    let connection = context.connect().await?;
    let subject = asked(&arguments.subject, &connection).await?;
    let mut client = connection.exposures();
    let columns = Columns::of(&subject);
    let mut shown = if context.output.is_json() {
        Shown::Json { lines: 0 }
    } else {
        Shown::Table(StreamedRows::new(columns.headings()))
    };
    let mut groups = HashSet::new();
    let (mut tally, mut page_token, mut more) = (Tally::default(), bytes::Bytes::new(), false);
    loop {
        let request = proto::ListExposuresRequest {
            subject: Some(subject.clone()),
            since_ms: arguments.since.map_or(0, jiff::Timestamp::as_millisecond),
            page_size: PAGE,
            page_token,
        };
        let mut page = waiting("reading exposures", client.list_exposures(request)).await?.into_inner();
        // Keys of groups stand on each page of meters for which they left.
        page.keys.retain(|key| key.group.is_empty() || groups.insert(group_key(key)));
        if arguments.open {
            page.keys.retain(|key| key.reach == "open");
        }
        if arguments.limit > 0 {
            let left = usize::try_from(arguments.limit.saturating_sub(tally.lines)).unwrap_or(usize::MAX);
            more = page.keys.len() > left;
            page.keys.truncate(left);
        }
        tally.count(&page);
        shown.lines(&page, &columns);
        page_token = page.next_page_token.clone();
        more |= !page_token.is_empty() && arguments.limit > 0 && tally.lines >= arguments.limit;
        if more || page_token.is_empty() {
            break;
        }
    }
    shown.end(&tally, &subject, more);
    match (tally.incomplete, tally.unreadable.len()) {
        (false, 0) => Ok(()),
        (true, _) => {
            Err(Failure::partly("the server has not indexed all rows of an earlier version yet: owners can be missing")
                .with_hint("ask again when its log says `the index of exposures is complete`"))
        }
        (false, count) => Err(Failure::partly(format!("{count} sealed rows do not verify, and are not in the answer"))
            .with_hint("run `kms audit scrub`")),
    }
}

type GroupKey = (String, bytes::Bytes, String, u32, String);

/// What names a line about a group's key.
fn group_key(key: &proto::ExposedKey) -> GroupKey {
    (key.group.clone(), key.security_setup.clone(), key.key_type.clone(), key.version, key.known_to.clone())
}

/// The subject of the command line. A handheld's name is of the caller's island.
async fn asked(subject: &Subject, connection: &kms_client::Connection) -> Result<Asked, Failure> {
    Ok(match subject {
        Subject { meter: Some(meter), .. } => Asked::Meter(octets(meter.octets())),
        Subject { group: Some(group), .. } => Asked::Group(group.clone()),
        Subject { principal: Some(principal), .. } => Asked::Principal(principal.to_string()),
        Subject { handheld: Some(name), .. } if name.contains(':') => Asked::Principal(name.clone()),
        Subject { handheld: Some(name), .. } => {
            let own = connection.principals().who_am_i(proto::WhoAmIRequest {}).await?.into_inner();
            let own = PrincipalId::parse(&own.principal)?;
            let handheld = PrincipalId::new(own.island().clone(), kms_client::Role::Handheld, name)?;
            Asked::Principal(handheld.to_string())
        }
        Subject { vendor: Some(vendor), .. } => Asked::Manufacturer(vendor.clone()),
        Subject { batch: Some(batch), .. } => Asked::Batch(batch.clone()),
        Subject { .. } => Asked::Anyone(proto::AnyoneSubject {}),
    })
}

/// The lines, as a table or as one JSON value, in both cases while they come.
enum Shown {
    Table(StreamedRows),
    Json { lines: u64 },
}

impl Shown {
    fn lines(&mut self, page: &proto::ListExposuresResponse, columns: &Columns) {
        match self {
            Self::Table(rows) => rows.show(page.keys.iter().map(|key| columns.cells(key)).collect()),
            Self::Json { lines } => {
                let Value::Object(mut message) = json::message("ListExposuresResponse", page) else { return };
                let Some(Value::Array(keys)) = message.remove("keys") else { return };
                for key in keys {
                    print(&format!("{}{key}", if *lines == 0 { "{\"keys\": [\n" } else { ",\n" }));
                    *lines += 1;
                }
            }
        }
    }

    fn end(self, tally: &Tally, subject: &Asked, more: bool) {
        match self {
            Self::Table(rows) => {
                let before = if rows.is_empty() { "no exposures\n" } else { "\n" };
                let unreadable: String = tally
                    .unreadable
                    .iter()
                    .map(|one| format!("{}: its row does not verify: {}\n", owner_text(one), one.reason))
                    .collect();
                print(&format!("{before}{}{unreadable}", summary(tally, subject, more)));
            }
            Self::Json { lines } => {
                let unreadable: Vec<Value> =
                    tally.unreadable.iter().map(|one| json::message("UnreadableOwner", one)).collect();
                let rest = json!({
                    "totals": tally.totals.map_or(Value::Null, |totals| json::message("ExposureTotals", &totals)),
                    "shown": { "owners": tally.owners, "slots": tally.slots, "open": tally.open },
                    "complete": !tally.incomplete,
                    "unreadable": unreadable,
                    "more": more,
                });
                let rest = rest.to_string();
                let rest = rest.strip_prefix('{').unwrap_or(&rest);
                print(&format!("{}\n],\n{rest}\n", if lines == 0 { "{\"keys\": [" } else { "" }));
            }
        }
    }
}

/// It is no failure if the reader has closed the pipe (`kms … | head`).
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Owners of a page.
const PAGE: u32 = 500;
