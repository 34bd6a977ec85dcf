//! Sessions: request the keys, repeat the request where that helps, and open the answer.

use kms_domain::{RequestId, SystemTitle};
use kms_proto::v1 as proto;
use tonic::{Status, Streaming};

use crate::{Connection, OpenError, OpenOptions, OpenedEnvelope, RetryPolicy, ServerError, TransportKey};

impl Connection {
    /// Opens a session with one meter: requests keys and counters, and opens the answer. The
    /// request is repeated under the same request id while the server is unavailable.
    ///
    /// # Errors
    /// The server refused, or the answer could not be opened.
    pub async fn open_session(
        &self,
        key: &TransportKey,
        request_id: RequestId,
        meter: SystemTitle,
        terms: proto::SessionTerms,
        options: &OpenOptions,
    ) -> Result<Session, SessionError> {
        let request = proto::OpenSessionRequest {
            request_id: request_id.octets().to_vec().into(),
            meter: meter.octets().to_vec().into(),
            terms: Some(terms),
        };
        let answer = RetryPolicy::default()
            .run(|| {
                let (mut grants, request) = (self.grants(), request.clone());
                async move { grants.open_session(request).await }
            })
            .await?
            .into_inner();
        let keys = key.open_all(&answer.envelopes, &options.clone().answering(request_id))?;
        // A session has one meter: keys of another one in the envelope would be used by mistake.
        if keys.meters.iter().any(|entry| entry.meter != meter) || !keys.groups.is_empty() {
            return Err(OpenError::manifest("it has keys of another meter than the requested one").into());
        }
        Ok(Session { keys, audit_leaf: answer.audit_leaf.to_vec(), rotation: None })
    }

    /// Gets the keys of a group of meters for broadcasts, and counters for the group's GBEK, if
    /// policy permits it for the group itself. `version` is that of the GBEK; `None`: the active
    /// one. The request is repeated under the same request id while the server is unavailable.
    ///
    /// # Errors
    /// The server refused, or the answer could not be opened.
    pub async fn open_group_session(
        &self,
        key: &TransportKey,
        request_id: RequestId,
        group: &str,
        version: Option<u32>,
        terms: proto::SessionTerms,
        options: &OpenOptions,
    ) -> Result<Session, SessionError> {
        let request = proto::OpenGroupSessionRequest {
            request_id: request_id.octets().to_vec().into(),
            group: group.to_owned(),
            terms: Some(terms),
            key_version: version.unwrap_or_default(),
        };
        let answer = RetryPolicy::default()
            .run(|| {
                let (mut grants, request) = (self.grants(), request.clone());
                async move { grants.open_group_session(request).await }
            })
            .await?
            .into_inner();
        let keys = key.open_all(&answer.envelopes, &options.clone().answering(request_id))?;
        if !keys.meters.is_empty() || keys.groups.iter().any(|entry| entry.name != group) {
            return Err(OpenError::manifest("it has keys of others than the requested group").into());
        }
        Ok(Session { keys, audit_leaf: answer.audit_leaf.to_vec(), rotation: answer.rotation })
    }

    /// Opens sessions with up to 10,000 meters, chunk by chunk. A broken stream is resumed where it
    /// ended.
    pub fn open_sessions<'a>(
        &self,
        key: &'a TransportKey,
        request_id: RequestId,
        meters: &[SystemTitle],
        terms: proto::SessionTerms,
        options: &OpenOptions,
    ) -> SessionBatch<'a> {
        SessionBatch {
            connection: self.clone(),
            key,
            options: options.clone().answering(request_id),
            request: proto::OpenSessionsRequest {
                request_id: request_id.octets().to_vec().into(),
                meters: meters.iter().map(|meter| meter.octets().to_vec().into()).collect(),
                terms: Some(terms),
                first_chunk: 0,
            },
            stream: None,
            chunk_count: None,
            failures: 0,
            retry: RetryPolicy::default(),
        }
    }
}

/// A session with one meter, or the broadcast keys of one group.
#[derive(Debug)]
pub struct Session {
    /// The keys and counters.
    pub keys: OpenedEnvelope,
    /// SHA-256 leaf hash (RFC 9162) of the audit record, 32 octets.
    pub audit_leaf: Vec<u8>,
    /// For a group: whether another version of its GBEK is being rolled out, and whether broadcasts
    /// may switch to it. Without the numbers of members.
    pub rotation: Option<proto::GroupRotation>,
}

/// A batch of sessions that is being received.
pub struct SessionBatch<'a> {
    connection: Connection,
    key: &'a TransportKey,
    options: OpenOptions,
    request: proto::OpenSessionsRequest,
    stream: Option<Streaming<proto::OpenSessionsResponse>>,
    chunk_count: Option<u32>,
    /// Attempts since the last chunk.
    failures: u32,
    retry: RetryPolicy,
}

/// A part of a batch: a grant of its own.
#[derive(Debug)]
pub struct SessionChunk {
    /// From 0.
    pub chunk_index: u32,
    /// The number of chunks in the batch.
    pub chunk_count: u32,
    /// The keys; `None`: every meter was refused.
    pub sessions: Option<OpenedEnvelope>,
    /// Meters that got no keys, with the reason.
    pub refusals: Vec<proto::MeterRefusal>,
    /// SHA-256 leaf hash (RFC 9162) of the audit record.
    pub audit_leaf: Vec<u8>,
}

impl SessionBatch<'_> {
    /// The next chunk; `None` after the last.
    ///
    /// # Errors
    /// The server refused, the stream broke and could not be resumed, or a chunk could not be
    /// opened. The next call resumes at the same chunk.
    pub async fn next(&mut self) -> Result<Option<SessionChunk>, SessionError> {
        loop {
            if self.chunk_count.is_some_and(|count| self.request.first_chunk >= count) {
                return Ok(None);
            }
            match self.receive().await {
                Ok(Some(chunk)) => {
                    self.failures = 0;
                    return self.open(chunk).map(Some);
                }
                // A stream that ends before the last chunk is broken.
                Ok(None) => {
                    self.wait(Status::unavailable("the stream of chunks ended before its last chunk").into()).await?
                }
                Err(status) => self.wait(status.into()).await?,
            }
        }
    }

    async fn receive(&mut self) -> Result<Option<proto::OpenSessionsResponse>, Status> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = self.connection.grants().open_sessions(self.request.clone()).await?.into_inner();
                self.stream.insert(stream)
            }
        };
        stream.message().await
    }

    fn open(&mut self, chunk: proto::OpenSessionsResponse) -> Result<SessionChunk, SessionError> {
        if chunk.chunk_index != self.request.first_chunk
            || self.chunk_count.is_some_and(|count| count != chunk.chunk_count)
            || chunk.chunk_index >= chunk.chunk_count
        {
            self.stream = None;
            return Err(SessionError::ChunkOrder { expected: self.request.first_chunk, received: chunk.chunk_index });
        }
        let sessions =
            if chunk.envelopes.is_empty() { None } else { Some(self.key.open_all(&chunk.envelopes, &self.options)?) };
        if sessions.as_ref().is_some_and(|sessions| sessions.chunk_index != chunk.chunk_index) {
            return Err(OpenError::manifest("its chunk_index is not that of the answer").into());
        }
        self.chunk_count = Some(chunk.chunk_count);
        self.request.first_chunk += 1;
        Ok(SessionChunk {
            chunk_index: chunk.chunk_index,
            chunk_count: chunk.chunk_count,
            sessions,
            refusals: chunk.refusals,
            audit_leaf: chunk.audit_leaf.to_vec(),
        })
    }

    /// Waits before the stream is resumed. Returns the error if it cannot be resumed.
    async fn wait(&mut self, error: ServerError) -> Result<(), SessionError> {
        self.stream = None;
        self.failures += 1;
        match self.retry.delay_after(self.failures, &error) {
            Some(delay) => tokio::time::sleep(delay).await,
            None => {
                self.failures = 0;
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The server refused or failed.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The answer could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The chunks came in another order than requested.
    #[error(
        "the server sent chunk {received} instead of {expected}: resume with the same request id, and report this as a fault of the server"
    )]
    ChunkOrder {
        /// The chunk that was expected.
        expected: u32,
        /// The chunk that came.
        received: u32,
    },
}
