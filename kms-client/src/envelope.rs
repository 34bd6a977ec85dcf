//! Opening envelopes (docs/formats.md, *Envelopes*). The content of an envelope is used only after
//! its seal has been verified.

use aes_kw::{KeyInit as _, KwAes256};
use aws_lc_rs::{
    agreement,
    cipher::{self, EncryptionContext},
    digest, hmac,
    iv::FixedLength,
};
use kms_domain::{GrantId, IslandName, KeyType, ParseError, PrincipalId, RequestId, UnixMillis};
use kms_proto::v1::{self as proto, EnvelopeAlgorithm};
use prost::Message as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{OpenedEnvelope, TransportKey, counters::now};

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

/// The conditions for opening a genuine envelope. The default: made for any request, algorithm 1,
/// opened now.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    at: Option<UnixMillis>,
    allow_cbc_expand: bool,
    pub(crate) request_id: Option<RequestId>,
}

impl OpenOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Compare expiry with this time and not with the machine's clock.
    #[must_use]
    pub const fn at(mut self, now: UnixMillis) -> Self {
        self.at = Some(now);
        self
    }

    /// Accept algorithm 2, `ecdh-p256-cbc-expand`, which is not for production.
    #[must_use]
    pub const fn allow_cbc_expand(mut self) -> Self {
        self.allow_cbc_expand = true;
        self
    }

    /// Accept only an answer to this request.
    #[must_use]
    pub const fn answering(mut self, request_id: RequestId) -> Self {
        self.request_id = Some(request_id);
        self
    }

    pub(crate) fn now(&self) -> UnixMillis {
        self.at.unwrap_or_else(now)
    }
}

/// The header of an envelope, parsed. It is not authentic until the seal has been verified.
#[derive(Clone, Debug)]
pub struct EnvelopeHeader {
    /// How the keys were agreed; never unspecified.
    pub algorithm: EnvelopeAlgorithm,
    /// The island that made the envelope.
    pub island: IslandName,
    /// The HSM's ephemeral public key, a P-256 point `04 ‖ x ‖ y`.
    pub ephemeral_public: [u8; 65],
    /// SHA-256 of the transport certificate that the envelope is for.
    pub transport_certificate_sha256: [u8; 32],
    /// When the agreement ends; part of the key derivation.
    pub not_after: UnixMillis,
}

impl EnvelopeHeader {
    /// The header of these octets.
    ///
    /// # Errors
    /// Not an `EnvelopeHeader`, or a field is not what docs/formats.md says.
    pub fn parse(octets: &[u8]) -> Result<Self, OpenError> {
        let refuse = |field, reason: &str| OpenError::Header { field, reason: reason.into() };
        if octets.len() > LONGEST_HEADER {
            return Err(refuse("header", "longer than 1,024 octets"));
        }
        let header =
            proto::EnvelopeHeader::decode(octets).map_err(|_| refuse("header", "not an encoded EnvelopeHeader"))?;
        let algorithm = match header.algorithm() {
            EnvelopeAlgorithm::Unspecified => return Err(refuse("algorithm", "unknown: a newer client may know it")),
            known => known,
        };
        Ok(Self {
            algorithm,
            island: IslandName::parse(&header.island).map_err(|error| refuse("island", error.reason()))?,
            ephemeral_public: <[u8; 65]>::try_from(header.ephemeral_public.as_ref())
                .ok()
                .filter(|point| point.first() == Some(&4))
                .ok_or_else(|| refuse("ephemeral_public", "not an uncompressed P-256 point of 65 octets"))?,
            transport_certificate_sha256: header
                .transport_certificate_sha256
                .as_ref()
                .try_into()
                .map_err(|_| refuse("transport_certificate_sha256", "not 32 octets"))?,
            not_after: if header.not_after_ms > 0 {
                UnixMillis(header.not_after_ms)
            } else {
                return Err(refuse("not_after_ms", "not a time after 1970"));
            },
        })
    }

    /// The key for one use, from the ECDH value.
    fn derive(&self, z: &[u8], grantee: &TransportKey, key_use: KeyUse) -> Option<Zeroizing<[u8; 32]>> {
        let shared_info = self.shared_info(grantee, key_use);
        let mut key = Zeroizing::new([0; 32]);
        if self.algorithm == EnvelopeAlgorithm::EcdhP256X963Sha256 {
            // ANSI X9.63 (SEC 1, 3.6.1), one block: the library has the hash, but no such KDF.
            let mut block = digest::Context::new(&digest::SHA256);
            block.update(z);
            block.update(&1_u32.to_be_bytes());
            block.update(shared_info.as_ref());
            key.copy_from_slice(block.finish().as_ref());
        } else {
            let cipher =
                cipher::PaddedBlockEncryptingKey::cbc_pkcs7(cipher::UnboundCipherKey::new(&cipher::AES_256, z).ok()?)
                    .ok()?;
            // Room for the block of padding that the library always adds. It is not used.
            let mut blocks = Vec::with_capacity(48);
            blocks.extend_from_slice(shared_info.as_ref());
            cipher.less_safe_encrypt(&mut blocks, EncryptionContext::Iv128(FixedLength::from([0; 16]))).ok()?;
            key.copy_from_slice(blocks.get(..32)?);
            blocks.zeroize();
        }
        Some(key)
    }

    /// `SHA-256(info)` for a use of the agreed value.
    fn shared_info(&self, grantee: &TransportKey, key_use: KeyUse) -> digest::Digest {
        let algorithm: u8 = if self.algorithm == EnvelopeAlgorithm::EcdhP256X963Sha256 { 1 } else { 2 };
        let island = self.island.as_str().as_bytes();
        let mut info = digest::Context::new(&digest::SHA256);
        info.update(b"meterkms/envelope");
        info.update(&[1, algorithm, key_use as u8]);
        info.update(&self.ephemeral_public);
        info.update(grantee.public());
        info.update(&self.transport_certificate_sha256);
        // An island's name has at most 32 octets.
        info.update(&[u8::try_from(island.len()).unwrap_or(u8::MAX)]);
        info.update(island);
        info.update(&self.not_after.0.to_be_bytes());
        info.finish()
    }
}

/// Keys that an island's HSM and a grantee share. Envelopes with the same header have the same
/// keys.
pub(crate) struct Agreement {
    transport_kek: KwAes256,
    seal_key: hmac::Key,
}

impl Agreement {
    /// Agrees with the header's ephemeral key. `None`: the key is not a point of the curve.
    pub(crate) fn derive(header: &EnvelopeHeader, grantee: &TransportKey) -> Option<Self> {
        let peer = agreement::UnparsedPublicKey::new(&agreement::ECDH_P256, header.ephemeral_public);
        let agreed = agreement::agree(&grantee.private, peer, (), |z| {
            let derive = |key_use| header.derive(z, grantee, key_use).ok_or(());
            Ok((derive(KeyUse::TransportKek)?, derive(KeyUse::SealKey)?))
        });
        let (transport_kek, seal_key) = agreed.ok()?;
        Some(Self {
            transport_kek: KwAes256::new_from_slice(transport_kek.as_slice()).ok()?,
            seal_key: hmac::Key::new(hmac::HMAC_SHA256, seal_key.as_slice()),
        })
    }

    /// Verifies the seal, in constant time.
    fn verify(&self, envelope: &proto::Envelope) -> Result<(), OpenError> {
        // A header has at most 1,024 octets here.
        let length = u32::try_from(envelope.header.len()).unwrap_or(u32::MAX).to_be_bytes();
        let mut seal = hmac::Context::with_key(&self.seal_key);
        seal.update(&length);
        seal.update(&envelope.header);
        seal.update(&envelope.manifest);
        aws_lc_rs::constant_time::verify_slices_are_equal(seal.sign().as_ref(), &envelope.seal)
            .map_err(|_| OpenError::Seal)
    }

    /// Unwraps a key of at most 256 octets (RFC 3394). `None`: the wrap is not genuine, or has an
    /// impossible length.
    pub(crate) fn unwrap(&self, wrapped: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let length = wrapped.len().checked_sub(8).filter(|length| (16..=256).contains(length))?;
        let mut key = Zeroizing::new(vec![0; length]);
        self.transport_kek.unwrap_key(wrapped, &mut key).ok()?;
        Some(key)
    }
}

/// The use of an agreed key.
#[derive(Clone, Copy)]
enum KeyUse {
    TransportKek = 1,
    SealKey = 2,
}

/// Why an envelope was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A field of the header is wrong.
    #[error("envelope header, {field}: {reason}")]
    Header {
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Algorithm 2, which the options do not allow.
    #[error(
        "envelope algorithm `ecdh-p256-cbc-expand` is not for production, and not allowed here. The HSM module of the island has no X9.63 KDF; allow this algorithm for trials only"
    )]
    AlgorithmRefused,
    /// The envelope is for another transport key of the grantee, or for another grantee.
    #[error(
        "the envelope is for the transport certificate with SHA-256 `{named}`, this one has `{own}`: use the newest transport key"
    )]
    OtherTransportKey {
        /// SHA-256 of the certificate that the header names, hex.
        named: String,
        /// This key's certificate, hex.
        own: String,
    },
    /// Expired.
    #[error("the envelope expired at {} ms, now is {} ms (Unix time): ask again with a new request id, and check the clock of this machine", .not_after.0, .now.0)]
    Expired {
        /// The expiry.
        not_after: UnixMillis,
        /// The time that it was compared with.
        now: UnixMillis,
    },
    /// The ephemeral key is no point of the curve.
    #[error("envelope header, ephemeral_public: not a point of P-256")]
    Agreement,
    /// The seal does not verify.
    #[error(
        "the seal of the envelope does not verify: the header or manifest was changed, or the envelope was made for another key; none of its keys was used"
    )]
    Seal,
    /// The manifest is genuine, but its content is wrong.
    #[error("envelope manifest: {reason}")]
    Manifest {
        /// What is wrong.
        reason: String,
    },
    /// Made for another principal.
    #[error("the envelope is for `{named}`, but this transport key belongs to `{own}`: use the profile of `{named}`")]
    OtherPrincipal {
        /// The principal that the manifest names.
        named: PrincipalId,
        /// The principal that the transport certificate names.
        own: PrincipalId,
    },
    /// An answer to another request.
    #[error("the envelope of grant {grant_id} answers request {named}, not this one: ask again with a new request id")]
    OtherRequest {
        /// The request that the manifest names.
        named: RequestId,
        /// The grant.
        grant_id: GrantId,
    },
    /// A wrapped key does not open.
    #[error(
        "{owner}, {key_type}: the wrapped key does not open, or has the wrong length; report this to the operator of the server"
    )]
    Unwrap {
        /// The meter or group.
        owner: String,
        /// The key type.
        key_type: KeyType,
    },
}

impl OpenError {
    pub(crate) fn manifest(reason: impl Into<String>) -> Self {
        Self::Manifest { reason: reason.into() }
    }
}

impl From<ParseError> for OpenError {
    /// Only the manifest is parsed by types of the domain.
    fn from(error: ParseError) -> Self {
        Self::manifest(error.to_string())
    }
}

const LONGEST_HEADER: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(header.derive(&z, &key, KeyUse::TransportKek).unwrap().as_slice(), octets("transport_kek"));
            assert_eq!(header.derive(&z, &key, KeyUse::SealKey).unwrap().as_slice(), octets("seal_key"));
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
