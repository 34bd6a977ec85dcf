//! The contract on the wire, as `contract.txt` keeps it: names, numbers and types.
//!
//! Clients in the field and records in the audit log are older than the next server. A number that
//! has another meaning is read wrongly and without an error.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

/// No line of the committed contract changes or goes: the next version only adds lines.
#[test]
fn the_wire_contract_only_grows() {
    let set = FileDescriptorSet::decode(kms_proto::FILE_DESCRIPTOR_SET).unwrap();
    let now = contract(&set);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("contract.txt");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if now == committed {
        return;
    }
    let lines: BTreeSet<_> = now.lines().collect();
    let known: BTreeSet<_> = committed.lines().collect();
    let listed = |lines: Vec<&&str>| lines.iter().map(|line| format!("  {line}\n")).collect::<String>();
    let lost = listed(known.difference(&lines).collect());
    let added = listed(lines.difference(&known).collect());
    assert!(
        lost.is_empty(),
        "the wire contract breaks. These lines of proto/contract.txt are no longer true:\n{lost}\
         and these are new:\n{added}\n\
         A name, a number or a type is never changed, removed or used again: clients and records of the audit log\n\
         that are older than this server are read with it. Restore what the lines say, and add a field with a new\n\
         number instead. A field that nobody reads any more stays, with `[deprecated = true]`.\n\
         Only what no server and no client has ever run with may go: delete its lines from proto/contract.txt by hand."
    );
    if std::env::var_os(RENEW).is_some() {
        std::fs::write(&path, now).unwrap();
        return;
    }
    panic!(
        "the wire contract has grown:\n{added}\nCheck that each number is new and right, then renew and commit \
         proto/contract.txt:\n\n    {RENEW}=1 cargo test --release -p kms-proto --test contract\n"
    );
}

/// The contract as text, in order of file names, and inside a file in its own order.
fn contract(set: &FileDescriptorSet) -> String {
    let mut files: Vec<_> = set.file.iter().filter(|file| file.package() == PACKAGE).collect();
    files.sort_by_key(|file| file.name());
    let mut text = String::from(HEAD);
    for file in files {
        let name = Path::new(file.name()).file_name().unwrap_or_default().display();
        writeln!(text, "\n# {name}").unwrap();
        file.service.iter().for_each(|service| write_service(&mut text, service));
        file.message_type.iter().for_each(|message| write_message(&mut text, "", message));
        file.enum_type.iter().for_each(|values| write_enum(&mut text, "", values));
    }
    text
}

fn write_service(text: &mut String, service: &ServiceDescriptorProto) {
    for method in &service.method {
        let stream = |yes: bool| if yes { "stream " } else { "" };
        writeln!(
            text,
            "rpc {}.{}: {}{} -> {}{}",
            service.name(),
            method.name(),
            stream(method.client_streaming()),
            short(method.input_type()),
            stream(method.server_streaming()),
            short(method.output_type())
        )
        .unwrap();
    }
}

fn write_message(text: &mut String, outer: &str, message: &DescriptorProto) {
    let name = format!("{outer}{}", message.name());
    // A message without fields is told from one that is missing.
    writeln!(text, "message {name}").unwrap();
    for field in &message.field {
        let oneof = field
            .oneof_index
            .filter(|_| !field.proto3_optional())
            .and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?))
            .map(|oneof| format!(", one of {}", oneof.name()))
            .unwrap_or_default();
        writeln!(text, "{name}.{} = {}: {}{oneof}", field.name(), field.number(), type_of(field)).unwrap();
    }
    for range in &message.reserved_range {
        // The end of a range is exclusive in descriptors.
        writeln!(text, "{name} reserves {} to {}", range.start(), range.end() - 1).unwrap();
    }
    let inner = format!("{name}.");
    message.nested_type.iter().for_each(|nested| write_message(text, &inner, nested));
    message.enum_type.iter().for_each(|values| write_enum(text, &inner, values));
}

fn write_enum(text: &mut String, outer: &str, values: &EnumDescriptorProto) {
    let name = format!("{outer}{}", values.name());
    for value in &values.value {
        writeln!(text, "enum {name}.{} = {}", value.name(), value.number()).unwrap();
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    let label = match field.label() {
        Label::Repeated => "repeated ",
        _ if field.proto3_optional() => "optional ",
        _ => "",
    };
    let name = match field.r#type() {
        Type::Message | Type::Enum | Type::Group => short(field.type_name()).to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    format!("{label}{name}")
}

/// A type's name without the package, or the full name of one from elsewhere.
fn short(name: &str) -> &str {
    name.strip_prefix(".meterkms.v1.").unwrap_or(name)
}

const PACKAGE: &str = "meterkms.v1";
const RENEW: &str = "KMS_TEST_RENEW";
const HEAD: &str = "\
# The contract on the wire. proto/tests/contract.rs compares it with the proto files and writes it.
# Lines are only added: no name, number or type of a line changes, and none goes.
";
