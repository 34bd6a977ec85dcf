//! The help of every command, as it is committed.

use std::fmt::Write as _;

use crate::{
    RENEW,
    command_tree::{Node, section},
    root,
};

#[test]
fn help_is_as_committed() {
    for (name, file) in
        [("kms", "kms-cli/help.txt"), ("kms-server", "kms-server/help.txt"), ("kms-dev", "kms-server/dev/help.txt")]
    {
        let program = Node::of_program(name);
        let now = written(&program);
        let path = root().join(file);
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        if now == committed {
            continue;
        }
        if std::env::var_os(RENEW).is_some() {
            std::fs::write(&path, &now).unwrap();
            continue;
        }
        let first = now.lines().zip(committed.lines()).find(|(now, committed)| now != committed);
        panic!(
            "the help of `{name}` is not what {file} says; the first line that differs (now, committed): {first:?}\n\
             Scripts and habits depend on commands and options: mention what is gone or renamed in CHANGELOG.md.\n\
             Then renew the file, read the difference, and commit it:\n\n    \
             {RENEW}=1 cargo test --release --workspace --test texts help"
        );
    }
}

#[test]
fn every_command_has_help_and_the_first_one_tells_exit_codes() {
    for name in ["kms", "kms-server", "kms-dev"] {
        for command in Node::of_program(name).walk() {
            let first = command.help.lines().next().unwrap();
            assert!(!first.is_empty() && !first.starts_with("Usage:"), "{:?} has no description", command.path);
        }
    }
    let kms = Node::of_program("kms");
    for words in ["Exit codes", "refused by policy", "partly done", "Examples"] {
        assert!(kms.help.contains(words), "{}", kms.help);
    }
}

/// The help of all commands. Options for every command stand with the program only.
fn written(program: &Node) -> String {
    let mut text = String::new();
    for command in program.walk() {
        let path = command.path.join(" ");
        writeln!(text, "{}\n$ {path} --help\n", "=".repeat(80)).unwrap();
        let common: Vec<_> = match command.path.len() {
            1 => Vec::new(),
            _ => [FOR_ALL].into_iter().chain(section(&command.help, FOR_ALL)).collect(),
        };
        text.push_str(command.help.replace(&common.join("\n"), "").trim_end());
        text.push_str("\n\n");
    }
    text
}

const FOR_ALL: &str = "Options for every command:";
