//! Ciphered APDUs: service-specific global and dedicated ones, general-glo and general-ded (IEC
//! 62056-5-3, ciphered APDUs).

use kms_domain::SystemTitle;

use crate::{
    AuthenticationTag, DlmsError, SecurityControl,
    reader::{Reader, write_length},
};

/// The longest APDU that is read, in octets.
pub const LONGEST_APDU: usize = 65_535;

/// The kind of a ciphered APDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CipheredTag {
    /// A service-specific APDU under the global keys: 21, 28, C8 to CF. It carries the tag of its
    /// plain APDU.
    Global {
        /// The tag of the plain APDU inside.
        plain: u8,
    },
    /// A service-specific APDU under the dedicated key: D0 to D7.
    Dedicated {
        /// The tag of the plain APDU inside.
        plain: u8,
    },
    /// general-glo-ciphering, DB: carries the sender's system title.
    GeneralGlobal,
    /// general-ded-ciphering, DC: carries the sender's system title.
    GeneralDedicated,
}

impl CipheredTag {
    /// The service-specific global APDU for a plain APDU of this tag; `None` where there is none.
    pub fn global_for(plain: u8) -> Option<Self> {
        PAIRS.iter().any(|(known, ..)| *known == plain).then_some(Self::Global { plain })
    }

    /// The service-specific dedicated APDU for a plain APDU of this tag; `None` where there is
    /// none.
    pub fn dedicated_for(plain: u8) -> Option<Self> {
        PAIRS
            .iter()
            .any(|(known, _, dedicated)| *known == plain && dedicated.is_some())
            .then_some(Self::Dedicated { plain })
    }

    /// Whether the dedicated key protects it.
    pub const fn is_dedicated(self) -> bool {
        matches!(self, Self::Dedicated { .. } | Self::GeneralDedicated)
    }

    /// Whether it carries the sender's system title.
    pub const fn is_general(self) -> bool {
        matches!(self, Self::GeneralGlobal | Self::GeneralDedicated)
    }

    /// Whether this plain APDU may be inside: a service-specific tag permits one kind only.
    pub fn fits(self, plain_apdu: &[u8]) -> bool {
        match self {
            Self::Global { plain } | Self::Dedicated { plain } => plain_apdu.first() == Some(&plain),
            Self::GeneralGlobal | Self::GeneralDedicated => true,
        }
    }

    /// The tag's octet.
    pub fn octet(self) -> u8 {
        let pair = |plain| PAIRS.iter().find(|(known, ..)| *known == plain);
        match self {
            Self::Global { plain } => pair(plain).map_or(0, |(_, global, _)| *global),
            Self::Dedicated { plain } => pair(plain).and_then(|(.., dedicated)| *dedicated).unwrap_or_default(),
            Self::GeneralGlobal => 0xDB,
            Self::GeneralDedicated => 0xDC,
        }
    }

    fn from_octet(octet: u8) -> Result<Self, DlmsError> {
        match octet {
            0xDB => return Ok(Self::GeneralGlobal),
            0xDC => return Ok(Self::GeneralDedicated),
            _ => {}
        }
        PAIRS
            .iter()
            .find_map(|(plain, global, dedicated)| {
                if *global == octet {
                    Some(Self::Global { plain: *plain })
                } else if *dedicated == Some(octet) {
                    Some(Self::Dedicated { plain: *plain })
                } else {
                    None
                }
            })
            .ok_or_else(|| {
                DlmsError::invalid(
                    "ciphered APDU",
                    format!("tag {octet:#04X} is not a glo-, ded-, general-glo- or general-ded-APDU"),
                )
            })
    }
}

/// A ciphered APDU: `tag ‖ [len ‖ system title] ‖ len ‖ SC ‖ IC(4) ‖ content ‖ authentication
/// tag(12)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipheredApdu<'a> {
    /// Which kind.
    pub tag: CipheredTag,
    /// The sender's system title, in general APDUs that carry it; an empty one means that of the
    /// association.
    pub system_title: Option<SystemTitle>,
    /// How it is protected.
    pub control: SecurityControl,
    /// The invocation counter.
    pub counter: u32,
    /// The ciphertext, or the plain APDU if it is only authenticated.
    pub content: &'a [u8],
    /// The authentication tag.
    pub authentication_tag: AuthenticationTag,
}

impl<'a> CipheredApdu<'a> {
    /// Reads a ciphered APDU, to its last octet.
    ///
    /// # Errors
    /// The octets are not a ciphered APDU, are cut, others follow, or they are not authenticated.
    pub fn parse(octets: &'a [u8]) -> Result<Self, DlmsError> {
        if octets.len() > LONGEST_APDU {
            return Err(DlmsError::invalid(WHAT, format!("{} octets, more than {LONGEST_APDU}", octets.len())));
        }
        let mut reader = Reader::new(octets);
        let tag = CipheredTag::from_octet(reader.octet(WHAT)?)?;
        let system_title = if tag.is_general() { read_title(&mut reader)? } else { None };
        let length = reader.length(WHAT)?;
        let mut body = Reader::new(reader.take(length, WHAT)?);
        reader.end(WHAT)?;
        let control = SecurityControl::from_octet(body.octet(WHAT)?)?;
        let counter = u32::from_be_bytes(body.array(WHAT)?);
        let (content, authentication_tag) =
            body.rest().split_last_chunk().ok_or(DlmsError::Short { what: "authentication tag" })?;
        Ok(Self {
            tag,
            system_title,
            control,
            counter,
            content,
            authentication_tag: AuthenticationTag(*authentication_tag),
        })
    }

    /// The octets.
    ///
    /// # Errors
    /// Longer than [`LONGEST_APDU`], or a system title in an APDU that carries none.
    pub fn octets(&self) -> Result<Vec<u8>, DlmsError> {
        let length = 1 + 4 + self.content.len() + 12;
        let mut octets = Vec::with_capacity(length + 13);
        octets.push(self.tag.octet());
        match (self.tag.is_general(), self.system_title) {
            (true, Some(title)) => {
                octets.push(8);
                octets.extend_from_slice(&title.octets());
            }
            (true, None) => octets.push(0),
            (false, None) => {}
            (false, Some(_)) => {
                return Err(DlmsError::invalid(WHAT, "only general-glo and general-ded APDUs carry a system title"));
            }
        }
        write_length(&mut octets, length, WHAT)?;
        octets.push(self.control.octet());
        octets.extend_from_slice(&self.counter.to_be_bytes());
        octets.extend_from_slice(self.content);
        octets.extend_from_slice(&self.authentication_tag.0);
        if octets.len() > LONGEST_APDU {
            return Err(DlmsError::invalid(WHAT, format!("{} octets, more than {LONGEST_APDU}", octets.len())));
        }
        Ok(octets)
    }
}

fn read_title(reader: &mut Reader<'_>) -> Result<Option<SystemTitle>, DlmsError> {
    match reader.length("system title")? {
        0 => Ok(None),
        8 => SystemTitle::from_octets(&reader.array::<8>("system title")?)
            .map(Some)
            .map_err(|error| DlmsError::invalid("system title", error.reason())),
        other => Err(DlmsError::invalid("system title", format!("{other} octets instead of 8 or none"))),
    }
}

const WHAT: &str = "ciphered APDU";

/// Tags: plain, global, dedicated. InitiateRequest and InitiateResponse have no dedicated form,
/// because the dedicated key comes with them.
const PAIRS: [(u8, u8, Option<u8>); 9] = [
    (0x01, 0x21, None),
    (0x08, 0x28, None),
    (0xC0, 0xC8, Some(0xD0)),
    (0xC1, 0xC9, Some(0xD1)),
    (0xC2, 0xCA, Some(0xD2)),
    (0xC3, 0xCB, Some(0xD3)),
    (0xC4, 0xCC, Some(0xD4)),
    (0xC5, 0xCD, Some(0xD5)),
    (0xC7, 0xCF, Some(0xD7)),
];
