//! Reads the answers of meters in the HSM. Only authenticated octets prove something; what a
//! head-end says of them does not (I3).

use std::sync::Arc;

use kms_dlms::{
    ActionResponse, ActionResult, AssociationResponse, Challenge, CipheredApdu, CipheredTag, ExceptionResponse,
    HlsGmac, InitiateResponse, KeySet, Nonce, ServiceError as DlmsServiceError, resembles_request,
};
use kms_domain::{KeyPair, KeyType, Meter, Observation, Stage, Transfer};
use kms_hsm::{FrameKeys, FrameParameters, HsmError, ProtectedFrame};

use super::{
    TransferService,
    emit::{INVOKE_ID, pair_keys},
    step::{Report, ReportedAnswer},
};
use kms_base::error::ServiceError;

/// What one report shows.
#[derive(Clone, Debug)]
pub(super) struct ReadReport {
    pub(super) observation: Observation,
    /// The last counter that the meter states to have accepted. Not authenticated.
    pub(super) last_accepted: Option<u32>,
}

impl From<Observation> for ReadReport {
    fn from(observation: Observation) -> Self {
        Self { observation, last_accepted: None }
    }
}

impl TransferService {
    /// Reads the reports of meters that are at the reported step, in two rounds in the HSM. `None`
    /// for other meters.
    pub(super) async fn read(
        &self,
        reports: &[Report],
        expected: &[Option<Arc<Meter>>],
    ) -> Result<Vec<Option<ReadReport>>, ServiceError> {
        let mut first: Vec<Option<Reading>> = reports
            .iter()
            .zip(expected)
            .map(|(report, meter)| {
                let meter = meter.as_ref()?;
                Some(Reading::begin(meter, meter.transfer.as_ref()?, &report.answer))
            })
            .collect();
        let jobs = first.iter().flatten().filter_map(Reading::job).collect();
        let mut opened = self.hsm.unprotect_batch(jobs).await?.into_iter();
        for reading in first.iter_mut().flatten() {
            if reading.job().is_some() {
                *reading = reading.opened(next(&mut opened)?)?;
            }
        }
        let jobs = first.iter().flatten().filter_map(Reading::challenge_job).collect();
        let mut verified = self.hsm.unprotect_batch(jobs).await?.into_iter();
        first
            .into_iter()
            .map(|reading| match reading {
                None => Ok(None),
                Some(Reading::Challenge { counter, .. }) => {
                    let verified = next(&mut verified)?;
                    Ok(Some(if verified.is_some() {
                        Observation::Authenticated { meter_counter: counter }.into()
                    } else {
                        Observation::Nothing.into()
                    }))
                }
                Some(Reading::Done(read)) => Ok(Some(read)),
                Some(Reading::Frame { .. }) => Ok(Some(Observation::Nothing.into())),
            })
            .collect()
    }
}

/// How far a report is read.
enum Reading {
    /// A ciphered APDU must be opened.
    Frame { keys: FrameKeys, frame: ProtectedFrame, counter: u32, content: Content },
    /// An answer to the client's challenge must be verified.
    Challenge { keys: FrameKeys, frame: ProtectedFrame, counter: u32 },
    /// The report is read.
    Done(ReadReport),
}

/// The expected content of a ciphered APDU.
#[derive(Clone)]
enum Content {
    /// An InitiateResponse, which came with this challenge of the meter.
    Initiate { meter_challenge: Vec<u8> },
    /// An action-response with f(CtoS) for this challenge.
    Authentication { parameters: ClientChallenge },
    /// An action-response to `key_transfer`. If the server made the request, the invoke ids must be
    /// equal.
    Delivery { made_here: bool },
}

/// The parameters of f(CtoS).
#[derive(Clone)]
struct ClientChallenge {
    meter: kms_domain::SystemTitle,
    suite: kms_domain::SecuritySuite,
    challenge: Vec<u8>,
}

impl Reading {
    fn begin(meter: &Meter, transfer: &Transfer, answer: &ReportedAnswer) -> Self {
        let octets = match answer {
            ReportedAnswer::Nothing => return Self::done(Observation::Nothing),
            ReportedAnswer::Attested(holds) => return Self::done(Observation::Attested { holds: *holds }),
            ReportedAnswer::Apdu(octets) => octets,
        };
        if ExceptionResponse::recognise(octets) {
            return match ExceptionResponse::parse(octets).map(|exception| exception.service_error) {
                Ok(DlmsServiceError::InvocationCounterError { last_accepted }) => {
                    Self::Done(ReadReport { observation: Observation::Refusal, last_accepted: Some(last_accepted) })
                }
                Ok(_) => Self::done(Observation::Refusal),
                Err(_) => Self::done(Observation::Nothing),
            };
        }
        // An answer that cannot be read counts as no answer: it changes no state.
        Self::try_begin(meter, transfer, octets).unwrap_or_else(Self::done)
    }

    fn try_begin(meter: &Meter, transfer: &Transfer, octets: &[u8]) -> Result<Self, Observation> {
        let pair = transfer
            .pair()
            .or_else(|| meter.pairs(transfer.setup, None).first().copied())
            .ok_or(Observation::Nothing)?;
        let keys = pair_keys(meter, transfer.setup, pair).map_err(|_| Observation::Nothing)?;
        match &transfer.stage {
            Stage::Associate { challenge, .. } => {
                let response = AssociationResponse::parse(octets).map_err(|_| Observation::Nothing)?;
                let client = Challenge::new(challenge).map_err(|_| Observation::Nothing)?;
                let continued = response.hls_challenge(meter.title, &client).map_err(|_| Observation::Refusal)?;
                let meter_challenge = continued.challenge.octets().to_vec();
                if resembles_request(&meter_challenge) {
                    // I8: f(StoC) authenticates a challenge exactly as it authenticates an APDU
                    // that is not encrypted.
                    return Err(Observation::ChallengeUnfit);
                }
                ciphered(
                    meter,
                    keys,
                    continued.initiate_response,
                    &[INITIATE_RESPONSE],
                    Content::Initiate { meter_challenge },
                )
            }
            Stage::Authenticate { challenge, .. } => {
                let parameters =
                    ClientChallenge { meter: meter.title, suite: meter.suite, challenge: challenge.to_vec() };
                ciphered(meter, keys, octets, &[ACTION_RESPONSE], Content::Authentication { parameters })
            }
            Stage::Deliver { pair: own } => {
                let reading =
                    ciphered(meter, keys, octets, &[ACTION_RESPONSE], Content::Delivery { made_here: own.is_some() })?;
                // The meter's own counter shows whether it made the answer after the request was
                // sent.
                match &reading {
                    Self::Frame { counter, .. } if *counter <= known_counter(meter, transfer, pair) => {
                        Err(Observation::Nothing)
                    }
                    _ => Ok(reading),
                }
            }
        }
    }

    fn job(&self) -> Option<(FrameKeys, ProtectedFrame)> {
        match self {
            Self::Frame { keys, frame, .. } => Some((keys.clone(), frame.clone())),
            _ => None,
        }
    }

    fn challenge_job(&self) -> Option<(FrameKeys, ProtectedFrame)> {
        match self {
            Self::Challenge { keys, frame, .. } => Some((keys.clone(), frame.clone())),
            _ => None,
        }
    }

    /// Continues with the content of the frame; `None` if the keys do not open it.
    fn opened(&self, plain: Option<Vec<u8>>) -> Result<Self, ServiceError> {
        let (Self::Frame { keys, counter, content, .. }, Some(plain)) = (self, plain) else {
            return Ok(Self::done(Observation::Nothing));
        };
        let read = match content {
            Content::Initiate { meter_challenge } => match InitiateResponse::parse(&plain) {
                Ok(_) => Observation::Associated { meter_challenge: meter_challenge.clone(), meter_counter: *counter },
                Err(_) => Observation::Refusal,
            },
            Content::Delivery { made_here } => match ActionResponse::parse(&plain) {
                Ok(response)
                    if !made_here || response.invoke_id_and_priority & INVOKE_ID_BITS == INVOKE_ID & INVOKE_ID_BITS =>
                {
                    Observation::Answered { result: response.result.0, meter_counter: *counter }
                }
                _ => Observation::Nothing,
            },
            Content::Authentication { parameters } => match ActionResponse::parse(&plain)
                .ok()
                .filter(|response| response.result == ActionResult::SUCCESS)
            {
                None => Observation::Refusal,
                Some(response) => match response.hls_gmac().ok().filter(|gmac| gmac.suite == parameters.suite) {
                    None => Observation::Refusal,
                    Some(gmac) => {
                        let nonce = Nonce::new(parameters.meter, gmac.counter);
                        let frame = ProtectedFrame {
                            parameters: FrameParameters::new(HlsGmac::control(gmac.suite).octet(), *nonce.octets())?,
                            text: parameters.challenge.clone(),
                            tag: gmac.tag.0,
                        };
                        return Ok(Self::Challenge {
                            keys: keys.clone(),
                            frame,
                            counter: (*counter).max(gmac.counter),
                        });
                    }
                },
            },
        };
        Ok(Self::done(read))
    }

    fn done(observation: Observation) -> Self {
        Self::Done(observation.into())
    }
}

/// A ciphered APDU of this meter: for one of these plain APDUs, or in general-glo-ciphering.
fn ciphered(
    meter: &Meter,
    keys: FrameKeys,
    octets: &[u8],
    plain: &[u8],
    content: Content,
) -> Result<Reading, Observation> {
    let apdu = CipheredApdu::parse(octets).map_err(|_| Observation::Nothing)?;
    let expected = match apdu.tag {
        CipheredTag::Global { plain: tag } => plain.contains(&tag),
        CipheredTag::GeneralGlobal => apdu.system_title.is_none_or(|title| title == meter.title),
        CipheredTag::Dedicated { .. } | CipheredTag::GeneralDedicated => false,
    };
    if !expected || apdu.control.suite != meter.suite || apdu.control.key_set != KeySet::Unicast {
        return Err(Observation::Nothing);
    }
    let parameters = FrameParameters::new(apdu.control.octet(), *Nonce::new(meter.title, apdu.counter).octets())
        .map_err(|_| Observation::Nothing)?;
    let frame = ProtectedFrame { parameters, text: apdu.content.to_vec(), tag: apdu.authentication_tag.0 };
    Ok(Reading::Frame { keys, frame, counter: apdu.counter, content })
}

/// The highest counter that the meter is known to have used under this GUEK.
fn known_counter(meter: &Meter, transfer: &Transfer, pair: KeyPair) -> u32 {
    let version = meter.slots.get(transfer.setup, KeyType::GUEK).and_then(|slot| slot.version(pair.encryption));
    version.map_or(0, |version| version.transport().meter_counter)
}

/// The next result of the HSM: the plain octets, or `None` if the tag does not verify.
fn next(results: &mut impl Iterator<Item = Result<Vec<u8>, HsmError>>) -> Result<Option<Vec<u8>>, ServiceError> {
    match results.next() {
        Some(Ok(plain)) => Ok(Some(plain)),
        Some(Err(HsmError::TagInvalid)) => Ok(None),
        Some(Err(error)) => Err(error.into()),
        None => Err(ServiceError::Internal("the HSM returned less than it was asked for".to_owned())),
    }
}

const INITIATE_RESPONSE: u8 = 0x08;
const ACTION_RESPONSE: u8 = 0xC7;
const INVOKE_ID_BITS: u8 = 0x0F;
