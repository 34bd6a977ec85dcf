//! Rules that all principals must fulfil together. The transaction that changes one principal
//! checks them.

use std::sync::Arc;

use kms_domain::{IslandName, Principal, PrincipalId, PrincipalStatus, Role, SystemTitle};
use kms_store::{Reads, RowKind, Store};

use crate::island::IslandContext;
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Committer, View};

/// The names of all principals, and the count of added principals in the island's row. Each new
/// principal increases the count. A transaction that finds the same count has read all principals,
/// and conflicts with a transaction of another server that adds one.
#[derive(Clone, Debug)]
pub(crate) struct Everyone {
    island: IslandName,
    ids: Vec<PrincipalId>,
    added: u64,
}

impl Everyone {
    /// Runs an act that must be consistent with all principals, and again if a principal was added
    /// after the names were read.
    ///
    /// # Errors
    /// As [`Self::of`], and as `act`.
    pub(crate) async fn consistently<T, F, A>(island: &IslandContext, act: F) -> Result<T, ServiceError>
    where
        F: Fn(Self) -> A,
        A: Future<Output = Result<T, ServiceError>>,
    {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let everyone = Self::of(&*island.store, &island.committer, island.name()).await?;
            match act(everyone).await {
                Err(error) if Self::is_stale(&error) && attempts < MOST_ATTEMPTS => {}
                outcome => return outcome,
            }
        }
    }

    /// Reads the names outside the writer's transaction.
    pub(crate) async fn of(
        store: &dyn Store,
        committer: &Committer,
        island: &IslandName,
    ) -> Result<Self, ServiceError> {
        // The count is read first: if a principal is added meanwhile, there are too many names and
        // not too few.
        let row = store.sealed(RowKind::Island, island.as_str().as_bytes()).await?.ok_or_else(no_island)?;
        let added = committer.open_island(&row)?.principals_added;
        let (mut ids, mut after) = (Vec::new(), None::<Vec<u8>>);
        loop {
            let page = store.sealed_page(RowKind::Principal, after.as_deref(), MOST_AT_ONCE).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            for (name, _) in &page {
                ids.push(parse_name(name)?);
            }
        }
        Ok(Self { island: island.clone(), ids, added })
    }

    /// The reads of a transaction that checks all principals.
    pub(crate) fn reads(&self) -> Reads {
        let mut sealed: Vec<_> = self.ids.iter().map(principal_row).collect();
        sealed.push((RowKind::Island, self.island.as_str().as_bytes().to_vec()));
        Reads { sealed, ..Reads::default() }
    }

    /// All principals as they are in the transaction.
    ///
    /// # Errors
    /// Aborted, with [`Self::is_stale`]: a principal was added after the names were read. Also a
    /// row that does not verify, which the refusal names: its key could be the one to certify (I6).
    pub(crate) fn rows(&self, view: &mut View<'_, '_>) -> Result<Vec<Arc<Principal>>, ServiceError> {
        if view.island(&self.island)?.ok_or_else(no_island)?.principals_added != self.added {
            return Err(stale());
        }
        let mut rows = Vec::with_capacity(self.ids.len());
        for id in &self.ids {
            rows.extend(view.principal(id).map_err(|error| match error {
                ServiceError::PermissionDenied { .. } => unverified(id),
                other => other,
            })?);
        }
        Ok(rows)
    }

    /// Increases the count, so that other transactions read the names again.
    pub(crate) fn count_one_more(&self, view: &mut View<'_, '_>) -> Result<(), ServiceError> {
        let mut row = Arc::unwrap_or_clone(view.island(&self.island)?.ok_or_else(no_island)?);
        row.principals_added += 1;
        view.put_island(row)
    }

    /// Refuses to remove the last officer: another enabled officer with a valid certificate must
    /// remain. An officer whose row does not verify does not count.
    pub(crate) fn refuse_last_officer(&self, view: &mut View<'_, '_>, id: &PrincipalId) -> Result<(), ServiceError> {
        if id.role() != Role::Officer {
            return Ok(());
        }
        let now = view.now();
        for other in self.ids.iter().filter(|other| other.role() == Role::Officer && *other != id) {
            match view.principal(other) {
                Ok(Some(other)) if other.can_act(now) => return Ok(()),
                Ok(_) | Err(ServiceError::PermissionDenied { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ServiceError::FailedPrecondition {
            reason: format!(
                "`{id}` is the last enabled officer with a certificate that has not ended, and nobody could administer the island afterwards"
            ),
            next_step: "add another officer first".to_owned(),
        })
    }

    /// Whether a refusal says that the names must be read again.
    pub(crate) fn is_stale(error: &ServiceError) -> bool {
        *error == stale()
    }
}

/// I6: one key belongs to one principal. With one key for two principals, one person would count
/// twice.
pub(crate) fn refuse_shared_key(
    rows: &[Arc<Principal>],
    id: &PrincipalId,
    key_sha256: &[u8; 32],
) -> Result<(), ServiceError> {
    let has_key = |principal: &Principal| {
        principal.certificates.iter().any(|certificate| certificate.key_sha256.as_ref() == Some(key_sha256))
    };
    match rows.iter().find(|other| other.id != *id && has_key(other)) {
        None => Ok(()),
        Some(other) => Err(ServiceError::FailedPrecondition {
            reason: format!("the key is that of a certificate of `{}`", other.id),
            next_step: "make a key pair for each principal".to_owned(),
        }),
    }
}

/// Two enabled principals must not use one client title: the leases of one would supersede those of
/// the other.
pub(crate) fn refuse_shared_titles(
    rows: &[Arc<Principal>],
    id: &PrincipalId,
    titles: &[SystemTitle],
) -> Result<(), ServiceError> {
    let others = rows.iter().filter(|other| other.id != *id && other.status == PrincipalStatus::Enabled);
    for other in others {
        if let Some(title) = titles.iter().find(|title| other.client_titles.contains(title)) {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the client title {title} belongs to `{}`", other.id),
                next_step: "give each principal a title of its own".to_owned(),
            });
        }
    }
    Ok(())
}

pub(crate) fn parse_name(name: &[u8]) -> Result<PrincipalId, ServiceError> {
    let id = std::str::from_utf8(name).ok().and_then(|id| PrincipalId::parse(id).ok());
    id.ok_or_else(|| ServiceError::Internal("a principal's row with an id that is no principal (I5)".to_owned()))
}

fn stale() -> ServiceError {
    ServiceError::Aborted {
        reason: "another principal was added at the same moment".to_owned(),
        next_step: "ask again".to_owned(),
    }
}

pub(crate) fn unverified(id: &PrincipalId) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!(
            "the row of `{id}` does not verify (I5), so nobody can tell whether its key or client title is the same"
        ),
        next_step:
            "restore that row from a copy of the database, then ask again; `kms audit scrub` lists all such rows"
                .to_owned(),
    }
}

fn no_island() -> ServiceError {
    ServiceError::Internal("the island has no row (I5)".to_owned())
}

/// How often an act is tried again because a principal was added meanwhile.
const MOST_ATTEMPTS: usize = 8;
/// Rows of principals that are read at once.
pub(crate) const MOST_AT_ONCE: u32 = 500;
