//! `kms audit`.

use kms_proto::v1::{self as proto, audit_record::Event};
use serde_json::json;

use super::{PAGE, octets, text};
use crate::{
    arguments::audit::{AuditCommand, ListAudit},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, number, plural},
    progress,
};

pub(crate) async fn run(command: AuditCommand, context: &Context) -> Result<(), Failure> {
    match command {
        AuditCommand::List(arguments) => list(arguments, context).await,
        AuditCommand::Scrub => scrub(context).await,
    }
}

async fn list(arguments: ListAudit, context: &Context) -> Result<(), Failure> {
    if let (Some(from), Some(to)) = (arguments.from, arguments.to)
        && from >= to
    {
        return Err(Failure::usage("--from must lie before --to"));
    }
    let mut client = context.connect().await?.audit();
    let (mut records, mut page_token, limit) =
        (Vec::new(), proto::ListAuditRecordsRequest::default().page_token, arguments.limit.limit);
    loop {
        let wanted = if limit == 0 { PAGE } else { PAGE.min(limit - records.len()) };
        let request = proto::ListAuditRecordsRequest {
            principal: text(arguments.principal.as_ref()),
            meter: arguments.meter.map(|meter| octets(meter.octets())).unwrap_or_default(),
            from_ms: arguments.from.map_or(0, jiff::Timestamp::as_millisecond),
            to_ms: arguments.to.map_or(0, jiff::Timestamp::as_millisecond),
            page_size: wanted as u32,
            page_token,
            newest_first: !arguments.oldest_first,
        };
        let page = progress::waiting("reading audit records", client.list_audit_records(request)).await?.into_inner();
        records.extend(page.records);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit > 0 && records.len() >= limit) {
            break;
        }
    }
    context.output.show(
        || json!({"records": records.iter().map(|record| json::message("AuditRecord", record)).collect::<Vec<_>>(), "more": !page_token.is_empty()}),
        || {
            let mut rows = Rows::new(&["time", "principal", "event", "what"]).sentences(&[3]);
            for record in &records {
                let (event, what) = summary(record);
                let principal = if record.principal.is_empty() { "the server".into() } else { record.principal.clone() };
                rows.row([output::exact_time(record.time_ms), principal, event.into(), what]);
            }
            let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
            format!("{}{more}", rows.text_or("no records"))
        },
    );
    Ok(())
}

/// The name of an event, and a summary of it.
fn summary(record: &proto::AuditRecord) -> (&'static str, String) {
    let Some(event) = &record.event else { return ("unknown", "a newer client may know it".into()) };
    match event {
        Event::WriterOpened(event) => {
            let closed = if event.closed.is_empty() {
                String::new()
            } else {
                format!(", {} closed", plural(event.closed.len() as u64, "earlier chain"))
            };
            ("server started", format!("{} {}{closed}", event.server, event.version))
        }
        Event::KeysGranted(event) => {
            let dedicated = if event.dedicated_key { " and a dedicated key" } else { "" };
            let named = |one: &proto::GrantedMeter| {
                if one.group > 0 { format!("group {}", one.group) } else { format!("{:016X}", one.meter) }
            };
            let (whom, counters) = match event.meters.as_slice() {
                [one] if one.lease_count > 0 => {
                    let last = u64::from(one.lease_first) + u64::from(one.lease_count) - 1;
                    (
                        named(one),
                        format!(", counters {} to {last} of {}", one.lease_first, output::octets(&event.client_title)),
                    )
                }
                [one] => (named(one), String::new()),
                many => (plural(many.len() as u64, "meter"), String::new()),
            };
            let purpose = output::purpose(event.purpose());
            let what = format!(
                "{}{dedicated} of {whom} to {purpose}{counters}, until {}, grant {}",
                event.key_types.join(", "),
                output::time(event.not_after_ms),
                output::uuid(&event.grant_id)
            );
            ("keys granted", what)
        }
        Event::Refused(event) => (
            "refused",
            format!(
                "{}: {} ({})",
                event.action,
                event.reason,
                if event.count == 1 { "once".into() } else { format!("{} times", number(event.count)) }
            ),
        ),
        Event::ShipmentImported(event) if !event.refusal.is_empty() => {
            ("shipment refused", format!("{} of {}: {}", event.batch, event.manufacturer, event.refusal))
        }
        Event::ShipmentImported(event) => (
            "shipment imported",
            format!(
                "{}, lines {} to {}: {} imported, {} refused",
                event.batch,
                number(event.first_line),
                number(event.last_line),
                number(event.imported),
                number(event.refused)
            ),
        ),
        Event::MetersChanged(event) => {
            let whom = match event.meters.as_slice() {
                [one] => output::octets(one),
                many => plural(many.len() as u64, "meter"),
            };
            (
                "meters changed",
                [whom, event.change.clone(), event.value.clone(), event.reason.clone()]
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .collect::<Vec<_>>()
                    .join(", "),
            )
        }
        Event::PrincipalChanged(event) => (
            "principal changed",
            [event.principal.clone(), event.change.clone(), event.reason.clone()]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join(", "),
        ),
        Event::GrantRevoked(event) => ("grant revoked", format!("{}: {}", output::uuid(&event.grant_id), event.reason)),
        Event::FramesProtected(event) => {
            let whom = match event.frames.as_slice() {
                [one] => format!("{} for {:016X}", one.service, one.meter),
                many => plural(many.len() as u64, "frame"),
            };
            ("frames protected", whom)
        }
        Event::KeysDestroyed(event) => {
            let versions = event.keys.iter().map(|keys| keys.versions.len() as u64).sum();
            let whom = match event.keys.as_slice() {
                [first, rest @ ..] if rest.iter().all(|keys| keys.owner == first.owner) => output::octets(&first.owner),
                many => {
                    let mut owners: Vec<_> = many.iter().map(|keys| (keys.kind, &keys.owner)).collect();
                    owners.dedup();
                    plural(owners.len() as u64, "owner")
                }
            };
            (
                "keys destroyed",
                format!(
                    "{} of {whom}, kept for {}",
                    plural(versions, "key version"),
                    plural(event.retention_days.into(), "day")
                ),
            )
        }
        Event::KeyCreated(event) => (
            "key created",
            format!(
                "{} version {} of {}: {}, {}",
                event.key_type, event.version, event.owner_name, event.state, event.origin
            ),
        ),
        Event::GroupKeyChanged(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
            let what = match event.change.as_str() {
                "threshold-set" => format!(
                    "{}: broadcasts may switch at {} % of the members",
                    event.group_name, event.threshold_percent
                ),
                change => {
                    let counted = if event.members == 0 {
                        String::new()
                    } else {
                        format!(", {} of {} members", number(event.acknowledged), number(event.members))
                    };
                    format!("{}: {} version {} {change}{counted}", event.group_name, event.key_type, event.version)
                }
            };
            ("group key", format!("{what}{reason}"))
        }
        Event::DeviceTypeAdded(event) => (
            "device type added",
            format!(
                "{}, number {}, of {}, with {}",
                event.name, event.number, event.manufacturer, event.device_profile
            ),
        ),
        Event::TransfersAdvanced(event) => match event.advances.as_slice() {
            [one] => {
                let key = if one.key_type.is_empty() {
                    String::new()
                } else {
                    format!(", {} {}", one.key_type, one.key_version)
                };
                ("transfer", format!("{:016X}: {}{key}", one.meter, one.event))
            }
            many => ("transfers", plural(many.len() as u64, "step")),
        },
        Event::ClockJumped(event) => (
            "security event",
            format!(
                "clock-jumped: the clock says {}, and should say {} by {}",
                output::time(event.observed_ms),
                output::time(event.expected_ms),
                match event.compared_with.as_str() {
                    "process" => "the time that has passed",
                    "log" => "the newest record of the log",
                    "database" => "the database's clock",
                    other => other,
                }
            ),
        ),
        Event::SecurityEvent(event) => ("security event", format!("{}: {}", event.kind, event.detail)),
        Event::ProposalMade(event) => {
            ("proposal made", format!("{}: {} ({})", output::uuid(&event.proposal_id), event.action, event.reason))
        }
        Event::ProposalApproved(event) => {
            let rest = if event.complete { ", all approvals are there" } else { "" };
            ("proposal approved", format!("{} by {}{rest}", output::uuid(&event.proposal_id), event.person))
        }
        Event::ProposalEnded(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(" ({})", event.reason) };
            (
                "proposal ended",
                format!("{} {}{reason}: {}", output::uuid(&event.proposal_id), event.change, event.action),
            )
        }
        Event::WorkOrderCreated(event) => {
            ("work order made", format!("{}: {}", event.work_order_id, ordered(event.work.as_ref())))
        }
        Event::WorkOrderChanged(event) => (
            "work order changed",
            format!("{} revision {}: {}", event.work_order_id, event.revision, ordered(event.work.as_ref())),
        ),
        Event::WorkOrderEnded(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
            ("work order ended", format!("{} {}{reason}", event.work_order_id, event.change))
        }
        Event::PlacesRemoved(event) => (
            "places removed",
            format!(
                "of {} that ended {} ago",
                plural(event.work_order_ids.len() as u64, "work order"),
                plural(event.days.into(), "day")
            ),
        ),
        Event::ExposureIndexCompleted(event) => {
            ("exposures indexed", format!("for the first time: {} written", plural(event.rows_written, "row")))
        }
        Event::CounterRaised(event) => (
            "counter raised",
            format!(
                "{:016X}: {} under {} {}, from {} to {}, proposal {}",
                event.meter,
                output::octets(&event.client_title),
                event.key_type,
                event.key_version,
                number(event.from),
                number(event.to),
                output::uuid(&event.proposal_id)
            ),
        ),
        Event::CampaignCreated(event) => (
            "campaign made",
            format!(
                "{} ({}): {} for {}",
                event.name,
                output::uuid(&event.campaign_id),
                event.action,
                plural(event.meters, "meter")
            ),
        ),
        Event::CampaignApproved(event) => {
            let rest = if event.complete { ", all approvals are there" } else { "" };
            ("campaign approved", format!("{} by {}{rest}", output::uuid(&event.campaign_id), event.person))
        }
        Event::CampaignChanged(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
            ("campaign changed", format!("{} {}{reason}", output::uuid(&event.campaign_id), event.change))
        }
        Event::WaveChanged(event) if event.change == "ended" => (
            "wave ended",
            format!(
                "{} wave {}: {} succeeded, {} failed, {} in doubt, {} skipped",
                output::uuid(&event.campaign_id),
                event.wave,
                number(event.succeeded),
                number(event.failed),
                number(event.in_doubt),
                number(event.skipped)
            ),
        ),
        Event::WaveChanged(event) => (
            "wave planned",
            format!("{} wave {}: {}", output::uuid(&event.campaign_id), event.wave, plural(event.tasks, "task")),
        ),
        Event::TasksChanged(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
            (
                "tasks",
                format!(
                    "{} of {} {}{reason}",
                    plural(event.meters.len() as u64, "task"),
                    output::uuid(&event.campaign_id),
                    event.change
                ),
            )
        }
        Event::RootVersionBegun(event) => ("root about to be made", format!("{}/{}", event.root, event.version)),
        Event::RootVersionMade(event) => (
            "root made",
            format!("{}/{}, fingerprint {}", event.root, event.version, output::octets(&event.fingerprint)),
        ),
        Event::RootRotationChanged(event) => {
            let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
            ("root rotation", format!("{}/{} {}{reason}", event.root, event.version, event.change))
        }
        Event::RootRowsAdvanced(event) => (
            "root rotation",
            format!(
                "{}/{} round {}: {} written, {} wrapped again, {} left",
                event.root,
                event.version,
                event.round,
                plural(event.changed, "row"),
                plural(event.keys, "key"),
                number(event.refused)
            ),
        ),
        Event::AuditKeyChanged(event) => (
            "audit key",
            format!("continues with version {}, {} closed", event.version, plural(event.closed.len() as u64, "chain")),
        ),
        Event::RootDestroyed(event) => {
            ("root destruction", format!("{}/{} {}", event.root, event.version, event.change))
        }
        Event::HandheldInvited(event) => (
            "handheld invited",
            format!("{} for {}, until {}", event.handheld, event.technician, output::time(event.expires_ms)),
        ),
        Event::InvitationWithdrawn(event) => ("invitation withdrawn", format!("{}: {}", event.handheld, event.reason)),
        Event::WrongEnrolmentCode(event) => {
            let ended = if event.ended { ", which ended the invitation" } else { "" };
            ("wrong enrolment code", format!("{}: wrong code number {}{ended}", event.handheld, event.wrong_codes))
        }
        Event::HandheldEnrolled(event) => (
            "handheld enrolled",
            format!(
                "{} for {}, {}, invited by {}",
                event.handheld, event.technician, event.assurance, event.invited_by
            ),
        ),
        Event::HandheldHandedOver(event) => {
            let from = if event.from.is_empty() { String::new() } else { format!(" from {}", event.from) };
            (
                "handheld handed over",
                format!(
                    "{}{from} to {}, {} ended",
                    event.handheld,
                    event.to,
                    plural(event.ended.len() as u64, "certificate")
                ),
            )
        }
        Event::CeremonyHeld(event) => (
            "ceremony",
            format!(
                "{} made{}",
                plural(event.fingerprints.len() as u64, "public key"),
                if event.development { ", for development" } else { "" }
            ),
        ),
    }
}

async fn scrub(context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.audit();
    let bar = progress::spinner("scrubbing");
    let mut stream = client.scrub(proto::ScrubRequest {}).await?.into_inner();
    let mut all = proto::ScrubResponse::default();
    while let Some(step) = stream.message().await? {
        bar.set_message(format!(
            "{} and {} read, {}",
            plural(step.records_read, "record"),
            plural(step.rows_read, "row"),
            plural((all.findings.len() + step.findings.len()) as u64, "finding")
        ));
        all.records_read = step.records_read;
        all.rows_read = step.rows_read;
        all.finished = step.finished;
        all.findings.extend(step.findings);
    }
    bar.finish_and_clear();
    context.output.show(
        || json::message("ScrubResponse", &all),
        || {
            let mut rows = Rows::new(&["row", "id", "finding", "detail"]).sentences(&[3]);
            for finding in &all.findings {
                rows.row([
                    row_kind(finding.kind),
                    output::octets(&finding.id),
                    finding.finding.clone(),
                    finding.detail.clone(),
                ]);
            }
            format!(
                "{} and {} read\n\n{}",
                plural(all.records_read, "record"),
                plural(all.rows_read, "row"),
                rows.text_or("nothing found")
            )
        },
    );
    match all.findings.len() as u64 {
        _ if !all.finished => Err(Failure::failed("the scrub ended before it had read everything: run it again")),
        0 => Ok(()),
        findings => Err(Failure::failed(format!(
            "{}: somebody may have written the database without the server",
            plural(findings, "finding")
        ))),
    }
}

/// What a work order says, in a few words.
fn ordered(work: Option<&proto::OrderedWork>) -> String {
    let Some(work) = work else { return String::new() };
    format!(
        "{} at {} for {}, {} to {}",
        work.tasks.join(", "),
        plural(work.meters.len() as u64, "meter"),
        work.technician,
        output::time(work.from_ms),
        output::time(work.until_ms)
    )
}

fn row_kind(kind: u32) -> String {
    match kind {
        1 => "meter".into(),
        2 => "group".into(),
        3 => "device type".into(),
        4 => "principal".into(),
        5 => "counter domain".into(),
        6 => "island".into(),
        7 => "quota use".into(),
        8 => "campaign".into(),
        9 => "root rotation".into(),
        12 => "proposal".into(),
        13 => "invitation".into(),
        14 => "work order".into(),
        0 => "log".into(),
        other => other.to_string(),
    }
}
