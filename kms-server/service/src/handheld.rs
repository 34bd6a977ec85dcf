//! Handhelds: invited, handed over and listed by officers. The device itself answers an invitation
//! ([`enrol`]).
//!
//! One handheld serves one technician at a time. The keys of a device are encrypted under the PIN
//! of its technician, who could have copied them, so a hand-over ends these keys: the device is
//! enrolled again, with keys that the next technician's PIN protects.

pub mod enrol;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_recursion::async_recursion as boxed;
use bytes::Bytes;
use kms_domain::{
    CodeId, Invitation, InvitationEnd, InvitationState, Occasion, PersonName, Principal, PrincipalId, PrincipalStatus,
    Role, SystemTitle, UnixMillis,
};
use kms_proto::v1::{self, HandheldHandedOver, HandheldInvited, InvitationWithdrawn, audit_record::Event};
use kms_store::{Reads, RowKind};

use crate::Request;
use crate::certificate::CertificateAuthority;
use crate::island::IslandContext;
use crate::principal::everyone::{Everyone, MOST_AT_ONCE, parse_name, refuse_shared_titles};
use crate::principal::{enabled, to_proto};
use kms_authz::{Action, Caller, Resource};
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Permit, Remembered, View, invitation_row, principal_row};

/// Handhelds of an island.
pub struct HandheldService {
    island: Arc<IslandContext>,
    /// The island's root certificate, which codes name.
    root: Bytes,
}

/// An invitation to make.
#[derive(Clone, Debug)]
pub struct NewInvitation {
    /// The handheld.
    pub handheld: PrincipalId,
    /// The person who will carry it.
    pub technician: PersonName,
    /// The public part of the code.
    pub code_id: CodeId,
    /// The digest of the code.
    pub code_sha256: [u8; 32],
    /// How long the code is accepted; `None`: as long as the bound permits.
    pub lifetime_seconds: Option<u32>,
    /// Client system titles that it may use. Of a hand-over: none, the handheld keeps its own.
    pub client_titles: Vec<SystemTitle>,
}

impl HandheldService {
    /// The use cases for an island with this authority.
    pub fn new(island: Arc<IslandContext>, authority: &CertificateAuthority) -> Self {
        Self { island, root: Bytes::copy_from_slice(authority.certificate()) }
    }

    /// The island.
    pub const fn island(&self) -> &Arc<IslandContext> {
        &self.island
    }

    /// Invites a device to be enrolled as a new handheld.
    ///
    /// # Errors
    /// Not permitted; the name is taken, or has an invitation that is pending; a client title is
    /// another's or a meter's; the lifetime is too long; or a failure of the database.
    #[boxed]
    pub async fn invite(
        &self,
        caller: &Caller,
        request: Request,
        new: NewInvitation,
    ) -> Result<v1::Invitation, ServiceError> {
        self.island.require(caller, &Action::InviteHandheld).await?;
        let lifetime = self.lifetime(new.lifetime_seconds)?;
        let answer = Everyone::consistently(&self.island, |everyone| {
            let (invite, door) = (Invite { new: new.clone(), lifetime, everyone }, &self.island.door);
            async move { Ok(door.act(caller, request, invite).await?.value) }
        });
        Ok(v1::Invitation { root_certificate: self.root.clone(), ..answer.await? })
    }

    /// Ends all keys of a handheld, and invites it again, for this technician.
    ///
    /// # Errors
    /// Not permitted; no such handheld, or a disabled one; the lifetime is too long; or a failure
    /// of the database.
    #[boxed]
    pub async fn hand_over(
        &self,
        caller: &Caller,
        request: Request,
        new: NewInvitation,
    ) -> Result<v1::Invitation, ServiceError> {
        self.island.require(caller, &Action::HandOverHandheld).await?;
        let lifetime = self.lifetime(new.lifetime_seconds)?;
        let answer = self.island.door.act(caller, request, HandOver { new, lifetime }).await?.value;
        Ok(v1::Invitation { root_certificate: self.root.clone(), ..answer })
    }

    /// Ends an invitation that nobody has used.
    ///
    /// # Errors
    /// Not permitted; no invitation, or one that has ended; or a failure of the database.
    #[boxed]
    pub async fn withdraw(
        &self,
        caller: &Caller,
        request: Request,
        handheld: PrincipalId,
        reason: String,
    ) -> Result<v1::Invitation, ServiceError> {
        Ok(self.island.door.act(caller, request, Withdraw { handheld, reason }).await?.value)
    }

    /// All handhelds and their last invitations, in the order of their names. A handheld with a row
    /// that does not verify (I5) is named as such, without what that row says.
    ///
    /// # Errors
    /// Not permitted, or a failure of the database.
    #[boxed]
    pub async fn list(&self, caller: &Caller) -> Result<Vec<v1::Handheld>, ServiceError> {
        self.island.require(caller, &Action::ListHandhelds).await?;
        let now = IslandContext::now();
        let mut handhelds: BTreeMap<PrincipalId, v1::Handheld> = BTreeMap::new();
        for kind in [RowKind::Principal, RowKind::Invitation] {
            let mut after: Option<Vec<u8>> = None;
            loop {
                let page = self.island.store.sealed_page(kind, after.as_deref(), MOST_AT_ONCE).await?;
                let Some((last, _)) = page.last() else { break };
                after = Some(last.clone());
                for (name, row) in &page {
                    // The scrubber reports a row that has no name.
                    let Some(id) = parse_name(name).ok().filter(|id| id.role() == Role::Handheld) else { continue };
                    let shown = handhelds
                        .entry(id.clone())
                        .or_insert_with(|| v1::Handheld { handheld: id.to_string(), ..v1::Handheld::default() });
                    let committer = &self.island.committer;
                    let readable = if kind == RowKind::Principal {
                        shown.principal = committer.open_principal(&id, row).ok().map(|principal| to_proto(&principal));
                        shown.principal.is_some()
                    } else {
                        shown.invitation = committer.open_invitation(&id, row).ok().map(|row| message(&row, now));
                        shown.invitation.is_some()
                    };
                    shown.unreadable |= !readable;
                }
            }
        }
        Ok(handhelds.into_values().collect())
    }

    /// The lifetime of a code in milliseconds.
    fn lifetime(&self, seconds: Option<u32>) -> Result<i64, ServiceError> {
        let most = self.island.limits.of(Bound::InvitationMinutes).saturating_mul(60);
        let seconds = seconds.map_or(most, u64::from);
        if seconds > most {
            return Err(ServiceError::invalid(
                "lifetime_seconds",
                format!("{seconds} s, and the bound `{}` is {most} s", Bound::InvitationMinutes.name()),
            ));
        }
        Ok(i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000))
    }
}

struct Invite {
    new: NewInvitation,
    lifetime: i64,
    everyone: Everyone,
}

impl Act for Invite {
    type Answer = v1::Invitation;
    type Past = Remembered<v1::Invitation>;

    fn name(&self) -> &'static str {
        Action::InviteHandheld.name()
    }

    fn reads(&self) -> Reads {
        let mut reads = self.everyone.reads();
        reads.sealed.extend([principal_row(&self.new.handheld), invitation_row(&self.new.handheld)]);
        reads.meters.extend(&self.new.client_titles);
        reads
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::InviteHandheld, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Invitation>, ServiceError> {
        let id = &self.new.handheld;
        if let Some(existing) = view.principal(id)? {
            return Err(name_is_taken(&existing));
        }
        if let Some(earlier) = view.invitation(id)? {
            refuse_pending(&earlier, view.now())?;
        }
        refuse_titles_of_meters(view, &self.new.client_titles)?;
        refuse_shared_titles(&self.everyone.rows(view)?, id, &self.new.client_titles)?;
        let invitation = invitation(&self.new, Occasion::First, self.lifetime, permit, view)?;
        let entry = view.append(Event::HandheldInvited(HandheldInvited {
            handheld: id.to_string(),
            technician: invitation.technician.as_str().to_owned(),
            code_id: Bytes::copy_from_slice(&invitation.code_id.0),
            expires_ms: invitation.expires.0,
            client_titles: invitation.client_titles.iter().map(|title| u64::from_be_bytes(title.octets())).collect(),
        }));
        let answer = message(&invitation, view.now());
        view.put_invitation(invitation)?;
        Ok(Decision::recorded(entry, answer))
    }

    fn again(
        &self,
        Remembered(answer): Remembered<v1::Invitation>,
        _: &Permit,
        _: &mut View<'_, '_>,
    ) -> Result<v1::Invitation, ServiceError> {
        Ok(answer)
    }
}

struct HandOver {
    new: NewInvitation,
    lifetime: i64,
}

impl Act for HandOver {
    type Answer = v1::Invitation;
    type Past = Remembered<v1::Invitation>;

    fn name(&self) -> &'static str {
        Action::HandOverHandheld.name()
    }

    fn reads(&self) -> Reads {
        let sealed = vec![principal_row(&self.new.handheld), invitation_row(&self.new.handheld)];
        Reads { sealed, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::HandOverHandheld, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Invitation>, ServiceError> {
        let id = &self.new.handheld;
        let existing = view.principal(id)?;
        let mut principal = enabled(id, existing)?;
        let mut new = self.new.clone();
        new.client_titles.clone_from(&principal.client_titles);
        // An invitation that is pending gets another code: only the newest one is accepted.
        let invitation = invitation(&new, Occasion::HandOver, self.lifetime, permit, view)?;
        let now = view.now();
        let entry = view.append(Event::HandheldHandedOver(HandheldHandedOver {
            handheld: id.to_string(),
            from: principal.person.as_ref().map(|person| person.as_str().to_owned()).unwrap_or_default(),
            to: invitation.technician.as_str().to_owned(),
            ended: principal.live_certificates(now).map(|certificate| hex::encode(&certificate.serial)).collect(),
            code_id: Bytes::copy_from_slice(&invitation.code_id.0),
            expires_ms: invitation.expires.0,
        }));
        principal.certificates.clear();
        principal.transport = None;
        principal.assurance = None;
        principal.person = Some(invitation.technician.clone());
        principal.revision += 1;
        let answer = message(&invitation, now);
        view.put_principal(principal)?;
        view.put_invitation(invitation)?;
        Ok(Decision::recorded(entry, answer))
    }

    fn again(
        &self,
        Remembered(answer): Remembered<v1::Invitation>,
        _: &Permit,
        _: &mut View<'_, '_>,
    ) -> Result<v1::Invitation, ServiceError> {
        Ok(answer)
    }
}

struct Withdraw {
    handheld: PrincipalId,
    reason: String,
}

impl Act for Withdraw {
    type Answer = v1::Invitation;
    type Past = Remembered<v1::Invitation>;

    fn name(&self) -> &'static str {
        Action::WithdrawInvitation.name()
    }

    fn reads(&self) -> Reads {
        Reads { sealed: vec![invitation_row(&self.handheld)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::WithdrawInvitation, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Invitation>, ServiceError> {
        let now = view.now();
        let known = view.invitation(&self.handheld)?;
        let mut invitation = Arc::unwrap_or_clone(
            known.ok_or_else(|| ServiceError::NotFound { what: format!("an invitation of `{}`", self.handheld) })?,
        );
        let state = invitation.state(now);
        if state != InvitationState::Pending {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the invitation of `{}` is {}, so nobody can use it", self.handheld, state.name()),
                next_step: "look at it with `kms handheld list`".to_owned(),
            });
        }
        invitation.end = Some(InvitationEnd::Withdrawn(now));
        let entry = view.append(Event::InvitationWithdrawn(InvitationWithdrawn {
            handheld: self.handheld.to_string(),
            code_id: Bytes::copy_from_slice(&invitation.code_id.0),
            reason: self.reason.clone(),
        }));
        let answer = message(&invitation, now);
        view.put_invitation(invitation)?;
        Ok(Decision::recorded(entry, answer))
    }

    fn again(
        &self,
        Remembered(answer): Remembered<v1::Invitation>,
        _: &Permit,
        _: &mut View<'_, '_>,
    ) -> Result<v1::Invitation, ServiceError> {
        Ok(answer)
    }
}

fn invitation(
    new: &NewInvitation,
    occasion: Occasion,
    lifetime: i64,
    permit: &Permit,
    view: &View<'_, '_>,
) -> Result<Invitation, ServiceError> {
    let invited = view.now();
    let invitation = Invitation {
        handheld: new.handheld.clone(),
        technician: new.technician.clone(),
        client_titles: new.client_titles.clone(),
        occasion,
        code_id: new.code_id,
        code_sha256: new.code_sha256,
        invited_by: permit.principal().id.clone(),
        invited,
        expires: invited.after(lifetime),
        wrong_codes: 0,
        end: None,
    };
    invitation.check().map_err(ServiceError::parse("name"))?;
    Ok(invitation)
}

/// An invitation as the gRPC contract shows it.
fn message(invitation: &Invitation, now: UnixMillis) -> v1::Invitation {
    v1::Invitation {
        handheld: invitation.handheld.to_string(),
        technician: invitation.technician.as_str().to_owned(),
        state: invitation.state(now).name().to_owned(),
        occasion: invitation.occasion.name().to_owned(),
        code_id: Bytes::copy_from_slice(&invitation.code_id.0),
        invited_by: invitation.invited_by.to_string(),
        invited_ms: invitation.invited.0,
        expires_ms: invitation.expires.0,
        wrong_codes: invitation.wrong_codes,
        client_titles: invitation.client_titles.iter().map(|title| Bytes::copy_from_slice(&title.octets())).collect(),
        root_certificate: Bytes::new(),
    }
}

/// A lost device is never enabled again: who has found it enrols it under a new name. So each name
/// means one device, in the log too.
fn name_is_taken(existing: &Principal) -> ServiceError {
    let id = &existing.id;
    let next_step = match existing.status {
        PrincipalStatus::Enabled => format!(
            "choose another name; for another technician, a forgotten PIN or certificates that have ended: \
             `kms handheld hand-over {}`",
            id.name()
        ),
        PrincipalStatus::Disabled => "choose another name: it was disabled, and names are not used again".to_owned(),
    };
    ServiceError::FailedPrecondition { reason: format!("`{id}` exists"), next_step }
}

fn refuse_pending(earlier: &Invitation, now: UnixMillis) -> Result<(), ServiceError> {
    if earlier.state(now) != InvitationState::Pending {
        return Ok(());
    }
    let name = earlier.handheld.name();
    Err(ServiceError::FailedPrecondition {
        reason: format!(
            "`{}` was invited by `{}`, and the code is still accepted",
            earlier.handheld, earlier.invited_by
        ),
        next_step: format!("withdraw it first with `kms handheld withdraw-invitation {name}`"),
    })
}

/// I4: frames with a meter's title as client title would repeat the nonces of the meter's own
/// answers under the same key.
fn refuse_titles_of_meters(view: &mut View<'_, '_>, titles: &[SystemTitle]) -> Result<(), ServiceError> {
    for title in titles {
        if view.meter(*title)?.is_some() {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the client title {title} is the system title of a meter"),
                next_step: "give the handheld a system title that no device has".to_owned(),
            });
        }
    }
    Ok(())
}
