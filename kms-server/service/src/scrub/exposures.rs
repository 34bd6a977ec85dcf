//! Compares the index of exposures with the sealed rows that it repeats, in both directions. An
//! answer to *who could know this key?* is made of sealed rows, which the index finds. A missing
//! row hides an exposure; a row too many, or one with other numbers, falsifies the counts.

use kms_domain::{Owner, RowId};
use kms_proto::v1::ScrubFinding;
use kms_store::{ExposureOwner, ExposureParty, ExposureRow, RowKind};

use super::finding::{METER, Name, finding};
use crate::exposure::{
    index::{Difference, IndexWalk},
    upkeep::Standing,
};
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The walk over the sealed rows, and over the index.
pub(super) struct Exposures<'a> {
    walk: IndexWalk<'a>,
    findings: Vec<ScrubFinding>,
}

impl<'a> Exposures<'a> {
    /// Begins a walk. While the index is being completed for the first time after an upgrade, it
    /// lacks rows: that is one finding, and only what it has is compared. Once the island's sealed
    /// row says that the index was complete (I5), all is compared.
    ///
    /// # Errors
    /// The database is unavailable.
    pub(super) async fn new(island: &'a IslandContext) -> Result<Self, ServiceError> {
        let standing = Standing::read(island).await?;
        let incomplete = |detail: &str| {
            let island_row = (RowKind::Island.number(), island.name().as_str().as_bytes().into());
            finding(&island_row, "exposure-index-incomplete", detail.to_owned())
        };
        Ok(match standing {
            Standing { marked: true, .. } => Self { walk: IndexWalk::new(island), findings: Vec::new() },
            Standing { marked: false, sealed: true } => Self {
                walk: IndexWalk::new(island),
                findings: vec![incomplete(
                    "the database says that the index of exposures is not complete, and it was: somebody changed that mark",
                )],
            },
            Standing { marked: false, sealed: false } => Self {
                walk: IndexWalk::over_the_index(island),
                findings: vec![incomplete(
                    "after an upgrade, the index of exposures does not repeat all sealed rows yet",
                )],
            },
        })
    }

    /// Checks one more page; false after the last page, and when the number of findings has reached
    /// its limit.
    pub(super) async fn step(&mut self) -> Result<bool, ServiceError> {
        if self.findings.len() >= MOST_FINDINGS {
            return Ok(false);
        }
        let Some(differences) = self.walk.step().await? else { return Ok(false) };
        self.findings.extend(differences.iter().map(|difference| match difference {
            Difference::Missing(id, row) => finding(
                &name_of(id),
                "exposure-missing",
                format!("the index of exposures does not say that {}", said(row)),
            ),
            Difference::Stray(_, _, Some(row)) => finding(
                &name_of_owner(row.owner),
                "exposure-stray",
                format!("the index of exposures says that {}, and its sealed row does not", said(row)),
            ),
            Difference::Stray(_, place, None) => finding(
                &(u8::MAX, Box::default()),
                "exposure-stray",
                format!("the index of exposures has a row that no server writes: {place:?}"),
            ),
        }));
        Ok(true)
    }

    pub(super) fn finish(self) -> Vec<ScrubFinding> {
        self.findings
    }
}

fn said(row: &ExposureRow) -> String {
    let party = match &row.party {
        ExposureParty::Anyone => "anyone".to_owned(),
        ExposureParty::Principal(principal) => principal.to_string(),
        ExposureParty::KeyValue(prefix) => format!("whoever knows the key value {}", hex::encode_upper(prefix.0)),
    };
    match row.owner {
        ExposureOwner::Owner(_) => {
            format!("{party} could know keys of {} slots, {} of them open", row.slots, row.open)
        }
        ExposureOwner::KeyValue(_) => format!("{party} could know this key value"),
    }
}

fn name_of(id: &RowId) -> Name {
    match id {
        RowId::Meter(title) => (METER as u8, title.octets().into()),
        other => {
            let (kind, octets) = kms_ledger::sealed_name(other);
            (kind.number(), octets.into())
        }
    }
}

fn name_of_owner(owner: ExposureOwner) -> Name {
    match owner {
        ExposureOwner::Owner(Owner::Meter(title)) => (METER as u8, title.octets().into()),
        ExposureOwner::Owner(Owner::Group(id)) => (RowKind::Group.number(), id.0.to_be_bytes().into()),
        ExposureOwner::Owner(Owner::DeviceType(id)) => (RowKind::DeviceType.number(), id.0.to_be_bytes().into()),
        ExposureOwner::KeyValue(prefix) => (RowKind::CounterDomain.number(), prefix.0.into()),
    }
}

/// With more findings than this, the index as a whole is lost.
const MOST_FINDINGS: usize = 10_000;
