//! The commands, one file for each noun.

pub(crate) mod audit;
pub(crate) mod campaign;
pub(crate) mod device_type;
pub(crate) mod exposure;
pub(crate) mod field;
pub(crate) mod grant;
pub(crate) mod group;
pub(crate) mod group_rotation;
pub(crate) mod handheld;
pub(crate) mod hsm;
pub(crate) mod meter;
mod new_key;
pub(crate) mod principal;
pub(crate) mod proposal;
pub(crate) mod roots;
pub(crate) mod sample;
pub(crate) mod session;
pub(crate) mod shipment;
pub(crate) mod work_order;

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use kms_client::{SystemTitle, new_request_id};
use serde::de::DeserializeOwned;

use crate::{arguments::shared::Sure, failure::Failure};

/// A new request id for a message.
fn request_id() -> Bytes {
    octets(new_request_id().octets())
}

/// Octets for a message.
fn octets(octets: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(octets.as_ref())
}

/// Text for an optional field: empty is absent.
fn text<T: ToString>(value: Option<&T>) -> String {
    value.map(T::to_string).unwrap_or_default()
}

/// Asks for confirmation. Without a terminal, only `--yes` confirms.
fn confirm(what: &str, sure: &Sure) -> Result<(), Failure> {
    if sure.yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{what}: add --yes to confirm")));
    }
    eprint!("{what}. Continue? [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    match io::stdin().read_line(&mut answer) {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => Err(Failure::failed("nothing was changed")),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| Failure::failed(format!("cannot read `{}`: {error}", path.display())))
}

/// Reads a file of JSON Lines. An error names the line.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, Failure> {
    let content = read(path)?;
    let lines = content.split(|octet| *octet == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let parsed = lines.map(|(index, line)| {
        serde_json::from_slice(line)
            .map_err(|error| Failure::usage(format!("`{}`, line {}: {error}", path.display(), index + 1)))
    });
    let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
    if parsed.is_empty() {
        Err(Failure::usage(format!("`{}` is empty: write one JSON object a line", path.display())))
    } else {
        Ok(parsed)
    }
}

/// Reads the meters of a file, one system title a line.
fn read_titles(path: &Path) -> Result<Vec<Bytes>, Failure> {
    let content = String::from_utf8(read(path)?)
        .map_err(|_| Failure::usage(format!("`{}` is not a text file", path.display())))?;
    let mut titles = Vec::new();
    for (line, title) in (1..).zip(content.lines()).filter(|(_, title)| !title.trim().is_empty()) {
        let title = SystemTitle::parse(title.trim())
            .map_err(|error| Failure::from(error).while_doing(&format!("`{}`, line {line}", path.display())))?;
        titles.push(octets(title.octets()));
    }
    if titles.is_empty() {
        Err(Failure::usage(format!("`{}` names no meter: write one system title a line", path.display())))
    } else {
        Ok(titles)
    }
}

/// Creates a file that must not exist yet; with `private`, only its owner may read it.
fn create(path: &Path, private: bool) -> Result<fs::File, Failure> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if private {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::failed(format!(
            "`{}` exists and is not overwritten: remove it or choose another name",
            path.display()
        )),
        _ => Failure::failed(format!("cannot write `{}`: {error}", path.display())),
    })
}

fn write(path: &Path, private: bool, content: &[u8]) -> Result<(), Failure> {
    create(path, private)?
        .write_all(content)
        .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", path.display())))
}

/// The path with `suffix` at its end: `batch.jsonl` and `.sig` give `batch.jsonl.sig`.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Entries that a command requests at a time.
const PAGE: usize = 1_000;
