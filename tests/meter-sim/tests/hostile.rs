//! Bytes from strangers: never a panic, never an answer that changes something.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use common::{CLIENT_TITLE, Client, ENERGY, bytes, ciphering, client_config, guek, meter, reading};
use meter_sim::acse::{AssociationRequest, AssociationResponse, Release};
use meter_sim::axdr::Data;
use meter_sim::ciphered::{CipheredApdu, CipheredForm};
use meter_sim::security::SecurityControl;
use meter_sim::xdlms::{ExceptionResponse, InitiateRequest, InitiateResponse, ServiceRequest, ServiceResponse};
use meter_sim::{Connection, Obis, SecuritySuite};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn parsers_take_any_bytes(input in prop::collection::vec(any::<u8>(), 0..300), tag in any::<u8>()) {
        for bytes in [input.clone(), [&[tag][..], &input].concat()] {
            let _ = AssociationRequest::parse(&bytes);
            let _ = AssociationResponse::parse(&bytes);
            let _ = Release::parse_request(&bytes);
            let _ = Release::parse_response(&bytes);
            let _ = InitiateRequest::parse(&bytes);
            let _ = InitiateResponse::parse(&bytes);
            let _ = ServiceResponse::parse(&bytes);
            let _ = ExceptionResponse::parse(&bytes);
            let _ = CipheredApdu::parse(&bytes);
            if let Ok(data) = Data::parse(&bytes) {
                prop_assert_eq!(Data::parse(&data.encode()).unwrap(), data);
            }
            if let Ok(request) = ServiceRequest::parse(&bytes) {
                prop_assert_eq!(
                    ServiceRequest::parse(&without_selection(request.clone()).encode()).unwrap(),
                    without_selection(request)
                );
            }
        }
    }

    #[test]
    fn a_meter_takes_any_bytes(
        requests in prop::collection::vec(
            (prop::sample::select(TAGS.to_vec()), prop::collection::vec(any::<u8>(), 0..120)),
            1..8,
        ),
        associated in any::<bool>(),
    ) {
        let meter = meter();
        let mut client = Client::new(&meter, client_config(1));
        if associated {
            client.associate().unwrap();
        }
        for (tag, rest) in requests {
            client.connection.exchange(&[&[tag][..], &rest].concat());
        }
        prop_assert_eq!(meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap().guek, guek());
    }

    /// What a client with the right keys says is foreign as well.
    #[test]
    fn a_meter_takes_any_plaintext(
        tag in prop::sample::select(vec![0xC0_u8, 0xC1, 0xC3]),
        kind in 0_u8..4,
        rest in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let meter = meter();
        let mut client = Client::associated(&meter, client_config(1));
        let plaintext = [&[tag, kind, 0xC1][..], &rest].concat();
        let content = ciphering()
            .protect(
                SecurityControl::authenticated_encrypted(SecuritySuite::Suite0),
                &CLIENT_TITLE,
                50,
                &plaintext,
            )
            .unwrap();
        let apdu = CipheredApdu::new(CipheredForm::GeneralGlobal, tag, CLIENT_TITLE, content)
            .unwrap()
            .encode();
        prop_assert!(client.connection.exchange(&apdu).is_some());
        prop_assert_eq!(meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap().guek, guek());
    }

    /// A true request with one changed, lost or added byte is never executed.
    #[test]
    fn a_changed_request_is_refused(position in any::<prop::sample::Index>(), change in 1_u8..=255, how in 0..3) {
        let meter = meter();
        let mut client = Client::associated(&meter, client_config(1));
        let mut request = client.session.get_request(ENERGY).unwrap();
        let position = position.index(request.len());
        match how {
            0 => request[position] ^= change,
            1 => request.truncate(position),
            _ => request.push(change),
        }
        if let Some(answer) = client.connection.exchange(&request) {
            prop_assert_eq!(answer[0], 0xD8);
        }
        // Nothing was used up: the next request is served.
        prop_assert_eq!(client.get(ENERGY), Ok(reading()));
    }

    /// A true answer with one changed byte is never believed.
    #[test]
    fn a_changed_answer_is_refused(position in any::<prop::sample::Index>(), change in 1_u8..=255) {
        let meter = meter();
        let mut client = Client::associated(&meter, client_config(1));
        let request = client.session.get_request(ENERGY).unwrap();
        let mut answer = client.exchange(&request);
        let position = position.index(answer.len());
        answer[position] ^= change;
        prop_assert!(client.session.process_get_response(&answer).is_err());
    }

    #[test]
    fn aarq_and_aare_take_changes(position in any::<prop::sample::Index>(), change in 1_u8..=255) {
        let meter = meter();
        let mut client = Client::new(&meter, client_config(1));
        let mut aarq = client.session.association_request().unwrap();
        let aare = client.exchange(&aarq);
        let index = position.index(aarq.len());
        aarq[index] ^= change;
        Connection::new(meter, 1).exchange(&aarq);
        let mut changed = aare.clone();
        let index = position.index(changed.len());
        changed[index] ^= change;
        let _ = client.session.process_association_response(&changed);
    }
}

#[test]
fn an_oversized_apdu_is_refused() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    assert_eq!(client.exchange(&[0xDB; 1025]), bytes("D80104"));
    assert_eq!(client.exchange(&[0xDB; 65_535]), bytes("D80104"));
    assert_eq!(client.get(ENERGY), Ok(reading()));
}

#[test]
fn deep_nesting_and_false_counts_are_refused() {
    let deep = [[1, 1].repeat(500), vec![0]].concat();
    assert!(Data::parse(&deep).is_err());
    // An array that claims 4 billion items in 6 bytes.
    assert!(Data::parse(&bytes("0184FFFFFFFF")).is_err());
    assert!(Data::parse(&bytes("0984FFFFFFFF")).is_err());
    assert!(ServiceRequest::parse(&bytes("C003C184FFFFFFFF")).is_err());
}

#[test]
fn replays_do_not_fill_the_memory() {
    let meter = meter();
    let mut client = Client::associated(&meter, client_config(1));
    let request = client.session.get_request(ENERGY).unwrap();
    client.exchange(&request);
    let nonces = meter.nonce_log().len();
    for _ in 0..2_000 {
        client.exchange(&request);
    }
    assert_eq!(meter.nonce_log().len(), nonces);
    assert_eq!(meter.refusals().len(), 1024);
}

const TAGS: [u8; 15] = [0x60, 0x62, 0xC0, 0xC1, 0xC3, 0xC8, 0xC9, 0xCB, 0xD0, 0xD1, 0xD3, 0xDB, 0xDC, 0xDD, 0x00];

/// Access selections are read and refused, but not written.
fn without_selection(request: ServiceRequest) -> ServiceRequest {
    match request {
        ServiceRequest::Get { invoke, attribute, .. } => ServiceRequest::Get { invoke, attribute, selective: false },
        ServiceRequest::GetWithList { invoke, mut attributes } => {
            for (_, selective) in &mut attributes {
                *selective = false;
            }
            ServiceRequest::GetWithList { invoke, attributes }
        }
        other => other,
    }
}
