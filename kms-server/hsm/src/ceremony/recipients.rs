//! The RSA public keys that roots may leave a token under: the escrow key and those of standby
//! tokens.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki_sys::*;
use kms_domain::IslandName;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::error::HsmError;
use crate::label::TokenKey;
use crate::raw::Session;
use crate::template::Template;
use crate::worker::find_one;

/// An RSA public key from outside.
pub(super) struct RsaPublicKey {
    modulus: Vec<u8>,
    exponent: Vec<u8>,
    pub(super) sha256: [u8; 32],
}

impl RsaPublicKey {
    pub(super) fn parse(der: &[u8]) -> Result<Self, HsmError> {
        let refuse = |reason: &str| HsmError::invalid("escrow or standby public key", reason.to_owned());
        let (rest, spki) = SubjectPublicKeyInfo::from_der(der).map_err(|_| {
            refuse("it is not a SubjectPublicKeyInfo; make the PEM file with `openssl pkey -in KEY -pubout`")
        })?;
        if !rest.is_empty() {
            return Err(refuse("octets follow the SubjectPublicKeyInfo"));
        }
        let Ok(PublicKey::RSA(key)) = spki.parsed() else { return Err(refuse("it is not an RSA key")) };
        let trimmed = |octets: &[u8]| octets.iter().copied().skip_while(|octet| *octet == 0).collect::<Vec<u8>>();
        let (modulus, exponent) = (trimmed(key.modulus), trimmed(key.exponent));
        if !(SHORTEST_RSA..=LONGEST_RSA).contains(&modulus.len()) {
            return Err(refuse("it is shorter than 3072 bits or longer than 8192"));
        }
        let mut sha256 = [0; 32];
        sha256.iter_mut().zip(digest(&SHA256, der).as_ref()).for_each(|(place, octet)| *place = *octet);
        Ok(Self { modulus, exponent, sha256 })
    }

    pub(super) fn octets(&self) -> usize {
        self.modulus.len()
    }
}

/// Creates, as security officer, the public keys that roots may leave under. They are trusted if
/// the module has CKA_TRUSTED. Returns whether all are trusted.
pub(super) fn install_recipients(
    session: &Session,
    island: &IslandName,
    recipients: &[(TokenKey, RsaPublicKey)],
) -> Result<bool, HsmError> {
    let mut all_trusted = true;
    for (key, public) in recipients {
        let label = key.label(island);
        match find_one(session, &label, CKO_PUBLIC_KEY) {
            Ok(object) => {
                let modulus = session.attribute(object, CKA_MODULUS)?.unwrap_or_default();
                if !modulus.ends_with(&public.modulus) {
                    return Err(HsmError::Ceremony {
                        reason: format!("the token already holds another key labelled `{label}`"),
                        next_step:
                            "use the key of the ceremony that was begun, or remove that object as security officer"
                                .to_owned(),
                    });
                }
                all_trusted &= session.flag(object, CKA_TRUSTED)? == Some(true);
            }
            Err(HsmError::KeyMissing { .. }) => {
                let id = key.id(island);
                let template = |trusted: bool| {
                    let template = Template::empty()
                        .number(CKA_CLASS, &CKO_PUBLIC_KEY)
                        .number(CKA_KEY_TYPE, &CKK_RSA)
                        .flag(CKA_TOKEN, true)
                        .flag(CKA_PRIVATE, false)
                        .octets(CKA_LABEL, label.as_bytes())
                        .octets(CKA_ID, &id)
                        .octets(CKA_MODULUS, &public.modulus)
                        .octets(CKA_PUBLIC_EXPONENT, &public.exponent)
                        .flag(CKA_WRAP, true)
                        .flag(CKA_ENCRYPT, false)
                        .flag(CKA_VERIFY, false);
                    if trusted { template.flag(CKA_TRUSTED, true) } else { template }
                };
                if session.create(template(true).as_slice()).is_err() {
                    // The module has no CKA_TRUSTED. Only the lock after the ceremony protects the
                    // roots then.
                    session.create(template(false).as_slice())?;
                    all_trusted = false;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(all_trusted)
}

/// Checks that the token holds these keys, which the security officer created in the ceremony.
/// Returns whether all are trusted.
pub(super) fn known_recipients(
    session: &Session,
    island: &IslandName,
    recipients: &[(TokenKey, RsaPublicKey)],
) -> Result<bool, HsmError> {
    let mut all_trusted = true;
    for (key, public) in recipients {
        let label = key.label(island);
        let object = find_one(session, &label, CKO_PUBLIC_KEY)?;
        if !session.attribute(object, CKA_MODULUS)?.unwrap_or_default().ends_with(&public.modulus) {
            return Err(HsmError::Ceremony {
                reason: format!("the key `{label}` in the token is not that of the escrow file"),
                next_step: "give the newest escrow file of this island's ceremony".to_owned(),
            });
        }
        all_trusted &= session.flag(object, CKA_TRUSTED)? == Some(true);
    }
    Ok(all_trusted)
}

const SHORTEST_RSA: usize = 3072 / 8;
const LONGEST_RSA: usize = 8192 / 8;
