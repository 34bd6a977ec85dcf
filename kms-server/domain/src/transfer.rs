//! Transfers: how a key slot of a meter moves from one version to the next over the air, without
//! ever losing the meter (I3).
//!
//! A transfer is a part of the meter's sealed row, so a meter has one at a time, on all servers. It
//! is a pure state machine: each step says what to send to the meter, and each [`Observation`] is
//! what the server itself read in the meter's octets. What a head-end claims changes nothing. The
//! steps of a transfer whose requests are made in the HSM:
//!
//! 1. *open*: an association under the keys that the meter most likely holds, proven by a fresh
//!    challenge;
//! 2. *deliver*: the new version leaves, wrapped under the meter's KEK. Before that, the durable
//!    row says that it is a candidate;
//! 3. *prove*: a new association under the new version. Only an answer to its challenge is proof;
//!    acceptance, refusal, exceptions and silence are not.
//!
//! A new KEK is proven by a GUEK that left wrapped under this KEK only: both are one compound
//! transfer. Keys that no exchange uses are acknowledged, not proven. In every case, each version
//! that left stays a candidate until a later version is proven and the retention time has passed.

pub(crate) mod error;
mod likeliest;
pub(crate) mod order;
pub(crate) mod state;

use self::{
    error::TransferError,
    order::TransferOrder,
    state::{Answer, CHALLENGE, ExchangePurpose, KeyPair, SharedKey, Stage, Transfer, TransferForm},
};
use crate::{
    Confirmation, Evidence, ExposureReason, KeyState, KeyType, KeyVersionNumber, Meter, Owner, Party, TransferId,
    UnixMillis,
};

/// What the server read in the octets that came back, with the keys in the HSM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Observation {
    /// Nothing came, or nothing that these keys can open.
    Nothing,
    /// An exception response, or a refused association.
    Refusal,
    /// An exception response that names a counter. The reservation was moved above it, within the
    /// cap of the device profile.
    CounterFollowed,
    /// The association was accepted, but its challenge must not be answered: it could be a request.
    /// It shows nothing about the keys or the meter. Another association under the same keys brings
    /// another challenge. It counts as no attempt, up to [`MOST_UNFIT`] in a row.
    ChallengeUnfit,
    /// The association was accepted: the ciphered InitiateResponse opened under the pair.
    Associated {
        /// The meter's challenge, 8–64 octets.
        meter_challenge: Vec<u8>,
        /// The meter's own counter.
        meter_counter: u32,
    },
    /// The answer to the client's challenge verifies under the pair. The challenge is fresh, so
    /// this is proof.
    Authenticated {
        /// The highest counter of the meter in it.
        meter_counter: u32,
    },
    /// An authenticated answer to `key_transfer`.
    Answered {
        /// The action-result: 0 is success.
        result: u8,
        /// The meter's own counter: above every earlier one under the same GUEK, so this is no
        /// answer to an earlier request.
        meter_counter: u32,
    },
    /// The head-end, which holds the new key, says whether the meter uses it. Policy has permitted
    /// this statement.
    Attested {
        /// Whether the meter uses it.
        holds: bool,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// Send what [`Transfer::stage`] says, with fresh counters.
    Send,
    /// The transfer is over.
    Done(Outcome),
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The meter showed that it holds the new version.
    Proven,
    /// The meter accepted a key that no exchange proves.
    Acknowledged,
    /// The head-end states that the meter holds the new version.
    Attested,
    /// The meter showed, after the delivery, that it holds an earlier version.
    NotApplied,
    /// The meter showed which keys it holds; nothing was delivered.
    Probed,
    /// Nothing was shown. The meter may hold any version that left.
    InDoubt,
    /// The transfer was withdrawn, its time ran out, its key was reported compromised before it
    /// left, or the meter has left the group whose key it is.
    Withdrawn,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 7] = [
        Self::Proven,
        Self::Acknowledged,
        Self::Attested,
        Self::NotApplied,
        Self::Probed,
        Self::InDoubt,
        Self::Withdrawn,
    ];

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Proven => "proven",
            Self::Acknowledged => "acknowledged",
            Self::Attested => "attested",
            Self::NotApplied => "not-applied",
            Self::Probed => "probed",
            Self::InDoubt => "in-doubt",
            Self::Withdrawn => "withdrawn",
        }
    }

    /// Whether the transfer reached its aim.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Proven | Self::Acknowledged | Self::Attested | Self::Probed)
    }
}

/// The result of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do next.
    pub next: Next,
    /// What the audit records must say.
    pub findings: Vec<Finding>,
}

/// Something that a step has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finding {
    /// The meter showed that it holds a version.
    Held {
        /// The key type.
        key_type: KeyType,
        /// The version.
        version: KeyVersionNumber,
        /// How.
        evidence: Evidence,
        /// What follows from it.
        confirmation: Confirmation,
    },
    /// The meter's own counter went backwards under the same key: a security event.
    MeterCounterBackwards {
        /// The version of the GUEK.
        version: KeyVersionNumber,
        /// The highest one before.
        known: u32,
        /// What was seen.
        seen: u32,
    },
    /// A key of a group or a device type was acknowledged.
    SharedAcknowledged {
        /// Whose key.
        owner: Owner,
        /// Its type.
        key_type: KeyType,
        /// The version.
        version: KeyVersionNumber,
    },
}

impl Meter {
    /// Begins a transfer: adds its new versions. If the first one leaves at once, it becomes a
    /// candidate. The row is stored before anything leaves (I3).
    ///
    /// # Errors
    /// Another transfer is under way, the slot is in doubt, the meter lacks a key that the transfer
    /// needs, its status forbids grants, or its sequence is used up. The caller then drops the
    /// changed meter: an earlier transfer may have ended in it.
    pub fn begin_transfer(&mut self, order: TransferOrder, now: UnixMillis) -> Result<Step, TransferError> {
        if !self.class.status.may_grant() {
            return Err(TransferError::Status { status: self.class.status.name() });
        }
        // I3: moments that no longer increase give no order.
        if self.sequence > LAST_MOMENT_TO_BEGIN {
            return Err(TransferError::SequenceUsedUp);
        }
        if let Some(other) = &self.transfer {
            if other.not_after > now {
                return Err(TransferError::UnderWay { id: other.id, not_after: other.not_after });
            }
            self.close_transfer(now);
        }
        let pairs = self.pairs(order.setup, None);
        let first = *pairs.first().ok_or(TransferError::NoKeys { setup: order.setup })?;
        let keys = self.add_versions(&order, now)?;
        self.sequence = self.sequence.saturating_add(1);
        let frames = order.form == TransferForm::Frames || keys.is_empty();
        let stage = if frames {
            Stage::Associate { purpose: ExchangePurpose::Open, pair: first, challenge: order.challenge }
        } else {
            Stage::Deliver { pair: None }
        };
        self.transfer = Some(Transfer {
            id: order.id,
            setup: order.setup,
            head_end: order.head_end,
            campaign: order.campaign,
            client_title: order.client_title,
            form: order.form,
            keys,
            delivered: 0,
            stage,
            step: 1,
            tried: 0,
            counters: Vec::new(),
            pinned: None,
            retries: 0,
            unfit: 0,
            answer: Answer::Silence,
            not_after: order.not_after,
        });
        if !frames {
            self.deliver(None, now)?;
        }
        Ok(Step { next: Next::Send, findings: Vec::new() })
    }

    /// Continues with what was observed after step `step`. `challenge` is random, for the exchange
    /// that may follow.
    ///
    /// # Errors
    /// No such transfer is under way, or it is at another step. Nothing has changed.
    pub fn observe(
        &mut self,
        id: TransferId,
        step: u32,
        observation: Observation,
        challenge: [u8; CHALLENGE],
        now: UnixMillis,
    ) -> Result<Step, TransferError> {
        let transfer = self.transfer_mut(id)?;
        if transfer.step != step {
            return Err(TransferError::OtherStep { at: transfer.step });
        }
        let mut findings = Vec::new();
        let next = match transfer.stage.clone() {
            Stage::Associate { purpose, pair, challenge: sent } => match observation {
                Observation::Associated { meter_challenge, .. } => {
                    transfer.unfit = 0;
                    transfer.stage = Stage::Authenticate { purpose, pair, challenge: sent, meter_challenge };
                    Next::Send
                }
                Observation::CounterFollowed if transfer.follows_counter() => {
                    transfer.retries += 1;
                    transfer.stage = Stage::Associate { purpose, pair, challenge };
                    Next::Send
                }
                // Associate again. This uses up no pair and no attempt, and settles no doubt.
                Observation::ChallengeUnfit if transfer.unfit < MOST_UNFIT => {
                    transfer.unfit += 1;
                    transfer.stage = Stage::Associate { purpose, pair, challenge };
                    Next::Send
                }
                Observation::Attested { holds }
                    if purpose == ExchangePurpose::Prove && transfer.form == TransferForm::WrappedKey =>
                {
                    self.attested(holds, &mut findings, now)?
                }
                _ => self.next_pair(purpose, challenge),
            },
            Stage::Authenticate { purpose, pair, .. } => match observation {
                Observation::Authenticated { meter_counter } => {
                    self.proven(purpose, pair, meter_counter, &mut findings, now)?
                }
                _ => self.next_pair(purpose, challenge),
            },
            Stage::Deliver { .. } => self.answered(&observation, challenge, &mut findings, now)?,
        };
        match next {
            Next::Send => {
                if let Some(transfer) = &mut self.transfer {
                    transfer.step = transfer.step.saturating_add(1);
                    transfer.counters.clear();
                    transfer.pinned = None;
                }
            }
            Next::Done(_) => self.close_transfer(now),
        }
        Ok(Step { next, findings })
    }

    /// Ends the transfer. What has left stays a candidate (I3); what never left is destroyed.
    ///
    /// # Errors
    /// No such transfer is under way.
    pub fn withdraw_transfer(&mut self, id: TransferId, now: UnixMillis) -> Result<(), TransferError> {
        self.transfer_mut(id)?;
        self.close_transfer(now);
        Ok(())
    }

    fn transfer_mut(&mut self, id: TransferId) -> Result<&mut Transfer, TransferError> {
        self.transfer.as_mut().filter(|transfer| transfer.id == id).ok_or(TransferError::NotUnderWay)
    }

    /// I3: makes the next key a candidate. Its wrapped form leaves after the row is stored.
    fn deliver(&mut self, pair: Option<KeyPair>, now: UnixMillis) -> Result<Next, TransferError> {
        let Some((setup, delivered)) = self.transfer.as_ref().map(|transfer| (transfer.setup, transfer.delivered))
        else {
            return Err(TransferError::NotUnderWay);
        };
        // The association may have shown which KEK the meter holds. The second key of a compound
        // transfer leaves under the first.
        let kek = if delivered == 0 { self.kek_for_transfer(setup) } else { None };
        let owner = self.owner();
        let Some(transfer) = &mut self.transfer else { return Err(TransferError::NotUnderWay) };
        let Some(key) = transfer.keys.get_mut(delivered) else { return Ok(Next::Done(Outcome::Probed)) };
        if let Some(kek) = kek {
            key.kek = kek;
        }
        let key = *key;
        let slot = self.slots.get(setup, key.key_type);
        if key.owner == owner
            && slot
                .and_then(|slot| slot.version(key.version))
                .is_none_or(|version| version.state() != KeyState::PreActive)
        {
            return Ok(Next::Done(Outcome::Withdrawn));
        }
        // The meter may have left the group since the transfer began.
        if matches!(key.owner, Owner::Group(group) if !self.class.groups.contains(&group)) {
            return Ok(Next::Done(Outcome::Withdrawn));
        }
        transfer.delivered += 1;
        transfer.answer = Answer::Silence;
        transfer.stage = Stage::Deliver { pair };
        self.sequence = self.sequence.saturating_add(1);
        let moment = self.sequence;
        if key.owner != owner {
            let shared = SharedKey {
                owner: key.owner,
                setup,
                key_type: key.key_type,
                version: key.version,
                kek: key.kek,
                acknowledged: false,
            };
            self.shared.retain(|known| {
                (known.owner, known.setup, known.key_type, known.version)
                    != (shared.owner, setup, key.key_type, key.version)
            });
            self.shared.push(shared);
            self.shared.sort_unstable();
            return Ok(Next::Send);
        }
        // A key that travels under an exposed KEK is exposed to whoever recorded the traffic.
        let exposed_to: Vec<Party> = self
            .slots
            .get(setup, KeyType::KEK)
            .and_then(|slot| slot.version(key.kek))
            .map(|kek| kek.exposures().iter().map(|exposure| exposure.party.clone()).collect())
            .unwrap_or_default();
        let slot = self.slots.get_mut(setup, key.key_type)?;
        slot.mark_left(key.version, moment, key.kek)?;
        let version = slot.version_mut(key.version)?;
        for party in exposed_to {
            version.expose(party, ExposureReason::TransferUnderExposedKek, now);
        }
        Ok(Next::Send)
    }

    /// Continues after an answer to a delivery, or after silence.
    fn answered(
        &mut self,
        observation: &Observation,
        challenge: [u8; CHALLENGE],
        findings: &mut Vec<Finding>,
        now: UnixMillis,
    ) -> Result<Next, TransferError> {
        let Some(transfer) = &mut self.transfer else { return Err(TransferError::NotUnderWay) };
        let (pair, setup) = (transfer.pair(), transfer.setup);
        // No challenge binds an answer to its request. The meter's own counter tells an earlier
        // answer, relayed once more, from a new one.
        let protected = pair.or_else(|| self.pairs(setup, None).first().copied());
        let version =
            protected.and_then(|pair| self.slots.get_mut(setup, KeyType::GUEK).ok()?.version_mut(pair.encryption).ok());
        let answer = match (observation, version) {
            (Observation::Answered { result, meter_counter }, Some(version))
                if *meter_counter > version.transport.meter_counter =>
            {
                version.transport.meter_counter = *meter_counter;
                if *result == 0 { Answer::Accepted } else { Answer::Refused(*result) }
            }
            (Observation::Refusal | Observation::CounterFollowed, _) => Answer::Exception,
            _ => Answer::Silence,
        };
        let Some(transfer) = &mut self.transfer else { return Err(TransferError::NotUnderWay) };
        transfer.answer = answer;
        let Some(key) = transfer.current().copied() else { return Err(TransferError::NotUnderWay) };
        if transfer.delivered < transfer.keys.len() {
            // The second key of a compound transfer follows in the same association, if it is still
            // open.
            let alive = matches!(answer, Answer::Accepted | Answer::Refused(_));
            if alive || transfer.form == TransferForm::WrappedKey {
                return self.deliver(pair, now);
            }
            transfer.tried = 0;
            return Ok(self.exchange(ExchangePurpose::Open, challenge));
        }
        match key.key_type {
            KeyType::GUEK | KeyType::GAK => {
                transfer.tried = 0;
                Ok(self.exchange(ExchangePurpose::Prove, challenge))
            }
            _ if answer != Answer::Accepted => Ok(Next::Done(Outcome::InDoubt)),
            key_type if key.owner == self.owner() => {
                self.sequence = self.sequence.saturating_add(1);
                let moment = self.sequence;
                let confirmation =
                    self.slots.get_mut(setup, key_type)?.confirm(key.version, moment, Evidence::Acknowledged, now)?;
                findings.push(Finding::Held {
                    key_type,
                    version: key.version,
                    evidence: Evidence::Acknowledged,
                    confirmation,
                });
                Ok(Next::Done(Outcome::Acknowledged))
            }
            key_type => {
                for shared in &mut self.shared {
                    if (shared.owner, shared.setup, shared.key_type, shared.version)
                        == (key.owner, setup, key_type, key.version)
                    {
                        shared.acknowledged = true;
                    }
                }
                // It replaces the earlier versions in the meter.
                self.shared.retain(|shared| {
                    (shared.owner, shared.setup, shared.key_type) != (key.owner, setup, key_type)
                        || shared.version >= key.version
                });
                findings.push(Finding::SharedAcknowledged { owner: key.owner, key_type, version: key.version });
                Ok(Next::Done(Outcome::Acknowledged))
            }
        }
    }

    /// Continues after the pair answered a fresh challenge: the meter holds both keys.
    fn proven(
        &mut self,
        purpose: ExchangePurpose,
        pair: KeyPair,
        meter_counter: u32,
        findings: &mut Vec<Finding>,
        now: UnixMillis,
    ) -> Result<Next, TransferError> {
        let Some(transfer) = &self.transfer else { return Err(TransferError::NotUnderWay) };
        let setup = transfer.setup;
        let target = transfer.keys.last().map(|key| (key.key_type, key.version));
        self.sequence = self.sequence.saturating_add(1);
        let moment = self.sequence;
        let mut shown = Vec::new();
        for (key_type, number) in [(KeyType::GUEK, pair.encryption), (KeyType::GAK, pair.authentication)] {
            let slot = self.slots.get_mut(setup, key_type)?;
            let first_time = slot.version(number).is_some_and(|version| version.transport().confirmed == 0);
            let confirmation = slot.confirm(number, moment, Evidence::Proven, now)?;
            let version = slot.version_mut(number)?;
            if key_type == KeyType::GUEK {
                let known = version.transport.meter_counter;
                // A repeated counter is as bad as one that goes backwards: two answers under one
                // nonce.
                if known > 0 && meter_counter <= known {
                    findings.push(Finding::MeterCounterBackwards { version: number, known, seen: meter_counter });
                }
                version.transport.meter_counter = known.max(meter_counter);
            }
            if first_time && let Some(kek) = version.transport.kek {
                shown.push((kek, version.transport.left));
            }
            findings.push(Finding::Held { key_type, version: number, evidence: Evidence::Proven, confirmation });
        }
        for (kek, left) in shown {
            // What the meter unwrapped shows the KEK that it held when the key had left. It shows
            // nothing about later: a newer KEK may have come since.
            let slot = self.slots.get_mut(setup, KeyType::KEK)?;
            // A KEK that was released meanwhile has been replaced.
            let Some(version) = slot.version(kek).filter(|version| version.candidate()) else { continue };
            if version.transport().confirmed < left {
                let confirmation = slot.confirm(kek, left, Evidence::Proven, now)?;
                findings.push(Finding::Held {
                    key_type: KeyType::KEK,
                    version: kek,
                    evidence: Evidence::Proven,
                    confirmation,
                });
            }
        }
        match purpose {
            ExchangePurpose::Open => self.deliver(Some(pair), now),
            ExchangePurpose::Prove => {
                let held = [(KeyType::GUEK, pair.encryption), (KeyType::GAK, pair.authentication)];
                Ok(Next::Done(if target.is_some_and(|target| held.contains(&target)) {
                    Outcome::Proven
                } else {
                    Outcome::NotApplied
                }))
            }
        }
    }

    /// Continues with the statement of a head-end that holds the key itself.
    fn attested(&mut self, holds: bool, findings: &mut Vec<Finding>, now: UnixMillis) -> Result<Next, TransferError> {
        let Some(transfer) = &self.transfer else { return Err(TransferError::NotUnderWay) };
        let (setup, keys) = (transfer.setup, transfer.keys.clone());
        if !holds {
            return Ok(Next::Done(Outcome::InDoubt));
        }
        self.sequence = self.sequence.saturating_add(1);
        for key in keys {
            let confirmation = self.slots.get_mut(setup, key.key_type)?.confirm(
                key.version,
                self.sequence,
                Evidence::Attested,
                now,
            )?;
            findings.push(Finding::Held {
                key_type: key.key_type,
                version: key.version,
                evidence: Evidence::Attested,
                confirmation,
            });
        }
        Ok(Next::Done(Outcome::Attested))
    }

    fn next_pair(&mut self, purpose: ExchangePurpose, challenge: [u8; CHALLENGE]) -> Next {
        if let Some(transfer) = &mut self.transfer {
            transfer.tried = transfer.tried.saturating_add(1);
        }
        self.exchange(purpose, challenge)
    }

    /// Begins an exchange under the next pair that was not tried in this round.
    fn exchange(&mut self, purpose: ExchangePurpose, challenge: [u8; CHALLENGE]) -> Next {
        let Some(transfer) = &self.transfer else { return Next::Done(Outcome::InDoubt) };
        let target = match purpose {
            ExchangePurpose::Open => None,
            ExchangePurpose::Prove => transfer.keys.last().map(|key| (key.key_type, key.version)),
        };
        let pairs = self.pairs(transfer.setup, target);
        let pair = usize::try_from(transfer.tried).ok().and_then(|tried| pairs.get(tried)).copied();
        match (pair, &mut self.transfer) {
            (Some(pair), Some(transfer)) => {
                transfer.stage = Stage::Associate { purpose, pair, challenge };
                Next::Send
            }
            _ => Next::Done(Outcome::InDoubt),
        }
    }

    pub(crate) fn close_transfer(&mut self, now: UnixMillis) {
        let Some(transfer) = self.transfer.take() else { return };
        for key in transfer.keys.iter().skip(transfer.delivered).filter(|key| key.owner == Owner::Meter(self.title)) {
            if let Ok(slot) = self.slots.get_mut(transfer.setup, key.key_type) {
                // The version never left, so nobody holds it.
                let _ = slot.discard(key.version, now);
            }
        }
    }
}

/// How many challenges in a row that must not be answered lead to another association. The next one
/// counts as no answer.
///
/// One random challenge in 26 is of this kind, so an honest meter sends nine in a row once in 5 *
/// 10^12 associations. Without this limit, a meter that always sends them, or an attacker who
/// forges its associations, would keep a transfer busy for ever, and each association uses up a
/// counter. The count begins again only after a challenge that can be answered, not with the next
/// pair of keys. So such a meter costs these associations once, and then one for each pair.
pub const MOST_UNFIT: u32 = 8;
/// A transfer takes one moment of the sequence at its beginning, and one for each delivery and each
/// exchange that is answered: fewer than 16.
const LAST_MOMENT_TO_BEGIN: u32 = u32::MAX - 16;
