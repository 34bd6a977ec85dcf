//! Sessions with a server that breaks off, is unavailable, or answers something else.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use kms_client::{Connection, KeyType, RequestId, SessionError, SystemTitle, TransportKey, proto};
use proto::grant_service_server::{GrantService, GrantServiceServer};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use crate::support::{Vector, options, transport_key};

/// Three chunks of one meter each; what goes wrong is listed call by call.
struct Server {
    faults: Mutex<Vec<Fault>>,
    first_chunks: Mutex<Vec<u32>>,
}

#[derive(Clone, Copy)]
enum Fault {
    /// Not there.
    Unavailable,
    /// The stream ends with an error after so many chunks.
    BreaksAfter(usize),
    /// The stream ends without one.
    EndsAfter(usize),
    /// The second chunk is left out.
    Skips,
    /// Policy.
    Refuses,
}

type Steps<T> = ready::Steps<T>;

pub(crate) mod ready {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    /// A stream of steps that are there already.
    pub(crate) struct Steps<T>(pub(crate) std::vec::IntoIter<Result<T, tonic::Status>>);

    impl<T: Unpin> tonic::codegen::tokio_stream::Stream for Steps<T> {
        type Item = Result<T, tonic::Status>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.next())
        }
    }
}

fn meter(number: u32) -> SystemTitle {
    SystemTitle::parse(&format!("4B414D00{number:08X}")).unwrap()
}

fn chunk(request_id: &[u8], index: u32) -> proto::OpenSessionsResponse {
    let vector = Vector::load("vector.properties");
    let mut manifest = vector.manifest();
    manifest.request_id = request_id.to_vec().into();
    manifest.chunk_index = index;
    manifest.grant_id = vec![index as u8 + 1; 16].into();
    manifest.meters[0].meter = meter(index + 1).octets().to_vec().into();
    proto::OpenSessionsResponse {
        chunk_index: index,
        chunk_count: 3,
        envelopes: vec![vector.sealed(&manifest)],
        ..Default::default()
    }
}

impl Server {
    async fn start(faults: &[Fault]) -> (Arc<Self>, Connection) {
        let server = Arc::new(Self {
            faults: Mutex::new(faults.iter().rev().copied().collect()),
            first_chunks: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let service =
            tonic::transport::Server::builder().add_service(GrantServiceServer::from_arc(Arc::clone(&server)));
        tokio::spawn(service.serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)));
        let channel =
            tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        (server, Connection::over(channel))
    }

    fn fault(&self) -> Option<Fault> {
        self.faults.lock().unwrap().pop()
    }
}

#[tonic::async_trait]
impl GrantService for Server {
    async fn open_session(
        &self,
        request: Request<proto::OpenSessionRequest>,
    ) -> Result<Response<proto::OpenSessionResponse>, Status> {
        match self.fault() {
            Some(Fault::Unavailable) => return Err(Status::unavailable("not now")),
            Some(_) => return Err(Status::permission_denied("no")),
            None => {}
        }
        // Always the keys of meter 1, whatever was asked for.
        Ok(Response::new(proto::OpenSessionResponse {
            envelopes: chunk(&request.get_ref().request_id, 0).envelopes,
            audit_leaf: vec![7; 32].into(),
            rotation: None,
        }))
    }

    async fn open_group_session(
        &self,
        request: Request<proto::OpenGroupSessionRequest>,
    ) -> Result<Response<proto::OpenSessionResponse>, Status> {
        // The keys of a meter, where a group was asked for.
        Ok(Response::new(proto::OpenSessionResponse {
            envelopes: chunk(&request.get_ref().request_id, 0).envelopes,
            audit_leaf: vec![7; 32].into(),
            rotation: None,
        }))
    }

    type OpenSessionsStream = Steps<proto::OpenSessionsResponse>;

    async fn open_sessions(
        &self,
        request: Request<proto::OpenSessionsRequest>,
    ) -> Result<Response<Self::OpenSessionsStream>, Status> {
        let request = request.into_inner();
        self.first_chunks.lock().unwrap().push(request.first_chunk);
        let mut steps: Vec<_> = (request.first_chunk..3).map(|index| Ok(chunk(&request.request_id, index))).collect();
        match self.fault() {
            None => {}
            Some(Fault::Unavailable) => return Err(Status::unavailable("not now")),
            Some(Fault::Refuses) => return Err(Status::permission_denied("no")),
            Some(Fault::EndsAfter(count)) => steps.truncate(count),
            Some(Fault::Skips) => drop(steps.remove(1)),
            Some(Fault::BreaksAfter(count)) => {
                steps.truncate(count);
                steps.push(Err(Status::unavailable("the connection was lost")));
            }
        }
        Ok(Response::new(ready::Steps(steps.into_iter())))
    }

    async fn list_grants(
        &self,
        _: Request<proto::ListGrantsRequest>,
    ) -> Result<Response<proto::ListGrantsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn revoke_grant(
        &self,
        _: Request<proto::RevokeGrantRequest>,
    ) -> Result<Response<proto::RevokeGrantResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Receives a whole batch: the chunks, and the error that ended it.
async fn receive(connection: &Connection, key: &TransportKey) -> (Vec<u32>, Option<SessionError>) {
    let meters = [meter(1), meter(2), meter(3)];
    let request_id = RequestId::parse("0199aa00-0000-7000-8000-0000000000aa").unwrap();
    let mut batch = connection.open_sessions(key, request_id, &meters, proto::SessionTerms::default(), &options());
    let mut chunks = Vec::new();
    loop {
        match batch.next().await {
            Ok(Some(chunk)) => {
                let sessions = chunk.sessions.unwrap();
                assert!(sessions.meter(meter(chunk.chunk_index + 1)).unwrap().key(KeyType::GUEK).is_some());
                chunks.push(chunk.chunk_index);
            }
            Ok(None) => return (chunks, None),
            Err(error) => return (chunks, Some(error)),
        }
    }
}

#[tokio::test]
async fn a_batch_goes_on_where_its_stream_broke() {
    let key = transport_key();
    for (faults, first_chunks) in [
        (&[][..], &[0][..]),
        (&[Fault::BreaksAfter(1)], &[0, 1]),
        (&[Fault::Unavailable, Fault::EndsAfter(2), Fault::BreaksAfter(0)], &[0, 0, 2, 2]),
    ] {
        let (server, connection) = Server::start(faults).await;
        let (chunks, error) = receive(&connection, &key).await;
        assert!(error.is_none() && chunks == [0, 1, 2], "{chunks:?} {error:?}");
        assert_eq!(*server.first_chunks.lock().unwrap(), first_chunks);
    }
}

#[tokio::test]
async fn a_batch_ends_where_going_on_makes_no_sense() {
    let key = transport_key();
    let (server, connection) = Server::start(&[Fault::Refuses]).await;
    let (chunks, error) = receive(&connection, &key).await;
    assert!(chunks.is_empty() && matches!(error, Some(SessionError::Server(error)) if error.is_refused()));
    assert_eq!(server.first_chunks.lock().unwrap().len(), 1);
    let (_, connection) = Server::start(&[Fault::Skips]).await;
    let (chunks, error) = receive(&connection, &key).await;
    assert_eq!(chunks, [0]);
    assert!(matches!(error, Some(SessionError::ChunkOrder { expected: 1, received: 2 })));
}

#[tokio::test]
async fn a_session_is_asked_for_again_and_must_be_with_the_meter_that_was_asked_for() {
    let key = transport_key();
    let request_id = kms_client::new_request_id();
    let (_, connection) = Server::start(&[Fault::Unavailable, Fault::Unavailable]).await;
    let session =
        connection.open_session(&key, request_id, meter(1), proto::SessionTerms::default(), &options()).await.unwrap();
    assert_eq!((session.keys.request_id, session.audit_leaf.len()), (request_id, 32));
    let other = connection.open_session(&key, request_id, meter(2), proto::SessionTerms::default(), &options()).await;
    assert!(matches!(other.unwrap_err(), SessionError::Open(_)));
    let group = connection
        .open_group_session(&key, request_id, "north", None, proto::SessionTerms::default(), &options())
        .await;
    assert!(matches!(group.unwrap_err(), SessionError::Open(_)), "keys of a meter are no answer for a group");
}
