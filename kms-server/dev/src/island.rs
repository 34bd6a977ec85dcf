//! `kms-dev`: a whole development island on one machine, made and served in one step. It also reads
//! a meter once through the public interface.
//!
//! Ceremony, import and session use the same code and the same RPCs as production. This program
//! acts for the people: it keeps the identities of officers, head-end and vendor in one folder. So
//! such an island is marked, and a production server refuses it.

mod show;

use std::{
    env, fs,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der},
    rsa::{KeySize, PrivateDecryptingKey},
};
use kms_client::{
    Connection, KeyRequest, NewProfile, OpenOptions, Profile, StateDirectory, new_request_id,
    proto::{
        AddPrincipalRequest, GetVendorTransportKeyRequest, ImportShipmentRequest, RegisterTransportKeyRequest,
        Shipment, UploadShipmentRequest, UploadShipmentStart,
    },
    sample::{SampleShipment, VendorKey, VendorTransportKey},
};
use kms_domain::{FlagId, IslandKind, IslandName, OaepHash, PersonName, PrincipalId, Role, SystemTitle};
use kms_hsm::TokenSelector;
use kms_store::StoreConfig;
use tokio::sync::oneshot;

use crate::Failure;
use kms_config::{Config, EnrolmentSection, SecretSource};
use kms_server::server::Server;
use kms_service::profiles::Profiles;
use kms_service::{
    certificate::request::CertificationRequest,
    escrow::{Custodian, Quorum},
    init::{CeremonyPlan, CeremonyToken, FirstPrincipal, Storage},
};

/// The settings of a development island.
#[derive(Clone, Debug)]
pub(crate) struct DevSettings {
    /// The folder of the island.
    pub(crate) state: PathBuf,
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// Where devices enrol.
    pub(crate) enrolment: SocketAddr,
    /// The database, as a `postgres://` address, where it is not SQLite in the folder. Only at the
    /// first start.
    pub(crate) database: Option<String>,
    /// Meters of the sample shipment. Only at the first start.
    pub(crate) meters: u64,
    /// Another PKCS#11 module than the embedded one. Only at the first start.
    pub(crate) module: Option<PathBuf>,
}

/// Makes the island if it does not exist, serves it until `stop` ends, and reads a meter once.
///
/// # Errors
/// The reason, as text.
pub(crate) async fn run(settings: DevSettings, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), Failure> {
    let (listen, enrolment) = (settings.listen, settings.enrolment);
    let state = State::open(settings)?;
    state.enter_token_directory()?;
    let began = Instant::now();
    println!("A development island in {} (not for real keys)\n", state.root.display());
    if !state.configuration().exists() {
        state.hold_ceremony(listen).await?;
        done("ceremony", "token, roots, escrow 2 of 3, certification authority, first identities", began);
    }

    let mut config = Config::load(&state.configuration())?;
    config.listen = listen;
    config.enrolment = Some(EnrolmentSection { listen: enrolment, server: None });
    for token in config.hsm.tokens.iter_mut().filter(|token| token.module.ends_with(MODULE)) {
        // A new build may have its module in another place.
        token.module = module()?;
    }
    let embedded = config.hsm.tokens.iter().all(|token| token.module.ends_with(MODULE));
    let server = Server::start(config).await?;
    let address = server.local_addr()?;
    let enrolment = server.enrolment_addr().unwrap_or(enrolment);
    let mut opened = server.opened();
    let (end, ended) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async move {
        tokio::select! {
            () = stop => {}
            _ = ended => {}
        }
    }));
    let began = Instant::now();
    if !matches!(tokio::time::timeout(OPEN_WITHIN, opened.wait_for(Option::is_some)).await, Ok(Ok(_))) {
        let _ = end.send(());
        serving.await??;
        return Err(
            format!("the island did not open within {} s; the log above tells why", OPEN_WITHIN.as_secs()).into()
        );
    }
    done("server", &format!("serving on {address}, mTLS 1.3 only; handhelds enrol at {enrolment}"), began);

    // If this fails, the error is printed and the island still serves, so that it can be examined.
    let mut end = Some(end);
    if let Err(error) = state.populate_and_show(address, embedded).await {
        eprintln!("\nkms-dev: {error}");
        if !serving.is_finished() {
            println!("\nThe server goes on serving on {address}. Ctrl-C ends it.");
        }
    } else {
        state.tell_what_next(address);
    }
    let outcome = serving.await?;
    drop(end.take());
    println!("stopped");
    Ok(outcome?)
}

/// The folder of the island.
struct State {
    root: PathBuf,
    settings: DevSettings,
}

impl State {
    fn open(settings: DevSettings) -> Result<Self, Failure> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = &settings.state;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| format!("cannot make the folder `{}`: {error}", path.display()))?;
        Ok(Self { root: path.canonicalize()?, settings })
    }

    fn configuration(&self) -> PathBuf {
        self.root.join("island/kms-server.toml")
    }

    /// Starts this program again with the module's directory in its environment, where the module
    /// looks for it.
    fn enter_token_directory(&self) -> Result<(), Failure> {
        let directory = self.root.join("token");
        if env::var_os(TOKEN_DIRECTORY).is_some_and(|set| Path::new(&set) == directory) {
            return Ok(());
        }
        let error =
            Command::new(env::current_exe()?).args(env::args_os().skip(1)).env(TOKEN_DIRECTORY, &directory).exec();
        Err(format!("cannot start again with {TOKEN_DIRECTORY} set: {error}").into())
    }

    async fn hold_ceremony(&self, listen: SocketAddr) -> Result<(), Failure> {
        let island = IslandName::parse(ISLAND)?;
        let mut principals = Vec::new();
        let mut requests = Vec::new();
        for (name, role, person) in IDENTITIES {
            let id = PrincipalId::new(island.clone(), role, name)?;
            let request = KeyRequest::generate(&id)?;
            principals.push(FirstPrincipal {
                id: id.clone(),
                person: person.map(PersonName::parse).transpose()?,
                certification: CertificationRequest::parse(request.certificate_request())?,
                client_titles: client_titles(role)?,
            });
            requests.push((name, id, request));
        }
        let secrets = self.root.join("secrets");
        fs::create_dir_all(&secrets)?;
        let plan = CeremonyPlan {
            island,
            kind: IslandKind::Development,
            server_names: vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
            token: CeremonyToken {
                module: self.settings.module.clone().map_or_else(module, Ok)?,
                selector: TokenSelector { label: TOKEN.to_owned(), serial: None },
                pin: SecretSource::File(secrets.join("pin")),
                so_pin: SecretSource::File(secrets.join("so-pin")),
                initialise: true,
            },
            copies: Vec::new(),
            quorum: Quorum::new(2, CUSTODIANS.len())?,
            custodians: self.custodians()?,
            principals,
            storage: self.storage()?,
        };
        let held = plan.hold(&self.root.join("island")).await?;
        let root = pem("CERTIFICATE", &held.root);
        let states = StateDirectory::new(&self.root);
        for ((name, id, request), certificate) in requests.iter().zip(&held.certificates) {
            let new = NewProfile {
                server: &NewProfile::address(listen),
                server_name: "localhost",
                principal: id,
                ca_pem: &root,
                certificate_pem: &certificate.pem(),
                key_pem: request.key_pem(),
            };
            Profile::create(states.profile_directory(name), &new)?;
        }
        states.set_default_profile(OFFICER)?;
        Ok(())
    }

    fn storage(&self) -> Result<Storage, Failure> {
        let Some(address) = &self.settings.database else { return Ok(Storage::sqlite(self.root.join("island.db"))) };
        Ok(Storage {
            store: StoreConfig::parse(address)?,
            section: format!("[storage.postgres]\nurl = {}\n", toml::Value::String(address.clone())),
        })
    }

    /// Three custodians. In production their keys are on the cards of three people.
    fn custodians(&self) -> Result<Vec<Custodian>, Failure> {
        let folder = self.root.join("custodians");
        fs::create_dir_all(&folder)?;
        let mut custodians = Vec::new();
        for name in CUSTODIANS {
            let private = folder.join(format!("{name}.key"));
            let public = folder.join(format!("{name}.der"));
            if !public.exists() {
                let key =
                    PrivateDecryptingKey::generate(KeySize::Rsa3072).map_err(|_| "cannot make a custodian's key")?;
                let pkcs8: Pkcs8V1Der<'_> = key.as_der().map_err(|_| "cannot encode a custodian's key")?;
                let spki: PublicKeyX509Der<'_> =
                    key.public_key().as_der().map_err(|_| "cannot encode a custodian's key")?;
                write_private(&private, pem("PRIVATE KEY", pkcs8.as_ref()).as_bytes())?;
                fs::write(&public, spki.as_ref())?;
            }
            custodians.push(Custodian::new(name, &fs::read(&public)?)?);
        }
        Ok(custodians)
    }

    /// What people do after a ceremony, by RPC: register keys, import a shipment. Then reads a
    /// meter.
    async fn populate_and_show(&self, address: SocketAddr, embedded: bool) -> Result<(), Failure> {
        let states = StateDirectory::new(&self.root);
        for name in states.profile_names() {
            // The server may listen at another address than last time.
            let profile = states.profile(&name)?;
            if profile.server() != NewProfile::address(address) {
                profile.set_server(&NewProfile::address(address))?;
            }
        }
        let head_end = states.profile(HEAD_END)?;
        for name in [HEAD_END, HANDHELD] {
            register_transport_key(&states.profile(name)?).await?;
        }
        let officer = Connection::connect(&states.profile(OFFICER)?).await?;
        self.import_sample(&officer).await?;
        // A module without the X9.63 KDF uses the algorithm that is not for production: permitted
        // on a development island.
        let options = if embedded { OpenOptions::new() } else { OpenOptions::new().allow_cbc_expand() };
        show::main_job(&head_end, &self.root.join("vendor/devices.jsonl"), SystemTitle::parse(CLIENT_TITLE)?, &options)
            .await
    }

    async fn import_sample(&self, officer: &Connection) -> Result<(), Failure> {
        let vendor = self.root.join("vendor");
        fs::create_dir_all(&vendor)?;
        let (file, signature, devices) =
            (vendor.join("shipment.jsonl"), vendor.join("shipment.jsonl.sig"), vendor.join("devices.jsonl"));
        let manufacturer = PrincipalId::new(IslandName::parse(ISLAND)?, Role::Manufacturer, "kam")?;
        if !signature.exists() {
            let key = VendorKey::generate()?;
            write_private(&vendor.join("signing.key"), key.private_pem().as_bytes())?;
            let request = AddPrincipalRequest {
                request_id: new_request_id().octets().to_vec().into(),
                principal: manufacturer.to_string(),
                shipment_key: key.public_der()?.into(),
                ..AddPrincipalRequest::default()
            };
            officer.principals().add_principal(request).await.map_err(refused("registering the vendor"))?;
            let transport = officer
                .shipments()
                .get_vendor_transport_key(GetVendorTransportKeyRequest {})
                .await
                .map_err(refused("fetching the vendor transport key"))?
                .into_inner();
            let profiles = Profiles::load(None)?;
            let profile = profiles
                .get(&kms_domain::DeviceProfileName::parse(PROFILE)?)
                .ok_or("the device profile of the sample is missing")?
                .clone();
            let mut sample = SampleShipment::new("KAM-2026-0001", FlagId::parse("KAM")?, profile, self.settings.meters);
            sample.oaep_hash = OaepHash::parse(transport.oaep_hashes.first().ok_or("the HSM opens no batch keys")?)?;
            let mut plain = private_file(&devices)?;
            let signed = sample.write(
                &VendorTransportKey::from_der(&transport.spki)?,
                &key,
                &mut fs::File::create(&file)?,
                Some(&mut plain),
                &mut |_| {},
            )?;
            // Last: its presence says that the vendor's files are complete.
            fs::write(&signature, signed)?;
        }
        let began = Instant::now();
        let octets = fs::read(&file)?;
        let digest: [u8; 32] = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &octets).as_ref().try_into()?;
        let start = UploadShipmentStart {
            file_sha256: digest.to_vec().into(),
            file_length: u64::try_from(octets.len())?,
            signature: fs::read(&signature)?.into(),
            manufacturer: manufacturer.to_string(),
        };
        let mut messages = vec![UploadShipmentRequest { start: Some(start), ..UploadShipmentRequest::default() }];
        for (number, chunk) in octets.chunks(UPLOAD_CHUNK).enumerate() {
            messages.push(UploadShipmentRequest {
                start: None,
                offset: u64::try_from(number * UPLOAD_CHUNK)?,
                octets: chunk.to_vec().into(),
            });
        }
        let known = officer
            .shipments()
            .list_shipments(kms_client::proto::ListShipmentsRequest {})
            .await
            .map_err(refused("listing shipments"))?
            .into_inner();
        if known
            .shipments
            .iter()
            .any(|shipment| shipment.file_sha256 == digest.as_slice() && shipment.state == "imported")
        {
            return Ok(());
        }
        officer
            .shipments()
            .upload_shipment(futures::stream::iter(messages))
            .await
            .map_err(refused("sending the shipment"))?;
        let head_end = PrincipalId::new(IslandName::parse(ISLAND)?, Role::HeadEnd, HEAD_END)?;
        let request = ImportShipmentRequest { file_sha256: digest.to_vec().into(), head_end: head_end.to_string() };
        let mut answers =
            officer.shipments().import_shipment(request).await.map_err(refused("importing the shipment"))?.into_inner();
        let mut last = Shipment::default();
        while let Some(answer) = answers.message().await.map_err(refused("importing the shipment"))? {
            last = answer.shipment.unwrap_or(last);
        }
        if last.state != "imported" {
            return Err(format!("the sample shipment was not imported: {}", last.refusal).into());
        }
        done(
            "shipment",
            &format!("{} meters of a vendor imported, {} lines refused", last.imported + last.unchanged, last.refused),
            began,
        );
        Ok(())
    }

    fn tell_what_next(&self, address: SocketAddr) {
        let state =
            if self.root.ends_with(".kms") { String::new() } else { format!(" --state {}", self.root.display()) };
        println!(
            "
Try next, in another terminal:

    cargo build --release --config tests/build.toml --bin kms
    target/release/kms{state} meter list
    target/release/kms{state} --profile {HEAD_END} session open 4B414D0000000002 --client-title {CLIENT_TITLE}
    target/release/kms{state} audit list
    target/release/kms{state} hsm check
    target/release/kms{state} --help

Identities are in {}/profiles. Serving on {address}; Ctrl-C ends it.",
            self.root.display()
        );
    }
}

async fn register_transport_key(profile: &Profile) -> Result<(), Failure> {
    if profile.has_transport_key() {
        return Ok(());
    }
    let connection = Connection::connect(profile).await?;
    let principal = connection
        .principals()
        .who_am_i(kms_client::proto::WhoAmIRequest {})
        .await
        .map_err(refused("asking who it is"))?
        .into_inner()
        .principal;
    let request = KeyRequest::generate(&PrincipalId::parse(&principal)?)?;
    let message = RegisterTransportKeyRequest {
        request_id: new_request_id().octets().to_vec().into(),
        certificate_request: request.certificate_request().to_vec().into(),
    };
    let issued = connection
        .principals()
        .register_transport_key(message)
        .await
        .map_err(refused("registering a transport key"))?
        .into_inner();
    profile.set_transport_key(request.key_pem(), &KeyRequest::certificate_pem(&issued))?;
    Ok(())
}

/// The client titles of a role here.
fn client_titles(role: Role) -> Result<Vec<SystemTitle>, Failure> {
    Ok(match role {
        Role::HeadEnd => vec![SystemTitle::parse(CLIENT_TITLE)?],
        Role::Handheld => vec![SystemTitle::parse("4D4D4D00000000F1")?],
        _ => Vec::new(),
    })
}

/// The module that cargo builds along with this program.
fn module() -> Result<PathBuf, Failure> {
    let program = env::current_exe()?;
    let folder = program.parent().ok_or("this program has no folder")?;
    let places = [folder.join(MODULE), folder.join("deps").join(MODULE), folder.join("..").join(MODULE)];
    // The newest: `cargo test` builds the module below `deps` only, and leaves an older one beside
    // the program.
    let built = |place: &PathBuf| Some((place.metadata().ok()?.modified().ok()?, place.canonicalize().ok()?));
    let found = places.iter().filter_map(built).max_by_key(|(modified, _)| *modified).map(|(_, place)| place);
    found.ok_or_else(|| {
        format!(
            "`{MODULE}` is not beside this program in `{}`; build it with `cargo build --release -p hsm-sim`",
            folder.display()
        )
        .into()
    })
}

fn refused(doing: &'static str) -> impl FnOnce(tonic::Status) -> Failure {
    move |status| format!("{doing}: {} ({})", status.message(), status.code()).into()
}

fn done(what: &str, detail: &str, since: Instant) {
    println!("  {what:<10} {detail:<82} {:>6.2} s", since.elapsed().as_secs_f64());
    let _ = io::stdout().flush();
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> =
        (0..text.len()).step_by(64).filter_map(|at| text.get(at..(at + 64).min(text.len()))).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn private_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn write_private(path: &Path, octets: &[u8]) -> io::Result<()> {
    private_file(path)?.write_all(octets)
}

const TOKEN_DIRECTORY: &str = "HSM_SIM_DIR";
const MODULE: &str = "libhsm_sim.so";
const ISLAND: &str = "dev";
const TOKEN: &str = "dev";
const PROFILE: &str = "generic-suite0";
const UPLOAD_CHUNK: usize = 256 * 1024;
const CLIENT_TITLE: &str = "4D4D4D0000000001";
const HEAD_END: &str = "head-end";
const OFFICER: &str = "officer-1";
const HANDHELD: &str = "handheld";
const CUSTODIANS: [&str; 3] = ["custodian-1", "custodian-2", "custodian-3"];
const IDENTITIES: [(&str, Role, Option<&str>); 6] = [
    (HEAD_END, Role::HeadEnd, None),
    (OFFICER, Role::Officer, Some("Ada Officer")),
    ("officer-2", Role::Officer, Some("Bo Officer")),
    ("auditor", Role::Auditor, Some("Cy Auditor")),
    (HANDHELD, Role::Handheld, Some("Ida Technician")),
    ("workforce", Role::ServiceAccount, None),
];
const OPEN_WITHIN: Duration = Duration::from_secs(60);
