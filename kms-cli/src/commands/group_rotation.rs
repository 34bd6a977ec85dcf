//! `kms group rotation`, `switch`, `set`, `add-members` and `remove-members`: a group's key and its
//! members.

use kms_proto::v1 as proto;
use serde_json::json;

use super::{PAGE, confirm, meter::report, octets, read_titles, request_id};
use crate::{
    arguments::{
        group::{GroupKeyName, Members},
        shared::{Limit, Reason, Sure},
    },
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts, number, plural},
    progress::waiting,
};

pub(crate) async fn show(key: &GroupKeyName, behind: bool, limit: &Limit, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.groups();
    let request = proto::ShowGroupRotationRequest {
        group: key.group.clone(),
        key_type: key.key_type.to_string(),
        security_setup: key.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
    };
    let rotation = waiting("counting the members", client.show_group_rotation(request)).await?.into_inner();
    if !behind {
        context.output.show(|| json::message("GroupRotation", &rotation), || rotation_text(&rotation));
        return Ok(());
    }
    let (mut members, mut page_token) = (Vec::new(), bytes::Bytes::new());
    loop {
        let wanted = if limit.limit == 0 { PAGE } else { PAGE.min(limit.limit - members.len()) };
        let request = proto::ListMembersBehindRequest {
            group: key.group.clone(),
            key_type: key.key_type.to_string(),
            security_setup: rotation.security_setup.clone(),
            page_size: u32::try_from(wanted).unwrap_or(u32::MAX),
            page_token,
        };
        let page = waiting("listing the members that are left behind", client.list_members_behind(request))
            .await?
            .into_inner();
        members.extend(page.members);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit.limit > 0 && members.len() >= limit.limit) {
            break;
        }
    }
    context.output.show(
        || {
            let members = members.iter().map(|member| json::message("MemberBehind", member)).collect::<Vec<_>>();
            json!({"rotation": json::message("GroupRotation", &rotation), "members": members, "more": !page_token.is_empty()})
        },
        || {
            let columns = ["meter", "manufacturer", "status", "head-end", "acknowledged", "delivered", "transfer under way"];
            let mut rows = Rows::new(&columns).numbers(&[4]);
            for member in &members {
                let acknowledged = if member.acknowledged_version == 0 { "-".to_owned() } else { member.acknowledged_version.to_string() };
                rows.row([
                    output::octets(&member.meter),
                    member.manufacturer.clone(),
                    member.status.clone(),
                    member.head_end.clone(),
                    acknowledged,
                    output::yes(member.delivered),
                    output::yes(member.transfer_under_way),
                ]);
            }
            let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
            format!("{}\n{}{more}", rotation_text(&rotation), rows.text_or("no member is left behind"))
        },
    );
    Ok(())
}

pub(crate) async fn switch(
    key: &GroupKeyName,
    to: u32,
    early: bool,
    reason: Option<String>,
    sure: &Sure,
    context: &Context,
) -> Result<(), Failure> {
    let mut client = context.connect().await?.groups();
    let security_setup = key.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default();
    let request = proto::ShowGroupRotationRequest {
        group: key.group.clone(),
        key_type: key.key_type.to_string(),
        security_setup,
    };
    let known = waiting("counting the members", client.show_group_rotation(request)).await?.into_inner();
    let counts = format!("{} of {} have it", number(known.acknowledged), plural(known.members, "member"));
    confirm(&format!("broadcasts to `{}` will use {} version {to}; {counts}", key.group, key.key_type), sure)?;
    let request = proto::SwitchGroupKeyRequest {
        request_id: request_id(),
        group: key.group.clone(),
        key_type: key.key_type.to_string(),
        security_setup: known.security_setup,
        version: to,
        early,
        reason: reason.unwrap_or_default(),
    };
    let switched = waiting("switching", client.switch_group_key(request)).await?.into_inner();
    context.output.show(|| json::message("GroupRotation", &switched), || rotation_text(&switched));
    Ok(())
}

pub(crate) async fn set(group: String, percent: u32, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.groups();
    let request = proto::SetSwitchThresholdRequest { request_id: request_id(), group, percent };
    let group = waiting("changing the group", client.set_switch_threshold(request)).await?.into_inner();
    let text = || {
        format!(
            "broadcasts to `{}` may switch to a new key when {} % of its members have it\n",
            group.name, group.switch_threshold_percent
        )
    };
    context.output.show(|| json::message("Group", &group), text);
    Ok(())
}

pub(crate) async fn add_members(members: &Members, context: &Context) -> Result<(), Failure> {
    change(members, proto::MembershipChange::Add, String::new(), "added to the group", context).await
}

pub(crate) async fn remove_members(
    members: &Members,
    compromised: bool,
    why: Reason,
    sure: &Sure,
    context: &Context,
) -> Result<(), Failure> {
    let change_to =
        if compromised { proto::MembershipChange::RemoveCompromised } else { proto::MembershipChange::Remove };
    confirm(
        &format!("meters will leave `{}`, and its keys count as exposed until they are rotated", members.group),
        sure,
    )?;
    change(members, change_to, why.reason, "removed from the group", context).await
}

async fn change(
    members: &Members,
    change: proto::MembershipChange,
    reason: String,
    done: &str,
    context: &Context,
) -> Result<(), Failure> {
    let mut meters: Vec<_> = members.meters.iter().map(|meter| octets(meter.octets())).collect();
    if let Some(path) = &members.meters_file {
        meters.extend(read_titles(path)?);
    }
    let mut client = context.connect().await?.groups();
    let mut answer = proto::ChangeMetersResponse::default();
    for chunk in meters.chunks(MOST_METERS) {
        let request = proto::ChangeGroupMembersRequest {
            request_id: request_id(),
            group: members.group.clone(),
            meters: chunk.to_vec(),
            change: change.into(),
            reason: reason.clone(),
        };
        let part = waiting("changing the group", client.change_group_members(request)).await?.into_inner();
        answer.changed += part.changed;
        answer.unchanged += part.unchanged;
        answer.problems.extend(part.problems);
    }
    report(answer, done, context)
}

/// The rotation of a group's key: how many members have it.
pub(crate) fn rotation_text(rotation: &proto::GroupRotation) -> String {
    let version = |number: u32| if number == 0 { String::new() } else { format!("version {number}") };
    let share = |count: u64| {
        let percent = if rotation.members == 0 { 0 } else { u128::from(count) * 100 / u128::from(rotation.members) };
        format!("{:>width$}  {percent:>3} %", number(count), width = number(rotation.members).len())
    };
    let rolled_out = rotation.version > 0;
    let behind = rotation.members.saturating_sub(rotation.acknowledged).saturating_sub(rotation.unacknowledged);
    let only = |text: String| if rolled_out { text } else { String::new() };
    facts([
        ("group", rotation.group.clone()),
        ("key", format!("{} in security setup {}", rotation.key_type, output::obis(&rotation.security_setup))),
        ("broadcasts use", version(rotation.active_version)),
        ("members have or get", version(rotation.version)),
        ("stage", stage_text(rotation).to_owned()),
        ("still issued", version(rotation.former_version)),
        ("members", if rolled_out { share(rotation.members) } else { number(rotation.members) }),
        ("acknowledged", only(format!("{}  {}", share(rotation.acknowledged), bar(rotation)))),
        ("left, unacknowledged", only(share(rotation.unacknowledged))),
        ("not begun", only(share(behind))),
        ("may switch at", format!("{} %", rotation.threshold_percent)),
        ("campaign", if rotation.campaign_id.is_empty() { String::new() } else { output::uuid(&rotation.campaign_id) }),
        ("begun", output::time(rotation.begun_ms)),
        ("threshold reached", output::time(rotation.threshold_reached_ms)),
        ("switched", output::time(rotation.switched_ms)),
        ("complete", output::time(rotation.complete_ms)),
        (
            "rotate it",
            if rotation.wanted_because.is_empty() { String::new() } else { rotation.wanted_because.join(", ") },
        ),
    ])
}

fn stage_text(rotation: &proto::GroupRotation) -> &'static str {
    // Servers update the count once a minute. A switch counts anew.
    let enough = u128::from(rotation.acknowledged) * 100
        >= u128::from(rotation.members) * u128::from(rotation.threshold_percent);
    match rotation.stage.as_str() {
        "rolling-out" if enough && rotation.members > 0 => "may switch: enough members have it",
        "rolling-out" => "rolling out: too few members have it to switch",
        "may-switch" => "may switch: enough members have it",
        "switched" => "switched: the former version is for members that are left behind",
        "complete" => "complete: every member has it",
        _ => "not rolled out: members were set up with it",
    }
}

/// The share of members that have the version, with a mark where broadcasts may switch.
fn bar(rotation: &proto::GroupRotation) -> String {
    let filled = if rotation.members == 0 {
        0
    } else {
        u128::from(rotation.acknowledged) * WIDTH / u128::from(rotation.members)
    };
    let mark = u128::from(rotation.threshold_percent) * WIDTH / 100;
    let cell = |at: u128| match (at < filled, at + 1 == mark) {
        (_, true) if mark > filled => '|',
        (true, _) => '#',
        (false, _) => '.',
    };
    format!("[{}]", (0..WIDTH).map(cell).collect::<String>())
}
/// Meters of a call.
const MOST_METERS: usize = 10_000;
/// Characters of a bar.
const WIDTH: u128 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_how_far_it_is_to_the_threshold() {
        let rotation = |members, acknowledged| proto::GroupRotation {
            members,
            acknowledged,
            threshold_percent: 95,
            version: 2,
            ..Default::default()
        };
        assert_eq!(bar(&rotation(4, 1)), format!("[{}{}|..]", "#".repeat(10), ".".repeat(27)));
        assert_eq!(bar(&rotation(4, 4)), format!("[{}]", "#".repeat(40)));
        assert_eq!(bar(&rotation(0, 0)), format!("[{}|..]", ".".repeat(37)));
        let text = rotation_text(&rotation(1_000, 12));
        assert!(text.contains("acknowledged") && text.contains("12    1 %"), "{text}");
    }
}
