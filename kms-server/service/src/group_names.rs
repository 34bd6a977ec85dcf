//! Groups by name: shipments and enrolments name groups, rows and policies have their numbers.
//!
//! A group owns the broadcast keys of its members ([`super::owner`]). Policy permits their use for
//! the group, and membership gives no right: a meter that joins or leaves a group changes nobody's
//! right to a key.
//!
//! Numbers begin at 1 and have no gaps, and a group is never removed. So a walk in their order
//! finds every name. Two servers that add a group at the same time try the same number, and one of
//! them tries again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kms_domain::{Group, GroupId, MeterClass, RequestId, SecuritySuite};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::{Reads, RowKind};
use tokio::sync::Mutex;

use crate::island::IslandContext;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

/// The groups that this server knows, by name.
#[derive(Default)]
pub(super) struct Groups {
    /// In order of their numbers: the first is group 1.
    known: Mutex<Vec<KnownGroup>>,
}

#[derive(Clone)]
struct KnownGroup {
    name: String,
    suite: SecuritySuite,
}

/// For whom groups are added, and by which action.
pub(super) struct Naming<'a> {
    pub(super) caller: &'a Caller,
    pub(super) request: Option<RequestId>,
    pub(super) action: &'a Action,
    /// The class of meters that the action is for; `None`: the action is on the island.
    pub(super) class: Option<&'a MeterClass>,
}

impl Groups {
    /// The numbers of the groups with these names. Missing groups are added, for meters of this
    /// suite. A name is left out if its group is of another suite, or if the island has the most
    /// groups that it may have.
    ///
    /// # Errors
    /// Not permitted, or the database cannot be reached.
    pub(super) async fn resolve(
        &self,
        island: &Arc<IslandContext>,
        naming: &Naming<'_>,
        names: &BTreeSet<&str>,
        suite: SecuritySuite,
    ) -> Result<BTreeMap<String, GroupId>, ServiceError> {
        let mut known = self.known.lock().await;
        while !names.iter().all(|name| known.iter().any(|group| group.name == *name)) && known.len() < MOST_GROUPS {
            let before = known.len();
            *known = step(island, naming, &known, names, suite).await?;
            if known.len() == before {
                break;
            }
        }
        let numbered =
            (1..).zip(known.iter()).filter(|(_, group)| group.suite == suite && names.contains(group.name.as_str()));
        Ok(numbered.map(|(number, group)| (group.name.clone(), GroupId(number))).collect())
    }

    /// The number of the group with this name.
    ///
    /// # Errors
    /// A row that does not verify, or the database cannot be reached.
    pub(super) async fn find(&self, island: &IslandContext, name: &str) -> Result<Option<GroupId>, ServiceError> {
        let mut known = self.known.lock().await;
        loop {
            if let Some((number, _)) = (1..).zip(known.iter()).find(|(_, group)| group.name == name) {
                return Ok(Some(GroupId(number)));
            }
            let last = u64::try_from(known.len()).unwrap_or(u64::MAX);
            let page = island.store.sealed_page(RowKind::Group, Some(&last.to_be_bytes()), PAGE as u32).await?;
            let before = known.len();
            for ((octets, row), number) in page.iter().zip(last + 1..) {
                // Numbers have no gaps: rows after a gap are not trusted.
                if octets.as_slice() != number.to_be_bytes() {
                    break;
                }
                let group = match island.committer.open_group(GroupId(number), row) {
                    Ok(group) => group,
                    // A row that was written between reading and opening verifies the second time.
                    Err(_) => match island.group(GroupId(number)).await? {
                        Some((group, _)) => group,
                        None => break,
                    },
                };
                known.push(KnownGroup { name: group.name.clone(), suite: group.suite });
            }
            if known.len() == before {
                return Ok(None);
            }
        }
    }
}

/// Reads the groups after the known ones. After the last it adds those that are missing.
async fn step(
    island: &IslandContext,
    naming: &Naming<'_>,
    known: &[KnownGroup],
    names: &BTreeSet<&str>,
    suite: SecuritySuite,
) -> Result<Vec<KnownGroup>, ServiceError> {
    let act = NameGroups {
        action: naming.action.clone(),
        class: naming.class.cloned(),
        known: known.to_vec(),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        suite,
    };
    Ok(island.door.act(naming.caller, naming.request, act).await?.value)
}

/// Reads the next groups and adds missing ones, as one act.
struct NameGroups {
    action: Action,
    class: Option<MeterClass>,
    known: Vec<KnownGroup>,
    names: Vec<String>,
    suite: SecuritySuite,
}

impl NameGroups {
    fn numbers(&self) -> std::ops::Range<u64> {
        let first = u64::try_from(self.known.len()).unwrap_or(u64::MAX).saturating_add(1);
        first..first.saturating_add(PAGE)
    }
}

impl Act for NameGroups {
    type Answer = Vec<KnownGroup>;
    // A group that was added has a row, so a repetition finds it.
    type Past = Never;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        let sealed = self.numbers().map(|number| (RowKind::Group, number.to_be_bytes().to_vec())).collect();
        Reads { sealed, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.action, &self.class.as_ref().map_or(Resource::Island, Resource::Meters))
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<KnownGroup>>, ServiceError> {
        let mut known = self.known.clone();
        let missing = self.names.iter().filter(|name| !known.iter().any(|group| group.name == **name));
        let mut missing: BTreeSet<String> = missing.cloned().collect();
        let mut entry = None;
        for number in self.numbers() {
            if let Some(group) = view.group(GroupId(number))? {
                missing.remove(&group.name);
                known.push(KnownGroup { name: group.name.clone(), suite: group.suite });
                continue;
            }
            let Some(name) = missing.pop_first() else { break };
            let added = view.now();
            view.put_group(Group::new(GroupId(number), name.clone(), self.suite, added))?;
            entry = Some(view.append(Event::MetersChanged(MetersChanged {
                change: "group-added".to_owned(),
                value: format!("{number}: {name}"),
                ..MetersChanged::default()
            })));
            known.push(KnownGroup { name, suite: self.suite });
        }
        Ok(Decision::of(entry, known))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<KnownGroup>, ServiceError> {
        match never {}
    }
}

/// How many numbers one transaction reads.
const PAGE: u64 = 256;
/// The most groups of an island. It stops a shipment that names a group for each meter by mistake.
const MOST_GROUPS: usize = 10_000;
