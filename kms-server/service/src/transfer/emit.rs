//! The octets of a step, made in the HSM from the meter's row alone.
//!
//! The same row gives the same octets, because RFC 3394 and AES-GCM under a given nonce are
//! deterministic. So a repeated step does not use its counters a second time (I4). The octets also
//! depend on the device profile and on constants of this program. A digest of these is pinned in
//! the row with the counters. If the digest has changed, the step is not made again.

use std::{collections::HashMap, sync::Arc};

use aws_lc_rs::digest;
use kms_dlms::{
    AssociationRequest, AuthenticationTag, Challenge, CipheredApdu, CipheredTag, DlmsError, HlsGmac, InitiateRequest,
    KeySet, KeyTransfer, Nonce, Protection, SecurityControl,
};
use kms_domain::{
    Group, GroupId, KeyPair, KeyType, KeyVersionNumber, Meter, Owner, SecuritySetupId, Slots, Stage, SystemTitle,
    Transfer,
};
use kms_hsm::{FrameInput, FrameKeys, FrameParameters, KeySource, ProtectedFrame, TransferJob};

use super::{
    TransferService,
    step::{Brought, Decided, DecidedStep, Delivery, NextStep, Sending, SendingKind, StepAnswer},
};
use crate::island::IslandContext;
use crate::keys::source::source;
use kms_authz::Caller;
use kms_base::error::ServiceError;

impl TransferService {
    /// The answers to decided steps. The requests to the meters are made now.
    pub(super) async fn answer(&self, decided: Vec<Decided>) -> Result<Vec<StepAnswer>, ServiceError> {
        let groups = self.groups(&decided).await?;
        let mut plans: Vec<Option<StepPlan>> = Vec::with_capacity(decided.len());
        let mut answers = Vec::with_capacity(decided.len());
        for (title, step) in decided {
            let (answer, plan) = match step {
                Err(error) => (StepAnswer { meter: title, transfer: None, next: Err(error) }, None),
                Ok(DecidedStep { end: Some((outcome, findings)), .. }) => {
                    (StepAnswer { meter: title, transfer: None, next: Ok(NextStep::End { outcome, findings }) }, None)
                }
                Ok(DecidedStep { meter, end: None }) => match StepPlan::of(&self.island, &meter, &groups) {
                    Ok(plan) => {
                        let transfer = Some((plan.transfer.id, plan.transfer.step));
                        // Replaced below by the request that is made.
                        (
                            StepAnswer {
                                meter: title,
                                transfer,
                                next: Err(ServiceError::Internal("nothing was made for this step".to_owned())),
                            },
                            Some(plan),
                        )
                    }
                    Err(error) => (StepAnswer { meter: title, transfer: None, next: Err(error) }, None),
                },
            };
            answers.push(answer);
            plans.push(plan);
        }
        let made = self.make(plans.iter().flatten().collect()).await?;
        let open = answers.iter_mut().zip(&plans).filter(|(_, plan)| plan.is_some());
        for ((answer, _), sending) in open.zip(made) {
            answer.next = sending.map(|sending| NextStep::Send(Box::new(sending)));
        }
        Ok(answers)
    }

    /// The `key_transfer` requests that the caller ciphers in the present steps of its transfers to
    /// these meters. The HSM's work is charged to the caller. Transfers of other head-ends are left
    /// out.
    ///
    /// # Errors
    /// The HSM or the database. A meter whose key cannot be wrapped is left out.
    pub(crate) async fn brought(
        &self,
        caller: &Caller,
        meters: impl Iterator<Item = SystemTitle>,
    ) -> Result<HashMap<SystemTitle, Brought>, ServiceError> {
        let ciphered_outside = |meter: &Arc<Meter>| {
            let by_the_caller = |transfer: &Transfer| {
                transfer.head_end == caller.principal && transfer.stage == Stage::Deliver { pair: None }
            };
            meter.transfer.as_ref().is_some_and(by_the_caller)
        };
        let meters = self.meters(meters).await?.into_values().filter(ciphered_outside);
        let decided: Vec<Decided> = meters.map(|meter| (meter.title, Ok(DecidedStep::going_on(meter)))).collect();
        let groups = self.groups(&decided).await?;
        let steps = decided.iter().filter_map(|(_, step)| step.as_ref().ok());
        let plans: Vec<StepPlan> = steps
            .filter_map(|step| StepPlan::of(&self.island, &step.meter, &groups).ok())
            .filter(|plan| plan.wrap.is_some())
            .collect();
        let wrapped = self
            .island
            .hsm_for(caller)
            .wrap_for_meters(plans.iter().filter_map(|plan| plan.wrap.clone()).collect())
            .await?;
        let brought = plans.iter().zip(wrapped).filter_map(|(plan, wrapped)| {
            let request =
                KeyTransfer::new(plan.key_id?, &wrapped.ok()?).ok()?.action_request(plan.transfer.setup, INVOKE_ID);
            Some((plan.meter, Brought { transfer: plan.transfer.id, step: plan.transfer.step, request }))
        });
        Ok(brought.collect())
    }

    /// Makes the requests in three rounds, each one item in the HSM's queue: keys are wrapped for
    /// meters, challenges are answered, frames are protected.
    async fn make(&self, plans: Vec<&StepPlan>) -> Result<Vec<Result<Sending, ServiceError>>, ServiceError> {
        let jobs = plans.iter().filter_map(|plan| plan.wrap.clone()).collect();
        let mut wrapped = self.hsm.wrap_for_meters(jobs).await?.into_iter();
        let challenges: Vec<(FrameKeys, FrameInput)> =
            plans.iter().filter_map(|plan| plan.challenge_input().transpose()).collect::<Result<_, _>>()?;
        let mut answered = self.hsm.protect_batch(challenges).await?.into_iter();
        let mut deliveries = Vec::with_capacity(plans.len());
        let mut frames: Vec<(FrameKeys, FrameInput)> = Vec::new();
        for plan in &plans {
            let delivery = match &plan.wrap {
                None => Ok(None),
                Some(_) => wrapped
                    .next()
                    .map_or_else(missing, |octets| Ok(octets?))
                    .and_then(|octets| plan.delivery(octets).map(Some)),
            };
            let answer = match plan.stage() {
                Stage::Authenticate { .. } => answered.next().map_or_else(missing, |frame| Ok(Some(frame?))),
                _ => Ok(None),
            };
            let ready = delivery.and_then(|delivery| {
                let plain = plan.plain(delivery.as_ref(), answer?)?;
                if let (Some(plain), Some(keys)) = (&plain, &plan.keys) {
                    frames.push((keys.clone(), plan.input(plain)?));
                }
                Ok((delivery, plain.is_some()))
            });
            deliveries.push(ready);
        }
        let mut protected = self.hsm.protect_batch(frames).await?.into_iter();
        Ok(plans
            .iter()
            .zip(deliveries)
            .map(|(plan, ready)| {
                let (delivery, ciphered) = ready?;
                let apdu = match ciphered {
                    false => Vec::new(),
                    true => plan
                        .assemble(&protected.next().map_or_else(missing, |frame| Ok(frame?))?)
                        .map_err(|error| fault(&error))?,
                };
                Ok(Sending { kind: plan.kind(), apdu, client_sap: plan.client_sap, delivery })
            })
            .collect())
    }

    /// The groups whose keys are delivered in these steps.
    async fn groups(&self, decided: &[Decided]) -> Result<HashMap<GroupId, Arc<Group>>, ServiceError> {
        let mut groups = HashMap::new();
        for (_, step) in decided {
            let Ok(DecidedStep { meter, end: None }) = step else { continue };
            let Some(Owner::Group(id)) = meter.transfer.as_ref().and_then(Transfer::current).map(|key| key.owner)
            else {
                continue;
            };
            if groups.contains_key(&id) {
                continue;
            }
            if let Some((group, _)) = self.island.group(id).await? {
                groups.insert(id, group);
            }
        }
        Ok(groups)
    }
}

/// What one step needs from the HSM.
struct StepPlan {
    meter: SystemTitle,
    suite: kms_domain::SecuritySuite,
    transfer: Transfer,
    keys: Option<FrameKeys>,
    wrap: Option<TransferJob>,
    client_sap: u16,
    /// The id of the delivered key in `key_transfer`.
    key_id: Option<u8>,
}

impl StepPlan {
    fn of(island: &IslandContext, meter: &Meter, groups: &HashMap<GroupId, Arc<Group>>) -> Result<Self, ServiceError> {
        let transfer =
            meter.transfer.clone().ok_or_else(|| ServiceError::Internal("a step without a transfer".to_owned()))?;
        // I4: other octets under the same counters would repeat a nonce.
        if !transfer.counters.is_empty() && transfer.pinned != Some(pinned(island, meter)?) {
            return Err(ServiceError::Aborted {
                reason:
                    "the device profile or the server program has changed since this step was sent, so the step cannot be repeated"
                        .to_owned(),
                next_step: "report `nothing` for it: the next step uses new counters".to_owned(),
            });
        }
        let keys = transfer.pair().map(|pair| pair_keys(meter, transfer.setup, pair)).transpose()?;
        let wrap = match (&transfer.stage, transfer.current()) {
            (Stage::Deliver { .. }, Some(key)) => {
                let kek = version_source(meter.owner(), &meter.slots, transfer.setup, KeyType::KEK, key.kek)?;
                let brought = match key.owner {
                    Owner::Group(id) => {
                        let group = groups
                            .get(&id)
                            .ok_or_else(|| ServiceError::Internal("the group of a key is missing".to_owned()))?;
                        version_source(group.owner(), &group.slots, transfer.setup, key.key_type, key.version)?
                    }
                    owner => version_source(owner, &meter.slots, transfer.setup, key.key_type, key.version)?,
                };
                Some(TransferJob { kek, key: brought })
            }
            _ => None,
        };
        let clients =
            island.profiles.get(&meter.class.profile).map(|profile| profile.clients.as_slice()).unwrap_or_default();
        let client_sap = clients
            .iter()
            .filter(|client| client.security_setup == transfer.setup)
            .find(|client| client.system_title.is_none_or(|title| title == transfer.client_title))
            .map_or(0, |client| client.sap);
        let key_id = transfer.current().and_then(|key| key_id(island, meter, transfer.setup, key.key_type));
        Ok(Self { meter: meter.title, suite: meter.suite, transfer, keys, wrap, client_sap, key_id })
    }

    fn key_id(&self) -> Result<u8, ServiceError> {
        self.key_id.ok_or_else(|| ServiceError::FailedPrecondition {
            reason: "the device profile of the meter has no `key_id` for the key".to_owned(),
            next_step: "use the same device profiles on every server".to_owned(),
        })
    }

    const fn stage(&self) -> &Stage {
        &self.transfer.stage
    }

    const fn kind(&self) -> SendingKind {
        match self.transfer.stage {
            Stage::Associate { .. } => SendingKind::Associate,
            Stage::Authenticate { .. } => SendingKind::Authenticate,
            Stage::Deliver { .. } => SendingKind::Deliver,
        }
    }

    /// The meter's challenge. It is answered with the first counter of the step.
    fn challenge_input(&self) -> Result<Option<(FrameKeys, FrameInput)>, ServiceError> {
        let (Stage::Authenticate { meter_challenge, .. }, Some(keys)) = (self.stage(), &self.keys) else {
            return Ok(None);
        };
        let nonce = Nonce::new(self.transfer.client_title, self.counter(0)?);
        let parameters = FrameParameters::new(HlsGmac::control(self.suite).octet(), *nonce.octets())?;
        Ok(Some((keys.clone(), FrameInput { parameters, plaintext: meter_challenge.clone() })))
    }

    fn delivery(&self, wrapped: Vec<u8>) -> Result<Delivery, ServiceError> {
        let key =
            self.transfer.current().ok_or_else(|| ServiceError::Internal("a delivery without a key".to_owned()))?;
        let argument = KeyTransfer::new(self.key_id()?, &wrapped)
            .map_err(|error| ServiceError::Internal(error.to_string()))?
            .argument();
        Ok(Delivery { key_type: key.key_type, version: key.version, wrapped, argument })
    }

    /// The plain request that is ciphered; `None` if the head-end ciphers it.
    fn plain(
        &self,
        delivery: Option<&Delivery>,
        answer: Option<ProtectedFrame>,
    ) -> Result<Option<Vec<u8>>, ServiceError> {
        match (self.stage(), delivery, answer) {
            (Stage::Associate { .. }, ..) => {
                let request =
                    InitiateRequest { dedicated_key: None, conformance: CONFORMANCE, longest_apdu: LONGEST_APDU };
                Ok(Some(request.octets().map_err(|error| fault(&error))?.to_vec()))
            }
            (Stage::Authenticate { .. }, _, Some(frame)) => {
                let answer =
                    HlsGmac { suite: self.suite, counter: self.counter(0)?, tag: AuthenticationTag(frame.tag) };
                Ok(Some(answer.reply_to_hls_authentication(INVOKE_ID)))
            }
            (Stage::Deliver { pair: Some(_) }, Some(delivery), _) => {
                let transfer = KeyTransfer::new(self.key_id()?, &delivery.wrapped).map_err(|error| fault(&error))?;
                Ok(Some(transfer.action_request(self.transfer.setup, INVOKE_ID)))
            }
            (Stage::Deliver { pair: None }, Some(_), _) => Ok(None),
            _ => Err(ServiceError::Internal("a step without its parts".to_owned())),
        }
    }

    fn input(&self, plain: &[u8]) -> Result<FrameInput, ServiceError> {
        let nonce = Nonce::new(self.transfer.client_title, self.last_counter()?);
        Ok(FrameInput {
            parameters: FrameParameters::new(self.control().octet(), *nonce.octets())?,
            plaintext: plain.to_vec(),
        })
    }

    fn assemble(&self, frame: &ProtectedFrame) -> Result<Vec<u8>, DlmsError> {
        let plain = match self.stage() {
            Stage::Associate { .. } => INITIATE_REQUEST,
            _ => ACTION_REQUEST,
        };
        let ciphered = CipheredApdu {
            tag: CipheredTag::Global { plain },
            system_title: None,
            control: self.control(),
            counter: self.transfer.counters.last().copied().unwrap_or_default(),
            content: &frame.text,
            authentication_tag: AuthenticationTag(frame.tag),
        }
        .octets()?;
        match self.stage() {
            Stage::Associate { challenge, .. } => AssociationRequest {
                client_title: self.transfer.client_title,
                challenge: Challenge::new(challenge)?,
                initiate_request: &ciphered,
            }
            .octets(),
            _ => Ok(ciphered),
        }
    }

    const fn control(&self) -> SecurityControl {
        SecurityControl { suite: self.suite, protection: Protection::AuthenticatedEncrypted, key_set: KeySet::Unicast }
    }

    fn counter(&self, at: usize) -> Result<u32, ServiceError> {
        self.transfer
            .counters
            .get(at)
            .copied()
            .ok_or_else(|| ServiceError::Internal("a step has fewer counters than its request uses".to_owned()))
    }

    fn last_counter(&self) -> Result<u32, ServiceError> {
        self.transfer
            .counters
            .last()
            .copied()
            .ok_or_else(|| ServiceError::Internal(format!("a step of meter {} has no counter", self.meter)))
    }
}

/// Digest of what a step's octets depend on besides the transfer: `SHA-256("meterkms/step" ‖ suite
/// ‖ key id ‖ invoke id ‖ conformance ‖ longest APDU)[0..16]`. The key id is 0 and 0, or 1 and its
/// number.
pub(super) fn pinned(island: &IslandContext, meter: &Meter) -> Result<[u8; 16], ServiceError> {
    let brought =
        meter.transfer.as_ref().and_then(|transfer| transfer.current().map(|key| (transfer.setup, key.key_type)));
    let key_id = brought.and_then(|(setup, key_type)| key_id(island, meter, setup, key_type));
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"meterkms/step");
    context.update(&[meter.suite.number(), u8::from(key_id.is_some()), key_id.unwrap_or_default(), INVOKE_ID]);
    context.update(&CONFORMANCE);
    context.update(&LONGEST_APDU.to_be_bytes());
    let digest = context.finish();
    digest.as_ref().first_chunk().copied().ok_or_else(|| ServiceError::Internal("a digest is too short".to_owned()))
}

/// The id of a meter's key in `key_transfer`: the standard's, or that of its device profile.
pub(super) fn key_id(island: &IslandContext, meter: &Meter, setup: SecuritySetupId, key_type: KeyType) -> Option<u8> {
    let of_profile = || island.profiles.get(&meter.class.profile)?.key(setup, key_type)?.key_id;
    key_type.standard_key_id().or_else(of_profile)
}

/// The keys of an exchange. Any candidate may be used: the HSM uses it, and nobody gets it.
pub(crate) fn pair_keys(meter: &Meter, setup: SecuritySetupId, pair: KeyPair) -> Result<FrameKeys, ServiceError> {
    Ok(FrameKeys {
        encryption: version_source(meter.owner(), &meter.slots, setup, KeyType::GUEK, pair.encryption)?,
        authentication: version_source(meter.owner(), &meter.slots, setup, KeyType::GAK, pair.authentication)?,
    })
}

pub(super) fn version_source(
    owner: Owner,
    slots: &Slots,
    setup: SecuritySetupId,
    key_type: KeyType,
    version: KeyVersionNumber,
) -> Result<KeySource, ServiceError> {
    let found = slots.get(setup, key_type).and_then(|slot| Some((slot, slot.version(version)?)));
    let (slot, version) = found.ok_or_else(|| ServiceError::FailedPrecondition {
        reason: format!("{key_type} version {version} is not in the row any more"),
        next_step: "withdraw the transfer and begin another".to_owned(),
    })?;
    source(owner, slot, version)
}

fn missing<T>() -> Result<T, ServiceError> {
    Err(ServiceError::Internal("the HSM returned less than it was asked for".to_owned()))
}

fn fault(error: &DlmsError) -> ServiceError {
    ServiceError::Internal(error.to_string())
}

/// Invoke id 1, confirmed, high priority.
pub(super) const INVOKE_ID: u8 = 0xC1;
const INITIATE_REQUEST: u8 = 0x01;
const ACTION_REQUEST: u8 = 0xC3;
/// get, set, action, selective access, block transfer, and others that clients usually propose.
const CONFORMANCE: [u8; 3] = [0x00, 0x7E, 0x1F];
const LONGEST_APDU: u16 = 1_200;
