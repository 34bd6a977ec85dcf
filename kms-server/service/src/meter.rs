//! Meters: what is known of them, which head-end they are assigned to, and the life of a meter's
//! identity.

mod change;
mod compromise;
mod counter;
mod enrol;
mod filter;
mod membership;
mod raise;
mod show;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{GroupId, Owner, SystemTitle};
use kms_proto::v1::{self, MeterProblemCode as Code};
use kms_store::{Reads, RowKind};
use prost::Message;

pub use self::{
    change::Assignment,
    compromise::Compromise,
    counter::CounterFloor,
    enrol::{Enrolment, NewMeter},
    filter::{Filter, Selection},
    membership::Membership,
    raise::CounterRaise,
};
pub(super) use self::{
    raise::raise_counter,
    show::{Shown, shown_version},
};
pub use super::Request;
use super::group_names::Groups;
use crate::island::IslandContext;
use kms_authz::facts;
use kms_authz::{Action, Caller, GroupFacts, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Permit, Remembered, View};

/// The use cases of meters. Clones share the names of groups that were read.
#[derive(Clone)]
pub struct MeterService {
    island: Arc<IslandContext>,
    groups: Arc<Groups>,
}

/// A page of meters.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The meters.
    pub meters: Vec<v1::MeterSummary>,
    /// Where the next page begins; `None` behind the last.
    pub next: Option<SystemTitle>,
    /// How many match in all, by the search columns.
    pub total: u64,
}

impl MeterService {
    /// The most meters of a request that names them.
    pub const MOST_METERS: usize = 10_000;

    /// Meters of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// A page of the meters that the caller may see. A head-end sees its own meters only.
    ///
    /// # Errors
    /// Not permitted, or the database cannot be reached.
    #[boxed]
    pub async fn list(
        &self,
        caller: &Caller,
        filter: Filter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Page, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        let filter = {
            let policy = self.island.policy.load();
            if policy.permits(&principal, &Action::ListMeters { own: false }, &Resource::Island).is_permit() {
                filter
            } else {
                policy.require(&principal, &Action::ListMeters { own: true }, &Resource::Island)?;
                match filter.only_of(&caller.principal) {
                    Some(filter) => filter,
                    None => return Ok(Page::default()),
                }
            }
        };
        let columns = filter.columns();
        let rows = self.island.store.meter_page(&columns, after, limit).await?;
        let full = rows.len() == usize::try_from(limit).unwrap_or(usize::MAX);
        let next = rows.last().map(|row| row.title).filter(|_| full);
        let total = self.island.store.meter_count(&columns).await?;
        // I5: the columns found these meters, and the sealed rows decide. A row that was tampered
        // with is left out; the scrub reports it.
        let meters = rows
            .iter()
            .filter_map(|row| self.island.committer.open_meter(row.title, &row.row).ok())
            .filter(|meter| filter.matches(meter));
        Ok(Page { meters: meters.map(|meter| show::summary(&meter)).collect(), next, total })
    }

    /// One meter: slots, versions, counters and exposures; never a key.
    ///
    /// # Errors
    /// Permission denied, alike for an unknown meter and for one that the caller may not see; or
    /// the database cannot be reached.
    #[boxed]
    pub async fn show(&self, caller: &Caller, title: SystemTitle) -> Result<v1::Meter, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        // To a caller, a row that does not verify is absent (I5).
        let meter = match self.island.meter(title).await {
            Err(ServiceError::FailedPrecondition { .. }) => None,
            other => other?,
        };
        let seen = meter.filter(|meter| {
            self.island
                .policy
                .load()
                .permits(&principal, &Action::ShowMeter, &Resource::Meters(&meter.class))
                .is_permit()
        });
        let Some(meter) = seen else {
            return Err(ServiceError::denied(format!("showMeter {title}")));
        };
        let generation = self.island.store.meters(&[title]).await?.first().map_or(0, |row| row.row.generation);
        let mut shown =
            Shown { profile: self.island.profiles.get(&meter.class.profile), slots: &meter.slots, domains: Vec::new() };
        let mut groups = Vec::new();
        for slot in meter.slots.iter() {
            for id in slot.versions().iter().filter_map(kms_domain::KeyVersion::domain) {
                if let Some(row) = self.island.store.sealed(RowKind::CounterDomain, &id.0).await? {
                    shown.domains.push(self.island.committer.open_domain(id, &row)?);
                }
            }
        }
        for group in &meter.class.groups {
            if let Some(row) = self.island.store.sealed(RowKind::Group, &group.0.to_be_bytes()).await? {
                groups.push(self.island.committer.open_group(*group, &row)?.name.clone());
            }
        }
        let mut shared_keys = Vec::with_capacity(meter.shared.len());
        for key in &meter.shared {
            let group = match key.owner {
                // The meter may have left the group since.
                Owner::Group(id) => {
                    self.island.group(id).await?.map(|(group, _)| group.name.clone()).unwrap_or_default()
                }
                Owner::Meter(_) | Owner::DeviceType(_) => String::new(),
            };
            shared_keys.push(v1::SharedKey {
                group,
                security_setup: key.setup.obis().to_vec().into(),
                key_type: key.key_type.to_string(),
                version: key.version.number(),
                acknowledged: key.acknowledged,
            });
        }
        Ok(shown.meter(&meter, groups, shared_keys, generation))
    }

    /// Executes one chunk of a request, or repeats its earlier answer. `change` asks policy for
    /// each meter of `reads`.
    async fn change_chunk<F>(
        &self,
        caller: &Caller,
        action: Action,
        request: Request,
        index: u32,
        reads: Reads,
        change: F,
    ) -> Result<ChunkOutcome, ServiceError>
    where
        F: Fn(&mut View<'_, '_>, &Permit) -> Result<Decision<ChunkOutcome>, ServiceError> + Send + Sync + 'static,
    {
        let about = About::Meters(reads.meters.clone());
        let act = MeterChunk { about, action, reads, change };
        Ok(self.island.door.act(caller, request.chunk(index), act).await?.value)
    }
}

/// One chunk of a change of meters, as one act.
struct MeterChunk<F> {
    about: About,
    action: Action,
    reads: Reads,
    change: F,
}

impl<F> Act for MeterChunk<F>
where
    F: Fn(&mut View<'_, '_>, &Permit) -> Result<Decision<ChunkOutcome>, ServiceError> + Send + Sync + 'static,
{
    type Answer = ChunkOutcome;
    type Past = Remembered<ChunkOutcome>;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        match &self.about {
            About::Meters(_) => Ok(asker.each()),
            About::Group(id) => {
                let group = view.group(*id)?.ok_or_else(|| ServiceError::denied(self.action.to_string()))?;
                asker.require(&self.action, &Resource::Group(&GroupFacts::from(&*group)))
            }
        }
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<ChunkOutcome>, ServiceError> {
        (self.change)(view, permit)
    }

    fn again(
        &self,
        Remembered(outcome): Remembered<ChunkOutcome>,
        permit: &Permit,
        view: &mut View<'_, '_>,
    ) -> Result<ChunkOutcome, ServiceError> {
        self.about.shows(&outcome, view, permit, &self.action).map(|()| outcome)
    }
}

/// The resource that policy decides on.
enum About {
    Meters(Vec<SystemTitle>),
    Group(GroupId),
}

impl About {
    /// I8: a caller that has lost the permission does not get the answer again. Meters that the
    /// answer refuses are not checked, because it says nothing of them.
    fn shows(
        &self,
        outcome: &ChunkOutcome,
        view: &mut View<'_, '_>,
        permit: &Permit,
        action: &Action,
    ) -> Result<(), ServiceError> {
        let Self::Meters(titles) = self else { return Ok(()) };
        let refused =
            |title: &SystemTitle| outcome.problems.iter().any(|problem| problem.meter == title.octets().as_slice());
        for title in titles.iter().filter(|title| !refused(title)) {
            if let Some(meter) = view.meter(*title)?
                && !permit.permits(action, &Resource::Meters(&meter.class))
            {
                return Err(ServiceError::denied(action.name()));
            }
        }
        Ok(())
    }
}

/// The outcome of a chunk, kept for replays.
#[derive(Clone, PartialEq, Message)]
struct ChunkOutcome {
    #[prost(uint64, tag = "1")]
    changed: u64,
    #[prost(uint64, tag = "2")]
    unchanged: u64,
    #[prost(message, repeated, tag = "3")]
    problems: Vec<v1::MeterProblem>,
    /// The last meter that was read, if a filter selects them.
    #[prost(fixed64, tag = "4")]
    last: u64,
    /// Whether a following chunk would find nothing.
    #[prost(bool, tag = "5")]
    done: bool,
}

impl ChunkOutcome {
    fn problem(&mut self, meter: SystemTitle, code: Code, reason: impl Into<String>) {
        self.problems.push(v1::MeterProblem {
            meter: meter.octets().to_vec().into(),
            reason: reason.into(),
            code: code.into(),
        });
    }

    fn add_to(self, response: &mut v1::ChangeMetersResponse) {
        response.changed += self.changed;
        response.unchanged += self.unchanged;
        let room = MOST_PROBLEMS.saturating_sub(response.problems.len());
        response.problems.extend(self.problems.into_iter().take(room));
    }
}

/// The same text for an unknown meter and for one that the caller may not change.
const NOT_PERMITTED: &str = "it is unknown, or this is not permitted with it";
/// Meters of one transaction.
const CHUNK: usize = 500;
/// Problems that an answer names at most.
const MOST_PROBLEMS: usize = 10_000;
