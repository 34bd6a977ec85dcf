//! Meters on TCP: one per port, hundreds per port, idle and hostile connections.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{ENERGY, client_config, config, counter_exception, kek, key_of, meter, reading};
use meter_sim::behaviour::{Fault, ScriptedFault, Trigger};
use meter_sim::client::{ClientConnection, ClientSession};
use meter_sim::nonces::RepeatedNonce;
use meter_sim::security::wrap_key;
use meter_sim::{Error, KeyId, Meter, MeterDirectory, Obis, ServeOptions, SystemTitle, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_session_over_tcp() {
    let meter = meter();
    let server = Server::start(MeterDirectory::One(meter.clone()), ServeOptions::default()).await;
    let mut connection = server.connect(1, PATIENCE).await;
    let mut session = ClientSession::new(client_config(1)).unwrap();
    connection.associate(&mut session).await.unwrap();
    assert_eq!(connection.get(&mut session, ENERGY).await, Ok(reading()));
    let wrapped = wrap_key(&kek(), &key_of(0xA5)).unwrap();
    connection
        .key_transfer(&mut session, Obis::SECURITY_SETUP, &[(KeyId::GlobalUnicastEncryption, &wrapped)])
        .await
        .unwrap();
    let mut keys = common::ciphering();
    keys.encryption = key_of(0xA5);
    session.set_keys(keys);
    assert_eq!(connection.get(&mut session, ENERGY).await, Ok(reading()));
    connection.release(&mut session).await.unwrap();
    assert_eq!(RepeatedNonce::find(&[meter]), []);
}

#[tokio::test]
async fn many_meters_on_one_port() {
    let meters: Vec<Meter> = (1..=250_u16)
        .map(|number| {
            let mut config = config();
            let mut title = *b"SIM\0\0\0\0\0";
            title[6..].copy_from_slice(&number.to_be_bytes());
            config.system_title = SystemTitle::new(title);
            config.security_setups[0].guek = key_of(number as u8);
            Meter::new(config).unwrap()
        })
        .collect();
    let directory = (1..).zip(meters.iter().cloned()).collect();
    let server = Server::start(MeterDirectory::ByDestination(Arc::new(directory)), ServeOptions::default()).await;
    let mut tasks = tokio::task::JoinSet::new();
    for (destination, meter) in (1..).zip(meters) {
        let mut connection = server.connect(destination, PATIENCE).await;
        tasks.spawn(async move {
            let mut config = client_config(1);
            config.keys.encryption = key_of(destination as u8);
            let mut session = ClientSession::new(config).unwrap();
            connection.associate(&mut session).await.unwrap();
            assert_eq!(session.meter_title(), Some(meter.system_title()));
            assert_eq!(connection.get(&mut session, ENERGY).await, Ok(reading()));
        });
    }
    assert_eq!(tasks.join_all().await.len(), 250);
}

#[tokio::test]
async fn several_meters_on_one_connection() {
    let meters: Vec<Meter> = (0..2).map(|_| meter()).collect();
    let server =
        Server::start(MeterDirectory::ByDestination(Arc::new((1..).zip(meters).collect())), ServeOptions::default())
            .await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for destination in [1, 2] {
        let mut session = ClientSession::new(client_config(1)).unwrap();
        let frame = meter_sim::wrapper::Frame { source: 1, destination, apdu: session.association_request().unwrap() };
        frame.write(&mut stream).await.unwrap();
        let answer = meter_sim::wrapper::Frame::read(&mut stream).await.unwrap().unwrap();
        assert_eq!((answer.source, answer.destination), (destination, 1));
        session.process_association_response(&answer.apdu).unwrap();
    }
}

#[tokio::test]
async fn a_lost_answer_is_a_timeout_and_the_next_session_goes_on_above() {
    let meter = meter();
    meter.add_fault(ScriptedFault { at: Trigger::Exchange(3), fault: Fault::LoseAnswer });
    let server = Server::start(MeterDirectory::One(meter.clone()), ServeOptions::default()).await;
    let mut connection = server.connect(1, Duration::from_millis(200)).await;
    let mut session = ClientSession::new(client_config(1)).unwrap();
    connection.associate(&mut session).await.unwrap();
    assert_eq!(connection.get(&mut session, ENERGY).await, Err(Error::Transport(std::io::ErrorKind::TimedOut)));
    // The counter of the lost exchange is used up.
    let mut again = ClientSession::new(client_config(4)).unwrap();
    let mut connection = server.connect(1, PATIENCE).await;
    assert_eq!(connection.associate(&mut again).await, Err(counter_exception(4)));
    connection.associate(&mut again).await.unwrap();
}

#[tokio::test]
async fn idle_and_slow_connections_are_closed() {
    let options = ServeOptions { idle_timeout: Duration::from_millis(100), ..ServeOptions::default() };
    let server = Server::start(MeterDirectory::One(meter()), options).await;
    for start in [&[][..], &[0, 1, 0, 1, 0, 1, 0xFF, 0xFF, 0x60]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(start).await.unwrap();
        assert!(is_closed(&mut stream).await);
    }
}

#[tokio::test]
async fn another_protocol_is_cut_off() {
    let server = Server::start(MeterDirectory::One(meter()), ServeOptions::default()).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(is_closed(&mut stream).await);
}

#[tokio::test]
async fn connections_above_the_limit_wait() {
    let options = ServeOptions { max_connections: 1, ..ServeOptions::default() };
    let server = Server::start(MeterDirectory::One(meter()), options).await;
    let mut first = server.connect(1, PATIENCE).await;
    let mut session = ClientSession::new(client_config(1)).unwrap();
    first.associate(&mut session).await.unwrap();
    let mut second = server.connect(1, Duration::from_millis(100)).await;
    let mut waiting = ClientSession::new(client_config(50)).unwrap();
    assert_eq!(second.associate(&mut waiting).await, Err(Error::Transport(std::io::ErrorKind::TimedOut)));
    drop((first, second));
    let mut third = server.connect(1, PATIENCE).await;
    let mut session = ClientSession::new(client_config(100)).unwrap();
    third.associate(&mut session).await.unwrap();
}

struct Server {
    address: std::net::SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(meters: MeterDirectory, options: ServeOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { address: listener.local_addr().unwrap(), task: tokio::spawn(serve(listener, meters, options)) }
    }

    async fn connect(&self, destination: u16, patience: Duration) -> ClientConnection {
        ClientConnection::connect(self.address, 1, destination, patience).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
    read.unwrap().is_err()
}
