//! The key management server: it opens an island by a configuration and serves it. Policy, audit,
//! use cases and gRPC are separate crates below it (docs/architecture.md).

pub mod command_line;
mod descriptors;
pub mod pin_memory;
pub mod server;
pub mod telemetry;
