//! Associations, services, and what a meter refuses.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a helper that fails is a test that fails"
)]

mod common;

use common::{
    CLIENT_TITLE, Client, ENERGY, METER_TITLE, bytes, ciphering, client_config, config, counter_exception, exception,
    key_of, meter, reading,
};
use meter_sim::acse::{ApplicationContext, AssociationRequest, AssociationResponse, Mechanism};
use meter_sim::axdr::Data;
use meter_sim::behaviour::GmacCounter;
use meter_sim::ciphered::{CipheredApdu, CipheredForm};
use meter_sim::client::ClientSession;
use meter_sim::config::{AssociationConfig, CounterScope, MechanismConfig, SecuritySetupConfig};
use meter_sim::inspect::Refusal;
use meter_sim::nonces::RepeatedNonce;
use meter_sim::security::{Ciphering, SecurityControl};
use meter_sim::xdlms::{
    AttributeDescriptor, DataAccessResult, ExceptionResponse, InitiateRequest, MethodDescriptor, ServiceRequest,
    ServiceResponse,
};
use meter_sim::{
    CLASS_ASSOCIATION, CLASS_CLOCK, CLASS_DATA, CLASS_DISCONNECT_CONTROL, CLASS_SECURITY_SETUP, ChallengeSource,
    Connection, Error, Meter, MeterConfig, Obis, REQUESTS, Secret, SecuritySuite, SymmetricKey, SystemTitle,
};

const SUITE: SecuritySuite = SecuritySuite::Suite0;

#[test]
fn reads_a_register_in_every_form() {
    for general_ciphering in [false, true] {
        for dedicated_key in [None, Some(key_of(0x77))] {
            let meter = meter();
            let mut client = Client::associated(
                &meter,
                meter_sim::client::ClientConfig {
                    general_ciphering,
                    dedicated_key: dedicated_key.clone(),
                    ..client_config(1)
                },
            );
            let request = client.session.get_request(ENERGY).unwrap();
            let answer = client.exchange(&request);
            let expected_tags = match (general_ciphering, dedicated_key.is_some()) {
                (false, false) => [0xC8, 0xCC],
                (false, true) => [0xD0, 0xD4],
                (true, false) => [0xDB, 0xDB],
                (true, true) => [0xDC, 0xDC],
            };
            assert_eq!([request[0], answer[0]], expected_tags);
            assert_eq!(client.session.process_get_response(&answer), Ok(reading()));
            assert_eq!(RepeatedNonce::find(&[meter]), []);
        }
    }
}

#[test]
fn works_in_suites_1_and_2() {
    for suite in [SecuritySuite::Suite1, SecuritySuite::Suite2] {
        let random = || SymmetricKey::random(suite).unwrap();
        let keys = Ciphering { encryption: random(), authentication: random() };
        let kek = random();
        let setup = SecuritySetupConfig::new(keys.encryption.clone(), keys.authentication.clone(), kek.clone());
        let meter = Meter::new(MeterConfig::ordinary(METER_TITLE, suite, setup)).unwrap();
        let mut client = Client::associated(
            &meter,
            meter_sim::client::ClientConfig {
                suite,
                keys: keys.clone(),
                dedicated_key: Some(random()),
                ..client_config(1)
            },
        );
        assert_eq!(client.get(ENERGY), Ok(reading()));
        let new = random();
        client.transfer_key(meter_sim::KeyId::GlobalUnicastEncryption, &kek, &new).unwrap();
        let inspected = meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        assert_eq!(inspected.guek, new);
    }
}

#[test]
fn a_key_of_the_wrong_length_makes_no_meter() {
    let setup = SecuritySetupConfig::new(key_of(1), key_of(2), key_of(3));
    let config = MeterConfig::ordinary(METER_TITLE, SecuritySuite::Suite2, setup);
    assert!(Meter::new(config).is_err());
}

#[test]
fn associates_again_and_releases() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    for _ in 0..3 {
        let request = client.session.release_request().unwrap();
        let answer = client.exchange(&request);
        client.session.process_release_response(&answer).unwrap();
        assert!(!client.connection.is_associated());
        client.associate().unwrap();
        assert_eq!(client.get(ENERGY), Ok(reading()));
    }
    assert_eq!(RepeatedNonce::find(&[meter]), []);
}

#[test]
fn nothing_but_the_hls_answer_is_served_before_hls() {
    let meter = meter();
    let mut client = Client::new(&meter, client_config(1));
    let aarq = client.session.association_request().unwrap();
    let aare = client.exchange(&aarq);
    client.session.process_association_response(&aare).unwrap();
    let get = protected(CLIENT_TITLE, 50, &get_request(ENERGY).encode());
    assert_eq!(client.exchange(&get), bytes("D80101"));
    assert!(!client.connection.is_associated());
}

#[test]
fn a_wrong_hls_answer_ends_the_association() {
    let meter = meter();
    let mut client = Client::new(&meter, client_config(1));
    let aarq = client.session.association_request().unwrap();
    let aare = client.exchange(&aarq);
    client.session.process_association_response(&aare).unwrap();
    let answer = ciphering().answer_challenge(SUITE, &CLIENT_TITLE, 40, b"not the challenge").unwrap();
    let request = hls_request(answer);
    let answer = client.exchange(&protected(CLIENT_TITLE, 41, &request));
    assert_eq!(client.session.process_hls_response(&answer), Err(Error::Action(DataAccessResult::OTHER_REASON.0)));
    let get = protected(CLIENT_TITLE, 42, &get_request(ENERGY).encode());
    assert_eq!(client.exchange(&get), bytes("D80101"));
}

/// The challenges of a meter's next associations.
fn challenges(meter: &Meter, count: u32) -> Vec<Vec<u8>> {
    let one = |number| {
        let mut client = Client::new(meter, client_config(1 + number));
        let aarq = client.session.association_request().unwrap();
        AssociationResponse::parse(&client.exchange(&aarq)).unwrap().authentication_value.unwrap()
    };
    (0..count).map(one).collect()
}

#[test]
fn challenges_come_from_the_seed_or_are_chosen() {
    let with = |seed, answerable| {
        Meter::new(MeterConfig { challenges: ChallengeSource { seed, answerable, chosen: Vec::new() }, ..config() })
            .unwrap()
    };
    let first = challenges(&with(7, false), 2_000);
    assert_eq!(challenges(&with(7, false), 2_000), first);
    assert_ne!(challenges(&with(8, false), 20), first[..20]);
    let is_request = |challenge: &Vec<u8>| REQUESTS.contains(&challenge[0]);
    // Now and then one begins as a request does, unless none shall.
    assert!((20..200).contains(&first.iter().filter(|challenge| is_request(challenge)).count()));
    assert!(!challenges(&with(7, true), 2_000).iter().any(is_request));
    let meter = with(7, true);
    meter.choose_challenges([vec![0xC3, 1], vec![1]]);
    let chosen = challenges(&meter, 3);
    assert!(chosen[0].starts_with(&[0xC3, 1]) && chosen[1][0] == 1 && !is_request(&chosen[2]), "{chosen:?}");
    assert!(chosen.iter().all(|challenge| challenge.len() == 16));
}

#[test]
fn counters_must_increase() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(100));
    assert_eq!(client.get(ENERGY), Ok(reading()));
    let last = meter.last_accepted_counter(Obis::SECURITY_SETUP, &CLIENT_TITLE).unwrap();
    assert_eq!(last, 103);
    for stale in [0, last - 1, last] {
        let get = protected(CLIENT_TITLE, stale, &get_request(ENERGY).encode());
        let answer = client.exchange(&get);
        assert_eq!(hex::encode_upper(&answer), "D8010600000067");
        assert_eq!(client.session.process_get_response(&answer), Err(counter_exception(last)));
        assert_eq!(meter.refusals().last(), Some(&Refusal::Counter { received: stale, last }));
    }
    // A jump is accepted, the end of the range included; then nothing is left.
    let get = protected(CLIENT_TITLE, u32::MAX, &get_request(ENERGY).encode());
    assert_eq!(client.exchange(&get)[0], 0xDB);
    assert_eq!(client.exchange(&get), bytes("D80106FFFFFFFF"));
}

#[test]
fn a_forged_counter_is_not_accepted() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    let mut forged = protected(CLIENT_TITLE, u32::MAX, &get_request(ENERGY).encode());
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(client.exchange(&forged), bytes("D80205"));
    assert_eq!(client.get(ENERGY), Ok(reading()));
}

#[test]
fn the_same_session_cannot_start_twice() {
    let meter = meter();
    let mut first = Client::associated(&meter, client_config(10));
    assert_eq!(first.get(ENERGY), Ok(reading()));
    // A second head-end with the same title and a lease that is not above.
    let mut second =
        Client::new(&meter, meter_sim::client::ClientConfig { dedicated_key: Some(key_of(0x77)), ..client_config(10) });
    assert_eq!(second.associate(), Err(counter_exception(13)));
    // It protected another message under an old nonce: the meter refused it, and the log shows it.
    let repeated = RepeatedNonce::find(&[meter]);
    assert_eq!(repeated.len(), 1);
    assert!(!repeated[0].second.accepted);
}

#[test]
fn the_counter_scope_is_the_title_or_the_setup() {
    let other = SystemTitle::new(*b"KMSHES02");
    for (scope, expected) in
        [(CounterScope::PerClientTitle, Ok(())), (CounterScope::PerSecuritySetup, Err(counter_exception(1002)))]
    {
        let mut config = config();
        config.security_setups[0].counter_scope = scope;
        let meter = Meter::new(config).unwrap();
        Client::associated(&meter, client_config(1000));
        let mut client =
            Client::new(&meter, meter_sim::client::ClientConfig { client_title: other, ..client_config(1) });
        assert_eq!(client.associate(), expected);
    }
}

#[test]
fn counter_floors_hold_from_the_start() {
    let mut config = config();
    config.security_setups[0].counter_floors.insert(CLIENT_TITLE, 500);
    let meter = Meter::new(config).unwrap();
    assert_eq!(Client::new(&meter, client_config(500)).associate(), Err(counter_exception(500)));
    Client::associated(&meter, client_config(501));
}

#[test]
fn one_counter_for_gmac_and_apdu_is_accepted_or_not_and_always_seen() {
    for (behaviour, accepted) in [(GmacCounter::MayEqualApdu, true), (GmacCounter::MustDiffer, false)] {
        let mut config = config();
        config.behaviour.gmac_counter = behaviour;
        let meter = Meter::new(config).unwrap();
        let mut client = Client::new(&meter, client_config(1));
        let aarq = client.session.association_request().unwrap();
        let aare = client.exchange(&aarq);
        let challenge = AssociationResponse::parse(&aare).unwrap().authentication_value.unwrap();
        client.session.process_association_response(&aare).unwrap();
        let answer = ciphering().answer_challenge(SUITE, &CLIENT_TITLE, 2, &challenge).unwrap();
        let answer = client.exchange(&protected(CLIENT_TITLE, 2, &hls_request(answer)));
        assert_eq!(client.session.process_hls_response(&answer).is_ok(), accepted);
        let repeated = RepeatedNonce::find(&[meter]);
        assert_eq!(repeated.len(), 1);
        assert_eq!(repeated[0].first.counter, 2);
    }
}

#[test]
fn equal_keys_in_two_meters_are_one_counter_domain() {
    let meters: Vec<Meter> = [*b"ABCDEFG1", *b"ABCDEFG2"]
        .map(|title| {
            let mut config = config();
            config.system_title = SystemTitle::new(title);
            Meter::new(config).unwrap()
        })
        .into();
    for meter in &meters {
        // The same lease for both: each meter alone sees nothing wrong.
        Client::associated(meter, client_config(1));
        assert_eq!(RepeatedNonce::find(std::slice::from_ref(meter)), []);
    }
    assert!(!RepeatedNonce::find(&meters).is_empty());
}

#[test]
fn protection_below_the_policy_is_refused() {
    let request = get_request(ENERGY).encode();
    let with_control = |control, counter| {
        let content = ciphering().protect(control, &CLIENT_TITLE, counter, &request).unwrap();
        CipheredApdu::new(CipheredForm::GeneralGlobal, 0xC0, CLIENT_TITLE, content).unwrap().encode()
    };
    for accept_authenticated_only in [false, true] {
        let mut config = config();
        config.security_setups[0].accept_authenticated_only = accept_authenticated_only;
        let meter = Meter::new(config).unwrap();
        let mut client = Client::associated(&meter, client_config(1));
        let encrypted_only = with_control(SecurityControl::encrypted(SUITE), 20);
        assert_eq!(client.exchange(&encrypted_only), bytes("D80101"));
        assert_eq!(client.exchange(&request), bytes("D80101"));
        let authenticated_only = client.exchange(&with_control(SecurityControl::authenticated(SUITE), 21));
        if accept_authenticated_only {
            // The answer has the protection of the request.
            let answer = CipheredApdu::parse(&authenticated_only).unwrap();
            assert_eq!(answer.content.control, SecurityControl::authenticated(SUITE));
            assert_eq!(client.session.process_get_response(&authenticated_only), Ok(reading()));
        } else {
            assert_eq!(authenticated_only, bytes("D80101"));
        }
        // Another suite, and compression.
        for control in [SecurityControl(0x31), SecurityControl(0xB0)] {
            assert_eq!(client.exchange(&with_control(control, 22)), bytes("D80205"));
        }
        assert_eq!(client.exchange(&with_control(SecurityControl(0x30), 23))[0], 0xDB);
    }
}

#[test]
fn wrong_keys_and_titles_have_their_exceptions() {
    let meter = meter();
    let mut config = client_config(1);
    config.keys.encryption = key_of(9);
    let mut stranger = Client::new(&meter, config);
    assert_eq!(stranger.associate(), Err(exception(1, 5)));

    let mut client = Client::associated(&meter, client_config(10));
    let other = SystemTitle::new(*b"KMSHES02");
    let get = protected(other, 50, &get_request(ENERGY).encode());
    assert_eq!(client.exchange(&get), bytes("D80205"));
}

#[test]
fn a_service_specific_tag_carries_its_own_service_only() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    let content = ciphering()
        .protect(SecurityControl::authenticated_encrypted(SUITE), &CLIENT_TITLE, 50, &disconnect().encode())
        .unwrap();
    // A disconnect under the tag of a GET request.
    let apdu = CipheredApdu::new(CipheredForm::Global, 0xC0, CLIENT_TITLE, content).unwrap();
    assert_eq!(client.exchange(&apdu.encode()), bytes("D80103"));
    assert_eq!(meter.is_connected(Obis::DISCONNECT_CONTROL), Some(true));
}

#[test]
fn unknown_clients_are_rejected() {
    let mut config = config();
    config.security_setups[0].client_titles = Some(vec![SystemTitle::new(*b"KMSHES99")]);
    let meter = Meter::new(config).unwrap();
    assert_eq!(
        Client::new(&meter, client_config(1)).associate(),
        Err(Error::AssociationRejected { result: 1, diagnostic: 3 })
    );
    assert_eq!(meter.refusals(), [Refusal::Association(3)]);
}

#[test]
fn the_public_client_reads_the_counter_and_little_else() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(41));
    assert_eq!(client.get(ENERGY), Ok(reading()));
    let mut public = public_connection(&meter, 16, Mechanism::Lowest, None).unwrap();
    let mut read =
        |class, instance, attribute| get_plain(&mut public, AttributeDescriptor { class, instance, attribute });
    assert_eq!(read(CLASS_DATA, Obis::INVOCATION_COUNTER, 2), Ok(Data::DoubleLongUnsigned(44)));
    assert!(read(CLASS_CLOCK, Obis::CLOCK, 2).is_ok());
    assert!(read(CLASS_DATA, Obis::LOGICAL_DEVICE_NAME, 2).is_ok());
    assert_eq!(read(3, Obis::ACTIVE_ENERGY_IMPORT, 2), Err(DataAccessResult::READ_WRITE_DENIED));
    assert_eq!(read(CLASS_SECURITY_SETUP, Obis::SECURITY_SETUP, 2), Err(DataAccessResult::READ_WRITE_DENIED));
    let answer = public.exchange(&disconnect().encode()).unwrap();
    assert_eq!(
        ServiceResponse::parse(&answer).unwrap(),
        ServiceResponse::Action { invoke: 0xC1, result: DataAccessResult::READ_WRITE_DENIED.0, returned: None }
    );
    assert_eq!(meter.is_connected(Obis::DISCONNECT_CONTROL), Some(true));
}

#[test]
fn low_level_security_needs_the_password() {
    let mut config = config();
    config.associations.push(AssociationConfig {
        client_sap: 2,
        mechanism: MechanismConfig::Low(Secret::new(b"12345678")),
        security_setup: None,
    });
    let meter = Meter::new(config).unwrap();
    let mut connection = public_connection(&meter, 2, Mechanism::Low, Some(b"12345678".to_vec())).unwrap();
    assert_eq!(get_plain(&mut connection, ENERGY), Ok(reading()));
    for (mechanism, password, diagnostic) in
        [(Mechanism::Low, Some(b"12345679".to_vec()), 13), (Mechanism::Low, None, 13), (Mechanism::Lowest, None, 14)]
    {
        assert_eq!(public_connection(&meter, 2, mechanism, password).unwrap_err(), diagnostic);
    }
    // A client SAP that the meter does not know.
    assert_eq!(public_connection(&meter, 3, Mechanism::Lowest, None).unwrap_err(), 1);
}

#[test]
fn objects_are_read_written_and_called() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    let clock = AttributeDescriptor { class: CLASS_CLOCK, instance: Obis::CLOCK, attribute: 2 };
    let request = client.session.set_request(clock, Data::OctetString(vec![7; 12])).unwrap();
    let answer = client.exchange(&request);
    client.session.process_set_response(&answer).unwrap();
    assert_eq!(client.get(clock), Ok(Data::OctetString(vec![7; 12])));

    let request = client.session.set_request(ENERGY, Data::Unsigned(0)).unwrap();
    let answer = client.exchange(&request);
    assert_eq!(client.session.process_set_response(&answer), Err(Error::Access(DataAccessResult::READ_WRITE_DENIED)));

    let setup =
        |attribute| AttributeDescriptor { class: CLASS_SECURITY_SETUP, instance: Obis::SECURITY_SETUP, attribute };
    assert_eq!(client.get(setup(2)), Ok(Data::Enum(0x6C)));
    assert_eq!(client.get(setup(3)), Ok(Data::Enum(0)));
    let title = |title: SystemTitle| Ok(Data::OctetString(title.as_bytes().to_vec()));
    assert_eq!(client.get(setup(4)), title(CLIENT_TITLE));
    assert_eq!(client.get(setup(5)), title(METER_TITLE));
    assert_eq!(
        client.get(AttributeDescriptor { class: 1, ..ENERGY }),
        Err(Error::Access(DataAccessResult::OBJECT_CLASS_INCONSISTENT))
    );

    let list = ServiceRequest::GetWithList {
        invoke: 0xC1,
        attributes: vec![(ENERGY, false), (AttributeDescriptor { attribute: 9, ..ENERGY }, false)],
    };
    let answer = client.exchange(&protected(CLIENT_TITLE, 100, &list.encode()));
    let opened = ciphering().open(&METER_TITLE, &CipheredApdu::parse(&answer).unwrap().content).unwrap();
    assert_eq!(
        ServiceResponse::parse(&opened).unwrap(),
        ServiceResponse::GetWithList {
            invoke: 0xC1,
            results: vec![Ok(reading()), Err(DataAccessResult::OBJECT_UNAVAILABLE)]
        }
    );
}

#[test]
fn a_broadcast_disconnects_and_has_no_answer() {
    let gbek = key_of(0xBB);
    let mut config = config();
    config.security_setups[0].gbek = Some(gbek.clone());
    let meter = Meter::new(config).unwrap();
    let mut connection = Connection::new(meter.clone(), 1);
    let broadcast = |key: &SymmetricKey, counter| {
        let content = Ciphering { encryption: key.clone(), ..ciphering() }
            .protect(
                SecurityControl::authenticated_encrypted(SUITE).broadcast(),
                &CLIENT_TITLE,
                counter,
                &disconnect().encode(),
            )
            .unwrap();
        CipheredApdu::new(CipheredForm::GeneralGlobal, 0xC3, CLIENT_TITLE, content).unwrap().encode()
    };
    // The unicast key does not open broadcasts.
    assert_eq!(connection.exchange(&broadcast(&common::guek(), 1)), None);
    assert_eq!(meter.is_connected(Obis::DISCONNECT_CONTROL), Some(true));
    assert_eq!(connection.exchange(&broadcast(&gbek, 1)), None);
    assert_eq!(meter.is_connected(Obis::DISCONNECT_CONTROL), Some(false));
    assert_eq!(connection.exchange(&broadcast(&gbek, 1)), None);
    assert_eq!(meter.refusals(), [Refusal::Deciphering, Refusal::Counter { received: 1, last: 1 }]);
}

#[test]
fn a_client_that_runs_out_of_counters_stops() {
    let meter = meter();
    let mut config = client_config(7);
    config.counters = 7..=10;
    let mut client = Client::associated(&meter, config);
    assert_eq!(client.session.next_counter(), Some(10));
    assert_eq!(client.get(ENERGY), Ok(reading()));
    assert_eq!(client.session.next_counter(), None);
    assert_eq!(client.get(ENERGY), Err(Error::CountersExhausted));
}

#[test]
fn the_client_refuses_a_meter_without_the_keys() {
    // A meter that replays another session's answers.
    let meter = meter();
    let mut client = Client::new(&meter, client_config(1));
    let aarq = client.session.association_request().unwrap();
    let aare = client.exchange(&aarq);
    client.session.process_association_response(&aare).unwrap();
    let request = client.session.hls_request().unwrap();
    let old_answer = client.exchange(&request);

    let mut victim = ClientSession::new(client_config(100)).unwrap();
    victim.association_request().unwrap();
    victim.process_association_response(&aare).unwrap();
    victim.hls_request().unwrap();
    assert_eq!(victim.process_hls_response(&old_answer), Err(Error::Deciphering));
}

#[test]
fn secrets_are_not_printed() {
    let text = format!("{:?} {:?} {:?}", config(), client_config(1), meter());
    assert!(!text.contains("d0d1") && !text.contains("D0D1") && !text.contains("208, 209"));
}

fn get_request(attribute: AttributeDescriptor) -> ServiceRequest {
    ServiceRequest::Get { invoke: 0xC1, attribute, selective: false }
}

fn hls_request(answer: Vec<u8>) -> Vec<u8> {
    ServiceRequest::Action {
        invoke: 0xC1,
        method: MethodDescriptor { class: CLASS_ASSOCIATION, instance: Obis::CURRENT_ASSOCIATION, method: 1 },
        argument: Some(Data::OctetString(answer)),
    }
    .encode()
}

fn disconnect() -> ServiceRequest {
    ServiceRequest::Action {
        invoke: 0xC1,
        method: MethodDescriptor { class: CLASS_DISCONNECT_CONTROL, instance: Obis::DISCONNECT_CONTROL, method: 1 },
        argument: Some(Data::Integer(0)),
    }
}

/// `plaintext` in general form under the global keys of the tests.
fn protected(title: SystemTitle, counter: u32, plaintext: &[u8]) -> Vec<u8> {
    let content =
        ciphering().protect(SecurityControl::authenticated_encrypted(SUITE), &title, counter, plaintext).unwrap();
    CipheredApdu::new(CipheredForm::GeneralGlobal, plaintext[0], title, content).unwrap().encode()
}

fn public_connection(
    meter: &Meter,
    client_sap: u16,
    mechanism: Mechanism,
    authentication_value: Option<Vec<u8>>,
) -> Result<Connection, u8> {
    let mut connection = Connection::new(meter.clone(), client_sap);
    let request = AssociationRequest {
        context: ApplicationContext::LogicalName,
        client_title: None,
        mechanism,
        authentication_value,
        user_information: InitiateRequest {
            dedicated_key: None,
            conformance: [0xFF; 3],
            client_max_receive_pdu_size: 0,
        }
        .encode()
        .to_vec(),
    };
    let response = AssociationResponse::parse(&connection.exchange(&request.encode()).unwrap()).unwrap();
    match response.result {
        0 => Ok(connection),
        _ => Err(response.diagnostic),
    }
}

fn get_plain(connection: &mut Connection, attribute: AttributeDescriptor) -> Result<Data, DataAccessResult> {
    let answer = connection.exchange(&get_request(attribute).encode()).unwrap();
    assert_eq!(ExceptionResponse::parse(&answer).ok(), None);
    match ServiceResponse::parse(&answer).unwrap() {
        ServiceResponse::Get { result, .. } => result,
        other => panic!("{other:?} answers a GET"),
    }
}
