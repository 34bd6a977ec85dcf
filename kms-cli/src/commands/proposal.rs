//! `kms proposal`.

use bytes::Bytes;
use kms_client::Connection;
use kms_domain::ProposalId;
use kms_proto::v1 as proto;
use serde_json::json;

use super::{confirm, octets, request_id};
use crate::{
    arguments::{proposal::ProposalCommand, shared::Sure},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts, number},
    progress::waiting,
};

pub(crate) async fn run(command: ProposalCommand, context: &Context) -> Result<(), Failure> {
    match command {
        ProposalCommand::List { limit } => list(limit.limit, context).await,
        ProposalCommand::Show { proposal } => {
            let connection = context.connect().await?;
            show(&load(&connection, proposal.proposal).await?, context);
            Ok(())
        }
        ProposalCommand::Approve { proposal, content, sure } => {
            approve(proposal.proposal, content, &sure, context).await
        }
        ProposalCommand::CarryOut { proposal, sure } => {
            let connection = context.connect().await?;
            let known = load(&connection, proposal.proposal).await?;
            confirm(&format!("this runs now: {}", known.description), &sure)?;
            let request = proto::CarryOutProposalRequest {
                request_id: request_id(),
                proposal_id: octets(proposal.proposal.octets()),
            };
            show(
                &waiting("executing the proposal", connection.proposals().carry_out_proposal(request))
                    .await?
                    .into_inner(),
                context,
            );
            Ok(())
        }
        ProposalCommand::Withdraw { proposal, why } => {
            let request = proto::WithdrawProposalRequest {
                request_id: request_id(),
                proposal_id: octets(proposal.proposal.octets()),
                reason: why.reason,
            };
            let mut client = context.connect().await?.proposals();
            show(&waiting("withdrawing", client.withdraw_proposal(request)).await?.into_inner(), context);
            Ok(())
        }
    }
}

async fn list(limit: usize, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.proposals();
    let (mut proposals, mut page_token) = (Vec::new(), Bytes::new());
    loop {
        let wanted = if limit == 0 { PAGE } else { PAGE.min(limit - proposals.len()) };
        let request = proto::ListProposalsRequest { page_size: wanted as u32, page_token };
        let page = waiting("reading proposals", client.list_proposals(request)).await?.into_inner();
        proposals.extend(page.proposals);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit > 0 && proposals.len() >= limit) {
            break;
        }
    }
    context.output.show(
        || json!({"proposals": proposals.iter().map(|proposal| json::message("Proposal", proposal)).collect::<Vec<_>>(), "more": !page_token.is_empty()}),
        || {
            let mut rows = Rows::new(&["proposal", "state", "made", "by", "what"]).sentences(&[4]);
            for proposal in &proposals {
                rows.row([
                    output::uuid(&proposal.proposal_id),
                    proposal.state.clone(),
                    output::time(proposal.created_ms),
                    proposal.requester_person.clone(),
                    proposal.description.clone(),
                ]);
            }
            let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
            format!("{}{more}", rows.text_or("no proposals"))
        },
    );
    Ok(())
}

async fn approve(
    proposal: ProposalId,
    content: Option<[u8; 32]>,
    sure: &Sure,
    context: &Context,
) -> Result<(), Failure> {
    let connection = context.connect().await?;
    let content_sha256 = match content {
        Some(content) => octets(content),
        None if sure.yes => {
            return Err(Failure::usage(
                "--yes needs --content HEX: the SHA-256 of the content that you have reviewed, from `kms proposal show`",
            ));
        }
        None => {
            let known = load(&connection, proposal).await?;
            eprintln!("{}", proposal_text(&known));
            confirm(&format!("you approve exactly this: {}", known.description), sure)?;
            known.content_sha256
        }
    };
    let request = proto::ApproveProposalRequest {
        request_id: request_id(),
        proposal_id: octets(proposal.octets()),
        content_sha256,
    };
    show(&waiting("approving", connection.proposals().approve_proposal(request)).await?.into_inner(), context);
    Ok(())
}

async fn load(connection: &Connection, proposal: ProposalId) -> Result<proto::Proposal, Failure> {
    let request = proto::ShowProposalRequest { proposal_id: octets(proposal.octets()) };
    Ok(waiting("reading the proposal", connection.proposals().show_proposal(request)).await?.into_inner())
}

fn show(proposal: &proto::Proposal, context: &Context) {
    context.output.show(|| json::message("Proposal", proposal), || proposal_text(proposal));
}

/// A new proposal, and the next step.
pub(crate) fn show_made(proposal: &proto::Proposal, context: &Context) {
    let next = format!("\nanother person approves it: kms proposal approve {}\n", output::uuid(&proposal.proposal_id));
    context.output.show(|| json::message("Proposal", proposal), || format!("{}{next}", proposal_text(proposal)));
}

/// A proposal, field by field: exactly what will run, and who requested it.
fn proposal_text(proposal: &proto::Proposal) -> String {
    let mut lines = vec![("proposal", output::uuid(&proposal.proposal_id)), ("what", proposal.description.clone())];
    match &proposal.action {
        Some(proto::proposal::Action::RaiseCounter(raise)) => lines.extend([
            ("meter", output::octets(&raise.meter)),
            ("security setup", output::obis(&raise.security_setup)),
            ("key", format!("{} version {}", raise.key_type, raise.key_version)),
            ("client title", output::octets(&raise.client_title)),
            (
                "lowest counter",
                format!("{}; {} are left", number(raise.to.into()), number((1 << 32) - u64::from(raise.to))),
            ),
        ]),
        Some(proto::proposal::Action::DestroyRoot(root)) => lines.extend([
            ("root", root.kind.clone()),
            ("key class", root.key_class.clone()),
            ("version", root.version.to_string()),
            ("oldest backup", output::time(root.oldest_backup_ms)),
        ]),
        Some(proto::proposal::Action::RecertifyPrincipal(recertify)) => lines.extend([
            ("principal", recertify.principal.clone()),
            ("person", recertify.person.clone()),
            ("key SHA-256", hex::encode(&recertify.key_sha256)),
        ]),
        None => lines.push(("action", "one that a newer client may know: do not approve it".to_owned())),
    }
    let approvals: Vec<String> = proposal
        .approvals
        .iter()
        .map(|approval| format!("{} at {}", approval.person, output::time(approval.time_ms)))
        .collect();
    let ended = if proposal.ended_ms == 0 {
        String::new()
    } else {
        format!("by {} at {}", proposal.ended_by, output::time(proposal.ended_ms))
    };
    lines.extend([
        ("reason", proposal.reason.clone()),
        (
            "made",
            format!(
                "by {} ({}) at {}",
                proposal.requester_person,
                proposal.requester,
                output::time(proposal.created_ms)
            ),
        ),
        ("expires", output::time(proposal.expires_ms)),
        (
            "approvals",
            format!(
                "{} of {}: {}",
                approvals.len(),
                proposal.quorum,
                if approvals.is_empty() { "nobody yet".to_owned() } else { approvals.join(", ") }
            ),
        ),
        (
            "state",
            [proposal.state.clone(), ended].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" "),
        ),
        ("content SHA-256", hex::encode(&proposal.content_sha256)),
    ]);
    facts(lines)
}

const PAGE: usize = 200;
