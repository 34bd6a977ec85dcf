//! The context of a server process: the tokens, database, policies, device profiles and writer of
//! its island (I7: one context for one island).

use async_recursion::async_recursion as boxed;
use std::{collections::HashSet, path::PathBuf, sync::Arc};

use arc_swap::ArcSwap;
use kms_domain::{FingerprintKey, Group, GroupId, IslandName, PrincipalId, SystemTitle, UnixMillis};
use kms_hsm::Hsm;
use kms_store::{MeterRow, RowKind, SealedRow, Store};

use crate::profiles::Profiles;
use crate::scrub_flight::ScrubFlight;
use kms_authz::{Action, Caller, Policy, Resource};
use kms_base::Repetition;
use kms_base::bounds::Limits;
use kms_base::clock;
use kms_base::error::ServiceError;
use kms_ledger::{Asker, Committer, Door};

/// The context that all use cases of an island share. The island's row is [`kms_domain::Island`].
pub struct IslandContext {
    /// The island's row, as last verified: see [`Self::row`].
    pub row: ArcSwap<kms_domain::Island>,
    /// Its tokens.
    pub hsm: Hsm,
    /// Its database.
    pub store: Arc<dyn Store>,
    /// Its policies; replaced as a whole.
    pub policy: Arc<ArcSwap<Policy>>,
    /// Its device profiles.
    pub profiles: Profiles,
    /// The only writer of this process.
    pub committer: Committer,
    /// The entry for every act of a caller.
    pub door: Door,
    /// The bounds of this server.
    pub limits: Arc<Limits>,
    /// The file of the embedded database; `None` for a database server.
    pub disk: Option<PathBuf>,
    /// The key of key fingerprints.
    pub fingerprint_key: FingerprintKey,
    /// The running scrub: one at a time.
    pub scrubs: ScrubFlight,
    /// Held while the island's row is read again and its roots are taken into use. It remembers the
    /// last problem that was logged.
    pub refreshing: tokio::sync::Mutex<Repetition>,
}

impl IslandContext {
    /// The island's name.
    pub const fn name(&self) -> &IslandName {
        self.hsm.island()
    }

    /// The tokens, for work on behalf of a caller. The work queues fairly among the callers.
    pub fn hsm_for(&self, caller: &Caller) -> Hsm {
        self.hsm.paid_by(&caller.principal.to_string())
    }

    /// The island's row, no older than a few seconds. It says which roots are in use.
    pub fn row(&self) -> Arc<kms_domain::Island> {
        self.row.load_full()
    }

    /// The name of the island's row in the store. Acts that store keys read this row (I3). They are
    /// faster when their reads name it.
    pub fn row_name(&self) -> (RowKind, Vec<u8>) {
        (RowKind::Island, self.name().as_str().as_bytes().to_vec())
    }

    /// Now.
    pub fn now() -> UnixMillis {
        clock::now()
    }

    /// The caller's principal as it stands in the database now, for calls that only read (I5, I8).
    ///
    /// # Errors
    /// The principal is disabled or unknown, or the certificate is not one of its own; the row was
    /// tampered with; the database is unavailable.
    #[boxed]
    pub async fn principal(&self, caller: &Caller) -> Result<Arc<kms_domain::Principal>, ServiceError> {
        let name = caller.principal.to_string();
        let row = self.store.sealed(RowKind::Principal, name.as_bytes()).await?;
        self.accept(caller, row).await
    }

    /// As [`Self::principal`], with the rows of these meters as [`Store::meters`] reads them.
    ///
    /// # Errors
    /// As there.
    #[boxed]
    pub async fn principal_and_meters(
        &self,
        caller: &Caller,
        titles: &[SystemTitle],
    ) -> Result<(Arc<kms_domain::Principal>, Vec<MeterRow>), ServiceError> {
        let name = caller.principal.to_string();
        let (row, meters) = self.store.sealed_and_meters(RowKind::Principal, name.as_bytes(), titles).await?;
        Ok((self.accept(caller, row).await?, meters))
    }

    async fn accept(
        &self,
        caller: &Caller,
        row: Option<SealedRow>,
    ) -> Result<Arc<kms_domain::Principal>, ServiceError> {
        let refuse = || {
            ServiceError::unauthenticated(
                "the certificate is not one of an enabled principal of this island; ask a security officer",
            )
        };
        let row = row.ok_or_else(refuse)?;
        let principal = match self.committer.open_principal(&caller.principal, &row) {
            Ok(principal) => principal,
            // Another server may have written the row after it was read here. So it is read once
            // more: only a row that fails twice was tampered with.
            Err(_) => {
                let name = caller.principal.to_string();
                let row = self.store.sealed(RowKind::Principal, name.as_bytes()).await?.ok_or_else(refuse)?;
                self.committer.open_principal(&caller.principal, &row)?
            }
        };
        if principal.accepts(&caller.certificate_sha256, Self::now()) { Ok(principal) } else { Err(refuse()) }
    }

    /// The caller with the current policies: for calls that only read, and for a check before work
    /// that an act would refuse.
    ///
    /// # Errors
    /// As [`Self::principal`].
    #[boxed]
    pub async fn asker(&self, caller: &Caller) -> Result<Asker, ServiceError> {
        Ok(Asker::new(self.principal(caller).await?, self.policy.load_full()))
    }

    /// Like [`Self::principal`], for an action on the island that policy must permit.
    ///
    /// # Errors
    /// As there, and if no policy permits it.
    #[boxed]
    pub async fn require(&self, caller: &Caller, action: &Action) -> Result<Arc<kms_domain::Principal>, ServiceError> {
        let principal = self.principal(caller).await?;
        self.policy.load().require(&kms_authz::facts(&principal), action, &Resource::Island)?;
        Ok(principal)
    }

    /// A meter as it stands in the database now, for showing it.
    ///
    /// # Errors
    /// Its row was tampered with, or the database is unavailable.
    #[boxed]
    pub async fn meter(&self, title: SystemTitle) -> Result<Option<Arc<kms_domain::Meter>>, ServiceError> {
        let rows = self.store.meters(&[title]).await?;
        rows.first().map(|row| self.committer.open_meter(title, &row.row)).transpose()
    }
}

impl IslandContext {
    /// A group as it stands in the database now, and its row's generation.
    ///
    /// # Errors
    /// Its row was tampered with, or the database is unavailable.
    #[boxed]
    pub async fn group(&self, id: GroupId) -> Result<Option<(Arc<Group>, u64)>, ServiceError> {
        self.open_twice(RowKind::Group, &id.0.to_be_bytes(), |row| self.committer.open_group(id, row)).await
    }

    /// Reads and opens a sealed row, and returns its generation too. Another server may have
    /// written the row after it was read here, and this one may know that already. So it is read
    /// once more: only a row that fails twice was tampered with (I5).
    ///
    /// # Errors
    /// The row was tampered with, or the database is unavailable.
    pub(crate) async fn open_twice<T>(
        &self,
        kind: RowKind,
        id: &[u8],
        mut open: impl FnMut(&SealedRow) -> Result<T, ServiceError> + Send,
    ) -> Result<Option<(T, u64)>, ServiceError> {
        let Some(row) = self.store.sealed(kind, id).await? else { return Ok(None) };
        if let Ok(content) = open(&row) {
            return Ok(Some((content, row.generation)));
        }
        let Some(row) = self.store.sealed(kind, id).await? else { return Ok(None) };
        Ok(Some((open(&row)?, row.generation)))
    }

    /// Every known client system title: those of principals, enabled or not, and those that device
    /// profiles name. No meter may have one of them (I4). They are read outside the writer's
    /// transaction, so the transaction that uses one checks it again.
    ///
    /// # Errors
    /// A principal's row was tampered with, or the database is unavailable.
    #[boxed]
    pub async fn client_titles(&self) -> Result<HashSet<SystemTitle>, ServiceError> {
        let of_profiles = self
            .profiles
            .all()
            .into_iter()
            .flat_map(|profile| profile.clients.iter().filter_map(|client| client.system_title));
        let mut titles: HashSet<SystemTitle> = of_profiles.collect();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.store.sealed_page(RowKind::Principal, after.as_deref(), PRINCIPALS_AT_ONCE).await?;
            let Some((last, _)) = page.last() else { return Ok(titles) };
            after = Some(last.clone());
            for (name, row) in page {
                let id = std::str::from_utf8(&name).ok().and_then(|uri| PrincipalId::parse(uri).ok());
                let id =
                    id.ok_or_else(|| ServiceError::Internal("a principal's row has no principal's name".to_owned()))?;
                titles.extend(&self.committer.open_principal(&id, &row)?.client_titles);
            }
        }
    }
}

const PRINCIPALS_AT_ONCE: u32 = 256;
