//! Agreements with grantees: an ephemeral P-256 key of the HSM and the grantee's transport key give
//! a transport KEK and a seal key (docs/formats.md, *Envelopes*). A session keeps agreements alive,
//! so that envelopes for one grantee share them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use cryptoki_sys::*;
use kms_domain::IslandName;

use crate::error::HsmError;
use crate::public_key::{P256_OID, public_point};
use crate::raw::{Mechanism, Object, Session, Temporary};
use crate::template::Template;

/// A grantee's certified transport key, and the time until which keys that are wrapped for it may
/// be used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Recipient {
    public_point: [u8; 65],
    transport_certificate_sha256: [u8; 32],
    expiry: u64,
}

impl Recipient {
    /// The holder of the P-256 transport key `public_point` (65 octets, `04 ‖ x ‖ y`), whose
    /// certificate has this SHA-256 digest (of the DER), until `expiry` (Unix milliseconds). The
    /// expiry is part of the key derivation: round it, so that grants made together share one
    /// agreement.
    ///
    /// # Errors
    /// The point is not 65 octets long or not on the curve.
    pub fn new(public_point: &[u8], transport_certificate_sha256: [u8; 32], expiry: u64) -> Result<Self, HsmError> {
        let refuse =
            || HsmError::invalid("transport key", "it is not an uncompressed point of P-256 (65 octets, 04, x, y)");
        let point = public_point.try_into().map_err(|_| refuse())?;
        ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_point).map_err(|_| refuse())?;
        Ok(Self { public_point: point, transport_certificate_sha256, expiry })
    }

    /// The transport key, `04 ‖ x ‖ y`.
    pub const fn public_point(&self) -> &[u8; 65] {
        &self.public_point
    }

    /// SHA-256 of the transport certificate's DER.
    pub const fn transport_certificate_sha256(&self) -> &[u8; 32] {
        &self.transport_certificate_sha256
    }

    /// Unix milliseconds.
    pub const fn expiry(&self) -> u64 {
        self.expiry
    }
}

/// How the transport KEK and the seal key come from the ECDH value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EnvelopeAlgorithm {
    /// `ecdh-p256-x963-sha256`: ANSI X9.63 KDF with SHA-256 (CKD_SHA256_KDF).
    X963Sha256,
    /// `ecdh-p256-cbc-expand`: for modules that only have CKD_NULL; not for production.
    CbcExpand,
}

impl EnvelopeAlgorithm {
    /// The number in headers and in the derivation: 1 or 2.
    pub const fn number(self) -> u8 {
        match self {
            Self::X963Sha256 => 1,
            Self::CbcExpand => 2,
        }
    }

    /// The name in docs/formats.md.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X963Sha256 => "ecdh-p256-x963-sha256",
            Self::CbcExpand => "ecdh-p256-cbc-expand",
        }
    }
}

impl fmt::Display for EnvelopeAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The public side of an agreement: what the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// How keys are derived.
    pub algorithm: EnvelopeAlgorithm,
    /// The HSM's ephemeral P-256 key, `04 ‖ x ‖ y`.
    pub ephemeral_public: [u8; 65],
}

/// The limits for the reuse of an agreement, per session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgreementLimits {
    /// An older agreement is not used.
    pub age: Duration,
    /// Keys that one agreement wraps at most. A larger batch has an agreement of its own.
    pub keys: usize,
    /// Live agreements in a session at most. The oldest is destroyed first.
    pub live: usize,
}

impl Default for AgreementLimits {
    fn default() -> Self {
        Self { age: Duration::from_secs(60), keys: 100_000, live: 64 }
    }
}

/// The live agreements of one session.
pub(crate) struct AgreementCache {
    limits: AgreementLimits,
    algorithm: Option<EnvelopeAlgorithm>,
    live: RefCell<HashMap<Recipient, LiveAgreement>>,
}

/// An agreement whose keys are session objects.
#[derive(Clone, Copy)]
pub(crate) struct LiveAgreement {
    pub(crate) public: Agreement,
    pub(crate) transport_kek: Object,
    pub(crate) seal_key: Object,
    made: Instant,
    keys: usize,
}

impl AgreementCache {
    /// `algorithm` is what the module can and the configuration permits, if anything.
    pub(crate) fn new(limits: AgreementLimits, algorithm: Option<EnvelopeAlgorithm>) -> Self {
        Self { limits, algorithm, live: RefCell::default() }
    }

    /// Destroys agreements that may not be used any more.
    pub(crate) fn tidy(&self, session: &Session) {
        self.live.borrow_mut().retain(|_, agreement| {
            let usable = agreement.made.elapsed() < self.limits.age;
            if !usable {
                agreement.destroy(session);
            }
            usable
        });
    }

    /// The agreement with `recipient` for `keys` more keys: a live one, or a new one.
    pub(crate) fn agreement(
        &self,
        session: &Session,
        island: &IslandName,
        recipient: &Recipient,
        keys: usize,
    ) -> Result<LiveAgreement, HsmError> {
        let limits = self.limits;
        let mut live = self.live.borrow_mut();
        if let Some(agreement) = live.get_mut(recipient) {
            if agreement.made.elapsed() < limits.age && agreement.keys.saturating_add(keys) <= limits.keys {
                agreement.keys += keys;
                return Ok(*agreement);
            }
            agreement.destroy(session);
            live.remove(recipient);
        }
        while live.len() >= limits.live.max(1) {
            let oldest =
                live.iter().min_by_key(|(_, agreement)| agreement.made).map(|(recipient, _)| recipient.clone());
            let Some(agreement) = oldest.and_then(|oldest| live.remove(&oldest)) else { break };
            agreement.destroy(session);
        }
        let agreement = self.agree(session, island, recipient, keys)?;
        live.insert(recipient.clone(), agreement);
        Ok(agreement)
    }

    fn agree(
        &self,
        session: &Session,
        island: &IslandName,
        recipient: &Recipient,
        keys: usize,
    ) -> Result<LiveAgreement, HsmError> {
        let algorithm = self.algorithm.ok_or(HsmError::Unsupported {
            what: "ECDH with the X9.63 KDF (CKD_SHA256_KDF)",
            instead: "permit the algorithm `ecdh-p256-cbc-expand` (not for production), or use another module",
        })?;
        let (ephemeral, ephemeral_public) = generate_ephemeral(session)?;
        let derive = |usage: KeyUse| {
            let shared = shared_info(algorithm, usage, &ephemeral_public, recipient, island);
            let octets = 32 as CK_ULONG;
            let template = match usage {
                KeyUse::TransportKek => Template::session_secret(&CKK_AES).usage(&[CKA_WRAP]),
                KeyUse::SealKey => Template::session_secret(&CKK_GENERIC_SECRET).usage(&[CKA_SIGN]),
            };
            let template = template.sensitive(false).number(CKA_VALUE_LEN, &octets);
            match algorithm {
                EnvelopeAlgorithm::X963Sha256 => {
                    let mechanism =
                        Mechanism::Ecdh { kdf: CKD_SHA256_KDF, shared: &shared, public: &recipient.public_point };
                    session.derive(&mechanism, ephemeral.object(), template.as_slice())
                }
                EnvelopeAlgorithm::CbcExpand => {
                    let z_template = Template::session_secret(&CKK_AES)
                        .sensitive(false)
                        .usage(&[CKA_DERIVE])
                        .number(CKA_VALUE_LEN, &octets);
                    let mechanism = Mechanism::Ecdh { kdf: CKD_NULL, shared: &[], public: &recipient.public_point };
                    let z =
                        Temporary::new(session, session.derive(&mechanism, ephemeral.object(), z_template.as_slice())?);
                    session.derive(&Mechanism::CbcEncryptData { data: &shared }, z.object(), template.as_slice())
                }
            }
        };
        let transport_kek = Temporary::new(session, derive(KeyUse::TransportKek)?);
        let seal_key = Temporary::new(session, derive(KeyUse::SealKey)?);
        Ok(LiveAgreement {
            public: Agreement { algorithm, ephemeral_public },
            transport_kek: transport_kek.keep(),
            seal_key: seal_key.keep(),
            made: Instant::now(),
            keys,
        })
    }
}

impl LiveAgreement {
    fn destroy(&self, session: &Session) {
        drop(Temporary::new(session, self.transport_kek));
        drop(Temporary::new(session, self.seal_key));
    }
}

/// The use of a key of an agreement. The number is part of the key's derivation.
#[derive(Clone, Copy)]
enum KeyUse {
    TransportKek = 1,
    SealKey = 2,
}

/// A P-256 key pair for one agreement: the private key as a session object, the public point. The
/// public object is destroyed.
pub(crate) fn generate_ephemeral(session: &Session) -> Result<(Temporary<'_>, [u8; 65]), HsmError> {
    let public = Template::empty().flag(CKA_TOKEN, false).octets(CKA_EC_PARAMS, P256_OID);
    let private = Template::empty().flag(CKA_TOKEN, false).sensitive(false).private_usage(&[CKA_DERIVE]);
    let (public, private) = session.generate_pair(CKM_EC_KEY_PAIR_GEN, public.as_slice(), private.as_slice())?;
    let (public, private) = (Temporary::new(session, public), Temporary::new(session, private));
    let point = public_point(session, public.object())?;
    Ok((private, point))
}

fn shared_info(
    algorithm: EnvelopeAlgorithm,
    usage: KeyUse,
    ephemeral_public: &[u8; 65],
    recipient: &Recipient,
    island: &IslandName,
) -> [u8; 32] {
    let island = island.as_str().as_bytes();
    let mut info = Vec::with_capacity(256);
    info.extend_from_slice(b"meterkms/envelope");
    info.extend_from_slice(&[1, algorithm.number(), usage as u8]);
    info.extend_from_slice(ephemeral_public);
    info.extend_from_slice(&recipient.public_point);
    info.extend_from_slice(&recipient.transport_certificate_sha256);
    // An island's name has at most 32 octets.
    info.push(u8::try_from(island.len()).unwrap_or(u8::MAX));
    info.extend_from_slice(island);
    info.extend_from_slice(&recipient.expiry.to_be_bytes());
    let mut shared = [0; 32];
    shared.iter_mut().zip(digest(&SHA256, &info).as_ref()).for_each(|(place, octet)| *place = *octet);
    shared
}
