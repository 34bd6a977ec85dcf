//! Security setups in audit records.

use kms_domain::SecuritySetupId;

/// A security setup as audit records carry it: `b × 256 + e`.
pub(crate) fn setup_record(setup: SecuritySetupId) -> u32 {
    u32::from(u16::from_be_bytes(setup.octets()))
}

/// The security setup of an audit record.
pub(crate) fn recorded_setup(setup: u32) -> SecuritySetupId {
    let [_, _, b, e] = setup.to_be_bytes();
    SecuritySetupId::from_octets([b, e])
}
