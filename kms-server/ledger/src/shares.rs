//! How much of a transaction each principal gets. How much may wait in the queue is in
//! [`kms_base::bounds`].

use std::time::Duration;

/// After what time a caller that met a bound of the queue may try again: a few transactions.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(500);
/// The most acts of one transaction.
pub(super) const MOST_ACTS: usize = 256;
/// The most work of one transaction, in rows. A larger act gets a transaction of its own.
pub(super) const MOST_WORK: u64 = 4_096;
/// The most work of one principal in a transaction while others send acts too, and wait for it: one
/// chunk of a batch grant, which takes a few milliseconds. A principal that is alone may use the
/// whole transaction.
pub(super) const MOST_WORK_OF_ONE: u64 = 512;
/// How long after the act of another principal a principal counts as not alone.
pub(super) const NOT_ALONE: Duration = Duration::from_secs(2);
/// The cost of an act besides its rows: its principal, its request, its record. A single grant
/// takes the writer five times as long as one meter of a batch grant.
pub(super) const WORK_OF_AN_ACT: u64 = 4;
/// Acts up to this cost are small. A transaction that begins with a small act takes no large ones:
/// the small acts would wait for them.
pub(super) const SMALL: u64 = 64;
