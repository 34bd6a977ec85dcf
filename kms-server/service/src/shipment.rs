//! Vendor shipments (docs/formats.md, *Shipments*): uploaded to the spool, verified as a whole,
//! then imported line by line. The HSM takes each key from the vendor's wrapping to the storage
//! KEK.
//!
//! Any server can continue where another one stopped: the octets and the progress are in the
//! database, and the progress is written in the transaction that writes the meters. Only what the
//! manufacturer signed is imported: every call verifies the whole file in a first pass, and each
//! part of it again when the second pass reads it (I5).

mod batch;
mod duplicates;
mod error;
mod import;
mod known;
mod progress;
mod record;
mod spool;
#[cfg(test)]
mod tests;
mod transport_key;
mod upload;
mod verify;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_proto::v1::{self, ShipmentImported, audit_record::Event};
use kms_store::{Reads, ShipmentRow, ShipmentState, UploadId};
use prost::Message as _;

use self::{
    error::{overtaken, unknown},
    progress::{MOST_UPLOADS, Progress, to_proto, upload_id},
    transport_key::{oaep_hashes, offered_version},
};
pub use self::{
    import::Import,
    upload::{Upload, UploadStart},
};
use super::group_names::Groups;
use crate::island::IslandContext;
use kms_authz::facts;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, ServerAct, View};

/// The use cases of shipments. Clones share the names of groups that were read.
#[derive(Clone)]
pub struct ShipmentService {
    island: Arc<IslandContext>,
    groups: Arc<Groups>,
}

impl ShipmentService {
    /// Shipments of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// The progress of a shipment.
    ///
    /// # Errors
    /// Not permitted; an unknown shipment, or another principal's where the caller may see its own
    /// only; or the database cannot be reached.
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
    /// Not permitted, or the database cannot be reached.
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
    /// Not permitted, or the HSM cannot be reached.
    #[boxed]
    pub async fn transport_key(&self, caller: &Caller) -> Result<v1::VendorTransportKey, ServiceError> {
        self.sees_all(caller).await?;
        let spki = self.island.hsm.transport_key_spki(offered_version(&self.island)?).await?;
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

    /// Whether the caller may see all shipments. An error if it may not even see its own.
    async fn sees_all(&self, caller: &Caller) -> Result<bool, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        let policy = self.island.policy.load();
        if policy.permits(&principal, &Action::ListShipments { own: false }, &Resource::Island).is_permit() {
            return Ok(true);
        }
        policy.require(&principal, &Action::ListShipments { own: true }, &Resource::Island)?;
        Ok(false)
    }

    /// Refuses a whole file in an act of the caller, with a record (I2), and deletes its octets.
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

    /// Refuses a whole file in an act of the server: nobody continues its upload or import.
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
    /// The row that the refusal was decided on.
    seen: ShipmentRow,
    reason: String,
}

impl Act for Refuse {
    type Answer = ShipmentRow;
    // A file is refused only once: its row says so.
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

/// The row of a file, if nobody has changed it since `seen` was read.
fn unchanged(view: &mut View<'_, '_>, seen: &ShipmentRow) -> Result<ShipmentRow, ServiceError> {
    let row = view.shipment(seen.upload)?.ok_or_else(|| unknown(&seen.sha256))?;
    if row.generation == seen.generation { Ok(row) } else { Err(overtaken()) }
}

fn is_own(row: &ShipmentRow, caller: &Caller) -> bool {
    row.principal == caller.principal
        || Progress::of(row).is_ok_and(|progress| progress.manufacturer == caller.principal.to_string())
}

const PAGE: u32 = 256;
const MOST_LISTED: usize = 1_000;
/// A chunk has 1 MiB.
const CHUNKS_AT_ONCE: u32 = 64;
