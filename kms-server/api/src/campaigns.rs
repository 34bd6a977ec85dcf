//! `meterkms.v1.CampaignService` and `meterkms.v1.TaskService`.

use std::{
    num::{NonZeroU8, NonZeroU32},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt};
use kms_domain::{
    CampaignAction, CampaignId, CampaignName, CampaignSelection, CampaignTerms, DeviceProfileName, ExposureReason,
    FlagId, KeyType, MaintenanceWindow, MaintenanceWindows, ParseError, Party, PrincipalId, Quorum, SystemTitle,
    TaskState, WaveSize,
};
use kms_proto::v1::{
    AcceptanceReport, ApproveCampaignRequest, Campaign, CampaignPlan, CampaignProgress, CampaignReport,
    ChangeCampaignRequest, CreateCampaignRequest, CreateCampaignResponse, HeartbeatTasksRequest,
    HeartbeatTasksResponse, LeaseTasksRequest, LeaseTasksResponse, ListCampaignsRequest, ListCampaignsResponse,
    ReleaseTasksRequest, ReleaseTasksResponse, ReportAcceptanceRequest, ReportCampaignRequest, ShowCampaignRequest,
    TaskLease as TaskLeaseMessage, WatchCampaignRequest,
    campaign_service_server::CampaignService as CampaignRpc,
    task_service_server::TaskService as TaskRpc,
    {self as v1},
};
use kms_store::TaskFilter;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_reason, parse_setup};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::campaign::{
    CampaignChange, CampaignService, LeaseQuery, NewCampaign, PlanPlace, ReportQuery, TaskLease, days_before,
};
use kms_service::island::IslandContext;

/// Both services over gRPC.
#[derive(Clone)]
pub(crate) struct CampaignApi {
    island: Arc<IslandContext>,
    service: CampaignService,
}

impl CampaignApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: CampaignService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }

    async fn change(
        &self,
        caller: Caller,
        message: ChangeCampaignRequest,
        name: &[u8],
        change: CampaignChange,
    ) -> Result<Response<Campaign>, Status> {
        let request = parse::request(
            &message.request_id,
            name,
            &ChangeCampaignRequest { request_id: bytes::Bytes::new(), ..message.clone() },
        )?;
        Ok(Response::new(self.service.change(&caller, request, campaign_id(&message.campaign_id)?, change).await?))
    }
}

#[tonic::async_trait]
impl CampaignRpc for CampaignApi {
    async fn create_campaign(
        &self,
        request: Request<CreateCampaignRequest>,
    ) -> Result<Response<CreateCampaignResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = CreateCampaignRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CreateCampaign", &same)?;
        let plan = message.plan.ok_or_else(|| ServiceError::invalid("plan", "it is missing"))?;
        let group = plan.selection.as_ref().map(|selection| selection.group.clone()).filter(|group| !group.is_empty());
        let mut new = parse_plan(plan)?;
        if let Some(group) = group {
            self.island.require(&caller, &kms_authz::Action::CreateCampaign).await?;
            new.selection.group = Some(self.service.group(&group).await?);
        }
        Ok(Response::new(self.service.create(&caller, request, new, message.commit).await?))
    }

    async fn list_campaigns(
        &self,
        request: Request<ListCampaignsRequest>,
    ) -> Result<Response<ListCampaignsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let before = match message.page_token.len() {
            0 => None,
            _ => Some(CampaignId::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let page = page_size(message.page_size);
        let campaigns = self.service.list(&caller, before, page).await?;
        let next_page_token = if campaigns.len() == page {
            campaigns.last().map(|campaign| campaign.campaign_id.clone()).unwrap_or_default()
        } else {
            bytes::Bytes::new()
        };
        Ok(Response::new(ListCampaignsResponse { campaigns, next_page_token }))
    }

    async fn show_campaign(&self, request: Request<ShowCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.service.show(&caller, campaign_id(&request.into_inner().campaign_id)?).await?))
    }

    async fn approve_campaign(&self, request: Request<ApproveCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let content_sha256 = <[u8; 32]>::try_from(message.content_sha256.as_ref()).map_err(|_| {
            ServiceError::invalid("content_sha256", format!("{} octets instead of 32", message.content_sha256.len()))
        })?;
        let same = ApproveCampaignRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ApproveCampaign", &same)?;
        let campaign = self.service.change(
            &caller,
            request,
            campaign_id(&message.campaign_id)?,
            CampaignChange::Approve { content_sha256 },
        );
        Ok(Response::new(campaign.await?))
    }

    async fn start_campaign(&self, request: Request<ChangeCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        self.change(caller, request.into_inner(), b"StartCampaign", CampaignChange::Start).await
    }

    async fn pause_campaign(&self, request: Request<ChangeCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let change = CampaignChange::Pause { reason: parse_reason(message.reason.clone())? };
        self.change(caller, message, b"PauseCampaign", change).await
    }

    async fn resume_campaign(&self, request: Request<ChangeCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let change = CampaignChange::Resume { reason: parse_reason(message.reason.clone())? };
        self.change(caller, message, b"ResumeCampaign", change).await
    }

    async fn abort_campaign(&self, request: Request<ChangeCampaignRequest>) -> Result<Response<Campaign>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let change = CampaignChange::Abort { reason: parse_reason(message.reason.clone())? };
        self.change(caller, message, b"AbortCampaign", change).await
    }

    type WatchCampaignStream = Pin<Box<dyn Stream<Item = Result<CampaignProgress, Status>> + Send>>;

    async fn watch_campaign(
        &self,
        request: Request<WatchCampaignRequest>,
    ) -> Result<Response<Self::WatchCampaignStream>, Status> {
        let caller = self.caller(&request)?;
        let watch = self.service.watch(&caller, campaign_id(&request.into_inner().campaign_id)?).await?;
        Ok(Response::new(Box::pin(
            ReceiverStream::new(watch.into_receiver()).map(|progress| progress.map_err(Status::from)),
        )))
    }

    async fn report_acceptance(
        &self,
        request: Request<ReportAcceptanceRequest>,
    ) -> Result<Response<AcceptanceReport>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let from = match message.page_token.as_ref().split_first_chunk::<8>() {
            None if message.page_token.is_empty() => PlanPlace::default(),
            Some((chunk, meter)) if meter.len() == 4 => PlanPlace {
                chunk: u64::from_be_bytes(*chunk),
                meter: meter.iter().fold(0, |sum, octet| (sum << 8) | usize::from(*octet)),
            },
            _ => return Err(ServiceError::invalid("page_token", "it is not from an answer of this method").into()),
        };
        let (meters, next) = self
            .service
            .acceptance(&caller, campaign_id(&message.campaign_id)?, from, page_size(message.page_size))
            .await?;
        let token = |place: PlanPlace| {
            [place.chunk.to_be_bytes().as_slice(), &u32::try_from(place.meter).unwrap_or(u32::MAX).to_be_bytes()]
                .concat()
        };
        Ok(Response::new(AcceptanceReport { meters, next_page_token: next.map(token).unwrap_or_default().into() }))
    }

    async fn report_campaign(
        &self,
        request: Request<ReportCampaignRequest>,
    ) -> Result<Response<CampaignReport>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let filter = match (message.state.as_str(), message.in_doubt) {
            ("", false) => TaskFilter::All,
            ("", true) => TaskFilter::InDoubt,
            (state, false) => TaskFilter::State(TaskState::parse(state).map_err(ServiceError::parse("state"))?),
            (_, true) => return Err(ServiceError::invalid("in_doubt", "give either `in_doubt` or `state`").into()),
        };
        let after = match message.page_token.len() {
            0 => None,
            _ => Some(SystemTitle::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let query =
            ReportQuery { filter, after, page: u32::try_from(page_size(message.page_size)).unwrap_or(u32::MAX) };
        Ok(Response::new(self.service.report(&caller, campaign_id(&message.campaign_id)?, query).await?))
    }
}

#[tonic::async_trait]
impl TaskRpc for CampaignApi {
    type LeaseTasksStream = Pin<Box<dyn Stream<Item = Result<LeaseTasksResponse, Status>> + Send>>;

    async fn lease_tasks(
        &self,
        request: Request<LeaseTasksRequest>,
    ) -> Result<Response<Self::LeaseTasksStream>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let query = LeaseQuery {
            campaign: match message.campaign_id.len() {
                0 => None,
                _ => Some(campaign_id(&message.campaign_id)?),
            },
            most: within("most", message.most, DEFAULT_MOST, MOST_LEASES)?,
            lease_ms: lease_ms(message.lease_seconds)?,
        };
        let first = LeaseTasksResponse { tasks: self.service.lease(&caller, query).await? };
        if !message.follow {
            return Ok(Response::new(Box::pin(futures::stream::iter([Ok(first)]))));
        }
        let (answers, receiver) = mpsc::channel(1);
        let service = self.service.clone();
        tokio::spawn(async move {
            let mut next = Ok(first);
            loop {
                let (failed, empty) =
                    (next.is_err(), next.as_ref().is_ok_and(|answer: &LeaseTasksResponse| answer.tasks.is_empty()));
                if !empty && answers.send(next).await.is_err() || failed {
                    return;
                }
                if empty {
                    tokio::select! {
                        () = answers.closed() => return,
                        () = tokio::time::sleep(LOOK_EVERY) => {}
                    }
                }
                // Nothing is leased before the caller has read the last answer. Revocation also
                // ends open streams.
                let Ok(room) = answers.reserve().await else { return };
                drop(room);
                next = if caller.not_after <= IslandContext::now() {
                    Err(ServiceError::unauthenticated("the client certificate has expired; renew it").into())
                } else {
                    service.lease(&caller, query).await.map(|tasks| LeaseTasksResponse { tasks }).map_err(Status::from)
                };
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn heartbeat_tasks(
        &self,
        request: Request<HeartbeatTasksRequest>,
    ) -> Result<Response<HeartbeatTasksResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let (until, lost) =
            self.service.heartbeat(&caller, parse_leases(&message.leases)?, lease_ms(message.lease_seconds)?).await?;
        Ok(Response::new(HeartbeatTasksResponse {
            lease_expires_ms: until.0,
            lost: lost.iter().map(lease_message).collect(),
        }))
    }

    async fn release_tasks(
        &self,
        request: Request<ReleaseTasksRequest>,
    ) -> Result<Response<ReleaseTasksResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        if message.reason.len() > 128 || message.reason.chars().any(char::is_control) {
            return Err(
                ServiceError::invalid("reason", "it is longer than 128 octets or has control characters").into()
            );
        }
        let lost = self.service.release(&caller, parse_leases(&message.leases)?, message.reason).await?;
        Ok(Response::new(ReleaseTasksResponse { lost: lost.iter().map(lease_message).collect() }))
    }
}

fn parse_plan(plan: CampaignPlan) -> Result<NewCampaign, ServiceError> {
    let action = match v1::CampaignAction::try_from(plan.action) {
        Ok(v1::CampaignAction::Rotate) => {
            let key_type = KeyType::parse(&plan.key_type).map_err(ServiceError::parse("plan.key_type"))?;
            CampaignAction::rotate(key_type).map_err(ServiceError::parse("plan.key_type"))?
        }
        Ok(v1::CampaignAction::Probe) => CampaignAction::Probe,
        Ok(v1::CampaignAction::TakeOver) => CampaignAction::TakeOver,
        Ok(v1::CampaignAction::Unspecified) | Err(_) => {
            return Err(ServiceError::invalid("plan.action", "it is missing or unknown"));
        }
    };
    if !matches!(action, CampaignAction::Rotate(_)) && !plan.key_type.is_empty() {
        return Err(ServiceError::invalid("plan.key_type", "only a rotation has a key type"));
    }
    let selection = plan.selection.unwrap_or_default();
    if selection.meters.len() > MOST_NAMED {
        return Err(ServiceError::invalid(
            "plan.selection.meters",
            format!("{} meters; at most {MOST_NAMED}", selection.meters.len()),
        ));
    }
    let named = (0..).zip(&selection.meters).map(|(number, title)| {
        SystemTitle::from_octets(title).map_err(ServiceError::parse(format!("plan.selection.meters[{number}]")))
    });
    Ok(NewCampaign {
        name: CampaignName::parse(&plan.name).map_err(ServiceError::parse("plan.name"))?,
        action,
        setup: parse_setup("plan.security_setup", &plan.security_setup)?,
        named: named.collect::<Result<_, _>>()?,
        selection: parse_selection(&selection)?,
        terms: parse_terms(plan.terms.unwrap_or_default())?,
    })
}

fn parse_selection(selection: &v1::CampaignSelection) -> Result<CampaignSelection, ServiceError> {
    fn given<T>(
        field: &str,
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, ParseError>,
    ) -> Result<Option<T>, ServiceError> {
        if text.is_empty() {
            Ok(None)
        } else {
            parse(text).map(Some).map_err(ServiceError::parse(format!("plan.selection.{field}")))
        }
    }
    let party = |text: &str| match text {
        "vendor" => Ok(Party::Vendor),
        "anyone" => Ok(Party::Anyone),
        uri => PrincipalId::parse(uri).map(Party::Principal),
    };
    let reason = |text: &str| {
        let known = ExposureReason::ALL.into_iter().find(|reason| reason.name() == text);
        known.ok_or_else(|| {
            ParseError::new("exposure reason", format!("`{}` is not an exposure reason", text.escape_debug()))
        })
    };
    Ok(CampaignSelection {
        whole_island: selection.whole_island,
        vendor: given("manufacturer", &selection.manufacturer, FlagId::parse)?,
        profile: given("device_profile", &selection.device_profile, DeviceProfileName::parse)?,
        group: None,
        head_end: given("head_end", &selection.head_end, PrincipalId::parse)?,
        batch: Some(selection.batch.clone()).filter(|batch| !batch.is_empty()),
        active_before: Some(selection.older_than_days)
            .filter(|days| *days > 0)
            .map(|days| days_before(days, IslandContext::now())),
        exposed_to: given("exposed_to", &selection.exposed_to, party)?,
        exposed_by: given("exposed_by", &selection.exposed_by, reason)?,
        imported: selection.imported,
        counter_used: match selection.counter_used_percent {
            0 => None,
            percent => Some(u8::try_from(percent).ok().filter(|percent| *percent <= 100).ok_or_else(|| {
                ServiceError::invalid("plan.selection.counter_used_percent", format!("`{percent}` is not 1 to 100"))
            })?),
        },
        named: 0,
    })
}

fn parse_terms(terms: v1::CampaignTerms) -> Result<CampaignTerms, ServiceError> {
    let small = |field: &str, value: u32, default: u8| match value {
        0 => Ok(default),
        value => u8::try_from(value).map_err(|_| ServiceError::invalid(field, format!("`{value}` is too large"))),
    };
    let windows = (0..).zip(&terms.windows).map(|(number, text)| {
        MaintenanceWindow::parse(text).map_err(ServiceError::parse(format!("plan.terms.windows[{number}]")))
    });
    let windows = windows.collect::<Result<Vec<_>, _>>()?;
    let zone = if terms.time_zone.is_empty() { "UTC" } else { terms.time_zone.as_str() };
    let waves = (0..).zip(&terms.waves).map(|(number, text)| {
        WaveSize::parse(text).map_err(ServiceError::parse(format!("plan.terms.waves[{number}]")))
    });
    let waves = waves.collect::<Result<Vec<_>, _>>()?;
    let parsed = CampaignTerms {
        quorum: terms.quorum.map_or(Ok(Quorum::ONE), Quorum::new).map_err(ServiceError::parse("plan.terms.quorum"))?,
        canary: terms.canary.unwrap_or(DEFAULT_CANARY),
        waves: if waves.is_empty() { vec![WaveSize::Percent(10)] } else { waves },
        success_threshold: small("plan.terms.success_threshold", terms.success_threshold, 95)?,
        failure_limit: terms.failure_limit.unwrap_or(10),
        windows: MaintenanceWindows::new(zone, windows).map_err(ServiceError::parse("plan.terms.windows"))?,
        starts_per_minute: NonZeroU32::new(terms.starts_per_minute),
        in_flight: NonZeroU32::new(terms.in_flight).or(NonZeroU32::new(1_000)).unwrap_or(NonZeroU32::MIN),
        attempts: NonZeroU8::new(small("plan.terms.attempts", terms.attempts, 5)?).unwrap_or(NonZeroU8::MIN),
        back_off_seconds: if terms.back_off_seconds == 0 { 300 } else { terms.back_off_seconds },
    };
    parsed.check().map_err(ServiceError::parse("plan.terms"))?;
    Ok(parsed)
}

fn parse_leases(leases: &[TaskLeaseMessage]) -> Result<Vec<TaskLease>, ServiceError> {
    if leases.is_empty() || leases.len() > MOST_LEASES as usize {
        return Err(ServiceError::invalid(
            "leases",
            format!("{} leases; a request has 1 to {MOST_LEASES}", leases.len()),
        ));
    }
    let parse = |(number, lease): (usize, &TaskLeaseMessage)| {
        Ok(TaskLease {
            campaign: CampaignId::from_octets(&lease.campaign_id)
                .map_err(ServiceError::parse(format!("leases[{number}].campaign_id")))?,
            meter: SystemTitle::from_octets(&lease.meter)
                .map_err(ServiceError::parse(format!("leases[{number}].meter")))?,
            fence: lease.fence,
        })
    };
    leases.iter().enumerate().map(parse).collect()
}

fn lease_message(lease: &TaskLease) -> TaskLeaseMessage {
    TaskLeaseMessage {
        campaign_id: lease.campaign.octets().to_vec().into(),
        meter: lease.meter.octets().to_vec().into(),
        fence: lease.fence,
    }
}

fn campaign_id(octets: &[u8]) -> Result<CampaignId, ServiceError> {
    CampaignId::from_octets(octets).map_err(ServiceError::parse("campaign_id"))
}

fn within(field: &str, value: u32, default: u32, most: u32) -> Result<u32, ServiceError> {
    match value {
        0 => Ok(default),
        value if value <= most => Ok(value),
        value => Err(ServiceError::invalid(field, format!("`{value}` is above {most}"))),
    }
}

fn lease_ms(seconds: u32) -> Result<i64, ServiceError> {
    Ok(i64::from(within("lease_seconds", seconds, DEFAULT_LEASE, LONGEST_LEASE)?) * 1_000)
}

fn page_size(asked: u32) -> usize {
    match asked {
        0 => DEFAULT_PAGE,
        size => usize::try_from(size).unwrap_or(LARGEST_PAGE).min(LARGEST_PAGE),
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(1);
const MOST_NAMED: usize = 100_000;
const DEFAULT_CANARY: u32 = 10;
const DEFAULT_MOST: u32 = 100;
const MOST_LEASES: u32 = 1_000;
const DEFAULT_LEASE: u32 = 120;
const LONGEST_LEASE: u32 = 3_600;
const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;
