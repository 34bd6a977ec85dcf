//! What the end-to-end tests share: real server processes on loopback, clients, and simulated
//! meters with the keys of the sample shipment.
//!
//! All of them run on one pair of PKCS#11 module and database, which two environment variables
//! name:
//!
//! | variable | values |
//! |---|---|
//! | `KMS_TEST_MODULE` | `hsm-sim` (the default), `softhsm2` |
//! | `KMS_TEST_DATABASE` | `sqlite` (the default), `postgresql` |
//!
//! Tests that start a second server on the same island run on PostgreSQL whatever the variable
//! says, because an SQLite database belongs to one process: they begin with
//! [`DevServer::start_on_postgresql`]. Tests that put the files of a database back run on SQLite:
//! [`DevServer::start_on_sqlite`]. No test here needs the faults of hsm-sim.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test harness: what fails here fails the test"
)]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use kms_client::{
    Connection, OpenOptions, Profile, Session, SessionError, StateDirectory, SystemTitle, new_request_id, proto,
    proto::{Purpose, SessionTerms},
};
use kms_store::{DatabaseLocation, StoreConfig};
use kms_store_testing::{Glance, TestDatabase};
use meter_sim::{
    CLASS_REGISTER, Meter, MeterConfig, MeterDirectory, ServeOptions, SymmetricKey,
    axdr::Data,
    client::{ClientConfig, ClientConnection, ClientSession},
    config::SecuritySetupConfig,
    security::Ciphering,
    serve,
    xdlms::AttributeDescriptor,
};

/// SoftHSM2, as Debian installs it.
pub const SOFTHSM2: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// The client system title of the sample's head-end.
pub const CLIENT_TITLE: &str = "4D4D4D0000000001";

/// The PKCS#11 module of this run of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TestModule {
    /// The embedded one.
    HsmSim,
    /// SoftHSM2.
    SoftHsm2,
}

impl TestModule {
    /// What the environment says.
    ///
    /// # Panics
    /// It says something else, or SoftHSM2 is not installed: a test that ran on another module than
    /// was asked for would prove nothing.
    pub fn of_environment() -> Self {
        match env::var("KMS_TEST_MODULE").as_deref() {
            Err(_) | Ok("hsm-sim") => Self::HsmSim,
            Ok("softhsm2") => {
                assert!(
                    Path::new(SOFTHSM2).exists(),
                    "SoftHSM2 is missing: run `apt-get install softhsm2`, or `tests/run`, which does"
                );
                Self::SoftHsm2
            }
            Ok(other) => panic!("KMS_TEST_MODULE: `{other}` is neither `hsm-sim` nor `softhsm2`"),
        }
    }

    /// How clients open sessions: SoftHSM2 has no X9.63 KDF, and what is used instead a client must
    /// ask for.
    pub fn open_options(self) -> OpenOptions {
        match self {
            Self::HsmSim => OpenOptions::new(),
            Self::SoftHsm2 => OpenOptions::new().allow_cbc_expand(),
        }
    }
}

/// A `kms-dev` process with its folder.
pub struct DevServer {
    // Dropped first: it looks into the folder.
    #[expect(dead_code, reason = "it works when it is dropped")]
    nonces: NonceWatch,
    state: tempfile::TempDir,
    process: Process,
    arguments: Vec<String>,
    /// What it printed until it was ready.
    pub printed: String,
}

impl DevServer {
    /// Starts one on the pair of this run, and waits until it has done the main job.
    pub fn start() -> Self {
        Self::start_on(TestModule::of_environment(), TestDatabase::of_environment())
    }

    /// Starts one on the module of this run and on PostgreSQL, for tests that need a second server.
    pub fn start_on_postgresql() -> Self {
        Self::start_on(TestModule::of_environment(), TestDatabase::Postgresql)
    }

    /// Starts one on the module of this run and on SQLite, for tests that put the database's files
    /// back.
    pub fn start_on_sqlite() -> Self {
        Self::start_on(TestModule::of_environment(), TestDatabase::Sqlite)
    }

    /// Starts one on this pair: a copy of an island that this process made once, because a ceremony
    /// takes seconds.
    pub fn start_on(module: TestModule, database: TestDatabase) -> Self {
        let template = Template::of(module, database);
        let state = folder();
        copy_folder(template.state.path(), state.path());
        let configuration = state.path().join("island/kms-server.toml");
        let mut text = fs::read_to_string(&configuration).unwrap().replace(path(&template.state), path(&state));
        let copy = template.database.as_deref().map(|address| TestDatabase::copy_postgresql(address).unwrap());
        if let (Some(address), Some(copy)) = (&template.database, &copy) {
            text = text.replace(address, copy);
        }
        fs::write(&configuration, text).unwrap();
        Self::start_in(state, &arguments(module, copy.as_deref()))
    }

    /// Starts one on this pair for the first time: with an empty database, and a ceremony of its
    /// own.
    pub fn start_afresh(module: TestModule, database: TestDatabase) -> Self {
        Self::start_with(&arguments(module, database.create().unwrap().as_deref()))
    }

    /// Starts one for the first time, on the module of this run and on the empty database at this
    /// address.
    pub fn start_at(database: &str) -> Self {
        Self::start_with(&arguments(TestModule::of_environment(), Some(database)))
    }

    /// Starts one for the first time, with these arguments besides state, port and number of
    /// meters.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_in(folder(), &[arguments, &["--meters", "50"]].concat())
    }

    /// Starts one for the first time on this pair, with so many meters in the sample shipment.
    pub fn start_sized(module: TestModule, database: TestDatabase, meters: u64) -> Self {
        let (database, meters) = (database.create().unwrap(), meters.to_string());
        let mut arguments = arguments(module, database.as_deref());
        arguments.extend(["--meters", &meters]);
        Self::start_in(folder(), &arguments)
    }

    fn start_in(state: tempfile::TempDir, arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let (process, printed) = Self::spawn(state.path(), &arguments);
        let nonces = NonceWatch {
            folder: state.path().join(NONCES),
            noted: !arguments.iter().any(|argument| argument == "--module"),
        };
        Self { nonces, state, process, arguments, printed }
    }

    fn spawn(state: &Path, arguments: &[String]) -> (Process, String) {
        Self::spawn_by(state, arguments, None)
    }

    fn spawn_by(state: &Path, arguments: &[String], open_files: Option<u32>) -> (Process, String) {
        let limit = open_files.map_or_else(String::new, |files| format!("ulimit -n {files}; "));
        let mut command = Command::new("sh");
        // A file that may not grow is an error and not a signal: see `limit_files`.
        command.args(["-c", &format!("trap '' XFSZ; {limit}exec \"$@\""), "sh"]).arg(program("kms-dev"));
        let tokens = state.join("softhsm");
        fs::create_dir_all(&tokens).unwrap();
        fs::write(
            state.join("softhsm2.conf"),
            format!("directories.tokendir = {}\nlog.level = ERROR\n", tokens.display()),
        )
        .unwrap();
        command.args(["--listen", "127.0.0.1:0", "--state"]).arg(state).args(arguments);
        command
            .env_remove("HSM_SIM_DIR")
            .env("SOFTHSM2_CONF", state.join("softhsm2.conf"))
            .env(NONCE_WATCH, state.join(NONCES));
        Process::spawn(command, "Ctrl-C ends it")
    }

    /// Its database.
    pub fn database(&self) -> DatabaseLocation {
        match self.arguments.iter().position(|argument| argument == "--database") {
            Some(at) => StoreConfig::parse(&self.arguments[at + 1]).unwrap().database,
            None => DatabaseLocation::Sqlite(self.state.path().join("island.db")),
        }
    }

    /// A look into its database as it stands now.
    pub async fn glance(&self) -> Glance {
        Glance::at(&self.database()).await.unwrap()
    }

    /// The folder.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// From now on no file of the process may be written from this length on (RLIMIT_FSIZE): as if
    /// its disk were full. `unlimited`: as before.
    pub fn limit_files(&self, octets: &str) {
        let status = Command::new("prlimit")
            .args(["--pid", &self.process.0.id().to_string(), &format!("--fsize={octets}:")])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "prlimit (util-linux) failed");
    }

    /// Ends the process as kill -9 does.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends the process as Ctrl-C does, and tells whether it ended well.
    pub fn interrupt(&mut self) -> bool {
        self.process.interrupt()
    }

    /// Starts it again on its folder.
    pub fn restart(&mut self) {
        self.process.kill();
        (self.process, self.printed) = Self::spawn(self.state.path(), &self.arguments);
    }

    /// An identity of the folder.
    pub fn profile(&self, name: &str) -> Profile {
        StateDirectory::new(self.state.path()).profile(name).unwrap()
    }

    /// A connection as this identity.
    pub async fn connect(&self, name: &str) -> Connection {
        Connection::connect(&self.profile(name)).await.unwrap()
    }

    /// Its address.
    pub fn address(&self) -> String {
        self.profile("officer-1").server().to_owned()
    }

    /// Where devices enrol.
    pub fn enrolment_address(&self) -> SocketAddr {
        let (_, after) = self.printed.split_once("handhelds enrol at ").expect("it prints where devices enrol");
        after.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// The memory that the process holds, in octets (VmRSS).
    pub fn resident_octets(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }

    /// Starts it again with these lines under `[limits]` of its configuration.
    pub fn restart_with_limits(&mut self, limits: &str) {
        self.set_limits(limits);
        self.restart();
    }

    fn set_limits(&self, limits: &str) {
        let configuration = self.state.path().join("island/kms-server.toml");
        let text = fs::read_to_string(&configuration).unwrap();
        assert!(!text.contains("[limits]"), "{text}");
        fs::write(&configuration, format!("{text}\n[limits]\n{limits}\n")).unwrap();
    }

    /// Starts it again with so many files that it may have open.
    pub fn restart_with_open_files(&mut self, files: u32) {
        self.process.kill();
        (self.process, self.printed) = Self::spawn_by(self.state.path(), &self.arguments, Some(files));
    }

    /// Adds an officer with a certificate of its own, and connects as this officer. Two of them may
    /// be the same person. One officer alone has added this one, who counts nowhere before two
    /// others confirm it: see [`Self::add_confirmed_officer`].
    pub async fn add_officer(&self, name: &str, person: &str) -> Connection {
        let mut command = Command::new(program("kms"));
        command.arg("--state").arg(self.state()).args(["--profile", "officer-1", "principal", "add"]);
        let output = command.args([&format!("urn:meterkms:dev:officer:{name}"), "--person", person]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.connect(name).await
    }

    /// As [`Self::add_officer`]; then officer-1 proposes to confirm the key, officer-2 approves,
    /// and officer-1 carries it out.
    pub async fn add_confirmed_officer(&self, name: &str, person: &str) -> Connection {
        let added = self.add_officer(name, person).await;
        let request_id = || new_request_id().octets().to_vec().into();
        let known = added.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap().into_inner();
        let propose = proto::ProposePrincipalKeyRequest {
            request_id: request_id(),
            principal: known.principal,
            key_sha256: known.certificates[0].key_sha256.clone(),
            reason: "met in person".to_owned(),
            quorum: None,
        };
        let (one, two) = (self.connect("officer-1").await, self.connect("officer-2").await);
        let proposal = one.principals().propose_principal_key(propose).await.unwrap().into_inner();
        let (proposal_id, content_sha256) = (proposal.proposal_id, proposal.content_sha256);
        let approve = proto::ApproveProposalRequest {
            request_id: request_id(),
            proposal_id: proposal_id.clone(),
            content_sha256,
        };
        two.proposals().approve_proposal(approve).await.unwrap();
        one.proposals()
            .carry_out_proposal(proto::CarryOutProposalRequest { request_id: request_id(), proposal_id })
            .await
            .unwrap();
        added
    }

    /// Starts a second server on the same island: same token, same database, another process.
    /// `edit` may change its configuration.
    pub async fn second(&self, name: &str, edit: impl FnOnce(String) -> String) -> SecondServer {
        let (address, port) = lasting_address();
        let text = fs::read_to_string(self.state.path().join("island/kms-server.toml")).unwrap();
        let text: String = text
            .lines()
            .map(|line| {
                if line.starts_with("listen =") {
                    format!("listen = \"{address}\"\nserver_name = \"{name}\"\n")
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
        let folder = self.state.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        let configuration = self.state.path().join(format!("island/{name}.toml"));
        fs::write(&configuration, edit(text)).unwrap();
        let process = SecondServer::spawn(self.state.path(), &configuration);
        for identity in StateDirectory::new(self.state.path()).profile_names() {
            let target = folder.join("profiles").join(&identity);
            copy_folder(&self.state.path().join("profiles").join(&identity), &target);
            Profile::load(&target).unwrap().set_server(&address.to_string()).unwrap();
        }
        let second = SecondServer { state: self.state.path().to_owned(), configuration, folder, process, _port: port };
        // It listens before its island is open: until then it answers UNAVAILABLE.
        let began = Instant::now();
        let connection = second.connect("officer-1").await;
        while let Err(status) = connection.principals().who_am_i(kms_client::proto::WhoAmIRequest {}).await {
            assert!(began.elapsed() < START_WITHIN, "the second server does not open its island: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        second
    }

    /// A `kms-server` subcommand that finds the token of this island.
    pub fn command(&self, subcommand: &str) -> Command {
        server_command(subcommand, self.state.path())
    }

    /// The simulated meter of a device of the sample shipment. Its challenges come from
    /// `METER_SIM_SEED`.
    pub fn meter(&self, number: usize) -> Meter {
        println!("METER_SIM_SEED={}", meter_sim::challenge_seed());
        let meters = meter_configs(&self.state.path().join("vendor/devices.jsonl"));
        Meter::new(meters.into_iter().nth(number).expect("the sample has fewer devices")).unwrap()
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Every key of the sample in plaintext, as its vendor knows them.
    pub fn plaintext_keys(&self) -> Vec<Vec<u8>> {
        let text = fs::read_to_string(self.state.path().join("vendor/devices.jsonl")).unwrap();
        let mut keys = Vec::new();
        for line in text.lines() {
            let device: serde_json::Value = serde_json::from_str(line).unwrap();
            for (name, value) in device["security_setups"][0].as_object().unwrap() {
                if name != "logical_name" {
                    keys.push(hex::decode(value.as_str().unwrap()).unwrap());
                }
            }
        }
        keys
    }
}

/// I4, whatever a test is about: hsm-sim knows key values, and notes what was protected under which
/// nonce in all processes of an island, before and after they were killed. Looked at when the test
/// is over. SoftHSM2 notes nothing.
struct NonceWatch {
    folder: PathBuf,
    /// Whether the module is the embedded one.
    noted: bool,
}

impl Drop for NonceWatch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let mut notes = hsm_sim::Notes::read(&self.folder).unwrap();
        // What a meter protects is computed by the server to be verified: whether it repeats nonces
        // is the meter's.
        notes.repeated.retain(|nonce| !nonce.iv.starts_with(METERS));
        assert!(notes.repeated.is_empty(), "a nonce was repeated (I4): {:#?}", notes.repeated);
        assert!(!self.noted || self.folder.exists(), "the nonce watcher was off");
    }
}

/// A `kms-server` subcommand that finds the token in the folder of an island.
fn server_command(subcommand: &str, state: &Path) -> Command {
    let mut command = Command::new(program("kms-server"));
    command.arg(subcommand).env("HSM_SIM_DIR", state.join("token")).env("SOFTHSM2_CONF", state.join("softhsm2.conf"));
    command.env(NONCE_WATCH, state.join(NONCES));
    command
}

/// The options of `dev` for module and database.
fn arguments(module: TestModule, database: Option<&str>) -> Vec<&str> {
    let module = (module == TestModule::SoftHsm2).then_some(["--module", SOFTHSM2]);
    let database = database.map(|address| ["--database", address]);
    module.into_iter().chain(database).flatten().collect()
}

/// An island whose ceremony was held, with its meters, and whose server has ended.
struct Template {
    state: tempfile::TempDir,
    database: Option<String>,
}

impl Template {
    fn of(module: TestModule, database: TestDatabase) -> Arc<Self> {
        static TEMPLATES: Mutex<BTreeMap<(TestModule, TestDatabase), Arc<Template>>> = Mutex::new(BTreeMap::new());
        let mut templates = TEMPLATES.lock().unwrap();
        let make = || {
            let database = database.create().unwrap();
            let mut server = DevServer::start_with(&arguments(module, database.as_deref()));
            assert!(server.interrupt(), "the server of the template does not end");
            Arc::new(Self { state: server.state, database })
        };
        templates.entry((module, database)).or_insert_with(make).clone()
    }
}

/// The ordinary meters of a vendor's list of devices with their keys in plaintext, as `kms shipment
/// make-sample` writes it.
pub fn meter_configs(devices: &Path) -> Vec<MeterConfig> {
    let text = fs::read_to_string(devices).unwrap();
    text.lines()
        .map(|line| {
            let device: Device = serde_json::from_str(line).unwrap();
            let setup = device.security_setups.into_iter().next().unwrap();
            MeterConfig::ordinary(device.system_title, device.security_suite, setup)
        })
        .collect()
}

/// Another server process on the island of a [`DevServer`], at an address that stays when it is
/// started again.
pub struct SecondServer {
    state: PathBuf,
    configuration: PathBuf,
    folder: PathBuf,
    process: Process,
    _port: fs::File,
}

impl SecondServer {
    fn spawn(state: &Path, configuration: &Path) -> Process {
        let mut command = server_command("run", state);
        command.arg("--config").arg(configuration);
        Process::spawn(command, "listening").0
    }

    /// Starts it again. It listens then; its island may not be open yet.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = Self::spawn(&self.state, &self.configuration);
    }

    /// Runs `kms` against it as this identity: what it printed.
    ///
    /// # Panics
    /// The command failed.
    pub fn kms(&self, identity: &str, arguments: &[&str]) -> String {
        self.kms_ends(identity, arguments, 0)
    }

    /// The same, where the command must end with this exit code.
    pub fn kms_ends(&self, identity: &str, arguments: &[&str], code: i32) -> String {
        let output = kms(&self.folder, identity, arguments);
        let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
        assert!(
            output.status.code() == Some(code),
            "kms {arguments:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// A connection as this identity.
    pub async fn connect(&self, name: &str) -> Connection {
        Connection::connect(&Profile::load(self.folder.join("profiles").join(name)).unwrap()).await.unwrap()
    }

    /// Ends the process as kill -9 does.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// The title of a device of the sample shipment, from 0.
pub fn title(number: u64) -> SystemTitle {
    SystemTitle::parse(&format!("4B414D{:010X}", number + 1)).unwrap()
}

/// Terms to read under the head-end's client title.
pub fn terms(counters: u32) -> SessionTerms {
    SessionTerms {
        purpose: Purpose::Read.into(),
        client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
        counters,
        ..SessionTerms::default()
    }
}

/// A session with one meter.
pub async fn open(
    connection: &Connection,
    profile: &Profile,
    meter: SystemTitle,
    counters: u32,
) -> Result<Session, SessionError> {
    connection
        .open_session(
            &profile.transport_key().unwrap(),
            new_request_id(),
            meter,
            terms(counters),
            &TestModule::of_environment().open_options(),
        )
        .await
}

/// Puts a meter on a loopback port.
pub async fn put_on_line(meter: &Meter) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, MeterDirectory::One(meter.clone()), ServeOptions::default()));
    address
}

/// Associates with a meter under the keys of a session, with the first counters of its lease, and
/// reads the energy register.
pub async fn read_energy(address: SocketAddr, session: &Session, meter: SystemTitle) -> Result<Data, meter_sim::Error> {
    let keys = session.keys.meter(meter).unwrap();
    let key = |name| SymmetricKey::new(keys.key(name).unwrap().key.expose()).unwrap();
    let counters = keys.counters.as_ref().unwrap();
    let lease: Vec<u32> = (0..5).map(|_| counters.allocate().unwrap()).collect();
    let mut client = ClientSession::new(ClientConfig {
        client_title: meter_sim::SystemTitle::new(hex::decode(CLIENT_TITLE).unwrap().try_into().unwrap()),
        suite: meter_sim::SecuritySuite::default(),
        keys: Ciphering { encryption: key(kms_client::KeyType::GUEK), authentication: key(kms_client::KeyType::GAK) },
        dedicated_key: None,
        counters: lease[0]..=lease[4],
        general_ciphering: false,
    })?;
    let mut connection = ClientConnection::connect(address, 1, 1, Duration::from_secs(10)).await?;
    connection.associate(&mut client).await?;
    let energy = AttributeDescriptor { class: CLASS_REGISTER, instance: "1.0.1.8.0.255".parse()?, attribute: 2 };
    let value = connection.get(&mut client, energy).await?;
    connection.release(&mut client).await?;
    Ok(value)
}

/// What `kms` comes to as this identity of a state folder.
pub fn kms(state: &Path, identity: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("kms"));
    command.arg("--state").arg(state).args(["--profile", identity]).args(arguments).stdin(Stdio::null());
    command.env_remove("KMS_PROFILE").env_remove("KMS_STATE").output().unwrap()
}

/// An id of JSON output, 32 hex digits, as `kms` takes it.
pub fn uuid(id: &str) -> String {
    format!("{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]).to_lowercase()
}

/// The shipped policies and one more: a folder of the state folder.
pub fn policies_with(state: &Path, policy: &str) -> String {
    let policies = state.join("policies");
    fs::create_dir(&policies).unwrap();
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../policies")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cedar") {
            fs::copy(&path, policies.join(path.file_name().unwrap())).unwrap();
        }
    }
    fs::write(policies.join("site.cedar"), policy).unwrap();
    policies.display().to_string()
}

/// A program of this workspace, in the folder above that of the test program.
pub fn program(name: &str) -> PathBuf {
    let folder = env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let path = folder.join(name);
    assert!(path.exists(), "`{}` is missing: build it first with `cargo build --release --workspace`", path.display());
    path
}

#[derive(serde::Deserialize)]
struct Device {
    system_title: meter_sim::SystemTitle,
    security_suite: meter_sim::SecuritySuite,
    security_setups: Vec<SecuritySetupConfig>,
}

/// A child process that does not outlive its test.
struct Process(Child);

impl Process {
    /// Starts it and waits for a line with `ready`; what it printed until then.
    fn spawn(mut command: Command, ready: &str) -> (Self, String) {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (lines, printed) = mpsc::channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let lines = lines.clone();
            // Reads on after the test has seen enough, so that the process never blocks on a full
            // pipe.
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let _ = lines.send(line);
                }
            });
        }
        drop(lines);
        let mut process = Self(child);
        let mut text = String::new();
        let began = Instant::now();
        loop {
            match printed.recv_timeout(START_WITHIN.saturating_sub(began.elapsed())) {
                Ok(line) => {
                    text.push_str(&line);
                    text.push('\n');
                    if line.contains(ready) {
                        return (process, text);
                    }
                }
                Err(_) => {
                    process.kill();
                    panic!("the server was not ready; it printed:\n{text}");
                }
            }
        }
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    fn interrupt(&mut self) -> bool {
        let sent =
            Command::new("kill").arg("-INT").arg(self.0.id().to_string()).status().is_ok_and(|status| status.success());
        let began = Instant::now();
        while began.elapsed() < STOP_WITHIN {
            if let Ok(Some(status)) = self.0.try_wait() {
                return sent && status.success();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An address that stays this test's own between the starts of a server: its port is none that the
/// system gives out by itself, and a file that is locked as long as it is held keeps other tests
/// from it.
fn lasting_address() -> (SocketAddr, fs::File) {
    let folder = std::env::temp_dir().join("kms-test-ports");
    fs::create_dir_all(&folder).unwrap();
    for port in LASTING_PORTS {
        let lock = fs::File::create(folder.join(port.to_string())).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if lock.try_lock().is_ok() && TcpListener::bind(address).is_ok() {
            return (address, lock);
        }
    }
    panic!("no port is free");
}

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("kms-dev-").tempdir().unwrap()
}

fn path(folder: &tempfile::TempDir) -> &str {
    folder.path().to_str().unwrap()
}

/// With all that is in it, and with its mode.
fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy_folder(&entry, &target);
        } else {
            fs::copy(entry, target).unwrap();
        }
    }
}

/// Where hsm-sim notes the nonces of an island.
const NONCES: &str = "nonces";
/// How system titles of the samples' meters begin: `KAM`, in hexadecimal.
const METERS: &str = "4b414d";
const NONCE_WATCH: &str = "HSM_SIM_NONCE_WATCH";

/// Below those that Linux gives out by itself (from 32,768).
const LASTING_PORTS: std::ops::Range<u16> = 21_000..31_000;
// Far more than it takes on a busy machine: they are there so that what never happens is told.
const START_WITHIN: Duration = Duration::from_secs(300);
const STOP_WITHIN: Duration = Duration::from_secs(120);
