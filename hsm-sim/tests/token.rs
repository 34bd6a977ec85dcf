//! The token: PINs and lock-out, login that all sessions share, private objects, what stays when a
//! process ends or dies.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "test helpers: a failure is to stop the test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::{
    Mechanism, Module, PIN_ATTEMPTS, SO_PIN, Session, Template, Token, USER_PIN, child, folder, hsm_sim, name,
};
use cryptoki_sys::*;

fn token_key(label: &str, value: &[u8]) -> Template {
    Template::aes(value).bool(CKA_TOKEN, true).bytes(CKA_LABEL, label)
}

fn by_label(label: &str) -> Template {
    Template::new().bytes(CKA_LABEL, label)
}

fn flags(module: &Module, slot: CK_SLOT_ID) -> CK_FLAGS {
    module.token_info(slot).unwrap().flags
}

#[test]
fn initialising_sets_label_and_flags_and_wipes() {
    let token = Token::fresh("first life");
    let (module, slot) = (token.module, token.slot);
    let set = flags(module, slot);
    assert_ne!(set & CKF_TOKEN_INITIALIZED, 0);
    assert_ne!(set & CKF_USER_PIN_INITIALIZED, 0);
    assert_ne!(set & CKF_LOGIN_REQUIRED, 0);
    assert_ne!(set & CKF_RNG, 0);
    module.create(token.session, &token_key("gone", &[7; 16])).unwrap();

    assert_eq!(module.init_token(slot, SO_PIN, "second life"), Err(CKR_SESSION_EXISTS));
    module.close(token.session).unwrap();
    assert_eq!(module.init_token(slot, "wrong-so-pin", "second life"), Err(CKR_PIN_INCORRECT));
    module.init_token(slot, SO_PIN, "second life").unwrap();
    assert_eq!(flags(module, slot) & CKF_USER_PIN_INITIALIZED, 0, "the user PIN goes with the old token");

    let session = module.open_rw(module.slot_of("second life").unwrap()).unwrap();
    assert_eq!(module.login(session, CKU_USER, USER_PIN), Err(CKR_USER_PIN_NOT_INITIALIZED));
    module.login(session, CKU_SO, SO_PIN).unwrap();
    module.init_pin(session, USER_PIN).unwrap();
    module.logout(session).unwrap();
    module.login(session, CKU_USER, USER_PIN).unwrap();
    assert_eq!(module.find(session, &Template::new()).unwrap(), [], "objects survived C_InitToken");
}

#[test]
fn wrong_user_pins_lock_it_and_the_officer_unlocks() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "lock-out");
    let session = module.open_rw(slot).unwrap();
    for attempt in 1..=PIN_ATTEMPTS {
        let code = module.login(session, CKU_USER, "wrong-pin").unwrap_err();
        assert!(
            code == CKR_PIN_INCORRECT || (attempt == PIN_ATTEMPTS && code == CKR_PIN_LOCKED),
            "attempt {attempt}: {}",
            name(code)
        );
        assert_ne!(flags(module, slot) & (CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_LOCKED), 0, "after attempt {attempt}");
        assert_eq!(
            flags(module, slot) & CKF_USER_PIN_FINAL_TRY != 0,
            attempt == PIN_ATTEMPTS - 1,
            "after attempt {attempt}"
        );
    }
    assert_ne!(flags(module, slot) & CKF_USER_PIN_LOCKED, 0);
    assert_eq!(module.login(session, CKU_USER, USER_PIN), Err(CKR_PIN_LOCKED), "the right PIN opened a locked token");

    module.login(session, CKU_SO, SO_PIN).unwrap();
    module.init_pin(session, "new-user-pin").unwrap();
    module.logout(session).unwrap();
    assert_eq!(flags(module, slot) & (CKF_USER_PIN_LOCKED | CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY), 0);
    module.login(session, CKU_USER, "new-user-pin").unwrap();
}

#[test]
fn a_right_pin_resets_the_count() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "count");
    let session = module.open_rw(slot).unwrap();
    for _ in 0..3 {
        for _ in 0..PIN_ATTEMPTS - 1 {
            assert_eq!(module.login(session, CKU_USER, "wrong-pin"), Err(CKR_PIN_INCORRECT));
        }
        module.login(session, CKU_USER, USER_PIN).unwrap();
        assert_eq!(flags(module, slot) & CKF_USER_PIN_COUNT_LOW, 0);
        module.logout(session).unwrap();
    }
}

/// Wrong PINs are counted per token, not per process: otherwise a loop of processes would try them
/// all.
#[test]
fn wrong_pins_of_other_processes_count() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "lock-out of processes");
    for _ in 0..PIN_ATTEMPTS {
        assert!(
            child("as_a_process", folder(), &[("ROLE", "wrong-pin"), ("TOKEN", "lock-out of processes")])
                .stdout(Stdio::null())
                .status()
                .unwrap()
                .success()
        );
    }
    let session = module.open_rw(slot).unwrap();
    assert_eq!(module.login(session, CKU_USER, USER_PIN), Err(CKR_PIN_LOCKED));
}

#[test]
fn wrong_officer_pins_lock_it() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "officer lock-out");
    let session = module.open_rw(slot).unwrap();
    for _ in 0..PIN_ATTEMPTS {
        module.login(session, CKU_SO, "wrong-pin").unwrap_err();
    }
    assert_eq!(module.login(session, CKU_SO, SO_PIN), Err(CKR_PIN_LOCKED));
    assert_ne!(flags(module, slot) & CKF_SO_PIN_LOCKED, 0);
    module.login(session, CKU_USER, USER_PIN).expect("the user's PIN is not locked by the officer's");
}

#[test]
fn pins_are_changed_by_who_knows_them() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "pins");
    let session = module.open_rw(slot).unwrap();
    let key = {
        module.login(session, CKU_USER, USER_PIN).unwrap();
        module.create(session, &token_key("kept", &[5; 32])).unwrap()
    };
    assert_eq!(module.set_pin(session, "wrong-pin", "new-user-pin"), Err(CKR_PIN_INCORRECT));
    assert_eq!(module.set_pin(session, USER_PIN, "x"), Err(CKR_PIN_LEN_RANGE));
    module.set_pin(session, USER_PIN, "new-user-pin").unwrap();
    assert_eq!(module.get(session, key, CKA_VALUE).unwrap(), [5; 32]);
    module.logout(session).unwrap();
    assert_eq!(module.login(session, CKU_USER, USER_PIN), Err(CKR_PIN_INCORRECT));
    module.login(session, CKU_USER, "new-user-pin").unwrap();
    let found = module.find(session, &by_label("kept")).unwrap();
    assert_eq!(module.get(session, found[0], CKA_VALUE).unwrap(), [5; 32], "a new PIN opens the old objects");
    module.logout(session).unwrap();

    // Not logged in, C_SetPIN changes the user's PIN (PKCS#11 2.40 section 5.5).
    module.set_pin(session, "new-user-pin", USER_PIN).unwrap();
    module.login(session, CKU_SO, SO_PIN).unwrap();
    module.set_pin(session, SO_PIN, "new-so-pin").unwrap();
    assert_eq!(module.init_pin(session, "y"), Err(CKR_PIN_LEN_RANGE));
    module.logout(session).unwrap();
    assert_eq!(module.login(session, CKU_SO, SO_PIN), Err(CKR_PIN_INCORRECT));
    module.login(session, CKU_SO, "new-so-pin").unwrap();
    module.logout(session).unwrap();
    assert_eq!(module.init_pin(session, "another-pin"), Err(CKR_USER_NOT_LOGGED_IN));
    // Read-only sessions change no PIN.
    let read_only = module.open(slot, 0).unwrap();
    assert_eq!(module.set_pin(read_only, USER_PIN, "another-pin"), Err(CKR_SESSION_READ_ONLY));
}

#[test]
fn login_is_of_the_token_not_of_the_session() {
    let module = hsm_sim();
    let slot = Token::initialised(module, "login");
    let (first, second, read_only) =
        (module.open_rw(slot).unwrap(), module.open_rw(slot).unwrap(), module.open(slot, 0).unwrap());
    let states = || [first, second, read_only].map(|session| module.session_state(session).unwrap());
    assert_eq!(states(), [CKS_RW_PUBLIC_SESSION, CKS_RW_PUBLIC_SESSION, CKS_RO_PUBLIC_SESSION]);
    assert_eq!(module.login(first, CKU_SO, SO_PIN), Err(CKR_SESSION_READ_ONLY_EXISTS));
    module.login(first, CKU_USER, USER_PIN).unwrap();
    assert_eq!(states(), [CKS_RW_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS, CKS_RO_USER_FUNCTIONS]);
    assert_eq!(module.login(second, CKU_USER, USER_PIN), Err(CKR_USER_ALREADY_LOGGED_IN));
    module.close(read_only).unwrap();
    assert_eq!(module.login(second, CKU_SO, SO_PIN), Err(CKR_USER_ANOTHER_ALREADY_LOGGED_IN));
    assert_eq!(module.login(second, 77, USER_PIN), Err(CKR_USER_TYPE_INVALID));
    module.logout(second).unwrap();
    assert_eq!(module.session_state(first).unwrap(), CKS_RW_PUBLIC_SESSION);
    assert_eq!(module.logout(first), Err(CKR_USER_NOT_LOGGED_IN));
    module.login(first, CKU_SO, SO_PIN).unwrap();
    assert_eq!(module.session_state(second).unwrap(), CKS_RW_SO_FUNCTIONS);
    assert_eq!(module.open(slot, 0), Err(CKR_SESSION_READ_WRITE_SO_EXISTS));
    module.close(first).unwrap();
    module.close(second).unwrap();
    let fresh = module.open_rw(slot).unwrap();
    assert_eq!(module.session_state(fresh).unwrap(), CKS_RW_PUBLIC_SESSION, "closing the last session logs out");
}

#[test]
fn one_tokens_login_is_not_anothers() {
    let first = Token::fresh("island one");
    let module = first.module;
    let slot = Token::initialised(module, "island two");
    let session = module.open_rw(slot).unwrap();
    assert_eq!(module.session_state(session).unwrap(), CKS_RW_PUBLIC_SESSION);
    let key = module.create(first.session, &token_key("of one", &[1; 16])).unwrap();
    module.login(session, CKU_USER, USER_PIN).unwrap();
    assert_eq!(module.get(session, key, CKA_LABEL), Err(CKR_OBJECT_HANDLE_INVALID));
    assert_eq!(module.find(session, &by_label("of one")).unwrap(), []);
    assert_eq!(module.encrypt(session, &Mechanism::plain(CKM_AES_ECB), key, &[0; 16]), Err(CKR_KEY_HANDLE_INVALID));
}

#[test]
fn private_objects_need_the_login() {
    let token = Token::fresh("private");
    let (module, session) = (token.module, token.session);
    let private = module.create(session, &token_key("private", &[1; 16]).bool(CKA_PRIVATE, true)).unwrap();
    module.create(session, &token_key("public", &[2; 16]).bool(CKA_PRIVATE, false)).unwrap();
    let private_session =
        module.create(session, &Template::aes(&[3; 16]).bool(CKA_PRIVATE, true).bytes(CKA_LABEL, "session")).unwrap();
    module
        .create(session, &Template::aes(&[4; 16]).bool(CKA_PRIVATE, false).bytes(CKA_LABEL, "public session"))
        .unwrap();
    module.logout(session).unwrap();

    assert_eq!(module.find(session, &by_label("private")).unwrap(), []);
    assert_eq!(module.find(session, &by_label("public")).unwrap().len(), 1);
    assert_eq!(module.find(session, &by_label("public session")).unwrap().len(), 1);
    assert_eq!(module.get(session, private, CKA_LABEL), Err(CKR_OBJECT_HANDLE_INVALID));
    let code = module.encrypt(session, &Mechanism::plain(CKM_AES_ECB), private, &[0; 16]).unwrap_err();
    assert!([CKR_KEY_HANDLE_INVALID, CKR_USER_NOT_LOGGED_IN].contains(&code), "{}", name(code));
    assert_eq!(module.create(session, &Template::aes(&[1; 16]).bool(CKA_PRIVATE, true)), Err(CKR_USER_NOT_LOGGED_IN));
    assert_eq!(
        module.generate_key(
            session,
            &Mechanism::plain(CKM_AES_KEY_GEN),
            &Template::new_aes(16).bool(CKA_PRIVATE, true)
        ),
        Err(CKR_USER_NOT_LOGGED_IN)
    );

    module.login(session, CKU_USER, USER_PIN).unwrap();
    assert_eq!(module.find(session, &by_label("private")).unwrap().len(), 1);
    assert_eq!(module.find(session, &by_label("session")).unwrap(), [], "logout destroys private session objects");
    assert_eq!(module.get(session, private_session, CKA_LABEL), Err(CKR_OBJECT_HANDLE_INVALID));
}

#[test]
fn logout_ends_operations() {
    let token = Token::fresh("operations");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new().bool(CKA_PRIVATE, true));
    let mechanism = Mechanism::plain(CKM_AES_ECB);
    module.encrypt_in_parts(session, &mechanism, key, &[0; 16], &[]).unwrap();
    common::begin_encryption(module, session, &mechanism, key).unwrap();
    module.logout(session).unwrap();
    assert_eq!(common::finish_encryption(module, session, &[0; 16]), Err(CKR_OPERATION_NOT_INITIALIZED));
}

#[test]
fn read_only_sessions_write_no_token_objects() {
    let token = Token::fresh("read-only");
    let module = token.module;
    let object = module.create(token.session, &token_key("there", &[1; 16])).unwrap();
    let session = module.open(token.slot, 0).unwrap();
    assert_eq!(module.create(session, &token_key("new", &[1; 16])), Err(CKR_SESSION_READ_ONLY));
    assert_eq!(module.set(session, object, &by_label("renamed")), Err(CKR_SESSION_READ_ONLY));
    assert_eq!(module.destroy(session, object), Err(CKR_SESSION_READ_ONLY));
    assert_eq!(module.copy(session, object, &Template::new()), Err(CKR_SESSION_READ_ONLY));
    module.create(session, &Template::aes(&[2; 16])).expect("session objects may be created");
    module
        .copy(session, object, &Template::new().bool(CKA_TOKEN, false))
        .expect("a copy that is a session object, too");
}

#[test]
fn nothing_secret_is_on_the_disk() {
    let token = Token::fresh("at rest");
    let (module, session) = (token.module, token.session);
    let secret = *b"\xA5fourteen bytes\x5A";
    module
        .create(session, &token_key("at rest", &secret).bool(CKA_PRIVATE, true).bytes(CKA_ID, b"identifier at rest"))
        .unwrap();
    let generated = module
        .generate_key(
            session,
            &Mechanism::plain(CKM_AES_KEY_GEN),
            &Template::new_aes(32).bool(CKA_TOKEN, true).bool(CKA_PRIVATE, true),
        )
        .unwrap();
    let generated = token.value(generated);
    let mut seen = 0;
    for file in files(folder()) {
        let content = std::fs::read(&file).unwrap_or_default();
        seen += content.len();
        for needle in [&secret[..], &generated, SO_PIN.as_bytes(), USER_PIN.as_bytes(), b"identifier at rest"] {
            assert!(
                !content.windows(needle.len()).any(|window| window == needle),
                "`{}` holds a secret",
                file.display()
            );
        }
    }
    assert!(seen > 200, "the token's files were not found");
}

/// Whoever can write to the token's folder can change no attribute: private objects are encrypted
/// as a whole, and a public object that is not what was written under a PIN is gone with the next
/// login.
#[test]
fn a_changed_object_file_is_refused() {
    let token = Token::fresh("edited");
    let (module, session) = (token.module, token.session);
    // One object at a time, so that its file is known.
    let made = |label: &str, private: bool| {
        let before = object_files("edited");
        module.create(session, &token_key(label, &[7; 16]).bool(CKA_PRIVATE, private).bool(CKA_WRAP, false)).unwrap();
        object_files("edited").into_iter().find(|file| !before.contains(file)).unwrap()
    };
    let (public, private, untouched) =
        (made("edited public", false), made("edited private", true), made("untouched", false));
    let swapped = [made("swapped one", false), made("swapped other", false)];
    let found = |label: &str| {
        let (look, label) = (
            child("as_a_process", folder(), &[("ROLE", "sees"), ("TOKEN", "edited"), ("LABEL", label)])
                .output()
                .unwrap(),
            label,
        );
        assert!(look.status.success(), "{label}: {}", String::from_utf8_lossy(&look.stderr));
        let out = String::from_utf8(look.stdout).unwrap();
        ["before", "after"].map(|when| out.contains(&format!("{when} 1\n")))
    };
    // A public object is seen before the login, a private one after.
    assert_eq!((found("edited public"), found("edited private")), ([true, true], [false, true]));

    // Every octet in turn would take long; a stride meets flags, values and the code that
    // authenticates them.
    for (file, label) in [(&public, "edited public"), (&private, "edited private")] {
        let good = std::fs::read(file).unwrap();
        for at in (0..good.len()).step_by(good.len() / 8) {
            let mut forged = good.clone();
            forged[at] ^= 1;
            std::fs::write(file, forged).unwrap();
            assert!(!found(label)[1], "octet {at} of {} of {label} was changed, and the object is used", good.len());
        }
        std::fs::write(file, &good[..good.len() - 1]).unwrap();
        assert!(!found(label)[1], "{label} was cut");
        std::fs::write(file, good).unwrap();
        assert!(found(label)[1], "{label} is whole again");
    }
    // Another object's file under this one's name.
    let other = std::fs::read(&swapped[1]).unwrap();
    std::fs::write(&swapped[0], other).unwrap();
    assert!(!found("swapped one")[1]);
    // Before the login both files show it.
    assert_eq!(found("swapped other"), [false, true]);
    assert!(untouched.exists() && found("untouched") == [true, true], "the other objects are usable");
}

/// A public object too is written by who knows a PIN only: its code is made with the key that the
/// PIN opens.
#[test]
fn nothing_is_written_without_a_login() {
    let token = Token::fresh("no login");
    let (module, session) = (token.module, token.session);
    let object = module.create(session, &token_key("public", &[2; 16]).bool(CKA_PRIVATE, false)).unwrap();
    module.logout(session).unwrap();
    assert_eq!(
        module.create(session, &token_key("new", &[2; 16]).bool(CKA_PRIVATE, false)),
        Err(CKR_USER_NOT_LOGGED_IN)
    );
    assert_eq!(module.set(session, object, &by_label("renamed")), Err(CKR_USER_NOT_LOGGED_IN));
    module.create(session, &Template::aes(&[2; 16]).bool(CKA_PRIVATE, false)).expect("a session object needs none");
}

/// The object files of one token: the other tests' tokens are beside it.
fn object_files(label: &str) -> Vec<PathBuf> {
    let named = label.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    let all = files(folder());
    let record = all.iter().find(|file| {
        file.ends_with("token")
            && std::fs::read_to_string(file).is_ok_and(|text| text.contains(&format!("label = {named}20")))
    });
    let own = record.unwrap().parent().unwrap().to_owned();
    all.into_iter()
        .filter(|file| file.starts_with(&own) && file.extension().is_some_and(|extension| extension == "object"))
        .collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

/// Objects outlive their process, with all attributes, and processes see each other's changes.
#[test]
fn objects_are_shared_with_other_processes() {
    let token = Token::fresh("shared");
    let (module, session) = (token.module, token.session);
    module.create(session, &token_key("from the parent", &[9; 24]).bytes(CKA_ID, [1, 2, 3])).unwrap();
    let doomed = module.create(session, &token_key("doomed", &[8; 16])).unwrap();
    assert!(
        child("as_a_process", folder(), &[("ROLE", "look"), ("TOKEN", "shared")])
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    let made = module.find(session, &by_label("from the child")).unwrap();
    assert_eq!(made.len(), 1);
    assert_eq!(token.value(made[0]), [6; 32]);
    assert_eq!(module.get(session, doomed, CKA_LABEL), Err(CKR_OBJECT_HANDLE_INVALID), "the child destroyed it");
    let renamed = module.find(session, &by_label("renamed by the child")).unwrap();
    assert_eq!(token.value(renamed[0]), [9; 24]);
}

#[test]
fn two_processes_write_at_once() {
    let token = Token::fresh("crowded");
    let (module, session) = (token.module, token.session);
    let mut children: Vec<_> = ["a", "b"]
        .map(|prefix| {
            child(
                "as_a_process",
                folder(),
                &[("ROLE", "write"), ("TOKEN", "crowded"), ("PREFIX", prefix), ("COUNT", "60")],
            )
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
        })
        .into();
    for i in 0..60 {
        module.create(session, &token_key(&format!("p{i}"), &pattern("p", i))).unwrap();
    }
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    for prefix in ["a", "b", "p"] {
        for i in 0..60 {
            let found = module.find(session, &by_label(&format!("{prefix}{i}"))).unwrap();
            assert_eq!(found.len(), 1, "{prefix}{i}");
            assert_eq!(token.value(found[0]), pattern(prefix, i), "{prefix}{i}");
        }
    }
}

/// kill -9 at random moments of creating, changing and destroying: everything acknowledged is there
/// and whole, nothing half-made is.
#[test]
fn kill_loses_nothing() {
    let token = Token::fresh("killed");
    let (module, session) = (token.module, token.session);
    let mut acknowledged: BTreeMap<String, Option<u8>> = BTreeMap::new();
    let mut unspoken = BTreeSet::new();
    for round in 0..ROUNDS {
        let prefix = format!("r{round}-");
        let mut writer =
            child("as_a_process", folder(), &[("ROLE", "churn"), ("TOKEN", "killed"), ("PREFIX", &prefix)])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let random = module.random(session, 4).unwrap();
        let mut apply = |line: &str| -> bool {
            let mut words = line.split(' ').skip_while(|word| !["made", "changed", "destroyed"].contains(word));
            let (Some(verb), Some(label)) = (words.next(), words.next()) else { return false };
            acknowledged.insert(
                label.to_owned(),
                match verb {
                    "made" => Some(0),
                    "changed" => Some(1),
                    _ => None,
                },
            );
            true
        };
        // A random number of acknowledged steps, then a random part of the next step.
        let mut steps = 1 + usize::from(random[0]) % 12;
        while steps > 0 {
            let line = lines.next().expect("the child ended by itself").unwrap();
            steps -= usize::from(apply(&line));
        }
        std::thread::sleep(Duration::from_micros(u64::from(u16::from_le_bytes([random[1], random[2]])) % 3000));
        writer.kill().unwrap();
        writer.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            apply(&line);
        }
        check_churn(module, session, &mut acknowledged, &mut unspoken);
    }
    assert!(acknowledged.len() > ROUNDS, "only {} objects were written", acknowledged.len());
    // And in a process that reads the files anew.
    let mut command = child("as_a_process", folder(), &[("ROLE", "count"), ("TOKEN", "killed")]);
    let output = command.output().unwrap();
    assert!(output.status.success());
    let there = module.find(session, &Template::new()).unwrap().len();
    assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("count {there}\n")), "{there} here");
}

const ROUNDS: usize = 40;

/// `acknowledged`: what the writers said of each label, its state or that it is destroyed. Each
/// writer may have taken one more step than it said, which may be seen late; that step is added,
/// and its writer to `unspoken`.
fn check_churn(
    module: &Module,
    session: Session,
    acknowledged: &mut BTreeMap<String, Option<u8>>,
    unspoken: &mut BTreeSet<String>,
) {
    let mut there = BTreeMap::new();
    for object in module.find(session, &Template::new()).unwrap() {
        let label = String::from_utf8(module.get(session, object, CKA_LABEL).unwrap()).unwrap();
        let (own, number) = label.rsplit_once('-').unwrap();
        assert_eq!(
            module.get(session, object, CKA_VALUE).unwrap(),
            pattern(&format!("{own}-"), number.parse().unwrap()),
            "`{label}` is not whole"
        );
        let id = module.get(session, object, CKA_ID).unwrap();
        assert!(id == vec![0; 300] || id == vec![1; 300], "`{label}` is half changed");
        assert!(there.insert(label, id[0]).is_none(), "one object twice");
    }
    let labels: BTreeSet<String> = there.keys().chain(acknowledged.keys()).cloned().collect();
    for label in labels {
        let (said, is) = (acknowledged.get(&label).copied(), there.get(&label).copied());
        if said.unwrap_or(None) != is {
            let writer = label.split('-').next().unwrap().to_owned();
            let possible = matches!((said, is), (None, Some(0)) | (Some(Some(0)), Some(1)) | (Some(Some(_)), None));
            assert!(possible && unspoken.insert(writer), "`{label}` was said to be {said:?} and is {is:?}");
        }
        acknowledged.insert(label, is);
    }
}

/// 16 bytes that tell the object.
fn pattern(prefix: &str, number: usize) -> [u8; 16] {
    let mut bytes = [0xA0; 16];
    for (place, byte) in bytes.iter_mut().zip(format!("{prefix}{number}").bytes()) {
        *place = byte;
    }
    bytes
}

/// Not a test: what the tests above run as another process.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn as_a_process() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let (module, label) = (hsm_sim(), variable("TOKEN"));
    let slot = module.slot_of(&label).expect("the parent's token");
    let session = module.open_rw(slot).unwrap();
    if variable("ROLE") == "wrong-pin" {
        module.login(session, CKU_USER, "wrong-pin").unwrap_err();
        return;
    }
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
    };
    if variable("ROLE") == "sees" {
        let count = || module.find(session, &by_label(&variable("LABEL"))).unwrap().len();
        let before = count();
        module.login(session, CKU_USER, USER_PIN).unwrap();
        say(format!("before {before}\nafter {}", count()));
        return;
    }
    module.login(session, CKU_USER, USER_PIN).unwrap();
    match variable("ROLE").as_str() {
        "look" => {
            let found = module.find(session, &by_label("from the parent")).unwrap();
            assert_eq!(module.get(session, found[0], CKA_VALUE).unwrap(), [9; 24]);
            assert_eq!(module.get(session, found[0], CKA_ID).unwrap(), [1, 2, 3]);
            assert!(!module.get_bool(session, found[0], CKA_LOCAL).unwrap());
            module.set(session, found[0], &by_label("renamed by the child")).unwrap();
            module.create(session, &token_key("from the child", &[6; 32])).unwrap();
            let doomed = module.find(session, &by_label("doomed")).unwrap();
            module.destroy(session, doomed[0]).unwrap();
        }
        "write" => {
            for i in 0..variable("COUNT").parse().unwrap() {
                module
                    .create(
                        session,
                        &token_key(&format!("{}{i}", variable("PREFIX")), &pattern(&variable("PREFIX"), i)),
                    )
                    .unwrap();
            }
        }
        "churn" => {
            for i in 0..100_000_usize {
                let name = format!("{}{i}", variable("PREFIX"));
                let object = module
                    .create(session, &token_key(&name, &pattern(&variable("PREFIX"), i)).bytes(CKA_ID, [0; 300]))
                    .unwrap();
                say(format!("made {name}"));
                if i % 2 == 0 {
                    module.set(session, object, &Template::new().bytes(CKA_ID, [1; 300])).unwrap();
                    say(format!("changed {name}"));
                }
                if i % 3 == 0 {
                    module.destroy(session, object).unwrap();
                    say(format!("destroyed {name}"));
                }
            }
        }
        "count" => say(format!("count {}", module.find(session, &Template::new()).unwrap().len())),
        other => panic!("unknown role `{other}`"),
    }
}
