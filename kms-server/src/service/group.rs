//! Groups by name: shipments and enrolments name them, rows and policies have their numbers.
//!
//! A group owns the broadcast keys of its members ([`super::owner`]). Who may use them is said of
//! the group, and never follows from membership: a meter that joins or leaves a group changes
//! nobody's right to a key.
//!
//! Numbers are given from 1 on without gaps, and a group is never removed. So whoever looks through
//! them in order finds every name, and two servers that make one at the same time meet at the same
//! number.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kms_domain::{Group, GroupId, SecuritySuite};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::{Reads, RowKind};
use tokio::sync::Mutex;

use crate::{
    audit::{Actor, View},
    error::ServiceError,
    island::{Island, principal_row},
};

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

/// What must hold when groups are made: the caller is still who it was, and permitted.
pub(super) type Permit = Arc<dyn for<'a, 'v, 'b> Fn(&'a mut View<'v, 'b>) -> Result<(), ServiceError> + Send + Sync>;

impl Groups {
    /// The numbers of the groups with these names; missing ones are made, for meters of this suite.
    /// A name is left out if its group is of another suite, or if the island has as many groups as
    /// it takes.
    ///
    /// # Errors
    /// `permit` refuses, or the database is away.
    pub(super) async fn resolve(
        &self,
        island: &Arc<Island>,
        actor: &Actor,
        permit: &Permit,
        names: &BTreeSet<&str>,
        suite: SecuritySuite,
    ) -> Result<BTreeMap<String, GroupId>, ServiceError> {
        let mut known = self.known.lock().await;
        while !names.iter().all(|name| known.iter().any(|group| group.name == *name)) && known.len() < MOST_GROUPS {
            let before = known.len();
            *known = self.step(island, actor, permit, &known, names, suite).await?;
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
    /// A row that does not verify, or the database is away.
    pub(super) async fn find(&self, island: &Island, name: &str) -> Result<Option<GroupId>, ServiceError> {
        let mut known = self.known.lock().await;
        loop {
            if let Some((number, _)) = (1..).zip(known.iter()).find(|(_, group)| group.name == name) {
                return Ok(Some(GroupId(number)));
            }
            let last = u64::try_from(known.len()).unwrap_or(u64::MAX);
            let page = island.store.sealed_page(RowKind::Group, Some(&last.to_be_bytes()), PAGE as u32).await?;
            let before = known.len();
            for ((octets, row), number) in page.iter().zip(last + 1..) {
                // Numbers have no gaps; what stands behind one is not believed.
                if octets.as_slice() != number.to_be_bytes() {
                    break;
                }
                let group = match island.committer.open_group(GroupId(number), row) {
                    Ok(group) => group,
                    // It may have been written between being read and being opened.
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

    /// Looks through the groups after the known ones; behind the last, makes those that are
    /// missing.
    async fn step(
        &self,
        island: &Arc<Island>,
        actor: &Actor,
        permit: &Permit,
        known: &[KnownGroup],
        names: &BTreeSet<&str>,
        suite: SecuritySuite,
    ) -> Result<Vec<KnownGroup>, ServiceError> {
        let first = u64::try_from(known.len()).unwrap_or(u64::MAX).saturating_add(1);
        let numbers = first..first.saturating_add(PAGE);
        let mut sealed: Vec<_> =
            numbers.clone().map(|number| (RowKind::Group, number.to_be_bytes().to_vec())).collect();
        sealed.extend(actor.principal.as_ref().map(principal_row));
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let (known, permit) = (known.to_vec(), permit.clone());
        let committed = island
            .committer
            .act(actor.clone(), Reads { sealed, ..Reads::default() }, move |view| {
                permit(view)?;
                let mut known = known.clone();
                let mut missing = names
                    .iter()
                    .filter(|name| !known.iter().any(|group| group.name == **name))
                    .cloned()
                    .collect::<BTreeSet<_>>();
                for number in numbers.clone() {
                    if let Some(group) = view.group(GroupId(number))? {
                        missing.remove(&group.name);
                        known.push(KnownGroup { name: group.name.clone(), suite: group.suite });
                        continue;
                    }
                    let Some(name) = missing.pop_first() else { break };
                    let added = view.now();
                    view.put_group(Group::new(GroupId(number), name.clone(), suite, added))?;
                    view.append(Event::MetersChanged(MetersChanged {
                        change: "group-added".to_owned(),
                        value: format!("{number}: {name}"),
                        ..MetersChanged::default()
                    }));
                    known.push(KnownGroup { name, suite });
                }
                Ok(known)
            })
            .await?;
        Ok(committed.value)
    }
}

/// How many numbers are looked at in one transaction.
const PAGE: u64 = 256;
/// Groups of an island at most: a shipment with a group for each meter is a mistake.
const MOST_GROUPS: usize = 10_000;
