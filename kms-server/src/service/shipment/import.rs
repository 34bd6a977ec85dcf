//! The import of a verified shipment, batch after batch.

use std::{sync::Arc, time::Instant};

use kms_domain::{MeterStatus, Principal, PrincipalId, PrincipalStatus, Role};
use kms_proto::v1::{DuplicateKey, ImportShipmentResponse, RefusedLine};
use kms_store::{Reads, ShipmentRow, ShipmentState, UploadId};
use prost::Message as _;
use tokio::sync::mpsc;

use super::{
    ShipmentService,
    batch::{BatchSize, ReadyBatch, read_ahead},
    overtaken,
    progress::{Progress, to_proto, upload_id},
    record::Step,
    spool::Windows,
    unknown,
    verify::{FIRST_DEVICE_LINE, Rejection, Verified, verify},
};
use crate::{
    audit::Actor,
    authz::{Action, Caller, Resource},
    error::ServiceError,
    island::{facts, principal_row},
};

/// An import under way: its answers, as they come. Dropping it stops the import after the batch
/// that is being committed.
pub struct Import(mpsc::Receiver<Result<ImportShipmentResponse, ServiceError>>);

impl Import {
    /// The next answer; none behind the last.
    pub async fn next(&mut self) -> Option<Result<ImportShipmentResponse, ServiceError>> {
        self.0.recv().await
    }

    /// The answers as a channel.
    pub fn into_receiver(self) -> mpsc::Receiver<Result<ImportShipmentResponse, ServiceError>> {
        self.0
    }
}

impl ShipmentService {
    /// Imports a shipment, or goes on where an earlier call stopped. Each call tells all refused
    /// lines, those of earlier calls first; after the end it repeats the result.
    ///
    /// The meters become the head-end's, if one is named, and are then in service: policy lets a
    /// head-end talk to meters that are its own and in service. Without one they are in stock,
    /// until they are assigned.
    ///
    /// # Errors
    /// Not permitted; the file is unknown or not complete; another head-end than in an earlier
    /// call; HSM or database are away. A file that is refused as a whole is an answer and no error.
    pub async fn import(
        &self,
        caller: &Caller,
        file_sha256: &[u8; 32],
        head_end: Option<PrincipalId>,
    ) -> Result<Import, ServiceError> {
        if let Some(head_end) = &head_end
            && (head_end.role() != Role::HeadEnd || head_end.island() != self.island.name())
        {
            return Err(ServiceError::invalid("head_end", format!("`{head_end}` is no head-end of this island")));
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
        let mut sealed = vec![principal_row(&caller.principal)];
        sealed.extend(head_end.as_ref().map(principal_row));
        let reads = Reads { sealed, shipments: vec![upload], ..Reads::default() };
        let (island, caller_again, sha256, wanted) =
            (self.island.clone(), caller.clone(), *file_sha256, head_end.clone());
        let committed = self
            .island
            .committer
            .act(Actor::caller(caller, None, IMPORT), reads, move |view| {
                let principal = view.caller(&caller_again)?;
                let row = view.shipment(upload)?.filter(|row| row.sha256 == sha256);
                let progress = row.as_ref().map(Progress::of).transpose()?;
                let own = progress.as_ref().is_some_and(|progress| progress.manufacturer == caller_again.principal.to_string());
                island.policy.load().require(&facts(&principal), &Action::ImportShipment { own }, &Resource::Island)?;
                let (Some(row), Some(progress)) = (row, progress) else { return Err(unknown(&sha256)) };
                let named = wanted.as_ref().map(ToString::to_string).unwrap_or_default();
                match row.state {
                    ShipmentState::Receiving => {
                        return Err(ServiceError::FailedPrecondition {
                            reason: format!("{} of {} octets of the shipment have arrived", row.received, row.size),
                            next_step: "upload the rest first".to_owned(),
                        });
                    }
                    ShipmentState::Importing | ShipmentState::Imported if progress.head_end != named => {
                        return Err(ServiceError::invalid(
                            "head_end",
                            format!("importShipment has begun with the head-end `{}` and goes on with it alone; assign the meters afterwards with `kms meter assign`", progress.head_end),
                        ));
                    }
                    _ => {}
                }
                if let Some(head_end) = &wanted
                    && view.principal(head_end)?.is_none_or(|head_end| head_end.status != PrincipalStatus::Enabled)
                {
                    return Err(ServiceError::invalid("head_end", format!("`{head_end}` is no enabled head-end of this island")));
                }
                let manufacturer = progress.manufacturer()?;
                let key = view.principal(&manufacturer)?.filter(|known| known.status == PrincipalStatus::Enabled);
                let key = key.ok_or_else(|| super::no_shipment_key(&manufacturer))?;
                Ok((row, progress, key, own))
            })
            .await?;
        let (row, progress, manufacturer, own) = committed.value;
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

/// One call's import.
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
            // A caller that has gone away has no use for it.
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
                    self.row =
                        self.service.refuse(Actor::caller(&self.caller, None, IMPORT), &self.row, &reason).await?;
                }
            }
        } else {
            // A server that crashed behind the last batch left the octets.
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
        let reads = Reads { shipments: vec![self.upload], ..Reads::default() };
        let (upload, seen, batch, devices) =
            (self.upload, self.row.clone(), verified.header.batch.clone(), verified.devices);
        let head_end = self.head_end.as_ref().map(ToString::to_string).unwrap_or_default();
        let committed = self
            .service
            .island
            .committer
            .act(Actor::caller(&self.caller, None, IMPORT), reads, move |view| {
                let mut row = view.shipment(upload)?.ok_or_else(|| unknown(&seen.sha256))?;
                if row.generation != seen.generation {
                    return Err(overtaken());
                }
                let mut progress = Progress::of(&row)?;
                progress.devices = devices;
                progress.head_end.clone_from(&head_end);
                row.batch.clone_from(&batch);
                row.progress = progress.encode_to_vec();
                row.state = ShipmentState::Importing;
                row.next_line = row.next_line.max(FIRST_DEVICE_LINE);
                row.generation += 1;
                row.updated = view.now();
                view.put_shipment(row.clone());
                Ok(row)
            })
            .await?;
        self.row = committed.value;
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
                    "the caller has gone; the import goes on with its next call"
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
        let actor = Actor::caller(&self.caller, None, IMPORT);
        let (island, caller) = (self.service.island.clone(), self.caller.clone());
        let permit: super::super::group::Permit = Arc::new(move |view| {
            let principal = view.caller(&caller)?;
            island.policy.load().require(&facts(&principal), &action, &Resource::Island)
        });
        let names = batch.devices.iter().flat_map(|device| device.groups.iter().map(String::as_str)).collect();
        let groups =
            self.service.groups.resolve(&self.service.island, &actor, &permit, &names, verified.profile.suite).await?;
        let step = Step {
            client_titles: self.service.island.client_titles().await?,
            island: self.service.island.clone(),
            caller: self.caller.clone(),
            own: self.own,
            head_end: self.head_end.clone(),
            status: if self.head_end.is_some() { MeterStatus::InService } else { MeterStatus::InStock },
            manufacturer: self.manufacturer.id.clone(),
            upload: self.upload,
            verified: verified.clone(),
            groups,
            batch: Arc::new(batch),
        };
        let recorded = self.act(actor, Arc::new(step)).await?;
        self.row = recorded.row;
        Ok(ImportShipmentResponse {
            shipment: Some(to_proto(&self.row)?),
            refused_lines: recorded.refused,
            duplicate_keys: recorded.duplicates,
        })
    }

    /// Commits a batch. An import gives way to callers who wait for an answer: it comes back when
    /// the queue is full.
    async fn act(&self, actor: Actor, step: Arc<Step>) -> Result<Recorded, ServiceError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let deciding = step.clone();
            match self
                .service
                .island
                .committer
                .act(actor.clone(), step.reads(), move |view| deciding.decide(view))
                .await
            {
                Err(ServiceError::ResourceExhausted { retry_after, .. }) if attempts < MOST_ATTEMPTS => {
                    tokio::time::sleep(retry_after).await
                }
                other => return Ok(other?.value),
            }
        }
    }
}

/// What one batch came to.
pub(super) struct Recorded {
    pub(super) row: ShipmentRow,
    pub(super) refused: Vec<RefusedLine>,
    pub(super) duplicates: Vec<DuplicateKey>,
}

/// The action's name in policies and the log.
const IMPORT: &str = "importShipment";
const REFUSALS_AT_ONCE: u32 = 1_000;
const MOST_ATTEMPTS: u32 = 20;
