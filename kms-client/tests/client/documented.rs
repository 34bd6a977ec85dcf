//! The Rust of docs/integration.md, line for line: tests/texts/documented_rust.rs compares them. It
//! is compiled and not run, because there is no server here.
#![expect(dead_code, reason = "the compiler reads it")]

use std::{error::Error, sync::Arc};

use kms_client::{Connection, SystemTitle};

async fn open_a_session() -> Result<(), Box<dyn Error>> {
    use kms_client::proto::{Purpose, SessionTerms};
    use kms_client::{Connection, KeyType, OpenOptions, Profile, SystemTitle, new_request_id};

    let profile = Profile::load(".kms/profiles/hes-1")?;
    let transport_key = profile.transport_key()?;
    let connection = Connection::connect(&profile).await?;
    let terms = SessionTerms {
        purpose: Purpose::Read.into(),
        client_title: SystemTitle::parse("4D4D4D0000000001")?.octets().to_vec().into(),
        ..Default::default()
    };
    let meter = SystemTitle::parse("4B414D0000000001")?;
    let options = OpenOptions::new();
    let session = connection.open_session(&transport_key, new_request_id(), meter, terms, &options).await?;
    let keys = session.keys.meter(meter).ok_or("no keys")?;
    let guek = keys.key(KeyType::GUEK).ok_or("no GUEK")?.key.expose();
    let counter = keys.counters.as_ref().ok_or("no counters")?.allocate()?;

    let _ = (guek, counter);
    Ok(())
}

async fn carry_new_keys(
    connection: Connection,
    client_title: SystemTitle,
    stop: impl Future<Output = ()>,
) -> Result<(), Box<dyn Error>> {
    use kms_client::{MeterLine, MeterNetwork, MeterRequest, Relay, RelaySettings};

    struct Line(TcpStream); // a connection of yours to one meter
    impl MeterLine for Line {
        async fn exchange(&mut self, request: MeterRequest) -> Option<Vec<u8>> {
            exchange(&mut self.0, &request.apdu).await // yours; None: no answer came
        }
    }
    struct Network; // where your meters are
    impl MeterNetwork for Network {
        type Line = Line;

        async fn line(&self, meter: SystemTitle) -> Option<Line> {
            connect(meter).await.map(Line) // yours; None: the meter cannot be reached now
        }
    }

    let relay = Relay::new(connection, [], client_title, RelaySettings::default());
    relay.work(Arc::new(Network), stop, |task, end| println!("{}: {end:?}", task.key_type)).await?;

    Ok(())
}

struct TcpStream;

async fn exchange(_: &mut TcpStream, _: &[u8]) -> Option<Vec<u8>> {
    None
}

async fn connect(_: SystemTitle) -> Option<TcpStream> {
    None
}
