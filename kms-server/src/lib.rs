//! The key management server: it opens an island by a configuration and serves it. Policy, audit,
//! use cases and gRPC are separate crates below it (docs/architecture.md).

pub mod command_line;
mod descriptors;
pub mod pin_memory;
pub mod server;
pub mod telemetry;

/// The allocator of the server's programs. With that of glibc, two of five processor cycles of a
/// batch of grants were spent on memory: what one thread allocates, another one frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
