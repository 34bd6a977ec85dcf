//! `meterkms.v1.HsmService`: the capabilities and the objects of the tokens.

use std::sync::Arc;

use kms_domain::IslandName;
use kms_hsm::{Capabilities, InventoryObject, Token, TokenState};
use kms_proto::v1;
use kms_proto::v1::hsm_service_server::HsmService;
use tonic::{Request, Response, Status};

use crate::peer::caller_of;
use kms_authz::Action;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;

/// The service over gRPC.
pub(crate) struct HsmApi {
    island: Arc<IslandContext>,
}

impl HsmApi {
    /// The service of this island.
    pub(crate) const fn new(island: Arc<IslandContext>) -> Self {
        Self { island }
    }

    async fn permit<T>(&self, request: &Request<T>, action: Action) -> Result<(), ServiceError> {
        let caller = caller_of(request, self.island.name(), IslandContext::now())?;
        self.island.require(&caller, &action).await.map(drop)
    }
}

#[tonic::async_trait]
impl HsmService for HsmApi {
    async fn check_hsm(&self, request: Request<v1::CheckHsmRequest>) -> Result<Response<v1::CheckHsmResponse>, Status> {
        self.permit(&request, Action::CheckHsm).await?;
        let tokens = self.island.hsm.all_tokens().into_iter().map(token_check).collect();
        Ok(Response::new(v1::CheckHsmResponse { tokens }))
    }

    async fn inventory_hsm(
        &self,
        request: Request<v1::InventoryHsmRequest>,
    ) -> Result<Response<v1::InventoryHsmResponse>, Status> {
        self.permit(&request, Action::InventoryHsm).await?;
        let inventory = self.island.hsm.inventory().await.map_err(ServiceError::from)?;
        let tokens = self.island.hsm.all_tokens();
        let mut objects = Vec::new();
        for (label, found) in inventory {
            let Some(token) = tokens.iter().find(|token| token.label() == label) else { continue };
            objects.extend(found.into_iter().map(|object| hsm_object(self.island.name(), token, object)));
        }
        Ok(Response::new(v1::InventoryHsmResponse { objects }))
    }
}

fn token_check(token: &Token) -> v1::TokenCheck {
    let state = token.state().borrow().clone();
    let (name, reason) = match &state {
        TokenState::Probing => ("probing", String::new()),
        TokenState::Usable(_) => ("usable", String::new()),
        TokenState::Unusable { reason, next_step, .. } => ("unusable", format!("{reason}; {next_step}")),
    };
    // If something essential is missing, the table says what.
    let capabilities = token.capabilities();
    v1::TokenCheck {
        label: token.label().to_owned(),
        serial: token.serial().unwrap_or_default(),
        module: capabilities.as_ref().map(|capabilities| capabilities.module.clone()).unwrap_or_default(),
        state: name.to_owned(),
        reason,
        capabilities: capabilities.map(|capabilities| capability_checks(&capabilities)).unwrap_or_default(),
    }
}

fn capability_checks(capabilities: &Capabilities) -> Vec<v1::CapabilityCheck> {
    let rows = capabilities.table().into_iter().map(|row| v1::CapabilityCheck {
        name: row.name.to_owned(),
        needed_for: row.needed_for.to_owned(),
        essential: row.is_essential(),
        found: row.found,
        instead: row.instead.to_owned(),
        cost: row.cost.to_owned(),
    });
    rows.collect()
}

fn hsm_object(island: &IslandName, token: &Token, object: InventoryObject) -> v1::HsmObject {
    let objection = match &*token.state().borrow() {
        TokenState::Usable(capabilities) => object.findings(island, capabilities).join("; "),
        _ => String::new(),
    };
    v1::HsmObject {
        token: token.label().to_owned(),
        object_class: object.class.replace(' ', "-"),
        id: hex::decode(&object.id).unwrap_or_default().into(),
        key_type: object.key_type,
        attributes: object.flags.iter().filter(|(_, holds)| *holds).map(|(name, _)| (*name).to_owned()).collect(),
        label: object.label,
        allowed_mechanisms: object.allowed_mechanisms,
        objection,
    }
}
