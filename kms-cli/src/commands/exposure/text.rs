//! The lines and the summary of an answer about exposures.

use kms_client::SecuritySetupId;
use kms_proto::v1::{self as proto, list_exposures_request::Subject as Asked};

use super::tally::Tally;
use crate::output::{self, number, plural};

/// Which columns the lines have.
pub(super) struct Columns {
    /// The party is the subject itself.
    one_party: bool,
}

impl Columns {
    pub(super) const fn of(subject: &Asked) -> Self {
        Self { one_party: !matches!(subject, Asked::Meter(_) | Asked::Group(_)) }
    }

    pub(super) const fn headings(&self) -> &'static [&'static str] {
        if self.one_party {
            &["owner", "key", "version", "since", "until", "how"]
        } else {
            &["owner", "key", "version", "known by", "since", "until", "how"]
        }
    }

    pub(super) fn cells(&self, key: &proto::ExposedKey) -> Vec<String> {
        let owner = match (key.group.as_str(), key.device_type.as_str()) {
            ("", "") => output::octets(&key.meter),
            ("", name) => format!("device type {name}"),
            (name, _) => format!("group {name}"),
        };
        let setup = if key.security_setup == SecuritySetupId::DEFAULT.obis().as_slice() {
            String::new()
        } else {
            format!(" in {}", output::obis(&key.security_setup))
        };
        let mut cells = vec![owner, format!("{}{setup}", key.key_type), key.version.to_string()];
        if !self.one_party {
            cells.push(key.known_to.clone());
        }
        let until = match key.reach.as_str() {
            "open" => "open".to_owned(),
            "replaced" => format!("{}, may go back", output::time(key.until_ms)),
            _ if key.meter_status == "retired" => format!("{}, retired", output::time(key.until_ms)),
            _ => output::time(key.until_ms),
        };
        cells.extend([output::time(key.since_ms), until, how(&key.ways)]);
        cells
    }
}

fn how(ways: &[proto::ExposureWay]) -> String {
    let way = |way: &proto::ExposureWay| match (way.reason.as_str(), way.through_version) {
        ("frames-under-exposed-key", version) => format!("its frames, from {} {version}", way.through_key_type),
        (_, version @ 1..) => format!("it left under {} {version}", way.through_key_type),
        (reason, _) if way.equal_key => format!("equal key: {reason}"),
        (reason, _) => reason.to_owned(),
    };
    ways.iter().map(way).collect::<Vec<_>>().join("; ")
}

/// The owner of a row that does not verify.
pub(super) fn owner_text(owner: &proto::UnreadableOwner) -> String {
    match (owner.group_number, owner.device_type_number) {
        (0, 0) => output::octets(&owner.meter),
        (0, number) => format!("device type {number}"),
        (number, _) => format!("group {number}"),
    }
}

/// How much of it there was, and how much is still open.
pub(super) fn summary(tally: &Tally, subject: &Asked, more: bool) -> String {
    let party = match subject {
        Asked::Meter(_) | Asked::Group(_) if tally.parties.len() == 1 => "1 party".to_owned(),
        Asked::Meter(_) | Asked::Group(_) => format!("{} parties", number(tally.parties.len() as u64)),
        Asked::Principal(uri) => uri.clone(),
        Asked::Manufacturer(flag) => format!("the vendor of {flag}"),
        Asked::Batch(batch) => format!("the vendor of batch {batch}"),
        Asked::Anyone(_) => "anyone".to_owned(),
    };
    let sentence = |slots: u64, owners: u64, open: u64| {
        format!(
            "{} of {} {} open to {party}, {} still {}\n",
            plural(slots, "slot"),
            plural(owners, "owner"),
            if slots == 1 { "was" } else { "were" },
            number(open),
            if open == 1 { "is" } else { "are" }
        )
    };
    if more {
        let all = match tally.totals {
            Some(totals) if totals.slots > 0 => {
                format!("by the index, {}", sentence(totals.slots, totals.owners, totals.open))
            }
            _ => String::new(),
        };
        return format!("{all}{} shown; there are more: --limit 0 shows all\n", plural(tally.lines, "line"));
    }
    if tally.lines == 0 {
        return String::new();
    }
    let may_go_back = match tally.may_go_back {
        0 => String::new(),
        count => format!(
            "{} {} replaced, and the meter may go back until the retention time has passed\n",
            plural(count, "slot"),
            if count == 1 { "was" } else { "were" }
        ),
    };
    format!("{}{may_go_back}", sentence(tally.slots, tally.owners, tally.open))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(reason: &str, through: (&str, u32), equal_key: bool) -> proto::ExposureWay {
        proto::ExposureWay {
            reason: reason.to_owned(),
            equal_key,
            through_key_type: through.0.to_owned(),
            through_version: through.1,
        }
    }

    #[test]
    fn each_way_has_its_words() {
        let ways = [
            way("grant", ("", 0), false),
            way("shipment", ("", 0), true),
            way("transfer-under-exposed-kek", ("KEK", 2), false),
            way("frames-under-exposed-key", ("GUEK", 1), false),
        ];
        assert_eq!(how(&ways), "grant; equal key: shipment; it left under KEK 2; its frames, from GUEK 1");
    }

    #[test]
    fn the_summary_counts_what_was_and_what_is() {
        let hh = Asked::Principal("urn:meterkms:dev:handheld:hh-7".to_owned());
        let all = Tally { lines: 3, owners: 2, slots: 3, open: 1, may_go_back: 2, ..Tally::default() };
        let text = summary(&all, &hh, false);
        assert!(
            text.starts_with("3 slots of 2 owners were open to urn:meterkms:dev:handheld:hh-7, 1 still is\n"),
            "{text}"
        );
        assert!(text.contains("2 slots were replaced, and the meter may go back"), "{text}");
        let totals = proto::ExposureTotals { owners: 206, slots: 412, open: 37, equal_keys: 0 };
        let some = Tally { totals: Some(totals), ..all };
        let text = summary(&some, &hh, true);
        assert!(
            text.contains("by the index, 412 slots of 206 owners were open") && text.contains("3 lines shown"),
            "{text}"
        );
        assert_eq!(summary(&Tally::default(), &hh, false), "");
    }
}
