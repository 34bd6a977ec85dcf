//! Findings of the scrubber, and the security events that they become.

use kms_proto::v1::{ScrubFinding, SecurityEvent};
use kms_store::RowKind;

/// Names a sealed row: kind and id.
pub(super) type Name = (u8, Box<[u8]>);

/// A finding about a row.
pub(super) fn finding((kind, id): &Name, finding: &str, detail: String) -> ScrubFinding {
    ScrubFinding { kind: u32::from(*kind), id: id.to_vec().into(), finding: finding.to_owned(), detail }
}

fn kind_name(kind: u32) -> &'static str {
    match kind {
        0 => "chain of writer",
        METER => "meter",
        _ => RowKind::ALL.into_iter().find(|known| u32::from(known.number()) == kind).map_or("row", RowKind::name),
    }
}

fn text_of(kind: u32, id: &[u8]) -> String {
    match (kind, std::str::from_utf8(id)) {
        // Principal, island, quota use, invitation, work order.
        (4 | 6 | 7 | 13 | 14, Ok(text)) => text.to_owned(),
        _ => hex::encode_upper(id),
    }
}

/// The security event of a finding.
pub(super) fn event(finding: &ScrubFinding) -> SecurityEvent {
    let meter = if finding.kind == METER { finding.id.clone() } else { Default::default() };
    SecurityEvent {
        kind: format!("scrub-{}", finding.finding),
        detail: format!("{} {}: {}", kind_name(finding.kind), text_of(finding.kind, &finding.id), finding.detail),
        meter,
    }
}

/// The kind of meters' rows.
pub(super) const METER: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_whose_id_is_text_are_named_by_it() {
        let detail =
            |kind: RowKind, id: &[u8]| event(&finding(&(kind.number(), id.into()), "stale", "old".to_owned())).detail;
        let handheld = "urn:meterkms:north:handheld:hh-7";
        for (kind, id) in [
            (RowKind::Principal, handheld),
            (RowKind::Island, "north"),
            (RowKind::QuotaUse, handheld),
            (RowKind::Invitation, handheld),
            (RowKind::WorkOrder, "WO-1"),
        ] {
            assert_eq!(detail(kind, id.as_bytes()), format!("{} {id}: old", kind.name()));
        }
        assert_eq!(detail(RowKind::Group, &[0, 0x4B]), "group 004B: old");
    }
}
