//! `kms group`; the rotation of a group's key and its members are in `group_rotation.rs`.

use kms_proto::v1 as proto;
use serde_json::json;

use super::{
    PAGE,
    group_rotation::{self, rotation_text},
    meter::setups_text,
    new_key::created,
    octets, request_id, text,
};
use crate::{
    arguments::{
        group::{GroupCommand, GroupKeyCommand},
        shared::Limit,
    },
    context::Context,
    failure::Failure,
    json,
    output::{Rows, facts},
    progress::waiting,
};

pub(crate) async fn run(command: GroupCommand, context: &Context) -> Result<(), Failure> {
    match command {
        GroupCommand::List { limit } => list_groups(&limit, context).await,
        GroupCommand::Show { group } => {
            let mut client = context.connect().await?.groups();
            let group =
                waiting("reading the group", client.show_group(proto::ShowGroupRequest { group })).await?.into_inner();
            let text = || {
                let heading = [
                    ("group", group.name.clone()),
                    ("number", group.number.to_string()),
                    ("security suite", group.security_suite.to_string()),
                    ("may switch at", format!("{} %", group.switch_threshold_percent)),
                    ("generation", group.generation.to_string()),
                ];
                let rotations: String =
                    group.rotations.iter().map(|rotation| format!("\n{}", rotation_text(rotation))).collect();
                format!("{}{}{rotations}", facts(heading), setups_text(&group.security_setups))
            };
            context.output.show(|| json::message("Group", &group), text);
            Ok(())
        }
        GroupCommand::Rotation { key, behind, limit } => group_rotation::show(&key, behind, &limit, context).await,
        GroupCommand::Switch { key, to, early, reason, sure } => {
            group_rotation::switch(&key, to, early, reason, &sure, context).await
        }
        GroupCommand::Set { group, switch_at } => group_rotation::set(group, switch_at, context).await,
        GroupCommand::AddMembers { members } => group_rotation::add_members(&members, context).await,
        GroupCommand::RemoveMembers { members, compromised, why, sure } => {
            group_rotation::remove_members(&members, compromised, why, &sure, context).await
        }
        GroupCommand::Key(GroupKeyCommand::Create { group, key, device_profile }) => {
            let request = proto::CreateGroupKeyRequest {
                request_id: request_id(),
                group: group.clone(),
                security_setup: octets(key.setup.obis()),
                key_type: key.key_type.clone(),
                device_profile: text(device_profile.as_ref()),
                held_by_meters: key.held_by_meters,
            };
            let mut client = context.connect().await?.groups();
            created(
                &group,
                &key,
                waiting("making the key", client.create_group_key(request)).await?.into_inner(),
                context,
            );
            Ok(())
        }
    }
}

async fn list_groups(limit: &Limit, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.groups();
    let (mut groups, mut page_token) = (Vec::new(), proto::ListGroupsRequest::default().page_token);
    loop {
        let wanted = if limit.limit == 0 { PAGE } else { PAGE.min(limit.limit - groups.len()) };
        let request = proto::ListGroupsRequest { page_size: u32::try_from(wanted).unwrap_or(u32::MAX), page_token };
        let page = waiting("reading groups", client.list_groups(request)).await?.into_inner();
        groups.extend(page.groups);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit.limit > 0 && groups.len() >= limit.limit) {
            break;
        }
    }
    context.output.show(
        || json!({"groups": groups.iter().map(|group| json::message("Group", group)).collect::<Vec<_>>(), "more": !page_token.is_empty()}),
        || {
            let mut rows = Rows::new(&["group", "number", "security suite"]).numbers(&[1, 2]);
            for group in &groups {
                rows.row([group.name.clone(), group.number.to_string(), group.security_suite.to_string()]);
            }
            let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
            format!("{}{more}", rows.text_or("no groups"))
        },
    );
    Ok(())
}
