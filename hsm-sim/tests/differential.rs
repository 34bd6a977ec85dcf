//! The same random sequences of calls on hsm-sim and on SoftHSM2: results and return codes must be
//! the same, or be in the table of explained differences. The sequences are the same in every run;
//! HSM_SIM_DIFFERENTIAL_SEED (a number) makes others.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "test helpers: a failure is to stop the test")]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;

use common::template::P256;
use common::{Mechanism, Module, Object, Result, Session, Template, Token, USER_PIN, hsm_sim, name, softhsm2};
use cryptoki_sys::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const SEQUENCES: usize = 400;

/// Where the two differ, and why that is right. A row that no sequence meets fails the test as
/// well.
///
/// The call (with its mechanism or attribute where that matters; one `*` stands for anything), what
/// SoftHSM2 2.6.1 says, what hsm-sim says, the reason.
const EXPLAINED: &[(&str, &str, &str, &str)] = &[
    (
        "*",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_KEY_HANDLE_INVALID",
        "the standard has a code for handles of keys; SoftHSM2 uses the one for objects",
    ),
    (
        "*",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_TYPE_INCONSISTENT",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_MECHANISM_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_MECHANISM_PARAM_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_PARAM_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_ATTRIBUTE_VALUE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_MECHANISM_PARAM_INVALID",
        "CKR_ATTRIBUTE_VALUE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "*",
        "CKR_KEY_UNEXTRACTABLE",
        "CKR_KEY_NOT_WRAPPABLE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_DeriveKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_ATTRIBUTE_VALUE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_DeriveKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_DeriveKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_UnwrapKey a digest mechanism*",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_UnwrapKey a digest mechanism*",
        "CKR_MECHANISM_INVALID",
        "CKR_TEMPLATE_INCOMPLETE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_UnwrapKey a digest mechanism*",
        "CKR_MECHANISM_INVALID",
        "CKR_UNWRAPPING_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_NOT_WRAPPABLE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_KEY_UNEXTRACTABLE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey a digest mechanism",
        "CKR_MECHANISM_INVALID",
        "CKR_WRAPPING_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey AES_KEY_WRAP",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey AES_KEY_WRAP",
        "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey AES_KEY_WRAP",
        "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_HANDLE_INVALID",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey AES_KEY_WRAP",
        "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_NOT_WRAPPABLE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_WrapKey AES_KEY_WRAP",
        "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_UNEXTRACTABLE",
        "two things are wrong at once, and the standard gives no order",
    ),
    (
        "C_UnwrapKey AES_KEY_WRAP*",
        "CKR_ATTRIBUTE_VALUE_INVALID",
        "CKR_TEMPLATE_INCOMPLETE",
        "a data object is not to be unwrapped, and it has no key type: both are wrong",
    ),
    (
        "C_UnwrapKey AES_KEY_WRAP*",
        "CKR_GENERAL_ERROR",
        "CKR_WRAPPED_KEY_INVALID",
        "the standard has a code for a wrapped key that fails its check",
    ),
    ("C_Decrypt AES_GCM", "CKR_GENERAL_ERROR", "CKR_ENCRYPTED_DATA_INVALID", "the standard has a code for a wrong tag"),
    (
        "C_Decrypt AES_GCM",
        "CKR_GENERAL_ERROR",
        "CKR_ENCRYPTED_DATA_LEN_RANGE",
        "the standard has a code for data shorter than a tag",
    ),
    (
        "C_Decrypt AES_CBC_PAD",
        "CKR_GENERAL_ERROR",
        "CKR_ENCRYPTED_DATA_LEN_RANGE",
        "the standard has a code for data that is no whole number of blocks",
    ),
    (
        "C_*AES_CBC with a short IV",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "it is the parameter that is wrong",
    ),
    (
        "C_Sign ECDSA",
        "CKR_GENERAL_ERROR",
        "CKR_KEY_TYPE_INCONSISTENT",
        "SoftHSM2 takes an AES key for ECDSA and fails later",
    ),
    (
        "C_Verify ECDSA",
        "CKR_SIGNATURE_LEN_RANGE",
        "CKR_KEY_TYPE_INCONSISTENT",
        "SoftHSM2 takes an AES key for ECDSA and fails later",
    ),
    ("C_Sign SHA*_HMAC", "CKR_KEY_SIZE_RANGE", "CKR_OK", "SoftHSM2 wants keys as long as the hash; RFC 2104 does not"),
    (
        "C_Verify SHA*_HMAC",
        "CKR_KEY_SIZE_RANGE",
        "CKR_SIGNATURE_LEN_RANGE",
        "SoftHSM2 wants keys as long as the hash; RFC 2104 does not",
    ),
    ("C_CreateObject Aes, flaw None", "CKR_OK", "CKR_ATTRIBUTE_VALUE_INVALID", "SoftHSM2 takes AES keys of any length"),
    (
        "C_CopyObject Extractable(false)",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 refuses to set a one-way attribute to what it is; nothing changes by it",
    ),
    (
        "C_CopyObject Sensitive(true)",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 refuses to set a one-way attribute to what it is; nothing changes by it",
    ),
    (
        "C_CopyObject WrapWithTrusted(*",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 takes it at creation only; the standard lets it be set to true, once",
    ),
    (
        "C_CopyObject Value",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "the value of a data object may be changed (PKCS#11 2.40 section 4.5)",
    ),
    (
        "C_SetAttributeValue Extractable(false)",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 refuses to set a one-way attribute to what it is; nothing changes by it",
    ),
    (
        "C_SetAttributeValue Sensitive(true)",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 refuses to set a one-way attribute to what it is; nothing changes by it",
    ),
    (
        "C_SetAttributeValue WrapWithTrusted(*",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "SoftHSM2 takes it at creation only; the standard lets it be set to true, once",
    ),
    (
        "C_SetAttributeValue Value",
        "CKR_ATTRIBUTE_READ_ONLY",
        "CKR_OK",
        "the value of a data object may be changed (PKCS#11 2.40 section 4.5)",
    ),
];

/// One step. Objects are named by a number, taken modulo how many there are; most sequences hit
/// live ones.
#[derive(Clone, Debug)]
enum Step {
    Create { kind: Kind, length: usize, uses: u16, flaw: Flaw },
    Generate { length: usize, uses: u16 },
    GeneratePair { curve: bool },
    Copy { object: usize, change: Change },
    Set { object: usize, change: Change },
    Get { object: usize, attribute: usize },
    Find { label: u8 },
    Encrypt { object: usize, cipher: usize, length: usize, parts: bool },
    Decrypt { object: usize, cipher: usize, length: usize },
    Sign { object: usize, mac: usize, length: usize },
    Verify { object: usize, mac: usize, length: usize },
    Digest { hash: usize, length: usize },
    Wrap { kek: usize, key: usize, wrap: usize },
    Unwrap { kek: usize, blob: usize, wrap: usize, tamper: bool, kind: Kind, uses: u16 },
    Derive { object: usize, kdf: usize, length: usize, uses: u16 },
    Destroy { object: usize },
    Stale { call: u8 },
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Aes,
    Generic,
    Data,
}

#[derive(Clone, Copy, Debug)]
enum Flaw {
    None,
    NoClass,
    NoKeyType,
    NoValue,
    LongBoolean,
    Local,
    UnknownAttribute,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Nothing,
    Label(u8),
    Use(usize, bool),
    Sensitive(bool),
    Extractable(bool),
    WrapWithTrusted(bool),
    Class,
    Value,
    Trusted,
    Token,
}

const USES: [CK_ATTRIBUTE_TYPE; 9] =
    [CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE, CKA_SENSITIVE, CKA_EXTRACTABLE];
const ATTRIBUTES: [(CK_ATTRIBUTE_TYPE, &str); 14] = [
    (CKA_CLASS, "CLASS"),
    (CKA_KEY_TYPE, "KEY_TYPE"),
    (CKA_VALUE, "VALUE"),
    (CKA_VALUE_LEN, "VALUE_LEN"),
    (CKA_LABEL, "LABEL"),
    (CKA_TOKEN, "TOKEN"),
    (CKA_SENSITIVE, "SENSITIVE"),
    (CKA_EXTRACTABLE, "EXTRACTABLE"),
    (CKA_LOCAL, "LOCAL"),
    (CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE"),
    (CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE"),
    (CKA_KEY_GEN_MECHANISM, "KEY_GEN_MECHANISM"),
    (CKA_DERIVE, "DERIVE"),
    (CKA_MODULUS, "MODULUS"),
];
const HASHES: [(CK_MECHANISM_TYPE, &str); 5] =
    [(CKM_SHA_1, "SHA_1"), (CKM_SHA224, "SHA224"), (CKM_SHA256, "SHA256"), (CKM_SHA512, "SHA512"), (0x7777, "unknown")];

fn cipher(number: usize) -> (Mechanism, &'static str) {
    match number % 8 {
        0 => (Mechanism::plain(CKM_AES_ECB), "AES_ECB"),
        1 => (Mechanism::with_bytes(CKM_AES_CBC, &[1; 16]), "AES_CBC"),
        2 => (Mechanism::with_bytes(CKM_AES_CBC_PAD, &[1; 16]), "AES_CBC_PAD"),
        3 => (Mechanism::gcm(&[2; 12], b"header", 96), "AES_GCM"),
        4 => (Mechanism::ctr([3; 16], 128), "AES_CTR"),
        5 => (Mechanism::with_bytes(CKM_AES_CBC, &[1; 15]), "AES_CBC with a short IV"),
        6 => (Mechanism::gcm(&[2; 12], b"", 128), "AES_GCM"),
        _ => (Mechanism::plain(CKM_SHA256), "a digest mechanism"),
    }
}

fn mac(number: usize) -> (Mechanism, &'static str) {
    match number % 5 {
        0 => (Mechanism::plain(CKM_AES_CMAC), "AES_CMAC"),
        1 => (Mechanism::plain(CKM_SHA256_HMAC), "SHA256_HMAC"),
        2 => (Mechanism::plain(CKM_SHA512_HMAC), "SHA512_HMAC"),
        3 => (Mechanism::plain(CKM_ECDSA), "ECDSA"),
        _ => (Mechanism::plain(CKM_AES_ECB), "a cipher mechanism"),
    }
}

fn wrap(number: usize) -> (Mechanism, &'static str) {
    match number % 3 {
        0 | 1 => (Mechanism::plain(CKM_AES_KEY_WRAP), "AES_KEY_WRAP"),
        _ => (Mechanism::plain(CKM_SHA256), "a digest mechanism"),
    }
}

fn kdf(number: usize) -> (Mechanism, &'static str) {
    match number % 4 {
        0 => (Mechanism::ecb_data(&[4; 32]), "AES_ECB_ENCRYPT_DATA"),
        1 => (Mechanism::cbc_data([5; 16], &[4; 32]), "AES_CBC_ENCRYPT_DATA"),
        2 => (Mechanism::cbc_data([5; 16], &[4; 17]), "AES_CBC_ENCRYPT_DATA of part of a block"),
        _ => (Mechanism::plain(CKM_SHA256), "a digest mechanism"),
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let object = || 0..12_usize;
    let kind = || prop_oneof![4 => Just(Kind::Aes), 2 => Just(Kind::Generic), 1 => Just(Kind::Data)];
    let length = || prop_oneof![3 => Just(16_usize), 1 => Just(24), 2 => Just(32), 1 => 0..40_usize];
    let uses = || prop_oneof![2 => Just(0b1_0111_1111_u16), 1 => any::<u16>()];
    let flaw = prop_oneof![
        12 => Just(Flaw::None), 1 => Just(Flaw::NoClass), 1 => Just(Flaw::NoKeyType), 1 => Just(Flaw::NoValue), 1 => Just(Flaw::LongBoolean),
        1 => Just(Flaw::Local), 1 => Just(Flaw::UnknownAttribute)
    ];
    let change = || {
        prop_oneof![
            Just(Change::Nothing),
            (0..3_u8).prop_map(Change::Label),
            (0..7_usize, any::<bool>()).prop_map(|(number, value)| Change::Use(number, value)),
            any::<bool>().prop_map(Change::Sensitive),
            any::<bool>().prop_map(Change::Extractable),
            any::<bool>().prop_map(Change::WrapWithTrusted),
            Just(Change::Class),
            Just(Change::Value),
            Just(Change::Trusted),
            Just(Change::Token)
        ]
    };
    let number = || 0..40_usize;
    let step = prop_oneof![
        4 => (kind(), length(), uses(), flaw).prop_map(|(kind, length, uses, flaw)| Step::Create { kind, length, uses, flaw }),
        2 => (length(), uses()).prop_map(|(length, uses)| Step::Generate { length, uses }),
        1 => any::<bool>().prop_map(|curve| Step::GeneratePair { curve }),
        2 => (object(), change()).prop_map(|(object, change)| Step::Copy { object, change }),
        3 => (object(), change()).prop_map(|(object, change)| Step::Set { object, change }),
        4 => (object(), number()).prop_map(|(object, attribute)| Step::Get { object, attribute }),
        1 => (0..3_u8).prop_map(|label| Step::Find { label }),
        4 => (object(), number(), 0..50_usize, any::<bool>()).prop_map(|(object, cipher, length, parts)| Step::Encrypt { object, cipher, length, parts }),
        3 => (object(), number(), 0..50_usize).prop_map(|(object, cipher, length)| Step::Decrypt { object, cipher, length }),
        3 => (object(), number(), 0..50_usize).prop_map(|(object, mac, length)| Step::Sign { object, mac, length }),
        2 => (object(), number(), 0..80_usize).prop_map(|(object, mac, length)| Step::Verify { object, mac, length }),
        1 => (number(), 0..200_usize).prop_map(|(hash, length)| Step::Digest { hash, length }),
        4 => (object(), object(), number()).prop_map(|(kek, key, wrap)| Step::Wrap { kek, key, wrap }),
        4 => (object(), number(), number(), any::<bool>(), kind(), uses()).prop_map(|(kek, blob, wrap, tamper, kind, uses)| Step::Unwrap { kek, blob, wrap, tamper, kind, uses }),
        4 => (object(), number(), length(), uses()).prop_map(|(object, kdf, length, uses)| Step::Derive { object, kdf, length, uses }),
        1 => object().prop_map(|object| Step::Destroy { object }),
        1 => (0..6_u8).prop_map(|call| Step::Stale { call }),
    ];
    vec(step, 5..40)
}

/// One of the two modules, with its session and what the sequence made there.
struct Side {
    module: &'static Module,
    session: Session,
    objects: Vec<Object>,
    blobs: Vec<Vec<u8>>,
}

/// What a step did on one side.
enum Outcome {
    Object(Object),
    Blob(Vec<u8>),
    Bytes(Vec<u8>),
    Done,
}

impl Side {
    fn new(module: &'static Module, label: &str) -> Self {
        let slot = Token::initialised(module, label);
        let session = module.open_rw(slot).unwrap();
        module.login(session, CKU_USER, USER_PIN).unwrap();
        Self { module, session, objects: Vec::new(), blobs: Vec::new() }
    }

    fn clear(&mut self) {
        for object in self.module.find(self.session, &Template::new()).unwrap() {
            self.module.destroy(self.session, object).unwrap();
        }
        self.objects.clear();
        self.blobs.clear();
    }

    fn object(&self, number: usize) -> Option<Object> {
        (!self.objects.is_empty()).then(|| self.objects[number % self.objects.len()])
    }

    /// `None`: there is nothing to do it with.
    fn run(&self, step: &Step) -> Option<Result<Outcome>> {
        let (module, session) = (self.module, self.session);
        let data: Vec<u8> = (0..200).collect();
        Some(match *step {
            Step::Create { kind, length, uses, flaw } => module
                .create(session, &flawed(template(kind, uses).bytes(CKA_VALUE, &data[..length]), flaw))
                .map(Outcome::Object),
            Step::Generate { length, uses } => {
                let template = template(Kind::Aes, uses).ulong(CKA_VALUE_LEN, length as CK_ULONG);
                module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &template).map(Outcome::Object)
            }
            Step::GeneratePair { curve } => {
                let public = Template::new().bool(CKA_TOKEN, false).bool(CKA_VERIFY, true);
                let public = if curve { public.bytes(CKA_EC_PARAMS, P256) } else { public };
                let private = Template::new()
                    .bool(CKA_TOKEN, false)
                    .bool(CKA_SIGN, true)
                    .bool(CKA_SENSITIVE, true)
                    .bool(CKA_EXTRACTABLE, false);
                module
                    .generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &public, &private)
                    .map(|(_, private)| Outcome::Object(private))
            }
            Step::Copy { object, change } => {
                module.copy(session, self.object(object)?, &changes(change)).map(Outcome::Object)
            }
            Step::Set { object, change } => {
                module.set(session, self.object(object)?, &changes(change)).map(|()| Outcome::Done)
            }
            Step::Get { object, attribute } => module
                .get(session, self.object(object)?, ATTRIBUTES[attribute % ATTRIBUTES.len()].0)
                .map(Outcome::Bytes),
            Step::Find { label } => module
                .find(session, &Template::new().bytes(CKA_LABEL, [label]))
                .map(|found| Outcome::Bytes(vec![found.len() as u8])),
            Step::Encrypt { object, cipher: number, length, parts } => {
                let (object, mechanism) = (self.object(object)?, cipher(number).0);
                let parts: &[usize] = if parts { &[7, 16] } else { &[] };
                let result = if parts.is_empty() {
                    module.encrypt(session, &mechanism, object, &data[..length])
                } else {
                    module.encrypt_in_parts(session, &mechanism, object, &data[..length], parts)
                };
                result.map(Outcome::Bytes)
            }
            Step::Decrypt { object, cipher: number, length } => {
                module.decrypt(session, &cipher(number).0, self.object(object)?, &data[..length]).map(Outcome::Bytes)
            }
            Step::Sign { object, mac: number, length } => {
                module.sign(session, &mac(number).0, self.object(object)?, &data[..length]).map(Outcome::Bytes)
            }
            Step::Verify { object, mac: number, length } => module
                .verify(session, &mac(number).0, self.object(object)?, &data[..16], &data[..length])
                .map(|()| Outcome::Done),
            Step::Digest { hash, length } => module
                .digest(session, &Mechanism::plain(HASHES[hash % HASHES.len()].0), &data[..length])
                .map(Outcome::Bytes),
            Step::Wrap { kek, key, wrap: number } => {
                module.wrap(session, &wrap(number).0, self.object(kek)?, self.object(key)?).map(Outcome::Blob)
            }
            Step::Unwrap { kek, blob, wrap: number, tamper, kind, uses } => {
                if self.blobs.is_empty() {
                    return None;
                }
                let mut blob = self.blobs[blob % self.blobs.len()].clone();
                blob[3] ^= u8::from(tamper);
                module
                    .unwrap(session, &wrap(number).0, self.object(kek)?, &blob, &template(kind, uses))
                    .map(Outcome::Object)
            }
            Step::Derive { object, kdf: number, length, uses } => {
                let template = template(Kind::Aes, uses).ulong(CKA_VALUE_LEN, length as CK_ULONG);
                module.derive(session, &kdf(number).0, self.object(object)?, &template).map(Outcome::Object)
            }
            Step::Destroy { object } => module.destroy(session, self.object(object)?).map(|()| Outcome::Done),
            Step::Stale { call } => match call {
                0 => module.get(session, 0xFFFF_0000, CKA_LABEL).map(Outcome::Bytes),
                1 => module.destroy(session, 0xFFFF_0000).map(|()| Outcome::Done),
                2 => module.encrypt(session, &cipher(0).0, 0xFFFF_0000, &[0; 16]).map(Outcome::Bytes),
                3 => module.sign(session, &mac(0).0, 0xFFFF_0000, &[0; 16]).map(Outcome::Bytes),
                4 => module.wrap(session, &wrap(0).0, 0xFFFF_0000, 0xFFFF_0000).map(Outcome::Bytes),
                _ => module.derive(session, &kdf(0).0, 0xFFFF_0000, &Template::new_aes(16)).map(Outcome::Object),
            },
        })
    }
}

fn template(kind: Kind, uses: u16) -> Template {
    let class = match kind {
        Kind::Aes => Template::new().ulong(CKA_CLASS, CKO_SECRET_KEY).ulong(CKA_KEY_TYPE, CKK_AES),
        Kind::Generic => Template::new().ulong(CKA_CLASS, CKO_SECRET_KEY).ulong(CKA_KEY_TYPE, CKK_GENERIC_SECRET),
        Kind::Data => return Template::new().ulong(CKA_CLASS, CKO_DATA).bool(CKA_TOKEN, false),
    };
    USES.iter()
        .enumerate()
        .fold(class.bool(CKA_TOKEN, false), |template, (bit, kind)| template.bool(*kind, uses >> bit & 1 == 1))
}

fn flawed(template: Template, flaw: Flaw) -> Template {
    match flaw {
        Flaw::None => template,
        Flaw::NoClass => template.without(CKA_CLASS),
        Flaw::NoKeyType => template.without(CKA_KEY_TYPE),
        Flaw::NoValue => template.without(CKA_VALUE),
        Flaw::LongBoolean => template.bytes(CKA_MODIFIABLE, [1, 1]),
        Flaw::Local => template.bool(CKA_LOCAL, true),
        Flaw::UnknownAttribute => template.bytes(0x7777_7777, [1]),
    }
}

fn changes(change: Change) -> Template {
    let template = Template::new();
    match change {
        Change::Nothing => template,
        Change::Label(label) => template.bytes(CKA_LABEL, [label]),
        Change::Use(number, value) => template.bool(USES[number], value),
        Change::Sensitive(value) => template.bool(CKA_SENSITIVE, value),
        Change::Extractable(value) => template.bool(CKA_EXTRACTABLE, value),
        Change::WrapWithTrusted(value) => template.bool(CKA_WRAP_WITH_TRUSTED, value),
        Change::Class => template.ulong(CKA_CLASS, CKO_DATA),
        Change::Value => template.bytes(CKA_VALUE, [9; 16]),
        Change::Trusted => template.bool(CKA_TRUSTED, true),
        Change::Token => template.bool(CKA_TOKEN, true),
    }
}

/// The call as the table names it.
fn call_name(step: &Step) -> String {
    match *step {
        Step::Create { kind, flaw, .. } => format!("C_CreateObject {kind:?}, flaw {flaw:?}"),
        Step::Generate { .. } => "C_GenerateKey".into(),
        Step::GeneratePair { curve } => {
            format!("C_GenerateKeyPair {}", if curve { "P-256" } else { "without a curve" })
        }
        Step::Copy { change, .. } => format!("C_CopyObject {}", change_name(change)),
        Step::Set { change, .. } => format!("C_SetAttributeValue {}", change_name(change)),
        Step::Get { attribute, .. } => format!("C_GetAttributeValue {}", ATTRIBUTES[attribute % ATTRIBUTES.len()].1),
        Step::Find { .. } => "C_FindObjects".into(),
        Step::Encrypt { cipher: number, parts, .. } => {
            format!("C_Encrypt{} {}", if parts { "Update" } else { "" }, cipher(number).1)
        }
        Step::Decrypt { cipher: number, .. } => format!("C_Decrypt {}", cipher(number).1),
        Step::Sign { mac: number, .. } => format!("C_Sign {}", mac(number).1),
        Step::Verify { mac: number, .. } => format!("C_Verify {}", mac(number).1),
        Step::Digest { hash, .. } => format!("C_Digest {}", HASHES[hash % HASHES.len()].1),
        Step::Wrap { wrap: number, .. } => format!("C_WrapKey {}", wrap(number).1),
        Step::Unwrap { wrap: number, tamper, kind, .. } => {
            format!("C_UnwrapKey {}{} as {kind:?}", wrap(number).1, if tamper { " tampered" } else { "" })
        }
        Step::Derive { kdf: number, .. } => format!("C_DeriveKey {}", kdf(number).1),
        Step::Destroy { .. } => "C_DestroyObject".into(),
        Step::Stale { call } => format!("stale handle {call}"),
    }
}

fn change_name(change: Change) -> String {
    match change {
        Change::Label(_) => "Label".into(),
        Change::Use(..) => "Use".into(),
        other => format!("{other:?}"),
    }
}

fn code_name<T>(result: &Result<T>) -> String {
    result.as_ref().err().map_or_else(|| "CKR_OK".into(), |code| name(*code))
}

#[test]
fn both_modules_answer_alike() {
    let mut theirs = Side::new(softhsm2(), "differential");
    let mut ours = Side::new(hsm_sim(), "differential");
    let seed: u64 = std::env::var("HSM_SIM_DIFFERENTIAL_SEED").map_or(0, |seed| seed.parse().unwrap());
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let strategy = steps();

    let mut differences: BTreeMap<(String, String, String), (usize, String)> = BTreeMap::new();
    let mut compared = 0;
    for _ in 0..SEQUENCES {
        theirs.clear();
        ours.clear();
        // Which objects have the same value on both sides: random keys do not, nor does what they
        // encrypt.
        let mut known: Vec<bool> = Vec::new();
        let mut blobs_known: Vec<bool> = Vec::new();
        let mut past = String::new();
        for step in strategy.new_tree(&mut runner).unwrap().current() {
            let uses_known = |number: usize| known.is_empty() || known[number % known.len()];
            let comparable = match step {
                Step::Generate { .. } | Step::GeneratePair { .. } => false,
                Step::Copy { object, .. }
                | Step::Get { object, .. }
                | Step::Encrypt { object, .. }
                | Step::Decrypt { object, .. }
                | Step::Derive { object, .. } => uses_known(object),
                Step::Sign { object, mac: number, .. } => uses_known(object) && mac(number).1 != "ECDSA",
                Step::Wrap { kek, key, .. } => uses_known(kek) && uses_known(key),
                Step::Unwrap { blob, .. } => blobs_known.is_empty() || blobs_known[blob % blobs_known.len()],
                _ => true,
            };
            let (Some(their), Some(our)) = (theirs.run(&step), ours.run(&step)) else { continue };
            compared += 1;
            let _ = writeln!(past, "  {step:?}: {} / {}", code_name(&their), code_name(&our));
            let call = call_name(&step);
            let mut differ = |their: String, our: String| {
                differences.entry((call.clone(), their, our)).or_insert_with(|| (0, past.clone())).0 += 1;
            };
            match (their, our) {
                (Ok(Outcome::Object(their)), Ok(Outcome::Object(our))) => {
                    let values = [(&theirs, their), (&ours, our)]
                        .map(|(side, object)| side.module.get(side.session, object, CKA_VALUE));
                    if comparable && values[0] != values[1] {
                        differ(
                            format!(
                                "CKR_OK, value {}",
                                values[0].as_ref().map_or_else(|code| name(*code), |_| "readable".into())
                            ),
                            format!(
                                "CKR_OK, value {}",
                                values[1].as_ref().map_or_else(|code| name(*code), |_| "readable".into())
                            ),
                        );
                    }
                    theirs.objects.push(their);
                    ours.objects.push(our);
                    known.push(comparable);
                }
                (Ok(Outcome::Blob(their)), Ok(Outcome::Blob(our))) => {
                    if their.len() != our.len() || (comparable && their != our) {
                        differ("CKR_OK, other bytes".into(), "CKR_OK, other bytes".into());
                    }
                    theirs.blobs.push(their);
                    ours.blobs.push(our);
                    blobs_known.push(comparable);
                }
                (Ok(Outcome::Bytes(their)), Ok(Outcome::Bytes(our))) => {
                    if their.len() != our.len() || (comparable && their != our) {
                        differ("CKR_OK, other bytes".into(), "CKR_OK, other bytes".into());
                    }
                }
                (Ok(Outcome::Done), Ok(Outcome::Done)) => {}
                (their, our) => {
                    if code_name(&their) != code_name(&our) {
                        differ(code_name(&their), code_name(&our));
                    }
                    // From here on the object is not the same on both sides: forget it.
                    if let Step::Set { object, .. } = step
                        && code_name(&their) != code_name(&our)
                    {
                        let number = object % known.len();
                        theirs.objects.remove(number);
                        ours.objects.remove(number);
                        known.remove(number);
                    }
                    // An object of one side only would shift the numbers of all that follow.
                    for (side, outcome) in [(&theirs, their), (&ours, our)] {
                        if let Ok(Outcome::Object(object)) = outcome {
                            side.module.destroy(side.session, object).unwrap();
                        }
                    }
                }
            }
        }
    }

    let mut report = String::new();
    for ((call, their, our), (count, past)) in &differences {
        if !EXPLAINED.iter().any(|row| explains(row, call, their, our)) {
            let _ = writeln!(report, "{count} × {call}: SoftHSM2 {their}, hsm-sim {our}");
            if std::env::var_os("HSM_SIM_DIFFERENTIAL_PAST").is_some() {
                let _ = writeln!(report, "{past}");
            }
        }
    }
    assert!(
        report.is_empty(),
        "differences that no one explained (HSM_SIM_DIFFERENTIAL_PAST=1 shows how each first came about):\n{report}"
    );
    assert!(compared > SEQUENCES * 10, "only {compared} calls were compared");
    if seed == 0 {
        for row in EXPLAINED {
            let met = differences.keys().any(|(call, their, our)| explains(row, call, their, our));
            assert!(met, "an explained difference is no more: {row:?}");
        }
    }
}

fn explains(row: &(&str, &str, &str, &str), call: &str, their: &str, our: &str) -> bool {
    let matches = match row.0.split_once('*') {
        None => row.0 == call,
        Some((start, end)) => call.len() >= start.len() + end.len() && call.starts_with(start) && call.ends_with(end),
    };
    matches && row.1 == their && row.2 == our
}
