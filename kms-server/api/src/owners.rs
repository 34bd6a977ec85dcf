//! `meterkms.v1.GroupService` and `meterkms.v1.DeviceTypeService`.

use std::sync::Arc;

use kms_domain::{
    DeviceProfileName, FlagId, GroupId, KeyType, KeyVersionNumber, RequestId, SecuritySetupId, SwitchThreshold,
    SystemTitle,
};
use kms_proto::v1::{self, device_type_service_server::DeviceTypeService, group_service_server::GroupService};
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_group_name, parse_setup};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::{
    meter::{Membership, MeterService},
    owner::{NamedGroupKey, NewDeviceType, NewOwnerKey, OwnerService, Switch},
};

/// Both services over gRPC. Clones share the cache of groups.
#[derive(Clone)]
pub(crate) struct OwnerApi {
    island: Arc<IslandContext>,
    service: OwnerService,
    meters: MeterService,
}

impl OwnerApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: OwnerService::new(island.clone()), meters: MeterService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl GroupService for OwnerApi {
    async fn list_groups(
        &self,
        request: Request<v1::ListGroupsRequest>,
    ) -> Result<Response<v1::ListGroupsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let after = match message.page_token.as_ref() {
            [] => None,
            token => {
                let number = <[u8; 8]>::try_from(token)
                    .map_err(|_| ServiceError::invalid("page_token", "it is not from an answer of this method"))?;
                Some(GroupId(u64::from_be_bytes(number)))
            }
        };
        let limit = if message.page_size == 0 { DEFAULT_PAGE } else { message.page_size.min(LARGEST_PAGE) };
        let page = self.service.groups(&caller, after, limit).await?;
        let next_page_token = page.next.map(|id| id.0.to_be_bytes().to_vec().into()).unwrap_or_default();
        Ok(Response::new(v1::ListGroupsResponse { groups: page.groups, next_page_token }))
    }

    async fn show_group(&self, request: Request<v1::ShowGroupRequest>) -> Result<Response<v1::Group>, Status> {
        let caller = self.caller(&request)?;
        let name = parse_group_name(request.into_inner().group, "group")?;
        Ok(Response::new(self.service.group(&caller, &name).await?))
    }

    async fn create_group_key(
        &self,
        request: Request<v1::CreateGroupKeyRequest>,
    ) -> Result<Response<v1::CreateKeyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::CreateGroupKeyRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CreateGroupKey", &same)?;
        let name = parse_group_name(message.group, "group")?;
        let profile = match message.device_profile.as_str() {
            "" => None,
            name => Some(DeviceProfileName::parse(name).map_err(ServiceError::parse("device_profile"))?),
        };
        let new = new_key(&message.security_setup, message.key_type, message.held_by_meters)?;
        Ok(Response::new(self.service.create_group_key(&caller, request, &name, new, profile.as_ref()).await?))
    }

    async fn show_group_rotation(
        &self,
        request: Request<v1::ShowGroupRotationRequest>,
    ) -> Result<Response<v1::GroupRotation>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let key = named_key(message.group, &message.key_type, &message.security_setup)?;
        Ok(Response::new(self.service.rotation(&caller, &key).await?))
    }

    async fn list_members_behind(
        &self,
        request: Request<v1::ListMembersBehindRequest>,
    ) -> Result<Response<v1::ListMembersBehindResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let key = named_key(message.group, &message.key_type, &message.security_setup)?;
        let after = match message.page_token.len() {
            0 => None,
            _ => Some(SystemTitle::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let limit = if message.page_size == 0 { DEFAULT_PAGE } else { message.page_size.min(LARGEST_PAGE) };
        let page =
            self.service.members_behind(&caller, &key, after, usize::try_from(limit).unwrap_or(usize::MAX)).await?;
        let next_page_token = page.next.map(|title| title.octets().to_vec().into()).unwrap_or_default();
        Ok(Response::new(v1::ListMembersBehindResponse { members: page.members, next_page_token }))
    }

    async fn switch_group_key(
        &self,
        request: Request<v1::SwitchGroupKeyRequest>,
    ) -> Result<Response<v1::GroupRotation>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        if message.reason.len() > LONGEST_REASON || (message.early && message.reason.trim().is_empty()) {
            return Err(ServiceError::invalid(
                "reason",
                format!("it is not 1 to {LONGEST_REASON} octets: the audit record must say why the switch is early"),
            )
            .into());
        }
        let switch = Switch {
            key: named_key(message.group, &message.key_type, &message.security_setup)?,
            version: KeyVersionNumber::new(message.version).map_err(ServiceError::parse("version"))?,
            early: message.early,
            reason: message.reason,
        };
        Ok(Response::new(self.service.switch(&caller, id, switch).await?))
    }

    async fn set_switch_threshold(
        &self,
        request: Request<v1::SetSwitchThresholdRequest>,
    ) -> Result<Response<v1::Group>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let threshold = SwitchThreshold::new(message.percent).map_err(ServiceError::parse("percent"))?;
        let name = parse_group_name(message.group, "group")?;
        Ok(Response::new(self.service.set_switch_threshold(&caller, id, &name, threshold).await?))
    }

    async fn change_group_members(
        &self,
        request: Request<v1::ChangeGroupMembersRequest>,
    ) -> Result<Response<v1::ChangeMetersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ChangeGroupMembersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ChangeGroupMembers", &same)?;
        let change = Membership::from_proto(message.change)?;
        let name = parse_group_name(message.group, "group")?;
        if message.meters.is_empty() || message.meters.len() > MeterService::MOST_METERS {
            return Err(ServiceError::invalid(
                "meters",
                format!("{} meters; a request has 1 to {}", message.meters.len(), MeterService::MOST_METERS),
            )
            .into());
        }
        if message.reason.len() > LONGEST_REASON || (change != Membership::Add && message.reason.trim().is_empty()) {
            return Err(ServiceError::invalid(
                "reason",
                format!("it is not 1 to {LONGEST_REASON} octets: the audit record must say why meters leave the group"),
            )
            .into());
        }
        let titles = message.meters.iter().enumerate();
        let meters = titles.map(|(number, title)| {
            SystemTitle::from_octets(title).map_err(ServiceError::parse(format!("meters[{number}]")))
        });
        let meters = meters.collect::<Result<Vec<_>, ServiceError>>()?;
        Ok(Response::new(self.meters.change_members(&caller, request, &name, meters, change, message.reason).await?))
    }
}

#[tonic::async_trait]
impl DeviceTypeService for OwnerApi {
    async fn add_device_type(
        &self,
        request: Request<v1::AddDeviceTypeRequest>,
    ) -> Result<Response<v1::DeviceType>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let new = NewDeviceType {
            name: parse_group_name(message.name, "name")?,
            manufacturer: FlagId::parse(&message.manufacturer).map_err(ServiceError::parse("manufacturer"))?,
            device_profile: DeviceProfileName::parse(&message.device_profile)
                .map_err(ServiceError::parse("device_profile"))?,
        };
        Ok(Response::new(self.service.add_device_type(&caller, id, new).await?))
    }

    async fn list_device_types(
        &self,
        request: Request<v1::ListDeviceTypesRequest>,
    ) -> Result<Response<v1::ListDeviceTypesResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(v1::ListDeviceTypesResponse { device_types: self.service.device_types(&caller).await? }))
    }

    async fn show_device_type(
        &self,
        request: Request<v1::ShowDeviceTypeRequest>,
    ) -> Result<Response<v1::DeviceType>, Status> {
        let caller = self.caller(&request)?;
        let name = parse_group_name(request.into_inner().device_type, "device_type")?;
        Ok(Response::new(self.service.device_type(&caller, &name).await?))
    }

    async fn create_device_type_key(
        &self,
        request: Request<v1::CreateDeviceTypeKeyRequest>,
    ) -> Result<Response<v1::CreateKeyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::CreateDeviceTypeKeyRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CreateDeviceTypeKey", &same)?;
        let name = parse_group_name(message.device_type, "device_type")?;
        let new = new_key(&message.security_setup, message.key_type, message.held_by_meters)?;
        Ok(Response::new(self.service.create_device_type_key(&caller, request, &name, new).await?))
    }
}

fn named_key(group: String, key_type: &str, setup: &[u8]) -> Result<NamedGroupKey, ServiceError> {
    Ok(NamedGroupKey {
        group: parse_group_name(group, "group")?,
        key_type: if key_type.is_empty() {
            KeyType::GBEK
        } else {
            KeyType::parse(key_type).map_err(ServiceError::parse("key_type"))?
        },
        setup: parse_setup("security_setup", setup)?,
    })
}

fn new_key(setup: &[u8], key_type: String, held_by_meters: bool) -> Result<NewOwnerKey, ServiceError> {
    if !(1..=LONGEST_KEY_TYPE).contains(&key_type.len()) {
        return Err(ServiceError::invalid(
            "key_type",
            format!("{} octets; a key type has 1 to {LONGEST_KEY_TYPE}", key_type.len()),
        ));
    }
    Ok(NewOwnerKey {
        setup: parse_setup("security_setup", setup)?.unwrap_or(SecuritySetupId::DEFAULT),
        key_type,
        held_by_meters,
    })
}

const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;
const LONGEST_KEY_TYPE: usize = 32;
const LONGEST_REASON: usize = 256;
