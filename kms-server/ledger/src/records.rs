//! Audit records: their kinds, how they join the chain of this writer, and which errors count as
//! refusals.

use kms_domain::UnixMillis;
use kms_proto::v1::{AuditRecord, audit_record::Event};
use kms_store::AuditAppend;

use super::{
    actor::Actor,
    chain::{AuditKeys, AuditLeaf, ChainHead},
    refusals::Refusal,
};
use kms_base::error::ServiceError;

/// Numbers and chains a record. Returns its leaf hash and its row.
pub(super) fn append(
    head: &mut ChainHead,
    keys: &AuditKeys,
    record: AuditRecord,
    now: UnixMillis,
) -> (AuditLeaf, AuditAppend) {
    let kind = record.event.as_ref().map_or(0, event_kind);
    let linked = head.link(keys, record, now);
    (
        linked.leaf,
        AuditAppend {
            writer: head.writer,
            sequence: linked.sequence,
            time: now,
            kind,
            record: linked.record,
            chain: linked.chain,
        },
    )
}

/// The number of [`Event::ClockJumped`].
pub const CLOCK_JUMPED: u16 = 66;

/// The field number of the event in the record.
pub const fn event_kind(event: &Event) -> u16 {
    match event {
        Event::WriterOpened(_) => 16,
        Event::KeysGranted(_) => 17,
        Event::Refused(_) => 18,
        Event::ShipmentImported(_) => 19,
        Event::MetersChanged(_) => 20,
        Event::PrincipalChanged(_) => 21,
        Event::GrantRevoked(_) => 22,
        Event::FramesProtected(_) => 23,
        Event::SecurityEvent(_) => 24,
        Event::CeremonyHeld(_) => 25,
        Event::KeyCreated(_) => 26,
        Event::GroupKeyChanged(_) => 33,
        Event::DeviceTypeAdded(_) => 27,
        Event::KeysDestroyed(_) => 30,
        Event::TransfersAdvanced(_) => 31,
        Event::ProposalMade(_) => 35,
        Event::ProposalApproved(_) => 36,
        Event::ProposalEnded(_) => 37,
        Event::CounterRaised(_) => 38,
        Event::CampaignCreated(_) => 40,
        Event::CampaignApproved(_) => 41,
        Event::CampaignChanged(_) => 42,
        Event::WaveChanged(_) => 43,
        Event::TasksChanged(_) => 44,
        Event::RootVersionBegun(_) => 45,
        Event::RootVersionMade(_) => 46,
        Event::RootRotationChanged(_) => 47,
        Event::RootRowsAdvanced(_) => 48,
        Event::RootDestroyed(_) => 49,
        Event::AuditKeyChanged(_) => 50,
        Event::WorkOrderCreated(_) => 75,
        Event::WorkOrderChanged(_) => 76,
        Event::WorkOrderEnded(_) => 77,
        Event::PlacesRemoved(_) => 78,
        Event::ExposureIndexCompleted(_) => 90,
        Event::ClockJumped(_) => CLOCK_JUMPED,
        Event::HandheldInvited(_) => 70,
        Event::InvitationWithdrawn(_) => 71,
        Event::WrongEnrolmentCode(_) => 72,
        Event::HandheldEnrolled(_) => 73,
        Event::HandheldHandedOver(_) => 74,
    }
}

/// A refused act, as the log counts it. A fault of the server is no refusal.
pub(super) fn refusal_of(error: &ServiceError, actor: &Actor) -> Option<Refusal> {
    match error {
        ServiceError::PermissionDenied { .. }
        | ServiceError::Unauthenticated { .. }
        | ServiceError::FailedPrecondition { .. }
        | ServiceError::NotFound { .. } => Some(Refusal {
            principal: actor.principal_text(),
            action: actor.action.to_owned(),
            // Without the meter: one client that asks for many unknown meters is one line in the
            // log, not thousands.
            reason: match error {
                ServiceError::PermissionDenied { asked, .. } => {
                    format!("`{}` is not permitted", asked.split(" with ").next().unwrap_or_default())
                }
                other => other.to_string(),
            },
            security_event: false,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    /// The kind of a record in the database is the number of its event in the contract: `kms audit
    /// list` and the scrubber find records by it.
    #[test]
    fn the_kind_of_each_event_is_its_number_in_the_contract() {
        let set = prost_types::FileDescriptorSet::decode(kms_proto::FILE_DESCRIPTOR_SET).unwrap();
        let record =
            set.file.iter().flat_map(|file| &file.message_type).find(|message| message.name() == "AuditRecord");
        let record = record.unwrap();
        let events = record.oneof_decl.iter().position(|oneof| oneof.name() == "event").unwrap();
        let events = record.field.iter().filter(|field| field.oneof_index == i32::try_from(events).ok());
        let mut compared = 0;
        for field in events {
            // An empty message in this field: the tag, and a length of 0.
            let mut octets = Vec::new();
            prost::encoding::encode_key(
                field.number().cast_unsigned(),
                prost::encoding::WireType::LengthDelimited,
                &mut octets,
            );
            octets.push(0);
            let event = AuditRecord::decode(&*octets).unwrap().event.unwrap();
            assert_eq!(i32::from(event_kind(&event)), field.number(), "`event_kind` of {}", field.name());
            compared += 1;
        }
        assert!(compared > 30, "{compared} events");
    }
}
