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
                match hello.handshake(place).await {
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
    async fn handshake(self, mut place: HandshakePlace) -> Result<TlsConnection, HandshakeError> {
        let evicted = place.evicted();
        let shaking = async {
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
                        end: End::Open,
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
            outcome = shaking => outcome,
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
pub struct TlsConnection<S = TlsStream<TcpStream>> {
    stream: S,
    peer: Peer,
    /// Runs until the first call: HTTP/2 sends no pings before the client's preface.
    first_call: Option<Pin<Box<Sleep>>>,
    end: End,
    /// Held as long as the connection is open.
    _place: ConnectionPlace,
}

/// How far the end of a connection has come.
enum End {
    /// It is open.
    Open,
    /// Nothing more is read. Answers are sent until the time is over.
    Farewell(Pin<Box<Sleep>>),
    /// Nothing more is read, and nothing is waited for.
    Closed,
    /// Nothing is read or written any more.
    Aborted,
}

impl<S> TlsConnection<S> {
    /// Looks whether the connection is to end. Every poll asks this first: HTTP/2 reads nothing
    /// while it cannot write, so the connection of a client that does not read ends in a write.
    ///
    /// # Errors
    /// It ends at once.
    fn end(&mut self, cx: &mut Context<'_>) -> io::Result<&End> {
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
        if matches!(self.end, End::Open) && self.peer.usage.is_cut(cx) {
            self.end = if self.peer.usage.has_called() {
                End::Farewell(Box::pin(tokio::time::sleep(FAREWELL)))
            } else {
                // It has no unsent answers, and its place is given to another connection.
                End::Aborted
            };
        }
        if let End::Farewell(over) = &mut self.end
            && over.as_mut().poll(cx).is_ready()
        {
            self.end = End::Closed;
        }
        if matches!(self.end, End::Aborted) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(&self.end) }
    }

    /// Writes, unless the connection has ended. A client that reads gets a proper end; one that
    /// makes the server wait is not waited for.
    fn write<T>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>>
    where
        S: Unpin,
    {
        let closed = matches!(self.end(cx)?, End::Closed);
        match write(Pin::new(&mut self.stream), cx) {
            Poll::Pending if closed => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            outcome => outcome,
        }
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TlsConnection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.end(cx)? {
            End::Open => Pin::new(&mut self.stream).poll_read(cx, buffer),
            End::Farewell(_) => Poll::Pending,
            // As the end of the client's octets.
            End::Closed | End::Aborted => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TlsConnection<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write(cx, octets))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        octets: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write_vectored(cx, octets))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |stream, cx| stream.poll_shutdown(cx))
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

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use kms_domain::{IslandName, PrincipalId, Role, UnixMillis};
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    /// A connection, and its client.
    fn connection(first_call: Duration) -> (TlsConnection<DuplexStream>, DuplexStream) {
        let principal = PrincipalId::new(IslandName::parse("north").unwrap(), Role::HeadEnd, "hes-1").unwrap();
        let doorway = Doorway::new(Limits::default());
        let handshake = doorway.handshake(IpAddr::from([192, 0, 2, 1])).unwrap();
        let (place, usage) = handshake.connection(&principal).unwrap();
        let certificate = Arc::new(PeerCertificate {
            principal,
            sha256: [1; 32],
            serial: bytes::Bytes::new(),
            not_after: UnixMillis(i64::MAX),
        });
        let first_call = Some(Box::pin(tokio::time::sleep(first_call)));
        let (stream, client) = duplex(64);
        let peer = Peer { certificate, usage };
        (TlsConnection { stream, peer, first_call, end: End::Open, _place: place }, client)
    }

    /// The error that ends a connection whose client does not read.
    async fn ended(connection: &mut TlsConnection<DuplexStream>) -> io::ErrorKind {
        let written = tokio::time::timeout(WITHIN, connection.write_all(&[0; 1_000])).await;
        written.unwrap().unwrap_err().kind()
    }

    #[tokio::test]
    async fn a_connection_ends_though_its_client_does_not_read() {
        // No call in time.
        let (mut silent, _client) = connection(Duration::from_millis(50));
        assert_eq!(ended(&mut silent).await, io::ErrorKind::ConnectionAborted);
        assert!(silent.read(&mut [0]).await.is_err() && silent.shutdown().await.is_err());

        // Cut while the server waits to write.
        let (mut cut, _client) = connection(WITHIN);
        let usage = Arc::clone(&cut.peer.usage);
        usage.note_called();
        let waiting = tokio::spawn(async move { (ended(&mut cut).await, cut.read(&mut [0]).await) });
        tokio::task::yield_now().await;
        usage.cut();
        let (written, read) = waiting.await.unwrap();
        assert_eq!((written, read.unwrap()), (io::ErrorKind::TimedOut, 0));
    }

    #[tokio::test]
    async fn a_client_that_reads_gets_its_answers_and_a_proper_end() {
        let (mut cut, mut client) = connection(WITHIN);
        cut.peer.usage.note_called();
        cut.peer.usage.cut();
        client.write_all(b"another call").await.unwrap();
        let reading = tokio::spawn(async move {
            let mut answers = Vec::new();
            client.read_to_end(&mut answers).await.map(|_| answers.len())
        });
        cut.write_all(&[0; 1_000]).await.unwrap();
        // Nothing more is read; after the time of the farewell this is the end.
        assert_eq!(tokio::time::timeout(WITHIN, cut.read(&mut [0; 16])).await.unwrap().unwrap(), 0);
        cut.write_all(&[0; 10]).await.unwrap();
        cut.shutdown().await.unwrap();
        assert_eq!(reading.await.unwrap().unwrap(), 1_010);
    }

    const WITHIN: Duration = Duration::from_secs(20);
}
