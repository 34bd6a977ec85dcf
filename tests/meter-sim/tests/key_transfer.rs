//! What meters in the field do on `key_transfer`, row by row, and what the network does to it.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::time::Duration;

use common::{
    CLIENT_TITLE, Client, ENERGY, METER_TITLE, bytes, ciphering, client_config, config, counter_exception, exception,
    gak, guek, kek, key_of, meter, reading,
};
use meter_sim::behaviour::{ArrayTransfer, Behaviour, CounterOnNewKey, Fault, HexBytes, ScriptedFault, Trigger};
use meter_sim::nonces::RepeatedNonce;
use meter_sim::security::{Ciphering, wrap_key};
use meter_sim::{Connection, Delivery, Error, KeyId, Meter, Obis, SymmetricKey};

const GUEK: KeyId = KeyId::GlobalUnicastEncryption;
const GBEK: KeyId = KeyId::GlobalBroadcastEncryption;
const GAK: KeyId = KeyId::GlobalAuthentication;
const KEK: KeyId = KeyId::Master;

#[test]
fn the_answer_comes_under_the_old_key_and_the_new_one_counts_from_then_on() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    let new = key_of(0xA5);
    // The session opens the answer with the old key.
    client.transfer_key(GUEK, &kek(), &new).unwrap();
    assert_eq!(keys(&meter).guek, new);
    // Old key, same association.
    assert_eq!(client.get(ENERGY), Err(exception(2, 5)));
    client.session.set_keys(Ciphering { encryption: new, ..ciphering() });
    assert_eq!(client.get(ENERGY), Ok(reading()));
    // Old key, new association.
    let mut old = Client::new(&meter, client_config(1000));
    assert_eq!(old.associate(), Err(exception(1, 5)));
    assert_eq!(RepeatedNonce::find(&[meter]), []);
}

#[test]
fn every_key_can_be_changed() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    client.transfer_key(GBEK, &kek(), &key_of(1)).unwrap();
    client.transfer_key(GAK, &kek(), &key_of(2)).unwrap();
    client.session.set_keys(Ciphering { authentication: key_of(2), ..ciphering() });
    client.transfer_key(KEK, &kek(), &key_of(3)).unwrap();
    // The old KEK stopped at once.
    assert_eq!(client.transfer_key(GUEK, &kek(), &key_of(4)), Err(Error::Action(9)));
    client.transfer_key(GUEK, &key_of(3), &key_of(4)).unwrap();
    let keys = keys(&meter);
    assert_eq!((keys.gbek, keys.gak, keys.kek, keys.guek), (Some(key_of(1)), key_of(2), key_of(3), key_of(4)));
}

#[test]
fn a_wrong_kek_has_the_result_of_the_device() {
    for result in [9, 250, 3] {
        let meter = meter_with(Behaviour { wrong_kek_result: result, ..Behaviour::default() });
        let mut client = Client::associated(&meter, client_config(1));
        let wrong = wrap_key(&key_of(0x99), &key_of(1)).unwrap();
        let request = client.session.key_transfer_request(Obis::SECURITY_SETUP, &[(GUEK, &wrong)]).unwrap();
        let answer = client.exchange(&request);
        assert_eq!(client.session.process_action_response(&answer), Err(Error::Action(result)));
        assert_eq!(keys(&meter).guek, guek());
        // Nothing else happened: the session goes on.
        assert_eq!(client.get(ENERGY), Ok(reading()));
    }
}

#[test]
fn a_good_and_a_bad_item_give_an_error_and_change_the_key() {
    for (array, expected) in [(ArrayTransfer::ApplyUntilError, key_of(0xA5)), (ArrayTransfer::AllOrNothing, guek())] {
        let meter = meter_with(Behaviour { array, ..Behaviour::default() });
        let mut client = Client::associated(&meter, client_config(1));
        let good = wrap_key(&kek(), &key_of(0xA5)).unwrap();
        let bad = wrap_key(&key_of(0x99), &key_of(1)).unwrap();
        assert_eq!(client.transfer(&[(GUEK, &good), (GAK, &bad)]), Err(Error::Action(9)));
        assert_eq!(keys(&meter).guek, expected);
        assert_eq!(keys(&meter).gak, gak());
    }
}

#[test]
fn malformed_arguments_change_nothing() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    assert_eq!(client.transfer(&[]), Err(Error::Action(12)));
    assert_eq!(client.transfer(&[(GUEK, &[0; 16])]), Err(Error::Action(9)));
    let long = wrap_key(&kek(), &SymmetricKey::new(&[7; 32]).unwrap()).unwrap();
    assert_eq!(client.transfer(&[(GUEK, &long)]), Err(Error::Action(9)));
    assert_eq!(keys(&meter).guek, guek());
}

#[test]
fn counters_on_a_new_key_go_on_or_restart() {
    for (counter_on_new_key, last_accepted, first_own) in [
        (CounterOnNewKey::KeepCounting, Some(103), 4),
        (CounterOnNewKey::RestartAt(0), None, 0),
        (CounterOnNewKey::RestartAt(250), Some(249), 250),
    ] {
        let meter = meter_with(Behaviour { counter_on_new_key, ..Behaviour::default() });
        let mut client = Client::associated(&meter, client_config(100));
        client.transfer_key(GUEK, &kek(), &key_of(0xA5)).unwrap();
        assert_eq!(meter.last_accepted_counter(Obis::SECURITY_SETUP, &CLIENT_TITLE), last_accepted);
        client.session.set_keys(Ciphering { encryption: key_of(0xA5), ..ciphering() });
        if let Some(last) = last_accepted.filter(|last| *last > 104) {
            assert_eq!(client.get(ENERGY), Err(counter_exception(last)));
            let mut config = client_config(last + 1);
            config.keys.encryption = key_of(0xA5);
            client = Client::new(&meter, config);
            client.associate().unwrap();
        }
        assert_eq!(client.get(ENERGY), Ok(reading()));
        let first = meter
            .nonce_log()
            .into_iter()
            .find(|nonce| {
                nonce.sender == METER_TITLE && meter.nonce_key_for_inspection(nonce.key) == Some(key_of(0xA5))
            })
            .unwrap();
        assert_eq!(first.counter, first_own);
        assert_eq!(RepeatedNonce::find(&[meter]), []);
    }
}

#[test]
fn a_power_cycle_ends_associations_and_may_bring_the_old_key_back() {
    for reverts in [false, true] {
        let meter = meter_with(Behaviour {
            reverts_on_power_cycle: if reverts { [GUEK, KEK].into() } else { [].into() },
            ..Behaviour::default()
        });
        let mut client = Client::associated(&meter, client_config(1));
        client.transfer_key(KEK, &kek(), &key_of(3)).unwrap();
        client.transfer_key(GUEK, &key_of(3), &key_of(4)).unwrap();
        meter.power_cycle();
        assert!(!client.connection.is_associated());
        assert_eq!(client.get(ENERGY), Err(exception(1, 1)));
        let now = keys(&meter);
        let expected = if reverts { (guek(), kek()) } else { (key_of(4), key_of(3)) };
        assert_eq!((now.guek.clone(), now.kek), expected);
        client.session.set_keys(Ciphering { encryption: now.guek, ..ciphering() });
        client.associate().unwrap();
        // A second power cycle changes nothing more.
        meter.power_cycle();
        assert_eq!(keys(&meter).guek, expected.0);
        assert_eq!(RepeatedNonce::find(&[meter]), []);
    }
}

#[test]
fn key_transfer_needs_the_ciphered_association() {
    let meter = meter();
    let mut connection = Connection::new(meter.clone(), 16);
    let plain = bytes("C301C1004000002B0000FF02010101020216000918C97E5B71207F159EDDCCB965D7DCF3FD1A14AC7F2CF25E1E");
    assert_eq!(connection.exchange(&plain), Some(bytes("D80101")));
    assert_eq!(keys(&meter).guek, guek());
}

#[tokio::test]
async fn faults_of_the_meter_at_a_stated_transfer() {
    for (fault, expected, applied) in [
        (Fault::AppliedButError(250), Err(Error::Action(250)), true),
        (Fault::RefusedWithoutApplying(2), Err(Error::Action(2)), false),
        (Fault::SuccessWithoutApplying, Ok(None), false),
    ] {
        let meter = meter();
        meter.add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault });
        let mut client = Client::associated(&meter, client_config(1));
        let delivery = deliver_transfer(&mut client, &key_of(0xA5)).await;
        let [answer] = delivery.answers.as_slice() else {
            panic!("{delivery:?}");
        };
        assert_eq!(client.session.process_action_response(answer), expected);
        assert_eq!(keys(&meter).guek == key_of(0xA5), applied);
        assert_eq!(meter.key_transfers(), 1);
    }
}

#[tokio::test]
async fn faults_of_the_network_at_a_stated_transfer() {
    let unchanged = guek();
    let changed = key_of(0xA5);
    for (fault, answers, expected) in [
        (Fault::LoseRequest, 0, &unchanged),
        (Fault::PowerCycleBefore, 0, &unchanged),
        (Fault::LoseAnswer, 0, &changed),
        (Fault::PowerCycleBeforeAnswer, 0, &changed),
        (Fault::PowerCycleAfter, 1, &changed),
        (Fault::CloseConnection, 0, &changed),
        (Fault::DuplicateRequest, 2, &changed),
        (Fault::DuplicateAnswer, 2, &changed),
        (Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 5])), 1, &changed),
        (Fault::RepeatPreviousAnswer, 1, &changed),
        (Fault::CorruptAnswer(0), 1, &changed),
        (Fault::HoldRequest(1), 0, &unchanged),
    ] {
        let meter = meter();
        meter.add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault: fault.clone() });
        let mut client = Client::associated(&meter, client_config(1));
        let delivery = deliver_transfer(&mut client, &changed).await;
        assert_eq!(delivery.answers.len(), answers, "{fault:?}");
        assert_eq!(&keys(&meter).guek, expected, "{fault:?}");
        assert_eq!(delivery.closes, fault == Fault::CloseConnection);
        let mut readable = delivery.answers.iter().map(|answer| client.session.process_action_response(answer));
        match fault {
            Fault::DuplicateRequest => {
                assert_eq!(readable.next(), Some(Ok(None)));
                // The copy came after the change: its tag no longer fits, its counter is stale
                // first.
                assert!(matches!(readable.next(), Some(Err(Error::Exception(_)))));
            }
            Fault::DuplicateAnswer => {
                assert_eq!(readable.next(), Some(Ok(None)));
                assert!(matches!(readable.next(), Some(Err(Error::CounterNotIncreasing { .. }))));
            }
            Fault::WrongAnswer(_) => assert_eq!(readable.next(), Some(Err(exception(1, 5)))),
            Fault::RepeatPreviousAnswer => {
                assert!(matches!(readable.next(), Some(Err(Error::CounterNotIncreasing { .. }))))
            }
            Fault::CorruptAnswer(_) => {
                assert_eq!(readable.next(), Some(Err(Error::Deciphering)));
            }
            _ => assert!(readable.all(|read| read == Ok(None))),
        }
        assert_eq!(RepeatedNonce::find(&[meter]), []);
    }
}

/// A request that is late: a later one overtook it, so its counter is stale; or it arrives first
/// after a new association, in time to change the key behind the head-end's back.
#[tokio::test]
async fn a_held_request_arrives_later() {
    let meter = meter();
    meter.add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault: Fault::HoldRequestAndAnswer(1) });
    let mut client = Client::associated(&meter, client_config(1));
    assert_eq!(deliver_transfer(&mut client, &key_of(0xA5)).await, Delivery::default());
    let get = client.session.get_request(ENERGY).unwrap();
    let delivery = client.connection.deliver(&get).await;
    assert_eq!(delivery.answers.len(), 2);
    assert_eq!(client.session.process_get_response(&delivery.answers[0]), Ok(reading()));
    assert_eq!(client.session.process_action_response(&delivery.answers[1]), Err(counter_exception(5)));
    assert_eq!(keys(&meter).guek, guek());

    // With a title of its own the overtaking client leaves the counter alone: the late one counts.
    meter.add_fault(ScriptedFault { at: Trigger::KeyTransfer(2), fault: Fault::HoldRequest(1) });
    deliver_transfer(&mut client, &key_of(0xA5)).await;
    assert_eq!(keys(&meter).guek, guek());
    client.connection.deliver(&[0x00]).await;
    assert_eq!(keys(&meter).guek, key_of(0xA5));
}

#[tokio::test]
async fn delays_take_their_time() {
    let meter = meter();
    for fault in [Fault::DelayRequest(30), Fault::DelayAnswer(40)] {
        meter.add_fault(ScriptedFault { at: Trigger::Exchange(1), fault });
    }
    let mut client = Client::new(&meter, client_config(1));
    let aarq = client.session.association_request().unwrap();
    let start = std::time::Instant::now();
    let delivery = client.connection.deliver(&aarq).await;
    assert_eq!(delivery.answers.len(), 1);
    assert!(start.elapsed() >= Duration::from_millis(70));
    assert_eq!(meter.exchanges(), 1);
}

#[test]
fn behaviours_and_faults_are_read_from_json() {
    let behaviour: Behaviour = serde_json::from_str(
        r#"{"wrong_kek_result": 250, "array": "all-or-nothing",
            "counter_on_new_key": {"restart-at": 250},
            "reverts_on_power_cycle": ["global-unicast-encryption", "master"],
            "gmac_counter": "must-differ"}"#,
    )
    .unwrap();
    assert_eq!(behaviour.counter_on_new_key, CounterOnNewKey::RestartAt(250));
    assert_eq!(behaviour.reverts_on_power_cycle, [GUEK, KEK].into());
    let faults: Vec<ScriptedFault> = serde_json::from_str(
        r#"[{"at": {"key-transfer": 2}, "fault": {"applied-but-error": 250}},
            {"at": {"exchange": 7}, "fault": "lose-answer"},
            {"at": {"association-request": 1}, "fault": {"wrong-answer": "D80105"}}]"#,
    )
    .unwrap();
    assert_eq!(faults[2].fault, Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 5])));
}

fn keys(meter: &Meter) -> meter_sim::inspect::InspectedKeys {
    meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap()
}

fn meter_with(behaviour: Behaviour) -> Meter {
    let mut config = config();
    config.behaviour = behaviour;
    Meter::new(config).unwrap()
}

async fn deliver_transfer(client: &mut Client, new: &SymmetricKey) -> Delivery {
    let wrapped = wrap_key(&kek(), new).unwrap();
    let request = client.session.key_transfer_request(Obis::SECURITY_SETUP, &[(GUEK, &wrapped)]).unwrap();
    client.connection.deliver(&request).await
}
