//! Rows of rotations of roots, and what the island's row says of root versions.

use bytes::Bytes;
use prost::Message;

use super::{
    RowError,
    message::{MadeRootRow, RootRotationRow},
    moment,
    slot::derivation_number,
};
use crate::{
    KeyDerivation, PrincipalId, RootEntry, RootId, RootRotation, RootRotationState, RowPlace, UnixMillis, WriterId,
};

impl RootRotation {
    /// Reads the body of the row of the rotation to version `to`.
    ///
    /// # Errors
    /// The body is no such row, or breaks an invariant.
    pub fn from_row(to: RootId, body: Bytes) -> Result<Self, RowError> {
        let row = RootRotationRow::decode(body)?;
        let lead = if row.leader.is_empty() {
            None
        } else {
            Some((WriterId::from_octets(&row.leader)?, UnixMillis(row.lead_until)))
        };
        if row.rows_per_second == 0 || row.round == 0 {
            return Err(RowError::new("a rotation without a rate or a round"));
        }
        Ok(Self {
            to,
            state: RootRotationState::from_number(row.state)?,
            since: moment(row.since)?,
            reason: row.reason,
            requested_by: PrincipalId::parse(&row.requested_by)?,
            began: moment(row.began)?,
            rows_per_second: row.rows_per_second,
            rows: row.rows,
            round: row.round,
            place: RowPlace { stage: row.stage, after: row.after },
            looked: row.looked,
            changed: row.changed,
            refused: row.refused,
            all_changed: row.all_changed,
            keys: row.keys,
            lead,
        })
    }

    /// The body of the row.
    pub fn to_row(&self) -> Vec<u8> {
        RootRotationRow {
            state: self.state.number(),
            since: self.since.0,
            reason: self.reason.clone(),
            requested_by: self.requested_by.to_string(),
            rows_per_second: self.rows_per_second,
            rows: self.rows,
            round: self.round,
            stage: self.place.stage,
            after: self.place.after.clone(),
            looked: self.looked,
            changed: self.changed,
            refused: self.refused,
            all_changed: self.all_changed,
            keys: self.keys,
            leader: self.lead.map(|(leader, _)| Bytes::copy_from_slice(&leader.octets())).unwrap_or_default(),
            lead_until: self.lead.map_or(0, |(_, until)| until.0),
            began: self.began.0,
        }
        .encode_to_vec()
    }
}

pub(super) fn made_roots(rows: Vec<MadeRootRow>) -> Result<Vec<RootEntry>, RowError> {
    let entries = rows
        .into_iter()
        .map(|row| {
            let derivation = match row.derivation {
                0 => None,
                1 => Some(KeyDerivation::Sp800108Cmac),
                2 => Some(KeyDerivation::AesCbcEncryptData),
                other => return Err(RowError::new(format!("key derivation {other} is unknown"))),
            };
            let destroyed = (row.destroyed != 0).then_some(UnixMillis(row.destroyed));
            Ok(RootEntry {
                id: RootId::from_octets(&row.id)?,
                derivation,
                made: moment(row.made)?,
                fingerprint: row.fingerprint,
                destroyed,
            })
        })
        .collect::<Result<Vec<_>, RowError>>()?;
    if !entries.is_sorted_by(|entry, next| entry.id < next.id) {
        return Err(RowError::new("the versions of roots do not increase"));
    }
    Ok(entries)
}

pub(super) fn made_roots_rows(entries: &[RootEntry]) -> Vec<MadeRootRow> {
    let rows = entries.iter().map(|entry| MadeRootRow {
        id: Bytes::copy_from_slice(&entry.id.octets()),
        derivation: entry.derivation.map_or(0, derivation_number),
        made: entry.made.0,
        fingerprint: entry.fingerprint.clone(),
        destroyed: entry.destroyed.map_or(0, |time| time.0),
    });
    rows.collect()
}
