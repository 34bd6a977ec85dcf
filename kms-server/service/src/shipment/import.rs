//! The import of a shipment: the file is verified, then committed batch by batch.

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Instant};

use kms_domain::{MeterStatus, Principal, PrincipalId, PrincipalStatus, Role};
use kms_proto::v1::{ImportShipmentResponse, RefusedLine};
use kms_store::{Reads, ShipmentRow, ShipmentState, UploadId};
use prost::Message as _;
use tokio::sync::mpsc;

use super::{
    ShipmentService,
    batch::{BatchSize, ReadyBatch, read_ahead},
    error::{no_shipment_key, unknown},
    progress::{Progress, to_proto, upload_id},
    record::{ImportBatch, ImportedBatch},
    spool::Windows,
    unchanged,
    verify::{FIRST_DEVICE_LINE, Rejection, Verified, verify},
};
use crate::group_names::Naming;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

/// A running import, as a stream of answers. If it is dropped, the import stops after the batch
/// that is being committed.
pub struct Import(mpsc::Receiver<Result<ImportShipmentResponse, ServiceError>>);

impl Import {
    /// The next answer; `None` after the last.
    #[boxed]
    pub async fn next(&mut self) -> Option<Result<ImportShipmentResponse, ServiceError>> {
        self.0.recv().await
    }

    /// The answers as a channel.
    pub fn into_receiver(self) -> mpsc::Receiver<Result<ImportShipmentResponse, ServiceError>> {
        self.0
    }
}

impl ShipmentService {
    /// Imports a shipment, or continues where an earlier call stopped. Each call reports all
    /// refused lines, those of earlier calls first. A call after the end repeats the result.
    ///
    /// If a head-end is named, the meters are assigned to it and are in service: policy lets a
    /// head-end talk to its own meters in service. Without a head-end they are in stock until they
    /// are assigned.
    ///
    /// # Errors
    /// Not permitted; the file is unknown or not complete; another head-end than in an earlier
    /// call; the HSM or the database cannot be reached. A file that is refused as a whole is an
    /// answer and no error.
    #[boxed]
    pub async fn import(
        &self,
        caller: &Caller,
        file_sha256: &[u8; 32],
        head_end: Option<PrincipalId>,
    ) -> Result<Import, ServiceError> {
        if let Some(head_end) = &head_end
            && (head_end.role() != Role::HeadEnd || head_end.island() != self.island.name())
        {
            return Err(ServiceError::invalid("head_end", format!("`{head_end}` is not a head-end of this island")));
        }
        let run = self.begin_import(caller, file_sha256, head_end).await?;
        let (answers, receiver) = mpsc::channel(2);
        tokio::spawn(run.finish(answers));
        Ok(Import(receiver))
    }

    async fn begin_import(
        &self,
        caller: &Caller,
        file_sha256: &[u8; 32],
        head_end: Option<PrincipalId>,
    ) -> Result<Run, ServiceError> {
        let upload = self.latest(file_sha256).await?.map_or_else(|| upload_id(file_sha256, 0), |row| row.upload);
        let act = BeginImport { upload, sha256: *file_sha256, head_end: head_end.clone() };
        let Begun { row, progress, manufacturer, own } = self.island.door.act(caller, None, act).await?.value;
        Ok(Run {
            service: self.clone(),
            caller: caller.clone(),
            own,
            head_end,
            upload,
            row,
            signature: progress.signature,
            manufacturer,
        })
    }
}

/// The answer of [`BeginImport`].
struct Begun {
    row: ShipmentRow,
    progress: Progress,
    manufacturer: Arc<Principal>,
    /// The caller is the manufacturer.
    own: bool,
}

/// Begins an import, or continues it. This act checks and changes nothing.
struct BeginImport {
    upload: UploadId,
    sha256: [u8; 32],
    head_end: Option<PrincipalId>,
}

impl BeginImport {
    fn row(&self, view: &mut View<'_, '_>) -> Result<Option<(ShipmentRow, Progress)>, ServiceError> {
        let row = view.shipment(self.upload)?.filter(|row| row.sha256 == self.sha256);
        row.map(|row| Progress::of(&row).map(|progress| (row, progress))).transpose()
    }
}

fn is_own(progress: &Progress, caller: &PrincipalId) -> bool {
    progress.manufacturer == caller.to_string()
}

impl Act for BeginImport {
    type Answer = Begun;
    type Past = Never;

    fn name(&self) -> &'static str {
        // The name does not depend on whose file it is.
        Action::ImportShipment { own: false }.name()
    }

    fn reads(&self) -> Reads {
        let sealed = self.head_end.iter().map(principal_row).collect();
        Reads { sealed, shipments: vec![self.upload], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let own = self.row(view)?.is_some_and(|(_, progress)| is_own(&progress, &asker.principal().id));
        asker.require(&Action::ImportShipment { own }, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Begun>, ServiceError> {
        let (row, progress) = self.row(view)?.ok_or_else(|| unknown(&self.sha256))?;
        let named = self.head_end.as_ref().map(ToString::to_string).unwrap_or_default();
        match row.state {
            ShipmentState::Receiving => {
                return Err(ServiceError::FailedPrecondition {
                    reason: format!("{} of {} octets of the shipment have arrived", row.received, row.size),
                    next_step: "upload the rest, then import".to_owned(),
                });
            }
            ShipmentState::Importing | ShipmentState::Imported if progress.head_end != named => {
                let reason = format!(
                    "the import began with the head-end `{}` and can continue only with it; assign the meters afterwards with `kms meter assign`",
                    progress.head_end
                );
                return Err(ServiceError::invalid("head_end", reason));
            }
            _ => {}
        }
        if let Some(head_end) = &self.head_end
            && view.principal(head_end)?.is_none_or(|head_end| head_end.status != PrincipalStatus::Enabled)
        {
            return Err(ServiceError::invalid(
                "head_end",
                format!("`{head_end}` is not an enabled head-end of this island"),
            ));
        }
        let manufacturer = progress.manufacturer()?;
        let key = view.principal(&manufacturer)?.filter(|known| known.status == PrincipalStatus::Enabled);
        let key = key.ok_or_else(|| no_shipment_key(&manufacturer))?;
        let own = is_own(&progress, &permit.principal().id);
        Ok(Decision::unchanged(Begun { row, progress, manufacturer: key, own }))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Begun, ServiceError> {
        match never {}
    }
}

/// The file is right: from here on lines are imported.
struct MarkVerified {
    own: bool,
    /// The file as it was verified.
    seen: ShipmentRow,
    batch: String,
    devices: u64,
    head_end: Option<PrincipalId>,
}

impl Act for MarkVerified {
    type Answer = ShipmentRow;
    type Past = Never;

    fn name(&self) -> &'static str {
        Action::ImportShipment { own: self.own }.name()
    }

    fn reads(&self) -> Reads {
        Reads { shipments: vec![self.seen.upload], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::ImportShipment { own: self.own }, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<ShipmentRow>, ServiceError> {
        let mut row = unchanged(view, &self.seen)?;
        let mut progress = Progress::of(&row)?;
        progress.devices = self.devices;
        progress.head_end = self.head_end.as_ref().map(ToString::to_string).unwrap_or_default();
        row.batch.clone_from(&self.batch);
        row.progress = progress.encode_to_vec();
        row.state = ShipmentState::Importing;
        row.next_line = row.next_line.max(FIRST_DEVICE_LINE);
        row.generation += 1;
        row.updated = view.now();
        view.put_shipment(row.clone());
        Ok(Decision::progress(row))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<ShipmentRow, ServiceError> {
        match never {}
    }
}

/// The import of one call.
struct Run {
    service: ShipmentService,
    caller: Caller,
    own: bool,
    head_end: Option<PrincipalId>,
    upload: UploadId,
    row: ShipmentRow,
    signature: bytes::Bytes,
    manufacturer: Arc<Principal>,
}

type Answers = mpsc::Sender<Result<ImportShipmentResponse, ServiceError>>;

impl Run {
    async fn finish(mut self, answers: Answers) {
        if let Err(error) = self.run(&answers).await {
            // An error here means that the caller has disconnected.
            let _ = answers.send(Err(error)).await;
        }
    }

    async fn run(&mut self, answers: &Answers) -> Result<(), ServiceError> {
        if matches!(self.row.state, ShipmentState::Received | ShipmentState::Importing) {
            match verify(&self.service.island, &self.row, &self.signature, &self.manufacturer).await {
                Ok(verified) => {
                    self.mark_verified(&verified).await?;
                    self.repeat_refusals(answers).await?;
                    return self.import(answers, Arc::new(verified)).await;
                }
                Err(Rejection::Trouble(error)) => return Err(error),
                Err(Rejection::File(reason)) => {
                    tracing::warn!(shipment = hex::encode(self.row.sha256), reason, "a shipment was refused");
                    let action = Action::ImportShipment { own: self.own };
                    self.row = self.service.refuse(&self.caller, &action, &self.row, &reason).await?;
                }
            }
        } else {
            // A server that crashed after the last batch left the octets.
            self.service.delete_chunks(self.upload).await?;
        }
        self.repeat_refusals(answers).await?;
        let duplicate_keys = Progress::of(&self.row)?.duplicate_keys;
        let _ = answers
            .send(Ok(ImportShipmentResponse {
                shipment: Some(to_proto(&self.row)?),
                duplicate_keys,
                ..Default::default()
            }))
            .await;
        Ok(())
    }

    /// The file is right: from here on lines are imported.
    async fn mark_verified(&mut self, verified: &Verified) -> Result<(), ServiceError> {
        if self.row.state == ShipmentState::Importing {
            return Ok(());
        }
        let act = MarkVerified {
            own: self.own,
            seen: self.row.clone(),
            batch: verified.header.batch.clone(),
            devices: verified.devices,
            head_end: self.head_end.clone(),
        };
        self.row = self.service.island.door.act(&self.caller, None, act).await?.value;
        Ok(())
    }

    /// The refused lines of earlier calls, so that each call's report is whole.
    async fn repeat_refusals(&self, answers: &Answers) -> Result<(), ServiceError> {
        let mut after = 0;
        loop {
            let page = self.service.island.store.shipment_refusals(self.upload, after, REFUSALS_AT_ONCE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.line;
            let refused_lines = page
                .into_iter()
                .map(|refusal| RefusedLine { line: refusal.line, field: refusal.field, reason: refusal.reason })
                .collect();
            if answers
                .send(Ok(ImportShipmentResponse {
                    shipment: Some(to_proto(&self.row)?),
                    refused_lines,
                    ..Default::default()
                }))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
    }

    async fn import(&mut self, answers: &Answers, verified: Arc<Verified>) -> Result<(), ServiceError> {
        let island = &self.service.island;
        let size = Arc::new(BatchSize::new());
        let windows = Windows::verified(
            island.store.clone(),
            self.upload,
            self.row.size,
            verified.next_begin,
            verified.windows.clone(),
        );
        let mut batches = read_ahead(island.clone(), verified.clone(), windows, self.row.next_line, size.clone());
        let mut earlier = Progress::of(&self.row)?.duplicate_keys;
        while let Some(batch) = batches.recv().await {
            let batch = batch?;
            let (last, begun) = (batch.last, Instant::now());
            let mut answer = self.commit(batch, &verified).await?;
            size.committed_in(begun.elapsed());
            if last {
                self.service.delete_chunks(self.upload).await?;
            }
            answer.duplicate_keys.splice(0..0, std::mem::take(&mut earlier));
            if answers.send(Ok(answer)).await.is_err() {
                tracing::info!(
                    shipment = hex::encode(self.row.sha256),
                    next_line = self.row.next_line,
                    "the caller disconnected; the next call continues the import"
                );
                return Ok(());
            }
        }
        Ok(())
    }

    async fn commit(
        &mut self,
        batch: ReadyBatch,
        verified: &Arc<Verified>,
    ) -> Result<ImportShipmentResponse, ServiceError> {
        let action = Action::ImportShipment { own: self.own };
        let names = batch.devices.iter().flat_map(|device| device.groups.iter().map(String::as_str)).collect();
        let naming = Naming { caller: &self.caller, request: None, action: &action, class: None };
        let groups = self.service.groups.resolve(&self.service.island, &naming, &names, verified.profile.suite).await?;
        let act = ImportBatch {
            client_titles: self.service.island.client_titles().await?,
            island: self.service.island.clone(),
            own: self.own,
            head_end: self.head_end.clone(),
            status: if self.head_end.is_some() { MeterStatus::InService } else { MeterStatus::InStock },
            manufacturer: self.manufacturer.id.clone(),
            upload: self.upload,
            verified: verified.clone(),
            groups,
            batch: Arc::new(batch),
        };
        let recorded = self.act(Arc::new(act)).await?;
        self.row = recorded.row;
        Ok(ImportShipmentResponse {
            shipment: Some(to_proto(&self.row)?),
            refused_lines: recorded.refused,
            duplicate_keys: recorded.duplicates,
        })
    }

    /// Commits a batch. If the queue is full, it waits and tries again: callers who wait for an
    /// answer go before an import.
    async fn act(&self, act: Arc<ImportBatch>) -> Result<ImportedBatch, ServiceError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.service.island.door.act(&self.caller, None, act.clone()).await {
                Err(ServiceError::ResourceExhausted { retry_after, .. }) if attempts < MOST_ATTEMPTS => {
                    tokio::time::sleep(retry_after).await
                }
                other => return Ok(other?.value),
            }
        }
    }
}

const REFUSALS_AT_ONCE: u32 = 1_000;
const MOST_ATTEMPTS: u32 = 20;
