//! Associations with HLS 5 and the answers of meters: against octets that dlms-cosem made
//! (tests/vectors/generate.py), and against the codec and the simulated meter of meter-sim, which
//! share nothing with this crate.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use aes_gcm::{
    AesGcm, KeyInit,
    aead::{Aead, Payload, consts::U12},
    aes::Aes128,
};
use kms_dlms::*;
use kms_domain::{SecuritySuite, SystemTitle};
use meter_sim::{acse, axdr, config::SecuritySetupConfig, xdlms};
use proptest::prelude::*;
use serde_json::Value;

const METER: &str = "4B414D0000000001";
const CLIENT: &str = "4D4D4D0000000001";
const INVOKE: u8 = 0xC1;
const ENERGY: Target = Target { class_id: 3, obis: [1, 0, 1, 8, 0, 255], member: 2 };

fn hex(text: &str) -> Vec<u8> {
    hex::decode(text.replace(' ', "")).unwrap()
}

fn octets(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn optional(value: &Value) -> Option<Vec<u8>> {
    value.as_str().map(|text| hex::decode(text).unwrap())
}

fn title(text: &str) -> SystemTitle {
    SystemTitle::parse(text).unwrap()
}

fn vectors() -> Value {
    let all: Value = serde_json::from_str(include_str!("../../../tests/vectors/vectors.json")).unwrap();
    all["association"].clone()
}

#[test]
fn requests_are_what_dlms_cosem_makes() {
    let vectors = vectors();
    let request = &vectors["request"];
    let initiate_request = octets(&request["initiate_request"]);
    let aarq = AssociationRequest {
        client_title: SystemTitle::from_octets(&octets(&request["client_title"])).unwrap(),
        challenge: Challenge::new(&octets(&request["challenge"])).unwrap(),
        initiate_request: &initiate_request,
    };
    assert_eq!(hex::encode(aarq.octets().unwrap()), request["octets"].as_str().unwrap());

    let services = &vectors["services"];
    let invoke = octets(&services["invoke_id_and_priority"])[0];
    let gmac = HlsGmac::parse(&octets(&services["gmac"])).unwrap();
    let reply = gmac.reply_to_hls_authentication(invoke);
    assert_eq!(reply, octets(&services["reply_to_hls_authentication"]));
    let read = ServiceRequest::parse(&reply).unwrap();
    assert_eq!(
        (read.kind, read.targets),
        (ServiceKind::Action, vec![Target { class_id: 15, obis: [0, 0, 40, 0, 0, 255], member: 1 }])
    );
    let get = ENERGY.get_request_normal(invoke);
    assert_eq!(get, octets(&services["get_request"]));
    assert_eq!(ServiceRequest::parse(&get).unwrap().targets, [ENERGY]);
    let initiate_request = octets(&services["release_initiate_request"]);
    let ciphered = ReleaseRequest { initiate_request: Some(&initiate_request) };
    assert_eq!(ciphered.octets().unwrap(), octets(&services["release_request"]));
    assert_eq!(ReleaseRequest { initiate_request: None }.octets().unwrap(), octets(&services["release_request_plain"]));
}

#[test]
fn what_dlms_cosem_answers_is_read() {
    let vectors = vectors();
    let responses = vectors["responses"].as_array().unwrap();
    assert_eq!(responses.len(), 6);
    for vector in responses {
        let aare = octets(&vector["octets"]);
        let read = AssociationResponse::parse(&aare).unwrap_or_else(|error| panic!("{vector}: {error}"));
        let number = vector["diagnostic"].as_u64().unwrap().try_into().unwrap();
        let information = optional(&vector["information"]);
        let expected = AssociationResponse {
            context: if vector["ciphered"] == true {
                ApplicationContext::CipheredLogicalNames
            } else {
                ApplicationContext::LogicalNames
            },
            result: [
                AssociationResult::Accepted,
                AssociationResult::RejectedPermanent,
                AssociationResult::RejectedTransient,
            ][usize::try_from(vector["result"].as_u64().unwrap()).unwrap()],
            diagnostic: if vector["source"] == "user" {
                SourceDiagnostic::ServiceUser(number)
            } else {
                SourceDiagnostic::ServiceProvider(number)
            },
            server_title: optional(&vector["server_title"]).map(|title| SystemTitle::from_octets(&title).unwrap()),
            mechanism: (vector["mechanism"] == 5).then_some(AuthenticationMechanism::HighGmac),
            authentication_value: read.authentication_value,
            information: information.as_deref().map(|octets| match octets[0] {
                0x08 => AssociationInformation::InitiateResponse(InitiateResponse {
                    conformance: [0x40, 0x10, 0x1D],
                    longest_apdu: 1224,
                    vaa_name: 7,
                }),
                0x0E => AssociationInformation::Error(ConfirmedServiceError { service: 1, category: 6, error: 2 }),
                _ => AssociationInformation::Ciphered(octets),
            }),
        };
        assert_eq!(read, expected);
        assert_eq!(read.authentication_value.map(<[u8]>::to_vec), optional(&vector["challenge"]));
        let goes_on = read.hls_challenge(title(METER), &Challenge::new(&[7; 8]).unwrap());
        assert_eq!(goes_on.is_ok(), vector["mechanism"] == 5, "{goes_on:?}");

        for length in 0..aare.len() {
            assert!(AssociationResponse::parse(&aare[..length]).is_err(), "{vector} cut to {length}");
        }
        assert!(matches!(
            AssociationResponse::parse(&[aare.as_slice(), &[0]].concat()),
            Err(DlmsError::Trailing { .. })
        ));
    }

    let vector = &vectors["initiate_response"];
    let read = InitiateResponse::parse(&octets(&vector["octets"])).unwrap();
    assert_eq!(
        (hex::encode(read.conformance), read.longest_apdu, read.vaa_name),
        (vector["conformance"].as_str().unwrap().to_owned(), 1224, 7)
    );

    let services = &vectors["services"];
    let denied = Err(DataAccessResult(3));
    let response = octets(&services["get_response_error"]);
    assert_eq!(GetResponse::parse(&response), Ok(GetResponse { invoke_id_and_priority: INVOKE, result: denied }));
    let response = |name: &str| octets(&services[name]);
    let (plain, with_data, with_error) =
        (response("action_response"), response("action_response_with_data"), response("action_response_with_error"));
    let failed = ActionResponse { invoke_id_and_priority: INVOKE, result: ActionResult(9), return_parameters: None };
    assert_eq!(ActionResponse::parse(&plain), Ok(failed));
    assert_eq!(ActionResponse::parse(&with_error), Ok(ActionResponse { return_parameters: Some(denied), ..failed }));
    let answered = ActionResponse::parse(&with_data).unwrap();
    assert_eq!(answered.result, ActionResult::SUCCESS);
    assert_eq!(answered.hls_gmac().unwrap().octets().to_vec(), octets(&services["gmac"]));
    for refused in [&plain, &with_error] {
        let error = ActionResponse::parse(refused).unwrap().hls_gmac().unwrap_err().to_string();
        assert!(error.contains("object-class-inconsistent (9)"), "{error}");
    }
}

/// An AARE of these fields.
fn aare(fields: &str) -> Vec<u8> {
    let fields = hex(fields);
    [&[0x61, 0x81, fields.len().try_into().unwrap()], fields.as_slice()].concat()
}

const CONTEXT: &str = "A1 09 06 07 60857405080103";
const ACCEPTED: &str = "A2 03 02 01 00";
const REQUIRED: &str = "A3 05 A1 03 02 01 0E";
const TITLE: &str = "A4 0A 04 08 4B414D0000000001";
const MECHANISM: &str = "89 07 60857405080205";
const VALUE: &str = "AA 0A 80 08 0102030405060708";
const INFORMATION: &str = "BE 15 04 13 28 11 30 00000001 0102030405060708090A0B0C";

#[test]
fn fields_that_an_aare_may_carry_besides() {
    for fields in [
        format!(
            "80 02 07 80 {CONTEXT} {ACCEPTED} {REQUIRED} {TITLE} A5 03 04 01 00 A6 03 02 01 00 A7 03 02 01 00 88 02 07 80 {MECHANISM} {VALUE} BD 01 00"
        ),
        format!("80 02 02 84 {CONTEXT} {ACCEPTED} {REQUIRED} {TITLE} 88 01 00 {MECHANISM} {VALUE} 9D 00"),
        // Lengths in a longer form than needed are BER, too.
        format!("A1 81 0B 06 82 0007 60857405080103 {ACCEPTED} {REQUIRED} {TITLE} {MECHANISM} {VALUE}"),
    ] {
        let octets = aare(&format!("{fields} {INFORMATION}"));
        let read = AssociationResponse::parse(&octets).unwrap_or_else(|error| panic!("{fields}: {error}"));
        let challenge = read.hls_challenge(title(METER), &Challenge::new(&[7; 8]).unwrap()).unwrap();
        assert_eq!(challenge.challenge.octets(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(CipheredApdu::parse(challenge.initiate_response).unwrap().counter, 1);
    }
}

#[test]
fn what_an_aare_cannot_be() {
    let all = format!("{CONTEXT} {ACCEPTED} {REQUIRED}");
    for (fields, reason) in [
        (String::new(), "application-context-name is missing"),
        (format!("{CONTEXT} {REQUIRED}"), "result is missing"),
        (format!("{CONTEXT} {ACCEPTED}"), "result-source-diagnostic is missing"),
        (format!("{ACCEPTED} {CONTEXT} {REQUIRED}"), "tag A1 is repeated or out of order"),
        (format!("{all} {REQUIRED}"), "tag A3 is repeated or out of order"),
        (format!("{all} AB 00"), "tag AB is unknown"),
        (format!("{all} 84 0A 04 08 4B414D0000000001"), "tag 84 is unknown"),
        (format!("{all} 9F 22 00"), "more than one octet (9F ..)"),
        (format!("80 02 07 40 {all}"), "not version 1"),
        (format!("80 02 08 80 {all}"), "not a bit string"),
        (format!("80 80 {all}"), "length"),
        (format!("A1 09 06 07 60857405080105 {ACCEPTED} {REQUIRED}"), "2.16.756.5.8.1"),
        (format!("A1 0A 06 08 6085740508010300 {ACCEPTED} {REQUIRED}"), "2.16.756.5.8.1"),
        (format!("A1 0A 06 07 60857405080103 00 {ACCEPTED} {REQUIRED}"), "1 octets follow"),
        (format!("{CONTEXT} A2 03 02 01 03 {REQUIRED}"), "3 is not 0, 1 or 2"),
        (format!("{CONTEXT} A2 04 02 02 0000 {REQUIRED}"), "follow"),
        (format!("{CONTEXT} A2 03 0A 01 00 {REQUIRED}"), "the tag is 0A, not 02"),
        (format!("{CONTEXT} {ACCEPTED} A3 05 A1 03 02 01 80"), "negative"),
        (format!("{CONTEXT} {ACCEPTED} A3 05 A3 03 02 01 00"), "choice A3"),
        (format!("{CONTEXT} {ACCEPTED} A3 06 A1 03 02 01 0E 00"), "follow"),
        (format!("{all} A4 09 04 07 4B414D00000000"), "responding-AP-title: 7 octets"),
        (format!("{all} A4 0A 04 08 0000000000000000"), "responding-AP-title: all octets are zero"),
        (format!("{all} 88 00"), "end too early"),
        (format!("{all} 89 07 60857405080208"), "mechanism-name"),
        (format!("{all} AA 0A 81 08 0102030405060708"), "the tag is 81, not 80"),
        (format!("{all} BE 02 04 00"), "too early"),
        (format!("{all} BE 06 04 04 0E010B00"), "category 11"),
        (format!("{all} BE 06 04 04 0E020600"), "service 2"),
        (format!("{all} BE 15 04 13 21 11 30 00000001 0102030405060708090A0B0C"), "neither InitiateResponse"),
        (format!("{all} BE 15 04 13 28 11 20 00000001 0102030405060708090A0B0C"), "without authentication"),
        (format!("{all} BE 15 04 12 28 11 30 00000001 0102030405060708090A0B0C"), "follow"),
    ] {
        let error = AssociationResponse::parse(&aare(&fields)).expect_err(&fields).to_string();
        assert!(error.contains(reason), "{fields}: {error}");
    }
    assert!(AssociationResponse::parse(&hex("60 00")).is_err());
    assert!(AssociationResponse::parse(&vec![0x61; LONGEST_APDU + 1]).is_err());
}

#[test]
fn hls_goes_on_only_with_the_meter_that_was_asked() {
    let own = Challenge::new(&[7; 8]).unwrap();
    let good = format!("{CONTEXT} {ACCEPTED} {REQUIRED} {TITLE} {MECHANISM} {VALUE} {INFORMATION}");
    assert!(AssociationResponse::parse(&aare(&good)).unwrap().hls_challenge(title(METER), &own).is_ok());
    for (from, to, reason) in [
        (ACCEPTED, "A2 03 02 01 01", "rejected-permanent, acse-service-user 14 (authentication-required)"),
        (ACCEPTED, "A2 03 02 01 02", "rejected-transient"),
        (REQUIRED, "A3 05 A1 03 02 01 00", "accepted with acse-service-user 0 (null)"),
        (REQUIRED, "A3 05 A2 03 02 01 0E", "accepted with acse-service-provider 14"),
        (CONTEXT, "A1 09 06 07 60857405080101", "application-context-name"),
        (TITLE, "A4 0A 04 08 4B414D0000000002", "not the system title of the meter"),
        (TITLE, "", "not the system title of the meter"),
        (MECHANISM, "89 07 60857405080206", "mechanism-name"),
        (MECHANISM, "", "mechanism-name"),
        (VALUE, "", "responding-authentication-value is missing"),
        (VALUE, "AA 09 80 07 01020304050607", "7 octets, not 8 to 64"),
        (VALUE, "AA 0A 80 08 0707070707070707", "the client's own challenge"),
        (INFORMATION, "", "no ciphered InitiateResponse"),
        (INFORMATION, "BE 10 04 0E 0800065F1F040040101D04C80007", "no ciphered InitiateResponse"),
    ] {
        let octets = aare(&good.replace(from, to));
        let error =
            AssociationResponse::parse(&octets).unwrap().hls_challenge(title(METER), &own).unwrap_err().to_string();
        assert!(error.contains(reason), "{from} -> {to}: {error}");
    }
    let refused = aare(&format!("{CONTEXT} A2 03 02 01 01 A3 05 A1 03 02 01 01 BE 06 04 04 0E010602"));
    let error =
        AssociationResponse::parse(&refused).unwrap().hls_challenge(title(METER), &own).unwrap_err().to_string();
    assert!(error.ends_with("acse-service-user 1 (no-reason-given), confirmed service error 01 06 02"), "{error}");
}

#[test]
fn requests_that_are_not_made() {
    let request = |initiate_request: &[u8]| {
        AssociationRequest {
            client_title: title(CLIENT),
            challenge: Challenge::new(&[1; 8]).unwrap(),
            initiate_request,
        }
        .octets()
    };
    let content = "11 30 00000001 0102030405060708090A0B0C";
    assert!(request(&hex(&format!("21 {content}"))).is_ok());
    // In the clear, a response, another service, with a title of its own, cut.
    for refused in [
        "01000000065F1F040000101D0000",
        &format!("28 {content}"),
        &format!("C8 {content}"),
        &format!("DB 00 {content}"),
        "21 11 30",
    ] {
        assert!(request(&hex(refused)).is_err(), "{refused}");
        assert!(ReleaseRequest { initiate_request: Some(&hex(refused)) }.octets().is_err(), "{refused}");
    }
    for length in [0, 7, 65] {
        assert!(Challenge::new(&vec![1; length]).is_err());
    }
    let long = CipheredApdu {
        tag: CipheredTag::global_for(1).unwrap(),
        system_title: None,
        control: HlsGmac::control(SecuritySuite::Suite0),
        counter: 1,
        content: &[0; 65_500],
        authentication_tag: AuthenticationTag([0; 12]),
    };
    assert!(request(&long.octets().unwrap()).is_err());
}

#[test]
fn initiate_responses() {
    let parse = |text: &str| InitiateResponse::parse(&hex(text));
    let expected = InitiateResponse { conformance: [0x00, 0x10, 0x1D], longest_apdu: 0x0400, vaa_name: 0xFA00 };
    assert_eq!(parse("08 00 06 5F1F0400 00101D 0400 FA00"), Ok(expected));
    assert_eq!(parse("08 01 00 06 5F1F0400 00101D 0400 FA00"), Ok(expected));
    assert_eq!(parse("08 00 06 5F0400 00101D 0400 FA00"), Ok(expected));
    for refused in [
        "01 00 06 5F1F0400 00101D 0400 FA00",
        "08 02 06 5F1F0400 00101D 0400 FA00",
        "08 00 05 5F1F0400 00101D 0400 FA00",
        "08 00 06 5F1F0401 00101D 0400 FA00",
        "08 00 06 5E1F0400 00101D 0400 FA00",
        "08 00 06 5F1F0300 101D 0400 FA00",
        "08 00 06 5F1F0400 00101D 0400 FA",
        "08 00 06 5F1F0400 00101D 0400 FA0000",
    ] {
        assert!(parse(refused).is_err(), "{refused}");
    }
}

#[test]
fn service_responses() {
    for (data, octet_string, unsigned) in [
        ("09 03 010203", Some("010203"), None),
        ("09 81 01 FF", Some("FF"), None),
        ("09 00", Some(""), None),
        ("11 FF", None, Some(255)),
        ("12 FFFF", None, Some(65_535)),
        ("06 00010000", None, Some(65_536)),
        ("15 FFFFFFFFFFFFFFFF", None, Some(u64::MAX)),
        ("0F FF", None, None),
        ("02 02 11 01 09 01 FF", None, None),
        ("00", None, None),
    ] {
        for (start, is_get) in [("C4 01 C1 00", true), ("C7 01 C1 00 01 00", false)] {
            let apdu = hex(&format!("{start} {data}"));
            let (result, invoke) = if is_get {
                let response = GetResponse::parse(&apdu).unwrap();
                (response.result, response.invoke_id_and_priority)
            } else {
                let response = ActionResponse::parse(&apdu).unwrap();
                (response.return_parameters.unwrap(), response.invoke_id_and_priority)
            };
            let read = result.unwrap();
            assert_eq!((read.octets(), invoke), (hex(data).as_slice(), 0xC1));
            assert_eq!(read.octet_string().ok().map(hex::encode_upper).as_deref(), octet_string, "{data}");
            assert_eq!(read.unsigned().ok(), unsigned, "{data}");
            assert_eq!(format!("{read:?}"), format!("Data({} octets)", hex(data).len()));
            for length in 0..apdu.len() {
                assert!(
                    GetResponse::parse(&apdu[..length]).is_err() && ActionResponse::parse(&apdu[..length]).is_err(),
                    "{data} cut to {length}"
                );
            }
            let longer = [apdu.as_slice(), &[0]].concat();
            assert!(GetResponse::parse(&longer).is_err() && ActionResponse::parse(&longer).is_err(), "{data}");
        }
    }
    for (refused, reason) in [
        ("C4 02 C1 01 00000001 00 01 00", "blocks and lists"),
        ("C4 01 C1 02 00", "choice 2"),
        ("C4 01 C1 00 13 00", "type 19"),
        ("C7 01 C1 00 00", "the tag is not C4"),
        ("D8 01 05", "the tag is not C4"),
    ] {
        let error = GetResponse::parse(&hex(refused)).expect_err(refused).to_string();
        assert!(error.contains(reason), "{refused}: {error}");
    }
    for refused in
        ["C7 02 C1 00 00", "C7 01 C1 00 02", "C7 01 C1 00 01", "C7 01 C1 00 01 02 00", "C4 01 C1 01 00", "D8 01 05"]
    {
        assert!(ActionResponse::parse(&hex(refused)).is_err(), "{refused}");
    }
    for refused in [
        "C7 01 C1 00 00",
        "C7 01 C1 00 01 00 11 01",
        "C7 01 C1 00 01 00 09 10 10000000010102030405060708090A0B",
        "C7 01 C1 00 01 01 00",
    ] {
        assert!(ActionResponse::parse(&hex(refused)).unwrap().hls_gmac().is_err(), "{refused}");
    }
}

/// What the HSM does: AES-GCM under GUEK, with the GAK in the associated data.
struct Keys {
    guek: [u8; 16],
    gak: [u8; 16],
}

impl Keys {
    const CONTROL: SecurityControl = SecurityControl {
        suite: SecuritySuite::Suite0,
        protection: Protection::AuthenticatedEncrypted,
        key_set: KeySet::Unicast,
    };

    fn cipher(&self) -> AesGcm<Aes128, U12, U12> {
        AesGcm::new_from_slice(&self.guek).unwrap()
    }

    fn protect(&self, counter: u32, plain: &[u8]) -> Vec<u8> {
        let nonce = Nonce::new(title(CLIENT), counter);
        let associated_data = Self::CONTROL.associated_data(&self.gak, plain);
        let mut content =
            self.cipher().encrypt(nonce.octets().into(), Payload { msg: plain, aad: &associated_data }).unwrap();
        let tag = AuthenticationTag(content.split_off(plain.len()).try_into().unwrap());
        let tag_kind = CipheredTag::global_for(plain[0]).unwrap();
        let apdu = CipheredApdu {
            tag: tag_kind,
            system_title: None,
            control: Self::CONTROL,
            counter,
            content: &content,
            authentication_tag: tag,
        };
        apdu.octets().unwrap()
    }

    fn open(&self, octets: &[u8]) -> Option<Vec<u8>> {
        let apdu = CipheredApdu::parse(octets).ok()?;
        let nonce = Nonce::new(title(METER), apdu.counter);
        let associated_data = apdu.control.associated_data(&self.gak, apdu.content);
        let sealed = [apdu.content, &apdu.authentication_tag.0].concat();
        self.cipher().decrypt(nonce.octets().into(), Payload { msg: &sealed, aad: &associated_data }).ok()
    }

    fn answer(&self, sender: &str, counter: u32, challenge: &[u8]) -> HlsGmac {
        let suite = SecuritySuite::Suite0;
        let associated_data = HlsGmac::control(suite).associated_data(&self.gak, challenge);
        let nonce = Nonce::new(title(sender), counter);
        let tag = self.cipher().encrypt(nonce.octets().into(), Payload { msg: &[], aad: &associated_data }).unwrap();
        HlsGmac { suite, counter, tag: AuthenticationTag(tag.try_into().unwrap()) }
    }
}

/// The exchange that proves a key, byte for byte through the simulated meter.
#[test]
fn a_simulated_meter_proves_its_keys() {
    let keys = Keys { guek: [0x11; 16], gak: [0x22; 16] };
    let key = |octets: &[u8]| meter_sim::SymmetricKey::new(octets).unwrap();
    let setup = SecuritySetupConfig::new(key(&keys.guek), key(&keys.gak), key(&[0x33; 16]));
    let server_title = meter_sim::SystemTitle::new(title(METER).octets());
    let mut config = meter_sim::MeterConfig::ordinary(server_title, meter_sim::SecuritySuite::Suite0, setup);
    // A meter that takes no counter twice, not even for the GMAC and the APDU around it.
    config.behaviour.gmac_counter = meter_sim::behaviour::GmacCounter::MustDiffer;
    let mut connection = meter_sim::Connection::new(meter_sim::Meter::new(config).unwrap(), 1);

    let challenge = Challenge::new(&[0x5A; 64]).unwrap();
    let initiate = InitiateRequest { dedicated_key: None, conformance: [0x40, 0x10, 0x1D], longest_apdu: 0 };
    let ask = |keys: &Keys, counter| {
        let initiate_request = keys.protect(counter, &initiate.octets().unwrap());
        AssociationRequest {
            client_title: title(CLIENT),
            challenge: challenge.clone(),
            initiate_request: &initiate_request,
        }
        .octets()
        .unwrap()
    };
    // Another GUEK: the meter refuses, in the clear.
    let other = Keys { guek: [0x12; 16], gak: keys.gak };
    let refusal = connection.exchange(&ask(&other, 1)).unwrap();
    assert_eq!(ExceptionResponse::parse(&refusal).unwrap().service_error, ServiceError::DecipheringError);

    let aare = connection.exchange(&ask(&keys, 1)).unwrap();
    let response = AssociationResponse::parse(&aare).unwrap();
    let hls = response.hls_challenge(title(METER), &challenge).unwrap();
    assert!(other.open(hls.initiate_response).is_none());
    let agreed = InitiateResponse::parse(&keys.open(hls.initiate_response).unwrap()).unwrap();
    assert_eq!(agreed.vaa_name, 7);

    let reply = keys.answer(CLIENT, 2, hls.challenge.octets()).reply_to_hls_authentication(INVOKE);
    let answer = keys.open(&connection.exchange(&keys.protect(3, &reply)).unwrap()).unwrap();
    let answer = ActionResponse::parse(&answer).unwrap();
    let gmac = answer.hls_gmac().unwrap();
    assert_eq!(gmac, keys.answer(METER, gmac.counter, challenge.octets()));
    assert_ne!(gmac, other.answer(METER, gmac.counter, challenge.octets()));
    assert!(connection.is_associated());

    let answer =
        keys.open(&connection.exchange(&keys.protect(4, &ENERGY.get_request_normal(INVOKE))).unwrap()).unwrap();
    let answer = GetResponse::parse(&answer).unwrap();
    assert_eq!((answer.invoke_id_and_priority, answer.result.unwrap().unsigned()), (INVOKE, Ok(123_456)));

    let initiate_request = keys.protect(5, &initiate.octets().unwrap());
    let release = ReleaseRequest { initiate_request: Some(&initiate_request) };
    assert_eq!(connection.exchange(&release.octets().unwrap()).unwrap()[0], acse::RLRE);
    assert!(!connection.is_associated());
}

fn ciphered(tag: u8) -> impl Strategy<Value = Vec<u8>> {
    (any::<u32>(), prop::collection::vec(any::<u8>(), 12..200)).prop_map(move |(counter, content)| {
        let mut octets = vec![tag];
        axdr::write_octet_string(&[&[0x30], counter.to_be_bytes().as_slice(), &content].concat(), &mut octets);
        octets
    })
}

fn user_information() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        ciphered(0x28),
        any::<([u8; 3], u16)>().prop_map(|(conformance, size)| xdlms::InitiateResponse {
            conformance,
            server_max_receive_pdu_size: size
        }
        .encode()),
        (0..=10u8, any::<u8>()).prop_map(|(category, error)| vec![0x0E, 1, category, error]),
    ]
}

fn simulated_aare() -> impl Strategy<Value = acse::AssociationResponse> {
    let mechanism =
        prop::sample::select(vec![acse::Mechanism::Lowest, acse::Mechanism::Low, acse::Mechanism::HighGmac]);
    let authentication_value = prop::option::of(prop::collection::vec(any::<u8>(), 0..200));
    (
        any::<bool>(),
        0..3u8,
        0..128u8,
        prop::option::of(1..u64::MAX),
        mechanism,
        authentication_value,
        prop::option::of(user_information()),
    )
        .prop_map(|(ciphering, result, diagnostic, title, mechanism, authentication_value, user_information)| {
            acse::AssociationResponse {
                context: if ciphering {
                    acse::ApplicationContext::LogicalNameCiphering
                } else {
                    acse::ApplicationContext::LogicalName
                },
                result,
                diagnostic,
                server_title: title.map(|title| meter_sim::SystemTitle::new(title.to_be_bytes())),
                mechanism,
                authentication_value,
                user_information,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn an_aarq_says_what_was_asked(id in 1..u64::MAX, challenge in prop::collection::vec(any::<u8>(), 8..=64), initiate_request in ciphered(0x21)) {
        let client_title = SystemTitle::from_octets(&id.to_be_bytes()).unwrap();
        let request = AssociationRequest { client_title, challenge: Challenge::new(&challenge).unwrap(), initiate_request: &initiate_request };
        let octets = request.octets().unwrap();
        let read = acse::AssociationRequest::parse(&octets).unwrap();
        prop_assert_eq!(read.encode(), octets);
        prop_assert_eq!(read, acse::AssociationRequest {
            context: acse::ApplicationContext::LogicalNameCiphering,
            client_title: Some(meter_sim::SystemTitle::new(id.to_be_bytes())),
            mechanism: acse::Mechanism::HighGmac,
            authentication_value: Some(challenge),
            user_information: initiate_request.clone(),
        });
        let release = acse::Release::parse_request(&ReleaseRequest { initiate_request: Some(&initiate_request) }.octets().unwrap()).unwrap();
        prop_assert_eq!(release, acse::Release { reason: Some(0), user_information: Some(initiate_request) });
    }

    #[test]
    fn an_aare_is_read_as_it_was_meant(meant in simulated_aare()) {
        let octets = meant.encode();
        let read = AssociationResponse::parse(&octets).unwrap();
        prop_assert_eq!(read.context == ApplicationContext::CipheredLogicalNames, meant.context == acse::ApplicationContext::LogicalNameCiphering);
        prop_assert_eq!(read.result as u8, meant.result);
        prop_assert_eq!(read.diagnostic, SourceDiagnostic::ServiceUser(meant.diagnostic));
        prop_assert_eq!(read.server_title.map(SystemTitle::octets), meant.server_title.map(|title| *title.as_bytes()));
        prop_assert_eq!(read.mechanism.map_or(0, |mechanism| mechanism as u8), meant.mechanism.id());
        prop_assert_eq!(read.authentication_value.map(<[u8]>::to_vec), meant.authentication_value);
        match (read.information, meant.user_information.as_deref()) {
            (None, None) => {}
            (Some(AssociationInformation::Ciphered(read)), Some(meant)) => prop_assert_eq!(read, meant),
            (Some(AssociationInformation::InitiateResponse(read)), Some(meant)) => {
                let meant = xdlms::InitiateResponse::parse(meant).unwrap();
                prop_assert_eq!((read.conformance, read.longest_apdu, read.vaa_name), (meant.conformance, meant.server_max_receive_pdu_size, 7));
            }
            (Some(AssociationInformation::Error(read)), Some(meant)) => prop_assert_eq!(&[0x0E, read.service, read.category, read.error][..], meant),
            (read, meant) => prop_assert!(false, "{read:?} instead of {meant:?}"),
        }
    }

    #[test]
    fn damaged_answers_never_panic(meant in simulated_aare(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), cut: prop::sample::Index) {
        let mut octets = meant.encode();
        for (index, octet) in damage {
            let index = index.index(octets.len().min(160));
            octets[index] = octet;
        }
        let _ = AssociationResponse::parse(&octets[..cut.index(octets.len())]);
        if let Ok(read) = AssociationResponse::parse(&octets) {
            let _ = read.hls_challenge(title(METER), &Challenge::new(&[7; 8]).unwrap());
            let _ = (read.result.to_string(), read.diagnostic.to_string());
        }
    }

    #[test]
    fn hostile_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..300), start in prop::sample::select(vec!["", "61", "08 00 06 5F", "0E", "C4 01 C1", "C4 01 C1 00", "C7 01 C1 00", "C7 01 C1 00 01 00", "C7 01 C1 00 01 00 09"])) {
        let aimed = [hex(start), octets.clone()].concat();
        for octets in [&octets, &aimed] {
            let _ = AssociationResponse::parse(octets);
            let _ = InitiateResponse::parse(octets);
            let _ = ConfirmedServiceError::parse(octets);
            if let Ok(GetResponse { result: Ok(data), .. }) = GetResponse::parse(octets) {
                prop_assert!(octets.ends_with(data.octets()));
                let _ = (data.octet_string(), data.unsigned());
            }
            if let Ok(response) = ActionResponse::parse(octets) {
                let _ = (response.hls_gmac(), response.result.to_string());
            }
        }
    }

    #[test]
    fn answers_of_services_are_read_as_they_were_meant(invoke: u8, result: u8, error: u8, number: u32, answer: [u8; 17]) {
        let data = axdr::Data::DoubleLongUnsigned(number);
        let octets = xdlms::ServiceResponse::Get { invoke, result: Ok(data) }.encode();
        let read = GetResponse::parse(&octets).unwrap();
        prop_assert_eq!((read.invoke_id_and_priority, read.result.unwrap().unsigned()), (invoke, Ok(number.into())));
        let octets = xdlms::ServiceResponse::Get { invoke, result: Err(xdlms::DataAccessResult(error)) }.encode();
        prop_assert_eq!(GetResponse::parse(&octets).unwrap().result, Err(DataAccessResult(error)));
        let returned = Some(axdr::Data::OctetString(answer.to_vec()));
        let octets = xdlms::ServiceResponse::Action { invoke, result, returned }.encode();
        let read = ActionResponse::parse(&octets).unwrap();
        prop_assert_eq!((read.invoke_id_and_priority, read.result), (invoke, ActionResult(result)));
        prop_assert_eq!(read.return_parameters.unwrap().unwrap().octet_string(), Ok(answer.as_slice()));
    }

    #[test]
    fn requests_of_services_say_what_was_asked(invoke: u8, class: u16, obis: [u8; 6], attribute: i8, counter: u32, tag: [u8; 12]) {
        let get = Target { class_id: class, obis, member: attribute }.get_request_normal(invoke);
        let expected = xdlms::AttributeDescriptor { class, instance: meter_sim::Obis(obis), attribute };
        prop_assert_eq!(xdlms::ServiceRequest::parse(&get).unwrap(), xdlms::ServiceRequest::Get { invoke, attribute: expected, selective: false });
        let gmac = HlsGmac { suite: SecuritySuite::Suite0, counter, tag: AuthenticationTag(tag) };
        let method = xdlms::MethodDescriptor { class: 15, instance: meter_sim::Obis::CURRENT_ASSOCIATION, method: 1 };
        let argument = Some(axdr::Data::OctetString(gmac.octets().to_vec()));
        prop_assert_eq!(xdlms::ServiceRequest::parse(&gmac.reply_to_hls_authentication(invoke)).unwrap(), xdlms::ServiceRequest::Action { invoke, method, argument });
    }
}
