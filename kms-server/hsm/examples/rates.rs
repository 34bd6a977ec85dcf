//! Prints what a module does a second, raw, and through the verbs of this crate: `cargo run
//! --release -p kms-hsm --example rates -- [MODULE]`.
//!
//! The raw cycle is unwrap + wrap + destroy by the cryptoki crate on one session (the wrap asks for
//! the size first, as that crate does); the verbs are batches of 256 keys in envelopes. MODULE is
//! SoftHSM without an argument; tokens are made in a temporary folder.

#![expect(clippy::unwrap_used, reason = "an example stops at the first error")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::{KeySize, PrivateDecryptingKey};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType as CryptokiKeyType, ObjectClass};
use kms_domain::{
    DiversificationContext, IslandName, KeyClass, KeyLength, KeyShape, KeyType, KeyVersionNumber, Owner,
    SecuritySetupId, SystemTitle,
};
use kms_hsm::{
    CeremonyPlan, Hsm, KeySource, Module, Pin, PinSource, ProcessPinMemory, Recipient, RootVersion, TokenSelector,
    TokenSettings, create_roots,
};

fn main() {
    let module = std::env::args().nth(1).unwrap_or_else(|| "/usr/lib/softhsm/libsofthsm2.so".to_owned());
    let Ok(directory) = std::env::var("RATES_DIRECTORY") else { return in_child(&module) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(measure(PathBuf::from(module), PathBuf::from(directory)));
}

/// Modules read their configuration from the environment when they are initialised.
fn in_child(module: &str) {
    let directory = tempfile::tempdir().unwrap();
    let tokens = directory.path().join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    std::fs::write(
        directory.path().join("softhsm2.conf"),
        format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display()),
    )
    .unwrap();
    std::fs::write(directory.path().join("hsm-sim.conf"), "directory = tokens\n").unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .arg(module)
        .env("SOFTHSM2_CONF", directory.path().join("softhsm2.conf"))
        .env("HSM_SIM_CONF", directory.path().join("hsm-sim.conf"))
        .env("RATES_DIRECTORY", directory.path())
        .status()
        .unwrap();
    assert!(status.success(), "the measuring process failed: {status}");
}

async fn measure(path: PathBuf, directory: PathBuf) {
    let (so_pin, user_pin) = (Pin::new("so-12345678".to_owned()), Pin::new("user-12345678".to_owned()));
    let island = IslandName::parse("rates").unwrap();
    let module = Module::load(&path).unwrap();
    module.init_token("rates", &so_pin, &user_pin).unwrap();
    let selector = TokenSelector { label: "rates".to_owned(), serial: None };
    let escrow = PrivateDecryptingKey::generate(KeySize::Rsa3072).unwrap();
    let plan = CeremonyPlan {
        island: island.clone(),
        classes: KeyClass::WITH_ROOTS.to_vec(),
        general: true,
        escrow_public_key: escrow.public_key().as_der().unwrap().as_ref().to_vec(),
        standby: Vec::new(),
    };
    let ceremony = create_roots(&module, &selector, &so_pin, &user_pin, &plan, None, |_| Ok(())).unwrap();
    let pin = directory.join("pin");
    std::fs::write(&pin, "user-12345678").unwrap();
    std::fs::set_permissions(&pin, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let mut settings = TokenSettings::new(path.clone(), "rates".to_owned(), PinSource::File(pin));
    settings.allow_cbc_expand = true;
    settings.workers = std::env::var("RATES_WORKERS").ok().map(|workers| workers.parse().unwrap());
    let hsm = Hsm::start(island, settings, Arc::new(ProcessPinMemory::default())).unwrap();
    let capabilities = hsm.usable(Duration::from_secs(60)).await.unwrap();
    println!("{}", module.description());
    println!("raw cycle (unwrap + wrap + destroy, cryptoki): {:>9.0}/s", raw_cycles(&path));

    let transport = PrivateKey::generate(&ECDH_P256).unwrap();
    let recipient = Recipient::new(transport.compute_public_key().unwrap().as_ref(), [0; 32], 1).unwrap();
    let stored = hsm.generate_stored(KeyType::GUEK, KeyLength::Aes128).await.unwrap();
    let stored = KeySource::Stored {
        key_type: KeyType::GUEK,
        storage_kek_version: stored.storage_kek_version,
        shape: KeyShape::Aes(KeyLength::Aes128),
        blob: stored.blob,
    };
    println!("envelopes, stored keys:                        {:>9.0}/s", envelopes(&hsm, &recipient, &stored).await);
    if let Some(derivation) = ceremony.derivation {
        let context = DiversificationContext {
            owner: Owner::Meter(SystemTitle::from_octets(&[1; 8]).unwrap()),
            setup: SecuritySetupId::DEFAULT,
            key_type: KeyType::GUEK,
            version: KeyVersionNumber::FIRST,
            length: KeyLength::Aes128,
        };
        let diversified = KeySource::Diversified { root_version: RootVersion::FIRST, derivation, context };
        println!(
            "envelopes, diversified keys ({}): {:>9.0}/s",
            derivation.name(),
            envelopes(&hsm, &recipient, &diversified).await
        );
    }
    println!("workers: {}", capabilities.best_workers);
    tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
}

async fn envelopes(hsm: &Hsm, recipient: &Recipient, key: &KeySource) -> f64 {
    let keys = vec![key.clone(); BATCH];
    let deadline = Instant::now() + MEASURED;
    let lanes = (0..2).map(|_| {
        let (hsm, recipient, keys) = (hsm.clone(), recipient.clone(), keys.clone());
        tokio::spawn(async move {
            let mut done = 0;
            while Instant::now() < deadline {
                hsm.envelope(
                    recipient.clone(),
                    keys.clone(),
                    |_| Vec::new(),
                    |wrapped| wrapped.iter().flatten().flat_map(|key| key.0.clone()).collect(),
                )
                .await
                .unwrap();
                done += BATCH;
            }
            done
        })
    });
    let started = Instant::now();
    let mut done = 0;
    for lane in lanes.collect::<Vec<_>>() {
        done += lane.await.unwrap();
    }
    rate(done, started)
}

/// The token is logged in already: login is per token, for the whole process.
fn raw_cycles(path: &std::path::Path) -> f64 {
    let context = cryptoki::context::Pkcs11::new(path).unwrap();
    let slot = context.get_slots_with_initialized_token().unwrap().into_iter().next().unwrap();
    let session = context.open_rw_session(slot).unwrap();
    let kek = |usage: Attribute, other: Attribute| {
        [Attribute::Token(false), Attribute::ValueLen(32.into()), Attribute::Sensitive(true), usage, other]
    };
    let storage =
        session.generate_key(&Mechanism::AesKeyGen, &kek(Attribute::Wrap(true), Attribute::Unwrap(true))).unwrap();
    let transport =
        session.generate_key(&Mechanism::AesKeyGen, &kek(Attribute::Wrap(true), Attribute::Unwrap(false))).unwrap();
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(CryptokiKeyType::AES),
        Attribute::Token(false),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ];
    let key = [
        Attribute::Token(false),
        Attribute::ValueLen(16.into()),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ];
    let key = session.generate_key(&Mechanism::AesKeyGen, &key).unwrap();
    let mut wrapped = session.wrap_key(&Mechanism::AesKeyWrap, storage, key).unwrap();
    wrapped.truncate(24);
    let started = Instant::now();
    let mut done = 0;
    while started.elapsed() < MEASURED {
        for _ in 0..BATCH {
            let key = session.unwrap_key(&Mechanism::AesKeyWrap, storage, &wrapped, &template).unwrap();
            session.wrap_key(&Mechanism::AesKeyWrap, transport, key).unwrap();
            session.destroy_object(key).unwrap();
            done += 1;
        }
    }
    rate(done, started)
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(done: usize, started: Instant) -> f64 {
    done as f64 / started.elapsed().as_secs_f64()
}

const BATCH: usize = 256;
const MEASURED: Duration = Duration::from_secs(2);
