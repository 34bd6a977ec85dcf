//! The secrets of a meter, for tests: its keys, its counters, and every nonce that was used.

use std::collections::BTreeMap;

use crate::security::TAG_LENGTH;
use crate::{Obis, SymmetricKey, SystemTitle};

/// The keys that a security setup holds at this moment, in plaintext: for tests only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InspectedKeys {
    /// Global unicast encryption key.
    pub guek: SymmetricKey,
    /// Global authentication key.
    pub gak: SymmetricKey,
    /// Global broadcast encryption key.
    pub gbek: Option<SymmetricKey>,
    /// Master key.
    pub kek: SymmetricKey,
    /// Keys of the vendor's, by their id in `key_transfer`.
    pub vendor_keys: BTreeMap<u8, SymmetricKey>,
}

/// An encryption key of a meter, without its value. A value that returns has its former generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NonceKey {
    /// A GUEK of a security setup, numbered from 0 in the order of arrival.
    Unicast {
        /// The security setup.
        setup: Obis,
        /// Number of the key value.
        generation: usize,
    },
    /// A GBEK of a security setup.
    Broadcast {
        /// The security setup.
        setup: Obis,
        /// Number of the key value.
        generation: usize,
    },
    /// A dedicated key.
    Dedicated {
        /// Number of the key value in the meter.
        generation: usize,
    },
}

/// What a nonce was used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoncePurpose {
    /// A ciphered initiate request or response.
    Initiate,
    /// An HLS 5 answer.
    ChallengeAnswer,
    /// A ciphered service.
    Service,
}

/// One use of a nonce that the meter saw proven by a tag, or made itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NonceUse {
    /// The key.
    pub key: NonceKey,
    /// The sender: a client, or the meter itself.
    pub sender: SystemTitle,
    /// The invocation counter.
    pub counter: u32,
    /// The use of the nonce.
    pub purpose: NoncePurpose,
    /// The tag. Different tags are two messages. Equal tags are copies of one message, which the
    /// network makes as well, or the same plaintext protected twice: a meter cannot tell these
    /// apart.
    pub tag: [u8; TAG_LENGTH],
    /// Whether the meter accepted the message. False: its tag is right, but its counter is old.
    pub accepted: bool,
}

/// Why a meter refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The counter was not above the last accepted one.
    Counter {
        /// The counter in the request.
        received: u32,
        /// The last accepted one.
        last: u32,
    },
    /// The tag, the title, the suite or the protection did not fit.
    Deciphering,
    /// The association was rejected, with this diagnostic.
    Association(u8),
    /// The request does not fit the state or the policy of the association.
    NotAllowed,
    /// The request could not be read.
    Malformed,
}
