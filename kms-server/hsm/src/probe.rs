//! The probe of a module: at start-up it tries every capability with a known answer, on session
//! objects. The module's list of mechanisms counts only where a trial would cost much time.

use aws_lc_rs::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPublicEncryptingKey, PublicEncryptingKey,
};
use aws_lc_rs::{cmac, hmac, signature};
use cryptoki_sys::*;
use kms_domain::OaepHash;

use crate::agreement::generate_ephemeral;
use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::public_key::{P256_OID, public_point, rsa_public_key_der};
use crate::raw::{Attribute, Mechanism, Object, Session, Temporary};
use crate::template::Template;

/// Tries everything on `session`, whose user is logged in. `rsa` is a key pair (public, private)
/// that may unwrap; without one, the probe makes one, which takes seconds on some HSMs.
///
/// # Errors
/// The session was lost. A missing capability is no error.
pub(crate) fn probe(
    session: &Session,
    module: &str,
    mechanisms: &[CK_MECHANISM_TYPE],
    rsa: Option<(Object, Object)>,
) -> Result<Capabilities, HsmError> {
    let probe = Probe { session };
    let unwrap_needs_value_len = found(probe.unwrap_template_with_value_len())?;
    let (key_wrap_128, untrimmed) = probe.key_wrap_128(unwrap_needs_value_len)?;
    let (oaep_sha1, oaep_sha256) =
        if mechanisms.contains(&CKM_RSA_PKCS_OAEP) { probe.oaep(rsa)? } else { (false, false) };
    Ok(Capabilities {
        module: module.to_owned(),
        best_workers: best_workers(module),
        key_wrap_128,
        key_wrap_256: found(probe.key_wrap(RFC3394_KEK_256, RFC3394_DATA_256, RFC3394_WRAPPED_256))?,
        aes_ecb: found(probe.aes_ecb())?,
        aes_gcm: found(probe.aes_gcm())?,
        aes_cmac: found(probe.aes_cmac())?,
        hmac_sha256: found(probe.hmac_sha256())?,
        ecdsa_p256: found(probe.ecdsa_p256())?,
        ecdh_null: found(probe.ecdh(CKD_NULL))?,
        ecdh_x963_sha256: found(probe.ecdh(CKD_SHA256_KDF))?,
        sp800_108_cmac: found(probe.sp800_108_cmac())?,
        cbc_encrypt_data: found(probe.cbc_encrypt_data())?,
        oaep_sha1,
        oaep_sha256,
        unwrap_template: found(probe.unwrap_template())?,
        derive_template: found(probe.derive_template())?,
        allowed_mechanisms: found(probe.allowed_mechanisms())?,
        wrap_with_trusted: found(probe.wrap_with_trusted())?,
        extractable_lock: found(probe.extractable_lock())?,
        sensitive: found(probe.sensitive())?,
        unwrap_needs_value_len,
        wrap_length_untrimmed: untrimmed,
    })
}

/// The runs of the probe. An error of a run means that the capability is missing, unless the
/// session was lost.
struct Probe<'a> {
    session: &'a Session,
}

/// The answer was wrong, or an attribute was not enforced.
struct Missing;

enum Outcome {
    Works,
    Fails,
}

type Run = Result<Outcome, HsmError>;

impl Probe<'_> {
    fn key_wrap_128(&self, with_value_len: bool) -> Result<(bool, bool), HsmError> {
        let works = found(self.key_wrap(RFC3394_KEK_128, RFC3394_DATA_128, RFC3394_WRAPPED_128))?
            && found(self.key_unwrap(with_value_len))?;
        let untrimmed = match self.wrapped(RFC3394_KEK_128, RFC3394_DATA_128) {
            Ok((written, _)) => written != RFC3394_WRAPPED_128.len(),
            Err(error) => found(Err(error))?,
        };
        Ok((works, untrimmed))
    }

    fn key_wrap(&self, kek: &[u8], data: &[u8], expected: &[u8]) -> Run {
        let (_, wrapped) = self.wrapped(kek, data)?;
        Ok(equal(wrapped.get(..expected.len()), expected))
    }

    fn wrapped(&self, kek: &[u8], data: &[u8]) -> Result<(usize, [u8; 64]), HsmError> {
        let kek = self.import(&CKK_AES, kek, CKA_WRAP)?;
        let key = self.import(&CKK_AES, data, CKA_ENCRYPT)?;
        let mut buffer = [0; 64];
        let written =
            self.session.wrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek.object(), key.object(), &mut buffer)?;
        Ok((written, buffer))
    }

    fn key_unwrap(&self, with_value_len: bool) -> Run {
        let kek = self.import(&CKK_AES, RFC3394_KEK_128, CKA_UNWRAP)?;
        let octets = 16 as CK_ULONG;
        let mut template = Template::session_secret(&CKK_AES).flag(CKA_SENSITIVE, false).flag(CKA_EXTRACTABLE, true);
        if with_value_len {
            template = template.number(CKA_VALUE_LEN, &octets);
        }
        let key = self.session.unwrap(
            &Mechanism::Plain(CKM_AES_KEY_WRAP),
            kek.object(),
            RFC3394_WRAPPED_128,
            template.as_slice(),
        )?;
        self.has_value(&self.temporary(key), RFC3394_DATA_128)
    }

    /// Works if the module refuses a template without CKA_VALUE_LEN and takes one with it.
    fn unwrap_template_with_value_len(&self) -> Run {
        match self.key_unwrap(false) {
            Ok(_) => Ok(Outcome::Fails),
            Err(error) if is_lost(&error) => Err(error),
            Err(_) => self.key_unwrap(true),
        }
    }

    fn aes_ecb(&self) -> Run {
        let key = self.import(&CKK_AES, FIPS197_KEY, CKA_ENCRYPT)?;
        let mut buffer = [0; 32];
        let written =
            self.session.encrypt(&Mechanism::Plain(CKM_AES_ECB), key.object(), FIPS197_PLAINTEXT, &mut buffer)?;
        Ok(equal(buffer.get(..written), FIPS197_CIPHERTEXT))
    }

    fn aes_gcm(&self) -> Run {
        let key = self.import(&CKK_AES, DLMS_KEY, CKA_ENCRYPT)?;
        let mut aad = [0; 17];
        aad.iter_mut().zip([0x30].iter().chain(DLMS_GAK)).for_each(|(place, octet)| *place = *octet);
        let mut buffer = [0; 64];
        let written = self.session.encrypt(
            &Mechanism::Gcm { nonce: DLMS_NONCE, aad: &aad, tag_bits: 96 },
            key.object(),
            DLMS_GET,
            &mut buffer,
        )?;
        if !matches!(equal(buffer.get(..written), DLMS_GET_PROTECTED), Outcome::Works) {
            return Ok(Outcome::Fails);
        }
        let authenticated: Vec<u8> = [0x10].iter().chain(DLMS_GAK).chain(DLMS_GET).copied().collect();
        let written = self.session.encrypt(
            &Mechanism::Gcm { nonce: DLMS_NONCE, aad: &authenticated, tag_bits: 96 },
            key.object(),
            &[],
            &mut buffer,
        )?;
        Ok(equal(buffer.get(..written), DLMS_GET_TAG))
    }

    fn aes_cmac(&self) -> Run {
        let key = self.import(&CKK_AES, FIPS197_KEY, CKA_SIGN)?;
        let mut buffer = [0; 16];
        let written = self.session.sign(CKM_AES_CMAC, key.object(), DLMS_GET, &mut buffer)?;
        let reference = cmac::Key::new(cmac::AES_128, FIPS197_KEY).and_then(|key| cmac::sign(&key, DLMS_GET));
        Ok(reference.map_or(Outcome::Fails, |reference| equal(buffer.get(..written), reference.as_ref())))
    }

    fn hmac_sha256(&self) -> Run {
        let key = self.import(&CKK_GENERIC_SECRET, RFC3394_KEK_256, CKA_SIGN)?;
        let mut buffer = [0; 32];
        let written = self.session.sign(CKM_SHA256_HMAC, key.object(), DLMS_GET, &mut buffer)?;
        let reference = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, RFC3394_KEK_256), DLMS_GET);
        Ok(equal(buffer.get(..written), reference.as_ref()))
    }

    fn ecdsa_p256(&self) -> Run {
        let public = Template::empty().flag(CKA_TOKEN, false).octets(CKA_EC_PARAMS, P256_OID);
        let private = Template::empty().flag(CKA_TOKEN, false).sensitive(false).flag(CKA_SIGN, true);
        let (public, private) =
            self.session.generate_pair(CKM_EC_KEY_PAIR_GEN, public.as_slice(), private.as_slice())?;
        let (public, private) = (self.temporary(public), self.temporary(private));
        let mut buffer = [0; 64];
        let written =
            self.session.sign(CKM_ECDSA, private.object(), digest(&SHA256, DLMS_GET).as_ref(), &mut buffer)?;
        let point = public_point(self.session, public.object())?;
        let key = signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point);
        Ok(outcome(buffer.get(..written).is_some_and(|signature| key.verify(DLMS_GET, signature).is_ok())))
    }

    fn ecdh(&self, kdf: CK_EC_KDF_TYPE) -> Run {
        let (private, point) = generate_ephemeral(self.session)?;
        let mut shared_info: &[u8] = FIPS197_PLAINTEXT;
        if kdf == CKD_NULL {
            shared_info = &[];
        }
        let Ok(own) = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()) else {
            return Ok(Outcome::Fails);
        };
        let Ok(own_public) = own.compute_public_key() else { return Ok(Outcome::Fails) };
        let octets = 32 as CK_ULONG;
        let template = Template::session_secret(&CKK_GENERIC_SECRET)
            .flag(CKA_SENSITIVE, false)
            .flag(CKA_EXTRACTABLE, true)
            .number(CKA_VALUE_LEN, &octets);
        let derived = self.session.derive(
            &Mechanism::Ecdh { kdf, shared: shared_info, public: own_public.as_ref() },
            private.object(),
            template.as_slice(),
        )?;
        let derived = self.temporary(derived);
        let expected = agree_ephemeral(own, UnparsedPublicKey::new(&ECDH_P256, point), Missing, |z| {
            let z = z.to_vec();
            Ok(if kdf == CKD_NULL {
                z
            } else {
                digest(&SHA256, &[&z, [0, 0, 0, 1].as_slice(), shared_info].concat()).as_ref().to_vec()
            })
        });
        match expected {
            Ok(expected) => self.has_value(&derived, &expected),
            Err(Missing) => Ok(Outcome::Fails),
        }
    }

    fn sp800_108_cmac(&self) -> Run {
        let root = self.import(&CKK_AES, RFC3394_KEK_256, CKA_DERIVE)?;
        let mut fixed = [0; 17];
        fixed.iter_mut().zip([2, 0].into_iter().chain(0..15)).for_each(|(place, octet)| *place = octet);
        let octets = 32 as CK_ULONG;
        let template = Template::session_secret(&CKK_AES)
            .flag(CKA_SENSITIVE, false)
            .flag(CKA_EXTRACTABLE, true)
            .number(CKA_VALUE_LEN, &octets);
        let key = self.session.derive(&Mechanism::CounterCmac { fixed: &fixed }, root.object(), template.as_slice())?;
        self.has_value(&self.temporary(key), SP800_108_DERIVED)
    }

    fn cbc_encrypt_data(&self) -> Run {
        let root = self.import(&CKK_AES, FIPS197_KEY, CKA_DERIVE)?;
        let octets = 16 as CK_ULONG;
        let template = Template::session_secret(&CKK_AES)
            .flag(CKA_SENSITIVE, false)
            .flag(CKA_EXTRACTABLE, true)
            .number(CKA_VALUE_LEN, &octets);
        let key = self.session.derive(
            &Mechanism::CbcEncryptData { data: FIPS197_PLAINTEXT },
            root.object(),
            template.as_slice(),
        )?;
        self.has_value(&self.temporary(key), FIPS197_CIPHERTEXT)
    }

    /// SHA-1, SHA-256.
    fn oaep(&self, rsa: Option<(Object, Object)>) -> Result<(bool, bool), HsmError> {
        if let Some((public, private)) = rsa {
            return self.oaep_of(public, private);
        }
        let bits = 2048 as CK_ULONG;
        let public = Template::empty()
            .flag(CKA_TOKEN, false)
            .number(CKA_MODULUS_BITS, &bits)
            .octets(CKA_PUBLIC_EXPONENT, &[1, 0, 1]);
        let private = Template::empty().flag(CKA_TOKEN, false).sensitive(false).private_usage(&[CKA_UNWRAP]);
        match self.session.generate_pair(CKM_RSA_PKCS_KEY_PAIR_GEN, public.as_slice(), private.as_slice()) {
            Ok((public, private)) => {
                let (public, private) = (self.temporary(public), self.temporary(private));
                self.oaep_of(public.object(), private.object())
            }
            Err(error) => found(Err(error)).map(|found| (found, found)),
        }
    }

    fn oaep_of(&self, public: Object, private: Object) -> Result<(bool, bool), HsmError> {
        let Some(der) = rsa_public_key_der(self.session, public)? else { return Ok((false, false)) };
        let sha1 = found(self.oaep_with(OaepHash::Sha1, &OAEP_SHA1_MGF1SHA1, &der, private))?;
        let sha256 = found(self.oaep_with(OaepHash::Sha256, &OAEP_SHA256_MGF1SHA256, &der, private))?;
        Ok((sha1, sha256))
    }

    fn oaep_with(&self, hash: OaepHash, algorithm: &'static OaepAlgorithm, der: &[u8], private: Object) -> Run {
        let Some(ciphertext) = oaep_encrypt(der, algorithm, RFC3394_DATA_256) else { return Ok(Outcome::Fails) };
        let template = Template::session_secret(&CKK_AES).flag(CKA_SENSITIVE, false).flag(CKA_EXTRACTABLE, true);
        let key = self.session.unwrap(&Mechanism::Oaep(hash), private, &ciphertext, template.as_slice())?;
        self.has_value(&self.temporary(key), RFC3394_DATA_256)
    }

    fn unwrap_template(&self) -> Run {
        let inner = [Attribute::flag(CKA_SENSITIVE, true)];
        let kek = Template::session_secret(&CKK_AES)
            .octets(CKA_VALUE, RFC3394_KEK_128)
            .flag(CKA_UNWRAP, true)
            .with(Attribute::template(CKA_UNWRAP_TEMPLATE, &inner));
        let kek = self.temporary(self.session.create(kek.as_slice())?);
        let attempt = |sensitive| {
            let template =
                Template::session_secret(&CKK_AES).flag(CKA_SENSITIVE, sensitive).flag(CKA_EXTRACTABLE, true);
            self.session
                .unwrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek.object(), RFC3394_WRAPPED_128, template.as_slice())
                .map(|key| self.temporary(key))
        };
        drop(attempt(true)?);
        self.refuses(attempt(false))
    }

    fn derive_template(&self) -> Run {
        let inner = [Attribute::flag(CKA_SENSITIVE, true)];
        let root = Template::session_secret(&CKK_AES)
            .octets(CKA_VALUE, FIPS197_KEY)
            .flag(CKA_DERIVE, true)
            .with(Attribute::template(CKA_DERIVE_TEMPLATE, &inner));
        let root = self.temporary(self.session.create(root.as_slice())?);
        let attempt = |sensitive| {
            let octets = 16 as CK_ULONG;
            let template = Template::session_secret(&CKK_AES)
                .flag(CKA_SENSITIVE, sensitive)
                .flag(CKA_EXTRACTABLE, true)
                .number(CKA_VALUE_LEN, &octets);
            self.session
                .derive(&Mechanism::CbcEncryptData { data: FIPS197_PLAINTEXT }, root.object(), template.as_slice())
                .map(|key| self.temporary(key))
        };
        drop(attempt(true)?);
        self.refuses(attempt(false))
    }

    fn allowed_mechanisms(&self) -> Run {
        let key = Template::session_secret(&CKK_AES)
            .octets(CKA_VALUE, FIPS197_KEY)
            .flag(CKA_ENCRYPT, true)
            .with(Attribute::numbers(CKA_ALLOWED_MECHANISMS, &[CKM_AES_CBC]));
        let key = self.temporary(self.session.create(key.as_slice())?);
        let mut buffer = [0; 32];
        self.refuses(self.session.encrypt(&Mechanism::Plain(CKM_AES_ECB), key.object(), FIPS197_PLAINTEXT, &mut buffer))
    }

    fn wrap_with_trusted(&self) -> Run {
        let kek = self.import(&CKK_AES, RFC3394_KEK_128, CKA_WRAP)?;
        let octets = 16 as CK_ULONG;
        let template = Template::session_secret(&CKK_AES)
            .sensitive(true)
            .number(CKA_VALUE_LEN, &octets)
            .flag(CKA_WRAP_WITH_TRUSTED, true);
        let key = self.temporary(self.session.generate(CKM_AES_KEY_GEN, template.as_slice())?);
        let mut buffer = [0; 64];
        self.refuses(self.session.wrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek.object(), key.object(), &mut buffer))
    }

    fn extractable_lock(&self) -> Run {
        let kek = self.import(&CKK_AES, RFC3394_KEK_128, CKA_WRAP)?;
        let octets = 16 as CK_ULONG;
        let template = Template::session_secret(&CKK_AES).sensitive(true).number(CKA_VALUE_LEN, &octets);
        let key = self.temporary(self.session.generate(CKM_AES_KEY_GEN, template.as_slice())?);
        self.session.set_attributes(key.object(), &[Attribute::flag(CKA_EXTRACTABLE, false)])?;
        let mut buffer = [0; 64];
        let wrap = self.refuses(self.session.wrap(
            &Mechanism::Plain(CKM_AES_KEY_WRAP),
            kek.object(),
            key.object(),
            &mut buffer,
        ))?;
        let back =
            self.refuses(self.session.set_attributes(key.object(), &[Attribute::flag(CKA_EXTRACTABLE, true)]))?;
        Ok(outcome(matches!((wrap, back), (Outcome::Works, Outcome::Works))))
    }

    fn sensitive(&self) -> Run {
        let octets = 16 as CK_ULONG;
        let template = Template::session_secret(&CKK_AES).sensitive(true).number(CKA_VALUE_LEN, &octets);
        let key = self.temporary(self.session.generate(CKM_AES_KEY_GEN, template.as_slice())?);
        Ok(outcome(self.session.attribute(key.object(), CKA_VALUE)?.is_none()))
    }

    fn import<'a>(
        &'a self,
        key_type: &'static CK_KEY_TYPE,
        value: &[u8],
        usage: CK_ATTRIBUTE_TYPE,
    ) -> Result<Temporary<'a>, HsmError> {
        let template = Template::session_secret(key_type).octets(CKA_VALUE, value).sensitive(true).flag(usage, true);
        Ok(self.temporary(self.session.create(template.as_slice())?))
    }

    fn temporary(&self, object: Object) -> Temporary<'_> {
        Temporary::new(self.session, object)
    }

    fn has_value(&self, key: &Temporary<'_>, expected: &[u8]) -> Run {
        let mut value = vec![0; expected.len()];
        self.session.read_value(key.object(), &mut value)?;
        Ok(equal(Some(&value), expected))
    }

    /// Works if the module refused.
    fn refuses<T>(&self, attempt: Result<T, HsmError>) -> Run {
        match attempt {
            Ok(_) => Ok(Outcome::Fails),
            Err(error) if is_lost(&error) => Err(error),
            Err(_) => Ok(Outcome::Works),
        }
    }
}

fn oaep_encrypt(der: &[u8], algorithm: &'static OaepAlgorithm, plaintext: &[u8]) -> Option<Vec<u8>> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(der).ok()?).ok()?;
    let mut ciphertext = vec![0; key.ciphertext_size()];
    let written = key.encrypt(algorithm, plaintext, &mut ciphertext, None).ok()?.len();
    ciphertext.truncate(written);
    Some(ciphertext)
}

/// Whether a run showed the capability. GENERAL_ERROR is also what some modules answer to an
/// unknown mechanism, so it does not count as a lost session. If the session is lost, the next call
/// tells.
fn found(run: Run) -> Result<bool, HsmError> {
    match run {
        Ok(Outcome::Works) => Ok(true),
        Ok(Outcome::Fails) => Ok(false),
        Err(error) if is_lost(&error) => Err(error),
        Err(error) => {
            tracing::debug!(%error, "a capability of the HSM is missing");
            Ok(false)
        }
    }
}

fn is_lost(error: &HsmError) -> bool {
    use cryptoki::error::RvError;
    matches!(
        error.code(),
        Some(
            RvError::SessionHandleInvalid
                | RvError::SessionClosed
                | RvError::UserNotLoggedIn
                | RvError::DeviceRemoved
                | RvError::TokenNotPresent
                | RvError::CryptokiNotInitialized
        )
    )
}

fn equal(found: Option<&[u8]>, expected: &[u8]) -> Outcome {
    outcome(found == Some(expected))
}

fn outcome(works: bool) -> Outcome {
    if works { Outcome::Works } else { Outcome::Fails }
}

/// As measured with symmetric work: a second thread makes SoftHSM and kryoptic slower, hsm-sim and
/// openCryptoki faster.
fn best_workers(module: &str) -> usize {
    let scales = ["hsm-sim", "openCryptoki", "NSS"]
        .iter()
        .any(|name| module.to_ascii_lowercase().contains(&name.to_ascii_lowercase()));
    if scales { 2 } else { 1 }
}

// RFC 3394, 4.1 and 4.6.
const RFC3394_KEK_128: &[u8] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const RFC3394_DATA_128: &[u8] =
    &[0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF];
const RFC3394_WRAPPED_128: &[u8] = &[
    0x1F, 0xA6, 0x8B, 0x0A, 0x81, 0x12, 0xB4, 0x47, 0xAE, 0xF3, 0x4B, 0xD8, 0xFB, 0x5A, 0x7B, 0x82, 0x9D, 0x3E, 0x86,
    0x23, 0x71, 0xD2, 0xCF, 0xE5,
];
const RFC3394_KEK_256: &[u8] = &[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
    31,
];
const RFC3394_DATA_256: &[u8] = &[
    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF, 0, 1, 2, 3, 4, 5,
    6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
];
const RFC3394_WRAPPED_256: &[u8] = &[
    0x28, 0xC9, 0xF4, 0x04, 0xC4, 0xB8, 0x10, 0xF4, 0xCB, 0xCC, 0xB3, 0x5C, 0xFB, 0x87, 0xF8, 0x26, 0x3F, 0x57, 0x86,
    0xE2, 0xD8, 0x0E, 0xD3, 0x26, 0xCB, 0xC7, 0xF0, 0xE7, 0x1A, 0x99, 0xF4, 0x3B, 0xFB, 0x98, 0x8B, 0x9B, 0x7A, 0x02,
    0xDD, 0x21,
];
// FIPS 197, C.1.
const FIPS197_KEY: &[u8] = RFC3394_KEK_128;
const FIPS197_PLAINTEXT: &[u8] = RFC3394_DATA_128;
const FIPS197_CIPHERTEXT: &[u8] =
    &[0x69, 0xC4, 0xE0, 0xD8, 0x6A, 0x7B, 0x04, 0x30, 0xD8, 0xCD, 0xB7, 0x80, 0x70, 0xB4, 0xC5, 0x5A];
// A GET request of the DLMS Green Book: EK 00..0F, AK D0..DF, system title 4D4D4D0000BC614E,
// invocation counter 01234567.
const DLMS_KEY: &[u8] = RFC3394_KEK_128;
const DLMS_GAK: &[u8; 16] =
    &[0xD0, 0xD1, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF];
const DLMS_NONCE: &[u8; 12] = &[0x4D, 0x4D, 0x4D, 0x00, 0x00, 0xBC, 0x61, 0x4E, 0x01, 0x23, 0x45, 0x67];
const DLMS_GET: &[u8] = &[0xC0, 0x01, 0x00, 0x00, 0x08, 0x00, 0x00, 0x01, 0x00, 0x00, 0xFF, 0x02, 0x00];
const DLMS_GET_PROTECTED: &[u8] = &[
    0x41, 0x13, 0x12, 0xFF, 0x93, 0x5A, 0x47, 0x56, 0x68, 0x27, 0xC4, 0x67, 0xBC, 0x7D, 0x82, 0x5C, 0x3B, 0xE4, 0xA7,
    0x7C, 0x3F, 0xCC, 0x05, 0x6B, 0x6B,
];
const DLMS_GET_TAG: &[u8] = &[0x06, 0x72, 0x5D, 0x91, 0x0F, 0x92, 0x21, 0xD2, 0x63, 0x87, 0x75, 0x16];
// NIST SP 800-108r1, counter mode, AES-256-CMAC: key 00..1F, label 02, context 00..0E, 32 octets;
// computed with Python `cryptography`.
const SP800_108_DERIVED: &[u8] = &[
    0x3B, 0xF6, 0xB1, 0xDE, 0x6E, 0x07, 0x6C, 0xE4, 0x4C, 0xFD, 0xDC, 0x79, 0x30, 0xF9, 0xE6, 0x55, 0x7D, 0x89, 0x42,
    0x2E, 0xBD, 0x86, 0xFC, 0x4A, 0x70, 0x8F, 0x5E, 0x94, 0x0F, 0x51, 0xBD, 0x4C,
];
