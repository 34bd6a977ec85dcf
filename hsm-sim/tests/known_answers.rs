//! Published known answers for every mechanism. Each file in `vectors/` names its source; those
//! written here name theirs.
#![expect(unsafe_code, reason = "calls into a C interface")]
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "test helpers: a failure is to stop the test"
)]

#[macro_use]
mod common;

use std::collections::HashMap;

use common::template::{P256, P384, P521};
use common::vectors::{Vector, hex, parse};
use common::{Mechanism, Template, Token, name};
use cryptoki_sys::*;

/// The AES key of SP 800-38A for each size, its plaintext, and what ECB, CBC and CTR make of it
/// (appendix F.1, F.2, F.5).
const SP800_38A: [[&str; 4]; 3] = [
    [
        "2b7e151628aed2a6abf7158809cf4f3c",
        "3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf43b1cd7f598ece23881b00e3ed0306887b0c785e27e8ad3f8223207104725dd4",
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b273bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee",
    ],
    [
        "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
        "bd334f1d6e45f25ff712a214571fa5cc974104846d0ad3ad7734ecb3ecee4eefef7afd2270e2e60adce0ba2face6444e9a4b41ba738d6c72fb16691603c18e0e",
        "4f021db243bc633d7178183a9fa071e8b4d9ada9ad7dedf4e5e738763f69145a571b242012fb7ae07fa9baac3df102e008b0e27988598881d920a9e64f5615cd",
        "1abc932417521ca24f2b0459fe7e6e0b090339ec0aa6faefd5ccc2c6f4ce8e941e36b26bd1ebc670d1bd1d665620abf74f78a7f6d29809585a97daec58c6b050",
    ],
    [
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870b6ed21b99ca6f4f9f153e7b1beafed1d23304b7a39f9f3ff067d8d8f9e24ecc7",
        "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c52b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
    ],
];
const PLAINTEXT: &str = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710";
const PARTS: [&[usize]; 3] = [&[], &[1, 15, 17], &[16, 32]];

fn block(text: &str) -> [u8; 16] {
    hex(text).try_into().unwrap()
}

#[test]
fn aes_ecb_cbc_and_ctr() {
    let token = Token::fresh("modes");
    let (module, session) = (token.module, token.session);
    let plaintext = hex(PLAINTEXT);
    for [key, ecb, cbc, ctr] in SP800_38A {
        let key = token.aes(&hex(key), Template::new());
        let iv = hex("000102030405060708090a0b0c0d0e0f");
        let modes = [
            (Mechanism::plain(CKM_AES_ECB), ecb),
            (Mechanism::with_bytes(CKM_AES_CBC, &iv), cbc),
            (Mechanism::ctr(block("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), 128), ctr),
        ];
        for (mechanism, ciphertext) in modes {
            let ciphertext = hex(ciphertext);
            assert_eq!(module.encrypt(session, &mechanism, key, &plaintext).unwrap(), ciphertext);
            assert_eq!(module.decrypt(session, &mechanism, key, &ciphertext).unwrap(), plaintext);
            for parts in PARTS {
                assert_eq!(module.encrypt_in_parts(session, &mechanism, key, &plaintext, parts).unwrap(), ciphertext);
                assert_eq!(module.decrypt_in_parts(session, &mechanism, key, &ciphertext, parts).unwrap(), plaintext);
            }
        }
    }
}

/// CBC with PKCS#7 padding: the blocks before the padding are those of SP 800-38A; RFC 3602 section
/// 4 has no padded ones.
#[test]
fn aes_cbc_pad_is_cbc_of_the_padded_text() {
    let token = Token::fresh("padded");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&hex(SP800_38A[0][0]), Template::new());
    let iv = hex("000102030405060708090a0b0c0d0e0f");
    for length in 0..=33 {
        let plaintext = &hex(PLAINTEXT)[..length];
        let pad = 16 - length % 16;
        let padded = [plaintext, &vec![pad as u8; pad]].concat();
        let ciphertext = module.encrypt(session, &Mechanism::with_bytes(CKM_AES_CBC, &iv), key, &padded).unwrap();
        let mechanism = Mechanism::with_bytes(CKM_AES_CBC_PAD, &iv);
        assert_eq!(module.encrypt(session, &mechanism, key, plaintext).unwrap(), ciphertext, "{length} bytes");
        assert_eq!(module.decrypt(session, &mechanism, key, &ciphertext).unwrap(), plaintext, "{length} bytes");
        for parts in PARTS {
            assert_eq!(module.encrypt_in_parts(session, &mechanism, key, plaintext, parts).unwrap(), ciphertext);
            assert_eq!(module.decrypt_in_parts(session, &mechanism, key, &ciphertext, parts).unwrap(), plaintext);
        }
    }
}

#[test]
fn aes_gcm() {
    let token = Token::fresh("gcm");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/aes_gcm.txt")) {
        let key = token.aes(&vector.hex("key"), Template::new());
        let tag = vector.hex("tag");
        let mechanism = Mechanism::gcm(&vector.hex("iv"), &vector.hex("aad"), tag.len() * 8);
        let sealed = [vector.hex("ciphertext"), tag].concat();
        if vector.must_fail() {
            let code = module.decrypt(session, &mechanism, key, &sealed).unwrap_err();
            assert_eq!(code, CKR_ENCRYPTED_DATA_INVALID, "line {}: {}", vector.line, name(code));
        } else {
            let plaintext = vector.hex("plaintext");
            assert_eq!(module.encrypt(session, &mechanism, key, &plaintext).unwrap(), sealed, "line {}", vector.line);
            assert_eq!(module.decrypt(session, &mechanism, key, &sealed).unwrap(), plaintext, "line {}", vector.line);
            assert_eq!(
                module.encrypt_in_parts(session, &mechanism, key, &plaintext, &[5]).unwrap(),
                sealed,
                "line {}",
                vector.line
            );
            assert_eq!(
                module.decrypt_in_parts(session, &mechanism, key, &sealed, &[5]).unwrap(),
                plaintext,
                "line {}",
                vector.line
            );
        }
        module.destroy(session, key).unwrap();
    }
}

/// The same vectors through C_EncryptMessage and C_DecryptMessage (PKCS#11 3.0 section 5.9.2 and
/// 5.11.2).
#[test]
fn aes_gcm_by_messages() {
    let token = Token::fresh("messages");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/aes_gcm.txt")) {
        let key = token.aes(&vector.hex("key"), Template::new());
        let (mut iv, mut aad, mut ciphertext, expected_tag) =
            (vector.hex("iv"), vector.hex("aad"), vector.hex("ciphertext"), vector.hex("tag"));
        let mut tag = vec![0_u8; expected_tag.len()];
        let mut parameters = CK_GCM_MESSAGE_PARAMS {
            pIv: iv.as_mut_ptr(),
            ulIvLen: iv.len() as CK_ULONG,
            ulIvFixedBits: 0,
            ivGenerator: CKG_NO_GENERATE,
            pTag: tag.as_mut_ptr(),
            ulTagBits: tag.len() as CK_ULONG * 8,
        };
        let size = size_of::<CK_GCM_MESSAGE_PARAMS>() as CK_ULONG;
        let mut mechanism = Mechanism::plain(CKM_AES_GCM).raw();
        if !vector.must_fail() {
            let mut plaintext = vector.hex("plaintext");
            call3!(module, C_MessageEncryptInit, session, &raw mut mechanism, key).unwrap();
            let sealed = common::into_buffer(plaintext.len() + 16, |output, length| {
                let parameters = (&raw mut parameters).cast();
                call3!(
                    module,
                    C_EncryptMessage,
                    session,
                    parameters,
                    size,
                    aad.as_mut_ptr(),
                    aad.len() as CK_ULONG,
                    plaintext.as_mut_ptr(),
                    plaintext.len() as CK_ULONG,
                    output,
                    length
                )
            });
            assert_eq!(sealed.unwrap(), ciphertext, "line {}", vector.line);
            call3!(module, C_MessageEncryptFinal, session).unwrap();
            assert_eq!(tag, expected_tag, "line {}", vector.line);
        }
        tag.copy_from_slice(&expected_tag);
        parameters.pTag = tag.as_mut_ptr();
        call3!(module, C_MessageDecryptInit, session, &raw mut mechanism, key).unwrap();
        let opened = common::into_buffer(ciphertext.len() + 16, |output, length| {
            let parameters = (&raw mut parameters).cast();
            call3!(
                module,
                C_DecryptMessage,
                session,
                parameters,
                size,
                aad.as_mut_ptr(),
                aad.len() as CK_ULONG,
                ciphertext.as_mut_ptr(),
                ciphertext.len() as CK_ULONG,
                output,
                length
            )
        });
        if vector.must_fail() {
            assert!(
                matches!(opened, Err(CKR_ENCRYPTED_DATA_INVALID | CKR_AEAD_DECRYPT_FAILED)),
                "line {}",
                vector.line
            );
        } else {
            assert_eq!(opened.unwrap(), vector.hex("plaintext"), "line {}", vector.line);
        }
        call3!(module, C_MessageDecryptFinal, session).unwrap();
        module.destroy(session, key).unwrap();
    }
}

/// GMAC is GCM without plaintext (SP 800-38D section 3): its vectors are those of GCM that have
/// none.
#[test]
fn aes_gmac() {
    let token = Token::fresh("gmac");
    let mut tried = 0;
    for vector in parse(include_str!("vectors/aes_gcm.txt")) {
        let whole = vector.hex("tag").len() == 16 && vector.hex("iv").len() == 12;
        if vector.must_fail() || !vector.hex("ciphertext").is_empty() || !whole {
            continue;
        }
        let key = token.aes(&vector.hex("key"), Template::new());
        let mechanism = Mechanism::with_bytes(CKM_AES_GMAC, &vector.hex("iv"));
        let mac = token.module.sign(token.session, &mechanism, key, &vector.hex("aad")).unwrap();
        assert_eq!(mac, vector.hex("tag"), "line {}", vector.line);
        token.module.verify(token.session, &mechanism, key, &vector.hex("aad"), &mac).unwrap();
        tried += 1;
    }
    assert!(tried > 3, "only {tried} vectors are for GMAC");
}

#[test]
fn aes_key_wrap() {
    wrapping("kw", CKM_AES_KEY_WRAP, include_str!("vectors/aes_key_wrap.txt"));
}

#[test]
fn aes_key_wrap_with_padding() {
    wrapping("kwp", CKM_AES_KEY_WRAP_KWP, include_str!("vectors/aes_key_wrap_padded.txt"));
}

/// Wraps and unwraps each vector's data as a generic secret, and as an AES key where it has the
/// length of one; and, because both mechanisms encrypt too, as data.
fn wrapping(label: &str, kind: CK_MECHANISM_TYPE, vectors: &str) {
    let token = Token::fresh(label);
    let (module, session, mechanism) = (token.module, token.session, Mechanism::plain(kind));
    for vector in parse(vectors) {
        let line = vector.line;
        let kek = token.aes(&vector.hex("kek"), Template::new());
        let wrapped = vector.hex("wrapped");
        if vector.must_fail() {
            let code =
                module.unwrap(session, &mechanism, kek, &wrapped, &Template::secret(CKK_GENERIC_SECRET)).unwrap_err();
            assert_eq!(code, CKR_WRAPPED_KEY_INVALID, "line {line}: {}", name(code));
            continue;
        }
        let data = vector.hex("data");
        let mut keys = vec![(token.generic(&data, Template::new()), CKK_GENERIC_SECRET)];
        if [16, 24, 32].contains(&data.len()) {
            keys.push((token.aes(&data, Template::new()), CKK_AES));
        }
        for (key, key_type) in keys {
            assert_eq!(module.wrap(session, &mechanism, kek, key).unwrap(), wrapped, "line {line}");
            let unwrapped = module.unwrap(session, &mechanism, kek, &wrapped, &Template::secret(key_type)).unwrap();
            assert_eq!(token.value(unwrapped), data, "line {line}");
        }
        assert_eq!(module.encrypt(session, &mechanism, kek, &data).unwrap(), wrapped, "line {line}");
        assert_eq!(module.decrypt(session, &mechanism, kek, &wrapped).unwrap(), data, "line {line}");
    }
}

/// RFC 3394 section 4, and the AES-256 pair of the DLMS key_transfer examples.
#[test]
fn aes_key_wrap_of_rfc_3394() {
    let token = Token::fresh("rfc3394");
    let sequence: Vec<u8> = (0..32).collect();
    let data = hex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f");
    let cases = [
        (16, 16, "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5"),
        (24, 16, "96778b25ae6ca435f92b5b97c050aed2468ab8a17ad84e5d"),
        (32, 16, "64e8c3f9ce0f5ba263e9777905818a2a93c8191e7d6e8ae7"),
        (24, 24, "031d33264e15d33268f24ec260743edce1c6c7ddee725a936ba814915c6762d2"),
        (32, 24, "a8f9bc1612c68b3ff6e6f4fbe30e71e4769c8b80a32cb8958cd5d17d6b254da1"),
        (32, 32, "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"),
    ];
    for (kek, length, wrapped) in cases {
        let kek = token.aes(&sequence[..kek], Template::new());
        let key = token.aes(&data[..length], Template::new());
        assert_eq!(
            token.module.wrap(token.session, &Mechanism::plain(CKM_AES_KEY_WRAP), kek, key).unwrap(),
            hex(wrapped)
        );
    }
}

#[test]
fn aes_cmac() {
    let token = Token::fresh("cmac");
    for vector in parse(include_str!("vectors/aes_cmac.txt")) {
        let key = token.aes(&vector.hex("key"), Template::new());
        mac(&token, &vector, key, CKM_AES_CMAC, CKM_AES_CMAC_GENERAL);
    }
}

#[test]
fn hmac() {
    let token = Token::fresh("hmac");
    for vector in parse(include_str!("vectors/hmac.txt")) {
        let key = token.generic(&vector.hex("key"), Template::new());
        let (_, hmac, general) = hash(vector.text("hash"));
        mac(&token, &vector, key, hmac, general);
    }
}

/// A MAC whole, in parts, shortened by the general mechanism, verified, and refused when one bit
/// differs.
fn mac(token: &Token, vector: &Vector, key: common::Object, kind: CK_MECHANISM_TYPE, general: CK_MECHANISM_TYPE) {
    let (module, session) = (token.module, token.session);
    let (message, expected, line) = (vector.hex("message"), vector.hex("mac"), vector.line);
    let mechanism = Mechanism::plain(kind);
    let made = module.sign(session, &mechanism, key, &message).unwrap();
    assert_eq!(made[..expected.len()], expected, "line {line}");
    for parts in PARTS {
        assert_eq!(module.sign_in_parts(session, &mechanism, key, &message, parts).unwrap(), made, "line {line}");
    }
    module.verify(session, &mechanism, key, &message, &made).unwrap();
    let short = Mechanism::with_ulong(general, 8);
    assert_eq!(module.sign(session, &short, key, &message).unwrap(), expected[..8], "line {line}");
    module.verify(session, &short, key, &message, &expected[..8]).unwrap();
    let mut wrong = made.clone();
    wrong[0] ^= 1;
    assert_eq!(module.verify(session, &mechanism, key, &message, &wrong), Err(CKR_SIGNATURE_INVALID), "line {line}");
    assert_eq!(
        module.verify(session, &mechanism, key, &message, &made[1..]),
        Err(CKR_SIGNATURE_LEN_RANGE),
        "line {line}"
    );
}

/// (digest, HMAC, HMAC general)
fn hash(name: &str) -> (CK_MECHANISM_TYPE, CK_MECHANISM_TYPE, CK_MECHANISM_TYPE) {
    match name {
        "SHA-1" => (CKM_SHA_1, CKM_SHA_1_HMAC, CKM_SHA_1_HMAC_GENERAL),
        "SHA-224" => (CKM_SHA224, CKM_SHA224_HMAC, CKM_SHA224_HMAC_GENERAL),
        "SHA-256" => (CKM_SHA256, CKM_SHA256_HMAC, CKM_SHA256_HMAC_GENERAL),
        "SHA-384" => (CKM_SHA384, CKM_SHA384_HMAC, CKM_SHA384_HMAC_GENERAL),
        "SHA-512" => (CKM_SHA512, CKM_SHA512_HMAC, CKM_SHA512_HMAC_GENERAL),
        other => panic!("unknown hash `{other}`"),
    }
}

#[test]
fn digests() {
    let token = Token::fresh("digests");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/digest.txt")) {
        let mut mechanism = Mechanism::plain(hash(vector.text("hash")).0);
        let message = vector.hex("message");
        assert_eq!(module.digest(session, &mechanism, &message).unwrap(), vector.hex("digest"), "line {}", vector.line);
        // In parts, byte by byte.
        mechanism = Mechanism::plain(hash(vector.text("hash")).0);
        call!(module, C_DigestInit, session, &raw mut *Box::leak(Box::new(mechanism.raw()))).unwrap();
        for byte in &message {
            let mut byte = *byte;
            call!(module, C_DigestUpdate, session, &raw mut byte, 1).unwrap();
        }
        let digest =
            common::into_buffer(64, |output, length| call!(module, C_DigestFinal, session, output, length)).unwrap();
        assert_eq!(digest, vector.hex("digest"), "line {}", vector.line);
    }
}

#[test]
fn sp800_108_counter() {
    let token = Token::fresh("kbkdf");
    for vector in parse(include_str!("vectors/sp800_108_counter.txt")) {
        let (prf, base) = match vector.text("prf") {
            "CMAC_AES128" | "CMAC_AES192" | "CMAC_AES256" => {
                (CKM_AES_CMAC, token.aes(&vector.hex("key"), Template::new()))
            }
            hmac => {
                let name = hmac.replace("HMAC_SHA", "SHA-");
                (hash(&name).1, token.generic(&vector.hex("key"), Template::new()))
            }
        };
        let output = vector.hex("output");
        let mechanism = Mechanism::sp800_108(prf, vector.number("counter_bits") as CK_ULONG, &vector.hex("fixed"));
        let key = token.module.derive(token.session, &mechanism, base, &Template::new_generic(output.len()));
        let key = key.unwrap_or_else(|code| panic!("line {}: {}", vector.line, name(code)));
        assert_eq!(token.value(key), output, "line {}", vector.line);
    }
}

#[test]
fn hkdf() {
    let token = Token::fresh("hkdf");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/hkdf.txt")) {
        let base = token.generic(&vector.hex("key"), Template::new());
        let (hash, salt) = (hash(vector.text("hash")).0, vector.hex("salt"));
        let salt = (!salt.is_empty()).then_some(salt.as_slice());
        let (info, output, prk) = (vector.hex("info"), vector.hex("output"), vector.hex("prk"));
        let both = Mechanism::hkdf(true, true, hash, salt, &info);
        assert_eq!(
            token.value(module.derive(session, &both, base, &Template::new_generic(output.len())).unwrap()),
            output,
            "line {}",
            vector.line
        );
        // The two steps one after the other.
        let extracted = module
            .derive(session, &Mechanism::hkdf(true, false, hash, salt, &[]), base, &Template::new_generic(prk.len()))
            .unwrap();
        assert_eq!(token.value(extracted), prk, "line {}", vector.line);
        let expand = Mechanism::hkdf(false, true, hash, None, &info);
        assert_eq!(
            token.value(module.derive(session, &expand, extracted, &Template::new_generic(output.len())).unwrap()),
            output,
            "line {}",
            vector.line
        );
        // As a data object.
        let data = Template::new()
            .ulong(CKA_CLASS, CKO_DATA)
            .ulong(CKA_VALUE_LEN, output.len() as CK_ULONG)
            .bool(CKA_TOKEN, false);
        let data = module.derive(session, &both.with_kind(CKM_HKDF_DATA), base, &data).unwrap();
        assert_eq!(token.value(data), output, "line {}", vector.line);
    }
}

/// AES_ECB_ENCRYPT_DATA and AES_CBC_ENCRYPT_DATA: the derived key is the encryption of the data, so
/// the vectors are those of SP 800-38A; a shorter key is its first bytes.
#[test]
fn derivation_by_encryption() {
    let token = Token::fresh("encrypt-data");
    let (module, session) = (token.module, token.session);
    let plaintext = hex(PLAINTEXT);
    for [key, ecb, cbc, _] in SP800_38A {
        let base = token.aes(&hex(key), Template::new());
        for (mechanism, ciphertext) in [
            (Mechanism::ecb_data(&plaintext[..32]), hex(ecb)),
            (Mechanism::cbc_data(block("000102030405060708090a0b0c0d0e0f"), &plaintext[..32]), hex(cbc)),
        ] {
            for length in [16, 24, 32] {
                let key = module.derive(session, &mechanism, base, &Template::new_aes(length)).unwrap();
                assert_eq!(token.value(key), ciphertext[..length]);
            }
            let secret = module.derive(session, &mechanism, base, &Template::new_generic(20)).unwrap();
            assert_eq!(token.value(secret), ciphertext[..20]);
        }
    }
}

#[test]
fn ecdh() {
    let token = Token::fresh("ecdh");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/ecdh.txt")) {
        let parameters = if vector.text("curve") == "P-256" { P256 } else { P384 };
        let private = module.create(session, &Template::ec_private(parameters, &vector.hex("d"))).unwrap();
        let (z, info) = (vector.hex("z"), vector.hex("shared_info"));
        let point = [vec![4], vector.hex("x"), vector.hex("y")].concat();
        // The public point raw and as a DER OCTET STRING: PKCS#11 2.40 says that a token takes
        // both.
        for public in [point.clone(), common::template::octet_string(&point)] {
            let plain = Mechanism::ecdh(CKD_NULL, &public, &[]);
            assert_eq!(
                token.value(module.derive(session, &plain, private, &Template::new_generic(z.len())).unwrap()),
                z,
                "line {}",
                vector.line
            );
            for (kdf, field) in
                [(CKD_SHA1_KDF, "x963_sha1_48"), (CKD_SHA256_KDF, "x963_sha256_48"), (CKD_SHA384_KDF, "x963_sha384_48")]
            {
                let mechanism = Mechanism::ecdh(kdf, &public, &info);
                let derived = module.derive(session, &mechanism, private, &Template::new_generic(48));
                match derived {
                    Ok(key) => assert_eq!(token.value(key), vector.hex(field), "line {} {field}", vector.line),
                    // SHA-256 is needed, the others are not.
                    Err(code) => assert!(
                        kdf != CKD_SHA256_KDF && code == CKR_MECHANISM_PARAM_INVALID,
                        "line {} {field}: {}",
                        vector.line,
                        name(code)
                    ),
                }
            }
        }
    }
}

/// The single-step KDF of SP 800-56A (`H(counter ‖ Z ‖ info)`), with the key agreement of DLMS
/// suite 1: the private key and the other public key of the Green Book's example, its two
/// AlgorithmIDs.
#[test]
fn ecdh_with_the_sp800_56a_kdf() {
    let token = Token::fresh("dlms-agreement");
    let (module, session) = (token.module, token.session);
    let d = hex("34a8c23a34dbb519d09b245754c85a6cfe05d14a063efa5aa41545aa8241efae");
    let public = hex(
        "042914d60e10ab705f62ed6cc349d7cb99b9ab3f3978e59278c7af595b3af987941372dab6d5af1fa867e134167e6f23de664a6693e05f43414611058d1b48f894",
    );
    let private = module.create(session, &Template::ec_private(P256, &d)).unwrap();
    let z =
        module.derive(session, &Mechanism::ecdh(CKD_NULL, &public, &[]), private, &Template::new_generic(32)).unwrap();
    assert_eq!(token.value(z), hex("c1cf8fe7891aef3617d7190795e61fe6c24efc3cca2e08469bad1a225ce6ea08"));
    for (algorithm, key) in
        [("60857406080300", "e025ca6f9ee8d2b40f993739d44cfbc0"), ("60857405080300", "c5f4512846ede51cfb8ccf59f08a694e")]
    {
        let info = [hex(algorithm), hex("4d4d4d0000bc614e"), hex("4d4d4d0000000001")].concat();
        let mechanism = Mechanism::ecdh(CKD_SHA256_KDF_SP800, &public, &info);
        let derived = module.derive(session, &mechanism, private, &Template::new_aes(16)).unwrap();
        assert_eq!(token.value(derived), hex(key));
    }
}

#[test]
fn ecdsa_verification() {
    let token = Token::fresh("ecdsa");
    let (module, session) = (token.module, token.session);
    let hashed = HashMap::from([
        ("SHA-1", CKM_ECDSA_SHA1),
        ("SHA-224", CKM_ECDSA_SHA224),
        ("SHA-256", CKM_ECDSA_SHA256),
        ("SHA-384", CKM_ECDSA_SHA384),
        ("SHA-512", CKM_ECDSA_SHA512),
    ]);
    for vector in parse(include_str!("vectors/ecdsa_verify.txt")) {
        let parameters = match vector.text("curve") {
            "P-256" => P256,
            "P-384" => P384,
            _ => P521,
        };
        let point = [vec![4], vector.hex("x"), vector.hex("y")].concat();
        let public = match module.create(session, &Template::ec_public(parameters, &point)) {
            Ok(public) => public,
            // A point that is not on the curve may be refused here already.
            Err(code) => {
                assert!(vector.must_fail(), "line {}: {}", vector.line, name(code));
                continue;
            }
        };
        let signature = [vector.hex("r"), vector.hex("s")].concat();
        let message = vector.hex("message");
        let expected = if vector.must_fail() { Err(CKR_SIGNATURE_INVALID) } else { Ok(()) };
        let digest = module.digest(session, &Mechanism::plain(hash(vector.text("hash")).0), &message).unwrap();
        assert_eq!(
            module.verify(session, &Mechanism::plain(CKM_ECDSA), public, &digest, &signature),
            expected,
            "line {}",
            vector.line
        );
        let mechanism = Mechanism::plain(hashed[vector.text("hash")]);
        assert_eq!(module.verify(session, &mechanism, public, &message, &signature), expected, "line {}", vector.line);
    }
}

/// Signatures made here are taken by aws-lc-rs, called directly.
#[test]
fn ecdsa_signatures_are_accepted_elsewhere() {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
    let token = Token::fresh("ecdsa-sign");
    let (module, session) = (token.module, token.session);
    let message = b"a meter reading";
    for (parameters, digest, hashed, algorithm) in [
        (P256, CKM_SHA256, CKM_ECDSA_SHA256, &ECDSA_P256_SHA256_FIXED),
        (P384, CKM_SHA384, CKM_ECDSA_SHA384, &ECDSA_P384_SHA384_FIXED),
    ] {
        let public = Template::new().bytes(CKA_EC_PARAMS, parameters).bool(CKA_VERIFY, true);
        let private = Template::new().bool(CKA_SIGN, true);
        let (public, private) =
            module.generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &public, &private).unwrap();
        let point = module.get(session, public, CKA_EC_POINT).unwrap();
        // DER OCTET STRING: two bytes of header for these lengths.
        let key = UnparsedPublicKey::new(algorithm, &point[2..]);
        let digest = module.digest(session, &Mechanism::plain(digest), message).unwrap();
        key.verify(message, &module.sign(session, &Mechanism::plain(CKM_ECDSA), private, &digest).unwrap()).unwrap();
        key.verify(message, &module.sign(session, &Mechanism::plain(hashed), private, message).unwrap()).unwrap();
        key.verify(message, &module.sign_in_parts(session, &Mechanism::plain(hashed), private, message, &[3]).unwrap())
            .unwrap();
    }
}

#[test]
fn rsa_oaep() {
    let token = Token::fresh("oaep");
    let (module, session) = (token.module, token.session);
    for vector in parse(include_str!("vectors/rsa_oaep.txt")) {
        let private = module.create(session, &rsa_private(&vector)).unwrap();
        let public = module.create(session, &rsa_public(&vector).bool(CKA_ENCRYPT, true)).unwrap();
        let mechanism = match vector.text("hash") {
            "SHA-1" => Mechanism::oaep(CKM_SHA_1, CKG_MGF1_SHA1, &[]),
            _ => Mechanism::oaep(CKM_SHA256, CKG_MGF1_SHA256, &[]),
        };
        let message = vector.hex("message");
        assert_eq!(
            module.decrypt(session, &mechanism, private, &vector.hex("ciphertext")).unwrap(),
            message,
            "line {}",
            vector.line
        );
        let again = module.encrypt(session, &mechanism, public, &message).unwrap();
        assert_eq!(module.decrypt(session, &mechanism, private, &again).unwrap(), message, "line {}", vector.line);
        let mut wrong = vector.hex("ciphertext");
        wrong[7] ^= 1;
        assert_eq!(
            module.decrypt(session, &mechanism, private, &wrong),
            Err(CKR_ENCRYPTED_DATA_INVALID),
            "line {}",
            vector.line
        );
    }
}

#[test]
fn rsa_verification() {
    let token = Token::fresh("rsa");
    let (module, session) = (token.module, token.session);
    let hashes = HashMap::from([
        ("SHA-1", (CKM_SHA_1, CKG_MGF1_SHA1, CKM_SHA1_RSA_PKCS, CKM_SHA1_RSA_PKCS_PSS)),
        ("SHA-256", (CKM_SHA256, CKG_MGF1_SHA256, CKM_SHA256_RSA_PKCS, CKM_SHA256_RSA_PKCS_PSS)),
        ("SHA-384", (CKM_SHA384, CKG_MGF1_SHA384, CKM_SHA384_RSA_PKCS, CKM_SHA384_RSA_PKCS_PSS)),
        ("SHA-512", (CKM_SHA512, CKG_MGF1_SHA512, CKM_SHA512_RSA_PKCS, CKM_SHA512_RSA_PKCS_PSS)),
    ]);
    for vector in parse(include_str!("vectors/rsa_verify.txt")) {
        let public = module.create(session, &rsa_public(&vector).bool(CKA_VERIFY, true)).unwrap();
        let (digest, mask, pkcs1, pss) = hashes[vector.text("hash")];
        let mechanism = match vector.text("scheme") {
            "pss" => Mechanism::pss(pss, digest, mask, vector.number("salt_length")),
            _ => Mechanism::plain(pkcs1),
        };
        let verified = module.verify(session, &mechanism, public, &vector.hex("message"), &vector.hex("signature"));
        if vector.must_fail() {
            assert_eq!(verified, Err(CKR_SIGNATURE_INVALID), "line {}", vector.line);
        } else {
            verified.unwrap_or_else(|code| panic!("line {}: {}", vector.line, name(code)));
        }
    }
}

fn rsa_public(vector: &Vector) -> Template {
    Template::new()
        .ulong(CKA_CLASS, CKO_PUBLIC_KEY)
        .ulong(CKA_KEY_TYPE, CKK_RSA)
        .bool(CKA_TOKEN, false)
        .bytes(CKA_MODULUS, vector.hex("n"))
        .bytes(CKA_PUBLIC_EXPONENT, vector.hex("e"))
}

fn rsa_private(vector: &Vector) -> Template {
    let parts = [
        (CKA_MODULUS, "n"),
        (CKA_PUBLIC_EXPONENT, "e"),
        (CKA_PRIVATE_EXPONENT, "d"),
        (CKA_PRIME_1, "p"),
        (CKA_PRIME_2, "q"),
        (CKA_EXPONENT_1, "dp"),
        (CKA_EXPONENT_2, "dq"),
        (CKA_COEFFICIENT, "qi"),
    ];
    let template = Template::new()
        .ulong(CKA_CLASS, CKO_PRIVATE_KEY)
        .ulong(CKA_KEY_TYPE, CKK_RSA)
        .bool(CKA_TOKEN, false)
        .bool(CKA_DECRYPT, true)
        .bool(CKA_SIGN, true)
        .bool(CKA_UNWRAP, true);
    parts.into_iter().fold(template, |template, (kind, field)| template.bytes(kind, vector.hex(field)))
}
