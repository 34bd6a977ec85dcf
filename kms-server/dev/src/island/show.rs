//! The main job, once, shown step by step: a head-end gets a session with one meter and reads it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
    time::{Duration, Instant},
};

use kms_client::{
    Connection, KeyType, OpenOptions, OpenedMeter, Profile, UnixMillis, new_request_id,
    proto::{Purpose, SessionTerms},
};
use kms_domain::SystemTitle;
use meter_sim::{
    CLASS_REGISTER, Meter, MeterConfig, MeterDirectory, SymmetricKey,
    axdr::Data,
    client::{ClientConfig, ClientConnection, ClientSession},
    config::SecuritySetupConfig,
    security::Ciphering,
    serve,
    xdlms::AttributeDescriptor,
};

use crate::Failure;

/// Does the main job with the first meter of the vendor's sample.
pub(super) async fn main_job(
    head_end: &Profile,
    devices: &Path,
    client_title: SystemTitle,
    options: &OpenOptions,
) -> Result<(), Failure> {
    let (title, meter) = first_meter(devices)?;
    println!("\nThe main job, once, through the public interface:\n");

    let began = Instant::now();
    let connection = Connection::connect(head_end).await?;
    let transport_key = head_end.transport_key()?;
    let terms = SessionTerms {
        purpose: Purpose::Read.into(),
        client_title: client_title.octets().to_vec().into(),
        counters: 100,
        ..SessionTerms::default()
    };
    step(1, "the head-end asks", &format!("a session with meter {title}, to read, as client {client_title}"));
    let session = connection.open_session(&transport_key, new_request_id(), title, terms, options).await?;
    let keys = session.keys.meter(title).ok_or("the envelope holds no keys of the meter")?;
    let counters = keys.counters.as_ref().ok_or("the envelope holds no counter lease")?;
    step(
        2,
        "the server grants",
        &format!(
            "{}, until {}, on the record as {}",
            session.keys.grant_id,
            clock(session.keys.not_after),
            hex::encode(session.audit_leaf.get(..8).unwrap_or_default())
        ),
    );
    let names: Vec<String> = keys
        .keys
        .iter()
        .map(|key| format!("{} version {}", key.key_type, key.version.map_or(0, |version| version.number())))
        .collect();
    let first = counters.next().unwrap_or_default();
    step(
        3,
        "the head-end opens",
        &format!("the envelope: {}; counters {first} to {}", names.join(", "), first + counters.remaining() - 1),
    );

    let (address, simulator) = simulate(meter).await?;
    step(4, "the meter", &format!("a simulated {title} listens on {address}, with the keys that its vendor gave it"));
    let lease: Vec<u32> = (0..10).map(|_| counters.allocate()).collect::<Result<_, _>>()?;
    let outcome = read(address, keys, client_title, &lease).await;
    simulator.abort();
    let (request, answer, value) = outcome?;
    step(5, "request", &format!("GET 1.0.1.8.0.255, ciphered: {}", hex::encode_upper(request)));
    step(6, "answer", &format!("opened with the same keys: {}", hex::encode_upper(answer)));
    step(7, "reads", &format!("1.0.1.8.0.255 = {value}"));
    println!("\n  all of it in {:.1} ms", began.elapsed().as_secs_f64() * 1_000.0);
    Ok(())
}

/// The first device of the vendor's plaintext list, as a simulated meter.
fn first_meter(devices: &Path) -> Result<(SystemTitle, MeterConfig), Failure> {
    let mut line = zeroize::Zeroizing::new(String::new());
    BufReader::new(File::open(devices)?).read_line(&mut line)?;
    let device: Device = serde_json::from_str(&line)?;
    let setup = device.security_setups.into_iter().next().ok_or("the device has no security setup")?;
    let title = SystemTitle::from_octets(device.system_title.as_bytes())?;
    Ok((title, MeterConfig::ordinary(device.system_title, device.security_suite, setup)))
}

#[derive(serde::Deserialize)]
struct Device {
    system_title: meter_sim::SystemTitle,
    security_suite: meter_sim::SecuritySuite,
    security_setups: Vec<SecuritySetupConfig>,
}

async fn simulate(config: MeterConfig) -> Result<(std::net::SocketAddr, tokio::task::JoinHandle<()>), Failure> {
    let meter = Meter::new(config)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    Ok((address, tokio::spawn(serve(listener, MeterDirectory::One(meter), meter_sim::ServeOptions::default()))))
}

/// Associates and reads the energy register: the ciphered request and answer, and the value.
async fn read(
    address: std::net::SocketAddr,
    keys: &OpenedMeter,
    client_title: SystemTitle,
    lease: &[u32],
) -> Result<(Vec<u8>, Vec<u8>, String), Failure> {
    let key = |key_type: KeyType| -> Result<SymmetricKey, Failure> {
        Ok(SymmetricKey::new(keys.key(key_type).ok_or("a key is missing")?.key.expose())?)
    };
    let (Some(first), Some(last)) = (lease.first(), lease.last()) else { return Err("no counters".into()) };
    let mut session = ClientSession::new(ClientConfig {
        client_title: meter_sim::SystemTitle::new(client_title.octets()),
        suite: meter_sim::SecuritySuite::default(),
        keys: Ciphering { encryption: key(KeyType::GUEK)?, authentication: key(KeyType::GAK)? },
        dedicated_key: None,
        counters: *first..=*last,
        general_ciphering: true,
    })?;
    let mut connection =
        ClientConnection::connect(address, MANAGEMENT_CLIENT, LOGICAL_DEVICE, Duration::from_secs(5)).await?;
    connection.associate(&mut session).await?;
    let energy = AttributeDescriptor { class: CLASS_REGISTER, instance: "1.0.1.8.0.255".parse()?, attribute: 2 };
    let request = session.get_request(energy)?;
    let answer = connection.exchange(request.clone()).await?;
    let value = match session.process_get_response(&answer)? {
        Data::DoubleLongUnsigned(value) => format!("{value} Wh"),
        other => format!("{other:?}"),
    };
    connection.release(&mut session).await?;
    Ok((request, answer, value))
}

fn step(number: u32, who: &str, what: &str) {
    println!("  {number}  {who:<20} {what}");
}

fn clock(time: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(time.0)
        .map_or_else(|_| "?".to_owned(), |time| time.strftime("%H:%M:%S UTC").to_string())
}

const MANAGEMENT_CLIENT: u16 = 1;
const LOGICAL_DEVICE: u16 = 1;
