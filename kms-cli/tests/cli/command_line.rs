//! `kms` without a server: what the command line accepts, refuses and says.

use std::{
    path::Path,
    process::{Command, Output},
};

fn kms(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kms"));
    command
        .args(arguments)
        .current_dir(directory)
        .env_remove("KMS_PROFILE")
        .env_remove("KMS_STATE")
        .env("NO_COLOR", "1");
    command.output().unwrap()
}

fn text(octets: &[u8]) -> String {
    String::from_utf8(octets.to_vec()).unwrap()
}

#[test]
fn wrong_values_are_refused_before_the_network_with_the_field_named() {
    let directory = tempfile::tempdir().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["session", "open", "4B414D"], "<METER>"),
        (&["session", "open", "4B414D000000000G"], "<METER>"),
        (&["session", "open", "0000000000000000"], "<METER>"),
        (&["session", "open", "4B414D0000000001", "--client-title", "xyz"], "--client-title"),
        (&["session", "open", "4B414D0000000001", "--key-types", "GUEK,GEK"], "--key-types"),
        (&["session", "open", "4B414D0000000001", "--purpose", "fun"], "--purpose"),
        (&["session", "open", "4B414D0000000001", "--counters", "5"], "--client-title"),
        (
            &["session", "open", "4B414D0000000001", "--client-title", "4D4D4D0000000001", "--counters", "1000001"],
            "--counters",
        ),
        (&["session", "open", "4B414D0000000001", "--security-setup", "0.0.43.0.0.254"], "--security-setup"),
        (&["meter", "show", "1"], "<METER>"),
        (&["meter", "list", "--manufacturer", "kam"], "--manufacturer"),
        (&["meter", "list", "--assigned-to", "hes-1"], "--assigned-to"),
        (&["meter", "assign", "4B414D0000000001"], "--head-end"),
        (&["meter", "assign", "4B414D0000000001", "--head-end", "urn:meterkms:dev:king:hes"], "--head-end"),
        (&["meter", "assign", "--head-end", "urn:meterkms:dev:head-end:hes-1"], "no meters, or two selections"),
        (&["meter", "adopt", "4B414D0000000001", "--floor", "1"], "--client-title"),
        (
            &["meter", "adopt", "4B414D0000000001", "--client-title", "4D4D4D0000000001", "--floor", "4294967296"],
            "--floor",
        ),
        (&["meter", "retire", "4B414D0000000001"], "--reason"),
        (&["meter", "retire", "4B414D0000000001", "--reason", ""], "--reason"),
        (&["meter", "retire", "4B414D0000000001", "--reason", "gone"], "--yes"),
        (&["handheld", "invite", "H-17", "--technician", "Tom"], "<NAME>"),
        (&["handheld", "invite", "h-17"], "--technician"),
        (&["handheld", "invite", "h-17", "--technician", ""], "--technician"),
        (&["handheld", "invite", "h-17", "--technician", "Tom", "--minutes", "0"], "--minutes"),
        (&["handheld", "hand-over", "h-17", "--technician", "Tom"], "--yes"),
        (&["handheld", "withdraw-invitation", "h-17"], "--reason"),
        (&["field", "enrol", "kms", "h-17/0"], "HOST:PORT"),
        (&["field", "enrol", "kms:7444", "h-17"], "enrolment code"),
        (&["field", "status"], "--profile"),
        (&["shipment", "import", "x"], "--manufacturer"),
        (&["work-order", "create", " x"], "<ID>"),
        (&["work-order", "create", "WO-1", "--task", "dance"], "--task"),
        (&["work-order", "create", "WO-1", "--meter", "1"], "--meter"),
        (&["work-order", "create", "WO-1", "--from", "tomorrow"], "--from"),
        (&["work-order", "change", "WO-1"], "--technician"),
        (&["work-order", "change", "WO-1", "--revision", "0"], "--revision"),
        (&["work-order", "cancel", "WO-1"], "--reason"),
        (&["work-order", "list", "--in-state", "done"], "--in-state"),
        (&["work-order", "list", "--made-by", "wfm"], "--made-by"),
        (
            &[
                "meter",
                "enrol",
                "4B414D00000F0001",
                "--manufacturer",
                "KAM",
                "--device-profile",
                "generic-suite0",
                "--batch",
                "lab",
            ],
            "--serial",
        ),
        (&["meter", "list", "--unassigned", "--assigned-to", "urn:meterkms:dev:head-end:hes-1"], "--unassigned"),
        (&["shipment", "show", "abc"], "SHA256|FILE"),
        (&["shipment", "make-sample", "--devices", "0", "--out", "x"], "--devices"),
        (&["shipment", "make-sample", "--devices", "1", "--out", "x", "--oaep-hash", "md5"], "--oaep-hash"),
        (&["shipment", "make-sample", "--devices", "1", "--out", "x", "--device-profile", "none"], "generic-suite0"),
        (&["principal", "add", "hes-2"], "<URN>"),
        (&["principal", "add", "urn:meterkms:dev:manufacturer:kam"], "--shipment-key"),
        (&["principal", "add", "urn:meterkms:dev:head-end:hes-2", "--certificate-request", "x"], "--out"),
        (&["campaign", "create", "x", "--batch", "B-1"], "--rotate"),
        (&["campaign", "create", "x", "--rotate", "LLS-SECRET", "--batch", "B-1"], "--rotate"),
        (&["campaign", "create", "x", "--rotate", "GUEK", "--probe", "--batch", "B-1"], "--probe"),
        (&["campaign", "create", "x", "--rotate", "GUEK"], "no meters are selected"),
        (&["campaign", "create", "x", "--probe", "--whole-island", "--quorum", "0"], "--quorum"),
        (&["campaign", "create", "x", "--probe", "--whole-island", "--wave", "0%"], "--wave"),
        (&["campaign", "create", "x", "--probe", "--whole-island", "--window", "22-5"], "--window"),
        (&["campaign", "create", "x", "--probe", "--whole-island", "--time-zone", "Mars/Olympus"], "--time-zone"),
        (&["campaign", "approve", "17"], "<CAMPAIGN>"),
        (&["campaign", "abort", "01939e7e-7c1b-7000-8000-000000000001"], "--reason"),
        (&["grant", "revoke", "17", "--reason", "lost"], "<GRANT>"),
        (&["exposure", "show"], "--meter"),
        (&["exposure", "show", "--meter", "4B414D0000000001", "--anyone"], "--anyone"),
        (&["exposure", "show", "--meter", "4B41"], "--meter"),
        (&["exposure", "show", "--handheld", "urn:meterkms:dev:head-end:hes-1"], "use --principal"),
        (&["exposure", "show", "--anyone", "--since", "yesterday"], "--since"),
        (&["audit", "list", "--from", "yesterday"], "--from"),
        (&["audit", "list", "--from", "2026-11-02T00:00:00Z", "--to", "2026-11-01T00:00:00Z"], "--from"),
        (&["--profile", "../x", "principal", "whoami"], "--profile"),
        (&["--output", "xml", "principal", "whoami"], "--output"),
        (&["frobnicate"], "frobnicate"),
    ];
    for (arguments, named) in cases {
        let output = kms(directory.path(), arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(named), "{arguments:?} does not name {named}: {error}");
        assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output");
    }
}

#[test]
fn a_missing_profile_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let output = kms(directory.path(), &["principal", "whoami"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no profile in `.kms`"), "{}", text(&output.stderr));
    for name in ["ada", "hes-1"] {
        let profile = directory.path().join(".kms/profiles").join(name);
        std::fs::create_dir_all(&profile).unwrap();
        std::fs::write(profile.join("profile.toml"), "server = '127.0.0.1:1'\nserver_name = 'localhost'\n").unwrap();
    }
    let output = kms(directory.path(), &["principal", "whoami"]);
    assert!(text(&output.stderr).contains("profiles: ada, hes-1"), "{}", text(&output.stderr));
    let output = kms(directory.path(), &["--profile", "bob", "principal", "whoami"]);
    assert!(text(&output.stderr).contains("no profile `bob`"), "{}", text(&output.stderr));
    // The default profile is used, and what is missing in it is named.
    std::fs::write(directory.path().join(".kms/default-profile"), "ada\n").unwrap();
    let output = kms(directory.path(), &["principal", "whoami"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("profiles/ada/ca.pem"), "{}", text(&output.stderr));
    let output = kms(directory.path(), &["session", "open", "4B414D0000000001"]);
    assert!(text(&output.stderr).contains("register-transport-key"), "{}", text(&output.stderr));
}

#[test]
fn without_arguments_there_is_help_whatever_the_environment_says() {
    let output = Command::new(env!("CARGO_BIN_EXE_kms")).env("KMS_STATE", "x").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).contains("Commands:"), "{}", text(&output.stdout));
}

#[test]
fn completions_are_made_for_every_shell() {
    let directory = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = kms(directory.path(), &["completions", shell]);
        assert!(output.status.success() && text(&output.stdout).contains("make-sample"));
    }
}

#[test]
#[cfg(unix)]
fn a_sample_shipment_is_made_without_a_server_and_openssl_accepts_its_signature() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl")
            .args(arguments)
            .current_dir(directory.path())
            .output()
            .expect("`apt-get install openssl` (tests/run does it)");
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    openssl(&["genrsa", "-out", "transport.pem", "2048"]);
    openssl(&["rsa", "-in", "transport.pem", "-pubout", "-out", "transport.pub.pem"]);
    let arguments = [
        "--output",
        "json",
        "shipment",
        "make-sample",
        "--devices",
        "2500",
        "--out",
        "B-1.jsonl",
        "--transport-key",
        "transport.pub.pem",
    ];
    let output = kms(directory.path(), &arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("PLAINTEXT"));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["devices"], 2500);
    openssl(&[
        "dgst",
        "-sha256",
        "-verify",
        "B-1.jsonl.vendor-key.pub.pem",
        "-signature",
        "B-1.jsonl.sig",
        "B-1.jsonl",
    ]);
    for private in ["B-1.jsonl.devices.jsonl", "B-1.jsonl.vendor-key.pem"] {
        assert_eq!(
            std::fs::metadata(directory.path().join(private)).unwrap().permissions().mode() & 0o777,
            0o600,
            "{private}"
        );
    }
    let shipment = std::fs::read_to_string(directory.path().join("B-1.jsonl")).unwrap();
    let devices = std::fs::read_to_string(directory.path().join("B-1.jsonl.devices.jsonl")).unwrap();
    assert_eq!((shipment.lines().count(), devices.lines().count()), (2502, 2500));
    assert!(shipment.lines().next().unwrap().contains("\"batch\":\"B-1\""));
    // Nothing is overwritten.
    let output = kms(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not overwritten"));
}
