//! The association control APDUs, in BER: AARQ, AARE, RLRQ and RLRE (IEC 62056-5-3, after
//! ISO/IEC 15954), with the fields that DLMS clients and servers send.

use crate::axdr::{Reader, write_octet_string};
use crate::{Error, SystemTitle};

/// `application-context-name`: logical names, with or without ciphering. Short names are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplicationContext {
    /// Logical name referencing, no ciphering (1).
    LogicalName,
    /// Logical name referencing with ciphering (3).
    LogicalNameCiphering,
}

/// `mechanism-name`: how the peers authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// Lowest level security: none (0, usually absent).
    Lowest,
    /// Low level security: a password (1).
    Low,
    /// High level security with GMAC: HLS 5 (5).
    HighGmac,
    /// Another mechanism, which no meter here supports.
    Other(u8),
}

impl Mechanism {
    /// The last arc of the object identifier.
    pub const fn id(self) -> u8 {
        match self {
            Self::Lowest => 0,
            Self::Low => 1,
            Self::HighGmac => 5,
            Self::Other(id) => id,
        }
    }

    const fn from_id(id: u8) -> Self {
        match id {
            0 => Self::Lowest,
            1 => Self::Low,
            5 => Self::HighGmac,
            other => Self::Other(other),
        }
    }
}

/// The association request, tag 60.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssociationRequest {
    /// With or without ciphering.
    pub context: ApplicationContext,
    /// `calling-AP-title`: the client's system title.
    pub client_title: Option<SystemTitle>,
    /// `mechanism-name`; absent means lowest level security.
    pub mechanism: Mechanism,
    /// `calling-authentication-value`: the password, or the challenge CtoS.
    pub authentication_value: Option<Vec<u8>>,
    /// `user-information`: an InitiateRequest, ciphered (tag 21) or not (tag 01).
    pub user_information: Vec<u8>,
}

impl AssociationRequest {
    /// Reads a whole AARQ.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut context = None;
        let mut client_title = None;
        let mut mechanism = Mechanism::Lowest;
        let mut authentication_value = None;
        let mut user_information = None;
        for field in fields(AARQ, apdu)? {
            let (tag, value) = field?;
            match tag {
                0xA1 => context = Some(parse_context(value)?),
                0xA6 => client_title = Some(SystemTitle::try_from(inner(0x04, value)?)?),
                0x8B => mechanism = parse_mechanism(value)?,
                0xAC => authentication_value = Some(inner(0x80, value)?.to_vec()),
                0xBE => user_information = Some(inner(0x04, value)?.to_vec()),
                // Version, called titles, qualifiers and the like: nothing here depends on them.
                _ => {}
            }
        }
        Ok(Self {
            context: context.ok_or(Error::malformed("AARQ", "has no application context name"))?,
            client_title,
            mechanism,
            authentication_value,
            user_information: user_information.ok_or(Error::malformed("AARQ", "has no user information"))?,
        })
    }

    /// The whole AARQ.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        write_field(0xA1, &context_name(self.context), &mut body);
        if let Some(title) = &self.client_title {
            write_field(0xA6, &wrapped(0x04, title.as_bytes()), &mut body);
        }
        if self.mechanism != Mechanism::Lowest {
            write_field(0x8A, &AUTHENTICATION_UNIT, &mut body);
            write_field(0x8B, &mechanism_name(self.mechanism), &mut body);
        }
        if let Some(value) = &self.authentication_value {
            write_field(0xAC, &wrapped(0x80, value), &mut body);
        }
        write_field(0xBE, &wrapped(0x04, &self.user_information), &mut body);
        wrapped(AARQ, &body)
    }
}

/// The association response, tag 61.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssociationResponse {
    /// The context of the request.
    pub context: ApplicationContext,
    /// `Association-result`: 0 accepted, 1 rejected permanently, 2 rejected for the moment.
    pub result: u8,
    /// `Associate-source-diagnostic`, `acse-service-user`: 0 null, 2 context not supported, 3
    /// calling title not recognised, 11 mechanism not recognised, 13 authentication failure, 14
    /// authentication required (the normal value when HLS goes on).
    pub diagnostic: u8,
    /// `responding-AP-title`: the meter's system title.
    pub server_title: Option<SystemTitle>,
    /// `mechanism-name`; absent means lowest level security.
    pub mechanism: Mechanism,
    /// `responding-authentication-value`: the challenge StoC.
    pub authentication_value: Option<Vec<u8>>,
    /// `user-information`: an InitiateResponse, ciphered (tag 28) or not (tag 08).
    pub user_information: Option<Vec<u8>>,
}

impl AssociationResponse {
    /// Reads a whole AARE.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut context = None;
        let mut result = None;
        let mut diagnostic = None;
        let mut server_title = None;
        let mut mechanism = Mechanism::Lowest;
        let mut authentication_value = None;
        let mut user_information = None;
        for field in fields(AARE, apdu)? {
            let (tag, value) = field?;
            match tag {
                0xA1 => context = Some(parse_context(value)?),
                0xA2 => result = Some(small_integer(value)?),
                0xA3 => {
                    // A choice of service user (A1) and service provider (A2).
                    let mut reader = Reader::new(value);
                    reader.u8()?;
                    diagnostic = Some(small_integer(reader.octet_string()?)?);
                }
                0xA4 => server_title = Some(SystemTitle::try_from(inner(0x04, value)?)?),
                0x89 => mechanism = parse_mechanism(value)?,
                0xAA => authentication_value = Some(inner(0x80, value)?.to_vec()),
                0xBE => user_information = Some(inner(0x04, value)?.to_vec()),
                _ => {}
            }
        }
        Ok(Self {
            context: context.ok_or(Error::malformed("AARE", "has no application context name"))?,
            result: result.ok_or(Error::malformed("AARE", "has no result"))?,
            diagnostic: diagnostic.ok_or(Error::malformed("AARE", "has no diagnostic"))?,
            server_title,
            mechanism,
            authentication_value,
            user_information,
        })
    }

    /// The whole AARE.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        write_field(0xA1, &context_name(self.context), &mut body);
        write_field(0xA2, &wrapped(0x02, &[self.result]), &mut body);
        let diagnostic = wrapped(0xA1, &wrapped(0x02, &[self.diagnostic]));
        write_field(0xA3, &diagnostic, &mut body);
        if let Some(title) = &self.server_title {
            write_field(0xA4, &wrapped(0x04, title.as_bytes()), &mut body);
        }
        if self.mechanism != Mechanism::Lowest {
            write_field(0x88, &AUTHENTICATION_UNIT, &mut body);
            write_field(0x89, &mechanism_name(self.mechanism), &mut body);
        }
        if let Some(value) = &self.authentication_value {
            write_field(0xAA, &wrapped(0x80, value), &mut body);
        }
        if let Some(value) = &self.user_information {
            write_field(0xBE, &wrapped(0x04, value), &mut body);
        }
        wrapped(AARE, &body)
    }
}

/// The release request (tag 62) or response (tag 63): a reason, and user information, which is
/// ciphered where the association is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// 0 normal.
    pub reason: Option<u8>,
    /// An InitiateRequest or InitiateResponse.
    pub user_information: Option<Vec<u8>>,
}

impl Release {
    /// Reads an RLRQ.
    pub fn parse_request(apdu: &[u8]) -> Result<Self, Error> {
        Self::parse(RLRQ, apdu)
    }

    /// Reads an RLRE.
    pub fn parse_response(apdu: &[u8]) -> Result<Self, Error> {
        Self::parse(RLRE, apdu)
    }

    /// The RLRQ.
    pub fn encode_request(&self) -> Vec<u8> {
        self.encode(RLRQ)
    }

    /// The RLRE.
    pub fn encode_response(&self) -> Vec<u8> {
        self.encode(RLRE)
    }

    fn parse(expected: u8, apdu: &[u8]) -> Result<Self, Error> {
        let mut release = Self::default();
        for field in fields(expected, apdu)? {
            let (tag, value) = field?;
            match tag {
                0x80 => release.reason = value.last().copied(),
                0xBE => release.user_information = Some(inner(0x04, value)?.to_vec()),
                _ => {}
            }
        }
        Ok(release)
    }

    fn encode(&self, tag: u8) -> Vec<u8> {
        let mut body = Vec::new();
        if let Some(reason) = self.reason {
            write_field(0x80, &[reason], &mut body);
        }
        if let Some(value) = &self.user_information {
            write_field(0xBE, &wrapped(0x04, value), &mut body);
        }
        wrapped(tag, &body)
    }
}

/// Tag of the association request.
pub const AARQ: u8 = 0x60;
/// Tag of the association response.
pub const AARE: u8 = 0x61;
/// Tag of the release request.
pub const RLRQ: u8 = 0x62;
/// Tag of the release response.
pub const RLRE: u8 = 0x63;

type Field<'a> = Result<(u8, &'a [u8]), Error>;

fn fields(tag: u8, apdu: &[u8]) -> Result<impl Iterator<Item = Field<'_>>, Error> {
    let mut reader = Reader::new(inner(tag, apdu)?);
    Ok(std::iter::from_fn(move || {
        if reader.remaining() == 0 {
            return None;
        }
        let field = reader.u8().and_then(|tag| Ok((tag, reader.octet_string()?)));
        if field.is_err() {
            reader.take_rest();
        }
        Some(field)
    }))
}

fn inner(tag: u8, bytes: &[u8]) -> Result<&[u8], Error> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != tag {
        return Err(Error::malformed("ACSE field", "has an unexpected tag"));
    }
    let value = reader.octet_string()?;
    reader.finish()?;
    Ok(value)
}

fn small_integer(bytes: &[u8]) -> Result<u8, Error> {
    inner(0x02, bytes)?.last().copied().ok_or(Error::malformed("ACSE integer", "is empty"))
}

fn parse_context(bytes: &[u8]) -> Result<ApplicationContext, Error> {
    match inner(0x06, bytes)?.strip_prefix(&CONTEXT_NAME) {
        Some([1]) => Ok(ApplicationContext::LogicalName),
        Some([3]) => Ok(ApplicationContext::LogicalNameCiphering),
        _ => Err(Error::malformed("application context name", "is not logical name referencing")),
    }
}

fn context_name(context: ApplicationContext) -> Vec<u8> {
    let mut name = CONTEXT_NAME.to_vec();
    name.push(match context {
        ApplicationContext::LogicalName => 1,
        ApplicationContext::LogicalNameCiphering => 3,
    });
    wrapped(0x06, &name)
}

fn parse_mechanism(bytes: &[u8]) -> Result<Mechanism, Error> {
    match bytes.strip_prefix(&MECHANISM_NAME) {
        Some([id]) => Ok(Mechanism::from_id(*id)),
        _ => Err(Error::malformed("mechanism name", "is not one of DLMS")),
    }
}

fn mechanism_name(mechanism: Mechanism) -> Vec<u8> {
    let mut name = MECHANISM_NAME.to_vec();
    name.push(mechanism.id());
    name
}

fn wrapped(tag: u8, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + 6);
    write_field(tag, value, &mut out);
    out
}

fn write_field(tag: u8, value: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    write_octet_string(value, out);
}

const CONTEXT_NAME: [u8; 6] = [0x60, 0x85, 0x74, 0x05, 0x08, 0x01];
const MECHANISM_NAME: [u8; 6] = [0x60, 0x85, 0x74, 0x05, 0x08, 0x02];
const AUTHENTICATION_UNIT: [u8; 2] = [0x07, 0x80];
