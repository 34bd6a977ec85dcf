//! The accept loop: TCP, then the TLS handshake with a time limit, then tonic. It bounds everything
//! that a stranger can make the server hold, before any octet reaches HTTP/2, and the connections
//! of each principal.

use async_recursion::async_recursion as boxed;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::doorway::{ConnectionPlace, Doorway, HandshakePlace};
use crate::peer::Peer;
use crate::tls::{ServerTls, TlsError};
use kms_authz::{PeerCertificate, PeerCertificateError};
use kms_base::Seldom;
use kms_base::bounds::{Bound, Limits};

/// Bounds of HTTP/2 on each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportLimits {
    streams: u32,
    headers: u32,
}

impl TransportLimits {
    /// The limits of the configuration.
    pub fn of(limits: &Limits) -> Self {
        let narrow = |bound| u32::try_from(limits.of(bound)).unwrap_or(u32::MAX);
        Self { streams: narrow(Bound::StreamsPerConnection), headers: narrow(Bound::HeaderOctets) }
    }

    /// The limits of connections of strangers: one call at a time.
    pub(crate) fn of_strangers(limits: &Limits) -> Self {
        Self { streams: 1, ..Self::of(limits) }
    }

    /// A tonic server with these limits. The window of the connection bounds octets that no service
    /// has read yet. A client that resets streams faster than they end is disconnected
    /// (CVE-2023-44487).
    pub fn server(&self) -> Server {
        Server::builder()
            .max_concurrent_streams(self.streams)
            .concurrency_limit_per_connection(usize::try_from(self.streams).unwrap_or(usize::MAX))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .http2_max_header_list_size(self.headers)
            .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .tcp_nodelay(true)
    }
}

/// A bound TCP port that speaks mutual TLS.
pub struct Listener {
    tcp: TcpListener,
    tls: Arc<ServerTls>,
    limits: Limits,
}

impl Listener {
    /// Binds the address.
    ///
    /// # Errors
    /// The address cannot be bound: it is in use, or not of this host.
    #[boxed]
    pub async fn bind(address: SocketAddr, tls: Arc<ServerTls>, limits: &Limits) -> io::Result<Self> {
        Ok(Self { tcp: TcpListener::bind(address).await?, tls, limits: limits.clone() })
    }

    /// The bound address, with the real port if the configured port is 0.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Accepts until the stream is dropped. Yields connections of principals only; others are
    /// closed and logged.
    pub fn incoming(self) -> impl Stream<Item = io::Result<TlsConnection>> + Send + use<> {
        let (ready, incoming) = mpsc::channel(READY_CONNECTIONS);
        tokio::spawn(self.accept(ready));
        ReceiverStream::new(incoming)
    }

    async fn accept(self, ready: mpsc::Sender<io::Result<TlsConnection>>) {
        let doorway = Doorway::new(self.limits.clone());
        let refused = Arc::new(Seldom::default());
        loop {
            let (tcp, remote) = tokio::select! {
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // No file descriptor is free, or the client left: neither ends the server.
                        refused.say(|unsaid| tracing::warn!(%error, unsaid, "cannot accept a connection"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = ready.closed() => return,
            };
            let place = match doorway.handshake(remote.ip()) {
                Ok(place) => place,
                Err(bound) => {
                    refused.say(|unsaid| tracing::warn!(%remote, bound = bound.name(), unsaid, "connection closed before its handshake"));
                    continue;
                }
            };
            let hello = Hello { acceptor: TlsAcceptor::from(self.tls.current()), tcp, limits: self.limits.clone() };
            let (ready, refused) = (ready.clone(), Arc::clone(&refused));
            tokio::spawn(async move {
                match hello.meet(place).await {
                    Ok(connection) => drop(ready.send(Ok(connection)).await),
                    Err(error) => refused.say(|unsaid| tracing::info!(%remote, %error, unsaid, "handshake refused")),
                }
            });
        }
    }
}

/// A connection before its handshake.
struct Hello {
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    limits: Limits,
}

impl Hello {
    /// Makes the handshake, until it is evicted.
    async fn meet(self, mut place: HandshakePlace) -> Result<TlsConnection, HandshakeError> {
        let evicted = place.evicted();
        let meeting = async {
            let in_time = |bound| self.limits.time(bound);
            // In TLS the client sends first: a silent client needs no place.
            let spoken = tokio::time::timeout(in_time(Bound::FirstOctetSeconds), self.tcp.peek(&mut [0])).await;
            if spoken.map_err(|_| HandshakeError::met(Bound::FirstOctetSeconds))?? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            place.spoke();
            self.tcp.set_nodelay(true)?;
            let shaken = tokio::time::timeout(in_time(Bound::HandshakeSeconds), self.acceptor.accept(self.tcp)).await;
            let mut stream = shaken.map_err(|_| HandshakeError::met(Bound::HandshakeSeconds))??;
            let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let certificate = certificate
                .ok_or_else(|| TlsError::from(PeerCertificateError { reason: "there is none".to_owned() }))?;
            let certificate = Arc::new(PeerCertificate::parse(certificate).map_err(TlsError::from)?);
            match place.connection(&certificate.principal) {
                Ok((place, usage)) => {
                    let first_call = Some(Box::pin(tokio::time::sleep(in_time(Bound::FirstCallSeconds))));
                    Ok(TlsConnection {
                        stream,
                        peer: Peer { certificate, usage },
                        first_call,
                        closing: None,
                        _place: place,
                    })
                }
                Err(bound) => {
                    // The client gets the reason. It has a short time to read it.
                    drop(tokio::time::timeout(FAREWELL, farewell(&mut stream, bound, &self.limits)).await);
                    Err(HandshakeError::Bound { bound: bound.name(), principal: certificate.principal.to_string() })
                }
            }
        };
        tokio::select! {
            outcome = meeting => outcome,
            bound = evicted => Err(HandshakeError::met(bound)),
        }
    }
}

/// An empty SETTINGS frame and a GOAWAY with ENHANCE_YOUR_CALM and the bound's name (RFC 9113, 6.5,
/// 6.8 and 7).
async fn farewell(stream: &mut TlsStream<TcpStream>, bound: Bound, limits: &Limits) -> io::Result<()> {
    let reason =
        format!("the bound `{}` is {} connections for each {}", bound.name(), limits.of(bound), bound.row().scope);
    let length = u8::try_from(reason.len() + 8).unwrap_or(u8::MAX);
    let mut frames = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    frames.extend([0, 0, length, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11]);
    frames.extend(reason.as_bytes().get(..usize::from(length) - 8).unwrap_or_default());
    stream.write_all(&frames).await?;
    stream.shutdown().await?;
    // Unread octets would turn the close into a reset, which discards the frames.
    while stream.read(&mut [0; 256]).await? > 0 {}
    Ok(())
}

/// A connection of a principal, after its handshake.
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// Runs until the first call: HTTP/2 sends no pings before the client's preface.
    first_call: Option<Pin<Box<Sleep>>>,
    /// Runs when the connection is to end.
    closing: Option<Pin<Box<Sleep>>>,
    /// Held as long as the connection is open.
    _place: ConnectionPlace,
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(mut first_call) = self.first_call.take()
            && !self.peer.usage.has_called()
        {
            match first_call.as_mut().poll(cx) {
                Poll::Pending => self.first_call = Some(first_call),
                Poll::Ready(()) => {
                    Bound::FirstCallSeconds.count();
                    self.peer.usage.cut();
                }
            }
        }
        if self.peer.usage.is_cut(cx) {
            if !self.peer.usage.has_called() {
                // It has no unsent answers, and its place is given to another connection.
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            // Nothing more is read. Answers have a short time to be sent; then this reads as the
            // end of the client's octets.
            return self
                .closing
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(FAREWELL)))
                .as_mut()
                .poll(cx)
                .map(Ok);
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        octets: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, octets)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Certificate(#[from] TlsError),
    #[error("the bound `{0}` is reached")]
    Met(&'static str),
    #[error("`{principal}` may open no further connection: the bound `{bound}` is reached")]
    Bound { bound: &'static str, principal: String },
}

impl HandshakeError {
    fn met(bound: Bound) -> Self {
        bound.count();
        Self::Met(bound.name())
    }
}

/// Connections that wait for tonic to take them.
const READY_CONNECTIONS: usize = 64;
/// How long the loop waits after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long sending an answer may take before the connection is closed.
const FAREWELL: Duration = Duration::from_millis(500);
/// After this time an idle connection gets a ping, and it is closed without an answer.
const KEEPALIVE: Duration = Duration::from_secs(30);
const STREAM_WINDOW: u32 = 256 << 10;
/// Part of what a connection can hold: see `request_octets_per_connection`.
const CONNECTION_WINDOW: u32 = 512 << 10;
const MAX_FRAME: u32 = 64 << 10;
const MAX_RESETS: usize = 32;
