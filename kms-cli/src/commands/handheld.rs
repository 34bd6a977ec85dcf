//! `kms handheld`: invitations, hand-overs, and the list. The one-time code is made here; the
//! server gets its digest.

use bytes::Bytes;
use kms_client::{Profile, field::OneTimeCode};
use kms_proto::v1 as proto;
use serde_json::json;
use zeroize::Zeroizing;

use super::{confirm, octets, request_id};
use crate::{
    arguments::handheld::{CodeTerms, HandheldCommand},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts},
    progress::waiting,
};

pub(crate) async fn run(command: HandheldCommand, context: &Context) -> Result<(), Failure> {
    match command {
        HandheldCommand::Invite { who, code: terms, client_titles } => {
            let code = OneTimeCode::generate(&who.name)?;
            let request = proto::InviteHandheldRequest {
                request_id: request_id(),
                name: who.name,
                code: Some(code.digest()),
                lifetime_seconds: seconds(&terms),
                technician: terms.technician,
                client_titles: client_titles.iter().map(|title| octets(title.octets())).collect(),
            };
            let mut client = context.connect().await?.handhelds();
            let answer = waiting("inviting", client.invite_handheld(request)).await?.into_inner();
            show_code(&code, answer, context)
        }
        HandheldCommand::HandOver { who, code: terms, sure } => {
            confirm(&format!("all keys of {} end at once", who.name), &sure)?;
            let code = OneTimeCode::generate(&who.name)?;
            let request = proto::HandOverHandheldRequest {
                request_id: request_id(),
                name: who.name,
                code: Some(code.digest()),
                lifetime_seconds: seconds(&terms),
                technician: terms.technician,
            };
            let mut client = context.connect().await?.handhelds();
            let answer = waiting("handing over", client.hand_over_handheld(request)).await?.into_inner();
            show_code(&code, answer, context)
        }
        HandheldCommand::WithdrawInvitation { who, why } => {
            let request =
                proto::WithdrawInvitationRequest { request_id: request_id(), name: who.name, reason: why.reason };
            let mut client = context.connect().await?.handhelds();
            let answer = waiting("withdrawing", client.withdraw_invitation(request)).await?.into_inner();
            context.output.show(|| json::message("Invitation", &answer), || facts(invitation_facts(&answer)));
            Ok(())
        }
        HandheldCommand::List => list(context).await,
    }
}

async fn list(context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.handhelds();
    let answer =
        waiting("reading handhelds", client.list_handhelds(proto::ListHandheldsRequest {})).await?.into_inner();
    context.output.show(
        || json::message("ListHandheldsResponse", &answer),
        || {
            let mut rows =
                Rows::new(&["handheld", "status", "technician", "assurance", "certificate until", "invitation"]);
            for handheld in &answer.handhelds {
                let principal = handheld.principal.clone().unwrap_or_default();
                let invitation = handheld.invitation.clone().unwrap_or_default();
                let technician =
                    if principal.person.is_empty() { invitation.technician.clone() } else { principal.person };
                let status = match (handheld.unreadable, principal.status.is_empty()) {
                    (true, _) => "does not verify".to_owned(),
                    (false, true) => "not enrolled".to_owned(),
                    (false, false) => principal.status,
                };
                rows.row([
                    handheld.handheld.clone(),
                    status,
                    technician,
                    principal.assurance,
                    output::end(principal.certificate_not_after_ms),
                    state(&invitation),
                ]);
            }
            rows.text_or("no handhelds")
        },
    );
    Ok(())
}

/// Shows the code. It names the root of the officer's own profile: not what the server says.
fn show_code(code: &OneTimeCode, answer: proto::Invitation, context: &Context) -> Result<(), Failure> {
    let profile: Profile = context.profile()?;
    if !profile.trusts(&answer.root_certificate)? {
        return Err(Failure::failed(format!(
            "the server names another root certificate than the profile `{}` has, so the code is not shown",
            profile.directory().display()
        ))
        .with_hint("withdraw the invitation, and tell the operators of the server"));
    }
    let text = code.text(&answer.root_certificate)?;
    let answer = proto::Invitation { root_certificate: Bytes::new(), ..answer };
    context.output.show(
        || json!({"invitation": json::message("Invitation", &answer), "code": text.as_str()}),
        || code_text(&answer, &text),
    );
    Ok(())
}

fn code_text(answer: &proto::Invitation, text: &Zeroizing<String>) -> String {
    format!(
        "{}\nOne-time code, shown only now:\n\n  {}\n\nNext, on the device, which asks for the code:\n  kms field enrol HOST:PORT -\n",
        facts(invitation_facts(answer)),
        text.as_str()
    )
}

fn invitation_facts(invitation: &proto::Invitation) -> Vec<(&'static str, String)> {
    let titles = invitation.client_titles.iter().map(|title| output::octets(title)).collect::<Vec<_>>().join(", ");
    vec![
        ("handheld", invitation.handheld.clone()),
        ("technician", invitation.technician.clone()),
        ("invitation", state(invitation)),
        ("invited by", invitation.invited_by.clone()),
        ("client titles", titles),
    ]
}

fn state(invitation: &proto::Invitation) -> String {
    match (invitation.state.as_str(), invitation.wrong_codes) {
        ("pending", 0) => format!("pending until {}", output::time(invitation.expires_ms)),
        ("pending", wrong) => {
            format!(
                "pending until {}, {}",
                output::time(invitation.expires_ms),
                output::plural(wrong.into(), "wrong code")
            )
        }
        (state, _) => state.to_owned(),
    }
}

const fn seconds(terms: &CodeTerms) -> u32 {
    match terms.minutes {
        Some(minutes) => minutes.saturating_mul(60),
        None => 0,
    }
}
