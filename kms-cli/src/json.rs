//! Messages of the contract as JSON.
//!
//! Names are those of the proto files; octets are upper-case hex; a time in milliseconds
//! (`NAME_ms`) becomes `NAME` in RFC 3339, or null where it is 0; an enum value is its name without
//! the enum's prefix. Every field is there, also where it is empty.

use kms_proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value as Field,
};
use serde_json::{Map, Value, json};

/// The JSON of a message, named as in the package `meterkms.v1`.
pub(crate) fn message(name: &str, message: &impl Message) -> Value {
    // Both fail only if the descriptors differ from those that the messages were compiled from.
    let descriptor = DescriptorPool::decode(FILE_DESCRIPTOR_SET)
        .ok()
        .and_then(|pool| pool.get_message_by_name(&format!("meterkms.v1.{name}")));
    descriptor
        .and_then(|descriptor| DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).ok())
        .map_or(Value::Null, |dynamic| object(&dynamic))
}

/// A time in milliseconds in RFC 3339; null for 0.
pub(crate) fn time(milliseconds: i64) -> Value {
    match crate::output::exact_time(milliseconds) {
        text if text.is_empty() => Value::Null,
        text => Value::String(text),
    }
}

/// Upper-case hex.
pub(crate) fn octets(octets: &[u8]) -> Value {
    Value::String(hex::encode_upper(octets))
}

fn object(message: &DynamicMessage) -> Value {
    let mut object = Map::new();
    for field in message.descriptor().fields() {
        let in_oneof = field.containing_oneof().is_some_and(|oneof| !oneof.is_synthetic());
        if in_oneof && !message.has_field(&field) {
            continue;
        }
        let is_time = field.name().ends_with("_ms") && matches!(field.kind(), Kind::Int64);
        let name = if is_time { field.name().trim_end_matches("_ms") } else { field.name() };
        let has_value = !field.supports_presence() || message.has_field(&field);
        object.insert(name.to_owned(), if has_value { value(&message.get_field(&field), &field) } else { Value::Null });
    }
    Value::Object(object)
}

fn value(field_value: &Field, field: &FieldDescriptor) -> Value {
    match field_value {
        Field::Bool(value) => json!(value),
        Field::I32(value) => json!(value),
        Field::I64(value) if field.name().ends_with("_ms") => time(*value),
        Field::I64(value) => json!(value),
        Field::U32(value) => json!(value),
        // The contract uses fixed64 for system titles only.
        Field::U64(value) if matches!(field.kind(), Kind::Fixed64) => octets(&value.to_be_bytes()),
        Field::U64(value) => json!(value),
        Field::F32(value) => json!(value),
        Field::F64(value) => json!(value),
        Field::String(value) => json!(value),
        Field::Bytes(value) => octets(value),
        Field::EnumNumber(number) => enum_name(*number, field),
        Field::Message(message) => object(message),
        Field::List(values) => values.iter().map(|item| value(item, field)).collect(),
        Field::Map(entries) => {
            let entries = entries.iter().map(|(key, item)| {
                let key = match key {
                    MapKey::String(text) => text.clone(),
                    MapKey::Bool(value) => value.to_string(),
                    MapKey::I32(value) => value.to_string(),
                    MapKey::I64(value) => value.to_string(),
                    MapKey::U32(value) => value.to_string(),
                    MapKey::U64(value) => value.to_string(),
                };
                (key, value(item, field))
            });
            Value::Object(entries.collect())
        }
    }
}

fn enum_name(number: i32, field: &FieldDescriptor) -> Value {
    let Kind::Enum(descriptor) = field.kind() else { return json!(number) };
    let Some(value) = descriptor.get_value(number) else { return json!(number) };
    let prefix: String = descriptor
        .name()
        .chars()
        .flat_map(|letter| letter.is_ascii_uppercase().then_some('_').into_iter().chain([letter.to_ascii_uppercase()]))
        .collect();
    let prefix = format!("{}_", prefix.trim_start_matches('_'));
    json!(value.name().strip_prefix(&prefix).unwrap_or(value.name()))
}

#[cfg(test)]
mod tests {
    use kms_proto::v1 as proto;

    use super::*;

    #[test]
    fn octets_times_enums_and_titles_have_their_forms() {
        let grant = proto::Grant {
            grant_id: vec![0xAB; 16].into(),
            principal: "urn:meterkms:north:head-end:hes-1".into(),
            purpose: proto::Purpose::FieldService.into(),
            issued_ms: 1_795_248_000_123,
            meter_count: 1,
            ..Default::default()
        };
        assert_eq!(
            message("Grant", &grant),
            json!({
                "grant_id": "ABABABABABABABABABABABABABABABAB", "principal": "urn:meterkms:north:head-end:hes-1", "purpose": "FIELD_SERVICE",
                "issued": "2026-11-21T08:00:00.123Z", "not_after": null, "revoked": null, "meter_count": 1,
            })
        );
        let record = proto::AuditRecord {
            event: Some(proto::audit_record::Event::KeysGranted(proto::KeysGranted {
                meters: vec![proto::GrantedMeter {
                    meter: 0x4B41_4D00_0000_0001,
                    versions: vec![1, 2],
                    ..Default::default()
                }],
                ..Default::default()
            })),
            ..Default::default()
        };
        let record = message("AuditRecord", &record);
        assert_eq!(
            record["keys_granted"]["meters"][0],
            json!({
                "meter": "4B414D0000000001", "versions": [1, 2], "lease_first": 0, "lease_count": 0, "security_setup": 0, "group": 0, "place": 0,
            })
        );
        assert_eq!(record["keys_granted"]["purpose"], "UNSPECIFIED");
        assert!(record.get("refused").is_none());
    }
}
