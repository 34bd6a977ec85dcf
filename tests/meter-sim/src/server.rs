//! Meters on TCP.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::wrapper::Frame;
use crate::{Connection, Meter};

/// The meters behind one listener.
#[derive(Clone, Debug)]
pub enum MeterDirectory {
    /// One meter, whatever destination port the wrapper names.
    One(Meter),
    /// Many meters, each at its own destination port of the wrapper: a data concentrator with
    /// hundreds of meters on one TCP port. Frames for other destinations have no answer.
    ByDestination(Arc<BTreeMap<u16, Meter>>),
}

impl MeterDirectory {
    fn find(&self, destination: u16) -> Option<&Meter> {
        match self {
            Self::One(meter) => Some(meter),
            Self::ByDestination(meters) => meters.get(&destination),
        }
    }
}

/// Limits of a listener.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// A connection without a whole frame for this long is closed; so is one that does not read its
    /// answers.
    pub idle_timeout: Duration,
    /// The largest number of open connections; further ones wait.
    pub max_connections: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { idle_timeout: Duration::from_secs(120), max_connections: 1024 }
    }
}

/// Serves `meters` on `listener` until the future is dropped; then every connection ends.
pub async fn serve(listener: TcpListener, meters: MeterDirectory, options: ServeOptions) {
    let slots = Arc::new(Semaphore::new(options.max_connections));
    let mut tasks = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Probably there is no file descriptor left: wait until another connection closes.
            Err(_) => {
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let meters = meters.clone();
        tasks.spawn(async move {
            let _slot = slot;
            // The end of a connection does not change the meter, whatever its cause.
            let _ = serve_connection(stream, &meters, options.idle_timeout).await;
        });
        while tasks.try_join_next().is_some() {}
    }
}

async fn serve_connection(mut stream: TcpStream, meters: &MeterDirectory, idle_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut connections: HashMap<(u16, u16), Connection> = HashMap::new();
    while let Some(frame) = timeout(idle_timeout, Frame::read(&mut stream)).await?? {
        let Some(meter) = meters.find(frame.destination) else {
            continue;
        };
        let address = (frame.source, frame.destination);
        if !connections.contains_key(&address) && connections.len() >= MAX_ASSOCIATIONS {
            return Ok(());
        }
        let delivery = connections
            .entry(address)
            .or_insert_with(|| Connection::new(meter.clone(), frame.source))
            .deliver(&frame.apdu)
            .await;
        for answer in delivery.answers {
            timeout(idle_timeout, frame.answer(answer).write(&mut stream)).await??;
        }
        if delivery.closes {
            return Ok(());
        }
    }
    Ok(())
}

/// Pairs of client SAP and meter on one TCP connection.
const MAX_ASSOCIATIONS: usize = 256;
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
