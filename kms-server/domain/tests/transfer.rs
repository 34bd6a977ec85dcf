//! Transfers, story by story: what the meter does, what the server sees of it, and what it may
//! believe. All interleavings are in `transfer_model.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kms_domain::*;
use proptest::prelude::*;

#[test]
fn a_new_guek_is_proven_by_an_exchange_under_it() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    // I3: nothing has left yet, so there is nothing to be in doubt about, and nothing to grant.
    assert_eq!((story.candidates(KeyType::GUEK), story.granted(KeyType::GUEK)), (vec![1], vec![1]));
    story.opened((1, 1));
    assert_eq!((story.candidates(KeyType::GUEK), story.granted(KeyType::GUEK)), (vec![1, 2], vec![1]));
    assert!(story.slot(KeyType::GUEK).in_doubt());
    story.accepted();
    // The acceptance changed nothing.
    assert_eq!(story.granted(KeyType::GUEK), [1]);
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Proven));
    assert_eq!((story.active(KeyType::GUEK), story.granted(KeyType::GUEK)), (Some(2), vec![2, 1]));
    assert!(!story.slot(KeyType::GUEK).in_doubt());
    // Who unwrapped it had the KEK.
    let kek = story.version(KeyType::KEK, 1).transport();
    assert_eq!((kek.evidence, kek.confirmed), (Evidence::Proven, story.version(KeyType::GUEK, 2).transport().left));
    assert!(story.findings.contains(&Finding::Held {
        key_type: KeyType::GUEK,
        version: number(2),
        evidence: Evidence::Proven,
        confirmation: Confirmation::Activated
    }));
    assert!(story.meter.transfer.is_none());
}

#[test]
fn a_lost_answer_proves_nothing_and_loses_nothing() {
    let mut story = Story::new();
    story.begin(own(KeyType::GAK));
    story.opened((1, 1));
    story.see(Observation::Nothing);
    assert_eq!(story.meter.transfer.as_ref().unwrap().answer, Answer::Silence);
    assert_eq!(story.exchange((1, 2)), Next::Done(Outcome::Proven));
    assert_eq!(story.active(KeyType::GAK), Some(2));
}

#[test]
fn a_lost_request_is_shown_by_the_old_key() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    story.see(Observation::Nothing);
    // The new key first; the meter answers D80105.
    story.refused((2, 1));
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::NotApplied));
    // It may still be on its way.
    assert_eq!((story.active(KeyType::GUEK), story.candidates(KeyType::GUEK)), (Some(1), vec![1, 2]));
    assert!(story.slot(KeyType::GUEK).clone().transition(number(2), KeyState::Destroyed, NOW).is_err());
    assert!(!story.slot(KeyType::GUEK).in_doubt());
    // A late packet after all: a probe finds it, and the version becomes active by its own exchange
    // only.
    story.begin(OrderedKeys::Probe);
    story.refused((1, 1));
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Probed));
    assert_eq!(story.active(KeyType::GUEK), Some(2));
}

#[test]
fn an_error_and_an_exception_prove_nothing() {
    for observation in
        [Observation::Answered { result: 250, meter_counter: 99 }, Observation::Refusal, Observation::CounterFollowed]
    {
        let mut story = Story::new();
        story.begin(own(KeyType::GUEK));
        story.opened((1, 1));
        story.see(observation);
        assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Proven), "applied all the same");
    }
}

#[test]
fn pairs_come_in_the_order_of_their_likelihood_and_end() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    story.see(Observation::Nothing);
    story.refused((2, 1));
    assert_eq!(story.next_refused((1, 1)), Next::Done(Outcome::InDoubt));
    // Another key in doubt: every pair that the meter may hold is tried, the likeliest first.
    story.begin(own(KeyType::GAK));
    story.opened((1, 1));
    story.accepted();
    for pair in [(1, 2), (1, 1), (2, 2)] {
        story.refused(pair);
    }
    assert_eq!(story.next_refused((2, 1)), Next::Done(Outcome::InDoubt));
    assert_eq!(story.meter.pairs(SETUP, None).len(), 4);
}

/// I3: a candidate whose turn never came would be as good as lost.
#[test]
fn a_meter_that_holds_an_unlikely_pair_is_found_by_one_of_the_next_probes() {
    let mut doubtful = Story::new();
    doubtful.form = TransferForm::WrappedKey;
    for key_type in [KeyType::GUEK, KeyType::GAK].repeat(5) {
        doubtful.begin_urgent(own(key_type));
        while doubtful.meter.transfer.is_some() {
            doubtful.see(Observation::Nothing);
        }
    }
    let candidates = doubtful.candidates(KeyType::GUEK);
    assert_eq!((candidates.len(), doubtful.candidates(KeyType::GAK).len()), (6, 6));
    for held in candidates.iter().flat_map(|guek| candidates.iter().map(move |gak| (*guek, *gak))) {
        let mut story = doubtful.clone();
        let mut probes = 0;
        while probes < 8 && story.slot(KeyType::GUEK).in_doubt() {
            probes += 1;
            story.begin(OrderedKeys::Probe);
            let mut exchanges = 0;
            while story.meter.transfer.is_some() {
                exchanges += 1;
                let pair = story.stage_pair();
                if pair == (KeyPair { encryption: number(held.0), authentication: number(held.1) }) {
                    assert_eq!(story.exchange(held), Next::Done(Outcome::Probed));
                } else {
                    story.see(Observation::Nothing);
                }
            }
            assert!(exchanges <= 12, "a round is bounded");
        }
        assert_eq!((story.active(KeyType::GUEK), story.active(KeyType::GAK)), (Some(held.0), Some(held.1)), "{held:?}");
    }
}

#[test]
fn a_slot_in_doubt_takes_so_many_candidates_and_no_more() {
    for key_type in [KeyType::GUEK, KeyType::GAK] {
        let mut story = Story::new();
        for _ in 1..MOST_CANDIDATES {
            story.begin_urgent(own(key_type));
            story.opened((1, 1));
            while story.see(Observation::Nothing) == Next::Send {}
        }
        assert_eq!(story.candidates(key_type).len(), MOST_CANDIDATES);
        // I3: none is dropped for it.
        let before = story.meter.clone();
        assert_eq!(
            story.try_begin(own(key_type), true),
            Err(TransferError::TooManyCandidates { key_type, most: MOST_CANDIDATES })
        );
        assert_eq!(story.meter, before);
        // The way out: a probe shows what it holds, and another version can be brought.
        story.begin(OrderedKeys::Probe);
        assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::Probed));
        let next = u32::try_from(MOST_CANDIDATES).unwrap() + 1;
        story.rotate(own(key_type), (1, 1), if key_type == KeyType::GUEK { (next, 1) } else { (1, next) });
    }
}

#[test]
fn a_kek_in_doubt_takes_so_many_candidates_until_a_guek_shows_which_one_it_is() {
    let mut story = Story::new();
    for _ in 1..MOST_KEK_CANDIDATES {
        story.begin(compound());
        story.opened((1, 1));
        // The KEK left; the association is gone, and the GUEK never leaves.
        while story.see(Observation::Nothing) == Next::Send {}
    }
    assert_eq!(story.candidates(KeyType::KEK).len(), MOST_KEK_CANDIDATES);
    assert_eq!(
        story.try_begin(compound(), true),
        Err(TransferError::TooManyCandidates { key_type: KeyType::KEK, most: MOST_KEK_CANDIDATES })
    );
    // The meter holds the first KEK. GUEKs go out under each in turn, until one arrives.
    let mut transfers = 0;
    while story.slot(KeyType::KEK).held().unwrap().number() != number(1) || story.slot(KeyType::KEK).unresolved() {
        transfers += 1;
        assert!(transfers < 150, "the turn of each KEK comes");
        story.begin(own(KeyType::GUEK));
        let held = story.slot(KeyType::GUEK).held().unwrap().number().number();
        story.opened((held, 1));
        let key = *story.meter.transfer.as_ref().unwrap().current().unwrap();
        story.see(Observation::Nothing);
        let now = if key.kek == number(1) { key.version.number() } else { held };
        while story.stage_pair().encryption != number(now) {
            story.see(Observation::Nothing);
        }
        story.exchange((now, 1));
    }
    story.begin(compound());
}

/// A head-end that plays its own meter: it reports nothing, lets the new pair fail and answers
/// under the former one. Nothing of it is in doubt.
#[test]
fn a_slot_takes_so_many_versions_in_doubt_or_not_and_then_one_a_day() {
    const DAY: i64 = 86_400_000;
    let full = |key_type, wait_ms| {
        Err(TransferError::SlotFull { key_type, most: MOST_VERSIONS, wait: std::time::Duration::from_millis(wait_ms) })
    };
    for key_type in [KeyType::GUEK, KeyType::GAK, KeyType::GBEK] {
        let mut story = Story::new();
        story.form = TransferForm::WrappedKey;
        let played = |story: &mut Story| {
            story.begin(own(key_type));
            story.see(Observation::Nothing);
            while story.meter.transfer.is_some() {
                let former = story.stage_pair() == KeyPair { encryption: number(1), authentication: number(1) };
                let next = if former { story.exchange((1, 1)) } else { story.see(Observation::Refusal) };
                assert!(!former || next == Next::Done(Outcome::NotApplied));
            }
        };
        for _ in 1..MOST_VERSIONS {
            played(&mut story);
            assert!(key_type == KeyType::GBEK || !story.slot(key_type).unresolved());
        }
        let before = story.meter.clone();
        assert_eq!(story.candidates(key_type).len(), MOST_VERSIONS);
        for urgent in [false, true] {
            assert_eq!(story.try_begin(own(key_type), urgent), full(key_type, 86_400_000));
        }
        story.now = NOW.after(DAY - 1);
        assert_eq!(story.try_begin(own(key_type), false), full(key_type, 1));
        assert_eq!(story.meter, before, "I3: none is dropped for it");
        // The meter is not out of reach: time helps, and so does a report of an officer.
        story.now = NOW.after(DAY);
        played(&mut story);
        assert_eq!(story.try_begin(own(key_type), false), full(key_type, 86_400_000));
        let newest = story.slot(key_type).versions().last().unwrap().number();
        story.meter.report_compromise(SETUP, key_type, newest, &Party::Anyone, story.now).unwrap();
        story.form = TransferForm::Frames;
        let next = newest.number() + 1;
        if key_type == KeyType::GBEK {
            story.begin(own(key_type));
            story.opened((1, 1));
            assert_eq!(story.accepted(), Next::Done(Outcome::Acknowledged));
        } else {
            story.rotate(own(key_type), (1, 1), if key_type == KeyType::GUEK { (next, 1) } else { (1, next) });
        }
        assert_eq!(story.active(key_type), Some(next));
        assert_eq!(story.try_begin(own(key_type), false), full(key_type, 86_400_000));
        // What is proven lets go of those before it, and the slot has room again.
        story.now = story.now.after(Retention::DEFAULT.milliseconds());
        assert!(!story.meter.expire_keys(Retention::DEFAULT, story.now).is_empty());
        for _ in 0..3 {
            let id = story.begin(own(key_type));
            story.meter.withdraw_transfer(id, story.now).unwrap();
        }
    }
}

#[test]
fn a_master_key_takes_its_place_among_the_versions_of_a_full_slot() {
    for key_type in [KeyType::GUEK, KeyType::KEK] {
        let mut story = Story::new();
        let slot = story.meter.slots.get_mut(SETUP, key_type).unwrap();
        for _ in 1..MOST_VERSIONS {
            slot.add_version(diversified(KeyState::PreActive), NOW).unwrap();
        }
        let before = story.meter.clone();
        assert!(
            matches!(story.try_begin(compound(), true), Err(TransferError::SlotFull { key_type: full, .. }) if full == key_type)
        );
        assert_eq!(story.meter, before);
        // What is destroyed takes no place.
        story.meter.slots.get_mut(SETUP, key_type).unwrap().transition(number(9), KeyState::Destroyed, NOW).unwrap();
        story.begin(compound());
    }
}

#[test]
fn orders_that_are_withdrawn_again_and_again_leave_one_version() {
    let mut story = Story::new();
    let withdrawn = |story: &mut Story, keys| {
        let id = story.begin(keys);
        story.meter.withdraw_transfer(id, NOW).unwrap();
        story.store();
    };
    let numbers = |story: &Story, key_type| {
        story.slot(key_type).versions().iter().map(|version| version.number().number()).collect::<Vec<_>>()
    };
    for _ in 0..10 {
        withdrawn(&mut story, compound());
    }
    for key_type in [KeyType::KEK, KeyType::GUEK] {
        assert_eq!(numbers(&story, key_type), [1, 11]);
        assert_eq!(story.version(key_type, 11).state(), KeyState::Destroyed);
        assert!(story.slot(key_type).version(number(10)).is_none());
    }
    // A number never names two keys.
    story.rotate(own(KeyType::GUEK), (1, 1), (12, 1));
    for _ in 0..3 {
        withdrawn(&mut story, own(KeyType::GUEK));
    }
    assert_eq!(numbers(&story, KeyType::GUEK), [1, 11, 12, 15]);
    // One that somebody knows, or counted with, stays on the books.
    let id = story.begin(own(KeyType::GUEK));
    story.meter.report_compromise(SETUP, KeyType::GUEK, number(16), &Party::Vendor, NOW).unwrap();
    story.meter.withdraw_transfer(id, NOW).unwrap();
    let id = story.begin(own(KeyType::GUEK));
    let counted = story.meter.slots.get_mut(SETUP, KeyType::GUEK).unwrap().version_mut(number(17)).unwrap();
    counted.counters_mut().unwrap().raise_floor(CounterKey::Setup, 700, None).unwrap();
    story.meter.withdraw_transfer(id, NOW).unwrap();
    for _ in 0..3 {
        withdrawn(&mut story, own(KeyType::GUEK));
    }
    assert_eq!(numbers(&story, KeyType::GUEK), [1, 11, 12, 15, 16, 17, 20]);
}

/// Rows from before the bound keep what they have: few pairs are made of them, and all pairs in
/// turn.
#[test]
fn few_pairs_are_made_of_many_candidates() {
    for (gueks, gaks) in [(1, 1), (2, 3), (12, 1), (1, 13), (5, 4), (40, 30), (900, 2)] {
        let mut story = Story::new();
        for (key_type, count) in [(KeyType::GUEK, gueks), (KeyType::GAK, gaks)] {
            let slot = story.meter.slots.get_mut(SETUP, key_type).unwrap();
            for moment in 1..count {
                let version = slot.add_version(diversified(KeyState::PreActive), NOW).unwrap();
                slot.mark_left(version, moment, number(1)).unwrap();
            }
        }
        // All pairs in order of their likelihood: the held version first, then the newest.
        let ranked = |count: u32| [1].into_iter().chain((2..=count).rev()).collect::<Vec<_>>();
        let mut all = Vec::new();
        for (at, guek) in ranked(gueks).into_iter().enumerate() {
            all.extend(ranked(gaks).into_iter().enumerate().map(|(other, gak)| (at + other, (guek, gak))));
        }
        all.sort_by_key(|(rank, _)| *rank);
        let all: Vec<(u32, u32)> = all.into_iter().map(|(_, pair)| pair).collect();
        let turns = all.len().saturating_sub(8).div_ceil(4).max(1);
        let turns = if all.len() > 12 { turns } else { 1 };
        let mut tried = std::collections::BTreeSet::new();
        for turn in 0..turns {
            story.meter.sequence = u32::try_from(turn).unwrap();
            let pairs = story.meter.pairs(SETUP, None);
            let pairs: Vec<_> =
                pairs.iter().map(|pair| (pair.encryption.number(), pair.authentication.number())).collect();
            assert!(pairs.len() <= 12);
            let likeliest = if all.len() > 12 { 8 } else { all.len() };
            assert_eq!(pairs[..likeliest], all[..likeliest]);
            assert_eq!(
                pairs[likeliest..],
                all[likeliest..][turn * 4..all.len().min(likeliest + turn * 4 + 4) - likeliest]
            );
            tried.extend(pairs);
        }
        assert_eq!(tried.len(), all.len(), "the turn of every pair comes");
    }
}

#[test]
fn a_counter_is_followed_with_the_same_keys_and_not_for_ever() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    for _ in 0..3 {
        let before = story.stage();
        assert_eq!(story.see(Observation::CounterFollowed), Next::Send);
        let (Stage::Associate { pair, challenge, .. }, Stage::Associate { pair: known, challenge: earlier, .. }) =
            (story.stage(), before)
        else {
            panic!()
        };
        assert_eq!(pair, known);
        assert_ne!(challenge, earlier, "the octets change, so the challenge does");
    }
    assert_eq!(story.see(Observation::CounterFollowed), Next::Done(Outcome::InDoubt));
    // Nothing has left.
    assert_eq!(story.version(KeyType::GUEK, 2).state(), KeyState::Destroyed);
}

#[test]
fn a_challenge_that_is_not_to_be_answered_costs_another_association_only() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    for pair in [(1, 1), (2, 1)] {
        for _ in 0..MOST_UNFIT {
            let before = story.meter.clone();
            story.expect(pair);
            assert_eq!(story.see(Observation::ChallengeUnfit), Next::Send);
            let (Stage::Associate { challenge, .. }, Some(Stage::Associate { challenge: earlier, .. })) =
                (story.stage(), before.transfer.as_ref().map(|transfer| transfer.stage.clone()))
            else {
                panic!()
            };
            assert_ne!(challenge, earlier, "the octets change, so the challenge does");
            assert_unmoved(&before, &story.meter);
        }
        story.exchange(pair);
        if pair == (1, 1) {
            story.see(Observation::Nothing);
        }
    }
    assert_eq!(story.active(KeyType::GUEK), Some(2));
}

#[test]
fn a_meter_that_sends_no_other_challenge_counts_as_silent() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    story.see(Observation::Nothing);
    let slots = story.meter.slots.clone();
    for _ in 0..MOST_UNFIT {
        assert_eq!(story.see(Observation::ChallengeUnfit), Next::Send);
    }
    // The count begins again with a challenge that can be answered only.
    story.expect((2, 1));
    assert_eq!(story.see(Observation::ChallengeUnfit), Next::Send);
    story.expect((1, 1));
    assert_eq!(story.see(Observation::ChallengeUnfit), Next::Done(Outcome::InDoubt));
    assert_eq!(story.meter.slots, slots);
    // Nor does it stay in the way.
    story.begin(OrderedKeys::Probe);
    assert_eq!(story.see(Observation::ChallengeUnfit), Next::Send);
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::Probed));
}

/// All but what tells one association from the next.
fn assert_unmoved(before: &Meter, after: &Meter) {
    let (mut before, mut after) = (before.clone(), after.clone());
    let (earlier, transfer) = (before.transfer.as_mut().unwrap(), after.transfer.as_mut().unwrap());
    assert_eq!((transfer.step, transfer.unfit), (earlier.step + 1, earlier.unfit + 1));
    (transfer.step, transfer.unfit, transfer.stage) = (earlier.step, earlier.unfit, earlier.stage.clone());
    assert_eq!(after, before);
}

#[test]
fn a_new_kek_is_proven_by_the_guek_that_left_under_it() {
    let mut story = Story::new();
    story.begin(compound());
    story.opened((1, 1));
    assert_eq!((story.candidates(KeyType::KEK), story.candidates(KeyType::GUEK)), (vec![1, 2], vec![1]));
    story.accepted();
    assert_eq!(story.candidates(KeyType::GUEK), [1, 2]);
    assert_eq!(story.meter.transfer.as_ref().unwrap().current().unwrap().kek, number(2));
    assert_eq!(story.active(KeyType::KEK), Some(1));
    story.accepted();
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Proven));
    assert_eq!((story.active(KeyType::KEK), story.active(KeyType::GUEK)), (Some(2), Some(2)));
    assert_eq!(story.candidates(KeyType::KEK), [1, 2]);
}

#[test]
fn a_kek_whose_guek_was_lost_is_found_by_the_next_transfer() {
    for kek_applied in [true, false] {
        let mut story = Story::new();
        story.begin(compound());
        story.opened((1, 1));
        story.accepted();
        story.see(Observation::Nothing);
        story.refused((2, 1));
        assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::NotApplied));
        assert_eq!(story.active(KeyType::KEK), Some(1));
        assert!(story.slot(KeyType::KEK).in_doubt());
        let accepted = story
            .meter
            .acceptance(None, |_, key_type| key_type.standard_key_id().is_some())
            .into_iter()
            .find(|key| key.key_type == KeyType::KEK)
            .unwrap();
        assert_eq!((accepted.verdict, accepted.remedy), (Verdict::InDoubt, Some(Remedy::Rotation)));
        // Each KEK gets its turn.
        let held = if kek_applied { 2 } else { 1 };
        let mut tried = Vec::new();
        for guek in 3.. {
            story.begin(own(KeyType::GUEK));
            story.opened((1, 1));
            let kek = story.meter.transfer.as_ref().unwrap().current().unwrap().kek.number();
            tried.push(kek);
            story.accepted();
            if kek == held {
                assert_eq!(story.exchange((guek, 1)), Next::Done(Outcome::Proven));
                break;
            }
            while story.stage_pair().encryption.number() != 1 {
                story.see(Observation::Refusal);
            }
            assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::NotApplied));
        }
        assert!(tried.len() <= 2, "{tried:?}");
        assert_eq!(story.active(KeyType::KEK), Some(held));
        assert!(!story.slot(KeyType::KEK).in_doubt());
    }
}

proptest! {
    /// Deliveries of compound transfers are lost at random, the KEK's, the GUEK's or both, and
    /// power failures take the last KEK back; then all goes well. The KEK that the meter holds gets
    /// its turn soon, whichever it is and however many there are.
    #[test]
    fn a_kek_in_doubt_is_found_by_transfers_alone(
        faults in prop::collection::vec((any::<bool>(), any::<bool>(), prop::bool::weighted(0.2)), 1..8)
    ) {
        let mut story = Story::new();
        let (mut kek, mut kek_before, mut guek, mut transfers) = (1, 1, 1, 0);
        let mut faults = faults.into_iter();
        loop {
            let fault = faults.next();
            let (kek_arrives, guek_arrives, power_fails) = fault.unwrap_or((true, true, false));
            if power_fails {
                kek = kek_before;
            }
            // It is never in doubt which GUEK it holds, since each transfer ends with an exchange.
            story.begin(compound());
            story.opened((guek, 1));
            let [first, second] = story.meter.transfer.as_ref().unwrap().keys.clone().try_into().unwrap();
            if kek_arrives && story.meter.transfer.as_ref().unwrap().keys[0].kek.number() == kek {
                (kek_before, kek) = (kek, first.version.number());
            }
            story.accepted();
            if guek_arrives && first.version.number() == kek {
                guek = second.version.number();
            }
            story.accepted();
            while story.stage_pair().encryption.number() != guek {
                story.see(Observation::Refusal);
            }
            let outcome = story.exchange((guek, 1));
            if fault.is_none() {
                transfers += 1;
                if outcome == Next::Done(Outcome::Proven) {
                    break;
                }
                prop_assert!(transfers < 40, "KEK {kek} never gets its turn");
            }
        }
        prop_assert_eq!(story.active(KeyType::KEK), Some(kek));
        prop_assert!(!story.slot(KeyType::KEK).in_doubt());
    }
}

#[test]
fn what_the_association_shows_decides_under_which_kek_the_key_leaves() {
    let mut story = Story::new();
    story.begin(compound());
    story.opened((1, 1));
    story.accepted();
    story.see(Observation::Nothing);
    story.refused((2, 1));
    story.next_refused((1, 1));
    story.begin_urgent(own(KeyType::GUEK));
    // The meter has the GUEK of the compound transfer, so its KEK too.
    story.refused((1, 1));
    story.opened((2, 1));
    assert_eq!(story.meter.transfer.as_ref().unwrap().current().unwrap().kek, number(2));
    assert_eq!(story.active(KeyType::KEK), Some(2));
}

#[test]
fn the_association_is_opened_again_for_the_second_key() {
    let mut story = Story::new();
    story.begin(compound());
    story.opened((1, 1));
    story.see(Observation::Refusal);
    assert!(matches!(story.stage(), Stage::Associate { purpose: ExchangePurpose::Open, .. }));
    // It never opens: the GUEK never left, the KEK may have arrived.
    assert_eq!(story.see(Observation::Nothing), Next::Done(Outcome::InDoubt));
    assert_eq!(story.version(KeyType::GUEK, 2).state(), KeyState::Destroyed);
    assert_eq!(story.candidates(KeyType::KEK), [1, 2]);
    // No probe decides which KEK it holds, so another transfer is nothing urgent.
    story.rotate(compound(), (1, 1), (3, 1));
    assert_eq!(story.active(KeyType::KEK), Some(3));
}

#[test]
fn a_head_end_that_ciphers_gets_the_wrapped_key_and_the_hsm_makes_the_proof() {
    let mut story = Story::new();
    story.form = TransferForm::WrappedKey;
    story.begin(own(KeyType::GUEK));
    assert_eq!(story.stage(), Stage::Deliver { pair: None });
    assert_eq!(story.candidates(KeyType::GUEK), [1, 2]);
    story.accepted();
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Proven));

    story.begin(own(KeyType::GUEK));
    story.see(Observation::Nothing);
    assert_eq!(story.see(Observation::Attested { holds: true }), Next::Done(Outcome::Attested));
    assert_eq!(story.version(KeyType::GUEK, 3).transport().evidence, Evidence::Attested);
    story.begin(own(KeyType::GUEK));
    story.see(Observation::Nothing);
    assert_eq!(story.see(Observation::Attested { holds: false }), Next::Done(Outcome::InDoubt));
    // Where the HSM ciphers, a head-end holds no key, and nothing that it says counts.
    story.form = TransferForm::Frames;
    story.begin_urgent(own(KeyType::GUEK));
    story.opened((3, 1));
    story.accepted();
    let before = story.active(KeyType::GUEK);
    story.see(Observation::Attested { holds: true });
    assert_eq!(story.active(KeyType::GUEK), before);
}

#[test]
fn keys_that_no_exchange_uses_are_acknowledged() {
    let mut story = Story::new();
    story.begin(own(KeyType::GBEK));
    story.opened((1, 1));
    assert_eq!(story.accepted(), Next::Done(Outcome::Acknowledged));
    assert_eq!(
        (story.active(KeyType::GBEK), story.version(KeyType::GBEK, 2).transport().evidence),
        (Some(2), Evidence::Acknowledged)
    );
    story.begin(own(KeyType::GBEK));
    story.opened((1, 1));
    assert_eq!(story.see(Observation::Answered { result: 9, meter_counter: 99 }), Next::Done(Outcome::InDoubt));
    assert_eq!(story.active(KeyType::GBEK), Some(2));
}

#[test]
fn an_earlier_answer_that_is_relayed_again_acknowledges_nothing() {
    let mut story = Story::new();
    story.begin(own(KeyType::GBEK));
    story.opened((1, 1));
    let earlier = story.version(KeyType::GUEK, 1).transport().meter_counter;
    assert_eq!(story.see(Observation::Answered { result: 0, meter_counter: earlier }), Next::Done(Outcome::InDoubt));
    assert_eq!((story.active(KeyType::GBEK), story.candidates(KeyType::GBEK)), (Some(1), vec![1, 2]));
}

#[test]
fn a_key_of_a_group_is_acknowledged_and_recorded() {
    let group = Owner::Group(GroupId(3));
    let shared = |key_type| OrderedKeys::Shared { owner: group, key_type, version: number(7) };
    let mut story = Story::new();
    story.begin(shared(KeyType::GBEK));
    story.opened((1, 1));
    assert_eq!(
        story.meter.shared.iter().map(|shared| (shared.version.number(), shared.acknowledged)).collect::<Vec<_>>(),
        [(7, false)]
    );
    assert_eq!(story.accepted(), Next::Done(Outcome::Acknowledged));
    assert!(story.meter.shared[0].acknowledged);
    assert_eq!(
        story.findings,
        [Finding::SharedAcknowledged { owner: group, key_type: KeyType::GBEK, version: number(7) }]
    );
    // The meter's own slot has nothing to do with it.
    assert_eq!(story.active(KeyType::GBEK), Some(1));
    // I3: what takes the place of a key of exchanges must be a candidate of its slot.
    for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GAK] {
        assert_eq!(story.try_begin(shared(key_type), false), Err(TransferError::NotShared { key_type }));
    }
}

#[test]
fn a_meter_that_has_left_the_group_gets_nothing_more_of_it() {
    let mut story = Story::new();
    story.begin(OrderedKeys::Shared { owner: Owner::Group(GroupId(3)), key_type: KeyType::GBEK, version: number(7) });
    assert!(story.meter.set_member(GroupId(3), false) && !story.meter.set_member(GroupId(3), false));
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::Withdrawn));
    assert_eq!(story.meter.shared, []);
}

#[test]
fn a_probe_delivers_nothing() {
    let mut story = Story::new();
    story.form = TransferForm::WrappedKey;
    story.begin(OrderedKeys::Probe);
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::Probed));
    assert_eq!(story.version(KeyType::GUEK, 1).transport().evidence, Evidence::Proven);
    assert_eq!(story.candidates(KeyType::GUEK), [1]);
}

#[test]
fn an_urgent_transfer_makes_a_third_candidate() {
    let mut story = Story::new();
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    story.see(Observation::Nothing);
    story.refused((2, 1));
    story.next_refused((1, 1));
    assert_eq!(story.try_begin(own(KeyType::GUEK), false), Err(TransferError::InDoubt { key_type: KeyType::GUEK }));
    story.begin_urgent(own(KeyType::GUEK));
    story.opened((1, 1));
    assert_eq!(story.candidates(KeyType::GUEK), [1, 2, 3]);
    story.accepted();
    assert_eq!(story.exchange((3, 1)), Next::Done(Outcome::Proven));
    // All three until the retention time has passed, then the proven one.
    assert!(!story.meter.release_candidates(1, NOW));
    assert!(story.meter.release_candidates(1, NOW.after(1)));
    assert_eq!(story.candidates(KeyType::GUEK), [3]);
}

#[test]
fn a_meter_that_goes_back_is_noticed_and_needs_a_new_key() {
    let mut story = Story::new();
    story.rotate(compound(), (1, 1), (2, 1));
    story.begin(OrderedKeys::Probe);
    story.refused((2, 1));
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::Probed));
    // I3: an earlier version never becomes active again.
    assert_eq!((story.active(KeyType::GUEK), story.slot(KeyType::GUEK).held().unwrap().number()), (Some(2), number(1)));
    assert!(story.slot(KeyType::GUEK).in_doubt());
    // I3: nobody knows yet that it went back to the earlier KEK too; nothing is released.
    assert!(!story.slot(KeyType::KEK).in_doubt());
    assert!(!story.meter.release_candidates(0, NOW));
    // It is known what it holds, so the next transfer is nothing urgent. The first KEK is the wrong
    // one.
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    story.accepted();
    story.refused((3, 1));
    assert_eq!(story.exchange((1, 1)), Next::Done(Outcome::NotApplied));
    story.rotate(own(KeyType::GUEK), (1, 1), (4, 1));
    assert_eq!(story.slot(KeyType::KEK).held().unwrap().number(), number(1));
    assert_eq!(story.active(KeyType::KEK), Some(2));
    assert!(!story.meter.release_candidates(0, NOW), "the KEK is in doubt still");
    story.rotate(compound(), (4, 1), (5, 1));
    assert!(story.meter.release_candidates(0, NOW));
    assert_eq!((story.candidates(KeyType::KEK), story.candidates(KeyType::GUEK)), (vec![3], vec![5]));
}

#[test]
fn a_compromised_version_is_held_but_never_granted() {
    let mut story = Story::new();
    let compromise = |story: &mut Story, version| {
        story
            .meter
            .slots
            .get_mut(SETUP, KeyType::GUEK)
            .unwrap()
            .transition(number(version), KeyState::Compromised, NOW)
            .unwrap();
    };
    compromise(&mut story, 1);
    assert!(story.granted(KeyType::GUEK).is_empty());
    // To replace it is nothing urgent: what the meter holds is known.
    story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    // The new one, too, while it is on its way: the meter takes it, and it never becomes active.
    compromise(&mut story, 2);
    story.accepted();
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Proven));
    assert!(story.granted(KeyType::GUEK).is_empty());
    assert_eq!((story.active(KeyType::GUEK), story.candidates(KeyType::GUEK)), (None, vec![1, 2]));
    // One that is compromised before it leaves does not leave.
    story.begin(own(KeyType::GUEK));
    compromise(&mut story, 3);
    story.see(Observation::Associated { meter_challenge: vec![9; 16], meter_counter: 50 });
    assert_eq!(story.see(Observation::Authenticated { meter_counter: 51 }), Next::Done(Outcome::Withdrawn));
    assert_eq!(story.candidates(KeyType::GUEK), [1, 2]);
    story.rotate(own(KeyType::GUEK), (2, 1), (4, 1));
    assert_eq!(story.granted(KeyType::GUEK), [4]);
}

#[test]
fn a_transfer_is_withdrawn_or_given_up_when_its_time_has_run_out() {
    let mut story = Story::new();
    let id = story.begin(own(KeyType::GUEK));
    assert!(matches!(story.try_begin(own(KeyType::GAK), true), Err(TransferError::UnderWay { .. })));
    story.meter.withdraw_transfer(id, NOW).unwrap();
    assert_eq!(story.version(KeyType::GUEK, 2).state(), KeyState::Destroyed);
    assert_eq!(story.meter.withdraw_transfer(id, NOW), Err(TransferError::NotUnderWay));

    story.begin(compound());
    story.opened((1, 1));
    // Half delivered when its time runs out: the KEK stays a candidate, the GUEK never left.
    story.now = NOW.after(HOUR);
    story.begin(OrderedKeys::Probe);
    assert_eq!(story.candidates(KeyType::KEK), [1, 2]);
    assert_eq!(story.version(KeyType::GUEK, 3).state(), KeyState::Destroyed);
}

#[test]
fn a_report_for_another_step_or_transfer_changes_nothing() {
    let mut story = Story::new();
    let id = story.begin(own(KeyType::GUEK));
    story.opened((1, 1));
    let before = story.meter.clone();
    let step = story.meter.transfer.as_ref().unwrap().step;
    for other in [0, step - 1, step + 1, u32::MAX] {
        assert_eq!(
            story.meter.observe(id, other, Observation::Attested { holds: true }, [9; CHALLENGE], NOW),
            Err(TransferError::OtherStep { at: step })
        );
    }
    let other = TransferId::from_octets(&[99; 16]).unwrap();
    assert_eq!(
        story.meter.observe(other, step, Observation::Nothing, [9; CHALLENGE], NOW),
        Err(TransferError::NotUnderWay)
    );
    assert_eq!(story.meter, before);
}

#[test]
fn what_travels_under_an_exposed_kek_is_exposed() {
    let mut story = Story::new();
    story.meter.slots.get_mut(SETUP, KeyType::KEK).unwrap().version_mut(number(1)).unwrap().expose(
        Party::Vendor,
        ExposureReason::Shipment,
        NOW,
    );
    story.rotate(compound(), (1, 1), (2, 1));
    // The KEK under the exposed one, and the GUEK under that.
    for key_type in [KeyType::KEK, KeyType::GUEK] {
        let exposures = story.version(key_type, 2).exposures().to_vec();
        assert_eq!(
            exposures,
            [Exposure { party: Party::Vendor, since: NOW, reason: ExposureReason::TransferUnderExposedKek }],
            "{key_type}"
        );
    }
}

#[test]
fn the_meters_counter_going_backwards_is_a_finding() {
    let mut story = Story::new();
    story.begin(OrderedKeys::Probe);
    story.see(Observation::Associated { meter_challenge: vec![1; 8], meter_counter: 500 });
    story.see(Observation::Authenticated { meter_counter: 501 });
    story.begin(OrderedKeys::Probe);
    story.see(Observation::Associated { meter_challenge: vec![1; 8], meter_counter: 3 });
    story.see(Observation::Authenticated { meter_counter: 4 });
    assert!(story.findings.contains(&Finding::MeterCounterBackwards { version: number(1), known: 501, seen: 4 }));
    assert_eq!(story.version(KeyType::GUEK, 1).transport().meter_counter, 501);
}

#[test]
fn a_guek_that_shows_a_released_kek_is_proven_all_the_same() {
    let mut story = Story::new();
    story.form = TransferForm::WrappedKey;
    story.begin(own(KeyType::GUEK));
    story.see(Observation::Nothing);
    story.refused((2, 1));
    story.next_refused((1, 1));
    story.begin_urgent(compound());
    story.accepted();
    story.accepted();
    assert_eq!(story.exchange((3, 1)), Next::Done(Outcome::Proven));
    // The KEK has been released slot by slot, the GUEK is still there.
    assert!(story.meter.slots.get_mut(SETUP, KeyType::KEK).unwrap().release_candidates(0, NOW));
    story.begin(OrderedKeys::Probe);
    story.refused((3, 1));
    while story.stage_pair().encryption != number(2) {
        story.see(Observation::Nothing);
    }
    assert_eq!(story.exchange((2, 1)), Next::Done(Outcome::Probed));
}

#[test]
fn what_cannot_begin_is_refused() {
    let mut story = Story::new();
    assert_eq!(story.try_begin(own(KeyType::KEK), false), Err(TransferError::KekAlone));
    assert_eq!(
        story.try_begin(own(KeyType::FIRMWARE), false),
        Err(TransferError::Slot(SlotError::NoSuchSlot { setup: SETUP, key_type: KeyType::FIRMWARE }))
    );
    let active = OrderedKeys::Own { key_type: KeyType::GUEK, new: diversified(KeyState::Active) };
    assert!(matches!(
        story.try_begin(active, false),
        Err(TransferError::Slot(SlotError::Transition { to: KeyState::Active, .. }))
    ));
    story.meter.class.status = MeterStatus::Quarantined;
    assert_eq!(story.try_begin(OrderedKeys::Probe, false), Err(TransferError::Status { status: "quarantined" }));
    story.meter.class.status = MeterStatus::InService;
    story.meter.sequence = u32::MAX - 3;
    assert_eq!(story.try_begin(OrderedKeys::Probe, false), Err(TransferError::SequenceUsedUp));

    let mut without = Story::new();
    without.meter.slots =
        Slots::new(vec![without.slot(KeyType::GUEK).clone(), without.slot(KeyType::GAK).clone()]).unwrap();
    assert_eq!(without.try_begin(own(KeyType::GUEK), false), Err(TransferError::NoKek { setup: SETUP }));
    without.meter.slots = Slots::new(vec![without.slot(KeyType::GUEK).clone()]).unwrap();
    assert_eq!(without.try_begin(own(KeyType::GUEK), false), Err(TransferError::NoKeys { setup: SETUP }));
}

/// A meter and what happens to it. After each step the row is written and read again.
#[derive(Clone)]
struct Story {
    meter: Meter,
    form: TransferForm,
    now: UnixMillis,
    begun: u8,
    meter_counter: u32,
    /// Of the last step.
    findings: Vec<Finding>,
}

impl Story {
    fn new() -> Self {
        let slots = [KeyType::KEK, KeyType::GUEK, KeyType::GAK, KeyType::GBEK].map(|key_type| {
            let mut slot = Slot::new(SETUP, key_type);
            slot.add_version(diversified(KeyState::Active), NOW).unwrap();
            slot
        });
        let meter = Meter {
            title: title(),
            class: MeterClass {
                vendor: FlagId::parse("KAM").unwrap(),
                profile: DeviceProfileName::parse("generic-suite0").unwrap(),
                status: MeterStatus::InService,
                groups: vec![GroupId(3)],
                head_end: None,
            },
            serial: "10000001".to_owned(),
            suite: SecuritySuite::Suite0,
            batch: String::new(),
            added: NOW,
            retired: None,
            slots: Slots::new(slots.to_vec()).unwrap(),
            sequence: 0,
            transfer: None,
            shared: Vec::new(),
        };
        Self { meter, form: TransferForm::Frames, now: NOW, begun: 0, meter_counter: 0, findings: Vec::new() }
    }

    fn try_begin(&mut self, keys: OrderedKeys, urgent: bool) -> Result<Step, TransferError> {
        self.begun += 1;
        let order = TransferOrder {
            id: TransferId::from_octets(&[self.begun; 16]).unwrap(),
            setup: SETUP,
            head_end: PrincipalId::new(island(), Role::HeadEnd, "hes-north").unwrap(),
            campaign: None,
            client_title: SystemTitle::parse("4D4D4D0000000001").unwrap(),
            form: self.form,
            keys,
            urgent,
            not_after: self.now.after(HOUR),
            challenge: [self.begun; CHALLENGE],
        };
        // Refusals are looked at on a copy, as a transaction does.
        let mut meter = self.meter.clone();
        let step = meter.begin_transfer(order, self.now)?;
        self.meter = meter;
        self.store();
        Ok(step)
    }

    fn begin(&mut self, keys: OrderedKeys) -> TransferId {
        self.try_begin(keys, false).unwrap();
        self.meter.transfer.as_ref().unwrap().id
    }

    fn begin_urgent(&mut self, keys: OrderedKeys) {
        self.try_begin(keys, true).unwrap();
    }

    fn see(&mut self, observation: Observation) -> Next {
        let (id, step) = self.meter.transfer.as_ref().map(|transfer| (transfer.id, transfer.step)).unwrap();
        let challenge = [u8::try_from(100 + step).unwrap(); CHALLENGE];
        let Step { next, findings } = self.meter.observe(id, step, observation, challenge, self.now).unwrap();
        assert_eq!(next == Next::Send, self.meter.transfer.is_some());
        self.findings = findings;
        self.store();
        next
    }

    fn store(&mut self) {
        let row = Bytes::from(self.meter.to_row().unwrap());
        assert_eq!(Meter::from_row(title(), &island(), row).unwrap(), self.meter);
    }

    /// The meter proves that it holds the pair that is tried now.
    fn exchange(&mut self, pair: (u32, u32)) -> Next {
        self.expect(pair);
        self.meter_counter += 1;
        assert_eq!(
            self.see(Observation::Associated { meter_challenge: vec![7; 32], meter_counter: self.meter_counter }),
            Next::Send
        );
        self.meter_counter += 1;
        self.see(Observation::Authenticated { meter_counter: self.meter_counter })
    }

    fn opened(&mut self, pair: (u32, u32)) {
        assert_eq!(self.exchange(pair), Next::Send);
        assert!(matches!(self.stage(), Stage::Deliver { .. }));
    }

    fn accepted(&mut self) -> Next {
        self.meter_counter += 1;
        self.see(Observation::Answered { result: 0, meter_counter: self.meter_counter })
    }

    fn refused(&mut self, pair: (u32, u32)) {
        assert_eq!(self.next_refused(pair), Next::Send);
    }

    fn next_refused(&mut self, pair: (u32, u32)) -> Next {
        self.expect(pair);
        self.see(Observation::Refusal)
    }

    fn expect(&self, (encryption, authentication): (u32, u32)) {
        assert_eq!(
            self.stage_pair(),
            KeyPair { encryption: number(encryption), authentication: number(authentication) }
        );
    }

    /// A whole transfer that goes well.
    fn rotate(&mut self, keys: OrderedKeys, from: (u32, u32), to: (u32, u32)) {
        self.begin(keys);
        self.opened(from);
        while matches!(self.stage(), Stage::Deliver { .. }) {
            self.accepted();
        }
        assert_eq!(self.exchange(to), Next::Done(Outcome::Proven));
    }

    fn stage(&self) -> Stage {
        self.meter.transfer.as_ref().unwrap().stage.clone()
    }

    fn stage_pair(&self) -> KeyPair {
        self.meter.transfer.as_ref().unwrap().pair().unwrap()
    }

    fn slot(&self, key_type: KeyType) -> &Slot {
        self.meter.slots.get(SETUP, key_type).unwrap()
    }

    fn version(&self, key_type: KeyType, version: u32) -> &KeyVersion {
        self.slot(key_type).version(number(version)).unwrap()
    }

    fn active(&self, key_type: KeyType) -> Option<u32> {
        self.slot(key_type).active().map(|version| version.number().number())
    }

    fn candidates(&self, key_type: KeyType) -> Vec<u32> {
        self.slot(key_type).candidates().map(|version| version.number().number()).collect()
    }

    fn granted(&self, key_type: KeyType) -> Vec<u32> {
        self.slot(key_type).grantable().map(|granted| granted.version.number().number()).collect()
    }
}

fn own(key_type: KeyType) -> OrderedKeys {
    OrderedKeys::Own { key_type, new: diversified(KeyState::PreActive) }
}

fn compound() -> OrderedKeys {
    OrderedKeys::Compound { kek: diversified(KeyState::PreActive), guek: diversified(KeyState::PreActive) }
}

fn diversified(state: KeyState) -> NewKeyVersion {
    let origin =
        KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    NewKeyVersion { state, origin, wrapped: None, fingerprint: None }
}

fn number(number: u32) -> KeyVersionNumber {
    KeyVersionNumber::new(number).unwrap()
}

fn title() -> SystemTitle {
    SystemTitle::parse("4B414D0000000001").unwrap()
}

fn island() -> IslandName {
    IslandName::parse("north").unwrap()
}

const SETUP: SecuritySetupId = SecuritySetupId::DEFAULT;
const NOW: UnixMillis = UnixMillis(1_795_165_200_000);
const HOUR: i64 = 3_600_000;
