//! Envelopes that were changed, that were made for another, and genuine ones with nonsense inside.

use kms_client::{
    KeyRequest, KeyType, OpenError, OpenOptions, PrincipalId, RequestId, TransportKey, TransportKeyError, UnixMillis,
    proto,
};
use proptest::prelude::*;
use prost::Message as _;

use crate::support::{Vector, examples, options, transport_key};

#[test]
fn every_changed_octet_is_noticed() {
    let vector = Vector::load("vector.properties");
    let key = transport_key();
    let good = vector.envelope();
    assert!(key.open(&good, &options()).is_ok());
    for part in 0..3 {
        let length = [&good.header, &good.manifest, &good.seal][part].len();
        for position in 0..length {
            let mut changed = good.clone();
            let octets = [&mut changed.header, &mut changed.manifest, &mut changed.seal].into_iter().nth(part).unwrap();
            let mut content = octets.to_vec();
            content[position] ^= 1;
            *octets = content.into();
            let error = key.open(&changed, &options()).unwrap_err();
            // In the header other checks may come first; the manifest is never looked at before the
            // seal.
            assert!(part == 0 || error == OpenError::Seal, "part {part}, octet {position}: {error}");
        }
    }
    for length in 0..32 {
        let short = proto::Envelope { seal: good.seal.slice(..length), ..good.clone() };
        assert_eq!(key.open(&short, &options()).unwrap_err(), OpenError::Seal);
    }
}

#[test]
fn octets_do_not_move_between_header_and_manifest() {
    let good = Vector::load("vector.properties").envelope();
    // The same octets in sum, with another boundary. The moved field is one that a header may have.
    let joined = [good.header.as_ref(), good.manifest.as_ref()].concat();
    for length in 1..joined.len() {
        if length != good.header.len() {
            let moved = proto::Envelope {
                header: joined[..length].to_vec().into(),
                manifest: joined[length..].to_vec().into(),
                seal: good.seal.clone(),
            };
            assert!(transport_key().open(&moved, &options()).is_err());
        }
    }
}

#[test]
fn an_envelope_ends_with_the_grant() {
    let good = Vector::load("vector.properties").envelope();
    let key = transport_key();
    for (now, opens) in
        [(1_795_248_899_999, true), (1_795_248_900_000, false), (1_795_251_600_000, false), (i64::MAX, false)]
    {
        let result = key.open(&good, &OpenOptions::new().at(UnixMillis(now)));
        assert_eq!(result.is_ok(), opens, "{now}");
        assert!(opens || matches!(result.unwrap_err(), OpenError::Expired { .. }));
    }
}

#[test]
fn an_answer_to_another_request_is_refused() {
    let good = Vector::load("vector.properties").envelope();
    let asked = RequestId::parse("0199aa00-0000-7000-8000-000000000002").unwrap();
    let other = RequestId::parse("0199aa00-0000-7000-8000-000000000003").unwrap();
    assert!(transport_key().open(&good, &options().answering(asked)).is_ok());
    assert!(matches!(
        transport_key().open(&good, &options().answering(other)).unwrap_err(),
        OpenError::OtherRequest { .. }
    ));
}

#[test]
fn only_the_key_that_it_was_made_for_opens_an_envelope() {
    let good = Vector::load("vector.properties").envelope();
    let principal = PrincipalId::parse("urn:meterkms:north:head-end:hes-1").unwrap();
    let other = KeyRequest::generate(&principal).unwrap();
    let certificate = std::fs::read(examples().join("transport-certificate.pem")).unwrap();
    assert_eq!(
        TransportKey::from_pem(other.key_pem().as_bytes(), &certificate).unwrap_err(),
        TransportKeyError::CertificateOfAnotherKey
    );
    let pair = rcgen::KeyPair::from_pem(other.key_pem()).unwrap();
    let mut parameters = rcgen::CertificateParams::default();
    parameters.subject_alt_names = vec![rcgen::SanType::URI(principal.to_string().try_into().unwrap())];
    let own = parameters.self_signed(&pair).unwrap();
    let own = TransportKey::from_pem(other.key_pem().as_bytes(), own.pem().as_bytes()).unwrap();
    assert!(matches!(own.open(&good, &options()).unwrap_err(), OpenError::OtherTransportKey { .. }));
    parameters.subject_alt_names.clear();
    let nameless = parameters.self_signed(&pair).unwrap();
    assert_eq!(
        TransportKey::from_pem(other.key_pem().as_bytes(), nameless.pem().as_bytes()).unwrap_err(),
        TransportKeyError::NoPrincipal
    );
}

#[test]
fn a_genuine_seal_does_not_make_nonsense_good() {
    let vector = Vector::load("vector.properties");
    let key = transport_key();
    let good = vector.manifest();
    assert!(key.open(&vector.sealed(&good), &options()).is_ok());
    type Change = fn(&mut proto::Manifest);
    let changes: &[(&str, Change)] = &[
        ("hes-2", |manifest| manifest.principal = "urn:meterkms:north:head-end:hes-2".into()),
        ("urn", |manifest| manifest.principal = "hes-1".into()),
        ("grant id", |manifest| manifest.grant_id = vec![1; 15].into()),
        ("request id", |manifest| manifest.request_id = Default::default()),
        ("purpose", |manifest| manifest.purpose = 0),
        ("purpose", |manifest| manifest.purpose = 77),
        ("issued_ms", |manifest| manifest.issued_ms = manifest.not_after_ms),
        ("issued_ms", |manifest| manifest.issued_ms = -1),
        ("expired", |manifest| manifest.not_after_ms = manifest.issued_ms + 1),
        ("system title", |manifest| manifest.meters[0].meter = vec![1; 9].into()),
        ("twice", |manifest| manifest.meters.push(manifest.meters[0].clone())),
        ("security_setup", |manifest| manifest.meters[0].security_setup = vec![1, 0, 43, 0, 0, 255].into()),
        ("security suite", |manifest| manifest.meters[0].security_suite = 3),
        // The keys of suite 2 have 32 octets.
        ("GUEK", |manifest| manifest.meters[0].security_suite = 2),
        ("key type", |manifest| manifest.meters[0].keys[0].key_type = "GEK".into()),
        ("key version", |manifest| manifest.meters[0].keys[0].version = 0),
        ("dedicated", |manifest| manifest.meters[0].keys[0].key_type = "DEDICATED".into()),
        ("twice", |manifest| {
            let again = manifest.meters[0].keys[0].clone();
            manifest.meters[0].keys.push(again);
        }),
        ("wrapped key", |manifest| manifest.meters[0].keys[0].wrapped = vec![0; 24].into()),
        ("wrapped key", |manifest| manifest.meters[0].keys[0].wrapped = vec![0; 23].into()),
        ("wrapped key", |manifest| manifest.meters[0].keys[0].wrapped = vec![0; 1 << 20].into()),
        ("wrapped key", |manifest| manifest.meters[0].keys[0].wrapped = Default::default()),
        // A secret is not an AES key, nor the other way round.
        ("LLS-SECRET", |manifest| manifest.meters[0].keys[0].key_type = "LLS-SECRET".into()),
        ("system title", |manifest| lease(manifest).client_title = vec![0; 8].into()),
        ("key version", |manifest| lease(manifest).key_version = 0),
        ("counter lease", |manifest| lease(manifest).key_version = 4),
        ("counter lease", |manifest| lease(manifest).count = 0),
        ("counter lease", |manifest| lease(manifest).first = u32::MAX),
    ];
    for (index, (named, change)) in changes.iter().enumerate() {
        let mut manifest = good.clone();
        change(&mut manifest);
        let error = key
            .open(&vector.sealed(&manifest), &options())
            .expect_err(&format!("change {index} was accepted"))
            .to_string();
        assert!(error.contains(named), "change {index} should name {named}: {error}");
    }
}

#[test]
fn keys_of_a_group_are_opened_and_nonsense_is_not() {
    let vector = Vector::load("vector.properties");
    let key = transport_key();
    // The worked vector's encryption key, as the broadcast key of a group.
    let mut good = vector.manifest();
    let of_meter = good.meters.remove(0);
    let mut granted = of_meter.keys.iter().find(|key| key.key_type == "GUEK").unwrap().clone();
    granted.key_type = "GBEK".into();
    let lease = proto::CounterLease { key_version: granted.version, ..of_meter.lease.clone().unwrap() };
    good.groups = vec![proto::GroupKeys {
        group: 7,
        name: "north".into(),
        security_setup: of_meter.security_setup.clone(),
        security_suite: of_meter.security_suite,
        keys: vec![granted],
        lease: Some(lease.clone()),
    }];
    let opened = key.open(&vector.sealed(&good), &options()).unwrap();
    let [group] = opened.groups.as_slice() else { panic!("{opened:?}") };
    assert!(opened.meters.is_empty());
    assert_eq!((group.number, group.name.as_str(), group.keys.len()), (7, "north", 1));
    assert_eq!(group.key(KeyType::GBEK).unwrap().key.expose(), vector.octets("guek"));
    assert_eq!(group.counters.as_ref().unwrap().next(), Some(lease.first));

    type Change = fn(&mut proto::GroupKeys);
    let changes: &[(&str, Change)] = &[
        ("numbered from 1", |group| group.group = 0),
        ("name", |group| group.name = "../north".into()),
        ("name", |group| group.name = String::new()),
        ("security_setup", |group| group.security_setup = Default::default()),
        ("security suite", |group| group.security_suite = 9),
        ("GBEK", |group| group.security_suite = 2),
        ("group 7", |group| group.keys.push(group.keys[0].clone())),
        ("wrapped key", |group| group.keys[0].wrapped = vec![0; 24].into()),
        ("dedicated", |group| group.keys[0].key_type = "DEDICATED".into()),
        ("counter lease", |group| group.lease.as_mut().unwrap().key_version += 1),
        ("counter lease", |group| group.lease.as_mut().unwrap().count = 0),
    ];
    for (index, (named, change)) in changes.iter().enumerate() {
        let mut manifest = good.clone();
        change(&mut manifest.groups[0]);
        let error = key
            .open(&vector.sealed(&manifest), &options())
            .expect_err(&format!("change {index} was accepted"))
            .to_string();
        assert!(error.contains(named), "change {index} should name {named}: {error}");
    }
    let mut twice = good.clone();
    twice.groups.push(good.groups[0].clone());
    assert!(key.open(&vector.sealed(&twice), &options()).unwrap_err().to_string().contains("twice"));
}

fn lease(manifest: &mut proto::Manifest) -> &mut proto::CounterLease {
    manifest.meters[0].lease.as_mut().unwrap()
}

#[test]
fn envelopes_of_one_answer_are_joined_and_must_agree() {
    let vector = Vector::load("vector.properties");
    let key = transport_key();
    let whole = vector.manifest();
    let (mut session, mut authentication) = (whole.clone(), whole.clone());
    session.meters[0].keys.truncate(1);
    authentication.meters[0].keys.remove(0);
    authentication.meters[0].lease = None;
    let joined = key.open_all(&[vector.sealed(&session), vector.sealed(&authentication)], &options()).unwrap();
    assert_eq!((joined.meters.len(), joined.meters[0].keys.len()), (1, 3));
    assert!(joined.meters[0].counters.is_some());
    assert!(key.open_all(&[], &options()).is_err());
    // The same key twice, two leases, two grants.
    assert!(key.open_all(&[vector.sealed(&session), vector.sealed(&session)], &options()).is_err());
    let mut two_leases = authentication.clone();
    two_leases.meters[0].lease = whole.meters[0].lease.clone();
    assert!(key.open_all(&[vector.sealed(&session), vector.sealed(&two_leases)], &options()).is_err());
    authentication.grant_id = vec![9; 16].into();
    assert!(key.open_all(&[vector.sealed(&session), vector.sealed(&authentication)], &options()).is_err());
}

#[test]
fn a_key_in_doubt_gives_way_to_one_that_is_not() {
    let vector = Vector::load("vector.properties");
    let mut manifest = vector.manifest();
    let mut newer = manifest.meters[0].keys[0].clone();
    (newer.version, newer.in_doubt) = (4, true);
    manifest.meters[0].keys.push(newer);
    let opened = transport_key().open(&vector.sealed(&manifest), &options()).unwrap();
    let meter = &opened.meters[0];
    assert_eq!(meter.keys_of(kms_client::KeyType::GUEK).count(), 2);
    assert!(!meter.key(kms_client::KeyType::GUEK).unwrap().in_doubt);
}

#[test]
fn opening_by_many_threads_shares_the_agreement() {
    let vector = Vector::load("vector.properties");
    let (key, envelope) = (transport_key(), vector.envelope());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..200).for_each(|_| assert!(key.open(&envelope, &options()).is_ok())));
        }
    });
}

proptest! {
    #[test]
    fn arbitrary_octets_never_panic(header in proptest::collection::vec(any::<u8>(), 0..200), manifest in proptest::collection::vec(any::<u8>(), 0..300), seal in proptest::collection::vec(any::<u8>(), 0..40)) {
        let envelope = proto::Envelope { header: header.into(), manifest: manifest.into(), seal: seal.into() };
        prop_assert!(transport_key().open(&envelope, &options()).is_err());
    }

    #[test]
    fn headers_with_hostile_fields_are_refused(algorithm in any::<i32>(), island in ".{0,40}", point in proptest::collection::vec(any::<u8>(), 65), not_after_ms in any::<i64>()) {
        let mut point = point;
        point[0] = 4;
        let digest = transport_key().certificate_sha256().to_vec();
        let header = proto::EnvelopeHeader { algorithm, island, ephemeral_public: point.into(), transport_certificate_sha256: digest.into(), not_after_ms };
        let envelope = proto::Envelope { header: header.encode_to_vec().into(), ..Vector::load("vector.properties").envelope() };
        prop_assert!(transport_key().open(&envelope, &options()).is_err());
    }

    #[test]
    fn points_off_the_curve_are_refused(point in proptest::collection::vec(any::<u8>(), 64)) {
        let good = Vector::load("vector.properties").envelope();
        let mut header = proto::EnvelopeHeader::decode(good.header.as_ref()).unwrap();
        header.ephemeral_public = [&[4][..], &point].concat().into();
        let error = transport_key().open(&proto::Envelope { header: header.encode_to_vec().into(), ..good }, &options()).unwrap_err();
        prop_assert!(matches!(error, OpenError::Agreement | OpenError::Seal));
    }

    #[test]
    fn sealed_nonsense_never_panics(manifest in proptest::collection::vec(any::<u8>(), 0..400)) {
        let vector = Vector::load("vector.properties");
        prop_assert!(transport_key().open(&vector.sealed_octets(manifest), &options()).is_err());
    }

    #[test]
    fn sealed_manifests_with_flipped_octets_never_panic(position in any::<proptest::sample::Index>(), octet in any::<u8>()) {
        let vector = Vector::load("vector.properties");
        let mut manifest = vector.octets("manifest");
        let position = position.index(manifest.len());
        manifest[position] = octet;
        let _ = transport_key().open(&vector.sealed_octets(manifest), &options());
    }
}
