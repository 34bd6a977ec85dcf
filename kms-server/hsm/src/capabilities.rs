//! What a module can do, as the probe found it, and what its gaps cost.

use kms_domain::{KeyDerivation, OaepHash};

use crate::agreement::EnvelopeAlgorithm;

/// What works on a token. Each field is the result of a run with a known answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// What the library says of itself.
    pub module: String,
    /// The number of worker threads that is fastest with this module, as measured.
    pub best_workers: usize,
    /// CKM_AES_KEY_WRAP with a 16-octet key (RFC 3394).
    pub key_wrap_128: bool,
    /// CKM_AES_KEY_WRAP with a 32-octet key (RFC 3394).
    pub key_wrap_256: bool,
    /// CKM_AES_ECB (FIPS 197).
    pub aes_ecb: bool,
    /// CKM_AES_GCM with 12-octet tags and associated data, and of nothing but associated data.
    pub aes_gcm: bool,
    /// CKM_AES_CMAC (RFC 4493).
    pub aes_cmac: bool,
    /// CKM_SHA256_HMAC.
    pub hmac_sha256: bool,
    /// CKM_ECDSA of a SHA-256 digest with P-256.
    pub ecdsa_p256: bool,
    /// CKM_ECDH1_DERIVE, P-256, CKD_NULL at full length.
    pub ecdh_null: bool,
    /// CKM_ECDH1_DERIVE, P-256, CKD_SHA256_KDF (ANSI X9.63).
    pub ecdh_x963_sha256: bool,
    /// CKM_SP800_108_COUNTER_KDF with AES-CMAC.
    pub sp800_108_cmac: bool,
    /// CKM_AES_CBC_ENCRYPT_DATA.
    pub cbc_encrypt_data: bool,
    /// RSA-OAEP unwrapping with SHA-1.
    pub oaep_sha1: bool,
    /// RSA-OAEP unwrapping with SHA-256.
    pub oaep_sha256: bool,
    /// CKA_UNWRAP_TEMPLATE is taken and enforced.
    pub unwrap_template: bool,
    /// CKA_DERIVE_TEMPLATE is taken and enforced.
    pub derive_template: bool,
    /// CKA_ALLOWED_MECHANISMS is taken and enforced.
    pub allowed_mechanisms: bool,
    /// CKA_WRAP_WITH_TRUSTED is enforced.
    pub wrap_with_trusted: bool,
    /// CKA_EXTRACTABLE can be taken away, and not given back.
    pub extractable_lock: bool,
    /// CKA_SENSITIVE values cannot be read.
    pub sensitive: bool,
    /// Quirk: CKA_VALUE_LEN must be in the template when an AES key is unwrapped.
    pub unwrap_needs_value_len: bool,
    /// Quirk: C_WrapKey says that it wrote more than RFC 3394 gives.
    pub wrap_length_untrimmed: bool,
}

/// One line of the table that `kms hsm check` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityRow {
    /// The mechanism or attribute.
    pub name: &'static str,
    /// What it is needed for.
    pub needed_for: &'static str,
    /// Whether it works.
    pub found: bool,
    /// What is used instead if it does not.
    pub instead: &'static str,
    /// What is lost if it does not.
    pub cost: &'static str,
}

impl CapabilityRow {
    /// Whether nothing can replace it: the token is not used without it.
    pub fn is_essential(&self) -> bool {
        self.cost == UNUSABLE
    }
}

impl Capabilities {
    /// The whole table, essentials first.
    pub fn table(&self) -> Vec<CapabilityRow> {
        let row = |name, needed_for, found, instead, cost| CapabilityRow { name, needed_for, found, instead, cost };
        vec![
            row(
                "AES_KEY_WRAP, 16 octets",
                "every key of suites 0 and 1 that is stored or granted",
                self.key_wrap_128,
                NOTHING,
                UNUSABLE,
            ),
            row("AES_KEY_WRAP, 32 octets", "suite 2 keys, copies of roots", self.key_wrap_256, NOTHING, UNUSABLE),
            row("SHA256_HMAC", "seals of rows and envelopes", self.hmac_sha256, NOTHING, UNUSABLE),
            row("ECDSA on a digest, P-256", "audit checkpoints, certificates", self.ecdsa_p256, NOTHING, UNUSABLE),
            row(
                "EXTRACTABLE=false is final",
                "roots leave once, for escrow, and never again",
                self.extractable_lock,
                NOTHING,
                UNUSABLE,
            ),
            row("SENSITIVE is enforced", "keys stay inside", self.sensitive, NOTHING, UNUSABLE),
            row(
                "ECDH1_DERIVE with SHA256_KDF",
                "envelopes",
                self.ecdh_x963_sha256,
                "ECDH1_DERIVE with KDF NULL, then AES_CBC_ENCRYPT_DATA",
                "envelopes of an algorithm that grantees may refuse; not for production",
            ),
            row(
                "ECDH1_DERIVE with KDF NULL",
                "envelopes without SHA256_KDF",
                self.ecdh_null,
                "SHA256_KDF",
                "none where SHA256_KDF is found",
            ),
            row(
                "SP800_108_COUNTER_KDF, CMAC",
                "diversified keys",
                self.sp800_108_cmac,
                "AES_CBC_ENCRYPT_DATA",
                "a derivation that no standard describes as a KDF",
            ),
            row(
                "AES_CBC_ENCRYPT_DATA",
                "diversified keys without SP800_108",
                self.cbc_encrypt_data,
                "SP800_108_COUNTER_KDF; without both, generated and stored keys",
                "without both, a lost database row loses the meter's keys",
            ),
            row(
                "AES_GCM, tags of 12 octets",
                "frames protected inside the HSM, proofs of transfers",
                self.aes_gcm,
                NOTHING,
                "head-ends must hold session keys",
            ),
            row(
                "RSA-OAEP, SHA-256",
                "vendors' batch keys, escrow",
                self.oaep_sha256,
                "RSA-OAEP with SHA-1",
                "an old hash in a place where its collisions do not matter",
            ),
            row(
                "RSA-OAEP, SHA-1",
                "vendors' batch keys, escrow, without SHA-256",
                self.oaep_sha1,
                "RSA-OAEP with SHA-256",
                "without both, no shipments and no escrow",
            ),
            row(
                "UNWRAP_TEMPLATE is enforced",
                "stored keys can only be unwrapped as sensitive ones",
                self.unwrap_template,
                "the server's own templates",
                "code that runs in a server can read stored keys",
            ),
            row(
                "DERIVE_TEMPLATE is enforced",
                "diversified keys can only be derived as sensitive ones",
                self.derive_template,
                "the server's own templates",
                "code that runs in a server can read diversified keys",
            ),
            row(
                "ALLOWED_MECHANISMS is enforced",
                "one use for each root",
                self.allowed_mechanisms,
                "usage attributes",
                "a root's usage is limited less narrowly",
            ),
            row(
                "WRAP_WITH_TRUSTED is enforced",
                "roots leave only under the escrow and standby keys",
                self.wrap_with_trusted,
                "the lock after the ceremony",
                "during the ceremony, a user can wrap roots under any key",
            ),
            row("AES_ECB", "check values", self.aes_ecb, "CKA_CHECK_VALUE", "none"),
            row("AES_CMAC", "check values", self.aes_cmac, "CKA_CHECK_VALUE", "none"),
        ]
    }

    /// Each capability that is missing and cannot be replaced, as a text. Empty: the token can be
    /// used.
    pub fn missing_essentials(&self, allow_cbc_expand: bool) -> Vec<String> {
        let mut missing: Vec<String> = self
            .table()
            .iter()
            .filter(|row| !row.found && row.is_essential())
            .map(|row| format!("{} (needed for {})", row.name, row.needed_for))
            .collect();
        if self.envelope_algorithm(allow_cbc_expand).is_none() {
            let hint = if self.envelope_algorithm(true).is_some() {
                "; the algorithm `ecdh-p256-cbc-expand` would work and is not permitted by the configuration"
            } else {
                ""
            };
            missing.push(format!("ECDH1_DERIVE with SHA256_KDF (needed for envelopes){hint}"));
        }
        missing
    }

    /// The best envelope algorithm that the module offers and the configuration permits.
    pub fn envelope_algorithm(&self, allow_cbc_expand: bool) -> Option<EnvelopeAlgorithm> {
        match () {
            () if self.ecdh_x963_sha256 => Some(EnvelopeAlgorithm::X963Sha256),
            () if self.ecdh_null && self.cbc_encrypt_data && allow_cbc_expand => Some(EnvelopeAlgorithm::CbcExpand),
            () => None,
        }
    }

    /// The best derivation of diversified keys, if the module has one.
    pub fn key_derivation(&self) -> Option<KeyDerivation> {
        match () {
            () if self.sp800_108_cmac => Some(KeyDerivation::Sp800108Cmac),
            () if self.cbc_encrypt_data => Some(KeyDerivation::AesCbcEncryptData),
            () => None,
        }
    }

    /// The best OAEP hash, if the module has one.
    pub fn oaep_hash(&self) -> Option<OaepHash> {
        match () {
            () if self.oaep_sha256 => Some(OaepHash::Sha256),
            () if self.oaep_sha1 => Some(OaepHash::Sha1),
            () => None,
        }
    }
}

const NOTHING: &str = "nothing";
const UNUSABLE: &str = "the token cannot be used";
