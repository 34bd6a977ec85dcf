//! `kms hsm`.

use kms_proto::v1 as proto;

use crate::{
    arguments::hsm::HsmCommand,
    context::Context,
    failure::Failure,
    json,
    output::{Rows, facts, plural},
    progress::waiting,
};

pub(crate) async fn run(command: HsmCommand, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.hsm();
    match command {
        HsmCommand::Check => {
            let answer =
                waiting("probing the HSM modules", client.check_hsm(proto::CheckHsmRequest {})).await?.into_inner();
            context.output.show(
                || json::message("CheckHsmResponse", &answer),
                || answer.tokens.iter().map(token_text).collect::<Vec<_>>().join("\n"),
            );
            let unusable = answer.tokens.iter().filter(|token| token.state != "usable").count() as u64;
            if unusable > 0 || answer.tokens.is_empty() {
                return Err(Failure::failed(if answer.tokens.is_empty() {
                    "the server has no token".into()
                } else {
                    format!("{} not usable", plural(unusable, "token"))
                }));
            }
        }
        HsmCommand::Inventory => {
            let answer =
                waiting("reading the tokens", client.inventory_hsm(proto::InventoryHsmRequest {})).await?.into_inner();
            context.output.show(|| json::message("InventoryHsmResponse", &answer), || inventory_text(&answer));
            let objections = answer.objects.iter().filter(|object| !object.objection.is_empty()).count() as u64;
            if objections > 0 {
                return Err(Failure::failed(format!(
                    "{} readable or usable beyond its purpose",
                    plural(objections, "object")
                )));
            }
        }
    }
    Ok(())
}

fn token_text(token: &proto::TokenCheck) -> String {
    let state =
        if token.reason.is_empty() { token.state.clone() } else { format!("{}: {}", token.state, token.reason) };
    let mut rows =
        Rows::new(&["capability", "needed for", "found", "used instead", "what that costs"]).sentences(&[1, 3, 4]);
    for capability in &token.capabilities {
        // The replacement and its cost matter only where a capability is missing.
        let (found, instead, cost) = match (capability.found, capability.essential) {
            (true, _) => ("yes", "", ""),
            (false, true) => ("MISSING", capability.instead.as_str(), capability.cost.as_str()),
            (false, false) => ("no", capability.instead.as_str(), capability.cost.as_str()),
        };
        rows.row([capability.name.clone(), capability.needed_for.clone(), found.into(), instead.into(), cost.into()]);
    }
    let missing = token.capabilities.iter().filter(|capability| !capability.found).count() as u64;
    let summary = match (token.capabilities.len() as u64, missing) {
        (0, _) => String::new(),
        (all, 0) => format!("all {all} were found"),
        (all, missing) => format!("{missing} of {all} were not found"),
    };
    let facts = facts([
        ("token", token.label.clone()),
        ("serial", token.serial.clone()),
        ("module", token.module.clone()),
        ("state", state),
        ("capabilities", summary),
    ]);
    format!("{facts}\n{}", rows.text_or("not probed yet"))
}

fn inventory_text(answer: &proto::InventoryHsmResponse) -> String {
    let mut tokens: Vec<&str> = answer.objects.iter().map(|object| object.token.as_str()).collect();
    tokens.dedup();
    let texts = tokens.iter().map(|token| {
        // The id is left out: it is the first half of the label's SHA-256. JSON has it.
        let mut rows = Rows::new(&["label", "class", "key type", "attributes", "objection"]).sentences(&[3, 4]);
        for object in answer.objects.iter().filter(|object| object.token == *token) {
            let label = match (object.label.as_str(), object.attributes.iter().any(|name| name == "TOKEN")) {
                ("", true) => "(no label)",
                ("", false) => "(session object)",
                (label, _) => label,
            };
            let mechanisms = object.allowed_mechanisms.iter().map(|mechanism| format!("only {mechanism}"));
            rows.row([
                label.to_owned(),
                object.object_class.replace('-', " "),
                object.key_type.clone(),
                object.attributes.iter().cloned().chain(mechanisms).collect::<Vec<_>>().join(" "),
                object.objection.clone(),
            ]);
        }
        format!("token  {token}\n\n{}", rows.text_or(""))
    });
    let text = texts.collect::<Vec<_>>().join("\n");
    match answer.objects.iter().filter(|object| !object.objection.is_empty()).count() as u64 {
        _ if answer.objects.is_empty() => "no objects\n".into(),
        0 => format!(
            "{text}\n{}: none is readable, extractable or usable beyond its purpose\n",
            plural(answer.objects.len() as u64, "object")
        ),
        _ => text,
    }
}
