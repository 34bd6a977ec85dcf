//! Vendor shipments (docs/formats.md, *Shipments*): sent into the spool, verified as a whole, then
//! imported line by line, from vendor wrapping to storage wrapping inside the HSM.
//!
//! Any server can go on where another one stopped: octets and progress are in the database,
//! progress in the same transaction as the meters. What is imported is what the manufacturer
//! signed: the file is verified in a first pass of every call, and each part of it again when the
//! second pass reads it (I5).

mod batch;
mod import;
mod progress;
mod record;
mod spool;
#[cfg(test)]
mod tests;
mod upload;
mod verify;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::PrincipalId;
use kms_proto::v1::{self, ShipmentImported, audit_record::Event};
use kms_store::{Reads, ShipmentRow, ShipmentState, UploadId};
use prost::Message as _;

use self::progress::{MOST_UPLOADS, Progress, to_proto, upload_id};
pub use self::{
    import::Import,
    upload::{Upload, UploadStart},
};
use super::group::Groups;
use crate::island::Island;
use kms_authz::facts;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, ServerAct, View};

/// The use cases of shipments. Clones share what is known of groups.
#[derive(Clone)]
pub struct ShipmentService {
    island: Arc<Island>,
    groups: Arc<Groups>,
}

impl ShipmentService {
    /// Shipments of an island.
    pub fn new(island: Arc<Island>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// How far a shipment is.
    ///
    /// # Errors
    /// Not permitted; unknown, or another's where the caller may see its own only; or the database
    /// is away.
    #[boxed]
    pub async fn get(&self, caller: &Caller, file_sha256: &[u8; 32]) -> Result<v1::Shipment, ServiceError> {
        let sees_all = self.sees_all(caller).await?;
        let row = self.latest(file_sha256).await?;
        let row = row.filter(|row| sees_all || is_own(row, caller)).ok_or_else(|| unknown(file_sha256))?;
        to_proto(&row)
    }

    /// The shipments that the caller may see, newest first, at most 1,000.
    ///
    /// # Errors
    /// Not permitted, or the database is away.
    #[boxed]
    pub async fn list(&self, caller: &Caller) -> Result<Vec<v1::Shipment>, ServiceError> {
        let sees_all = self.sees_all(caller).await?;
        let mut rows: Vec<ShipmentRow> = Vec::new();
        let mut after = None;
        loop {
            let page = self.island.store.shipment_page(after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.upload);
            rows.extend(page.into_iter().filter(|row| sees_all || is_own(row, caller)));
            // Upload ids have no order in time.
            rows.sort_unstable_by_key(|row| std::cmp::Reverse(row.created));
            rows.truncate(MOST_LISTED);
        }
        rows.iter().map(to_proto).collect()
    }

    /// The key that vendors encrypt batch keys to, and the OAEP hashes that are accepted.
    ///
    /// # Errors
    /// Not permitted, or the HSM is away.
    #[boxed]
    pub async fn transport_key(&self, caller: &Caller) -> Result<v1::VendorTransportKey, ServiceError> {
        self.sees_all(caller).await?;
        let spki = self.island.hsm.transport_key_spki(verify::offered_transport_version(&self.island)?).await?;
        let hashes = oaep_hashes(&self.island).await?;
        Ok(v1::VendorTransportKey {
            spki: spki.into(),
            oaep_hashes: hashes.iter().map(|hash| hash.name().to_owned()).collect(),
        })
    }

    /// The latest upload of a file: those before it were refused.
    async fn latest(&self, file_sha256: &[u8; 32]) -> Result<Option<ShipmentRow>, ServiceError> {
        let mut latest = None;
        for number in 0..MOST_UPLOADS {
            match self
                .island
                .store
                .shipment(upload_id(file_sha256, number))
                .await?
                .filter(|row| row.sha256 == *file_sha256)
            {
                None => break,
                Some(row) if row.state == ShipmentState::Refused => latest = Some(row),
                row => return Ok(row),
            }
        }
        Ok(latest)
    }

    /// Whether the caller may see all shipments; an error if not even its own.
    async fn sees_all(&self, caller: &Caller) -> Result<bool, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        let policy = self.island.policy.load();
        if policy.permits(&principal, &Action::ListShipments { own: false }, &Resource::Island).is_permit() {
            return Ok(true);
        }
        policy.require(&principal, &Action::ListShipments { own: true }, &Resource::Island)?;
        Ok(false)
    }

    /// Refuses a whole file for its caller, on the record, and drops its octets.
    async fn refuse(
        &self,
        caller: &Caller,
        action: &Action,
        row: &ShipmentRow,
        reason: &str,
    ) -> Result<ShipmentRow, ServiceError> {
        let act = Refuse { action: action.clone(), seen: row.clone(), reason: reason.to_owned() };
        let refused = self.island.door.act(caller, None, act).await?.value;
        self.delete_chunks(row.upload).await?;
        Ok(refused)
    }

    /// The same, of a file that nobody goes on with.
    async fn forget(&self, row: &ShipmentRow, reason: &str) -> Result<ShipmentRow, ServiceError> {
        let reads = Reads { shipments: vec![row.upload], ..Reads::default() };
        let (seen, reason) = (row.clone(), reason.to_owned());
        let act = self.island.committer.act(ServerAct::DROP_SHIPMENT, reads, move |view| refuse(view, &seen, &reason));
        let refused = act.await?.value;
        self.delete_chunks(row.upload).await?;
        Ok(refused)
    }

    async fn delete_chunks(&self, upload: UploadId) -> Result<(), ServiceError> {
        while self.island.store.delete_shipment_chunks(upload, CHUNKS_AT_ONCE).await? > 0 {}
        Ok(())
    }
}

/// The refusal of a whole file.
struct Refuse {
    action: Action,
    /// The file as it was looked at.
    seen: ShipmentRow,
    reason: String,
}

impl Act for Refuse {
    type Answer = ShipmentRow;
    // A file is refused once: its row says so.
    type Past = Never;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        Reads { shipments: vec![self.seen.upload], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.action, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<ShipmentRow>, ServiceError> {
        refuse(view, &self.seen, &self.reason)
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<ShipmentRow, ServiceError> {
        match never {}
    }
}

fn refuse(view: &mut View<'_, '_>, seen: &ShipmentRow, reason: &str) -> Result<Decision<ShipmentRow>, ServiceError> {
    let mut row = unchanged(view, seen)?;
    let mut progress = Progress::of(&row)?;
    reason.clone_into(&mut progress.refusal);
    let entry = view.append(Event::ShipmentImported(ShipmentImported {
        file_sha256: row.sha256.to_vec().into(),
        batch: row.batch.clone(),
        manufacturer: progress.manufacturer.clone(),
        refusal: reason.to_owned(),
        ..ShipmentImported::default()
    }));
    row.progress = progress.encode_to_vec();
    row.state = ShipmentState::Refused;
    row.generation += 1;
    row.updated = view.now();
    view.put_shipment(row.clone());
    Ok(Decision::recorded(entry, row))
}

/// A file's row, if nobody has changed it since it was looked at.
fn unchanged(view: &mut View<'_, '_>, seen: &ShipmentRow) -> Result<ShipmentRow, ServiceError> {
    let row = view.shipment(seen.upload)?.ok_or_else(|| unknown(&seen.sha256))?;
    if row.generation == seen.generation { Ok(row) } else { Err(overtaken()) }
}

/// The OAEP hashes that batch keys may use: SHA-256, and SHA-1 only where the module has nothing
/// else.
async fn oaep_hashes(island: &Island) -> Result<Vec<kms_domain::OaepHash>, ServiceError> {
    let capabilities = island.hsm.usable(HSM_WAIT).await?;
    Ok(capabilities.oaep_hash().into_iter().collect())
}

fn is_own(row: &ShipmentRow, caller: &Caller) -> bool {
    row.principal == caller.principal
        || Progress::of(row).is_ok_and(|progress| progress.manufacturer == caller.principal.to_string())
}

fn no_shipment_key(manufacturer: &PrincipalId) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("`{manufacturer}` is not an enabled manufacturer with a shipment key"),
        next_step: "register it with `kms principal add`".to_owned(),
    }
}

fn unknown(file_sha256: &[u8; 32]) -> ServiceError {
    ServiceError::NotFound { what: format!("shipment {}", hex::encode(file_sha256)) }
}

fn overtaken() -> ServiceError {
    ServiceError::Aborted {
        reason: "another call is importing or sending this shipment".to_owned(),
        next_step: "GetShipment tells how far it is; call again when it does not advance".to_owned(),
    }
}

const PAGE: u32 = 256;
const MOST_LISTED: usize = 1_000;
/// Chunks have 1 MiB.
const CHUNKS_AT_ONCE: u32 = 64;
const HSM_WAIT: std::time::Duration = std::time::Duration::from_secs(5);
