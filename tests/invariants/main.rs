//! Each invariant of docs/architecture.md, broken on purpose: the system must refuse. I7 is kept by
//! running one process an island.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod i1_keys_stay_inside;
mod i2_no_key_without_a_record;
mod i2_refusals;
mod i3_no_meter_is_lost;
mod i3_roots;
mod i4_no_nonce_twice;
mod i5_binding;
mod i6_one_key;
mod i6_proposals;
mod i6_two_people;
mod i8_default_deny;

/// The time of this machine, in milliseconds since 1970.
fn now_ms() -> i64 {
    i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis()).unwrap()
}
