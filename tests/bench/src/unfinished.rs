//! What a server holds for requests that are never finished.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use attacker::{Attacker, Hoard};
use kms_client::{PrincipalId, StateDirectory};

use crate::{
    Failure,
    island::{HEAD_END, Island},
    measure::memory_mib,
};

/// Memory at its highest while the head-end holds [`REQUESTS`] unfinished requests on each of two
/// connections, above that before, in MiB. The island must be fresh: memory that was used and is
/// free again would hide what is held.
pub(crate) async fn hold(island: &Island) -> Result<f64, Failure> {
    let head_end = PrincipalId::parse(HEAD_END)?;
    let attacker = Attacker::of(&StateDirectory::new(&island.directory).profile(head_end.name())?)?;
    let connections = [attacker.channel(LOOPBACK).await?, attacker.channel(LOOPBACK).await?];
    let server = island.load.server.to_string();
    let before = memory_mib(&server, "VmRSS");
    let mut most = before;
    let hoard = Hoard::begin(&connections, REQUESTS);
    let enough = || {
        most = most.max(memory_mib(&server, "VmRSS"));
        most - before > FAR_TOO_MUCH_MIB
    };
    hoard.settle(WITHIN, enough).await;
    hoard.end().await;
    Ok(most - before)
}

pub(crate) const REQUESTS: usize = 250;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The machine is not to suffer.
const FAR_TOO_MUCH_MIB: f64 = 1_024.0;
const WITHIN: Duration = Duration::from_secs(60);
