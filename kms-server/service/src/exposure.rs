//! Exposures: who could know which keys, from when, how, and until when.
//!
//! The sealed rows say it (I5), and each line of an answer is made of a row that was verified. The
//! index of exposures only finds the rows, and counts.

pub(crate) mod index;
mod owners;
mod query;
#[cfg(test)]
mod tests;
pub(crate) mod upkeep;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{IndexedParty, KnownBy, Owner, Party, Reach};
use kms_proto::v1;
use kms_store::{ExposureOwner, ExposureTotals, MeterFilter};

use self::owners::OwnerRows;
pub use self::query::{ExposedKey, ExposurePage, ExposureQuery, ExposureSubject, OpenSlot};
use crate::{group_names::Groups, island::IslandContext};
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

/// The questions about exposures. Clones share the names of groups that were read.
#[derive(Clone)]
pub struct ExposureService {
    island: Arc<IslandContext>,
    groups: Arc<Groups>,
}

impl ExposureService {
    /// The most owners of a page.
    pub const LARGEST_PAGE: u32 = 500;

    /// The questions about an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// Answers a caller, and says after which owner the next page begins; `None` behind the last.
    /// The caller of this function makes the page token. A subject that does not exist has the same
    /// answer as one of which nobody knows anything: no lines.
    ///
    /// # Errors
    /// Not permitted, or the database is unavailable.
    #[boxed]
    pub async fn list(
        &self,
        caller: &Caller,
        query: ExposureQuery,
    ) -> Result<(v1::ListExposuresResponse, Option<ExposureOwner>), ServiceError> {
        self.island.require(caller, &Action::ListExposures).await?;
        let first = query.after.is_none();
        // Read before the page: an index that is completed meanwhile is not told as complete.
        let complete = match query.subject {
            ExposureSubject::Known(_) => self.island.store.exposures_are_complete().await?,
            _ => true,
        };
        let totals = async { if first { self.totals(&query).await } else { Ok(None) } };
        let (totals, page) = futures::join!(totals, self.page(&query));
        let page = page?;
        // A party can have more rows in the index than the database counts within a call. Its keys
        // are told all the same.
        let totals = match totals {
            Err(ServiceError::Unavailable { reason, .. }) => {
                tracing::warn!(reason, "exposures could not be counted; the answer has no totals");
                None
            }
            totals => totals?,
        };
        let message = v1::ListExposuresResponse {
            keys: page.keys.iter().map(key_message).collect(),
            totals,
            complete,
            unreadable: page.unreadable.into_iter().map(unreadable_message).collect(),
            ..v1::ListExposuresResponse::default()
        };
        Ok((message, page.next))
    }

    /// A page of an answer, on verified rows.
    ///
    /// # Errors
    /// The database is unavailable.
    #[boxed]
    pub async fn page(&self, query: &ExposureQuery) -> Result<ExposurePage, ServiceError> {
        let store = &self.island.store;
        let mut rows = OwnerRows::new(&self.island);
        let (party, next) = match &query.subject {
            // An owner is one page.
            ExposureSubject::Meter(_) | ExposureSubject::Group(_) if query.after.is_some() => (None, None),
            ExposureSubject::Meter(title) => {
                rows.read(&[Owner::Meter(*title)]).await?;
                rows.read_groups_of_meters().await?;
                (None, None)
            }
            ExposureSubject::Group(name) => {
                if let Some(id) = self.groups.find(&self.island, name).await? {
                    rows.read(&[Owner::Group(id)]).await?;
                }
                (None, None)
            }
            ExposureSubject::Known(party) => {
                let Some(indexed) = IndexedParty::of(party) else { return Ok(ExposurePage::default()) };
                let found = store.exposed_owners(&indexed.into(), query.since, query.after, query.limit).await?;
                let owners: Vec<Owner> = found
                    .iter()
                    .filter_map(|owner| match owner {
                        ExposureOwner::Owner(owner) => Some(*owner),
                        ExposureOwner::KeyValue(_) => None,
                    })
                    .collect();
                rows.read(&owners).await?;
                (Some(party.clone()), found.last().copied().filter(|_| is_full(found.len(), query.limit)))
            }
            ExposureSubject::Manufacturer(_) | ExposureSubject::Batch(_) => {
                let after = match query.after {
                    Some(ExposureOwner::Owner(Owner::Meter(title))) => Some(title),
                    _ => None,
                };
                let found = store.meter_page(&columns(&query.subject), after, query.limit).await?;
                let next = found.last().map(|row| ExposureOwner::Owner(Owner::Meter(row.title)));
                let next = next.filter(|_| is_full(found.len(), query.limit));
                rows.open_meters(found).await?;
                rows.retain_meters(|meter| match &query.subject {
                    ExposureSubject::Manufacturer(manufacturer) => meter.class.vendor == *manufacturer,
                    ExposureSubject::Batch(batch) => meter.batch == *batch,
                    _ => true,
                });
                rows.read_groups_under_vendors_keks().await?;
                (Some(Party::Vendor), next)
            }
        };
        let (mut keys, unreadable) = rows.known_keys(party.as_ref()).await?;
        if let Some(since) = query.since {
            keys.retain(|exposed| exposed.key.since >= since);
        }
        Ok(ExposurePage { keys, unreadable, next })
    }

    /// The slots that are open to a principal, or to anyone: of up to `limit` owners after one. The
    /// second value is where the next page begins; `None` behind the last. Rows that do not verify
    /// are left out: ask [`Self::page`] for them. It is for containing an exposure; nothing calls
    /// it yet but tests.
    ///
    /// # Errors
    /// The database is unavailable.
    #[boxed]
    pub async fn open_slots(
        &self,
        party: &Party,
        after: Option<ExposureOwner>,
        limit: u32,
    ) -> Result<(Vec<OpenSlot>, Option<ExposureOwner>), ServiceError> {
        let query = ExposureQuery { subject: ExposureSubject::Known(party.clone()), since: None, after, limit };
        let page = self.page(&query).await?;
        let open = page.keys.iter().filter(|exposed| exposed.key.reach == Reach::Open);
        let mut slots: Vec<OpenSlot> = open
            .map(|exposed| OpenSlot { owner: exposed.owner, setup: exposed.key.setup, key_type: exposed.key.key_type })
            .collect();
        slots.dedup();
        Ok((slots, page.next))
    }

    /// The counts of an answer, from search columns; `None` for one owner.
    async fn totals(&self, query: &ExposureQuery) -> Result<Option<v1::ExposureTotals>, ServiceError> {
        let totals = match &query.subject {
            ExposureSubject::Meter(_) | ExposureSubject::Group(_) => return Ok(None),
            ExposureSubject::Known(party) => match IndexedParty::of(party) {
                Some(indexed) => self.island.store.exposure_totals(&indexed.into(), query.since).await?,
                None => ExposureTotals::default(),
            },
            subject => ExposureTotals {
                owners: self.island.store.meter_count(&columns(subject)).await?,
                ..ExposureTotals::default()
            },
        };
        Ok(Some(v1::ExposureTotals {
            owners: totals.owners,
            slots: totals.slots,
            open: totals.open,
            equal_keys: totals.equal_keys,
        }))
    }
}

fn is_full(found: usize, limit: u32) -> bool {
    found == usize::try_from(limit).unwrap_or(usize::MAX)
}

/// The search columns that find the meters of a vendor or of a batch.
fn columns(subject: &ExposureSubject) -> MeterFilter {
    match subject {
        ExposureSubject::Manufacturer(manufacturer) => {
            MeterFilter { vendor: Some(manufacturer.to_string()), ..MeterFilter::default() }
        }
        ExposureSubject::Batch(batch) => MeterFilter { batch: Some(batch.clone()), ..MeterFilter::default() },
        _ => MeterFilter::default(),
    }
}

fn key_message(exposed: &ExposedKey) -> v1::ExposedKey {
    let key = &exposed.key;
    let mut message = v1::ExposedKey {
        security_setup: key.setup.obis().to_vec().into(),
        key_type: key.key_type.to_string(),
        version: key.version.number(),
        known_to: key.party.to_string(),
        since_ms: key.since.0,
        ways: key
            .ways
            .iter()
            .map(|way| v1::ExposureWay {
                reason: way.reason().to_owned(),
                equal_key: matches!(way, KnownBy::EqualKey(_)),
                through_key_type: way.through().map(|(key_type, _)| key_type.to_string()).unwrap_or_default(),
                through_version: way.through().map_or(0, |(_, version)| version.number()),
            })
            .collect(),
        reach: key.reach.name().to_owned(),
        until_ms: key.reach.until().map_or(0, |until| until.0),
        meter_status: exposed.status.map(|status| status.name().to_owned()).unwrap_or_default(),
        ..v1::ExposedKey::default()
    };
    match exposed.owner {
        Owner::Meter(title) => message.meter = title.octets().to_vec().into(),
        Owner::Group(_) => message.group = exposed.name.clone(),
        Owner::DeviceType(_) => message.device_type = exposed.name.clone(),
    }
    message
}

fn unreadable_message((owner, reason): (Owner, String)) -> v1::UnreadableOwner {
    let mut message = v1::UnreadableOwner { reason, ..v1::UnreadableOwner::default() };
    match owner {
        Owner::Meter(title) => message.meter = title.octets().to_vec().into(),
        Owner::Group(id) => message.group_number = id.0,
        Owner::DeviceType(id) => message.device_type_number = id.0,
    }
    message
}
