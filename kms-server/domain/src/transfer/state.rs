//! A transfer as the meter's sealed row keeps it: what was sent last, and what has left.

use crate::{
    CampaignId, KeyType, KeyVersionNumber, Owner, PrincipalId, SecuritySetupId, SystemTitle, TransferId, UnixMillis,
};

/// A transfer under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// Its id: the id of the request that began it.
    pub id: TransferId,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The head-end that relays it.
    pub head_end: PrincipalId,
    /// The task of a campaign that it belongs to.
    pub campaign: Option<CampaignTask>,
    /// The client title that the requests are sent under.
    pub client_title: SystemTitle,
    /// Who ciphers the request that delivers a key.
    pub form: TransferForm,
    /// The keys, in the order in which they leave: none for a probe, a KEK and a GUEK for a
    /// compound transfer, else one.
    pub keys: Vec<TransferKey>,
    /// How many of the keys have left.
    pub delivered: usize,
    /// What was sent last.
    pub stage: Stage,
    /// The number of the step, from 1. A report names the step that it answers; a report for
    /// another step changes nothing.
    pub step: u32,
    /// How many pairs of keys were tried in the present round.
    pub tried: u32,
    /// The invocation counters of the step's request, in order of use. The same step is sent again
    /// with the same octets only (I4).
    pub counters: Vec<u32>,
    /// A digest of what the step's octets are made of besides this row: values of the program and
    /// of the meter's device profile. None: the step has no counters, or an earlier version of the
    /// server made it.
    pub pinned: Option<[u8; 16]>,
    /// How often an association was begun again under the same keys to follow the meter's counter.
    pub retries: u32,
    /// How many associations in a row brought a challenge that must not be answered: see
    /// [`crate::Observation::ChallengeUnfit`].
    pub unfit: u32,
    /// The meter's answer to the last delivery, as far as it could be read.
    pub answer: Answer,
    /// After this moment another transfer may replace it.
    pub not_after: UnixMillis,
}

impl Transfer {
    /// The key that the present delivery brings, or the last one brought.
    pub fn current(&self) -> Option<&TransferKey> {
        self.delivered.checked_sub(1).and_then(|at| self.keys.get(at))
    }

    /// Whether the present step is tried again above a counter that an unauthenticated answer
    /// names: an association, three times in a transfer. In other steps such an answer means only
    /// that the request was refused.
    pub const fn follows_counter(&self) -> bool {
        matches!(self.stage, Stage::Associate { .. }) && self.retries < MOST_RETRIES
    }

    /// The pair that protects the present step; `None` where the head-end ciphers by itself.
    pub const fn pair(&self) -> Option<KeyPair> {
        match &self.stage {
            Stage::Associate { pair, .. } | Stage::Authenticate { pair, .. } => Some(*pair),
            Stage::Deliver { pair } => *pair,
        }
    }
}

/// The lease of a campaign's task that a transfer began under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CampaignTask {
    /// The campaign; the task is that of the transfer's meter.
    pub campaign: CampaignId,
    /// The fencing token of the lease. A transfer under a lost lease does not continue.
    pub fence: u64,
}

/// Who ciphers the request that delivers a key. The HSM makes the proof in both forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransferForm {
    /// The head-end, in its own session: it gets the wrapped key and the argument of
    /// `key_transfer`.
    WrappedKey,
    /// The HSM: the head-end relays octets and holds no key.
    Frames,
}

/// A key of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TransferKey {
    /// Whose key: the meter's, or that of a group or device type that the meter belongs to.
    pub owner: Owner,
    /// Its type.
    pub key_type: KeyType,
    /// The version that is delivered.
    pub version: KeyVersionNumber,
    /// The version of the meter's KEK that it leaves under.
    pub kek: KeyVersionNumber,
}

/// The keys that an exchange is protected with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyPair {
    /// The version of the GUEK.
    pub encryption: KeyVersionNumber,
    /// The version of the GAK.
    pub authentication: KeyVersionNumber,
}

/// What an exchange is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangePurpose {
    /// To deliver a key in its association. In a probe: to learn what the meter holds.
    Open,
    /// To prove what was delivered.
    Prove,
}

/// What was sent last.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// An association request under a pair of keys.
    Associate {
        /// What for.
        purpose: ExchangePurpose,
        /// The keys.
        pair: KeyPair,
        /// The client's challenge (CtoS), random, new for each exchange.
        challenge: [u8; CHALLENGE],
    },
    /// The answer to the meter's challenge.
    Authenticate {
        /// What for.
        purpose: ExchangePurpose,
        /// The keys.
        pair: KeyPair,
        /// The client's challenge.
        challenge: [u8; CHALLENGE],
        /// The meter's challenge (StoC), 8–64 octets.
        meter_challenge: Vec<u8>,
    },
    /// The request that delivers a key. Without a pair, the head-end ciphers it by itself.
    Deliver {
        /// The keys of the association.
        pair: Option<KeyPair>,
    },
}

impl Stage {
    /// The name in output.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Associate { .. } => "associate",
            Self::Authenticate { .. } => "authenticate",
            Self::Deliver { .. } => "deliver",
        }
    }
}

/// The meter's answer to a delivery. None of these is proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Nothing that could be read.
    #[default]
    Silence,
    /// Success, authenticated under the keys of the association.
    Accepted,
    /// Another action-result, authenticated under the keys of the association.
    Refused(u8),
    /// An exception response, which anyone can forge.
    Exception,
}

/// A key of a group or a device type that left for a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SharedKey {
    /// The group or device type.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version.
    pub version: KeyVersionNumber,
    /// The version of the meter's KEK that it left under.
    pub kek: KeyVersionNumber,
    /// Whether the meter accepted it.
    pub acknowledged: bool,
}

/// The length of a client's challenge in octets.
pub const CHALLENGE: usize = 16;
/// How often a transfer follows a counter of the meter, which may be forged.
const MOST_RETRIES: u32 = 3;
