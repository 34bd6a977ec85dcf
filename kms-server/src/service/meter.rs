//! Meters: who they are, whose they are, and the life of a meter's identity.

mod change;
mod compromise;
mod counter;
mod enrol;
mod filter;
mod groups;
mod raise;
mod show;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use kms_domain::{GroupId, Owner, Principal, SystemTitle};
use kms_proto::v1::{self, MeterProblemCode as Code};
use kms_store::{Reads, RowKind};
use prost::Message;

pub use self::{
    change::Assignment,
    compromise::Compromise,
    counter::CounterFloor,
    enrol::{Enrolment, NewMeter},
    filter::{Filter, Selection},
    groups::Membership,
    raise::CounterRaise,
};
pub(super) use self::{
    raise::raise_counter,
    show::{Shown, shown_version},
};
pub use super::Request;
use super::group::Groups;
use crate::{
    audit::{Actor, Asked, Asking, View, Window},
    authz::{Action, Caller, GroupFacts, Resource},
    error::ServiceError,
    island::{Island, facts, principal_row},
};

/// The use cases of meters. Clones share what is known of groups.
#[derive(Clone)]
pub struct MeterService {
    island: Arc<Island>,
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
    pub fn new(island: Arc<Island>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// A page of the meters that the caller may see: a head-end sees its own only.
    ///
    /// # Errors
    /// Not permitted, or the database is away.
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
        // I5: the columns found them, the sealed rows decide. One that was tampered with is left
        // out and reported by the scrubber.
        let meters = rows
            .iter()
            .filter_map(|row| self.island.committer.open_meter(row.title, &row.row).ok())
            .filter(|meter| filter.matches(meter));
        Ok(Page { meters: meters.map(|meter| show::summary(&meter)).collect(), next, total })
    }

    /// One meter: slots, versions, counters and exposures; never a key.
    ///
    /// # Errors
    /// Permission denied, for an unknown meter and for one that is not the caller's alike; or the
    /// database is away.
    pub async fn show(&self, caller: &Caller, title: SystemTitle) -> Result<v1::Meter, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        // A row that does not verify is as good as absent for a caller (I5).
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
            return self.denied(caller, &Action::ShowMeter, format!("showMeter {title}")).await;
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
                // It may have left the group since.
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

    /// A refusal of a call that only reads, put on the record.
    async fn denied<T: Send + 'static>(
        &self,
        caller: &Caller,
        action: &Action,
        asked: String,
    ) -> Result<T, ServiceError> {
        let actor = Actor::caller(caller, None, action.name());
        let recorded = self
            .island
            .committer
            .act(actor, Reads::default(), move |_| Err::<T, _>(ServiceError::denied(asked.clone())))
            .await;
        recorded.map(|committed| committed.value)
    }

    /// Carries out one chunk of a request, or gives the answer that it got before. `change` sees
    /// the rows of `meters` and `sealed`.
    async fn chunk<F>(
        &self,
        caller: &Caller,
        action: &Action,
        request: Request,
        index: u32,
        reads: Reads,
        change: F,
    ) -> Result<Outcome, ServiceError>
    where
        F: FnMut(&mut View<'_, '_>, &Principal) -> Result<Outcome, ServiceError> + Send + 'static,
    {
        let about = About::Meters(reads.meters.clone());
        self.chunk_about(about, caller, action, request, index, reads, change).await
    }

    /// The same, of which policy decides by `about` on a repetition.
    #[expect(clippy::too_many_arguments, reason = "one call, which only splits the request into chunks")]
    async fn chunk_about<F>(
        &self,
        about: About,
        caller: &Caller,
        action: &Action,
        request: Request,
        index: u32,
        reads: Reads,
        mut change: F,
    ) -> Result<Outcome, ServiceError>
    where
        F: FnMut(&mut View<'_, '_>, &Principal) -> Result<Outcome, ServiceError> + Send + 'static,
    {
        let asking = Asking::new(caller, request.id, request.digest, Window::Administration).chunk(index);
        let mut reads = Reads { requests: asking.reads(), ..reads };
        reads.sealed.push(principal_row(&caller.principal));
        let actor = Actor::caller(caller, Some(request.id), action.name());
        let (island, action) = (self.island.clone(), action.clone());
        let caller = caller.clone();
        let committed = self
            .island
            .committer
            .act(actor, reads, move |view| {
                let principal = view.caller(&caller)?;
                if let Asked::Before(answered) = view.asked(&asking)? {
                    let outcome: Outcome = answered.message()?;
                    return about.shows(&outcome, view, &island, &principal, &action).map(|()| outcome);
                }
                let outcome = change(view, &principal)?;
                view.answered_with(&asking, &outcome);
                Ok(outcome)
            })
            .await?;
        Ok(committed.value)
    }
}

/// What policy decides on, of a chunk.
enum About {
    Meters(Vec<SystemTitle>),
    Group(GroupId),
}

impl About {
    /// I8: whoever has lost the right to it is not told again what came of it. Meters that the
    /// answer refuses are left out: of those it tells nothing.
    fn shows(
        &self,
        outcome: &Outcome,
        view: &mut View<'_, '_>,
        island: &Island,
        principal: &Principal,
        action: &Action,
    ) -> Result<(), ServiceError> {
        let (policy, facts) = (island.policy.load(), facts(principal));
        let permitted = match self {
            Self::Group(id) => match view.group(*id)? {
                Some(group) => policy.permits(&facts, action, &Resource::Group(&GroupFacts::from(&*group))).is_permit(),
                None => false,
            },
            Self::Meters(titles) => {
                let mut permitted = true;
                for title in titles
                    .iter()
                    .filter(|title| outcome.problems.iter().all(|problem| problem.meter != title.octets().as_slice()))
                {
                    if let Some(meter) = view.meter(*title)? {
                        permitted &= policy.permits(&facts, action, &Resource::Meters(&meter.class)).is_permit();
                    }
                }
                permitted
            }
        };
        if permitted { Ok(()) } else { Err(ServiceError::denied(action.name())) }
    }
}

/// What a chunk came to; kept for repeated requests.
#[derive(Clone, PartialEq, Message)]
struct Outcome {
    #[prost(uint64, tag = "1")]
    changed: u64,
    #[prost(uint64, tag = "2")]
    unchanged: u64,
    #[prost(message, repeated, tag = "3")]
    problems: Vec<v1::MeterProblem>,
    /// The last meter that was looked at, where a filter selects them.
    #[prost(fixed64, tag = "4")]
    last: u64,
    /// Whether a following chunk would find nothing.
    #[prost(bool, tag = "5")]
    done: bool,
}

impl Outcome {
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

/// What is said of a meter that does not exist and of one that the caller may not change.
const NOT_PERMITTED: &str = "it is unknown, or this is not permitted with it";
/// Meters of one transaction.
const CHUNK: usize = 500;
/// Problems that an answer names at most.
const MOST_PROBLEMS: usize = 10_000;
