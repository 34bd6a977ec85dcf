//! `meterkms.v1.RootService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use kms_domain::{ProposalId, Quorum, RootId, RootPurpose, UnixMillis};
use kms_proto::v1::{
    self, CountRootReferencesRequest, CountRootReferencesResponse, DestroyRootRequest, PauseRootRotationRequest,
    ProposeRootDestructionRequest, RetireRootRequest, RotateRootRequest, ShowRootsRequest, ShowRootsResponse,
    WatchRootRotationRequest, root_service_server::RootService as RootRpc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_reason};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::root::{Destruction, RootService, RotationChange};

/// The service over gRPC.
pub(crate) struct RootApi {
    island: Arc<IslandContext>,
    service: RootService,
}

impl RootApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: RootService::new(Arc::clone(&island)), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl RootRpc for RootApi {
    async fn show_roots(&self, request: Request<ShowRootsRequest>) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.service.show(&caller).await?))
    }

    async fn rotate_root(&self, request: Request<RotateRootRequest>) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = RotateRootRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"RotateRoot", &same)?;
        let change = RotationChange::Rotate { rows_per_second: rate(message.rows_per_second)?.unwrap_or(DEFAULT_RATE) };
        Ok(Response::new(self.service.change(&caller, request, root(&message.root)?, change).await?))
    }

    async fn pause_root_rotation(
        &self,
        request: Request<PauseRootRotationRequest>,
    ) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = PauseRootRotationRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"PauseRootRotation", &same)?;
        let change = RotationChange::Pause { reason: parse_reason(message.reason)? };
        Ok(Response::new(self.service.change(&caller, request, root(&message.root)?, change).await?))
    }

    async fn resume_root_rotation(
        &self,
        request: Request<RotateRootRequest>,
    ) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = RotateRootRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ResumeRootRotation", &same)?;
        let change = RotationChange::Resume { rows_per_second: rate(message.rows_per_second)? };
        Ok(Response::new(self.service.change(&caller, request, root(&message.root)?, change).await?))
    }

    async fn retire_root(&self, request: Request<RetireRootRequest>) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = RetireRootRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"RetireRoot", &same)?;
        Ok(Response::new(self.service.change(&caller, request, root(&message.root)?, RotationChange::Retire).await?))
    }

    async fn propose_root_destruction(
        &self,
        request: Request<ProposeRootDestructionRequest>,
    ) -> Result<Response<v1::Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = ProposeRootDestructionRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ProposeRootDestruction", &same)?;
        let version = u8::try_from(message.version).ok().filter(|version| *version > 0);
        let destruction = Destruction {
            id: RootId {
                purpose: root(&message.root)?,
                version: version.ok_or_else(|| ServiceError::invalid("version", "it is not 1 to 255"))?,
            },
            oldest_backup: UnixMillis(message.oldest_backup_ms),
            reason: parse_reason(message.reason)?,
            quorum: message.quorum.map_or(Ok(Quorum::ONE), Quorum::new).map_err(ServiceError::parse("quorum"))?,
        };
        Ok(Response::new(self.service.propose_destruction(&caller, request, destruction).await?))
    }

    async fn destroy_root(&self, request: Request<DestroyRootRequest>) -> Result<Response<ShowRootsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = DestroyRootRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"DestroyRoot", &same)?;
        let proposal = ProposalId::from_octets(&message.proposal_id).map_err(ServiceError::parse("proposal_id"))?;
        Ok(Response::new(self.service.destroy(&caller, request, proposal).await?))
    }

    type WatchRootRotationStream = Pin<Box<dyn Stream<Item = Result<v1::RootRotation, Status>> + Send>>;

    async fn watch_root_rotation(
        &self,
        request: Request<WatchRootRotationRequest>,
    ) -> Result<Response<Self::WatchRootRotationStream>, Status> {
        let caller = self.caller(&request)?;
        let watch = self.service.watch(&caller, root(&request.into_inner().root)?).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(watch).map(|rotation| rotation.map_err(Status::from)))))
    }

    type CountRootReferencesStream = Pin<Box<dyn Stream<Item = Result<CountRootReferencesResponse, Status>> + Send>>;

    async fn count_root_references(
        &self,
        request: Request<CountRootReferencesRequest>,
    ) -> Result<Response<Self::CountRootReferencesStream>, Status> {
        let caller = self.caller(&request)?;
        let counts = self.service.count_for(&caller).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(counts).map(|counted| counted.map_err(Status::from)))))
    }
}

fn root(name: &str) -> Result<RootPurpose, ServiceError> {
    RootPurpose::parse(name).map_err(ServiceError::parse("root"))
}

fn rate(rows_per_second: u32) -> Result<Option<u32>, ServiceError> {
    match rows_per_second {
        0 => Ok(None),
        1..=1_000_000 => Ok(Some(rows_per_second)),
        other => Err(ServiceError::invalid("rows_per_second", format!("`{other}` is not 1 to 1,000,000"))),
    }
}

const DEFAULT_RATE: u32 = 1_000;
