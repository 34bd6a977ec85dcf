//! What is read, what is refused, and that hostile octets do no harm.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kms_dlms::*;
use kms_domain::{KeyType, SecuritySuite};
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    hex::decode(text.replace(' ', "")).unwrap()
}

fn targets(request: &ServiceRequest) -> Vec<(u16, String, i8)> {
    request.targets.iter().map(|target| (target.class_id, hex::encode_upper(target.obis), target.member)).collect()
}

#[test]
fn every_form_of_a_request_is_read() {
    let clock = ("0000010000FF".to_owned(), 2);
    let at = |class| vec![(class, clock.0.clone(), clock.1)];
    let two = vec![at(8)[0].clone(), (70, "0000600300FF".to_owned(), 1)];
    let descriptor = "0008 0000010000FF 02";
    let disconnector = "0046 0000600300FF 01";
    let block = "00 00000001 03 AABBCC";
    for (apdu, kind, expected, continuation) in [
        (format!("C0 01 C1 {descriptor} 00"), ServiceKind::Get, at(8), false),
        (format!("C0 01 C1 {descriptor} 01 02 02 02 06 00000001 12 0003"), ServiceKind::Get, at(8), false),
        ("C0 02 C1 00000001".to_owned(), ServiceKind::Get, vec![], true),
        (format!("C0 03 C1 02 {descriptor} 00 {disconnector} 00"), ServiceKind::Get, two.clone(), false),
        (format!("C1 01 C1 {descriptor} 00 09 04 01020304"), ServiceKind::Set, at(8), false),
        (format!("C1 02 C1 {descriptor} 00 {block}"), ServiceKind::Set, at(8), false),
        (format!("C1 03 C1 {block}"), ServiceKind::Set, vec![], true),
        (format!("C1 04 C1 02 {descriptor} 00 {disconnector} 00 02 0F 01 11 02"), ServiceKind::Set, two.clone(), false),
        (format!("C1 05 C1 02 {descriptor} 00 {disconnector} 00 {block}"), ServiceKind::Set, two.clone(), false),
        (format!("C3 01 C1 {descriptor} 00"), ServiceKind::Action, at(8), false),
        (format!("C3 01 C1 {descriptor} 01 0F 00"), ServiceKind::Action, at(8), false),
        ("C3 02 C1 00000001".to_owned(), ServiceKind::Action, vec![], true),
        (format!("C3 03 C1 02 {descriptor} {disconnector} 02 00 0F 00"), ServiceKind::Action, two.clone(), false),
        (format!("C3 04 C1 {descriptor} {block}"), ServiceKind::Action, at(8), false),
        (format!("C3 05 C1 02 {descriptor} {disconnector} {block}"), ServiceKind::Action, two, false),
        (format!("C3 06 C1 {block}"), ServiceKind::Action, vec![], true),
    ] {
        let octets = hex(&apdu);
        let request = ServiceRequest::parse(&octets).unwrap_or_else(|error| panic!("{apdu}: {error}"));
        assert_eq!((request.kind, targets(&request), request.continuation), (kind, expected, continuation), "{apdu}");
        for length in 0..octets.len() {
            assert!(ServiceRequest::parse(&octets[..length]).is_err(), "{apdu} cut to {length}");
        }
        assert!(
            matches!(ServiceRequest::parse(&[octets.as_slice(), &[0]].concat()), Err(DlmsError::Trailing { .. })),
            "{apdu}"
        );
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let deep = format!("C1 01 C1 0001 0000010000FF 02 00 {} 00", "02 01".repeat(17));
    for (apdu, reason) in [
        ("D9 00", "tag"),
        ("60 00", "tag"),
        ("C0 04 C1 00000001", "choice"),
        ("C1 01 C1 0001 0000010000FF 02 00 13 00", "type 19"),
        ("C0 01 C1 0001 0000010000FF 02 02", "presence"),
        ("C0 03 C1 00", "list of 0"),
        ("C0 03 C1 82 FFFF", "list of 65535"),
        ("C1 04 C1 01 0001 0000010000FF 02 00 02 00 00", "2 values for 1"),
        ("C1 01 C1 0001 0000010000FF 02 00 09 84 FFFFFFFF", "65,535"),
        (&deep, "deeper"),
    ] {
        let error = ServiceRequest::parse(&hex(apdu)).expect_err(apdu);
        assert!(error.to_string().contains(reason), "{apdu}: {error}");
    }
    assert!(ServiceRequest::parse(&vec![0xC0; LONGEST_APDU + 1]).is_err());
}

/// What is decided on is what the meter executes: there is one way only to read what is
/// accepted.
#[test]
fn a_second_encoding_of_a_request_is_refused() {
    let initiate = "00 00 00 06 5F 1F 04 00 00 7E 1F 04 B0";
    let with_key = format!("01 10 {} 00 00 06 5F 1F 04 00 00 7E 1F 04 B0", "A5".repeat(16));
    let plain = ServiceRequest::parse(&hex(&format!("01 {initiate}"))).unwrap();
    assert_eq!((plain.kind, plain.dedicated_key), (ServiceKind::Initiate, false));
    assert!(ServiceRequest::parse(&hex(&format!("01 {with_key}"))).unwrap().dedicated_key);
    for refused in [
        // The tag of the conformance block in one octet, another presence octet, another version,
        // an octet that follows.
        format!("01 {}", with_key.replace("5F 1F", "5F")),
        format!("01 FF {}", &with_key[3..]),
        format!("01 {}", with_key.replace("00 00 06 5F", "FF 00 06 5F")),
        format!("01 {}", with_key.replace("06 5F", "07 5F")),
        format!("01 {with_key} 00"),
        format!("01 {}", with_key.replacen("01 10", "01 81 10", 1)),
        format!("01 {initiate} 00"),
        // Lengths that are not in their shortest form, of lists, values and blocks.
        "C0 03 C1 81 01 0008 0000010000FF 02 00".to_owned(),
        "C1 01 C1 0008 0000010000FF 02 00 09 81 02 0102".to_owned(),
        "C1 01 C1 0008 0000010000FF 02 00 01 82 0001 00".to_owned(),
        "C1 04 C1 01 0008 0000010000FF 02 00 82 0001 00".to_owned(),
        "C3 04 C1 0046 0000600300FF 01 01 00000001 81 01 00".to_owned(),
    ] {
        assert!(ServiceRequest::parse(&hex(&refused)).is_err(), "{refused}");
    }
}

/// The plain form of each service that a meter acts upon, in encodings that a strict parser does
/// not take.
#[test]
fn a_challenge_that_begins_as_a_request_is_told_from_others() {
    let key = "A5".repeat(16);
    for request in [
        format!("01 01 10 {key} 00 00 06 5F 1F 04 00 00 7E 1F 04 B0"),
        format!("01 01 10 {key} 00 00 06 5F 04 00 00 7E 1F 04 B0"),
        format!("01 FF 10 {key} 00 00 06 5F 1F 04 00 00 7E 1F 04 B0"),
        format!("01 01 10 {key} 01 FF 00 06 5F 1F 04 00 00 7E 1F 04 B0"),
        format!("01 01 10 {key} 00 00 07 5F 1F 04 00 00 7E 1F 04 B0"),
        format!("01 01 10 {key} 00 00 06 5F 1F 04 00 00 7E 1F 04 B0 00"),
        "05 81 01 02 0FA0".to_owned(),
        "06 01 05 0FA0 01 0F01".to_owned(),
        "10 00000001 00".to_owned(),
        "16 11 02 0FA0 01 0F01".to_owned(),
        "C0 81 C1 0008 0000010000FF 02 00".to_owned(),
        "C1 01 C1 0008 0000010000FF 02 00 00 00".to_owned(),
        "C3 01 C1 0046 0000600300FF 01 01 0F 00 00 00".to_owned(),
        "D9 40000001 00 01".to_owned(),
        "E0 80 0001 0000 0D".to_owned(),
    ] {
        assert!(resembles_request(&hex(&request)), "{request}");
    }
    let refused = (0..=u8::MAX).filter(|first| resembles_request(&[*first; 16])).count();
    assert_eq!(refused, 10, "one challenge in 26 costs another association");
    assert!(!resembles_request(b"a-fresh-challenge") && !resembles_request(&[]));
}

#[test]
fn requests_that_carry_keys_are_known() {
    let carried = |apdu: &str| {
        let octets = hex(apdu);
        ServiceRequest::parse(&octets).unwrap_or_else(|error| panic!("{apdu}: {error}")).carries_key(&octets)
    };
    let argument = "01 01 02 02 16 00 09 01 AA";
    for transfer in [
        format!("C3 01 C1 0040 00002B0000FF 02 01 {argument}"),
        "C3 01 C1 0040 00002B0000FF 02 00".to_owned(),
        format!("C3 03 C1 02 0046 0000600300FF 01 0040 00002B0000FF 02 02 0F 00 {argument}"),
        "C3 04 C1 0040 00002B0000FF 02 01 00000001 01 01".to_owned(),
    ] {
        assert_eq!(carried(&transfer), Some(KeyCarrier::KeyTransfer), "{transfer}");
    }
    let script = |class: &str| {
        format!(
            "C1 01 C1 0009 00000A0064FF 02 00 01 01 02 02 12 0001 01 01 02 05 16 02 {class} 09 06 00002B0000FF 0F 02 {argument}"
        )
    };
    for other in [
        format!("C3 03 C1 02 0040 00002B0000FF 02 0040 00002B0000FF 03 02 {argument} {argument}"),
        "C3 01 C1 0040 00002B0000FF 03 00".to_owned(),
        "C3 01 C1 0040 00002B0000FF 06 00".to_owned(),
        "C3 01 C1 000F 0000280000FF 02 00".to_owned(),
        "C1 01 C1 000F 0000280000FF 07 00 00".to_owned(),
        "C1 01 C1 000F 0000280000FF 00 00 00".to_owned(),
        "C3 01 C1 000C 0000280000FF 06 00".to_owned(),
        "C3 01 C1 0048 0001180000FF 07 00".to_owned(),
        "C3 01 C1 0048 0001180000FF 08 00".to_owned(),
        "C3 01 C1 001E 00002B0200FF 02 00".to_owned(),
        "C1 01 C1 001E 00002B0200FF 04 00 00".to_owned(),
        script("12 0040"),
        script("10 0040"),
        script("06 00000040"),
        script("12 000F"),
        script("12 0048"),
    ] {
        assert!(matches!(carried(&other), Some(KeyCarrier::Other(_))), "{other}");
    }
    for harmless in [
        "C0 01 C1 0040 00002B0000FF 02 00".to_owned(),
        "C3 01 C1 0040 00002B0000FF 01 01 16 03".to_owned(),
        "C3 01 C1 000F 0000280000FF 01 01 09 01 10".to_owned(),
        "C1 01 C1 0008 0000010000FF 02 00 12 0040".to_owned(),
        "C3 01 C1 0046 0000600300FF 01 01 0F 00".to_owned(),
        script("12 0046"),
    ] {
        assert_eq!(carried(&harmless), None, "{harmless}");
    }
}

#[test]
fn every_object_of_a_list_is_named() {
    let targets = |apdu: &str| ServiceRequest::parse(&hex(apdu)).unwrap().targets;
    let object = |class: u16, member: u8| format!("{class:04X} 0000600300FF {member:02X}");
    let named = |class_id, member| Target { class_id, obis: [0, 0, 0x60, 3, 0, 0xFF], member };
    let list = format!("C3 03 C1 03 {} {} {} 03 00 00 00", object(3, 1), object(70, 2), object(70, 1));
    assert_eq!(targets(&list), [named(3, 1), named(70, 2), named(70, 1)]);
    // The first block of a long request names its object, so splitting it hides nothing.
    assert_eq!(targets(&format!("C3 04 C1 {} 00 00000001 00", object(64, 2))), [named(64, 2)]);
}

#[test]
fn the_tags_of_ciphered_apdus() {
    for (plain, global, dedicated) in [
        (0xC0, 0xC8, 0xD0),
        (0xC1, 0xC9, 0xD1),
        (0xC3, 0xCB, 0xD3),
        (0xC4, 0xCC, 0xD4),
        (0xC5, 0xCD, 0xD5),
        (0xC7, 0xCF, 0xD7),
    ] {
        assert_eq!(CipheredTag::global_for(plain).unwrap().octet(), global);
        let tag = CipheredTag::dedicated_for(plain).unwrap();
        assert!(tag.is_dedicated() && tag.octet() == dedicated && tag.fits(&[plain]) && !tag.fits(&[plain ^ 1]));
    }
    assert_eq!(CipheredTag::global_for(0x08).unwrap().octet(), 0x28);
    assert_eq!((CipheredTag::dedicated_for(0x01), CipheredTag::global_for(0xD9)), (None, None));
}

#[test]
fn general_apdus_with_and_without_a_title() {
    let content = "30 00000007 AABB 0102030405060708090A0B0C";
    let without = hex(&format!("DC 00 13 {content}"));
    let apdu = CipheredApdu::parse(&without).unwrap();
    assert_eq!((apdu.system_title, apdu.counter, apdu.content), (None, 7, hex("AABB").as_slice()));
    assert_eq!(apdu.octets().unwrap(), without);
    // Lengths in a longer form than needed occur in the field.
    assert_eq!(
        CipheredApdu::parse(&hex(&format!("DB 08 4142434445464748 82 0013 {content}"))).unwrap().content,
        hex("AABB")
    );
    for refused in [
        format!("DB 07 41424344454647 13 {content}"),
        format!("DB 08 0000000000000000 13 {content}"),
        format!("C8 14 {content}"),
        format!("C8 12 {content}"),
        format!("DD 00 13 {content}"),
        "C8 10 30 00000007 0102030405060708090A0B".to_owned(),
        "C8 13 B0 00000007 AABB 0102030405060708090A0B0C".to_owned(),
        "C8 13 33 00000007 AABB 0102030405060708090A0B0C".to_owned(),
        "C8 13 00 00000007 AABB 0102030405060708090A0B0C".to_owned(),
    ] {
        assert!(CipheredApdu::parse(&hex(&refused)).is_err(), "{refused}");
    }
    let in_a_specific_one = CipheredApdu {
        tag: CipheredTag::global_for(0xC0).unwrap(),
        system_title: Some(kms_domain::SystemTitle::parse("4142434445464748").unwrap()),
        ..apdu
    };
    assert!(in_a_specific_one.octets().is_err());
}

#[test]
fn exception_responses() {
    let parse = |text: &str| ExceptionResponse::parse(&hex(text));
    assert_eq!(
        parse("D80105"),
        Ok(ExceptionResponse { state_error: 1, service_error: ServiceError::DecipheringError })
    );
    assert_eq!(parse("D80205").unwrap().state_error, 2);
    let counter = ServiceError::InvocationCounterError { last_accepted: 0x0123_4567 };
    assert_eq!(parse("D8010601234567").unwrap().service_error, counter);
    for refused in ["", "D8", "D801", "D80305", "D80107", "D80106", "D80106012345", "D8010501", "C70105"] {
        assert!(parse(refused).is_err(), "{refused}");
    }
    assert!(ExceptionResponse::recognise(&hex("D80105")) && !ExceptionResponse::recognise(&hex("C701C10000")));
}

#[test]
fn key_transfer_takes_what_a_meter_takes() {
    for (key_type, id) in [(KeyType::GUEK, 0), (KeyType::GBEK, 1), (KeyType::GAK, 2), (KeyType::KEK, 3)] {
        assert_eq!(key_type.standard_key_id(), Some(id));
        assert_eq!(KeyTransfer::new(id, &[7; 40]).unwrap().argument()[..8], [1, 1, 2, 2, 0x16, id, 9, 40]);
    }
    assert_eq!((KeyType::FIRMWARE.standard_key_id(), KeyType::LLS_SECRET.is_transferable()), (None, false));
    assert_eq!(KeyTransfer::new(200, &[7; 24]).unwrap().argument()[..8], [1, 1, 2, 2, 0x16, 200, 9, 24]);
    assert!(KeyTransfer::new(0, &[7; 16]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn hostile_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..300), tag in prop::sample::select(vec![0x01u8, 0xC0, 0xC1, 0xC3, 0xC8, 0xDB, 0xDC, 0xD8]), choice in 0..8u8) {
        let _ = ServiceRequest::parse(&octets);
        let aimed = [&[tag, choice], octets.as_slice()].concat();
        if let Ok(request) = ServiceRequest::parse(&aimed) {
            prop_assert!(request.targets.len() <= 256);
            prop_assert!(request.kind == ServiceKind::Initiate || request.continuation == request.targets.is_empty());
        }
        let _ = InitiateRequest::parse(&aimed);
        let _ = ExceptionResponse::parse(&aimed);
        let _ = HlsGmac::parse(&octets);
        if let Ok(apdu) = CipheredApdu::parse(&aimed) {
            let octets = apdu.octets().unwrap();
            prop_assert_eq!(CipheredApdu::parse(&octets).unwrap(), apdu);
        }
    }
}

proptest! {
    // Few cases: each is up to 70,000 octets long.
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn ciphered_apdus_come_back(content in prop::collection::vec(any::<u8>(), 0..70_000), counter: u32, tag: [u8; 12], general: bool, suite in 0..3u8) {
        let control = SecurityControl { suite: SecuritySuite::from_number(suite).unwrap(), protection: Protection::AuthenticatedEncrypted, key_set: KeySet::Broadcast };
        prop_assert_eq!(SecurityControl::from_octet(control.octet()).unwrap(), control);
        let tag_kind = if general { CipheredTag::GeneralGlobal } else { CipheredTag::global_for(0xC0).unwrap() };
        let apdu = CipheredApdu { tag: tag_kind, system_title: None, control, counter, content: &content, authentication_tag: AuthenticationTag(tag) };
        match apdu.octets() {
            Ok(octets) => prop_assert_eq!(CipheredApdu::parse(&octets).unwrap(), apdu),
            Err(_) => prop_assert!(content.len() > LONGEST_APDU - 30),
        }
    }
}
