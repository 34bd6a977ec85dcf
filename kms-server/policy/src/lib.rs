//! The policies of an island, in Cedar (I8). No other crate knows Cedar: the others know
//! [`kms_authz::Policy`].

mod engine;

use std::{
    path::{Path, PathBuf},
    str::FromStr as _,
};

use aws_lc_rs::digest::{self, SHA256};
use cedar_policy::{PolicyId, PolicySet, Schema, ValidationMode, Validator};
use kms_authz::{Policy, QuotaError, Quotas};
use miette::Diagnostic;

use engine::Cedar;

/// The policies of a directory (every `*.cedar` file in it, and `quotas.toml`). Without a
/// directory, the policies that the server ships with.
///
/// # Errors
/// A file cannot be read, parsed, or validated strictly against the schema. The error names file,
/// line and column. A directory without policies is refused: it is probably a wrong path.
pub fn load(directory: Option<&Path>) -> Result<Policy, PolicyError> {
    let shipped = || (PathBuf::from(Quotas::FILE), Quotas::SHIPPED.to_owned());
    match directory {
        Some(directory) => from_files(read_directory(directory)?, read_quotas(directory)?),
        None => from_files(
            SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect(),
            shipped(),
        ),
    }
}

/// The policies and quotas of these texts, each with the file name for errors.
///
/// # Errors
/// As [`load`].
pub fn from_files(
    files: Vec<(PathBuf, String)>,
    (quotas_path, quotas_text): (PathBuf, String),
) -> Result<Policy, PolicyError> {
    let (schema, _warnings) = Schema::from_cedarschema_str(SCHEMA)
        .map_err(|error| PolicyError::at(Path::new("meterkms.cedarschema"), SCHEMA, &error))?;
    let validator = Validator::new(schema.clone());
    let mut policies = PolicySet::new();
    let mut hash = digest::Context::new(&SHA256);
    let quotas = Quotas::parse(&quotas_text).map_err(|error| PolicyError::quotas(quotas_path, error))?;
    for (path, text) in &files {
        let parsed = PolicySet::from_str(text).map_err(|error| PolicyError::at(path, text, &error))?;
        if parsed.templates().next().is_some() {
            return Err(PolicyError::Template { path: path.clone() });
        }
        // File by file, so that the position of an error is a position in the file.
        if let Some(error) = validator.validate(&parsed, ValidationMode::Strict).validation_errors().next() {
            return Err(PolicyError::at(path, text, error));
        }
        for policy in parsed.policies() {
            let id = PolicyId::new(format!("{}/{}", path.display(), policy.id()));
            policies.add(policy.new_id(id)).map_err(|error| PolicyError::at(path, text, &error))?;
        }
    }
    let quotas_name = PathBuf::from(Quotas::FILE);
    for (path, text) in files.iter().chain([&(quotas_name, quotas_text)]) {
        for part in [path.to_string_lossy().as_bytes(), text.as_bytes()] {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part);
        }
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(hash.finish().as_ref());
    Ok(Policy::new(Box::new(Cedar::new(schema, policies)), quotas, digest))
}

/// Why policies cannot be used. The server does not start with them.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A directory or file cannot be read.
    #[error("cannot read policies from `{path}`: {reason}")]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A policy is not well-formed or does not fit the schema.
    #[error("`{path}` line {line} column {column}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong.
        reason: String,
    },
    /// The quotas are not well-formed.
    #[error("`{path}` line {line}: {reason}")]
    Quotas {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is a template. The server links none, so it would permit or forbid nothing.
    #[error("`{path}` has a policy template (`?principal` or `?resource`); write a policy for each case instead")]
    Template {
        /// The file.
        path: PathBuf,
    },
}

impl PolicyError {
    fn quotas(path: PathBuf, error: QuotaError) -> Self {
        Self::Quotas { path, line: error.line, reason: error.reason }
    }

    fn at(path: &Path, text: &str, error: &(impl Diagnostic + ?Sized)) -> Self {
        let offset = error.labels().and_then(|mut labels| labels.next()).map_or(0, |label| label.offset());
        let before = text.get(..offset).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        let mut reason = error.to_string();
        if let Some(help) = error.help() {
            reason = format!("{reason}; {help}");
        }
        Self::Invalid { path: path.to_owned(), line: before.matches('\n').count() + 1, column, reason }
    }
}

fn read_directory(directory: &Path) -> Result<Vec<(PathBuf, String)>, PolicyError> {
    let refuse =
        |path: &Path, error: std::io::Error| PolicyError::Read { path: path.to_owned(), reason: error.to_string() };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| refuse(directory, error))? {
        let path = entry.map_err(|error| refuse(directory, error))?.path();
        if path.extension().is_some_and(|extension| extension == "cedar") {
            let text = std::fs::read_to_string(&path).map_err(|error| refuse(&path, error))?;
            files.push((PathBuf::from(path.file_name().unwrap_or_default()), text));
        }
    }
    if files.is_empty() {
        return Err(PolicyError::Read { path: directory.to_owned(), reason: "it holds no `*.cedar` file".to_owned() });
    }
    files.sort();
    Ok(files)
}

/// The quotas of a directory of policies. Without such a file, the quotas that the server ships
/// with.
fn read_quotas(directory: &Path) -> Result<(PathBuf, String), PolicyError> {
    let path = directory.join(Quotas::FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok((PathBuf::from(Quotas::FILE), Quotas::SHIPPED.to_owned()))
        }
        Err(error) => Err(PolicyError::Read { path, reason: error.to_string() }),
    }
}

const SCHEMA: &str = include_str!("../../../policies/meterkms.cedarschema");
const SHIPPED: [(&str, &str); 9] = [
    ("auditors.cedar", include_str!("../../../policies/auditors.cedar")),
    ("everyone.cedar", include_str!("../../../policies/everyone.cedar")),
    ("groups.cedar", include_str!("../../../policies/groups.cedar")),
    ("guards.cedar", include_str!("../../../policies/guards.cedar")),
    ("handhelds.cedar", include_str!("../../../policies/handhelds.cedar")),
    ("head-ends.cedar", include_str!("../../../policies/head-ends.cedar")),
    ("manufacturers.cedar", include_str!("../../../policies/manufacturers.cedar")),
    ("officers.cedar", include_str!("../../../policies/officers.cedar")),
    ("service-accounts.cedar", include_str!("../../../policies/service-accounts.cedar")),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kms_authz::{
        Action, CosemTarget, DeviceTypeFacts, FrameService, GroupFacts, PolicyDecision, PrincipalFacts, Purpose,
        Resource, ResourceKind,
    };
    use kms_domain::{
        DeviceProfileName, FlagId, GroupId, IslandName, KeyType, MeterClass, MeterStatus, PersonName, PrincipalId,
        Role, WorkOrderTask,
    };

    use super::engine::uid;
    use super::*;

    fn facts(role: Role, name: &str) -> PrincipalFacts {
        PrincipalFacts {
            principal: PrincipalId::new(IslandName::parse("north").unwrap(), role, name).unwrap(),
            revision: 1,
            technician: None,
            assurance: None,
        }
    }

    fn class(status: MeterStatus, head_end: Option<&str>) -> MeterClass {
        MeterClass {
            vendor: FlagId::parse("KAM").unwrap(),
            profile: DeviceProfileName::parse("generic-suite0").unwrap(),
            status,
            groups: vec![GroupId(7)],
            head_end: head_end.map(|name| facts(Role::HeadEnd, name).principal),
        }
    }

    fn session(key_type: KeyType, purpose: Purpose, lifetime_seconds: u32) -> Action {
        Action::OpenSession { key_type, purpose, lifetime_seconds, dedicated_key: false }
    }

    fn from_text(text: &str) -> Result<Policy, PolicyError> {
        from_files(vec![("site.cedar".into(), text.to_owned())], (Quotas::FILE.into(), Quotas::SHIPPED.to_owned()))
    }

    fn frame(service: FrameService, class_id: u16, member: i8, purpose: Purpose) -> Action {
        Action::ProtectFrame {
            service,
            target: Some(CosemTarget { class_id, obis: [0, 0, 96, 3, 10, 255], member }),
            purpose,
        }
    }

    #[test]
    fn the_shipped_policies_decide_as_documented() {
        use PolicyDecision::{Deny, Permit};
        let policy = load(None).unwrap();
        let hes = facts(Role::HeadEnd, "hes-1");
        let (officer, auditor, handheld, vendor) = (
            facts(Role::Officer, "ada"),
            facts(Role::Auditor, "bo"),
            facts(Role::Handheld, "hh-1"),
            facts(Role::Manufacturer, "kam"),
        );
        let own = class(MeterStatus::InService, Some("hes-1"));
        let foreign = class(MeterStatus::InService, Some("hes-2"));
        let unassigned = class(MeterStatus::InService, None);
        let stock = class(MeterStatus::InStock, Some("hes-1"));
        let quarantined = class(MeterStatus::Quarantined, Some("hes-1"));
        let retired = class(MeterStatus::Retired, Some("hes-1"));
        let read = |key_type| session(key_type, Purpose::Read, 900);
        let meters = [
            (&hes, read(KeyType::GUEK), &own, Permit),
            (&hes, read(KeyType::GAK), &own, Permit),
            (&hes, read(KeyType::DEDICATED), &own, Permit),
            (&hes, session(KeyType::GUEK, Purpose::Control, 3_600), &own, Permit),
            (&hes, session(KeyType::GUEK, Purpose::Read, 3_601), &own, Deny),
            (&hes, session(KeyType::GUEK, Purpose::FieldService, 900), &own, Deny),
            (&hes, read(KeyType::KEK), &own, Deny),
            (&hes, read(KeyType::GBEK), &own, Deny),
            (&hes, read(KeyType::LLS_SECRET), &own, Deny),
            (&hes, read(KeyType::GUEK), &foreign, Deny),
            (&hes, read(KeyType::GUEK), &unassigned, Deny),
            (&hes, read(KeyType::GUEK), &stock, Deny),
            (&hes, read(KeyType::GUEK), &quarantined, Deny),
            (&hes, read(KeyType::GUEK), &retired, Deny),
            (&officer, read(KeyType::GUEK), &own, Deny),
            (&auditor, read(KeyType::GUEK), &own, Deny),
            (&handheld, read(KeyType::GUEK), &own, Deny),
            (&vendor, read(KeyType::GUEK), &own, Deny),
            (&hes, frame(FrameService::Get, 3, 2, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Get, 70, 2, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Get, 3, 2, Purpose::Read), &foreign, Deny),
            (&hes, frame(FrameService::Action, 15, 1, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Set, 8, 2, Purpose::Read), &own, Deny),
            (&hes, frame(FrameService::Set, 8, 2, Purpose::Configure), &own, Permit),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Control), &own, Permit),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Control), &stock, Deny),
            (&hes, frame(FrameService::Set, 22, 4, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 64, 2, Purpose::Control), &own, Deny),
            (&hes, frame(FrameService::Action, 64, 2, Purpose::Configure), &own, Permit),
            (&hes, frame(FrameService::Action, 18, 1, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 18, 1, Purpose::Firmware), &own, Permit),
            (&officer, frame(FrameService::Get, 3, 2, Purpose::Read), &own, Deny),
            (
                &hes,
                Action::ProtectFrame { service: FrameService::HlsChallenge, target: None, purpose: Purpose::Read },
                &own,
                Permit,
            ),
            (
                &hes,
                Action::ProtectFrame { service: FrameService::Set, target: None, purpose: Purpose::Read },
                &own,
                Deny,
            ),
            (&hes, Action::UnprotectFrame { purpose: Purpose::Read }, &own, Permit),
            (&hes, Action::UnprotectFrame { purpose: Purpose::Read }, &foreign, Deny),
            (&hes, Action::ShowMeter, &own, Permit),
            (&hes, Action::ShowMeter, &foreign, Deny),
            (&hes, Action::AssignMeters, &own, Deny),
            (&officer, Action::AssignMeters, &unassigned, Permit),
            (&officer, Action::RetireMeters, &own, Permit),
            (&auditor, Action::ShowMeter, &own, Permit),
            (&auditor, Action::RetireMeters, &own, Deny),
            (&handheld, Action::ShowMeter, &own, Deny),
        ];
        for (principal, action, class, expected) in meters {
            assert_eq!(
                policy.permits(principal, &action, &Resource::Meters(class)),
                expected,
                "{} {action} {class:?}",
                principal.principal
            );
        }
        let island = [
            (&hes, Action::ListMeters { own: true }, Permit),
            (&hes, Action::ListMeters { own: false }, Deny),
            (&hes, Action::ListGrants { own: true }, Permit),
            (&hes, Action::ListAuditRecords, Deny),
            (&hes, Action::ListExposures, Deny),
            (&handheld, Action::ListExposures, Deny),
            (&vendor, Action::ListExposures, Deny),
            (&officer, Action::ListExposures, Permit),
            (&auditor, Action::ListExposures, Permit),
            (&hes, Action::AddPrincipal { role: Role::HeadEnd }, Deny),
            (&hes, Action::RenewPrincipal { role: Role::HeadEnd, own: true }, Permit),
            (&hes, Action::RenewPrincipal { role: Role::Officer, own: false }, Deny),
            (&hes, Action::RegisterTransportKey { role: Role::HeadEnd }, Permit),
            (&handheld, Action::RegisterTransportKey { role: Role::Handheld }, Permit),
            (&handheld, Action::ListMeters { own: true }, Deny),
            (&officer, Action::AddPrincipal { role: Role::Officer }, Permit),
            // I6: a person's key is renewed by the person.
            (&officer, Action::RenewPrincipal { role: Role::Officer, own: true }, Permit),
            (&officer, Action::RenewPrincipal { role: Role::Officer, own: false }, Deny),
            (&officer, Action::RenewPrincipal { role: Role::Auditor, own: false }, Deny),
            (&officer, Action::RenewPrincipal { role: Role::HeadEnd, own: false }, Permit),
            (&officer, Action::RecertifyPrincipal { role: Role::Officer, own: false }, Permit),
            (&auditor, Action::RecertifyPrincipal { role: Role::Officer, own: false }, Deny),
            (&officer, Action::EndCertificate { role: Role::HeadEnd, own: false }, Permit),
            (&hes, Action::EndCertificate { role: Role::HeadEnd, own: false }, Deny),
            (&officer, Action::DisablePrincipal { role: Role::HeadEnd, own: false }, Permit),
            (&officer, Action::InventoryHsm, Permit),
            (&officer, Action::InviteHandheld, Permit),
            (&officer, Action::HandOverHandheld, Permit),
            (&officer, Action::WithdrawInvitation, Permit),
            (&officer, Action::ListHandhelds, Permit),
            (&auditor, Action::ListHandhelds, Permit),
            (&auditor, Action::InviteHandheld, Deny),
            (&auditor, Action::HandOverHandheld, Deny),
            (&auditor, Action::WithdrawInvitation, Deny),
            (&handheld, Action::InviteHandheld, Deny),
            (&handheld, Action::ListHandhelds, Deny),
            (&handheld, Action::HandOverHandheld, Deny),
            (&handheld, Action::RenewPrincipal { role: Role::Handheld, own: true }, Permit),
            (&handheld, Action::RenewPrincipal { role: Role::Handheld, own: false }, Deny),
            (&hes, Action::InviteHandheld, Deny),
            (&vendor, Action::InviteHandheld, Deny),
            (&auditor, Action::Scrub, Permit),
            (&auditor, Action::AddPrincipal { role: Role::Auditor }, Deny),
            (&auditor, Action::ImportShipment { own: false }, Deny),
            (&vendor, Action::UploadShipment { own: true }, Permit),
            (&vendor, Action::UploadShipment { own: false }, Deny),
            (&vendor, Action::ImportShipment { own: true }, Deny),
            // The resource must fit the action.
            (&officer, Action::ShowMeter, Deny),
        ];
        for (principal, action, expected) in island {
            assert_eq!(
                policy.permits(principal, &action, &Resource::Island),
                expected,
                "{} {action:?}",
                principal.principal
            );
        }
    }

    fn work(tasks: &[WorkOrderTask], technician: &str, hours: u32) -> Action {
        let technician = PersonName::parse(technician).unwrap();
        Action::CreateWorkOrder { tasks: tasks.iter().copied().collect(), technician, hours }
    }

    /// Every role and every action on work orders: who may, and who may not.
    #[test]
    fn work_orders_are_for_those_who_make_them_and_those_who_do_them() {
        use Action::{CancelWorkOrder, ChangeWorkOrder, CompleteWorkOrder, ListWorkOrders, ShowWorkOrder};
        let policy = load(None).unwrap();
        let class = class(MeterStatus::InService, Some("hes-1"));
        let bools = [false, true];
        for role in Role::ALL {
            let principal = facts(role, "one");
            let permits = |action: Action| policy.permits(&principal, &action, &Resource::Island).is_permit();
            let create = policy.permits(&principal, &work(&WorkOrderTask::ALL, "Ida", 744), &Resource::Meters(&class));
            assert_eq!(create.is_permit(), matches!(role, Role::Officer | Role::ServiceAccount), "{role}");
            for own in bools {
                let of_maker = role == Role::Officer || (role == Role::ServiceAccount && own);
                assert_eq!(permits(ChangeWorkOrder { own }), of_maker, "{role} {own}");
                assert_eq!(permits(CancelWorkOrder { own }), of_maker, "{role} {own}");
                for assigned in bools {
                    let of_technician = role == Role::Handheld && assigned;
                    assert_eq!(permits(CompleteWorkOrder { own, assigned }), of_maker || of_technician, "{role}");
                    let seen = of_maker || of_technician || role == Role::Auditor;
                    assert_eq!(permits(ListWorkOrders { own, assigned }), seen, "{role}");
                    assert_eq!(permits(ShowWorkOrder { own, assigned, place: false }), seen, "{role}");
                    let place = of_maker || of_technician;
                    assert_eq!(permits(ShowWorkOrder { own, assigned, place: true }), place, "{role}");
                }
            }
        }
    }

    #[test]
    fn a_service_account_gets_no_keys_whatever_else_is_permitted() {
        let mut files: Vec<_> = SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect();
        files.push((PathBuf::from("site.cedar"), "permit (principal, action, resource);".to_owned()));
        let policy = from_files(files, (Quotas::FILE.into(), Quotas::SHIPPED.to_owned())).unwrap();
        let account = facts(Role::ServiceAccount, "wfm");
        let own = class(MeterStatus::InService, None);
        let group = GroupFacts { number: 7, name: "north".to_owned(), suite: 0 };
        for action in [
            session(KeyType::GUEK, Purpose::Read, 900),
            frame(FrameService::Get, 3, 2, Purpose::Read),
            Action::UnprotectFrame { purpose: Purpose::Read },
            Action::TransferKey { key_type: KeyType::GUEK, in_frames: true, urgent: false, campaign: true },
            Action::TransferMasterKey { in_frames: true, urgent: false, campaign: true },
            Action::ProbeKeys { campaign: true },
            Action::AttestKey { key_type: KeyType::GUEK },
            Action::WithdrawTransfer { own: true },
            Action::LeaseTasks,
        ] {
            assert!(!policy.permits(&account, &action, &Resource::Meters(&own)).is_permit(), "{action}");
        }
        let broadcast = Action::OpenGroupSession {
            key_type: KeyType::GBEK,
            purpose: Purpose::Read,
            lifetime_seconds: 60,
            named_version: false,
        };
        assert!(!policy.permits(&account, &broadcast, &Resource::Group(&group)).is_permit());
        let transport = Action::RegisterTransportKey { role: Role::ServiceAccount };
        assert!(!policy.permits(&account, &transport, &Resource::Island).is_permit());
        assert!(policy.permits(&account, &Action::ShowMeter, &Resource::Meters(&own)).is_permit(), "it is no key");
        // Its own certificate, as shipped.
        let renew = Action::RenewPrincipal { role: Role::ServiceAccount, own: true };
        assert!(load(None).unwrap().permits(&account, &renew, &Resource::Island).is_permit());
        let officer = facts(Role::Officer, "ada");
        let renew = Action::RenewPrincipal { role: Role::ServiceAccount, own: false };
        assert!(load(None).unwrap().permits(&officer, &renew, &Resource::Island).is_permit());
    }

    /// The examples of policies/README.md.
    #[test]
    fn policies_know_the_tasks_the_technician_and_the_length_of_an_order() {
        let permit = r#"permit (principal is ServiceAccount, action == Action::"createWorkOrder", resource)
            when { !context.tasks.contains("control-supply") && context.hours <= 24 };"#;
        let forbid = r#"forbid (principal, action == Action::"createWorkOrder", resource)
            when { context.tasks.contains("firmware") && !["ida berg", "bo lind"].contains(context.technician) };"#;
        let policy = from_text(&format!("{permit}\n{forbid}")).unwrap();
        let (account, class) = (facts(Role::ServiceAccount, "wfm"), class(MeterStatus::InService, None));
        use WorkOrderTask::{ControlSupply, Firmware, Read};
        for (tasks, technician, hours, expected) in [
            (&[Read][..], "Eve", 24, true),
            (&[Read], "Eve", 25, false),
            (&[Read, ControlSupply], "Ida Berg", 1, false),
            (&[Read, Firmware], "Ida Berg", 1, true),
            // However the name is written: the code sees one person.
            (&[Read, Firmware], "ida  BERG", 1, true),
            (&[Read, Firmware], "Eve", 1, false),
        ] {
            let decision = policy.permits(&account, &work(tasks, technician, hours), &Resource::Meters(&class));
            assert_eq!(decision.is_permit(), expected, "{tasks:?} {technician} {hours}");
        }
    }

    #[test]
    fn i8_a_forbid_that_fails_denies_although_a_permit_stands_beside_it() {
        let permit = r#"permit (principal is HeadEnd, action == Action::"openSession", resource);"#;
        // Strict validation cannot see an overflow.
        let forbid = r#"forbid (principal, action == Action::"openSession", resource) when { context.lifetime_seconds * 9223372036854775807 > 0 };"#;
        let load = |text: &str| from_text(text).unwrap();
        let own = class(MeterStatus::InService, Some("hes-1"));
        let (principal, action, resource) =
            (facts(Role::HeadEnd, "hes-1"), session(KeyType::GUEK, Purpose::Read, 900), Resource::Meters(&own));
        assert_eq!(load(permit).permits(&principal, &action, &resource), PolicyDecision::Permit);
        let both = load(&format!("{permit}\n{forbid}"));
        assert_eq!(both.permits(&principal, &action, &resource), PolicyDecision::Deny);
        // Remembered as a denial too.
        assert_eq!(both.permits(&principal, &action, &resource), PolicyDecision::Deny);
    }

    #[test]
    fn a_mistake_is_reported_with_file_line_and_column() {
        let mistakes = [
            ("permit (principal, action, resource)\nwhen { resource.statuss == \"x\" };", 2, 8),
            ("\n\npermit (principal, action == Action::\"openSesion\", resource);", 3, 30),
            ("permit (principal, action, resource) when {", 1, 44),
            (
                "permit (principal, action == Action::\"openSession\", resource)\nwhen { context.lifetime_seconds <= \"1\" };",
                2,
                36,
            ),
        ];
        for (text, line, column) in mistakes {
            match from_text(text) {
                Err(PolicyError::Invalid { path, line: found_line, column: found_column, reason }) => {
                    assert_eq!(
                        (path.as_path(), found_line, found_column),
                        (Path::new("site.cedar"), line, column),
                        "{reason}"
                    );
                }
                other => panic!("{text}: {:?}", other.err()),
            }
        }
    }

    #[test]
    fn a_directory_replaces_the_shipped_policies() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(load(Some(directory.path())), Err(PolicyError::Read { .. })), "an empty directory is refused");
        std::fs::write(
            directory.path().join("a.cedar"),
            "permit (principal is Auditor, action == Action::\"scrub\", resource);",
        )
        .unwrap();
        let policy = load(Some(directory.path())).unwrap();
        assert!(policy.permits(&facts(Role::Auditor, "bo"), &Action::Scrub, &Resource::Island).is_permit());
        assert!(!policy.permits(&facts(Role::Officer, "ada"), &Action::Scrub, &Resource::Island).is_permit());
        assert_ne!(policy.digest(), load(None).unwrap().digest());
        // A folder may have quotas of its own.
        std::fs::write(
            directory.path().join(Quotas::FILE),
            Quotas::SHIPPED.replace("commands = 200,", "commands = 300,"),
        )
        .unwrap();
        assert_ne!(load(Some(directory.path())).unwrap().digest(), policy.digest());
        std::fs::write(directory.path().join(Quotas::FILE), "\nquota = 7").unwrap();
        assert!(matches!(load(Some(directory.path())), Err(PolicyError::Quotas { line: 2, .. })));
        std::fs::remove_file(directory.path().join(Quotas::FILE)).unwrap();
        std::fs::write(directory.path().join("b.cedar"), "permit (principal == ?principal, action, resource);")
            .unwrap();
        assert!(matches!(load(Some(directory.path())), Err(PolicyError::Template { .. })));
    }

    #[test]
    fn keys_of_groups_and_device_types_are_decided_on_by_themselves() {
        use PolicyDecision::{Deny, Permit};
        let shipped = load(None).unwrap();
        let group = GroupFacts { number: 7, name: "north".to_owned(), suite: 0 };
        let other = GroupFacts { number: 8, ..group.clone() };
        let device_type = DeviceTypeFacts {
            name: "meter-1".to_owned(),
            manufacturer: "KAM".to_owned(),
            device_profile: "gateway-suite0".to_owned(),
        };
        let broadcast = |key_type, purpose, lifetime_seconds| Action::OpenGroupSession {
            key_type,
            purpose,
            lifetime_seconds,
            named_version: false,
        };
        let create = Action::CreateGroupKey { key_type: KeyType::GBEK, held_by_meters: false };
        let create_firmware = Action::CreateDeviceTypeKey { key_type: KeyType::FIRMWARE, held_by_meters: true };
        let (hes, officer, auditor) =
            (facts(Role::HeadEnd, "hes-1"), facts(Role::Officer, "ada"), facts(Role::Auditor, "bo"));
        // I8: nobody gets a group's key as shipped, also not for a meter of the group.
        for principal in [&hes, &officer, &auditor] {
            assert_eq!(
                shipped.permits(principal, &broadcast(KeyType::GBEK, Purpose::Read, 900), &Resource::Group(&group)),
                Deny
            );
        }
        assert_eq!(shipped.permits(&officer, &create, &Resource::Group(&group)), Permit);
        assert_eq!(shipped.permits(&officer, &create, &Resource::Island), Deny, "the wrong resource");
        assert_eq!(shipped.permits(&officer, &create_firmware, &Resource::DeviceType(&device_type)), Permit);
        assert_eq!(shipped.permits(&officer, &Action::AddDeviceType, &Resource::DeviceType(&device_type)), Permit);
        for principal in [&hes, &auditor] {
            assert_eq!(shipped.permits(principal, &create, &Resource::Group(&group)), Deny);
            assert_eq!(shipped.permits(principal, &create_firmware, &Resource::DeviceType(&device_type)), Deny);
        }
        assert_eq!(shipped.permits(&auditor, &Action::ListGroups, &Resource::Island), Permit);

        // One head-end, one group; and the guards hold whatever else is permitted.
        let mut files: Vec<_> = SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect();
        let all = "permit (principal, action == Action::\"openGroupSession\", resource == MeterGroup::\"7\");";
        files.push((PathBuf::from("site.cedar"), all.to_owned()));
        let policy = from_files(files, (Quotas::FILE.into(), Quotas::SHIPPED.to_owned())).unwrap();
        let of = |principal: &PrincipalFacts, key_type, lifetime, group| {
            policy.permits(principal, &broadcast(key_type, Purpose::Configure, lifetime), &Resource::Group(group))
        };
        assert_eq!(of(&hes, KeyType::GBEK, 900, &group), Permit);
        assert_eq!(of(&hes, KeyType::GBEK, 900, &other), Deny);
        assert_eq!(of(&hes, KeyType::KEK, 900, &group), Deny);
        assert_eq!(of(&hes, KeyType::GBEK, 86_401, &group), Deny);
        assert_eq!(of(&officer, KeyType::GBEK, 900, &group), Deny);
    }

    #[test]
    fn policies_know_who_carries_a_handheld_and_where_its_keys_are() {
        use kms_domain::{Assurance, Principal, PrincipalStatus, UnixMillis};
        let policy = from_text(
            "permit (principal is Handheld, action == Action::\"listMeters\", resource)\n\
             when { principal has assurance && principal.assurance == \"hardware\" \
             && principal has technician && principal.technician == \"tom field\" };",
        )
        .unwrap();
        let decides = |technician: Option<&str>, assurance, revision| {
            let facts = kms_authz::facts(&Principal {
                id: facts(Role::Handheld, "h-17").principal,
                revision,
                status: PrincipalStatus::Enabled,
                certificates: Vec::new(),
                transport: None,
                client_titles: Vec::new(),
                person: technician.map(|name| PersonName::parse(name).unwrap()),
                assurance,
                shipment_key: None,
                added: UnixMillis(1),
            });
            policy.permits(&facts, &Action::ListMeters { own: true }, &Resource::Island).is_permit()
        };
        assert!(decides(Some("Tom Field"), Some(Assurance::Hardware), 1));
        assert!(decides(Some("TOM  field"), Some(Assurance::Hardware), 5));
        assert!(!decides(Some("Tom Field"), Some(Assurance::Software), 2));
        assert!(!decides(Some("Una Field"), Some(Assurance::Hardware), 3));
        // Registered without an enrolment: it has neither, and the policy does not fail.
        assert!(!decides(None, None, 4));
        // Nobody else has them: such a policy is refused when it is loaded.
        let wrong = "permit (principal is HeadEnd, action, resource) when { principal.assurance == \"hardware\" };";
        assert!(from_text(wrong).is_err());
    }

    #[test]
    fn every_action_stands_in_schema_policies_and_documentation() {
        let (schema, _) = Schema::from_cedarschema_str(SCHEMA).unwrap();
        let names: BTreeSet<&str> = Action::ALL.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), Action::ALL.len());
        let in_schema: BTreeSet<&str> = schema.actions().map(|action| action.id().unescaped()).collect();
        assert_eq!(names, in_schema);
        let policies: String = SHIPPED.iter().map(|(_, text)| *text).collect();
        let documentation = include_str!("../../../policies/README.md");
        for (name, on) in Action::ALL {
            let wanted = match on {
                ResourceKind::Island => "Island",
                ResourceKind::Meters => "MeterClass",
                ResourceKind::Group => "MeterGroup",
                ResourceKind::DeviceType => "DeviceType",
            };
            let resources = schema.resources_for_action(&uid("Action", name).unwrap()).unwrap();
            assert_eq!(resources.map(ToString::to_string).collect::<Vec<_>>(), [wanted], "{name}");
            // Whether the word of a head-end is a proof is for each utility to decide.
            let shipped = policies.contains(&format!("Action::\"{name}\""));
            assert!(shipped || *name == "attestKey", "no shipped policy says who may {name}");
            assert!(documentation.contains(&format!("`{name}`")), "policies/README.md lacks `{name}`");
        }
    }

    #[test]
    fn every_shipped_file_is_embedded() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../policies");
        let embedded: Vec<_> = SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect();
        assert_eq!(read_directory(&directory).unwrap(), embedded);
    }

    #[test]
    fn remembered_decisions_are_told_apart() {
        let policy = load(None).unwrap();
        let own = class(MeterStatus::InService, Some("hes-1"));
        for lifetime in 0..40 {
            for _ in 0..2 {
                let expected = if lifetime <= 30 { PolicyDecision::Permit } else { PolicyDecision::Deny };
                let action = session(KeyType::GUEK, Purpose::Read, lifetime * 120);
                assert_eq!(policy.permits(&facts(Role::HeadEnd, "hes-1"), &action, &Resource::Meters(&own)), expected);
            }
        }
    }
}
