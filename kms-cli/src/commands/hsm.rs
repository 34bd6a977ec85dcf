//! `kms hsm`.

use kms_proto::v1 as proto;

use crate::{
    Context, Failure,
    arguments::HsmCommand,
    json,
    output::{Rows, facts, octets, plural},
    progress::waiting,
};

pub(crate) async fn run(command: HsmCommand, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.hsm();
    match command {
        HsmCommand::Check => {
            let answer = waiting("probing the HSM modules", client.check_hsm(proto::CheckHsmRequest {})).await?.into_inner();
            context.output.show(|| json::message("CheckHsmResponse", &answer), || answer.tokens.iter().map(token_text).collect::<Vec<_>>().join("\n"));
            let unusable = answer.tokens.iter().filter(|token| token.state != "usable").count() as u64;
            if unusable > 0 || answer.tokens.is_empty() {
                return Err(Failure::failed(if answer.tokens.is_empty() { "the server has no token".into() } else { format!("{} not usable", plural(unusable, "token")) }));
            }
        }
        HsmCommand::Inventory => {
            let answer = waiting("reading the tokens", client.inventory_hsm(proto::InventoryHsmRequest {})).await?.into_inner();
            context.output.show(|| json::message("InventoryHsmResponse", &answer), || inventory_text(&answer));
            let objections = answer.objects.iter().filter(|object| !object.objection.is_empty()).count() as u64;
            if objections > 0 {
                return Err(Failure::failed(format!("{} readable or usable beyond its purpose", plural(objections, "object"))));
            }
        }
    }
    Ok(())
}

fn token_text(token: &proto::TokenCheck) -> String {
    let state = if token.reason.is_empty() { token.state.clone() } else { format!("{}: {}", token.state, token.reason) };
    let mut rows = Rows::new(&["capability", "needed for", "found", "used instead", "what that costs"]);
    for capability in &token.capabilities {
        let found = match (capability.found, capability.essential) {
            (true, _) => "yes",
            (false, true) => "MISSING",
            (false, false) => "no",
        };
        rows.row([capability.name.clone(), capability.needed_for.clone(), found.into(), capability.instead.clone(), capability.cost.clone()]);
    }
    let facts = facts([("token", token.label.clone()), ("serial", token.serial.clone()), ("module", token.module.clone()), ("state", state)]);
    format!("{facts}\n{}", rows.text_or("not probed yet"))
}

fn inventory_text(answer: &proto::InventoryHsmResponse) -> String {
    let mut rows = Rows::new(&["token", "class", "label", "id", "key type", "attributes", "mechanisms", "objection"]);
    for object in &answer.objects {
        rows.row([
            object.token.clone(),
            object.object_class.clone(),
            object.label.clone(),
            octets(&object.id),
            object.key_type.clone(),
            object.attributes.join(" "),
            object.allowed_mechanisms.join(" "),
            object.objection.clone(),
        ]);
    }
    rows.text_or("no objects")
}
