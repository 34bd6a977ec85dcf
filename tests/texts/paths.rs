//! A path that a page names exists in the tree: files and folders move, and pages stay behind.

use std::path::{Path, PathBuf};

use crate::{files, root};

#[test]
fn every_path_that_a_page_names_exists() {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for path in PAGES.iter().flat_map(|page| files(page, &["md"])) {
        let text = std::fs::read_to_string(&path).unwrap();
        let page = path.strip_prefix(root()).unwrap();
        for target in named(page, &text) {
            checked += 1;
            if !root().join(&target).exists() {
                wrong.push(format!("{}: `{}`", page.display(), target.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "pages name files or folders that do not exist:\n{}", wrong.join("\n"));
    assert!(checked > 250, "only {checked} paths were found in the pages");
}

#[test]
fn what_is_a_path_is_found() {
    let page = Path::new("docs/decisions/0001-some-words.md");
    for (text, paths) in [
        ("in `kms-server/ledger/src/door.rs`.", vec!["kms-server/ledger/src/door.rs"]),
        ("run `tests/run build\nrust`", vec!["tests/run"]),
        (
            "`cat docs/a.toml` of `tests/`, and `hsm-sim/README.md#tokens`",
            vec!["docs/a.toml", "tests", "hsm-sim/README.md"],
        ),
        ("[policies](../../policies/README.md#quotas), [hsm](../hsm.md)", vec!["policies/README.md", "docs/hsm.md"]),
        ("[`a`](0002-b.md) [c](#d) [e](https://example.com/f.md)", vec!["docs/decisions/0002-b.md"]),
        // What stands before a glob or a placeholder exists.
        ("`proto/meterkms/v1/*.proto`", vec!["proto/meterkms/v1"]),
        ("`kms-cli/src/commands/NOUN.rs`", vec!["kms-cli/src/commands"]),
        ("`kms-server/store/tests/schemas/NNNN_name.sql`", vec!["kms-server/store/tests/schemas"]),
        // None of these is one of the tree.
        ("`kms-server init`, tests/nothing, `target/release/kms-server`, `/etc/meterkms/policies`", vec![]),
    ] {
        let expected: Vec<_> = paths.iter().map(PathBuf::from).collect();
        assert_eq!(named(page, text), expected, "{text}");
    }
}

/// The paths in a page, from the folder of the workspace: words in backquotes that begin with one
/// of its folders, and the targets of links to files.
fn named(page: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for paragraph in text.split("\n\n") {
        // Every second part is in backquotes.
        for (number, part) in paragraph.split('`').enumerate() {
            if number % 2 == 1 {
                let words = part.split_whitespace().map(|word| word.trim_matches(['(', ')', ',', '.', ';', ':', '"']));
                let paths = words.filter(|word| FOLDERS.iter().any(|folder| word.starts_with(folder)));
                found.extend(paths.filter_map(|path| path.split('#').next()).map(|path| certain(Path::new(path))));
            } else {
                let targets = part.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
                let files = targets.filter(|target| !target.is_empty() && !target.contains(':'));
                found.extend(files.map(|target| certain(&resolved(page, target))));
            }
        }
    }
    found
}

/// The target of a link, from the folder of the workspace.
fn resolved(page: &Path, target: &str) -> PathBuf {
    let mut path = page.parent().map(Path::to_owned).unwrap_or_default();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                path.pop();
            }
            part => path.push(part),
        }
    }
    path
}

/// The path before its first glob or placeholder.
fn certain(path: &Path) -> PathBuf {
    let is_certain = |part: &str| !part.contains(['*', '{', '<', '…']) && !is_placeholder(part);
    path.iter().take_while(|part| part.to_str().is_some_and(is_certain)).collect()
}

/// Whether a part of a path begins with a word in capitals, and is no file that is called so.
fn is_placeholder(part: &str) -> bool {
    let word = part.split(|character: char| !character.is_alphanumeric()).next().unwrap_or_default();
    word.len() > 1 && word.chars().all(|character| character.is_ascii_uppercase()) && !IN_CAPITALS.contains(&word)
}

const PAGES: &[&str] =
    &["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "hsm-sim/README.md", "policies/README.md"];

/// The folders of the workspace that pages name.
const FOLDERS: &[&str] =
    &["docs/", "hsm-sim/", "kms-cli/", "kms-client/", "kms-server/", "policies/", "proto/", "tests/"];

const IN_CAPITALS: &[&str] = &["CHANGELOG", "CONTRIBUTING", "LICENSE", "README", "SECURITY"];
