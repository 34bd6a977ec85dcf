//! The engine: one question of the server becomes one Cedar request, and any failure denies (I8).

use std::{collections::HashSet, fmt, str::FromStr as _};

use cedar_policy::{
    Authorizer, Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicySet, Request,
    RestrictedExpression, Schema,
};
use kms_authz::{Action, Attribute, Engine, EvaluationError, PolicyDecision, PrincipalFacts, Resource};
use kms_domain::{IslandName, PrincipalId, Role};

/// Policies in Cedar.
pub(super) struct Cedar {
    schema: Schema,
    policies: PolicySet,
    authorizer: Authorizer,
}

impl Cedar {
    pub(super) fn new(schema: Schema, policies: PolicySet) -> Self {
        Self { schema, policies, authorizer: Authorizer::new() }
    }
}

impl Engine for Cedar {
    fn decide(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
    ) -> Result<PolicyDecision, EvaluationError> {
        let island = principal.principal.island();
        let caller = uid(entity_type(principal.principal.role()), &principal.principal.to_string())?;
        let mut entities = vec![
            entity(uid("Island", island.as_str())?, [("name", text(island.as_str()))])?,
            caller_entity(principal)?,
        ];
        let target = match resource {
            Resource::Island => uid("Island", island.as_str())?,
            Resource::Meters(class) => {
                let target = uid("MeterClass", "class")?;
                let groups = class
                    .groups
                    .iter()
                    .map(|group| RestrictedExpression::new_long(i64::try_from(group.0).unwrap_or(i64::MAX)));
                let mut attributes = vec![
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("manufacturer", text(class.vendor.as_str())),
                    ("device_profile", text(class.profile.as_str())),
                    ("status", text(class.status.name())),
                    ("groups", RestrictedExpression::new_set(groups)),
                ];
                if let Some(head_end) = &class.head_end {
                    attributes.push((
                        "head_end",
                        RestrictedExpression::new_entity_uid(uid("HeadEnd", &head_end.to_string())?),
                    ));
                    if *head_end != principal.principal {
                        entities.push(principal_entity(head_end)?);
                    }
                }
                entities.push(entity(target.clone(), attributes)?);
                target
            }
            Resource::Group(group) => {
                let target = uid("MeterGroup", &group.number.to_string())?;
                let attributes = [
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("number", RestrictedExpression::new_long(i64::try_from(group.number).unwrap_or(i64::MAX))),
                    ("name", text(&group.name)),
                    ("security_suite", RestrictedExpression::new_long(i64::from(group.suite))),
                ];
                entities.push(entity(target.clone(), attributes)?);
                target
            }
            Resource::DeviceType(device_type) => {
                let target = uid("DeviceType", &device_type.name)?;
                let attributes = [
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("name", text(&device_type.name)),
                    ("manufacturer", text(&device_type.manufacturer)),
                    ("device_profile", text(&device_type.device_profile)),
                ];
                entities.push(entity(target.clone(), attributes)?);
                target
            }
        };
        let entities = Entities::from_entities(entities, Some(&self.schema)).map_err(failed)?;
        let context = Context::from_pairs(context(action)).map_err(failed)?;
        let request =
            Request::new(caller, uid("Action", action.name())?, target, context, Some(&self.schema)).map_err(failed)?;
        let response = self.authorizer.is_authorized(&request, &self.policies, &entities);
        // I8: Cedar skips a policy that fails, even a `forbid`. Here any failure denies.
        if let Some(error) = response.diagnostics().errors().next() {
            return Err(failed(error));
        }
        Ok(match response.decision() {
            cedar_policy::Decision::Allow => PolicyDecision::Permit,
            cedar_policy::Decision::Deny => PolicyDecision::Deny,
        })
    }
}

fn context(action: &Action) -> Vec<(String, RestrictedExpression)> {
    let value = |attribute| match attribute {
        Attribute::Text(value) => text(&value),
        Attribute::Number(value) => RestrictedExpression::new_long(value),
        Attribute::Bool(value) => RestrictedExpression::new_bool(value),
        Attribute::Texts(values) => RestrictedExpression::new_set(values.iter().map(|value| text(value))),
    };
    action.attributes().into_iter().map(|(name, attribute)| (name.to_owned(), value(attribute))).collect()
}

fn failed(error: impl fmt::Display) -> EvaluationError {
    EvaluationError(error.to_string())
}

fn principal_entity(principal: &PrincipalId) -> Result<Entity, EvaluationError> {
    entity(uid(entity_type(principal.role()), &principal.to_string())?, principal_attributes(principal)?)
}

/// What every principal has.
fn principal_attributes(principal: &PrincipalId) -> Result<Vec<(&'static str, RestrictedExpression)>, EvaluationError> {
    let island: &IslandName = principal.island();
    Ok(vec![
        ("name", text(principal.name())),
        ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
    ])
}

/// The entity of the caller. A handheld also has what its row says of the device.
fn caller_entity(facts: &PrincipalFacts) -> Result<Entity, EvaluationError> {
    let mut attributes = principal_attributes(&facts.principal)?;
    if facts.principal.role() == Role::Handheld {
        attributes.extend(facts.technician.as_deref().map(|technician| ("technician", text(technician))));
        attributes.extend(facts.assurance.map(|assurance| ("assurance", text(assurance.name()))));
    }
    entity(uid(entity_type(facts.principal.role()), &facts.principal.to_string())?, attributes)
}

const fn entity_type(role: Role) -> &'static str {
    match role {
        Role::HeadEnd => "HeadEnd",
        Role::Officer => "Officer",
        Role::Auditor => "Auditor",
        Role::Handheld => "Handheld",
        Role::Manufacturer => "Manufacturer",
        Role::ServiceAccount => "ServiceAccount",
    }
}

fn entity(
    uid: EntityUid,
    attributes: impl IntoIterator<Item = (&'static str, RestrictedExpression)>,
) -> Result<Entity, EvaluationError> {
    let attributes = attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Entity::new(uid, attributes, HashSet::new()).map_err(failed)
}

pub(super) fn uid(entity_type: &str, id: &str) -> Result<EntityUid, EvaluationError> {
    let name = EntityTypeName::from_str(entity_type).map_err(failed)?;
    Ok(EntityUid::from_type_name_and_id(name, EntityId::new(id)))
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}
