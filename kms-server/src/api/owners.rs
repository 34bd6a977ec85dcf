//! `meterkms.v1.GroupService` and `meterkms.v1.DeviceTypeService`.

use std::sync::Arc;

use kms_domain::{DeviceProfileName, FlagId, GroupId, RequestId, SecuritySetupId};
use kms_proto::v1::{self, device_type_service_server::DeviceTypeService, group_service_server::GroupService};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{grants::parse_setup, meters::parse_group_name};
use crate::{
    authz::Caller,
    error::ServiceError,
    island::Island,
    service::{
        grant::request_digest,
        meter,
        owner::{NewDeviceType, NewOwnerKey, OwnerService},
    },
};

/// Both services over gRPC. Clones share what is known of groups.
#[derive(Clone)]
pub struct OwnerApi {
    island: Arc<Island>,
    service: OwnerService,
}

impl OwnerApi {
    /// Of an island.
    pub fn new(island: Arc<Island>) -> Self {
        Self { service: OwnerService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        Caller::of(request, self.island.name(), Island::now())
    }
}

#[tonic::async_trait]
impl GroupService for OwnerApi {
    async fn list_groups(&self, request: Request<v1::ListGroupsRequest>) -> Result<Response<v1::ListGroupsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let after = match message.page_token.as_ref() {
            [] => None,
            token => {
                let number = <[u8; 8]>::try_from(token).map_err(|_| ServiceError::invalid("page_token", "it is none of this call's"))?;
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

    async fn create_group_key(&self, request: Request<v1::CreateGroupKeyRequest>) -> Result<Response<v1::CreateKeyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let digest = request_digest(&[b"CreateGroupKey", &v1::CreateGroupKeyRequest { request_id: bytes::Bytes::new(), ..message.clone() }.encode_to_vec()]);
        let request = meter::Request { id: RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?, digest };
        let name = parse_group_name(message.group, "group")?;
        let profile = match message.device_profile.as_str() {
            "" => None,
            name => Some(DeviceProfileName::parse(name).map_err(ServiceError::parse("device_profile"))?),
        };
        let new = new_key(&message.security_setup, message.key_type, message.held_by_meters)?;
        Ok(Response::new(self.service.create_group_key(&caller, request, &name, new, profile.as_ref()).await?))
    }
}

#[tonic::async_trait]
impl DeviceTypeService for OwnerApi {
    async fn add_device_type(&self, request: Request<v1::AddDeviceTypeRequest>) -> Result<Response<v1::DeviceType>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let new = NewDeviceType {
            name: parse_group_name(message.name, "name")?,
            manufacturer: FlagId::parse(&message.manufacturer).map_err(ServiceError::parse("manufacturer"))?,
            device_profile: DeviceProfileName::parse(&message.device_profile).map_err(ServiceError::parse("device_profile"))?,
        };
        Ok(Response::new(self.service.add_device_type(&caller, id, new).await?))
    }

    async fn list_device_types(&self, request: Request<v1::ListDeviceTypesRequest>) -> Result<Response<v1::ListDeviceTypesResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(v1::ListDeviceTypesResponse { device_types: self.service.device_types(&caller).await? }))
    }

    async fn show_device_type(&self, request: Request<v1::ShowDeviceTypeRequest>) -> Result<Response<v1::DeviceType>, Status> {
        let caller = self.caller(&request)?;
        let name = parse_group_name(request.into_inner().device_type, "device_type")?;
        Ok(Response::new(self.service.device_type(&caller, &name).await?))
    }

    async fn create_device_type_key(&self, request: Request<v1::CreateDeviceTypeKeyRequest>) -> Result<Response<v1::CreateKeyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let without_id = v1::CreateDeviceTypeKeyRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let digest = request_digest(&[b"CreateDeviceTypeKey", &without_id.encode_to_vec()]);
        let request = meter::Request { id: RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?, digest };
        let name = parse_group_name(message.device_type, "device_type")?;
        let new = new_key(&message.security_setup, message.key_type, message.held_by_meters)?;
        Ok(Response::new(self.service.create_device_type_key(&caller, request, &name, new).await?))
    }
}

fn new_key(setup: &[u8], key_type: String, held_by_meters: bool) -> Result<NewOwnerKey, ServiceError> {
    if !(1..=LONGEST_KEY_TYPE).contains(&key_type.len()) {
        return Err(ServiceError::invalid("key_type", format!("{} octets instead of 1 to {LONGEST_KEY_TYPE}", key_type.len())));
    }
    Ok(NewOwnerKey { setup: parse_setup("security_setup", setup)?.unwrap_or(SecuritySetupId::DEFAULT), key_type, held_by_meters })
}

const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;
const LONGEST_KEY_TYPE: usize = 32;
