//! `kms meter`.

use kms_client::{PrincipalId, SecuritySetupId, SystemTitle};
use kms_proto::v1 as proto;
use serde::Deserialize;
use serde_json::json;

use super::{PAGE, confirm, octets, read_lines, request_id, text};
use crate::{
    arguments::{
        meter::{AdoptCounters, AssignMeters, EnrolMeters, MeterCommand, MeterFilter},
        shared::Limit,
    },
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts, number, plural},
    progress::waiting,
};

pub(crate) async fn run(command: MeterCommand, context: &Context) -> Result<(), Failure> {
    match command {
        MeterCommand::List { filter, limit } => list(&filter, &limit, context).await,
        MeterCommand::Show { meter } => show(meter, context).await,
        MeterCommand::Assign(arguments) => assign(arguments, context).await,
        MeterCommand::Adopt(arguments) => adopt(arguments, context).await,
        MeterCommand::RaiseCounter(arguments) => {
            let request = proto::ProposeCounterRaiseRequest {
                request_id: request_id(),
                meter: octets(arguments.meter.octets()),
                security_setup: arguments.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
                key_type: arguments.key_type.to_string(),
                key_version: arguments.key_version.unwrap_or_default(),
                client_title: octets(arguments.client_title.octets()),
                to: arguments.to,
                reason: arguments.why.reason,
                quorum: Some(arguments.quorum.number().into()),
            };
            let mut client = context.connect().await?.meters();
            super::proposal::show_made(
                &waiting("proposing", client.propose_counter_raise(request)).await?.into_inner(),
                context,
            );
            Ok(())
        }
        MeterCommand::Compromise(arguments) => {
            let what = format!(
                "{} version {} of {} is never granted again",
                arguments.key_type, arguments.key_version, arguments.meter
            );
            confirm(&what, &arguments.sure)?;
            let request = proto::ReportCompromiseRequest {
                request_id: request_id(),
                meter: octets(arguments.meter.octets()),
                security_setup: arguments.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
                key_type: arguments.key_type.to_string(),
                key_version: arguments.key_version,
                known_to: arguments.known_to,
                reason: arguments.why.reason,
            };
            let mut client = context.connect().await?.meters();
            let meter = waiting("reporting", client.report_compromise(request)).await?.into_inner();
            context.output.show(|| json::message("Meter", &meter), || meter_text(&meter));
            Ok(())
        }
        MeterCommand::Enrol(arguments) => enrol(arguments, context).await,
        MeterCommand::Retire { meters, why, sure } => {
            confirm(
                &format!(
                    "{} will be retired for good: their keys are not granted any more",
                    plural(meters.len() as u64, "meter")
                ),
                &sure,
            )?;
            let request =
                proto::RetireMetersRequest { request_id: request_id(), meters: titles(&meters), reason: why.reason };
            let mut client = context.connect().await?.meters();
            report(waiting("retiring", client.retire_meters(request)).await?.into_inner(), "retired", context)
        }
        MeterCommand::Replace { old_meter, new_meter, why, sure } => {
            confirm(&format!("{old_meter} will be retired and replaced by {new_meter}"), &sure)?;
            let request = proto::ReplaceMeterRequest {
                request_id: request_id(),
                old_meter: octets(old_meter.octets()),
                new_meter: octets(new_meter.octets()),
                reason: why.reason,
            };
            let mut client = context.connect().await?.meters();
            report(waiting("replacing", client.replace_meter(request)).await?.into_inner(), "replaced", context)
        }
    }
}

async fn list(filter: &MeterFilter, limit: &Limit, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.meters();
    let (mut meters, mut total, mut page_token) = (Vec::new(), 0, proto::ListMetersRequest::default().page_token);
    loop {
        let wanted = if limit.limit == 0 { PAGE } else { PAGE.min(limit.limit - meters.len()) };
        let request =
            proto::ListMetersRequest { filter: Some(filter_message(filter)), page_size: wanted as u32, page_token };
        let page = waiting("reading meters", client.list_meters(request)).await?.into_inner();
        total = page.total.max(total);
        meters.extend(page.meters);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit.limit > 0 && meters.len() >= limit.limit) {
            break;
        }
    }
    context.output.show(
        || json!({"total": total, "meters": meters.iter().map(|meter| json::message("MeterSummary", meter)).collect::<Vec<_>>()}),
        || {
            let mut rows = Rows::new(&["meter", "manufacturer", "serial", "device profile", "status", "head-end", "batch", "asks for"]);
            for meter in &meters {
                rows.row([
                    output::octets(&meter.meter),
                    meter.manufacturer.clone(),
                    meter.serial.clone(),
                    meter.device_profile.clone(),
                    meter.status.clone(),
                    meter.head_end.clone(),
                    meter.batch.clone(),
                    match (meter.compromised, meter.rotation_due) {
                        (true, _) => "rotation: a key is compromised".to_owned(),
                        (false, true) => "rotation".to_owned(),
                        (false, false) => String::new(),
                    },
                ]);
            }
            let more = if (meters.len() as u64) < total { " (--limit shows more)" } else { "" };
            let count = if meters.is_empty() { String::new() } else { format!("\n{} of {}{more}\n", number(meters.len() as u64), plural(total, "meter")) };
            format!("{}{count}", rows.text_or("no meters"))
        },
    );
    Ok(())
}

async fn show(meter: SystemTitle, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.meters();
    let request = proto::ShowMeterRequest { meter: octets(meter.octets()) };
    let meter = waiting("reading the meter", client.show_meter(request)).await?.into_inner();
    context.output.show(|| json::message("Meter", &meter), || meter_text(&meter));
    Ok(())
}

fn meter_text(meter: &proto::Meter) -> String {
    let summary = meter.summary.clone().unwrap_or_default();
    let mut result = facts([
        ("meter", output::octets(&summary.meter)),
        ("manufacturer", summary.manufacturer),
        ("serial", summary.serial),
        ("device profile", summary.device_profile),
        ("security suite", meter.security_suite.to_string()),
        ("status", summary.status),
        ("head-end", summary.head_end),
        ("groups", meter.groups.join(", ")),
        ("batch", summary.batch),
        ("generation", meter.generation.to_string()),
    ]);
    if let Some(transfer) = &meter.transfer {
        result.push_str("\ntransfer under way\n\n");
        result.push_str(&transfer_text(transfer));
    }
    result.push_str(&setups_text(&meter.security_setups));
    if !meter.shared_keys.is_empty() {
        let mut keys = Rows::new(&["key of group", "security setup", "key", "version", "acknowledged"]).numbers(&[3]);
        for key in &meter.shared_keys {
            let acknowledged = output::yes(key.acknowledged);
            keys.row([
                key.group.clone(),
                output::obis(&key.security_setup),
                key.key_type.clone(),
                key.version.to_string(),
                acknowledged,
            ]);
        }
        result.push_str(&format!("\nkeys of groups that left for the meter\n\n{}", keys.text_or("")));
    }
    result
}

fn transfer_text(transfer: &proto::MeterTransfer) -> String {
    let keys = transfer.keys.iter().map(|key| {
        format!("{} version {}, {}", key.key_type, key.version, if key.left { "has left" } else { "not yet sent" })
    });
    let campaign = if transfer.campaign_id.is_empty() { String::new() } else { output::uuid(&transfer.campaign_id) };
    facts([
        ("transfer", output::uuid(&transfer.transfer_id)),
        (
            "brings",
            if transfer.keys.is_empty() { "nothing: a probe".to_owned() } else { keys.collect::<Vec<_>>().join("; ") },
        ),
        ("security setup", output::obis(&transfer.security_setup)),
        ("head-end", transfer.head_end.clone()),
        ("client title", output::octets(&transfer.client_title)),
        ("campaign", campaign),
        ("step", format!("{}: {}", transfer.step, transfer.stage)),
        ("given up after", output::time(transfer.not_after_ms)),
    ])
}

/// Keys and counters of each security setup.
pub(crate) fn setups_text(setups: &[proto::SecuritySetup]) -> String {
    let mut result = String::new();
    for setup in setups {
        result.push_str(&format!("\nsecurity setup {}\n\n", output::obis(&setup.obis)));
        let mut keys = Rows::new(&["key", "version", "state", "origin", "candidate", "duplicate", "who could know it"])
            .numbers(&[1])
            .sentences(&[6]);
        for (slot, version) in
            setup.slots.iter().flat_map(|slot| slot.versions.iter().map(move |version| (slot, version)))
        {
            let exposures = version.exposures.iter().map(|exposure| {
                format!("{} since {}: {}", exposure.party, output::time(exposure.since_ms), exposure.reason)
            });
            keys.row([
                slot.key_type.clone(),
                version.number.to_string(),
                version.state.clone(),
                version.origin.clone(),
                output::yes(version.candidate),
                output::yes(version.duplicate),
                exposures.collect::<Vec<_>>().join("\n"),
            ]);
        }
        result.push_str(&keys.text_or("no keys"));
        for slot in setup.slots.iter().filter(|slot| slot.in_doubt) {
            let candidates: Vec<_> = slot
                .versions
                .iter()
                .filter(|version| version.candidate)
                .map(|version| version.number.to_string())
                .collect();
            result.push_str(&format!(
                "\nin doubt: the meter holds {} version {}; a probe shows which\n",
                slot.key_type,
                candidates.join(" or ")
            ));
        }
        for slot in setup.slots.iter().filter(|slot| slot.compromised) {
            result.push_str(&format!(
                "\ncompromised, rotation needed: nothing of the {} is granted until a new version is proven (`kms campaign create NAME --rotate {} --exposed-by reported`)\n",
                slot.key_type, slot.key_type
            ));
        }
        let mut counters =
            Rows::new(&["client title", "key version", "reserved below", "counted by", "asks for"]).numbers(&[1, 2]);
        for counter in &setup.counters {
            let owner = if counter.owned_by.is_empty() { "this system".into() } else { counter.owned_by.clone() };
            let percent = (u128::from(counter.reserved_below) * 100) >> 32;
            let asks = if counter.rotation_due { format!("rotation: {percent} % are used") } else { String::new() };
            counters.row([
                output::octets(&counter.client_title),
                counter.key_version.to_string(),
                counter.reserved_below.to_string(),
                owner,
                asks,
            ]);
        }
        result.push('\n');
        result.push_str(&counters.text_or("no counters yet"));
    }
    result
}

async fn assign(arguments: AssignMeters, context: &Context) -> Result<(), Failure> {
    let by_filter = arguments.filter != MeterFilter::default();
    if by_filter != arguments.meters.is_empty() {
        return Err(Failure::usage(
            "no meters, or two selections: give either METER… or a filter such as --batch, not both",
        ));
    }
    let request = |dry_run| proto::AssignMetersRequest {
        request_id: request_id(),
        meters: titles(&arguments.meters),
        filter: by_filter.then(|| filter_message(&arguments.filter)),
        head_end: text(arguments.head_end.as_ref()),
        dry_run,
    };
    let mut client = context.connect().await?.meters();
    if arguments.dry_run || (by_filter && !arguments.sure.yes) {
        let answer = waiting("counting", client.assign_meters(request(true))).await?.into_inner();
        if !arguments.dry_run {
            let whom = arguments.head_end.as_ref().map_or_else(|| "nobody".into(), PrincipalId::to_string);
            confirm(&format!("{} would be assigned to {whom}", plural(answer.changed, "meter")), &arguments.sure)?;
        } else {
            return report(answer, "would be assigned", context);
        }
    }
    report(waiting("assigning", client.assign_meters(request(false))).await?.into_inner(), "assigned", context)
}

async fn adopt(arguments: AdoptCounters, context: &Context) -> Result<(), Failure> {
    let floors = match (&arguments.file, arguments.meter, arguments.client_title, arguments.floor) {
        (Some(file), ..) => read_lines::<FloorLine>(file)?
            .iter()
            .enumerate()
            .map(|(index, line)| line.message().map_err(|failure| failure.while_doing(&format!("line {}", index + 1))))
            .collect::<Result<_, _>>()?,
        (None, Some(meter), Some(client_title), Some(floor)) => vec![proto::CounterFloor {
            meter: octets(meter.octets()),
            security_setup: octets(arguments.security_setup.obis()),
            client_title: octets(client_title.octets()),
            floor,
            owned_by: text(arguments.owned_by.as_ref()),
        }],
        _ => return Err(Failure::usage("METER, --client-title and --floor belong together; or give --file")),
    };
    let request = proto::AdoptCountersRequest { request_id: request_id(), floors };
    let mut client = context.connect().await?.meters();
    report(waiting("adopting counters", client.adopt_counters(request)).await?.into_inner(), "adopted", context)
}

async fn enrol(arguments: EnrolMeters, context: &Context) -> Result<(), Failure> {
    let meters = match &arguments.file {
        Some(file) => read_lines::<MeterLine>(file)?
            .into_iter()
            .enumerate()
            .map(|(index, line)| {
                let title = SystemTitle::parse(&line.meter)
                    .map_err(|error| Failure::from(error).while_doing(&format!("line {}, meter", index + 1)))?;
                let mut groups = arguments.groups.clone();
                groups.extend(line.groups);
                Ok(proto::NewMeter { meter: octets(title.octets()), serial: line.serial, groups })
            })
            .collect::<Result<_, Failure>>()?,
        None => {
            let (Some(meter), Some(serial)) = (arguments.meter, arguments.serial) else {
                return Err(Failure::usage("METER and --serial belong together; or give --file"));
            };
            vec![proto::NewMeter { meter: octets(meter.octets()), serial, groups: arguments.groups }]
        }
    };
    let request = proto::EnrolMetersRequest {
        request_id: request_id(),
        manufacturer: arguments.manufacturer.to_string(),
        device_profile: arguments.device_profile.to_string(),
        batch: arguments.batch,
        meters,
    };
    let mut client = context.connect().await?.meters();
    report(waiting("enrolling", client.enrol_meters(request)).await?.into_inner(), "enrolled", context)
}

/// Shows the result of a change. Exit code 5: a part was refused. Exit code 1: all of it was
/// refused.
pub(crate) fn report(answer: proto::ChangeMetersResponse, done: &str, context: &Context) -> Result<(), Failure> {
    context.output.show(
        || json::message("ChangeMetersResponse", &answer),
        || {
            let mut text = format!("{} {done}", plural(answer.changed, "meter"));
            if answer.unchanged > 0 {
                text.push_str(&format!(", {} already as requested", number(answer.unchanged)));
            }
            text.push('\n');
            if !answer.problems.is_empty() {
                let mut rows = Rows::new(&["meter", "refused because"]).sentences(&[1]);
                for problem in &answer.problems {
                    rows.row([output::octets(&problem.meter), problem.reason.clone()]);
                }
                text.push('\n');
                text.push_str(&rows.text_or(""));
            }
            text
        },
    );
    match answer.problems.len() as u64 {
        0 => Ok(()),
        problems if answer.changed + answer.unchanged > 0 => {
            Err(Failure::partly(format!("{} not {done}", plural(problems, "meter"))))
        }
        problems => Err(Failure::failed(format!("{} not {done}", plural(problems, "meter")))),
    }
}

fn filter_message(filter: &MeterFilter) -> proto::MeterFilter {
    proto::MeterFilter {
        manufacturer: text(filter.manufacturer.as_ref()),
        device_profile: text(filter.device_profile.as_ref()),
        status: text(filter.status.as_ref()),
        head_end: if filter.unassigned { NO_HEAD_END.into() } else { text(filter.assigned_to.as_ref()) },
        batch: text(filter.batch.as_ref()),
    }
}

fn titles(meters: &[SystemTitle]) -> Vec<bytes::Bytes> {
    meters.iter().map(|meter| octets(meter.octets())).collect()
}

/// A line of `--file` of `kms meter adopt`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FloorLine {
    meter: String,
    client_title: String,
    floor: u32,
    #[serde(default)]
    security_setup: Option<String>,
    #[serde(default)]
    owned_by: Option<String>,
}

impl FloorLine {
    fn message(&self) -> Result<proto::CounterFloor, Failure> {
        let setup = self.security_setup.as_deref().map_or(Ok(SecuritySetupId::DEFAULT), SecuritySetupId::parse)?;
        Ok(proto::CounterFloor {
            meter: octets(SystemTitle::parse(&self.meter)?.octets()),
            security_setup: octets(setup.obis()),
            client_title: octets(SystemTitle::parse(&self.client_title)?.octets()),
            floor: self.floor,
            owned_by: text(self.owned_by.as_deref().map(PrincipalId::parse).transpose()?.as_ref()),
        })
    }
}

/// A line of `--file` of `kms meter enrol`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MeterLine {
    meter: String,
    serial: String,
    #[serde(default)]
    groups: Vec<String>,
}
/// In a filter, instead of a principal's URI: meters without a head-end.
const NO_HEAD_END: &str = "none";
