//! Associations with HLS 5, in BER: AARQ, AARE and RLRQ (IEC 62056-5-3, ACSE, after ISO/IEC 15954).
//!
//! AARQ and AARE are sent in the clear around the ciphered initiate APDUs. Nothing in an AARE is
//! authenticated. It proves nothing (I3) before its InitiateResponse opens and the meter answers
//! the client's challenge.

use std::fmt;

use kms_domain::SystemTitle;

use crate::{
    CipheredApdu, CipheredTag, ConfirmedServiceError, DlmsError, InitiateResponse, LONGEST_APDU,
    initiate_response::INITIATE_RESPONSE,
    reader::{Reader, TAG_NUMBER, write_element},
};

/// A challenge of HLS authentication, CtoS or StoC: 8 to 64 octets, any values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Challenge(Vec<u8>);

impl Challenge {
    /// The challenge of these octets. The client's own must be random.
    ///
    /// # Errors
    /// Fewer than 8 octets or more than 64.
    pub fn new(octets: &[u8]) -> Result<Self, DlmsError> {
        if !(8..=64).contains(&octets.len()) {
            return Err(DlmsError::invalid("challenge", format!("{} octets, not 8 to 64", octets.len())));
        }
        Ok(Self(octets.to_vec()))
    }

    /// The octets.
    pub fn octets(&self) -> &[u8] {
        &self.0
    }
}

/// An AARQ for HLS 5 in the context of logical names with ciphering: opens an association.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssociationRequest<'a> {
    /// calling-AP-title: the client's system title.
    pub client_title: SystemTitle,
    /// calling-authentication-value: the challenge CtoS.
    pub challenge: Challenge,
    /// user-information: the InitiateRequest in a glo-initiate-request APDU (21).
    pub initiate_request: &'a [u8],
}

impl AssociationRequest<'_> {
    /// The octets, of tag 60: application-context-name 2.16.756.5.8.1.3, calling-AP-title,
    /// sender-acse-requirements (authentication), mechanism-name 2.16.756.5.8.2.5,
    /// calling-authentication-value (charstring), user-information.
    ///
    /// # Errors
    /// `initiate_request` is not a glo-initiate-request, or the AARQ would be longer than
    /// [`LONGEST_APDU`].
    pub fn octets(&self) -> Result<Vec<u8>, DlmsError> {
        const WHAT: &str = "AARQ";
        let mut fields = Vec::with_capacity(self.initiate_request.len() + 128);
        write_element(
            &mut fields,
            0xA1,
            &element(OBJECT_IDENTIFIER, &object_identifier(CONTEXT_NAME, CIPHERED_LOGICAL_NAMES), WHAT)?,
            WHAT,
        )?;
        write_element(&mut fields, 0xA6, &element(OCTET_STRING, &self.client_title.octets(), WHAT)?, WHAT)?;
        write_element(&mut fields, 0x8A, &AUTHENTICATION, WHAT)?;
        write_element(&mut fields, 0x8B, &object_identifier(MECHANISM_NAME, HLS_GMAC), WHAT)?;
        write_element(&mut fields, 0xAC, &element(CHARSTRING, self.challenge.octets(), WHAT)?, WHAT)?;
        write_initiate_request(&mut fields, self.initiate_request, WHAT)?;
        apdu(AARQ, &fields, WHAT)
    }
}

/// An RLRQ with reason `normal`: ends an association. The server needs nothing of the RLRE that
/// answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReleaseRequest<'a> {
    /// user-information: an InitiateRequest in a glo-initiate-request APDU (21), with an invocation
    /// counter of its own (I4). Some meters require it against a forged end of the association.
    pub initiate_request: Option<&'a [u8]>,
}

impl ReleaseRequest<'_> {
    /// The octets, of tag 62.
    ///
    /// # Errors
    /// `initiate_request` is not a glo-initiate-request, or the RLRQ would be longer than
    /// [`LONGEST_APDU`].
    pub fn octets(&self) -> Result<Vec<u8>, DlmsError> {
        const WHAT: &str = "RLRQ";
        let mut fields = vec![0x80, 1, 0];
        if let Some(initiate_request) = self.initiate_request {
            write_initiate_request(&mut fields, initiate_request, WHAT)?;
        }
        apdu(RLRQ, &fields, WHAT)
    }
}

/// An AARE: how the meter answers an AARQ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssociationResponse<'a> {
    /// application-context-name.
    pub context: ApplicationContext,
    /// Whether the meter accepted.
    pub result: AssociationResult,
    /// Why, or what comes next.
    pub diagnostic: SourceDiagnostic,
    /// responding-AP-title: the meter's system title.
    pub server_title: Option<SystemTitle>,
    /// mechanism-name.
    pub mechanism: Option<AuthenticationMechanism>,
    /// responding-authentication-value, if it is a charstring: the challenge StoC, of any length.
    /// See [`Self::hls_challenge`].
    pub authentication_value: Option<&'a [u8]>,
    /// user-information.
    pub information: Option<AssociationInformation<'a>>,
}

/// The user-information of an AARE (ACSE, Association-information).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AssociationInformation<'a> {
    /// A well-formed ciphered APDU for an InitiateResponse, glo-initiate-response (28) or
    /// general-glo-ciphering (DB): all its octets.
    Ciphered(&'a [u8]),
    /// An InitiateResponse in the clear.
    InitiateResponse(InitiateResponse),
    /// The meter does not accept the proposed xDLMS context.
    Error(ConfirmedServiceError),
}

/// The content of an AARE that continues with HLS 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HlsChallenge<'a> {
    /// The challenge StoC, which the client answers in `reply_to_HLS_authentication`.
    pub challenge: Challenge,
    /// The ciphered InitiateResponse, all octets of the ciphered APDU.
    pub initiate_response: &'a [u8],
}

impl<'a> AssociationResponse<'a> {
    /// Reads an AARE, to its last octet. Every field comes at most once and in the order of the
    /// standard. Protocol-version must name version 1; responding-AE-qualifier (a certificate), the
    /// responding invocation ids and implementation-information are skipped; any other tag is
    /// refused.
    ///
    /// # Errors
    /// The octets are not an AARE, are cut, or others follow; a field is missing, unknown, repeated
    /// or out of order, or its value is not valid.
    pub fn parse(octets: &'a [u8]) -> Result<Self, DlmsError> {
        if octets.len() > LONGEST_APDU {
            return Err(DlmsError::invalid(WHAT, format!("{} octets, more than {LONGEST_APDU}", octets.len())));
        }
        let mut fields = Reader::new(octets).only_element(AARE, WHAT)?;
        let (mut context, mut result, mut diagnostic, mut server_title) = (None, None, None, None);
        let (mut mechanism, mut authentication_value, mut information) = (None, None, None);
        let mut previous = None;
        while !fields.is_empty() {
            let (tag, value) = fields.element(WHAT)?;
            let number = tag & TAG_NUMBER;
            if previous.is_some_and(|previous| number <= previous) {
                return Err(DlmsError::invalid(
                    WHAT,
                    format!("the field with tag {tag:02X} is repeated or out of order"),
                ));
            }
            previous = Some(number);
            match tag {
                0x80 if first_bit(value, "protocol-version")? => {}
                0x80 => return Err(DlmsError::invalid("protocol-version", "not version 1")),
                0xA1 => context = Some(ApplicationContext::read(value)?),
                0xA2 => result = Some(AssociationResult::read(value)?),
                0xA3 => diagnostic = Some(SourceDiagnostic::read(value)?),
                0xA4 => server_title = Some(title(value)?),
                // Unused: the mechanism-name says that authentication continues.
                0x88 => drop(first_bit(value, "responder-acse-requirements")?),
                0x89 => mechanism = Some(AuthenticationMechanism::read(value)?),
                0xAA => {
                    authentication_value =
                        Some(value.only_element(CHARSTRING, "responding-authentication-value")?.rest())
                }
                0xBE => information = Some(AssociationInformation::read(value)?),
                0xA5 | 0xA6 | 0xA7 | 0x9D | 0xBD => {}
                other => return Err(DlmsError::invalid(WHAT, format!("the field with tag {other:02X} is unknown"))),
            }
        }
        let missing = |field| DlmsError::invalid(WHAT, format!("{field} is missing"));
        Ok(Self {
            context: context.ok_or_else(|| missing("application-context-name"))?,
            result: result.ok_or_else(|| missing("result"))?,
            diagnostic: diagnostic.ok_or_else(|| missing("result-source-diagnostic"))?,
            server_title,
            mechanism,
            authentication_value,
            information,
        })
    }

    /// The challenge and the InitiateResponse, if the AARE continues with HLS 5: accepted with
    /// diagnostic `authentication-required`, in the context of logical names with ciphering, from
    /// this meter, with a challenge that is not the client's own, and with a ciphered
    /// InitiateResponse. Nothing of it is authenticated yet.
    ///
    /// # Errors
    /// One of these conditions is false. The error contains the diagnostic of a refusal by the
    /// meter.
    pub fn hls_challenge(
        &self,
        meter: SystemTitle,
        client_challenge: &Challenge,
    ) -> Result<HlsChallenge<'a>, DlmsError> {
        if self.result != AssociationResult::Accepted {
            let error = match self.information {
                Some(AssociationInformation::Error(error)) => format!(", {error}"),
                _ => String::new(),
            };
            return Err(DlmsError::invalid(
                WHAT,
                format!("the meter refused the association: {}, {}{error}", self.result, self.diagnostic),
            ));
        }
        if self.diagnostic != SourceDiagnostic::AUTHENTICATION_REQUIRED {
            return Err(DlmsError::invalid(
                WHAT,
                format!("accepted with {} instead of {}", self.diagnostic, SourceDiagnostic::AUTHENTICATION_REQUIRED),
            ));
        }
        if self.context != ApplicationContext::CipheredLogicalNames {
            return Err(DlmsError::invalid("application-context-name", "not logical names with ciphering (3)"));
        }
        if self.mechanism != Some(AuthenticationMechanism::HighGmac) {
            return Err(DlmsError::invalid("mechanism-name", "not HLS with GMAC (5)"));
        }
        if self.server_title != Some(meter) {
            return Err(DlmsError::invalid("responding-AP-title", "not the system title of the meter that was asked"));
        }
        let challenge = Challenge::new(
            self.authentication_value
                .ok_or_else(|| DlmsError::invalid(WHAT, "responding-authentication-value is missing"))?,
        )?;
        // A meter that sends the client's own challenge back would make the client answer it for
        // the meter.
        if challenge == *client_challenge {
            return Err(DlmsError::invalid("responding-authentication-value", "the client's own challenge comes back"));
        }
        let Some(AssociationInformation::Ciphered(initiate_response)) = self.information else {
            return Err(DlmsError::invalid("user-information", "no ciphered InitiateResponse"));
        };
        Ok(HlsChallenge { challenge, initiate_response })
    }
}

/// Application-context-name 2.16.756.5.8.1.n: how objects are named, and whether APDUs may be
/// ciphered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApplicationContext {
    /// 1: logical names, no ciphering.
    LogicalNames,
    /// 2: short names, no ciphering.
    ShortNames,
    /// 3: logical names with ciphering.
    CipheredLogicalNames,
    /// 4: short names with ciphering.
    CipheredShortNames,
}

impl ApplicationContext {
    fn read(value: Reader<'_>) -> Result<Self, DlmsError> {
        const WHAT: &str = "application-context-name";
        match last_arc(value.only_element(OBJECT_IDENTIFIER, WHAT)?, CONTEXT_NAME) {
            Some(1) => Ok(Self::LogicalNames),
            Some(2) => Ok(Self::ShortNames),
            Some(CIPHERED_LOGICAL_NAMES) => Ok(Self::CipheredLogicalNames),
            Some(4) => Ok(Self::CipheredShortNames),
            _ => Err(DlmsError::invalid(WHAT, "not 2.16.756.5.8.1.1 to .4")),
        }
    }
}

/// Mechanism-name 2.16.756.5.8.2.n: how the two sides authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuthenticationMechanism {
    /// 0: lowest level security, none.
    Lowest,
    /// 1: low level security, a password.
    Low,
    /// 2: high level security, the manufacturer's own.
    HighManufacturer,
    /// 3: high level security with MD5.
    HighMd5,
    /// 4: high level security with SHA-1.
    HighSha1,
    /// 5: high level security with GMAC, HLS 5.
    HighGmac,
    /// 6: high level security with SHA-256.
    HighSha256,
    /// 7: high level security with ECDSA.
    HighEcdsa,
}

impl AuthenticationMechanism {
    fn read(value: Reader<'_>) -> Result<Self, DlmsError> {
        match last_arc(value, MECHANISM_NAME) {
            Some(0) => Ok(Self::Lowest),
            Some(1) => Ok(Self::Low),
            Some(2) => Ok(Self::HighManufacturer),
            Some(3) => Ok(Self::HighMd5),
            Some(4) => Ok(Self::HighSha1),
            Some(HLS_GMAC) => Ok(Self::HighGmac),
            Some(6) => Ok(Self::HighSha256),
            Some(7) => Ok(Self::HighEcdsa),
            _ => Err(DlmsError::invalid("mechanism-name", "not 2.16.756.5.8.2.0 to .7")),
        }
    }
}

/// The result of an AARE (ACSE, Association-result).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AssociationResult {
    /// 0.
    Accepted,
    /// 1: the same request will be refused again.
    RejectedPermanent,
    /// 2: the same request may be accepted later.
    RejectedTransient,
}

impl AssociationResult {
    fn read(value: Reader<'_>) -> Result<Self, DlmsError> {
        const WHAT: &str = "result";
        match small_integer(value, WHAT)? {
            0 => Ok(Self::Accepted),
            1 => Ok(Self::RejectedPermanent),
            2 => Ok(Self::RejectedTransient),
            other => Err(DlmsError::invalid(WHAT, format!("{other} is not 0, 1 or 2"))),
        }
    }
}

impl fmt::Display for AssociationResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::RejectedPermanent => "rejected-permanent",
            Self::RejectedTransient => "rejected-transient",
        })
    }
}

/// The result-source-diagnostic of an AARE (ACSE, Associate-source-diagnostic): who decided, and a
/// number, 0 to 127.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDiagnostic {
    /// acse-service-user, the meter's application: 0 null, 1 no-reason-given, 2
    /// application-context-name-not-supported, 3 calling-AP-title-not-recognized, 11
    /// authentication-mechanism-name-not-recognised, 12 authentication-mechanism-name-required, 13
    /// authentication-failure, 14 authentication-required.
    ServiceUser(u8),
    /// acse-service-provider: 0 null, 1 no-reason-given, 2 no-common-acse-version.
    ServiceProvider(u8),
}

impl SourceDiagnostic {
    /// The diagnostic of an accepted association with HLS: both challenges must still be answered.
    pub const AUTHENTICATION_REQUIRED: Self = Self::ServiceUser(14);

    fn read(mut value: Reader<'_>) -> Result<Self, DlmsError> {
        const WHAT: &str = "result-source-diagnostic";
        let (choice, number) = value.element(WHAT)?;
        value.end(WHAT)?;
        let number = small_integer(number, WHAT)?;
        match choice {
            0xA1 => Ok(Self::ServiceUser(number)),
            0xA2 => Ok(Self::ServiceProvider(number)),
            other => Err(DlmsError::invalid(WHAT, format!("choice {other:02X} is unknown"))),
        }
    }
}

impl fmt::Display for SourceDiagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, number, name) = match *self {
            Self::ServiceUser(number) => (
                "acse-service-user",
                number,
                match number {
                    0 => "null",
                    1 => "no-reason-given",
                    2 => "application-context-name-not-supported",
                    3 => "calling-AP-title-not-recognized",
                    11 => "authentication-mechanism-name-not-recognised",
                    12 => "authentication-mechanism-name-required",
                    13 => "authentication-failure",
                    14 => "authentication-required",
                    _ => "another diagnostic",
                },
            ),
            Self::ServiceProvider(number) => (
                "acse-service-provider",
                number,
                match number {
                    0 => "null",
                    1 => "no-reason-given",
                    2 => "no-common-acse-version",
                    _ => "another diagnostic",
                },
            ),
        };
        write!(f, "{source} {number} ({name})")
    }
}

impl<'a> AssociationInformation<'a> {
    fn read(value: Reader<'a>) -> Result<Self, DlmsError> {
        const WHAT: &str = "user-information";
        let octets = value.only_element(OCTET_STRING, WHAT)?.rest();
        match octets.first() {
            Some(&INITIATE_RESPONSE) => InitiateResponse::parse(octets).map(Self::InitiateResponse),
            _ if ConfirmedServiceError::recognise(octets) => ConfirmedServiceError::parse(octets).map(Self::Error),
            _ => match CipheredApdu::parse(octets)?.tag {
                CipheredTag::Global { plain: INITIATE_RESPONSE } | CipheredTag::GeneralGlobal => {
                    Ok(Self::Ciphered(octets))
                }
                _ => Err(DlmsError::invalid(WHAT, "neither InitiateResponse nor ConfirmedServiceError")),
            },
        }
    }
}

fn title(value: Reader<'_>) -> Result<SystemTitle, DlmsError> {
    const WHAT: &str = "responding-AP-title";
    SystemTitle::from_octets(value.only_element(OCTET_STRING, WHAT)?.rest())
        .map_err(|error| DlmsError::invalid(WHAT, error.reason()))
}

/// An INTEGER of one octet, 0 to 127.
fn small_integer(value: Reader<'_>, what: &'static str) -> Result<u8, DlmsError> {
    let mut content = value.only_element(INTEGER, what)?;
    let number = content.octet(what)?;
    content.end(what)?;
    if number > 0x7F {
        return Err(DlmsError::invalid(what, "a negative number"));
    }
    Ok(number)
}

/// The first bit of a BIT STRING: the number of unused bits of the last octet, then the octets.
fn first_bit(mut value: Reader<'_>, what: &'static str) -> Result<bool, DlmsError> {
    match (value.octet(what)?, value.rest().first()) {
        (0..=7, Some(octet)) => Ok(octet & 0x80 != 0),
        (0, None) => Ok(false),
        _ => Err(DlmsError::invalid(what, "not a bit string")),
    }
}

/// The last arc of an object identifier that starts with these arcs.
fn last_arc(value: Reader<'_>, prefix: [u8; 6]) -> Option<u8> {
    match value.rest().strip_prefix(&prefix)? {
        [arc] => Some(*arc),
        _ => None,
    }
}

fn object_identifier([a, b, c, d, e, f]: [u8; 6], last: u8) -> [u8; 7] {
    [a, b, c, d, e, f, last]
}

fn element(tag: u8, content: &[u8], what: &'static str) -> Result<Vec<u8>, DlmsError> {
    let mut octets = Vec::with_capacity(content.len() + 4);
    write_element(&mut octets, tag, content, what)?;
    Ok(octets)
}

/// The field user-information, of a request.
fn write_initiate_request(fields: &mut Vec<u8>, initiate_request: &[u8], what: &'static str) -> Result<(), DlmsError> {
    if CipheredApdu::parse(initiate_request)?.tag != (CipheredTag::Global { plain: INITIATE_REQUEST }) {
        return Err(DlmsError::invalid(what, "the user-information is not a glo-initiate-request (21)"));
    }
    write_element(fields, 0xBE, &element(OCTET_STRING, initiate_request, what)?, what)
}

fn apdu(tag: u8, fields: &[u8], what: &'static str) -> Result<Vec<u8>, DlmsError> {
    let octets = element(tag, fields, what)?;
    if octets.len() > LONGEST_APDU {
        return Err(DlmsError::invalid(what, format!("{} octets, more than {LONGEST_APDU}", octets.len())));
    }
    Ok(octets)
}

const WHAT: &str = "AARE";
const AARQ: u8 = 0x60;
const AARE: u8 = 0x61;
const RLRQ: u8 = 0x62;
const INITIATE_REQUEST: u8 = 0x01;

// BER.
const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// Authentication-value, choice charstring.
const CHARSTRING: u8 = 0x80;
/// ACSE-requirements: a bit string whose first bit, authentication, is set.
const AUTHENTICATION: [u8; 2] = [7, 0x80];
/// 2.16.756.5.8.1
const CONTEXT_NAME: [u8; 6] = [0x60, 0x85, 0x74, 5, 8, 1];
const CIPHERED_LOGICAL_NAMES: u8 = 3;
/// 2.16.756.5.8.2
const MECHANISM_NAME: [u8; 6] = [0x60, 0x85, 0x74, 5, 8, 2];
const HLS_GMAC: u8 = 5;
