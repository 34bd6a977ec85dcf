//! Envelopes: keys wrapped for one grantee (docs/formats.md, *Envelopes*).

use cryptoki_sys::*;

use crate::agreement::{Agreement, Recipient};
use crate::error::{HsmError, concerns_all};
use crate::key_source::KeySource;
use crate::raw::Object;
use crate::template::Handling;
use crate::worker::Worker;

/// A key wrapped under the transport KEK (RFC 3394): 24 or 40 octets for AES keys, up to 264 for
/// secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey(pub Vec<u8>);

/// What the HSM made for one grantee.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The agreement, as the header has it.
    pub agreement: Agreement,
    /// The header's octets.
    pub header: Vec<u8>,
    /// The manifest's octets.
    pub manifest: Vec<u8>,
    /// HMAC-SHA-256 under the agreement's seal key of `len(header)(4) ‖ header ‖ manifest`.
    pub seal: [u8; 32],
}

impl Worker {
    /// Wraps `keys` for `recipient` and seals what `header` and `manifest` make. A key that cannot
    /// be made is an error in the list that `manifest` gets. A failing HSM is an error of the whole
    /// envelope.
    pub(crate) fn envelope(
        &self,
        recipient: &Recipient,
        keys: &[KeySource],
        header: &mut impl FnMut(&Agreement) -> Vec<u8>,
        manifest: &mut impl FnMut(&[Result<WrappedKey, HsmError>]) -> Vec<u8>,
    ) -> Result<Envelope, HsmError> {
        let agreement = self.agreements.agreement(&self.session, &self.island, recipient, keys.len())?;
        let mut wrapped = Vec::with_capacity(keys.len());
        for source in keys {
            wrapped.push(match self.wrap_for_grantee(source, agreement.transport_kek) {
                Ok(key) => Ok(WrappedKey(key)),
                Err(error) if concerns_all(&error) => return Err(error),
                Err(error) => Err(error),
            });
        }
        let (header, manifest) = (header(&agreement.public), manifest(&wrapped));
        let mut sealed = Vec::with_capacity(4 + header.len() + manifest.len());
        let header_length =
            u32::try_from(header.len()).map_err(|_| HsmError::invalid("envelope header", "it is longer than 4 GiB"))?;
        sealed.extend_from_slice(&header_length.to_be_bytes());
        sealed.extend_from_slice(&header);
        sealed.extend_from_slice(&manifest);
        let mut seal = [0; 32];
        self.mac_into(agreement.seal_key, &sealed, &mut seal)?;
        Ok(Envelope { agreement: agreement.public, header, manifest, seal })
    }

    /// HMAC-SHA-256.
    pub(crate) fn mac_into(&self, key: Object, message: &[u8], mac: &mut [u8; 32]) -> Result<(), HsmError> {
        match self.session.sign(CKM_SHA256_HMAC, key, message, mac)? {
            32 => Ok(()),
            _ => Err(HsmError::call("C_Sign", CKR_FUNCTION_FAILED)),
        }
    }

    fn wrap_for_grantee(&self, source: &KeySource, transport_kek: Object) -> Result<Vec<u8>, HsmError> {
        let (key, octets) = self.key(source, Handling::Wrap)?;
        // I1: what leaves is wrapped for one named grantee.
        self.wrap(transport_kek, key.object(), octets)
    }
}
