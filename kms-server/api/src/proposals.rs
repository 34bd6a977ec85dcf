//! `meterkms.v1.ProposalService`.

use std::sync::Arc;

use bytes::Bytes;
use kms_domain::{ProposalId, RequestId};
use kms_proto::v1::{
    ApproveProposalRequest, CarryOutProposalRequest, ListProposalsRequest, ListProposalsResponse, Proposal,
    ShowProposalRequest, WithdrawProposalRequest, proposal_service_server::ProposalService as Rpc,
};
use tonic::{Response, Status};

use crate::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::Island;
use kms_service::{
    approval::{Change, ProposalService, Request},
    grant::request_digest,
};

/// The service over gRPC.
pub struct ProposalApi {
    island: Arc<Island>,
    service: ProposalService,
}

impl ProposalApi {
    /// Of an island.
    pub fn new(island: Arc<Island>) -> Self {
        Self { service: ProposalService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &tonic::Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), Island::now())
    }
}

#[tonic::async_trait]
impl Rpc for ProposalApi {
    async fn list_proposals(
        &self,
        request: tonic::Request<ListProposalsRequest>,
    ) -> Result<Response<ListProposalsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let before = match message.page_token.len() {
            0 => None,
            _ => Some(ProposalId::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let page = match message.page_size {
            0 => DEFAULT_PAGE,
            size => usize::try_from(size).unwrap_or(LARGEST_PAGE).min(LARGEST_PAGE),
        };
        let proposals = self.service.list(&caller, before, page).await?;
        let last = proposals.last().filter(|_| proposals.len() == page);
        let next_page_token = last.map(|proposal| proposal.proposal_id.clone()).unwrap_or_default();
        Ok(Response::new(ListProposalsResponse { proposals, next_page_token }))
    }

    async fn show_proposal(&self, request: tonic::Request<ShowProposalRequest>) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.service.show(&caller, proposal_id(&request.into_inner().proposal_id)?).await?))
    }

    async fn approve_proposal(
        &self,
        request: tonic::Request<ApproveProposalRequest>,
    ) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let content_sha256 = <[u8; 32]>::try_from(message.content_sha256.as_ref()).map_err(|_| {
            ServiceError::invalid("content_sha256", format!("{} octets instead of 32", message.content_sha256.len()))
        })?;
        let same = ApproveProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = self::request(&message.request_id, b"ApproveProposal", &same)?;
        Ok(Response::new(
            self.service
                .change(&caller, request, proposal_id(&message.proposal_id)?, Change::Approve { content_sha256 })
                .await?,
        ))
    }

    async fn withdraw_proposal(
        &self,
        request: tonic::Request<WithdrawProposalRequest>,
    ) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        if message.reason.trim().is_empty() || message.reason.len() > 256 {
            return Err(ServiceError::invalid("reason", "not 1 to 256 octets: the record must say why").into());
        }
        let same = WithdrawProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = self::request(&message.request_id, b"WithdrawProposal", &same)?;
        let change = Change::Withdraw { reason: message.reason };
        Ok(Response::new(self.service.change(&caller, request, proposal_id(&message.proposal_id)?, change).await?))
    }

    async fn carry_out_proposal(
        &self,
        request: tonic::Request<CarryOutProposalRequest>,
    ) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = CarryOutProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = self::request(&message.request_id, b"CarryOutProposal", &same)?;
        Ok(Response::new(
            self.service.change(&caller, request, proposal_id(&message.proposal_id)?, Change::CarryOut).await?,
        ))
    }
}

fn request(id: &[u8], name: &[u8], same: &impl prost::Message) -> Result<Request, ServiceError> {
    let id = RequestId::from_octets(id).map_err(ServiceError::parse("request_id"))?;
    Ok(Request { id, digest: request_digest(&[name, &same.encode_to_vec()]) })
}

fn proposal_id(octets: &[u8]) -> Result<ProposalId, ServiceError> {
    ProposalId::from_octets(octets).map_err(ServiceError::parse("proposal_id"))
}

const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;
