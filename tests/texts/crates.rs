//! The crates of the workspace, as docs/architecture.md draws them, are those that cargo knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::PathBuf,
    process::Command,
};

use serde_json::Value;

use crate::{RENEW, root};

/// Each crate with the crates of the workspace that it uses in a program, tests apart.
type Graph = BTreeMap<String, BTreeSet<String>>;

#[test]
fn the_crates_are_drawn_as_they_are() {
    let path = root().join("docs/architecture.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("docs/architecture.md has the mark of the crates");
    let (committed, after) = rest.split_once(END).expect("docs/architecture.md has the other mark of the crates");
    let now = drawn(&graph());
    if committed == now {
        return;
    }
    if std::env::var_os(RENEW).is_some() {
        std::fs::write(&path, [before, BEGIN, &now, END, after].concat()).unwrap();
        return;
    }
    panic!(
        "docs/architecture.md draws other crates than there are; if the new order is meant, renew it and read the \
         difference:\n\n    {RENEW}=1 cargo test --release --workspace --test texts crates"
    );
}

/// What the production program must not carry: simulators, samples, and what tests use.
#[test]
fn the_server_carries_no_simulator() {
    let graph = graph();
    let mut carried = BTreeSet::new();
    let mut waiting = vec!["kms-server".to_owned()];
    while let Some(name) = waiting.pop() {
        if carried.insert(name.clone()) {
            waiting.extend(graph[&name].iter().cloned());
        }
    }
    for foreign in ["attacker", "hsm-sim", "kms-client", "kms-dev", "kms-store-testing", "kms-tests", "meter-sim"] {
        assert!(graph.contains_key(foreign), "{foreign} is a crate of the workspace");
        assert!(!carried.contains(foreign), "kms-server carries {foreign}");
    }
}

fn graph() -> Graph {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let names: BTreeSet<String> = packages.iter().map(name).collect();
    let used = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        dependencies.filter(|one| one["kind"].is_null()).map(name).filter(|used| names.contains(used)).collect()
    };
    packages.iter().map(|package| (name(package), used(package))).collect()
}

/// What cargo knows of the packages of the workspace.
pub(crate) fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    let output = Command::new(cargo).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The root file of each library and program of the workspace.
pub(crate) fn sources(metadata: &Value) -> Vec<PathBuf> {
    let targets = metadata["packages"].as_array().unwrap().iter().flat_map(|one| one["targets"].as_array().unwrap());
    let built = |target: &&Value| {
        let kinds = target["kind"].as_array().unwrap();
        kinds.iter().any(|kind| ["bin", "lib", "cdylib"].iter().any(|built| kind == *built))
    };
    targets.filter(built).map(|target| target["src_path"].as_str().unwrap().into()).collect()
}

/// A line for each crate, those that it uses above it. What it uses by way of another one is left
/// out.
fn drawn(graph: &Graph) -> String {
    let mut text = "\n\n    crate              uses directly\n".to_owned();
    let mut done: BTreeSet<&str> = BTreeSet::new();
    while done.len() < graph.len() {
        let ready = graph.iter().filter(|(name, used)| {
            !done.contains(name.as_str()) && used.iter().all(|used| done.contains(used.as_str()))
        });
        let ready: Vec<_> = ready.collect();
        assert!(!ready.is_empty(), "crates use each other in a circle");
        for (name, used) in ready {
            let direct =
                used.iter().filter(|one| !used.iter().any(|other| other != *one && reaches(graph, other, one)));
            let direct: Vec<&str> = direct.map(String::as_str).collect();
            writeln!(text, "{}", format!("    {name:<18} {}", direct.join(", ")).trim_end()).unwrap();
            done.insert(name);
        }
    }
    text.push('\n');
    text
}

fn reaches(graph: &Graph, from: &str, to: &str) -> bool {
    graph[from].iter().any(|used| used == to || reaches(graph, used, to))
}

const BEGIN: &str = "<!-- crates:begin -->";
const END: &str = "<!-- crates:end -->";
