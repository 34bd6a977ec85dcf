//! Requests on their way in: what a caller can make the server hold before a use case sees the call.
//!
//! A call's message is received as a whole before its service is entered: its length is compared with the bound of the method when the first five
//! octets of it are there, its octets count for connection, principal and server until the call is answered, and it has a time to arrive.
//! Messages of a stream are bounded one by one. A principal that is disabled or unknown is refused before an octet of the message is read, and its
//! connection is closed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use futures::task::AtomicWaker;
use http_body::{Body as _, Frame, SizeHint};
use kms_store::Reads;
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service as _;

use super::listener::Peer;
use super::methods::{self, Method};
use crate::audit::Actor;
use crate::authz::Caller;
use crate::bounds::{Bound, Limits};
use crate::error::ServiceError;
use crate::island::{Island, principal_row};

/// Octets of requests that are not answered yet, of one connection, principal or server.
#[derive(Debug, Default)]
pub(crate) struct Held(AtomicU64);

impl Held {
    fn take(&self, octets: u64, most: u64) -> bool {
        let before = self.0.fetch_add(octets, Ordering::Relaxed);
        let fits = before.saturating_add(octets) <= most;
        if !fits {
            self.0.fetch_sub(octets, Ordering::Relaxed);
        }
        fits
    }

    fn give_back(&self, octets: u64) {
        self.0.fetch_sub(octets, Ordering::Relaxed);
    }
}

/// What is counted of a connection, and the way to end it.
#[derive(Debug, Default)]
pub struct ConnectionUse {
    held: Held,
    principal: Arc<Held>,
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl ConnectionUse {
    /// Of a connection of a principal, whose connections share `principal`.
    pub(super) fn new(principal: Arc<Held>) -> Self {
        Self { principal, ..Self::default() }
    }

    /// Ends the connection: nothing is read from it any more, and it is closed as soon as what was answered is sent.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether the connection is to end; if not, the task is woken when it is.
    pub(super) fn is_cut(&self, context: &Context<'_>) -> bool {
        self.waker.register(context.waker());
        self.cut.load(Ordering::Acquire)
    }
}

/// Octets that count until this is dropped.
#[derive(Debug)]
struct Reservation {
    connection: Arc<ConnectionUse>,
    server: Arc<Held>,
    octets: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.connection.held.give_back(self.octets);
        self.connection.principal.give_back(self.octets);
        self.server.give_back(self.octets);
    }
}

/// Takes requests in for the services. Clones share what is counted.
#[derive(Clone)]
pub(crate) struct Intake {
    limits: Arc<Limits>,
    server: Arc<Held>,
    known: Arc<Mutex<HashMap<[u8; 32], Known>>>,
}

/// What was found out about a certificate.
#[derive(Clone, Copy)]
struct Known {
    accepted: bool,
    at: Instant,
}

impl Intake {
    /// With these bounds.
    pub(crate) fn new(limits: Arc<Limits>) -> Self {
        Self { limits, server: Arc::default(), known: Arc::default() }
    }

    /// Receives the request, has the service answer it, and ends the connection of a caller that is nobody any more. Without an island, the
    /// caller is not looked at: for health and reflection.
    pub(crate) async fn serve(self, request: http::Request<Body>, island: Option<Arc<Island>>, mut routes: Routes) -> http::Response<Body> {
        let connection = request.extensions().get::<Peer>().map(|peer| Arc::clone(&peer.usage)).unwrap_or_default();
        let answer = match self.receive(request, island.as_deref(), &connection).await {
            Ok((request, reserved)) => {
                let answer: Result<_, Infallible> = routes.call(request).await;
                drop(reserved);
                match answer {
                    Ok(answer) => answer,
                    Err(never) => match never {},
                }
            }
            Err(refusal) => refusal.into_http(),
        };
        if answer.headers().get("grpc-status").is_some_and(|status| status == UNAUTHENTICATED) {
            connection.cut();
        }
        answer
    }

    async fn receive(
        &self,
        request: http::Request<Body>,
        island: Option<&Island>,
        connection: &Arc<ConnectionUse>,
    ) -> Result<(http::Request<Body>, Option<Reservation>), Status> {
        if let Some(island) = island {
            self.check_caller(island, request.extensions()).await?;
        }
        let (parts, body) = request.into_parts();
        let Some(method) = methods::of(parts.uri.path()) else {
            // The routes answer UNIMPLEMENTED; nobody reads what comes with it.
            return Ok((http::Request::from_parts(parts, Body::empty()), None));
        };
        let headers = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_COST).sum::<usize>() + parts.uri.path().len();
        let reserved = self.reserve(connection, wide(headers))?;
        if method.streaming {
            let messages = Messages::new(self.clone(), Arc::clone(connection), method, body);
            return Ok((http::Request::from_parts(parts, Body::new(messages)), Some(reserved)));
        }
        let mut message = Message { intake: self, connection, method, reserved, octets: BytesMut::new(), wanted: None };
        let receiving = message.receive(body);
        let octets = tokio::time::timeout(self.limits.time(Bound::RequestSeconds), receiving).await;
        let octets = octets.map_err(|_| self.met(Bound::RequestSeconds, "the request did not arrive in time", COME_BACK))??;
        Ok((http::Request::from_parts(parts, Body::new(Whole(octets))), Some(message.reserved)))
    }

    /// Refuses callers that are not enabled principals, before their message is read. What else is wrong with a principal's row, and a database that
    /// is away, the use case finds and records itself.
    async fn check_caller(&self, island: &Island, extensions: &http::Extensions) -> Result<(), ServiceError> {
        let caller = Caller::from_peer(extensions.get::<Peer>(), island.name(), Island::now())?;
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(&caller.certificate_sha256).filter(|known| known.at.elapsed() < KNOWN_FOR).map(|known| known.accepted)
        };
        match known {
            Some(true) => return Ok(()),
            Some(false) => return Err(nobody()),
            None => {}
        }
        match island.principal(&caller).await {
            Err(refusal @ ServiceError::Unauthenticated { .. }) => {
                self.learn(&caller, false);
                // The refusal is on the record, as that of a use case is; a flood of them costs one act a second.
                let (again, reads) = (caller.clone(), Reads { sealed: vec![principal_row(&caller.principal)], ..Reads::default() });
                let recorded = island.committer.act(Actor::caller(&caller, None, "call"), reads, move |view| view.caller(&again).map(drop)).await;
                match recorded {
                    // Enabled meanwhile.
                    Ok(_) => {
                        self.learn(&caller, true);
                        Ok(())
                    }
                    Err(_) => Err(refusal),
                }
            }
            Err(_) => Ok(()),
            Ok(_) => {
                self.learn(&caller, true);
                Ok(())
            }
        }
    }

    fn learn(&self, caller: &Caller, accepted: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN {
            known.retain(|_, known| known.at.elapsed() < KNOWN_FOR);
        }
        if known.len() < MOST_KNOWN {
            known.insert(caller.certificate_sha256, Known { accepted, at: Instant::now() });
        }
    }

    fn reserve(&self, connection: &Arc<ConnectionUse>, octets: u64) -> Result<Reservation, Status> {
        let refuse = |bound| self.met(bound, "requests that are not answered yet hold too many octets", COME_BACK);
        if !connection.held.take(octets, self.limits.request_octets_per_connection) {
            return Err(refuse(Bound::RequestOctetsPerConnection));
        }
        if !connection.principal.take(octets, self.limits.request_octets_per_principal) {
            connection.held.give_back(octets);
            return Err(refuse(Bound::RequestOctetsPerPrincipal));
        }
        if !self.server.take(octets, self.limits.request_octets) {
            connection.held.give_back(octets);
            connection.principal.give_back(octets);
            return Err(refuse(Bound::RequestOctets));
        }
        Ok(Reservation { connection: Arc::clone(connection), server: Arc::clone(&self.server), octets })
    }

    /// Reserves the octets of a message whose first five octets say how long it is.
    fn reserve_message(&self, connection: &Arc<ConnectionUse>, method: Method, prefix: [u8; PREFIX]) -> Result<(Reservation, usize), Status> {
        let [compressed, a, b, c, d] = prefix;
        if compressed != 0 {
            return Err(Status::unimplemented("compressed messages are not taken"));
        }
        let length = u32::from_be_bytes([a, b, c, d]);
        if u64::from(length) > self.limits.of(method.message) {
            return Err(self.met(method.message, &format!("the message has {length} octets"), Duration::ZERO));
        }
        let whole = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(PREFIX);
        Ok((self.reserve(connection, wide(whole))?, whole))
    }

    fn met(&self, bound: Bound, what: &str, retry_after: Duration) -> Status {
        bound.met(&self.limits, what, retry_after).into()
    }
}

/// The one message of a call, while it is received.
struct Message<'a> {
    intake: &'a Intake,
    connection: &'a Arc<ConnectionUse>,
    method: Method,
    reserved: Reservation,
    octets: BytesMut,
    /// Octets of the message with its prefix.
    wanted: Option<usize>,
}

impl Message<'_> {
    async fn receive(&mut self, mut body: Body) -> Result<Bytes, Status> {
        loop {
            let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.transpose()? else {
                return Ok(std::mem::take(&mut self.octets).freeze());
            };
            // Trailers of a request say nothing.
            let Ok(data) = frame.into_data() else { continue };
            if data.is_empty() {
                continue;
            }
            // Copied: a frame's octets keep a whole read buffer of the connection in memory.
            self.octets.extend_from_slice(&data);
            if self.wanted.is_none()
                && let Some(prefix) = self.octets.first_chunk::<PREFIX>()
            {
                let (more, whole) = self.intake.reserve_message(self.connection, self.method, *prefix)?;
                self.reserved.join(more);
                self.wanted = Some(whole);
                self.octets.reserve(whole.saturating_sub(self.octets.len()));
            }
            if self.octets.len() > self.wanted.unwrap_or(PREFIX) {
                return Err(ServiceError::invalid("request", "octets follow its one message").into());
            }
        }
    }
}

impl Reservation {
    fn join(&mut self, mut other: Self) {
        self.octets = self.octets.saturating_add(std::mem::take(&mut other.octets));
    }
}

/// A message that is there.
struct Whole(Bytes);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let octets = std::mem::take(&mut self.0);
        Poll::Ready((!octets.is_empty()).then_some(Ok(Frame::data(octets))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(wide(self.0.len()))
    }
}

/// The messages of a stream, each within its bounds of octets and time.
struct Messages {
    intake: Intake,
    connection: Arc<ConnectionUse>,
    method: Method,
    body: Body,
    /// Octets of the message that is being received: its prefix as far as it is there, then how many are to come.
    prefix: Vec<u8>,
    to_come: usize,
    reserved: Option<Reservation>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Messages {
    fn new(intake: Intake, connection: Arc<ConnectionUse>, method: Method, body: Body) -> Self {
        Self { intake, connection, method, body, prefix: Vec::with_capacity(PREFIX), to_come: 0, reserved: None, deadline: None }
    }

    /// Follows the messages in octets that have arrived. True if one of them ended.
    fn follow(&mut self, mut octets: &[u8]) -> Result<bool, Status> {
        let mut ended = false;
        while !octets.is_empty() {
            if self.to_come > 0 {
                let taken = self.to_come.min(octets.len());
                octets.advance(taken);
                self.to_come -= taken;
                ended |= self.to_come == 0;
                continue;
            }
            let taken = (PREFIX - self.prefix.len()).min(octets.len());
            self.prefix.extend_from_slice(octets.get(..taken).unwrap_or_default());
            octets.advance(taken);
            if let Some(prefix) = self.prefix.first_chunk::<PREFIX>().copied() {
                self.prefix.clear();
                // The message before is done with when the next one begins to arrive.
                self.reserved = None;
                let (reserved, whole) = self.intake.reserve_message(&self.connection, self.method, prefix)?;
                self.reserved = Some(reserved);
                self.to_come = whole - PREFIX;
                ended |= self.to_come == 0;
            }
        }
        Ok(ended)
    }
}

impl http_body::Body for Messages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(octets) = frame.data_ref() {
                    match this.follow(octets) {
                        // The next message has its own time.
                        Ok(true) => this.deadline = None,
                        Ok(false) => {}
                        Err(status) => return Poll::Ready(Some(Err(status))),
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(other) => Poll::Ready(other),
            Poll::Pending => {
                let time = this.intake.limits.time(Bound::UploadPauseSeconds);
                let deadline = this.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
                match deadline.as_mut().poll(context) {
                    Poll::Ready(()) => {
                        let status = this.intake.met(Bound::UploadPauseSeconds, "the next message did not arrive in time", COME_BACK);
                        Poll::Ready(Some(Err(status)))
                    }
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn nobody() -> ServiceError {
    ServiceError::Unauthenticated { reason: "the certificate is not one of an enabled principal of this island; ask a security officer".to_owned() }
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The prefix of a gRPC message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// What a header counts beyond its octets (RFC 9113, 6.5.2).
const HEADER_COST: usize = 32;
/// google.rpc.Code.
const UNAUTHENTICATED: &str = "16";
/// When to try again where a call of one's own must be answered first.
const COME_BACK: Duration = Duration::from_secs(1);
/// How long it is remembered whether a certificate is accepted: each use case reads the row again, so what a later answer rests on is the row.
const KNOWN_FOR: Duration = Duration::from_secs(1);
/// Certificates that are remembered.
const MOST_KNOWN: usize = 4_096;
