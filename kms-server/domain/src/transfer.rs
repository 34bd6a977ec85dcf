//! Transfers: how a key slot of a meter moves from one version to the next over the air, without
//! ever losing the meter (I3).
//!
//! A transfer is a part of the meter's sealed row, so there is one at a time, whoever asks on
//! whichever server. It is a pure state machine: each step says what to send to the meter, and each
//! [`Observation`] is what the server itself read in the meter's octets. What a head-end says moves
//! nothing. The steps of a transfer whose requests are made in the HSM:
//!
//! 1. *open*: an association under the keys that the meter is believed to hold, proven by a fresh
//!    challenge;
//! 2. *deliver*: the new version leaves, wrapped under the meter's KEK; before that it is a
//!    candidate in the durable row;
//! 3. *prove*: a new association under the new version. What answers its challenge is proof;
//!    acceptance, refusal, exceptions and silence are none.
//!
//! A new KEK is proven by a GUEK that only ever left wrapped under it: both are one compound
//! transfer. Keys that no exchange uses are acknowledged, not proven. Whatever happens, every
//! version that left stays a candidate until a later one is proven and the retention time has
//! passed.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    CampaignId, Confirmation, Evidence, ExposureReason, KeyState, KeyType, KeyVersion, KeyVersionNumber, Meter,
    NewKeyVersion, Owner, Party, PrincipalId, SecuritySetupId, SlotError, SystemTitle, TransferId, UnixMillis,
};

/// A transfer under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// Its id: that of the request that began it.
    pub id: TransferId,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The head-end that carries it out.
    pub head_end: PrincipalId,
    /// The campaign's task that it is carried out for.
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
    /// The number of the step, from 1. A report names the step that it answers; for any other it
    /// changes nothing.
    pub step: u32,
    /// How many pairs of keys were tried in the present round.
    pub tried: u32,
    /// The invocation counters of the step's request, in order of use. The same step is sent again
    /// with the same octets only (I4).
    pub counters: Vec<u32>,
    /// A digest of what the step's octets are made of besides this row: what the program and the
    /// meter's device profile say. None: the step has no counters, or a version of the server that
    /// did not note it made them.
    pub pinned: Option<[u8; 16]>,
    /// How often an association was begun again under the same keys because the meter's counter was
    /// followed.
    pub retries: u32,
    /// Associations in a row that brought a challenge which is not one to answer: see
    /// [`Observation::ChallengeUnfit`].
    pub unfit: u32,
    /// What the meter answered to the last delivery, as far as it could be read.
    pub answer: Answer,
    /// After this it can be given up by whoever wants to begin another.
    pub not_after: UnixMillis,
}

/// The lease of a campaign's task that a transfer began under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CampaignTask {
    /// The campaign; the task is that of the transfer's meter.
    pub campaign: CampaignId,
    /// The fencing token of the lease. A transfer under a lease that was lost goes no further.
    pub fence: u64,
}

/// Who ciphers the request that delivers a key. The proof is made in the HSM either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransferForm {
    /// The head-end, in a session of its own: it gets the wrapped key and the argument of
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
    /// The version that is to be brought.
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
    /// To deliver a key in its association, or, in a probe, to learn what the meter holds.
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

/// What the meter answered to a delivery. None of these proves anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Nothing that could be read.
    #[default]
    Silence,
    /// Success, authenticated under the keys before.
    Accepted,
    /// Another action-result, authenticated under the keys before.
    Refused(u8),
    /// An exception response, which anyone can forge.
    Exception,
}

/// What the server read in the octets that came back, by the keys in the HSM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Observation {
    /// Nothing came, or nothing that these keys open.
    Nothing,
    /// An exception response, or a refused association.
    Refusal,
    /// An exception response that names a counter; the reservation was moved above it, within the
    /// device profile's cap.
    CounterFollowed,
    /// The association was accepted, and its challenge is not one to answer: it could be a request.
    /// Nothing is learnt by it, neither of the keys nor of the meter: another association under the
    /// same keys brings another challenge. It counts as no attempt, up to [`MOST_UNFIT`] in a row.
    ChallengeUnfit,
    /// The association was accepted: the ciphered InitiateResponse opened under the pair.
    Associated {
        /// The meter's challenge, 8–64 octets.
        meter_challenge: Vec<u8>,
        /// The meter's own counter.
        meter_counter: u32,
    },
    /// The answer to the client's challenge verifies under the pair. This is fresh: it is proof.
    Authenticated {
        /// The highest counter of the meter in it.
        meter_counter: u32,
    },
    /// An authenticated answer to `key_transfer`.
    Answered {
        /// The action-result: 0 is success.
        result: u8,
        /// The meter's own counter: above every one before it under the same GUEK, so that it is no
        /// answer to an earlier request.
        meter_counter: u32,
    },
    /// The head-end, which holds the new key, says whether the meter uses it. Policy has allowed
    /// that it may say so.
    Attested {
        /// Whether it does.
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
    /// The head-end says that the meter holds the new version.
    Attested,
    /// The meter showed, after the delivery, that it holds an earlier version.
    NotApplied,
    /// The meter showed which keys it holds; nothing was delivered.
    Probed,
    /// Nothing was shown. Every version that left may be the one that the meter holds.
    InDoubt,
    /// It was withdrawn, its time ran out, its key was reported compromised before it left, or the
    /// meter has left the group whose key it is.
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

    /// Whether the meter has what it was to get.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Proven | Self::Acknowledged | Self::Attested | Self::Probed)
    }
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do next.
    pub next: Next,
    /// What the records have to say.
    pub findings: Vec<Finding>,
}

/// Something that a step found out.
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
        /// What this came to.
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

/// What a transfer is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferOrder {
    /// The id that it gets.
    pub id: TransferId,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The head-end that carries it out.
    pub head_end: PrincipalId,
    /// The campaign's task that it is carried out for.
    pub campaign: Option<CampaignTask>,
    /// The client title that the requests are sent under.
    pub client_title: SystemTitle,
    /// Who ciphers the delivery.
    pub form: TransferForm,
    /// What to bring.
    pub keys: OrderedKeys,
    /// Go on although an earlier transfer of the slot is in doubt: a further candidate comes to be.
    pub urgent: bool,
    /// After this it can be given up by whoever wants to begin another.
    pub not_after: UnixMillis,
    /// The client's challenge of the first exchange: random.
    pub challenge: [u8; CHALLENGE],
}

/// The keys of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderedKeys {
    /// None: only learn what the meter holds.
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

impl Transfer {
    /// The key that the present delivery brings, or the last one brought.
    pub fn current(&self) -> Option<&TransferKey> {
        self.delivered.checked_sub(1).and_then(|at| self.keys.get(at))
    }

    /// Whether the present step is tried again above a counter that an unauthenticated answer
    /// names: an association, three times in a transfer. Elsewhere such an answer only says that
    /// the request was refused.
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

impl Meter {
    /// Begins a transfer: its new versions are added and, if the first one leaves at once, it is a
    /// candidate. The row is stored before anything leaves (I3).
    ///
    /// # Errors
    /// Another transfer is under way, the slot is in doubt, the meter lacks a key that the transfer
    /// needs, is set aside, or has used up its sequence. The caller drops the meter then: an
    /// earlier transfer may have ended by it.
    pub fn begin_transfer(&mut self, order: TransferOrder, now: UnixMillis) -> Result<Step, TransferError> {
        if !self.class.status.may_grant() {
            return Err(TransferError::Status { status: self.class.status.name() });
        }
        // I3: moments that no longer increase would put nothing in order.
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

    /// Goes on by what was observed after step `step`. `challenge` is random, for the exchange that
    /// may follow.
    ///
    /// # Errors
    /// No such transfer is under way, or it is at another step. Nothing has changed then.
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
                // Associate again. No pair and no attempt is used up, and no doubt moves.
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

    /// The KEK to wrap the next key under: the candidate that the meter most likely holds. Each key
    /// that left under a KEK since that was shown, and was not shown itself, halves the odds of
    /// that KEK; a new KEK starts with what is left to the one that it left under. So the turn of
    /// every candidate comes, however many there are.
    pub fn kek_for_transfer(&self, setup: SecuritySetupId) -> Option<KeyVersionNumber> {
        let slot = self.slots.get(setup, KeyType::KEK)?;
        let (held, shown) = slot.held().map_or((None, 0), |held| (Some(held.number()), held.transport().confirmed));
        let candidates = slot.candidates().filter(|kek| kek.state() != KeyState::Destroyed);
        // Another one has been shown since it left: the meter has it only if it went back.
        let superseded = |kek: &KeyVersion| Some(kek.number()) != held && kek.transport().left <= shown;
        let mut odds: BTreeMap<_, KekOdds> = candidates
            .map(|kek| (kek.number(), KekOdds { halvings: u32::from(superseded(kek)), in_vain: 0 }))
            .collect();
        for shared in self.shared.iter().filter(|shared| shared.setup == setup && !shared.acknowledged) {
            odds.entry(shared.kek).and_modify(KekOdds::halve);
        }
        let mut in_vain: Vec<_> = self
            .slots
            .of_setup(setup)
            .flat_map(|slot| slot.versions().iter().map(|version| (slot.key_type(), version)))
            .collect();
        in_vain.retain(|(_, version)| {
            let transport = version.transport();
            let under = transport.kek.and_then(|kek| slot.version(kek));
            transport.evidence == Evidence::None && under.is_some_and(|kek| transport.left > kek.transport().confirmed)
        });
        in_vain.sort_by_key(|(_, version)| version.transport().left);
        for (key_type, version) in in_vain {
            let Some(kek) = version.transport().kek.and_then(|kek| odds.get_mut(&kek)) else { continue };
            kek.halve();
            let inherited = kek.halvings;
            if key_type == KeyType::KEK {
                odds.entry(version.number()).and_modify(|own| own.halvings = own.halvings.max(inherited));
            }
        }
        // Where two are alike, the one that was tried less often, then the newer one.
        odds.into_iter().min_by_key(|(number, odds)| (*odds, std::cmp::Reverse(*number))).map(|(number, _)| number)
    }

    /// The pairs of keys that are tried in a round, the likeliest first; `target` counts as the
    /// likeliest of its key type. Where the meter may hold one of more than a round has, the
    /// likeliest are tried in each one, and the others in turn: one probe after another finds every
    /// meter. At most twelve, however many candidates there are.
    pub fn pairs(&self, setup: SecuritySetupId, target: Option<(KeyType, KeyVersionNumber)>) -> Vec<KeyPair> {
        let ranked = |key_type: KeyType| {
            let Some(slot) = self.slots.get(setup, key_type) else { return Vec::new() };
            let held = slot.held().map(KeyVersion::number);
            let mut numbers: Vec<KeyVersionNumber> = slot.candidates().map(KeyVersion::number).collect();
            numbers.sort_by_key(|number| {
                (target != Some((key_type, *number)), Some(*number) != held, std::cmp::Reverse(*number))
            });
            numbers
        };
        let (encryption, authentication) = (ranked(KeyType::GUEK), ranked(KeyType::GAK));
        let all = encryption.len().saturating_mul(authentication.len());
        let others = if all > PAIRS_OF_A_ROUND { all - LIKELIEST_PAIRS } else { 0 };
        let at_once = PAIRS_OF_A_ROUND - LIKELIEST_PAIRS;
        // The sequence stays within a round, and grows by one from probe to probe.
        let turn = usize::try_from(self.sequence).unwrap_or_default() % others.div_ceil(at_once).max(1);
        let places =
            (0..LIKELIEST_PAIRS).chain((LIKELIEST_PAIRS..all).skip(turn.saturating_mul(at_once)).take(at_once));
        let pair = |place| {
            let (encrypts, authenticates) = place_by_rank(place, encryption.len(), authentication.len())?;
            Some(KeyPair {
                encryption: *encryption.get(encrypts)?,
                authentication: *authentication.get(authenticates)?,
            })
        };
        places.map_while(pair).collect()
    }

    fn transfer_mut(&mut self, id: TransferId) -> Result<&mut Transfer, TransferError> {
        self.transfer.as_mut().filter(|transfer| transfer.id == id).ok_or(TransferError::NotUnderWay)
    }

    /// Adds the new versions of an order, with the KEK that each leaves under.
    fn add_versions(&mut self, order: &TransferOrder, now: UnixMillis) -> Result<Vec<TransferKey>, TransferError> {
        let setup = order.setup;
        let owner = self.owner();
        if matches!(order.keys, OrderedKeys::Probe) {
            return Ok(Vec::new());
        }
        let kek = self.kek_for_transfer(setup).ok_or(TransferError::NoKek { setup })?;
        let mut keys = Vec::new();
        match &order.keys {
            OrderedKeys::Probe => {}
            // I3: it would take the place of a key of the meter, in whose slot it is no candidate.
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
                // A probe shows no KEK: only another transfer does.
                self.refuse_in_doubt(setup, &[KeyType::GUEK], order.urgent)?;
                self.refuse_too_many(setup, KeyType::GUEK)?;
                self.refuse_too_many(setup, KeyType::KEK)?;
                self.refuse_full(setup, KeyType::GUEK, now)?;
                self.refuse_full(setup, KeyType::KEK, now)?;
                // Nothing is added unless both can be.
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

    /// A key that no exchange shows is brought again without further ado: no probe would settle the
    /// doubt.
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

    /// I3: no candidate is dropped to make room for another, so the new one is refused. Not where a
    /// probe has shown what the meter holds since the last one left: then it is known which key
    /// opens the meter, however many it could have. Keys that no exchange shows open nothing, and
    /// are not counted.
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

    /// Bounds what whoever plays a meter can have stored, in doubt or not: each version is decoded,
    /// sealed and written again with every act. None of the versions can go before its time (I3),
    /// and a meter that can get no further key is as good as lost, so a full slot takes one more
    /// each day. It takes one at once where the newest is reported as compromised, which only
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

    /// I3: the next key becomes a candidate; its wrapped form leaves after the row is stored.
    fn deliver(&mut self, pair: Option<KeyPair>, now: UnixMillis) -> Result<Next, TransferError> {
        let Some((setup, delivered)) = self.transfer.as_ref().map(|transfer| (transfer.setup, transfer.delivered))
        else {
            return Err(TransferError::NotUnderWay);
        };
        // What the association has shown may have settled which KEK the meter holds. The second key
        // of a compound transfer leaves under the first.
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
        // What travels under an exposed KEK is exposed to whoever recorded the traffic.
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

    /// After an answer, or none, to a delivery.
    fn answered(
        &mut self,
        observation: &Observation,
        challenge: [u8; CHALLENGE],
        findings: &mut Vec<Finding>,
        now: UnixMillis,
    ) -> Result<Next, TransferError> {
        let Some(transfer) = &mut self.transfer else { return Err(TransferError::NotUnderWay) };
        let (pair, setup) = (transfer.pair(), transfer.setup);
        // No challenge binds an answer to its request: an earlier one of the meter, relayed once
        // more, says nothing. Its own counter tells.
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
            // The second key of a compound transfer follows in the same association, if there still
            // is one.
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
                // It has taken the place of those before it.
                self.shared.retain(|shared| {
                    (shared.owner, shared.setup, shared.key_type) != (key.owner, setup, key_type)
                        || shared.version >= key.version
                });
                findings.push(Finding::SharedAcknowledged { owner: key.owner, key_type, version: key.version });
                Ok(Next::Done(Outcome::Acknowledged))
            }
        }
    }

    /// The pair answered a fresh challenge: the meter holds both.
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
                // A counter that comes again is as bad as one that goes back: two answers under one
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
            // What the meter unwrapped shows the KEK that it held when the key had left: not later
            // than that, for a newer KEK may have come since.
            let slot = self.slots.get_mut(setup, KeyType::KEK)?;
            // One that was released meanwhile has been replaced since.
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

    /// What a head-end says that holds the key itself.
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

    /// An exchange under the next pair that was not tried in this round.
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
                // It never left, so nobody holds it.
                let _ = slot.discard(key.version, now);
            }
        }
    }
}

/// The place of a pair in two ranked lists, by its place among all pairs: the smallest sum of both
/// ranks first, and of these the one that is first in the first list. It steps over whole
/// diagonals, so it costs no more than the lists are long.
const fn place_by_rank(place: usize, first: usize, second: usize) -> Option<(usize, usize)> {
    let (mut left, mut sum) = (place, 0);
    while sum + 1 < first + second {
        let from = (sum + 1).saturating_sub(second);
        let to = if sum < first { sum + 1 } else { first };
        if let Some(beyond) = left.checked_sub(to - from) {
            left = beyond;
        } else {
            return Some((from + left, sum - from - left));
        }
        sum += 1;
    }
    None
}

/// How likely it is that a meter holds a KEK, by what has left under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct KekOdds {
    /// The odds are halved so often.
    halvings: u32,
    /// Keys that left under it in vain.
    in_vain: u32,
}

impl KekOdds {
    const fn halve(&mut self) {
        self.halvings = self.halvings.saturating_add(1);
        self.in_vain = self.in_vain.saturating_add(1);
    }
}

/// Why a transfer does not begin or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// One transfer of a meter at a time.
    #[error("transfer {id} of this meter is under way")]
    UnderWay {
        /// The other.
        id: TransferId,
        /// When it may be given up.
        not_after: UnixMillis,
    },
    /// It ended, or never was.
    #[error("no such transfer of this meter is under way")]
    NotUnderWay,
    /// A late or repeated report.
    #[error("the transfer is at step {at}")]
    OtherStep {
        /// Its step.
        at: u32,
    },
    /// A transfer before left it open which version the meter holds.
    #[error("it is in doubt which {key_type} the meter holds")]
    InDoubt {
        /// The key type.
        key_type: KeyType,
    },
    /// An urgent transfer, or one of a KEK, would add one more version that the meter may hold.
    #[error("the meter may hold any of {most} versions of its {key_type}, or of more: no further one is added")]
    TooManyCandidates {
        /// The key type.
        key_type: KeyType,
        /// The bound.
        most: usize,
    },
    /// The slot has as many versions that are not destroyed as a day's orders bring.
    #[error(
        "{most} versions of the meter's {key_type}, or more, are not destroyed yet: a further one is brought once a day. Those before a version that is \
         proven go when the retention time has passed"
    )]
    SlotFull {
        /// The key type.
        key_type: KeyType,
        /// The bound.
        most: usize,
        /// How long until a further one is brought.
        wait: Duration,
    },
    /// A KEK is proven by a GUEK only.
    #[error("a KEK is transferred together with the GUEK that proves it")]
    KekAlone,
    /// A key of exchanges, or the one that wraps others, is the meter's own.
    #[error("a {key_type} is a meter's own: bring a new version of it")]
    NotShared {
        /// The key type.
        key_type: KeyType,
    },
    /// So many transfers were begun that no moment is left to put another in order.
    #[error("the meter's sequence is used up: enrol it under a new system title")]
    SequenceUsedUp,
    /// Nothing to wrap under.
    #[error("the meter has no KEK in security setup {setup}")]
    NoKek {
        /// The security setup.
        setup: SecuritySetupId,
    },
    /// No exchange is possible.
    #[error("the meter has no GUEK and GAK in security setup {setup}")]
    NoKeys {
        /// The security setup.
        setup: SecuritySetupId,
    },
    /// The meter is set aside or retired.
    #[error("the meter is {status}")]
    Status {
        /// Its status.
        status: &'static str,
    },
    /// The slot refuses.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// The length of a client's challenge in octets.
pub const CHALLENGE: usize = 16;
/// A counter, which may be forged, is followed at most this often in a transfer.
const MOST_RETRIES: u32 = 3;
/// So many challenges in a row that are not to be answered are asked for anew; the next one counts
/// as no answer.
///
/// One random challenge in 26 is of this kind, so an honest meter sends nine in a row once in 5 *
/// 10^12 associations. A meter that always sends them, or whoever forges its associations, would
/// else have a transfer ask for ever, and each association uses up a counter. The count begins
/// again only with a challenge that can be answered, not with the next pair of keys: such a meter
/// costs these associations once, and one for each pair.
pub const MOST_UNFIT: u32 = 8;
/// While it is in doubt which one of so many versions of a key a meter holds, no further one is
/// brought to it.
///
/// A round tries twelve pairs of GUEK and GAK, so a probe finds the meter at once among eight
/// candidates of one of them. Rows that have more keep them.
pub const MOST_CANDIDATES: usize = 8;
/// The same of KEKs. They make no pairs, a probe does not show them, and the turn of each comes by
/// transfers alone, so there are more. A GUEK that is proven shows the KEK that it left under.
pub const MOST_KEK_CANDIDATES: usize = 64;
/// Versions of a key of a meter that are not destroyed, of all key types, whether it is known which
/// one the meter holds or not. More are brought one a day.
///
/// Twice the candidates of a KEK, so that a GUEK can leave under each of these in turn and show
/// which one the meter holds. Who rotates a key each day keeps fewer: after the default retention
/// time of 90 days they are destroyed.
pub const MOST_VERSIONS: usize = 128;
const DAY_MS: i64 = 86_400_000;
/// Pairs that are tried in a round at most.
const PAIRS_OF_A_ROUND: usize = 12;
/// Those of them that are tried in every round.
const LIKELIEST_PAIRS: usize = 8;
/// A transfer takes a moment at its beginning, and one for each delivery and each exchange that is
/// answered: fewer than 16.
const LAST_MOMENT_TO_BEGIN: u32 = u32::MAX - 16;
