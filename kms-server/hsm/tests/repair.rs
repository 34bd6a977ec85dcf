//! Lost sessions, lost logins, wrong PINs and dead HSMs: what fails at once, what recovers by
//! itself, and what is never tried twice.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod common;

use std::future::Future as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Bench, Grantee, SO_PIN, USER_PIN, diversify, island, so_pin, user_pin, write_pin};
use cryptoki::context::Pkcs11;
use cryptoki::session::UserType;
use cryptoki::slot::Slot;
use kms_domain::{KeyLength, KeyType};
use kms_hsm::{
    ErrorKind, Hsm, HsmError, KeySource, Pin, PinMemory, PinSource, ProcessPinMemory, Purpose, Token, TokenKey,
    TokenSettings, TokenState,
};

each_module! {
    async fn lost_sessions_are_opened_again(bench: Bench) {
        let (_, slot) = behind(&bench, "meterkms-test");
        assert_grants(&bench).await;
        for _ in 0..3 {
            close_all_sessions(&bench, slot);
            assert_grants(&bench).await;
        }
    }

    async fn a_lost_login_is_repeated(bench: Bench) {
        let (context, slot) = behind(&bench, "meterkms-test");
        for _ in 0..3 {
            assert_grants(&bench).await;
            // Logging out on any session logs out all of them.
            context.open_rw_session(slot).unwrap().logout().unwrap();
        }
        assert_grants(&bench).await;
    }

    async fn batches_survive_sessions_that_are_dropped_all_the_time(bench: Bench) {
        let (_, slot) = behind(&bench, "meterkms-test");
        let batch = {
            let hash = bench.ceremony.capabilities.oaep_hash().unwrap();
            let transport = bench.hsm.transport_key_spki(kms_hsm::RootVersion::FIRST).await.unwrap();
            bench.hsm.open_batch_key(kms_hsm::RootVersion::FIRST, hash, common::oaep_encrypt(&transport, hash, &[1; 32])).await.unwrap()
        };
        let job = kms_hsm::ImportJob {
            key_type: KeyType::GUEK,
            shape: kms_domain::KeyShape::Aes(KeyLength::Aes128),
            wrapped: common::wrap(&[1; 32], &[2; 16]),
        };
        let mut imported = 0;
        for _ in 0..10 {
            close_all_sessions(&bench, slot);
            // A batch either succeeds as a whole or fails as a whole, and never blames the data.
            match bench.hsm.import_keys(batch.clone(), vec![job.clone(); 50]).await {
                Ok(results) => imported += results.into_iter().filter(Result::is_ok).count(),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Transient, "{error}"),
            }
        }
        assert!(imported >= 450, "{imported}");
    }

    async fn a_wrong_pin_is_tried_exactly_once(bench: Bench) {
        bench.module.init_token("pins", &so_pin(), &user_pin()).unwrap();
        let (context, slot) = behind(&bench, "pins");
        let file = bench.directory.join("pin-2");
        write_pin(&file, "wrong-87654321");
        let memory = Arc::new(Counting::default());
        let settings = settings(&bench, "pins", &file);
        for _restart in 0..3 {
            let token = Token::start(settings.clone(), island(), Arc::clone(&memory) as Arc<dyn PinMemory>).unwrap();
            let error = token.usable(Duration::from_secs(20)).await.unwrap_err();
            assert!(matches!(&error, HsmError::Unusable { .. }) && error.to_string().contains("PIN"), "{error}");
            assert!(!error.to_string().contains("wrong-87654321"), "{error}");
            // The keeper looks again: the state is published anew each time, without an attempt.
            let mut state = token.state();
            for _ in 0..3 {
                state.changed().await.unwrap();
            }
            tokio::task::spawn_blocking(move || token.close()).await.unwrap();
        }
        assert_eq!(memory.refused.load(Ordering::SeqCst), 1, "the token refused a PIN once");
        assert!(!context.get_token_info(slot).unwrap().user_pin_final_try());

        // A changed PIN is tried by itself.
        let token = Token::start(settings, island(), memory).unwrap();
        token.usable(Duration::from_secs(20)).await.unwrap_err();
        write_pin(&file, USER_PIN);
        let mut state = token.state();
        tokio::time::timeout(Duration::from_secs(30), state.wait_for(TokenState::is_usable)).await.unwrap().unwrap();
        tokio::task::spawn_blocking(move || token.close()).await.unwrap();
    }

    async fn a_start_without_the_token_fails_fast_and_recovers(bench: Bench) {
        let file = bench.directory.join("pin");
        let hsm = Hsm::start(island(), settings(&bench, "later", &file), Arc::new(ProcessPinMemory::default())).unwrap();
        let mut state = hsm.token(kms_domain::KeyClass::Kek).unwrap().state();
        state.wait_for(|state| matches!(state, TokenState::Unusable { may_recover: true, .. })).await.unwrap();
        let error = hsm.random(8).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Transient && error.retry_after().is_some() && error.to_string().contains("`later`"), "{error}");
        bench.module.init_token("later", &so_pin(), &user_pin()).unwrap();
        tokio::time::timeout(Duration::from_secs(30), state.wait_for(TokenState::is_usable)).await.unwrap().unwrap();
        hsm.random(8).await.unwrap();
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }

    async fn a_module_that_is_not_there_is_named(bench: Bench) {
        let mut missing = settings(&bench, "meterkms-test", &bench.directory.join("pin"));
        missing.module = "/nonexistent/libpkcs11.so".into();
        let hsm = Hsm::start(island(), missing, Arc::new(ProcessPinMemory::default())).unwrap();
        let error = hsm.usable(Duration::from_secs(10)).await.unwrap_err();
        assert!(matches!(&error, HsmError::Unusable { .. }) && error.to_string().contains("/nonexistent/libpkcs11.so"), "{error}");
    }

    async fn a_full_queue_refuses(bench: Bench) {
        let mut small = settings(&bench, "meterkms-test", &bench.directory.join("pin"));
        small.queue = 1;
        small.workers = Some(1);
        let hsm = Hsm::start(island(), small, Arc::new(ProcessPinMemory::default())).unwrap();
        hsm.usable(Duration::from_secs(30)).await.unwrap();
        // A manifest that waits holds the one worker; the queue has room for one more.
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let mut started = Some(started);
        let (busy, recipient) = (hsm.clone(), Grantee::new().recipient());
        let holding = tokio::spawn(async move {
            let manifest = move |_: &[_]| {
                started.take().map(|started| started.send(()));
                released.recv().unwrap();
                Vec::new()
            };
            busy.envelope(recipient, Vec::new(), |_| Vec::new(), manifest).await
        });
        has_started.await.unwrap();
        let waiting = { let hsm = hsm.clone(); tokio::spawn(async move { hsm.random(8).await }) };
        let mut overloaded = None;
        for _ in 0..1000 {
            // Only refused once the waiting call is in the queue.
            let probe = tokio::time::timeout(Duration::from_millis(20), hsm.random(8)).await;
            if let Ok(Err(error)) = probe {
                overloaded = Some(error);
                break;
            }
        }
        let error = overloaded.expect("the queue is full");
        assert!(matches!(error, HsmError::Overloaded { limit: 1, .. }) && error.kind() == ErrorKind::Transient, "{error}");
        release.send(()).unwrap();
        holding.await.unwrap().unwrap();
        waiting.await.unwrap().ok();
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }

    async fn one_that_floods_waits_for_itself(bench: Bench) {
        let mut one_worker = settings(&bench, "meterkms-test", &bench.directory.join("pin"));
        (one_worker.workers, one_worker.queue_of_one) = (Some(1), 20);
        let hsm = Hsm::start(island(), one_worker, Arc::new(ProcessPinMemory::default())).unwrap();
        hsm.usable(Duration::from_secs(30)).await.unwrap();
        // A manifest that waits holds the one worker, while others queue; manifests note the order
        // in which they are served.
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let mut started = Some(started);
        let served: Arc<std::sync::Mutex<Vec<&'static str>>> = Arc::default();
        let (busy, recipient) = (hsm.clone(), Grantee::new().recipient());
        let holding = tokio::spawn(async move {
            let manifest = move |_: &[_]| {
                started.take().map(|started| started.send(()));
                released.recv().unwrap();
                Vec::new()
            };
            busy.envelope(recipient, Vec::new(), |_| Vec::new(), manifest).await
        });
        has_started.await.unwrap();
        let flood = hsm.paid_by("flood");
        let queued = |hsm: &Hsm, name: &'static str, keys: usize| {
            let (hsm, served, recipient) = (hsm.clone(), Arc::clone(&served), Grantee::new().recipient());
            let (told, is_queued) = tokio::sync::oneshot::channel();
            let call = tokio::spawn(async move {
                let manifest = move |_: &[_]| {
                    served.lock().unwrap().push(name);
                    Vec::new()
                };
                let mut call = Box::pin(hsm.envelope(recipient, vec![KeySource::Fresh(KeyLength::Aes128); keys], |_| Vec::new(), manifest));
                let first = std::future::poll_fn(|context| std::task::Poll::Ready(call.as_mut().poll(context))).await;
                told.send(()).unwrap();
                match first {
                    std::task::Poll::Ready(outcome) => outcome,
                    std::task::Poll::Pending => call.await,
                }
            });
            (call, is_queued)
        };
        let mut calls = Vec::new();
        for _ in 0..20 {
            let (call, is_queued) = queued(&flood, "flood", 40);
            is_queued.await.unwrap();
            calls.push(call);
        }
        let (call, is_queued) = queued(&flood, "refused", 1);
        is_queued.await.unwrap();
        let refused = call.await.unwrap().unwrap_err();
        assert!(matches!(refused, HsmError::TooManyOfOne { limit: 20, .. }) && refused.to_string().contains("hsm_jobs_per_principal"), "{refused}");
        for name in ["neighbour", "server"] {
            let (call, is_queued) = queued(&if name == "server" { hsm.clone() } else { hsm.paid_by(name) }, name, 1);
            is_queued.await.unwrap();
            calls.push(call);
        }
        release.send(()).unwrap();
        holding.await.unwrap().unwrap();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        let served = served.lock().unwrap().clone();
        assert_eq!(served[..3], ["neighbour", "server", "flood"], "who came last with little is first");
        assert_eq!(served.len(), 22);
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }

    async fn a_panicking_manifest_does_not_stop_the_worker(bench: Bench) {
        let result = bench.hsm.envelope(Grantee::new().recipient(), Vec::new(), |_| Vec::new(), |_| panic!("a defect above")).await;
        assert!(matches!(result, Err(HsmError::Unavailable { .. })), "{result:?}");
        assert_grants(&bench).await;
    }
}

hsm_sim_only! {
    "SoftHSM2 never locks a PIN",
    async fn the_last_try_of_a_pin_is_never_used(bench: Bench) {
        bench.module.init_token("pins", &so_pin(), &user_pin()).unwrap();
        let (context, slot) = behind(&bench, "pins");
        let session = context.open_rw_session(slot).unwrap();
        for _ in 0..20 {
            if context.get_token_info(slot).unwrap().user_pin_final_try() {
                break;
            }
            session.login(UserType::User, Some(&"wrong-87654321".to_owned().into())).unwrap_err();
        }
        assert!(context.get_token_info(slot).unwrap().user_pin_final_try());
        let file = bench.directory.join("pin-2");
        write_pin(&file, USER_PIN);
        let token = Token::start(settings(&bench, "pins", &file), island(), Arc::new(ProcessPinMemory::default())).unwrap();
        let error = token.usable(Duration::from_secs(20)).await.unwrap_err();
        assert!(error.to_string().contains("FINAL_TRY"), "{error}");
        assert!(context.get_token_info(slot).unwrap().user_pin_final_try() && !context.get_token_info(slot).unwrap().user_pin_locked());
        tokio::task::spawn_blocking(move || token.close()).await.unwrap();
    }

    "no other module can be told to lose its token",
    async fn a_token_that_is_removed_and_put_back_recovers(bench: Bench) {
        assert_grants(&bench).await;
        let mut state = bench.hsm.token(kms_domain::KeyClass::Kek).unwrap().state();
        control(&bench, "remove-token meterkms-test id=1");
        tokio::time::timeout(Duration::from_secs(30), state.wait_for(|state| !state.is_usable())).await.unwrap().unwrap();
        let error = bench.hsm.random(8).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Transient && error.retry_after().is_some(), "{error}");
        control(&bench, "insert-token meterkms-test id=2");
        tokio::time::timeout(Duration::from_secs(60), state.wait_for(TokenState::is_usable)).await.unwrap().unwrap();
        assert_grants(&bench).await;
    }

    "no other module can be told to fail",
    async fn a_failing_hsm_is_never_blamed_on_the_data(bench: Bench) {
        let stored = bench.hsm.generate_stored(KeyType::GUEK, KeyLength::Aes128).await.unwrap();
        let source = kms_hsm::KeySource::Stored {
            key_type: KeyType::GUEK,
            storage_kek_version: stored.storage_kek_version,
            shape: kms_domain::KeyShape::Aes(KeyLength::Aes128),
            blob: stored.blob.clone(),
        };
        // Once, at each of the calls that an unwrapping can make: the job is repeated, or the
        // unwrapping is.
        let mut failed = 0;
        for nth in 1..=10 {
            control(&bench, &format!("fail C_UnwrapKey nth={nth} count=1 CKR_DEVICE_ERROR"));
            for _ in 0..10 {
                match bench.hsm.rewrap_stored(source.clone()).await {
                    Ok(again) => assert_eq!(again, stored),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Transient, "{error}");
                        failed += 1;
                    }
                }
            }
        }
        assert!(failed <= 10, "{failed}");
        // Always: the error says that the HSM fails.
        control(&bench, "fail C_UnwrapKey CKR_GENERAL_ERROR");
        let error = loop {
            if let Err(error) = bench.hsm.rewrap_stored(source.clone()).await {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::Transient, "{error}");
        control(&bench, "");
        while bench.hsm.rewrap_stored(source.clone()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }
}

async fn assert_grants(bench: &Bench) {
    let grantee = Grantee::new();
    let source = bench.diversified(7, KeyType::GUEK, KeyLength::Aes128);
    let envelope = bench.grant(&grantee, vec![source.clone()]).await;
    let root = bench.root(TokenKey::first(Purpose::Diversification(source.class())));
    assert_eq!(grantee.keys(&envelope, 24), [diversify(&root, &source)]);
}

/// The same module from behind the server's back, as an operator's tool in the same process would
/// have it.
fn behind(bench: &Bench, label: &str) -> (Pkcs11, Slot) {
    let context = Pkcs11::new(bench.module.path()).unwrap();
    let slot = context
        .get_slots_with_initialized_token()
        .unwrap()
        .into_iter()
        .find(|slot| context.get_token_info(*slot).unwrap().label() == label)
        .unwrap();
    (context, slot)
}

/// What a token that is reset does: every session of the process is gone, and with them the login.
#[expect(unsafe_code, reason = "the cryptoki crate has no C_CloseAllSessions")]
fn close_all_sessions(bench: &Bench, slot: Slot) {
    let mut list = std::ptr::null_mut();
    // SAFETY: the module is loaded already and stays loaded; C_GetFunctionList gives a list that
    // lives as long as the module.
    let code = unsafe {
        assert_eq!(
            cryptoki_sys::Pkcs11::new(bench.module.path()).unwrap().C_GetFunctionList(&mut list),
            cryptoki_sys::CKR_OK
        );
        (*list).C_CloseAllSessions.unwrap()(slot.id())
    };
    assert_eq!(code, cryptoki_sys::CKR_OK);
}

/// Tells hsm-sim what to do from now on.
fn control(bench: &Bench, line: &str) {
    let (new, file) = (bench.directory.join("control.new"), bench.directory.join("control"));
    std::fs::write(&new, format!("{line}\n")).unwrap();
    std::fs::rename(new, file).unwrap();
}

fn settings(bench: &Bench, label: &str, pin: &std::path::Path) -> TokenSettings {
    let mut settings =
        TokenSettings::new(bench.module.path().to_owned(), label.to_owned(), PinSource::File(pin.to_owned()));
    settings.allow_cbc_expand = true;
    assert_ne!(SO_PIN, USER_PIN);
    settings
}

/// A memory that counts what it is told.
#[derive(Default)]
struct Counting {
    memory: ProcessPinMemory,
    refused: AtomicUsize,
}

impl PinMemory for Counting {
    fn was_refused(&self, token_serial: &str, pin: &Pin) -> bool {
        self.memory.was_refused(token_serial, pin)
    }

    fn remember_refused(&self, token_serial: &str, pin: &Pin) {
        self.refused.fetch_add(1, Ordering::SeqCst);
        self.memory.remember_refused(token_serial, pin);
    }
}
