//! The C interface: lengths and buffers, pointers that are null or unaligned, garbage,
//! initialisation, fork. Nothing that a caller says may crash the module, except pointers that lie.
#![expect(unsafe_code, reason = "calls into a C interface, some of them wrong on purpose")]
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "test helpers: a failure is to stop the test"
)]

#[macro_use]
mod common;

use std::ffi::c_void;
use std::process::Stdio;
use std::ptr::null_mut;
use std::sync::Barrier;

use common::template::P256;
use common::{Mechanism, Module, Result, Session, Template, Token, child, folder, hsm_sim, name};
use cryptoki_sys::*;
use proptest::collection::vec;
use proptest::prelude::*;

const HUGE: CK_ULONG = CK_ULONG::MAX;

/// The two-call convention (PKCS#11 2.40 section 5.2): a null buffer asks for the length; a small
/// one gives BUFFER_TOO_SMALL and the length; neither ends the operation or does it. `ends`: the
/// last call ends an operation.
fn two_calls(what: &str, ends: bool, function: impl Fn(*mut u8, *mut CK_ULONG) -> Result<()>) {
    let mut length = HUGE;
    function(null_mut(), &raw mut length).unwrap_or_else(|code| panic!("{what}, length query: {}", name(code)));
    assert!(length > 0 && length < 10_000, "{what}: {length} bytes");
    let mut buffer = vec![0xEE_u8; usize::try_from(length).unwrap() + 8];
    let mut given = 0;
    let code = function(buffer.as_mut_ptr(), &raw mut given).unwrap_err();
    assert_eq!(code, CKR_BUFFER_TOO_SMALL, "{what}: {}", name(code));
    assert!(given > 0 && given <= length, "{what}: the length with BUFFER_TOO_SMALL is {given}, asked it was {length}");
    assert!(buffer.iter().all(|byte| *byte == 0xEE), "{what}: wrote into a buffer that is too small");
    given = length;
    function(buffer.as_mut_ptr(), &raw mut given)
        .unwrap_or_else(|code| panic!("{what}, after BUFFER_TOO_SMALL: {}", name(code)));
    assert!(given <= length, "{what}: wrote {given} bytes and said {length}");
    assert!(buffer[usize::try_from(given).unwrap()..].iter().all(|byte| *byte == 0xEE), "{what}: wrote past its end");
    if ends {
        assert_eq!(
            function(null_mut(), &raw mut given),
            Err(CKR_OPERATION_NOT_INITIALIZED),
            "{what}: the operation is active after its end"
        );
    }
}

#[test]
fn lengths_are_asked_first() {
    let token = Token::fresh("two calls");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let ec = Template::new().bytes(CKA_EC_PARAMS, P256).bool(CKA_VERIFY, true);
    let private = module
        .generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &ec, &Template::new().bool(CKA_SIGN, true))
        .unwrap()
        .1;
    let data = [7_u8; 48];
    let pointer = data.as_ptr().cast_mut();
    for kind in ["ecb", "cbc", "cbc-pad", "gcm", "ctr"] {
        let mechanism = match kind {
            "ecb" => Mechanism::plain(CKM_AES_ECB),
            "cbc" => Mechanism::with_bytes(CKM_AES_CBC, &[3; 16]),
            "cbc-pad" => Mechanism::with_bytes(CKM_AES_CBC_PAD, &[3; 16]),
            "ctr" => Mechanism::ctr([3; 16], 128),
            _ => Mechanism::gcm(&[3; 12], b"aad", 96),
        };
        let mut raw = mechanism.raw();
        call!(module, C_EncryptInit, session, &raw mut raw, key).unwrap();
        let encrypt = |output, length| call!(module, C_Encrypt, session, pointer, 48, output, length);
        two_calls(&format!("C_Encrypt {kind}"), true, encrypt);
        let mut ciphertext = module.encrypt(session, &mechanism, key, &data).unwrap();
        let (input, size) = (ciphertext.as_mut_ptr(), ciphertext.len() as CK_ULONG);
        call!(module, C_DecryptInit, session, &raw mut raw, key).unwrap();
        let decrypt = |output, length| call!(module, C_Decrypt, session, input, size, output, length);
        two_calls(&format!("C_Decrypt {kind}"), true, decrypt);
    }
    for (what, mechanism, key) in [
        ("C_Sign CMAC", Mechanism::plain(CKM_AES_CMAC), key),
        ("C_Sign ECDSA", Mechanism::plain(CKM_ECDSA), private),
        ("C_Sign ECDSA_SHA256", Mechanism::plain(CKM_ECDSA_SHA256), private),
    ] {
        let mut raw = mechanism.raw();
        call!(module, C_SignInit, session, &raw mut raw, key).unwrap();
        let sign = |output, length| call!(module, C_Sign, session, pointer, 32, output, length);
        two_calls(what, true, sign);
    }
    let mut raw = Mechanism::plain(CKM_AES_CMAC).raw();
    call!(module, C_SignInit, session, &raw mut raw, key).unwrap();
    call!(module, C_SignUpdate, session, pointer, 32).unwrap();
    let finish = |output, length| call!(module, C_SignFinal, session, output, length);
    two_calls("C_SignFinal", true, finish);
    let mut raw = Mechanism::plain(CKM_SHA256).raw();
    call!(module, C_DigestInit, session, &raw mut raw).unwrap();
    let digest = |output, length| call!(module, C_Digest, session, pointer, 32, output, length);
    two_calls("C_Digest", true, digest);
    let mut raw = Mechanism::plain(CKM_AES_KEY_WRAP).raw();
    let wrap_raw = &raw mut raw;
    let wrap = |output, length| call!(module, C_WrapKey, session, wrap_raw, key, key, output, length);
    two_calls("C_WrapKey", false, wrap);
}

#[test]
fn lists_are_asked_first() {
    let token = Token::fresh("lists");
    let (module, slot) = (token.module, token.slot);
    let mut count = 0;
    call!(module, C_GetSlotList, CK_FALSE, null_mut(), &raw mut count).unwrap();
    assert!(count > 1, "a token simulator with one slot");
    let (mut small, mut place) = (1, 0);
    assert_eq!(call!(module, C_GetSlotList, CK_FALSE, &raw mut place, &raw mut small), Err(CKR_BUFFER_TOO_SMALL));
    assert_eq!(small, count);
    let mut place = 0;
    let mut small = 1;
    assert_eq!(call!(module, C_GetMechanismList, slot, &raw mut place, &raw mut small), Err(CKR_BUFFER_TOO_SMALL));
    assert_eq!(small, module.mechanisms(slot).len() as CK_ULONG);
    for mechanism in module.mechanisms(slot) {
        let mut info = CK_MECHANISM_INFO::default();
        call!(module, C_GetMechanismInfo, slot, mechanism, &raw mut info).unwrap();
        assert!(info.ulMinKeySize <= info.ulMaxKeySize && info.flags != 0, "mechanism {mechanism:#x}");
    }
    let mut info = CK_MECHANISM_INFO::default();
    assert_eq!(call!(module, C_GetMechanismInfo, slot, 0x7FFF_FFFF, &raw mut info), Err(CKR_MECHANISM_INVALID));
    assert_eq!(call!(module, C_GetMechanismInfo, 9_999_999, CKM_AES_ECB, &raw mut info), Err(CKR_SLOT_ID_INVALID));
    assert_eq!(module.token_info(9_999_999).map(drop), Err(CKR_SLOT_ID_INVALID));
    assert_eq!(module.open(9_999_999, 0), Err(CKR_SLOT_ID_INVALID));
}

/// Each function with every pointer null and every length huge: an answer, not a crash, and never
/// CKR_OK where something was to be written.
#[test]
fn null_pointers_are_refused() {
    let token = Token::fresh("null");
    let (module, session, slot) = (token.module, token.session, token.slot);
    let key = token.aes(&[1; 16], Template::new());
    let mut raw = Mechanism::plain(CKM_AES_ECB).raw();
    let ecb = &raw mut raw;
    let mut place = 0;
    let handle = &raw mut place;
    let refused: Vec<(&str, Result<()>)> = vec![
        ("C_GetInfo", call!(module, C_GetInfo, null_mut())),
        ("C_GetFunctionList", call!(module, C_GetFunctionList, null_mut())),
        ("C_GetSlotList", call!(module, C_GetSlotList, 0, null_mut(), null_mut())),
        ("C_GetSlotInfo", call!(module, C_GetSlotInfo, slot, null_mut())),
        ("C_GetTokenInfo", call!(module, C_GetTokenInfo, slot, null_mut())),
        ("C_GetMechanismList", call!(module, C_GetMechanismList, slot, null_mut(), null_mut())),
        ("C_GetMechanismInfo", call!(module, C_GetMechanismInfo, slot, CKM_AES_ECB, null_mut())),
        ("C_InitToken", call!(module, C_InitToken, 63, null_mut(), 8, null_mut())),
        ("C_InitPIN", call!(module, C_InitPIN, session, null_mut(), 8)),
        ("C_SetPIN", call!(module, C_SetPIN, session, null_mut(), 8, null_mut(), 8)),
        ("C_OpenSession", call!(module, C_OpenSession, slot, CKF_SERIAL_SESSION, null_mut(), None, null_mut())),
        ("C_GetSessionInfo", call!(module, C_GetSessionInfo, session, null_mut())),
        ("C_GetOperationState", call!(module, C_GetOperationState, session, null_mut(), null_mut())),
        ("C_SetOperationState", call!(module, C_SetOperationState, session, null_mut(), 9, 0, 0)),
        ("C_Login", call!(module, C_Login, session, CKU_USER, null_mut(), 8)),
        ("C_CreateObject", call!(module, C_CreateObject, session, null_mut(), 3, handle)),
        ("C_CreateObject", call!(module, C_CreateObject, session, null_mut(), HUGE, null_mut())),
        ("C_CopyObject", call!(module, C_CopyObject, session, key, null_mut(), 2, handle)),
        ("C_CopyObject", call!(module, C_CopyObject, session, key, null_mut(), 0, null_mut())),
        ("C_GetObjectSize", call!(module, C_GetObjectSize, session, key, null_mut())),
        ("C_GetAttributeValue", call!(module, C_GetAttributeValue, session, key, null_mut(), 1)),
        ("C_SetAttributeValue", call!(module, C_SetAttributeValue, session, key, null_mut(), HUGE)),
        ("C_FindObjectsInit", call!(module, C_FindObjectsInit, session, null_mut(), 1)),
        ("C_SignRecoverInit", call!(module, C_SignRecoverInit, session, null_mut(), HUGE)),
        ("C_GenerateKey", call!(module, C_GenerateKey, session, null_mut(), null_mut(), 0, handle)),
        ("C_GenerateKey", call!(module, C_GenerateKey, session, ecb, null_mut(), 5, null_mut())),
        (
            "C_GenerateKeyPair",
            call!(module, C_GenerateKeyPair, session, null_mut(), null_mut(), 9, null_mut(), 9, null_mut(), null_mut()),
        ),
        ("C_WrapKey", call!(module, C_WrapKey, session, null_mut(), key, key, null_mut(), null_mut())),
        ("C_WrapKey", call!(module, C_WrapKey, session, ecb, key, key, null_mut(), null_mut())),
        ("C_UnwrapKey", call!(module, C_UnwrapKey, session, ecb, key, null_mut(), 16, null_mut(), 0, handle)),
        ("C_DeriveKey", call!(module, C_DeriveKey, session, null_mut(), key, null_mut(), 0, handle)),
        ("C_SeedRandom", call!(module, C_SeedRandom, session, null_mut(), 8)),
        ("C_GenerateRandom", call!(module, C_GenerateRandom, session, null_mut(), 8)),
        ("C_WaitForSlotEvent", call!(module, C_WaitForSlotEvent, CKF_DONT_BLOCK, null_mut(), null_mut())),
    ];
    for (function, result) in refused {
        assert!(result.is_err(), "{function} with null pointers said CKR_OK");
    }
    // Without a mechanism an operation is cancelled (PKCS#11 3.0 section 5.8.1): none is active
    // then.
    call!(module, C_EncryptInit, session, ecb, key).unwrap();
    let _ = call!(module, C_EncryptInit, session, null_mut(), HUGE);
    assert_eq!(common::finish_encryption(module, session, &[0; 16]), Err(CKR_OPERATION_NOT_INITIALIZED));
    let _ = call!(module, C_DecryptInit, session, null_mut(), HUGE);
    let _ = call!(module, C_SignInit, session, null_mut(), HUGE);
    let _ = call!(module, C_VerifyInit, session, null_mut(), HUGE);
    let _ = call!(module, C_DigestInit, session, null_mut());
    // With an operation active.
    for round in 0..4 {
        call!(module, C_EncryptInit, session, ecb, key).unwrap();
        let result = match round {
            0 => call!(module, C_Encrypt, session, null_mut(), 16, null_mut(), null_mut()),
            1 => call!(module, C_EncryptUpdate, session, null_mut(), 16, null_mut(), null_mut()),
            2 => call!(module, C_EncryptFinal, session, null_mut(), null_mut()),
            _ => {
                let mut length = 64;
                let mut buffer = [0_u8; 64];
                call!(module, C_Encrypt, session, null_mut(), HUGE, buffer.as_mut_ptr(), &raw mut length)
            }
        };
        assert!(result.is_err(), "round {round}");
        // Whether the operation has ended is not told by a null pointer; end it.
        let _ = common::finish_encryption(module, session, &[0; 16]);
    }
    let mut cmac = Mechanism::plain(CKM_AES_CMAC).raw();
    call!(module, C_VerifyInit, session, &raw mut cmac, key).unwrap();
    assert!(call!(module, C_Verify, session, null_mut(), 5, null_mut(), 16).is_err());
    let _ = call!(module, C_VerifyFinal, session, null_mut(), 16);
    call!(module, C_FindObjectsInit, session, null_mut(), 0).unwrap();
    assert!(call!(module, C_FindObjects, session, null_mut(), 5, null_mut()).is_err());
    let _ = call!(module, C_FindObjectsFinal, session);
    assert_eq!(
        module.encrypt(session, &Mechanism::plain(CKM_AES_ECB), key, &[0; 16]).unwrap().len(),
        16,
        "the session is usable"
    );
}

/// Null with length 0 is an empty input, and a template of nothing is fine.
#[test]
fn null_with_length_zero_is_empty() {
    let token = Token::fresh("empty");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&hex16(), Template::new());
    let mut cmac = Mechanism::plain(CKM_AES_CMAC).raw();
    call!(module, C_SignInit, session, &raw mut cmac, key).unwrap();
    let mac = common::into_buffer(16, |output, length| call!(module, C_Sign, session, null_mut(), 0, output, length))
        .unwrap();
    // RFC 4493 section 4, example 1.
    assert_eq!(mac[..4], [0xBB, 0x1D, 0x69, 0x29]);
    let gcm = Mechanism::gcm(&[0; 12], &[], 128);
    let mut raw = gcm.raw();
    call!(module, C_EncryptInit, session, &raw mut raw, key).unwrap();
    let tag =
        common::into_buffer(16, |output, length| call!(module, C_Encrypt, session, null_mut(), 0, output, length))
            .unwrap();
    assert_eq!(tag.len(), 16);
    call!(module, C_FindObjectsInit, session, null_mut(), 0).unwrap();
    call!(module, C_FindObjectsFinal, session).unwrap();
    call!(module, C_GetAttributeValue, session, key, null_mut(), 0).unwrap();
    call!(module, C_SetAttributeValue, session, key, null_mut(), 0).unwrap();
    call!(module, C_GenerateRandom, session, null_mut(), 0).unwrap();
}

fn hex16() -> [u8; 16] {
    [0x2B, 0x7E, 0x15, 0x16, 0x28, 0xAE, 0xD2, 0xA6, 0xAB, 0xF7, 0x15, 0x88, 0x09, 0xCF, 0x4F, 0x3C]
}

/// Templates, values and parameters at odd addresses.
#[test]
fn unaligned_structures_are_read() {
    let token = Token::fresh("unaligned");
    let (module, session) = (token.module, token.session);
    let template = Template::aes(&[1; 16]).bytes(CKA_LABEL, "odd");
    let attributes = template.attributes();
    // Values moved to odd addresses, then the whole template.
    let mut values: Vec<u8> = vec![0];
    let mut offsets = Vec::new();
    for attribute in &attributes {
        if values.len().is_multiple_of(2) {
            values.push(0);
        }
        offsets.push(values.len());
        // SAFETY: the template's values are valid for their lengths.
        values.extend(unsafe {
            std::slice::from_raw_parts(attribute.pValue.cast::<u8>(), usize::try_from(attribute.ulValueLen).unwrap())
        });
    }
    let mut space = vec![0_u64; attributes.len() * size_of::<CK_ATTRIBUTE>() / 8 + 2];
    // SAFETY: within `space`, which is larger by 16 bytes.
    let moved = unsafe { space.as_mut_ptr().cast::<u8>().add(1).cast::<CK_ATTRIBUTE>() };
    for (i, attribute) in attributes.iter().enumerate() {
        // SAFETY: within `values` and `space`; the write is said to be unaligned.
        unsafe {
            let value = values.as_mut_ptr().add(offsets[i]).cast::<c_void>();
            moved.add(i).write_unaligned(CK_ATTRIBUTE { pValue: value, ..*attribute });
        }
    }
    let mut key = 0;
    call!(module, C_CreateObject, session, moved, attributes.len() as CK_ULONG, &raw mut key).unwrap();
    assert_eq!(token.value(key), [1; 16]);
    let expected = module.encrypt(session, &Mechanism::gcm(&[3; 12], b"aad", 128), key, b"data").unwrap();
    let (mut iv, mut aad) = ([3_u8; 12], *b"aad");
    let parameters = CK_GCM_PARAMS {
        pIv: iv.as_mut_ptr(),
        ulIvLen: 12,
        ulIvBits: 96,
        pAAD: aad.as_mut_ptr(),
        ulAADLen: 3,
        ulTagBits: 128,
    };
    let mut space = [0_u64; size_of::<CK_GCM_PARAMS>() / 8 + 1];
    // SAFETY: one byte into `space`, which is larger by eight.
    let odd = unsafe { space.as_mut_ptr().cast::<u8>().add(1) };
    // SAFETY: as above; the write is said to be unaligned.
    unsafe { odd.cast::<CK_GCM_PARAMS>().write_unaligned(parameters) };
    let mut mechanism = CK_MECHANISM {
        mechanism: CKM_AES_GCM,
        pParameter: odd.cast(),
        ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
    };
    call!(module, C_EncryptInit, session, &raw mut mechanism, key).unwrap();
    assert_eq!(common::finish_encryption(module, session, b"data").unwrap(), expected);
}

/// Inner pointers that are null, lengths that are absurd, parameters that are cut.
#[test]
fn hostile_parameters_are_refused() {
    let token = Token::fresh("hostile");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let ec = module.create(session, &Template::ec_private(P256, &[1; 32])).unwrap();
    let gcm = |parameters: CK_GCM_PARAMS| {
        let mut parameters = parameters;
        let mut mechanism = CK_MECHANISM {
            mechanism: CKM_AES_GCM,
            pParameter: (&raw mut parameters).cast(),
            ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
        };
        call!(module, C_EncryptInit, session, &raw mut mechanism, key)
    };
    let mut iv = [0_u8; 12];
    let good = CK_GCM_PARAMS {
        pIv: iv.as_mut_ptr(),
        ulIvLen: 12,
        ulIvBits: 96,
        pAAD: null_mut(),
        ulAADLen: 0,
        ulTagBits: 128,
    };
    for bad in [
        CK_GCM_PARAMS { pIv: null_mut(), ..good },
        CK_GCM_PARAMS { pAAD: null_mut(), ulAADLen: 16, ..good },
        CK_GCM_PARAMS { pAAD: null_mut(), ulAADLen: HUGE, ..good },
        CK_GCM_PARAMS { ulIvLen: 0, ..good },
        CK_GCM_PARAMS { pIv: null_mut(), ulIvLen: HUGE, ..good },
        CK_GCM_PARAMS { ulTagBits: 129, ..good },
        CK_GCM_PARAMS { ulTagBits: HUGE, ..good },
        CK_GCM_PARAMS { ulTagBits: 7, ..good },
    ] {
        let code = gcm(bad).unwrap_err();
        assert!([CKR_MECHANISM_PARAM_INVALID, CKR_ARGUMENTS_BAD].contains(&code), "{}", name(code));
    }
    gcm(good).unwrap();
    common::finish_encryption(module, session, &[]).unwrap();

    let new_key = Template::new_aes(16);
    // A structure with pointers, cut or with nothing behind it.
    let structures = [
        (CKM_AES_GCM, size_of::<CK_GCM_PARAMS>()),
        (CKM_AES_CBC_ENCRYPT_DATA, size_of::<CK_AES_CBC_ENCRYPT_DATA_PARAMS>()),
        (CKM_AES_ECB_ENCRYPT_DATA, size_of::<CK_KEY_DERIVATION_STRING_DATA>()),
        (CKM_SP800_108_COUNTER_KDF, size_of::<CK_SP800_108_KDF_PARAMS>()),
        (CKM_HKDF_DERIVE, size_of::<CK_HKDF_PARAMS>()),
        (CKM_ECDH1_DERIVE, size_of::<CK_ECDH1_DERIVE_PARAMS>()),
        (CKM_AES_CTR, size_of::<CK_AES_CTR_PARAMS>()),
        (CKM_AES_CBC, 16),
    ];
    for (kind, size) in structures {
        let base = if kind == CKM_ECDH1_DERIVE { ec } else { key };
        for length in [0, 1, size - 1, size, size + 1] {
            // All zeros: null pointers and lengths of zero.
            let mechanism = Mechanism::with_bytes(kind, &vec![0; length]);
            let fits = length == size && [CKM_AES_CBC].contains(&kind);
            let encrypted = module.encrypt(session, &mechanism, base, &[0; 16]);
            assert_eq!(encrypted.is_ok(), fits, "{kind:#x} with {length} bytes");
            assert!(
                module.derive(session, &mechanism, base, &Template::new_aes(16)).is_err(),
                "{kind:#x} with {length} bytes"
            );
            // Nothing behind a length.
            let mut lying = CK_MECHANISM { mechanism: kind, pParameter: null_mut(), ulParameterLen: size as CK_ULONG };
            assert!(call!(module, C_EncryptInit, session, &raw mut lying, base).is_err());
            let (mut template, mut object) = (new_key.attributes(), 0);
            assert!(
                call!(module, C_DeriveKey, session, &raw mut lying, base, template.as_mut_ptr(), 3, &raw mut object)
                    .is_err()
            );
        }
    }
    // KDF fields: many, at nowhere.
    for (count, place) in [(1, null_mut()), (HUGE, null_mut())] {
        let mut parameters = CK_SP800_108_KDF_PARAMS {
            prfType: CKM_AES_CMAC,
            ulNumberOfDataParams: count,
            pDataParams: place,
            ulAdditionalDerivedKeys: 0,
            pAdditionalDerivedKeys: null_mut(),
        };
        let mut mechanism = CK_MECHANISM {
            mechanism: CKM_SP800_108_COUNTER_KDF,
            pParameter: (&raw mut parameters).cast(),
            ulParameterLen: size_of::<CK_SP800_108_KDF_PARAMS>() as CK_ULONG,
        };
        let (mut template, mut object) = (new_key.attributes(), 0);
        assert!(
            call!(module, C_DeriveKey, session, &raw mut mechanism, key, template.as_mut_ptr(), 3, &raw mut object)
                .is_err()
        );
    }
    // Public points: none, cut, off the curve, infinity.
    for public in [&[][..], &[0], &[4], &[4; 64], &[4; 65], &[0; 65], &[4; 1000]] {
        let result = module.derive(session, &Mechanism::ecdh(CKD_NULL, public, &[]), ec, &Template::new_generic(32));
        assert!(result.is_err(), "a public point of {} bytes", public.len());
    }
    // Nested templates: cut, null, nested in themselves.
    for value in [vec![1_u8; 23], vec![0_u8; 24], vec![0_u8; 48]] {
        let created = module.create(session, &Template::aes(&[1; 16]).bytes(CKA_UNWRAP_TEMPLATE, &value));
        if !value.len().is_multiple_of(24) {
            assert!(created.is_err(), "a nested template of {} bytes", value.len());
        }
    }
    // Wrapped keys of every length.
    for length in (0..50).chain([1000, 100_000]) {
        let result = module.unwrap(
            session,
            &Mechanism::plain(CKM_AES_KEY_WRAP),
            key,
            &vec![5; length],
            &Template::secret(CKK_AES),
        );
        assert!(result.is_err(), "{length} bytes of nothing were unwrapped");
        assert!(
            module
                .unwrap(
                    session,
                    &Mechanism::plain(CKM_AES_KEY_WRAP_KWP),
                    key,
                    &vec![5; length],
                    &Template::secret(CKK_AES)
                )
                .is_err()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Garbage as parameters and templates: an answer, whatever it is, and the session works
    /// afterwards. Sizes at which a parameter would be read as a structure of pointers are left
    /// out: garbage pointers are the caller's crime.
    #[test]
    fn garbage_is_answered(
        pick in any::<prop::sample::Index>(),
        parameter in vec(any::<u8>(), 0..100).prop_filter("a structure with pointers", |bytes| bytes.len() < 16 || bytes.len() % 8 != 0 || bytes.len() == 16),
        attributes in vec((prop_oneof![0_u64..0x700, Just(CKA_ALLOWED_MECHANISMS), any::<u64>()], vec(any::<u8>(), 0..40)), 0..6),
        data in vec(any::<u8>(), 0..70),
        handles in any::<[u64; 2]>(),
    ) {
        let token = garbage_token();
        let (module, session) = (token.module, token.session);
        let mechanisms = module.mechanisms(token.slot);
        let kind = mechanisms[pick.index(mechanisms.len())];
        // 16 bytes are an IV for some, and two pointers or lengths for others.
        prop_assume!(parameter.len() != 16 || [CKM_AES_CBC, CKM_AES_CBC_PAD, CKM_AES_GMAC, CKM_AES_ECB].contains(&kind));
        let mechanism = Mechanism::with_bytes(kind, &parameter);
        let nested = [CKA_WRAP_TEMPLATE, CKA_UNWRAP_TEMPLATE, CKA_DERIVE_TEMPLATE];
        let template = attributes.into_iter().filter(|(kind, _)| !nested.contains(kind)).fold(Template::new(), |template, (kind, value)| template.bytes(kind, value));
        for key in [token.key, token.private, handles[0]] {
            let _ = module.encrypt(session, &mechanism, key, &data);
            let _ = module.decrypt(session, &mechanism, key, &data);
            let _ = module.sign(session, &mechanism, key, &data);
            let _ = module.verify(session, &mechanism, key, &data, &parameter);
            let _ = module.wrap(session, &mechanism, key, token.key);
            let _ = module.unwrap(session, &mechanism, key, &data, &template);
            let _ = module.derive(session, &mechanism, key, &template);
            let _ = module.copy(session, key, &template);
            let _ = module.encrypt_in_parts(session, &mechanism, key, &data, &[3, 20]);
            let _ = module.decrypt_in_parts(session, &mechanism, key, &data, &[3, 20]);
        }
        let _ = module.create(session, &template);
        let _ = module.create(session, &Template::aes(&[1; 16]).with(template.clone()));
        let _ = module.generate_key(session, &mechanism, &template);
        let _ = module.generate_key_pair(session, &mechanism, &template, &template);
        let _ = module.digest(session, &mechanism, &data);
        let _ = module.find(session, &template);
        let _ = module.set(session, token.spare(), &template);
        let _ = module.destroy(session, handles[1]);
        let _ = module.encrypt(handles[1], &mechanism, token.key, &data);
        prop_assert_eq!(module.encrypt(session, &Mechanism::plain(CKM_AES_ECB), token.key, &[0; 16]).map(|block| block.len()), Ok(16));
    }
}

struct Garbage {
    module: &'static Module,
    slot: CK_SLOT_ID,
    session: Session,
    key: common::Object,
    private: common::Object,
}

impl Garbage {
    /// A session object to spoil.
    fn spare(&self) -> common::Object {
        self.module.create(self.session, &Template::aes(&[1; 16])).unwrap()
    }
}

fn garbage_token() -> &'static Garbage {
    static TOKEN: std::sync::OnceLock<Garbage> = std::sync::OnceLock::new();
    TOKEN.get_or_init(|| {
        let Token { module, slot, session } = Token::fresh("garbage");
        let key = module.create(session, &Template::aes(&[1; 16])).unwrap();
        let private = module.create(session, &Template::ec_private(P256, &[1; 32])).unwrap();
        Garbage { module, slot, session, key, private }
    })
}

#[test]
fn the_function_lists_are_whole() {
    let module = hsm_sim();
    assert_eq!((module.list.version.major, module.list.version.minor), (2, 40));
    assert_eq!(module.list3().version.major, 3);
    let mut info = CK_INFO::default();
    call!(module, C_GetInfo, &raw mut info).unwrap();
    assert!(info.cryptokiVersion.major == 3 || info.cryptokiVersion.minor == 40);
    assert_eq!(info.flags, 0);
    // Every pointer of both lists is there (PKCS#11 2.40 section 3.6: a function that is not
    // supported has a stub).
    let pointers = |start: *const u8, size: usize| {
        let count = (size - size_of::<usize>()) / size_of::<usize>();
        // SAFETY: the lists are a version, padded to a pointer, and then function pointers only.
        unsafe { std::slice::from_raw_parts(start.add(size_of::<usize>()).cast::<usize>(), count) }.to_vec()
    };
    for list in [
        pointers((&raw const module.list).cast(), size_of::<CK_FUNCTION_LIST>()),
        pointers(std::ptr::from_ref(module.list3()).cast(), size_of::<CK_FUNCTION_LIST_3_0>()),
    ] {
        assert!(list.len() >= 68);
        assert!(list.iter().all(|pointer| *pointer != 0), "a null function pointer");
    }
    // C_GetInterface with null gives the default interface; unknown names and versions are refused.
    let get = module.library().C_GetInterface.as_ref().unwrap();
    let mut interface = null_mut();
    // SAFETY: nulls are allowed here (PKCS#11 3.0 section 5.4.6).
    common::check(unsafe { get(null_mut(), null_mut(), &raw mut interface, 0) }).unwrap();
    assert!(!interface.is_null());
    let mut wrong = *b"Vendor\0";
    // SAFETY: a name that ends with zero.
    assert!(common::check(unsafe { get(wrong.as_mut_ptr(), null_mut(), &raw mut interface, 0) }).is_err());
    let mut version = CK_VERSION { major: 9, minor: 9 };
    // SAFETY: as above.
    assert!(common::check(unsafe { get(null_mut(), &raw mut version, &raw mut interface, 0) }).is_err());
    // SAFETY: null on purpose.
    assert!(common::check(unsafe { get(null_mut(), null_mut(), null_mut(), 0) }).is_err());
    let list = module.library().C_GetInterfaceList.as_ref().unwrap();
    let mut count = 0;
    // SAFETY: a count query, then as many places.
    unsafe {
        common::check(list(null_mut(), &raw mut count)).unwrap();
        let mut interfaces = vec![
            CK_INTERFACE { pInterfaceName: null_mut(), pFunctionList: null_mut(), flags: 0 };
            usize::try_from(count).unwrap()
        ];
        let mut small = 0;
        assert_eq!(common::check(list(interfaces.as_mut_ptr(), &raw mut small)), Err(CKR_BUFFER_TOO_SMALL));
        common::check(list(interfaces.as_mut_ptr(), &raw mut count)).unwrap();
        assert!(interfaces.iter().all(|interface| !interface.pFunctionList.is_null()));
    }
    assert!(count >= 2);
}

#[test]
fn the_parallel_functions_say_no() {
    let token = Token::fresh("parallel");
    assert_eq!(call!(token.module, C_GetFunctionStatus, token.session), Err(CKR_FUNCTION_NOT_PARALLEL));
    assert_eq!(call!(token.module, C_CancelFunction, token.session), Err(CKR_FUNCTION_NOT_PARALLEL));
    let mut session = 0;
    assert_eq!(
        call!(token.module, C_OpenSession, token.slot, 0, null_mut(), None, &raw mut session),
        Err(CKR_SESSION_PARALLEL_NOT_SUPPORTED)
    );
}

#[test]
fn initialisation_in_a_process_of_its_own() {
    assert!(
        child("as_a_process", folder(), &[("ROLE", "initialise")]).stdout(Stdio::null()).status().unwrap().success()
    );
}

#[test]
fn a_forked_child_is_not_initialised() {
    assert!(child("as_a_process", folder(), &[("ROLE", "fork")]).stdout(Stdio::null()).status().unwrap().success());
}

/// Not a test: what the tests above run as another process.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn as_a_process() {
    common::configure(folder());
    let module = Module::load(&Module::hsm_sim_path());
    match std::env::var("ROLE").as_deref() {
        Ok("initialise") => initialise(&module),
        Ok("fork") => fork_and_call(&module),
        role => panic!("unknown role {role:?}"),
    }
}

fn initialise(module: &Module) {
    let mut count = 0;
    let slots = |count: &mut CK_ULONG| call!(module, C_GetSlotList, CK_FALSE, null_mut(), std::ptr::from_mut(count));
    assert_eq!(slots(&mut count), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
    assert_eq!(module.open(0, 0), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
    assert_eq!(call!(module, C_Finalize, null_mut()), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
    let mut info = CK_INFO::default();
    assert_eq!(call!(module, C_GetInfo, &raw mut info), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
    assert_eq!(call!(module, C_EncryptInit, 1, null_mut(), 1), Err(CKR_CRYPTOKI_NOT_INITIALIZED));

    let arguments = |create: CK_CREATEMUTEX, flags, reserved: *mut c_void| CK_C_INITIALIZE_ARGS {
        CreateMutex: create,
        DestroyMutex: None,
        LockMutex: None,
        UnlockMutex: None,
        flags,
        pReserved: reserved,
    };
    unsafe extern "C" fn create(_: *mut *mut c_void) -> CK_RV {
        CKR_OK
    }
    let mut place = 0_u8;
    let mut bad = arguments(None, 0, (&raw mut place).cast());
    assert_eq!(call!(module, C_Initialize, (&raw mut bad).cast()), Err(CKR_ARGUMENTS_BAD), "pReserved is set");
    let mut bad = arguments(Some(create), 0, null_mut());
    assert_eq!(
        call!(module, C_Initialize, (&raw mut bad).cast()),
        Err(CKR_ARGUMENTS_BAD),
        "some of the mutex functions"
    );

    // Of many threads at once exactly one initialises.
    for _ in 0..20 {
        let barrier = Barrier::new(8);
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        module.initialize()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        assert!(results.iter().all(|result| [Ok(()), Err(CKR_CRYPTOKI_ALREADY_INITIALIZED)].contains(result)));
        assert_eq!(module.initialize(), Err(CKR_CRYPTOKI_ALREADY_INITIALIZED));
        slots(&mut count).unwrap();
        let slot = module.slots(false)[0];
        let session = module.open(slot, 0);
        assert_eq!(
            call!(module, C_Finalize, (&raw mut place).cast()),
            Err(CKR_ARGUMENTS_BAD),
            "the reserved pointer is set"
        );
        call!(module, C_Finalize, null_mut()).unwrap();
        assert_eq!(slots(&mut count), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
        if let Ok(session) = session {
            assert_eq!(module.close(session), Err(CKR_CRYPTOKI_NOT_INITIALIZED));
        }
    }
    // Without arguments too.
    call!(module, C_Initialize, null_mut()).unwrap();
    call!(module, C_Finalize, null_mut()).unwrap();
}

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(process: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

fn fork_and_call(module: &Module) {
    module.initialize().unwrap();
    let slot = module.slots(false)[0];
    // SAFETY: this process has one thread that matters; the child only calls the module and leaves.
    let process = unsafe { fork() };
    if process == 0 {
        let mut count = 0;
        let inherited = call!(module, C_GetSlotList, CK_FALSE, null_mut(), &raw mut count);
        let open = module.open(slot, 0);
        let again = module.initialize();
        let works = call!(module, C_GetSlotList, CK_FALSE, null_mut(), &raw mut count);
        let right = inherited == Err(CKR_CRYPTOKI_NOT_INITIALIZED)
            && open == Err(CKR_CRYPTOKI_NOT_INITIALIZED)
            && again == Ok(())
            && works == Ok(());
        // SAFETY: leaves without running anything of the parent's.
        unsafe { _exit(i32::from(!right)) };
    }
    let mut status = -1;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { waitpid(process, &raw mut status, 0) }, process);
    assert_eq!(status, 0, "in the child: not initialised, then initialised anew");
    assert!(!module.slots(false).is_empty(), "the parent works on");
}
