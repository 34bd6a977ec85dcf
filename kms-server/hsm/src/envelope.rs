//! Envelopes: keys wrapped for one grantee (docs/formats.md, *Envelopes*).

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use cryptoki_sys::*;
use kms_domain::IslandName;

use crate::error::HsmError;
use crate::raw::{Mechanism, Object, Session, Temporary};
use crate::template::{Handling, Template};
use crate::worker::{KeySource, Worker};

/// A grantee's certified transport key, and until when what is wrapped for it may be used.
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

/// How long an agreement is reused, per session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgreementLimits {
    /// No use after this time.
    pub age: Duration,
    /// No more than this many wrapped keys; a larger batch has an agreement of its own.
    pub keys: usize,
    /// Live agreements a session; the oldest is destroyed first.
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

#[derive(Clone, Copy)]
struct LiveAgreement {
    public: Agreement,
    transport_kek: Object,
    seal_key: Object,
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
}

impl LiveAgreement {
    fn destroy(&self, session: &Session) {
        drop(Temporary::new(session, self.transport_kek));
        drop(Temporary::new(session, self.seal_key));
    }
}

impl Worker {
    /// Wraps `keys` for `recipient` and seals what `header` and `manifest` make. A key that cannot
    /// be had is an error of its own in what `manifest` is given; trouble of the HSM is an error of
    /// the whole.
    pub(crate) fn envelope(
        &self,
        recipient: &Recipient,
        keys: &[KeySource],
        header: &mut impl FnMut(&Agreement) -> Vec<u8>,
        manifest: &mut impl FnMut(&[Result<WrappedKey, HsmError>]) -> Vec<u8>,
    ) -> Result<Envelope, HsmError> {
        let agreement = self.agreement(recipient, keys.len())?;
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

    fn agreement(&self, recipient: &Recipient, keys: usize) -> Result<LiveAgreement, HsmError> {
        let limits = self.agreements.limits;
        let mut live = self.agreements.live.borrow_mut();
        if let Some(agreement) = live.get_mut(recipient) {
            if agreement.made.elapsed() < limits.age && agreement.keys.saturating_add(keys) <= limits.keys {
                agreement.keys += keys;
                return Ok(*agreement);
            }
            agreement.destroy(&self.session);
            live.remove(recipient);
        }
        while live.len() >= limits.live.max(1) {
            let oldest =
                live.iter().min_by_key(|(_, agreement)| agreement.made).map(|(recipient, _)| recipient.clone());
            let Some(agreement) = oldest.and_then(|oldest| live.remove(&oldest)) else { break };
            agreement.destroy(&self.session);
        }
        let agreement = self.agree(recipient, keys)?;
        live.insert(recipient.clone(), agreement);
        Ok(agreement)
    }

    fn agree(&self, recipient: &Recipient, keys: usize) -> Result<LiveAgreement, HsmError> {
        let algorithm = self.agreements.algorithm.ok_or(HsmError::Unsupported {
            what: "ECDH with the X9.63 KDF (CKD_SHA256_KDF)",
            instead: "permit the algorithm `ecdh-p256-cbc-expand` (not for production), or use another module",
        })?;
        let (ephemeral, ephemeral_public) = generate_ephemeral(&self.session)?;
        let derive = |usage: Use| {
            let shared = shared_info(algorithm, usage, &ephemeral_public, recipient, &self.island);
            let octets = 32 as CK_ULONG;
            let template = match usage {
                Use::TransportKek => Template::session_secret(&CKK_AES).usage(&[CKA_WRAP]),
                Use::SealKey => Template::session_secret(&CKK_GENERIC_SECRET).usage(&[CKA_SIGN]),
            };
            let template = template.sensitive(false).number(CKA_VALUE_LEN, &octets);
            match algorithm {
                EnvelopeAlgorithm::X963Sha256 => {
                    let mechanism =
                        Mechanism::Ecdh { kdf: CKD_SHA256_KDF, shared: &shared, public: &recipient.public_point };
                    self.session.derive(&mechanism, ephemeral.object(), template.as_slice())
                }
                EnvelopeAlgorithm::CbcExpand => {
                    let z_template = Template::session_secret(&CKK_AES)
                        .sensitive(false)
                        .usage(&[CKA_DERIVE])
                        .number(CKA_VALUE_LEN, &octets);
                    let mechanism = Mechanism::Ecdh { kdf: CKD_NULL, shared: &[], public: &recipient.public_point };
                    let z = Temporary::new(
                        &self.session,
                        self.session.derive(&mechanism, ephemeral.object(), z_template.as_slice())?,
                    );
                    self.session.derive(&Mechanism::CbcEncryptData { data: &shared }, z.object(), template.as_slice())
                }
            }
        };
        let transport_kek = Temporary::new(&self.session, derive(Use::TransportKek)?);
        let seal_key = Temporary::new(&self.session, derive(Use::SealKey)?);
        Ok(LiveAgreement {
            public: Agreement { algorithm, ephemeral_public },
            transport_kek: transport_kek.keep(),
            seal_key: seal_key.keep(),
            made: Instant::now(),
            keys,
        })
    }
}

/// What a key of an agreement is for; the number is part of its derivation.
#[derive(Clone, Copy)]
enum Use {
    TransportKek = 1,
    SealKey = 2,
}

/// Whether an error of one key stops a batch: trouble of the HSM does, a refused or missing key
/// does not.
pub(crate) fn concerns_all(error: &HsmError) -> bool {
    error.needs_repair() || error.kind() == crate::error::ErrorKind::Transient
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

/// The uncompressed point of a P-256 public key object.
pub(crate) fn public_point(session: &Session, object: Object) -> Result<[u8; 65], HsmError> {
    let value = session
        .attribute(object, CKA_EC_POINT)?
        .ok_or_else(|| HsmError::call("C_GetAttributeValue", CKR_ATTRIBUTE_TYPE_INVALID))?;
    // CKA_EC_POINT is the DER of an OCTET STRING; a few modules give the bare point.
    let point = value.strip_prefix(&[0x04, 65]).unwrap_or(&value);
    point.try_into().map_err(|_| HsmError::call("C_GetAttributeValue", CKR_ATTRIBUTE_VALUE_INVALID))
}

fn shared_info(
    algorithm: EnvelopeAlgorithm,
    usage: Use,
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

/// DER of the OID of P-256 (RFC 5480): CKA_EC_PARAMS.
pub(crate) const P256_OID: &[u8] = &[0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07];
