//! A3, A12: a floor is a floor, and nobody uses up the counters of a key that has to be replaced.

use std::time::Duration;

use kms_client::{
    Connection, KeyType,
    proto::{
        AdoptCountersRequest, ApproveProposalRequest, CarryOutProposalRequest, ContinueTransfersRequest, Counter,
        CounterFloor, ProposeCounterRaiseRequest, Purpose, ShowMeterRequest, TransferReport,
        frame_result::Result as Outcome, transfer_report::Answer, transfer_step::Next,
    },
};
use kms_tests::{CLIENT_TITLE, DevServer, open, put_on_line, title};
use meter_sim::{
    SymmetricKey,
    client::{ClientConfig, ClientConnection, ClientSession},
    security::Ciphering,
};

use crate::{
    relay,
    scene::{GET_ENERGY, client_title, frame, lease, meter, protect, request_id},
    verdict::{Figure, Verdict},
};

/// The next counter of every path after a floor: inside the reserved chunk, at its edge, above it.
pub(crate) async fn floors() -> Vec<Verdict> {
    let server = DevServer::start();
    let (officer, head_end) = (server.connect("officer-1").await, server.connect("head-end").await);
    let (mut tried, mut below) = (0, Vec::new());
    for (number, place) in (1..).zip(["inside", "last", "edge", "above"]) {
        let (_, last) = lease(&head_end, &server, number, 1_000).await.unwrap();
        let reserved = u32::try_from(counter(&officer, number).await.reserved_below).unwrap();
        let floor = match place {
            "inside" => last + 4_000,
            "last" => reserved - 1,
            "edge" => reserved,
            _ => reserved + 1_000,
        };
        adopt(&officer, number, floor).await;
        let mut seen = vec![lease(&head_end, &server, number, 10).await.unwrap().0];
        seen.push(protected(&head_end, number).await);
        // Once more, for a floor below issued counters lowers nothing.
        adopt(&officer, number, floor - 100).await;
        seen.push(lease(&head_end, &server, number, 10).await.unwrap().0);
        tried += seen.len();
        below.extend(
            seen.iter().filter(|counter| **counter < floor).map(|counter| format!("{place}: {counter} below {floor}")),
        );
        assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{place}: counters do not rise: {seen:?}");
    }
    vec![verdict("a floor inside, at the edge of and above the chunk", tried, &below)]
}

/// The same with a second server on the island: the holder of the chunk, either one, goes on above
/// the floor.
pub(crate) async fn floors_on_two_servers() -> Vec<Verdict> {
    let first = DevServer::start_on_postgresql();
    let second = first.second("second", |text| text).await;
    let officers = [first.connect("officer-1").await, second.connect("officer-1").await];
    let head_ends = [first.connect("head-end").await, second.connect("head-end").await];
    let (mut tried, mut below) = (0, Vec::new());
    // Who holds the chunk, and who is told the floor.
    for (number, (holder, told)) in (1..).zip([(0, 0), (0, 1), (1, 0), (1, 1)]) {
        let (_, mut last) = lease(&head_ends[holder], &first, number, 1_000).await.unwrap();
        let floor = last + 4_000;
        adopt(&officers[told], number, floor).await;
        for server in [holder, told, 1 - holder, holder] {
            let (next, end) = lease(&head_ends[server], &first, number, 10).await.unwrap();
            assert!(next > last, "I4: counter {next} of meter {number} left twice");
            last = end;
            tried += 1;
            if next < floor {
                below.push(format!("holder {holder}, told {told}: {next} below {floor}"));
            }
        }
    }
    vec![verdict("a floor told to either of two servers", tried, &below)]
}

fn verdict(attack: &str, tried: usize, below: &[String]) -> Verdict {
    assert!(tried > 0);
    Verdict::new(
        "A3",
        attack,
        below.is_empty(),
        Figure::count(below.len(), format!("of {tried} next counters below the floor")),
    )
    .with(below.join(", "))
}

/// A meter that is ahead of the server says so in a plain exception, and is reached in the next
/// step of the transfer.
pub(crate) async fn meters_that_are_ahead() -> Vec<Verdict> {
    let server = DevServer::start();
    let head_end = server.connect("head-end").await;
    let mut missed = Vec::new();
    for (number, ahead) in (10..).zip(AHEAD) {
        let device = server.meter(usize::try_from(number).unwrap());
        let address = put_on_line(&device).await;
        let session = open(&head_end, &server.profile("head-end"), title(number), 10).await.unwrap();
        let keys = session.keys.meter(title(number)).unwrap();
        let counters = keys.counters.as_ref().unwrap();
        let first = counters.next().unwrap() + counters.remaining() - 1 + ahead;
        let key = |key_type| SymmetricKey::new(keys.key(key_type).unwrap().key.expose()).unwrap();
        let mut client = ClientSession::new(ClientConfig {
            client_title: meter_sim::SystemTitle::new(hex::decode(CLIENT_TITLE).unwrap().try_into().unwrap()),
            suite: meter_sim::SecuritySuite::default(),
            keys: Ciphering { encryption: key(KeyType::GUEK), authentication: key(KeyType::GAK) },
            dedicated_key: None,
            counters: first..=first + 4,
            general_ciphering: false,
        })
        .unwrap();
        let mut line = ClientConnection::connect(address, 1, 1, Duration::from_secs(10)).await.unwrap();
        line.associate(&mut client).await.unwrap();
        line.release(&mut client).await.unwrap();
        drop(line);
        let refused = device.refusals().len();
        let outcome = relay::transfer(&head_end, &device, relay::order(number, "")).await;
        let refused = device.refusals().len() - refused;
        if outcome != "probed" || refused > 1 {
            missed.push(format!("ahead by {ahead}: {outcome}, {refused} requests refused"));
        }
    }
    let figure = Figure::count(missed.len(), format!("of {} meters not reached in the next step", AHEAD.len()));
    vec![Verdict::new("A3", "meters whose counter is ahead", missed.is_empty(), figure).with(missed.join(", "))]
}

/// The largest sessions in a loop, and all that is left near the end of a key's counters: a
/// rotation still works.
pub(crate) async fn used_up() -> Vec<Verdict> {
    let server = DevServer::start();
    let head_end = server.connect("head-end").await;
    let mut taken = 0;
    let mut refusal = None;
    while taken < MOST_SESSIONS && refusal.is_none() {
        match lease(&head_end, &server, 20, LARGEST).await {
            Ok(_) => taken += 1,
            Err(error) => refusal = Some(error),
        }
    }
    let outcome = relay::transfer_at_last(&head_end, &server.meter(20), 20, "GUEK").await;
    let figure = Figure::count(taken, format!("sessions of 1,000,000 counters in a row, of {MOST_SESSIONS} tried"));
    let looped = Verdict::new(
        "A12",
        "sessions of 1,000,000 counters in a loop",
        refusal.is_some() && outcome == "proven",
        figure,
    )
    .with(format!("then a rotation: {outcome}; {}", refusal.unwrap_or_else(|| "none was refused".to_owned())));

    // Two officers move another meter's counter to where little is left, as if it had come so far
    // in years.
    raise(&server, 21, NEAR_THE_END).await;
    let mut sessions = 0;
    for counters in [LARGEST, 100_000, 10_000, 1_000, 100, 10, 1] {
        while sessions < MOST_SESSIONS && lease(&head_end, &server, 21, counters).await.is_ok() {
            sessions += 1;
        }
    }
    let outcome = relay::transfer_at_last(&head_end, &server.meter(21), 21, "GUEK").await;
    let figure = Figure::count(sessions, "sessions until not a single counter was left to them");
    let ended = Verdict::new("A12", "a rotation after the last counter of sessions", outcome == "proven", figure)
        .with(format!("the rotation: {outcome}"));
    vec![looped, ended]
}

/// A head-end that may probe forges what the meter answers: counters as far ahead as the profile
/// lets a meter be, with a whole key before it and with what is kept for transfers. A rotation
/// still works.
pub(crate) async fn forged() -> Vec<Verdict> {
    let server = DevServer::start();
    let (officer, head_end) = (server.connect("officer-1").await, server.connect("head-end").await);
    raise(&server, 23, SESSIONS_END).await;
    let mut verdicts = Vec::new();
    for (number, place, most) in [(22, "of a new key", SKIPPED), (23, "in the reserve", u64::from(JUMP))] {
        // So that there is a counter to be shown; in the reserve it is refused.
        let _ = lease(&head_end, &server, number, 1).await;
        let start = counter(&officer, number).await.reserved_below;
        for _ in 0..FORGED_PROBES {
            forge(&officer, &head_end, number).await;
        }
        let skipped = counter(&officer, number).await.reserved_below.saturating_sub(start);
        let outcome =
            relay::transfer_at_last(&head_end, &server.meter(usize::try_from(number).unwrap()), number, "GUEK").await;
        let figure = Figure::count(
            usize::try_from(skipped).unwrap(),
            format!("counters used up by {FORGED_PROBES} probes with forged answers"),
        );
        let attack = format!("forged answers that name a counter {place}");
        verdicts.push(
            Verdict::new("A12", &attack, skipped <= most && outcome == "proven", figure)
                .with(format!("then a rotation: {outcome}")),
        );
    }
    verdicts
}

/// A probe that reaches no meter: `D8 01 06` and a counter answer each of its requests.
async fn forge(officer: &Connection, head_end: &Connection, number: u64) {
    let mut step = relay::begin(head_end, relay::order(number, "")).await.unwrap();
    while matches!(step.next, Some(Next::Send(_))) {
        let ahead =
            u32::try_from(counter(officer, number).await.reserved_below - 1 + u64::from(JUMP)).unwrap_or(u32::MAX);
        let answer = [&[0xD8, 1, 6][..], &ahead.to_be_bytes()].concat();
        let report = TransferReport {
            meter: step.meter,
            transfer_id: step.transfer_id,
            step: step.step,
            answer: Some(Answer::Apdu(answer.into())),
        };
        let reports = ContinueTransfersRequest { reports: vec![report] };
        step = head_end.transfers().continue_transfers(reports).await.unwrap().into_inner().steps.remove(0);
    }
}

/// Adopts a counter, or is refused.
async fn adopt(officer: &Connection, number: u64, floor: u32) {
    let floor = CounterFloor {
        meter: meter(number),
        security_setup: SETUP.to_vec().into(),
        client_title: client_title(),
        floor,
        owned_by: String::new(),
    };
    let request = AdoptCountersRequest { request_id: request_id(), floors: vec![floor] };
    let adopted = officer.meters().adopt_counters(request).await.unwrap().into_inner();
    assert_eq!(adopted.problems, [], "meter {number}");
}

/// The counter of the head-end's title under the newest key.
async fn counter(officer: &Connection, number: u64) -> Counter {
    let shown = officer.meters().show_meter(ShowMeterRequest { meter: meter(number) }).await.unwrap().into_inner();
    let counters = shown.security_setups.into_iter().flat_map(|setup| setup.counters);
    counters.filter(|counter| counter.client_title == client_title()).max_by_key(|counter| counter.key_version).unwrap()
}

async fn protected(connection: &Connection, number: u64) -> u32 {
    let request = protect(Purpose::Read, vec![frame(number, GET_ENERGY)]);
    let result = connection.frames().protect(request).await.unwrap().into_inner().results.remove(0);
    assert!(matches!(result.result, Some(Outcome::Apdu(_))), "{result:?}");
    result.invocation_counter
}

async fn raise(server: &DevServer, number: u64, to: u32) {
    let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
    let propose = ProposeCounterRaiseRequest {
        request_id: request_id(),
        meter: meter(number),
        client_title: client_title(),
        to,
        reason: "a meter that has counted for years".to_owned(),
        ..ProposeCounterRaiseRequest::default()
    };
    let proposal = ada.meters().propose_counter_raise(propose).await.unwrap().into_inner();
    let (proposal_id, content_sha256) = (proposal.proposal_id, proposal.content_sha256);
    let approve = ApproveProposalRequest { request_id: request_id(), proposal_id: proposal_id.clone(), content_sha256 };
    bo.proposals().approve_proposal(approve).await.unwrap();
    let carry_out = CarryOutProposalRequest { request_id: request_id(), proposal_id };
    ada.proposals().carry_out_proposal(carry_out).await.unwrap();
}

/// 0.0.43.0.0.255.
const SETUP: [u8; 6] = [0, 0, 43, 0, 0, 255];
/// By how much meters are ahead: within the shipped profiles' `jump_cap` of 100,000.
const AHEAD: [u32; 4] = [1, 5_000, 65_536, 70_000];
/// The most counters that a session gets.
const LARGEST: u32 = 1_000_000;
/// A fourteenth of what a key has.
const MOST_SESSIONS: usize = 300;
/// 2,967,296 below the end.
const NEAR_THE_END: u32 = 4_292_000_000;
/// The last 2^24 counters are for transfers.
const SESSIONS_END: u32 = u32::MAX - 0xFF_FFFF;
/// The shipped profiles' `jump_cap`.
const JUMP: u32 = 100_000;
/// Enough to take 8,000,000 counters by three jumps each, or a third of the reserve.
const FORGED_PROBES: usize = 60;
/// What an hour has, twice because one may end meanwhile, and what the probes' own requests use.
const SKIPPED: u64 = 8_001_000;
