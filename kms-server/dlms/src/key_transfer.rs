//! `key_transfer`, method 2 of a security setup object (class 64): brings a new key, wrapped under
//! the meter's KEK.

use kms_domain::{KeyLength, SecuritySetupId};

use crate::DlmsError;

/// One key for one `key_transfer`. Never two: a meter that refuses the second may already have
/// taken the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyTransfer {
    key_id: u8,
    wrapped: Vec<u8>,
}

impl KeyTransfer {
    /// A new key in its RFC 3394 wrap under the meter's KEK: 24 octets, or 40 for a key of 32
    /// octets. `key_id` is 0 GUEK, 1 GBEK, 2 GAK, 3 KEK, or one that the vendor has for a key of
    /// its own.
    ///
    /// # Errors
    /// The wrapped key has another length.
    pub fn new(key_id: u8, wrapped: &[u8]) -> Result<Self, DlmsError> {
        if ![KeyLength::Aes128, KeyLength::Aes256].iter().any(|length| length.wrapped_octets() == wrapped.len()) {
            return Err(DlmsError::invalid(
                "key_transfer",
                format!("a wrapped key of {} octets, not 24 or 40", wrapped.len()),
            ));
        }
        Ok(Self { key_id, wrapped: wrapped.to_vec() })
    }

    /// The method's argument: an array of one structure {enum key id, octet-string wrapped key}.
    pub fn argument(&self) -> Vec<u8> {
        // The constructor took 24 or 40 octets only.
        let length = if self.wrapped.len() == KeyLength::Aes128.wrapped_octets() { 24 } else { 40 };
        let mut argument = vec![0x01, 1, 0x02, 2, 0x16, self.key_id, 0x09, length];
        argument.extend_from_slice(&self.wrapped);
        argument
    }

    /// The plain action-request-normal that invokes the method, with the invoke-id-and-priority
    /// octet that the head-end uses.
    pub fn action_request(&self, setup: SecuritySetupId, invoke_id_and_priority: u8) -> Vec<u8> {
        let mut request = vec![0xC3, 0x01, invoke_id_and_priority];
        request.extend_from_slice(&SECURITY_SETUP.to_be_bytes());
        request.extend_from_slice(&setup.obis());
        request.extend_from_slice(&[KEY_TRANSFER, 1]);
        request.extend_from_slice(&self.argument());
        request
    }
}

const SECURITY_SETUP: u16 = 64;
const KEY_TRANSFER: u8 = 2;
