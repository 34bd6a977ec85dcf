//! The client half: a head-end that holds plaintext keys and a range of invocation counters.

use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::timeout;

use crate::acse::{ApplicationContext, AssociationRequest, AssociationResponse, Mechanism, Release};
use crate::axdr::Data;
use crate::ciphered::{
    CipheredApdu, CipheredForm, GLO_INITIATE_REQUEST, GLO_INITIATE_RESPONSE, encode_initiate, parse_initiate,
};
use crate::key_transfer::{KEY_TRANSFER, key_transfer_argument};
use crate::objects::{CLASS_ASSOCIATION, CLASS_SECURITY_SETUP};
use crate::security::{CipheredContent, Ciphering, SecurityControl};
use crate::wrapper::Frame;
use crate::xdlms::{
    AttributeDescriptor, DataAccessResult, EXCEPTION_RESPONSE, ExceptionResponse, InitiateRequest, InitiateResponse,
    MethodDescriptor, ServiceRequest, ServiceResponse,
};
use crate::{Error, KeyId, Obis, SecuritySuite, SymmetricKey, SystemTitle};

/// What a session needs before it starts.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The client's own system title.
    pub client_title: SystemTitle,
    /// The suite of the meter.
    pub suite: SecuritySuite,
    /// GUEK and GAK.
    pub keys: Ciphering,
    /// The dedicated key that the association shall have; APDUs after the HLS answer come under it.
    pub dedicated_key: Option<SymmetricKey>,
    /// The invocation counters that this session may use, each once.
    pub counters: RangeInclusive<u32>,
    /// Whether APDUs go in general or in service specific form.
    pub general_ciphering: bool,
}

/// A ciphered session with one meter: it makes requests and reads answers, and leaves their
/// transport to the caller. The order is AARQ, HLS answer, services, RLRQ.
#[derive(Debug)]
pub struct ClientSession {
    config: ClientConfig,
    counters: Counters,
    dedicated_counters: Counters,
    client_challenge: Vec<u8>,
    meter_challenge: Vec<u8>,
    meter_title: Option<SystemTitle>,
    last_meter_counter: Option<u32>,
    last_dedicated_meter_counter: Option<u32>,
    /// Of the request under way: its answer has the same.
    last_form: CipheredForm,
    stage: Stage,
}

impl ClientSession {
    /// A session with a random challenge CtoS of 16 bytes.
    pub fn new(config: ClientConfig) -> Result<Self, Error> {
        let mut challenge = vec![0; CHALLENGE_LENGTH];
        getrandom::fill(&mut challenge).map_err(|_| Error::Random)?;
        Ok(Self {
            counters: Counters(config.counters.clone()),
            dedicated_counters: Counters(0..=u32::MAX),
            config,
            client_challenge: challenge,
            meter_challenge: Vec::new(),
            meter_title: None,
            last_meter_counter: None,
            last_dedicated_meter_counter: None,
            last_form: CipheredForm::Global,
            stage: Stage::Fresh,
        })
    }

    /// The meter's system title, from the AARE.
    pub fn meter_title(&self) -> Option<SystemTitle> {
        self.meter_title
    }

    /// The next invocation counter that the session would use; `None` if there is none left.
    pub fn next_counter(&self) -> Option<u32> {
        let Counters(range) = &self.counters;
        (!range.is_empty()).then(|| *range.start())
    }

    /// The keys that protect what follows, for example after an accepted `key_transfer`. The caller
    /// is responsible for the counters: the session continues with the same range under a new GUEK.
    /// The meter's counter may start anew with a new GUEK.
    pub fn set_keys(&mut self, keys: Ciphering) {
        if keys.encryption != self.config.keys.encryption {
            self.last_meter_counter = None;
        }
        self.config.keys = keys;
    }

    /// The AARQ. Starts the session anew, with the counters that are left.
    pub fn association_request(&mut self) -> Result<Vec<u8>, Error> {
        self.stage = Stage::Fresh;
        self.last_dedicated_meter_counter = None;
        let user_information = self.initiate_request(self.config.dedicated_key.clone())?;
        let request = AssociationRequest {
            context: ApplicationContext::LogicalNameCiphering,
            client_title: Some(self.config.client_title),
            mechanism: Mechanism::HighGmac,
            authentication_value: Some(self.client_challenge.clone()),
            user_information,
        };
        self.stage = Stage::Requested;
        Ok(request.encode())
    }

    /// Reads the AARE: checks the result, opens the initiate response, and keeps title and
    /// challenge.
    pub fn process_association_response(&mut self, apdu: &[u8]) -> Result<InitiateResponse, Error> {
        self.expect(Stage::Requested)?;
        Self::refuse_exception(apdu)?;
        let response = AssociationResponse::parse(apdu)?;
        if response.result != 0 {
            return Err(Error::AssociationRejected { result: response.result, diagnostic: response.diagnostic });
        }
        let title = response.server_title.ok_or(Error::malformed("AARE", "has no system title"))?;
        if response.mechanism != Mechanism::HighGmac {
            return Err(Error::malformed("AARE", "has another mechanism than HLS 5"));
        }
        let information = response.user_information.ok_or(Error::malformed("AARE", "has no user information"))?;
        self.meter_challenge = response
            .authentication_value
            .filter(|challenge| (8..=64).contains(&challenge.len()))
            .ok_or(Error::malformed("AARE", "has no challenge of 8 to 64 bytes"))?;
        if self.meter_challenge == self.client_challenge {
            return Err(Error::malformed("AARE", "reflects the client's challenge"));
        }
        self.meter_title = Some(title);
        let content = parse_initiate(GLO_INITIATE_RESPONSE, &information)?;
        let initiate = InitiateResponse::parse(&self.open_global(&content)?)?;
        self.stage = Stage::Answered;
        self.last_form = self.form();
        Ok(initiate)
    }

    /// The ACTION `reply_to_HLS_authentication` with f(StoC). It uses up two counters: one for the
    /// GMAC, one for the APDU.
    pub fn hls_request(&mut self) -> Result<Vec<u8>, Error> {
        self.expect(Stage::Answered)?;
        let counter = self.counters.next()?;
        let answer = self.config.keys.answer_challenge(
            self.config.suite,
            &self.config.client_title,
            counter,
            &self.meter_challenge,
        )?;
        self.protect(&ServiceRequest::Action {
            invoke: INVOKE,
            method: MethodDescriptor {
                class: CLASS_ASSOCIATION,
                instance: Obis::CURRENT_ASSOCIATION,
                method: REPLY_TO_HLS,
            },
            argument: Some(Data::OctetString(answer)),
        })
    }

    /// Reads the answer and checks f(CtoS): only now the meter has proven that it holds the keys.
    pub fn process_hls_response(&mut self, apdu: &[u8]) -> Result<(), Error> {
        self.expect(Stage::Answered)?;
        let ServiceResponse::Action { result, returned, .. } = self.open(apdu)? else {
            return Err(Error::malformed("HLS answer", "is not an action response"));
        };
        if result != 0 {
            return Err(Error::Action(result));
        }
        let Some(Data::OctetString(answer)) = returned else {
            return Err(Error::malformed("HLS answer", "has no octet string"));
        };
        let title = self.meter_title.ok_or(Error::State("there is no AARE"))?;
        self.config.keys.verify_challenge_answer(self.config.suite, &title, &self.client_challenge, &answer)?;
        self.stage = Stage::Associated;
        Ok(())
    }

    /// A GET of one attribute.
    pub fn get_request(&mut self, attribute: AttributeDescriptor) -> Result<Vec<u8>, Error> {
        self.expect(Stage::Associated)?;
        self.protect(&ServiceRequest::Get { invoke: INVOKE, attribute, selective: false })
    }

    /// Reads the answer to a GET.
    pub fn process_get_response(&mut self, apdu: &[u8]) -> Result<Data, Error> {
        match self.open(apdu)? {
            ServiceResponse::Get { result, .. } => result.map_err(Error::Access),
            _ => Err(Error::malformed("answer", "is not a get response")),
        }
    }

    /// A SET of one attribute.
    pub fn set_request(&mut self, attribute: AttributeDescriptor, value: Data) -> Result<Vec<u8>, Error> {
        self.expect(Stage::Associated)?;
        self.protect(&ServiceRequest::Set { invoke: INVOKE, attribute, value })
    }

    /// Reads the answer to a SET.
    pub fn process_set_response(&mut self, apdu: &[u8]) -> Result<(), Error> {
        match self.open(apdu)? {
            ServiceResponse::Set { result: DataAccessResult::SUCCESS, .. } => Ok(()),
            ServiceResponse::Set { result, .. } => Err(Error::Access(result)),
            _ => Err(Error::malformed("answer", "is not a set response")),
        }
    }

    /// An ACTION.
    pub fn action_request(&mut self, method: MethodDescriptor, argument: Option<Data>) -> Result<Vec<u8>, Error> {
        self.expect(Stage::Associated)?;
        self.protect(&ServiceRequest::Action { invoke: INVOKE, method, argument })
    }

    /// A `key_transfer` on the security setup `setup`: each key's id and its form wrapped under the
    /// KEK.
    pub fn key_transfer_request(&mut self, setup: Obis, items: &[(KeyId, &[u8])]) -> Result<Vec<u8>, Error> {
        self.action_request(
            MethodDescriptor { class: CLASS_SECURITY_SETUP, instance: setup, method: KEY_TRANSFER },
            Some(key_transfer_argument(items)),
        )
    }

    /// Reads the answer to an ACTION. An `Action-Result` other than success is [`Error::Action`].
    pub fn process_action_response(&mut self, apdu: &[u8]) -> Result<Option<Data>, Error> {
        match self.open(apdu)? {
            ServiceResponse::Action { result: 0, returned, .. } => Ok(returned),
            ServiceResponse::Action { result, .. } => Err(Error::Action(result)),
            _ => Err(Error::malformed("answer", "is not an action response")),
        }
    }

    /// The RLRQ, with a ciphered initiate request.
    pub fn release_request(&mut self) -> Result<Vec<u8>, Error> {
        let user_information = self.initiate_request(None)?;
        Ok(Release { reason: Some(0), user_information: Some(user_information) }.encode_request())
    }

    /// Reads the RLRE and opens its initiate response.
    pub fn process_release_response(&mut self, apdu: &[u8]) -> Result<(), Error> {
        Self::refuse_exception(apdu)?;
        let release = Release::parse_response(apdu)?;
        if let Some(information) = release.user_information {
            let content = parse_initiate(GLO_INITIATE_RESPONSE, &information)?;
            self.open_global(&content)?;
        }
        self.stage = Stage::Fresh;
        Ok(())
    }

    fn initiate_request(&mut self, dedicated_key: Option<SymmetricKey>) -> Result<Vec<u8>, Error> {
        let counter = self.counters.next()?;
        let content = self.config.keys.protect(
            SecurityControl::authenticated_encrypted(self.config.suite),
            &self.config.client_title,
            counter,
            &InitiateRequest { dedicated_key, conformance: CONFORMANCE, client_max_receive_pdu_size: 0xFFFF }.encode(),
        )?;
        Ok(encode_initiate(GLO_INITIATE_REQUEST, &content))
    }

    fn protect(&mut self, request: &ServiceRequest) -> Result<Vec<u8>, Error> {
        let plaintext = request.encode();
        let tag = plaintext.first().copied().ok_or(Error::malformed("request", "is empty"))?;
        let form = self.form();
        self.last_form = form;
        let counter = if form.is_dedicated() { self.dedicated_counters.next()? } else { self.counters.next()? };
        let content = self.ciphering(form).protect(
            SecurityControl::authenticated_encrypted(self.config.suite),
            &self.config.client_title,
            counter,
            &plaintext,
        )?;
        Ok(CipheredApdu::new(form, tag, self.config.client_title, content)?.encode())
    }

    fn open(&mut self, apdu: &[u8]) -> Result<ServiceResponse, Error> {
        Self::refuse_exception(apdu)?;
        let apdu = CipheredApdu::parse(apdu)?;
        let title = self.meter_title.ok_or(Error::State("there is no AARE"))?;
        if apdu.title.is_some_and(|other| other != title) {
            return Err(Error::Deciphering);
        }
        if apdu.form != self.last_form {
            return Err(Error::malformed("answer", "has another form than its request"));
        }
        let plaintext = if apdu.form.is_dedicated() {
            let plaintext = self.ciphering(apdu.form).open(&title, &apdu.content)?;
            accept_counter(&mut self.last_dedicated_meter_counter, apdu.content.counter)?;
            plaintext
        } else {
            self.open_global(&apdu.content)?
        };
        if !plaintext.first().is_some_and(|tag| apdu.may_carry(*tag)) {
            return Err(Error::malformed("answer", "carries another service"));
        }
        ServiceResponse::parse(&plaintext)
    }

    fn open_global(&mut self, content: &CipheredContent) -> Result<zeroize::Zeroizing<Vec<u8>>, Error> {
        let title = self.meter_title.ok_or(Error::State("there is no AARE"))?;
        let plaintext = self.config.keys.open(&title, content)?;
        accept_counter(&mut self.last_meter_counter, content.counter)?;
        Ok(plaintext)
    }

    fn form(&self) -> CipheredForm {
        let dedicated = self.stage == Stage::Associated && self.config.dedicated_key.is_some();
        match (dedicated, self.config.general_ciphering) {
            (false, false) => CipheredForm::Global,
            (false, true) => CipheredForm::GeneralGlobal,
            (true, false) => CipheredForm::Dedicated,
            (true, true) => CipheredForm::GeneralDedicated,
        }
    }

    fn ciphering(&self, form: CipheredForm) -> Ciphering {
        let mut ciphering = self.config.keys.clone();
        if let (true, Some(key)) = (form.is_dedicated(), &self.config.dedicated_key) {
            ciphering.encryption = key.clone();
        }
        ciphering
    }

    fn expect(&self, stage: Stage) -> Result<(), Error> {
        if self.stage == stage {
            return Ok(());
        }
        Err(Error::State(match stage {
            Stage::Fresh => "it has begun already",
            Stage::Requested => "there is no AARQ under way",
            Stage::Answered => "there is no AARE that waits for HLS",
            Stage::Associated => "the association is not open",
        }))
    }

    fn refuse_exception(apdu: &[u8]) -> Result<(), Error> {
        if apdu.first() == Some(&EXCEPTION_RESPONSE) {
            return Err(Error::Exception(ExceptionResponse::parse(apdu)?));
        }
        Ok(())
    }
}

/// A TCP connection with the DLMS wrapper.
#[derive(Debug)]
pub struct ClientConnection {
    stream: TcpStream,
    client_sap: u16,
    logical_device: u16,
    answer_timeout: Duration,
}

impl ClientConnection {
    /// Connects. `client_sap` and `logical_device` are the wrapper's ports; an answer that takes
    /// longer than `answer_timeout` is [`Error::Transport`] with `TimedOut`.
    pub async fn connect(
        address: impl ToSocketAddrs,
        client_sap: u16,
        logical_device: u16,
        answer_timeout: Duration,
    ) -> Result<Self, Error> {
        let stream = timeout(answer_timeout, TcpStream::connect(address)).await.map_err(std::io::Error::from)??;
        stream.set_nodelay(true)?;
        Ok(Self { stream, client_sap, logical_device, answer_timeout })
    }

    /// Sends a request and waits for the next APDU from this logical device. After a lost or
    /// duplicated answer, this APDU may answer another request: the checks of the session detect
    /// that.
    pub async fn exchange(&mut self, apdu: Vec<u8>) -> Result<Vec<u8>, Error> {
        Frame { source: self.client_sap, destination: self.logical_device, apdu }.write(&mut self.stream).await?;
        timeout(self.answer_timeout, self.receive()).await.map_err(std::io::Error::from)?
    }

    /// AARQ, AARE and HLS in both directions: afterwards `session` is associated.
    pub async fn associate(&mut self, session: &mut ClientSession) -> Result<(), Error> {
        let answer = self.exchange(session.association_request()?).await?;
        session.process_association_response(&answer)?;
        let answer = self.exchange(session.hls_request()?).await?;
        session.process_hls_response(&answer)
    }

    /// Reads one attribute.
    pub async fn get(&mut self, session: &mut ClientSession, attribute: AttributeDescriptor) -> Result<Data, Error> {
        let answer = self.exchange(session.get_request(attribute)?).await?;
        session.process_get_response(&answer)
    }

    /// Sends a `key_transfer` on the security setup `setup`.
    pub async fn key_transfer(
        &mut self,
        session: &mut ClientSession,
        setup: Obis,
        items: &[(KeyId, &[u8])],
    ) -> Result<(), Error> {
        let answer = self.exchange(session.key_transfer_request(setup, items)?).await?;
        session.process_action_response(&answer).map(|_| ())
    }

    /// RLRQ and RLRE.
    pub async fn release(&mut self, session: &mut ClientSession) -> Result<(), Error> {
        let answer = self.exchange(session.release_request()?).await?;
        session.process_release_response(&answer)
    }

    async fn receive(&mut self) -> Result<Vec<u8>, Error> {
        loop {
            let frame =
                Frame::read(&mut self.stream).await?.ok_or(Error::Transport(std::io::ErrorKind::UnexpectedEof))?;
            if frame.source == self.logical_device && frame.destination == self.client_sap {
                return Ok(frame.apdu);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No AARQ yet.
    Fresh,
    /// AARQ made, AARE awaited.
    Requested,
    /// AARE read, HLS awaited.
    Answered,
    /// HLS done.
    Associated,
}

#[derive(Debug)]
struct Counters(RangeInclusive<u32>);

impl Counters {
    fn next(&mut self) -> Result<u32, Error> {
        self.0.next().ok_or(Error::CountersExhausted)
    }
}

fn accept_counter(last: &mut Option<u32>, received: u32) -> Result<(), Error> {
    match *last {
        Some(last) if received <= last => Err(Error::CounterNotIncreasing { received, last }),
        _ => {
            *last = Some(received);
            Ok(())
        }
    }
}

const CHALLENGE_LENGTH: usize = 16;
const REPLY_TO_HLS: i8 = 1;
/// Invoke id 1, confirmed, high priority.
const INVOKE: u8 = 0xC1;
/// General protection, block transfer with GET, multiple references, get, set, selective access,
/// action.
const CONFORMANCE: [u8; 3] = [0x40, 0x1E, 0x1D];
