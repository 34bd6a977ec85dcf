//! Opening envelopes (docs/formats.md, *Envelopes*). The content of an envelope is used only after
//! its seal has been verified.

use kms_proto::v1::{self as proto, EnvelopeAlgorithm};

use crate::{
    agreement::EnvelopeHeader,
    manifest::OpenedEnvelope,
    opening::{OpenError, OpenOptions},
    transport_key::TransportKey,
};

impl TransportKey {
    /// Opens an envelope that was made for this key.
    ///
    /// # Errors
    /// The envelope is for another key, principal or request; has expired; uses an algorithm that
    /// `options` do not allow; differs from docs/formats.md; or was changed on its way.
    pub fn open(&self, envelope: &proto::Envelope, options: &OpenOptions) -> Result<OpenedEnvelope, OpenError> {
        let header = EnvelopeHeader::parse(&envelope.header)?;
        if header.algorithm == EnvelopeAlgorithm::EcdhP256CbcExpand && !options.allow_cbc_expand {
            return Err(OpenError::AlgorithmRefused);
        }
        if header.transport_certificate_sha256 != self.certificate_sha256() {
            return Err(OpenError::OtherTransportKey {
                named: hex::encode(header.transport_certificate_sha256),
                own: hex::encode(self.certificate_sha256()),
            });
        }
        if header.island != *self.principal().island() {
            return Err(OpenError::Header {
                field: "island",
                reason: format!(
                    "`{}`, but the transport certificate is of `{}`",
                    header.island,
                    self.principal().island()
                ),
            });
        }
        let now = options.now();
        if now >= header.not_after {
            return Err(OpenError::Expired { not_after: header.not_after, now });
        }
        let agreement = self.agreement(&header, &envelope.header).ok_or(OpenError::Agreement)?;
        agreement.verify(envelope)?;
        OpenedEnvelope::parse(&header, &envelope.manifest, &agreement, self.principal(), options)
    }

    /// Opens all envelopes of one answer, and joins the keys of the same meter. Each HSM token
    /// makes an envelope of its own.
    ///
    /// # Errors
    /// As [`Self::open`]; or there is no envelope, or they are not of one grant.
    pub fn open_all(&self, envelopes: &[proto::Envelope], options: &OpenOptions) -> Result<OpenedEnvelope, OpenError> {
        let mut opened = envelopes.iter().map(|envelope| self.open(envelope, options));
        let mut all = opened.next().ok_or_else(|| OpenError::manifest("the answer has no envelope"))??;
        for next in opened {
            all.join(next?)?;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use kms_domain::{PrincipalId, UnixMillis};
    use prost::Message as _;
    use zeroize::Zeroizing;

    use super::*;
    use crate::agreement::KeyUse;

    #[test]
    fn the_vectors_of_the_formats_open() {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/vectors.json")).unwrap();
        let vectors: serde_json::Value = serde_json::from_str(&text).unwrap();
        let vectors = vectors["envelopes"].as_array().unwrap();
        assert_eq!(vectors.len(), 2);
        for vector in vectors {
            let octets = |name: &str| hex::decode(vector[name].as_str().unwrap()).unwrap();
            let header = EnvelopeHeader::parse(&octets("header")).unwrap();
            let manifest = proto::Manifest::decode(octets("manifest").as_slice()).unwrap();
            let key = TransportKey::with_digest(
                &octets("grantee_private_pkcs8"),
                header.transport_certificate_sha256,
                PrincipalId::parse(&manifest.principal).unwrap(),
            );
            let z = octets("ecdh_z");
            assert_eq!(
                header.derive(&z, key.public(), KeyUse::TransportKek).unwrap().as_slice(),
                octets("transport_kek")
            );
            assert_eq!(header.derive(&z, key.public(), KeyUse::SealKey).unwrap().as_slice(), octets("seal_key"));
            let envelope = proto::Envelope::decode(octets("envelope").as_slice()).unwrap();
            let options = OpenOptions::new().at(UnixMillis(manifest.issued_ms)).allow_cbc_expand();
            let opened = key.open(&envelope, &options).unwrap();
            let expected = vector["keys"].as_array().unwrap();
            let keys: Vec<_> = opened.meters.iter().flat_map(|meter| &meter.keys).collect();
            assert_eq!(keys.len(), expected.len());
            for (opened, expected) in keys.iter().zip(expected) {
                let key = hex::decode(expected["key"].as_str().unwrap()).unwrap();
                assert_eq!(opened.key_type.to_string(), expected["type"].as_str().unwrap());
                // Secrets stand in their encoding there.
                let key = if opened.key_type.is_aes() { key } else { EncodedSecretOctets(key).secret() };
                assert_eq!(opened.key.expose(), key);
            }
        }
    }

    struct EncodedSecretOctets(Vec<u8>);

    impl EncodedSecretOctets {
        fn secret(self) -> Vec<u8> {
            kms_domain::EncodedSecret::from_octets(Zeroizing::new(self.0)).unwrap().secret().to_vec()
        }
    }
}
