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

use kms_domain::RequestId;

/// A request to change something: what makes it the same when it comes again.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its id.
    pub id: RequestId,
    /// Digest of all that is asked.
    pub digest: [u8; 32],
}
