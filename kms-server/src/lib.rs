//! The key management server: a configuration, put to work. Policy, audit, use cases and gRPC are
//! rooms of their own below it (docs/architecture.md).

pub mod command_line;
mod descriptors;
pub mod pin_memory;
pub mod server;
pub mod telemetry;
