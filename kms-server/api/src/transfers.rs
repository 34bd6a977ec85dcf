//! `meterkms.v1.TransferService`.

use std::{collections::HashSet, sync::Arc};

use kms_domain::{CampaignId, CampaignTask, Finding, KeyType, RequestId, SystemTitle, TransferForm, TransferId};
use kms_proto::v1::{
    self, BeginTransfersRequest, BeginTransfersResponse, ContinueTransfersRequest, ContinueTransfersResponse, HeldKey,
    TransferEnd, TransferRefusal, TransferSend, TransferStep, WithdrawTransfersRequest, WithdrawTransfersResponse,
    transfer_report, transfer_send::Kind, transfer_service_server::TransferService as Rpc, transfer_step::Next,
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::parse::parse_setup;
use crate::peer::caller_of;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::{
    request_digest::request_digest,
    transfer::{NextStep, Order, Report, ReportedAnswer, Sending, SendingKind, StepAnswer, TransferService},
};

/// The service over gRPC.
pub(crate) struct TransferApi {
    island: Arc<IslandContext>,
    service: TransferService,
}

impl TransferApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: TransferService::new(island.clone()), island }
    }
}

#[tonic::async_trait]
impl Rpc for TransferApi {
    async fn begin_transfers(
        &self,
        request: Request<BeginTransfersRequest>,
    ) -> Result<Response<BeginTransfersResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let message = request.into_inner();
        let digest = request_digest(&[
            b"BeginTransfers",
            &BeginTransfersRequest { request_id: bytes::Bytes::new(), ..message.clone() }.encode_to_vec(),
        ]);
        let request = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let orders = message
            .orders
            .into_iter()
            .enumerate()
            .map(|(number, order)| Self::order(number, order))
            .collect::<Result<Vec<_>, _>>()?;
        check_meters("orders", orders.iter().map(|order| order.meter))?;
        let (steps, leaf) = self.service.begin(&caller, request, digest, orders).await?;
        Ok(Response::new(BeginTransfersResponse {
            steps: steps.into_iter().map(step).collect(),
            audit_leaf: leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
        }))
    }

    async fn continue_transfers(
        &self,
        request: Request<ContinueTransfersRequest>,
    ) -> Result<Response<ContinueTransfersResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let reports = request
            .into_inner()
            .reports
            .into_iter()
            .enumerate()
            .map(|(number, report)| parse_report(number, report))
            .collect::<Result<Vec<_>, _>>()?;
        check_meters("reports", reports.iter().map(|report| report.meter))?;
        let (steps, leaf) = self.service.proceed(&caller, reports).await?;
        Ok(Response::new(ContinueTransfersResponse {
            steps: steps.into_iter().map(step).collect(),
            audit_leaf: leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
        }))
    }

    async fn withdraw_transfers(
        &self,
        request: Request<WithdrawTransfersRequest>,
    ) -> Result<Response<WithdrawTransfersResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let message = request.into_inner();
        let request = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        if message.reason.len() > LONGEST_REASON {
            return Err(ServiceError::invalid("reason", format!("it is longer than {LONGEST_REASON} octets")).into());
        }
        let transfers = message
            .transfers
            .into_iter()
            .enumerate()
            .map(|(number, transfer)| {
                let field = |name: &str| format!("transfers[{number}].{name}");
                let meter = SystemTitle::from_octets(&transfer.meter).map_err(ServiceError::parse(field("meter")))?;
                Ok((
                    meter,
                    TransferId::from_octets(&transfer.transfer_id)
                        .map_err(ServiceError::parse(field("transfer_id")))?,
                ))
            })
            .collect::<Result<Vec<_>, ServiceError>>()?;
        check_meters("transfers", transfers.iter().map(|(meter, _)| *meter))?;
        let steps = self.service.withdraw(&caller, request, transfers, message.reason).await?;
        Ok(Response::new(WithdrawTransfersResponse { steps: steps.into_iter().map(step).collect() }))
    }
}

impl TransferApi {
    fn order(number: usize, order: v1::TransferOrder) -> Result<Order, ServiceError> {
        let field = |name: &str| format!("orders[{number}].{name}");
        let key_type = match order.key_type.as_str() {
            "" => None,
            name => match KeyType::parse(name).map_err(ServiceError::parse(field("key_type")))? {
                // The device profile says which of these a meter accepts (IEC 62056-6-2, class 64,
                // method 2).
                known if known.is_transferable() => Some(known),
                other => {
                    let reason = format!(
                        "`key_transfer` carries wrapped AES keys, not a {other}: secrets and dedicated keys would leave the HSM in plaintext (I1)"
                    );
                    return Err(ServiceError::invalid(field("key_type"), reason));
                }
            },
        };
        let form = match v1::TransferForm::try_from(order.form) {
            Ok(v1::TransferForm::WrappedKey) => TransferForm::WrappedKey,
            Ok(v1::TransferForm::Frames) => TransferForm::Frames,
            _ => return Err(ServiceError::invalid(field("form"), "it is neither WRAPPED_KEY nor FRAMES")),
        };
        let lifetime_seconds = match order.lifetime_seconds {
            0 => DEFAULT_LIFETIME_SECONDS,
            seconds if seconds <= LONGEST_LIFETIME_SECONDS => seconds,
            seconds => {
                return Err(ServiceError::invalid(
                    field("lifetime_seconds"),
                    format!("`{seconds}` is above {LONGEST_LIFETIME_SECONDS}"),
                ));
            }
        };
        let task = match (order.campaign_id.is_empty(), order.fence) {
            (true, 0) => None,
            (true, _) => return Err(ServiceError::invalid(field("fence"), "a fencing token needs `campaign_id`")),
            (false, fence) => {
                let campaign =
                    CampaignId::from_octets(&order.campaign_id).map_err(ServiceError::parse(field("campaign_id")))?;
                Some(CampaignTask { campaign, fence })
            }
        };
        Ok(Order {
            meter: SystemTitle::from_octets(&order.meter).map_err(ServiceError::parse(field("meter")))?,
            setup: parse_setup(&field("security_setup"), &order.security_setup)?,
            key_type,
            client_title: SystemTitle::from_octets(&order.client_title)
                .map_err(ServiceError::parse(field("client_title")))?,
            form,
            urgent: order.urgent,
            lifetime_seconds,
            task,
        })
    }
}

fn parse_report(number: usize, report: v1::TransferReport) -> Result<Report, ServiceError> {
    let field = |name: &str| format!("reports[{number}].{name}");
    let answer = match report.answer {
        Some(transfer_report::Answer::Apdu(apdu)) if apdu.is_empty() => {
            return Err(ServiceError::invalid(field("apdu"), "it is empty: report `nothing` instead"));
        }
        Some(transfer_report::Answer::Apdu(apdu)) if apdu.len() > kms_dlms::LONGEST_APDU => {
            return Err(ServiceError::invalid(
                field("apdu"),
                format!("it is longer than {} octets", kms_dlms::LONGEST_APDU),
            ));
        }
        Some(transfer_report::Answer::Apdu(apdu)) => ReportedAnswer::Apdu(apdu.to_vec()),
        Some(transfer_report::Answer::Nothing(true)) => ReportedAnswer::Nothing,
        Some(transfer_report::Answer::Attested(holds)) => ReportedAnswer::Attested(holds),
        _ => {
            return Err(ServiceError::invalid(
                field("answer"),
                "it is missing: give the answer that came, or set `nothing`",
            ));
        }
    };
    if report.step == 0 {
        return Err(ServiceError::invalid(field("step"), "steps count from 1"));
    }
    Ok(Report {
        meter: SystemTitle::from_octets(&report.meter).map_err(ServiceError::parse(field("meter")))?,
        id: TransferId::from_octets(&report.transfer_id).map_err(ServiceError::parse(field("transfer_id")))?,
        step: report.step,
        answer,
    })
}

fn step(answer: StepAnswer) -> TransferStep {
    let next = match answer.next {
        Err(error) => Next::Refusal(TransferRefusal { code: error.code(), message: error.to_string() }),
        Ok(NextStep::End { outcome, findings }) => Next::End(TransferEnd {
            outcome: outcome.name().to_owned(),
            held: findings.iter().filter_map(held).collect(),
        }),
        Ok(NextStep::Send(sending)) => Next::Send(send(*sending)),
    };
    let (transfer_id, step) =
        answer.transfer.map_or_else(Default::default, |(id, step)| (id.octets().to_vec().into(), step));
    TransferStep { meter: answer.meter.octets().to_vec().into(), transfer_id, step, next: Some(next) }
}

fn send(sending: Sending) -> TransferSend {
    let kind = match sending.kind {
        SendingKind::Associate => Kind::Associate,
        SendingKind::Authenticate => Kind::Authenticate,
        SendingKind::Deliver => Kind::Deliver,
    };
    let mut message = TransferSend {
        kind: kind.into(),
        apdu: sending.apdu.into(),
        client_sap: sending.client_sap.into(),
        ..TransferSend::default()
    };
    if let Some(delivery) = sending.delivery {
        message.key_type = delivery.key_type.to_string();
        message.key_version = delivery.version.number();
        message.wrapped_key = delivery.wrapped.into();
        message.key_transfer_argument = delivery.argument.into();
    }
    message
}

fn held(finding: &Finding) -> Option<HeldKey> {
    match finding {
        Finding::Held { key_type, version, evidence, confirmation } => Some(HeldKey {
            key_type: key_type.to_string(),
            version: version.number(),
            evidence: evidence.name().to_owned(),
            active: matches!(confirmation, kms_domain::Confirmation::Activated | kms_domain::Confirmation::Active),
        }),
        Finding::SharedAcknowledged { key_type, version, .. } => Some(HeldKey {
            key_type: key_type.to_string(),
            version: version.number(),
            evidence: kms_domain::Evidence::Acknowledged.name().to_owned(),
            active: true,
        }),
        Finding::MeterCounterBackwards { .. } => None,
    }
}

fn check_meters(field: &str, meters: impl ExactSizeIterator<Item = SystemTitle>) -> Result<(), ServiceError> {
    match meters.len() {
        0 => return Err(ServiceError::invalid(field, "it is empty")),
        count if count > MOST_METERS => {
            return Err(ServiceError::invalid(field, format!("{count} entries; at most {MOST_METERS}")));
        }
        _ => {}
    }
    let mut seen = HashSet::new();
    for (number, meter) in meters.enumerate() {
        if !seen.insert(meter) {
            return Err(ServiceError::invalid(format!("{field}[{number}].meter"), "this meter occurs twice"));
        }
    }
    Ok(())
}

const MOST_METERS: usize = 1_000;
const LONGEST_REASON: usize = 500;
const DEFAULT_LIFETIME_SECONDS: u32 = 3_600;
const LONGEST_LIFETIME_SECONDS: u32 = 7 * 86_400;
