//! One client's connection to a meter: the association, and every check that a request passes.

use std::ops::RangeInclusive;

use crate::acse::{AARQ, ApplicationContext, AssociationRequest, AssociationResponse, Mechanism, RLRQ, Release};
use crate::axdr::Data;
use crate::ciphered::{CipheredApdu, GLO_INITIATE_REQUEST, GLO_INITIATE_RESPONSE, encode_initiate, parse_initiate};
use crate::config::{AssociationConfig, MechanismConfig};
use crate::inspect::{NoncePurpose, Refusal};
use crate::meter::{KeyRecord, MeterState, RequestKind};
use crate::objects::{CLASS_ASSOCIATION, CLASS_SECURITY_SETUP};
use crate::protection::{Challenges, Dedicated, Received};
use crate::reading::ReaderContext;
use crate::security::{CipheredContent, Ciphering, SecurityControl};
use crate::xdlms::{
    DECIPHERING_ERROR, ExceptionResponse, InitiateRequest, InitiateResponse, MethodDescriptor, OPERATION_NOT_POSSIBLE,
    OTHER_REASON, PDU_TOO_LONG, SERVICE_NOT_ALLOWED, SERVICE_NOT_SUPPORTED, SERVICE_UNKNOWN, ServiceRequest,
    ServiceResponse,
};
use crate::{Error, Meter, Obis, SystemTitle, xdlms};

/// A connection of one client SAP to one meter, without any transport: APDU in, APDU out.
#[derive(Debug)]
pub struct Connection {
    meter: Meter,
    client_sap: u16,
    association: Option<Association>,
    pub(crate) previous_answer: Option<Vec<u8>>,
}

impl Connection {
    /// A new connection without an association.
    pub fn new(meter: Meter, client_sap: u16) -> Self {
        Self { meter, client_sap, association: None, previous_answer: None }
    }

    /// A connection with a pre-established ciphered association of `client` (IEC 62056-5-3): no
    /// AARQ, no HLS. The client SAP must be one with `high-gmac`.
    pub fn pre_established(meter: Meter, client_sap: u16, client: SystemTitle) -> Result<Self, Error> {
        let association = {
            let state = meter.lock();
            let config = association_config(&state, client_sap)
                .filter(|config| config.security_setup.is_some())
                .ok_or(Error::State("no ciphered association for this client SAP"))?;
            Association {
                epoch: state.epoch,
                mechanism: config.mechanism,
                setup: config.security_setup,
                client_title: Some(client),
                dedicated: None,
                challenges: None,
                client_max_receive_pdu_size: 0,
            }
        };
        let mut connection = Self::new(meter, client_sap);
        connection.association = Some(association);
        Ok(connection)
    }

    /// The meter at the other end.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Whether an association is open and, with HLS, authenticated.
    pub fn is_associated(&self) -> bool {
        let epoch = self.meter.lock().epoch;
        self.association
            .as_ref()
            .is_some_and(|association| association.epoch == epoch && association.challenges.is_none())
    }

    /// Executes one request of any bytes and returns the answer. A broadcast has no answer. No
    /// network fault happens here: see [`Connection::deliver`].
    pub fn exchange(&mut self, apdu: &[u8]) -> Option<Vec<u8>> {
        let meter = self.meter.clone();
        let mut state = meter.lock();
        self.end_outdated_association(&state);
        let answer = match self.dispatch(&mut state, apdu) {
            Ok(answer) => answer,
            Err(refusal) => {
                state.record_refusal(refusal.reason);
                Some(refusal.exception.encode())
            }
        };
        if let Some(answer) = &answer {
            self.previous_answer = Some(answer.clone());
        }
        answer
    }

    pub(crate) fn request_kind(&self, apdu: &[u8]) -> RequestKind {
        if apdu.first() == Some(&AARQ) {
            return RequestKind::AssociationRequest;
        }
        let state = self.meter.lock();
        match self.peek(&state, apdu) {
            Some(ServiceRequest::Action { method, .. }) if is_key_transfer(&method) => RequestKind::KeyTransfer,
            _ => RequestKind::Other,
        }
    }

    fn dispatch(&mut self, state: &mut MeterState, apdu: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
        let limit = usize::from(state.config.max_receive_pdu_size);
        if limit != 0 && apdu.len() > limit {
            return Err(Refused::new(SERVICE_NOT_ALLOWED, PDU_TOO_LONG, Refusal::Malformed));
        }
        match apdu.first() {
            Some(&AARQ) => self.associate(state, apdu).map(Some),
            Some(&RLRQ) => self.release(state, apdu).map(Some),
            Some(&(xdlms::GET_REQUEST | xdlms::SET_REQUEST | xdlms::ACTION_REQUEST)) => {
                self.plain_service(state, apdu).map(Some)
            }
            Some(&tag) if CipheredApdu::has_tag(tag) => {
                let apdu = CipheredApdu::parse(apdu).map_err(|_| Refused::malformed())?;
                if apdu.content.control.is_broadcast() {
                    if let Err(refusal) = self.broadcast(state, &apdu) {
                        state.record_refusal(refusal.reason);
                    }
                    Ok(None)
                } else {
                    self.ciphered_service(state, &apdu).map(Some)
                }
            }
            _ => Err(Refused::new(SERVICE_UNKNOWN, SERVICE_NOT_SUPPORTED, Refusal::Malformed)),
        }
    }

    fn associate(&mut self, state: &mut MeterState, apdu: &[u8]) -> Result<Vec<u8>, Refused> {
        // Bytes that are not an AARQ do not end the association: anyone can send them.
        let request = AssociationRequest::parse(apdu).map_err(|_| Refused::malformed())?;
        self.association = None;
        match self.check_association(state, &request)? {
            Ok(accepted) => {
                let answer = accepted.response.encode();
                self.association = Some(accepted.association);
                Ok(answer)
            }
            Err(diagnostic) => {
                state.record_refusal(Refusal::Association(diagnostic));
                Ok(AssociationResponse {
                    context: request.context,
                    result: REJECTED_PERMANENT,
                    diagnostic,
                    server_title: None,
                    mechanism: Mechanism::Lowest,
                    authentication_value: None,
                    user_information: None,
                }
                .encode())
            }
        }
    }

    fn check_association(
        &self,
        state: &mut MeterState,
        request: &AssociationRequest,
    ) -> Result<Result<AcceptedAssociation, u8>, Refused> {
        let Some(config) = association_config(state, self.client_sap) else {
            return Ok(Err(NO_REASON_GIVEN));
        };
        match &config.mechanism {
            MechanismConfig::Lowest if request.mechanism != Mechanism::Lowest => Ok(Err(MECHANISM_NOT_RECOGNISED)),
            MechanismConfig::Low(_) if request.mechanism != Mechanism::Low => Ok(Err(AUTHENTICATION_REQUIRED)),
            MechanismConfig::Low(secret)
                if !request.authentication_value.as_ref().is_some_and(|value| secret.matches(value)) =>
            {
                Ok(Err(AUTHENTICATION_FAILURE))
            }
            MechanismConfig::Lowest | MechanismConfig::Low(_) if request.context != ApplicationContext::LogicalName => {
                Ok(Err(CONTEXT_NOT_SUPPORTED))
            }
            MechanismConfig::Lowest | MechanismConfig::Low(_) => self.associate_plain(state, config, request).map(Ok),
            MechanismConfig::HighGmac if request.mechanism != Mechanism::HighGmac => Ok(Err(AUTHENTICATION_REQUIRED)),
            MechanismConfig::HighGmac if request.context != ApplicationContext::LogicalNameCiphering => {
                Ok(Err(CONTEXT_NOT_SUPPORTED))
            }
            MechanismConfig::HighGmac => self.associate_ciphered(state, config, request),
        }
    }

    fn associate_plain(
        &self,
        state: &MeterState,
        config: AssociationConfig,
        request: &AssociationRequest,
    ) -> Result<AcceptedAssociation, Refused> {
        let initiate = InitiateRequest::parse(&request.user_information).map_err(|_| Refused::malformed())?;
        Ok(AcceptedAssociation {
            response: AssociationResponse {
                context: request.context,
                result: ACCEPTED,
                diagnostic: NULL_DIAGNOSTIC,
                server_title: Some(state.config.system_title),
                mechanism: request.mechanism,
                authentication_value: None,
                user_information: Some(initiate_response(state, &initiate).encode()),
            },
            association: Association {
                epoch: state.epoch,
                mechanism: config.mechanism,
                // Nothing is ciphered here, whatever the configuration names.
                setup: None,
                client_title: request.client_title,
                dedicated: None,
                challenges: None,
                client_max_receive_pdu_size: initiate.client_max_receive_pdu_size,
            },
        })
    }

    fn associate_ciphered(
        &self,
        state: &mut MeterState,
        config: AssociationConfig,
        request: &AssociationRequest,
    ) -> Result<Result<AcceptedAssociation, u8>, Refused> {
        let (Some(setup), Some(client)) = (config.security_setup, request.client_title) else {
            return Ok(Err(TITLE_NOT_RECOGNISED));
        };
        if !state.accepts_client(setup, &client) {
            return Ok(Err(TITLE_NOT_RECOGNISED));
        }
        let client_challenge = match &request.authentication_value {
            Some(challenge) if CHALLENGE_LENGTHS.contains(&challenge.len()) => challenge.clone(),
            _ => return Ok(Err(AUTHENTICATION_FAILURE)),
        };
        let Ok(content) = parse_initiate(GLO_INITIATE_REQUEST, &request.user_information) else {
            return Ok(Err(NO_REASON_GIVEN));
        };
        if content.control.is_broadcast() {
            return Err(Refused::not_allowed());
        }
        let received = state
            .receive_global(setup, client, &content, NoncePurpose::Initiate)
            .map_err(|reason| Refused::protection(reason, SERVICE_NOT_ALLOWED))?;
        let initiate = InitiateRequest::parse(&received.plaintext).map_err(|_| Refused::malformed())?;
        let dedicated = match &initiate.dedicated_key {
            Some(key) if key.expose().len() == state.suite().key_length() => {
                Some(Dedicated { generation: state.dedicated_generation(key), record: KeyRecord::new(key.clone()) })
            }
            Some(_) => return Err(Refused::malformed()),
            None => None,
        };
        let length = usize::from(state.config.behaviour.challenge_length)
            .clamp(*CHALLENGE_LENGTHS.start(), *CHALLENGE_LENGTHS.end());
        let meter_challenge = state.next_challenge(length);
        let answer = state
            .send_global(
                setup,
                &received,
                answer_control(&content),
                &initiate_response(state, &initiate).encode(),
                NoncePurpose::Initiate,
            )
            .map_err(|_| Refused::not_possible())?;
        Ok(Ok(AcceptedAssociation {
            response: AssociationResponse {
                context: request.context,
                result: ACCEPTED,
                diagnostic: AUTHENTICATION_REQUIRED,
                server_title: Some(state.config.system_title),
                mechanism: Mechanism::HighGmac,
                authentication_value: Some(meter_challenge.clone()),
                user_information: Some(encode_initiate(GLO_INITIATE_RESPONSE, &answer)),
            },
            association: Association {
                epoch: state.epoch,
                mechanism: config.mechanism,
                setup: Some(setup),
                client_title: Some(client),
                dedicated,
                challenges: Some(Challenges { client: client_challenge, meter: meter_challenge }),
                client_max_receive_pdu_size: initiate.client_max_receive_pdu_size,
            },
        }))
    }

    fn release(&mut self, state: &mut MeterState, apdu: &[u8]) -> Result<Vec<u8>, Refused> {
        let request = Release::parse_request(apdu).map_err(|_| Refused::malformed())?;
        let association = self.association.as_ref().ok_or(Refused::not_allowed())?;
        let user_information = match (request.user_information, association.ciphered()) {
            (Some(information), Some((setup, client))) => {
                let content = parse_initiate(GLO_INITIATE_REQUEST, &information).map_err(|_| Refused::malformed())?;
                if content.control.is_broadcast() {
                    return Err(Refused::not_allowed());
                }
                let received = state
                    .receive_global(setup, client, &content, NoncePurpose::Initiate)
                    .map_err(|reason| Refused::protection(reason, SERVICE_UNKNOWN))?;
                let initiate = InitiateRequest::parse(&received.plaintext).map_err(|_| Refused::malformed())?;
                let answer = state
                    .send_global(
                        setup,
                        &received,
                        answer_control(&content),
                        &initiate_response(state, &initiate).encode(),
                        NoncePurpose::Initiate,
                    )
                    .map_err(|_| Refused::not_possible())?;
                Some(encode_initiate(GLO_INITIATE_RESPONSE, &answer))
            }
            // Without user information anyone can end the association. That does no harm.
            _ => None,
        };
        self.association = None;
        Ok(Release { reason: Some(0), user_information }.encode_response())
    }

    fn plain_service(&mut self, state: &mut MeterState, apdu: &[u8]) -> Result<Vec<u8>, Refused> {
        let association = self.association.as_ref().ok_or(Refused::not_allowed())?;
        if association.ciphered().is_some() {
            return Err(Refused::not_allowed());
        }
        let request = ServiceRequest::parse(apdu).map_err(|_| Refused::malformed())?;
        let answer = self.serve(state, request, None)?.encode();
        self.check_length(&answer)?;
        Ok(answer)
    }

    fn ciphered_service(&mut self, state: &mut MeterState, apdu: &CipheredApdu) -> Result<Vec<u8>, Refused> {
        let association = self.association.as_mut().ok_or(Refused::not_allowed())?;
        let (setup, client) = association.ciphered().ok_or(Refused::not_allowed())?;
        if apdu.title.is_some_and(|title| title != client) {
            return Err(Refused::protection(Refusal::Deciphering, SERVICE_UNKNOWN));
        }
        let received = if apdu.form.is_dedicated() {
            let dedicated =
                association.dedicated.as_mut().ok_or(Refused::protection(Refusal::Deciphering, SERVICE_UNKNOWN))?;
            state.receive_dedicated(setup, client, dedicated, &apdu.content)
        } else {
            state.receive_global(setup, client, &apdu.content, NoncePurpose::Service)
        }
        .map_err(|reason| Refused::protection(reason, SERVICE_UNKNOWN))?;
        if !received.plaintext.first().is_some_and(|tag| apdu.may_carry(*tag)) {
            return Err(Refused::malformed());
        }
        let request = ServiceRequest::parse(&received.plaintext).map_err(|_| Refused::malformed())?;
        let answer = self.serve(state, request, Some(&received))?.encode();
        let tag = answer.first().copied().ok_or(Refused::other())?;
        // The answer to a key_transfer leaves under the keys that its request came under.
        let control = answer_control(&apdu.content);
        let content = match self.association.as_mut() {
            Some(association) if apdu.form.is_dedicated() => {
                let dedicated = association.dedicated.as_mut().ok_or(Refused::other())?;
                state.send_dedicated(dedicated, &received, control, &answer)
            }
            _ => state.send_global(setup, &received, control, &answer, NoncePurpose::Service),
        }
        .map_err(|_| Refused::not_possible())?;
        let answer = CipheredApdu::new(apdu.form, tag, state.config.system_title, content)
            .map_err(|_| Refused::other())?
            .encode();
        self.check_length(&answer)?;
        if received.ends_association.get() {
            self.association = None;
        }
        Ok(answer)
    }

    /// A broadcast needs no association, has no answer, and reaches no security object.
    fn broadcast(&mut self, state: &mut MeterState, apdu: &CipheredApdu) -> Result<(), Refused> {
        let setup = association_config(state, self.client_sap)
            .and_then(|config| config.security_setup)
            .ok_or(Refused::not_allowed())?;
        let associated = self.association.as_ref().and_then(|association| association.client_title);
        let client = apdu
            .title
            .or(associated)
            .filter(|client| state.accepts_client(setup, client))
            .ok_or(Refused::not_allowed())?;
        if apdu.form.is_dedicated() {
            return Err(Refused::not_allowed());
        }
        let received = state
            .receive_broadcast(setup, client, &apdu.content)
            .map_err(|reason| Refused::protection(reason, SERVICE_UNKNOWN))?;
        match ServiceRequest::parse(&received.plaintext) {
            Ok(ServiceRequest::Set { attribute, value, .. }) if apdu.may_carry(xdlms::SET_REQUEST) => {
                state.objects.set(&attribute, value);
                Ok(())
            }
            Ok(ServiceRequest::Action { method, .. }) if apdu.may_carry(xdlms::ACTION_REQUEST) => {
                state.objects.act(&method);
                Ok(())
            }
            _ => Err(Refused::not_allowed()),
        }
    }

    fn serve(
        &mut self,
        state: &mut MeterState,
        request: ServiceRequest,
        received: Option<&Received>,
    ) -> Result<ServiceResponse, Refused> {
        let association = self.association.as_mut().ok_or(Refused::not_allowed())?;
        if let Some(challenges) = &association.challenges {
            let (
                Some(received),
                Some((setup, client)),
                ServiceRequest::Action { invoke, method, argument: Some(Data::OctetString(answer)) },
            ) = (received, association.ciphered(), request)
            else {
                return Err(Refused::not_allowed());
            };
            if !is_reply_to_hls(&method) {
                return Err(Refused::not_allowed());
            }
            let returned = state.reply_to_hls(setup, client, challenges, &answer, received);
            return Ok(match returned {
                Ok(returned) => {
                    association.challenges = None;
                    ServiceResponse::Action { invoke, result: 0, returned: Some(Data::OctetString(returned)) }
                }
                Err(reason) => {
                    state.record_refusal(reason);
                    received.ends_association.set(true);
                    ServiceResponse::Action { invoke, result: xdlms::DataAccessResult::OTHER_REASON.0, returned: None }
                }
            });
        }
        let reader = ReaderContext {
            mechanism: &association.mechanism,
            setup: association.setup,
            client_title: association.client_title,
        };
        let get = |attribute, selective| {
            if selective {
                Err(xdlms::DataAccessResult::SCOPE_OF_ACCESS_VIOLATED)
            } else {
                state.get(&attribute, &reader)
            }
        };
        let may_write = !matches!(association.mechanism, MechanismConfig::Lowest);
        Ok(match request {
            ServiceRequest::Get { invoke, attribute, selective } => {
                ServiceResponse::Get { invoke, result: get(attribute, selective) }
            }
            ServiceRequest::GetWithList { invoke, attributes } => ServiceResponse::GetWithList {
                invoke,
                results: attributes.into_iter().map(|(attribute, selective)| get(attribute, selective)).collect(),
            },
            ServiceRequest::Set { invoke, attribute, value } => ServiceResponse::Set {
                invoke,
                result: if may_write {
                    state.objects.set(&attribute, value)
                } else {
                    xdlms::DataAccessResult::READ_WRITE_DENIED
                },
            },
            ServiceRequest::Action { invoke, method, argument } => ServiceResponse::Action {
                invoke,
                result: if !may_write {
                    xdlms::DataAccessResult::READ_WRITE_DENIED.0
                } else if method.class == CLASS_SECURITY_SETUP {
                    // Methods of the security setup need a ciphered association.
                    match received {
                        Some(_) => state.act_on_security_setup(&method, argument.as_ref()),
                        None => xdlms::DataAccessResult::READ_WRITE_DENIED.0,
                    }
                } else {
                    state.objects.act(&method)
                },
                returned: None,
            },
        })
    }

    fn check_length(&self, answer: &[u8]) -> Result<(), Refused> {
        let limit =
            self.association.as_ref().map_or(0, |association| usize::from(association.client_max_receive_pdu_size));
        if limit != 0 && answer.len() > limit {
            return Err(Refused::new(SERVICE_NOT_ALLOWED, PDU_TOO_LONG, Refusal::NotAllowed));
        }
        Ok(())
    }

    fn end_outdated_association(&mut self, state: &MeterState) {
        if self.association.as_ref().is_some_and(|association| association.epoch != state.epoch) {
            self.association = None;
        }
    }

    /// Opens a ciphered request without accepting it.
    fn peek(&self, state: &MeterState, apdu: &[u8]) -> Option<ServiceRequest> {
        let apdu = CipheredApdu::parse(apdu).ok()?;
        let association = self.association.as_ref()?;
        let (setup, client) = association.ciphered()?;
        let setup = state.setup(setup)?;
        let encryption = if apdu.form.is_dedicated() {
            association.dedicated.as_ref()?.record.key.clone()
        } else {
            setup.guek.current().key.clone()
        };
        let ciphering = Ciphering { encryption, authentication: setup.gak.current().key.clone() };
        ServiceRequest::parse(&ciphering.open(&client, &apdu.content).ok()?).ok()
    }
}

/// An open association.
#[derive(Debug)]
struct Association {
    epoch: u64,
    mechanism: MechanismConfig,
    setup: Option<Obis>,
    client_title: Option<SystemTitle>,
    dedicated: Option<Dedicated>,
    /// Present until `reply_to_HLS_authentication` succeeded.
    challenges: Option<Challenges>,
    client_max_receive_pdu_size: u16,
}

impl Association {
    /// The security setup and the client, if the association is ciphered.
    fn ciphered(&self) -> Option<(Obis, SystemTitle)> {
        Some((self.setup?, self.client_title?))
    }
}

struct AcceptedAssociation {
    response: AssociationResponse,
    association: Association,
}

/// A refusal: the answer to the client, and the entry in the log.
#[derive(Debug)]
struct Refused {
    exception: ExceptionResponse,
    reason: Refusal,
}

impl Refused {
    const fn new(state: u8, service: u8, reason: Refusal) -> Self {
        Self { exception: ExceptionResponse::new(state, service), reason }
    }

    const fn malformed() -> Self {
        Self::new(SERVICE_NOT_ALLOWED, OTHER_REASON, Refusal::Malformed)
    }

    const fn not_allowed() -> Self {
        Self::new(SERVICE_NOT_ALLOWED, OPERATION_NOT_POSSIBLE, Refusal::NotAllowed)
    }

    const fn not_possible() -> Self {
        Self::not_allowed()
    }

    const fn other() -> Self {
        Self::new(SERVICE_NOT_ALLOWED, OTHER_REASON, Refusal::NotAllowed)
    }

    /// `state` is 1 for an association request and 2 for a request inside an association, as with
    /// meters in the field when deciphering fails.
    const fn protection(reason: Refusal, state: u8) -> Self {
        let exception = match reason {
            Refusal::Counter { last, .. } => ExceptionResponse::invocation_counter(last),
            Refusal::NotAllowed => ExceptionResponse::new(SERVICE_NOT_ALLOWED, OPERATION_NOT_POSSIBLE),
            _ => ExceptionResponse::new(state, DECIPHERING_ERROR),
        };
        Self { exception, reason }
    }
}

fn association_config(state: &MeterState, client_sap: u16) -> Option<AssociationConfig> {
    state.config.associations.iter().find(|association| association.client_sap == client_sap).cloned()
}

fn initiate_response(state: &MeterState, request: &InitiateRequest) -> InitiateResponse {
    let [a, b, c] = request.conformance;
    let [x, y, z] = CONFORMANCE;
    InitiateResponse {
        conformance: [a & x, b & y, c & z],
        server_max_receive_pdu_size: state.config.max_receive_pdu_size,
    }
}

/// An answer is protected like its request.
const fn answer_control(content: &CipheredContent) -> SecurityControl {
    SecurityControl(content.control.0 & 0x3F)
}

fn is_reply_to_hls(method: &MethodDescriptor) -> bool {
    method.class == CLASS_ASSOCIATION && method.instance == Obis::CURRENT_ASSOCIATION && method.method == 1
}

fn is_key_transfer(method: &MethodDescriptor) -> bool {
    method.class == CLASS_SECURITY_SETUP && method.method == crate::key_transfer::KEY_TRANSFER
}

/// What a meter supports, as the bits of IEC 62056-5-3: general protection, multiple references,
/// get, set, action.
const CONFORMANCE: [u8; 3] = [0x40, 0x02, 0x19];
const CHALLENGE_LENGTHS: RangeInclusive<usize> = 8..=64;

const ACCEPTED: u8 = 0;
const REJECTED_PERMANENT: u8 = 1;
const NULL_DIAGNOSTIC: u8 = 0;
const NO_REASON_GIVEN: u8 = 1;
const CONTEXT_NOT_SUPPORTED: u8 = 2;
const TITLE_NOT_RECOGNISED: u8 = 3;
const MECHANISM_NOT_RECOGNISED: u8 = 11;
const AUTHENTICATION_FAILURE: u8 = 13;
const AUTHENTICATION_REQUIRED: u8 = 14;
