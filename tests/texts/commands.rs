//! A command that a text names exists, with the options that the text gives it.

use crate::{command_tree::Node, files, root};

#[test]
fn every_command_that_a_text_names_exists() {
    let programs = [Node::of_program("kms"), Node::of_program("kms-server"), Node::of_program("kms-dev")];
    let mut wrong = Vec::new();
    let mut checked = 0;
    for folder in TEXTS {
        for path in files(folder, &["rs", "md", "toml", "proto", "cedar", "txt", "cedarschema"]) {
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            for command in named(&name, &text, &programs) {
                checked += 1;
                if let Err(reason) = check(&command, &programs) {
                    wrong.push(format!("{name}: `{command}`: {reason}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "texts name what does not exist:\n{}", wrong.join("\n"));
    assert!(checked > 300, "only {checked} commands were found in the texts");
}

#[test]
fn what_does_not_exist_is_found() {
    let programs = [Node::of_program("kms"), Node::of_program("kms-server"), Node::of_program("kms-dev")];
    for (text, reason) in [
        ("`kms shipment transport-key`", "`transport-key`"),
        ("`kms\n/// shipment\n/// transport-key`", "`transport-key`"),
        ("run kms principal propose {id}", "`propose`"),
        ("    $ kms --profile a session open 4B41 --counter 5", "`--counter`"),
        ("    cargo run --release --bin kms-dev -- --port 1", "`--port`"),
        ("`kms nothing`", "`nothing`"),
    ] {
        let found: Vec<_> = named("a.rs", text, &programs).iter().filter_map(|c| check(c, &programs).err()).collect();
        assert!(found.iter().any(|found| found.contains(reason)), "{text}: {found:?}");
    }
    for text in
        ["`kms … | head`", "`kms roots rotate {root}`", "the kms of a country", "`kms --output json audit list`"]
    {
        let found: Vec<_> = named("a.rs", text, &programs).iter().filter_map(|c| check(c, &programs).err()).collect();
        assert!(found.is_empty(), "{text}: {found:?}");
    }
}

/// The commands in a text: in backquotes, as lines of examples, and wherever the name of a program
/// is followed by one of its commands.
fn named(file: &str, text: &str, programs: &[Node]) -> Vec<String> {
    let text = joined(file, text);
    let mut found = Vec::new();
    for (at, _) in text.match_indices("kms") {
        let (before, rest) = text.split_at(at);
        let Some(program) = programs.iter().rev().find(|p| rest.starts_with(&format!("{} ", p.path.join(" ")))) else {
            continue;
        };
        let rest = rest.split_at(program.path.join(" ").len()).1;
        // `cargo run --release --bin kms --` stands for the program.
        let rest = rest.strip_prefix(" --").filter(|rest| rest.starts_with([' ', '`'])).unwrap_or(rest);
        let line = rest.lines().next().unwrap_or_default();
        let first = line.split_whitespace().next().unwrap_or_default();
        let quoted = before.ends_with('`');
        let word = before.chars().next_back().is_some_and(|c| c.is_alphanumeric() || "-_./@".contains(c));
        // An option tells a program that has no commands.
        let option = program.commands.is_empty() && first.starts_with("--");
        let known = option || program.command(first).is_some() || program.options.contains_key(first);
        if !word && (quoted || known || before.ends_with("$ ")) {
            let end = if quoted { line.find('`') } else { line.find(['`', '"', '\\', ')', ',', ';', ':', '(']) };
            let command = line.split_at(end.unwrap_or(line.len())).0;
            found.push(format!("{}{command}", program.path.join(" ")));
        }
    }
    found
}

/// The text with comments, strings and commands that go on in the next line in one line.
fn joined(file: &str, text: &str) -> String {
    let mut joined = String::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        let comment = ["/// ", "//! ", "// ", "# "].iter().find_map(|mark| trimmed.strip_prefix(mark));
        let open = joined.rsplit('\n').next().unwrap_or_default().matches('`').count() % 2 == 1;
        let carried = joined.ends_with('\\') && !joined.ends_with("\\n\\");
        if carried {
            joined.pop();
            joined.push_str(trimmed);
        } else if open && !file.ends_with(".txt") {
            joined.push(' ');
            joined.push_str(comment.unwrap_or(trimmed));
        } else {
            joined.push('\n');
            joined.push_str(line);
        }
    }
    joined.replace("\\n", "\n")
}

/// Walks down the commands, as far as the text says them.
fn check(command: &str, programs: &[Node]) -> Result<(), String> {
    let mut words = command.split_whitespace().peekable();
    let name = words.next().unwrap_or_default();
    let program = programs.iter().find(|program| program.path.join(" ") == name).unwrap();
    let mut node = program;
    let mut in_commands = true;
    while let Some(word) = words.next() {
        let word = word.trim_matches(['[', ']', '(', ')', ',', '.', '"', '\'']);
        if word.is_empty() || ["|", ">", "<", "&&", "#", "…", "...", "-->"].contains(&word) {
            break;
        }
        if word.starts_with("--") {
            let (option, value) = word.split_once('=').map_or((word, false), |(option, _)| (option, true));
            let follows = [node, program].iter().find_map(|node| node.options.get(option));
            let follows = *follows.ok_or_else(|| format!("there is no `{option}`"))?;
            if follows && !value && words.peek().is_some_and(|next| !next.starts_with("--")) {
                words.next();
            }
        } else if in_commands && !node.commands.is_empty() {
            match node.command(word) {
                Some(next) => node = next,
                // A placeholder, or prose after a command that was named as a whole.
                None if word.starts_with(['{', '<']) || word.chars().any(char::is_uppercase) => in_commands = false,
                None => return Err(format!("there is no `{word}`")),
            }
        }
    }
    Ok(())
}

/// Files and folders whose texts are read.
const TEXTS: &[&str] = &[
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "docs",
    "hsm-sim/README.md",
    "kms-cli",
    "kms-client",
    "kms-server",
    "policies",
    "proto",
    "tests/bench",
];
