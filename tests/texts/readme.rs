//! What README shows is what the programs print: the same words in the same order. Figures, ids,
//! times and line breaks are others.

use kms_tests::{DevServer, TestModule, kms};

use crate::root;

#[test]
fn readme_shows_what_the_programs_print() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let server = DevServer::start_sized(TestModule::HsmSim, kms_store_testing::TestDatabase::Sqlite, 1_000);
    let mut compared = 0;
    for block in blocks(&readme) {
        let (command, shown) = block.split_once('\n').unwrap_or((&block, ""));
        let printed = if let Some(command) = command.strip_prefix("$ kms ") {
            let mut words: Vec<_> = command.split(' ').collect();
            let identity = match words.as_slice() {
                ["--profile", identity, ..] => (*identity).to_owned(),
                _ => "officer-1".to_owned(),
            };
            words.drain(..if words.contains(&"--profile") { 2 } else { 0 });
            let output = kms(server.state(), &identity, &words);
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            assert_same(command, shown, &String::from_utf8(output.stdout).unwrap());
            compared += 1;
            continue;
        } else if command.starts_with("A development island in") {
            &server.printed
        } else {
            continue;
        };
        assert_same("kms-dev", &block, printed);
        compared += 1;
    }
    assert_eq!(compared, 4, "outputs in README");
}

/// The indented blocks, without their indentation.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        match line.strip_prefix("    ") {
            Some(line) => blocks.last_mut().unwrap().extend([line, "\n"]),
            None if line.is_empty() => blocks.last_mut().unwrap().push('\n'),
            None => blocks.push(String::new()),
        }
    }
    blocks.iter().map(|block| block.trim().to_owned()).filter(|block| !block.is_empty()).collect()
}

/// What is shown is the beginning of what is printed, up to `...`.
fn assert_same(what: &str, shown: &str, printed: &str) {
    let (shown, ends) = shown.trim_end().strip_suffix("...").map_or((shown, false), |shown| (shown, true));
    let (shown_words, printed_words) = (shapes(shown), shapes(printed));
    let same = match ends || printed.contains("Ctrl-C") {
        true => printed_words.starts_with(&shown_words),
        false => printed_words == shown_words,
    };
    let first = shown_words.iter().zip(&printed_words).find(|(shown, printed)| shown != printed);
    assert!(
        same,
        "README shows other words than `{what}` prints; the first that differ (shown, printed): {first:?}\n\
         run it, and show what it prints now:\n\n{printed}"
    );
}

/// The words without figures: what has a digit, or could be octets in hex, keeps its punctuation
/// only.
fn shapes(text: &str) -> Vec<String> {
    text.split_whitespace().map(shape).collect()
}

fn shape(word: &str) -> String {
    let octets = word.len() >= 8 && word.bytes().all(|octet| octet.is_ascii_hexdigit());
    if word.starts_with('/') {
        return "/PATH".to_owned();
    }
    if word.bytes().all(|octet| octet == b'-') {
        return "-".to_owned();
    }
    if ["s", "ms", "µs"].contains(&word) {
        return "TIME".to_owned();
    }
    if !octets && !word.bytes().any(|octet| octet.is_ascii_digit()) {
        return word.to_owned();
    }
    let mut shape = String::new();
    for character in word.chars() {
        let character = if character.is_alphanumeric() { '#' } else { character };
        if character != '#' || !shape.ends_with('#') {
            shape.push(character);
        }
    }
    shape
}
