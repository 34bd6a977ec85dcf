//! Use cases, each in a file or a folder, and the island that they share.

pub mod approval;
pub mod audit_log;
pub mod campaign;
pub mod certificate;
pub mod certificate_end;
mod equal_keys;
pub mod escrow;
pub mod exposure;
pub mod frame;
pub mod grant;
mod group_names;
pub mod handheld;
pub mod init;
pub mod island;
pub mod island_keys;
mod keys;
#[cfg(test)]
mod ledger_tests;
pub mod meter;
pub mod officers;
pub mod owner;
pub mod principal;
pub mod profiles;
pub mod proposal;
#[cfg(test)]
mod replay_tests;
pub mod request_digest;
pub mod retention;
pub mod root;
mod row_id;
pub mod scrub;
pub mod scrub_flight;
pub mod shipment;
#[cfg(test)]
mod testing;
pub mod transfer;
mod watch;
pub mod work_order;

pub use kms_ledger::Request;
