//! The bounds of what one principal may have waiting for the writer, and may write into the log.

use std::time::Duration;

/// Bounds of the committer. Each refusal names the bound that was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitterBounds {
    /// `acts_waiting`: acts of all principals that may wait. When more come, they are turned away at once (I2: callers do not hang). The server's own
    /// are not counted against it: there are few, and others wait for them.
    pub acts_waiting: usize,
    /// `acts_waiting_per_principal`: acts of one principal that may wait. A head-end with 256 calls on each of four connections has that many.
    pub acts_waiting_per_principal: usize,
    /// `meters_in_flight_per_principal`: rows of meters, keys and tasks that the waiting acts of one principal name: five calls of the largest size.
    /// An act that waits alone is taken whatever its size.
    pub meters_in_flight_per_principal: u64,
    /// `log_octets_per_principal_and_hour`: octets of audit records that the acts of one principal may add in an hour. One head-end that opens a
    /// session with each of 25 million meters every 15 minutes, in batches, writes about 2 GiB: the whole design scale in one hand. An attacker with
    /// single grants writes as much in 20 minutes.
    pub log_octets_per_principal_and_hour: u64,
}

impl Default for CommitterBounds {
    fn default() -> Self {
        Self { acts_waiting: 8_192, acts_waiting_per_principal: 1_024, meters_in_flight_per_principal: 50_000, log_octets_per_principal_and_hour: 4 << 30 }
    }
}

/// When a caller that met a bound of waiting acts may come back: a few transactions later.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Acts of one transaction.
pub(super) const MOST_ACTS: usize = 256;
/// Work of one transaction, in rows. What is larger is a transaction of its own.
pub(super) const MOST_WORK: u64 = 4_096;
/// Work of one principal in a transaction while others send acts too, who wait for it: a chunk of a batch, which takes a few milliseconds. One that is
/// alone has all of a transaction.
pub(super) const MOST_WORK_OF_ONE: u64 = 512;
/// For how long a principal counts as not alone after another one's act.
pub(super) const NOT_ALONE: Duration = Duration::from_secs(2);
/// What an act costs besides its rows: its principal, its request, its record. A single grant takes the writer five times as long as a meter of a
/// batch.
pub(super) const WORK_OF_AN_ACT: u64 = 4;
/// Acts up to this size are small: a transaction that begins with one takes no larger ones, which the small would wait for.
pub(super) const SMALL: u64 = 64;
