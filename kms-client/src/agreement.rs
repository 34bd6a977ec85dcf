//! The header of an envelope, and the keys that follow from it (docs/formats.md, *Envelopes*).

use aes_kw::{KeyInit as _, KwAes256};
use aws_lc_rs::{
    agreement::{self, PrivateKey},
    cipher::{self, EncryptionContext},
    digest, hmac,
    iv::FixedLength,
};
use kms_domain::{IslandName, UnixMillis};
use kms_proto::v1::{self as proto, EnvelopeAlgorithm};
use prost::Message as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::opening::OpenError;

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

    /// The key for one use, from the ECDH value and the public key of the grantee.
    pub(crate) fn derive(&self, z: &[u8], grantee: &[u8; 65], key_use: KeyUse) -> Option<Zeroizing<[u8; 32]>> {
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
    fn shared_info(&self, grantee: &[u8; 65], key_use: KeyUse) -> digest::Digest {
        let algorithm: u8 = if self.algorithm == EnvelopeAlgorithm::EcdhP256X963Sha256 { 1 } else { 2 };
        let island = self.island.as_str().as_bytes();
        let mut info = digest::Context::new(&digest::SHA256);
        info.update(b"meterkms/envelope");
        info.update(&[1, algorithm, key_use as u8]);
        info.update(&self.ephemeral_public);
        info.update(grantee);
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
    /// Agrees with the header's ephemeral key, with the `private` key of the grantee and its
    /// `public` key. `None`: the ephemeral key is not a point of the curve.
    pub(crate) fn derive(header: &EnvelopeHeader, private: &PrivateKey, public: &[u8; 65]) -> Option<Self> {
        let peer = agreement::UnparsedPublicKey::new(&agreement::ECDH_P256, header.ephemeral_public);
        let agreed = agreement::agree(private, peer, (), |z| {
            let derive = |key_use| header.derive(z, public, key_use).ok_or(());
            Ok((derive(KeyUse::TransportKek)?, derive(KeyUse::SealKey)?))
        });
        let (transport_kek, seal_key) = agreed.ok()?;
        Some(Self {
            transport_kek: KwAes256::new_from_slice(transport_kek.as_slice()).ok()?,
            seal_key: hmac::Key::new(hmac::HMAC_SHA256, seal_key.as_slice()),
        })
    }

    /// Verifies the seal, in constant time.
    pub(crate) fn verify(&self, envelope: &proto::Envelope) -> Result<(), OpenError> {
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
pub(crate) enum KeyUse {
    TransportKek = 1,
    SealKey = 2,
}

const LONGEST_HEADER: usize = 1024;
