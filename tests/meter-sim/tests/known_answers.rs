//! The codec and the primitives against published and independently computed bytes.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use common::{bytes, ciphering, gak, guek, key};
use meter_sim::axdr::Data;
use meter_sim::ciphered::{CipheredApdu, CipheredForm, GLO_INITIATE_REQUEST, encode_initiate, parse_initiate};
use meter_sim::config::SecuritySetupConfig;
use meter_sim::key_transfer::key_transfer_argument;
use meter_sim::security::{SecurityControl, unwrap_key, wrap_key};
use meter_sim::xdlms::{AttributeDescriptor, InitiateRequest, MethodDescriptor, ServiceRequest, ServiceResponse};
use meter_sim::{
    CLASS_CLOCK, CLASS_SECURITY_SETUP, Connection, Error, KeyId, Meter, MeterConfig, Obis, SecuritySuite, SystemTitle,
};

const SUITE: SecuritySuite = SecuritySuite::Suite0;
const COUNTER: u32 = 0x0123_4567;
const GET: &str = "C0010000080000010000FF0200";

fn title() -> SystemTitle {
    "4D4D4D0000BC614E".parse().unwrap()
}

fn client() -> SystemTitle {
    "4D4D4D0000000001".parse().unwrap()
}

#[test]
fn get_request_in_plaintext() {
    let request = ServiceRequest::Get {
        invoke: 0,
        attribute: AttributeDescriptor { class: CLASS_CLOCK, instance: Obis::CLOCK, attribute: 2 },
        selective: false,
    };
    assert_eq!(request.encode(), bytes(GET));
    assert_eq!(ServiceRequest::parse(&bytes(GET)).unwrap(), request);
}

#[test]
fn get_request_under_three_protections() {
    for (control, expected) in [
        (SecurityControl::authenticated(SUITE), "C81E1001234567C0010000080000010000FF020006725D910F9221D263877516"),
        (SecurityControl::encrypted(SUITE), "C8122001234567411312FF935A47566827C467BC"),
        (
            SecurityControl::authenticated_encrypted(SUITE),
            "C81E3001234567411312FF935A47566827C467BC7D825C3BE4A77C3FCC056B6B",
        ),
    ] {
        let content = ciphering().protect(control, &title(), COUNTER, &bytes(GET)).unwrap();
        let apdu = CipheredApdu::new(CipheredForm::Global, 0xC0, title(), content).unwrap();
        assert_eq!(hex::encode_upper(apdu.encode()), expected);

        let read = CipheredApdu::parse(&bytes(expected)).unwrap();
        assert_eq!(read, apdu);
        let opened = ciphering().open(&title(), &read.content);
        if control.is_authenticated() {
            assert_eq!(opened.unwrap().as_slice(), bytes(GET));
        } else {
            assert_eq!(opened.unwrap_err(), Error::NotProtected);
        }
    }
}

#[test]
fn initiate_request() {
    let plain = bytes("01011000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B0");
    let expected =
        bytes("21303001234567801302FF8A7874133D414CED25B42534D28DB0047720606B175BD52211BE6841DB204D39EE6FDB8E356855");
    let request = InitiateRequest::parse(&plain).unwrap();
    assert_eq!(request.dedicated_key, Some(key("00112233445566778899AABBCCDDEEFF")));
    assert_eq!(request.conformance, [0x00, 0x7E, 0x1F]);
    assert_eq!(request.client_max_receive_pdu_size, 0x04B0);
    assert_eq!(request.encode().as_slice(), plain);

    let content =
        ciphering().protect(SecurityControl::authenticated_encrypted(SUITE), &title(), COUNTER, &plain).unwrap();
    assert_eq!(encode_initiate(GLO_INITIATE_REQUEST, &content), expected);
    let read = parse_initiate(GLO_INITIATE_REQUEST, &expected).unwrap();
    assert_eq!(ciphering().open(&title(), &read).unwrap().as_slice(), plain);
}

#[test]
fn hls_5_answers() {
    for (title, counter, challenge, expected) in [
        (client(), 1, "503677524A323146", "10000000011A52FE7DD3E72748973C1E28"),
        (title(), COUNTER, "4B35366956616759", "1001234567FE1466AFB3DBCD4F9389E2B7"),
    ] {
        let answer = ciphering().answer_challenge(SUITE, &title, counter, &bytes(challenge)).unwrap();
        assert_eq!(hex::encode_upper(&answer), expected);
        let (read, _) = ciphering().verify_challenge_answer(SUITE, &title, &bytes(challenge), &answer).unwrap();
        assert_eq!(read, counter);
        assert_eq!(
            ciphering().verify_challenge_answer(SUITE, &title, b"another challenge", &answer),
            Err(Error::Deciphering)
        );
    }
}

#[test]
fn key_wrap_of_rfc_3394() {
    for (kek, data, expected) in [
        (
            "000102030405060708090A0B0C0D0E0F",
            "00112233445566778899AABBCCDDEEFF",
            "1FA68B0A8112B447AEF34BD8FB5A7B829D3E862371D2CFE5",
        ),
        (
            "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F",
            "00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F",
            "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21",
        ),
    ] {
        let wrapped = wrap_key(&key(kek), &key(data)).unwrap();
        assert_eq!(hex::encode_upper(&wrapped), expected);
        assert_eq!(unwrap_key(&key(kek), &wrapped).unwrap(), key(data));
        assert_eq!(unwrap_key(&key(data), &wrapped), Err(Error::Unwrap));
    }
}

/// The request and the answer of a whole `key_transfer`, byte for byte, through a meter.
#[test]
fn key_transfer() {
    let client = "4B4D534845533031".parse().unwrap();
    let meter_title = "4142434445464748".parse().unwrap();
    let setup_name = "0.0.43.0.2.255".parse().unwrap();
    let new = key("A0A1A2A3A4A5A6A7A8A9AAABACADAEAF");
    let request = bytes(
        "DB084B4D5348455330313E300000006C16B4024AAAE66E67C1FB397E3054AA06DF99C2AE2ED92E4B1E030322514B4945BC58684154027369966C696FAF2D6C7410B0F19BD10CEC21B5",
    );
    let plain = bytes("C301C1004000002B0002FF02010101020216000918C97E5B71207F159EDDCCB965D7DCF3FD1A14AC7F2CF25E1E");
    let answer = bytes("DB084142434445464748163000000009F80A78728C4CF7587EF736B7C01DB98A9A");

    // The codec makes the request.
    let wrapped = wrap_key(&common::kek(), &new).unwrap();
    let action = ServiceRequest::Action {
        invoke: 0xC1,
        method: MethodDescriptor { class: CLASS_SECURITY_SETUP, instance: setup_name, method: 2 },
        argument: Some(key_transfer_argument(&[(KeyId::GlobalUnicastEncryption, &wrapped)])),
    };
    assert_eq!(action.encode(), plain);
    assert_eq!(ServiceRequest::parse(&plain).unwrap(), action);
    let content = ciphering().protect(SecurityControl::authenticated_encrypted(SUITE), &client, 0x6C, &plain).unwrap();
    let apdu = CipheredApdu::new(CipheredForm::GeneralGlobal, 0xC3, client, content).unwrap();
    assert_eq!(apdu.encode(), request);

    // A meter answers it.
    let mut setup = SecuritySetupConfig::new(guek(), gak(), common::kek());
    setup.logical_name = setup_name;
    setup.server_counter = 9;
    let meter = Meter::new(MeterConfig::ordinary(meter_title, SUITE, setup)).unwrap();
    let mut connection = Connection::pre_established(meter.clone(), 1, client).unwrap();
    assert_eq!(connection.exchange(&request).unwrap(), answer);
    assert_eq!(meter.keys_for_inspection(setup_name).unwrap().guek, new);

    // The codec reads the answer.
    let read = CipheredApdu::parse(&answer).unwrap();
    let opened = ciphering().open(&meter_title, &read.content).unwrap();
    assert_eq!(opened.as_slice(), bytes("C701C10000"));
    assert_eq!(
        ServiceResponse::parse(&opened).unwrap(),
        ServiceResponse::Action { invoke: 0xC1, result: 0, returned: None }
    );
}

#[test]
fn data_of_every_type_survives() {
    let data = Data::Structure(vec![
        Data::NullData,
        Data::Array(vec![Data::Unsigned(1), Data::Unsigned(2)]),
        Data::Boolean(true),
        Data::BitString(9, vec![0xAA, 0x80]),
        Data::DoubleLong(-2),
        Data::DoubleLongUnsigned(u32::MAX),
        Data::OctetString(vec![7; 300]),
        Data::VisibleString(b"abc".to_vec()),
        Data::Utf8String("ä".as_bytes().to_vec()),
        Data::Bcd(9),
        Data::Integer(-1),
        Data::Long(-3),
        Data::LongUnsigned(4),
        Data::Long64(-5),
        Data::Long64Unsigned(6),
        Data::Enum(22),
        Data::Float32([0; 4]),
        Data::Float64([0; 8]),
        Data::DateTime([1; 12]),
        Data::Date([2; 5]),
        Data::Time([3; 4]),
        Data::DontCare,
    ]);
    assert_eq!(Data::parse(&data.encode()).unwrap(), data);
}
