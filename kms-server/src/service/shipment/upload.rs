//! A file on its way into the spool.

use kms_domain::PrincipalId;
use kms_proto::v1;
use kms_store::{Reads, ShipmentRow, ShipmentState, StoreError, UploadId};
use prost::Message as _;

use super::{
    ShipmentService, no_shipment_key, overtaken,
    progress::{Progress, next_upload_id, to_proto, upload_id},
    verify::FIRST_DEVICE_LINE,
};
use crate::{
    audit::Actor,
    authz::{Action, Caller, Resource},
    error::ServiceError,
    island::{Island, facts, principal_row},
};

/// What a sender announces.
#[derive(Clone, Debug)]
pub struct UploadStart {
    /// SHA-256 of the whole file: the shipment's identity.
    pub file_sha256: [u8; 32],
    /// Its length in octets.
    pub file_length: u64,
    /// DER ECDSA signature over the file.
    pub signature: bytes::Bytes,
    /// Who signed.
    pub manufacturer: PrincipalId,
}

/// Octets on their way into the spool. Small pieces are collected; what was taken in and not yet stored is lost with the server, and sent again.
pub struct Upload {
    service: ShipmentService,
    caller: Caller,
    action: Action,
    row: ShipmentRow,
    collected: Vec<u8>,
}

impl ShipmentService {
    /// Begins to send a shipment, or goes on with it: the next octet is [`Upload::position`].
    ///
    /// # Errors
    /// Not permitted; the manufacturer has no shipment key; too long a file; too many unfinished ones; or the database is away.
    pub async fn upload(&self, caller: &Caller, start: UploadStart) -> Result<Upload, ServiceError> {
        let own = start.manufacturer == caller.principal;
        let action = Action::UploadShipment { own };
        let principal = self.island.require(caller, &action).await?;
        let may_replace = self.island.policy.load().permits(&facts(&principal), &Action::UploadShipment { own: false }, &Resource::Island).is_permit();
        if start.file_length == 0 || start.file_length > LONGEST_FILE {
            return Err(ServiceError::invalid("start.file_length", format!("`{}` is not 1 to {LONGEST_FILE} octets", start.file_length)));
        }
        if !(8..=MOST_SIGNATURE).contains(&start.signature.len()) {
            return Err(ServiceError::invalid("start.signature", "it is no DER ECDSA signature"));
        }
        let upload = match self.latest(&start.file_sha256).await? {
            None => {
                self.bound_unfinished(caller).await?;
                upload_id(&start.file_sha256, 0)
            }
            Some(row) if row.state == ShipmentState::Refused => next_upload_id(&row)?,
            Some(row) if row.size != start.file_length && matches!(row.state, ShipmentState::Receiving | ShipmentState::Received) => {
                Self::may_replace(&row, caller, may_replace)?;
                next_upload_id(&self.refuse(Actor::caller(caller, None, action.name()), &row, "another length was announced").await?)?
            }
            Some(row) => row.upload,
        };
        let row = self.begin(caller, &action, upload, &start, may_replace).await?;
        Ok(Upload { service: self.clone(), caller: caller.clone(), action, row, collected: Vec::new() })
    }

    /// Registers the upload, or goes on with it. Another signature replaces the one before, as long as nothing was imported.
    async fn begin(&self, caller: &Caller, action: &Action, upload: UploadId, start: &UploadStart, may_replace: bool) -> Result<ShipmentRow, ServiceError> {
        let reads = Reads { sealed: vec![principal_row(&caller.principal), principal_row(&start.manufacturer)], shipments: vec![upload], ..Reads::default() };
        let (service, caller_again, action_again, start) = (self.clone(), caller.clone(), action.clone(), start.clone());
        let actor = Actor::caller(caller, None, action.name());
        let committed = self
            .island
            .committer
            .act(actor, reads, move |view| {
                let principal = view.caller(&caller_again)?;
                service.island.policy.load().require(&facts(&principal), &action_again, &Resource::Island)?;
                let manufacturer = view.principal(&start.manufacturer)?;
                if !manufacturer.is_some_and(|manufacturer| manufacturer.shipment_key.is_some() && manufacturer.status == kms_domain::PrincipalStatus::Enabled)
                {
                    return Err(no_shipment_key(&start.manufacturer));
                }
                let now = view.now();
                let Some(mut row) = view.shipment(upload)? else {
                    let row = ShipmentRow {
                        upload,
                        generation: 1,
                        sha256: start.file_sha256,
                        size: start.file_length,
                        batch: String::new(),
                        principal: caller_again.principal.clone(),
                        state: ShipmentState::Receiving,
                        received: 0,
                        next_line: FIRST_DEVICE_LINE,
                        imported: 0,
                        refused: 0,
                        created: now,
                        updated: now,
                        progress: Progress { manufacturer: start.manufacturer.to_string(), signature: start.signature.clone(), ..Progress::default() }
                            .encode_to_vec(),
                    };
                    view.put_shipment(row.clone());
                    return Ok(row);
                };
                if row.sha256 != start.file_sha256 || row.size != start.file_length {
                    return Err(overtaken());
                }
                if !matches!(row.state, ShipmentState::Receiving | ShipmentState::Received) {
                    return Ok(row);
                }
                let mut progress = Progress::of(&row)?;
                if progress.manufacturer == start.manufacturer.to_string() && progress.signature == start.signature {
                    return Ok(row);
                }
                Self::may_replace(&row, &caller_again, may_replace)?;
                progress.manufacturer = start.manufacturer.to_string();
                progress.signature = start.signature.clone();
                row.progress = progress.encode_to_vec();
                row.generation += 1;
                row.updated = now;
                view.put_shipment(row.clone());
                Ok(row)
            })
            .await?;
        Ok(committed.value)
    }

    fn may_replace(row: &ShipmentRow, caller: &Caller, of_others: bool) -> Result<(), ServiceError> {
        if row.principal == caller.principal || of_others {
            return Ok(());
        }
        Err(ServiceError::denied("uploadShipment of a file that another principal began to send"))
    }

    /// No sender fills the database with files that it never finishes; those that it left are dropped first.
    async fn bound_unfinished(&self, caller: &Caller) -> Result<(), ServiceError> {
        let mut unfinished = 0;
        let mut after = None;
        let forgotten = Island::now().after(-FORGOTTEN_MS);
        loop {
            let page = self.island.store.shipment_page(after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.upload);
            for row in page.iter().filter(|row| row.principal == caller.principal && matches!(row.state, ShipmentState::Receiving | ShipmentState::Received)) {
                if row.updated < forgotten {
                    self.refuse(Actor::server("dropShipment"), row, "it was not touched for a week").await?;
                } else {
                    unfinished += 1;
                }
            }
        }
        if unfinished >= MOST_UNFINISHED {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("{unfinished} shipments of `{}` are in the spool and not imported", caller.principal),
                next_step: "import them, or finish their upload, first".to_owned(),
            });
        }
        Ok(())
    }
}

impl Upload {
    /// The longest piece that is taken at once.
    pub const LONGEST_PIECE: usize = 1 << 20;

    /// Where the next octet belongs.
    pub fn position(&self) -> u64 {
        self.row.received + self.collected.len() as u64
    }

    /// Takes a piece of the file.
    ///
    /// # Errors
    /// It is too long or not the next one; the caller is shut out meanwhile; another upload of the file is under way; the database is away.
    pub async fn append(&mut self, offset: u64, octets: &[u8]) -> Result<(), ServiceError> {
        if octets.len() > Self::LONGEST_PIECE {
            return Err(ServiceError::invalid("octets", format!("{} octets; at most {}", octets.len(), Self::LONGEST_PIECE)));
        }
        if octets.is_empty() {
            return Ok(());
        }
        if offset != self.position() {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the piece is for octet {offset}, and {} octets have arrived", self.position()),
                next_step: "ask GetShipment how many octets have arrived and go on from there".to_owned(),
            });
        }
        if self.position() + octets.len() as u64 > self.row.size {
            return Err(ServiceError::invalid("octets", format!("the file would be longer than the announced {} octets", self.row.size)));
        }
        self.collected.extend_from_slice(octets);
        if self.collected.len() >= Self::LONGEST_PIECE { self.store().await } else { Ok(()) }
    }

    /// Stores what was collected: at the end, and when a stream breaks.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn store(&mut self) -> Result<(), ServiceError> {
        if self.collected.is_empty() {
            return Ok(());
        }
        // Revocation acts in open streams too.
        self.service.island.require(&self.caller, &self.action).await?;
        let octets = std::mem::take(&mut self.collected);
        let stored = self.service.island.store.append_shipment_chunk(self.row.upload, self.row.received, octets, Island::now()).await;
        self.row.received = stored.map_err(|error| match error {
            StoreError::Conflict { .. } => ServiceError::Aborted {
                reason: "another upload of the same file is under way".to_owned(),
                next_step: "ask GetShipment how many octets have arrived and go on from there".to_owned(),
            },
            other => other.into(),
        })?;
        Ok(())
    }

    /// Ends the upload; a file that is complete can be imported now.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn finish(mut self) -> Result<v1::Shipment, ServiceError> {
        self.store().await?;
        if self.row.state != ShipmentState::Receiving || self.row.received < self.row.size {
            return to_proto(&self.row);
        }
        let upload = self.row.upload;
        let reads = Reads { sealed: vec![principal_row(&self.caller.principal)], shipments: vec![upload], ..Reads::default() };
        let (caller, sha256) = (self.caller.clone(), self.row.sha256);
        let committed = self
            .service
            .island
            .committer
            .act(Actor::caller(&self.caller, None, self.action.name()), reads, move |view| {
                view.caller(&caller)?;
                let mut row = view.shipment(upload)?.ok_or_else(|| super::unknown(&sha256))?;
                if row.state == ShipmentState::Receiving && row.received == row.size {
                    row.state = ShipmentState::Received;
                    row.generation += 1;
                    row.updated = view.now();
                    view.put_shipment(row.clone());
                }
                Ok(row)
            })
            .await?;
        to_proto(&committed.value)
    }
}

/// 32 GiB: 40 million meters with four keys.
const LONGEST_FILE: u64 = 32 << 30;
/// DER of two P-384 integers has 104 octets at most.
const MOST_SIGNATURE: usize = 104;
const MOST_UNFINISHED: usize = 16;
/// An upload that nobody touched for a week is forgotten.
const FORGOTTEN_MS: i64 = 7 * 24 * 3_600 * 1_000;
const PAGE: u32 = 256;
