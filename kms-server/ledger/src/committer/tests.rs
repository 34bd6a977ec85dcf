use kms_proto::v1::AuditRecord;
use prost::Message as _;

use super::event_kind;

/// The kind of a record in the database is the number of its event in the contract: `kms audit
/// list` and the scrubber find records by it.
#[test]
fn the_kind_of_each_event_is_its_number_in_the_contract() {
    let set = prost_types::FileDescriptorSet::decode(kms_proto::FILE_DESCRIPTOR_SET).unwrap();
    let record = set.file.iter().flat_map(|file| &file.message_type).find(|message| message.name() == "AuditRecord");
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
