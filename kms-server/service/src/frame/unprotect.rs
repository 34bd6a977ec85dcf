//! Frames from meters, opened inside the HSM.
//!
//! A meter's answer to a challenge also shows which keys the meter holds. If they are not the
//! active keys, a security event tells the officers.

use async_recursion::async_recursion as boxed;
use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
};

use kms_dlms::{CipheredApdu, DlmsError, HlsGmac, KeySet, Nonce};
use kms_domain::{KeyState, KeyType, KeyVersionNumber, Meter, SecuritySetupId, SystemTitle};
use kms_hsm::{FrameKeys, FrameParameters, HsmError, ProtectedFrame};
use tracing::Instrument as _;

use super::alert::{Alert, Alerts, Shown};
use super::{FrameOutcome, FrameService, SetupKeys, denied, frame_keys, setup_of};
use crate::transfer::pair_keys;
use kms_authz::facts;
use kms_authz::{Action, Caller, PrincipalFacts, Purpose, Resource};
use kms_base::FrameDirection;
use kms_base::error::ServiceError;
use kms_base::metrics;

/// A frame from a meter, to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedFrame {
    /// The meter that sent it.
    pub meter: SystemTitle,
    /// Which security setup; `None` is the meter's first.
    pub setup: Option<SecuritySetupId>,
    /// The content.
    pub content: ReceivedContent,
}

/// The content of a received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceivedContent {
    /// A ciphered APDU.
    Apdu(Vec<u8>),
    /// f(CtoS), 17 octets, and the challenge that it answers.
    HlsResponse {
        /// What the meter sent.
        response: Vec<u8>,
        /// The client's challenge (CtoS).
        challenge: Vec<u8>,
    },
}

impl FrameService {
    /// Opens frames that came from meters.
    ///
    /// # Errors
    /// What concerns all: the caller, HSM or database.
    #[boxed]
    pub async fn unprotect(
        &self,
        caller: &Caller,
        purpose: Purpose,
        frames: Vec<ReceivedFrame>,
    ) -> Result<Vec<FrameOutcome>, ServiceError> {
        let span = tracing::debug_span!("frames", kms.frames = frames.len());
        let (opened, alerts) = self.open_all(caller, purpose, frames).instrument(span).await?;
        self.alert(caller, alerts).await?;
        // No act refuses these (I2).
        for _ in opened.iter().filter(|outcome| matches!(outcome.octets, Err(ServiceError::PermissionDenied { .. }))) {
            self.island.committer.refused(
                Some(&caller.principal),
                "unprotectFrame",
                "`unprotectFrame` is not permitted".to_owned(),
            );
        }
        metrics().frames(FrameDirection::Unprotect, opened.iter().map(|outcome| &outcome.octets));
        Ok(opened)
    }

    /// Records security events, once for each key while this server runs.
    async fn alert(&self, caller: &Caller, alerts: Vec<Alert>) -> Result<(), ServiceError> {
        let mut fresh = alerts;
        {
            let alerted = self.alerted.lock().unwrap_or_else(PoisonError::into_inner);
            fresh.retain(|found| !alerted.contains(&found.key()));
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let told: Vec<_> = fresh.iter().map(Alert::key).collect();
        self.island.door.act(caller, None, Alerts(fresh)).await?;
        // Only after the record is durable is the alert not repeated.
        let mut alerted = self.alerted.lock().unwrap_or_else(PoisonError::into_inner);
        if alerted.len() > MOST_ALERTED {
            alerted.clear();
        }
        alerted.extend(told);
        Ok(())
    }

    async fn open_all(
        &self,
        caller: &Caller,
        purpose: Purpose,
        frames: Vec<ReceivedFrame>,
    ) -> Result<(Vec<FrameOutcome>, Vec<Alert>), ServiceError> {
        let titles: Vec<SystemTitle> = frames.iter().map(|frame| frame.meter).collect();
        let (principal, rows) = self.island.principal_and_meters(caller, &titles).await?;
        let facts = facts(&principal);
        let mut meters = HashMap::new();
        for row in rows {
            match self.island.committer.open_meter(row.title, &row.row) {
                Ok(meter) => meters.insert(row.title, meter),
                // Another server may have written the row after it was read here, so it is read
                // once more. A row that fails twice counts as absent (I5).
                Err(_) => {
                    self.island.meter(row.title).await.ok().flatten().and_then(|meter| meters.insert(row.title, meter))
                }
            };
        }
        let mut others = OtherPairs::default();
        let opened: Vec<Result<Received, ServiceError>> = frames
            .into_iter()
            .map(|frame| self.receive(&facts, purpose, meters.get(&frame.meter).map(AsRef::as_ref), frame, &mut others))
            .collect();
        let jobs: Vec<(FrameKeys, ProtectedFrame)> = opened
            .iter()
            .filter_map(|received| received.as_ref().ok())
            .map(|received| (received.keys.clone(), received.frame.clone()))
            .collect();
        let mut plain = self
            .island
            .hsm_for(caller)
            .unprotect_batch(jobs)
            .instrument(tracing::debug_span!("hsm.unprotect"))
            .await?
            .into_iter();
        let (mut alerts, mut doubtful) = (Vec::new(), Vec::new());
        let mut outcomes: Vec<FrameOutcome> = opened
            .into_iter()
            .enumerate()
            .map(|(at, received)| match received {
                Err(error) => FrameOutcome { octets: Err(error), counter: 0 },
                Ok(received) => {
                    let octets = match plain.next() {
                        Some(Ok(_)) if received.is_challenge => {
                            alerts.extend(received.backwards);
                            Ok(Vec::new())
                        }
                        Some(Ok(octets)) => Ok(octets),
                        Some(Err(error @ HsmError::TagInvalid)) => {
                            metrics().hsm_error(&error);
                            doubtful.extend(
                                received.others.iter().map(|other| (at, other.clone(), received.frame.clone())),
                            );
                            Err(ServiceError::FailedPrecondition {
                                reason: "the frame's authentication tag does not verify".to_owned(),
                                next_step:
                                    "check that the frame is the meter's and unchanged; the meter may hold another key"
                                        .to_owned(),
                            })
                        }
                        Some(Err(error)) => Err(error.into()),
                        None => {
                            Err(ServiceError::Internal("the HSM returned fewer frames than it was given".to_owned()))
                        }
                    };
                    FrameOutcome { octets, counter: received.counter }
                }
            })
            .collect();
        for (at, other) in self.held_instead(caller, doubtful).await? {
            if let Some(outcome) = outcomes.get_mut(at) {
                outcome.octets = Err(other.refusal());
            }
            alerts.extend(other.earlier);
        }
        Ok((outcomes, alerts))
    }

    /// The pair of keys that protected a meter's answer to a challenge, if it is not the active
    /// pair. The answer changes no state (I3): only a probe, whose challenge the HSM makes, proves
    /// what the meter holds.
    async fn held_instead(
        &self,
        caller: &Caller,
        doubtful: Vec<(usize, OtherPair, ProtectedFrame)>,
    ) -> Result<Vec<(usize, OtherPair)>, ServiceError> {
        if doubtful.is_empty() {
            return Ok(Vec::new());
        }
        let jobs = doubtful.iter().map(|(_, other, frame)| (other.keys.clone(), frame.clone())).collect();
        let opened =
            self.island.hsm_for(caller).unprotect_batch(jobs).instrument(tracing::debug_span!("hsm.unprotect")).await?;
        let mut found: Vec<(usize, OtherPair)> = Vec::new();
        for ((at, other, _), opened) in doubtful.into_iter().zip(opened) {
            if opened.is_ok() && found.last().is_none_or(|(known, _)| *known != at) {
                found.push((at, other));
            }
        }
        Ok(found)
    }

    fn receive(
        &self,
        facts: &PrincipalFacts,
        purpose: Purpose,
        meter: Option<&Meter>,
        frame: ReceivedFrame,
        others: &mut OtherPairs,
    ) -> Result<Received, ServiceError> {
        let meter = meter.ok_or_else(|| denied("unprotectFrame", frame.meter))?;
        let action = Action::UnprotectFrame { purpose };
        if !meter.class.status.may_grant()
            || !self.island.policy.load().permits(facts, &action, &Resource::Meters(&meter.class)).is_permit()
        {
            return Err(denied("unprotectFrame", frame.meter));
        }
        let setup = setup_of(meter, frame.setup)?;
        let keys = frame_keys(meter, setup)?;
        let invalid = |error: DlmsError| ServiceError::invalid("frames.apdu", error.to_string());
        match frame.content {
            ReceivedContent::Apdu(octets) => {
                let ciphered = CipheredApdu::parse(&octets).map_err(invalid)?;
                if ciphered.tag.is_dedicated() || ciphered.control.key_set == KeySet::Broadcast {
                    return Err(ServiceError::invalid(
                        "frames.apdu",
                        "it is protected by a dedicated or a broadcast key; only unicast frames are opened here",
                    ));
                }
                // Only frames that the meter itself sent: otherwise a head-end could open what
                // other head-ends send to it.
                if ciphered.system_title.is_some_and(|title| title != meter.title) {
                    return Err(ServiceError::invalid(
                        "frames.apdu",
                        "it carries another system title than the meter's",
                    ));
                }
                if ciphered.control.suite != meter.suite {
                    return Err(ServiceError::invalid("frames.apdu", "its security suite is not the meter's"));
                }
                let parameters = FrameParameters::new(
                    ciphered.control.octet(),
                    *Nonce::new(meter.title, ciphered.counter).octets(),
                )?;
                let received =
                    ProtectedFrame { parameters, text: ciphered.content.to_vec(), tag: ciphered.authentication_tag.0 };
                Ok(Received {
                    keys: keys.keys,
                    frame: received,
                    counter: ciphered.counter,
                    is_challenge: false,
                    backwards: None,
                    others: Arc::default(),
                })
            }
            ReceivedContent::HlsResponse { response, challenge } => {
                let gmac = HlsGmac::parse(&response)
                    .map_err(|error| ServiceError::invalid("frames.hls_response", error.to_string()))?;
                let parameters = FrameParameters::new(
                    HlsGmac::control(gmac.suite).octet(),
                    *Nonce::new(meter.title, gmac.counter).octets(),
                )?;
                let received = ProtectedFrame { parameters, text: challenge, tag: gmac.tag.0 };
                // Only the answer to a challenge is fresh. Any other frame may be opened long after
                // it was sent.
                let known = meter
                    .slots
                    .get(setup, KeyType::GUEK)
                    .and_then(|slot| slot.version(keys.encryption_version))
                    .map_or(0, |version| version.transport().meter_counter);
                let shown = Shown::Backwards { version: keys.encryption_version, known, seen: gmac.counter };
                let found = Alert { meter: meter.title, setup, shown };
                let others =
                    others.entry((meter.title, setup)).or_insert_with(|| OtherPair::of(meter, setup, &keys)).clone();
                Ok(Received {
                    keys: keys.keys,
                    frame: received,
                    counter: gmac.counter,
                    is_challenge: true,
                    backwards: Some(found).filter(|_| gmac.counter < known),
                    others,
                })
            }
        }
    }
}

struct Received {
    keys: FrameKeys,
    frame: ProtectedFrame,
    counter: u32,
    is_challenge: bool,
    /// The alert to record if the frame is genuine.
    backwards: Option<Alert>,
    /// The other pairs that the meter may hold, the most likely first. Only an answer to a
    /// challenge is tried with them: any other frame could have been recorded while these keys were
    /// active.
    others: Arc<[OtherPair]>,
}

/// The other pairs of the meters of one call, each made once.
type OtherPairs = HashMap<(SystemTitle, SecuritySetupId), Arc<[OtherPair]>>;

/// A pair of keys that a meter may hold, and that is not the active one.
#[derive(Clone)]
struct OtherPair {
    keys: FrameKeys,
    /// Which of the two keys was active before. Empty: an unfinished transfer left it unknown
    /// whether the meter has a new key.
    earlier: Vec<Alert>,
}

impl OtherPair {
    fn of(meter: &Meter, setup: SecuritySetupId, active: &SetupKeys) -> Arc<[Self]> {
        let pairs = meter.pairs(setup, None).into_iter();
        let others = pairs.filter(|pair| {
            (pair.encryption, pair.authentication) != (active.encryption_version, active.authentication_version)
        });
        let earlier = |key_type: KeyType, number: KeyVersionNumber| {
            let version = meter.slots.get(setup, key_type)?.version(number)?;
            let was_active = !matches!(version.state(), KeyState::Active | KeyState::PreActive);
            was_active.then_some(Alert {
                meter: meter.title,
                setup,
                shown: Shown::EarlierKey { key_type, version: number },
            })
        };
        let others = others.filter_map(|pair| {
            let earlier = [earlier(KeyType::GUEK, pair.encryption), earlier(KeyType::GAK, pair.authentication)]
                .into_iter()
                .flatten()
                .collect();
            Some(Self { keys: pair_keys(meter, setup, pair).ok()?, earlier })
        });
        others.take(MOST_OTHER_PAIRS).collect()
    }

    fn refusal(&self) -> ServiceError {
        let held: Vec<String> = self.earlier.iter().map(Alert::detail).collect();
        let reason = if held.is_empty() {
            "the response was not protected with the active keys; an unfinished key transfer left it unknown which version the meter holds".to_owned()
        } else {
            format!("the response was not protected with the active keys: {}", held.join("; "))
        };
        ServiceError::FailedPrecondition {
            reason,
            next_step: "find out which keys the meter holds with a probe: a transfer without a key type".to_owned(),
        }
    }
}

/// Alerts that are remembered as recorded.
const MOST_ALERTED: usize = 10_000;
/// Other pairs of keys with which an answer to a challenge is tried.
const MOST_OTHER_PAIRS: usize = 4;
