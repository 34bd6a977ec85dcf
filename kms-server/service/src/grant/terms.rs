//! What a caller asks for: meters or a group, and the terms of their grant.

use std::{num::NonZeroU32, sync::Arc};

use kms_domain::{KeyType, KeyVersionNumber, RequestId, SecuritySetupId, SystemTitle};
use kms_proto::v1::KeysGranted;

use kms_authz::Purpose;

/// What is asked for each meter of a request, or for a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionTerms {
    /// What for.
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
    /// How long.
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
    /// Digest of the whole request, so that an id is not used for two.
    pub digest: [u8; 32],
    /// Whose keys.
    pub targets: GrantTargets,
    /// What is asked.
    pub terms: Arc<SessionTerms>,
}

/// Whose keys are asked for.
#[derive(Clone, Debug)]
pub enum GrantTargets {
    /// Those of meters.
    Meters(Vec<SystemTitle>),
    /// Those of a group of meters.
    Group {
        /// Its name.
        name: String,
        /// The version of its GBEK; `None`: the active one.
        version: Option<KeyVersionNumber>,
    },
}

/// What the record of a grant says of its terms.
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
