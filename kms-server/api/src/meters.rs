//! `meterkms.v1.MeterService`.

use std::sync::Arc;

use kms_domain::{
    DeviceProfileName, FlagId, KeyType, KeyVersionNumber, MeterStatus, Party, PrincipalId, Quorum, SecuritySetupId,
    SystemTitle, check_batch, check_serial,
};
use kms_proto::v1::{self, meter_service_server::MeterService as Rpc};
use tonic::{Response, Status};

use crate::parse::{self, parse_group_name, parse_optional_reason, parse_setup};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::meter::{
    Assignment, Compromise, CounterFloor, CounterRaise, Enrolment, Filter, MeterService, NewMeter, Selection,
};

/// The service over gRPC.
pub(crate) struct MeterApi {
    island: Arc<IslandContext>,
    service: MeterService,
}

impl MeterApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: MeterService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &tonic::Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for MeterApi {
    async fn list_meters(
        &self,
        request: tonic::Request<v1::ListMetersRequest>,
    ) -> Result<Response<v1::ListMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let filter = parse_filter(message.filter.unwrap_or_default(), "filter")?;
        let after = match message.page_token.len() {
            0 => None,
            _ => Some(SystemTitle::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let limit = match message.page_size {
            0 => DEFAULT_PAGE,
            size => size.min(LARGEST_PAGE),
        };
        let page = self.service.list(&caller, filter, after, limit).await?;
        let next_page_token = page.next.map(|title| title.octets().to_vec().into()).unwrap_or_default();
        Ok(Response::new(v1::ListMetersResponse { meters: page.meters, next_page_token, total: page.total }))
    }

    async fn show_meter(&self, request: tonic::Request<v1::ShowMeterRequest>) -> Result<Response<v1::Meter>, Status> {
        let caller = self.caller(&request)?;
        let title = SystemTitle::from_octets(&request.into_inner().meter).map_err(ServiceError::parse("meter"))?;
        Ok(Response::new(self.service.show(&caller, title).await?))
    }

    async fn assign_meters(
        &self,
        request: tonic::Request<v1::AssignMetersRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::AssignMetersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"AssignMeters", &same)?;
        let selection = match (message.meters.is_empty(), message.filter) {
            (false, None) => Selection::Meters(parse_meters(&message.meters)?),
            (true, Some(filter)) => Selection::Filter(parse_filter(filter, "filter")?),
            (false, Some(_)) => {
                return Err(
                    ServiceError::invalid("filter", "meters are named too: give either `meters` or `filter`").into()
                );
            }
            (true, None) => {
                return Err(ServiceError::invalid(
                    "meters",
                    "no meter is named and there is no filter: give one of them",
                )
                .into());
            }
        };
        let head_end = parse_principal(&message.head_end, "head_end")?;
        let assignment = Assignment { selection, head_end, dry_run: message.dry_run };
        Ok(Response::new(self.service.assign(&caller, request, assignment).await?))
    }

    async fn adopt_counters(
        &self,
        request: tonic::Request<v1::AdoptCountersRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::AdoptCountersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"AdoptCounters", &same)?;
        bounded(message.floors.len(), "floors")?;
        let floors = message
            .floors
            .iter()
            .enumerate()
            .map(|(index, floor)| parse_floor(floor, index))
            .collect::<Result<_, _>>()?;
        Ok(Response::new(self.service.adopt(&caller, request, floors).await?))
    }

    async fn propose_counter_raise(
        &self,
        request: tonic::Request<v1::ProposeCounterRaiseRequest>,
    ) -> Result<Response<v1::Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ProposeCounterRaiseRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ProposeCounterRaise", &same)?;
        let key_type = match message.key_type.as_str() {
            "" => KeyType::GUEK,
            name => KeyType::parse(name).map_err(ServiceError::parse("key_type"))?,
        };
        if ![KeyType::GUEK, KeyType::GBEK].contains(&key_type) {
            return Err(ServiceError::invalid(
                "key_type",
                format!("a {key_type} has no invocation counter; only a GUEK or a GBEK has one"),
            )
            .into());
        }
        let version = Some(message.key_version).filter(|version| *version > 0).map(KeyVersionNumber::new).transpose();
        let raise = CounterRaise {
            meter: SystemTitle::from_octets(&message.meter).map_err(ServiceError::parse("meter"))?,
            setup: parse_setup("security_setup", &message.security_setup)?,
            key_type,
            version: version.map_err(ServiceError::parse("key_version"))?,
            client_title: SystemTitle::from_octets(&message.client_title)
                .map_err(ServiceError::parse("client_title"))?,
            to: message.to,
            reason: parse_optional_reason(message.reason)?,
            quorum: message.quorum.map_or(Ok(Quorum::ONE), Quorum::new).map_err(ServiceError::parse("quorum"))?,
        };
        Ok(Response::new(self.service.propose_raise(&caller, request, raise).await?))
    }

    async fn report_compromise(
        &self,
        request: tonic::Request<v1::ReportCompromiseRequest>,
    ) -> Result<Response<v1::Meter>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ReportCompromiseRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ReportCompromise", &same)?;
        if message.reason.trim().is_empty() {
            return Err(ServiceError::invalid("reason", "it is empty: the audit record must say why").into());
        }
        let compromise = Compromise {
            meter: SystemTitle::from_octets(&message.meter).map_err(ServiceError::parse("meter"))?,
            setup: parse_setup("security_setup", &message.security_setup)?,
            key_type: KeyType::parse(&message.key_type).map_err(ServiceError::parse("key_type"))?,
            version: KeyVersionNumber::new(message.key_version).map_err(ServiceError::parse("key_version"))?,
            known_to: match message.known_to.as_str() {
                "" | "anyone" => Party::Anyone,
                "vendor" => Party::Vendor,
                uri => PrincipalId::parse(uri).map(Party::Principal).map_err(ServiceError::parse("known_to"))?,
            },
            reason: parse_optional_reason(message.reason)?,
        };
        Ok(Response::new(self.service.report_compromise(&caller, request, compromise).await?))
    }

    async fn enrol_meters(
        &self,
        request: tonic::Request<v1::EnrolMetersRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::EnrolMetersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"EnrolMeters", &same)?;
        bounded(message.meters.len(), "meters")?;
        check_batch(&message.batch).map_err(ServiceError::parse("batch"))?;
        let mut meters: Vec<NewMeter> = Vec::with_capacity(message.meters.len());
        let mut titles = std::collections::HashSet::with_capacity(message.meters.len());
        for (index, meter) in message.meters.iter().enumerate() {
            let meter = parse_new_meter(meter, index)?;
            if !titles.insert(meter.title) {
                return Err(ServiceError::invalid(format!("meters[{index}].meter"), "it occurs twice").into());
            }
            meters.push(meter);
        }
        let enrolment = Enrolment {
            manufacturer: FlagId::parse(&message.manufacturer).map_err(ServiceError::parse("manufacturer"))?,
            device_profile: DeviceProfileName::parse(&message.device_profile)
                .map_err(ServiceError::parse("device_profile"))?,
            batch: message.batch,
            meters,
        };
        Ok(Response::new(self.service.enrol(&caller, request, enrolment).await?))
    }

    async fn retire_meters(
        &self,
        request: tonic::Request<v1::RetireMetersRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::RetireMetersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"RetireMeters", &same)?;
        let meters = parse_meters(&message.meters)?;
        Ok(Response::new(self.service.retire(&caller, request, meters, parse_optional_reason(message.reason)?).await?))
    }

    async fn replace_meter(
        &self,
        request: tonic::Request<v1::ReplaceMeterRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ReplaceMeterRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ReplaceMeter", &same)?;
        let old = SystemTitle::from_octets(&message.old_meter).map_err(ServiceError::parse("old_meter"))?;
        let new = SystemTitle::from_octets(&message.new_meter).map_err(ServiceError::parse("new_meter"))?;
        Ok(Response::new(
            self.service.replace(&caller, request, old, new, parse_optional_reason(message.reason)?).await?,
        ))
    }
}

fn parse_filter(filter: v1::MeterFilter, field: &str) -> Result<Filter, ServiceError> {
    let named = |name: &str| format!("{field}.{name}");
    let given = |text: &str| !text.is_empty();
    check_batch(&filter.batch).map_err(ServiceError::parse(named("batch")))?;
    Ok(Filter {
        manufacturer: given(&filter.manufacturer)
            .then(|| FlagId::parse(&filter.manufacturer).map_err(ServiceError::parse(named("manufacturer"))))
            .transpose()?,
        device_profile: given(&filter.device_profile)
            .then(|| {
                DeviceProfileName::parse(&filter.device_profile).map_err(ServiceError::parse(named("device_profile")))
            })
            .transpose()?,
        status: given(&filter.status)
            .then(|| MeterStatus::parse(&filter.status).map_err(ServiceError::parse(named("status"))))
            .transpose()?,
        head_end: match filter.head_end.as_str() {
            "" => None,
            NO_HEAD_END => Some(None),
            uri => Some(Some(PrincipalId::parse(uri).map_err(ServiceError::parse(named("head_end")))?)),
        },
        batch: Some(filter.batch).filter(|batch| !batch.is_empty()),
    })
}

fn parse_meters(meters: &[bytes::Bytes]) -> Result<Vec<SystemTitle>, ServiceError> {
    bounded(meters.len(), "meters")?;
    let mut known = std::collections::HashSet::with_capacity(meters.len());
    let mut titles = Vec::with_capacity(meters.len());
    for (index, octets) in meters.iter().enumerate() {
        let title = SystemTitle::from_octets(octets).map_err(ServiceError::parse(format!("meters[{index}]")))?;
        if !known.insert(title) {
            return Err(ServiceError::invalid(format!("meters[{index}]"), "it occurs twice"));
        }
        titles.push(title);
    }
    Ok(titles)
}

fn bounded(count: usize, field: &str) -> Result<(), ServiceError> {
    if (1..=MeterService::MOST_METERS).contains(&count) {
        return Ok(());
    }
    Err(ServiceError::invalid(field, format!("{count} entries; a request has 1 to {}", MeterService::MOST_METERS)))
}

fn parse_floor(floor: &v1::CounterFloor, index: usize) -> Result<CounterFloor, ServiceError> {
    let field = |name: &str| format!("floors[{index}].{name}");
    Ok(CounterFloor {
        meter: SystemTitle::from_octets(&floor.meter).map_err(ServiceError::parse(field("meter")))?,
        setup: parse_setup(&field("security_setup"), &floor.security_setup)?.unwrap_or(SecuritySetupId::DEFAULT),
        client_title: SystemTitle::from_octets(&floor.client_title)
            .map_err(ServiceError::parse(field("client_title")))?,
        floor: floor.floor,
        owned_by: parse_principal(&floor.owned_by, &field("owned_by"))?,
    })
}

fn parse_new_meter(meter: &v1::NewMeter, index: usize) -> Result<NewMeter, ServiceError> {
    let field = |name: &str| format!("meters[{index}].{name}");
    check_serial(&meter.serial).map_err(ServiceError::parse(field("serial")))?;
    if meter.groups.len() > MOST_GROUPS {
        return Err(ServiceError::invalid(
            field("groups"),
            format!("{} groups; at most {MOST_GROUPS}", meter.groups.len()),
        ));
    }
    for (at, group) in meter.groups.iter().enumerate() {
        parse_group_name(group.clone(), &field(&format!("groups[{at}]")))?;
        if meter.groups.iter().take(at).any(|earlier| earlier == group) {
            return Err(ServiceError::invalid(field(&format!("groups[{at}]")), "it occurs twice"));
        }
    }
    Ok(NewMeter {
        title: SystemTitle::from_octets(&meter.meter).map_err(ServiceError::parse(field("meter")))?,
        serial: meter.serial.clone(),
        groups: meter.groups.clone(),
    })
}

fn parse_principal(uri: &str, field: &str) -> Result<Option<PrincipalId>, ServiceError> {
    match uri {
        "" => Ok(None),
        uri => Ok(Some(PrincipalId::parse(uri).map_err(ServiceError::parse(field))?)),
    }
}

/// Finds meters that are assigned to no head-end.
const NO_HEAD_END: &str = "none";
const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;
const MOST_GROUPS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        let field = |error: ServiceError| match error {
            ServiceError::InvalidArgument { field, .. } => field,
            other => panic!("{other}"),
        };
        for (expected, filter) in [
            ("filter.manufacturer", v1::MeterFilter { manufacturer: "kam".into(), ..Default::default() }),
            ("filter.device_profile", v1::MeterFilter { device_profile: "?".into(), ..Default::default() }),
            ("filter.status", v1::MeterFilter { status: "lost".into(), ..Default::default() }),
            ("filter.head_end", v1::MeterFilter { head_end: "hes".into(), ..Default::default() }),
            ("filter.batch", v1::MeterFilter { batch: "a\nb".into(), ..Default::default() }),
        ] {
            assert_eq!(field(parse_filter(filter, "filter").unwrap_err()), expected);
        }
        assert_eq!(
            parse_filter(v1::MeterFilter { head_end: NO_HEAD_END.into(), ..Default::default() }, "filter")
                .unwrap()
                .head_end,
            Some(None)
        );

        let title = bytes::Bytes::from_static(b"KAM\0\0\0\0\x01");
        assert_eq!(field(parse_meters(&[]).unwrap_err()), "meters");
        assert_eq!(field(parse_meters(&[title.clone(), title.clone()]).unwrap_err()), "meters[1]");
        assert_eq!(field(parse_meters(&[bytes::Bytes::from_static(b"KAM")]).unwrap_err()), "meters[0]");
        assert_eq!(field(parse_meters(&vec![title.clone(); MeterService::MOST_METERS + 1]).unwrap_err()), "meters");

        let good = v1::NewMeter { meter: title.clone(), serial: "1".into(), groups: vec!["north".into()] };
        assert!(parse_new_meter(&good, 0).is_ok());
        for (expected, meter) in [
            ("meters[3].meter", v1::NewMeter { meter: Default::default(), ..good.clone() }),
            ("meters[3].serial", v1::NewMeter { serial: String::new(), ..good.clone() }),
            ("meters[3].groups[0]", v1::NewMeter { groups: vec!["North".into()], ..good.clone() }),
            ("meters[3].groups[1]", v1::NewMeter { groups: vec!["north".into(), "north".into()], ..good.clone() }),
            ("meters[3].groups", v1::NewMeter { groups: vec!["north".into(); 65], ..good.clone() }),
        ] {
            assert_eq!(field(parse_new_meter(&meter, 3).unwrap_err()), expected);
        }

        let floor = v1::CounterFloor { meter: title.clone(), client_title: title, ..Default::default() };
        assert_eq!(parse_floor(&floor, 0).unwrap().setup, SecuritySetupId::DEFAULT);
        for (expected, floor) in [
            ("floors[0].meter", v1::CounterFloor { meter: Default::default(), ..floor.clone() }),
            (
                "floors[0].security_setup",
                v1::CounterFloor { security_setup: vec![1, 0, 43, 0, 0, 255].into(), ..floor.clone() },
            ),
            ("floors[0].client_title", v1::CounterFloor { client_title: vec![0; 9].into(), ..floor.clone() }),
            ("floors[0].owned_by", v1::CounterFloor { owned_by: "x".into(), ..floor.clone() }),
        ] {
            assert_eq!(field(parse_floor(&floor, 0).unwrap_err()), expected);
        }
    }
}
