//! DLMS frames protected and unprotected inside the HSM (IEC 62056-5-3, AES-GCM with 12-octet
//! tags).

use aws_lc_rs::constant_time::verify_slices_are_equal;
use cryptoki::error::RvError;
use zeroize::Zeroizing;

use crate::error::{HsmError, concerns_all};
use crate::key_source::KeySource;
use crate::raw::Mechanism;
use crate::template::Handling;
use crate::worker::Worker;

/// The keys of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameKeys {
    /// GUEK, GBEK or dedicated key: encrypts.
    pub encryption: KeySource,
    /// GAK: associated data.
    pub authentication: KeySource,
}

/// The protection of a frame, as its security control octet says. There is no encryption without
/// authentication: the GAK would protect nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameProtection {
    /// Authenticated only (bit 4): the text is associated data.
    Authenticated,
    /// Authenticated and encrypted (bits 4 and 5).
    AuthenticatedEncrypted,
}

/// The parameters of a frame. The caller guarantees that the nonce is used once (I4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameParameters {
    security_control: u8,
    protection: FrameProtection,
    nonce: [u8; 12],
}

impl FrameParameters {
    /// The parameters with a security control octet and a nonce, `system title(8) ‖ invocation
    /// counter(4)`.
    ///
    /// # Errors
    /// The octet does not ask for authentication.
    pub fn new(security_control: u8, nonce: [u8; 12]) -> Result<Self, HsmError> {
        let protection = match security_control & 0x30 {
            0x10 => FrameProtection::Authenticated,
            0x30 => FrameProtection::AuthenticatedEncrypted,
            _ => {
                return Err(HsmError::invalid(
                    "security control",
                    format!(
                        "`{security_control:02X}` does not ask for authentication, and frames without it are refused"
                    ),
                ));
            }
        };
        Ok(Self { security_control, protection, nonce })
    }

    /// How the frame is protected.
    pub const fn protection(&self) -> FrameProtection {
        self.protection
    }
}

/// A frame to protect.
#[derive(Clone)]
pub struct FrameInput {
    /// Its parameters.
    pub parameters: FrameParameters,
    /// The APDU in plain.
    pub plaintext: Vec<u8>,
}

/// A protected frame: what follows the invocation counter on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtectedFrame {
    /// Its parameters.
    pub parameters: FrameParameters,
    /// The ciphertext; the plaintext if the frame is authenticated only.
    pub text: Vec<u8>,
    /// The authentication tag.
    pub tag: [u8; 12],
}

impl Worker {
    /// Protects one frame.
    pub(crate) fn protect(&self, keys: &FrameKeys, frame: &FrameInput) -> Result<ProtectedFrame, HsmError> {
        let parameters = frame.parameters;
        let aad = self.associated_data(keys, parameters, &frame.plaintext)?;
        let (text, tag) = match parameters.protection {
            FrameProtection::Authenticated => (frame.plaintext.clone(), self.encrypt(keys, parameters, &aad, &[])?.1),
            FrameProtection::AuthenticatedEncrypted => self.encrypt(keys, parameters, &aad, &frame.plaintext)?,
        };
        Ok(ProtectedFrame { parameters, text, tag })
    }

    /// Opens one frame.
    pub(crate) fn unprotect(&self, keys: &FrameKeys, frame: &ProtectedFrame) -> Result<Vec<u8>, HsmError> {
        let parameters = frame.parameters;
        let aad = self.associated_data(keys, parameters, &frame.text)?;
        match parameters.protection {
            FrameProtection::Authenticated => {
                let (_, tag) = self.encrypt(keys, parameters, &aad, &[])?;
                verify_slices_are_equal(&tag, &frame.tag).map_err(|_| HsmError::TagInvalid)?;
                Ok(frame.text.clone())
            }
            FrameProtection::AuthenticatedEncrypted => self.decrypt(keys, parameters, &aad, frame),
        }
    }

    /// `SC ‖ GAK`, and the text if it is authenticated only. I1: zeroized after the call.
    fn associated_data(
        &self,
        keys: &FrameKeys,
        parameters: FrameParameters,
        text: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let gak = self.readable_gak(&keys.authentication)?;
        let text = if parameters.protection == FrameProtection::Authenticated { text } else { &[] };
        // Allocated with its whole length: a buffer that grows would leave a copy of the GAK
        // behind.
        let mut aad = Zeroizing::new(Vec::with_capacity(1 + gak.len() + text.len()));
        aad.push(parameters.security_control);
        aad.extend_from_slice(&gak);
        aad.extend_from_slice(text);
        Ok(aad)
    }

    fn encrypt(
        &self,
        keys: &FrameKeys,
        parameters: FrameParameters,
        aad: &[u8],
        plaintext: &[u8],
    ) -> Result<(Vec<u8>, [u8; 12]), HsmError> {
        let (key, _) = self.key(&keys.encryption, Handling::Encrypt)?;
        let mechanism = Mechanism::Gcm { nonce: &parameters.nonce, aad, tag_bits: TAG_BITS };
        let mut text = vec![0; plaintext.len() + ROOM];
        let written = self.session.encrypt(&mechanism, key.object(), plaintext, &mut text)?;
        text.truncate(written);
        let tag = text.split_off(plaintext.len().min(text.len()));
        match (text.len() == plaintext.len(), tag.try_into()) {
            (true, Ok(tag)) => Ok((text, tag)),
            _ => Err(HsmError::Call { function: "C_Encrypt", code: RvError::FunctionFailed }),
        }
    }

    fn decrypt(
        &self,
        keys: &FrameKeys,
        parameters: FrameParameters,
        aad: &[u8],
        frame: &ProtectedFrame,
    ) -> Result<Vec<u8>, HsmError> {
        let (key, _) = self.key(&keys.encryption, Handling::Decrypt)?;
        let mechanism = Mechanism::Gcm { nonce: &parameters.nonce, aad, tag_bits: TAG_BITS };
        let mut data = Vec::with_capacity(frame.text.len() + frame.tag.len());
        data.extend_from_slice(&frame.text);
        data.extend_from_slice(&frame.tag);
        let mut text = vec![0; data.len() + ROOM];
        match self.session.decrypt(&mechanism, key.object(), &data, &mut text) {
            Ok(written) => {
                text.truncate(written);
                Ok(text)
            }
            Err(HsmError::Call { function: "C_Decrypt", code }) if refuses_tag(code) => {
                // Some modules answer GENERAL_ERROR to a wrong tag; all modules do when they fail.
                // So make the tag of an empty text with the same key: if that works, the frame's
                // tag is wrong.
                self.encrypt_probe(keys, parameters)?;
                Err(HsmError::TagInvalid)
            }
            Err(error) => Err(error),
        }
    }

    fn encrypt_probe(&self, keys: &FrameKeys, parameters: FrameParameters) -> Result<(), HsmError> {
        // I4: the nonce is not used again for anything that leaves; the tag is dropped here.
        self.encrypt(keys, parameters, &[], &[]).map(drop)
    }
}

/// One result for each input. A failing HSM stops the batch.
pub(crate) fn each<T, R>(
    inputs: &[T],
    mut one: impl FnMut(&T) -> Result<R, HsmError>,
) -> Result<Vec<Result<R, HsmError>>, HsmError> {
    let mut results = Vec::with_capacity(inputs.len());
    for input in inputs {
        match one(input) {
            Err(error) if concerns_all(&error) => return Err(error),
            result => results.push(result),
        }
    }
    Ok(results)
}

fn refuses_tag(code: RvError) -> bool {
    matches!(
        code,
        RvError::EncryptedDataInvalid
            | RvError::EncryptedDataLenRange
            | RvError::SignatureInvalid
            | RvError::GeneralError
            | RvError::FunctionFailed
    )
}

const TAG_BITS: cryptoki_sys::CK_ULONG = 96;
/// More than a tag of any length: some modules want room for 16 octets.
const ROOM: usize = 32;
