//! Use cases, one file each.

pub mod audit_log;
pub mod campaign;
pub mod certificate;
pub mod certificate_end;
pub mod escrow;
pub mod frame;
pub mod grant;
mod group;
pub mod init;
pub mod meter;
pub mod officers;
pub mod owner;
pub mod principal;
pub mod proposal;
mod recipe;
#[cfg(test)]
mod replay_tests;
pub mod retention;
pub mod root;
pub mod scrub;
pub mod shipment;
pub mod transfer;
mod watch;

pub use crate::audit::Request;
