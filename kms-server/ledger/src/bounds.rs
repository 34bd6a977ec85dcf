//! How the writer shares a transaction out. What callers may have waiting is in
//! [`kms_base::bounds`].

use std::time::Duration;

/// When a caller that met a bound of waiting acts may come back: a few transactions later.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Acts of one transaction.
pub(super) const MOST_ACTS: usize = 256;
/// Work of one transaction, in rows. What is larger is a transaction of its own.
pub(super) const MOST_WORK: u64 = 4_096;
/// Work of one principal in a transaction while others send acts too, who wait for it: a chunk of a
/// batch, which takes a few milliseconds. One that is alone has all of a transaction.
pub(super) const MOST_WORK_OF_ONE: u64 = 512;
/// For how long a principal counts as not alone after another one's act.
pub(super) const NOT_ALONE: Duration = Duration::from_secs(2);
/// What an act costs besides its rows: its principal, its request, its record. A single grant takes
/// the writer five times as long as a meter of a batch.
pub(super) const WORK_OF_AN_ACT: u64 = 4;
/// Acts up to this size are small: a transaction that begins with one takes no larger ones, which
/// the small would wait for.
pub(super) const SMALL: u64 = 64;
