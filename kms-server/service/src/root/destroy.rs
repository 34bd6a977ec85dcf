//! The destruction of a version of a root. An officer proposes it and another person approves
//! exactly this proposal (I6). It is executed if nothing refers to the root, in the database or in
//! a backup that may still be restored.
//!
//! The decision is recorded and noted in the island's row. After every server has read it, each
//! server counts again what uses the root, and destroys it in its own tokens. The destruction
//! cannot be undone.

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_domain::{
    DestroyRoot, Island as IslandRow, ProposalId, ProposedAction, Quorum, RootError, RootId, RootKind, RootPurpose,
    RootRotationState, RootStanding, UnixMillis,
};
use kms_proto::v1::{self, RootDestroyed, audit_record::Event};
use kms_store::{Reads, RowKind};

use super::{RootService, millis, no_island, refused, rotation_row};
use crate::island::IslandContext;
use crate::keys::token::token_key;
use crate::{
    Request,
    proposal::{NewProposal, Propose, execute, proposal_row},
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Permit, ServerAct, View};

/// A destruction to propose.
#[derive(Clone, Debug)]
pub struct Destruction {
    /// Which version.
    pub id: RootId,
    /// The moment of the oldest backup of the database that may still be restored.
    pub oldest_backup: UnixMillis,
    /// Why, 1–256 octets.
    pub reason: String,
    /// How many other people must approve.
    pub quorum: Quorum,
}

impl RootService {
    /// Proposes to destroy a version. The proposal itself destroys nothing.
    ///
    /// # Errors
    /// Not permitted; something refers to the root, or a backup may; or the database is
    /// unavailable.
    #[boxed]
    pub async fn propose_destruction(
        &self,
        caller: &Caller,
        request: Request,
        destruction: Destruction,
    ) -> Result<v1::Proposal, ServiceError> {
        self.island.require(caller, &Action::DestroyRoot).await?;
        let Destruction { id, oldest_backup, reason, quorum } = destruction;
        self.is_unused(id, oldest_backup).await?;
        let root = destroy_root(id, oldest_backup)?;
        let propose = Propose::new(request.id, Action::DestroyRoot, Reads::default(), move |_| {
            Ok(NewProposal { action: ProposedAction::DestroyRoot(root), reason: reason.clone(), quorum })
        });
        Ok(self.island.door.act(caller, request, propose).await?.value)
    }

    /// Executes an approved destruction. First it is decided and recorded (I2). After every server
    /// has read the decision, each server destroys the root in its tokens.
    ///
    /// # Errors
    /// Not permitted; not approved by enough people (I6); something refers to the root, or a backup
    /// may; or the HSM or the database is unavailable.
    #[boxed]
    pub async fn destroy(
        &self,
        caller: &Caller,
        request: Request,
        approved: ProposalId,
    ) -> Result<v1::ShowRootsResponse, ServiceError> {
        self.island.require(caller, &Action::DestroyRoot).await?;
        self.refresh().await?;
        let missing = || ServiceError::NotFound { what: format!("proposal {approved}") };
        let stored = self.island.store.sealed(RowKind::Proposal, &approved.octets()).await?.ok_or_else(missing)?;
        let ProposedAction::DestroyRoot(root) =
            self.island.committer.open_proposal(approved, &stored)?.content.action.clone()
        else {
            return Err(missing());
        };
        let id = root_id(&root)?;
        let again = self.island.row().root_standing(id) == Some(RootStanding::Destroyed);
        if !again {
            self.is_unused(id, root.oldest_backup).await?;
        }
        let current =
            RootId { purpose: id.purpose, version: self.island.row().current_root(id.purpose).unwrap_or_default() };
        self.island.door.act(caller, request, Destroy { island: self.island.clone(), approved, current }).await?;
        let row = self.refresh().await?;
        self.destroy_decided(&row).await?;
        self.show(caller).await
    }

    /// Destroys in this server's tokens the roots whose destruction was decided, and records what
    /// was there. Returns how long to wait before the next call; `None`: nothing is left to do.
    ///
    /// # Errors
    /// The HSM or the database is unavailable: it is tried again.
    #[boxed]
    pub async fn destroy_decided(&self, row: &Arc<IslandRow>) -> Result<Option<Duration>, ServiceError> {
        let mut wait = None;
        for (id, decided) in row.ledger.entries.iter().filter_map(|entry| Some((entry.id, entry.destroyed?))) {
            let label = token_key(id)?.label(self.island.name());
            let held = self.island.hsm.inventory().await?;
            if held.iter().flat_map(|(_, objects)| objects).all(|object| object.label != label) {
                continue;
            }
            let since = self.island.store.now().await?.0.saturating_sub(decided.0);
            let left = millis(self.timing.settling).saturating_sub(since);
            let left = Duration::from_millis(u64::try_from(left).unwrap_or_default());
            // I3: a key may have been stored under the root after the first count, but not after
            // the decision: acts that store keys read the decision in their transaction. So this
            // second count stays true.
            let counts = if left.is_zero() { Some(self.count(|_| true).await?) } else { None };
            match counts {
                None => wait = wait.max(Some(left)),
                Some(counts) if counts.of(id) > 0 || counts.unreadable > 0 => {
                    tracing::error!(root = %id, uses = counts.of(id), unreadable = counts.unreadable,
                        "a root whose destruction was decided is in use again, and stays in the tokens; go on with its pass by `kms roots resume`, or run `kms audit scrub`");
                    wait = wait.max(Some(IN_USE_AGAIN));
                }
                Some(_) => self.destroy_in_tokens(id).await?,
            }
        }
        Ok(wait)
    }

    /// I2: recorded before and after the change of the tokens. After a crash in between, the object
    /// is gone and its destruction could not be recorded any more.
    async fn destroy_in_tokens(&self, id: RootId) -> Result<(), ServiceError> {
        self.record(id, "begun", 0).await?;
        let objects = self.island.hsm.destroy_root(token_key(id)?).await?;
        tracing::warn!(root = %id, objects, "a root was destroyed in this server's tokens");
        self.record(id, "done", objects).await
    }

    async fn record(&self, id: RootId, change: &str, objects: usize) -> Result<(), ServiceError> {
        let event = RootDestroyed {
            root: id.purpose.to_string(),
            version: id.version.into(),
            change: change.to_owned(),
            objects: u32::try_from(objects).unwrap_or(u32::MAX),
            ..RootDestroyed::default()
        };
        let act = self.island.committer.act(ServerAct::DESTROY_ROOT, Reads::default(), move |view| {
            Ok(Decision::recorded(view.append(Event::RootDestroyed(event.clone())), ()))
        });
        act.await.map(drop)
    }

    /// Refuses a version that is still needed: by a key, a row, a record, or a backup that may
    /// still be restored.
    async fn is_unused(&self, id: RootId, oldest_backup: UnixMillis) -> Result<(), ServiceError> {
        let row = self.refresh().await?;
        let now = self.island.store.now().await?;
        // I2: records stay, and checking them needs the key that linked them.
        if id.purpose == RootPurpose::Seal
            && row.root_standing(id).is_some_and(|standing| standing != RootStanding::Made)
        {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the root `{id}` is needed as long as the audit log is: records that were linked under it are checked with it"),
                next_step: "leave it in the tokens; once it is retired, nothing that is sealed or linked under it is believed any more".to_owned(),
            });
        }
        (*row).clone().destroy_root(id, now).map_err(refused)?;
        if oldest_backup > now {
            return Err(ServiceError::invalid("oldest_backup_ms", "it lies in the future"));
        }
        let counts = self.count(|_| true).await?;
        if counts.unreadable > 0 {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("{} rows cannot be read, so nobody can tell what they use", counts.unreadable),
                next_step: "run `kms audit scrub`".to_owned(),
            });
        }
        if counts.of(id) > 0 {
            let what = if id.purpose == RootPurpose::Seal { "rows" } else { "key versions" };
            return Err(ServiceError::FailedPrecondition {
                reason: format!("{} {what} use the root `{id}` still", counts.of(id)),
                next_step: "`kms roots show --count` tells of all roots; rotate what uses it".to_owned(),
            });
        }
        if row.root_standing(id) == Some(RootStanding::Made) {
            return Ok(());
        }
        let current = RootId {
            purpose: id.purpose,
            version: row.current_root(id.purpose).ok_or(RootError::NoSuchVersion { id }).map_err(refused)?,
        };
        let unused_since = match id.purpose {
            RootPurpose::StorageKek(_) => {
                let finished =
                    self.load(current).await?.filter(|rotation| rotation.state == RootRotationState::Finished);
                finished.ok_or_else(|| unfinished(id.purpose))?.since
            }
            RootPurpose::Diversification(_) => counts.last_use(id).unwrap_or(row.created),
            RootPurpose::VendorTransport | RootPurpose::Seal => row.created,
        };
        let replaced = row.root_entry(current).map_or(row.created, |entry| entry.made);
        not_in_backups(id, unused_since.max(replaced), oldest_backup)
    }
}

/// The decision to destroy a root, as people approved it.
struct Destroy {
    island: Arc<IslandContext>,
    approved: ProposalId,
    /// The current version for the same purpose.
    current: RootId,
}

impl Act for Destroy {
    type Answer = ();
    type Past = Known;

    fn name(&self) -> &'static str {
        Action::DestroyRoot.name()
    }

    fn reads(&self) -> Reads {
        let sealed = vec![proposal_row(self.approved), self.island.row_name(), rotation_row(self.current)];
        Reads { sealed, clock: true, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::DestroyRoot, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        let (approved, current) = (self.approved, self.current);
        // I6: exactly what was approved, and only once.
        let (ProposedAction::DestroyRoot(root), entry) = execute(view, permit, approved)? else {
            return Err(ServiceError::denied("destroyRoot"));
        };
        let id = root_id(&root)?;
        let now = view.clock()?;
        let mut row = (*view.island(self.island.name())?.ok_or_else(no_island)?).clone();
        // A version that was made and never used has had no pass, and no backup needs it.
        if id.purpose.has_pass() && row.root_standing(id) != Some(RootStanding::Made) {
            let finished =
                view.root_rotation(current)?.filter(|rotation| rotation.state == RootRotationState::Finished);
            let finished = finished
                .filter(|_| row.current_root(id.purpose) == Some(current.version))
                .ok_or_else(|| unfinished(id.purpose))?;
            not_in_backups(id, finished.since, root.oldest_backup)?;
        }
        row.destroy_root(id, now).map_err(refused)?;
        view.append(Event::RootDestroyed(RootDestroyed {
            root: id.purpose.to_string(),
            version: id.version.into(),
            change: "decided".to_owned(),
            proposal_id: approved.octets().to_vec().into(),
            oldest_backup_ms: root.oldest_backup.0,
            objects: 0,
        }));
        view.put_island(row)?;
        Ok(Decision::recorded(entry, ()))
    }

    fn again(&self, _: Known, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        Ok(())
    }
}

/// A backup from before `unused_since` has keys or rows that need the root: they would be lost
/// after a restore.
fn not_in_backups(id: RootId, unused_since: UnixMillis, oldest_backup: UnixMillis) -> Result<(), ServiceError> {
    if oldest_backup > unused_since {
        return Ok(());
    }
    Err(ServiceError::FailedPrecondition {
        reason: format!(
            "backups from before {} use the root `{id}`, and the oldest that may be restored is from {}",
            moment(unused_since),
            moment(oldest_backup)
        ),
        next_step: "destroy older backups, or wait until none of them is kept, and state the oldest that is left"
            .to_owned(),
    })
}

fn moment(time: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(time.0)
        .map_or_else(|_| format!("{} ms after 1970", time.0), |time| time.to_string())
}

fn unfinished(purpose: RootPurpose) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("the pass of the root `{purpose}` has not ended"),
        next_step: "watch it with `kms roots watch`".to_owned(),
    }
}

fn destroy_root(id: RootId, oldest_backup: UnixMillis) -> Result<DestroyRoot, ServiceError> {
    let kind = match id.purpose {
        RootPurpose::Diversification(_) => RootKind::Diversification,
        RootPurpose::StorageKek(_) => RootKind::StorageKek,
        RootPurpose::Seal => RootKind::Seal,
        RootPurpose::VendorTransport => RootKind::VendorTransport,
    };
    DestroyRoot::new(kind, id.purpose.class(), id.version, oldest_backup).map_err(ServiceError::parse("root"))
}

fn root_id(root: &DestroyRoot) -> Result<RootId, ServiceError> {
    let found = RootPurpose::ALL.into_iter().map(|purpose| RootId { purpose, version: root.version });
    let same = |id: &RootId| destroy_root(*id, root.oldest_backup).is_ok_and(|known| known == *root);
    found.into_iter().find(same).ok_or_else(|| ServiceError::FailedPrecondition {
        reason: format!("a root of the kind {} is not destroyed here", root.kind.name()),
        next_step: "withdraw the proposal".to_owned(),
    })
}

/// How long to wait after a root was found in use again: each count reads all rows.
const IN_USE_AGAIN: Duration = Duration::from_mins(10);
