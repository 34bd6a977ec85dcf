//! The answer to `key create`, of a group or a device type.

use kms_proto::v1 as proto;

use crate::{arguments::shared::NewKey, context::Context, json};

/// Shows the new key of `owner`.
pub(super) fn created(owner: &str, key: &NewKey, response: proto::CreateKeyResponse, context: &Context) {
    context.output.show(
        || json::message("CreateKeyResponse", &response),
        || {
            let version = response.version.clone().unwrap_or_default();
            let note = if key.held_by_meters {
                ""
            } else {
                "It is granted to nobody until the meters hold it: a rotation delivers it to them.\n"
            };
            format!(
                "{} version {} of {owner}: {}, {}\n{note}",
                key.key_type, version.number, version.state, version.origin
            )
        },
    );
}
