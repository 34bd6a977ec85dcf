//! Measures the module through the cryptoki crate: the cycle of unwrap, wrap and destroy, and
//! single operations.
//!
//! `cargo run --release -p hsm-sim --example cycle [threads] [seconds] [module]`: `module` is a
//! path to another module for comparison (its first initialised token, with the user PIN in `PIN`).

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a measuring program may end where something is wrong"
)]

use std::path::PathBuf;
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::elliptic_curve::{EcKdf, Ecdh1DeriveParams};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;

/// One measured operation: made for a session, it is called again and again.
type Operation = fn(&Session) -> Box<dyn FnMut(&Session)>;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let threads: usize = arguments.get(1).map_or(1, |text| text.parse().expect("threads is a number"));
    let seconds: f64 = arguments.get(2).map_or(2.0, |text| text.parse().expect("seconds is a number"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (pkcs11, slot) = match arguments.get(3) {
        Some(path) => (open(path.into()), None),
        None => {
            // The module reads the environment: it is set by starting this program again.
            let this = std::env::current_exe().expect("the path of this program");
            let module =
                this.parent().and_then(|folder| folder.parent()).expect("a target folder").join("libhsm_sim.so");
            if std::env::var_os("HSM_SIM_DIR").is_none() {
                let status = std::process::Command::new(&this)
                    .args(&arguments[1..])
                    .env("HSM_SIM_DIR", folder.path())
                    .status()
                    .expect("this program again");
                std::process::exit(status.code().unwrap_or(1));
            }
            (open(module), Some(0))
        }
    };
    let pin = AuthPin::new(std::env::var("PIN").unwrap_or_else(|_| "1234".to_owned()).into());
    let slot: Slot = match slot {
        Some(place) => {
            let slot = pkcs11.get_slots_with_token().expect("slots")[place];
            pkcs11.init_token(slot, &pin, "cycle").expect("a token");
            let session = pkcs11.open_rw_session(slot).expect("a session");
            session.login(UserType::So, Some(&pin)).expect("the SO");
            session.init_pin(&pin).expect("a user PIN");
            slot
        }
        None => pkcs11.get_slots_with_initialized_token().expect("slots")[0],
    };
    let anchor = pkcs11.open_rw_session(slot).expect("a session");
    anchor.login(UserType::User, Some(&pin)).expect("the user");
    let operations: [(&str, Operation); 7] = [
        ("cycle: unwrap + wrap + destroy", cycle),
        ("the cycle with keys of the token", shared_cycle),
        ("AES-CMAC 64 B", mac),
        ("AES-GCM 64 B", gcm),
        ("ECDSA P-256 sign", ecdsa),
        ("ECDH P-256", ecdh),
        ("P-256 key pair", pair),
    ];
    for (name, operation) in operations {
        let rate = measure(&pkcs11, slot, threads, Duration::from_secs_f64(seconds), operation);
        println!(
            "{name:34} {:>10.0}/s on {threads} thread(s), {:>10.0} per second of processor time",
            rate.wall, rate.processor
        );
    }
}

fn open(path: PathBuf) -> Pkcs11 {
    let pkcs11 = Pkcs11::new(path).expect("the module loads");
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).expect("the module starts");
    pkcs11
}

/// Operations of all threads together: in a second, and in a second of each thread's processor
/// time. On a machine that is busy with other work, the second number is the one that means
/// something.
struct Rate {
    wall: f64,
    processor: f64,
}

/// The time that this thread has had a processor (Linux).
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0))
}

fn measure(pkcs11: &Pkcs11, slot: Slot, threads: usize, time: Duration, operation: Operation) -> Rate {
    let barrier = Arc::new(Barrier::new(threads));
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            let session = pkcs11.open_rw_session(slot).expect("a session");
            let barrier = Arc::clone(&barrier);
            std::thread::spawn(move || {
                let mut step = operation(&session);
                barrier.wait();
                let (start, processor, mut count) = (Instant::now(), processor_time(), 0_u32);
                while start.elapsed() < time {
                    for _ in 0..16 {
                        step(&session);
                    }
                    count += 16;
                }
                let processor = processor_time().saturating_sub(processor);
                (f64::from(count) / start.elapsed().as_secs_f64(), f64::from(count) / processor.as_secs_f64())
            })
        })
        .collect();
    let rates: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("a worker")).collect();
    Rate { wall: rates.iter().map(|rate| rate.0).sum(), processor: rates.iter().map(|rate| rate.1).sum() }
}

fn aes(session: &Session, length: u64, usage: &[Attribute]) -> ObjectHandle {
    let mut template = vec![Attribute::ValueLen(length.into()), Attribute::Token(false), Attribute::Extractable(true)];
    template.extend_from_slice(usage);
    session.generate_key(&Mechanism::AesKeyGen, &template).expect("an AES key")
}

fn cycle(session: &Session) -> Box<dyn FnMut(&Session)> {
    let storage = aes(session, 32, &[Attribute::Wrap(true), Attribute::Unwrap(true)]);
    let transport = aes(session, 32, &[Attribute::Wrap(true)]);
    cycle_with(session, storage, transport)
}

/// The cycle as a server runs it: all threads use the same two keys, which are token objects.
fn shared_cycle(session: &Session) -> Box<dyn FnMut(&Session)> {
    static KEYS: OnceLock<(ObjectHandle, ObjectHandle)> = OnceLock::new();
    let (storage, transport) = *KEYS.get_or_init(|| {
        let usage =
            [Attribute::Token(true), Attribute::Wrap(true), Attribute::Unwrap(true), Attribute::ValueLen(32.into())];
        let make = || session.generate_key(&Mechanism::AesKeyGen, &usage).expect("an AES key");
        (make(), make())
    });
    cycle_with(session, storage, transport)
}

fn cycle_with(session: &Session, storage: ObjectHandle, transport: ObjectHandle) -> Box<dyn FnMut(&Session)> {
    let meter = aes(session, 16, &[Attribute::Encrypt(true)]);
    let wrapped = session.wrap_key(&Mechanism::AesKeyWrap, storage, meter).expect("a wrapped key");
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(false),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ];
    Box::new(move |session| {
        let key = session.unwrap_key(&Mechanism::AesKeyWrap, storage, &wrapped[..24], &template).expect("unwrap");
        let again = session.wrap_key(&Mechanism::AesKeyWrap, transport, key).expect("wrap");
        session.destroy_object(key).expect("destroy");
        std::hint::black_box(again);
    })
}

fn mac(session: &Session) -> Box<dyn FnMut(&Session)> {
    let key = aes(session, 16, &[Attribute::Sign(true)]);
    Box::new(move |session| {
        std::hint::black_box(session.sign(&Mechanism::AesCMac, key, &[7; 64]).expect("CMAC"));
    })
}

fn gcm(session: &Session) -> Box<dyn FnMut(&Session)> {
    let key = aes(session, 16, &[Attribute::Encrypt(true)]);
    Box::new(move |session| {
        let mut iv = [3; 12];
        let parameters = GcmParams::new(&mut iv, &[5; 17], 96.into()).expect("parameters");
        std::hint::black_box(session.encrypt(&Mechanism::AesGcm(parameters), key, &[7; 64]).expect("GCM"));
    })
}

const P256: [u8; 10] = [0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07];

fn key_pair(session: &Session) -> (ObjectHandle, ObjectHandle) {
    let public = [Attribute::EcParams(P256.to_vec()), Attribute::Token(false)];
    let private = [Attribute::Sign(true), Attribute::Derive(true), Attribute::Token(false)];
    session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private).expect("a key pair")
}

fn ecdsa(session: &Session) -> Box<dyn FnMut(&Session)> {
    let (_, private) = key_pair(session);
    Box::new(move |session| {
        std::hint::black_box(session.sign(&Mechanism::Ecdsa, private, &[7; 32]).expect("ECDSA"));
    })
}

fn ecdh(session: &Session) -> Box<dyn FnMut(&Session)> {
    let (_, private) = key_pair(session);
    let (public, _) = key_pair(session);
    let attributes = session.get_attributes(public, &[AttributeType::EcPoint]).expect("the point");
    let Some(Attribute::EcPoint(point)) = attributes.into_iter().next() else { panic!("no point") };
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(32.into()),
        Attribute::Token(false),
    ];
    Box::new(move |session| {
        let parameters = Ecdh1DeriveParams::new(EcKdf::null(), &point);
        let key = session.derive_key(&Mechanism::Ecdh1Derive(parameters), private, &template).expect("ECDH");
        session.destroy_object(key).expect("destroy");
    })
}

fn pair(session: &Session) -> Box<dyn FnMut(&Session)> {
    let _ = session;
    Box::new(|session| {
        let (public, private) = key_pair(session);
        session.destroy_object(public).expect("destroy");
        session.destroy_object(private).expect("destroy");
    })
}
