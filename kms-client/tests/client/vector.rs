//! The worked vector of docs/integration.md: opened by this library, and by every example program
//! of the guide.

use std::process::Command;

use kms_client::{KeyType, OpenError, proto::Purpose};

use crate::support::{Vector, examples, options, transport_key};

#[test]
fn the_worked_vector_opens() {
    let vector = Vector::load("vector.properties");
    let opened = transport_key().open(&vector.envelope(), &options()).unwrap();
    assert_eq!(opened.principal.to_string(), "urn:meterkms:north:head-end:hes-1");
    assert_eq!(opened.purpose, Purpose::Read);
    // The grant ends before the agreement.
    assert_eq!((opened.issued.0, opened.not_after.0), (1_795_248_000_000, 1_795_248_900_000));
    let meter = opened.meters.first().unwrap();
    assert_eq!(
        (meter.meter.to_string().as_str(), meter.security_setup.to_string().as_str()),
        ("4B414D0000000001", "0.0.43.0.0.255")
    );
    for (key_type, name) in [(KeyType::GUEK, "guek"), (KeyType::GAK, "gak"), (KeyType::LLS_SECRET, "lls_secret")] {
        let key = meter.key(key_type).unwrap();
        assert_eq!(key.key.expose(), vector.octets(name), "{name}");
        assert_eq!(key.version.map(kms_client::KeyVersionNumber::number), Some(3));
    }
    let counters = meter.counters.as_ref().unwrap();
    assert_eq!((counters.next(), counters.remaining(), counters.key_version().number()), (Some(1001), 1000, 3));
    assert_eq!(counters.client_title().to_string(), "4D4D4D0000000001");
    assert!(!format!("{opened:?}").to_uppercase().contains("0001020304050607"));
}

#[test]
fn algorithm_2_opens_only_where_it_is_allowed() {
    let vector = Vector::load("vector-cbc-expand.properties");
    assert_eq!(transport_key().open(&vector.envelope(), &options()).unwrap_err(), OpenError::AlgorithmRefused);
    let opened = transport_key().open(&vector.envelope(), &options().allow_cbc_expand()).unwrap();
    assert_eq!(opened.meters.first().unwrap().key(KeyType::GUEK).unwrap().key.expose(), vector.octets("guek"));
}

#[test]
fn the_python_example_opens_the_worked_vector() {
    run("python3", &["open_envelope.py"], "`pip install cryptography` (tests/run does it)");
}

#[test]
fn the_java_example_opens_the_worked_vector() {
    run("java", &["OpenEnvelope.java"], "`apt-get install default-jdk-headless` (tests/run does it)");
}

#[test]
fn the_openssl_example_opens_the_worked_vector() {
    run("sh", &["open_envelope.sh"], "`apt-get install openssl` (tests/run does it)");
}

#[test]
fn the_guide_shows_what_the_examples_do() {
    let guide = std::fs::read_to_string(examples().join("../integration.md")).unwrap();
    let shown = guide.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let (_, shown) = shown.split_once('\n').unwrap();
    assert!(std::fs::read_to_string(examples().join("open_envelope.py")).unwrap().contains(shown.trim_end()));
    let vector = Vector::load("vector.properties");
    for name in ["z", "transport_kek", "seal_key", "guek_wrapped", "guek", "gak"] {
        assert!(guide.contains(&hex::encode_upper(vector.octets(name))), "{name}");
    }
}

/// Runs an example in its folder and compares what it prints.
fn run(program: &str, arguments: &[&str], hint: &str) {
    let output = Command::new(program)
        .args(arguments)
        .arg(".")
        .current_dir(examples())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    let output = output.unwrap_or_else(|error| panic!("`{program}` is not on this machine ({error}): {hint}"));
    let text = String::from_utf8_lossy(&output.stdout);
    let vector = Vector::load("vector.properties");
    let expected =
        format!("GUEK {}\nGAK {}\n", hex::encode_upper(vector.octets("guek")), hex::encode_upper(vector.octets("gak")));
    assert!(
        output.status.success() && text == expected,
        "{program} {arguments:?} printed `{text}` and `{}`; it needs {hint}",
        String::from_utf8_lossy(&output.stderr)
    );
}
