//! The upload of a file to the spool.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;
use std::time::Duration;

use kms_domain::{LONGEST_SHIPMENT_LINE, Principal, PrincipalId, PrincipalStatus, UnixMillis};
use kms_proto::v1;
use kms_store::{Reads, ShipmentRow, ShipmentState, SpooledFile, StoreError, UploadId};
use prost::Message as _;

use super::{
    ShipmentService,
    error::{no_shipment_key, overtaken, unknown},
    progress::{Progress, next_upload_id, to_proto, upload_id},
    verify::{FIRST_DEVICE_LINE, Rejection, preview},
};
use crate::island::IslandContext;
use kms_authz::facts;
use kms_authz::{Action, Caller, Resource};
use kms_base::Repetition;
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

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

/// A running upload. Small pieces are collected before they are stored. If the server ends, pieces
/// that are not stored yet are lost, and the sender sends them again.
pub struct Upload {
    service: ShipmentService,
    caller: Caller,
    action: Action,
    row: ShipmentRow,
    manufacturer: Arc<Principal>,
    collected: Vec<u8>,
    /// Whether the first line was checked. Nothing is stored before.
    previewed: bool,
}

impl ShipmentService {
    /// Begins an upload, or continues it: the next octet is [`Upload::position`].
    ///
    /// # Errors
    /// Not permitted; the manufacturer has no shipment key; the file is too long; too many uploads
    /// are unfinished; or the database cannot be reached.
    #[boxed]
    pub async fn upload(&self, caller: &Caller, start: UploadStart) -> Result<Upload, ServiceError> {
        let own = start.manufacturer == caller.principal;
        let action = Action::UploadShipment { own };
        let principal = self.island.require(caller, &action).await?;
        let may_replace = self
            .island
            .policy
            .load()
            .permits(&facts(&principal), &Action::UploadShipment { own: false }, &Resource::Island)
            .is_permit();
        if start.file_length == 0 || start.file_length > LONGEST_FILE {
            return Err(ServiceError::invalid(
                "start.file_length",
                format!("`{}` is not 1 to {LONGEST_FILE} octets", start.file_length),
            ));
        }
        if !(8..=MOST_SIGNATURE).contains(&start.signature.len()) {
            return Err(ServiceError::invalid("start.signature", "it is not a DER ECDSA signature"));
        }
        let upload = match self.latest(&start.file_sha256).await? {
            None => upload_id(&start.file_sha256, 0),
            Some(row) if row.state == ShipmentState::Refused => next_upload_id(&row)?,
            Some(row)
                if row.size != start.file_length
                    && matches!(row.state, ShipmentState::Receiving | ShipmentState::Received) =>
            {
                Self::may_replace(&row, &caller.principal, may_replace)?;
                next_upload_id(&self.refuse(caller, &action, &row, "another length was announced").await?)?
            }
            Some(row) => row.upload,
        };
        let (row, manufacturer) = self.begin(caller, &action, upload, &start, may_replace).await?;
        let previewed = row.received > 0 || row.state != ShipmentState::Receiving;
        Ok(Upload {
            service: self.clone(),
            caller: caller.clone(),
            action,
            row,
            manufacturer,
            collected: Vec::new(),
            previewed,
        })
    }

    /// Registers the upload, or continues it. Another signature replaces the earlier one as long as
    /// nothing was imported.
    async fn begin(
        &self,
        caller: &Caller,
        action: &Action,
        upload: UploadId,
        start: &UploadStart,
        may_replace: bool,
    ) -> Result<(ShipmentRow, Arc<Principal>), ServiceError> {
        let act = Begin { service: self.clone(), action: action.clone(), upload, start: start.clone(), may_replace };
        Ok(self.island.door.act(caller, None, act).await?.value)
    }

    fn may_replace(row: &ShipmentRow, caller: &PrincipalId, of_others: bool) -> Result<(), ServiceError> {
        if row.principal == *caller || of_others {
            return Ok(());
        }
        Err(ServiceError::denied("uploadShipment of a file that another principal began to send"))
    }

    /// Whether a file of this length has room in the spool. The act that adds the file calls this
    /// with all files of the spool.
    fn bound_spool(&self, caller: &PrincipalId, length: u64, spool: &[SpooledFile]) -> Result<(), ServiceError> {
        let limits = &self.island.limits;
        let octets = |own: bool| {
            let counted = spool.iter().filter(|file| !own || file.principal == *caller);
            counted.fold(length, |sum, file| sum.saturating_add(file.size))
        };
        let own = spool.iter().filter(|file| file.principal == *caller).count();
        if own >= limits.number(Bound::UploadsPerPrincipal) {
            let what = format!(
                "{own} shipments of `{}` are in the spool and not imported; import them, or finish their upload",
                caller
            );
            return Err(self.met(Bound::UploadsPerPrincipal, &what, Duration::ZERO));
        }
        if octets(true) > limits.spool_octets_per_principal {
            let what = format!(
                "with this file, the shipments of `{}` that are not imported have {} octets",
                caller,
                octets(true)
            );
            return Err(self.met(Bound::SpoolOctetsPerPrincipal, &what, Duration::ZERO));
        }
        if octets(false) > limits.spool_octets {
            let what = format!("with this file, the shipments that are not imported have {} octets", octets(false));
            return Err(self.met(Bound::SpoolOctets, &what, SPOOL_RETRY));
        }
        let to_come =
            spool.iter().fold(length, |sum, file| sum.saturating_add(file.size.saturating_sub(file.received)));
        self.bound_disk(to_come)
    }

    /// I2: whether the disk of the embedded database has room for these octets beside the reserve
    /// for the log.
    fn bound_disk(&self, octets: u64) -> Result<(), ServiceError> {
        let Some(folder) = &self.island.disk else { return Ok(()) };
        // If the disk cannot be measured, nothing is refused: the database reports when it is full.
        let Ok(disk) = rustix::fs::statvfs(folder.as_path()) else { return Ok(()) };
        let (free, whole) = (disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize));
        if octets.saturating_add(self.island.limits.disk_reserve_octets.min(whole / 10)) > free {
            let what = format!(
                "{octets} octets of shipments would leave too little free on the disk of the database, which has {free} octets free"
            );
            return Err(self.met(Bound::DiskReserveOctets, &what, SPOOL_RETRY));
        }
        Ok(())
    }

    fn met(&self, bound: Bound, what: &str, retry_after: Duration) -> ServiceError {
        bound.met(&self.island.limits, what, retry_after)
    }

    /// How long an upload may take, in ms.
    fn upload_ms(&self) -> i64 {
        i64::try_from(self.island.limits.upload_hours.saturating_mul(3_600_000)).unwrap_or(i64::MAX)
    }

    /// Drops abandoned uploads and files every few minutes.
    pub fn in_background(self) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            let mut failures = Repetition::default();
            loop {
                if let Err(error) = self.drop_forgotten(IslandContext::now()).await
                    && failures.is_news(&error.to_string())
                {
                    tracing::warn!(%error, "abandoned shipments cannot be dropped from the spool; the next round tries again");
                }
                tokio::time::sleep(DROP_EVERY).await;
            }
        })
    }

    /// Drops uploads that are not complete in time, files that nobody imports, and octets that a
    /// server left behind when it ended.
    ///
    /// # Errors
    /// The database cannot be reached.
    pub(super) async fn drop_forgotten(&self, now: UnixMillis) -> Result<(), ServiceError> {
        let mut after = None;
        loop {
            let page = self.island.store.shipment_page(after, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.upload);
            for row in page {
                let forgotten = match row.state {
                    ShipmentState::Receiving if row.created.after(self.upload_ms()) < now => {
                        "it was not complete in time"
                    }
                    ShipmentState::Received if row.updated.after(FORGOTTEN_MS) < now => "nobody imported it for a week",
                    ShipmentState::Imported | ShipmentState::Refused => {
                        // A server that ended after the last line, or after the refusal, left the
                        // octets.
                        if self.island.store.shipment_chunk(row.upload, 0).await?.is_some() {
                            self.delete_chunks(row.upload).await?;
                        }
                        continue;
                    }
                    _ => continue,
                };
                match self.forget(&row, forgotten).await {
                    // Somebody has continued the upload or begun the import.
                    Ok(_) | Err(ServiceError::Aborted { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

impl Upload {
    /// The most octets of a piece.
    pub const LONGEST_PIECE: usize = 1 << 20;

    /// The number of the next octet.
    pub fn position(&self) -> u64 {
        self.row.received + self.collected.len() as u64
    }

    /// Adds a piece of the file.
    ///
    /// # Errors
    /// The piece is too long or not the next one; the caller has lost its permission; another
    /// upload of the file is running; or the database cannot be reached.
    #[boxed]
    pub async fn append(&mut self, offset: u64, octets: &[u8]) -> Result<(), ServiceError> {
        if octets.len() > Self::LONGEST_PIECE {
            return Err(ServiceError::invalid(
                "octets",
                format!("{} octets; at most {}", octets.len(), Self::LONGEST_PIECE),
            ));
        }
        if octets.is_empty() || self.is_refused() {
            return Ok(());
        }
        if offset != self.position() {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the piece is for octet {offset}, and {} octets have arrived", self.position()),
                next_step: "ask GetShipment how many octets have arrived and continue from there".to_owned(),
            });
        }
        if self.position() + octets.len() as u64 > self.row.size {
            return Err(ServiceError::invalid(
                "octets",
                format!("the file would be longer than the announced {} octets", self.row.size),
            ));
        }
        self.collected.extend_from_slice(octets);
        self.preview().await?;
        if self.is_refused() {
            return Ok(());
        }
        if self.collected.len() >= Self::LONGEST_PIECE { self.store().await } else { Ok(()) }
    }

    /// Whether the file was refused because of its first line. Then nothing more of it is stored.
    pub fn is_refused(&self) -> bool {
        self.row.state == ShipmentState::Refused
    }

    async fn preview(&mut self) -> Result<(), ServiceError> {
        self.preview_line(false).await
    }

    /// Checks the first line as soon as it is complete. A file that cannot be a shipment to this
    /// island is refused, with a record, before anything of it is stored.
    async fn preview_line(&mut self, ended: bool) -> Result<(), ServiceError> {
        if self.previewed || self.is_refused() {
            return Ok(());
        }
        let end = self.collected.iter().take(LONGEST_SHIPMENT_LINE + 1).position(|octet| *octet == b'\n');
        let length = match end {
            Some(end) => end,
            None if ended || self.collected.len() > LONGEST_SHIPMENT_LINE => {
                self.collected.len().min(LONGEST_SHIPMENT_LINE + 1)
            }
            None => return Ok(()),
        };
        if self.collected.is_empty() {
            return Ok(());
        }
        match preview(&self.service.island, &self.manufacturer, self.collected.get(..length).unwrap_or_default()).await
        {
            Ok(()) => self.previewed = true,
            Err(Rejection::Trouble(error)) => return Err(error),
            Err(Rejection::File(reason)) => {
                self.collected = Vec::new();
                self.row = self.service.refuse(&self.caller, &self.action, &self.row, &reason).await?;
            }
        }
        Ok(())
    }

    /// Stores the collected octets: at the end, and when the stream breaks. Nothing is stored
    /// before the first line is complete.
    ///
    /// # Errors
    /// As [`Self::append`].
    #[boxed]
    pub async fn store(&mut self) -> Result<(), ServiceError> {
        if self.collected.is_empty() || self.is_refused() || !self.previewed {
            return Ok(());
        }
        if self.row.created.after(self.service.upload_ms()) < IslandContext::now() {
            let reason = format!("it was not complete within {} hours", self.service.island.limits.upload_hours);
            self.row = self.service.forget(&self.row, &reason).await?;
            return Err(self.service.met(
                Bound::UploadHours,
                "the upload has taken too long and was dropped",
                Duration::ZERO,
            ));
        }
        self.service.bound_disk(self.collected.len() as u64)?;
        // A revocation also ends open streams.
        self.service.island.require(&self.caller, &self.action).await?;
        let octets = std::mem::take(&mut self.collected);
        let stored = self
            .service
            .island
            .store
            .append_shipment_chunk(self.row.upload, self.row.received, octets, IslandContext::now())
            .await;
        self.row.received = stored.map_err(|error| match error {
            StoreError::Conflict { .. } => ServiceError::Aborted {
                reason: "another upload of the same file is running".to_owned(),
                next_step: "ask GetShipment how many octets have arrived and continue from there".to_owned(),
            },
            other => other.into(),
        })?;
        Ok(())
    }

    /// Ends the upload. A file that is complete can be imported then.
    ///
    /// # Errors
    /// As [`Self::append`].
    #[boxed]
    pub async fn finish(mut self) -> Result<v1::Shipment, ServiceError> {
        self.preview_line(true).await?;
        self.store().await?;
        if self.row.state != ShipmentState::Receiving || self.row.received < self.row.size {
            return to_proto(&self.row);
        }
        let act = Finish { action: self.action.clone(), upload: self.row.upload, sha256: self.row.sha256 };
        let row = self.service.island.door.act(&self.caller, None, act).await?.value;
        to_proto(&row)
    }
}

/// The beginning of an upload.
struct Begin {
    service: ShipmentService,
    action: Action,
    upload: UploadId,
    start: UploadStart,
    may_replace: bool,
}

impl Act for Begin {
    type Answer = (ShipmentRow, Arc<Principal>);
    // The id of an upload is made from its content, so a repetition finds the same row.
    type Past = Never;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        let sealed = vec![principal_row(&self.start.manufacturer)];
        Reads { sealed, shipments: vec![self.upload], spool: true, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.action, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Self::Answer>, ServiceError> {
        let (start, caller) = (&self.start, &permit.principal().id);
        let signs = |known: &Arc<Principal>| known.shipment_key.is_some() && known.status == PrincipalStatus::Enabled;
        let manufacturer = view.principal(&start.manufacturer)?.filter(signs);
        let manufacturer = manufacturer.ok_or_else(|| no_shipment_key(&start.manufacturer))?;
        let now = view.now();
        let Some(mut row) = view.shipment(self.upload)? else {
            self.service.bound_spool(caller, start.file_length, &view.spool()?)?;
            let progress = Progress {
                manufacturer: start.manufacturer.to_string(),
                signature: start.signature.clone(),
                ..Progress::default()
            };
            let row = ShipmentRow {
                upload: self.upload,
                generation: 1,
                sha256: start.file_sha256,
                size: start.file_length,
                batch: String::new(),
                principal: caller.clone(),
                state: ShipmentState::Receiving,
                received: 0,
                next_line: FIRST_DEVICE_LINE,
                imported: 0,
                refused: 0,
                created: now,
                updated: now,
                progress: progress.encode_to_vec(),
            };
            view.put_shipment(row.clone());
            return Ok(Decision::progress((row, manufacturer)));
        };
        if row.sha256 != start.file_sha256 || row.size != start.file_length {
            return Err(overtaken());
        }
        if !matches!(row.state, ShipmentState::Receiving | ShipmentState::Received) {
            return Ok(Decision::unchanged((row, manufacturer)));
        }
        let mut progress = Progress::of(&row)?;
        if progress.manufacturer == start.manufacturer.to_string() && progress.signature == start.signature {
            return Ok(Decision::unchanged((row, manufacturer)));
        }
        ShipmentService::may_replace(&row, caller, self.may_replace)?;
        progress.manufacturer = start.manufacturer.to_string();
        progress.signature = start.signature.clone();
        row.progress = progress.encode_to_vec();
        row.generation += 1;
        row.updated = now;
        view.put_shipment(row.clone());
        Ok(Decision::progress((row, manufacturer)))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Self::Answer, ServiceError> {
        match never {}
    }
}

/// The end of an upload: all octets have arrived.
struct Finish {
    action: Action,
    upload: UploadId,
    sha256: [u8; 32],
}

impl Act for Finish {
    type Answer = ShipmentRow;
    type Past = Never;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        Reads { shipments: vec![self.upload], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.action, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<ShipmentRow>, ServiceError> {
        let mut row = view.shipment(self.upload)?.ok_or_else(|| unknown(&self.sha256))?;
        if row.state != ShipmentState::Receiving || row.received != row.size {
            return Ok(Decision::unchanged(row));
        }
        row.state = ShipmentState::Received;
        row.generation += 1;
        row.updated = view.now();
        view.put_shipment(row.clone());
        Ok(Decision::progress(row))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<ShipmentRow, ServiceError> {
        match never {}
    }
}

/// 32 GiB: 40 million meters with four keys.
const LONGEST_FILE: u64 = 32 << 30;
/// The DER of two P-384 integers has at most 104 octets.
const MOST_SIGNATURE: usize = 104;
/// A complete file that nobody imports for a week is dropped.
const FORGOTTEN_MS: i64 = 7 * 24 * 3_600 * 1_000;
const PAGE: u32 = 256;
const DROP_EVERY: Duration = Duration::from_mins(10);
/// When a sender may try again: the spool has room when other files are imported.
const SPOOL_RETRY: Duration = Duration::from_mins(10);
