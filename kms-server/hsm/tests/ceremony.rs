//! The ceremony: roots leave once, are locked, and an interrupted ceremony is finished or refused.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::{Bench, Escrow, Grantee, diversify, island, plan, so_pin, user_pin};
use kms_domain::{KeyClass, KeyLength, KeyShape, KeyType};
use kms_hsm::{
    CeremonyPlan, CeremonyResult, EscrowPackage, Hsm, HsmError, KeySource, NewRoot, PinSource, ProcessPinMemory,
    Purpose, RootVersion, StandbyToken, StoredKey, TokenKey, TokenSelector, TokenSettings, create_root_version,
    create_roots, create_standby_transport, install_wrapped_roots,
};

each_module! {
    async fn roots_are_32_octets_different_and_locked(bench: Bench) {
        let roots = bench.escrow.open(&bench.ceremony.package.escrow);
        assert_eq!(roots.len(), 8);
        let mut values: Vec<_> = roots.values().collect();
        values.sort();
        values.dedup();
        assert!(values.len() == 8 && values.iter().all(|value| value.len() == 32));
        let inventory = bench.hsm.inventory().await.unwrap();
        for key in roots.keys() {
            let label = key.label(&island());
            let object = inventory[0].1.iter().find(|object| object.label == label).unwrap();
            assert_eq!((object.flag("EXTRACTABLE"), object.flag("SENSITIVE"), object.value_readable), (Some(false), Some(true), false), "{label}");
            assert!(bench.ceremony.fingerprints.iter().any(|printed| printed.label == label));
        }
    }

    async fn a_finished_ceremony_can_be_run_again_with_its_package(bench: Bench) {
        let escrow = token(&bench, "again");
        let first = run(&bench, "again", &plan(&escrow), None, |_| Ok(())).unwrap();
        let again = run(&bench, "again", &plan(&escrow), Some(&first.package), |_| Ok(())).unwrap();
        assert_eq!(escrow.open(&first.package.escrow), escrow.open(&again.package.escrow));
        let mut fingerprints = (first.fingerprints, again.fingerprints);
        fingerprints.0.sort_by(|a, b| a.label.cmp(&b.label));
        fingerprints.1.sort_by(|a, b| a.label.cmp(&b.label));
        assert_eq!(fingerprints.0, fingerprints.1);

        let error = run(&bench, "again", &plan(&escrow), None, |_| Ok(())).unwrap_err();
        assert!(matches!(&error, HsmError::Ceremony { .. }) && error.to_string().contains("never be escrowed"), "{error}");
        let error = run(&bench, "again", &plan(&Escrow::new()), Some(&first.package), |_| Ok(())).unwrap_err();
        assert!(matches!(&error, HsmError::Ceremony { .. }), "{error}");
    }

    async fn nothing_is_locked_before_the_package_is_stored(bench: Bench) {
        let escrow = token(&bench, "crash");
        let mut begun: Option<HashMap<TokenKey, Vec<u8>>> = None;
        let error = run(&bench, "crash", &plan(&escrow), None, |package| {
            begun = Some(escrow.open(&package.escrow));
            Err("the disk is full".to_owned())
        })
        .unwrap_err();
        assert!(error.to_string().contains("the disk is full"), "{error}");
        let finished = run(&bench, "crash", &plan(&escrow), None, |_| Ok(())).unwrap();
        assert_eq!(begun.unwrap(), escrow.open(&finished.package.escrow), "the roots that were begun are the ones that are finished");
    }

    async fn a_standby_token_derives_the_same_keys(bench: Bench) {
        let escrow = token(&bench, "primary");
        token(&bench, "standby");
        let standby = create_standby_transport(&bench.module, &selector("standby"), &user_pin(), &island()).unwrap();
        assert_eq!(standby, create_standby_transport(&bench.module, &selector("standby"), &user_pin(), &island()).unwrap());
        let mut plan = plan(&escrow);
        plan.standby = vec![StandbyToken { public_key: standby, classes: KeyClass::WITH_ROOTS.to_vec() }];
        let ceremony = run(&bench, "primary", &plan, None, |_| Ok(())).unwrap();
        let copies = &ceremony.package.standby[0];
        let installed = install_wrapped_roots(&bench.module, &selector("standby"), &user_pin(), &island(), copies).unwrap();
        assert_eq!(installed.len(), 8);
        assert_eq!(installed, install_wrapped_roots(&bench.module, &selector("standby"), &user_pin(), &island(), copies).unwrap());
        assert!(install_wrapped_roots(&bench.module, &selector("standby"), &user_pin(), &island(), &ceremony.package.escrow).is_err());

        let mut settings = TokenSettings::new(bench.module.path().to_owned(), "standby".to_owned(), PinSource::File(bench.directory.join("pin")));
        settings.allow_cbc_expand = true;
        let hsm = Hsm::start(island(), settings, Arc::new(ProcessPinMemory::default())).unwrap();
        let capabilities = hsm.usable(Duration::from_secs(30)).await.unwrap();
        let grantee = Grantee::new();
        let source = bench.diversified(7, KeyType::KEK, KeyLength::Aes256);
        let envelope = hsm.envelope(grantee.recipient(), vec![source.clone()], |_| Vec::new(), common::concatenated).await.unwrap();
        let root = &escrow.open(&ceremony.package.escrow)[&TokenKey::first(Purpose::Diversification(KeyClass::Kek))];
        assert_eq!(grantee.keys(&envelope, 40), [diversify(root, &source)]);
        for object in &hsm.inventory().await.unwrap()[0].1 {
            assert_eq!(object.findings(&island(), &capabilities), Vec::<String>::new(), "{object:?}");
        }
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }

    /// I1: a token of a grant server never gets a KEK's root, not even wrapped; and an interrupted
    /// ceremony goes on with such copies.
    async fn copies_are_of_the_classes_of_their_token(bench: Bench) {
        let escrow = token(&bench, "all");
        token(&bench, "grant");
        let public_key = create_standby_transport(&bench.module, &selector("grant"), &user_pin(), &island()).unwrap();
        let mut plan = plan(&escrow);
        plan.standby = vec![StandbyToken { public_key, classes: vec![KeyClass::Session] }];
        let first = run(&bench, "all", &plan, None, |_| Ok(())).unwrap();
        let purposes: Vec<_> = first.package.standby[0].roots.iter().map(|root| root.key.purpose).collect();
        assert_eq!(purposes, [Purpose::Diversification(KeyClass::Session), Purpose::StorageKek(KeyClass::Session), Purpose::Seal, Purpose::FingerprintKek]);
        let again = run(&bench, "all", &plan, Some(&first.package), |_| Ok(())).unwrap();
        assert_eq!(again.package, first.package);
        // A later version leaves once too, so it is said of each standby token whether it gets a
        // copy.
        let key = TokenKey { purpose: Purpose::StorageKek(KeyClass::Session), version: RootVersion::new(2).unwrap() };
        let forgotten = NewRoot { island: island(), key, escrow_public_key: plan.escrow_public_key.clone(), standby: Vec::new(), without: Vec::new() };
        let make = |new: &NewRoot| create_root_version(&bench.module, &selector("all"), &user_pin(), new, None, |_| Ok(()));
        assert!(make(&forgotten).unwrap_err().to_string().contains("`--copy 1`"));
        assert_eq!(make(&NewRoot { without: vec![0], ..forgotten.clone() }).unwrap().package.unwrap().standby, []);
        let third = TokenKey { version: RootVersion::new(3).unwrap(), ..key };
        assert_eq!(make(&NewRoot { key: third, standby: vec![0], ..forgotten }).unwrap().package.unwrap().standby.len(), 1);
    }

    async fn another_version_of_a_root_is_escrowed_once_and_locked(bench: Bench) {
        let escrow = token(&bench, "later");
        let plan = plan(&escrow);
        let ceremony = run(&bench, "later", &plan, None, |_| Ok(())).unwrap();
        for purpose in [Purpose::StorageKek(KeyClass::Session), Purpose::Diversification(KeyClass::Kek), Purpose::Seal] {
            let key = TokenKey { purpose, version: RootVersion::new(2).unwrap() };
            let new = NewRoot { island: island(), key, escrow_public_key: plan.escrow_public_key.clone(), standby: Vec::new(), without: Vec::new() };
            let make = |new: &NewRoot, previous: Option<&EscrowPackage>, stored: Result<(), String>| {
                create_root_version(&bench.module, &selector("later"), &user_pin(), new, previous, |_| stored)
            };
            // Interrupted before the package is stored: the same root goes on. After it was locked:
            // only with the package.
            assert!(make(&new, None, Err("the disk is full".to_owned())).unwrap_err().to_string().contains("not locked"));
            let made = make(&new, None, Ok(())).unwrap();
            let package = made.package.unwrap();
            assert!(make(&new, None, Ok(())).unwrap_err().to_string().contains("never be escrowed"));
            assert_eq!(make(&new, Some(&package), Ok(())).unwrap().package.unwrap(), package);
            assert_eq!(made.derivation.is_some(), matches!(purpose, Purpose::Diversification(_)));
            let (first, second) = (escrow.open(&ceremony.package.escrow), escrow.open(&package.escrow));
            assert_eq!(second.len(), 1);
            assert_ne!(first[&TokenKey::first(purpose)], second[&key]);
            // A root leaves for the ceremony's custodians and for nobody else.
            let foreign = NewRoot { escrow_public_key: crate::plan(&Escrow::new()).escrow_public_key, ..new };
            assert!(make(&foreign, Some(&package), Ok(())).unwrap_err().to_string().contains("escrow file"));
        }
        let new = TokenKey { purpose: Purpose::VendorTransport, version: RootVersion::new(2).unwrap() };
        let new = NewRoot { island: island(), key: new, escrow_public_key: plan.escrow_public_key, standby: Vec::new(), without: Vec::new() };
        let pair = create_root_version(&bench.module, &selector("later"), &user_pin(), &new, None, |_| Err("a key pair never leaves".to_owned())).unwrap();
        assert!(pair.package.is_none() && pair.fingerprint.value.len() == 32);

        let mut settings = TokenSettings::new(bench.module.path().to_owned(), "later".to_owned(), PinSource::File(bench.directory.join("pin")));
        settings.allow_cbc_expand = true;
        let hsm = Hsm::start(island(), settings, Arc::new(ProcessPinMemory::default())).unwrap();
        let capabilities = hsm.usable(Duration::from_secs(30)).await.unwrap();
        let objects = hsm.inventory().await.unwrap().remove(0).1;
        assert!(objects.iter().any(|object| object.label == "meterkms/north/seal/2"));
        for object in &objects {
            assert_eq!(object.findings(&island(), &capabilities), Vec::<String>::new(), "{object:?}");
        }
        // A key goes from one storage KEK to the other and stays what it is; what is destroyed is
        // gone.
        let (storage, second) = (Purpose::StorageKek(KeyClass::Session), RootVersion::new(2).unwrap());
        let stored = hsm.generate_stored(KeyType::GUEK, KeyLength::Aes128).await.unwrap();
        let moved = hsm.rewrap_batch(vec![stored_source(KeyType::GUEK, &stored)], second).await.unwrap().remove(0).unwrap();
        assert_eq!((moved.fingerprint_wrap.clone(), moved.storage_kek_version), (stored.fingerprint_wrap.clone(), second));
        assert_ne!(moved.blob, stored.blob);
        assert_eq!(hsm.destroy_root(TokenKey::first(storage)).await.unwrap(), 1);
        assert!(!hsm.has_key(TokenKey::first(storage)).await.unwrap());
        assert!(hsm.rewrap_batch(vec![stored_source(KeyType::GUEK, &stored)], second).await.unwrap().remove(0).is_err());
        let again = hsm.rewrap_batch(vec![stored_source(KeyType::GUEK, &moved)], second).await.unwrap().remove(0).unwrap();
        assert_eq!(again.fingerprint_wrap, stored.fingerprint_wrap);
        tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
    }

    async fn a_weak_escrow_key_is_refused(bench: Bench) {
        token(&bench, "weak");
        let mut plan = plan(&bench.escrow);
        plan.escrow_public_key.truncate(40);
        assert!(matches!(run(&bench, "weak", &plan, None, |_| Ok(())), Err(HsmError::InvalidInput { .. })));
        let small = aws_lc_rs::rsa::PrivateDecryptingKey::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        plan.escrow_public_key = aws_lc_rs::encoding::AsDer::as_der(&small.public_key()).unwrap().as_ref().to_vec();
        let error = run(&bench, "weak", &plan, None, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("3072"), "{error}");
    }

    /// I1: during the ceremony too, a root leaves under the escrow key only.
    async fn an_unlocked_root_cannot_be_wrapped_by_the_user(bench: Bench) {
        let escrow = token(&bench, "open");
        run(&bench, "open", &plan(&escrow), None, |_| Err("stop here".to_owned())).unwrap_err();
        use cryptoki::mechanism::Mechanism;
        use cryptoki::object::Attribute;
        let context = cryptoki::context::Pkcs11::new(bench.module.path()).unwrap();
        let slot = context.get_slots_with_initialized_token().unwrap().into_iter().find(|slot| context.get_token_info(*slot).unwrap().label() == "open").unwrap();
        let session = context.open_rw_session(slot).unwrap();
        session.login(cryptoki::session::UserType::User, Some(&common::USER_PIN.to_owned().into())).unwrap();
        let label = TokenKey::first(Purpose::Seal).label(&island());
        let root = session.find_objects(&[Attribute::Label(label.into_bytes())]).unwrap()[0];
        let template = [Attribute::Token(false), Attribute::ValueLen(32.into()), Attribute::Wrap(true)];
        let kek = session.generate_key(&Mechanism::AesKeyGen, &template).unwrap();
        assert!(bench.ceremony.capabilities.wrap_with_trusted);
        session.wrap_key(&Mechanism::AesKeyWrap, kek, root).expect_err("the wrapping key is not trusted");
    }
}

fn token(bench: &Bench, label: &str) -> Escrow {
    bench.module.init_token(label, &so_pin(), &user_pin()).unwrap();
    Escrow::new()
}

fn stored_source(key_type: KeyType, stored: &StoredKey) -> KeySource {
    KeySource::Stored {
        key_type,
        storage_kek_version: stored.storage_kek_version,
        shape: KeyShape::Aes(KeyLength::Aes128),
        blob: stored.blob.clone(),
    }
}

fn selector(label: &str) -> TokenSelector {
    TokenSelector { label: label.to_owned(), serial: None }
}

fn run(
    bench: &Bench,
    label: &str,
    plan: &CeremonyPlan,
    previous: Option<&EscrowPackage>,
    persist: impl FnOnce(&EscrowPackage) -> Result<(), String>,
) -> Result<CeremonyResult, HsmError> {
    create_roots(&bench.module, &selector(label), &so_pin(), &user_pin(), plan, previous, persist)
}
