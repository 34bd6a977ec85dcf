//! The accept loop: TCP, then the TLS handshake with a time limit, then tonic. Everything that a stranger can make the server
//! hold is bounded here, before any of his octets reach HTTP/2.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::tls::{PeerCertificate, ServerTls, TlsError};

/// Bounds of the listener and of each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportLimits {
    /// Connections at a time. Further ones are closed after their handshake.
    pub connections: usize,
    /// Handshakes at a time. The next client waits in the kernel's backlog.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Calls at a time on one connection (SETTINGS_MAX_CONCURRENT_STREAMS).
    pub streams_per_connection: u32,
    /// Octets of one message from a client. A batch of 10,000 meters needs 100 KiB; a shipment comes in pieces of 1 MiB.
    pub message_octets: usize,
    /// A connection that is idle for so long is asked for a sign of life, and closed without one.
    pub keepalive: Duration,
}

impl Default for TransportLimits {
    fn default() -> Self {
        Self {
            connections: 2_048,
            handshakes: 128,
            handshake_timeout: Duration::from_secs(10),
            streams_per_connection: 256,
            message_octets: 2 << 20,
            keepalive: Duration::from_secs(30),
        }
    }
}

impl TransportLimits {
    /// A tonic server with these limits. The largest buffer of a connection is its HTTP/2 window, 1 MiB; headers are at most
    /// 16 KiB a call; a client that resets streams faster than they end is disconnected (CVE-2023-44487).
    pub fn server(&self) -> Server {
        Server::builder()
            .max_concurrent_streams(self.streams_per_connection)
            .concurrency_limit_per_connection(usize::try_from(self.streams_per_connection).unwrap_or(usize::MAX))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .http2_max_header_list_size(MAX_HEADERS)
            .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
            .http2_keepalive_interval(Some(self.keepalive))
            .http2_keepalive_timeout(Some(self.keepalive))
            .tcp_nodelay(true)
    }
}

/// A bound TCP port that speaks mutual TLS.
pub struct Listener {
    tcp: TcpListener,
    tls: Arc<ServerTls>,
    limits: TransportLimits,
}

impl Listener {
    /// Binds the address.
    ///
    /// # Errors
    /// The address cannot be bound: it is in use, or not of this host.
    pub async fn bind(address: SocketAddr, tls: Arc<ServerTls>, limits: TransportLimits) -> io::Result<Self> {
        Ok(Self { tcp: TcpListener::bind(address).await?, tls, limits })
    }

    /// The address that is bound; its port is known here when 0 was asked for.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Accepts until the stream is dropped. Yields connections of principals only; others are closed and logged.
    pub fn incoming(self) -> impl Stream<Item = io::Result<TlsConnection>> + Send + use<> {
        let (ready, incoming) = mpsc::channel(READY_CONNECTIONS);
        tokio::spawn(self.accept(ready));
        ReceiverStream::new(incoming)
    }

    async fn accept(self, ready: mpsc::Sender<io::Result<TlsConnection>>) {
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        let connections = Arc::new(Semaphore::new(self.limits.connections));
        loop {
            // A place for the handshake comes first: without one, nobody is accepted and nothing is held for him.
            let Ok(handshake) = Arc::clone(&handshakes).acquire_owned().await else { return };
            let (tcp, remote) = tokio::select! {
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, or a client that left: neither ends the server.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = ready.closed() => return,
            };
            let acceptor = TlsAcceptor::from(self.tls.current());
            let (ready, connections, timeout) = (ready.clone(), Arc::clone(&connections), self.limits.handshake_timeout);
            tokio::spawn(async move {
                let connection = tokio::time::timeout(timeout, TlsConnection::handshake(acceptor, tcp, remote)).await;
                drop(handshake);
                match connection {
                    Ok(Ok(mut connection)) => match connections.try_acquire_owned() {
                        Ok(place) => {
                            connection.place = Some(place);
                            drop(ready.send(Ok(connection)).await);
                        }
                        Err(_) => tracing::warn!(%remote, principal = %connection.peer.certificate.principal, "connection closed: too many are open"),
                    },
                    Ok(Err(error)) => tracing::info!(%remote, %error, "handshake refused"),
                    Err(_) => tracing::info!(%remote, "handshake took too long"),
                }
            });
        }
    }
}

/// What every request of a connection carries in its extensions.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The client's certificate.
    pub certificate: Arc<PeerCertificate>,
    /// Where the connection comes from.
    pub remote: SocketAddr,
}

/// A connection of a principal, after its handshake.
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// Held as long as the connection is open.
    place: Option<OwnedSemaphorePermit>,
}

impl TlsConnection {
    async fn handshake(acceptor: TlsAcceptor, tcp: TcpStream, remote: SocketAddr) -> Result<Self, HandshakeError> {
        tcp.set_nodelay(true)?;
        let stream = acceptor.accept(tcp).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.ok_or_else(|| TlsError::PeerCertificate { reason: "there is none".to_owned() })?;
        let certificate = Arc::new(PeerCertificate::parse(certificate)?);
        Ok(Self { stream, peer: Peer { certificate, remote }, place: None })
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
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
}

/// Connections that wait for tonic to take them.
const READY_CONNECTIONS: usize = 64;
/// How long the loop waits after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
const MAX_FRAME: u32 = 64 << 10;
const MAX_HEADERS: u32 = 16 << 10;
const MAX_RESETS: usize = 32;
