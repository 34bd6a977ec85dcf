use std::{num::NonZeroU8, time::Duration};

use kms_domain::{
    CampaignAction, CampaignName, CampaignSelection, CampaignTask, CampaignTerms, FlagId, KeyType, MaintenanceWindow,
    MaintenanceWindows, Outcome, Quorum, RequestId, SecuritySetupId, TaskWork, UnixMillis, WaveSize,
};
use kms_store::{MeterFilter, TaskFilter};

use super::*;
use crate::testing::{TestIsland, island_tests, meter, sample};

pub(crate) fn request() -> Request {
    Request { id: RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap(), digest: [1; 32] }
}

pub(crate) fn new(terms: CampaignTerms) -> NewCampaign {
    NewCampaign {
        name: CampaignName::parse("spring").unwrap(),
        action: CampaignAction::rotate(KeyType::GUEK).unwrap(),
        setup: None,
        selection: CampaignSelection { vendor: Some(FlagId::parse("KAM").unwrap()), ..CampaignSelection::default() },
        named: Vec::new(),
        terms,
    }
}

pub(crate) fn terms() -> CampaignTerms {
    CampaignTerms {
        quorum: Quorum::ONE,
        canary: 2,
        waves: vec![WaveSize::Percent(50)],
        success_threshold: 50,
        failure_limit: 3,
        windows: MaintenanceWindows::always(),
        starts_per_minute: None,
        in_flight: 100.try_into().unwrap(),
        attempts: NonZeroU8::new(2).unwrap(),
        back_off_seconds: 1,
    }
}

pub(crate) fn lease(most: u32) -> LeaseQuery {
    LeaseQuery { campaign: None, most, lease_ms: 60_000 }
}

pub(crate) fn id(campaign: &v1::Campaign) -> CampaignId {
    CampaignId::from_octets(&campaign.campaign_id).unwrap()
}

pub(crate) fn approval(campaign: &v1::Campaign) -> CampaignChange {
    CampaignChange::Approve { content_sha256: campaign.content_sha256.as_ref().try_into().unwrap() }
}

/// A campaign that runs, over meters 1 to 20 of the first head-end.
async fn running(island: &TestIsland, terms: CampaignTerms) -> (CampaignService, CampaignId) {
    island.deliver(&sample("generic-suite0", 20)).await;
    let service = CampaignService::new(island.island.clone());
    let draft = service.create(&island.officer, request(), new(terms), true).await.unwrap().campaign.unwrap();
    let colleague = island.officer_of("bo", "Bo", 40).await;
    service.change(&colleague, request(), id(&draft), approval(&draft)).await.unwrap();
    let started = service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await.unwrap();
    assert_eq!((started.state.as_str(), started.wave), ("running", 1));
    service.lead(id(&draft)).await.unwrap();
    (service, id(&draft))
}

pub(crate) fn lease_of(task: &v1::Task) -> TaskLease {
    TaskLease {
        campaign: CampaignId::from_octets(&task.campaign_id).unwrap(),
        meter: kms_domain::SystemTitle::from_octets(&task.meter).unwrap(),
        fence: task.fence,
    }
}

fn task(lease: TaskLease) -> CampaignTask {
    CampaignTask { campaign: lease.campaign, fence: lease.fence }
}

/// What the transfer service does when a transfer begins.
async fn begin(island: &TestIsland, by: &Caller, lease: TaskLease, work: TaskWork) -> Result<(), ServiceError> {
    let principal = by.principal.clone();
    let mut reads = task_reads(lease.campaign, [lease.meter]);
    reads.meters.push(lease.meter);
    let act = island.island.committer.act_in_test(
        kms_ledger::Actor::caller(by, None, "beginTransfers"),
        reads,
        move |view| begin_task(view, task(lease), lease.meter, &principal, SecuritySetupId::DEFAULT, work),
    );
    act.await.map(drop)
}

/// What the transfer service does when one ends.
async fn end(island: &TestIsland, lease: TaskLease, outcome: Outcome, reason: &'static str) -> kms_domain::TaskEnd {
    let mut reads = task_reads(lease.campaign, [lease.meter]);
    reads.meters.push(lease.meter);
    let act = island.island.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        reads,
        move |view| end_task(view, task(lease), lease.meter, outcome, reason),
    );
    act.await.unwrap().value
}

pub(crate) fn code(outcome: Result<impl std::fmt::Debug, ServiceError>) -> i32 {
    outcome.map_or_else(|error| error.code(), |value| panic!("{value:?}"))
}

const ROTATE: TaskWork = TaskWork::Rotate(KeyType::GUEK);
const FAILED_PRECONDITION: i32 = 9;
const PERMISSION_DENIED: i32 = 7;

island_tests! {
    async fn a_dry_run_shows_what_would_be_touched_and_stores_nothing(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        let service = CampaignService::new(island.island.clone());
        let mut asked = new(terms());
        asked.named = (1..=6).chain([1_000]).map(meter).collect();
        let answer = service.create(&island.officer, request(), asked, false).await.unwrap();
        let preview = answer.preview.unwrap();
        assert!(answer.campaign.is_none());
        assert_eq!((preview.meters, preview.left_out, preview.not_reachable, preview.in_doubt, preview.sample.len()), (6, 1, 0, 0, 6));
        assert_eq!(preview.head_ends, [v1::NamedCount { name: island.head_end.principal.to_string(), count: 6 }]);
        assert_eq!(preview.waves.iter().sum::<u64>(), 6);
        assert!(service.list(&island.auditor, None, 9).await.unwrap().is_empty());
        // Nothing selected, nobody permitted.
        let mut nothing = new(terms());
        nothing.selection.batch = Some("none".to_owned());
        assert_eq!(code(service.create(&island.officer, request(), nothing, true).await), 3);
        assert_eq!(code(service.create(&island.auditor, request(), new(terms()), false).await), PERMISSION_DENIED);
        assert_eq!(code(service.create(&island.head_end, request(), new(terms()), true).await), PERMISSION_DENIED);
        assert_eq!(code(service.list(&island.head_end, None, 9).await), PERMISSION_DENIED);
    }

    async fn meters_are_found_by_how_far_their_counters_are_used(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        island.take_counters_over(meter(3), kms_domain::CounterState::END / 100 * 85).await;
        island.take_counters_over(meter(4), kms_domain::CounterState::END / 100 * 61).await;
        let service = CampaignService::new(island.island.clone());
        for (percent, expected) in [(80, 1), (60, 2), (90, 0)] {
            let mut asked = new(terms());
            asked.selection.counter_used = Some(percent);
            let found = service.create(&island.officer, request(), asked, false).await.map(|answer| answer.preview.unwrap().meters);
            assert_eq!(found.unwrap_or_default(), expected, "{percent}");
        }
        let mut asked = new(terms());
        asked.selection.counter_used = Some(101);
        assert_eq!(code(service.create(&island.officer, request(), asked, false).await), 3);
    }

    async fn a_take_over_is_accepted_by_what_it_came_to(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        let service = CampaignService::new(island.island.clone());
        let asked = NewCampaign { action: CampaignAction::TakeOver, ..new(terms()) };
        let draft = service.create(&island.officer, request(), asked, true).await.unwrap().campaign.unwrap();
        let (mut meters, mut from) = (Vec::new(), Some(PlanPlace::default()));
        while let Some(place) = from {
            let (page, next) = service.acceptance(&island.auditor, id(&draft), place, 7).await.unwrap();
            assert!(page.len() <= 7);
            meters.extend(page);
            from = next;
        }
        assert_eq!(meters.len(), 20);
        for meter in &meters {
            assert!(meter.problem.is_empty() && !meter.batch.is_empty() && meter.manufacturer == "KAM", "{meter:?}");
            let ours = |key: &&v1::KeyAcceptance| ["KEK", "GUEK", "GAK"].contains(&key.key_type.as_str());
            assert_eq!(meter.keys.iter().filter(ours).count(), 3);
            assert!(meter.keys.iter().filter(ours).all(|key| key.verdict == "not-replaced" && key.remedy == "rotation" && key.known_to == ["vendor"]), "{meter:?}");
        }
        assert_eq!(code(service.acceptance(&island.head_end, id(&draft), PlanPlace::default(), 7).await), PERMISSION_DENIED);
        assert_eq!(service.acceptance(&island.auditor, id(&draft), PlanPlace { chunk: 9, meter: 3 }, 7).await.unwrap(), (Vec::new(), None));
    }

    async fn only_another_person_approves_and_only_the_exact_content(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        let service = CampaignService::new(island.island.clone());
        let made = request();
        let draft = service.create(&island.officer, made, new(terms()), true).await.unwrap().campaign.unwrap();
        // The same request again is the same campaign; another content under its id is refused.
        assert_eq!(service.create(&island.officer, made, new(terms()), true).await.unwrap().campaign.unwrap(), draft);
        assert_eq!(code(service.create(&island.officer, Request { digest: [2; 32], ..made }, new(terms()), true).await), 3);
        let (colleague, alias) = (island.officer_of("bo", "Bo", 40).await, island.officer_of("ada-2", "ada", 41).await);
        assert_eq!(code(service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await), FAILED_PRECONDITION);
        assert_eq!(code(service.change(&island.officer, request(), id(&draft), approval(&draft)).await), FAILED_PRECONDITION);
        // Another certificate of the same person is the same person (I6).
        assert_eq!(code(service.change(&alias, request(), id(&draft), approval(&draft)).await), FAILED_PRECONDITION);
        assert_eq!(code(service.change(&island.auditor, request(), id(&draft), approval(&draft)).await), PERMISSION_DENIED);
        let other = CampaignChange::Approve { content_sha256: [0; 32] };
        assert_eq!(code(service.change(&colleague, request(), id(&draft), other).await), FAILED_PRECONDITION);
        let approving = request();
        let approved = service.change(&colleague, approving, id(&draft), approval(&draft)).await.unwrap();
        assert_eq!((approved.state.as_str(), approved.approvals.len()), ("approved", 1));
        // The same request again changes nothing more.
        assert_eq!(service.change(&colleague, approving, id(&draft), approval(&draft)).await.unwrap().approvals.len(), 1);
        assert_eq!(service.change(&colleague, request(), id(&draft), CampaignChange::Start).await.unwrap().state, "running");
    }

    async fn tasks_are_leased_fenced_and_offered_again(island) {
        let (service, campaign) = running(&island, CampaignTerms { canary: 20, ..terms() }).await;
        // Nobody gets tasks for the meters of others.
        assert!(service.lease(&island.other_head_end, lease(100)).await.unwrap().is_empty());
        assert!(service.lease(&island.officer, lease(100)).await.unwrap().is_empty());
        let tasks = service.lease(&island.head_end, lease(3)).await.unwrap();
        assert_eq!(tasks.len(), 3);
        assert!(service.lease(&island.head_end, lease(3)).await.unwrap().is_empty(), "three are held");
        let first = lease_of(&tasks[0]);
        assert_eq!((tasks[0].work(), tasks[0].key_type.as_str(), tasks[0].fence), (v1::CampaignAction::Rotate, "GUEK", 1));
        // Another fence, another principal, another work: refused.
        assert_eq!(code(begin(&island, &island.head_end, TaskLease { fence: 2, ..first }, ROTATE).await), FAILED_PRECONDITION);
        assert_eq!(code(begin(&island, &island.other_head_end, first, ROTATE).await), PERMISSION_DENIED);
        assert_eq!(code(begin(&island, &island.head_end, first, TaskWork::Rotate(KeyType::GAK)).await), FAILED_PRECONDITION);
        assert_eq!(code(begin(&island, &island.head_end, TaskLease { meter: meter(99), ..first }, ROTATE).await), PERMISSION_DENIED);
        begin(&island, &island.head_end, first, ROTATE).await.unwrap();
        let (_, lost) = service.heartbeat(&island.head_end, vec![first, TaskLease { fence: 7, ..lease_of(&tasks[1]) }], 60_000).await.unwrap();
        assert_eq!(lost, [TaskLease { fence: 7, ..lease_of(&tasks[1]) }]);
        assert_eq!(service.heartbeat(&island.other_head_end, vec![first], 60_000).await.unwrap().1, [first]);
        // A task lease that is given back without a reason is available at once, with a higher
        // token.
        let second = lease_of(&tasks[1]);
        assert!(service.release(&island.head_end, vec![second], String::new()).await.unwrap().is_empty());
        assert_eq!(service.release(&island.head_end, vec![second], String::new()).await.unwrap(), [second]);
        let again = service.lease(&island.head_end, lease(3)).await.unwrap();
        assert_eq!(again.iter().map(|task| task.fence).max(), Some(if again[0].meter == tasks[1].meter { 2 } else { 1 }));

        // A task lease that is not renewed ends by the database's clock. Another server leases the
        // task again.
        let other = CampaignService::new(island.another_server().await);
        let brief = LeaseQuery { campaign: Some(campaign), most: 100, lease_ms: 1 };
        let brief: Vec<_> = service.lease(&island.head_end, brief).await.unwrap().iter().map(lease_of).collect();
        assert!(!brief.is_empty());
        let later = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                let tasks = other.lease(&island.head_end, lease(100)).await.unwrap();
                if let Some(task) = tasks.iter().find(|task| brief.iter().any(|lease| lease.meter.octets() == task.meter.as_ref())) {
                    return lease_of(task);
                }
            }
        });
        let later = later.await.unwrap();
        let earlier = brief.iter().find(|lease| lease.meter == later.meter).unwrap();
        assert!(later.fence > earlier.fence);
        assert_eq!(code(begin(&island, &island.head_end, *earlier, ROTATE).await), FAILED_PRECONDITION);
        begin(&island, &island.head_end, later, ROTATE).await.unwrap();
    }

    async fn waves_follow_each_other_to_the_end(island) {
        let (service, campaign) = running(&island, terms()).await;
        // Tasks exist for the present wave only: one for each of its meters. The tasks of earlier
        // waves have succeeded and are deleted.
        let wave_under_way = async || {
            let shown = service.show(&island.officer, campaign).await.unwrap();
            let tasks = island.island.store.task_page(campaign, TaskFilter::All, None, 100).await.unwrap();
            let planned = shown.waves[usize::try_from(shown.wave).unwrap() - 1];
            assert!(shown.state == "finished" || tasks.iter().all(|task| task.wave == shown.wave), "{shown:?}: {tasks:?}");
            assert!(shown.state == "finished" || tasks.len() as u64 == planned, "{planned} meters in {shown:?}: {tasks:?}");
            shown
        };
        let mut waves = vec![wave_under_way().await.wave];
        assert_eq!(waves, [1]);
        let mut watch = service.watch(&island.auditor, campaign).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().campaign.unwrap().state, "running");
        let mut done = 0;
        for _ in 0..100 {
            let tasks = service.lease(&island.head_end, lease(100)).await.unwrap();
            for task in &tasks {
                begin(&island, &island.head_end, lease_of(task), ROTATE).await.unwrap();
                assert_eq!(end(&island, lease_of(task), Outcome::Proven, "").await, kms_domain::TaskEnd::Ended);
                done += 1;
            }
            service.lead(campaign).await.unwrap();
            let shown = wave_under_way().await;
            if shown.state == "finished" {
                break;
            }
            waves.push(shown.wave);
        }
        assert_eq!(done, 20);
        waves.dedup();
        let report = service.report(&island.auditor, campaign, ReportQuery { filter: TaskFilter::All, after: None, page: 100 }).await.unwrap();
        let progress = report.progress.unwrap();
        assert!(progress.waves.len() >= 3 && progress.waves.iter().all(|wave| wave.succeeded == wave.planned && wave.ended_ms > 0), "{progress:?}");
        assert!(waves.iter().eq(progress.waves.iter().map(|wave| &wave.wave)), "not every wave was looked at: {waves:?}");
        assert_eq!(report.outcomes.iter().map(|outcome| outcome.count).sum::<u64>(), 20);
        assert_eq!(report.timeline.last().unwrap().succeeded, 20);
        let last = tokio::time::timeout(Duration::from_secs(20), async {
            let mut last = None;
            while let Some(progress) = watch.next().await {
                last = Some(progress.unwrap());
            }
            last
        });
        assert_eq!(last.await.unwrap().unwrap().campaign.unwrap().state, "finished");
        // The scrubber finds the campaign's row in order (I5).
        let report = crate::scrub::Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap();
        assert_eq!(report.findings, []);
    }

    async fn too_many_failures_pause_it_and_what_is_in_doubt_is_probed_first(island) {
        let (service, campaign) = running(&island, CampaignTerms { canary: 20, failure_limit: 1, attempts: NonZeroU8::new(2).unwrap(), ..terms() }).await;
        let state = async || service.show(&island.officer, campaign).await.unwrap();
        let tasks = service.lease(&island.head_end, lease(3)).await.unwrap();
        for task in &tasks {
            begin(&island, &island.head_end, lease_of(task), ROTATE).await.unwrap();
            end(&island, lease_of(task), Outcome::InDoubt, "no answer").await;
        }
        service.lead(campaign).await.unwrap();
        assert_eq!(state().await.state, "running", "they are tried again");
        // After the back-off the same tasks come as probes.
        let mut probes = Vec::new();
        let seen = tokio::time::timeout(Duration::from_secs(20), async {
            while probes.len() < 3 {
                let tasks = service.lease(&island.head_end, lease(100)).await.unwrap();
                probes.extend(tasks.into_iter().filter(|task| task.work() == v1::CampaignAction::Probe));
            }
        });
        seen.await.unwrap();
        for task in &probes {
            assert_eq!(code(begin(&island, &island.head_end, lease_of(task), ROTATE).await), FAILED_PRECONDITION);
            begin(&island, &island.head_end, lease_of(task), TaskWork::Probe).await.unwrap();
            end(&island, lease_of(task), Outcome::InDoubt, "no answer").await;
        }
        service.lead(campaign).await.unwrap();
        let paused = state().await;
        assert!(paused.state == "paused" && paused.reason.contains("more than the limit of 1"), "{paused:?}");
        assert!(service.lease(&island.head_end, lease(100)).await.unwrap().is_empty());
        // An officer accepts the failures and resumes. One more failure is within the limit.
        service.change(&island.officer, request(), campaign, CampaignChange::Resume { reason: "seen".to_owned() }).await.unwrap();
        service.lead(campaign).await.unwrap();
        assert_eq!(state().await.state, "running");

        // Abort: no more work, and the list of meters in doubt.
        let under_way = service.report(&island.officer, campaign, ReportQuery { filter: TaskFilter::State(kms_domain::TaskState::Leased), after: None, page: 100 });
        let leased = under_way.await.unwrap().tasks;
        let begun = lease_of(&leased[0]);
        begin(&island, &island.head_end, begun, ROTATE).await.unwrap();
        service.change(&island.officer, request(), campaign, CampaignChange::Abort { reason: "wrong firmware".to_owned() }).await.unwrap();
        assert_eq!(code(begin(&island, &island.head_end, lease_of(&leased[1]), ROTATE).await), FAILED_PRECONDITION);
        assert!(service.lease(&island.head_end, lease(100)).await.unwrap().is_empty());
        let in_doubt = async || {
            let query = ReportQuery { filter: TaskFilter::InDoubt, after: None, page: 100 };
            service.report(&island.officer, campaign, query).await.unwrap().tasks.len()
        };
        assert_eq!(in_doubt().await, 4);
        // Tasks that had begun may end nevertheless.
        end(&island, begun, Outcome::Proven, "").await;
        assert_eq!(in_doubt().await, 3);
        let report = service.report(&island.officer, campaign, ReportQuery { filter: TaskFilter::All, after: None, page: 0 }).await.unwrap();
        assert_eq!(report.progress.unwrap().reasons[0], v1::NamedCount { name: "no answer".to_owned(), count: 3 });
        assert_eq!(code(service.change(&island.officer, request(), campaign, CampaignChange::Resume { reason: "no".to_owned() }).await), FAILED_PRECONDITION);
    }

    async fn nothing_begins_outside_the_window_and_rates_hold(island) {
        // A window of the day after tomorrow.
        let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
        let day = now.weekday().wrapping_add(2).to_monday_zero_offset();
        let days = kms_domain::Weekdays::from_number(1 << day).unwrap();
        let windows = MaintenanceWindows::new("UTC", vec![MaintenanceWindow { days, from: 0, to: 1440 }]).unwrap();
        let (service, campaign) = running(&island, CampaignTerms { windows, ..terms() }).await;
        let shown = service.show(&island.officer, campaign).await.unwrap();
        assert!(!shown.window_open && shown.next_opening_ms > IslandContext::now().0);
        assert!(service.lease(&island.head_end, lease(100)).await.unwrap().is_empty());
        service.change(&island.officer, request(), campaign, CampaignChange::Abort { reason: "test".to_owned() }).await.unwrap();

        let slow = CampaignTerms { canary: 20, starts_per_minute: 5.try_into().ok(), in_flight: 4.try_into().unwrap(), ..terms() };
        let draft = service.create(&island.officer, request(), new(slow), true).await.unwrap().campaign.unwrap();
        let colleague = island.officer_of("cy", "Cy", 42).await;
        service.change(&colleague, request(), id(&draft), approval(&draft)).await.unwrap();
        service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await.unwrap();
        let tasks = service.lease(&island.head_end, lease(100)).await.unwrap();
        assert_eq!(tasks.len(), 4);
        assert!(service.release(&island.head_end, tasks.iter().map(lease_of).collect(), "unreachable".to_owned()).await.unwrap().is_empty());
        assert_eq!(service.lease(&island.head_end, lease(100)).await.unwrap().len(), 1);
    }

    async fn a_changed_plan_and_a_forged_task_are_refused(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        let service = CampaignService::new(island.island.clone());
        let mut asked = new(terms());
        asked.named = (1..=5).map(meter).collect();
        let draft = service.create(&island.officer, request(), asked, true).await.unwrap().campaign.unwrap();
        let colleague = island.officer_of("bo", "Bo", 40).await;
        service.change(&colleague, request(), id(&draft), approval(&draft)).await.unwrap();
        // Somebody who can write the database adds a task for a meter.
        let store = &island.island.store;
        let step = kms_domain::TaskStep { setup: SecuritySetupId::DEFAULT, work: ROTATE, from: 1 };
        let forged = kms_store::TaskRow {
            key: kms_store::TaskKey { campaign: id(&draft), meter: meter(9) },
            generation: 1,
            wave: 1,
            vendor: "KAM".to_owned(),
            head_end: Some(island.head_end.principal.to_string()),
            mark: [0; 16],
            task: kms_domain::Task::new(step, UnixMillis(1)),
        };
        let changes = kms_store::Changes { tasks: vec![forged], ..kms_store::Changes::default() };
        store.transact(Reads::default(), &mut |_| kms_store::Decision::Commit(Box::new(changes.clone()))).await.unwrap();
        service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await.unwrap();
        service.lead(id(&draft)).await.unwrap();
        let tasks = service.lease(&island.head_end, lease(100)).await.unwrap();
        assert!(!tasks.is_empty() && tasks.iter().all(|task| task.meter != meter(9).octets().as_slice()));
        let lease = TaskLease { campaign: id(&draft), meter: meter(9), fence: 0 };
        assert_eq!(code(begin(&island, &island.head_end, lease, ROTATE).await), PERMISSION_DENIED);

        // A plan that is not the approved one is not executed.
        let mut asked = new(terms());
        asked.named = (11..=15).map(meter).collect();
        let (made, asked) = (request(), Arc::new(asked));
        let plan = service.survey(CampaignId::from_octets(&made.id.octets()).unwrap(), &asked, true).await.unwrap().plan;
        let other = kms_domain::Plan { digest: [5; 32], ..plan };
        let second = service.draft(&island.officer, made, CampaignId::from_octets(&made.id.octets()).unwrap(), asked, Some(other)).await.unwrap();
        let second = service.message(&second).await.unwrap();
        service.change(&colleague, request(), id(&second), approval(&second)).await.unwrap();
        service.change(&island.officer, request(), id(&second), CampaignChange::Start).await.unwrap();
        service.lead(id(&second)).await.unwrap();
        let refused = service.show(&island.officer, id(&second)).await.unwrap();
        assert!(refused.state == "paused" && refused.reason.contains("not the one that was approved"), "{refused:?}");
        assert!(store.task_page(id(&second), TaskFilter::All, None, 9).await.unwrap().is_empty());
        assert_eq!(store.meter_count(&MeterFilter::default()).await.unwrap(), 20);
    }

    /// I5, I6: somebody who can write the database can change neither what is rotated, nor in which
    /// meter, nor which head-end gets the task.
    async fn what_a_task_may_do_is_what_was_approved(island) {
        let (service, campaign) = running(&island, CampaignTerms { canary: 20, ..terms() }).await;
        let (store, key) = (&island.island.store, island.island.committer.seal_key());
        let database = crate::testing::database().database.clone();
        let sql = async |set: &str, number: u64| {
            let statement = format!("UPDATE task SET {set} WHERE meter = {}", meter(number).as_i64());
            assert_eq!(kms_store_testing::execute(&database, &statement).await.unwrap(), 1, "{statement}");
        };
        // The mark that an earlier server gave to these rows, which does not bind what is to be
        // done: accepted for what follows from the plan.
        for number in [5, 6, 7, 8] {
            let mark = kms_store_testing::octets(&database, &key.seal_former_task(campaign, meter(number), 1));
            sql(&format!("mark = {mark}"), number).await;
        }
        let edits = ["key_type = 1", "setup = 258", "from_version = 0", "key_type = 0"];
        for (number, edit) in (1..).zip(edits) {
            sql(edit, number).await;
        }
        sql("key_type = 1", 5).await;
        sql("setup = 258", 6).await;
        sql("key_type = 0", 7).await;
        for (number, edit) in (9..).zip(["fence = 7", "attempts = 0, due_ms = due_ms - 1", "probe = 1 - probe", "wave = 2", "leased_ms = 1"]) {
            sql(edit, number).await;
        }
        let leased: Vec<Vec<u8>> = service.lease(&island.head_end, lease(100)).await.unwrap().iter().map(|task| task.meter.to_vec()).collect();
        let sound: Vec<Vec<u8>> = [8].into_iter().chain(14..=20).map(|number| meter(number).octets().to_vec()).collect();
        let mut sorted = leased.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, sound);
        // The write has bound the row of the earlier server.
        let row = store.task_page(campaign, TaskFilter::All, None, 100).await.unwrap().into_iter().find(|row| row.key.meter == meter(8)).unwrap();
        assert!(row.mark == row.mark_by(&key) && row.mark != row.former_mark_by(&key));
        // A lease that is held does not let another key be begun.
        sql("key_type = 1", 14).await;
        let held = TaskLease { campaign, meter: meter(14), fence: 1 };
        assert_eq!(code(begin(&island, &island.head_end, held, TaskWork::Rotate(KeyType::KEK)).await), PERMISSION_DENIED);
        // The scrubber finds each of them, and no sound one.
        let report = crate::scrub::Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap();
        let found: Vec<&str> = report.findings.iter().filter(|finding| finding.id == campaign.octets().as_slice()).map(|finding| finding.detail.as_str()).collect();
        for number in (1..=7).chain(9..=14) {
            let title = meter(number).to_string();
            assert_eq!(found.iter().filter(|detail| detail.contains(&title)).count(), 1, "{title}: {found:?}");
        }
        assert_eq!(found.len(), 13, "{found:?}");
    }

    // Run it alone: `cargo test --release -p kms-service -- --ignored planning_a_million`, with
    // KMS_TEST_SHOW=1 for the figures.
    #[ignore = "a measurement: it makes a million meters"]
    async fn planning_a_million_slots_costs_seconds_and_flat_memory(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let pattern = island.island.meter(meter(1)).await.unwrap().unwrap();
        let (store, seal) = (&island.island.store, island.island.committer.seal_key());
        for page in (2..=1_000_000_u64).collect::<Vec<_>>().chunks(5_000) {
            let puts = page.iter().map(|number| {
                let copy = kms_domain::Meter { title: meter(*number), ..(*pattern).clone() };
                let body = copy.to_row().unwrap();
                let generation = kms_domain::Generation::FIRST;
                let mark = *seal.seal(&kms_domain::RowId::Meter(copy.title), generation, &body).octets();
                let projection = kms_store::MeterProjection {
                    vendor: "KAM".to_owned(),
                    profile: copy.class.profile.to_string(),
                    status: 2,
                    head_end: copy.class.head_end.as_ref().map(ToString::to_string),
                    batch: Some(copy.batch.clone()),
                    groups: Vec::new(),
                };
                kms_store::MeterPut::insert(copy.title, kms_store::SealedRow { generation: 1, seal: mark, body }, projection)
            });
            let changes = kms_store::Changes { meters: puts.collect(), ..kms_store::Changes::default() };
            store.transact(Reads::default(), &mut |_| kms_store::Decision::Commit(Box::new(changes.clone()))).await.unwrap();
        }
        let service = CampaignService::new(island.island.clone());
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1_024
        };
        let before = resident();
        let at = std::time::Instant::now();
        let draft = service.create(&island.officer, request(), new(terms()), true).await.unwrap().campaign.unwrap();
        println!("planned {} meters in {:.1} s, {} MiB more than the {before} MiB before", draft.meters, at.elapsed().as_secs_f64(), resident() - before);
        assert_eq!(draft.meters, 1_000_000);
        let colleague = island.officer_of("bo", "Bo", 40).await;
        service.change(&colleague, request(), id(&draft), approval(&draft)).await.unwrap();
        let at = std::time::Instant::now();
        service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await.unwrap();
        service.lead(id(&draft)).await.unwrap();
        println!("the first wave's tasks in {:.1} s", at.elapsed().as_secs_f64());
    }
}
