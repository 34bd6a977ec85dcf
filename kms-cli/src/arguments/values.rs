//! Values that arguments of several commands have, and what each must look like. A refusal says
//! what is wrong; clap adds the argument and the value.

use kms_client::{ParseError, PrincipalId, Role, SystemTitle};
use kms_domain::Quorum;

pub(super) fn system_title(text: &str) -> Result<SystemTitle, String> {
    if text.len() != 16 || !text.bytes().all(|octet| octet.is_ascii_hexdigit()) {
        return Err("not 16 hex digits".to_owned());
    }
    SystemTitle::parse(text).map_err(|error| error.to_string())
}

pub(super) fn group_name(name: &str) -> Result<String, String> {
    let well_formed = (1..=64).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-');
    if well_formed {
        Ok(name.to_owned())
    } else {
        Err("not 1 to 64 of a-z, 0-9 and `-`, starting with a letter".to_owned())
    }
}

pub(super) fn profile_name(name: &str) -> Result<String, String> {
    let well_formed = !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_' | b'.'));
    if well_formed { Ok(name.to_owned()) } else { Err("not a name of letters, digits, `-`, `_` and `.`".to_owned()) }
}

pub(super) fn quorum(text: &str) -> Result<Quorum, String> {
    Quorum::new(text.parse().map_err(|_| "not a number".to_owned())?).map_err(|error| error.reason().to_owned())
}

pub(super) fn party(text: &str) -> Result<String, ParseError> {
    if matches!(text, "vendor" | "anyone") {
        Ok(text.to_owned())
    } else {
        PrincipalId::parse(text).map(|principal| principal.to_string())
    }
}

/// The name of a handheld, or its URI.
pub(super) fn handheld(text: &str) -> Result<String, String> {
    if !text.contains(':') {
        return handheld_name(text);
    }
    let principal = PrincipalId::parse(text).map_err(|error| error.to_string())?;
    if principal.role() == Role::Handheld {
        Ok(principal.to_string())
    } else {
        Err(format!("it is the URI of a {}: use --principal", principal.role().name()))
    }
}

pub(super) fn digest(text: &str) -> Result<[u8; 32], String> {
    hex::decode(text).ok().and_then(|octets| octets.try_into().ok()).ok_or_else(|| "not 64 hex digits".to_owned())
}

/// The name of a handheld: the last part of its URI.
pub(crate) fn handheld_name(text: &str) -> Result<String, String> {
    PrincipalId::check_name(text).map(|()| text.to_owned()).map_err(|error| error.reason().to_owned())
}
