//! Frames protected and opened inside the HSM, for head-ends that must never hold a key.
//!
//! What is protected is read first: policy decides on service, class, object and member. Counters
//! come from the same place as leases (I4), and the record of every protected frame is durable
//! before it leaves (I2).

mod alert;
mod carried;
pub mod unprotect;

use async_recursion::async_recursion as boxed;
use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::{Arc, Mutex},
    time::Duration,
};

use kms_dlms::{
    AuthenticationTag, CipheredApdu, CipheredTag, DlmsError, HlsGmac, KeyCarrier, KeySet, Nonce, Protection,
    SecurityControl, ServiceKind, ServiceRequest, resembles_request,
};
use kms_domain::{
    KeyType, KeyVersionNumber, Meter, QuotaExceeded, QuotaHour, QuotaUse, RequestId, SecuritySetupId, Slot, Standing,
    SystemTitle, UnixMillis,
};
use kms_hsm::{FrameInput, FrameKeys, FrameParameters, ProtectedFrame};
use kms_proto::v1::{self, FramesProtected, audit_record::Event};
use kms_store::{Reads, RowKind};
use tracing::Instrument as _;

use self::alert::AlertKey;
use crate::island::IslandContext;
use crate::keys::counter::{counter_key, on_new_key};
use crate::keys::{setup::setup_record, source::source};
use kms_authz::{Action, Caller, CosemTarget, FrameService as Service, Purpose, Quota, Resource};
use kms_base::FrameDirection;
use kms_base::error::ServiceError;
use kms_base::metrics;
use kms_ledger::quota_use_row;
use kms_ledger::{
    Act, Asker, AuditLeaf, ByRecord, CounterOf, Decision, LiveLease, PastRecord, Permit, Request, View, overtaken,
    refused_before,
};

/// A frame to be protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainFrame {
    /// The meter that it goes to.
    pub meter: SystemTitle,
    /// Which security setup; `None` is the meter's first.
    pub setup: Option<SecuritySetupId>,
    /// The client title that sends it.
    pub client_title: SystemTitle,
    /// How it is protected.
    pub protection: Protection,
    /// What it is.
    pub content: PlainContent,
}

impl PlainFrame {
    /// The meter and its APDU; `None` for a challenge.
    fn apdu(&self) -> Option<(SystemTitle, &[u8])> {
        match &self.content {
            PlainContent::Apdu { apdu, .. } => Some((self.meter, apdu.as_slice())),
            PlainContent::Challenge(_) => None,
        }
    }
}

/// What is to be protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlainContent {
    /// An xDLMS request, and whether it is ciphered as general-glo-ciphering.
    Apdu {
        /// The request in plain.
        apdu: Vec<u8>,
        /// General or service-specific ciphering.
        general: bool,
    },
    /// The meter's challenge (StoC) of HLS mechanism 5, 8–64 octets.
    Challenge(Vec<u8>),
}

/// What became of one frame, and its invocation counter.
#[derive(Debug)]
pub struct FrameOutcome {
    /// The ciphered or the plain octets; empty for a verified HLS response.
    pub octets: Result<Vec<u8>, ServiceError>,
    /// The counter that was used or found; 0 if there was none.
    pub counter: u32,
}

/// The use case.
#[derive(Clone)]
pub struct FrameService {
    island: Arc<IslandContext>,
    /// Meters whose counter went backwards, as far as this server has said so.
    alerted: Arc<Mutex<HashSet<AlertKey>>>,
}

impl FrameService {
    /// Frames of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, alerted: Arc::default() }
    }

    /// Protects frames in order. A repeated request gets the same octets again, or a refusal: for
    /// each frame that was refused before, and for each that would be other octets now. A request
    /// of which every frame was refused is not remembered: nothing left for it, so it is decided on
    /// anew.
    ///
    /// # Errors
    /// What concerns all: the caller, the request id, HSM or database. What concerns one frame is
    /// in its outcome.
    #[boxed]
    pub async fn protect(
        &self,
        caller: &Caller,
        request: RequestId,
        digest: [u8; 32],
        purpose: Purpose,
        frames: Vec<PlainFrame>,
        supersede_lease: bool,
    ) -> Result<(Vec<FrameOutcome>, Option<AuditLeaf>), ServiceError> {
        let span = tracing::debug_span!("frames", kms.frames = frames.len());
        let protected =
            self.decide_and_protect(caller, request, digest, purpose, frames, supersede_lease).instrument(span).await?;
        metrics().frames(FrameDirection::Protect, protected.0.iter().map(|outcome| &outcome.octets));
        Ok(protected)
    }

    async fn decide_and_protect(
        &self,
        caller: &Caller,
        request: RequestId,
        digest: [u8; 32],
        purpose: Purpose,
        frames: Vec<PlainFrame>,
        supersede_lease: bool,
    ) -> Result<(Vec<FrameOutcome>, Option<AuditLeaf>), ServiceError> {
        let quotas = frames.iter().any(|frame| self.counts(frame)).then(|| quota_use_row(&caller.principal));
        let apdus: Vec<(SystemTitle, &[u8])> = frames.iter().filter_map(PlainFrame::apdu).collect();
        let under_way = carried::under_way(&self.island, caller, &apdus).await?;
        let act = Protect { island: self.island.clone(), purpose, frames, supersede_lease, under_way, quotas };
        let committed = self.island.door.act(caller, Request { id: request, digest }, act).await?;
        let Protected { planned, replayed } = committed.value;
        let mut jobs = Vec::with_capacity(planned.len());
        let forms: Vec<Result<AnswerForm, ServiceError>> = planned
            .into_iter()
            .map(|planned| {
                planned.map(|PlannedFrame { keys, input, form, .. }| {
                    jobs.push((keys, input));
                    form
                })
            })
            .collect();
        let mut protected = self
            .island
            .hsm_for(caller)
            .protect_batch(jobs)
            .instrument(tracing::debug_span!("hsm.protect"))
            .await?
            .into_iter();
        let outcomes = forms
            .into_iter()
            .map(|form| match form {
                Err(error) => FrameOutcome { octets: Err(error), counter: 0 },
                Ok(form) => {
                    let octets = match protected.next() {
                        Some(Ok(frame)) => {
                            form.assemble(&frame).map_err(|error| ServiceError::Internal(error.to_string()))
                        }
                        Some(Err(error)) => Err(error.into()),
                        None => {
                            Err(ServiceError::Internal("the HSM returned fewer frames than it was given".to_owned()))
                        }
                    };
                    FrameOutcome { octets, counter: form.counter }
                }
            })
            .collect();
        Ok((outcomes, committed.leaves.first().copied().or(replayed)))
    }

    /// Whether a frame is one that quotas count, so that the row of its principal's use is read
    /// with the others.
    fn counts(&self, frame: &PlainFrame) -> bool {
        let PlainContent::Apdu { apdu, .. } = &frame.content else { return false };
        let policy = self.island.policy.load();
        read_service(apdu).is_ok_and(|(service, targets, _)| {
            targets.iter().any(|target| policy.quotas().of(service, *target).next().is_some())
        })
    }
}

/// Frames of a caller, to be protected.
struct Protect {
    island: Arc<IslandContext>,
    purpose: Purpose,
    frames: Vec<PlainFrame>,
    supersede_lease: bool,
    under_way: carried::UnderWay,
    /// The row of the caller's quotas, where one counts a frame.
    quotas: Option<(RowKind, Vec<u8>)>,
}

/// Frames whose counters are on the record.
struct Protected {
    planned: Vec<Result<PlannedFrame, ServiceError>>,
    /// The leaf of the record, if they were protected before.
    replayed: Option<AuditLeaf>,
}

/// A frame's place in the request, from 1, and its record if it was protected before.
#[derive(Clone, Copy)]
struct FrameOf<'a> {
    place: u32,
    past: Option<&'a v1::ProtectedFrame>,
}

/// The recorded frames of a request, by their places in it.
fn by_place(past: &PastRecord, purpose: Purpose) -> Result<HashMap<u32, &v1::ProtectedFrame>, ServiceError> {
    let Some(Event::FramesProtected(event)) = &past.record.event else {
        return Err(ServiceError::Internal("the record of past frames does not read".to_owned()));
    };
    let frames: HashMap<u32, &v1::ProtectedFrame> = event.frames.iter().map(|frame| (frame.place, frame)).collect();
    // Of a version that did not note places: what it protected cannot be told from what it refused.
    if event.purpose != i32::from(purpose.to_proto()) || frames.contains_key(&0) || frames.len() != event.frames.len() {
        return Err(overtaken("the server was upgraded"));
    }
    Ok(frames)
}

/// A frame whose counter is recorded, to be protected.
struct PlannedFrame {
    meter: SystemTitle,
    keys: FrameKeys,
    input: FrameInput,
    form: AnswerForm,
    service: Service,
    targets: Vec<CosemTarget>,
    client_title: SystemTitle,
    setup: SecuritySetupId,
    encryption_version: KeyVersionNumber,
    authentication_version: KeyVersionNumber,
}

/// What goes around the octets of the HSM in an answer.
#[derive(Clone, Copy)]
struct AnswerForm {
    control: SecurityControl,
    tag: Option<(CipheredTag, Option<SystemTitle>)>,
    counter: u32,
}

impl Act for Protect {
    type Answer = Protected;
    type Past = ByRecord;

    fn name(&self) -> &'static str {
        "protectFrame"
    }

    fn reads(&self) -> Reads {
        let meters = self.frames.iter().map(|frame| frame.meter).collect();
        Reads { meters, sealed: self.quotas.iter().cloned().collect(), ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Protected>, ServiceError> {
        let planned = self.plan_all(permit, view, |place| Ok(FrameOf { place, past: None }));
        let made = (1_u32..).zip(&planned);
        let frames: Vec<v1::ProtectedFrame> =
            made.filter_map(|(place, planned)| Some(planned.as_ref().ok()?.recorded(place, view))).collect();
        let protected = Protected { planned, replayed: None };
        if frames.is_empty() {
            return Ok(Decision::forgotten(protected));
        }
        let purpose = self.purpose.to_proto().into();
        let entry = view.append(Event::FramesProtected(FramesProtected { purpose, frames }));
        Ok(Decision::recorded(entry, protected))
    }

    fn again(
        &self,
        ByRecord(past): ByRecord,
        permit: &Permit,
        view: &mut View<'_, '_>,
    ) -> Result<Protected, ServiceError> {
        let recorded = by_place(&past, self.purpose)?;
        let planned = self.plan_all(permit, view, |place| match recorded.get(&place) {
            Some(known) => Ok(FrameOf { place, past: Some(known) }),
            // I2, I8: it was refused then, and a replay protects nothing new.
            None => Err(refused_before()),
        });
        Ok(Protected { planned, replayed: Some(past.leaf()) })
    }
}

impl Protect {
    /// Decides on each frame, and counts the refusals.
    fn plan_all<'a>(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        of: impl Fn(u32) -> Result<FrameOf<'a>, ServiceError>,
    ) -> Vec<Result<PlannedFrame, ServiceError>> {
        let mut planned = Vec::with_capacity(self.frames.len());
        for (place, frame) in (1_u32..).zip(&self.frames) {
            planned.push(if permit.principal().client_titles.contains(&frame.client_title) {
                of(place).and_then(|of| view.attempt(|view| self.plan(permit, view, frame, of)))
            } else {
                Err(ServiceError::denied(format!("protectFrame under client title {}", frame.client_title)))
            });
        }
        for error in planned.iter().filter_map(|planned| planned.as_ref().err()) {
            view.refuse(error.to_string());
        }
        planned
    }

    /// Decides on one frame.
    fn plan(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        frame: &PlainFrame,
        FrameOf { place, past }: FrameOf<'_>,
    ) -> Result<PlannedFrame, ServiceError> {
        let (service, targets, carried) = match &frame.content {
            PlainContent::Challenge(challenge) => {
                if resembles_request(challenge) {
                    // I8: f(StoC) authenticates what it is given exactly as an authenticated-only
                    // APDU is: policy would be passed by.
                    return Err(ServiceError::AssociateAgain { field: "frames.hls_challenge".to_owned() });
                }
                (Service::HlsChallenge, Vec::new(), None)
            }
            PlainContent::Apdu { apdu, .. } => read_service(apdu)?,
        };
        let meter = view.meter(frame.meter)?.ok_or_else(|| denied("protectFrame", frame.meter))?;
        self.require(permit, &meter, service, &targets)?;
        if let PlainContent::Apdu { apdu, .. } = &frame.content {
            carried::check(carried, apdu, &meter, &permit.principal().id, &self.under_way)?;
        }
        let setup = setup_of(&meter, frame.setup)?;
        let keys = frame_keys(&meter, setup)?;
        let of = CounterOf {
            owner: meter.owner(),
            setup,
            key_type: KeyType::GUEK,
            version: keys.encryption_version,
            counter: counter_key(&self.island, &meter, setup, frame.client_title)?,
            on_new_key: on_new_key(&self.island, &meter, setup),
        };
        let form = CipheredForm::of(frame, &meter)?;
        let counter = match past {
            Some(past) => past.invocation_counter,
            None => {
                if let Some(lease) = view.live_lease(of)?.filter(|_| !self.supersede_lease) {
                    return Err(leased(frame.client_title, lease));
                }
                let used = within_quotas(permit, view, meter.title, service, &targets)?;
                let counter = view.frame_counters(of, NonZeroU32::MIN)?.first;
                if let Some(used) = used {
                    view.put_quota_use(used)?;
                }
                counter
            }
        };
        let parameters = FrameParameters::new(form.control.octet(), *Nonce::new(frame.client_title, counter).octets())?;
        let input = FrameInput { parameters, plaintext: form.plaintext };
        let planned = PlannedFrame {
            meter: meter.title,
            keys: keys.keys,
            input,
            form: AnswerForm { control: form.control, tag: form.tag, counter },
            service,
            targets,
            client_title: frame.client_title,
            setup,
            encryption_version: keys.encryption_version,
            authentication_version: keys.authentication_version,
        };
        // I4: a counter goes out again with the same octets only.
        past.map_or(Ok(()), |past| planned.repeats(past, place, view))?;
        Ok(planned)
    }

    /// I8: each object that the frame touches must be permitted.
    fn require(
        &self,
        permit: &Permit,
        meter: &Meter,
        service: Service,
        targets: &[CosemTarget],
    ) -> Result<(), ServiceError> {
        let permits = |target: Option<CosemTarget>| {
            let action = Action::ProtectFrame { service, target, purpose: self.purpose };
            permit.permits(&action, &Resource::Meters(&meter.class))
        };
        let permitted = meter.class.status.may_grant()
            && if targets.is_empty() { permits(None) } else { targets.iter().all(|target| permits(Some(*target))) };
        if permitted { Ok(()) } else { Err(denied("protectFrame", meter.title)) }
    }
}

/// What the principal has used of its quotas with this frame, to be stored with the frame's
/// record; `None` where no quota counts it.
fn within_quotas(
    permit: &Permit,
    view: &mut View<'_, '_>,
    meter: SystemTitle,
    service: Service,
    targets: &[CosemTarget],
) -> Result<Option<QuotaUse>, ServiceError> {
    let (policy, principal) = (permit.policy(), &permit.principal().id);
    let mut used = None;
    for (target, quota) in
        targets.iter().flat_map(|target| policy.quotas().of(service, *target).map(move |quota| (target, quota)))
    {
        let now = view.now();
        let used = match &mut used {
            Some(used) => used,
            None => used.insert(view.quota_use(principal)?),
        };
        used.count(&quota.name, quota.limit(principal), QuotaHour::of(now), meter, 1).map_err(|exceeded| {
            tracing::warn!(%principal, quota = %quota.name, class_id = target.class_id, "a quota is used up: a critical command was refused");
            used_up(quota, exceeded, now)
        })?;
    }
    Ok(used)
}

impl AnswerForm {
    fn assemble(&self, frame: &ProtectedFrame) -> Result<Vec<u8>, DlmsError> {
        match self.tag {
            None => Ok(HlsGmac { suite: self.control.suite, counter: self.counter, tag: AuthenticationTag(frame.tag) }
                .octets()
                .to_vec()),
            Some((tag, system_title)) => CipheredApdu {
                tag,
                system_title,
                control: self.control,
                counter: self.counter,
                content: &frame.text,
                authentication_tag: AuthenticationTag(frame.tag),
            }
            .octets(),
        }
    }
}

impl PlannedFrame {
    /// Whether its octets are those of the record: every part of them is compared.
    fn repeats(&self, past: &v1::ProtectedFrame, place: u32, view: &View<'_, '_>) -> Result<(), ServiceError> {
        // The mark may be of an earlier seal key.
        let now = v1::ProtectedFrame { content_mark: past.content_mark.clone(), ..self.recorded(place, view) };
        if (now.key_version, now.authentication_key_version) != (past.key_version, past.authentication_key_version) {
            return Err(overtaken("the key was rotated"));
        }
        if now == *past && view.is_marked(&past.content_mark, &self.content()) {
            Ok(())
        } else {
            Err(overtaken("the meter has changed"))
        }
    }

    /// Everything that goes into the octets.
    fn content(&self) -> Vec<u8> {
        let (tag, title) = self.form.tag.map_or((0, None), |(tag, title)| (tag.octet(), title));
        let mut content = Vec::with_capacity(22 + self.input.plaintext.len());
        content.extend_from_slice(&[self.form.control.octet(), tag]);
        content.extend_from_slice(&title.map_or([0; 8], SystemTitle::octets));
        content.extend_from_slice(&self.client_title.octets());
        content.extend_from_slice(&self.form.counter.to_be_bytes());
        content.extend_from_slice(&self.input.plaintext);
        content
    }

    /// Its record, with its place in the request.
    fn recorded(&self, place: u32, view: &View<'_, '_>) -> v1::ProtectedFrame {
        v1::ProtectedFrame {
            meter: u64::from_be_bytes(self.meter.octets()),
            client_title: self.client_title.octets().to_vec().into(),
            invocation_counter: self.form.counter,
            targets: self
                .targets
                .iter()
                .map(|target| v1::CosemTarget {
                    class_id: u32::from(target.class_id),
                    obis: target.obis.to_vec().into(),
                    member: i32::from(target.member),
                })
                .collect(),
            service: self.service.name().to_owned(),
            security_setup: setup_record(self.setup),
            key_version: self.encryption_version.number(),
            authentication_key_version: self.authentication_version.number(),
            place,
            content_mark: view.mark_content(&self.content()).to_vec().into(),
        }
    }
}

/// How a frame is ciphered.
struct CipheredForm {
    control: SecurityControl,
    /// The tag of the ciphered APDU, and the title in it; `None` for f(StoC).
    tag: Option<(CipheredTag, Option<SystemTitle>)>,
    /// What goes into the HSM.
    plaintext: Vec<u8>,
}

impl CipheredForm {
    fn of(frame: &PlainFrame, meter: &Meter) -> Result<Self, ServiceError> {
        match &frame.content {
            PlainContent::Challenge(challenge) => {
                Ok(Self { control: HlsGmac::control(meter.suite), tag: None, plaintext: challenge.clone() })
            }
            PlainContent::Apdu { apdu, general } => {
                let control =
                    SecurityControl { suite: meter.suite, protection: frame.protection, key_set: KeySet::Unicast };
                let unknown = || {
                    ServiceError::invalid(
                        "frames.apdu",
                        "this service has no ciphered form of its own; use general-glo-ciphering",
                    )
                };
                let tag = match (general, apdu.first()) {
                    (true, _) => (CipheredTag::GeneralGlobal, Some(frame.client_title)),
                    (false, Some(plain)) => (CipheredTag::global_for(*plain).ok_or_else(unknown)?, None),
                    (false, None) => return Err(unknown()),
                };
                Ok(Self { control, tag: Some(tag), plaintext: apdu.clone() })
            }
        }
    }
}

/// The keys of frames of a security setup, and the version of the one that encrypts.
struct SetupKeys {
    keys: FrameKeys,
    encryption_version: KeyVersionNumber,
    authentication_version: KeyVersionNumber,
}

fn frame_keys(meter: &Meter, setup: SecuritySetupId) -> Result<SetupKeys, ServiceError> {
    let active = |key_type: KeyType| {
        let slot = meter.slots.get(setup, key_type)?;
        let version = slot.grantable().find(|grantable| grantable.standing == Standing::Active)?.version;
        Some((slot, version))
    };
    let missing = |key_type: KeyType| ServiceError::FailedPrecondition {
        reason: format!("the meter has no active {key_type} in security setup {setup}"),
        next_step: "look at its slots with `kms meter show`".to_owned(),
    };
    let (slot, encryption) = active(KeyType::GUEK).ok_or_else(|| missing(KeyType::GUEK))?;
    let (gak_slot, authentication) = active(KeyType::GAK).ok_or_else(|| missing(KeyType::GAK))?;
    let keys = FrameKeys {
        encryption: source(meter.owner(), slot, encryption)?,
        authentication: source(meter.owner(), gak_slot, authentication)?,
    };
    Ok(SetupKeys { keys, encryption_version: encryption.number(), authentication_version: authentication.number() })
}

fn setup_of(meter: &Meter, setup: Option<SecuritySetupId>) -> Result<SecuritySetupId, ServiceError> {
    setup.or_else(|| meter.slots.iter().next().map(Slot::setup)).ok_or_else(|| ServiceError::FailedPrecondition {
        reason: "the meter has no keys".to_owned(),
        next_step: "import its shipment".to_owned(),
    })
}

/// What a request does and touches, and whether it carries a key.
fn read_service(apdu: &[u8]) -> Result<(Service, Vec<CosemTarget>, Option<KeyCarrier>), ServiceError> {
    let request =
        ServiceRequest::parse(apdu).map_err(|error| ServiceError::invalid("frames.apdu", error.to_string()))?;
    if request.dedicated_key {
        // With a dedicated key of its own choice, a head-end could protect everything that follows
        // by itself, past every policy.
        return Err(ServiceError::invalid(
            "frames.apdu",
            "an InitiateRequest may not bring a dedicated key: frames under it would pass policy by",
        ));
    }
    if request.continuation {
        // The block that named the object was decided on; what follows names nothing that policy
        // could decide on.
        return Err(ServiceError::invalid(
            "frames.apdu",
            "a following block names no object, so policy cannot decide on it; keep requests in one block",
        ));
    }
    let service = match request.kind {
        ServiceKind::Get => Service::Get,
        ServiceKind::Set => Service::Set,
        ServiceKind::Action => Service::Action,
        ServiceKind::Initiate => Service::Initiate,
    };
    Ok((
        service,
        request
            .targets
            .iter()
            .map(|target| CosemTarget { class_id: target.class_id, obis: target.obis, member: target.member })
            .collect(),
        request.carries_key(apdu),
    ))
}

/// The counters that a frame would use are above those of a lease, and the meter would refuse its
/// session from then on.
fn leased(client_title: SystemTitle, lease: LiveLease) -> ServiceError {
    let (reason, next_step) = match lease {
        LiveLease::Until(_) => (
            "holds a live counter lease for this meter",
            "let it end, use another client title, or set supersede_lease",
        ),
        LiveLease::EndUnknown => (
            "may hold a live counter lease for this meter: another server, or this one before its last start, allocated it, and only that server knows when it ends",
            "if no session of this client title with the meter is in use, set supersede_lease; or use another client title",
        ),
    };
    ServiceError::FailedPrecondition {
        reason: format!("client title {client_title} {reason}"),
        next_step: format!("{next_step}. supersede_lease ends the session that uses the lease"),
    }
}

fn used_up(quota: &Quota, exceeded: QuotaExceeded, now: UnixMillis) -> ServiceError {
    let name = &quota.name;
    let frees = exceeded.frees();
    let moment = jiff::Timestamp::from_millisecond(frees.0).map(|moment| moment.to_string()).unwrap_or_default();
    let reason = match exceeded {
        QuotaExceeded::Commands { most: 0, .. } => {
            format!(
                "quota `{name}` gives this principal no commands; whoever keeps `quotas.toml` among the policies of the island's servers can add a limit for it"
            )
        }
        exceeded => format!(
            "quota `{name}` is used up: {exceeded}; it frees at {moment}, and whoever keeps `quotas.toml` among the policies of the island's servers can raise it"
        ),
    };
    ServiceError::ResourceExhausted {
        reason,
        retry_after: Duration::from_millis(u64::try_from(frees.0 - now.0).unwrap_or_default()),
    }
}

/// The same answer for a meter that does not exist and one that the caller may not use.
fn denied(action: &str, meter: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("{action} with meter {meter}"))
}

#[cfg(test)]
mod tests;
