//! An island in this process, for tests: a fresh token with the ceremony done, an empty database,
//! the shipped policies, a few principals, and a vendor with its key.
//!
//! Two variables select the PKCS#11 module and the database, as for all tests of servers:
//! `KMS_TEST_MODULE`, `hsm-sim` (the default) or `softhsm2`, and `KMS_TEST_DATABASE`, `sqlite` (the
//! default) or `postgresql`. None of these tests needs the faults of hsm-sim: all run on all pairs.
//!
//! A PKCS#11 module is initialised once per process and reads its configuration then. So each test
//! runs in a process of its own.

mod counters;
mod log;

use std::{
    future::Future,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::Duration,
};

use aws_lc_rs::{
    encoding::AsDer,
    rsa::{KeySize, PrivateDecryptingKey},
};
use kms_client::sample::{SampleShipment, VendorKey, VendorTransportKey};
use kms_domain::{
    ChunkSize, ClassRoots, DeviceProfile, DiversificationRoot, FingerprintKey, FlagId, IslandKind, IslandName,
    KeyClass, OaepHash, Principal, PrincipalCertificate, PrincipalId, PrincipalStatus, Role, SealKey, SealRootKey,
    SystemTitle, UnixMillis,
};
use kms_hsm::{
    CeremonyPlan, Hsm, Module, Pin, PinSource, ProcessPinMemory, RootVersion, TokenSelector, TokenSettings,
    create_roots,
};
use kms_proto::v1::{self, CeremonyHeld, PrincipalChanged, audit_record::Event};
use kms_store::{Reads, Store, StoreConfig};
use kms_store_testing::TestDatabase;

use crate::island::IslandContext;
use crate::profiles::Profiles;
use crate::shipment::{ShipmentService, UploadStart};
use kms_authz::Caller;
use kms_ledger::principal_row;
use kms_ledger::{AuditKey, Committer, CommitterSettings, Door, RestoreSettings};

/// Which PKCS#11 module a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModuleKind {
    HsmSim,
    SoftHsm,
}

impl ModuleKind {
    /// What the environment says.
    fn of_environment() -> Self {
        match std::env::var("KMS_TEST_MODULE").as_deref() {
            Err(_) | Ok("hsm-sim") => Self::HsmSim,
            Ok("softhsm2") => Self::SoftHsm,
            Ok(other) => panic!("KMS_TEST_MODULE: `{other}` is neither `hsm-sim` nor `softhsm2`"),
        }
    }

    fn path(self) -> PathBuf {
        match self {
            Self::SoftHsm => "/usr/lib/softhsm/libsofthsm2.so".into(),
            Self::HsmSim => std::env::current_exe().unwrap().with_file_name("libhsm_sim.so"),
        }
    }

    /// The one OAEP hash that the module's tokens take for batch keys.
    pub(crate) const fn oaep_hash(self) -> OaepHash {
        match self {
            Self::HsmSim => OaepHash::Sha256,
            Self::SoftHsm => OaepHash::Sha1,
        }
    }
}

/// Whether the module of these tests notes nonces.
pub(crate) fn notes_nonces() -> bool {
    ModuleKind::of_environment() == ModuleKind::HsmSim
}

/// Runs a test on a new island, in a process of its own. `name` is the test's full path.
pub(crate) fn run<F, T>(name: &str, body: F)
where
    F: FnOnce(TestIsland) -> T,
    T: Future<Output = ()>,
{
    let kind = ModuleKind::of_environment();
    if std::env::var_os(FOLDER).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let island = TestIsland::new(kind).await;
            let context = island.island.clone();
            let (hsm, store) = (context.hsm.clone(), context.store.clone());
            body(island).await;
            assert_eq!(counters::repeated_counters(&*store).await, None);
            // I5, whatever the test is about. A test may have closed its database.
            if let Ok(differences) = crate::exposure::index::differences(&context).await {
                assert_eq!(differences, [], "the index of exposures is not what the sealed rows say");
            }
            tokio::task::spawn_blocking(move || hsm.close()).await.unwrap();
        });
        return;
    }
    static TOKEN: OnceLock<tempfile::TempDir> = OnceLock::new();
    let token = TOKEN.get_or_init(|| {
        let folder = token_folder();
        run_in(&folder, kind, "testing::hold_the_ceremony", None);
        folder
    });
    let folder = token_folder();
    copy(&token.path().join("tokens"), &folder.path().join("tokens"));
    for file in [DERIVATION, ESCROW_KEY] {
        let _ = std::fs::copy(token.path().join(file), folder.path().join(file));
    }
    let name = name.split_once("::").map_or(name, |(_, name)| name);
    run_in(&folder, kind, name, TestDatabase::of_environment().create().unwrap());
}

/// Runs one test of this program in a process of its own, which finds its token in the folder.
fn run_in(folder: &tempfile::TempDir, kind: ModuleKind, name: &str, database: Option<String>) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--include-ignored"])
        .env("SOFTHSM2_CONF", folder.path().join("softhsm2.conf"))
        .env("HSM_SIM_CONF", folder.path().join("hsm-sim.conf"))
        .env("HSM_SIM_NONCE_WATCH", folder.path().join(NONCES))
        .env(DATABASE, database.unwrap_or_else(|| format!("sqlite:{}", folder.path().join("island.db").display())))
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{name} on {kind:?}: {}\n{out}\n{err}", output.status);
    if std::env::var_os("KMS_TEST_SHOW").is_some() {
        eprintln!("{out}{err}");
    }
    // I4, whatever the test is about: hsm-sim knows key values, and has noted what was protected
    // under which nonce.
    let mut notes = hsm_sim::Notes::read(&folder.path().join(NONCES)).unwrap();
    // What a meter protects is computed here to be verified. Some tests have a meter repeat its own
    // nonces.
    notes.repeated.retain(|nonce| !nonce.iv.starts_with(METERS));
    assert!(kind != ModuleKind::HsmSim || folder.path().join(NONCES).exists(), "{name}: the nonce watcher was off");
    assert!(notes.repeated.is_empty(), "{name}: a nonce was repeated (I4): {:#?}", notes.repeated);
}

/// A folder for tokens of either module.
fn token_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    std::fs::write(
        folder.path().join("softhsm2.conf"),
        format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display()),
    )
    .unwrap();
    std::fs::write(
        folder.path().join("hsm-sim.conf"),
        "directory = tokens\nargon2_memory_kib = 64\nargon2_passes = 1\n",
    )
    .unwrap();
    folder
}

/// Makes the token that every test has a copy of: each test has an island of its own, and a
/// ceremony takes longer than most tests.
#[test]
#[ignore = "a part of all tests on an island, which start it in a process of its own"]
fn hold_the_ceremony() {
    let folder = std::env::var_os(FOLDER).expect("the tests on an island start this one");
    let module = Module::load(&ModuleKind::of_environment().path()).unwrap();
    let (so_pin, pin) = (Pin::new(SO_PIN.to_owned()), Pin::new(PIN.to_owned()));
    module.init_token("north", &so_pin, &pin).unwrap();
    let selector = TokenSelector { label: "north".to_owned(), serial: None };
    let plan = CeremonyPlan {
        island: IslandName::parse("north").unwrap(),
        classes: KeyClass::WITH_ROOTS.into_iter().chain([KeyClass::Ca]).collect(),
        general: true,
        escrow_public_key: PrivateDecryptingKey::generate(KeySize::Rsa3072)
            .unwrap()
            .public_key()
            .as_der()
            .unwrap()
            .as_ref()
            .to_vec(),
        standby: Vec::new(),
    };
    std::fs::write(Path::new(&folder).join(ESCROW_KEY), &plan.escrow_public_key).unwrap();
    let ceremony = create_roots(&module, &selector, &so_pin, &pin, &plan, None, |_| Ok(())).unwrap();
    if let Some(derivation) = ceremony.derivation {
        std::fs::write(Path::new(&folder).join(DERIVATION), derivation.name()).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (entry, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy(&entry, &target);
        } else {
            std::fs::copy(entry, target).unwrap();
        }
    }
}

/// Tests on an island: `island_tests! { async fn name(island) { … } }`.
macro_rules! island_tests {
    ($($(#[$attribute:meta])* async fn $name:ident($island:ident) $body:block)*) => {
        $(
            $(#[$attribute])*
            #[test]
            fn $name() {
                $crate::testing::run(concat!(module_path!(), "::", stringify!($name)), |$island| async move $body);
            }
        )*
    };
}
pub(crate) use island_tests;

/// An island, and who is on it.
pub(crate) struct TestIsland {
    pub(crate) island: Arc<IslandContext>,
    pub(crate) module: ModuleKind,
    pub(crate) officer: Caller,
    pub(crate) auditor: Caller,
    /// Has the client title [`client_title`].
    pub(crate) head_end: Caller,
    /// Has none.
    pub(crate) other_head_end: Caller,
    pub(crate) manufacturer: Caller,
    pub(crate) vendor_key: VendorKey,
}

impl TestIsland {
    async fn new(kind: ModuleKind) -> Self {
        let folder = std::path::PathBuf::from(std::env::var(FOLDER).unwrap());
        let name = IslandName::parse("north").unwrap();
        let (hsm, derivation) = token(kind, &folder, &name).await;
        let store = kms_store::open(&database()).await.unwrap();
        let classes = KeyClass::WITH_ROOTS.map(|class| ClassRoots {
            class,
            diversification: derivation
                .map(|derivation| DiversificationRoot { version: 1, derivation })
                .into_iter()
                .collect(),
            storage_kek_version: 1,
        });
        let row = kms_domain::Island {
            name,
            kind: IslandKind::Development,
            classes: classes.to_vec(),
            seal_key_version: 1,
            escrow_fingerprint: None,
            history: kms_domain::DatabaseHistory::default(),
            ledger: kms_domain::RootLedger::default(),
            principals_added: 0,
            exposures_indexed: true,
            created: IslandContext::now(),
        };
        let island = Arc::new(open(row, hsm, store, "one", CommitterSettings::SILENCE).await);

        let vendor_key = VendorKey::generate().unwrap();
        let mut callers = Vec::new();
        for (number, (role, principal_name)) in (1..).zip([
            (Role::Officer, "ada"),
            (Role::Auditor, "grace"),
            (Role::HeadEnd, "hes-1"),
            (Role::HeadEnd, "hes-2"),
            (Role::Manufacturer, "kam"),
        ]) {
            let id = PrincipalId::new(island.name().clone(), role, principal_name).unwrap();
            let not_after = IslandContext::now().after(86_400_000);
            callers.push(Caller { principal: id.clone(), certificate_sha256: [number; 32], not_after });
            let principal = Principal {
                id,
                revision: 1,
                status: PrincipalStatus::Enabled,
                certificates: vec![PrincipalCertificate::unrecorded(
                    bytes::Bytes::from(vec![number]),
                    [number; 32],
                    not_after,
                )],
                transport: None,
                client_titles: if principal_name == "hes-1" { vec![client_title()] } else { Vec::new() },
                person: matches!(role, Role::Officer | Role::Auditor)
                    .then(|| kms_domain::PersonName::parse(principal_name).unwrap()),
                assurance: None,
                shipment_key: (role == Role::Manufacturer).then(|| vendor_key.public_der().unwrap().into()),
                added: UnixMillis(1),
            };
            put_principal(&island, principal).await;
        }
        let row = (*island.row()).clone();
        let sealed = vec![(kms_store::RowKind::Island, row.name.as_str().as_bytes().to_vec())];
        island
            .committer
            .act_in_test(
                kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
                Reads { sealed, ..Reads::default() },
                move |view| {
                    view.append(Event::CeremonyHeld(CeremonyHeld::default()));
                    view.put_island(row.clone())
                },
            )
            .await
            .unwrap();
        let [officer, auditor, head_end, other_head_end, manufacturer] = <[Caller; 5]>::try_from(callers).unwrap();
        Self { island, module: kind, officer, auditor, head_end, other_head_end, manufacturer, vendor_key }
    }

    /// Makes another version of a root while no server runs, notes it in the island's row, and
    /// starts the server anew. Not for tests that go on with an earlier server: its tokens are
    /// closed.
    pub(crate) async fn add_root(&mut self, purpose: kms_domain::RootPurpose) -> kms_domain::RootId {
        let id = self.island.row().next_root(purpose).unwrap();
        let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
        let (hsm, name) = (self.island.hsm.clone(), self.island.name().clone());
        let escrow_public_key = std::fs::read(folder.join(ESCROW_KEY)).unwrap();
        let module = Module::load(&self.module.path()).unwrap();
        let key = crate::keys::token::token_key(id).unwrap();
        let made = tokio::task::spawn_blocking(move || {
            hsm.close();
            let new =
                kms_hsm::NewRoot { island: name, key, escrow_public_key, standby: Vec::new(), without: Vec::new() };
            let selector = TokenSelector { label: "north".to_owned(), serial: None };
            kms_hsm::create_root_version(&module, &selector, &Pin::new(PIN.to_owned()), &new, None, |_| Ok(())).unwrap()
        });
        let made = made.await.unwrap();
        let hsm = start_hsm(self.module, &folder, self.island.name()).await;
        let island =
            open((*self.island.row()).clone(), hsm, self.island.store.clone(), "one", CommitterSettings::SILENCE).await;
        let entry = kms_domain::RootEntry {
            id,
            derivation: made.derivation,
            made: IslandContext::now(),
            fingerprint: made.fingerprint.value,
            destroyed: None,
        };
        let (sealed, name) =
            (vec![(kms_store::RowKind::Island, island.name().as_str().as_bytes().to_vec())], island.name().clone());
        let act = island.committer.act_in_test(
            kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
            Reads { sealed, ..Reads::default() },
            move |view| {
                let mut row = (*view.island(&name)?.unwrap()).clone();
                row.add_root(entry.clone()).unwrap();
                view.append(Event::RootVersionMade(v1::RootVersionMade::default()));
                view.put_island(row)
            },
        );
        act.await.unwrap();
        self.island = Arc::new(island);
        crate::root::RootService::new(self.island.clone()).refresh().await.unwrap();
        id
    }

    /// Ends the tokens of a server that [`Self::add_root`] started.
    pub(crate) async fn end(self) {
        tokio::task::spawn_blocking(move || self.island.hsm.close()).await.unwrap();
    }

    /// Another officer, of another person.
    pub(crate) async fn colleague(&self) -> Caller {
        self.officer_of("bo", "Bo", 40).await
    }

    /// Another officer, of a person. The number makes a certificate of its own.
    pub(crate) async fn officer_of(&self, name: &str, person: &str, number: u8) -> Caller {
        self.member(Role::Officer, name, Some(person), number).await
    }

    /// Another principal. The number makes a certificate of its own.
    pub(crate) async fn member(&self, role: Role, name: &str, person: Option<&str>, number: u8) -> Caller {
        let id = PrincipalId::new(self.island.name().clone(), role, name).unwrap();
        let not_after = IslandContext::now().after(86_400_000);
        let certificate = PrincipalCertificate::unrecorded(bytes::Bytes::from(vec![number]), [number; 32], not_after);
        let principal = Principal {
            id: id.clone(),
            revision: 1,
            status: PrincipalStatus::Enabled,
            certificates: vec![certificate],
            transport: None,
            client_titles: Vec::new(),
            person: person.map(|person| kms_domain::PersonName::parse(person).unwrap()),
            assurance: None,
            shipment_key: None,
            added: UnixMillis(1),
        };
        put_principal(&self.island, principal).await;
        Caller { principal: id, certificate_sha256: [number; 32], not_after }
    }

    /// Another server of the same island: a writer of its own, and nothing remembered.
    pub(crate) async fn another_server(&self) -> Arc<IslandContext> {
        self.another_server_after(CommitterSettings::SILENCE).await
    }

    /// The same, which takes servers for gone that were silent for as long.
    pub(crate) async fn another_server_after(&self, silence: Duration) -> Arc<IslandContext> {
        Arc::new(
            open((*self.island.row()).clone(), self.island.hsm.clone(), self.island.store.clone(), "another", silence)
                .await,
        )
    }

    /// The same server after a restart: its name, a writer of its own, and nothing remembered.
    pub(crate) async fn restarted(&self) -> IslandContext {
        open(
            (*self.island.row()).clone(),
            self.island.hsm.clone(),
            self.island.store.clone(),
            "one",
            CommitterSettings::SILENCE,
        )
        .await
    }

    /// A shipment's file and signature, with the OAEP hash that this token takes.
    pub(crate) async fn sample(&self, sample: &SampleShipment) -> (Vec<u8>, Vec<u8>) {
        let sample = SampleShipment { oaep_hash: self.module.oaep_hash(), ..sample.clone() };
        let spki = self.island.hsm.transport_key_spki(RootVersion::FIRST).await.unwrap();
        let mut file = Vec::new();
        let signature = sample
            .write(&VendorTransportKey::from_der(&spki).unwrap(), &self.vendor_key, &mut file, None, &mut |_| ())
            .unwrap();
        (file, signature)
    }

    /// Sends a file whole.
    pub(crate) async fn upload(&self, file: &[u8], signature: &[u8]) -> [u8; 32] {
        let start = self.start(file, signature);
        let service = ShipmentService::new(self.island.clone());
        let mut upload = service.upload(&self.officer, start.clone()).await.unwrap();
        for piece in file.chunks(1 << 20) {
            upload.append(upload.position(), piece).await.unwrap();
        }
        let refused = upload.is_refused();
        assert_eq!(upload.finish().await.unwrap().received, if refused { 0 } else { file.len() as u64 });
        start.file_sha256
    }

    /// The vendor's signature of a file.
    pub(crate) fn signed(&self, file: &[u8]) -> Vec<u8> {
        sign(&self.vendor_key, file)
    }

    /// Signs, sends and imports a file for the head-end.
    pub(crate) async fn deliver_file(&self, file: &[u8]) -> v1::ImportShipmentResponse {
        let sha256 = self.upload(file, &self.signed(file)).await;
        self.import(sha256, Some(&self.head_end)).await
    }

    /// What a sender announces of a file.
    pub(crate) fn start(&self, file: &[u8], signature: &[u8]) -> UploadStart {
        UploadStart {
            file_sha256: sha256(file),
            file_length: file.len() as u64,
            signature: signature.to_vec().into(),
            manufacturer: self.manufacturer.principal.clone(),
        }
    }

    /// Imports, and gives all answers as one: the last shipment, all refused lines, all duplicates.
    pub(crate) async fn import(&self, file_sha256: [u8; 32], head_end: Option<&Caller>) -> v1::ImportShipmentResponse {
        import(&self.island, &self.officer, file_sha256, head_end).await
    }

    /// Sends and imports a sample for the head-end; its devices with their keys in plaintext too,
    /// one a line.
    pub(crate) async fn deliver_with_devices(&self, sample: &SampleShipment) -> (v1::ImportShipmentResponse, Vec<u8>) {
        let sample = SampleShipment { oaep_hash: self.module.oaep_hash(), ..sample.clone() };
        let spki = self.island.hsm.transport_key_spki(RootVersion::FIRST).await.unwrap();
        let (mut file, mut devices) = (Vec::new(), Vec::new());
        let key = VendorTransportKey::from_der(&spki).unwrap();
        let signature = sample.write(&key, &self.vendor_key, &mut file, Some(&mut devices), &mut |_| ()).unwrap();
        let sha256 = self.upload(&file, &signature).await;
        (self.import(sha256, Some(&self.head_end)).await, devices)
    }

    /// Counters of the head-end's client title from `floor` on are this system's.
    pub(crate) async fn take_counters_over(&self, meter: SystemTitle, floor: u64) {
        self.change_counters(meter, move |counters| {
            counters.take_over(kms_domain::CounterKey::ClientTitle(client_title()), floor)
        })
        .await;
    }

    /// The head-end counts its client title by itself.
    pub(crate) async fn leave_counters(&self, meter: SystemTitle) {
        let head_end = self.head_end.principal.clone();
        self.change_counters(meter, move |counters| {
            counters.leave_to(kms_domain::CounterKey::ClientTitle(client_title()), head_end.clone())
        })
        .await;
    }

    async fn change_counters(&self, meter: SystemTitle, change: impl Fn(&mut kms_domain::Counters) + Send + 'static) {
        let reads = Reads { meters: vec![meter], ..Reads::default() };
        self.island
            .committer
            .act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
                view.append(Event::KeysGranted(v1::KeysGranted::default()));
                let mut row = (*view.meter(meter)?.unwrap()).clone();
                let slot = row.slots.get_mut(kms_domain::SecuritySetupId::DEFAULT, kms_domain::KeyType::GUEK).unwrap();
                let version = slot.version_mut(kms_domain::KeyVersionNumber::FIRST).unwrap();
                if let Some(id) = version.domain() {
                    let mut domain = (*view.domain(id)?.unwrap()).clone();
                    change(&mut domain.counters);
                    return view.put_domain(domain);
                }
                change(version.counters_mut().unwrap());
                view.put_meter(row, false)
            })
            .await
            .unwrap();
    }

    /// Sends and imports a sample for the head-end.
    pub(crate) async fn deliver(&self, sample: &SampleShipment) -> v1::ImportShipmentResponse {
        let (file, signature) = self.sample(sample).await;
        let sha256 = self.upload(&file, &signature).await;
        self.import(sha256, Some(&self.head_end)).await
    }
}

/// A file that the vendor changes line by line and signs again.
pub(crate) struct Forged {
    pub(crate) lines: Vec<Vec<u8>>,
}

impl Forged {
    pub(crate) fn of(file: &[u8]) -> Self {
        Self { lines: file.split_inclusive(|octet| *octet == b'\n').map(<[u8]>::to_vec).collect() }
    }

    pub(crate) fn device(&mut self, line: usize, change: impl Fn(String) -> String) -> &mut Self {
        let text = String::from_utf8(self.lines[line - 1].clone()).unwrap();
        self.lines[line - 1] = change(text).into_bytes();
        self
    }

    /// With a right trailer for what the lines are now.
    pub(crate) fn file(&mut self) -> Vec<u8> {
        self.lines.pop();
        let content = self.lines.concat();
        let devices = content.iter().filter(|octet| **octet == b'\n').count() - 1;
        let trailer =
            format!("{{\"trailer\":{{\"devices\":{devices},\"sha256\":\"{}\"}}}}\n", hex::encode(sha256(&content)));
        [content, trailer.into_bytes()].concat()
    }
}

/// A signature of a file by the vendor.
pub(crate) fn sign(key: &VendorKey, file: &[u8]) -> Vec<u8> {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
    let der = <rustls_pki_types::PrivateKeyDer<'static> as rustls_pki_types::pem::PemObject>::from_pem_slice(
        key.private_pem().as_bytes(),
    )
    .unwrap();
    let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_der()).unwrap();
    pair.sign(&aws_lc_rs::rand::SystemRandom::new(), file).unwrap().as_ref().to_vec()
}

/// As [`TestIsland::import`], on any server.
pub(crate) async fn import(
    island: &Arc<IslandContext>,
    officer: &Caller,
    file_sha256: [u8; 32],
    head_end: Option<&Caller>,
) -> v1::ImportShipmentResponse {
    let service = ShipmentService::new(island.clone());
    let mut import =
        service.import(officer, &file_sha256, head_end.map(|caller| caller.principal.clone())).await.unwrap();
    let mut all = v1::ImportShipmentResponse::default();
    while let Some(answer) = import.next().await {
        let answer = answer.unwrap();
        all.shipment = answer.shipment;
        all.refused_lines.extend(answer.refused_lines);
        all.duplicate_keys.extend(answer.duplicate_keys);
    }
    all
}

/// The database of this test.
pub(crate) fn database() -> StoreConfig {
    StoreConfig::parse(&std::env::var(DATABASE).unwrap()).unwrap()
}

/// Writes a principal.
pub(crate) async fn put_principal(island: &IslandContext, principal: Principal) {
    let reads = Reads { sealed: vec![principal_row(&principal.id)], ..Reads::default() };
    island
        .committer
        .act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
            view.append(Event::PrincipalChanged(PrincipalChanged {
                principal: principal.id.to_string(),
                ..PrincipalChanged::default()
            }));
            view.put_principal(principal.clone())
        })
        .await
        .unwrap();
}

/// A sample of a shipped device profile, of manufacturer KAM.
pub(crate) fn sample(profile: &str, devices: u64) -> SampleShipment {
    let shipped = DeviceProfile::SHIPPED.iter().find(|(name, _)| *name == profile).map(|(_, text)| (*text).to_owned());
    let text = shipped.unwrap_or_else(|| std::fs::read_to_string(profiles().join(format!("{profile}.toml"))).unwrap());
    SampleShipment::new(
        format!("B-{profile}-{devices}"),
        FlagId::parse("KAM").unwrap(),
        DeviceProfile::parse(&text).unwrap(),
        devices,
    )
}

/// A meter of the samples.
pub(crate) fn meter(number: u64) -> SystemTitle {
    SystemTitle::from_octets(&[b"KAM".as_slice(), number.to_be_bytes().get(3..).unwrap()].concat()).unwrap()
}

/// The client title of the first head-end.
pub(crate) fn client_title() -> SystemTitle {
    SystemTitle::parse("4D4D4D0000000001").unwrap()
}

/// SHA-256.
pub(crate) fn sha256(octets: &[u8]) -> [u8; 32] {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, octets).as_ref().try_into().unwrap()
}

async fn token(kind: ModuleKind, folder: &Path, name: &IslandName) -> (Hsm, Option<kms_domain::KeyDerivation>) {
    use std::os::unix::fs::PermissionsExt;
    let pin_file = folder.join("pin");
    std::fs::write(&pin_file, PIN).unwrap();
    std::fs::set_permissions(&pin_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let derivation = std::fs::read_to_string(folder.join(DERIVATION))
        .ok()
        .map(|name| kms_domain::KeyDerivation::parse(&name).unwrap());
    (start_hsm(kind, folder, name).await, derivation)
}

async fn start_hsm(kind: ModuleKind, folder: &Path, name: &IslandName) -> Hsm {
    let mut settings = TokenSettings::new(kind.path(), "north".to_owned(), PinSource::File(folder.join("pin")));
    settings.allow_cbc_expand = true;
    let hsm = Hsm::start(name.clone(), settings, Arc::new(ProcessPinMemory::default())).unwrap();
    hsm.usable(Duration::from_secs(60)).await.unwrap();
    hsm
}

async fn open(
    row: kms_domain::Island,
    hsm: Hsm,
    store: Arc<dyn Store>,
    server: &str,
    silence: Duration,
) -> IslandContext {
    let key = |which: SealRootKey| {
        let (hsm, message) = (hsm.clone(), which.message(1, &row.name));
        async move { hsm.mac(RootVersion::FIRST, message).await.unwrap() }
    };
    let settings = CommitterSettings {
        policy_sha256: None,
        island: row.name.clone(),
        server: server.to_owned(),
        chunk_size: ChunkSize::DEFAULT,
        limits: Arc::default(),
        restore: RestoreSettings::default(),
        silence,
    };
    let committer = Committer::start(
        store.clone(),
        SealKey::new(1, &key(SealRootKey::Seal).await),
        AuditKey::new(1, &*key(SealRootKey::AuditChain).await),
        settings,
    );
    let fingerprint_key = FingerprintKey::new(&key(SealRootKey::Fingerprint).await);
    let policy = Arc::new(arc_swap::ArcSwap::from_pointee(kms_policy::load(None).unwrap()));
    IslandContext {
        door: Door::new(committer.clone(), store.clone(), policy.clone()),
        row: arc_swap::ArcSwap::from_pointee(row),
        hsm,
        store,
        policy,
        profiles: Profiles::load(Some(&profiles())).unwrap(),
        committer,
        limits: Arc::default(),
        disk: None,
        fingerprint_key,
        scrubs: Default::default(),
        refreshing: tokio::sync::Mutex::default(),
    }
}

/// A folder with device profiles besides the shipped ones: `needs-secret`, whose meters cannot be
/// without an LLS secret, `diversified-broadcast`, whose groups have a diversified GBEK, and
/// `counter-resets`, whose meters start again at 250 with each new key.
fn profiles() -> std::path::PathBuf {
    let folder = std::path::PathBuf::from(std::env::var(FOLDER).unwrap()).join("profiles");
    std::fs::create_dir_all(&folder).unwrap();
    let shipped = |wanted: &str| {
        DeviceProfile::SHIPPED.iter().find(|(name, _)| *name == wanted).unwrap().1.replace(wanted, "NAME")
    };
    let secret = shipped("gateway-suite0").replace(
        "\"LLS-SECRET\", origin = \"imported\", shipped = \"optional\"",
        "\"LLS-SECRET\", origin = \"imported\"",
    );
    let broadcast = shipped("generic-suite0").replace(
        "\"GBEK\", origin = \"generated\"",
        "\"GBEK\", origin = \"diversified\", owner = \"group\", shipped = \"no\"",
    );
    let resets =
        shipped("generic-suite0").replace("on_new_key = \"continue\"", "on_new_key = \"reset\"\nreset_to = 250");
    for (name, text) in [("needs-secret", secret), ("diversified-broadcast", broadcast), ("counter-resets", resets)] {
        std::fs::write(folder.join(format!("{name}.toml")), text.replace("NAME", name)).unwrap();
    }
    folder
}

/// Where hsm-sim notes the nonces of a test. Tests have copies of one token, so each has notes of
/// its own.
const NONCES: &str = "nonces";
/// How system titles of the samples' meters begin: `KAM`, in hexadecimal.
const METERS: &str = "4b414d";

/// Both are set in the process of one test alone.
const DATABASE: &str = "KMS_SERVER_TEST_DATABASE";
/// The name of the derivation that the token's module has; no such file where it has none.
const DERIVATION: &str = "derivation";
/// The escrow key of the ceremony, DER of its SubjectPublicKeyInfo.
const ESCROW_KEY: &str = "escrow-key.der";
const SO_PIN: &str = "so-12345678";
const PIN: &str = "user-12345678";
const FOLDER: &str = "KMS_SERVER_TEST_FOLDER";
