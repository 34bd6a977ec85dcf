//! `kms roots`.

use std::io::{IsTerminal as _, Write as _};

use kms_domain::RootPurpose;
use kms_proto::v1 as proto;

use super::{confirm, octets, request_id};
use crate::{
    arguments::roots::RootsCommand,
    context::Context,
    failure::Failure,
    json,
    output::{self, Rows, number, plural},
    progress,
};

pub(crate) async fn run(command: RootsCommand, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.roots();
    let answer = match command {
        RootsCommand::Show { count: false } => client.show_roots(proto::ShowRootsRequest {}).await?,
        RootsCommand::Show { count: true } => return count(context).await,
        RootsCommand::Watch { root, once } => return watch(root.root, once, context).await,
        RootsCommand::ProposeDestruction { root, version, oldest_backup, quorum, why } => {
            let request = proto::ProposeRootDestructionRequest {
                request_id: request_id(),
                root: root.root.to_string(),
                version: version.into(),
                oldest_backup_ms: oldest_backup.as_millisecond(),
                reason: why.reason,
                quorum: Some(quorum.number().into()),
            };
            let answer = progress::waiting("counting the references", client.propose_root_destruction(request)).await?.into_inner();
            super::proposal::show_made(&answer, context);
            return Ok(());
        }
        RootsCommand::Destroy { proposal, sure } => {
            let mut proposals = context.connect().await?.proposals();
            let known = proposals.show_proposal(proto::ShowProposalRequest { proposal_id: octets(proposal.octets()) }).await?.into_inner();
            confirm(&format!("{}, in all tokens and for good", known.description), &sure)?;
            let request = proto::DestroyRootRequest { request_id: request_id(), proposal_id: octets(proposal.octets()) };
            let answer = progress::waiting("counting the references", client.destroy_root(request)).await?.into_inner();
            let text = || format!("{}\nin 20 s all servers know the decision. Then each of them counts again, destroys the root in its own tokens and records that (kms audit list). `kms roots show` shows whether the token of a server still has the root\n", roots_text(&answer));
            context.output.show(|| json::message("ShowRootsResponse", &answer), text);
            return Ok(());
        }
        RootsCommand::Rotate { root, rows_per_second, sure } => {
            confirm(&format!("new keys and seals use the newest version of `{}`", root.root), &sure)?;
            let request =
                proto::RotateRootRequest { request_id: request_id(), root: root.root.to_string(), rows_per_second: rows_per_second.unwrap_or_default() };
            let answer = client.rotate_root(request).await?.into_inner();
            let watch = if root.root.has_pass() { format!("\nwatch the progress: kms roots watch {}\n", root.root) } else { String::new() };
            context.output.show(|| json::message("ShowRootsResponse", &answer), || format!("{}{watch}", roots_text(&answer)));
            return Ok(());
        }
        RootsCommand::Pause { root, reason } => {
            client.pause_root_rotation(proto::PauseRootRotationRequest { request_id: request_id(), root: root.root.to_string(), reason: reason.reason }).await?
        }
        RootsCommand::Resume { root, rows_per_second } => {
            let request =
                proto::RotateRootRequest { request_id: request_id(), root: root.root.to_string(), rows_per_second: rows_per_second.unwrap_or_default() };
            client.resume_root_rotation(request).await?
        }
        RootsCommand::Retire { root, sure } => {
            confirm(&format!("shipments under earlier versions of `{}` are refused", root.root), &sure)?;
            client.retire_root(proto::RetireRootRequest { request_id: request_id(), root: root.root.to_string() }).await?
        }
    }
    .into_inner();
    context.output.show(|| json::message("ShowRootsResponse", &answer), || roots_text(&answer));
    Ok(())
}

fn roots_text(answer: &proto::ShowRootsResponse) -> String {
    let mut rows = Rows::new(&["root", "version", "standing", "made", "fingerprint", "in token", "rotation"])
        .numbers(&[1])
        .sentences(&[6]);
    for root in &answer.roots {
        let fingerprint = output::octets(&root.fingerprint);
        rows.row([
            root.root.clone(),
            root.version.to_string(),
            root.standing.clone(),
            output::time(root.made_ms),
            fingerprint.get(..FINGERPRINT).unwrap_or(&fingerprint).to_owned(),
            root.in_token.map_or("not told", |held| if held { "yes" } else { "no" }).to_owned(),
            root.rotation.as_ref().map(line).unwrap_or_default(),
        ]);
    }
    rows.text_or("no roots")
}

/// A pass in one line.
fn line(rotation: &proto::RootRotation) -> String {
    let mut parts = vec![rotation.state.clone()];
    if rotation.state != "finished" {
        parts.push(format!(
            "round {}, {} of about {} looked at",
            rotation.round,
            number(rotation.looked),
            plural(rotation.rows, "meter")
        ));
    }
    parts.push(format!("{} written", plural(rotation.all_changed, "row")));
    if rotation.keys > 0 {
        parts.push(format!("{} wrapped again", plural(rotation.keys, "key")));
    }
    if rotation.refused > 0 {
        parts.push(format!("{} left", number(rotation.refused)));
    }
    if !rotation.reason.is_empty() {
        parts.push(rotation.reason.clone());
    }
    parts.join(", ")
}

async fn watch(root: RootPurpose, once: bool, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.roots();
    let mut stream =
        client.watch_root_rotation(proto::WatchRootRotationRequest { root: root.to_string() }).await?.into_inner();
    let as_json = context.output.is_json();
    let on_terminal = !as_json && !once && std::io::stderr().is_terminal();
    let mut bar = None;
    let mut last = None;
    while let Some(rotation) = stream.message().await? {
        let told = if as_json {
            writeln!(std::io::stdout(), "{}", json::message("RootRotation", &rotation))
        } else if on_terminal {
            let bar = bar.get_or_insert_with(|| progress::count(&root.to_string(), rotation.rows));
            bar.set_length(rotation.rows.max(rotation.looked));
            bar.set_position(rotation.looked);
            bar.set_message(format!("{root} round {}", rotation.round));
            Ok(())
        } else {
            writeln!(std::io::stdout(), "{}", line(&rotation))
        };
        last = Some(rotation);
        // Ends when the reader has closed the pipe.
        if once || told.is_err() {
            break;
        }
    }
    if let (Some(bar), Some(rotation)) = (bar, &last) {
        bar.finish_and_clear();
        let _ = writeln!(std::io::stdout(), "{}", line(rotation));
    }
    Ok(())
}

async fn count(context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.roots();
    let roots = client.show_roots(proto::ShowRootsRequest {}).await?.into_inner();
    let mut stream = client.count_root_references(proto::CountRootReferencesRequest {}).await?.into_inner();
    let bar = progress::count("counting", 0);
    let mut all = proto::CountRootReferencesResponse::default();
    while let Some(step) = stream.message().await? {
        bar.set_length(step.rows.max(step.rows_read));
        bar.set_position(step.rows_read);
        all = step;
    }
    bar.finish_and_clear();
    if !all.finished {
        return Err(Failure::failed("the server stopped counting before it had read all rows: run the command again"));
    }
    context.output.show(
        || json::message("CountRootReferencesResponse", &all),
        || {
            let mut rows =
                Rows::new(&["root", "version", "standing", "used by", "needed for"]).numbers(&[1]).sentences(&[4]);
            for counted in &all.references {
                let root = roots.roots.iter().find(|root| root.root == counted.root && root.version == counted.version);
                let used = match counted.root.as_str() {
                    "seal" => plural(counted.references, "row"),
                    "vendor-transport" => String::new(),
                    _ => plural(counted.references, "key version"),
                };
                let standing = root.map(|root| root.standing.clone()).unwrap_or_default();
                rows.row([
                    counted.root.clone(),
                    counted.version.to_string(),
                    standing,
                    used,
                    counted.needed_for.clone(),
                ]);
            }
            format!("{} read\n\n{}", plural(all.rows_read, "row"), rows.text_or("no roots"))
        },
    );
    match all.unreadable {
        0 => Ok(()),
        rows => Err(Failure::failed(format!("{} cannot be read: run `kms audit scrub`", plural(rows, "row")))),
    }
}

/// Digits of a fingerprint in tables; JSON has all of them.
const FINGERPRINT: usize = 16;
