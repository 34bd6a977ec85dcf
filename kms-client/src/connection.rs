//! A channel to a server, authenticated both ways.

use std::{error::Error, io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use kms_proto::v1::{
    audit_service_client::AuditServiceClient, campaign_service_client::CampaignServiceClient,
    device_type_service_client::DeviceTypeServiceClient, exposure_service_client::ExposureServiceClient,
    frame_service_client::FrameServiceClient, grant_service_client::GrantServiceClient,
    group_service_client::GroupServiceClient, handheld_service_client::HandheldServiceClient,
    hsm_service_client::HsmServiceClient, meter_service_client::MeterServiceClient,
    principal_service_client::PrincipalServiceClient, proposal_service_client::ProposalServiceClient,
    root_service_client::RootServiceClient, shipment_service_client::ShipmentServiceClient,
    task_service_client::TaskServiceClient, transfer_service_client::TransferServiceClient,
    work_order_service_client::WorkOrderServiceClient,
};
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs as provider},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{Profile, ProfileError};

/// A channel to the server of a [`Profile`]: TLS 1.3 only, with a certificate on both sides, key
/// exchange X25519MLKEM768 where the server has it. Cheap to clone; clones share the connection,
/// which is made again when it was lost.
#[derive(Clone, Debug)]
pub struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// The profile is not usable, no server listens at the address, or one side does not accept the
    /// other's certificate.
    pub async fn connect(profile: &Profile) -> Result<Self, ConnectError> {
        let identity = TlsIdentity {
            roots: profile.ca_certificates()?,
            chain: profile.certificate_chain()?,
            key: profile.private_key()?,
        };
        let config = identity.config().map_err(|reason| ConnectError::Identity {
            directory: profile.directory().display().to_string(),
            reason,
        })?;
        Self::open(profile.server(), profile.server_name()?, config).await
    }

    /// Connects to `host:port`, whose certificate must carry this name, with this configuration of
    /// TLS.
    pub(crate) async fn open(
        server: &str,
        name: ServerName<'static>,
        config: ClientConfig,
    ) -> Result<Self, ConnectError> {
        let server = server.to_owned();
        let refuse = |error: tonic::transport::Error| ConnectError::of(&server, &error);
        // The connector below does TLS; to tonic the stream is plain.
        let endpoint = Endpoint::from_shared(format!("http://{server}"))
            .map_err(refuse)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .user_agent(concat!("kms-client/", env!("CARGO_PKG_VERSION")))
            .map_err(refuse)?;
        let connector = TlsConnector::from(Arc::new(config));
        let address = server.clone();
        let connect = tower::service_fn(move |_: http::Uri| {
            let (connector, name, address) = (connector.clone(), name.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let mut stream = BufReader::new(connector.connect(name, stream).await?);
                // In TLS 1.3 a server refuses the client's certificate after the handshake. Its
                // first frame (RFC 9113, 3.4) shows that it has accepted it. Some servers wait for
                // the client's frame first, so the wait for theirs is short.
                if let Ok(first) = tokio::time::timeout(FIRST_FRAME_TIMEOUT, stream.fill_buf()).await {
                    let first = first?;
                    if first.is_empty() {
                        return Err(io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            "the server closed the connection at once: is it shutting down?",
                        ));
                    }
                    if let Some(reason) = farewell(first) {
                        return Err(io::Error::other(format!("the server refused the connection: {reason}")));
                    }
                }
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        Ok(Self { channel: endpoint.connect_with_connector(connect).await.map_err(refuse)? })
    }

    /// A connection over a channel that the caller has made.
    pub const fn over(channel: Channel) -> Self {
        Self { channel }
    }

    /// The channel, for calls that no client here makes.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Session grants.
    pub fn grants(&self) -> GrantServiceClient<Channel> {
        GrantServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Frames protected inside the HSM.
    pub fn frames(&self) -> FrameServiceClient<Channel> {
        FrameServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Meters.
    pub fn meters(&self) -> MeterServiceClient<Channel> {
        MeterServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Groups of meters.
    pub fn groups(&self) -> GroupServiceClient<Channel> {
        GroupServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Device types.
    pub fn device_types(&self) -> DeviceTypeServiceClient<Channel> {
        DeviceTypeServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// New keys for meters over the air.
    pub fn transfers(&self) -> TransferServiceClient<Channel> {
        TransferServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Vendor shipments.
    pub fn shipments(&self) -> ShipmentServiceClient<Channel> {
        ShipmentServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Principals and their certificates.
    pub fn principals(&self) -> PrincipalServiceClient<Channel> {
        PrincipalServiceClient::new(self.channel.clone())
    }

    /// Who could know which keys.
    pub fn exposures(&self) -> ExposureServiceClient<Channel> {
        ExposureServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Handhelds and their invitations.
    pub fn handhelds(&self) -> HandheldServiceClient<Channel> {
        HandheldServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// The audit log.
    pub fn audit(&self) -> AuditServiceClient<Channel> {
        AuditServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Campaigns.
    pub fn campaigns(&self) -> CampaignServiceClient<Channel> {
        CampaignServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Dangerous actions that wait for the approval of other people.
    pub fn proposals(&self) -> ProposalServiceClient<Channel> {
        ProposalServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Who works at which meters, and when.
    pub fn work_orders(&self) -> WorkOrderServiceClient<Channel> {
        WorkOrderServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// Tasks of campaigns, for head-ends.
    pub fn tasks(&self) -> TaskServiceClient<Channel> {
        TaskServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// The island's roots.
    pub fn roots(&self) -> RootServiceClient<Channel> {
        RootServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// HSM tokens.
    pub fn hsm(&self) -> HsmServiceClient<Channel> {
        HsmServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }
}

/// The text of a GOAWAY frame (RFC 9113, 6.8) in a server's first octets, with which it ends the
/// connection.
fn farewell(mut octets: &[u8]) -> Option<String> {
    while let Some(([a, b, c, kind, ..], rest)) = octets.split_first_chunk::<9>() {
        let (frame, next) = rest.split_at_checked(usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).ok()?)?;
        if *kind == GOAWAY {
            return Some(String::from_utf8_lossy(frame.get(8..)?).into_owned());
        }
        octets = next;
    }
    None
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The profile is not usable.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The profile's certificate or key is not usable with TLS.
    #[error("certificate or key in `{directory}`: {reason}")]
    Identity {
        /// The profile's directory.
        directory: String,
        /// What TLS says.
        reason: String,
    },
    /// The server is not running, or not reachable.
    #[error("no connection to `{server}`: {reason}")]
    Unreachable {
        /// `host:port`.
        server: String,
        /// What the operating system says.
        reason: String,
    },
    /// One side does not accept the other's certificate.
    #[error("no TLS connection to `{server}`: {reason}")]
    Tls {
        /// `host:port`.
        server: String,
        /// What TLS says.
        reason: String,
    },
}

impl ConnectError {
    fn of(server: &str, error: &tonic::transport::Error) -> Self {
        let server = server.to_owned();
        if let Some(tls) = tls_error(error) {
            return Self::Tls { server, reason: tls_reason(tls) };
        }
        let mut cause: &dyn Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let refused =
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        let reason = if refused {
            "nothing listens there: is the server running, and is `server` in profile.toml right?".into()
        } else {
            cause.to_string()
        };
        Self::Unreachable { server, reason }
    }
}

/// The TLS error in a chain of errors, where there is one.
pub(crate) fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        // An I/O error does not show the error inside it as its source.
        let inside =
            error.downcast_ref::<io::Error>().and_then(|error| error.get_ref()).and_then(|inner| inner.downcast_ref());
        if let Some(tls) = error.downcast_ref().or(inside) {
            return Some(tls);
        }
        cause = error.source();
    }
    None
}

/// The TLS error with what to do about it.
pub(crate) fn tls_reason(error: &rustls::Error) -> String {
    match error {
        rustls::Error::AlertReceived(alert) => {
            format!(
                "the server did not accept this profile's certificate (alert {alert:?}): it may be expired or disabled; ask an officer"
            )
        }
        rustls::Error::InvalidCertificate(reason) => {
            format!(
                "the server's certificate is not acceptable ({reason:?}): check `server_name` and `ca.pem` of the profile, and that this is the right server"
            )
        }
        other => other.to_string(),
    }
}

/// The certificates and the key of one side of a connection.
pub(crate) struct TlsIdentity {
    /// The island's roots.
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// The certificate and its issuers.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub(crate) key: PrivateKeyDer<'static>,
}

impl TlsIdentity {
    /// The configuration of TLS, or why the certificates or the key cannot be used.
    pub(crate) fn config(self) -> Result<ClientConfig, String> {
        let mut roots = RootCertStore::empty();
        for certificate in self.roots {
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        let config = tls_1_3(crypto())
            .and_then(|config| config.with_root_certificates(roots).with_client_auth_cert(self.chain, self.key));
        config.map(finished).map_err(|error| error.to_string())
    }
}

/// The cryptography of TLS: as the library has it, the hybrid group first.
pub(crate) fn crypto() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        kx_groups: vec![provider::kx_group::X25519MLKEM768, provider::kx_group::X25519, provider::kx_group::SECP256R1],
        ..provider::default_provider()
    })
}

/// TLS 1.3 and nothing else.
pub(crate) fn tls_1_3(
    crypto: Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(crypto).with_protocol_versions(&[&rustls::version::TLS13])
}

/// For HTTP/2, and without resumption: a resumed session would skip the verification of
/// certificates.
pub(crate) fn finished(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(1);
/// The type of a frame that ends the connection.
const GOAWAY: u8 = 7;
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// 4 MiB: a batch of 10,000 meters is not throttled by the default of 64 KiB.
const WINDOW: u32 = 4 << 20;
const LARGEST_MESSAGE: usize = 32 << 20;
