//! Changes which meters are members of a group.

use async_recursion::async_recursion as boxed;
use kms_domain::{ExposureReason, MeterStatus, SystemTitle};
use kms_proto::v1::{self, MembershipChange};
use kms_store::{Reads, RowKind};

use super::{About, CHUNK, ChunkOutcome, Code, MeterChunk, MeterService, NOT_PERMITTED, Request, change::record};
use crate::keys::exposure::expose_to_former_member;
use kms_authz::facts;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, Permit, View};

/// A change of membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// The meters become members.
    Add,
    /// The meters leave the group.
    Remove,
    /// The meters leave the group because they are compromised.
    RemoveCompromised,
}

impl Membership {
    /// What the contract asks for.
    ///
    /// # Errors
    /// The number is unspecified or unknown.
    pub fn from_proto(number: i32) -> Result<Self, ServiceError> {
        match MembershipChange::try_from(number) {
            Ok(MembershipChange::Add) => Ok(Self::Add),
            Ok(MembershipChange::Remove) => Ok(Self::Remove),
            Ok(MembershipChange::RemoveCompromised) => Ok(Self::RemoveCompromised),
            _ => Err(ServiceError::invalid("change", "neither ADD, REMOVE nor REMOVE_COMPROMISED")),
        }
    }

    const fn record(self) -> &'static str {
        match self {
            Self::Add => "group-joined",
            Self::Remove => "group-left",
            Self::RemoveCompromised => "group-left-compromised",
        }
    }
}

impl MeterService {
    /// Adds meters to a group, or removes them. A new member gets the group's key by a transfer. A
    /// removed meter may keep the key that it holds, so the key is exposed and must be rotated.
    ///
    /// # Errors
    /// Not permitted, a request id that was used for another request, or the database cannot be
    /// reached. Errors of single meters are in the answer.
    #[boxed]
    pub async fn change_members(
        &self,
        caller: &Caller,
        request: Request,
        group: &str,
        meters: Vec<SystemTitle>,
        change: Membership,
        reason: String,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        let action = Action::ChangeGroupMembers { add: change == Membership::Add };
        let principal = facts(&*self.island.principal(caller).await?);
        let policy = self.island.policy.load_full();
        let id = self.groups.find(&self.island, group).await?.ok_or_else(|| {
            let lists = policy.permits(&principal, &Action::ListGroups, &Resource::Island).is_permit();
            if lists {
                ServiceError::NotFound { what: format!("group `{group}`") }
            } else {
                ServiceError::denied(action.to_string())
            }
        })?;
        let mut response = v1::ChangeMetersResponse::default();
        for (index, titles) in (0..).zip(meters.chunks(CHUNK).map(<[SystemTitle]>::to_vec)) {
            let (reason, denied) = (reason.clone(), action.to_string());
            let reads = Reads {
                meters: titles.clone(),
                sealed: vec![(RowKind::Group, id.0.to_be_bytes().to_vec())],
                ..Reads::default()
            };
            let act = MeterChunk {
                about: About::Group(id),
                action: action.clone(),
                reads,
                change: move |view: &mut View<'_, '_>, _: &Permit| {
                    let group = view.group(id)?.ok_or_else(|| ServiceError::denied(denied.clone()))?;
                    let mut outcome = ChunkOutcome::default();
                    let mut changed = Vec::new();
                    for title in &titles {
                        // An error means that the row does not verify and counts as absent (I5), or
                        // that it is read for the next attempt.
                        let Some(meter) = view.meter(*title).ok().flatten() else {
                            view.refuse("not permitted for a meter of the request".to_owned());
                            outcome.problem(*title, Code::NotPermitted, NOT_PERMITTED);
                            continue;
                        };
                        let mut meter = (*meter).clone();
                        if meter.class.status == MeterStatus::Retired {
                            outcome.problem(*title, Code::Status, "it is retired");
                            continue;
                        }
                        if change == Membership::Add && meter.suite != group.suite {
                            outcome.problem(*title, Code::Group, "the group is for meters of another security suite");
                            continue;
                        }
                        if change == Membership::Add && meter.class.groups.len() >= MOST_GROUPS {
                            outcome.problem(
                                *title,
                                Code::Group,
                                format!("it is already in {MOST_GROUPS} groups, the most that a meter may be in"),
                            );
                            continue;
                        }
                        if !meter.set_member(id, change == Membership::Add) {
                            outcome.unchanged += 1;
                            continue;
                        }
                        match change {
                            Membership::Add => {}
                            Membership::Remove => {
                                expose_to_former_member(view, &meter, &[id], ExposureReason::MemberLeft)?
                            }
                            Membership::RemoveCompromised => {
                                expose_to_former_member(view, &meter, &[id], ExposureReason::MemberCompromised)?
                            }
                        }
                        changed.push(*title);
                        view.put_meter(meter, true)?;
                    }
                    let entry =
                        record(view, &mut outcome, change.record(), &changed, group.name.clone(), reason.clone());
                    Ok(Decision::of(entry, outcome))
                },
            };
            let outcome = self.island.door.act(caller, request.chunk(index), act).await?.value;
            outcome.add_to(&mut response);
        }
        Ok(response)
    }
}

/// The most groups of a meter.
const MOST_GROUPS: usize = 16;
