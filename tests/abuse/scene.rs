//! What attacks share: people, head-ends, frames, and what the operating system says of the server.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kms_client::{
    Connection, KeyRequest, NewProfile, PrincipalId, Profile, StateDirectory, SystemTitle, new_request_id, proto,
};
use kms_tests::{CLIENT_TITLE, DevServer, TestModule, open, title};
use tonic::Status;

/// A fresh request id, as messages have it.
pub(crate) fn request_id() -> Bytes {
    new_request_id().octets().to_vec().into()
}

/// The title of a meter of the sample, from 0, as messages have it.
pub(crate) fn meter(number: u64) -> Bytes {
    title(number).octets().to_vec().into()
}

/// The client title of the sample's head-end, as messages have it.
pub(crate) fn client_title() -> Bytes {
    hex::decode(CLIENT_TITLE).unwrap().into()
}

/// The URI of a principal of the development island.
pub(crate) fn urn(role: &str, name: &str) -> String {
    format!("urn:meterkms:dev:{role}:{name}")
}

/// Registers a principal with a key that is made here, and keeps its profile in the folder of the
/// island.
pub(crate) async fn add(
    server: &DevServer,
    officer: &Connection,
    new: proto::AddPrincipalRequest,
) -> Result<Profile, Status> {
    let id = PrincipalId::parse(&new.principal).unwrap();
    let key = KeyRequest::generate(&id).unwrap();
    let certificate_request = key.certificate_request().to_vec().into();
    let request = proto::AddPrincipalRequest { request_id: request_id(), certificate_request, ..new };
    let issued = officer.principals().add_principal(request).await?.into_inner();
    Ok(keep(server, &id, id.name(), &key, &issued))
}

/// A profile of the folder of the island, with a certificate that was issued for a key.
pub(crate) fn keep(
    server: &DevServer,
    principal: &PrincipalId,
    name: &str,
    key: &KeyRequest,
    issued: &proto::PrincipalCertificate,
) -> Profile {
    let known = server.profile("officer-1");
    let new = NewProfile {
        server: known.server(),
        server_name: known.server_name_text(),
        principal,
        ca_pem: &known.ca_pem().unwrap(),
        certificate_pem: &KeyRequest::chain_pem(issued),
        key_pem: key.key_pem(),
    };
    Profile::create(StateDirectory::new(server.state()).profile_directory(name), &new).unwrap()
}

/// A head-end that behaves, with meters of its own: what it sees of an attack is what counts.
pub(crate) struct Neighbour {
    pub(crate) profile: Profile,
    pub(crate) connection: Connection,
    title: Bytes,
    meter: SystemTitle,
}

impl Neighbour {
    /// Registers it under this name and client title (8 octets in hex), and assigns this meter of
    /// the sample to it.
    pub(crate) async fn settle(server: &DevServer, name: &str, client_title: &str, number: u64) -> Self {
        let officer = server.connect("officer-1").await;
        let client_title = Bytes::from(hex::decode(client_title).unwrap());
        let new = proto::AddPrincipalRequest {
            principal: urn("head-end", name),
            client_titles: vec![client_title.clone()],
            ..proto::AddPrincipalRequest::default()
        };
        let profile = add(server, &officer, new).await.unwrap();
        let connection = Connection::connect(&profile).await.unwrap();
        let key = KeyRequest::generate(&PrincipalId::parse(&urn("head-end", name)).unwrap()).unwrap();
        let certificate_request = key.certificate_request().to_vec().into();
        let register = proto::RegisterTransportKeyRequest { request_id: request_id(), certificate_request };
        let issued = connection.principals().register_transport_key(register).await.unwrap().into_inner();
        profile.set_transport_key(key.key_pem(), &KeyRequest::certificate_pem(&issued)).unwrap();
        assign(&officer, &[number], &urn("head-end", name)).await;
        Self { profile, connection, title: client_title, meter: title(number) }
    }

    /// Asks for a session with its meter: how long the answer took, or why there is none.
    pub(crate) async fn ask(&self) -> Result<Duration, String> {
        self.ask_over(&self.connection).await
    }

    /// As [`Self::ask`], over another connection of its own.
    pub(crate) async fn ask_over(&self, connection: &Connection) -> Result<Duration, String> {
        let terms = proto::SessionTerms { client_title: self.title.clone(), ..kms_tests::terms(1) };
        let (key, options) = (self.profile.transport_key().unwrap(), TestModule::of_environment().open_options());
        let began = Instant::now();
        let asked = connection.open_session(&key, new_request_id(), self.meter, terms, &options);
        match tokio::time::timeout(ANSWERS_WITHIN, asked).await {
            Ok(Ok(_)) => Ok(began.elapsed()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWERS_WITHIN.as_secs())),
        }
    }

    /// As [`Self::ask`], over a connection that is made for it.
    pub(crate) async fn ask_anew(&self) -> Result<Duration, String> {
        let began = Instant::now();
        let connecting = tokio::time::timeout(ANSWERS_WITHIN, Connection::connect(&self.profile));
        let connection =
            connecting.await.map_err(|_| "no connection".to_owned())?.map_err(|error| error.to_string())?;
        self.ask_over(&connection).await.map(|_| began.elapsed())
    }
}

/// Assigns meters of the sample to a head-end.
pub(crate) async fn assign(officer: &Connection, numbers: &[u64], head_end: &str) {
    let meters = numbers.iter().map(|number| meter(*number)).collect();
    let request = proto::AssignMetersRequest {
        request_id: request_id(),
        meters,
        head_end: head_end.to_owned(),
        ..Default::default()
    };
    let changed = officer.meters().assign_meters(request).await.unwrap().into_inner();
    assert_eq!(changed.problems, [], "assigning {numbers:?} to `{head_end}`");
}

/// The counters of a new session of the sample's head-end with a meter of the sample: first and
/// last.
pub(crate) async fn lease(
    connection: &Connection,
    server: &DevServer,
    number: u64,
    counters: u32,
) -> Result<(u32, u32), String> {
    let session = open(connection, &server.profile("head-end"), title(number), counters)
        .await
        .map_err(|error| error.to_string())?;
    let counters = session.keys.meter(title(number)).unwrap().counters.as_ref().unwrap();
    let first = counters.next().unwrap();
    Ok((first, first + (counters.remaining() - 1)))
}

/// A frame to a meter of the sample, under the client title of its head-end.
pub(crate) fn frame(number: u64, apdu: &str) -> proto::PlainFrame {
    proto::PlainFrame {
        meter: meter(number),
        client_title: client_title(),
        form: proto::FrameForm::Glo.into(),
        apdu: hex::decode(apdu).unwrap().into(),
        ..proto::PlainFrame::default()
    }
}

/// A request for frames; `supersede_lease` is set.
pub(crate) fn protect(purpose: proto::Purpose, frames: Vec<proto::PlainFrame>) -> proto::ProtectRequest {
    proto::ProtectRequest { request_id: request_id(), purpose: purpose.into(), frames, supersede_lease: true }
}

/// Get of the energy register.
pub(crate) const GET_ENERGY: &str = "C001C100030100010800FF0200";
/// `remote_disconnect` of the disconnect control.
pub(crate) const DISCONNECT: &str = "C301C10046000060030AFF01010F00";

/// Every counter that left, with what was protected under it (I4).
#[derive(Default)]
pub(crate) struct Nonces(HashMap<(Bytes, Bytes, u32), Bytes>);

impl Nonces {
    /// Takes note of an answer: how many of its frames have a counter that left with other octets
    /// before.
    pub(crate) fn see(&mut self, request: &proto::ProtectRequest, answer: &proto::ProtectResponse) -> usize {
        assert_eq!(request.frames.len(), answer.results.len());
        let mut changed = 0;
        for (frame, result) in request.frames.iter().zip(&answer.results) {
            let Some(proto::frame_result::Result::Apdu(octets)) = &result.result else { continue };
            let nonce = (frame.meter.clone(), frame.client_title.clone(), result.invocation_counter);
            changed += usize::from(*self.0.entry(nonce).or_insert_with(|| octets.clone()) != *octets);
        }
        changed
    }
}

/// A kibibyte figure of `/proc/PID/status`, in MiB.
pub(crate) fn memory_mib(pid: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap() / 1_024.0
}

/// The middle and the ninety-ninth percentile, in milliseconds.
pub(crate) fn percentiles(times: &[Duration]) -> (f64, f64) {
    let mut sorted: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1_000.0).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |part: usize| {
        sorted.get((sorted.len() * part / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    };
    (at(50), at(99))
}

/// A random number generator (xorshift64*) whose seed is printed, and taken from `KMS_TEST_SEED`.
pub(crate) struct Random(u64);

impl Random {
    /// With the seed of the environment, or a new one.
    pub(crate) fn of_environment(name: &str) -> Self {
        let fresh = || u64::from_be_bytes(new_request_id().octets()[8..].try_into().unwrap());
        let seed = std::env::var("KMS_TEST_SEED").map_or_else(|_| fresh(), |seed| seed.parse().unwrap());
        println!("{name}: KMS_TEST_SEED={seed}");
        Self(seed | 1)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound as u64).unwrap()
    }

    /// So many octets.
    pub(crate) fn octets(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
    }
}

/// A neighbour that waits longer has no answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);
