//! `meterkms.v1.FrameService`.

use std::sync::Arc;

use kms_dlms::Protection;
use kms_domain::{RequestId, SystemTitle};
use kms_proto::v1::{
    CipheredFrame, FrameForm, FrameProtection, FrameRefusal, FrameResult, PlainFrame, ProtectRequest, ProtectResponse,
    UnprotectRequest, UnprotectResponse, frame_result::Result as Outcome, frame_service_server::FrameService as Rpc,
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::parse::parse_setup;
use crate::peer::caller_of;
use kms_authz::Purpose;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::{
    frame::unprotect::{ReceivedContent, ReceivedFrame},
    frame::{self, FrameOutcome, FrameService, PlainContent},
    request_digest::request_digest,
};

/// The service over gRPC.
pub(crate) struct FrameApi {
    island: Arc<IslandContext>,
    service: FrameService,
}

impl FrameApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: FrameService::new(island.clone()), island }
    }
}

#[tonic::async_trait]
impl Rpc for FrameApi {
    async fn protect(&self, request: Request<ProtectRequest>) -> Result<Response<ProtectResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let message = request.into_inner();
        let digest = request_digest(&[
            b"Protect",
            &ProtectRequest { request_id: bytes::Bytes::new(), ..message.clone() }.encode_to_vec(),
        ]);
        let request = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let purpose = Purpose::from_proto(message.purpose).map_err(ServiceError::parse("purpose"))?;
        check_count(message.frames.len())?;
        let frames = message
            .frames
            .into_iter()
            .enumerate()
            .map(|(number, frame)| parse_plain(number, frame))
            .collect::<Result<Vec<_>, _>>()?;
        let (outcomes, leaf) =
            self.service.protect(&caller, request, digest, purpose, frames, message.supersede_lease).await?;
        Ok(Response::new(ProtectResponse {
            results: outcomes.into_iter().map(result).collect(),
            audit_leaf: leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
        }))
    }

    async fn unprotect(&self, request: Request<UnprotectRequest>) -> Result<Response<UnprotectResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let message = request.into_inner();
        let purpose = Purpose::from_proto(message.purpose).map_err(ServiceError::parse("purpose"))?;
        check_count(message.frames.len())?;
        let frames = message
            .frames
            .into_iter()
            .enumerate()
            .map(|(number, frame)| parse_ciphered(number, frame))
            .collect::<Result<Vec<_>, _>>()?;
        let outcomes = self.service.unprotect(&caller, purpose, frames).await?;
        Ok(Response::new(UnprotectResponse { results: outcomes.into_iter().map(result).collect() }))
    }
}

fn parse_plain(number: usize, frame: PlainFrame) -> Result<frame::PlainFrame, ServiceError> {
    let field = |name: &str| format!("frames[{number}].{name}");
    let protection = match FrameProtection::try_from(frame.protection) {
        Ok(FrameProtection::Unspecified | FrameProtection::AuthenticatedEncrypted) => {
            Protection::AuthenticatedEncrypted
        }
        Ok(FrameProtection::Authenticated) => Protection::Authenticated,
        Err(_) => {
            return Err(ServiceError::invalid(
                field("protection"),
                format!("`{}` is not a protection", frame.protection),
            ));
        }
    };
    let content = match (frame.apdu.is_empty(), frame.hls_challenge.len()) {
        (true, 8..=64) => PlainContent::Challenge(frame.hls_challenge.to_vec()),
        (true, 0) => {
            return Err(ServiceError::invalid(
                field("apdu"),
                "it is empty and there is no `hls_challenge`: give one of them",
            ));
        }
        (true, length) => {
            return Err(ServiceError::invalid(
                field("hls_challenge"),
                format!("{length} octets; a challenge has 8 to 64"),
            ));
        }
        (false, 0) => {
            let general = match FrameForm::try_from(frame.form) {
                Ok(FrameForm::Glo) => false,
                Ok(FrameForm::GeneralGlo) => true,
                _ => return Err(ServiceError::invalid(field("form"), "it is neither GLO nor GENERAL_GLO")),
            };
            PlainContent::Apdu { apdu: frame.apdu.to_vec(), general }
        }
        (false, _) => {
            return Err(ServiceError::invalid(field("hls_challenge"), "an `apdu` is given too: give one of them"));
        }
    };
    Ok(frame::PlainFrame {
        meter: SystemTitle::from_octets(&frame.meter).map_err(ServiceError::parse(field("meter")))?,
        setup: parse_setup(&field("security_setup"), &frame.security_setup)?,
        client_title: SystemTitle::from_octets(&frame.client_title)
            .map_err(ServiceError::parse(field("client_title")))?,
        protection,
        content,
    })
}

fn parse_ciphered(number: usize, frame: CipheredFrame) -> Result<ReceivedFrame, ServiceError> {
    let field = |name: &str| format!("frames[{number}].{name}");
    let content = match (frame.apdu.is_empty(), frame.hls_response.is_empty()) {
        (false, true) => ReceivedContent::Apdu(frame.apdu.to_vec()),
        (true, false) if (8..=64).contains(&frame.hls_challenge.len()) => ReceivedContent::HlsResponse {
            response: frame.hls_response.to_vec(),
            challenge: frame.hls_challenge.to_vec(),
        },
        (true, false) => {
            return Err(ServiceError::invalid(
                field("hls_challenge"),
                format!("{} octets; a challenge has 8 to 64", frame.hls_challenge.len()),
            ));
        }
        _ => return Err(ServiceError::invalid(field("apdu"), "give either an `apdu` or an `hls_response`")),
    };
    Ok(ReceivedFrame {
        meter: SystemTitle::from_octets(&frame.meter).map_err(ServiceError::parse(field("meter")))?,
        setup: parse_setup(&field("security_setup"), &frame.security_setup)?,
        content,
    })
}

fn result(outcome: FrameOutcome) -> FrameResult {
    let result = match outcome.octets {
        Ok(octets) => Outcome::Apdu(octets.into()),
        Err(error) => Outcome::Refusal(FrameRefusal {
            code: error.code(),
            message: error.to_string(),
            reason: error.reason().to_owned(),
        }),
    };
    FrameResult { result: Some(result), invocation_counter: outcome.counter }
}

fn check_count(frames: usize) -> Result<(), ServiceError> {
    if !(1..=MOST_FRAMES).contains(&frames) {
        return Err(ServiceError::invalid("frames", format!("{frames} frames; a request has 1 to {MOST_FRAMES}")));
    }
    Ok(())
}

const MOST_FRAMES: usize = 1_000;
