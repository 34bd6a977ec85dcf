//! Keys of groups and device types through `kms`, and what a changed shipment is answered with.

use std::{fs, path::Path};

use kms_tests::{DevServer, TestModule, kms, policies_with};

const OFFICER: &str = "officer-1";
const HEAD_END: &str = "head-end";
const PERMIT: &str = "permit (principal is HeadEnd, action == Action::\"openGroupSession\", resource == MeterGroup::\"1\") \
                      when { context.key_type == \"GBEK\" && context.lifetime_seconds <= 3600 };\n";

fn done(state: &Path, profile: &str, arguments: &[&str]) -> String {
    let output = kms(state, profile, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_key_is_made_and_issued_where_a_policy_says_so() {
    let mut server = DevServer::start();
    let state = server.state().to_owned();
    let enrol = [
        "meter",
        "enrol",
        "4B414D00000F0001",
        "--serial",
        "F1",
        "--manufacturer",
        "KAM",
        "--device-profile",
        "two-setups-suite1",
        "--batch",
        "F",
        "--group",
        "north",
    ];
    done(&state, OFFICER, &enrol);
    assert!(done(&state, OFFICER, &["group", "list"]).contains("north"));
    let made = done(&state, OFFICER, &["group", "key", "create", "north", "--type", "GBEK", "--held-by-meters"]);
    assert!(made.contains("GBEK version 1 of north: active"), "{made}");
    let twice = kms(&state, OFFICER, &["group", "key", "create", "north", "--type", "GBEK"]);
    assert_eq!(twice.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&twice.stderr).contains("already"), "{twice:?}");
    // I8: as shipped, nobody gets it.
    let mut open = vec!["session", "open-group", "north", "--client-title", "4D4D4D0000000001"];
    if TestModule::of_environment() == TestModule::SoftHsm2 {
        open.push("--allow-cbc-expand");
    }
    assert_eq!(kms(&state, HEAD_END, &open).status.code(), Some(3));

    done(
        &state,
        OFFICER,
        &["device-type", "add", "kam-gateway", "--manufacturer", "KAM", "--device-profile", "gateway-suite0"],
    );
    done(&state, OFFICER, &["device-type", "key", "create", "kam-gateway", "--type", "FIRMWARE"]);
    assert!(done(&state, OFFICER, &["device-type", "show", "kam-gateway"]).contains("FIRMWARE"));
    let log = done(&state, OFFICER, &["audit", "list", "--limit", "20"]);
    for words in ["key created", "device type added"] {
        assert!(log.contains(words), "{log}");
    }

    // Another server of the island, with a policy for this group.
    let policies = policies_with(&state, PERMIT);
    server.kill();
    let second = server.second("second", |text| format!("{text}\n[policies]\ndirectory = \"{policies}\"\n")).await;
    let folder = state.join("second");
    let granted = done(&folder, HEAD_END, &open);
    for words in ["north", "GBEK", "1 to 1000, each once, with GBEK version 1"] {
        assert!(granted.contains(words), "{granted}");
    }
    // I4: the next lease follows.
    assert!(done(&folder, HEAD_END, &open).contains("1001 to 2000, each once"));
    let shown = done(&folder, OFFICER, &["group", "show", "north"]);
    assert!(shown.contains("4D4D4D0000000001") && shown.contains("head-end"), "{shown}");
    assert!(done(&folder, OFFICER, &["audit", "scrub"]).contains("nothing found"));
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shipment_that_is_not_what_was_signed_is_refused_by_its_signature() {
    let server = DevServer::start();
    let state = server.state();
    let file = fs::read(state.join("vendor/shipment.jsonl")).unwrap();
    let signature = fs::read(state.join("vendor/shipment.jsonl.sig")).unwrap();
    let text = String::from_utf8(file.clone()).unwrap();
    let serial = text.replacen("\"serial\":\"1", "\"serial\":\"2", 1).into_bytes();
    assert_ne!(serial, file);
    let last_line = file.len() - text.split_inclusive('\n').next_back().unwrap().len();
    for (name, octets) in
        [("serial", serial), ("cut", file[..file.len() / 2].to_vec()), ("without-trailer", file[..last_line].to_vec())]
    {
        let path = state.join(format!("{name}.jsonl"));
        fs::write(&path, &octets).unwrap();
        fs::write(state.join(format!("{name}.jsonl.sig")), &signature).unwrap();
        // Twice: what was refused is refused again, in the same words.
        for _ in 0..2 {
            let output = kms(
                state,
                OFFICER,
                &["shipment", "import", path.to_str().unwrap(), "--manufacturer", "urn:meterkms:dev:manufacturer:kam"],
            );
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{name}: {said}");
            assert!(
                said.contains(
                    "refused as a whole, nothing was imported: the signature does not verify with the manufacturer's key"
                ),
                "{name}: {said}"
            );
        }
    }
}
