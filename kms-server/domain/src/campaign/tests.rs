use std::num::{NonZeroU8, NonZeroU32};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    ApprovalError, DeviceProfileName, FlagId, IslandName, KeyDerivation, KeyLength, KeyOrigin, KeyType,
    MaintenanceWindow, MaintenanceWindows, MeterClass, MeterStatus, NewKeyVersion, Outcome, PlanChain, Quorum, Role,
    SecuritySuite, Slot, Slots, SystemTitle, Task, TaskEnd, TaskError, TaskState, WavePlanner, WaveSize, WaveTally,
    WrappedKey,
};

const NOW: UnixMillis = UnixMillis(1_795_248_000_000);

fn id() -> CampaignId {
    CampaignId::from_octets(&[7; 16]).unwrap()
}

fn officer(name: &str) -> PrincipalId {
    PrincipalId::new(IslandName::parse("north").unwrap(), Role::Officer, name).unwrap()
}

fn person(name: &str) -> PersonName {
    PersonName::parse(name).unwrap()
}

fn title(number: u64) -> SystemTitle {
    SystemTitle::parse(&format!("4B414D{number:010X}")).unwrap()
}

fn terms() -> CampaignTerms {
    CampaignTerms {
        quorum: Quorum::ONE,
        canary: 10,
        waves: vec![WaveSize::Meters(40), WaveSize::Percent(50)],
        success_threshold: 90,
        failure_limit: 5,
        windows: MaintenanceWindows::new("Europe/Berlin", vec![MaintenanceWindow::parse("22:00-05:00").unwrap()])
            .unwrap(),
        starts_per_minute: NonZeroU32::new(60),
        in_flight: NonZeroU32::new(500).unwrap(),
        attempts: NonZeroU8::new(3).unwrap(),
        back_off_seconds: 60,
    }
}

fn plan(meters: u64) -> Plan {
    let mut planner = WavePlanner::new(id());
    (1..=meters).for_each(|number| planner.add(title(number)));
    let terms = terms();
    Plan { meters: planner.total(), chunks: 1, digest: [9; 32], waves: planner.waves(terms.canary, &terms.waves) }
}

fn campaign(action: CampaignAction) -> Campaign {
    let content = CampaignContent {
        name: CampaignName::parse("GUEK of batch 41").unwrap(),
        action,
        setup: None,
        selection: CampaignSelection { batch: Some("B-41".to_owned()), ..CampaignSelection::default() },
        terms: terms(),
        requester: officer("ada"),
        requester_person: person("Ada"),
        created: NOW,
        plan: plan(100),
    };
    Campaign::draft(id(), content).unwrap()
}

fn running() -> Campaign {
    running_with(CampaignAction::Rotate(KeyType::GUEK))
}

fn running_with(action: CampaignAction) -> Campaign {
    let mut campaign = campaign(action);
    let digest = campaign.content_digest();
    campaign.approve(officer("bo"), person("Bo"), &digest, NOW).unwrap();
    campaign.start(NOW).unwrap();
    campaign.expanded = 1;
    campaign
}

fn result() -> WaveResult {
    WaveResult {
        started: NOW,
        ended: NOW.after(5),
        tallies: vec![WaveTally {
            vendor: "KAM".to_owned(),
            state: TaskState::Failed,
            reason: "not-applied".to_owned(),
            tasks: 3,
        }],
        timeline: vec![(NOW.after(1), 2), (NOW.after(2), 7)],
    }
}

/// A meter with imported keys.
fn meter(key_types: &[KeyType]) -> Meter {
    let mut slots = Vec::new();
    for key_type in key_types {
        let mut slot = Slot::new(SecuritySetupId::DEFAULT, *key_type);
        slot.add_version(
            NewKeyVersion {
                state: crate::KeyState::Active,
                origin: KeyOrigin::Imported,
                wrapped: Some(WrappedKey::new(*key_type, 1, Bytes::from_static(&[1; 24])).unwrap()),
                fingerprint: None,
            },
            NOW,
        )
        .unwrap();
        slots.push(slot);
    }
    Meter {
        title: title(1),
        class: MeterClass {
            vendor: FlagId::parse("KAM").unwrap(),
            profile: DeviceProfileName::parse("generic-suite0").unwrap(),
            status: MeterStatus::InService,
            groups: Vec::new(),
            head_end: None,
        },
        serial: "1".to_owned(),
        suite: SecuritySuite::Suite0,
        batch: "B-41".to_owned(),
        added: NOW,
        retired: None,
        slots: Slots::new(slots).unwrap(),
        sequence: 0,
        transfer: None,
        shared: Vec::new(),
    }
}

/// The slot gets a new active version of our own.
fn rotate(meter: &mut Meter, key_type: KeyType) {
    let slot = meter.slots.get_mut(SecuritySetupId::DEFAULT, key_type).unwrap();
    let number = slot.add_version(pre_active(), NOW).unwrap();
    slot.mark_left(number, 1, crate::KeyVersionNumber::FIRST).unwrap();
    slot.confirm(number, 2, crate::Evidence::Proven, NOW).unwrap();
}

fn pre_active() -> NewKeyVersion {
    NewKeyVersion {
        state: crate::KeyState::PreActive,
        origin: KeyOrigin::Diversified {
            root_version: 1,
            derivation: KeyDerivation::Sp800108Cmac,
            length: KeyLength::Aes128,
        },
        wrapped: None,
        fingerprint: None,
    }
}

#[test]
fn approval_needs_another_person_and_the_exact_content() {
    let mut campaign = campaign(CampaignAction::Probe);
    campaign.content.terms.quorum = Quorum::new(2).unwrap();
    let digest = campaign.content_digest();
    assert_eq!(campaign.approve(officer("bo"), person("Bo"), &[0; 32], NOW), Err(ApprovalError::OtherContent.into()));
    // Another certificate of the same person is the same person, however the name is written.
    assert_eq!(
        campaign.approve(officer("ada-2"), person("ADA"), &digest, NOW),
        Err(ApprovalError::OwnRequest { person: person("ADA") }.into())
    );
    campaign.approve(officer("bo"), person("Bo"), &digest, NOW).unwrap();
    assert_eq!(
        campaign.approve(officer("bo-2"), person("bo"), &digest, NOW),
        Err(ApprovalError::ApprovedAlready { person: person("bo") }.into())
    );
    assert!(campaign.start(NOW).unwrap_err().to_string().contains("one approval is missing"));
    campaign.approve(officer("cy"), person("Cy"), &digest, NOW).unwrap();
    assert_eq!(campaign.state, CampaignState::Approved);
    campaign.start(NOW).unwrap();
    assert_eq!((campaign.state, campaign.wave), (CampaignState::Running, 1));
    assert!(Quorum::new(0).is_err());
}

#[test]
fn every_change_of_the_content_changes_the_digest() {
    let base = campaign(CampaignAction::Probe);
    let changes: [fn(&mut CampaignContent); 8] = [
        |content| content.name = CampaignName::parse("other").unwrap(),
        |content| content.action = CampaignAction::TakeOver,
        |content| content.setup = Some(SecuritySetupId::DEFAULT),
        |content| content.selection.imported = true,
        |content| content.terms.failure_limit += 1,
        |content| content.terms.windows = MaintenanceWindows::always(),
        |content| content.plan.digest = [8; 32],
        |content| content.plan.waves.truncate(1),
    ];
    for change in changes {
        let mut other = base.clone();
        change(&mut other.content);
        assert_ne!(other.content_digest(), base.content_digest());
    }
    assert_ne!(
        Campaign { id: CampaignId::from_octets(&[8; 16]).unwrap(), ..base.clone() }.content_digest(),
        base.content_digest()
    );
}

#[test]
fn a_row_is_read_as_it_was_written() {
    let mut campaign = running();
    campaign.content.selection = CampaignSelection {
        whole_island: true,
        vendor: Some(FlagId::parse("KAM").unwrap()),
        profile: Some(DeviceProfileName::parse("generic-suite0").unwrap()),
        group: Some(crate::GroupId(0)),
        head_end: Some(PrincipalId::parse("urn:meterkms:north:head-end:hes-1").unwrap()),
        batch: Some(String::new()),
        active_before: Some(NOW),
        exposed_to: Some(crate::Party::Principal(officer("x"))),
        exposed_by: Some(crate::ExposureReason::Grant),
        imported: true,
        counter_used: Some(80),
        named: 3,
    };
    campaign.content.setup = Some(SecuritySetupId::from_octets([0, 0]));
    campaign.end_wave(result(), NOW).unwrap();
    campaign.pause("why".to_owned(), NOW).unwrap();
    assert_eq!(Campaign::from_row(campaign.id, campaign.to_row().into()).unwrap(), campaign);
    assert!(Campaign::from_row(campaign.id, Bytes::new()).is_err());
}

#[test]
fn a_wave_goes_on_pauses_and_ends_by_its_counts() {
    let campaign = running();
    let planned = campaign.planned_wave().unwrap().meters;
    let decide = |campaign: &Campaign, failed, succeeded| {
        campaign.decide(&WaveCounts {
            failed,
            succeeded,
            pending: planned.saturating_sub(failed + succeeded),
            ..WaveCounts::default()
        })
    };
    assert_eq!(decide(&campaign, 0, 0), WaveDecision::Wait);
    assert_eq!(decide(&campaign, 1, 3), WaveDecision::Wait);
    // 90 % of 10 can no longer succeed.
    assert!(matches!(decide(&campaign, 2, 0), WaveDecision::Pause { .. }));
    assert_eq!(decide(&campaign, 1, planned - 1), WaveDecision::NextWave);
    // Tasks that do not exist yet are waited for.
    assert_eq!(decide(&Campaign { expanded: 0, ..campaign.clone() }, 0, planned), WaveDecision::Wait);
    // What an officer has accepted counts no more.
    let mut resumed = campaign.clone();
    resumed.pause("too many".to_owned(), NOW).unwrap();
    resumed.resume(&WaveCounts { failed: 2, ..WaveCounts::default() }, NOW).unwrap();
    assert_eq!(decide(&resumed, 2, 0), WaveDecision::Wait);
    assert!(matches!(decide(&resumed, 4, 0), WaveDecision::Pause { .. }));
    // A wave of meters that cannot be reached is no failure.
    assert_eq!(campaign.decide(&WaveCounts { skipped: planned, ..WaveCounts::default() }), WaveDecision::NextWave);
    let mut last = campaign;
    last.wave = u32::try_from(last.content.plan.waves.len()).unwrap();
    let planned = last.planned_wave().unwrap().meters;
    assert_eq!(last.decide(&WaveCounts { succeeded: planned, ..WaveCounts::default() }), WaveDecision::Finish);
    last.end_wave(result(), NOW).unwrap();
    assert!(last.state == CampaignState::Finished && last.abort(String::new(), NOW).is_err());
}

#[test]
fn waves_have_their_sizes_and_every_meter_has_one_wave() {
    for total in [1_u64, 9, 60, 1_000, 20_000] {
        let plan = plan(total);
        assert_eq!(plan.waves.iter().map(|wave| wave.meters).sum::<u64>(), total);
        for (wave, planned) in (1..).zip(&plan.waves) {
            let members = plan.members(id(), wave, (1..=total).map(title));
            assert_eq!(members.len() as u64, planned.meters);
            assert!(members.iter().all(|meter| plan.wave_of(id(), *meter) == wave));
        }
        if total == 1_000 {
            // Canary 10, then 40, then halves of 1,000: the rest.
            let sizes: Vec<u64> = plan.waves.iter().map(|wave| wave.meters).collect();
            assert!(matches!(sizes.as_slice(), [10..=12, 40..=42, 500..=502, 440..=450]), "{sizes:?}");
        }
    }
}

#[test]
fn the_chain_of_the_plan_notices_every_change() {
    let whole = PlanChain::new(id()).link(b"12345678").link(b"87654321");
    assert_ne!(whole, PlanChain::new(id()).link(b"1234567887654321"));
    assert_ne!(whole, PlanChain::new(id()).link(b"87654321").link(b"12345678"));
    assert_ne!(whole, PlanChain::new(CampaignId::from_octets(&[8; 16]).unwrap()).link(b"12345678").link(b"87654321"));
}

#[test]
fn take_over_goes_kek_gak_and_the_rest() {
    let mut meter = meter(&[KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK, KeyType::LLS_SECRET]);
    let mut campaign = campaign(CampaignAction::TakeOver);
    campaign.state = CampaignState::Running;
    let mut task = Task::new(CampaignAction::TakeOver.first_step(&meter, None).unwrap(), NOW);
    let mut order = Vec::new();
    while !task.state.is_final() {
        task.lease(&campaign, 1_000, NOW).unwrap();
        let TaskWork::Rotate(key_type) = task.work() else { panic!("a probe") };
        task.begin(task.fence, SecuritySetupId::DEFAULT, task.work(), NOW).unwrap();
        order.push(key_type);
        rotate(&mut meter, key_type);
        if key_type == KeyType::KEK {
            rotate(&mut meter, KeyType::GUEK);
        }
        task.end(&campaign, Outcome::Proven, "", &meter, NOW);
        assert!(order.len() < 9);
    }
    assert_eq!((order, task.state), (vec![KeyType::KEK, KeyType::GAK, KeyType::GBEK], TaskState::Succeeded));
    assert_eq!(CampaignAction::TakeOver.first_step(&meter, None), None);
}

#[test]
fn what_is_in_doubt_is_probed_before_it_is_tried_again() {
    let mut meter = meter(&[KeyType::GUEK]);
    let campaign = running();
    let mut task = Task::new(campaign.content.action.first_step(&meter, None).unwrap(), NOW);
    assert!(task.lease(&campaign, 1_000, NOW).unwrap());
    let rotation = TaskWork::Rotate(KeyType::GUEK);
    assert_eq!(task.begin(task.fence + 1, SecuritySetupId::DEFAULT, rotation, NOW), Err(TaskError::NotHeld));
    task.begin(task.fence, SecuritySetupId::DEFAULT, rotation, NOW).unwrap();
    assert_eq!(task.end(&campaign, Outcome::InDoubt, "", &meter, NOW), TaskEnd::GoesOn);
    assert_eq!((task.state, task.due, task.reason.as_str()), (TaskState::Pending, NOW.after(60_000), "in-doubt"));
    assert_eq!(task.lease(&campaign, 1_000, NOW), Err(TaskError::NotHeld));

    let later = NOW.after(60_000);
    task.lease(&campaign, 1_000, later).unwrap();
    assert_eq!((task.fence, task.work()), (2, TaskWork::Probe));
    assert_eq!(
        task.begin(2, SecuritySetupId::DEFAULT, rotation, later),
        Err(TaskError::OtherWork { wanted: TaskWork::Probe })
    );
    task.begin(2, SecuritySetupId::DEFAULT, TaskWork::Probe, later).unwrap();
    // The probe shows the old key: the transfer is tried again.
    assert_eq!(task.end(&campaign, Outcome::Probed, "", &meter, later), TaskEnd::GoesOn);
    assert_eq!(task.work(), rotation);
    // Another time it shows the new one.
    rotate(&mut meter, KeyType::GUEK);
    assert_eq!(task.end(&campaign, Outcome::Probed, "", &meter, later), TaskEnd::Ended);
    assert_eq!(task.state, TaskState::Succeeded);
    assert_eq!(task.end(&campaign, Outcome::InDoubt, "", &meter, later), TaskEnd::Unchanged);
}

#[test]
fn what_no_probe_decides_is_tried_again_after_one() {
    // A probe shows a GUEK and a GAK. It shows an earlier one as well as the active one, and it
    // shows no KEK.
    let mut went_back = meter(&[KeyType::GUEK]);
    rotate(&mut went_back, KeyType::GUEK);
    went_back
        .slots
        .get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK)
        .unwrap()
        .confirm(crate::KeyVersionNumber::FIRST, 3, crate::Evidence::Proven, NOW)
        .unwrap();
    let mut kek_left = meter(&[KeyType::KEK, KeyType::GUEK]);
    let kek = kek_left.slots.get_mut(SecuritySetupId::DEFAULT, KeyType::KEK).unwrap();
    let number = kek.add_version(pre_active(), NOW).unwrap();
    kek.mark_left(number, 1, crate::KeyVersionNumber::FIRST).unwrap();
    for (meter, key_type, last) in
        [(went_back, KeyType::GUEK, TaskState::Failed), (kek_left, KeyType::KEK, TaskState::InDoubt)]
    {
        let campaign = running_with(CampaignAction::Rotate(key_type));
        assert!(meter.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap().in_doubt());
        let mut task =
            Task { probe: true, ..Task::new(campaign.content.action.first_step(&meter, None).unwrap(), NOW) };
        for attempt in 1..=3 {
            if task.work() == TaskWork::Probe {
                task.lease(&campaign, 1_000, task.due).unwrap();
                task.begin(task.fence, SecuritySetupId::DEFAULT, TaskWork::Probe, task.leased).unwrap();
                assert_eq!(task.end(&campaign, Outcome::Probed, "", &meter, task.leased), TaskEnd::GoesOn);
            }
            task.lease(&campaign, 1_000, task.due).unwrap();
            assert_eq!((task.work(), task.attempts), (TaskWork::Rotate(key_type), attempt - 1));
            task.begin(task.fence, SecuritySetupId::DEFAULT, task.work(), task.leased).unwrap();
            task.end(&campaign, Outcome::NotApplied, "", &meter, task.leased);
        }
        assert_eq!(task.state, last);
    }
}

#[test]
fn a_task_ends_after_its_attempts() {
    let meter = meter(&[KeyType::GUEK]);
    let campaign = running();
    let step = campaign.content.action.first_step(&meter, None).unwrap();
    for (outcome, last) in [(Outcome::NotApplied, TaskState::Failed), (Outcome::InDoubt, TaskState::InDoubt)] {
        let mut task = Task::new(step, NOW);
        let mut now = NOW;
        for attempt in 1.. {
            task.lease(&campaign, 1_000, now).unwrap();
            task.begin(task.fence, step.setup, task.work(), now).unwrap();
            if task.end(&campaign, outcome, "refused 3", &meter, now) == TaskEnd::Ended {
                assert_eq!((attempt, task.state, task.reason.as_str()), (3, last, "refused 3"));
                break;
            }
            now = task.due;
        }
        assert_eq!(now, NOW.after(180_000));
    }
    // So does one whose leases all run out.
    let mut task = Task::new(step, NOW);
    let mut now = NOW;
    for _ in 0..3 {
        assert!(task.lease(&campaign, 1_000, now).unwrap());
        assert!(!task.is_due(now.after(999)));
        now = now.after(1_000);
        assert_eq!(task.check(task.fence, now), Err(TaskError::NotHeld));
    }
    assert!(!task.lease(&campaign, 1_000, now).unwrap());
    assert_eq!((task.state, task.reason.as_str()), (TaskState::Failed, "the lease ran out"));
}

#[test]
fn a_selection_that_says_nothing_selects_nothing() {
    assert!(CampaignSelection::default().check().is_err());
    let all = CampaignSelection { whole_island: true, ..CampaignSelection::default() };
    assert!(all.check().is_ok());
    let mut meter = meter(&[KeyType::GUEK]);
    assert!(all.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
    assert!(!all.matches(&meter, CampaignAction::Rotate(KeyType::GAK), None));
    let imported = CampaignSelection { imported: true, ..CampaignSelection::default() };
    assert!(imported.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
    let old = CampaignSelection { active_before: Some(NOW), ..CampaignSelection::default() };
    assert!(!old.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
    let exposed = CampaignSelection { exposed_to: Some(crate::Party::Vendor), ..CampaignSelection::default() };
    assert!(!exposed.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
    let slot = meter.slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
    slot.version_mut(crate::KeyVersionNumber::FIRST).unwrap().expose(
        crate::Party::Vendor,
        crate::ExposureReason::Shipment,
        NOW,
    );
    assert!(exposed.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
    rotate(&mut meter, KeyType::GUEK);
    assert!(
        !imported.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None)
            && !exposed.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None)
    );
    meter.class.status = MeterStatus::Quarantined;
    assert!(!all.matches(&meter, CampaignAction::Rotate(KeyType::GUEK), None));
}

proptest! {
    /// Whatever counts come in: a campaign that went on has not failed too much, and one that ended
    /// has no open task.
    #[test]
    fn no_wave_ends_below_its_threshold(total in 1_u64..5_000, failed in 0_u64..60, in_doubt in 0_u64..60, skipped in 0_u64..60, open in 0_u64..60) {
        let mut campaign = running();
        campaign.content.plan.waves[0].meters = total;
        let succeeded = total.saturating_sub(failed + in_doubt + skipped + open);
        prop_assume!(failed + in_doubt + skipped + open + succeeded == total);
        let counts = WaveCounts { pending: open, succeeded, failed, in_doubt, skipped, ..WaveCounts::default() };
        match campaign.decide(&counts) {
            WaveDecision::NextWave | WaveDecision::Finish => {
                prop_assert_eq!(open, 0);
                prop_assert!(failed + in_doubt <= 5);
                prop_assert!(succeeded * 100 >= (total - skipped) * 90);
            }
            WaveDecision::Wait => prop_assert!(open > 0 && failed + in_doubt <= 5),
            WaveDecision::Pause { .. } => prop_assert!(failed + in_doubt > 0),
        }
    }

    /// Fencing tokens only grow, a final task stays so, and no lease is good after another was
    /// given out.
    #[test]
    fn leases_are_fenced(steps in prop::collection::vec((0_u8..6, 0_i64..2_000), 1..60)) {
        let meter = meter(&[KeyType::GUEK]);
        let campaign = running();
        let step = campaign.content.action.first_step(&meter, None).unwrap();
        let (mut task, mut now, mut held) = (Task::new(step, NOW), NOW, None);
        for (act, later) in steps {
            now = now.after(later);
            let before = task.clone();
            match act {
                0 => if task.lease(&campaign, 1_500, now) == Ok(true) { held = Some(task.fence) },
                1 => { let _ = task.renew(held.unwrap_or(0), 1_500, now); }
                2 => { let work = task.work(); let _ = task.begin(held.unwrap_or(0), step.setup, work, now); }
                3 => { let _ = task.release(&campaign, held.unwrap_or(0), "unreachable", now); }
                4 => { task.end(&campaign, Outcome::NotApplied, "", &meter, now); }
                _ => prop_assert_eq!(task.check(before.fence.wrapping_sub(1), now), Err(TaskError::NotHeld)),
            }
            prop_assert!(task.fence >= before.fence && task.attempts >= before.attempts);
            prop_assert!(!before.state.is_final() || task == before);
        }
    }
}
