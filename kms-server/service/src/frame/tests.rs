use std::num::NonZeroU32;

use kms_domain::{
    CounterKey, KeyPair, KeyType, KeyVersionNumber, Lease, Outcome, RequestId, SecuritySetupId, TransferForm,
    UnixMillis,
};
use kms_proto::v1::{self, audit_record::Event};
use kms_store::Reads;

use super::unprotect::{ReceivedContent, ReceivedFrame};
use super::*;
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};
use crate::transfer::{
    EARLIER_KEY_HELD, NextStep, Order, ReportedAnswer, pair_keys,
    tests::{Field, order},
};

/// GET of a register.
const GET: &str = "C001C100030100010800FF0200";

fn plain(number: u64, apdu: &str) -> PlainFrame {
    PlainFrame {
        meter: meter(number),
        setup: None,
        client_title: client_title(),
        protection: Protection::AuthenticatedEncrypted,
        content: PlainContent::Apdu { apdu: hex::decode(apdu).unwrap(), general: false },
    }
}

fn request() -> RequestId {
    RequestId::from_octets(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

/// The counter of one frame to meter 1, or why there is none.
async fn get(server: &Arc<IslandContext>, caller: &Caller, supersede: bool) -> Result<u32, ServiceError> {
    let (mut outcomes, _) = FrameService::new(server.clone())
        .protect(caller, request(), [1; 32], Purpose::Read, vec![plain(1, GET)], supersede)
        .await
        .unwrap();
    let outcome = outcomes.remove(0);
    outcome.octets.map(|_| outcome.counter)
}

/// A meter's answer to the challenge of 16 octets 07, made with a pair of its candidates.
async fn answer(field: &Field, pair: (u32, u32), counter: u32) -> ReceivedFrame {
    let row = field.row(0).await;
    let number = |number| KeyVersionNumber::new(number).unwrap();
    let keys = pair_keys(
        &row,
        SecuritySetupId::DEFAULT,
        KeyPair { encryption: number(pair.0), authentication: number(pair.1) },
    )
    .unwrap();
    let parameters =
        FrameParameters::new(HlsGmac::control(row.suite).octet(), *Nonce::new(row.title, counter).octets()).unwrap();
    let made = field
        .island
        .island
        .hsm
        .protect_batch(vec![(keys, FrameInput { parameters, plaintext: vec![7; 16] })])
        .await
        .unwrap()
        .remove(0)
        .unwrap();
    let response = HlsGmac { suite: row.suite, counter, tag: AuthenticationTag(made.tag) }.octets().to_vec();
    ReceivedFrame {
        meter: row.title,
        setup: None,
        content: ReceivedContent::HlsResponse { response, challenge: vec![7; 16] },
    }
}

/// Lends counters as a session does.
async fn lease(server: &Arc<IslandContext>, until: UnixMillis) -> Lease {
    let of = CounterOf {
        owner: kms_domain::Owner::Meter(meter(1)),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    };
    let committed = server.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        Reads::default(),
        move |view| {
            view.append(Event::KeysGranted(v1::KeysGranted::default()));
            view.lease(of, NonZeroU32::new(100).unwrap(), until)
        },
    );
    committed.await.unwrap().value
}

/// How often meter 1's row was written.
async fn generation(island: &TestIsland) -> u64 {
    island.island.store.meters(&[meter(1)]).await.unwrap()[0].row.generation
}

fn refused(outcome: Result<u32, ServiceError>) -> String {
    match outcome {
        Err(error @ ServiceError::FailedPrecondition { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// remote_disconnect of the disconnect control.
const DISCONNECT: &str = "C301C10046000060030AFF01010F00";
/// security_activate of the security setup.
const ACTIVATE: &str = "C301C1004000002B0000FF01011603";

/// Set of a script table.
const SET_SCRIPTS: &str = "c101c10009";

/// What became of commands to meters, one request each.
async fn command(
    server: &Arc<IslandContext>,
    caller: &Caller,
    apdu: &str,
    meters: &[u64],
) -> Vec<Result<(), ServiceError>> {
    let purpose =
        if apdu == DISCONNECT || apdu.starts_with(SET_SCRIPTS) { Purpose::Control } else { Purpose::Configure };
    let frames = meters.iter().map(|number| plain(*number, apdu)).collect();
    let (outcomes, _) =
        FrameService::new(server.clone()).protect(caller, request(), [1; 32], purpose, frames, false).await.unwrap();
    outcomes.into_iter().map(|outcome| outcome.octets.map(drop)).collect()
}

/// Quotas that a test can use up.
fn limit(server: &IslandContext, limits: &str) {
    let text = format!(
        "quota = [{{ name = \"supply\", criticality = \"supply-control\", limit = [{limits}] }}, {{ name = \"security\", criticality = \
         \"security-setup\" }}, {{ name = \"image\", criticality = \"image-transfer\" }}]"
    );
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../../policies")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cedar") {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    std::fs::write(folder.path().join(kms_authz::Quotas::FILE), text).unwrap();
    server.policy.store(Arc::new(kms_policy::load(Some(folder.path())).unwrap()));
}

/// Quotas are free again when the next hour begins. A test that counts waits until that does not
/// happen meanwhile.
async fn away_from_the_end_of_an_hour() {
    let left = || QuotaHour::of(IslandContext::now()).end().0 - IslandContext::now().0;
    while left() < 2 * 60_000 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn exhausted(outcome: &Result<(), ServiceError>) -> &str {
    match outcome {
        Err(ServiceError::ResourceExhausted { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

island_tests! {
    async fn a_quota_holds_for_all_servers_and_after_a_restart(island) {
        away_from_the_end_of_an_hour().await;
        island.deliver(&sample("generic-suite0", 5)).await;
        let another = island.another_server().await;
        let two = r#"{ role = "head-end", commands = 2 }"#;
        limit(&island.island, two);
        limit(&another, two);
        // One on each server, the second in a request with one too many; reading is not counted.
        assert_eq!(command(&island.island, &island.head_end, DISCONNECT, &[1]).await, [Ok(())]);
        let outcomes = command(&another, &island.head_end, DISCONNECT, &[2, 3]).await;
        assert_eq!(outcomes[0], Ok(()));
        let reason = exhausted(&outcomes[1]);
        assert!(reason.contains("quota `supply` is used up: 2 commands an hour; it frees at 20") && reason.contains("can raise it"), "{reason}");
        get(&another, &island.head_end, false).await.unwrap();
        exhausted(&command(&island.island, &island.head_end, DISCONNECT, &[1]).await[0]);
        let restarted = Arc::new(island.restarted().await);
        limit(&restarted, two);
        exhausted(&command(&restarted, &island.head_end, DISCONNECT, &[1]).await[0]);

        // A refusal takes no counter, and is on the record.
        let before = get(&restarted, &island.head_end, false).await.unwrap();
        exhausted(&command(&restarted, &island.head_end, DISCONNECT, &[1]).await[0]);
        assert_eq!(get(&restarted, &island.head_end, false).await.unwrap(), before + 1);
        let refused = island.recorded(|event| match event { Event::Refused(event) => Some(event.reason), _ => None }).await;
        assert!(refused.iter().any(|reason| reason.contains("quota `supply` is used up")), "{refused:?}");

        // I5: whoever puts an older row back is found.
        let name = quota_use_row(&island.head_end.principal);
        let mut row = island.island.store.sealed(name.0, &name.1).await.unwrap().unwrap();
        row.body.clear();
        let raised = kms_store::Changes { sealed: vec![kms_store::SealedPut { kind: name.0, id: name.1, row: kms_store::SealedRow { generation: row.generation + 1, ..row } }], ..Default::default() };
        island.island.store.transact(Reads::default(), &mut |_: &kms_store::ReadSet| kms_store::Decision::Commit(Box::new(raised.clone()))).await.unwrap();
        assert!(matches!(command(&another, &island.head_end, DISCONNECT, &[1]).await[0], Err(ServiceError::PermissionDenied { .. })));
    }

    async fn a_quota_is_of_one_principal_and_counts_meters(island) {
        away_from_the_end_of_an_hour().await;
        island.deliver(&sample("generic-suite0", 5)).await;
        let limits = r#"{ principal = "urn:meterkms:north:head-end:hes-1", commands = 9, meters = 2 }"#;
        limit(&island.island, limits);
        let outcomes = command(&island.island, &island.head_end, DISCONNECT, &[1, 2, 1, 3, 2]).await;
        assert!([0, 1, 2, 4].iter().all(|at| outcomes[*at].is_ok()), "{outcomes:?}");
        assert!(exhausted(&outcomes[3]).contains("commands to 2 meters an hour"));
        // I8: a quota without a limit for the role gives nothing.
        let reason = command(&island.island, &island.head_end, ACTIVATE, &[1]).await;
        assert!(exhausted(&reason[0]).contains("quota `security` gives this principal no commands"));

        // Another head-end, with a title and meters of its own, has its own count.
        let mut row = kms_domain::Principal::clone(&*island.island.principal(&island.other_head_end).await.unwrap());
        let other_title = SystemTitle::parse("4D4D4D0000000002").unwrap();
        row.client_titles = vec![other_title];
        crate::testing::put_principal(&island.island, row).await;
        let mut more = sample("generic-suite0", 1);
        more.batch = "other".to_owned();
        more.first_number = 900;
        let (file, signature) = island.sample(&more).await;
        let sha256 = island.upload(&file, &signature).await;
        island.import(sha256, Some(&island.other_head_end)).await;
        let frame = PlainFrame { client_title: other_title, ..plain(900, DISCONNECT) };
        limit(&island.island, r#"{ role = "head-end", commands = 1 }"#);
        for expected in [true, false] {
            let (outcomes, _) = FrameService::new(island.island.clone())
                .protect(&island.other_head_end, request(), [1; 32], Purpose::Control, vec![frame.clone()], false)
                .await
                .unwrap();
            assert_eq!(outcomes[0].octets.is_ok(), expected, "{:?}", outcomes[0].octets);
        }
    }

    async fn a_repeated_request_is_counted_once(island) {
        away_from_the_end_of_an_hour().await;
        island.deliver(&sample("generic-suite0", 1)).await;
        limit(&island.island, r#"{ role = "head-end", commands = 2 }"#);
        let id = request();
        let service = FrameService::new(island.island.clone());
        let mut octets = Vec::new();
        for _ in 0..3 {
            let (mut outcomes, _) = service.protect(&island.head_end, id, [1; 32], Purpose::Control, vec![plain(1, DISCONNECT)], false).await.unwrap();
            octets.push(outcomes.remove(0).octets.unwrap());
        }
        assert!(octets.iter().all(|repeated| *repeated == octets[0]));
        assert_eq!(command(&island.island, &island.head_end, DISCONNECT, &[1]).await, [Ok(())]);
        exhausted(&command(&island.island, &island.head_end, DISCONNECT, &[1]).await[0]);
    }

    /// A head-end that has recorded the wrap of a key that it knows does not bring it back.
    async fn a_frame_carries_the_key_of_a_transfer_under_way_and_no_other(island) {
        let field = Field::of(island, &sample("generic-suite0", 2)).await;
        let deliver = async || {
            let step = field.begin(Order { form: TransferForm::WrappedKey, ..order(field.title(0), Some(KeyType::GUEK)) }).await;
            match step.next.unwrap() {
                NextStep::Send(sending) => (step.transfer.unwrap(), sending.delivery.unwrap().argument),
                NextStep::End { .. } => panic!("it is over"),
            }
        };
        // With an invoke id of the head-end's own.
        let request = |argument: &[u8]| [hex::decode("C301C2004000002B0000FF0201").unwrap(), argument.to_vec()].concat();
        let ((id, step), argument) = deliver().await;
        let sound = request(&argument);
        command(&field.island.island, &field.island.head_end, &hex::encode(&sound), &[1]).await.remove(0).unwrap();
        let mut others: Vec<Vec<u8>> = (0..argument.len()).map(|at| {
            let mut changed = argument.clone();
            changed[at] ^= 1;
            request(&changed)
        }).collect();
        let descriptor = "004000002B0000FF02";
        let wrapped = hex::encode(&argument);
        for carrier in [
            // In a list, alone and twice; in a block; to another security setup.
            format!("C303C101{descriptor}01{wrapped}"),
            format!("C303C102{descriptor}{descriptor}02{wrapped}{wrapped}"),
            format!("C304C1{descriptor}0100000001{:02X}{wrapped}", argument.len()),
            format!("C305C101{descriptor}0100000001{:02X}01{wrapped}", argument.len() + 1),
            format!("C301C1004000002B0001FF0201{wrapped}"),
            // key_agreement, import_certificate, change_HLS_secret, an LLS secret, an M-Bus device,
            // data protection, a script.
            "C301C1004000002B0000FF03010100".to_owned(),
            "C301C1004000002B0000FF060109020000".to_owned(),
            "C301C1000F0000280000FF020109020000".to_owned(),
            "C101C1000F0000280000FF070009020000".to_owned(),
            "C104C102000800000100 00FF0200000F0000280000FF07000200 09020000".replace(' ', ""),
            "C301C100480001180000FF070109020000".to_owned(),
            "C301C1001E00002B0200FF030100".to_owned(),
            format!("C101C1000900000A0064FF0200010102021200010101020516021200400906000 02B0000FF0F02{wrapped}").replace(' ', ""),
        ] {
            others.push(hex::decode(carrier).unwrap());
        }
        for other in &others {
            let refused = command(&field.island.island, &field.island.head_end, &hex::encode(other), &[1]).await.remove(0);
            assert!(matches!(refused, Err(ServiceError::FailedPrecondition { .. } | ServiceError::InvalidArgument { .. })), "{}: {refused:?}", hex::encode(other));
        }
        let refused = async |number: u64| {
            let refused = command(&field.island.island, &field.island.head_end, &hex::encode(&sound), &[number]).await.remove(0);
            matches!(refused, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("transfer under way"))
        };
        assert!(refused(2).await, "another meter");
        // The step is over, and then the transfer; the key is recorded, and another transfer of the
        // same key brings another one.
        field.report(&field.island.head_end, field.title(0), id, step, ReportedAnswer::Nothing).await;
        assert!(refused(1).await);
        field.service.withdraw(&field.island.head_end, field.request(), vec![(field.title(0), id)], String::new()).await.unwrap();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        let (_, next) = deliver().await;
        assert!(next != argument && refused(1).await);
        command(&field.island.island, &field.island.head_end, &hex::encode(request(&next)), &[1]).await.remove(0).unwrap();
    }

    async fn frames_alone_are_never_refused_for_a_lease(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let another = island.another_server().await;
        let restarted = Arc::new(island.restarted().await);
        let mut last = 0;
        for server in [&island.island, &island.island, &another, &island.island, &another, &restarted] {
            let counter = get(server, &island.head_end, false).await.unwrap();
            assert!(counter > last, "I4");
            last = counter;
        }
    }

    async fn a_lease_is_known_to_the_server_that_allocated_it_with_its_end(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let server = &island.island;
        get(server, &island.head_end, false).await.unwrap();
        let written = generation(&island).await;
        // The chunk was reserved for frames: one write says that a lease comes from it, and the
        // next leases write nothing.
        lease(server, UnixMillis(1)).await;
        assert_eq!(generation(&island).await, written + 1);
        let last = lease(server, IslandContext::now().after(60_000)).await.last();
        assert_eq!(generation(&island).await, written + 1);
        assert!(refused(get(server, &island.head_end, false).await).contains("holds a live counter lease"));
        let counter = get(server, &island.head_end, true).await.unwrap();
        assert!(counter > last, "I4");
        // It is superseded now, and one that has ended is nobody's hindrance.
        assert_eq!(get(server, &island.head_end, false).await.unwrap(), counter + 1);
        lease(server, UnixMillis(1)).await;
        get(server, &island.head_end, false).await.unwrap();
        assert_eq!(generation(&island).await, written + 1);
    }

    async fn a_lease_of_another_server_is_known_and_can_be_superseded(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let (one, another) = (&island.island, island.another_server().await);
        let leased = lease(one, IslandContext::now().after(60_000)).await;
        assert!(refused(get(&another, &island.head_end, false).await).contains("another server"));
        let counter = get(&another, &island.head_end, true).await.unwrap();
        assert!(counter > leased.last(), "I4");
        // The lease has ended for all of them, the one that allocated it included.
        let after = get(&another, &island.head_end, false).await.unwrap();
        assert!(get(one, &island.head_end, false).await.unwrap() > after, "I4");
        get(&another, &island.head_end, false).await.unwrap();
        // A lease from a chunk that another server reserved for frames.
        lease(one, UnixMillis(1)).await;
        assert!(refused(get(&another, &island.head_end, false).await).contains("supersede_lease"));
    }

    async fn a_key_that_has_used_its_counters_asks_for_its_rotation_once(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let due = kms_domain::CounterState::ROTATION_DUE;
        island.take_counters_over(meter(1), due - 1).await;
        let another = island.another_server().await;
        for server in [&island.island, &island.island, &another] {
            assert!(u64::from(get(server, &island.head_end, false).await.unwrap()) + 1 >= due);
        }
        let about_meters = |event| match event {
            // What PostgreSQL is noted for at a first start is about no meter.
            Event::SecurityEvent(event) if !event.meter.is_empty() => Some(event),
            _ => None,
        };
        let events = island.recorded(about_meters).await;
        assert_eq!(events.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(), ["counter-rotation-due"]);
        assert!(events[0].meter == meter(1).octets().as_slice() && events[0].detail.contains("80 %"), "{}", events[0].detail);
        // Officers see it, and find it.
        let meters = crate::meter::MeterService::new(island.island.clone());
        let shown = meters.show(&island.officer, meter(1)).await.unwrap();
        assert!(shown.summary.unwrap().rotation_due && shown.security_setups[0].counters[0].rotation_due);
        assert!(!meters.show(&island.officer, meter(2)).await.unwrap().summary.unwrap().rotation_due);
        // Near the end: the last counter is used that is not a transfer's alone, and then none.
        island.take_counters_over(meter(2), kms_domain::CounterState::SESSIONS_END - 1).await;
        let last = || async {
            let frames = vec![plain(2, GET)];
            let (mut outcomes, _) = FrameService::new(island.island.clone())
                .protect(&island.head_end, request(), [1; 32], Purpose::Read, frames, false)
                .await
                .unwrap();
            let outcome = outcomes.remove(0);
            outcome.octets.map(|_| outcome.counter)
        };
        assert_eq!(last().await, Ok(u32::try_from(kms_domain::CounterState::SESSIONS_END - 1).unwrap()));
        assert!(refused(last().await).contains("none left for sessions and frames"));
    }

    async fn an_answer_under_an_earlier_key_is_refused_and_told(island) {
        let field = Field::of(island, &sample("generic-suite0", 1)).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        let service = FrameService::new(field.island.island.clone());
        let refusal = async |frame| match service.unprotect(&field.island.head_end, Purpose::Read, vec![frame]).await.unwrap().remove(0).octets {
            Err(ServiceError::FailedPrecondition { reason, next_step }) => (reason, next_step),
            other => panic!("{other:?}"),
        };
        for _ in 0..2 {
            let (reason, next_step) = refusal(answer(&field, (1, 1), 900).await).await;
            assert!(reason.contains("the meter holds GUEK version 1") && next_step.contains("probe"), "{reason}; {next_step}");
        }
        assert_eq!(field.security_events().await, [EARLIER_KEY_HELD], "said once");
        // I3: nothing has become of it.
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert_eq!((slot.active().unwrap().number().number(), slot.in_doubt()), (2, false));
        // One that no candidate made tells nothing.
        let mut foreign = answer(&field, (1, 1), 901).await;
        if let ReceivedContent::HlsResponse { challenge, .. } = &mut foreign.content {
            challenge[0] = 8;
        }
        assert!(refusal(foreign).await.0.contains("does not verify"));
        // A new key that was never active is in doubt, which is no event: a probe decides.
        let left = field.begin(Order { form: TransferForm::WrappedKey, ..order(field.title(0), Some(KeyType::GUEK)) }).await;
        assert!(left.next.is_ok(), "{left:?}");
        let (reason, next_step) = refusal(answer(&field, (3, 1), 902).await).await;
        assert!(reason.contains("left it unknown") && next_step.contains("probe"), "{reason}; {next_step}");
        assert_eq!(field.security_events().await.len(), 1);
        assert_eq!(field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap().number().number(), 2);
    }

    async fn a_lease_is_known_after_a_restart(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        lease(&island.island, IslandContext::now().after(60_000)).await;
        let restarted = Arc::new(island.restarted().await);
        assert!(refused(get(&restarted, &island.head_end, false).await).contains("before its last start"));
        get(&restarted, &island.head_end, true).await.unwrap();
        get(&restarted, &island.head_end, false).await.unwrap();
    }
}
