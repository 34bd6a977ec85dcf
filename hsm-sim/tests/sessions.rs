//! Sessions: thousands of them, what dies with them, what one can do at a time, and many threads at
//! once.
#![expect(unsafe_code, reason = "calls into a C interface")]

#[macro_use]
mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Mechanism, Template, Token, USER_PIN, begin_encryption, finish_encryption, name};
use cryptoki_sys::*;

fn ecb() -> Mechanism {
    Mechanism::plain(CKM_AES_ECB)
}

#[test]
fn thousands_of_sessions() {
    let token = Token::fresh("thousands");
    let (module, slot) = (token.module, token.slot);
    let key = token.aes(&[1; 16], Template::new());
    let expected = module.encrypt(token.session, &ecb(), key, &[7; 16]).unwrap();
    let sessions: Vec<_> =
        (0..10_000).map(|i| module.open(slot, if i % 2 == 0 { CKF_RW_SESSION } else { 0 }).unwrap()).collect();
    assert_eq!(
        sessions.iter().collect::<std::collections::HashSet<_>>().len(),
        sessions.len(),
        "a handle was given twice"
    );
    for session in &sessions {
        begin_encryption(module, *session, &ecb(), key).unwrap();
    }
    for session in &sessions {
        assert_eq!(finish_encryption(module, *session, &[7; 16]).unwrap(), expected);
    }
    let info = module.token_info(slot).unwrap();
    assert!(
        info.ulSessionCount == CK_UNAVAILABLE_INFORMATION || info.ulSessionCount == 10_001,
        "{}",
        info.ulSessionCount
    );
    for session in &sessions {
        module.close(*session).unwrap();
    }
    assert_eq!(module.session_state(sessions[5]), Err(CKR_SESSION_HANDLE_INVALID));
    assert_eq!(module.close(sessions[5]), Err(CKR_SESSION_HANDLE_INVALID));
    assert_eq!(module.session_state(token.session), Ok(CKS_RW_USER_FUNCTIONS), "the anchor session and its login stay");
}

#[test]
fn session_objects_die_with_their_session() {
    let token = Token::fresh("mortal");
    let (module, slot, anchor) = (token.module, token.slot, token.session);
    let session = module.open(slot, 0).unwrap();
    let object = module.create(session, &Template::aes(&[1; 16])).unwrap();
    let lasting = module.create(anchor, &Template::aes(&[2; 16]).bool(CKA_TOKEN, true)).unwrap();
    let copy = module.copy(anchor, object, &Template::new()).unwrap();
    assert_eq!(module.get(anchor, object, CKA_VALUE).unwrap(), [1; 16], "other sessions use it");
    let wrapped = module.wrap(anchor, &Mechanism::plain(CKM_AES_KEY_WRAP), object, lasting).unwrap();
    module.close(session).unwrap();
    assert_eq!(module.get(anchor, object, CKA_VALUE), Err(CKR_OBJECT_HANDLE_INVALID));
    assert_eq!(module.encrypt(anchor, &ecb(), object, &[0; 16]), Err(CKR_KEY_HANDLE_INVALID));
    assert_eq!(
        module.unwrap(anchor, &Mechanism::plain(CKM_AES_KEY_WRAP), object, &wrapped, &Template::secret(CKK_AES)),
        Err(CKR_UNWRAPPING_KEY_HANDLE_INVALID)
    );
    assert_eq!(
        module.wrap(anchor, &Mechanism::plain(CKM_AES_KEY_WRAP), object, lasting),
        Err(CKR_WRAPPING_KEY_HANDLE_INVALID)
    );
    assert_eq!(module.find(anchor, &Template::new()).unwrap().len(), 2);
    assert_eq!(token.value(copy), [1; 16], "a copy belongs to the session that made it");
    assert_eq!(token.value(lasting), [2; 16]);
}

/// Sessions keep copies of the token objects that they use: a change or a removal by another
/// session is seen by the next call all the same.
#[test]
fn what_another_session_changes_is_seen_at_once() {
    let token = Token::fresh("shared keys");
    let (module, slot, anchor) = (token.module, token.slot, token.session);
    let sessions: Vec<_> = (0..20).map(|_| module.open(slot, 0).unwrap()).collect();
    let wrap = Mechanism::plain(CKM_AES_KEY_WRAP);
    let keys: Vec<_> =
        (0..12).map(|i| token.aes(&[i; 16], Template::new().bool(CKA_TOKEN, true).bool(CKA_WRAP, true))).collect();
    // More keys than a session keeps, in two rounds.
    for key in keys.iter().chain(&keys) {
        for session in &sessions {
            module.wrap(*session, &wrap, *key, keys[0]).unwrap();
        }
    }
    let (changed, destroyed) = (keys[11], keys[10]);
    module.set(anchor, changed, &Template::new().bool(CKA_WRAP, false)).unwrap();
    module.destroy(anchor, destroyed).unwrap();
    for session in &sessions {
        assert_eq!(module.wrap(*session, &wrap, changed, keys[0]), Err(CKR_KEY_FUNCTION_NOT_PERMITTED));
        assert_eq!(module.wrap(*session, &wrap, destroyed, keys[0]), Err(CKR_WRAPPING_KEY_HANDLE_INVALID));
        module.wrap(*session, &wrap, keys[9], keys[0]).unwrap();
    }
    // A key that goes while others use it: each call finds it whole or not at all, and none finds
    // it afterwards.
    let gone = AtomicBool::new(false);
    let barrier = Barrier::new(sessions.len() + 1);
    std::thread::scope(|scope| {
        for session in &sessions {
            scope.spawn(|| {
                barrier.wait();
                loop {
                    let was_gone = gone.load(Ordering::SeqCst);
                    match module.wrap(*session, &wrap, keys[9], keys[0]) {
                        Ok(_) => assert!(!was_gone, "a destroyed key was used"),
                        Err(code) => return assert_eq!(code, CKR_WRAPPING_KEY_HANDLE_INVALID),
                    }
                }
            });
        }
        barrier.wait();
        module.destroy(anchor, keys[9]).unwrap();
        gone.store(true, Ordering::SeqCst);
    });
    module.logout(anchor).unwrap();
    for session in &sessions {
        assert_eq!(module.wrap(*session, &wrap, keys[8], keys[0]), Err(CKR_WRAPPING_KEY_HANDLE_INVALID));
    }
}

#[test]
fn closing_all_sessions_ends_all_of_the_slot_only() {
    let token = Token::fresh("all of one");
    let other = Token::fresh("none of the other");
    let module = token.module;
    let more = module.open_rw(token.slot).unwrap();
    call!(module, C_CloseAllSessions, token.slot).unwrap();
    assert_eq!(module.session_state(more), Err(CKR_SESSION_HANDLE_INVALID));
    assert_eq!(module.session_state(token.session), Err(CKR_SESSION_HANDLE_INVALID));
    assert_eq!(module.session_state(other.session), Ok(CKS_RW_USER_FUNCTIONS));
    let session = module.open_rw(token.slot).unwrap();
    assert_eq!(module.session_state(session), Ok(CKS_RW_PUBLIC_SESSION), "it logged out");
    assert_eq!(call!(module, C_CloseAllSessions, 9_999_999), Err(CKR_SLOT_ID_INVALID));
}

/// One operation of a kind at a time (PKCS#11 2.40 section 5.8 and on), several kinds side by side.
#[test]
fn one_operation_of_a_kind() {
    let token = Token::fresh("kinds");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let cmac = Mechanism::plain(CKM_AES_CMAC);
    begin_encryption(module, session, &ecb(), key).unwrap();
    assert_eq!(begin_encryption(module, session, &ecb(), key), Err(CKR_OPERATION_ACTIVE));
    let mac = module.sign(session, &cmac, key, b"message").unwrap();
    module.verify(session, &cmac, key, b"message", &mac).unwrap();
    module.digest(session, &Mechanism::plain(CKM_SHA256), b"message").unwrap();
    assert_eq!(module.decrypt(session, &ecb(), key, &[0; 16]).unwrap().len(), 16);
    assert_eq!(module.find(session, &Template::new()).unwrap().len(), 1);
    finish_encryption(module, session, &[0; 16]).expect("the encryption is still active");
    assert_eq!(finish_encryption(module, session, &[0; 16]), Err(CKR_OPERATION_NOT_INITIALIZED));

    // Wrong data ends the operation.
    begin_encryption(module, session, &ecb(), key).unwrap();
    assert_eq!(finish_encryption(module, session, &[0; 15]), Err(CKR_DATA_LEN_RANGE));
    assert_eq!(finish_encryption(module, session, &[0; 16]), Err(CKR_OPERATION_NOT_INITIALIZED));
    // A null mechanism cancels (PKCS#11 3.0 section 5.8.1); either that or it is refused, but the
    // operation ends by then.
    assert_eq!(module.decrypt(session, &ecb(), key, &[0; 15]), Err(CKR_ENCRYPTED_DATA_LEN_RANGE));

    call!(module, C_FindObjectsInit, session, std::ptr::null_mut(), 0).unwrap();
    assert_eq!(call!(module, C_FindObjectsInit, session, std::ptr::null_mut(), 0), Err(CKR_OPERATION_ACTIVE));
    call!(module, C_FindObjectsFinal, session).unwrap();
    assert_eq!(call!(module, C_FindObjectsFinal, session), Err(CKR_OPERATION_NOT_INITIALIZED));
    let (mut found, mut count) = (0, 0);
    assert_eq!(
        call!(module, C_FindObjects, session, &raw mut found, 1, &raw mut count),
        Err(CKR_OPERATION_NOT_INITIALIZED)
    );

    // C_SessionCancel (3.0) ends what is active and nothing else.
    begin_encryption(module, session, &ecb(), key).unwrap();
    call3!(module, C_SessionCancel, session, CKF_ENCRYPT).unwrap();
    assert_eq!(finish_encryption(module, session, &[0; 16]), Err(CKR_OPERATION_NOT_INITIALIZED));
}

/// What is removed during an operation does not disturb it: the operation holds its key.
#[test]
fn an_operation_outlives_its_key() {
    let token = Token::fresh("outlive");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let expected = module.encrypt(session, &ecb(), key, &[7; 16]).unwrap();
    begin_encryption(module, session, &ecb(), key).unwrap();
    module.destroy(session, key).unwrap();
    match finish_encryption(module, session, &[7; 16]) {
        Ok(block) => assert_eq!(block, expected),
        Err(code) => assert!([CKR_KEY_HANDLE_INVALID, CKR_OPERATION_NOT_INITIALIZED].contains(&code), "{}", name(code)),
    }
    assert_eq!(begin_encryption(module, session, &ecb(), key), Err(CKR_KEY_HANDLE_INVALID));
}

/// The server's cycle on many threads, each with a session, over shared keys; every result is
/// checked.
#[test]
fn threads_do_the_cycle() {
    let token = Token::fresh("cycle");
    let (module, slot) = (token.module, token.slot);
    let (storage, transport) = (token.aes(&[1; 32], Template::new()), token.aes(&[2; 32], Template::new()));
    let kw = || Mechanism::plain(CKM_AES_KEY_WRAP);
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let barrier = &barrier;
            scope.spawn(move || {
                let session = module.open_rw(slot).unwrap();
                let value = [thread; 16];
                let key = module.create(session, &Template::aes(&value)).unwrap();
                let stored = module.wrap(session, &kw(), storage, key).unwrap();
                let sent = module.wrap(session, &kw(), transport, key).unwrap();
                barrier.wait();
                for _ in 0..2_000 {
                    let key = module.unwrap(session, &kw(), storage, &stored, &Template::secret(CKK_AES)).unwrap();
                    assert_eq!(module.wrap(session, &kw(), transport, key).unwrap(), sent);
                    module.destroy(session, key).unwrap();
                }
                module.close(session).unwrap();
            });
        }
    });
    assert_eq!(module.find(token.session, &Template::new()).unwrap().len(), 2, "keys were left behind");
}

/// One session used by many threads: calls may fail (it is one operation at a time), but nothing
/// crashes, hangs or mixes.
#[test]
fn threads_share_a_session() {
    let token = Token::fresh("one session");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let expected = module.encrypt(session, &ecb(), key, &[7; 16]).unwrap();
    let good = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    if let Ok(block) = module.encrypt(session, &ecb(), key, &[7; 16]) {
                        assert_eq!(block, expected);
                        good.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(good.into_inner() > 0);
    let _ = finish_encryption(module, session, &[7; 16]);
    module.encrypt(session, &ecb(), key, &[7; 16]).expect("the session works on");
}

/// Opening, closing, logging in and out, creating and destroying on many threads while others work.
#[test]
fn threads_come_and_go() {
    let token = Token::fresh("coming and going");
    let (module, slot) = (token.module, token.slot);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4_u8)
            .map(|thread| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut rounds = 0_u32;
                    while !stop.load(Ordering::Relaxed) || rounds < 50 {
                        let session = module.open_rw(slot).unwrap();
                        // The login may be gone, because another thread logged out: then public
                        // objects only.
                        let template = Template::aes(&[thread; 16]).bool(CKA_PRIVATE, false).bytes(CKA_ID, [thread]);
                        let key = module.create(session, &template).unwrap();
                        // A logout may end what is active in other sessions (PKCS#11 2.40 section
                        // 5.6, C_Logout).
                        let ended = |code: &CK_RV| assert_eq!(*code, CKR_OPERATION_NOT_INITIALIZED, "{}", name(*code));
                        if let Ok(block) = module.encrypt(session, &ecb(), key, &[rounds as u8; 16]).inspect_err(ended)
                            && let Ok(plain) = module.decrypt(session, &ecb(), key, &block).inspect_err(ended)
                        {
                            assert_eq!(plain, [rounds as u8; 16]);
                        }
                        if let Ok(found) =
                            module.find(session, &Template::new().bytes(CKA_ID, [thread])).inspect_err(ended)
                        {
                            assert!(found.contains(&key));
                        }
                        module.close(session).unwrap();
                        rounds += 1;
                    }
                })
            })
            .collect();
        for _ in 0..60 {
            let _ = module.logout(token.session);
            let code = module.login(token.session, CKU_USER, USER_PIN);
            assert!(code.is_ok(), "{code:?}");
            let private = module
                .create(token.session, &Template::aes(&[9; 16]).bool(CKA_PRIVATE, true).bool(CKA_TOKEN, true))
                .unwrap();
            module.destroy(token.session, private).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap();
        }
    });
    assert_eq!(module.find(token.session, &Template::new()).unwrap(), []);
}
