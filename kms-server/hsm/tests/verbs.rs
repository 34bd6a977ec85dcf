//! Every verb on every module, checked by an independent implementation with the roots that the
//! escrow key opens.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod common;

use std::collections::{HashSet, VecDeque};
use std::future::Future as _;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::{hmac, signature};
use common::{Bench, Grantee, diversify, oaep_encrypt, unwrap, wrap};
use kms_domain::{KeyClass, KeyLength, KeyShape, KeyType};
use kms_hsm::{
    ErrorKind, FrameInput, FrameKeys, FrameParameters, Hsm, HsmError, ImportJob, ImportRefusal, KeySource,
    ProcessPinMemory, ProtectedFrame, Purpose, RootVersion, StoredKey, TokenKey,
};

each_module! {
    async fn diversified_keys_open_from_an_envelope(bench: Bench) {
        let grantee = Grantee::new();
        for (length, octets) in [(KeyLength::Aes128, 24), (KeyLength::Aes256, 40)] {
            let types = [KeyType::GUEK, KeyType::GAK, KeyType::KEK, KeyType::FIRMWARE];
            let keys: Vec<KeySource> = types.into_iter().map(|key_type| bench.diversified(0x4B41_4D00_0000_0001, key_type, length)).collect();
            let envelope = bench.grant(&grantee, keys.clone()).await;
            let opened = grantee.keys(&envelope, octets);
            for (source, key) in keys.iter().zip(opened) {
                let root = bench.root(TokenKey::first(Purpose::Diversification(source.class())));
                assert_eq!(key, diversify(&root, source), "{source:?}");
            }
        }
    }

    async fn a_class_without_a_token_is_not_served(bench: Bench) {
        let token = bench.hsm.token(KeyClass::Session).unwrap().clone();
        let tokens = [KeyClass::Session, KeyClass::Authentication].map(|class| (class, token.clone()));
        let grants = Hsm::of_tokens(bench.hsm.island().clone(), token.clone(), tokens.into());
        assert!(grants.serves(KeyClass::Session) && !grants.serves(KeyClass::Ca));
        grants.generate_stored(KeyType::GUEK, KeyLength::Aes128).await.unwrap();
        let refused = [
            grants.sign_ecdsa(TokenKey::first(Purpose::Ca), [0; 32]).await.err(),
            grants.transport_key_spki(RootVersion::FIRST).await.err(),
            grants.generate_stored(KeyType::KEK, KeyLength::Aes128).await.err(),
        ];
        // The roots are in the token; the configuration decides.
        assert!(refused.iter().all(|error| error.as_ref().unwrap().kind() == ErrorKind::NotServed), "{refused:?}");
        assert!(token.serial().is_some_and(|serial| !serial.is_empty()));
        assert!(token.capabilities().unwrap().table().iter().filter(|row| row.is_essential()).all(|row| row.found));
    }

    async fn an_agreement_is_reused_and_bound_to_its_grantee(bench: Bench) {
        let (one, other) = (Grantee::new(), Grantee::new());
        let key = || vec![bench.diversified(7, KeyType::GUEK, KeyLength::Aes128)];
        let first = bench.grant(&one, key()).await;
        let again = bench.grant(&one, key()).await;
        let of_other = bench.grant(&other, key()).await;
        assert_eq!(one.keys(&first, 24), one.keys(&again, 24));
        assert_eq!(one.keys(&first, 24), other.keys(&of_other, 24));
        assert_ne!(first.agreement.ephemeral_public, of_other.agreement.ephemeral_public);
        assert_ne!(first.manifest, of_other.manifest);
    }

    async fn fresh_keys_are_fresh(bench: Bench) {
        let grantee = Grantee::new();
        let keys = vec![KeySource::Fresh(KeyLength::Aes128), KeySource::Fresh(KeyLength::Aes128)];
        let opened = grantee.keys(&bench.grant(&grantee, keys).await, 24);
        assert!(opened[0] != opened[1] && opened.iter().all(|key| key.len() == 16 && *key != [0; 16]));
    }

    async fn imported_keys_are_stored_and_granted(bench: Bench) {
        let batch_value = [0x5A; 32];
        let batch = open_batch(&bench, &batch_value).await;
        let (key, secret, suite_2) = ([0x11; 16], b"\x08password\0\0\0\0\0\0\0".as_slice(), [0x22; 32]);
        let jobs = vec![
            ImportJob { key_type: KeyType::GUEK, shape: KeyShape::Aes(KeyLength::Aes128), wrapped: wrap(&batch_value, &key) },
            ImportJob { key_type: KeyType::HLS_SECRET, shape: KeyShape::Secret, wrapped: wrap(&batch_value, secret) },
            ImportJob { key_type: KeyType::KEK, shape: KeyShape::Aes(KeyLength::Aes256), wrapped: wrap(&batch_value, &suite_2) },
            // Wrapped under another key; cut short; the first value again.
            ImportJob { key_type: KeyType::GAK, shape: KeyShape::Aes(KeyLength::Aes128), wrapped: wrap(&[9; 32], &key) },
            ImportJob { key_type: KeyType::GAK, shape: KeyShape::Aes(KeyLength::Aes128), wrapped: wrap(&batch_value, &key)[..16].to_vec() },
            ImportJob { key_type: KeyType::GAK, shape: KeyShape::Aes(KeyLength::Aes128), wrapped: wrap(&batch_value, &key) },
        ];
        let results = bench.hsm.import_keys(batch, jobs.clone()).await.unwrap();
        assert!(matches!(results[3], Err(ImportRefusal::WrappedKeyInvalid)), "{:?}", results[3]);
        assert!(matches!(results[4], Err(ImportRefusal::Length(_))), "{:?}", results[4]);

        let fingerprint_kek = bench.root(TokenKey::first(Purpose::FingerprintKek));
        let values: [(usize, &[u8]); 4] = [(0, &key), (1, secret), (2, &suite_2), (5, &key)];
        for (index, value) in values {
            let stored = results[index].as_ref().unwrap();
            let kek = bench.root(TokenKey::first(Purpose::StorageKek(jobs[index].key_type.class())));
            assert_eq!(unwrap(&kek, &stored.blob), value);
            assert_eq!(stored.fingerprint_wrap, wrap(&fingerprint_kek, value));
            let grantee = Grantee::new();
            let envelope = bench.grant(&grantee, vec![stored_source(stored, &jobs[index])]).await;
            assert_eq!(grantee.keys(&envelope, value.len() + 8), [value]);
        }
        assert_eq!(results[0].as_ref().unwrap().fingerprint_wrap, results[5].as_ref().unwrap().fingerprint_wrap);
    }

    async fn a_damaged_blob_fails_alone(bench: Bench) {
        let stored = bench.hsm.generate_stored(KeyType::GUEK, KeyLength::Aes128).await.unwrap();
        let good = generated_source(KeyType::GUEK, &stored);
        let mut damaged = stored.clone();
        damaged.blob[3] ^= 1;
        let grantee = Grantee::new();
        let (report, reported) = std::sync::mpsc::channel();
        let manifest = move |keys: &[Result<kms_hsm::WrappedKey, HsmError>]| {
            report.send(keys.iter().map(|key| key.as_ref().err().map(HsmError::kind)).collect::<Vec<_>>()).unwrap();
            common::concatenated(keys)
        };
        let keys = vec![good.clone(), generated_source(KeyType::GUEK, &damaged), good];
        let envelope = bench.hsm.envelope(grantee.recipient(), keys, |_| Vec::new(), manifest).await.unwrap();
        assert_eq!(reported.recv().unwrap(), [None, Some(kms_hsm::ErrorKind::DataRefused), None]);
        let opened = grantee.keys(&envelope, 24);
        assert_eq!(opened[0], opened[1]);
        assert_eq!(opened[0], unwrap(&bench.root(TokenKey::first(Purpose::StorageKek(KeyClass::Session))), &stored.blob));
    }

    async fn a_batch_key_for_another_transport_key_is_refused(bench: Bench) {
        let hash = bench.ceremony.capabilities.oaep_hash().unwrap();
        let ciphertext = oaep_encrypt(&bench.escrow.spki(), hash, &[1; 32]);
        let error = bench.hsm.open_batch_key(RootVersion::FIRST, hash, ciphertext).await.err().unwrap();
        assert!(matches!(error, HsmError::WrappedKeyInvalid { .. }), "{error}");
    }

    async fn frames_are_those_of_the_green_book(bench: Bench) {
        let keys = dlms_keys(&bench).await;
        let nonce = octets("4D4D4D0000BC614E01234567").try_into().unwrap();
        let plaintext = octets("C0010000080000010000FF0200");

        let both = FrameParameters::new(0x30, nonce).unwrap();
        let frame = bench.hsm.protect(keys.clone(), FrameInput { parameters: both, plaintext: plaintext.clone() }).await.unwrap();
        assert_eq!([frame.text.clone(), frame.tag.to_vec()].concat(), octets("411312FF935A47566827C467BC7D825C3BE4A77C3FCC056B6B"));
        assert_eq!(bench.hsm.unprotect(keys.clone(), frame.clone()).await.unwrap(), plaintext);

        let authenticated = FrameParameters::new(0x10, nonce).unwrap();
        let plain = bench.hsm.protect(keys.clone(), FrameInput { parameters: authenticated, plaintext: plaintext.clone() }).await.unwrap();
        assert_eq!((plain.text.clone(), plain.tag.to_vec()), (plaintext.clone(), octets("06725D910F9221D263877516")));
        assert_eq!(bench.hsm.unprotect(keys.clone(), plain.clone()).await.unwrap(), plaintext);

        let mut altered = vec![];
        for good in [frame, plain] {
            altered.push((keys.clone(), ProtectedFrame { tag: [0; 12], ..good.clone() }));
            let mut text = good.text.clone();
            text[4] ^= 0x80;
            altered.push((keys.clone(), ProtectedFrame { text, ..good }));
        }
        for result in bench.hsm.unprotect_batch(altered).await.unwrap() {
            assert!(matches!(result, Err(HsmError::TagInvalid)), "{result:?}");
        }
        assert!(FrameParameters::new(0x20, nonce).is_err(), "encryption without authentication");
    }

    async fn only_a_gak_is_ever_read(bench: Bench) {
        let nonce = [0; 12];
        for other in [KeyType::GUEK, KeyType::KEK, KeyType::DEDICATED, KeyType::HLS_SECRET] {
            let keys = FrameKeys { encryption: bench.diversified(7, KeyType::GUEK, KeyLength::Aes128), authentication: bench.diversified(7, other, KeyLength::Aes128) };
            let frame = FrameInput { parameters: FrameParameters::new(0x30, nonce).unwrap(), plaintext: vec![0; 8] };
            let error = bench.hsm.protect(keys, frame).await.unwrap_err();
            assert!(matches!(error, HsmError::InvalidInput { .. }), "{other}: {error}");
        }
    }

    async fn a_stored_key_can_be_rewrapped(bench: Bench) {
        let stored = bench.hsm.generate_stored(KeyType::GAK, KeyLength::Aes128).await.unwrap();
        let again = bench.hsm.rewrap_stored(generated_source(KeyType::GAK, &stored)).await.unwrap();
        assert_eq!(stored, again);
    }

    async fn signatures_verify_and_macs_are_hmac(bench: Bench) {
        for purpose in [Purpose::AuditSign, Purpose::Ca] {
            let key = TokenKey::first(purpose);
            let public = bench.hsm.public_key(key).await.unwrap();
            let value: [u8; 32] = digest(&SHA256, b"checkpoint").as_ref().try_into().unwrap();
            let made = bench.hsm.sign_ecdsa(key, value).await.unwrap();
            signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, public).verify(b"checkpoint", &made).unwrap();
        }
        assert!(bench.hsm.sign_ecdsa(TokenKey::first(Purpose::Seal), [0; 32]).await.is_err());

        let root = hmac::Key::new(hmac::HMAC_SHA256, &bench.root(TokenKey::first(Purpose::Seal)));
        let mac = bench.hsm.mac(RootVersion::FIRST, b"meterkms/seal-key\x01north".to_vec()).await.unwrap();
        assert_eq!(mac.as_slice(), hmac::sign(&root, b"meterkms/seal-key\x01north").as_ref());

        let (one, other) = (bench.hsm.random(32).await.unwrap(), bench.hsm.random(32).await.unwrap());
        assert!(one.len() == 32 && one != other);
    }

    async fn a_missing_root_version_is_named(bench: Bench) {
        let KeySource::Diversified { derivation, context, .. } = bench.diversified(7, KeyType::GUEK, KeyLength::Aes128) else { panic!() };
        let source = KeySource::Diversified { root_version: RootVersion::new(9).unwrap(), derivation, context };
        let error = bench.hsm.rewrap_stored(source).await.unwrap_err();
        assert!(error.to_string().contains("meterkms/north/session/diversification/9"), "{error}");
    }

    /// I1: no secret object is readable or usable beyond its purpose.
    async fn no_secret_object_is_readable_or_usable_beyond_its_purpose(bench: Bench) {
        // Live agreements and batch keys are looked at too.
        let grantee = Grantee::new();
        bench.grant(&grantee, vec![bench.diversified(7, KeyType::GUEK, KeyLength::Aes128)]).await;
        let batch = open_batch(&bench, &[3; 32]).await;
        let capabilities = &bench.ceremony.capabilities;
        let mut secrets = 0;
        for (token, objects) in bench.hsm.inventory().await.unwrap() {
            for object in objects.iter().filter(|object| object.is_secret()) {
                secrets += 1;
                assert_eq!(object.findings(bench.hsm.island(), capabilities), Vec::<String>::new(), "{token}: {object:?}");
            }
        }
        // Six roots of classes, seal, fingerprint KEK, audit, CA, vendor transport; two keys of the
        // agreement, one batch key.
        assert_eq!(secrets, 14);
        drop(batch);
    }

    /// Calls are asked for, and not waited for, until the queue is full. The rest of them is
    /// dropped while it waits.
    async fn a_full_queue_refuses_and_dropped_calls_leave_it(bench: Bench) {
        let mut settings = bench.settings();
        settings.workers = Some(1);
        settings.queue = QUEUE;
        let hsm = Hsm::start(bench.hsm.island().clone(), settings, Arc::new(ProcessPinMemory::default())).unwrap();
        hsm.usable(Duration::from_secs(60)).await.unwrap();
        let mut waiting = VecDeque::new();
        let mut refused = None;
        // A worker takes microseconds for a call, and this thread less to ask for one.
        for _ in 0..1_000_000 {
            let mut call = Box::pin(hsm.random(16));
            match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => waiting.push_back(call),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let refused = refused.expect("the queue fills up");
        assert!(matches!(refused, HsmError::Overloaded { limit: QUEUE, .. }), "{refused}");
        assert!(refused.to_string().contains("hsm_jobs") && waiting.len() >= QUEUE, "{refused}");
        // What was taken before is done in spite of the refusal, whoever gave up in between.
        let kept = waiting.pop_front().unwrap();
        let last = waiting.pop_back().unwrap();
        drop(waiting);
        let mut seen = HashSet::from([kept.await.unwrap().to_vec(), last.await.unwrap().to_vec()]);
        for _ in 0..2 * QUEUE {
            seen.insert(hsm.random(16).await.unwrap().to_vec());
        }
        assert_eq!(seen.len(), 2 * QUEUE + 2, "no call gets the answer to another one");
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }
}

async fn open_batch(bench: &Bench, value: &[u8]) -> kms_hsm::BatchKey {
    let hash = bench.ceremony.capabilities.oaep_hash().unwrap();
    let transport = bench.hsm.transport_key_spki(RootVersion::FIRST).await.unwrap();
    bench.hsm.open_batch_key(RootVersion::FIRST, hash, oaep_encrypt(&transport, hash, value)).await.unwrap()
}

/// EK 00..0F and AK D0..DF, imported.
async fn dlms_keys(bench: &Bench) -> FrameKeys {
    let batch = open_batch(bench, &[7; 32]).await;
    let job = |key_type, value: &str| ImportJob {
        key_type,
        shape: KeyShape::Aes(KeyLength::Aes128),
        wrapped: wrap(&[7; 32], &octets(value)),
    };
    let jobs = vec![
        job(KeyType::GUEK, "000102030405060708090A0B0C0D0E0F"),
        job(KeyType::GAK, "D0D1D2D3D4D5D6D7D8D9DADBDCDDDEDF"),
    ];
    let results = bench.hsm.import_keys(batch, jobs.clone()).await.unwrap();
    FrameKeys {
        encryption: stored_source(results[0].as_ref().unwrap(), &jobs[0]),
        authentication: stored_source(results[1].as_ref().unwrap(), &jobs[1]),
    }
}

fn stored_source(stored: &StoredKey, job: &ImportJob) -> KeySource {
    KeySource::Stored {
        key_type: job.key_type,
        storage_kek_version: stored.storage_kek_version,
        shape: job.shape,
        blob: stored.blob.clone(),
    }
}

fn generated_source(key_type: KeyType, stored: &StoredKey) -> KeySource {
    KeySource::Stored {
        key_type,
        storage_kek_version: stored.storage_kek_version,
        shape: KeyShape::Aes(KeyLength::Aes128),
        blob: stored.blob.clone(),
    }
}

fn octets(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

/// The shortest queue that still holds calls of both kinds: kept and dropped.
const QUEUE: usize = 8;
