//! InitiateRequest (IEC 62056-5-3, xDLMS InitiateRequest): opens an association, and may contain a
//! dedicated key.

use kms_domain::KeyLength;
use zeroize::Zeroizing;

use crate::{DlmsError, reader::Reader};

/// An InitiateRequest, in the clear. Not `Debug`: it may hold a key.
///
/// I1: a dedicated key is one of the named exceptions: its own InitiateRequest must carry it, in a
/// zeroizing buffer for one call.
#[derive(Clone, PartialEq, Eq)]
pub struct InitiateRequest {
    /// The dedicated key of this association, 16 or 32 octets.
    pub dedicated_key: Option<Zeroizing<Vec<u8>>>,
    /// The proposed conformance: 24 bits.
    pub conformance: [u8; 3],
    /// The longest APDU that the client accepts, in octets; 0 for no limit.
    pub longest_apdu: u16,
}

impl InitiateRequest {
    /// The octets. Response allowed, no quality of service, DLMS version 6.
    ///
    /// # Errors
    /// The dedicated key has neither 16 nor 32 octets.
    pub fn octets(&self) -> Result<Zeroizing<Vec<u8>>, DlmsError> {
        // The capacity is the whole length, so that no growing vector leaves a copy of the key.
        let mut octets = Zeroizing::new(Vec::with_capacity(64));
        octets.push(TAG);
        match &self.dedicated_key {
            None => octets.push(0),
            Some(key) => {
                let length = dedicated_key_length(key.len())?;
                octets.extend_from_slice(&[1, if length == KeyLength::Aes128 { 16 } else { 32 }]);
                octets.extend_from_slice(key);
            }
        }
        octets.extend_from_slice(&[0, 0, DLMS_VERSION]);
        octets.extend_from_slice(&CONFORMANCE_HEADER);
        octets.extend_from_slice(&self.conformance);
        octets.extend_from_slice(&self.longest_apdu.to_be_bytes());
        Ok(octets)
    }

    /// Reads an InitiateRequest, to its last octet.
    ///
    /// # Errors
    /// The octets are not an InitiateRequest, are cut, others follow, or the DLMS version is not 6.
    pub fn parse(octets: &[u8]) -> Result<Self, DlmsError> {
        let mut reader = Reader::strict(octets);
        if reader.octet(WHAT)? != TAG {
            return Err(DlmsError::invalid(WHAT, "the tag is not 01"));
        }
        let dedicated_key = if reader.present("dedicated key")? {
            let length = reader.length("dedicated key")?;
            dedicated_key_length(length)?;
            Some(Zeroizing::new(reader.take(length, "dedicated key")?.to_vec()))
        } else {
            None
        };
        // response-allowed is DEFAULT TRUE, quality-of-service OPTIONAL: a presence octet and a
        // value each.
        for what in ["response-allowed", "quality of service"] {
            if reader.present(what)? {
                reader.octet(what)?;
            }
        }
        if reader.octet("DLMS version")? != DLMS_VERSION {
            return Err(DlmsError::invalid("DLMS version", "not 6"));
        }
        if reader.array("conformance")? != CONFORMANCE_HEADER {
            return Err(DlmsError::invalid("conformance", "not 5F 1F 04 00 and 24 bits"));
        }
        let conformance = reader.array("conformance")?;
        let longest_apdu = u16::from_be_bytes(reader.array("longest APDU")?);
        reader.end(WHAT)?;
        Ok(Self { dedicated_key, conformance, longest_apdu })
    }
}

fn dedicated_key_length(octets: usize) -> Result<KeyLength, DlmsError> {
    KeyLength::from_octets(octets).map_err(|error| DlmsError::invalid("dedicated key", error.reason()))
}

const TAG: u8 = 1;
const DLMS_VERSION: u8 = 6;
/// Tag 5F 1F, length 4, no unused bits.
const CONFORMANCE_HEADER: [u8; 4] = [0x5F, 0x1F, 4, 0];
const WHAT: &str = "InitiateRequest";
