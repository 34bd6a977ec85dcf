//! A1, A2: a request that comes again gets the same octets or a refusal (I4).

use kms_client::{
    Connection,
    proto::{PlainFrame, ProtectRequest, ProtectResponse, Purpose, frame_result::Result as Outcome},
};
use kms_store::DatabaseLocation;
use kms_tests::DevServer;

use crate::{
    relay,
    scene::{DISCONNECT, GET_ENERGY, Neighbour, Nonces, Random, assign, frame, lease, protect, urn},
    verdict::{Figure, Verdict},
};

/// Every request of an attacker, all of which come again and again.
#[derive(Default)]
struct Replays {
    asked: Vec<ProtectRequest>,
    nonces: Nonces,
    replays: usize,
    changed: usize,
}

impl Replays {
    /// Asks for the first time: how many frames were protected.
    async fn ask(&mut self, connection: &Connection, request: ProtectRequest) -> usize {
        let Ok(answer) = connection.frames().protect(request.clone()).await else { return 0 };
        let answer = answer.into_inner();
        self.changed += self.nonces.see(&request, &answer);
        self.asked.push(request);
        protected(&answer)
    }

    /// Asks for everything once more.
    async fn again(&mut self, connection: &Connection) {
        for request in &self.asked {
            self.replays += 1;
            if let Ok(answer) = connection.frames().protect(request.clone()).await {
                self.changed += usize::from(self.nonces.see(request, &answer.into_inner()) > 0);
            }
        }
    }

    fn verdict(self, row: &'static str, attack: &str) -> Verdict {
        assert!(self.replays > 0, "nothing was replayed");
        Verdict::new(
            row,
            attack,
            self.changed == 0,
            Figure::count(self.changed, format!("of {} replays changed content", self.replays)),
        )
    }
}

fn protected(answer: &ProtectResponse) -> usize {
    answer.results.iter().filter(|result| matches!(result.result, Some(Outcome::Apdu(_)))).count()
}

/// A disconnect over the quota and a get; two gets of one meter; then any mix of what is permitted
/// and refused, while quotas, leases and assignments change, on a second server where there is one,
/// and after a restart.
pub(crate) async fn of_frames() -> Vec<Verdict> {
    let mut random = Random::of_environment("a1_replays_of_frames");
    let mut server = DevServer::start();
    let other = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let (mut connection, mut officer) = (server.connect("head-end").await, server.connect("officer-1").await);

    let mut after_refusal = Replays::default();
    // The quota of an hour, and one more: what is over it is refused, and the get behind it is
    // protected.
    for _ in 0..2 {
        let spend = protect(Purpose::Control, (0..150).map(|number| frame(number % 30, DISCONNECT)).collect());
        connection.frames().protect(spend).await.unwrap();
    }
    let mixed = protect(Purpose::Control, vec![frame(1, DISCONNECT), frame(1, GET_ENERGY)]);
    assert!(after_refusal.ask(&connection, mixed).await > 0, "the get was refused");
    for _ in 0..50 {
        after_refusal.again(&connection).await;
    }

    let mut mixes = Replays::default();
    let mut protected = 0;
    for round in 0..ROUNDS {
        protected += mixes.ask(&connection, mix(&mut random)).await;
        match random.below(4) {
            0 => {
                // A live lease stands in the way of frames that were protected before it.
                let _ = lease(&connection, &server, random.below(METERS) as u64, 5).await;
            }
            1 => {
                let number = random.below(METERS) as u64;
                assign(&officer, &[number], &urn("head-end", "other")).await;
                mixes.again(&connection).await;
                assign(&officer, &[number], &urn("head-end", "head-end")).await;
            }
            2 => {
                let gets = vec![frame(random.below(METERS) as u64, GET_ENERGY)];
                connection.frames().protect(protect(Purpose::Read, gets)).await.unwrap();
            }
            _ => {}
        }
        mixes.again(&connection).await;
        if round == ROUNDS / 2 {
            server.restart();
            (connection, officer) = (server.connect("head-end").await, server.connect("officer-1").await);
            mixes.again(&connection).await;
        }
    }
    if matches!(server.database(), DatabaseLocation::Postgres(_)) {
        let second = server.second("second", |text| text).await;
        mixes.again(&second.connect("head-end").await).await;
        mixes.again(&connection).await;
    }
    assert!(protected > 0, "no frame of a mix was protected");
    drop(other);
    vec![
        after_refusal.verdict("A1", "replayed Protect after a refused frame"),
        mixes.verdict("A1", "replayed random mixes after quota, lease, assignment, restart"),
    ]
}

/// One to eight frames to three meters: permitted, refused by policy, over a quota, to an unknown
/// meter, under a foreign title, malformed, and challenges.
fn mix(random: &mut Random) -> ProtectRequest {
    let purpose = [Purpose::Read, Purpose::Configure, Purpose::Control, Purpose::Control][random.below(4)];
    let supersede_lease = random.below(2) == 0;
    let frames = (0..=random.below(8)).map(|_| {
        let number = random.below(METERS) as u64;
        match random.below(8) {
            0 | 1 => frame(number, GET_ENERGY),
            2 => frame(number, &format!("C001C10003010001{:02X}00FF0200", random.below(256))),
            3 => frame(number, DISCONNECT),
            // A clock is set.
            4 => frame(number, "C101C100080000010000FF0300100000"),
            5 => PlainFrame { meter: hex::decode("4B414DFFFFFFFFFF").unwrap().into(), ..frame(number, GET_ENERGY) },
            6 => PlainFrame {
                client_title: hex::decode("4D4D4D0000000099").unwrap().into(),
                ..frame(number, GET_ENERGY)
            },
            _ => PlainFrame {
                apdu: bytes::Bytes::new(),
                hls_challenge: random.octets(16).into(),
                ..frame(number, GET_ENERGY)
            },
        }
    });
    let mut frames: Vec<PlainFrame> = frames.collect();
    if random.below(2) == 0 {
        // Refused over the quota, and protected, of one meter: what was matched wrongly.
        let number = random.below(METERS) as u64;
        frames.splice(..0, [frame(number, DISCONNECT), frame(number, GET_ENERGY)]);
    }
    ProtectRequest { supersede_lease, ..protect(purpose, frames) }
}

/// A request from before a new GAK, and from before a new GUEK, comes again after it.
pub(crate) async fn after_a_new_gak() -> Vec<Verdict> {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let mut verdicts = Vec::new();
    for (number, key_type) in [(3, "GAK"), (4, "GUEK")] {
        let mut replays = Replays::default();
        let gets = (0..4).map(|_| frame(number, GET_ENERGY)).collect();
        assert!(replays.ask(&connection, protect(Purpose::Read, gets)).await > 0, "the gets were refused");
        replays.again(&connection).await;
        let device = server.meter(usize::try_from(number).unwrap());
        let outcome = relay::transfer_at_last(&connection, &device, number, key_type).await;
        assert_eq!(outcome, "proven", "{key_type}");
        for _ in 0..10 {
            replays.again(&connection).await;
        }
        verdicts.push(replays.verdict("A2", &format!("replayed Protect after a new {key_type}")));
    }
    verdicts
}

const ROUNDS: usize = 20;
/// Few, so that a refused frame often stands before a protected one of the same meter.
const METERS: usize = 3;
