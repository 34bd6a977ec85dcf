//! Transfers for tasks of campaigns: task leases that are lost, servers that end, campaigns that
//! end.

use std::{collections::HashMap, num::NonZeroU8, time::Duration};

use kms_domain::{
    CampaignAction, CampaignId, CampaignState, CampaignTask, CampaignTerms, KeyType, Outcome, SecuritySetupId,
    SystemTitle,
};
use kms_proto::v1;
use kms_store::TaskFilter;
use meter_sim::{Connection, behaviour::Fault};

use super::super::{NextStep, Order, ReportedAnswer, SendingKind, StepAnswer, TransferService};
use super::{Field, at_association, at_key_transfer, order};
use crate::testing::{TestIsland, island_tests};
use crate::{
    campaign::{
        CampaignChange, CampaignService, NewCampaign, ReportQuery, TaskLease,
        tests::{approval, id, lease, lease_of, new, request, terms},
    },
    meter::{Assignment, MeterService, Request as MeterRequest, Selection},
};
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// A campaign that runs over all meters of a field.
struct Led {
    field: Field,
    service: CampaignService,
    campaign: CampaignId,
}

impl Led {
    async fn new(island: TestIsland, meters: u64, action: CampaignAction) -> Self {
        let terms = CampaignTerms {
            canary: u32::try_from(meters).unwrap(),
            attempts: NonZeroU8::new(6).unwrap(),
            failure_limit: meters,
            success_threshold: 1,
            ..terms()
        };
        let field = Field::new(island, "generic-suite0", meters).await;
        let island = &field.island;
        let service = CampaignService::new(island.island.clone());
        let draft = service
            .create(&island.officer, request(), NewCampaign { action, ..new(terms) }, true)
            .await
            .unwrap()
            .campaign
            .unwrap();
        let colleague = island.officer_of("bo", "Bo", 40).await;
        service.change(&colleague, request(), id(&draft), approval(&draft)).await.unwrap();
        service.change(&island.officer, request(), id(&draft), CampaignChange::Start).await.unwrap();
        service.lead(id(&draft)).await.unwrap();
        Self { service, campaign: id(&draft), field }
    }

    async fn rotating(island: TestIsland, meters: u64, key_type: KeyType) -> Self {
        Self::new(island, meters, CampaignAction::rotate(key_type).unwrap()).await
    }

    /// Waits for tasks.
    async fn tasks(&self, count: usize) -> Vec<v1::Task> {
        Self::tasks_of(&self.service, &self.field.island.head_end, count).await
    }

    async fn tasks_of(service: &CampaignService, head_end: &Caller, count: usize) -> Vec<v1::Task> {
        let mut tasks = Vec::new();
        let leased = tokio::time::timeout(Duration::from_secs(300), async {
            while tasks.len() < count {
                tasks.extend(service.lease(head_end, lease(100)).await.unwrap());
            }
        });
        leased.await.expect("tasks become due");
        tasks
    }

    fn number(&self, title: SystemTitle) -> usize {
        (0..self.field.meters.len()).find(|number| self.field.title(*number) == title).unwrap()
    }

    /// What the task asks for.
    fn order(task: &v1::Task) -> Order {
        let lease = lease_of(task);
        let key_type = (task.work() == v1::CampaignAction::Rotate).then(|| KeyType::parse(&task.key_type).unwrap());
        Order { task: Some(held(lease)), ..order(lease.meter, key_type) }
    }

    /// Executes a task as a head-end does that holds no keys.
    async fn run(&self, task: &v1::Task) -> Outcome {
        self.field.run(self.number(lease_of(task).meter), Self::order(task)).await
    }

    /// Up to the step that delivers a key, whose answer is lost. The step that waits for a report,
    /// and the octets of its request.
    async fn deliver(&self, task: &v1::Task) -> (StepAnswer, Vec<u8>) {
        let mut connection = Connection::new(self.field.meters[self.number(lease_of(task).meter)].clone(), 1);
        let mut step = self.field.begin(Self::order(task)).await;
        loop {
            let (id, at) = step.transfer.unwrap();
            let NextStep::Send(sending) = step.next.as_ref().unwrap() else { panic!("over") };
            let (kind, apdu) = (sending.kind, sending.apdu.clone());
            let answer = connection.exchange(&apdu).unwrap();
            if kind == SendingKind::Deliver {
                return (step, apdu);
            }
            step =
                self.field.report(&self.field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
        }
    }

    /// The states of all tasks.
    async fn states(&self) -> HashMap<SystemTitle, (String, bool)> {
        let query = ReportQuery { filter: TaskFilter::All, after: None, page: 1_000 };
        let report = self.service.report(&self.field.island.officer, self.campaign, query).await.unwrap();
        report
            .tasks
            .iter()
            .map(|task| (lease_of(task).meter, (task.state.clone(), task.work() == v1::CampaignAction::Probe)))
            .collect()
    }

    async fn state_of(&self, title: SystemTitle) -> (String, bool) {
        self.states().await.remove(&title).unwrap()
    }

    /// Begins and expects a refusal that changes nothing: not the meter, not the task.
    async fn refused(&self, caller: &Caller, order: Order) -> ServiceError {
        let number = self.number(order.meter);
        let (row, task) = (self.field.row(number).await, self.state_of(order.meter).await);
        let (mut steps, leaf) =
            self.field.service.begin(caller, self.field.request(), [1; 32], vec![order.clone()]).await.unwrap();
        assert!(leaf.is_none(), "nothing happened, so nothing is recorded of it");
        assert_eq!((self.field.row(number).await, self.state_of(order.meter).await), (row, task));
        steps.remove(0).next.unwrap_err()
    }
}

fn held(lease: TaskLease) -> CampaignTask {
    CampaignTask { campaign: lease.campaign, fence: lease.fence }
}

const FAILED_PRECONDITION: i32 = 9;
const PERMISSION_DENIED: i32 = 7;

island_tests! {
    async fn a_stale_token_begins_nothing_and_a_lost_lease_moves_nothing(island) {
        let led = Led::rotating(island, 1, KeyType::GUEK).await;
        let head_end = led.field.island.head_end.clone();
        let title = led.field.title(0);
        let task = led.tasks(1).await.remove(0);
        for fence in [task.fence - 1, task.fence + 1] {
            let order = Order { task: Some(CampaignTask { campaign: led.campaign, fence }), ..Led::order(&task) };
            assert_eq!(led.refused(&head_end, order).await.code(), FAILED_PRECONDITION);
        }
        // The new key is on its way when the head-end gives up.
        let (step, _) = led.deliver(&task).await;
        let (transfer, at) = step.transfer.unwrap();
        assert_eq!(led.state_of(title).await.0, "under-way");
        assert!(led.service.release(&head_end, vec![lease_of(&task)], "unreachable".to_owned()).await.unwrap().is_empty());
        let before = led.field.row(0).await;
        for report in [ReportedAnswer::Nothing, ReportedAnswer::Apdu(vec![0xC7, 0x01])] {
            let refused = led.field.report(&head_end, title, transfer, at, report).await.next;
            assert_eq!(refused.unwrap_err().code(), FAILED_PRECONDITION);
        }
        assert_eq!(led.field.row(0).await, before);
        // The task comes back with a higher token, as a probe; nothing else may begin.
        let again = led.tasks(1).await.remove(0);
        assert!(again.fence > task.fence);
        assert_eq!(again.work(), v1::CampaignAction::Probe);
        assert_eq!(led.refused(&head_end, Led::order(&task)).await.code(), FAILED_PRECONDITION);
        let transferring = Order { key_type: Some(KeyType::GUEK), ..Led::order(&again) };
        assert_eq!(led.refused(&head_end, transferring).await.code(), FAILED_PRECONDITION);
        // The probe takes the place of the transfer whose lease was lost, and finds the new key:
        // the task has succeeded.
        assert_eq!(led.run(&again).await, Outcome::Probed);
        assert_eq!(led.state_of(title).await.0, "succeeded");
        assert_eq!(led.field.held(0, KeyType::GUEK).await, 2);
        let late = led.field.report(&head_end, title, transfer, at, ReportedAnswer::Nothing).await.next;
        assert_eq!(late.unwrap_err().code(), FAILED_PRECONDITION);
        led.field.compare(0).await;
        led.field.assert_no_nonce_twice();
    }

    async fn a_transfer_whose_lease_was_lost_keeps_nobody_waiting(island) {
        let led = Led::rotating(island, 1, KeyType::GUEK).await;
        let head_end = led.field.island.head_end.clone();
        let title = led.field.title(0);
        let task = led.tasks(1).await.remove(0);
        let (step, _) = led.deliver(&task).await;
        assert_eq!(led.refused(&head_end, order(title, None)).await.code(), FAILED_PRECONDITION);
        assert!(led.service.heartbeat(&head_end, vec![lease_of(&task)], 1).await.unwrap().1.is_empty());
        // The task lease ends without a report, and the task gets the outcome of its transfer.
        let begun = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let begun = led.field.begin(order(title, None)).await;
                if begun.next.is_ok() {
                    return begun;
                }
            }
        });
        let begun = begun.await.unwrap();
        assert_ne!(begun.transfer.unwrap().0, step.transfer.unwrap().0);
        assert_eq!(led.state_of(title).await, ("pending".to_owned(), true));
        led.field.assert_not_lost(0).await;
    }

    async fn nobody_begins_the_task_of_another_or_another_key_by_a_task(island) {
        let led = Led::rotating(island, 2, KeyType::GUEK).await;
        let (island, title) = (&led.field.island, led.field.title(0));
        let tasks = led.tasks(2).await;
        let task = tasks.iter().find(|task| lease_of(task).meter == title).unwrap();
        // I8: policy permits a KEK to tasks of campaigns; this one is for a GUEK, and its number
        // opens no other door.
        for key_type in [KeyType::KEK, KeyType::GAK] {
            assert_eq!(led.refused(&island.head_end, Order { key_type: Some(key_type), ..Led::order(task) }).await.code(), FAILED_PRECONDITION);
        }
        // A campaign that has no task for the meter, and one that does not exist.
        for campaign in [CampaignId::from_octets(&[5; 16]).unwrap(), CampaignId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap()] {
            let order = Order { task: Some(CampaignTask { campaign, fence: task.fence }), ..Led::order(task) };
            assert_eq!(led.refused(&island.head_end, Order { key_type: Some(KeyType::KEK), ..order.clone() }).await.code(), PERMISSION_DENIED);
            assert_eq!(led.refused(&island.head_end, order).await.code(), PERMISSION_DENIED);
        }
        // The meter is assigned to another head-end, which does not get the task lease of the
        // former one.
        let request = MeterRequest { id: led.field.request(), digest: [9; 32] };
        let assignment =
            Assignment { selection: Selection::Meters(vec![title]), head_end: Some(island.other_head_end.principal.clone()), dry_run: false };
        assert_eq!(MeterService::new(island.island.clone()).assign(&island.officer, request, assignment).await.unwrap().changed, 1);
        for caller in [&island.head_end, &island.other_head_end] {
            assert_eq!(led.refused(caller, Led::order(task)).await.code(), PERMISSION_DENIED);
        }
        // The new head-end gets the task with a new task lease.
        let offered = led.service.lease(&island.other_head_end, lease(10)).await.unwrap();
        assert_eq!(offered.iter().map(|task| lease_of(task).meter).collect::<Vec<_>>(), [title]);
        assert!(offered[0].fence > task.fence);
    }

    async fn a_meter_that_changes_hands_during_its_transfer_is_probed_by_its_new_head_end(island) {
        let led = Led::rotating(island, 1, KeyType::GUEK).await;
        let (island, title) = (&led.field.island, led.field.title(0));
        let task = led.tasks(1).await.remove(0);
        let (steps, _) = led.field.service.begin(&island.head_end, led.field.request(), [1; 32], vec![Led::order(&task)]).await.unwrap();
        assert!(steps[0].next.is_ok());
        let request = MeterRequest { id: led.field.request(), digest: [9; 32] };
        let assignment =
            Assignment { selection: Selection::Meters(vec![title]), head_end: Some(island.other_head_end.principal.clone()), dry_run: false };
        assert_eq!(MeterService::new(island.island.clone()).assign(&island.officer, request, assignment).await.unwrap().changed, 1);
        let offered = led.service.lease(&island.other_head_end, lease(10)).await.unwrap();
        assert_eq!(offered.iter().map(v1::Task::work).collect::<Vec<_>>(), [v1::CampaignAction::Probe]);
        assert!(led.service.lease(&island.head_end, lease(10)).await.unwrap().is_empty());
    }

    async fn a_task_begins_with_its_transfer_or_not_at_all(island) {
        let led = Led::rotating(island, 2, KeyType::GUEK).await;
        let tasks = led.tasks(2).await;
        // The counters of one meter are a head-end's, so that the transfer finds none after its
        // task has begun. In one request with another meter.
        let (without, with) = (lease_of(&tasks[0]).meter, lease_of(&tasks[1]).meter);
        led.field.island.leave_counters(without).await;
        let before = led.field.row(led.number(without)).await;
        let orders = tasks.iter().map(Led::order).collect();
        let (steps, leaf) = led.field.service.begin(&led.field.island.head_end, led.field.request(), [1; 32], orders).await.unwrap();
        assert_eq!(steps[0].next.as_ref().unwrap_err().code(), FAILED_PRECONDITION);
        assert!(steps[1].next.is_ok() && leaf.is_some());
        assert_eq!(led.field.row(led.number(without)).await, before);
        assert_eq!((led.state_of(without).await.0, led.state_of(with).await.0), ("leased".to_owned(), "under-way".to_owned()));
    }

    async fn what_is_proven_has_succeeded_and_what_is_in_doubt_is_probed_first(island) {
        let led = Led::rotating(island, 3, KeyType::GUEK).await;
        // One answers nothing once the key has left, one gets the key late.
        led.field.meters[1].add_fault(at_key_transfer(1, Fault::LoseAnswer));
        led.field.meters[1].add_fault(at_association(2, Fault::LoseAnswer));
        led.field.meters[1].add_fault(at_association(3, Fault::LoseAnswer));
        led.field.meters[2].add_fault(at_key_transfer(1, Fault::LoseRequest));
        let mut works: HashMap<SystemTitle, Vec<(v1::CampaignAction, Outcome)>> = HashMap::new();
        let finished = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                for task in led.service.lease(&led.field.island.head_end, lease(100)).await.unwrap() {
                    let outcome = led.run(&task).await;
                    works.entry(lease_of(&task).meter).or_default().push((task.work(), outcome));
                }
                led.service.lead(led.campaign).await.unwrap();
                if led.service.show(&led.field.island.officer, led.campaign).await.unwrap().state == CampaignState::Finished.name() {
                    return;
                }
            }
        });
        finished.await.unwrap();
        let (rotate, probe) = (v1::CampaignAction::Rotate, v1::CampaignAction::Probe);
        assert_eq!(works[&led.field.title(0)], [(rotate, Outcome::Proven)]);
        assert_eq!(works[&led.field.title(1)], [(rotate, Outcome::InDoubt), (probe, Outcome::Probed)]);
        let third = &works[&led.field.title(2)];
        assert!(third[0] == (rotate, Outcome::NotApplied) && third.last() == Some(&(rotate, Outcome::Proven)), "{third:?}");
        let report = led.service.report(&led.field.island.officer, led.campaign, ReportQuery { filter: TaskFilter::All, after: None, page: 10 });
        assert_eq!(report.await.unwrap().outcomes.iter().map(|outcome| (outcome.state.as_str(), outcome.count)).collect::<Vec<_>>(), [("succeeded", 3)]);
        for number in 0..3 {
            led.field.compare(number).await;
        }
        led.field.assert_no_nonce_twice();
    }

    async fn a_master_key_is_rotated_by_its_task_alone(island) {
        let led = Led::rotating(island, 1, KeyType::KEK).await;
        let task = led.tasks(1).await.remove(0);
        assert_eq!(led.refused(&led.field.island.head_end, Order { task: None, ..Led::order(&task) }).await.code(), PERMISSION_DENIED);
        assert_eq!(led.run(&task).await, Outcome::Proven);
        assert_eq!(led.state_of(led.field.title(0)).await.0, "succeeded");
        assert_eq!((led.field.held(0, KeyType::KEK).await, led.field.held(0, KeyType::GUEK).await), (2, 2));
        led.field.compare(0).await;
    }

    /// I5: somebody who can write the database restores the row of a task from before it was done,
    /// with its mark. A key is rotated once for one approval.
    async fn the_older_row_of_a_task_has_nothing_done_again(island) {
        let led = Led::rotating(island, 1, KeyType::KEK).await;
        let (head_end, title) = (led.field.island.head_end.clone(), led.field.title(0));
        let row = async || {
            let rows = led.field.island.island.store.task_page(led.campaign, TaskFilter::All, None, 9).await.unwrap();
            rows.into_iter().find(|row| row.key.meter == title).unwrap()
        };
        let put_back = async |row: kms_store::TaskRow| {
            let database = crate::testing::database().database.clone();
            // So that the store takes it for the next one.
            let before = match row.generation {
                1 => format!("DELETE FROM task WHERE meter = {}", title.as_i64()),
                generation => format!("UPDATE task SET generation = {}, fence = 0 WHERE meter = {}", generation - 1, title.as_i64()),
            };
            assert_eq!(kms_store_testing::execute(&database, &before).await.unwrap(), 1);
            let changes = kms_store::Changes { tasks: vec![row], ..kms_store::Changes::default() };
            let store = &led.field.island.island.store;
            store.transact(kms_store::Reads::default(), &mut |_| kms_store::Decision::Commit(Box::new(changes.clone()))).await.unwrap();
        };
        let open = row().await;
        let task = led.tasks(1).await.remove(0);
        assert!(led.service.heartbeat(&head_end, vec![lease_of(&task)], 600_000).await.unwrap().1.is_empty());
        let leased = row().await;
        assert_eq!(led.run(&task).await, Outcome::Proven);
        let done = led.field.row(0).await;
        // It is leased to nobody.
        put_back(open.clone()).await;
        assert!(led.service.lease(&head_end, lease(100)).await.unwrap().is_empty());
        assert_eq!(led.state_of(title).await.0, "succeeded");
        assert_eq!(led.field.row(0).await, done);
        // A lease of then begins nothing but a probe, which ends it.
        put_back(leased).await;
        assert_eq!(led.refused(&head_end, Led::order(&task)).await.code(), FAILED_PRECONDITION);
        let probe = Order { key_type: None, ..Led::order(&task) };
        assert_eq!(led.field.run(0, probe).await, Outcome::Probed);
        assert_eq!(led.state_of(title).await.0, "succeeded");
        assert_eq!((led.field.held(0, KeyType::KEK).await, led.field.held(0, KeyType::GUEK).await), (2, 2));
        led.field.assert_no_nonce_twice();
    }

    async fn an_abort_leaves_every_slot_in_a_known_state(island) {
        let led = Led::rotating(island, 4, KeyType::GUEK).await;
        let island = &led.field.island;
        let mut tasks = led.tasks(4).await;
        tasks.sort_by_key(|task| led.number(lease_of(task).meter));
        // Meter 0 is done; 1 is in doubt, and will be for long; 2 has a key on its way; 3 was not
        // begun.
        assert_eq!(led.run(&tasks[0]).await, Outcome::Proven);
        led.field.meters[1].add_fault(at_key_transfer(1, Fault::LoseAnswer));
        led.field.meters[1].add_fault(at_association(2, Fault::LoseAnswer));
        led.field.meters[1].add_fault(at_association(3, Fault::LoseAnswer));
        assert_eq!(led.run(&tasks[1]).await, Outcome::InDoubt);
        let (step, _) = led.deliver(&tasks[2]).await;
        led.service.change(&island.officer, request(), led.campaign, CampaignChange::Abort { reason: "wrong firmware".to_owned() }).await.unwrap();

        assert_eq!(led.refused(&island.head_end, Led::order(&tasks[3])).await.code(), FAILED_PRECONDITION);
        assert!(led.service.lease(&island.head_end, lease(100)).await.unwrap().is_empty());
        let in_doubt = async || {
            let query = ReportQuery { filter: TaskFilter::InDoubt, after: None, page: 100 };
            let tasks = led.service.report(&island.officer, led.campaign, query).await.unwrap().tasks;
            let mut numbers: Vec<usize> = tasks.iter().map(|task| led.number(lease_of(task).meter)).collect();
            numbers.sort_unstable();
            numbers
        };
        let doubted = async || {
            let mut numbers = Vec::new();
            for number in 0..4 {
                if led.field.row(number).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().in_doubt() {
                    numbers.push(number);
                }
            }
            numbers
        };
        assert_eq!((in_doubt().await, doubted().await), (vec![1, 2], vec![1, 2]));
        // What is under way comes to its end: its lease is renewed, and its answers count.
        let (_, lost) = led.service.heartbeat(&island.head_end, vec![lease_of(&tasks[2]), lease_of(&tasks[3])], 60_000).await.unwrap();
        assert_eq!(lost, [lease_of(&tasks[3])]);
        let (mut step, mut connection) = (step, None);
        let mut answer = ReportedAnswer::Nothing;
        let outcome = loop {
            let (id, at) = step.transfer.unwrap();
            step = led.field.report(&island.head_end, step.meter, id, at, answer).await;
            match step.next.as_ref().unwrap() {
                NextStep::End { outcome, .. } => break *outcome,
                NextStep::Send(sending) => {
                    if sending.kind == SendingKind::Associate {
                        connection = Some(Connection::new(led.field.meters[2].clone(), 1));
                    }
                    answer = ReportedAnswer::Apdu(connection.as_mut().unwrap().exchange(&sending.apdu).unwrap());
                }
            }
        };
        assert_eq!(outcome, Outcome::Proven);
        assert_eq!((in_doubt().await, doubted().await), (vec![1], vec![1]));
        for number in [0, 2, 3] {
            led.field.compare(number).await;
        }
        led.field.assert_not_lost(1).await;
        led.field.assert_no_nonce_twice();
    }

    async fn a_server_that_is_gone_loses_and_repeats_nothing(island) {
        let mut led = Led::rotating(island, 3, KeyType::GUEK).await;
        let head_end = led.field.island.head_end.clone();
        let mut tasks = led.tasks(3).await;
        tasks.sort_by_key(|task| led.number(lease_of(task).meter));
        // Server one answers a report, and ends before its answer arrives. What it leased and began
        // is in the database.
        let (step, delivered) = led.deliver(&tasks[0]).await;
        let (transfer, at) = step.transfer.unwrap();
        let other = led.field.island.another_server().await;
        let first = std::mem::replace(&mut led.field.service, TransferService::new(other.clone()));
        led.service = CampaignService::new(other.clone());
        let again = led.field.service.begin(&head_end, led.field.last_request(), [1; 32], vec![Led::order(&tasks[0])]).await.unwrap().0.remove(0);
        let NextStep::Send(sending) = again.next.unwrap() else { panic!("over") };
        assert!(again.transfer == Some((transfer, at)) && sending.apdu == delivered, "the same step is the same octets (I4)");
        // Both get the same report, from a head-end that repeats itself: one step is taken, and
        // both tell it with the same octets.
        let report = || vec![super::Report { meter: step.meter, id: transfer, step: at, answer: ReportedAnswer::Nothing }];
        let (one, two) = tokio::join!(first.proceed(&head_end, report()), led.field.service.proceed(&head_end, report()));
        let [one, two] = [one, two].map(|answer| answer.unwrap().0.remove(0));
        assert_eq!((one.transfer, two.transfer), (Some((transfer, at + 1)), Some((transfer, at + 1))));
        let (NextStep::Send(sent_by_one), NextStep::Send(sent_by_two)) = (one.next.unwrap(), two.next.unwrap()) else { panic!("over") };
        assert_eq!(sent_by_one.apdu, sent_by_two.apdu);
        // The second task's lease is renewed by the other server, the third's is given up: it comes
        // again, once.
        assert!(led.service.heartbeat(&head_end, vec![lease_of(&tasks[1])], 60_000).await.unwrap().1.is_empty());
        assert!(led.service.release(&head_end, vec![lease_of(&tasks[2])], String::new()).await.unwrap().is_empty());
        let third = led.tasks(1).await;
        assert_eq!((third.len(), third[0].fence), (1, tasks[2].fence + 1));
        // The head-end has lost its memory as well: the first task's lease runs out, and it comes
        // as a probe with a higher token.
        let brief = led.service.heartbeat(&head_end, vec![lease_of(&tasks[0])], 1).await.unwrap();
        assert!(brief.1.is_empty());
        let probe = led.tasks(1).await.remove(0);
        assert!(lease_of(&probe).meter == step.meter && probe.fence > tasks[0].fence && probe.work() == v1::CampaignAction::Probe);
        assert_eq!(led.run(&probe).await, Outcome::Probed);
        assert_eq!(led.run(&tasks[1]).await, Outcome::Proven);
        assert_eq!(led.run(&third[0]).await, Outcome::Proven);
        led.service.lead(led.campaign).await.unwrap();
        let report = led.service.report(&led.field.island.officer, led.campaign, ReportQuery { filter: TaskFilter::All, after: None, page: 10 }).await.unwrap();
        let progress = report.progress.unwrap();
        assert_eq!((progress.campaign.unwrap().state.as_str(), progress.waves[0].succeeded), ("finished", 3));
        for number in 0..3 {
            assert_eq!(led.field.held(number, KeyType::GUEK).await, 2, "one new version each");
            led.field.compare(number).await;
        }
        led.field.assert_no_nonce_twice();
    }

    async fn a_meter_that_goes_out_of_service_ends_its_task(island) {
        let led = Led::rotating(island, 3, KeyType::GUEK).await;
        let island = &led.field.island;
        let mut tasks = led.tasks(3).await;
        tasks.sort_by_key(|task| led.number(lease_of(task).meter));
        let (step, _) = led.deliver(&tasks[0]).await;
        let meters = MeterService::new(island.island.clone());
        let request = || MeterRequest { id: led.field.request(), digest: [9; 32] };
        let retired = meters.retire(&island.officer, request(), vec![led.field.title(0)], "scrapped".to_owned()).await.unwrap();
        assert_eq!(retired.changed, 1);
        // A key had left for it: what it holds stays in doubt, and nothing more is reported for it.
        assert_eq!(led.state_of(led.field.title(0)).await.0, "in-doubt");
        let (id, at) = step.transfer.unwrap();
        assert!(led.field.report(&island.head_end, step.meter, id, at, ReportedAnswer::Nothing).await.next.is_err());
        // A withdrawn transfer tells its task, too.
        let (step, _) = led.deliver(&tasks[1]).await;
        let (id, _) = step.transfer.unwrap();
        led.field.service.withdraw(&island.head_end, led.field.request(), vec![(step.meter, id)], "too slow".to_owned()).await.unwrap();
        assert_eq!(led.state_of(step.meter).await, ("pending".to_owned(), true));
        // And a meter that is replaced by a registered one.
        let (step, _) = led.deliver(&tasks[2]).await;
        let replaced = meters.replace(&island.officer, request(), step.meter, led.field.title(1), "broken".to_owned()).await.unwrap();
        assert_eq!(replaced.changed, 2);
        assert_eq!(led.state_of(step.meter).await.0, "in-doubt");
    }
}
