//! Quotas on critical commands (`policies/quotas.toml`). Commands that policies permit are counted,
//! so that a compromised head-end cannot have the server protect commands that switch off a city.

use kms_domain::{PrincipalId, QuotaLimit, QuotaName, Role};
use serde::Deserialize;
use toml::Spanned;

use crate::{CosemTarget, Criticality, FrameService};

/// The quotas of a server, read at start.
#[derive(Clone, Debug)]
pub struct Quotas(Vec<Quota>);

/// One quota: what it counts, and the limit for each role or principal.
#[derive(Clone, Debug)]
pub struct Quota {
    /// Its name.
    pub name: QuotaName,
    counts: Counts,
    limits: Vec<(Holder, QuotaLimit)>,
}

#[derive(Clone, Debug)]
enum Counts {
    /// Everything of this criticality.
    Criticality(Criticality),
    /// These services on members of a class; `None`: all members.
    Class { class_id: u16, members: Option<Vec<i8>>, set: bool, action: bool },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Holder {
    Role(Role),
    Principal(PrincipalId),
}

impl Quotas {
    /// The name of the file in a folder of policies.
    pub const FILE: &str = "quotas.toml";

    /// The quotas that the server ships with.
    pub const SHIPPED: &str = include_str!("../../../policies/quotas.toml");

    /// Reads the text of a file.
    ///
    /// # Errors
    /// The text is not TOML; a field is unknown, missing or out of range; two quotas have one name;
    /// or no quota counts a criticality. The error names the line.
    pub fn parse(text: &str) -> Result<Self, QuotaError> {
        let line_of = |at: usize| text.get(..at).unwrap_or_default().matches('\n').count() + 1;
        let file: QuotaFile = toml::from_str(text).map_err(|error| QuotaError {
            line: error.span().map_or(1, |span| line_of(span.start)),
            reason: error.message().to_owned(),
        })?;
        let mut quotas: Vec<Quota> = Vec::new();
        for section in file.quota {
            let line = line_of(section.span().start);
            let quota = section.into_inner().into_quota().map_err(|reason| QuotaError { line, reason })?;
            if quotas.iter().any(|known| known.name == quota.name) {
                return Err(QuotaError { line, reason: format!("there are two quotas of the name `{}`", quota.name) });
            }
            quotas.push(quota);
        }
        if quotas.len() > MOST_QUOTAS {
            return Err(QuotaError {
                line: 1,
                reason: format!("{} quotas instead of at most {MOST_QUOTAS}", quotas.len()),
            });
        }
        // I8: a criticality that no quota counts would have no limit.
        for criticality in Criticality::CRITICAL {
            if !quotas
                .iter()
                .any(|quota| matches!(quota.counts, Counts::Criticality(counted) if counted == criticality))
            {
                let reason = format!(
                    "no quota counts the criticality `{}`; add one, without `limit` entries if nobody shall have any",
                    criticality.name()
                );
                return Err(QuotaError { line: 1, reason });
            }
        }
        Ok(Self(quotas))
    }

    /// The quotas that count this service on this object.
    pub fn of(&self, service: FrameService, target: CosemTarget) -> impl Iterator<Item = &Quota> {
        self.0.iter().filter(move |quota| quota.counts.matches(service, target))
    }
}

impl Quota {
    /// The limit of a principal: its own, or that of its role. I8: without either it gets nothing.
    pub fn limit(&self, principal: &PrincipalId) -> QuotaLimit {
        let of = |wanted: &Holder| self.limits.iter().find(|(holder, _)| holder == wanted).map(|(_, limit)| *limit);
        of(&Holder::Principal(principal.clone()))
            .or_else(|| of(&Holder::Role(principal.role())))
            .unwrap_or(QuotaLimit::NONE)
    }
}

impl Counts {
    fn matches(&self, service: FrameService, target: CosemTarget) -> bool {
        match self {
            Self::Criticality(criticality) => Criticality::of(service, Some(&target)) == *criticality,
            Self::Class { class_id, members, set, action } => {
                let counted = match service {
                    FrameService::Set => *set,
                    FrameService::Action => *action,
                    FrameService::Get | FrameService::Initiate | FrameService::HlsChallenge => false,
                };
                counted
                    && target.class_id == *class_id
                    && members.as_ref().is_none_or(|members| members.contains(&target.member))
            }
        }
    }
}

/// Why quotas cannot be used. The server does not start with such quotas.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct QuotaError {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuotaFile {
    quota: Vec<Spanned<QuotaSection>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuotaSection {
    name: String,
    criticality: Option<String>,
    class_id: Option<u16>,
    members: Option<Vec<i8>>,
    services: Option<Vec<CountedService>>,
    #[serde(default)]
    limit: Vec<LimitSection>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CountedService {
    Set,
    Action,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitSection {
    role: Option<String>,
    principal: Option<String>,
    commands: u32,
    meters: Option<u16>,
}

impl QuotaSection {
    fn into_quota(self) -> Result<Quota, String> {
        let name = QuotaName::parse(&self.name).map_err(|error| error.to_string())?;
        let counts = match (self.criticality, self.class_id, self.members, self.services) {
            (Some(text), None, None, None) => {
                let criticality = Criticality::CRITICAL
                    .into_iter()
                    .find(|criticality| criticality.name() == text)
                    .ok_or_else(|| {
                        format!(
                            "criticality: `{text}` is not one of {}",
                            Criticality::CRITICAL.map(Criticality::name).join(", ")
                        )
                    })?;
                Counts::Criticality(criticality)
            }
            (None, Some(class_id), members, services) => {
                if members.as_ref().is_some_and(Vec::is_empty) || services.as_ref().is_some_and(Vec::is_empty) {
                    return Err("members, services: an empty list counts nothing; leave it out to count all".to_owned());
                }
                let counts = |service| services.as_ref().is_none_or(|services| services.contains(&service));
                Counts::Class {
                    class_id,
                    members,
                    set: counts(CountedService::Set),
                    action: counts(CountedService::Action),
                }
            }
            _ => {
                return Err(
                    "either `criticality` is given, or `class_id`, which may have `members` and `services` beside it"
                        .to_owned(),
                );
            }
        };
        let mut limits = Vec::with_capacity(self.limit.len());
        for section in self.limit {
            let (holder, limit) = section.into_limit()?;
            if limits.iter().any(|(known, _)| *known == holder) {
                return Err("limit: a role or principal has two".to_owned());
            }
            limits.push((holder, limit));
        }
        Ok(Quota { name, counts, limits })
    }
}

impl LimitSection {
    fn into_limit(self) -> Result<(Holder, QuotaLimit), String> {
        let holder = match (self.role, self.principal) {
            (Some(role), None) => Role::parse(&role).map(Holder::Role),
            (None, Some(principal)) => PrincipalId::parse(&principal).map(Holder::Principal),
            _ => return Err("limit: it is for either a `role` or a `principal`".to_owned()),
        };
        let holder = holder.map_err(|error| format!("limit: {error}"))?;
        Ok((holder, QuotaLimit::new(self.commands, self.meters).map_err(|error| format!("limit: {error}"))?))
    }
}

/// Each quota in use adds to a principal's sealed row.
const MOST_QUOTAS: usize = 32;

#[cfg(test)]
mod tests {
    use kms_domain::IslandName;

    use super::*;

    fn principal(role: Role, name: &str) -> PrincipalId {
        PrincipalId::new(IslandName::parse("north").unwrap(), role, name).unwrap()
    }

    fn names(quotas: &Quotas, service: FrameService, class_id: u16, member: i8) -> Vec<String> {
        quotas
            .of(service, CosemTarget { class_id, obis: [0, 0, 96, 3, 10, 255], member })
            .map(|quota| quota.name.to_string())
            .collect()
    }

    /// Like the shipped ones, with more behind them.
    fn with(more: &str) -> Result<Quotas, QuotaError> {
        Quotas::parse(&format!("{}\n{more}", Quotas::SHIPPED))
    }

    #[test]
    fn the_shipped_quotas_count_what_can_harm() {
        let quotas = Quotas::parse(Quotas::SHIPPED).unwrap();
        assert_eq!(names(&quotas, FrameService::Action, 70, 1), ["supply-control"]);
        assert_eq!(names(&quotas, FrameService::Action, 64, 2), ["security-setup"]);
        assert_eq!(names(&quotas, FrameService::Action, 18, 2), ["image-transfer"]);
        assert_eq!(names(&quotas, FrameService::Action, 18, 4), ["image-transfer", "image-activate"]);
        assert!(names(&quotas, FrameService::Get, 70, 2).is_empty());
        assert!(names(&quotas, FrameService::Action, 15, 1).is_empty());
        let disconnect =
            quotas.of(FrameService::Action, CosemTarget { class_id: 70, obis: [0; 6], member: 1 }).next().unwrap();
        assert_eq!(disconnect.limit(&principal(Role::HeadEnd, "hes-1")).commands(), 200);
        assert_eq!(disconnect.limit(&principal(Role::Handheld, "hh-1")), QuotaLimit::NONE, "I8");
    }

    #[test]
    fn operators_add_quotas_and_limits() {
        let quotas = with(
            r#"
            [[quota]]
            name = "clock"
            class_id = 8
            services = ["set"]
            members = [2]
            limit = [{ role = "head-end", commands = 5 }, { principal = "urn:meterkms:north:head-end:hes-2", commands = 50, meters = 7 }]
            "#,
        )
        .unwrap();
        assert_eq!(names(&quotas, FrameService::Set, 8, 2), ["clock"]);
        assert!(
            names(&quotas, FrameService::Set, 8, 3).is_empty() && names(&quotas, FrameService::Action, 8, 2).is_empty()
        );
        let clock = quotas.of(FrameService::Set, CosemTarget { class_id: 8, obis: [0; 6], member: 2 }).next().unwrap();
        assert_eq!(clock.limit(&principal(Role::HeadEnd, "hes-1")), QuotaLimit::new(5, None).unwrap());
        assert_eq!(clock.limit(&principal(Role::HeadEnd, "hes-2")), QuotaLimit::new(50, Some(7)).unwrap());
    }

    #[test]
    fn every_field_of_the_file_changes_what_is_counted() {
        const BASE: &str = "[[quota]]\nname = \"clock\"\nclass_id = 8\nservices = [\"set\"]\nmembers = [2]\n\
            limit = [{ role = \"head-end\", commands = 5, meters = 3 }]\n\
            [[quota]]\nname = \"all\"\ncriticality = \"supply-control\"\nlimit = [{ principal = \"urn:meterkms:north:head-end:hes-1\", commands = 9 }]";
        // What is counted, and for whom how much.
        let seen = |text: &str| {
            let quotas = with(text).unwrap();
            let mut seen = Vec::new();
            for (class_id, member) in [(8, 2), (8, 3), (9, 2), (70, 1), (64, 2)] {
                for service in [FrameService::Set, FrameService::Action] {
                    for quota in quotas
                        .of(service, CosemTarget { class_id, obis: [0, 0, 96, 3, 10, 255], member })
                        .filter(|quota| ["clock", "watch", "all"].contains(&quota.name.as_str()))
                    {
                        for holder in [
                            principal(Role::HeadEnd, "hes-1"),
                            principal(Role::HeadEnd, "hes-2"),
                            principal(Role::Handheld, "hh-1"),
                        ] {
                            seen.push((class_id, member, service.name(), quota.name.to_string(), quota.limit(&holder)));
                        }
                    }
                }
            }
            seen
        };
        let mut changed = std::collections::BTreeSet::new();
        for (field, from, to) in [
            ("name", "clock", "watch"),
            ("class_id", "class_id = 8", "class_id = 9"),
            ("services", "[\"set\"]", "[\"action\"]"),
            ("members", "[2]", "[3]"),
            ("criticality", "supply-control", "security-setup"),
            ("role", "role = \"head-end\"", "role = \"handheld\""),
            ("principal", "hes-1", "hes-2"),
            ("commands", "commands = 5", "commands = 6"),
            ("meters", "meters = 3", "meters = 4"),
            ("limit", "limit = [{ role = \"head-end\", commands = 5, meters = 3 }]", ""),
        ] {
            assert_ne!(seen(BASE), seen(&BASE.replacen(from, to, 1)), "{field}");
            changed.insert(field);
        }
        // The parser names the fields that it takes when it refuses another one.
        let accepted = |text: &str| {
            let reason = with(text).unwrap_err().reason;
            reason
                .split('`')
                .skip(1)
                .step_by(2)
                .map(ToOwned::to_owned)
                .filter(|field| field != "unknown")
                .collect::<Vec<String>>()
        };
        let taken = [
            accepted("[[quota]]\nunknown = 1\nname = \"a\""),
            accepted("[[quota]]\nname = \"a\"\nlimit = [{ unknown = 1 }]"),
        ]
        .concat();
        assert_eq!(taken.iter().map(String::as_str).collect::<std::collections::BTreeSet<_>>(), changed);
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        let lines = Quotas::SHIPPED.lines().count() + 1;
        for (more, reason) in [
            ("[[quota]]\nname = \"a\"", "either `criticality`"),
            ("[[quota]]\nname = \"a\"\ncriticality = \"ordinary\"", "`ordinary` is not one of"),
            ("[[quota]]\nname = \"a\"\nclass_id = 8\nmembers = []", "an empty list"),
            ("[[quota]]\nname = \"supply-control\"\nclass_id = 8", "two quotas"),
            ("[[quota]]\nname = \"a\"\nclass_id = 8\nlimit = [{ commands = 5 }]", "either a `role`"),
            ("[[quota]]\nname = \"a\"\nclass_id = 8\nlimit = [{ role = \"head-end\", commands = 0 }]", "`0` is not"),
            ("[[quota]]\nname = \"a\"\nclass_id = 8\nlimit = [{ role = \"hacker\", commands = 5 }]", "role"),
            ("[[quota]]\nname = \"a\"\nclass_id = 8\nper_day = 5", "per_day"),
        ] {
            let error = with(more).unwrap_err();
            assert!(error.reason.contains(reason) && (lines..=lines + 4).contains(&error.line), "{more}: {error}");
        }
        assert!(Quotas::parse("quota = []").unwrap_err().reason.contains("no quota counts"), "I8");
        assert!(Quotas::parse("").is_err());
    }
}
