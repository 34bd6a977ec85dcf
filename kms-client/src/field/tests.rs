use super::*;

fn device(directory: &Path, pin: &Pin) -> Device {
    let key = KeyRequest::for_device("h-17").unwrap();
    let mut params = rcgen::CertificateParams::default();
    let now = x509_parser::time::ASN1Time::now().timestamp();
    let time = |seconds| x509_parser::time::ASN1Time::from_timestamp(seconds).unwrap().to_datetime();
    (params.not_before, params.not_after) = (time(now - 300), time(now + 7 * 86_400));
    let signer = rcgen::KeyPair::from_pem(key.key_pem()).unwrap();
    let certificate = params.self_signed(&signer).unwrap().pem();
    let content = Content {
        handheld: "urn:meterkms:north:handheld:h-17".to_owned(),
        technician: "Tom Field".to_owned(),
        server: "127.0.0.1:7443".to_owned(),
        server_name: "localhost".to_owned(),
        root: certificate.clone(),
        certificate: certificate.clone(),
        transport_certificate: certificate,
        key: key.key_pem().to_owned(),
        transport_key: "the transport key".to_owned(),
        renewal: None,
    };
    let device = Device { vault: Vault::create(directory.to_owned(), pin).unwrap(), content };
    device.store().unwrap();
    device
}

#[test]
fn a_copied_folder_opens_with_its_pin_only_and_each_changed_octet_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin::new("correct horse battery").unwrap();
    let made = device(&directory.path().join("one"), &pin);
    let file = made.directory().join("device.sealed");
    let octets = std::fs::read(&file).unwrap();
    let leaked = |secret: &str| octets.windows(secret.len()).any(|window| window == secret.as_bytes());
    assert!(!leaked("Tom Field") && !leaked("the transport key") && !leaked("PRIVATE KEY"));

    // Elsewhere.
    let copy = directory.path().join("two");
    std::fs::create_dir(&copy).unwrap();
    std::fs::write(copy.join("device.sealed"), &octets).unwrap();
    assert_eq!(Device::unlock(&copy, &pin).unwrap().technician(), "Tom Field");
    let refused = |octets: &[u8], pin: &Pin| {
        std::fs::write(copy.join("device.sealed"), octets).unwrap();
        match Device::unlock(&copy, pin) {
            Err(FieldError::Vault(VaultError::Wrong | VaultError::Newer)) => {}
            other => panic!("{other:?}"),
        }
    };
    for wrong in ["correct horse batterz", "Correct horse battery", "correct horse battery "] {
        refused(&octets, &Pin::new(wrong).unwrap());
    }
    // Argon2id takes its time, and only the first octets come before it: so all octets of the
    // header, and some of each 64 behind it.
    let behind = (37..octets.len()).step_by(509).chain([octets.len() - 16, octets.len() - 1]);
    for at in (0..37).step_by(3).chain(behind) {
        let mut changed = octets.clone();
        changed[at] ^= 1;
        refused(&changed, &pin);
    }
    for length in [0, 8, 36, 37, 52, octets.len() - 1] {
        refused(&octets[..length], &pin);
    }
    refused(&[&octets[..], &[0]].concat(), &pin);
}

#[test]
fn each_octet_of_the_file_is_authenticated() {
    // Under a key that is derived once: all octets.
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin::new("correct horse battery").unwrap();
    let made = device(&directory.path().join("one"), &pin);
    let octets = std::fs::read(made.directory().join("device.sealed")).unwrap();
    assert!(made.vault.opens(&octets));
    for at in 0..octets.len() {
        for bit in 0..8 {
            let mut changed = octets.clone();
            changed[at] ^= 1 << bit;
            assert!(!made.vault.opens(&changed), "octet {at}");
        }
    }
}

#[test]
fn a_device_is_not_overwritten_and_a_pin_has_a_form() {
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin::new("482915").unwrap();
    assert!(matches!(Device::unlock(directory.path(), &pin), Err(FieldError::Vault(VaultError::None { .. }))));
    let made = device(directory.path(), &pin);
    assert!(Device::is_in(directory.path()));
    assert!(matches!(Vault::create(directory.path().to_owned(), &pin), Err(VaultError::Exists { .. })));
    for wrong in ["12345", "", "1234\n5678", &"x".repeat(129)] {
        assert!(matches!(Pin::new(wrong), Err(VaultError::PinForm)), "{wrong:?}");
    }
    assert_eq!(format!("{made:?} {pin:?}"), "Device { handheld: \"urn:meterkms:north:handheld:h-17\", .. } Pin(..)");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(directory.path().join("device.sealed")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn renewals_in_the_second_half_never_make_a_third_certificate() {
    const MINUTE: i64 = 60_000;
    let directory = tempfile::tempdir().unwrap();
    let made = device(directory.path(), &Pin::new("482915").unwrap());
    let (from, to) = made.validity().unwrap();
    let due = (from..to).step_by(usize::try_from(MINUTE).unwrap()).find(|now| made.is_renewal_due_at(*now)).unwrap();
    assert!(due > from.midpoint(to));
    // The successor is issued then at the earliest, begins five minutes before, and is due when the
    // first one has ended.
    let successor = due - 5 * MINUTE;
    assert!(successor + (due - from) > to, "{due}");
}

#[test]
fn addresses_are_host_and_port() {
    let server = EnrolmentServer::parse("kms.example:7444", None).unwrap();
    let answer = |host: &str| proto::EnrolResponse {
        server_host: host.to_owned(),
        server_port: 7_443,
        ..proto::EnrolResponse::default()
    };
    assert_eq!(server.address_of(&answer("")), "kms.example:7443");
    assert_eq!(server.address_of(&answer("other.example")), "other.example:7443");
    assert_eq!(EnrolmentServer::parse("[::1]:7444", None).unwrap().name_text(), "::1");
    assert_eq!(EnrolmentServer::parse("127.0.0.1:7444", Some("localhost")).unwrap().name_text(), "localhost");
    for wrong in ["kms.example", ":7444", "kms.example:x", "kms example:1"] {
        assert!(EnrolmentServer::parse(wrong, None).is_err(), "{wrong}");
    }
}

/// What an independent program made (tests/vectors).
#[test]
fn the_file_of_a_device_is_the_documented_one() {
    let all = include_str!("../../../tests/vectors/vectors.json");
    let vector = serde_json::from_str::<serde_json::Value>(all).unwrap()["device"].clone();
    let octets = |name: &str| hex::decode(vector[name].as_str().unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("device.sealed"), octets("file")).unwrap();
    let pin = Pin::new(vector["pin"].as_str().unwrap()).unwrap();
    let (_, content) = Vault::open(directory.path().to_owned(), &pin).unwrap();
    assert_eq!(*content, octets("content"));
}

#[tokio::test]
async fn a_renewal_is_repeated_with_the_same_id_and_key_until_it_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin::new("482915").unwrap();
    let mut made = device(directory.path(), &pin);
    // Nothing listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    made.content.server = free.to_string();
    let mut asked = Vec::new();
    for _ in 0..2 {
        assert!(matches!(made.renew().await, Err(FieldError::Connect(_))));
        // After a restart of the device, too.
        made = Device::unlock(directory.path(), &pin).unwrap();
        let renewal = made.content.renewal.clone().unwrap();
        let request = renewal.request(made.handheld()).unwrap();
        asked.push((request.request_id, KeyRequest::key_sha256(&request.certificate_request).unwrap()));
        assert!(made.content.key != renewal.key, "the earlier key stays in use");
    }
    assert_eq!(asked[0], asked[1]);
}

#[test]
fn the_keys_of_an_enrolment_are_stored_before_it_and_belong_to_its_code() {
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin::new("482915").unwrap();
    let code = |octet| EnrolmentCode::new("h-17", &[octet; 21], b"the root").unwrap();
    let keys = |octet, pin: &Pin| {
        PendingKeys::of(directory.path().to_owned(), &code(octet), pin).map(|keys| {
            let requests = [keys.tls.certificate_request(), keys.transport.certificate_request()];
            requests.map(|request| KeyRequest::key_sha256(request).unwrap())
        })
    };
    let first = keys(1, &pin).unwrap();
    assert!(!Device::is_in(directory.path()));
    let file = directory.path().join("enrolment.sealed");
    assert!(!std::fs::read(&file).unwrap().windows(11).any(|window| window == b"PRIVATE KEY"));
    assert_eq!(keys(1, &pin).unwrap(), first);
    let refused = keys(1, &Pin::new("482916").unwrap());
    assert!(matches!(refused, Err(FieldError::Vault(VaultError::Pending { .. }))));
    // Another code has other keys, and replaces them.
    let second = keys(2, &pin).unwrap();
    assert!(second.iter().all(|key| !first.contains(key)));
    assert_ne!(keys(1, &pin).unwrap(), first);
    // With the device they are gone.
    device(directory.path(), &pin);
    assert!(!file.exists());
    assert!(matches!(keys(1, &pin), Err(FieldError::Vault(VaultError::Exists { .. }))));
}
