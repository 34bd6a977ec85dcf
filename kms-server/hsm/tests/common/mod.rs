//! A fresh token of each PKCS#11 module, with the ceremony done, and an independent opener of what
//! the verbs make.
//!
//! A module is initialised once per process and reads its configuration then, so each test runs in
//! a process of its own per module.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::agreement::{self, ECDH_P256, PrivateKey, UnparsedPublicKey};
use aws_lc_rs::cipher::{self, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::key_wrap::{self, AesKek, KeyWrap};
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey,
    PrivateDecryptingKey, PublicEncryptingKey,
};
use aws_lc_rs::{cmac, hmac};
use kms_domain::{
    DiversificationContext, IslandName, KeyClass, KeyDerivation, KeyLength, KeyType, KeyVersionNumber, OaepHash, Owner,
    SecuritySetupId, SystemTitle,
};
use kms_hsm::{
    CeremonyPlan, CeremonyResult, Envelope, EnvelopeAlgorithm, Hsm, KeySource, Module, Pin, PinSource,
    ProcessPinMemory, Recipient, RootVersion, TokenKey, TokenSelector, TokenSettings, WrappedKey, WrappedRoots,
    create_roots,
};

/// Runs a test once for each module: `each_module! { async fn name(bench: Bench) { … } }`.
#[macro_export]
macro_rules! each_module {
    ($($(#[$attribute:meta])* async fn $name:ident($bench:ident: Bench) $body:block)*) => {
        $(
            $(#[$attribute])*
            #[test]
            fn $name() {
                $crate::common::run_on_each(stringify!($name), |$bench| async move $body);
            }
        )*
    };
}

/// Runs a test on hsm-sim alone, and says why: `hsm_sim_only! { "reason", async fn name(bench:
/// Bench) { … } }`.
#[macro_export]
macro_rules! hsm_sim_only {
    ($($reason:literal, async fn $name:ident($bench:ident: Bench) $body:block)*) => {
        $(
            #[test]
            fn $name() {
                $crate::common::run_on_hsm_sim(stringify!($name), $reason, |$bench| async move $body);
            }
        )*
    };
}

fn settings(module: &Module, token: &TokenSelector, directory: &Path) -> TokenSettings {
    let pin = PinSource::File(directory.join("pin"));
    TokenSettings { allow_cbc_expand: true, ..TokenSettings::new(module.path().to_owned(), token.label.clone(), pin) }
}

/// Which module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    SoftHsm,
    HsmSim,
}

/// A token that is ready for use.
pub struct Bench {
    pub kind: Kind,
    pub directory: PathBuf,
    pub module: Arc<Module>,
    pub selector: TokenSelector,
    pub escrow: Escrow,
    pub ceremony: CeremonyResult,
    pub hsm: Hsm,
}

pub const SO_PIN: &str = "so-12345678";
pub const USER_PIN: &str = "user-12345678";

pub fn run_on_each<F, T>(name: &str, body: F)
where
    F: FnOnce(Bench) -> T,
    T: Future<Output = ()>,
{
    run_on(&[Kind::SoftHsm, Kind::HsmSim], name, body);
}

pub fn run_on_hsm_sim<F, T>(name: &str, reason: &str, body: F)
where
    F: FnOnce(Bench) -> T,
    T: Future<Output = ()>,
{
    if std::env::var_os(CHILD).is_none() {
        // Past the test runner, which keeps what passing tests print to itself.
        let said = format!("{name}: on hsm-sim only, not on SoftHSM2: {reason}\n");
        std::io::stderr().write_all(said.as_bytes()).unwrap();
    }
    run_on(&[Kind::HsmSim], name, body);
}

fn run_on<F, T>(kinds: &[Kind], name: &str, body: F)
where
    F: FnOnce(Bench) -> T,
    T: Future<Output = ()>,
{
    if let Ok(kind) = std::env::var(CHILD) {
        let kind = if kind == "SoftHsm" { Kind::SoftHsm } else { Kind::HsmSim };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new(kind).await;
            let hsm = bench.hsm.clone();
            body(bench).await;
            tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
        });
        return;
    }
    for kind in kinds.iter().copied() {
        if std::env::var("KMS_HSM_TEST_ONLY").is_ok_and(|only| only != format!("{kind:?}")) {
            continue;
        }
        let directory = tempfile::tempdir().unwrap();
        let output = in_child(kind, directory.path(), name);
        assert!(
            output.status.success(),
            "{name} on {kind:?}: {}\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn in_child(kind: Kind, directory: &Path, name: &str) -> std::process::Output {
    let tokens = directory.join("tokens");
    fs::create_dir(&tokens).unwrap();
    fs::write(
        directory.join("softhsm2.conf"),
        format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display()),
    )
    .unwrap();
    fs::write(
        directory.join("hsm-sim.conf"),
        "directory = tokens\ncontrol = control\nargon2_memory_kib = 64\nargon2_passes = 1\n",
    )
    .unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, format!("{kind:?}"))
        .env("SOFTHSM2_CONF", directory.join("softhsm2.conf"))
        .env("HSM_SIM_CONF", directory.join("hsm-sim.conf"))
        .env("KMS_HSM_TEST_DIRECTORY", directory)
        .output()
        .unwrap()
}

impl Bench {
    async fn new(kind: Kind) -> Self {
        let directory = PathBuf::from(std::env::var("KMS_HSM_TEST_DIRECTORY").unwrap());
        let module = Module::load(&module_path(kind)).unwrap();
        module.init_token("meterkms-test", &so_pin(), &user_pin()).unwrap();
        let selector = TokenSelector { label: "meterkms-test".to_owned(), serial: None };
        let escrow = Escrow::new();
        let plan = plan(&escrow);
        let (ceremony_module, token) = (Arc::clone(&module), selector.clone());
        let ceremony = tokio::task::spawn_blocking(move || {
            create_roots(&ceremony_module, &token, &so_pin(), &user_pin(), &plan, None, |_| Ok(()))
        })
        .await
        .unwrap()
        .unwrap();
        write_pin(&directory.join("pin"), USER_PIN);
        let hsm = Hsm::start(island(), settings(&module, &selector, &directory), Arc::new(ProcessPinMemory::default()));
        let hsm = hsm.unwrap();
        hsm.usable(Duration::from_secs(60)).await.unwrap();
        Self { kind, directory, module, selector, escrow, ceremony, hsm }
    }

    /// How the token is used.
    pub fn settings(&self) -> TokenSettings {
        settings(&self.module, &self.selector, &self.directory)
    }

    /// A root's value, as the custodians would restore it.
    pub fn root(&self, key: TokenKey) -> Vec<u8> {
        self.escrow.open(&self.ceremony.package.escrow)[&key].clone()
    }

    /// A diversified key of a meter.
    pub fn diversified(&self, title: u64, key_type: KeyType, length: KeyLength) -> KeySource {
        KeySource::Diversified {
            root_version: RootVersion::FIRST,
            derivation: self.ceremony.derivation.unwrap(),
            context: DiversificationContext {
                owner: Owner::Meter(SystemTitle::from_octets(&title.to_be_bytes()).unwrap()),
                setup: SecuritySetupId::DEFAULT,
                key_type,
                version: KeyVersionNumber::FIRST,
                length,
            },
        }
    }

    /// A grant in which the manifest is the wrapped keys, one after the other.
    pub async fn grant(&self, grantee: &Grantee, keys: Vec<KeySource>) -> Envelope {
        self.hsm
            .envelope(
                grantee.recipient(),
                keys,
                |agreement| [&[agreement.algorithm.number()], agreement.ephemeral_public.as_slice()].concat(),
                concatenated,
            )
            .await
            .unwrap()
    }
}

pub fn concatenated(keys: &[Result<WrappedKey, kms_hsm::HsmError>]) -> Vec<u8> {
    keys.iter().flat_map(|key| key.as_ref().map(|key| key.0.clone()).unwrap_or_default()).collect()
}

pub fn island() -> IslandName {
    IslandName::parse("north").unwrap()
}

pub fn plan(escrow: &Escrow) -> CeremonyPlan {
    CeremonyPlan {
        island: island(),
        classes: vec![KeyClass::Kek, KeyClass::Session, KeyClass::Authentication, KeyClass::Ca],
        general: true,
        escrow_public_key: escrow.spki(),
        standby: Vec::new(),
    }
}

pub fn so_pin() -> Pin {
    Pin::new(SO_PIN.to_owned())
}

pub fn user_pin() -> Pin {
    Pin::new(USER_PIN.to_owned())
}

pub fn write_pin(path: &Path, pin: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, pin).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The custodians' key, whole.
pub struct Escrow(PrivateDecryptingKey);

impl Escrow {
    pub fn new() -> Self {
        Self(PrivateDecryptingKey::generate(KeySize::Rsa3072).unwrap())
    }

    pub fn spki(&self) -> Vec<u8> {
        self.0.public_key().as_der().unwrap().as_ref().to_vec()
    }

    pub fn open(&self, roots: &WrappedRoots) -> HashMap<TokenKey, Vec<u8>> {
        let key = OaepPrivateDecryptingKey::new(self.0.clone()).unwrap();
        let algorithm = oaep(roots.oaep_hash);
        let open = |wrapped: &[u8]| {
            let mut plain = vec![0; key.min_output_size()];
            key.decrypt(algorithm, wrapped, &mut plain, None).unwrap().to_vec()
        };
        roots.roots.iter().map(|root| (root.key, open(&root.wrapped))).collect()
    }
}

pub fn oaep(hash: OaepHash) -> &'static aws_lc_rs::rsa::OaepAlgorithm {
    match hash {
        OaepHash::Sha1 => &OAEP_SHA1_MGF1SHA1,
        OaepHash::Sha256 => &OAEP_SHA256_MGF1SHA256,
    }
}

pub fn oaep_encrypt(spki: &[u8], hash: OaepHash, plain: &[u8]) -> Vec<u8> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(spki).unwrap()).unwrap();
    let mut ciphertext = vec![0; key.ciphertext_size()];
    key.encrypt(oaep(hash), plain, &mut ciphertext, None).unwrap().to_vec()
}

/// A grantee with a transport key, opening envelopes by aws-lc-rs only.
pub struct Grantee {
    private: PrivateKey,
    public: Vec<u8>,
    certificate_sha256: [u8; 32],
    expiry: u64,
}

pub const EXPIRY: u64 = 1_800_000_000_000;

impl Grantee {
    pub fn new() -> Self {
        let private = PrivateKey::generate(&ECDH_P256).unwrap();
        let public = private.compute_public_key().unwrap().as_ref().to_vec();
        Self { private, public, certificate_sha256: [0xC5; 32], expiry: EXPIRY }
    }

    pub fn recipient(&self) -> Recipient {
        Recipient::new(&self.public, self.certificate_sha256, self.expiry).unwrap()
    }

    /// Checks the seal and gives the transport KEK.
    pub fn open(&self, envelope: &Envelope) -> Vec<u8> {
        let seal_key = hmac::Key::new(hmac::HMAC_SHA256, &self.agreed_key(envelope, 2));
        let sealed = [
            &u32::try_from(envelope.header.len()).unwrap().to_be_bytes(),
            envelope.header.as_slice(),
            &envelope.manifest,
        ]
        .concat();
        hmac::verify(&seal_key, &sealed, &envelope.seal).expect("the seal verifies");
        self.agreed_key(envelope, 1)
    }

    /// The keys of a manifest that is wrapped keys of this length, one after the other.
    pub fn keys(&self, envelope: &Envelope, wrapped_octets: usize) -> Vec<Vec<u8>> {
        let kek = self.open(envelope);
        envelope.manifest.chunks(wrapped_octets).map(|wrapped| unwrap(&kek, wrapped)).collect()
    }

    fn agreed_key(&self, envelope: &Envelope, usage: u8) -> Vec<u8> {
        let ephemeral = envelope.agreement.ephemeral_public;
        let algorithm = envelope.agreement.algorithm;
        let mut info = b"meterkms/envelope".to_vec();
        info.extend([1, algorithm.number(), usage]);
        info.extend(ephemeral);
        info.extend(&self.public);
        info.extend(self.certificate_sha256);
        info.extend([5]);
        info.extend(b"north");
        info.extend(self.expiry.to_be_bytes());
        let shared = digest(&SHA256, &info);
        agreement::agree(&self.private, UnparsedPublicKey::new(&ECDH_P256, ephemeral), (), |z| {
            Ok(match algorithm {
                EnvelopeAlgorithm::X963Sha256 => {
                    digest(&SHA256, &[z, &[0, 0, 0, 1], shared.as_ref()].concat()).as_ref().to_vec()
                }
                EnvelopeAlgorithm::CbcExpand => cbc(z, shared.as_ref()),
            })
        })
        .unwrap()
    }
}

/// AES-CBC with a zero IV, no padding.
pub fn cbc(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut text = data.to_vec();
    let key = EncryptingKey::cbc(UnboundCipherKey::new(&cipher::AES_256, key).unwrap()).unwrap();
    key.less_safe_encrypt(&mut text, EncryptionContext::Iv128(FixedLength::from([0; 16]))).unwrap();
    text
}

/// The key that a root and a context give, computed without the HSM.
pub fn diversify(root: &[u8], source: &KeySource) -> Vec<u8> {
    let KeySource::Diversified { derivation, context, .. } = source else { panic!("not diversified") };
    let octets = context.length.octets();
    match derivation {
        KeyDerivation::AesCbcEncryptData => cbc(root, &context.cbc_data())[..octets].to_vec(),
        KeyDerivation::Sp800108Cmac => {
            let key = cmac::Key::new(cmac::AES_256, root).unwrap();
            let bits = u32::try_from(octets * 8).unwrap().to_be_bytes();
            let block = |counter: u32| {
                let input =
                    [&counter.to_be_bytes(), context.label().as_slice(), &[0], &context.context(), &bits].concat();
                cmac::sign(&key, &input).unwrap().as_ref().to_vec()
            };
            [block(1), block(2)].concat()[..octets].to_vec()
        }
    }
}

/// RFC 3394.
pub fn wrap(kek: &[u8], key: &[u8]) -> Vec<u8> {
    let mut output = vec![0; key.len() + 8];
    kek_of(kek).wrap(key, &mut output).unwrap();
    output
}

/// RFC 3394.
pub fn unwrap(kek: &[u8], wrapped: &[u8]) -> Vec<u8> {
    let mut output = vec![0; wrapped.len()];
    kek_of(kek).unwrap(wrapped, &mut output).expect("the key unwraps").to_vec()
}

fn kek_of(kek: &[u8]) -> AesKek {
    AesKek::new(if kek.len() == 16 { &key_wrap::AES_128 } else { &key_wrap::AES_256 }, kek).unwrap()
}

fn module_path(kind: Kind) -> PathBuf {
    match kind {
        Kind::SoftHsm => {
            let path = PathBuf::from("/usr/lib/softhsm/libsofthsm2.so");
            assert!(path.exists(), "SoftHSM is not installed: run `apt-get install softhsm2`");
            path
        }
        Kind::HsmSim => match std::env::var_os("HSM_SIM_MODULE") {
            Some(path) => PathBuf::from(path),
            // Cargo builds the cdylib of a dev-dependency beside the test executable.
            None => {
                let path = std::env::current_exe().unwrap().with_file_name("libhsm_sim.so");
                assert!(
                    path.exists(),
                    "`{}` is missing: build with `cargo test -p kms-hsm`, or set HSM_SIM_MODULE",
                    path.display()
                );
                path
            }
        },
    }
}

const CHILD: &str = "KMS_HSM_TEST_CHILD";
