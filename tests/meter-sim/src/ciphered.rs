//! The ciphered APDUs: which tag carries which service, and under which kind of key.

use crate::axdr::{Reader, write_octet_string};
use crate::security::CipheredContent;
use crate::xdlms;
use crate::{Error, SystemTitle};

/// The form of a ciphered APDU. An answer takes the form of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CipheredForm {
    /// Service specific, global key: `glo-get-request` C8 and its like.
    Global,
    /// Service specific, dedicated key: `ded-get-request` D0 and its like.
    Dedicated,
    /// `general-glo-ciphering`, DB.
    GeneralGlobal,
    /// `general-ded-ciphering`, DC.
    GeneralDedicated,
}

impl CipheredForm {
    /// Whether the key is the association's dedicated one.
    pub const fn is_dedicated(self) -> bool {
        matches!(self, Self::Dedicated | Self::GeneralDedicated)
    }

    /// The tag of a ciphered APDU that carries an APDU with tag `plain`, if there is one.
    pub fn tag(self, plain: u8) -> Option<u8> {
        match self {
            Self::GeneralGlobal => Some(GENERAL_GLO_CIPHERING),
            Self::GeneralDedicated => Some(GENERAL_DED_CIPHERING),
            Self::Global | Self::Dedicated => SERVICES
                .iter()
                .find(|service| service.0 == plain)
                .map(|service| if self == Self::Global { service.1 } else { service.2 }),
        }
    }

    fn of_tag(tag: u8) -> Option<Self> {
        match tag {
            GENERAL_GLO_CIPHERING => Some(Self::GeneralGlobal),
            GENERAL_DED_CIPHERING => Some(Self::GeneralDedicated),
            _ if SERVICES.iter().any(|service| service.1 == tag) => Some(Self::Global),
            _ if SERVICES.iter().any(|service| service.2 == tag) => Some(Self::Dedicated),
            _ => None,
        }
    }
}

/// A ciphered APDU, not yet opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CipheredApdu {
    /// Its form.
    pub form: CipheredForm,
    /// Its tag.
    pub tag: u8,
    /// The sender, where the APDU names it: general forms only, and there the field may be empty.
    pub title: Option<SystemTitle>,
    /// The protected content.
    pub content: CipheredContent,
}

impl CipheredApdu {
    /// Whether an APDU that starts with `tag` is ciphered.
    pub fn has_tag(tag: u8) -> bool {
        CipheredForm::of_tag(tag).is_some()
    }

    /// A ciphered APDU around `content`, which protects an APDU with tag `plain`. The title is
    /// written in general forms only.
    pub fn new(form: CipheredForm, plain: u8, title: SystemTitle, content: CipheredContent) -> Result<Self, Error> {
        Ok(Self {
            form,
            tag: form.tag(plain).ok_or(Error::malformed("APDU", "has no ciphered form"))?,
            title: match form {
                CipheredForm::GeneralGlobal | CipheredForm::GeneralDedicated => Some(title),
                CipheredForm::Global | CipheredForm::Dedicated => None,
            },
            content,
        })
    }

    /// Reads a whole APDU.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        let tag = reader.u8()?;
        let form = CipheredForm::of_tag(tag).ok_or(Error::malformed("APDU", "is not ciphered"))?;
        let title = match form {
            CipheredForm::Global | CipheredForm::Dedicated => None,
            CipheredForm::GeneralGlobal | CipheredForm::GeneralDedicated => match reader.octet_string()? {
                [] => None,
                title => Some(SystemTitle::try_from(title)?),
            },
        };
        let content = CipheredContent::parse(reader.octet_string()?)?;
        reader.finish()?;
        Ok(Self { form, tag, title, content })
    }

    /// The whole APDU.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.tag];
        if matches!(self.form, CipheredForm::GeneralGlobal | CipheredForm::GeneralDedicated) {
            write_octet_string(self.title.as_ref().map_or(&[][..], |title| title.as_bytes().as_slice()), &mut out);
        }
        write_octet_string(&self.content.encode(), &mut out);
        out
    }

    /// Whether this APDU may carry an APDU with tag `plain`: a `glo-get-request` carries a GET
    /// request and nothing else, general forms carry any service.
    pub fn may_carry(&self, plain: u8) -> bool {
        self.form.tag(plain) == Some(self.tag) && SERVICES.iter().any(|service| service.0 == plain)
    }
}

/// A ciphered initiate request (21) or response (28): `tag ‖ length ‖ content`.
pub fn encode_initiate(tag: u8, content: &CipheredContent) -> Vec<u8> {
    let mut out = vec![tag];
    write_octet_string(&content.encode(), &mut out);
    out
}

/// Reads a ciphered initiate request or response with this `tag`.
pub fn parse_initiate(tag: u8, apdu: &[u8]) -> Result<CipheredContent, Error> {
    let mut reader = Reader::new(apdu);
    if reader.u8()? != tag {
        return Err(Error::malformed("user information", "is not ciphered"));
    }
    let content = CipheredContent::parse(reader.octet_string()?)?;
    reader.finish()?;
    Ok(content)
}

/// Tag of the ciphered initiate request.
pub const GLO_INITIATE_REQUEST: u8 = 0x21;
/// Tag of the ciphered initiate response.
pub const GLO_INITIATE_RESPONSE: u8 = 0x28;
/// Tag of `general-glo-ciphering`.
pub const GENERAL_GLO_CIPHERING: u8 = 0xDB;
/// Tag of `general-ded-ciphering`.
pub const GENERAL_DED_CIPHERING: u8 = 0xDC;

/// Plain tag, tag under the global key, tag under the dedicated key.
const SERVICES: [(u8, u8, u8); 6] = [
    (xdlms::GET_REQUEST, 0xC8, 0xD0),
    (xdlms::SET_REQUEST, 0xC9, 0xD1),
    (xdlms::ACTION_REQUEST, 0xCB, 0xD3),
    (xdlms::GET_RESPONSE, 0xCC, 0xD4),
    (xdlms::SET_RESPONSE, 0xCD, 0xD5),
    (xdlms::ACTION_RESPONSE, 0xCF, 0xD7),
];
