//! `meterkms.v1.AuditService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use kms_domain::{PrincipalId, SystemTitle, UnixMillis};
use kms_proto::v1::{
    ListAuditRecordsRequest, ListAuditRecordsResponse, ScrubRequest, ScrubResponse,
    audit_service_server::AuditService as Rpc,
};
use kms_store::AuditCursor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::{
    audit_log::{AuditLog, LogPlace, LogQuery},
    scrub::Scrubber,
};

/// The service over gRPC.
pub(crate) struct AuditApi {
    island: Arc<IslandContext>,
    log: AuditLog,
    scrubber: Scrubber,
}

impl AuditApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { log: AuditLog::new(island.clone()), scrubber: Scrubber::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for AuditApi {
    async fn list_audit_records(
        &self,
        request: Request<ListAuditRecordsRequest>,
    ) -> Result<Response<ListAuditRecordsResponse>, Status> {
        let caller = self.caller(&request)?;
        let page = self.log.list(&caller, &parse_query(&request.into_inner())?).await?;
        let next_page_token = page
            .next
            .map(|place| [place.behind.0.to_be_bytes(), place.last.0.to_be_bytes()].concat().into())
            .unwrap_or_default();
        Ok(Response::new(ListAuditRecordsResponse { records: page.records, next_page_token }))
    }

    type ScrubStream = Pin<Box<dyn Stream<Item = Result<ScrubResponse, Status>> + Send>>;

    async fn scrub(&self, request: Request<ScrubRequest>) -> Result<Response<Self::ScrubStream>, Status> {
        let caller = self.caller(&request)?;
        let answers =
            ReceiverStream::new(self.scrubber.scrub_for(&caller).await?).map(|answer| answer.map_err(Status::from));
        Ok(Response::new(Box::pin(answers)))
    }
}

fn parse_query(message: &ListAuditRecordsRequest) -> Result<LogQuery, ServiceError> {
    let time = |time: i64| (time != 0).then_some(UnixMillis(time));
    Ok(LogQuery {
        principal: match message.principal.as_str() {
            "" => None,
            uri => Some(PrincipalId::parse(uri).map_err(ServiceError::parse("principal"))?),
        },
        meter: match message.meter.len() {
            0 => None,
            _ => Some(SystemTitle::from_octets(&message.meter).map_err(ServiceError::parse("meter"))?),
        },
        from: time(message.from_ms),
        to: time(message.to_ms),
        after: match message.page_token.split_first_chunk::<8>() {
            None if message.page_token.is_empty() => None,
            Some((behind, last)) => {
                let last = last
                    .try_into()
                    .map_err(|_| ServiceError::invalid("page_token", "it is not from an answer of this method"))?;
                Some(LogPlace {
                    behind: AuditCursor(i64::from_be_bytes(*behind)),
                    last: AuditCursor(i64::from_be_bytes(last)),
                })
            }
            None => return Err(ServiceError::invalid("page_token", "it is not from an answer of this method")),
        },
        limit: match usize::try_from(message.page_size) {
            Ok(0) => DEFAULT_PAGE,
            Ok(size) => size.min(LARGEST_PAGE),
            Err(_) => LARGEST_PAGE,
        },
        newest_first: message.newest_first,
    })
}

const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        for (expected, message) in [
            ("principal", ListAuditRecordsRequest { principal: "ada".into(), ..Default::default() }),
            ("meter", ListAuditRecordsRequest { meter: vec![1; 7].into(), ..Default::default() }),
            ("page_token", ListAuditRecordsRequest { page_token: vec![1; 15].into(), ..Default::default() }),
            ("page_token", ListAuditRecordsRequest { page_token: vec![1; 3].into(), ..Default::default() }),
        ] {
            match parse_query(&message) {
                Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, expected),
                other => panic!("{other:?}"),
            }
        }
        let page_token = [7_i64.to_be_bytes(), 9_i64.to_be_bytes()].concat().into();
        let query =
            parse_query(&ListAuditRecordsRequest { page_token, page_size: 5_000, ..Default::default() }).unwrap();
        assert_eq!(
            (query.after, query.limit),
            (Some(LogPlace { behind: AuditCursor(7), last: AuditCursor(9) }), LARGEST_PAGE)
        );
    }
}
