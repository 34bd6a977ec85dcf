//! The contract of the key management system: the messages and services of `proto/meterkms/v1`,
//! compiled without protoc.

/// The package `meterkms.v1`. The proto files hold the documentation of every message and field.
#[expect(missing_docs, clippy::all, reason = "generated from the proto files, which are the documentation")]
pub mod v1 {
    tonic::include_proto!("meterkms.v1");
}

/// The encoded `google.protobuf.FileDescriptorSet` of the package, for gRPC server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/meterkms.v1.descriptors"));
