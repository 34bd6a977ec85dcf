//! The client library of the key management system: what a head-end, a handheld or a tool links.
//!
//! - [`Profile`] is an identity on disk, [`Connection`] a channel that is authenticated both ways
//!   with it.
//! - [`TransportKey`] opens envelopes: [`TransportKey::open`] verifies an envelope and returns its
//!   keys.
//! - [`Counters`] allocates the invocation counters of a lease, each once.
//! - [`RetryPolicy`] repeats calls as the server asks for it, with one request id.
//! - [`Relay`] carries octets for a head-end that holds no keys: transfers of new keys, and the
//!   tasks of campaigns.
//! - [`field`] is for tools on handhelds: enrolment with a one-time code, and keys at rest under a
//!   PIN.
//! - [`KeyRequest`] makes key pairs on this machine, and the requests for their certificates.
//! - [`sample`] makes shipments as a meter vendor would, for trials.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use kms_client::proto::{Purpose, SessionTerms};
//! use kms_client::{Connection, KeyType, OpenOptions, Profile, SystemTitle, new_request_id};
//!
//! let profile = Profile::load(".kms/profiles/hes-1")?;
//! let transport_key = profile.transport_key()?;
//! let connection = Connection::connect(&profile).await?;
//! let terms = SessionTerms {
//!     purpose: Purpose::Read.into(),
//!     client_title: SystemTitle::parse("4D4D4D0000000001")?.octets().to_vec().into(),
//!     ..Default::default()
//! };
//! let meter = SystemTitle::parse("4B414D0000000001")?;
//! let (id, options) = (new_request_id(), OpenOptions::new());
//! let session = connection.open_session(&transport_key, id, meter, terms, &options).await?;
//! let keys = session.keys.meter(meter).ok_or("no keys")?;
//! let guek = keys.key(KeyType::GUEK).ok_or("no GUEK")?;
//! let counter = keys.counters.as_ref().ok_or("no lease")?.allocate()?;
//! // protect a frame with guek.key.expose() and counter
//! # Ok(()) }
//! ```

mod agreement;
mod connection;
mod counters;
mod envelope;
pub mod field;
mod identity;
mod manifest;
mod opening;
mod profile;
mod relay;
mod retry;
pub mod sample;
mod secret_key;
mod server_error;
mod session;
mod transport_key;

pub use agreement::EnvelopeHeader;
pub use connection::{ConnectError, Connection};
pub use counters::{Counters, CountersEnded};
pub use identity::{IdentityError, KeyRequest};
pub use kms_domain::{
    GrantId, IslandName, KeyType, KeyVersionNumber, ParseError, PrincipalId, RequestId, Role, SecuritySetupId,
    SecuritySuite, SystemTitle, UnixMillis,
};
pub use kms_proto::v1 as proto;
pub use manifest::{OpenedEnvelope, OpenedGroup, OpenedKey, OpenedMeter};
pub use opening::{OpenError, OpenOptions};
pub use profile::{NewProfile, Profile, ProfileError, StateDirectory};
pub use relay::{MeterLine, MeterNetwork, MeterRequest, Relay, RelayEnd, RelaySettings};
pub use retry::{RetryPolicy, new_request_id};
pub use secret_key::SecretKey;
pub use server_error::{ASSOCIATE_AGAIN, ServerError};
pub use session::{Session, SessionBatch, SessionChunk, SessionError};
pub use transport_key::{TransportKey, TransportKeyError};
