//! The key management server: gRPC, policy, audit and use cases over HSMs and a database.
//!
//! From the outside in; a room may use those below it, never those above: [`api`], [`service`],
//! [`authz`], [`audit`]. Below them, as crates of their own: `kms-dlms`, `kms-hsm`, `kms-store`,
//! `kms-domain`.

pub mod api;
pub mod audit;
pub mod authz;
pub mod bounds;
mod clock;
pub mod command_line;
pub mod config;
mod descriptors;
pub mod dev;
pub mod error;
mod files;
pub mod island;
pub mod pin_memory;
pub mod profiles;
pub mod server;
pub mod service;
pub mod telemetry;
#[cfg(test)]
mod testing;
