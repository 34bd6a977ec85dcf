//! What a caller asks for: meters or a group, and the terms of their grant.

use std::{num::NonZeroU32, sync::Arc};

use kms_domain::{KeyType, KeyVersionNumber, RequestId, SecuritySetupId, SystemTitle};
use kms_proto::v1::KeysGranted;

use kms_authz::Purpose;

/// What is asked for each meter of a request, or for a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionTerms {
    /// The purpose.
    pub purpose: Purpose,
    /// Which security setup; `None` is the first that the meter or group has keys in.
    pub setup: Option<SecuritySetupId>,
    /// Which keys, each type once, at least one.
    pub key_types: Vec<KeyType>,
    /// The client title to count under; `None`: no lease.
    pub client_title: Option<SystemTitle>,
    /// How many counters.
    pub counters: NonZeroU32,
    /// Whether to add a fresh dedicated key; never for a group.
    pub dedicated_key: bool,
    /// The lifetime of the grant.
    pub lifetime_seconds: u32,
}

impl SessionTerms {
    /// Counters of a lease where none are asked for.
    pub const DEFAULT_COUNTERS: u32 = 1_000;
    /// The most counters of a lease.
    pub const MOST_COUNTERS: u32 = 1_000_000;
    /// Seconds of a grant where none are asked for.
    pub const DEFAULT_LIFETIME: u32 = 900;
    /// The most seconds that can be asked for; policy caps it lower.
    pub const LONGEST_LIFETIME: u32 = 7 * 24 * 3_600;
}

/// One chunk of a request: what is committed, recorded and answered as one grant.
#[derive(Clone, Debug)]
pub struct GrantChunk {
    /// The request.
    pub request: RequestId,
    /// Which chunk of it, from 0.
    pub index: u32,
    /// Digest of the whole request: an id that comes with another digest is refused.
    pub digest: [u8; 32],
    /// The owners of the keys.
    pub targets: GrantTargets,
    /// The terms.
    pub terms: Arc<SessionTerms>,
}

/// The owners whose keys are asked for.
#[derive(Clone, Debug)]
pub enum GrantTargets {
    /// Meters.
    Meters(Vec<SystemTitle>),
    /// A group of meters.
    Group {
        /// Its name.
        name: String,
        /// The version of its GBEK; `None`: the active one.
        version: Option<KeyVersionNumber>,
    },
}

/// The terms of a grant, as its record has them.
pub(super) fn terms_record(terms: &SessionTerms, chunk: u32) -> KeysGranted {
    KeysGranted {
        purpose: terms.purpose.to_proto().into(),
        security_setup: terms.setup.map(|setup| setup.obis().to_vec().into()).unwrap_or_default(),
        key_types: terms.key_types.iter().map(ToString::to_string).collect(),
        client_title: terms.client_title.map(|title| title.octets().to_vec().into()).unwrap_or_default(),
        dedicated_key: terms.dedicated_key,
        chunk_index: chunk,
        ..KeysGranted::default()
    }
}
