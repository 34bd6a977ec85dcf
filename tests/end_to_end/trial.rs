//! An island for trials says so, and is not reached from elsewhere by mistake.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use kms_tests::{DevServer, program};

#[test]
fn run_says_as_an_error_that_its_configuration_is_for_trials() {
    let mut server = DevServer::start_on_sqlite();
    assert!(server.interrupt(), "Ctrl-C did not end the server well");
    let mut command = server.command("run");
    command.arg("--config").arg(server.state().join("island/kms-server.toml"));
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // The log ends when the process does.
    let log = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut seen = Vec::new();
    for line in log {
        let found = line.contains("NOT FOR REAL KEYS");
        seen.push(line);
        if found || seen.last().is_some_and(|line| line.contains("listening")) {
            break;
        }
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(seen.last().is_some_and(|line| line.contains("NOT FOR REAL KEYS") && line.contains("ERROR")), "{seen:?}");
}

#[test]
fn dev_listens_on_this_machine_alone_unless_more_is_said() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7443"] {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let mut command = std::process::Command::new(program("kms-dev"));
        let output = command.args(["--listen", address, "--state"]).arg(&state).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("--expose"), "{address}: {said}");
        assert!(!state.exists(), "nothing was made");
    }
}
