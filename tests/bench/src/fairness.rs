//! What one head-end sees while another one floods the server with batches.

use std::time::Duration;

use futures::future;

use crate::{
    Failure,
    grants::Grants,
    island::Island,
    measure::{Run, per_second},
};

/// The neighbour's calls in the quiet and during the flood, and what the flood gets.
pub(crate) struct Fairness {
    pub(crate) quiet: Run,
    pub(crate) flooded: Run,
    pub(crate) flood_rate: f64,
}

impl Fairness {
    /// The neighbour asks for one of the meters 1 to `meters` at a time, so many times a second;
    /// the flood has the meters from `first` on, which are its own.
    pub(crate) async fn measure(island: &Island, time: Duration, meters: u64, first: u64) -> Result<Self, Failure> {
        let quiet = Grants::new(island).paced(NEIGHBOUR_PACE, time, meters).await?;
        let flood = Grants::of(island, &island.flooder);
        let lane = || async {
            while flood.keys.get() < u64::MAX {
                // It may be refused; what a client that floods does then is to ask again.
                if flood.batch((first..first + FLOOD_METERS).collect()).await.is_err() {
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        let lanes = future::join_all((0..FLOOD_CALLS).map(|_| lane()));
        let served = || flood.keys.get();
        let measured = async {
            // Not before the flood has filled every queue.
            tokio::time::sleep(RISE).await;
            let before = served();
            let run = Grants::new(island).paced(NEIGHBOUR_PACE, time, meters).await;
            (run, served() - before)
        };
        // The flood is broken off, as a client breaks off that is killed.
        let (flooded, served) = tokio::select! {
            measured = measured => measured,
            // It never ends by itself.
            _ = lanes => return Err("the flood ended".into()),
        };
        let flooded = flooded?;
        Ok(Self { quiet, flood_rate: per_second(served, flooded.elapsed), flooded })
    }
}

/// Calls at a time, and meters of each.
pub(crate) const FLOOD_CALLS: usize = 60;
pub(crate) const FLOOD_METERS: u64 = 9_900;
/// The neighbour's calls a second.
pub(crate) const NEIGHBOUR_PACE: u32 = 50;
const RISE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(100);
