//! `meterkms.v1.ExposureService`.

use std::sync::Arc;

use kms_domain::{
    DeviceTypeId, FlagId, GroupId, Owner, OwnerKind, Party, PrincipalId, SystemTitle, UnixMillis, check_batch,
};
use kms_proto::v1::{
    self, exposure_service_server::ExposureService as Rpc, list_exposures_request::Subject as AskedSubject,
};
use kms_store::ExposureOwner;
use tonic::{Request, Response, Status};

use crate::parse::parse_group_name;
use crate::peer::caller_of;
use kms_base::error::ServiceError;
use kms_service::exposure::{ExposureQuery, ExposureService, ExposureSubject};
use kms_service::island::IslandContext;

/// The service over gRPC.
pub(crate) struct ExposureApi {
    island: Arc<IslandContext>,
    service: ExposureService,
}

impl ExposureApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: ExposureService::new(island.clone()), island }
    }
}

#[tonic::async_trait]
impl Rpc for ExposureApi {
    async fn list_exposures(
        &self,
        request: Request<v1::ListExposuresRequest>,
    ) -> Result<Response<v1::ListExposuresResponse>, Status> {
        let caller = caller_of(&request, self.island.name(), IslandContext::now())?;
        let query = parse_query(request.into_inner())?;
        let (mut answer, next) = self.service.list(&caller, query).await?;
        answer.next_page_token = next.map(token_of).unwrap_or_default();
        Ok(Response::new(answer))
    }
}

fn parse_query(message: v1::ListExposuresRequest) -> Result<ExposureQuery, ServiceError> {
    let since = match message.since_ms {
        0 => None,
        since if since > 0 => Some(UnixMillis(since)),
        _ => return Err(ServiceError::invalid("since_ms", "it is before 1970: give Unix milliseconds, or 0 for all")),
    };
    let after = if message.page_token.is_empty() { None } else { Some(parse_token(&message.page_token)?) };
    let limit = match message.page_size {
        0 => DEFAULT_PAGE,
        size => size.min(ExposureService::LARGEST_PAGE),
    };
    Ok(ExposureQuery { subject: parse_subject(message.subject)?, since, after, limit })
}

fn parse_subject(subject: Option<AskedSubject>) -> Result<ExposureSubject, ServiceError> {
    Ok(match subject {
        Some(AskedSubject::Meter(title)) => {
            ExposureSubject::Meter(SystemTitle::from_octets(&title).map_err(ServiceError::parse("meter"))?)
        }
        Some(AskedSubject::Group(name)) => ExposureSubject::Group(parse_group_name(name, "group")?),
        Some(AskedSubject::Principal(uri)) => {
            let principal = PrincipalId::parse(&uri).map_err(ServiceError::parse("principal"))?;
            ExposureSubject::Known(Party::Principal(principal))
        }
        Some(AskedSubject::Manufacturer(flag)) => {
            ExposureSubject::Manufacturer(FlagId::parse(&flag).map_err(ServiceError::parse("manufacturer"))?)
        }
        Some(AskedSubject::Batch(batch)) => {
            check_batch(&batch).map_err(ServiceError::parse("batch"))?;
            if batch.is_empty() {
                return Err(ServiceError::invalid("batch", "it is empty: name the batch of a shipment"));
            }
            ExposureSubject::Batch(batch)
        }
        Some(AskedSubject::Anyone(_)) => ExposureSubject::Known(Party::Anyone),
        None => {
            return Err(ServiceError::invalid(
                "subject",
                "nothing is asked for: give a meter, group, principal, manufacturer or batch, or `anyone`",
            ));
        }
    })
}

/// The token of the page behind an owner: its kind and its id.
fn token_of(owner: ExposureOwner) -> bytes::Bytes {
    match owner {
        ExposureOwner::Owner(owner) => [&[owner.kind().number()], owner.id().as_slice()].concat().into(),
        // Pages end with owners only.
        ExposureOwner::KeyValue(_) => bytes::Bytes::new(),
    }
}

/// The owner of a [`token_of`].
fn parse_token(token: &[u8]) -> Result<ExposureOwner, ServiceError> {
    let wrong = || ServiceError::invalid("page_token", "it is not from an answer of this method");
    let (kind, id) = token.split_first().ok_or_else(wrong)?;
    let id: [u8; 8] = id.try_into().map_err(|_| wrong())?;
    let number = u64::from_be_bytes(id);
    const METER: u8 = OwnerKind::Meter.number();
    const GROUP: u8 = OwnerKind::Group.number();
    const DEVICE_TYPE: u8 = OwnerKind::DeviceType.number();
    Ok(ExposureOwner::Owner(match *kind {
        METER => Owner::Meter(SystemTitle::from_octets(&id).map_err(|_| wrong())?),
        GROUP => Owner::Group(GroupId(number)),
        DEVICE_TYPE => Owner::DeviceType(DeviceTypeId(number)),
        _ => return Err(wrong()),
    }))
}

/// Owners of a page whose size is not given.
const DEFAULT_PAGE: u32 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn field(error: ServiceError) -> String {
        match error {
            ServiceError::InvalidArgument { field, .. } => field,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_page_token_comes_back_as_the_owner_that_it_was_made_of() {
        let meter = SystemTitle::from_octets(b"KAM\x00\x00\x00\x00\x01").unwrap();
        let owners = [Owner::Meter(meter), Owner::Group(GroupId(258)), Owner::DeviceType(DeviceTypeId(u64::MAX))];
        for owner in owners.map(ExposureOwner::Owner) {
            assert_eq!(parse_token(&token_of(owner)).unwrap(), owner);
        }
        assert_eq!(token_of(ExposureOwner::Owner(owners[1])).as_ref(), [1, 0, 0, 0, 0, 0, 0, 1, 2]);
    }

    #[test]
    fn a_request_that_asks_for_nothing_or_for_nonsense_names_the_field() {
        let ask = |subject| v1::ListExposuresRequest { subject, ..v1::ListExposuresRequest::default() };
        let meter = || Some(AskedSubject::Meter(b"KAM00001".to_vec().into()));
        assert_eq!(field(parse_query(ask(None)).unwrap_err()), "subject");
        for (subject, name) in [
            (AskedSubject::Meter(vec![1].into()), "meter"),
            (AskedSubject::Group("North!".to_owned()), "group"),
            (AskedSubject::Principal("alice".to_owned()), "principal"),
            (AskedSubject::Manufacturer("kam1".to_owned()), "manufacturer"),
            (AskedSubject::Batch(String::new()), "batch"),
            (AskedSubject::Batch("x".repeat(65)), "batch"),
        ] {
            assert_eq!(field(parse_query(ask(Some(subject))).unwrap_err()), name);
        }
        let early = v1::ListExposuresRequest { since_ms: -1, ..ask(meter()) };
        assert_eq!(field(parse_query(early).unwrap_err()), "since_ms");
        for token in [vec![0], vec![3; 9], vec![0; 10]] {
            let request = v1::ListExposuresRequest { page_token: token.into(), ..ask(meter()) };
            assert_eq!(field(parse_query(request).unwrap_err()), "page_token");
        }
        let large = v1::ListExposuresRequest { page_size: u32::MAX, ..ask(meter()) };
        assert_eq!(parse_query(large).unwrap().limit, ExposureService::LARGEST_PAGE);
    }
}
