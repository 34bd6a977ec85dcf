//! The enrolment door: a listener of its own for devices that have no certificate yet. It offers
//! one method, and has bounds of its own for everything that a stranger can make the server hold.

use async_recursion::async_recursion as boxed;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use kms_proto::v1::enrolment_service_server::EnrolmentServiceServer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tower::Service;
use tracing::Instrument as _;

use crate::doorway::Network;
use crate::enrolment_places::{Attempts, EnrolmentPlace, EnrolmentPlaces};
use crate::enrolments::{EnrolmentApi, ServerAddress};
use crate::intake::Intake;
use crate::listener::TransportLimits;
use crate::refusals;
use crate::telemetry::Call;
use crate::tls::ServerTls;
use kms_base::Seldom;
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;
use kms_service::certificate::CertificateAuthority;
use kms_service::handheld::enrol::EnrolmentService;
use kms_service::island::IslandContext;

/// A bound TCP port for devices without a certificate.
pub struct EnrolmentDoor {
    tcp: TcpListener,
    tls: Arc<ServerTls>,
    limits: Limits,
    gate: EnrolmentGate,
}

impl EnrolmentDoor {
    /// Binds the address.
    ///
    /// # Errors
    /// The address cannot be bound: it is in use, or not of this host.
    #[boxed]
    pub async fn bind(address: SocketAddr, tls: Arc<ServerTls>, limits: &Limits) -> io::Result<Self> {
        // What strangers hold is counted apart from what principals hold.
        let held = limits.enrolment_connections * (limits.certificate_message_octets + 2 * limits.header_octets);
        let intake = Intake::new(Arc::new(Limits { request_octets: held, ..limits.clone() }));
        let gate = EnrolmentGate { island: Arc::default(), intake, attempts: Arc::default(), limits: limits.clone() };
        Ok(Self { tcp: TcpListener::bind(address).await?, tls, limits: limits.clone(), gate })
    }

    /// The bound address, with the real port if the configured port is 0.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// The gate, to be opened with the island.
    pub fn gate(&self) -> EnrolmentGate {
        self.gate.clone()
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    /// HTTP/2 cannot be served.
    #[boxed]
    pub async fn serve(self, stop: Pin<Box<dyn Future<Output = ()> + Send>>) -> Result<(), tonic::transport::Error> {
        let server = TransportLimits::of_strangers(&self.limits).server();
        let gate = self.gate.clone();
        server.serve_with_incoming_shutdown(gate, self.incoming(), stop).await
    }

    fn incoming(self) -> impl Stream<Item = io::Result<StrangerConnection>> + Send + use<> {
        let (ready, incoming) = mpsc::channel(1);
        tokio::spawn(self.accept(ready));
        ReceiverStream::new(incoming)
    }

    async fn accept(self, ready: mpsc::Sender<io::Result<StrangerConnection>>) {
        let places = EnrolmentPlaces::new(self.limits.clone());
        let refused = Arc::new(Seldom::default());
        loop {
            let (tcp, remote) = tokio::select! {
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        refused.say(|unsaid| tracing::warn!(%error, unsaid, "the enrolment door cannot accept a connection"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = ready.closed() => return,
            };
            let place = match places.take(remote.ip()) {
                Ok(place) => place,
                Err(bound) => {
                    refused.say(|unsaid| tracing::warn!(%remote, bound = bound.name(), unsaid, "connection to the enrolment door closed"));
                    continue;
                }
            };
            let acceptor = TlsAcceptor::from(self.tls.current_for_strangers());
            let (limits, ready, refused) = (self.limits.clone(), ready.clone(), Arc::clone(&refused));
            tokio::spawn(async move {
                match handshake(acceptor, tcp, place, &limits).await {
                    Ok(connection) => drop(ready.send(Ok(connection)).await),
                    Err(error) => refused.say(
                        |unsaid| tracing::info!(%remote, %error, unsaid, "handshake refused at the enrolment door"),
                    ),
                }
            });
        }
    }
}

/// Makes the handshake, until the connection is evicted or its time is over.
async fn handshake(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    mut place: EnrolmentPlace,
    limits: &Limits,
) -> io::Result<StrangerConnection> {
    let mut ends = Box::pin(tokio::time::sleep(limits.time(Bound::EnrolmentSeconds)));
    let met = |bound: Bound| {
        bound.count();
        io::Error::new(io::ErrorKind::TimedOut, format!("the bound `{}` is reached", bound.name()))
    };
    let shaking = async {
        // In TLS the client sends first: a silent client needs no handshake.
        let spoken = tokio::time::timeout(limits.time(Bound::FirstOctetSeconds), tcp.peek(&mut [0])).await;
        if spoken.map_err(|_| met(Bound::FirstOctetSeconds))?? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        tcp.set_nodelay(true)?;
        let shaken = tokio::time::timeout(limits.time(Bound::HandshakeSeconds), acceptor.accept(tcp)).await;
        shaken.map_err(|_| met(Bound::HandshakeSeconds))?
    };
    let stream = tokio::select! {
        stream = shaking => stream?,
        () = &mut ends => return Err(met(Bound::EnrolmentSeconds)),
        _ = &mut place.evicted => return Err(io::Error::from(io::ErrorKind::ConnectionAborted)),
    };
    Ok(StrangerConnection { stream, ends, place, over: None })
}

/// A connection of a stranger, after its handshake.
struct StrangerConnection<S = TlsStream<TcpStream>> {
    stream: S,
    /// Runs until the connection has to end.
    ends: Pin<Box<Sleep>>,
    /// Held as long as the connection is open.
    place: EnrolmentPlace,
    /// Why the connection is over.
    over: Option<io::ErrorKind>,
}

impl<S> StrangerConnection<S> {
    /// An error, if the time of the connection is over or it is evicted. Every poll asks this
    /// first: HTTP/2 reads nothing while it cannot write, so a client that does not read ends in a
    /// write.
    fn over(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.over.is_none() {
            if self.ends.as_mut().poll(cx).is_ready() {
                Bound::EnrolmentSeconds.count();
                self.over = Some(io::ErrorKind::TimedOut);
            } else if Pin::new(&mut self.place.evicted).poll(cx).is_ready() {
                self.over = Some(io::ErrorKind::ConnectionAborted);
            }
        }
        self.over.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

/// What every request of such a connection carries in its extensions.
#[derive(Clone, Copy)]
struct Stranger(Network);

impl Connected for StrangerConnection {
    type ConnectInfo = Stranger;

    fn connect_info(&self) -> Stranger {
        Stranger(self.place.network)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StrangerConnection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.over(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StrangerConnection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        self.over(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.over(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.over(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The one method of the door, when the island is open.
#[derive(Clone)]
pub struct EnrolmentGate {
    island: Arc<OnceLock<(Routes, Arc<IslandContext>)>>,
    intake: Intake,
    attempts: Arc<Attempts>,
    limits: Limits,
}

impl EnrolmentGate {
    /// Begins to enrol devices of this island, which find the ordinary listener at `address`.
    pub fn open(&self, island: Arc<IslandContext>, authority: CertificateAuthority, address: ServerAddress) {
        let most = self.limits.number(Bound::CertificateMessageOctets);
        let enrolments = EnrolmentService::new(Arc::clone(&island), authority);
        let service = EnrolmentServiceServer::new(EnrolmentApi::new(enrolments, address));
        let routes = Routes::new(service.max_decoding_message_size(most)).prepare();
        drop(self.island.set((routes, island)));
    }

    /// Refuses what is not to be served.
    fn admit(&self, request: &http::Request<Body>) -> Result<(Routes, Arc<IslandContext>), Status> {
        if request.uri().path() != METHOD {
            return Err(Status::unimplemented("this listener enrols handhelds, and does nothing else"));
        }
        let (routes, island) = self
            .island
            .get()
            .ok_or_else(|| ServiceError::unavailable("the island is not open yet; the server's log tells why"))?;
        if let Some(Stranger(network)) = request.extensions().get() {
            let most = self.limits.enrolment_calls_per_address_and_hour;
            self.attempts.count(*network, most, Instant::now()).map_err(|retry_after| {
                Bound::EnrolmentCallsPerAddressAndHour.met(&self.limits, "too many attempts to enrol", retry_after)
            })?;
        }
        Ok((routes.clone(), Arc::clone(island)))
    }
}

impl Service<http::Request<Body>> for EnrolmentGate {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let call = Call::begin(&request);
        match self.admit(&request) {
            Ok((routes, island)) => {
                let call = call.watched(refusals::watch(&island.committer, &request));
                // The caller is no principal, so the intake compares no certificate.
                let answer = self.intake.clone().serve(request, None, routes).instrument(call.span());
                Box::pin(async move { Ok(call.answered(answer.await)) })
            }
            // A connection makes one call at a time, so few calls in a second.
            Err(refusal) => Box::pin(async move {
                tokio::time::sleep(REFUSAL_PAUSE).await;
                Ok(call.answered(refusal.into_http()))
            }),
        }
    }
}

/// The path of the one method.
const METHOD: &str = "/meterkms.v1.EnrolmentService/Enrol";
/// How long a call waits that is not admitted.
const REFUSAL_PAUSE: Duration = Duration::from_millis(100);
/// How long the loop waits after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    /// A connection, and its client, which reads nothing.
    fn connection(place: EnrolmentPlace, lives: Duration) -> (StrangerConnection<DuplexStream>, DuplexStream) {
        let (stream, client) = duplex(64);
        (StrangerConnection { stream, ends: Box::pin(tokio::time::sleep(lives)), place, over: None }, client)
    }

    /// Writes more than the connection takes: the error that ends it, for the writer and for all
    /// that follows.
    async fn ended(mut connection: StrangerConnection<DuplexStream>) -> io::ErrorKind {
        let written = tokio::time::timeout(WITHIN, connection.write_all(&[0; 1_000])).await;
        let kind = written.unwrap().unwrap_err().kind();
        assert_eq!(connection.flush().await.unwrap_err().kind(), kind);
        assert_eq!(connection.shutdown().await.unwrap_err().kind(), kind);
        assert_eq!(connection.read(&mut [0]).await.unwrap_err().kind(), kind);
        kind
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_closed_as_any_other() {
        let limits = Limits { enrolment_connections: 2, ..Limits::default() };
        let places = EnrolmentPlaces::new(limits);
        let take = |last| places.take(IpAddr::from([192, 0, 2, last])).unwrap();
        let (timed, _client) = connection(take(1), Duration::from_millis(50));
        assert_eq!(ended(timed).await, io::ErrorKind::TimedOut);

        // Evicted while the server waits to write.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (evicted, _client) = connection(take(1), WITHIN);
        let _another = take(1);
        let waiting = tokio::spawn(ended(evicted));
        tokio::task::yield_now().await;
        let _newcomer = take(2);
        assert_eq!(waiting.await.unwrap(), io::ErrorKind::ConnectionAborted);
    }

    const WITHIN: Duration = Duration::from_secs(20);
}
