//! `kms grant`.

use kms_proto::v1 as proto;
use serde_json::json;

use super::{PAGE, confirm, octets, request_id, text};
use crate::{
    arguments::grant::GrantCommand,
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts},
    progress::waiting,
};

pub(crate) async fn run(command: GrantCommand, context: &Context) -> Result<(), Failure> {
    match command {
        GrantCommand::List { principal, live, limit } => {
            let mut client = context.connect().await?.grants();
            let (mut grants, mut page_token) = (Vec::new(), proto::ListGrantsRequest::default().page_token);
            loop {
                let wanted = if limit.limit == 0 { PAGE } else { PAGE.min(limit.limit - grants.len()) };
                let request = proto::ListGrantsRequest {
                    principal: text(principal.as_ref()),
                    only_live: live,
                    page_size: wanted as u32,
                    page_token,
                };
                let page = waiting("reading grants", client.list_grants(request)).await?.into_inner();
                grants.extend(page.grants);
                page_token = page.next_page_token;
                if page_token.is_empty() || (limit.limit > 0 && grants.len() >= limit.limit) {
                    break;
                }
            }
            context.output.show(
                || json!({"grants": grants.iter().map(|grant| json::message("Grant", grant)).collect::<Vec<_>>(), "more": !page_token.is_empty()}),
                || {
                    let mut rows = Rows::new(&["grant", "principal", "purpose", "meters", "until"]).numbers(&[3]);
                    for grant in &grants {
                        rows.row([
                            output::uuid(&grant.grant_id),
                            grant.principal.clone(),
                            output::purpose(grant.purpose()),
                            output::number(grant.meter_count.into()),
                            if grant.revoked_ms == 0 { output::time(grant.not_after_ms) } else { format!("{}, revoked", output::time(grant.revoked_ms)) },
                        ]);
                    }
                    let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
                    format!("{}{more}", rows.text_or("no grants"))
                },
            );
        }
        GrantCommand::Revoke { grant, why, sure } => {
            confirm(&format!("grant {grant} will be revoked"), &sure)?;
            let mut client = context.connect().await?.grants();
            let request = proto::RevokeGrantRequest {
                request_id: request_id(),
                grant_id: octets(grant.octets()),
                reason: why.reason,
            };
            let answer = waiting("revoking", client.revoke_grant(request)).await?.into_inner();
            context.output.show(
                || json::message("RevokeGrantResponse", &answer),
                || {
                    let grant = answer.grant.clone().unwrap_or_default();
                    facts([
                        ("grant", output::uuid(&grant.grant_id)),
                        ("principal", grant.principal.clone()),
                        ("purpose", output::purpose(grant.purpose())),
                        ("meters", output::number(grant.meter_count.into())),
                        ("revoked", output::time(grant.revoked_ms)),
                    ])
                },
            );
        }
    }
    Ok(())
}
