//! `kms work-order` against a server that the test plays.

use serde_json::Value;

use crate::with_server::{Server, text};

const METER: &str = "4B414D0000000001";
const CREATE: [&str; 13] = [
    "work-order",
    "create",
    "WO-1",
    "--technician",
    "Ida Berg",
    "--task",
    "read",
    "--meter",
    METER,
    "--from",
    "2026-12-01T07:00:00Z",
    "--until",
    "2026-12-01T17:00:00+01:00",
];

/// What a command prints, and that it succeeds.
fn done(server: &Server, arguments: &[&str]) -> String {
    let output = server.kms(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn an_order_is_made_shown_changed_and_ended() {
    let server = Server::start();
    assert_eq!(done(&server, &CREATE), "work order WO-1 is made\n");
    assert_eq!(done(&server, &CREATE), "work order WO-1 was made before, as it is here\n");
    let place = [&CREATE[..], &["--place", "Harbour Street 7"]].concat();
    let mut second = place.clone();
    second[2] = "WO-2";
    done(&server, &second);

    let shown = done(&server, &["work-order", "show", "WO-2"]);
    for words in [
        "WO-2",
        "planned",
        "Ida Berg",
        "2026-12-01T07:00:00Z",
        "2026-12-01T16:00:00Z",
        "Harbour Street 7",
        METER,
        "1 meter\n",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    let json: Value =
        serde_json::from_str(&done(&server, &["work-order", "show", "WO-2", "--output", "json"])).unwrap();
    assert_eq!((&json["content"]["meters"][0], &json["revision"]), (&Value::from(METER), &Value::from(1)));

    let listed = done(&server, &["work-order", "list"]);
    for words in ["WO-1", "WO-2", "service-account:wfm", "2 work orders\n"] {
        assert!(listed.contains(words), "{words}: {listed}");
    }
    assert!(done(&server, &["work-order", "list", "--limit", "1"]).contains("1 work order (--limit shows more)"));
    assert!(done(&server, &["work-order", "ls", "--technician", "Bo"]).contains("no work orders"));

    let changed = done(
        &server,
        &[
            "work-order",
            "change",
            "WO-2",
            "--technician",
            "Bo Lind",
            "--task",
            "firmware",
            "--task",
            "configure",
            "--add-meter",
            "4B414D0000000002",
            "--remove-meter",
            METER,
            "--until",
            "2026-12-02T07:00:00Z",
        ],
    );
    for words in ["Bo Lind", "firmware, configure", "4B414D0000000002", "2026-12-02T07:00:00Z", "Harbour Street 7"] {
        assert!(changed.contains(words), "{words}: {changed}");
    }
    assert!(!changed.contains(METER));
    // It was changed since revision 1.
    let overtaken = server.kms(&["work-order", "change", "WO-2", "--technician", "Cy", "--revision", "1"]);
    assert_eq!(overtaken.status.code(), Some(1));
    assert!(text(&overtaken.stderr).contains("superseded"), "{}", text(&overtaken.stderr));
    let absent = server.kms(&["work-order", "change", "WO-2", "--remove-meter", METER]);
    assert_eq!(absent.status.code(), Some(2));

    assert!(
        done(&server, &["work-order", "complete", "WO-1"])
            .contains("2026-11-21T08:01:00Z by urn:meterkms:dev:officer:ada")
    );
    let unsure = server.kms(&["work-order", "cancel", "WO-2", "--reason", "not at home"]);
    assert_eq!(unsure.status.code(), Some(2));
    assert!(done(&server, &["work-order", "cancel", "WO-2", "--reason", "not at home", "--yes"]).contains("cancelled"));
    let unknown = server.kms(&["work-order", "show", "WO-9"]);
    assert_eq!(unknown.status.code(), Some(3));
}

#[test]
fn a_place_that_is_not_shown_is_not_overwritten_unseen() {
    let server = Server::start();
    let mut hidden = CREATE;
    hidden[2] = "WO-HIDDEN";
    done(&server, &hidden);
    assert!(done(&server, &["work-order", "show", "WO-HIDDEN"]).contains("not for you to see"));
    let refused = server.kms(&["work-order", "change", "WO-HIDDEN", "--technician", "Bo"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("add --place"), "{}", text(&refused.stderr));
    done(&server, &["work-order", "change", "WO-HIDDEN", "--technician", "Bo", "--place", ""]);
}

#[test]
fn a_file_is_imported_with_its_bad_lines_named() {
    let server = Server::start();
    let line = |id: &str, meters: &str, tasks: &str| {
        format!("{id},Ida Berg,{meters},{tasks},2026-12-01T07:00:00Z,2026-12-01T17:00:00Z\n")
    };
    let headings = "id,technician,meters,tasks,from,until\n";
    // Enough for two requests.
    let many: String = (10..310).map(|number| line(&format!("WO-{number}"), METER, "read firmware")).collect();
    let csv =
        [headings, &line("WO-1", METER, "dance"), &line("WO-2", &format!("{METER} 4B414D0000000009"), "read"), &many];
    std::fs::write(server.folder().join("orders.csv"), csv.concat()).unwrap();

    let checked = server.kms(&["work-order", "import", "orders.csv", "--dry-run"]);
    assert_eq!(checked.status.code(), Some(5));
    assert!(text(&checked.stdout).contains("301 work orders for 302 meters can be sent"), "{}", text(&checked.stdout));
    assert!(done(&server, &["work-order", "list"]).contains("no work orders"), "nothing was sent");

    let output = server.kms(&["work-order", "import", "orders.csv"]);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{shown}");
    for words in
        ["300 work orders made", "`dance` is not read", "4B414D0000000009: it is unknown", "   2  WO-1", "   3  WO-2"]
    {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    assert!(text(&output.stderr).contains("2 work orders not made"), "{}", text(&output.stderr));
    // Corrected and sent again: the others are as they are.
    let corrected = [headings, &line("WO-1", METER, "read"), &line("WO-2", METER, "read"), &many].concat();
    std::fs::write(server.folder().join("orders.csv"), corrected).unwrap();
    let again = done(&server, &["work-order", "import", "orders.csv", "--output", "json"]);
    let json: Value = serde_json::from_str(&again).unwrap();
    assert_eq!((&json["created"], &json["unchanged"]), (&Value::from(2), &Value::from(300)));
    assert_eq!(json["refused"], Value::from(Vec::<Value>::new()));

    let order = format!(
        "{{\"id\":\"WO-3\",\"technician\":\"Bo\",\"meters\":[\"{METER}\"],\"tasks\":[\"read\"],\"from\":\"2026-12-01T07:00:00Z\",\"until\":\"2026-12-01T17:00:00Z\"}}\n"
    );
    std::fs::write(server.folder().join("orders.jsonl"), order).unwrap();
    assert_eq!(done(&server, &["work-order", "import", "orders.jsonl"]), "1 work order made\n");
    let all_wrong = [headings, &line("WO-4", "4B414D0000000009", "read")].concat();
    std::fs::write(server.folder().join("wrong.txt"), all_wrong).unwrap();
    assert_eq!(server.kms(&["work-order", "import", "wrong.txt"]).status.code(), Some(2), "which format?");
    assert_eq!(server.kms(&["work-order", "import", "wrong.txt", "--format", "csv"]).status.code(), Some(1));
    assert_eq!(server.kms(&["work-order", "import", "absent.csv"]).status.code(), Some(1));
}
