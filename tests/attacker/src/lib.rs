//! What no client library does, with the real certificate of a principal: connections that are only
//! held, from any loopback address, and requests whose body never ends. The tests of abuse and the
//! bench share it.
//!
//! Sizes are octets. Nothing here gives up by itself: whoever drops a connection or a [`Hoard`]
//! ends it.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use hyper_util::rt::TokioIo;
use kms_client::Profile;
use rustls::{ClientConfig, RootCertStore, client::Resumption};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::ServiceExt as _;

/// Somebody with the certificate of a principal, and without manners. Cheap to clone.
#[derive(Clone)]
pub struct Attacker {
    connector: TlsConnector,
    server: SocketAddr,
    name: ServerName<'static>,
}

impl Attacker {
    /// Takes certificate, key and server address of a profile.
    ///
    /// # Errors
    /// A file of the profile cannot be read or used, or its server is no socket address.
    pub fn of(profile: &Profile) -> io::Result<Self> {
        let file = |name: &str| profile.directory().join(name);
        let certificates =
            |name: &str| CertificateDer::pem_file_iter(file(name)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut roots = RootCertStore::empty();
        for root in certificates("ca.pem").map_err(io::Error::other)? {
            roots.add(root).map_err(io::Error::other)?;
        }
        let chain = certificates("certificate.pem").map_err(io::Error::other)?;
        let key = PrivateKeyDer::from_pem_file(file("key.pem")).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|config| config.with_root_certificates(roots).with_client_auth_cert(chain, key))
            .map_err(io::Error::other)?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            server: profile.server().parse().map_err(io::Error::other)?,
            name: profile.server_name().map_err(io::Error::other)?,
        })
    }

    /// A TCP connection from this local address, on which nothing is said.
    ///
    /// # Errors
    /// The server does not accept, or the address is not of this host.
    pub async fn tcp(&self, from: IpAddr) -> io::Result<TcpStream> {
        let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(from, 0))?;
        socket.connect(self.server).await
    }

    async fn tls(&self, from: IpAddr) -> io::Result<TlsStream<TcpStream>> {
        let stream = self.tcp(from).await?;
        stream.set_nodelay(true)?;
        self.connector.connect(self.name.clone(), stream).await
    }

    /// A connection that the server has accepted: after the handshake, and after its first frame of
    /// HTTP/2 (RFC 9113, 3.4). Nothing is asked on it.
    ///
    /// # Errors
    /// The server refuses: it closes before or after the handshake.
    pub async fn hold(&self, from: IpAddr) -> io::Result<HeldConnection> {
        let mut stream = self.tls(from).await?;
        stream.write_all(PREFACE).await?;
        let mut first = [0; FRAME_HEADER];
        stream.read_exact(&mut first).await?;
        Ok(HeldConnection(stream))
    }

    /// A channel for ordinary and for unfinished calls, from this local address.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub async fn channel(&self, from: IpAddr) -> io::Result<Channel> {
        let attacker = self.clone();
        let connect = tower::service_fn(move |_: http::Uri| {
            let attacker = attacker.clone();
            async move { attacker.tls(from).await.map(TokioIo::new) }
        });
        Endpoint::from_static(ORIGIN).connect_with_connector(connect).await.map_err(io::Error::other)
    }
}

/// A connection that costs the server something as long as it is not dropped.
pub struct HeldConnection(TlsStream<TcpStream>);

impl HeldConnection {
    /// Whether the server has not closed it.
    pub fn is_open(&self) -> bool {
        is_open(self.0.get_ref().0)
    }
}

/// Whether the other side has not closed a connection. What it has sent meanwhile is lost.
pub fn is_open(stream: &TcpStream) -> bool {
    let mut octets = [0; 4_096];
    loop {
        match stream.try_read(&mut octets) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// How a server answered a request that was not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With this gRPC status.
    Status(i32),
    /// It reset the stream or closed the connection.
    Broken,
}

/// Begins a request that is never finished: a message of so many octets without its last one.
/// Returns when the server answers nevertheless.
pub async fn unfinished(channel: Channel, method: &str, octets: usize, sent: Arc<AtomicUsize>) -> Cut {
    let request = http::Request::post(format!("{ORIGIN}{method}"))
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .body(Body::new(Unfinished::new(octets, sent)));
    let Ok(request) = request else { return Cut::Broken };
    match channel.oneshot(request).await {
        Ok(response) => {
            let status = response.headers().get("grpc-status").and_then(|status| status.to_str().ok()?.parse().ok());
            Cut::Status(status.unwrap_or_default())
        }
        Err(_) => Cut::Broken,
    }
}

/// Unfinished requests on several connections, each as large as the server lets it be: one that is
/// refused is begun anew with a smaller size. Dropped, it ends.
pub struct Hoard {
    sent: Arc<AtomicUsize>,
    cut: Arc<AtomicUsize>,
    given_up: Arc<AtomicUsize>,
    slots: JoinSet<()>,
    requests: usize,
}

impl Hoard {
    /// So many requests on each of these connections, spread over methods whose requests may be
    /// large.
    pub fn begin(connections: &[Channel], requests: usize) -> Self {
        let [sent, cut, given_up] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
        let mut slots = JoinSet::new();
        for connection in connections {
            for method in METHODS.iter().cycle().take(requests) {
                let (connection, sent, cut) = (connection.clone(), Arc::clone(&sent), Arc::clone(&cut));
                let given_up = Arc::clone(&given_up);
                slots.spawn(async move {
                    for octets in SIZES {
                        unfinished(connection.clone(), method, octets, Arc::clone(&sent)).await;
                        cut.fetch_add(1, Ordering::Relaxed);
                    }
                    given_up.fetch_add(1, Ordering::Relaxed);
                });
            }
        }
        Self { sent, cut, given_up, slots, requests: requests * connections.len() }
    }

    /// Octets that the server has taken from the connections so far.
    pub fn octets_sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    /// Requests that the server has cut.
    pub fn cut(&self) -> usize {
        self.cut.load(Ordering::Relaxed)
    }

    /// Requests that are still open.
    pub fn open(&self) -> usize {
        self.requests - self.given_up.load(Ordering::Relaxed)
    }

    /// Waits until the server takes no more: nothing moved for a second, everything was cut,
    /// `enough` says so, or the time is up. `enough` is asked ten times a second.
    pub async fn settle(&self, most: Duration, mut enough: impl FnMut() -> bool) {
        let began = tokio::time::Instant::now();
        let (mut last, mut same) = ((0, 0), 0);
        while same < STILL && self.open() > 0 && began.elapsed() < most && !enough() {
            tokio::time::sleep(SAMPLE).await;
            let now = (self.octets_sent(), self.cut());
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
    }

    /// Ends all requests.
    pub async fn end(mut self) {
        self.slots.shutdown().await;
    }
}

/// The body of a gRPC request whose message lacks its last octet for ever.
struct Unfinished {
    prefix: Option<Bytes>,
    left: usize,
    sent: Arc<AtomicUsize>,
}

impl Unfinished {
    fn new(octets: usize, sent: Arc<AtomicUsize>) -> Self {
        let length = u32::try_from(octets).unwrap_or(u32::MAX).to_be_bytes();
        Self { prefix: Some(Bytes::from_iter(std::iter::once(0).chain(length))), left: octets.saturating_sub(1), sent }
    }
}

impl http_body::Body for Unfinished {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(prefix) = self.prefix.take() {
            return Poll::Ready(Some(Ok(Frame::data(prefix))));
        }
        let piece = Bytes::from_static(&ZEROS).slice(..self.left.min(ZEROS.len()));
        if piece.is_empty() {
            // Nobody is woken: there is no more.
            return Poll::Pending;
        }
        self.left -= piece.len();
        self.sent.fetch_add(piece.len(), Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

/// Calls whose requests may be large. Whether the caller may make them is for the server to find
/// out.
const METHODS: [&str; 8] = [
    "/meterkms.v1.FrameService/Protect",
    "/meterkms.v1.FrameService/Unprotect",
    "/meterkms.v1.TransferService/BeginTransfers",
    "/meterkms.v1.TransferService/ContinueTransfers",
    "/meterkms.v1.GrantService/OpenSessions",
    "/meterkms.v1.GrantService/OpenSession",
    "/meterkms.v1.ShipmentService/UploadShipment",
    "/meterkms.v1.MeterService/AssignMeters",
];
/// From the largest message that tonic takes by default, down to what any method must take.
const SIZES: [usize; 6] =
    [(4 << 20) - 1, (2 << 20) - 1, (1 << 20) - 1, (256 << 10) - 1, (128 << 10) - 1, (16 << 10) - 1];
const ORIGIN: &str = "http://localhost";
/// The client's preface and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const FRAME_HEADER: usize = 9;
static ZEROS: [u8; 16 << 10] = [0; 16 << 10];
const SAMPLE: Duration = Duration::from_millis(100);
const STILL: u32 = 10;
