//! The commands of a program, as its own help tells them.

use std::{collections::BTreeMap, process::Command};

use kms_tests::program;

/// A command, or a program.
#[derive(Debug)]
pub(crate) struct Node {
    /// The program and the names of the commands down to this one.
    pub(crate) path: Vec<String>,
    /// What `--help` prints.
    pub(crate) help: String,
    /// Its options and whether a value follows them.
    pub(crate) options: BTreeMap<String, bool>,
    pub(crate) commands: Vec<Self>,
}

impl Node {
    /// A program of this workspace with all that it can do.
    pub(crate) fn of_program(name: &str) -> Self {
        Self::at(vec![name.to_owned()])
    }

    fn at(path: Vec<String>) -> Self {
        let help = help(&path);
        let commands = section(&help, "Commands:")
            .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')))
            .map(|line| line.split_whitespace().next().unwrap())
            .filter(|name| *name != "help")
            .map(|name| Self::at([path.clone(), vec![name.to_owned()]].concat()))
            .collect();
        let options = help.lines().filter_map(option).collect();
        Self { path, help, options, commands }
    }

    pub(crate) fn command(&self, name: &str) -> Option<&Self> {
        self.commands.iter().find(|command| command.path.last().is_some_and(|last| last == name))
    }

    /// This command, and all below it.
    pub(crate) fn walk(&self) -> Vec<&Self> {
        [vec![self], self.commands.iter().flat_map(Self::walk).collect()].concat()
    }
}

fn help(path: &[String]) -> String {
    let (name, commands) = path.split_first().unwrap();
    let mut command = Command::new(program(name));
    // The help shows what these are set to, and is as wide as the terminal.
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("KMS_") || variable == "COLUMNS" || variable == "LINES" {
            command.env_remove(variable);
        }
    }
    let output = command.args(commands).arg("--help").stdin(std::process::Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("Usage:"), "{path:?} --help: {said}");
    said.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// The lines below a heading, up to the next one.
pub(crate) fn section<'h>(help: &'h str, heading: &str) -> impl Iterator<Item = &'h str> {
    let below = help.lines().skip_while(move |line| *line != heading).skip(1);
    below.take_while(|line| line.is_empty() || line.starts_with(' '))
}

/// `--name <VALUE>` at the beginning of a line, after `-n, ` or spaces.
fn option(line: &str) -> Option<(String, bool)> {
    let line = line.trim_start();
    let long = line.strip_prefix('-').and_then(|rest| rest.split_once(", ")).filter(|(short, _)| short.len() == 1);
    let line = long.map_or(line, |(_, long)| long);
    let mut words = line.split_whitespace();
    let name = words.next().filter(|word| word.starts_with("--"))?;
    Some((name.trim_end_matches("...").to_owned(), words.next().is_some_and(|word| word.starts_with('<'))))
}
