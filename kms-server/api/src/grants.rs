//! `meterkms.v1.GrantService`.

use std::{num::NonZeroU32, pin::Pin, sync::Arc};

use futures::{Stream, StreamExt, stream};
use kms_domain::{GrantId, KeyType, KeyVersionNumber, PrincipalId, RequestId, SystemTitle};
use kms_proto::v1::{
    ListGrantsRequest, ListGrantsResponse, MeterRefusal, OpenGroupSessionRequest, OpenSessionRequest,
    OpenSessionResponse, OpenSessionsRequest, OpenSessionsResponse, RevokeGrantRequest, RevokeGrantResponse,
    grant_service_server::GrantService as Rpc,
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::parse::{parse_group_name, parse_reason, parse_setup};
use crate::peer::caller_of;
use kms_authz::{Caller, Purpose};
use kms_base::error::ServiceError;
use kms_service::grant::deliver::Granted;
use kms_service::grant::terms::{GrantChunk, GrantTargets, SessionTerms};
use kms_service::grant::{GrantQuery, GrantService};
use kms_service::island::IslandContext;
use kms_service::request_digest::request_digest;

/// The service over gRPC.
pub(crate) struct GrantApi {
    island: Arc<IslandContext>,
    service: GrantService,
}

impl GrantApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: GrantService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for GrantApi {
    async fn open_session(
        &self,
        request: Request<OpenSessionRequest>,
    ) -> Result<Response<OpenSessionResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let digest = request_digest(&[
            b"OpenSession",
            &OpenSessionRequest { request_id: bytes::Bytes::new(), ..message.clone() }.encode_to_vec(),
        ]);
        let chunk = GrantChunk {
            request: RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?,
            index: 0,
            digest,
            targets: GrantTargets::Meters(vec![
                SystemTitle::from_octets(&message.meter).map_err(ServiceError::parse("meter"))?,
            ]),
            terms: Arc::new(parse_terms(message.terms, &[KeyType::GUEK, KeyType::GAK])?),
        };
        let Granted { envelopes, refusals, leaf, rotation } = self.service.open(&caller, chunk).await?;
        if let Some((_, error)) = refusals.into_iter().next() {
            return Err(error.into());
        }
        Ok(Response::new(OpenSessionResponse {
            envelopes,
            audit_leaf: leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
            rotation,
        }))
    }

    async fn open_group_session(
        &self,
        request: Request<OpenGroupSessionRequest>,
    ) -> Result<Response<OpenSessionResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let digest = request_digest(&[
            b"OpenGroupSession",
            &OpenGroupSessionRequest { request_id: bytes::Bytes::new(), ..message.clone() }.encode_to_vec(),
        ]);
        let terms = parse_terms(message.terms, &[KeyType::GBEK])?;
        if terms.dedicated_key {
            return Err(ServiceError::invalid(
                "terms.dedicated_key",
                "a dedicated key belongs to an association with one meter, not to a group",
            )
            .into());
        }
        let chunk = GrantChunk {
            request: RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?,
            index: 0,
            digest,
            targets: GrantTargets::Group {
                name: parse_group_name(message.group, "group")?,
                version: match message.key_version {
                    0 => None,
                    number => Some(KeyVersionNumber::new(number).map_err(ServiceError::parse("key_version"))?),
                },
            },
            terms: Arc::new(terms),
        };
        let Granted { envelopes, refusals, leaf, rotation } = self.service.open(&caller, chunk).await?;
        if let Some((_, error)) = refusals.into_iter().next() {
            return Err(error.into());
        }
        Ok(Response::new(OpenSessionResponse {
            envelopes,
            audit_leaf: leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
            rotation,
        }))
    }

    type OpenSessionsStream = Pin<Box<dyn Stream<Item = Result<OpenSessionsResponse, Status>> + Send>>;

    async fn open_sessions(
        &self,
        request: Request<OpenSessionsRequest>,
    ) -> Result<Response<Self::OpenSessionsStream>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let first_chunk = message.first_chunk;
        let request = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let meters = parse_meters(&message.meters)?;
        let terms = Arc::new(parse_terms(message.terms.clone(), &[KeyType::GUEK, KeyType::GAK])?);
        // The place where the answer resumes is not part of the request's identity.
        let digest = request_digest(&[
            b"OpenSessions",
            &OpenSessionsRequest { request_id: bytes::Bytes::new(), first_chunk: 0, ..message }.encode_to_vec(),
        ]);
        let chunks: Vec<GrantChunk> = (0..)
            .zip(meters.chunks(GrantService::CHUNK))
            .map(|(index, meters)| GrantChunk {
                request,
                index,
                digest,
                targets: GrantTargets::Meters(meters.to_vec()),
                terms: terms.clone(),
            })
            .collect();
        let chunk_count = u32::try_from(chunks.len()).unwrap_or(u32::MAX);
        if first_chunk >= chunk_count {
            return Err(ServiceError::invalid(
                "first_chunk",
                format!("`{first_chunk}` is not below the number of chunks, {chunk_count}"),
            )
            .into());
        }
        let batch = Arc::new(self.service.begin_batch(&caller, meters.len())?);
        let service = self.service.clone();
        let island = self.island.clone();
        // A few chunks are under way at once: one is committed while another is wrapped. They wait
        // for a caller that reads slowly.
        let answers = stream::iter(chunks.into_iter().skip(usize::try_from(first_chunk).unwrap_or(usize::MAX)))
            .map(move |chunk| {
                let (service, caller, island, batch) = (service.clone(), caller.clone(), island.clone(), batch.clone());
                async move {
                    let _turn = batch.turn().await;
                    // Revocation also ends open streams: an expired certificate ends them here, and
                    // each chunk reads the principal's row again.
                    if caller.not_after <= IslandContext::now() {
                        let reason =
                            format!("the client certificate has expired; renew it at island {}", island.name());
                        return Err(Status::from(ServiceError::unauthenticated(reason)));
                    }
                    let index = chunk.index;
                    let granted = service.open(&caller, chunk).await?;
                    Ok(answer(index, chunk_count, granted))
                }
            })
            .buffered(CHUNKS_AT_ONCE);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_grants(&self, request: Request<ListGrantsRequest>) -> Result<Response<ListGrantsResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let principal = match message.principal.as_str() {
            "" => None,
            uri => Some(PrincipalId::parse(uri).map_err(ServiceError::parse("principal"))?),
        };
        let before = match message.page_token.len() {
            0 => None,
            _ => Some(GrantId::from_octets(&message.page_token).map_err(ServiceError::parse("page_token"))?),
        };
        let page = match message.page_size {
            0 => DEFAULT_PAGE,
            size => size.min(LARGEST_PAGE),
        };
        let query = GrantQuery { principal, only_live: message.only_live, before, page };
        let grants = self.service.list(&caller, query).await?;
        let next_page_token = if grants.len() == usize::try_from(page).unwrap_or(usize::MAX) {
            grants.last().map(|grant| grant.grant_id.clone()).unwrap_or_default()
        } else {
            bytes::Bytes::new()
        };
        Ok(Response::new(ListGrantsResponse { grants, next_page_token }))
    }

    async fn revoke_grant(
        &self,
        request: Request<RevokeGrantRequest>,
    ) -> Result<Response<RevokeGrantResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let request = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let grant = GrantId::from_octets(&message.grant_id).map_err(ServiceError::parse("grant_id"))?;
        let grant = self.service.revoke(&caller, request, grant, parse_reason(message.reason)?).await?;
        Ok(Response::new(RevokeGrantResponse { grant: Some(grant) }))
    }
}

fn answer(chunk_index: u32, chunk_count: u32, granted: Granted) -> OpenSessionsResponse {
    OpenSessionsResponse {
        chunk_index,
        chunk_count,
        envelopes: granted.envelopes,
        refusals: granted
            .refusals
            .into_iter()
            .map(|(owner, error)| MeterRefusal {
                meter: owner.id().to_vec().into(),
                code: error.code(),
                message: error.to_string(),
            })
            .collect(),
        audit_leaf: granted.leaf.map(|leaf| leaf.0.to_vec().into()).unwrap_or_default(),
    }
}

fn parse_meters(titles: &[bytes::Bytes]) -> Result<Vec<SystemTitle>, ServiceError> {
    if titles.is_empty() || titles.len() > MOST_METERS {
        return Err(ServiceError::invalid(
            "meters",
            format!("{} meters; a request has 1 to {MOST_METERS}", titles.len()),
        ));
    }
    let mut meters = Vec::with_capacity(titles.len());
    for (number, title) in titles.iter().enumerate() {
        meters.push(SystemTitle::from_octets(title).map_err(ServiceError::parse(format!("meters[{number}]")))?);
    }
    let mut sorted = meters.clone();
    sorted.sort_unstable();
    match sorted.windows(2).find_map(|pair| match pair {
        [one, other] if one == other => Some(*one),
        _ => None,
    }) {
        Some(twice) => Err(ServiceError::invalid("meters", format!("`{twice}` occurs twice"))),
        None => Ok(meters),
    }
}

fn parse_terms(terms: Option<kms_proto::v1::SessionTerms>, default: &[KeyType]) -> Result<SessionTerms, ServiceError> {
    let terms = terms.ok_or_else(|| ServiceError::invalid("terms", "it is missing"))?;
    let key_types = if terms.key_types.is_empty() {
        default.to_vec()
    } else {
        let mut key_types = Vec::with_capacity(terms.key_types.len().min(64));
        for (number, name) in terms.key_types.iter().enumerate() {
            let field = format!("terms.key_types[{number}]");
            let key_type = KeyType::parse(name).map_err(ServiceError::parse(field.clone()))?;
            if key_type == KeyType::DEDICATED {
                return Err(ServiceError::invalid(field, "request a dedicated key with `dedicated_key`"));
            }
            if key_types.contains(&key_type) {
                return Err(ServiceError::invalid(field, format!("`{key_type}` occurs twice")));
            }
            key_types.push(key_type);
        }
        key_types
    };
    let within = |field: &str, value: u32, default: u32, most: u32| match value {
        0 => Ok(default),
        value if value <= most => Ok(value),
        value => Err(ServiceError::invalid(field, format!("`{value}` is above {most}"))),
    };
    let counters =
        within("terms.counters", terms.counters, SessionTerms::DEFAULT_COUNTERS, SessionTerms::MOST_COUNTERS)?;
    Ok(SessionTerms {
        purpose: Purpose::from_proto(terms.purpose).map_err(ServiceError::parse("terms.purpose"))?,
        setup: parse_setup("terms.security_setup", &terms.security_setup)?,
        key_types,
        client_title: match terms.client_title.len() {
            0 => None,
            _ => {
                Some(SystemTitle::from_octets(&terms.client_title).map_err(ServiceError::parse("terms.client_title"))?)
            }
        },
        counters: NonZeroU32::new(counters).unwrap_or(NonZeroU32::MIN),
        dedicated_key: terms.dedicated_key,
        lifetime_seconds: within(
            "terms.lifetime_seconds",
            terms.lifetime_seconds,
            SessionTerms::DEFAULT_LIFETIME,
            SessionTerms::LONGEST_LIFETIME,
        )?,
    })
}

const MOST_METERS: usize = 10_000;
const CHUNKS_AT_ONCE: usize = 3;
const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;
