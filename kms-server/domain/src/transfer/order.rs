//! The order of a transfer: which new versions it brings, and why an order is refused.

use std::time::Duration;

use super::{
    error::TransferError,
    state::{CHALLENGE, CampaignTask, TransferForm, TransferKey},
};
use crate::{
    KeyState, KeyType, KeyVersionNumber, Meter, NewKeyVersion, Owner, PrincipalId, SecuritySetupId, SystemTitle,
    TransferId, UnixMillis,
};

/// What a transfer is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferOrder {
    /// The id of the transfer.
    pub id: TransferId,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The head-end that relays it.
    pub head_end: PrincipalId,
    /// The task of a campaign that it belongs to.
    pub campaign: Option<CampaignTask>,
    /// The client title that the requests are sent under.
    pub client_title: SystemTitle,
    /// Who ciphers the delivery.
    pub form: TransferForm,
    /// What to deliver.
    pub keys: OrderedKeys,
    /// Begin although an earlier transfer of the slot is in doubt: this adds a candidate version.
    pub urgent: bool,
    /// After this moment another transfer may replace it.
    pub not_after: UnixMillis,
    /// The client's challenge of the first exchange: random.
    pub challenge: [u8; CHALLENGE],
}

/// The keys of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderedKeys {
    /// None: the transfer only shows what the meter holds.
    Probe,
    /// A new version of a key of the meter, not of its KEK.
    Own {
        /// The key type.
        key_type: KeyType,
        /// The new version, pre-active.
        new: NewKeyVersion,
    },
    /// A new KEK, and the GUEK that proves it.
    Compound {
        /// The new version of the KEK, pre-active.
        kek: NewKeyVersion,
        /// The new version of the GUEK, pre-active.
        guek: NewKeyVersion,
    },
    /// A version of a key of a group or a device type.
    Shared {
        /// Whose.
        owner: Owner,
        /// The key type.
        key_type: KeyType,
        /// The version.
        version: KeyVersionNumber,
    },
}

impl Meter {
    /// Adds the new versions of an order, with the KEK that each leaves under.
    pub(super) fn add_versions(
        &mut self,
        order: &TransferOrder,
        now: UnixMillis,
    ) -> Result<Vec<TransferKey>, TransferError> {
        let setup = order.setup;
        let owner = self.owner();
        if matches!(order.keys, OrderedKeys::Probe) {
            return Ok(Vec::new());
        }
        let kek = self.kek_for_transfer(setup).ok_or(TransferError::NoKek { setup })?;
        let mut keys = Vec::new();
        match &order.keys {
            OrderedKeys::Probe => {}
            // I3: it would replace a key of the meter, in whose slot it is no candidate.
            OrderedKeys::Shared { key_type: key_type @ (KeyType::KEK | KeyType::GUEK | KeyType::GAK), .. } => {
                return Err(TransferError::NotShared { key_type: *key_type });
            }
            OrderedKeys::Own { key_type: KeyType::KEK, .. } => return Err(TransferError::KekAlone),
            OrderedKeys::Own { key_type, new } => {
                self.refuse_in_doubt(setup, &[*key_type], order.urgent)?;
                self.refuse_too_many(setup, *key_type)?;
                self.refuse_full(setup, *key_type, now)?;
                let version = self.slots.get_mut(setup, *key_type)?.add_pre_active(new, now)?;
                keys.push(TransferKey { owner, key_type: *key_type, version, kek });
            }
            OrderedKeys::Compound { kek: new_kek, guek } => {
                // A probe shows no KEK; only another transfer shows one.
                self.refuse_in_doubt(setup, &[KeyType::GUEK], order.urgent)?;
                self.refuse_too_many(setup, KeyType::GUEK)?;
                self.refuse_too_many(setup, KeyType::KEK)?;
                self.refuse_full(setup, KeyType::GUEK, now)?;
                self.refuse_full(setup, KeyType::KEK, now)?;
                // Nothing is added unless both versions can be added.
                self.slots.get_mut(setup, KeyType::GUEK)?;
                let new = self.slots.get_mut(setup, KeyType::KEK)?.add_pre_active(new_kek, now)?;
                keys.push(TransferKey { owner, key_type: KeyType::KEK, version: new, kek });
                let version = self.slots.get_mut(setup, KeyType::GUEK)?.add_pre_active(guek, now)?;
                keys.push(TransferKey { owner, key_type: KeyType::GUEK, version, kek: new });
            }
            OrderedKeys::Shared { owner, key_type, version } => {
                keys.push(TransferKey { owner: *owner, key_type: *key_type, version: *version, kek })
            }
        }
        Ok(keys)
    }

    /// Refuses a new version while it is in doubt which one the meter holds. A key that no exchange
    /// shows is delivered again: no probe could settle the doubt.
    fn refuse_in_doubt(
        &self,
        setup: SecuritySetupId,
        key_types: &[KeyType],
        urgent: bool,
    ) -> Result<(), TransferError> {
        let refused = |key_type: &&KeyType| {
            !urgent
                && key_type.is_shown_by_exchanges()
                && self.slots.get(setup, **key_type).is_some_and(crate::Slot::unresolved)
        };
        match key_types.iter().find(refused) {
            Some(key_type) => Err(TransferError::InDoubt { key_type: *key_type }),
            None => Ok(()),
        }
    }

    /// I3: no candidate is dropped to make room for another, so too many candidates refuse a new
    /// one. If an exchange has shown what the meter holds since the last one left, the number does
    /// not matter: it is known which key opens the meter. Keys that no exchange shows open nothing
    /// and are not counted.
    fn refuse_too_many(&self, setup: SecuritySetupId, key_type: KeyType) -> Result<(), TransferError> {
        if !key_type.is_shown_by_exchanges() {
            return Ok(());
        }
        let most = if key_type == KeyType::KEK { MOST_KEK_CANDIDATES } else { MOST_CANDIDATES };
        match self.slots.get(setup, key_type) {
            Some(slot) if slot.unresolved() && slot.candidates().count() >= most => {
                Err(TransferError::TooManyCandidates { key_type, most })
            }
            _ => Ok(()),
        }
    }

    /// Bounds what an attacker who acts as a meter can have stored, in doubt or not: each version
    /// is decoded, sealed and written again with every act. No version can be destroyed before its
    /// time (I3), and a meter that can get no further key is lost. So a full slot takes one more
    /// version each day. It takes one at once if the newest is reported as compromised, which only
    /// officers do.
    fn refuse_full(&self, setup: SecuritySetupId, key_type: KeyType, now: UnixMillis) -> Result<(), TransferError> {
        let Some(slot) = self.slots.get(setup, key_type) else { return Ok(()) };
        let kept = || slot.versions().iter().filter(|version| version.state() != KeyState::Destroyed);
        let newest = kept().next_back().filter(|version| version.state() != KeyState::Compromised);
        let wait_ms = newest.map_or(0, |version| version.since().after(DAY_MS).0.saturating_sub(now.0).min(DAY_MS));
        match u64::try_from(wait_ms) {
            Ok(wait_ms @ 1..) if kept().count() >= MOST_VERSIONS => {
                Err(TransferError::SlotFull { key_type, most: MOST_VERSIONS, wait: Duration::from_millis(wait_ms) })
            }
            _ => Ok(()),
        }
    }
}

/// The most candidates of a key among which it may be in doubt which one the meter holds. With
/// more, no further version is delivered.
///
/// A round tries twelve pairs of GUEK and GAK, so one probe finds the right one among eight
/// candidates of one of them. Rows that have more keep them.
pub const MOST_CANDIDATES: usize = 8;
/// The same for KEKs. KEKs make no pairs and a probe does not show them; only transfers try them,
/// one after the other, so more are permitted. A GUEK that is proven shows the KEK that it left
/// under.
pub const MOST_KEK_CANDIDATES: usize = 64;
/// How many versions of one key of a meter may be not destroyed, for every key type, in doubt or
/// not. Beyond this, one more is delivered each day.
///
/// Twice the candidates of a KEK, so that a GUEK can leave under each of these in turn and show
/// which one the meter holds. A key that is rotated each day has fewer: versions are destroyed
/// after the default retention time of 90 days.
pub const MOST_VERSIONS: usize = 128;
const DAY_MS: i64 = 86_400_000;
