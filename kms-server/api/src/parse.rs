//! Parts of messages that several services have: request ids with their digest, names of groups,
//! security setups, reasons.

use kms_base::error::ServiceError;
use kms_domain::{RequestId, SecuritySetupId, SystemTitle};
use kms_service::Request;
use kms_service::request_digest::request_digest;

/// The request id, with the digest over all that is asked but the id. `name` is the name of the
/// method; `same` is the message without its request id.
pub(crate) fn request(id: &[u8], name: &[u8], same: &impl prost::Message) -> Result<Request, ServiceError> {
    let id = RequestId::from_octets(id).map_err(ServiceError::parse("request_id"))?;
    Ok(Request { id, digest: request_digest(&[name, &same.encode_to_vec()]) })
}

/// A security setup's OBIS code, 6 octets; empty is `None`.
pub(crate) fn parse_setup(field: &str, obis: &[u8]) -> Result<Option<SecuritySetupId>, ServiceError> {
    match obis {
        [] => Ok(None),
        [0, b, 43, 0, e, 255] => Ok(Some(SecuritySetupId::from_octets([*b, *e]))),
        _ => Err(ServiceError::invalid(field, "it is not the 6 octets of an OBIS code 0.b.43.0.e.255")),
    }
}

/// A group's or device type's name.
pub(crate) fn parse_group_name(name: String, field: &str) -> Result<String, ServiceError> {
    let well_formed = (1..=64).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-');
    if well_formed {
        Ok(name)
    } else {
        Err(ServiceError::invalid(field, "it is not 1 to 64 of a-z, 0-9 and `-`, starting with a letter"))
    }
}

/// Client system titles, at most 64, each once.
pub(crate) fn parse_client_titles(octets: &[bytes::Bytes]) -> Result<Vec<SystemTitle>, ServiceError> {
    if octets.len() > MOST_CLIENT_TITLES {
        return Err(ServiceError::invalid(
            "client_titles",
            format!("{} titles; at most {MOST_CLIENT_TITLES}", octets.len()),
        ));
    }
    let mut titles = Vec::with_capacity(octets.len());
    for (at, title) in octets.iter().enumerate() {
        let title = SystemTitle::from_octets(title).map_err(ServiceError::parse(format!("client_titles[{at}]")))?;
        if titles.contains(&title) {
            return Err(ServiceError::invalid(format!("client_titles[{at}]"), "it occurs twice"));
        }
        titles.push(title);
    }
    Ok(titles)
}

/// The reason of an act that needs one.
pub(crate) fn parse_reason(reason: String) -> Result<String, ServiceError> {
    if reason.trim().is_empty() || reason.len() > LONGEST_REASON {
        return Err(ServiceError::invalid("reason", "it is not 1 to 256 octets: the audit record must say why"));
    }
    Ok(reason)
}

/// The reason of an act that may have none.
pub(crate) fn parse_optional_reason(reason: String) -> Result<String, ServiceError> {
    if reason.len() > LONGEST_REASON || reason.chars().any(char::is_control) {
        return Err(ServiceError::invalid(
            "reason",
            format!("it is longer than {LONGEST_REASON} octets or has control characters"),
        ));
    }
    Ok(reason)
}

const LONGEST_REASON: usize = 256;
const MOST_CLIENT_TITLES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_fits_into_a_record() {
        assert!(parse_optional_reason("x".repeat(257)).is_err() && parse_optional_reason("a\tb".into()).is_err());
        assert!(parse_reason(" ".into()).is_err() && parse_reason("x".repeat(257)).is_err());
        assert!(parse_optional_reason(String::new()).is_ok() && parse_reason("stolen".into()).is_ok());
    }
}
