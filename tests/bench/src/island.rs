//! An island to be measured: made by the ceremony, served by `kms-server run`, peopled through the
//! public interface. Nothing here is a short cut.

use std::{
    env,
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rsa::{KeySize, PrivateDecryptingKey},
};
use bytes::Bytes;
use kms_client::{
    Connection, KeyRequest, NewProfile, OpenOptions, PrincipalId, Profile, StateDirectory, SystemTitle, TransportKey,
    new_request_id,
    proto::{AddPrincipalRequest, RegisterTransportKeyRequest, WhoAmIRequest},
    sample::VendorKey,
};
use sqlx::{Connection as _, Row as _, sqlite::SqliteConnectOptions};

use crate::{Failure, measure::Load, module::Module};

/// A running server with its island, and the identities that the measuring needs.
pub(crate) struct Island {
    pub(crate) directory: PathBuf,
    pub(crate) officer: Connection,
    pub(crate) head_end: HeadEnd,
    /// Another one, with meters of its own, that floods the server.
    pub(crate) flooder: HeadEnd,
    pub(crate) vendor: VendorKey,
    pub(crate) load: Load,
    server: Child,
}

/// The head-end that asks for keys: few connections, as a head-end has.
pub(crate) struct HeadEnd {
    pub(crate) connections: Vec<Connection>,
    pub(crate) key: TransportKey,
    pub(crate) client_title: SystemTitle,
    /// SoftHSM only has the development algorithm of envelopes.
    pub(crate) options: OpenOptions,
}

/// How large the database is, in octets.
#[derive(Clone, Copy)]
pub(crate) struct DatabaseSize {
    /// All pages, free ones too.
    pub(crate) file: f64,
    /// Pages in use.
    pub(crate) used: f64,
}

impl Island {
    /// Holds the ceremony, starts the server, and registers vendor and head-end.
    pub(crate) async fn make(module: Module, directory: &Path) -> Result<Self, Failure> {
        let directory = directory.to_owned();
        let environment = module.environment(&directory)?;
        let officer_id = PrincipalId::parse(OFFICER)?;
        let officer = KeyRequest::generate(&officer_id)?;
        fs::write(directory.join("officer.csr"), pem_text("CERTIFICATE REQUEST", officer.certificate_request()))?;
        for custodian in CUSTODIANS {
            let key = PrivateDecryptingKey::generate(KeySize::Rsa3072).map_err(|_| "cannot make a custodian's key")?;
            let public: PublicKeyX509Der<'_> =
                key.public_key().as_der().map_err(|_| "cannot encode a custodian's key")?;
            fs::write(directory.join(format!("{custodian}.pem")), pem_text("PUBLIC KEY", public.as_ref()))?;
        }
        let ceremony = directory.join("ceremony.toml");
        fs::write(&ceremony, ceremony_file(&module.path()?))?;
        let state = directory.join("island");
        let output = server_program()?
            .args(["init", "--ceremony"])
            .arg(&ceremony)
            .arg("--state")
            .arg(&state)
            .envs(environment.clone())
            .output()?;
        if !output.status.success() {
            return Err(format!(
                "the ceremony with {} failed: {}",
                module.name(),
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }

        let address = free_address()?;
        let configuration = state.join("kms-server.toml");
        let text = fs::read_to_string(&configuration)?.replace("127.0.0.1:7443", &address.to_string());
        fs::write(&configuration, text)?;
        let log = directory.join("server.log");
        let mut command = server_program()?;
        command
            .args(["run", "--config"])
            .arg(&configuration)
            .envs(environment)
            .env("KMS_LOG", "warn")
            .stdin(Stdio::null());
        let mut server =
            command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).spawn()?;

        let root = fs::read_to_string(state.join("root.pem"))?;
        let profiles = StateDirectory::new(&directory);
        let profile = |name: &str, principal: &PrincipalId, certificate_pem: &str, key_pem: &str| {
            let address = NewProfile::address(address);
            let new = NewProfile {
                server: &address,
                server_name: "localhost",
                principal,
                ca_pem: &root,
                certificate_pem,
                key_pem,
            };
            Profile::create(profiles.profile_directory(name), &new)
        };
        let certificate = fs::read_to_string(state.join("principals/officer-officer-1.pem"))?;
        let connected = connect(&profile("officer", &officer_id, &certificate, officer.key_pem())?, &mut server).await;
        let officer = match connected {
            Ok(officer) => officer,
            Err(error) => {
                let _ = server.kill();
                return Err(
                    format!("{error}; the server said: {}", fs::read_to_string(&log).unwrap_or_default()).into()
                );
            }
        };
        let vendor = VendorKey::generate()?;
        add(
            &officer,
            AddPrincipalRequest {
                principal: MANUFACTURER.to_owned(),
                shipment_key: vendor.public_der()?.into(),
                ..AddPrincipalRequest::default()
            },
        )
        .await?;
        let head_end = HeadEnd::register(&officer, &profile, module, HEAD_END, CLIENT_TITLE, CONNECTIONS).await?;
        let flooder = HeadEnd::register(&officer, &profile, module, FLOODER, FLOODER_TITLE, FLOOD_CONNECTIONS).await?;
        let load = Load { server: server.id() };
        Ok(Self { directory, officer, head_end, flooder, vendor, load, server })
    }

    /// The size of the database as its last commit left it.
    pub(crate) async fn database_size(&self) -> Result<DatabaseSize, Failure> {
        let options = SqliteConnectOptions::new().filename(self.directory.join("island/island.db")).read_only(true);
        let mut connection = sqlx::SqliteConnection::connect_with(&options).await?;
        let row = sqlx::query("SELECT page_count, freelist_count, page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size")
            .fetch_one(&mut connection)
            .await?;
        let [pages, free, octets]: [i64; 3] = [row.try_get(0)?, row.try_get(1)?, row.try_get(2)?];
        connection.close().await?;
        Ok(DatabaseSize { file: (pages * octets) as f64, used: ((pages - free) * octets) as f64 })
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl HeadEnd {
    async fn register(
        officer: &Connection,
        profile: impl Fn(&str, &PrincipalId, &str, &str) -> Result<Profile, kms_client::ProfileError>,
        module: Module,
        name: &str,
        client_title: &str,
        connection_count: usize,
    ) -> Result<Self, Failure> {
        let id = PrincipalId::parse(name)?;
        let client_title = SystemTitle::parse(client_title)?;
        let request = KeyRequest::generate(&id)?;
        let certificate_request = request.certificate_request().to_vec().into();
        let issued = add(
            officer,
            AddPrincipalRequest {
                principal: name.to_owned(),
                certificate_request,
                client_titles: vec![client_title.octets().to_vec().into()],
                ..AddPrincipalRequest::default()
            },
        )
        .await?;
        let profile = profile(id.name(), &id, &KeyRequest::chain_pem(&issued), request.key_pem())?;
        let mut connections = Vec::with_capacity(connection_count);
        for _ in 0..connection_count {
            connections.push(Connection::connect(&profile).await?);
        }
        let transport = KeyRequest::generate(&id)?;
        let message = RegisterTransportKeyRequest {
            request_id: request_id(),
            certificate_request: transport.certificate_request().to_vec().into(),
        };
        let issued = connections
            .first()
            .ok_or("no connection")?
            .principals()
            .register_transport_key(message)
            .await?
            .into_inner();
        profile.set_transport_key(transport.key_pem(), &KeyRequest::certificate_pem(&issued))?;
        let options = match module {
            Module::HsmSim => OpenOptions::new(),
            Module::Softhsm2 => OpenOptions::new().allow_cbc_expand(),
        };
        Ok(Self { connections, key: profile.transport_key()?, client_title, options })
    }

    /// One of the connections, in turn.
    pub(crate) fn connection(&self, turn: u64) -> Result<&Connection, Failure> {
        let at = usize::try_from(turn)? % self.connections.len().max(1);
        self.connections.get(at).ok_or_else(|| "no connection".into())
    }
}

/// The system title of the meter with this number, from 1.
pub(crate) fn title(number: u64) -> [u8; 8] {
    let mut title = number.to_be_bytes();
    title.iter_mut().zip(FLAG_ID.bytes()).for_each(|(octet, letter)| *octet = letter);
    title
}

/// A fresh request id, as messages have it.
pub(crate) fn request_id() -> Bytes {
    new_request_id().octets().to_vec().into()
}

async fn add(
    officer: &Connection,
    request: AddPrincipalRequest,
) -> Result<kms_client::proto::PrincipalCertificate, Failure> {
    Ok(officer
        .principals()
        .add_principal(AddPrincipalRequest { request_id: request_id(), ..request })
        .await?
        .into_inner())
}

/// Connects as soon as the server has opened its island.
async fn connect(profile: &Profile, server: &mut Child) -> Result<Connection, Failure> {
    let begun = Instant::now();
    loop {
        let error: Failure = match Connection::connect(profile).await {
            Ok(connection) => match connection.principals().who_am_i(WhoAmIRequest {}).await {
                Ok(_) => return Ok(connection),
                Err(status) => status.into(),
            },
            Err(error) => error.into(),
        };
        if let Some(status) = server.try_wait()? {
            return Err(format!("the server ended ({status})").into());
        }
        if begun.elapsed() > OPEN_WITHIN {
            return Err(format!("the server did not open its island: {error}").into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn server_program() -> Result<Command, Failure> {
    let program = env::current_exe()?.with_file_name("kms-server");
    if !program.exists() {
        return Err(
            format!("`{}` is missing; build it with `cargo build --release -p kms-server`", program.display()).into()
        );
    }
    Ok(Command::new(program))
}

fn ceremony_file(module: &Path) -> String {
    let custodians: String = CUSTODIANS
        .iter()
        .map(|name| format!("[[escrow.custodian]]\nname = \"{name}\"\npublic_key = \"{name}.pem\"\n"))
        .collect();
    format!(
        "island = \"bench\"\n\
         # For development: SoftHSM2 has only the algorithm of envelopes that is not for production.\n\
         kind = \"development\"\n\
         [server]\nnames = [\"localhost\"]\n\
         [token]\nmodule = \"{module}\"\nlabel = \"bench\"\npin = {{ file = \"pin\" }}\nso_pin = {{ file = \"so-pin\" }}\ninitialise = true\n\
         [escrow]\nneeded = 2\n{custodians}\
         [[officer]]\nname = \"officer-1\"\nperson = \"Ada Officer\"\ncertificate_request = \"officer.csr\"\n",
        module = module.display()
    )
}

fn pem_text(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// The vendor of all meters here.
pub(crate) const FLAG_ID: &str = "KAM";
pub(crate) const MANUFACTURER: &str = "urn:meterkms:bench:manufacturer:kam";
pub(crate) const HEAD_END: &str = "urn:meterkms:bench:head-end:hes";
pub(crate) const FLOODER: &str = "urn:meterkms:bench:head-end:flooder";
const OFFICER: &str = "urn:meterkms:bench:officer:officer-1";
const CLIENT_TITLE: &str = "4D4D4D0000000001";
const FLOODER_TITLE: &str = "4D4D4D0000000002";
const CUSTODIANS: [&str; 2] = ["custodian-1", "custodian-2"];
const CONNECTIONS: usize = 2;
/// Of the principal that floods.
const FLOOD_CONNECTIONS: usize = 3;
const OPEN_WITHIN: Duration = Duration::from_secs(60);
