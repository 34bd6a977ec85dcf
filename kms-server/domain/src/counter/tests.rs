//! What counters may never do, one rule a test.

use std::num::NonZeroU32;

use super::*;
use crate::{AllocateError, IslandName, Lease, LiveChunk, Role, SystemTitle};

const NONE: CounterJump = CounterJump::NONE;

fn title(last: u8) -> SystemTitle {
    SystemTitle::from_octets(&[0x4D, 0x4D, 0x4D, 0, 0, 0, 0, last]).unwrap()
}

fn server(number: u8) -> WriterId {
    WriterId::from_octets(&[number; 16]).unwrap()
}

fn chunk(counters: u32) -> ChunkSize {
    ChunkSize::new(NonZeroU32::new(counters).unwrap())
}

fn count(counters: u32) -> NonZeroU32 {
    NonZeroU32::new(counters).unwrap()
}

fn head_end() -> PrincipalId {
    PrincipalId::new(IslandName::parse("dev").unwrap(), Role::HeadEnd, "hes").unwrap()
}

#[test]
fn another_holder_reserves_above_and_ends_the_older_chunk() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    let mut first = LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
    assert_eq!(first.allocate(counters.get(key).unwrap(), count(60), NONE), Ok(Lease { first: 1, count: 60 }));
    assert_eq!(first.allocate(counters.get(key).unwrap(), count(41), NONE), Err(AllocateError::Spent));
    let mut second = LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(2), chunk(100), 0, NONE).unwrap());
    assert_eq!(first.allocate(counters.get(key).unwrap(), count(1), NONE), Err(AllocateError::Superseded));
    assert_eq!(second.allocate(counters.get(key).unwrap(), count(1), NONE), Ok(Lease { first: 101, count: 1 }));
}

#[test]
fn the_counter_space_ends_and_warns_before() {
    let key = CounterKey::Setup;
    let mut counters = Counters::default();
    counters.raise_floor(key, CounterState::ROTATION_DUE - 200, None).unwrap();
    assert!(!counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().rotation_due);
    assert!(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().rotation_due);
    counters.raise_floor(key, CounterState::SESSIONS_END - 10, None).unwrap();
    let last = counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
    assert_eq!(last.bound, CounterState::SESSIONS_END);
    let lease = LiveChunk::new(last).allocate(counters.get(key).unwrap(), count(10), NONE).unwrap();
    assert_eq!(u64::from(lease.last()), CounterState::SESSIONS_END - 1);
    for counter_use in [CounterUse::Lease, CounterUse::Frames] {
        assert_eq!(
            counters.reserve(key, counter_use, server(1), chunk(1), 0, NONE),
            Err(CounterError::SessionsExhausted { key })
        );
    }
}

#[test]
fn the_last_counters_are_for_transfers_alone() {
    let key = CounterKey::Setup;
    let next = |from: u64, counter_use| {
        let mut counters = Counters::default();
        counters.raise_floor(key, from, None).unwrap();
        let chunk = ChunkSize::DEFAULT.serving(counter_use, count(2));
        counters
            .reserve(key, counter_use, server(1), chunk, 0, NONE)
            .map(|reserved| (u64::from(reserved.first), reserved.bound))
    };
    let end = CounterState::SESSIONS_END;
    for counter_use in [CounterUse::Lease, CounterUse::Frames] {
        assert_eq!(next(end - 1, counter_use), Ok((end - 1, end)));
        assert_eq!(next(end, counter_use), Err(CounterError::SessionsExhausted { key }));
    }
    // A transfer reserves what it uses, and never across the edge.
    for (from, first) in [(1, 1), (end - 2, end - 2), (end - 1, end), (end, end), (end + 7, end + 7)] {
        assert_eq!(next(from, CounterUse::Transfer), Ok((first, first + 2)));
    }
    assert_eq!(next(CounterState::END - 1, CounterUse::Transfer), Ok((CounterState::END - 1, CounterState::END)));
    assert_eq!(next(CounterState::END, CounterUse::Transfer), Err(CounterError::Exhausted { key }));
    // Who holds a transfer's chunk there allocates nothing else from it.
    let mut counters = Counters::default();
    counters.raise_floor(key, end, None).unwrap();
    let held = LiveChunk::new(counters.reserve(key, CounterUse::Transfer, server(1), chunk(1), 0, NONE).unwrap());
    let uses = [CounterUse::Transfer, CounterUse::Frames, CounterUse::Lease];
    assert_eq!(uses.map(|counter_use| held.serves(counter_use)), [true, false, false]);
    let mut counters = Counters::default();
    let held = LiveChunk::new(counters.reserve(key, CounterUse::Transfer, server(1), chunk(1), 0, NONE).unwrap());
    assert!(uses.iter().all(|counter_use| held.serves(*counter_use)));
}

#[test]
fn an_hour_has_its_counters_and_the_next_one_again() {
    const HOUR: i64 = 3_600_000;
    let key = CounterKey::ClientTitle(title(1));
    let cap = CounterCap::new(1_000_000).unwrap();
    let mut counters = Counters::default();
    let mut reserve = |size: u32, counter_use, now: i64| -> Result<bool, CounterError> {
        // As the caller does: what is refused is not stored.
        let mut changed = counters.clone();
        let reserved = changed.reserve(key, counter_use, server(1), chunk(size), 0, NONE).unwrap();
        let half = changed.count_into_hour(reserved, counter_use, cap, UnixMillis(now))?;
        counters = changed;
        Ok(half)
    };
    let met: Result<bool, CounterError> = Err(CounterError::CapMet { key, cap, free: UnixMillis(5 * HOUR) });
    assert_eq!(reserve(499_999, CounterUse::Lease, 4 * HOUR), Ok(false));
    assert_eq!(reserve(1, CounterUse::Frames, 4 * HOUR + 1), Ok(true), "half of it, once");
    assert_eq!(reserve(500_001, CounterUse::Lease, 4 * HOUR + 2), met.clone());
    assert_eq!(reserve(500_000, CounterUse::Lease, 4 * HOUR + 3), Ok(false));
    assert_eq!(reserve(1, CounterUse::Frames, 5 * HOUR - 1), met.clone());
    // A transfer goes on. A clock that is behind by less than an hour opens nothing.
    assert_eq!(reserve(1, CounterUse::Transfer, 5 * HOUR - 1), Ok(false));
    assert_eq!(reserve(1, CounterUse::Lease, 3 * HOUR), met);
    assert_eq!(reserve(1_000_000, CounterUse::Lease, 5 * HOUR), Ok(true));
    // An hour far ahead was a wrong clock, and locks nobody out.
    assert_eq!(reserve(1_000_000, CounterUse::Lease, 50 * HOUR), Ok(true));
    assert_eq!(reserve(1_000_000, CounterUse::Lease, 6 * HOUR), Ok(true));
    assert!(CounterCap::new(999_999).is_err() && CounterCap::new(u32::MAX).is_ok());
}

// A12: `D8 01 06` with a counter is anyone's to forge, as often as a head-end that may probe
// likes.
#[test]
fn a_meter_s_word_takes_no_more_than_the_hour_has_and_nothing_of_the_reserve() {
    const HOUR: i64 = 3_600_000;
    const JUMP: u32 = 100_000;
    let key = CounterKey::ClientTitle(title(1));
    let cap = CounterCap::new(1_000_000).unwrap();
    let mut counters = Counters::default();
    let mut halves = 0;
    let mut forge = |counters: &mut Counters, now: i64| {
        let bound = counters.get(key).map_or(1, CounterState::bound);
        let half = counters.follow(key, bound + u64::from(JUMP), JUMP, cap, UnixMillis(now))?;
        halves += u32::from(half);
        Ok::<_, CounterError>(())
    };
    let met = |hour| Err(CounterError::CapMet { key, cap, free: UnixMillis(hour * HOUR) });
    for answer in 0..20 {
        assert_eq!(forge(&mut counters, 4 * HOUR + answer), if answer < 10 { Ok(()) } else { met(5) });
    }
    assert_eq!(counters.highest_bound(), 1_000_001);
    // Sessions and answers have one hour; a transfer goes on, and so does who repeats a counter
    // that was allocated.
    let reserved = counters.clone().reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap();
    assert!(counters.clone().count_into_hour(reserved, CounterUse::Lease, cap, UnixMillis(4 * HOUR)).is_err());
    assert!(counters.count_into_hour(reserved, CounterUse::Transfer, cap, UnixMillis(4 * HOUR)).is_ok());
    let before = counters.clone();
    assert_eq!(counters.follow(key, 1_000_001, JUMP, cap, UnixMillis(4 * HOUR)), Ok(false));
    assert_eq!(
        counters.follow(key, 1_100_002, JUMP, cap, UnixMillis(5 * HOUR)),
        Err(CounterError::JumpTooFar { from: 1_000_001, to: 1_100_002, cap: JUMP })
    );
    assert_eq!(counters, before, "what is refused changes nothing");
    assert_eq!(forge(&mut counters, 5 * HOUR), Ok(()));
    assert_eq!(halves, 1);

    // The reserve is for transfers, whatever a meter says; two people may raise the counter
    // there.
    let end = CounterState::SESSIONS_END;
    counters.raise_floor(key, end - 5, None).unwrap();
    for floor in [end + 1, end + 2, CounterState::END - 1, CounterState::END] {
        assert_eq!(
            counters.follow(key, floor, u32::MAX, cap, UnixMillis(6 * HOUR)),
            Err(CounterError::FloorInReserve { floor })
        );
    }
    assert_eq!(counters.follow(key, end, JUMP, cap, UnixMillis(6 * HOUR)), Ok(false));
    for step in 0..100 {
        let two = ChunkSize::DEFAULT.serving(CounterUse::Transfer, count(2));
        let reserved = counters.reserve(key, CounterUse::Transfer, server(step % 2 + 1), two, 0, NONE).unwrap();
        assert_eq!(u64::from(reserved.first), end + u64::from(step) * 2, "an answer takes nothing away");
        assert_eq!(
            counters.follow(key, reserved.bound + 1, JUMP, cap, UnixMillis(6 * HOUR)),
            Err(CounterError::FloorInReserve { floor: reserved.bound + 1 })
        );
        assert_eq!(
            counters.follow(key, reserved.bound, JUMP, cap, UnixMillis(6 * HOUR)),
            Ok(false),
            "the last counter that was sent"
        );
    }
    assert_eq!(counters.raise_floor(key, end + 5_000, None), Ok(()));
}

#[test]
fn the_counters_of_an_hour_are_not_forgotten_when_counters_join() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    let reserved = counters.reserve(key, CounterUse::Lease, server(1), chunk(900), 0, NONE).unwrap();
    counters.count_into_hour(reserved, CounterUse::Lease, CounterCap::DEFAULT, UnixMillis(7)).unwrap();
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&counters);
    assert_eq!(domain.counters.get(key).unwrap().hourly().counters, 900);
    counters.raise_floor(CounterKey::Setup, 5, None).unwrap();
    assert_eq!(counters.get(key).unwrap().hourly().counters, 900);
}

#[test]
fn a_floor_inside_the_chunk_binds_its_holder_and_wastes_nothing() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    let mut held = LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
    let mut allocate = |counters: &Counters, leased| {
        held.allocate(counters.get(key).unwrap(), count(leased), NONE).map(|lease| lease.first)
    };
    assert_eq!(allocate(&counters, 10), Ok(1));
    // A meter repeats a low counter, again and again.
    for floor in [5, 11, 3, 11] {
        counters.raise_floor(key, floor, Some(0)).unwrap();
    }
    assert_eq!(allocate(&counters, 10), Ok(11));
    counters.raise_floor(key, 51, Some(0)).unwrap();
    assert_eq!(allocate(&counters, 10), Ok(51));
    assert_eq!(allocate(&counters, 10), Ok(61));
    // The last counter of the chunk, and the first above it.
    counters.raise_floor(key, 100, Some(0)).unwrap();
    assert_eq!(allocate(&counters, 2), Err(AllocateError::Spent));
    assert_eq!(allocate(&counters, 1), Ok(100));
    counters.raise_floor(key, 101, Some(0)).unwrap();
    assert_eq!(allocate(&counters, 1), Err(AllocateError::Superseded));
    assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().first, 101);
    assert_eq!(counters.get(key).unwrap().floor(), 0);
}

#[test]
fn a_floor_inside_a_chunk_holds_in_a_domain_for_all_titles_and_after_a_take_over() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
    counters.raise_floor(key, 60, None).unwrap();
    assert_eq!(counters.get(key).unwrap().floor(), 60);
    let next = |counters: &Counters| {
        let mut counters = counters.clone();
        let first = counters.reserve(key, CounterUse::Lease, server(2), chunk(10), 0, NONE).unwrap().first;
        (first, counters.get(key).unwrap().floor())
    };
    assert_eq!(next(&counters), (101, 0), "another server reserves above the chunk");
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&counters);
    assert_eq!(next(&domain.counters), (101, 0));
    let mut all = counters.clone();
    all.raise_floor(CounterKey::Setup, 70, None).unwrap();
    assert_eq!(next(&all), (101, 0));
    counters.leave_to(key, head_end());
    counters.take_over(key, 80);
    assert_eq!(next(&counters), (101, 0));
    counters.raise_floor(key, 90, None).unwrap();
    assert_eq!(counters.get(key).unwrap().floor(), 0, "without a holder the bound is the floor");
}

#[test]
fn a_spoofed_counter_cannot_use_up_the_key() {
    let key = CounterKey::Setup;
    let mut counters = Counters::default();
    assert!(matches!(counters.raise_floor(key, 0xFFFF_FFFF, Some(100_000)), Err(CounterError::JumpTooFar { .. })));
    assert_eq!(counters.highest_bound(), u64::from(CounterState::FIRST));
    assert_eq!(counters.raise_floor(key, 5_000, Some(100_000)), Ok(()));
    assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 5_000);
}

#[test]
fn a_head_end_keeps_its_counter_until_it_is_taken_over() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    counters.leave_to(key, head_end());
    assert_eq!(
        counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE),
        Err(CounterError::OwnedByHeadEnd { head_end: head_end() })
    );
    assert!(
        counters.reserve(CounterKey::ClientTitle(title(2)), CounterUse::Lease, server(1), chunk(1), 0, NONE).is_ok()
    );
    counters.take_over(key, 1_200);
    assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 1_200);
}

#[test]
fn a_domain_starts_above_every_member() {
    let [mine, other] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
    let mut first = Counters::default();
    let mut second = Counters::default();
    first.raise_floor(mine, 500, None).unwrap();
    second.raise_floor(mine, 900, None).unwrap();
    second.raise_floor(other, 40, None).unwrap();
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&first);
    domain.join(&second);
    assert_eq!(domain.counters.reserve(mine, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 900);
    assert_eq!(domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 40);

    let mut whole_setup = Counters::default();
    whole_setup.raise_floor(CounterKey::Setup, 20, None).unwrap();
    domain.join(&whole_setup);
    assert_eq!(domain.counters.states().len(), 1);
    assert_eq!(domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 901);
}

#[test]
fn a_member_counted_by_a_head_end_stops_the_whole_domain() {
    let key = CounterKey::ClientTitle(title(1));
    let mut owned = Counters::default();
    owned.leave_to(key, head_end());
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&Counters::default());
    domain.join(&owned);
    assert!(matches!(
        domain.counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE),
        Err(CounterError::OwnedByHeadEnd { .. })
    ));
}

#[test]
fn after_a_restore_every_counter_starts_above_what_may_have_been_allocated() {
    let [known, lost] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
    let mut backup = Counters::default();
    backup.reserve(known, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
    // After the backup: more of the known counter, and the first of another.
    let mut served = backup.clone();
    assert_eq!(served.reserve(known, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().bound, 201);
    assert_eq!(served.reserve(lost, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().bound, 101);

    let jump = NONE.raised_by(1_000);
    let mut restored = backup;
    let reservation = restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap();
    assert_eq!((reservation.first, reservation.bound), (1_101, 1_201));
    assert_eq!(restored.reserve(lost, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap().first, 1_001);
    assert_eq!(
        restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap().first,
        1_201,
        "a jump is taken once"
    );
    assert_eq!(
        restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump.raised_by(500)).unwrap().first,
        1_801,
        "and the next one by what is new"
    );
}

#[test]
fn a_chunk_from_before_a_restore_is_not_allocated_from() {
    let key = CounterKey::ClientTitle(title(1));
    let mut counters = Counters::default();
    let mut held = LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
    assert_eq!(held.allocate(counters.get(key).unwrap(), count(1), NONE.raised_by(1)), Err(AllocateError::Superseded));
}

#[test]
fn a_jump_is_not_lost_when_counters_join() {
    let [own, other] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
    let jump = NONE.raised_by(1_000);
    let mut raised = Counters::default();
    raised.reserve(own, CounterUse::Lease, server(1), chunk(10), 0, jump).unwrap();
    let mut unraised = Counters::default();
    unraised.reserve(own, CounterUse::Lease, server(1), chunk(50), 0, NONE).unwrap();
    unraised.reserve(other, CounterUse::Lease, server(1), chunk(50), 0, NONE).unwrap();
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&raised);
    assert_eq!(domain.counters.get(own).unwrap().jumped(), jump);
    domain.join(&unraised);
    assert_eq!(domain.counters.reserve(own, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first, 2_011);
    assert_eq!(domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first, 1_051);
    unraised.raise_floor(CounterKey::Setup, 60, None).unwrap();
    assert_eq!(unraised.reserve(own, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first, 1_060);
}

#[test]
fn a_chunk_says_whether_leases_were_allocated_from_it() {
    let key = CounterKey::ClientTitle(title(1));
    let leased = |counters: &Counters| counters.get(key).unwrap().leased();
    let mut counters = Counters::default();
    counters.reserve(key, CounterUse::Frames, server(1), chunk(10), 0, NONE).unwrap();
    assert!(!leased(&counters));
    counters.mark_leased(key);
    assert!(leased(&counters));
    // The chunk of another server for frames is above every lease: they have ended.
    counters.reserve(key, CounterUse::Frames, server(2), chunk(10), 0, NONE).unwrap();
    assert!(!leased(&counters));
    counters.reserve(key, CounterUse::Lease, server(2), chunk(10), 0, NONE).unwrap();
    // A floor, a jump, a domain or the one counter of all titles leave the grantee in the
    // belief that it may count on.
    counters.raise_floor(key, 1_000, None).unwrap();
    assert!(leased(&counters));
    let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
    domain.join(&counters);
    assert!(leased(&domain.counters));
    let mut whole_setup = Counters::default();
    whole_setup.raise_floor(CounterKey::Setup, 20, None).unwrap();
    domain.join(&whole_setup);
    assert!(domain.counters.get(CounterKey::Setup).unwrap().leased());
    // What this system leased before the counter was a head-end's is forgotten with it.
    counters.leave_to(key, head_end());
    counters.take_over(key, 2_000);
    assert!(!leased(&counters));
}

#[test]
fn overlapping_counters_are_refused() {
    let state = |key| CounterState::new(key, 1, None, CounterOwnership::Kms, false).unwrap();
    let own = CounterKey::ClientTitle(title(1));
    assert_eq!(Counters::from_states(vec![state(own), state(own)]), Err(CounterError::Overlapping));
    assert_eq!(Counters::from_states(vec![state(own), state(CounterKey::Setup)]), Err(CounterError::Overlapping));
    assert!(CounterState::new(own, CounterState::END + 1, None, CounterOwnership::Kms, false).is_err());
}
