//! File descriptors: the limit of open files is raised as far as the bounds need it. A reserve is
//! kept for database, watermark, log and HSM; connections get the rest. So a new connection never
//! takes the descriptor that a record needs (I2).
//!
//! The limit is raised no further: some PKCS#11 modules wait with `select`, which cannot use
//! descriptors from 1,024 on. They open their descriptors at the start, when low ones are free.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use kms_base::bounds::Limits;

/// Raises the limit of open files if necessary. If it cannot be raised, reduces the bounds on
/// connections.
///
/// `strangers` is the number of connections that the enrolment door may have: 0 without one.
///
/// # Errors
/// The limit is too low to serve anybody; the text says how many files are needed.
pub(crate) fn fit(limits: &Limits, strangers: u64) -> Result<Limits, String> {
    let open =
        std::fs::read_dir("/proc/self/fd").map_or(ASSUMED, |open| u64::try_from(open.count()).unwrap_or(ASSUMED));
    let in_use = open + strangers;
    let wanted = in_use + limits.descriptors_reserve + limits.handshakes + limits.connections;
    let allowed = getrlimit(Resource::Nofile);
    let mut current = allowed.current.unwrap_or(u64::MAX);
    if current < wanted {
        let raised = wanted.min(allowed.maximum.unwrap_or(u64::MAX));
        match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: allowed.maximum }) {
            Ok(()) => current = raised,
            Err(error) => tracing::warn!(%error, current, raised, "the limit of open files cannot be raised"),
        }
    }
    let fitting = shares(limits, current, in_use)?;
    if fitting != *limits {
        let (connections, handshakes) = (fitting.connections, fitting.handshakes);
        tracing::warn!(
            open_files = current,
            needed = wanted,
            connections,
            handshakes,
            "the limit of open files allows fewer connections than [limits] does"
        );
    }
    Ok(fitting)
}

/// The bounds on connections that fit this number of descriptors.
fn shares(limits: &Limits, allowed: u64, in_use: u64) -> Result<Limits, String> {
    let available = allowed.saturating_sub(in_use.saturating_add(limits.descriptors_reserve));
    if available >= limits.handshakes.saturating_add(limits.connections) {
        return Ok(limits.clone());
    }
    if available < FEWEST {
        let needed = in_use + limits.descriptors_reserve + FEWEST;
        return Err(format!(
            "the limit of open files is {allowed}, and at least {needed} are needed: raise it (`ulimit -n`, systemd: LimitNOFILE)"
        ));
    }
    let handshakes = limits.handshakes.min(available / 4);
    let connections = limits.connections.min(available - handshakes);
    // The fewer places still serve several principals and addresses.
    Ok(Limits {
        handshakes,
        connections,
        connections_per_principal: limits.connections_per_principal.min((connections / 8).max(1)),
        connections_per_address: limits.connections_per_address.min(connections / 2),
        handshakes_per_address: limits.handshakes_per_address.min((handshakes / 4).max(1)),
        ..limits.clone()
    })
}

/// The fewest descriptors for connections with which a server starts.
const FEWEST: u64 = 16;
/// The assumed number of open files, if the operating system does not tell.
const ASSUMED: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_get_what_is_left_beside_the_reserve() {
        let limits = Limits::default();
        assert_eq!(shares(&limits, 1 << 20, 50).unwrap(), limits);
        let few = shares(&limits, 1_024, 50).unwrap();
        assert_eq!(few.handshakes + few.connections + 50 + limits.descriptors_reserve, 1_024);
        assert!(
            few.connections_per_principal * 8 <= few.connections && few.connections_per_address * 2 <= few.connections,
            "{few:?}"
        );
        assert!(few.handshakes_per_address * 4 <= few.handshakes, "{few:?}");
        let least = shares(&limits, 50 + limits.descriptors_reserve + FEWEST, 50).unwrap();
        assert!(least.handshakes >= 4 && least.connections_per_principal >= 1, "{least:?}");
        let refusal = shares(&limits, 50 + limits.descriptors_reserve + FEWEST - 1, 50).unwrap_err();
        assert!(refusal.contains("LimitNOFILE"), "{refusal}");
    }
}
