//! Requests on their way in: what a caller can make the server hold before a use case sees the
//! call.
//!
//! A call's message is received as a whole before its service is entered: its length is compared
//! with the bound of the method when the first five octets of it are there, its octets count for
//! connection, principal and server until the call is answered, and it has a time to arrive.
//! Messages of a stream are bounded one by one. A principal that is disabled or unknown is refused
//! before an octet of the message is read, and its connection is closed.

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
use kms_authz::Caller;
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};
use kms_service::island::Island;

/// A call, before it is known what it asks for. The door lets it pass if its caller may call.
struct Call;

impl Act for Call {
    type Answer = ();
    type Past = Never;

    fn name(&self) -> &'static str {
        "call"
    }

    fn reads(&self) -> Reads {
        Reads::default()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.without_policy("it asks for nothing yet"))
    }

    fn decide(&self, _: &Permit, _: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        Ok(Decision::unchanged(()))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        match never {}
    }
}

/// What one connection, principal or server holds: octets of requests that are not answered yet, or
/// calls.
#[derive(Debug, Default)]
pub struct Held(AtomicU64);

impl Held {
    fn take(&self, number: u64, most: u64) -> bool {
        let before = self.0.fetch_add(number, Ordering::Relaxed);
        let fits = before.saturating_add(number) <= most;
        if !fits {
            self.0.fetch_sub(number, Ordering::Relaxed);
        }
        fits
    }

    fn give_back(&self, number: u64) {
        self.0.fetch_sub(number, Ordering::Relaxed);
    }
}

/// What is counted over all connections of a principal.
#[derive(Debug, Default)]
pub struct PrincipalUse {
    octets: Held,
    answer_streams: Held,
}

/// What is counted of a connection, and the way to end it.
#[derive(Debug, Default)]
pub struct ConnectionUse {
    held: Held,
    principal: Arc<PrincipalUse>,
    /// A call came in, of whatever kind.
    called: AtomicBool,
    /// A call of a principal that the island knows came in.
    known: AtomicBool,
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl ConnectionUse {
    /// Of a connection of a principal, whose connections share `principal`.
    pub fn new(principal: Arc<PrincipalUse>) -> Self {
        Self { principal, ..Self::default() }
    }

    /// Ends the connection: nothing is read from it any more, and it is closed as soon as what was
    /// answered is sent.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether a call came in.
    pub fn has_called(&self) -> bool {
        self.called.load(Ordering::Relaxed)
    }

    /// Whether a call of a principal that the island knows came in: such a connection gives its
    /// place up for nobody.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Notes a call of a principal that the island knows.
    pub fn note_known(&self) {
        self.known.store(true, Ordering::Relaxed);
    }

    /// Whether the connection is to end; if not, the task is woken when it is.
    pub fn is_cut(&self, context: &Context<'_>) -> bool {
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
        self.connection.principal.octets.give_back(self.octets);
        self.server.give_back(self.octets);
    }
}

/// Takes requests in for the services. Clones share what is counted.
#[derive(Clone)]
pub struct Intake {
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
    pub fn new(limits: Arc<Limits>) -> Self {
        Self { limits, server: Arc::default(), known: Arc::default() }
    }

    /// Receives the request, has the service answer it, and ends the connection of a caller that is
    /// nobody any more. Without an island, the caller is not looked at: for health and reflection.
    pub async fn serve(
        self,
        request: http::Request<Body>,
        island: Option<Arc<Island>>,
        mut routes: Routes,
    ) -> http::Response<Body> {
        let peer = request.extensions().get::<Peer>();
        let certificate = peer.map(|peer| peer.certificate.sha256);
        let connection = peer.map(|peer| Arc::clone(&peer.usage)).unwrap_or_default();
        connection.called.store(true, Ordering::Relaxed);
        let streams = methods::of(request.uri().path()).is_some_and(|method| method.answers_stream);
        let mut place = None;
        let answer = match self.receive(request, island.as_deref(), &connection).await.and_then(|received| {
            place = streams.then(|| self.answer_stream(&connection)).transpose()?;
            Ok(received)
        }) {
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
            // Also where the use case found it out: the next connection is not to be believed
            // either.
            if let Some(certificate) = certificate {
                let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                if known.get(&certificate).is_some_and(|known| known.accepted) {
                    known.remove(&certificate);
                }
            }
            connection.cut();
        }
        match place {
            Some(place) => answer.map(|body| Body::new(Answer { body, _place: place })),
            None => answer,
        }
    }

    fn answer_stream(&self, connection: &ConnectionUse) -> Result<AnswerPlace, Status> {
        let principal = Arc::clone(&connection.principal);
        if !principal.answer_streams.take(1, self.limits.answer_streams_per_principal) {
            return Err(self.met(Bound::AnswerStreamsPerPrincipal, "too many calls are being answered", COME_BACK));
        }
        Ok(AnswerPlace(principal))
    }

    async fn receive(
        &self,
        request: http::Request<Body>,
        island: Option<&Island>,
        connection: &Arc<ConnectionUse>,
    ) -> Result<(http::Request<Body>, Option<Reservation>), Status> {
        if let Some(island) = island {
            self.check_caller(island, request.extensions()).await?;
            connection.note_known();
        }
        let (parts, body) = request.into_parts();
        let Some(method) = methods::of(parts.uri.path()) else {
            // The routes answer UNIMPLEMENTED; nobody reads what comes with it.
            return Ok((http::Request::from_parts(parts, Body::empty()), None));
        };
        let headers =
            parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_COST).sum::<usize>()
                + parts.uri.path().len();
        let mut reserved = self.reserve(connection, wide(headers))?;
        if method.streaming {
            // What its service collects between messages: of an upload, a piece of 1 MiB.
            reserved.join(self.reserve(connection, self.limits.of(method.message) / 2)?);
            let messages = Messages::new(self.clone(), Arc::clone(connection), method, body);
            return Ok((http::Request::from_parts(parts, Body::new(messages)), Some(reserved)));
        }
        let mut message = Message { intake: self, connection, method, reserved, octets: BytesMut::new(), wanted: None };
        let receiving = message.receive(body);
        let octets = tokio::time::timeout(self.limits.time(Bound::RequestSeconds), receiving).await;
        let octets =
            octets.map_err(|_| self.met(Bound::RequestSeconds, "the request did not arrive in time", COME_BACK))??;
        Ok((http::Request::from_parts(parts, Body::new(Whole(octets))), Some(message.reserved)))
    }

    /// Refuses callers that are not enabled principals, before their message is read. What else is
    /// wrong with a principal's row, and a database that is away, the use case finds and records
    /// itself.
    async fn check_caller(&self, island: &Island, extensions: &http::Extensions) -> Result<(), ServiceError> {
        let caller = Caller::of(extensions.get::<Peer>().map(|peer| &*peer.certificate), island.name(), Island::now())?;
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known
                .get(&caller.certificate_sha256)
                .filter(|known| known.at.elapsed() < KNOWN_FOR)
                .map(|known| known.accepted)
        };
        match known {
            Some(true) => return Ok(()),
            Some(false) => return Err(nobody()),
            None => {}
        }
        match island.principal(&caller).await {
            Err(refusal @ ServiceError::Unauthenticated { .. }) => {
                self.learn(&caller, false);
                // The refusal is on the record, as that of a use case is; a flood of them costs one
                // act a second.
                let recorded = island.door.act(&caller, None, Call).await;
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
        if !connection.principal.octets.take(octets, self.limits.request_octets_per_principal) {
            connection.held.give_back(octets);
            return Err(refuse(Bound::RequestOctetsPerPrincipal));
        }
        if !self.server.take(octets, self.limits.request_octets) {
            connection.held.give_back(octets);
            connection.principal.octets.give_back(octets);
            return Err(refuse(Bound::RequestOctets));
        }
        Ok(Reservation { connection: Arc::clone(connection), server: Arc::clone(&self.server), octets })
    }

    /// Reserves the octets of a message whose first five octets say how long it is.
    fn reserve_message(
        &self,
        connection: &Arc<ConnectionUse>,
        method: Method,
        prefix: [u8; PREFIX],
    ) -> Result<(Reservation, usize), Status> {
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
            let Some(frame) =
                std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.transpose()?
            else {
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

/// A place among the calls that are answered by a stream.
struct AnswerPlace(Arc<PrincipalUse>);

impl Drop for AnswerPlace {
    fn drop(&mut self) {
        self.0.answer_streams.give_back(1);
    }
}

/// An answer that holds its place until it has ended.
struct Answer {
    body: Body,
    _place: AnswerPlace,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
    /// Octets of the message that is being received: its prefix as far as it is there, then how
    /// many are to come.
    prefix: Vec<u8>,
    to_come: usize,
    reserved: Option<Reservation>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Messages {
    fn new(intake: Intake, connection: Arc<ConnectionUse>, method: Method, body: Body) -> Self {
        Self {
            intake,
            connection,
            method,
            body,
            prefix: Vec::with_capacity(PREFIX),
            to_come: 0,
            reserved: None,
            deadline: None,
        }
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
                        let status = this.intake.met(
                            Bound::UploadPauseSeconds,
                            "the next message did not arrive in time",
                            COME_BACK,
                        );
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
    ServiceError::unauthenticated(
        "the certificate is not one of an enabled principal of this island; ask a security officer",
    )
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
/// How long it is remembered whether a certificate is accepted: each use case reads the row again,
/// so what a later answer rests on is the row.
const KNOWN_FOR: Duration = Duration::from_secs(1);
/// Certificates that are remembered.
const MOST_KNOWN: usize = 4_096;

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Frames, then the end; or, without one, nothing more.
    struct Frames {
        octets: VecDeque<Vec<u8>>,
        ends: bool,
    }

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            match self.octets.pop_front() {
                Some(octets) => Poll::Ready(Some(Ok(Frame::data(octets.into())))),
                None if self.ends => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    fn frames(octets: &[&[u8]], ends: bool) -> Body {
        Body::new(Frames { octets: octets.iter().map(|octets| octets.to_vec()).collect(), ends })
    }

    fn message(announced: u32, sent: usize) -> Vec<u8> {
        let mut octets = vec![0];
        octets.extend(announced.to_be_bytes());
        octets.resize(PREFIX + sent, 7);
        octets
    }

    fn request(path: &str, body: Body) -> http::Request<Body> {
        http::Request::post(format!("https://kms/{path}")).body(body).unwrap()
    }

    async fn octets(mut body: Body) -> Result<Vec<u8>, Status> {
        let mut octets = Vec::new();
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            octets.extend(frame?.into_data().unwrap_or_default());
        }
        Ok(octets)
    }

    const OPEN: &str = "meterkms.v1.GrantService/OpenSession";
    const UPLOAD: &str = "meterkms.v1.ShipmentService/UploadShipment";

    #[tokio::test]
    async fn a_message_comes_whole_however_it_is_cut_and_counts_until_it_is_answered() {
        let (intake, connection) = (Intake::new(Arc::default()), Arc::new(ConnectionUse::default()));
        let whole = message(300, 300);
        for cut in [1, 4, 5, 6, 304] {
            let (first, second) = whole.split_at(cut);
            let (taken, reserved) =
                intake.receive(request(OPEN, frames(&[first, &[], second], true)), None, &connection).await.unwrap();
            assert_eq!(octets(taken.into_body()).await.unwrap(), whole, "cut at {cut}");
            let held = intake.server.0.load(Ordering::Relaxed);
            assert!((305..400).contains(&held), "{held}");
            drop(reserved);
            assert_eq!(intake.server.0.load(Ordering::Relaxed), 0);
        }
        for (body, expected) in [
            (frames(&[&message(16_385, 0)], false), "`message_octets`"),
            (frames(&[&message(3, 4)], false), "octets follow"),
            (frames(&[&[1, 0, 0, 0, 1, 7]], true), "compressed"),
        ] {
            let refused = intake.receive(request(OPEN, body), None, &connection).await.err().unwrap();
            assert!(refused.message().contains(expected), "{refused}");
        }
        assert_eq!(intake.server.0.load(Ordering::Relaxed), 0, "a refusal gives everything back");
    }

    #[tokio::test]
    async fn each_message_of_a_stream_has_its_bound_and_counts_alone() {
        let (intake, connection) = (Intake::new(Arc::default()), Arc::new(ConnectionUse::default()));
        let pieces: Vec<Vec<u8>> = (0..20).map(|_| message(1 << 20, 1 << 20)).collect();
        let all = pieces.concat();
        let body = Body::new(Frames { octets: all.chunks(300_001).map(<[u8]>::to_vec).collect(), ends: true });
        let (taken, reserved) = intake.receive(request(UPLOAD, body), None, &connection).await.unwrap();
        // 20 MiB in all, and 8 MiB for the connection.
        assert_eq!(octets(taken.into_body()).await.unwrap(), all);
        drop(reserved);
        assert_eq!(intake.server.0.load(Ordering::Relaxed), 0);
        let (taken, _) = intake
            .receive(request(UPLOAD, frames(&[&message(3, 3), &message(3 << 20, 1)], true)), None, &connection)
            .await
            .unwrap();
        let refused = octets(taken.into_body()).await.unwrap_err();
        assert!(
            refused.code() == tonic::Code::ResourceExhausted && refused.message().contains("`large_message_octets`"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn requests_that_are_not_answered_have_a_bound_for_each_connection_and_principal() {
        let limits =
            Limits { request_octets_per_connection: 1_000, request_octets_per_principal: 1_500, ..Limits::default() };
        let (intake, principal) = (Intake::new(Arc::new(limits)), Arc::new(PrincipalUse::default()));
        let connections = [(); 2].map(|()| Arc::new(ConnectionUse::new(Arc::clone(&principal))));
        let ask = async |connection: &Arc<ConnectionUse>, length: u32| {
            let whole = message(length, usize::try_from(length).unwrap());
            intake.receive(request(OPEN, frames(&[&whole], true)), None, connection).await.map(|(_, reserved)| reserved)
        };
        let first = ask(&connections[0], 800).await.unwrap();
        let refused = ask(&connections[0], 800).await.unwrap_err();
        assert!(refused.message().contains("`request_octets_per_connection`"), "{refused}");
        let refused = ask(&connections[1], 800).await.unwrap_err();
        assert!(refused.message().contains("`request_octets_per_principal`"), "{refused}");
        drop(first);
        ask(&connections[1], 800).await.unwrap();
        let streams: Vec<AnswerPlace> =
            (0..64).map(|number| intake.answer_stream(&connections[number % 2]).unwrap()).collect();
        let refused = intake.answer_stream(&connections[0]).err().unwrap();
        assert!(refused.message().contains("`answer_streams_per_principal` is 64"), "{refused}");
        drop(streams);
        intake.answer_stream(&connections[0]).unwrap();
    }
}
