//! Every rule that attributes make: what can be read, what can be changed and in which direction,
//! what a key may be used for.

mod common;

use common::template::P256;
use common::{Mechanism, Object, Template, Token, name};
use cryptoki_sys::*;

fn ecb() -> Mechanism {
    Mechanism::plain(CKM_AES_ECB)
}

fn kw() -> Mechanism {
    Mechanism::plain(CKM_AES_KEY_WRAP)
}

const SECRET_PARTS: [CK_ATTRIBUTE_TYPE; 7] =
    [CKA_VALUE, CKA_PRIVATE_EXPONENT, CKA_PRIME_1, CKA_PRIME_2, CKA_EXPONENT_1, CKA_EXPONENT_2, CKA_COEFFICIENT];

#[test]
fn no_sensitive_value_is_readable() {
    let token = Token::fresh("sensitive");
    let (module, session) = (token.module, token.session);
    let locks = [(true, true), (true, false), (false, false)];
    for (sensitive, extractable) in locks {
        let lock = Template::new().bool(CKA_SENSITIVE, sensitive).bool(CKA_EXTRACTABLE, extractable);
        let rsa = Template::new().ulong(CKA_MODULUS_BITS, 2048).bytes(CKA_PUBLIC_EXPONENT, [1, 0, 1]);
        let ec = Template::new().bytes(CKA_EC_PARAMS, P256);
        let keys = [
            token.aes(&[0xC3; 32], lock.clone()),
            token.generic(&[0xC3; 40], lock.clone()),
            module
                .generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(32).with(lock.clone()))
                .unwrap(),
            module.create(session, &Template::ec_private(P256, &[0xC3; 32]).with(lock.clone())).unwrap(),
            module.generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &ec, &lock).unwrap().1,
            module.generate_key_pair(session, &Mechanism::plain(CKM_RSA_PKCS_KEY_PAIR_GEN), &rsa, &lock).unwrap().1,
        ];
        for (number, key) in keys.into_iter().enumerate() {
            let key_type = module.get_ulong(session, key, CKA_KEY_TYPE).unwrap();
            for part in SECRET_PARTS {
                let rsa_part = part != CKA_VALUE;
                if rsa_part != (key_type == CKK_RSA) {
                    continue;
                }
                let code = module.get(session, key, part).unwrap_err();
                assert_eq!(code, CKR_ATTRIBUTE_SENSITIVE, "key {number}, attribute {part:#x}: {}", name(code));
            }
            // No other attribute has the value in it either.
            for kind in
                (0..0x700).chain([CKA_WRAP_TEMPLATE, CKA_UNWRAP_TEMPLATE, CKA_DERIVE_TEMPLATE, CKA_ALLOWED_MECHANISMS])
            {
                if let Ok(value) = module.get(session, key, kind) {
                    assert!(
                        !value.windows(8).any(|window| window == [0xC3; 8]),
                        "key {number} tells its value in attribute {kind:#x}"
                    );
                }
            }
            // A find by value tells nothing either.
            assert!(
                !module.find(session, &Template::new().bytes(CKA_VALUE, [0xC3; 32])).unwrap_or_default().contains(&key)
            );
            module.destroy(session, key).unwrap();
        }
    }
}

/// C_GetAttributeValue fills what it can before it says what it cannot (PKCS#11 2.40 section 5.7).
#[test]
fn a_template_is_filled_before_the_error() {
    let token = Token::fresh("filled");
    let (module, session) = (token.module, token.session);
    let key =
        token.aes(&[1; 16], Template::new().bool(CKA_SENSITIVE, true).bytes(CKA_LABEL, "a label").bytes(CKA_ID, [9]));
    let mut label = [0_u8; 7];
    let mut id = [0_u8; 1];
    let mut value = [0_u8; 16];
    let mut template = [
        CK_ATTRIBUTE { type_: CKA_VALUE, pValue: value.as_mut_ptr().cast(), ulValueLen: 16 },
        CK_ATTRIBUTE { type_: CKA_LABEL, pValue: label.as_mut_ptr().cast(), ulValueLen: 7 },
        CK_ATTRIBUTE { type_: CKA_MODULUS, pValue: common::nowhere(), ulValueLen: 0 },
        CK_ATTRIBUTE { type_: CKA_ID, pValue: id.as_mut_ptr().cast(), ulValueLen: 1 },
    ];
    let code = common::get_attributes(module, session, key, &mut template).unwrap_err();
    assert!([CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID].contains(&code), "{}", name(code));
    assert_eq!(
        template.map(|attribute| attribute.ulValueLen),
        [CK_UNAVAILABLE_INFORMATION, 7, CK_UNAVAILABLE_INFORMATION, 1]
    );
    assert_eq!((&label, id, value), (b"a label", [9], [0; 16]));

    let mut template = [
        CK_ATTRIBUTE { type_: CKA_LABEL, pValue: label.as_mut_ptr().cast(), ulValueLen: 3 },
        CK_ATTRIBUTE { type_: CKA_ID, pValue: id.as_mut_ptr().cast(), ulValueLen: 1 },
    ];
    id = [0];
    assert_eq!(common::get_attributes(module, session, key, &mut template), Err(CKR_BUFFER_TOO_SMALL));
    assert_eq!((template[0].ulValueLen, template[1].ulValueLen), (CK_UNAVAILABLE_INFORMATION, 1));
    assert_eq!(id, [9]);
}

#[test]
fn one_way_attributes_go_one_way() {
    let token = Token::fresh("one-way");
    let (module, session) = (token.module, token.session);
    let rules = [(CKA_SENSITIVE, true), (CKA_EXTRACTABLE, false), (CKA_WRAP_WITH_TRUSTED, true)];
    for (kind, locked) in rules {
        for on_token in [false, true] {
            let key = token.aes(&[1; 16], Template::new().bool(kind, !locked).bool(CKA_TOKEN, on_token));
            module
                .set(session, key, &Template::new().bool(kind, locked))
                .unwrap_or_else(|code| panic!("locking {kind:#x}: {}", name(code)));
            assert_eq!(module.get_bool(session, key, kind).unwrap(), locked);
            assert_eq!(
                module.set(session, key, &Template::new().bool(kind, !locked)),
                Err(CKR_ATTRIBUTE_READ_ONLY),
                "{kind:#x}"
            );
            let code = module.copy(session, key, &Template::new().bool(kind, !locked)).unwrap_err();
            assert!(
                [CKR_ATTRIBUTE_READ_ONLY, CKR_TEMPLATE_INCONSISTENT].contains(&code),
                "a copy unlocked {kind:#x}: {}",
                name(code)
            );
            let copy = module.copy(session, key, &Template::new()).unwrap();
            assert_eq!(module.get_bool(session, copy, kind).unwrap(), locked);
            module.destroy(session, key).unwrap();
        }
    }
    // A copy may be stricter.
    let key = token.aes(&[1; 16], Template::new());
    let copy =
        module.copy(session, key, &Template::new().bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false)).unwrap();
    assert_eq!(module.get(session, copy, CKA_VALUE), Err(CKR_ATTRIBUTE_SENSITIVE));
    assert_eq!(module.get(session, key, CKA_VALUE).unwrap(), [1; 16]);
}

#[test]
fn what_is_settled_at_creation_stays() {
    let token = Token::fresh("settled");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let settled = [
        Template::new().ulong(CKA_CLASS, CKO_DATA),
        Template::new().ulong(CKA_KEY_TYPE, CKK_GENERIC_SECRET),
        Template::new().bytes(CKA_VALUE, [2; 16]),
        Template::new().ulong(CKA_VALUE_LEN, 32),
        Template::new().bool(CKA_LOCAL, true),
        Template::new().bool(CKA_ALWAYS_SENSITIVE, true),
        Template::new().bool(CKA_NEVER_EXTRACTABLE, true),
        Template::new().ulong(CKA_KEY_GEN_MECHANISM, CKM_AES_KEY_GEN),
        Template::new().bool(CKA_TOKEN, true),
        Template::new().bool(CKA_PRIVATE, true),
        Template::new().bool(CKA_MODIFIABLE, false),
        Template::new().bytes(CKA_CHECK_VALUE, [0; 3]),
        Template::new().nested(CKA_UNWRAP_TEMPLATE, Template::new().bool(CKA_ENCRYPT, true)),
        Template::new().bytes(CKA_ALLOWED_MECHANISMS, CKM_AES_ECB.to_ne_bytes()),
    ];
    for template in settled {
        let code = module.set(session, key, &template).unwrap_err();
        assert_eq!(code, CKR_ATTRIBUTE_READ_ONLY, "{template:?}: {}", name(code));
    }
    assert_eq!(token.value(key), [1; 16]);

    // What a caller may not say at all.
    for kind in [CKA_LOCAL, CKA_ALWAYS_SENSITIVE, CKA_NEVER_EXTRACTABLE] {
        let code = module.create(session, &Template::aes(&[1; 16]).bool(kind, true)).unwrap_err();
        assert!([CKR_ATTRIBUTE_READ_ONLY, CKR_TEMPLATE_INCONSISTENT].contains(&code), "{kind:#x}: {}", name(code));
        let code = module
            .generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(16).bool(kind, true))
            .unwrap_err();
        assert!([CKR_ATTRIBUTE_READ_ONLY, CKR_TEMPLATE_INCONSISTENT].contains(&code), "{kind:#x}: {}", name(code));
    }
    let code =
        module.create(session, &Template::aes(&[1; 16]).ulong(CKA_KEY_GEN_MECHANISM, CKM_AES_KEY_GEN)).unwrap_err();
    assert!([CKR_ATTRIBUTE_READ_ONLY, CKR_TEMPLATE_INCONSISTENT].contains(&code), "{}", name(code));

    // And what a change refuses it refuses whole.
    let both = Template::new().bytes(CKA_LABEL, "changed").bool(CKA_LOCAL, true);
    module.set(session, key, &both).unwrap_err();
    assert_ne!(module.get(session, key, CKA_LABEL).unwrap(), b"changed", "half of a refused change was made");
}

#[test]
fn history_is_recorded() {
    let token = Token::fresh("history");
    let (module, session) = (token.module, token.session);
    let history = |key: Object| {
        [CKA_LOCAL, CKA_ALWAYS_SENSITIVE, CKA_NEVER_EXTRACTABLE]
            .map(|kind| module.get_bool(session, key, kind).unwrap())
    };
    let locked = Template::new_aes(32).bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false);
    let generated = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &locked).unwrap();
    assert_eq!(history(generated), [true, true, true]);
    assert_eq!(module.get_ulong(session, generated, CKA_KEY_GEN_MECHANISM).unwrap(), CKM_AES_KEY_GEN);
    // The ceremony: made extractable, locked later. It was extractable once, and that stays known.
    let open = Template::new_aes(32).bool(CKA_SENSITIVE, true);
    let ceremony = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &open).unwrap();
    module.set(session, ceremony, &Template::new().bool(CKA_EXTRACTABLE, false)).unwrap();
    assert_eq!(history(ceremony), [true, true, false]);
    let created = token.aes(&[1; 32], Template::new().bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false));
    assert_eq!(history(created), [false, false, false]);
    assert_eq!(module.get_ulong(session, created, CKA_KEY_GEN_MECHANISM).unwrap(), CK_UNAVAILABLE_INFORMATION);
    let wrapped = {
        let key = token.aes(&[2; 16], Template::new());
        module.wrap(session, &kw(), created, key).unwrap()
    };
    let unwrapped = module
        .unwrap(
            session,
            &kw(),
            created,
            &wrapped,
            &Template::secret(CKK_AES).bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false),
        )
        .unwrap();
    assert_eq!(history(unwrapped), [false, false, false]);
    // A derived key inherits the history of its base (PKCS#11 2.40 section 2.10 on the
    // derivations).
    for (base, expected) in
        [(generated, [false, true, true]), (ceremony, [false, true, false]), (created, [false, false, false])]
    {
        let derived = module.derive(session, &Mechanism::ecb_data(&[0; 32]), base, &locked).unwrap();
        assert_eq!(history(derived), expected);
    }
    let ec = Template::new().bytes(CKA_EC_PARAMS, P256);
    let lock = Template::new().bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false);
    let (public, private) =
        module.generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &ec, &lock).unwrap();
    assert_eq!(history(private), [true, true, true]);
    assert!(module.get_bool(session, public, CKA_LOCAL).unwrap());
}

#[test]
fn a_copy_keeps_its_history() {
    let token = Token::fresh("copies");
    let (module, session) = (token.module, token.session);
    let open = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(16)).unwrap();
    let copy =
        module.copy(session, open, &Template::new().bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false)).unwrap();
    assert!(!module.get_bool(session, copy, CKA_ALWAYS_SENSITIVE).unwrap());
    assert!(!module.get_bool(session, copy, CKA_NEVER_EXTRACTABLE).unwrap());
    let fixed = token.aes(&[1; 16], Template::new().bool(CKA_COPYABLE, false));
    assert_eq!(module.copy(session, fixed, &Template::new()), Err(CKR_ACTION_PROHIBITED));
}

#[test]
fn unmodifiable_and_undestroyable_objects() {
    let token = Token::fresh("fixed");
    let (module, session) = (token.module, token.session);
    let fixed = token.aes(&[1; 16], Template::new().bool(CKA_MODIFIABLE, false));
    let code = module.set(session, fixed, &Template::new().bytes(CKA_LABEL, "x")).unwrap_err();
    assert!([CKR_ACTION_PROHIBITED, CKR_ATTRIBUTE_READ_ONLY].contains(&code), "{}", name(code));
    let lasting = token.aes(&[1; 16], Template::new().bool(CKA_DESTROYABLE, false));
    assert_eq!(module.destroy(session, lasting), Err(CKR_ACTION_PROHIBITED));
}

#[test]
fn each_use_needs_its_attribute() {
    let token = Token::fresh("uses");
    let (module, session) = (token.module, token.session);
    let plain = token.aes(&[2; 16], Template::new());
    let wrapped = module.wrap(session, &kw(), plain, plain).unwrap();
    let cmac = Mechanism::plain(CKM_AES_CMAC);
    type Use<'a> = (CK_ATTRIBUTE_TYPE, &'a dyn Fn(Object) -> common::Result<()>);
    let uses: [Use<'_>; 7] = [
        (CKA_ENCRYPT, &|key| module.encrypt(session, &ecb(), key, &[0; 16]).map(drop)),
        (CKA_DECRYPT, &|key| module.decrypt(session, &ecb(), key, &[0; 16]).map(drop)),
        (CKA_SIGN, &|key| module.sign(session, &cmac, key, &[0; 16]).map(drop)),
        (CKA_VERIFY, &|key| match module.verify(session, &cmac, key, &[0; 16], &[0; 16]) {
            Err(CKR_SIGNATURE_INVALID) => Ok(()),
            other => other,
        }),
        (CKA_WRAP, &|key| module.wrap(session, &kw(), key, plain).map(drop)),
        (CKA_UNWRAP, &|key| module.unwrap(session, &kw(), key, &wrapped, &Template::secret(CKK_AES)).map(drop)),
        (CKA_DERIVE, &|key| {
            module.derive(session, &Mechanism::ecb_data(&[0; 16]), key, &Template::new_aes(16)).map(drop)
        }),
    ];
    for (kind, use_it) in uses {
        // Everything but this use is allowed; then nothing but this use.
        let without = token.aes(&[2; 16], Template::new().bool(kind, false));
        let code = use_it(without).unwrap_err();
        assert_eq!(code, CKR_KEY_FUNCTION_NOT_PERMITTED, "{kind:#x}: {}", name(code));
        let all = [CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE];
        let only = all.into_iter().fold(Template::new(), |template, other| template.bool(other, other == kind));
        use_it(token.aes(&[2; 16], only)).unwrap_or_else(|code| panic!("{kind:#x} alone: {}", name(code)));
    }
    // A failed initialisation leaves nothing active.
    assert_eq!(module.encrypt(session, &ecb(), plain, &[0; 16]).unwrap().len(), 16);
}

#[test]
fn unextractable_keys_stay() {
    let token = Token::fresh("unextractable");
    let (module, session) = (token.module, token.session);
    let kek = token.aes(&[1; 32], Template::new());
    for sensitive in [false, true] {
        let locked = token.aes(&[2; 16], Template::new().bool(CKA_SENSITIVE, sensitive).bool(CKA_EXTRACTABLE, false));
        for mechanism in
            [kw(), Mechanism::plain(CKM_AES_KEY_WRAP_KWP), Mechanism::with_bytes(CKM_AES_CBC_PAD, &[0; 16])]
        {
            assert_eq!(module.wrap(session, &mechanism, kek, locked), Err(CKR_KEY_UNEXTRACTABLE));
        }
        assert_eq!(module.get(session, locked, CKA_VALUE), Err(CKR_ATTRIBUTE_SENSITIVE));
    }
    let lock = Template::new().bool(CKA_EXTRACTABLE, false);
    let ec = Template::new().bytes(CKA_EC_PARAMS, P256);
    let private = module.generate_key_pair(session, &Mechanism::plain(CKM_EC_KEY_PAIR_GEN), &ec, &lock).unwrap().1;
    assert_eq!(module.wrap(session, &Mechanism::plain(CKM_AES_KEY_WRAP_KWP), kek, private), Err(CKR_KEY_UNEXTRACTABLE));
}

#[test]
fn wrap_with_trusted_needs_a_trusted_key_and_only_the_officer_trusts() {
    let module = common::hsm_sim();
    let slot = Token::initialised(module, "trusted");
    let session = module.open_rw(slot).unwrap();
    module.login(session, CKU_SO, common::SO_PIN).unwrap();
    let rsa = Template::new().ulong(CKA_MODULUS_BITS, 2048).bytes(CKA_PUBLIC_EXPONENT, [1, 0, 1]).bool(CKA_WRAP, true);
    // The officer makes public objects only, so the pair's private half is of another token in real
    // life.
    let public = {
        let template = rsa.clone().bool(CKA_TOKEN, true).bool(CKA_PRIVATE, false);
        let private = Template::new().bool(CKA_PRIVATE, false).bool(CKA_TOKEN, false);
        module.generate_key_pair(session, &Mechanism::plain(CKM_RSA_PKCS_KEY_PAIR_GEN), &template, &private).unwrap().0
    };
    let (n, e) =
        (module.get(session, public, CKA_MODULUS).unwrap(), module.get(session, public, CKA_PUBLIC_EXPONENT).unwrap());
    let escrow = Template::new()
        .ulong(CKA_CLASS, CKO_PUBLIC_KEY)
        .ulong(CKA_KEY_TYPE, CKK_RSA)
        .bool(CKA_TOKEN, true)
        .bool(CKA_PRIVATE, false)
        .bool(CKA_WRAP, true)
        .bytes(CKA_MODULUS, n)
        .bytes(CKA_PUBLIC_EXPONENT, e);
    module
        .create(session, &escrow.clone().bool(CKA_TRUSTED, true).bytes(CKA_LABEL, "escrow"))
        .expect("the officer may create a trusted key");
    module.logout(session).unwrap();

    module.login(session, CKU_USER, common::USER_PIN).unwrap();
    let trusted = module.find(session, &Template::new().bytes(CKA_LABEL, "escrow")).unwrap()[0];
    assert!(module.get_bool(session, trusted, CKA_TRUSTED).unwrap());
    let untrusted = module.create(session, &escrow).unwrap();
    let root = Template::new_aes(32).bool(CKA_SENSITIVE, true).bool(CKA_WRAP_WITH_TRUSTED, true);
    let root = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &root).unwrap();
    let oaep = Mechanism::oaep(CKM_SHA_1, CKG_MGF1_SHA1, &[]);
    assert_eq!(module.wrap(session, &oaep, untrusted, root), Err(CKR_KEY_NOT_WRAPPABLE));
    module.wrap(session, &oaep, trusted, root).unwrap();
    let aes = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(32)).unwrap();
    assert_eq!(module.wrap(session, &kw(), aes, root), Err(CKR_KEY_NOT_WRAPPABLE));

    // The user cannot make anything trusted: not at creation, not later, not by a copy.
    for code in [
        module.create(session, &escrow.clone().bool(CKA_TRUSTED, true)).unwrap_err(),
        module.set(session, untrusted, &Template::new().bool(CKA_TRUSTED, true)).unwrap_err(),
        module.copy(session, untrusted, &Template::new().bool(CKA_TRUSTED, true)).unwrap_err(),
        module
            .generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(32).bool(CKA_TRUSTED, true))
            .unwrap_err(),
    ] {
        assert!(
            [CKR_ATTRIBUTE_READ_ONLY, CKR_TEMPLATE_INCONSISTENT, CKR_USER_NOT_LOGGED_IN].contains(&code),
            "{}",
            name(code)
        );
    }
    // And what the officer trusts the user cannot turn into another key: setting it to what it is,
    // or a copy, is harmless.
    assert!(module.set(session, trusted, &Template::new().bytes(CKA_MODULUS, [1; 256])).is_err());
}

#[test]
fn wrap_templates_choose_what_is_wrapped() {
    let token = Token::fresh("wrap-template");
    let (module, session) = (token.module, token.session);
    let wanted = Template::new().bytes(CKA_LABEL, "meter").ulong(CKA_KEY_TYPE, CKK_AES);
    let kek = token.aes(&[1; 32], Template::new().nested(CKA_WRAP_TEMPLATE, wanted));
    let matching = token.aes(&[2; 16], Template::new().bytes(CKA_LABEL, "meter"));
    module.wrap(session, &kw(), kek, matching).unwrap();
    for other in [
        token.aes(&[2; 16], Template::new().bytes(CKA_LABEL, "root")),
        token.generic(&[2; 16], Template::new().bytes(CKA_LABEL, "meter")),
    ] {
        let code = module.wrap(session, &kw(), kek, other).unwrap_err();
        assert!([CKR_KEY_NOT_WRAPPABLE, CKR_KEY_HANDLE_INVALID].contains(&code), "{}", name(code));
    }
}

#[test]
fn unwrap_templates_bind_what_is_unwrapped() {
    let token = Token::fresh("unwrap-template");
    let (module, session) = (token.module, token.session);
    let forced = Template::new().bool(CKA_SENSITIVE, true).bool(CKA_WRAP, false).bool(CKA_DERIVE, false);
    let kek = token.aes(&[1; 32], Template::new().nested(CKA_UNWRAP_TEMPLATE, forced));
    let key = token.aes(&[2; 16], Template::new());
    let wrapped = module.wrap(session, &kw(), kek, key).unwrap();
    // What the caller leaves open is filled in.
    let open = Template::new()
        .ulong(CKA_CLASS, CKO_SECRET_KEY)
        .ulong(CKA_KEY_TYPE, CKK_AES)
        .bool(CKA_TOKEN, false)
        .bool(CKA_EXTRACTABLE, true);
    let unwrapped = module.unwrap(session, &kw(), kek, &wrapped, &open).unwrap();
    assert_eq!(module.get(session, unwrapped, CKA_VALUE), Err(CKR_ATTRIBUTE_SENSITIVE));
    assert!(!module.get_bool(session, unwrapped, CKA_WRAP).unwrap());
    // What the caller says otherwise is refused.
    for against in [
        Template::new().bool(CKA_SENSITIVE, false),
        Template::new().bool(CKA_WRAP, true),
        Template::new().bool(CKA_DERIVE, true),
    ] {
        let code = module.unwrap(session, &kw(), kek, &wrapped, &open.clone().with(against)).unwrap_err();
        assert_eq!(code, CKR_TEMPLATE_INCONSISTENT, "{}", name(code));
    }
    // What the caller says alike is fine, and the template can be read back.
    module.unwrap(session, &kw(), kek, &wrapped, &open.bool(CKA_SENSITIVE, true)).unwrap();
    assert_eq!(
        module.get(session, kek, CKA_UNWRAP_TEMPLATE).map(|value| value.len()),
        Ok(3 * size_of::<CK_ATTRIBUTE>())
    );
}

#[test]
fn derive_templates_bind_what_is_derived() {
    let token = Token::fresh("derive-template");
    let (module, session) = (token.module, token.session);
    let forced = Template::new().bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, true).bool(CKA_WRAP, false);
    let root = token.aes(&[1; 32], Template::new().nested(CKA_DERIVE_TEMPLATE, forced));
    let mechanism = Mechanism::cbc_data([0; 16], &[3; 32]);
    let open = Template::new()
        .ulong(CKA_CLASS, CKO_SECRET_KEY)
        .ulong(CKA_KEY_TYPE, CKK_AES)
        .ulong(CKA_VALUE_LEN, 16)
        .bool(CKA_TOKEN, false);
    let derived = module.derive(session, &mechanism, root, &open).unwrap();
    assert_eq!(module.get(session, derived, CKA_VALUE), Err(CKR_ATTRIBUTE_SENSITIVE));
    assert!(module.get_bool(session, derived, CKA_EXTRACTABLE).unwrap());
    let code = module.derive(session, &mechanism, root, &open.bool(CKA_SENSITIVE, false)).unwrap_err();
    assert_eq!(code, CKR_TEMPLATE_INCONSISTENT, "{}", name(code));
}

/// A sensitive base gives no readable key by a mechanism that could give the base away; that is the
/// caller's to forbid by a derive template. What must hold always: the base itself stays
/// unreadable.
#[test]
fn a_locked_root_still_derives() {
    let token = Token::fresh("locked-root");
    let (module, session) = (token.module, token.session);
    let template =
        Template::new_aes(32).bool(CKA_SENSITIVE, true).bool(CKA_EXTRACTABLE, false).bool(CKA_ENCRYPT, false);
    let root = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &template).unwrap();
    let kek = token.aes(&[1; 32], Template::new());
    let derived = module
        .derive(
            session,
            &Mechanism::cbc_data([0; 16], &[3; 16]),
            root,
            &Template::new_aes(16).bool(CKA_SENSITIVE, true),
        )
        .unwrap();
    module.wrap(session, &kw(), kek, derived).expect("derived keys are extractable if they are said to be");
    assert_eq!(module.wrap(session, &kw(), kek, root), Err(CKR_KEY_UNEXTRACTABLE));
}

#[test]
fn allowed_mechanisms_allow_no_others() {
    let token = Token::fresh("allowed");
    let (module, session) = (token.module, token.session);
    let list: Vec<u8> = [CKM_AES_CMAC, CKM_AES_KEY_WRAP].iter().flat_map(|kind| kind.to_ne_bytes()).collect();
    let key = token.aes(&[1; 32], Template::new().bytes(CKA_ALLOWED_MECHANISMS, &list));
    let other = token.aes(&[2; 16], Template::new());
    module.sign(session, &Mechanism::plain(CKM_AES_CMAC), key, b"message").unwrap();
    let wrapped = module.wrap(session, &kw(), key, other).unwrap();
    module.unwrap(session, &kw(), key, &wrapped, &Template::secret(CKK_AES)).unwrap();
    assert_eq!(module.encrypt(session, &ecb(), key, &[0; 16]), Err(CKR_MECHANISM_INVALID));
    assert_eq!(module.decrypt(session, &ecb(), key, &[0; 16]), Err(CKR_MECHANISM_INVALID));
    assert_eq!(module.encrypt(session, &Mechanism::gcm(&[0; 12], &[], 128), key, &[0; 16]), Err(CKR_MECHANISM_INVALID));
    assert_eq!(
        module.wrap(session, &Mechanism::with_bytes(CKM_AES_CBC_PAD, &[0; 16]), key, other),
        Err(CKR_MECHANISM_INVALID)
    );
    assert_eq!(
        module.derive(session, &Mechanism::ecb_data(&[0; 16]), key, &Template::new_aes(16)),
        Err(CKR_MECHANISM_INVALID)
    );
    assert_eq!(
        module.sign(session, &Mechanism::with_ulong(CKM_AES_CMAC_GENERAL, 8), key, b"message"),
        Err(CKR_MECHANISM_INVALID)
    );
    let copy = module.copy(session, key, &Template::new()).unwrap();
    assert_eq!(module.encrypt(session, &ecb(), copy, &[0; 16]), Err(CKR_MECHANISM_INVALID), "a copy forgot the list");
    let read = module.get(session, key, CKA_ALLOWED_MECHANISMS).unwrap();
    assert_eq!(read, list);
}

#[test]
fn templates_must_make_sense() {
    let token = Token::fresh("sense");
    let (module, session) = (token.module, token.session);
    let refused = [
        ("no class", Template::aes(&[1; 16]).without(CKA_CLASS), vec![CKR_TEMPLATE_INCOMPLETE]),
        ("no key type", Template::aes(&[1; 16]).without(CKA_KEY_TYPE), vec![CKR_TEMPLATE_INCOMPLETE]),
        ("no value", Template::secret(CKK_AES), vec![CKR_TEMPLATE_INCOMPLETE]),
        (
            "an AES key of 15 bytes",
            Template::aes(&[1; 15]),
            vec![CKR_ATTRIBUTE_VALUE_INVALID, CKR_KEY_SIZE_RANGE, CKR_TEMPLATE_INCONSISTENT],
        ),
        (
            "an empty secret",
            Template::generic(&[]),
            vec![CKR_ATTRIBUTE_VALUE_INVALID, CKR_KEY_SIZE_RANGE, CKR_TEMPLATE_INCONSISTENT],
        ),
        (
            "a boolean of two bytes",
            Template::aes(&[1; 16]).bytes(CKA_ENCRYPT, [1, 0]),
            vec![CKR_ATTRIBUTE_VALUE_INVALID],
        ),
        ("a class of one byte", Template::aes(&[1; 16]).bytes(CKA_CLASS, [4]), vec![CKR_ATTRIBUTE_VALUE_INVALID]),
        (
            "a modulus in an AES key",
            Template::aes(&[1; 16]).bytes(CKA_MODULUS, [1; 256]),
            vec![CKR_ATTRIBUTE_TYPE_INVALID, CKR_TEMPLATE_INCONSISTENT],
        ),
        ("an unknown attribute", Template::aes(&[1; 16]).bytes(0x7777_7777, [1]), vec![CKR_ATTRIBUTE_TYPE_INVALID]),
        (
            "an attribute twice, differently",
            Template::aes(&[1; 16]).and(Template::new().bool(CKA_DERIVE, false)),
            vec![CKR_TEMPLATE_INCONSISTENT],
        ),
        (
            "an unknown class",
            Template::aes(&[1; 16]).ulong(CKA_CLASS, 999),
            vec![CKR_ATTRIBUTE_VALUE_INVALID, CKR_TEMPLATE_INCONSISTENT],
        ),
        (
            "an unknown key type",
            Template::aes(&[1; 16]).ulong(CKA_KEY_TYPE, 999),
            vec![CKR_ATTRIBUTE_VALUE_INVALID, CKR_TEMPLATE_INCONSISTENT],
        ),
        (
            "a check value that is wrong",
            Template::aes(&[1; 16]).bytes(CKA_CHECK_VALUE, [9, 9, 9]),
            vec![CKR_ATTRIBUTE_VALUE_INVALID],
        ),
        (
            "a point off its curve",
            Template::ec_public(P256, &[[4; 1].as_slice(), &[1; 64]].concat()),
            vec![CKR_ATTRIBUTE_VALUE_INVALID, CKR_DOMAIN_PARAMS_INVALID],
        ),
        ("an EC scalar of zero", Template::ec_private(P256, &[0; 32]), vec![CKR_ATTRIBUTE_VALUE_INVALID]),
        (
            "a curve that is none",
            Template::ec_private(&[6, 3, 0x55, 4, 3], &[1; 32]),
            vec![CKR_DOMAIN_PARAMS_INVALID, CKR_CURVE_NOT_SUPPORTED, CKR_ATTRIBUTE_VALUE_INVALID],
        ),
    ];
    for (what, template, expected) in refused {
        match module.create(session, &template) {
            Ok(_) => panic!("{what} was taken"),
            Err(code) => assert!(expected.contains(&code), "{what}: {}", name(code)),
        }
    }
    // An attribute twice, alike, is as if it were there once (PKCS#11 2.40 section 4.1.1).
    module.create(session, &Template::aes(&[1; 16]).and(Template::new().bool(CKA_DERIVE, true))).unwrap();
    for (length, ok) in [(16, true), (24, true), (32, true), (0, false), (17, false), (64, false)] {
        let made = module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::new_aes(length));
        assert_eq!(made.is_ok(), ok, "a key of {length} bytes");
    }
    let code =
        module.generate_key(session, &Mechanism::plain(CKM_AES_KEY_GEN), &Template::secret(CKK_AES)).unwrap_err();
    assert_eq!(code, CKR_TEMPLATE_INCOMPLETE, "{}", name(code));
    let code = module
        .generate_key(
            session,
            &Mechanism::plain(CKM_AES_KEY_GEN),
            &Template::new_aes(16).ulong(CKA_KEY_TYPE, CKK_GENERIC_SECRET),
        )
        .unwrap_err();
    assert_eq!(code, CKR_TEMPLATE_INCONSISTENT, "{}", name(code));
}

/// The check value of an AES key: the first three bytes of its encryption of zeros (PKCS#11 2.40
/// section 2.10.2).
#[test]
fn check_values() {
    let token = Token::fresh("check-value");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[7; 16], Template::new());
    let expected = module.encrypt(session, &ecb(), key, &[0; 16]).unwrap()[..3].to_vec();
    assert_eq!(module.get(session, key, CKA_CHECK_VALUE).unwrap(), expected);
    token.aes(&[7; 16], Template::new().bytes(CKA_CHECK_VALUE, &expected));
}

#[test]
fn finding_matches_all_of_the_template() {
    let token = Token::fresh("find");
    let (module, session) = (token.module, token.session);
    let keys: Vec<Object> = (0..120_u8)
        .map(|i| {
            token.aes(
                &[i; 16],
                Template::new()
                    .bytes(CKA_ID, [i])
                    .bytes(CKA_LABEL, if i % 2 == 0 { "even" } else { "odd" })
                    .bool(CKA_TOKEN, i % 3 == 0),
            )
        })
        .collect();
    let count = |template: Template| module.find(session, &template).unwrap().len();
    assert_eq!(count(Template::new()), 120);
    assert_eq!(count(Template::new().bytes(CKA_LABEL, "even")), 60);
    assert_eq!(count(Template::new().bytes(CKA_LABEL, "even").bool(CKA_TOKEN, true)), 20);
    assert_eq!(module.find(session, &Template::new().bytes(CKA_ID, [77])).unwrap(), [keys[77]]);
    assert_eq!(count(Template::new().bytes(CKA_LABEL, "eve")), 0, "a prefix is no match");
    assert_eq!(count(Template::new().ulong(CKA_CLASS, CKO_PRIVATE_KEY)), 0);
    assert_eq!(count(Template::new().bytes(CKA_MODULUS, [1])), 0);
}
