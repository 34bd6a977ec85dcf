//! InitiateResponse and ConfirmedServiceError (IEC 62056-5-3): how a meter answers an
//! InitiateRequest.

use std::fmt;

use crate::{DlmsError, reader::Reader};

/// An InitiateResponse, in the clear: `08 ‖ [quality of service] ‖ version 6 ‖ conformance ‖
/// longest APDU(2) ‖ VAA name(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InitiateResponse {
    /// The negotiated conformance: 24 bits.
    pub conformance: [u8; 3],
    /// The longest APDU that the meter takes, in octets; 0 for no limit.
    pub longest_apdu: u16,
    /// The VAA name: 0007 under logical name referencing, the base name of the association object
    /// (FA00) under short name referencing.
    pub vaa_name: u16,
}

impl InitiateResponse {
    /// Reads an InitiateResponse, to its last octet.
    ///
    /// # Errors
    /// The octets are not an InitiateResponse, are cut, others follow, or the DLMS version is not
    /// 6.
    pub fn parse(octets: &[u8]) -> Result<Self, DlmsError> {
        const WHAT: &str = "InitiateResponse";
        let mut reader = Reader::new(octets);
        if reader.octet(WHAT)? != INITIATE_RESPONSE {
            return Err(DlmsError::invalid(WHAT, "the tag is not 08"));
        }
        if reader.present("quality of service")? {
            reader.octet("quality of service")?;
        }
        if reader.octet("DLMS version")? != DLMS_VERSION {
            return Err(DlmsError::invalid("DLMS version", "not 6"));
        }
        let conformance = conformance(&mut reader)?;
        let longest_apdu = u16::from_be_bytes(reader.array("longest APDU")?);
        let vaa_name = u16::from_be_bytes(reader.array("VAA name")?);
        reader.end(WHAT)?;
        Ok(Self { conformance, longest_apdu, vaa_name })
    }
}

/// `[APPLICATION 31] BIT STRING (SIZE(24))`. The tag is 5F 1F; older meters send 5F alone, which
/// the Green Book tolerates.
fn conformance(reader: &mut Reader<'_>) -> Result<[u8; 3], DlmsError> {
    const WHAT: &str = "conformance";
    let header = match reader.array(WHAT)? {
        [0x5F, 0x1F] => reader.array(WHAT)?,
        [0x5F, length] => [length, reader.octet(WHAT)?],
        _ => [0, 0],
    };
    if header != CONFORMANCE_LENGTH {
        return Err(DlmsError::invalid(WHAT, "not 5F 1F 04 00 and 24 bits"));
    }
    reader.array(WHAT)
}

/// A ConfirmedServiceError: `0E ‖ service ‖ category ‖ error`. In an AARE it stands in place of the
/// InitiateResponse when the meter does not take the proposed context. It is in the clear: it
/// proves nothing (I3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConfirmedServiceError {
    /// The service that failed: 1 initiate, 5 read, 6 write.
    pub service: u8,
    /// The choice of ServiceError, 0 to 10: 0 application-reference, 6 initiate.
    pub category: u8,
    /// The error within its category. For initiate: 0 other, 1 dlms-version-too-low, 2
    /// incompatible-conformance, 3 pdu-size-too-short, 4 refused-by-the-VDE-handler.
    pub error: u8,
}

impl ConfirmedServiceError {
    /// Whether octets begin like a ConfirmedServiceError.
    pub fn recognise(octets: &[u8]) -> bool {
        octets.first() == Some(&CONFIRMED_SERVICE_ERROR)
    }

    /// Reads a ConfirmedServiceError, to its last octet.
    ///
    /// # Errors
    /// The octets are not a ConfirmedServiceError, are cut, others follow, or the service or
    /// category is unknown.
    pub fn parse(octets: &[u8]) -> Result<Self, DlmsError> {
        const WHAT: &str = "ConfirmedServiceError";
        let mut reader = Reader::new(octets);
        let [tag, service, category, error] = reader.array(WHAT)?;
        if tag != CONFIRMED_SERVICE_ERROR {
            return Err(DlmsError::invalid(WHAT, "the tag is not 0E"));
        }
        if !matches!(service, 1 | 5 | 6) {
            return Err(DlmsError::invalid(WHAT, format!("service {service} is unknown")));
        }
        if category > LAST_CATEGORY {
            return Err(DlmsError::invalid(WHAT, format!("category {category} is unknown")));
        }
        reader.end(WHAT)?;
        Ok(Self { service, category, error })
    }
}

impl fmt::Display for ConfirmedServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "confirmed service error {:02X} {:02X} {:02X}", self.service, self.category, self.error)
    }
}

pub(crate) const INITIATE_RESPONSE: u8 = 0x08;
const CONFIRMED_SERVICE_ERROR: u8 = 0x0E;
const DLMS_VERSION: u8 = 6;
/// 4 octets, no unused bits.
const CONFORMANCE_LENGTH: [u8; 2] = [4, 0];
const LAST_CATEGORY: u8 = 10;
