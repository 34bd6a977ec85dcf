//! `meterkms.v1.ProposalService`.

use std::sync::Arc;

use bytes::Bytes;
use kms_domain::ProposalId;
use kms_proto::v1::{
    ApproveProposalRequest, CarryOutProposalRequest, ListProposalsRequest, ListProposalsResponse, Proposal,
    ShowProposalRequest, WithdrawProposalRequest, proposal_service_server::ProposalService as Rpc,
};
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_reason};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::approval::{ProposalChange, ProposalService};
use kms_service::island::IslandContext;

/// The service over gRPC.
pub(crate) struct ProposalApi {
    island: Arc<IslandContext>,
    service: ProposalService,
}

impl ProposalApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: ProposalService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for ProposalApi {
    async fn list_proposals(
        &self,
        request: Request<ListProposalsRequest>,
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

    async fn show_proposal(&self, request: Request<ShowProposalRequest>) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.service.show(&caller, proposal_id(&request.into_inner().proposal_id)?).await?))
    }

    async fn approve_proposal(&self, request: Request<ApproveProposalRequest>) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let content_sha256 = <[u8; 32]>::try_from(message.content_sha256.as_ref()).map_err(|_| {
            ServiceError::invalid("content_sha256", format!("{} octets instead of 32", message.content_sha256.len()))
        })?;
        let same = ApproveProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ApproveProposal", &same)?;
        Ok(Response::new(
            self.service
                .change(
                    &caller,
                    request,
                    proposal_id(&message.proposal_id)?,
                    ProposalChange::Approve { content_sha256 },
                )
                .await?,
        ))
    }

    async fn withdraw_proposal(&self, request: Request<WithdrawProposalRequest>) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = WithdrawProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"WithdrawProposal", &same)?;
        let change = ProposalChange::Withdraw { reason: parse_reason(message.reason)? };
        Ok(Response::new(self.service.change(&caller, request, proposal_id(&message.proposal_id)?, change).await?))
    }

    async fn carry_out_proposal(
        &self,
        request: Request<CarryOutProposalRequest>,
    ) -> Result<Response<Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = CarryOutProposalRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CarryOutProposal", &same)?;
        Ok(Response::new(
            self.service.change(&caller, request, proposal_id(&message.proposal_id)?, ProposalChange::Execute).await?,
        ))
    }
}

fn proposal_id(octets: &[u8]) -> Result<ProposalId, ServiceError> {
    ProposalId::from_octets(octets).map_err(ServiceError::parse("proposal_id"))
}

const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;
