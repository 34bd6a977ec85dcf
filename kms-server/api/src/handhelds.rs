//! `meterkms.v1.HandheldService`: messages to domain types and back.

use bytes::Bytes;
use kms_domain::{CodeId, IslandName, PersonName, PrincipalId, Role};
use kms_proto::v1;
use kms_proto::v1::handheld_service_server::HandheldService as HandheldRpc;
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_client_titles, parse_optional_reason};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::handheld::{HandheldService, NewInvitation};
use kms_service::island::IslandContext;

/// The service over gRPC.
pub(crate) struct HandheldApi {
    handhelds: HandheldService,
}

impl HandheldApi {
    /// The service over these use cases.
    pub(crate) const fn new(handhelds: HandheldService) -> Self {
        Self { handhelds }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island(), IslandContext::now())
    }

    fn island(&self) -> &IslandName {
        self.handhelds.island().name()
    }
}

#[tonic::async_trait]
impl HandheldRpc for HandheldApi {
    async fn invite_handheld(
        &self,
        request: Request<v1::InviteHandheldRequest>,
    ) -> Result<Response<v1::Invitation>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::InviteHandheldRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"InviteHandheld", &same)?;
        let new = NewInvitation {
            client_titles: parse_client_titles(&message.client_titles)?,
            ..invitation(self.island(), &message.name, &message.technician, message.code, message.lifetime_seconds)?
        };
        Ok(Response::new(self.handhelds.invite(&caller, request, new).await?))
    }

    async fn hand_over_handheld(
        &self,
        request: Request<v1::HandOverHandheldRequest>,
    ) -> Result<Response<v1::Invitation>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::HandOverHandheldRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"HandOverHandheld", &same)?;
        let new =
            invitation(self.island(), &message.name, &message.technician, message.code, message.lifetime_seconds)?;
        Ok(Response::new(self.handhelds.hand_over(&caller, request, new).await?))
    }

    async fn withdraw_invitation(
        &self,
        request: Request<v1::WithdrawInvitationRequest>,
    ) -> Result<Response<v1::Invitation>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::WithdrawInvitationRequest { request_id: Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"WithdrawInvitation", &same)?;
        let (handheld, reason) = (handheld(self.island(), &message.name)?, parse_optional_reason(message.reason)?);
        Ok(Response::new(self.handhelds.withdraw(&caller, request, handheld, reason).await?))
    }

    async fn list_handhelds(
        &self,
        request: Request<v1::ListHandheldsRequest>,
    ) -> Result<Response<v1::ListHandheldsResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(v1::ListHandheldsResponse { handhelds: self.handhelds.list(&caller).await? }))
    }
}

/// The handheld of this name.
pub(crate) fn handheld(island: &IslandName, name: &str) -> Result<PrincipalId, ServiceError> {
    PrincipalId::new(island.clone(), Role::Handheld, name).map_err(ServiceError::parse("name"))
}

/// The public part of a code.
pub(crate) fn code_id(field: &str, octets: &[u8]) -> Result<CodeId, ServiceError> {
    let id = <[u8; 6]>::try_from(octets);
    id.map(CodeId).map_err(|_| ServiceError::invalid(field, format!("{} octets instead of 6", octets.len())))
}

fn invitation(
    island: &IslandName,
    name: &str,
    technician: &str,
    code: Option<v1::CodeDigest>,
    lifetime_seconds: u32,
) -> Result<NewInvitation, ServiceError> {
    let code = code.ok_or_else(|| ServiceError::invalid("code", "it is missing"))?;
    Ok(NewInvitation {
        handheld: handheld(island, name)?,
        technician: PersonName::parse(technician).map_err(ServiceError::parse("technician"))?,
        code_id: code_id("code.code_id", &code.code_id)?,
        code_sha256: code
            .sha256
            .as_ref()
            .try_into()
            .map_err(|_| ServiceError::invalid("code.sha256", format!("{} octets instead of 32", code.sha256.len())))?,
        lifetime_seconds: Some(lifetime_seconds).filter(|seconds| *seconds > 0),
        client_titles: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        let island = IslandName::parse("north").unwrap();
        let code =
            |id: usize, digest: usize| v1::CodeDigest { code_id: vec![1; id].into(), sha256: vec![2; digest].into() };
        let right = invitation(&island, "h-17", "Tom Field", Some(code(6, 32)), 0).unwrap();
        assert_eq!(
            (right.handheld.to_string().as_str(), right.lifetime_seconds),
            ("urn:meterkms:north:handheld:h-17", None)
        );
        for (expected, name, technician, code) in [
            ("name", "H-17", "Tom Field", Some(code(6, 32))),
            ("technician", "h-17", "", Some(code(6, 32))),
            ("code", "h-17", "Tom Field", None),
            ("code.code_id", "h-17", "Tom Field", Some(code(5, 32))),
            ("code.sha256", "h-17", "Tom Field", Some(code(6, 31))),
        ] {
            match invitation(&island, name, technician, code, 60) {
                Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
