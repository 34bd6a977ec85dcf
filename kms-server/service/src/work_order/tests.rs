use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use kms_domain::{
    PersonName, Place, RequestId, Retention, Role, SystemTitle, UnixMillis, WorkOrder, WorkOrderContent, WorkOrderId,
    WorkOrderState, WorkOrderTask,
};
use kms_proto::v1::{
    self, ScrubFinding, WorkOrderOutcome as Outcome, WorkOrderProblemCode as Code, audit_record::Event,
};
use kms_store::{RowKind, SealedRow};
use kms_store_testing::{Damage, damage};

use super::{NewWorkOrder, Request, WorkOrderChange, WorkOrderQuery, WorkOrderService};
use crate::island::IslandContext;
use crate::meter::MeterService;
use crate::retention::RetentionPass;
use crate::scrub::Scrubber;
use crate::testing::{TestIsland, database, island_tests, meter, sample};
use kms_authz::{Action, Caller, Engine, EvaluationError, Policy, PolicyDecision, PrincipalFacts, Quotas, Resource};
use kms_base::bounds::Limits;
use kms_base::clock;
use kms_base::error::ServiceError;

const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;
const NOT_PERMITTED: &str = "it is unknown, or this work is not permitted with it";

fn request() -> Request {
    let id = RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap();
    Request { id, digest: [1; 32] }
}

fn id(text: &str) -> WorkOrderId {
    WorkOrderId::parse(text).unwrap()
}

fn content(technician: &str, meters: &[u64]) -> WorkOrderContent {
    // The same time in all orders of a test: they are compared.
    static NOW: OnceLock<UnixMillis> = OnceLock::new();
    let now = NOW.get_or_init(IslandContext::now);
    let day = (now.after(-HOUR), now.after(9 * HOUR));
    let titles: Vec<SystemTitle> = meters.iter().map(|number| meter(*number)).collect();
    let tasks = [WorkOrderTask::Read, WorkOrderTask::Firmware].into_iter().collect();
    let place = Place::parse("Harbour Street 7").unwrap();
    WorkOrderContent::new(PersonName::parse(technician).unwrap(), titles, tasks, day, place).unwrap()
}

fn order(text: &str, content: &WorkOrderContent) -> NewWorkOrder {
    NewWorkOrder { id: id(text), content: content.clone() }
}

/// What became of the orders of a call, each with the codes of its problems.
fn outcomes(response: &v1::CreateWorkOrdersResponse) -> Vec<(Outcome, Vec<Code>)> {
    let outcome = |result: &v1::WorkOrderResult| {
        (result.outcome(), result.problems.iter().map(v1::WorkOrderProblem::code).collect())
    };
    response.results.iter().map(outcome).collect()
}

fn denied<T: std::fmt::Debug>(result: Result<T, ServiceError>) -> String {
    match result.unwrap_err() {
        ServiceError::PermissionDenied { asked, .. } => asked,
        other => panic!("{other:?}"),
    }
}

/// Permits everything, and counts the questions.
struct Counting(Arc<AtomicUsize>);

impl Engine for Counting {
    fn decide(&self, _: &PrincipalFacts, _: &Action, _: &Resource<'_>) -> Result<PolicyDecision, EvaluationError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(PolicyDecision::Permit)
    }
}

impl TestIsland {
    fn orders(&self) -> WorkOrderService {
        WorkOrderService::new(self.island.clone())
    }

    async fn account(&self, name: &str, number: u8) -> Caller {
        self.member(Role::ServiceAccount, name, None, number).await
    }

    /// The handheld of a technician.
    async fn handheld(&self, name: &str, technician: &str, number: u8) -> Caller {
        self.member(Role::Handheld, name, Some(technician), number).await
    }

    async fn create(&self, by: &Caller, text: &str, content: &WorkOrderContent) -> (Outcome, Vec<Code>) {
        let response = self.orders().create(by, request(), vec![order(text, content)]).await.unwrap();
        outcomes(&response).remove(0)
    }

    async fn change_of(&self, by: &Caller, text: &str, change: WorkOrderChange) -> Result<v1::WorkOrder, ServiceError> {
        self.orders().change(by, request(), id(text), change).await
    }

    async fn listed(&self, by: &Caller, query: WorkOrderQuery) -> Vec<String> {
        let page = self.orders().list(by, query, None, 99).await.unwrap();
        assert!(page.orders.iter().all(|order| {
            let content = order.content.as_ref().unwrap();
            content.meters.is_empty() && content.place.is_empty() && order.meter_count > 0
        }));
        page.orders.into_iter().map(|order| order.work_order_id).collect()
    }

    async fn sealed_order(&self, text: &str) -> SealedRow {
        self.island.store.sealed(RowKind::WorkOrder, text.as_bytes()).await.unwrap().unwrap()
    }

    async fn put_order(&self, text: &str, row: &SealedRow) {
        let put = Damage::PutSealed(RowKind::WorkOrder, text.as_bytes().to_vec(), row.clone());
        assert_eq!(damage(&database().database, &put).await.unwrap(), 1);
    }

    async fn findings(&self) -> Vec<(String, String)> {
        let report = Scrubber::new(self.island.clone()).scrub(|_| true).await.unwrap();
        let named =
            |finding: &ScrubFinding| (String::from_utf8_lossy(&finding.id).into_owned(), finding.finding.clone());
        report.findings.iter().map(named).collect()
    }
}

island_tests! {
    async fn an_order_is_seen_and_changed_by_those_whose_it_is(island) {
        island.deliver(&sample("generic-suite0", 4)).await;
        let (wfm, other) = (island.account("wfm", 50).await, island.account("other", 51).await);
        let (ida, bo) = (island.handheld("hh-1", "ida  berg", 52).await, island.handheld("hh-2", "Bo Lind", 53).await);
        let ordered = content("Ida Berg", &[2, 1]);
        assert_eq!(island.create(&wfm, "WO-1", &ordered).await, (Outcome::Created, vec![]));
        assert_eq!(island.create(&wfm, "WO-1", &ordered).await, (Outcome::Unchanged, vec![]), "it is sent every night");
        assert_eq!(island.create(&other, "WO-1", &ordered).await, (Outcome::Refused, vec![Code::IdInUse]));
        assert_eq!(island.create(&wfm, "WO-1", &content("Bo Lind", &[1])).await, (Outcome::Refused, vec![Code::IdInUse]));

        // Who sees it, and its place. To all others it does not exist.
        let service = island.orders();
        for (caller, place) in [(&wfm, true), (&ida, true), (&island.officer, true), (&island.auditor, false)] {
            let shown = service.show(caller, &id("WO-1")).await.unwrap();
            let content = shown.content.unwrap();
            assert_eq!((content.meters.len(), shown.meter_count, shown.revision, shown.state.as_str()), (2, 2, 1, "open"));
            assert_eq!((content.place == "Harbour Street 7", shown.place_withheld), (place, !place), "{}", caller.principal);
        }
        for caller in [&other, &bo, &island.head_end, &island.manufacturer] {
            let (real, unknown) = (service.show(caller, &id("WO-1")).await, service.show(caller, &id("WO-9")).await);
            assert_eq!(denied(real), denied(unknown), "{}", caller.principal);
            for change in [WorkOrderChange::Complete, WorkOrderChange::Cancel { reason: String::new() }, WorkOrderChange::Content { revision: 1, content: ordered.clone() }] {
                let real = denied(island.change_of(caller, "WO-1", change.clone()).await);
                assert_eq!(real, denied(island.change_of(caller, "WO-9", change).await), "{}", caller.principal);
            }
        }
        // The technician completes, and does not change.
        assert_eq!(denied(island.change_of(&ida, "WO-1", WorkOrderChange::Cancel { reason: String::new() }).await), "cancelWorkOrder");
        assert_eq!(denied(island.change_of(&island.auditor, "WO-1", WorkOrderChange::Complete).await), "completeWorkOrder");
        assert!(matches!(service.show(&island.officer, &id("WO-9")).await, Err(ServiceError::NotFound { .. })));
        assert!(matches!(island.change_of(&island.officer, "WO-9", WorkOrderChange::Complete).await, Err(ServiceError::NotFound { .. })));

        // Lists.
        assert_eq!(island.create(&other, "WO-2", &content("Bo Lind", &[3])).await.0, Outcome::Created);
        let all = WorkOrderQuery::default;
        let named = |name: &str| WorkOrderQuery { technician: Some(PersonName::parse(name).unwrap()), ..WorkOrderQuery::default() };
        assert_eq!(island.listed(&island.officer, all()).await, ["WO-1", "WO-2"]);
        assert_eq!(island.listed(&island.auditor, named("BO LIND")).await, ["WO-2"]);
        assert_eq!(island.listed(&wfm, all()).await, ["WO-1"]);
        assert_eq!(island.listed(&other, all()).await, ["WO-2"]);
        assert_eq!(island.listed(&ida, all()).await, ["WO-1"]);
        assert_eq!(island.listed(&bo, named("bo lind")).await, ["WO-2"]);
        for (caller, query) in [(&bo, named("Ida Berg")), (&wfm, WorkOrderQuery { maker: Some(other.principal.clone()), ..all() })] {
            assert!(island.listed(caller, query).await.is_empty());
        }
        for caller in [&island.head_end, &island.manufacturer] {
            assert_eq!(denied(service.list(caller, all(), None, 9).await), "listWorkOrders");
        }
        let nobodys = island.member(Role::Handheld, "hh-3", None, 54).await;
        assert_eq!(denied(service.list(&nobodys, all(), None, 9).await), "listWorkOrders", "no technician, no orders");

        // Changed, with the revision that was seen; then done.
        let more = content("Ida Berg", &[1, 2, 3]);
        let change = |revision| WorkOrderChange::Content { revision, content: more.clone() };
        assert!(matches!(island.change_of(&wfm, "WO-1", change(2)).await, Err(ServiceError::Aborted { .. })));
        let changed = island.change_of(&wfm, "WO-1", change(1)).await.unwrap();
        assert_eq!((changed.revision, changed.meter_count), (2, 3));
        assert_eq!(island.change_of(&wfm, "WO-1", change(2)).await.unwrap().revision, 2, "nothing changed");
        let completed = island.change_of(&ida, "WO-1", WorkOrderChange::Complete).await.unwrap();
        assert_eq!((completed.state.as_str(), completed.ended_by), ("completed", ida.principal.to_string()));
        for change in [change(3), WorkOrderChange::Complete, WorkOrderChange::Cancel { reason: String::new() }] {
            assert!(matches!(island.change_of(&wfm, "WO-1", change).await, Err(ServiceError::FailedPrecondition { .. })));
        }
        assert_eq!(island.create(&wfm, "WO-1", &more).await, (Outcome::Refused, vec![Code::Ended]), "an id has one order for ever");
        assert_eq!(island.create(&other, "WO-1", &more).await, (Outcome::Refused, vec![Code::IdInUse]), "it is not theirs");
        assert!(island.listed(&ida, WorkOrderQuery { state: Some(WorkOrderState::Open), ..all() }).await.is_empty());
        assert_eq!(island.listed(&ida, WorkOrderQuery { state: Some(WorkOrderState::Completed), ..all() }).await, ["WO-1"]);

        // The log says all of it but the place.
        let events = island.recorded(|event| match event {
            Event::WorkOrderCreated(event) => Some((event.work_order_id, 1, event.work.unwrap().meters.len())),
            Event::WorkOrderChanged(event) => Some((event.work_order_id, event.revision, event.work.unwrap().meters.len())),
            Event::WorkOrderEnded(event) => Some((event.work_order_id + " " + &event.change, event.revision, 0)),
            _ => None,
        }).await;
        let text = |(id, revision, meters): (&str, u32, usize)| (id.to_owned(), revision, meters);
        assert_eq!(events, [("WO-1", 1, 2), ("WO-2", 1, 1), ("WO-1", 2, 3), ("WO-1 completed", 3, 0)].map(text));
        for tail in island.island.store.audit_tails().await.unwrap() {
            for record in island.island.store.audit_of_writer(tail.writer, 0, 1_000).await.unwrap() {
                assert!(!record.record.windows(7).any(|octets| octets == b"Harbour"), "the log has a place");
            }
        }
        assert_eq!(island.findings().await, []);
    }

    async fn meters_are_refused_by_name_and_orders_as_a_whole(island) {
        island.deliver(&sample("generic-suite0", 6)).await;
        let wfm = island.account("wfm", 50).await;
        MeterService::new(island.island.clone()).retire(&island.officer, request(), vec![meter(3)], String::new()).await.unwrap();
        let call = |orders| async { island.orders().create(&wfm, request(), orders).await.unwrap() };
        let response = call(vec![
            order("WO-1", &content("Ida", &[1])),
            order("WO-2", &content("Ida", &[2, 99, 3])),
            order("WO-3", &content("Ida", &[4])),
            order("WO-3", &content("Ida", &[4])),
            order("WO-3", &content("Ida", &[5])),
        ]).await;
        assert_eq!(outcomes(&response), [
            (Outcome::Created, vec![]),
            (Outcome::Refused, vec![Code::Retired, Code::NotPermitted]),
            (Outcome::Created, vec![]),
            (Outcome::Unchanged, vec![]),
            (Outcome::Refused, vec![Code::IdInUse]),
        ]);
        let unknown = &response.results[1].problems[1];
        assert_eq!((unknown.meter.as_ref(), unknown.reason.as_str()), (meter(99).octets().as_slice(), NOT_PERMITTED));
        assert_eq!(denied(island.orders().show(&wfm, &id("WO-2")).await), "showWorkOrder", "nothing of it was done");

        // I8: for those who may not order, a meter that exists is like one that does not.
        let response = island.orders().create(&island.head_end, request(), vec![order("WO-4", &content("Ida", &[1, 99, 3]))]).await.unwrap();
        assert!(response.results[0].problems.iter().all(|problem| problem.reason == NOT_PERMITTED && problem.code() == Code::NotPermitted));
        assert_eq!(response.results[0].problems.len(), 3);

        // A time that is over, and one that is too far away.
        for hours in [-20, 370 * 24] {
            let far = content("Ida", &[1]);
            let time = (far.from.after(hours * HOUR), far.until.after(hours * HOUR));
            let far = WorkOrderContent::new(far.technician.clone(), vec![meter(1)], far.tasks, time, Place::default()).unwrap();
            assert_eq!(island.create(&wfm, "WO-5", &far).await, (Outcome::Refused, vec![Code::Time]));
        }

        // A change names the field of the contract.
        let mut past = content("Ida", &[4]);
        (past.from, past.until) = (past.from.after(-20 * HOUR), past.until.after(-20 * HOUR));
        match island.change_of(&wfm, "WO-3", WorkOrderChange::Content { revision: 1, content: past }).await {
            Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, "content.until_ms"),
            other => panic!("{other:?}"),
        }

        // A meter that was retired since stays in its order, and does not come into another one.
        MeterService::new(island.island.clone()).retire(&island.officer, request(), vec![meter(1)], String::new()).await.unwrap();
        let change = |revision, meters: &[u64]| WorkOrderChange::Content { revision, content: content("Bo", meters) };
        assert_eq!(island.change_of(&wfm, "WO-1", change(1, &[1, 2])).await.unwrap().revision, 2);
        let refusal = island.change_of(&wfm, "WO-3", change(1, &[4, 1])).await.unwrap_err();
        assert!(refusal.to_string().contains("is retired; leave it out"), "{refusal}");
        assert!(denied(island.change_of(&wfm, "WO-3", change(1, &[4, 99])).await).contains("changeWorkOrder with meter"));
    }

    /// A nightly job sends what it has.
    async fn an_order_that_is_sent_again_is_told_what_became_of_it(island) {
        island.deliver(&sample("generic-suite0", 6)).await;
        let wfm = island.account("wfm", 50).await;
        let call = async |orders| outcomes(&island.orders().create(&wfm, request(), orders).await.unwrap());
        let night = || vec![
            order("WO-1", &content("Ida Berg", &[1, 2])),
            order("WO-2", &content("Ida Berg", &[3])),
            order("WO-3", &content("Ida Berg", &[4])),
        ];
        assert_eq!(call(night()).await, vec![(Outcome::Created, vec![]); 3]);
        MeterService::new(island.island.clone()).retire(&island.officer, request(), vec![meter(2), meter(5)], String::new()).await.unwrap();
        island.change_of(&wfm, "WO-2", WorkOrderChange::Complete).await.unwrap();
        island.change_of(&wfm, "WO-3", WorkOrderChange::Cancel { reason: String::new() }).await.unwrap();
        let again = [
            (Outcome::Unchanged, vec![]),
            (Outcome::Refused, vec![Code::Ended]),
            (Outcome::Refused, vec![Code::Ended]),
        ];
        assert_eq!(call(night()).await, again);
        // A name is the same however it is written.
        assert_eq!(island.create(&wfm, "WO-1", &content("ida  BERG", &[1, 2])).await, (Outcome::Unchanged, vec![]));
        // A retired meter that the order does not have, and another meter.
        assert_eq!(island.create(&wfm, "WO-1", &content("Ida Berg", &[1, 5])).await, (Outcome::Refused, vec![Code::Retired]));
        assert_eq!(island.create(&wfm, "WO-1", &content("Ida Berg", &[1, 3])).await, (Outcome::Refused, vec![Code::IdInUse]));

        // I8: to a maker that may not order this work any more, nothing is told.
        let deny = "permit (principal is Officer, action, resource);".to_owned();
        let policy = kms_policy::from_files(vec![("none.cedar".into(), deny)], (Quotas::FILE.into(), Quotas::SHIPPED.to_owned())).unwrap();
        let shipped = island.island.policy.swap(Arc::new(policy));
        let told = call(night()).await;
        island.island.policy.store(shipped);
        let not_permitted = |count| (Outcome::Refused, vec![Code::NotPermitted; count]);
        assert_eq!(told, [not_permitted(2), not_permitted(1), not_permitted(1)]);
    }

    /// Policy is asked once for each class of meters, and not about an order that is too late.
    async fn orders_ask_policy_as_little_as_they_can(island) {
        island.deliver(&sample("generic-suite0", 9)).await;
        let wfm = island.account("wfm", 50).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let quotas = Quotas::parse(Quotas::SHIPPED).unwrap();
        let counting = Policy::new(Box::new(Counting(asked.clone())), quotas, [0; 32]);
        let shipped = island.island.policy.swap(Arc::new(counting));
        let mut late = content("Ida", &[1]);
        (late.from, late.until) = (late.from.after(-20 * HOUR), late.until.after(-20 * HOUR));
        let called = island.create(&wfm, "WO-0", &late).await;
        let for_late = asked.load(Ordering::Relaxed);
        let orders = (1..=8).map(|number| order(&format!("WO-{number}"), &content("Ida", &[number, number + 1]))).collect();
        let made = island.orders().create(&wfm, request(), orders).await;
        island.island.policy.store(shipped);
        assert_eq!((called, for_late), ((Outcome::Refused, vec![Code::Time]), 0));
        assert!(made.unwrap().results.iter().all(|result| result.outcome() == Outcome::Created));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    async fn many_orders_of_one_call_are_divided_and_the_largest_is_whole(island) {
        island.deliver(&sample("generic-suite0", 700)).await;
        let wfm = island.account("wfm", 50).await;
        let all: Vec<u64> = (1..=700).collect();
        let mut orders: Vec<_> = (1..=250).map(|number| order(&format!("WO-{number}"), &content("Ida", &[number, number + 1]))).collect();
        orders.push(order("WO-LARGE", &content("Ida", &all)));
        let many = request();
        let response = island.orders().create(&wfm, many, orders.clone()).await.unwrap();
        assert_eq!(response.results.len(), 251);
        assert!(response.results.iter().all(|result| result.outcome() == Outcome::Created));
        assert_eq!(response.results[250].work_order_id, "WO-LARGE");
        assert_eq!(island.orders().create(&wfm, many, orders).await.unwrap(), response, "the same request again");
        // Pages.
        let (mut after, mut listed) = (None, Vec::new());
        loop {
            let page = island.orders().list(&wfm, WorkOrderQuery::default(), after.take(), 100).await.unwrap();
            listed.extend(page.orders.into_iter().map(|order| order.work_order_id));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        listed.sort_unstable();
        listed.dedup();
        assert_eq!(listed.len(), 251);
    }

    async fn two_servers_change_one_order_and_one_of_them_is_told(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let wfm = island.account("wfm", 50).await;
        island.create(&wfm, "WO-1", &content("Ida", &[1])).await;
        let servers = [island.orders(), WorkOrderService::new(island.another_server().await)];
        for round in 0..10 {
            let revision = 2 * round + 1;
            let change = |name: &str| WorkOrderChange::Content { revision, content: content(name, &[1, 2]) };
            let (one, other) = tokio::join!(
                servers[0].change(&wfm, request(), id("WO-1"), change(&format!("Ida {round}"))),
                servers[1].change(&wfm, request(), id("WO-1"), change(&format!("Bo {round}"))),
            );
            let (won, told) = match (one, other) {
                (Ok(won), Err(told)) | (Err(told), Ok(won)) => (won, told),
                other => panic!("{other:?}"),
            };
            assert!(matches!(told, ServiceError::Aborted { .. }), "{told:?}");
            // Both servers see it, and the refused server changes that revision.
            let seen = servers[0].show(&wfm, &id("WO-1")).await.unwrap();
            assert_eq!((seen.revision, &seen.content), (revision + 1, &won.content));
            let next = WorkOrderChange::Content { revision: revision + 1, content: content("Cy", &[2]) };
            assert_eq!(servers[1].change(&wfm, request(), id("WO-1"), next).await.unwrap().revision, revision + 2);
        }
        // One ends it, however many ask.
        let (one, other) = tokio::join!(
            servers[0].change(&wfm, request(), id("WO-1"), WorkOrderChange::Complete),
            servers[1].change(&wfm, request(), id("WO-1"), WorkOrderChange::Cancel { reason: "late".to_owned() }),
        );
        assert_eq!(usize::from(one.is_ok()) + usize::from(other.is_ok()), 1);
        assert_eq!(island.findings().await, []);
    }

    async fn i5_edited_swapped_older_and_deleted_orders_are_refused(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let (wfm, ida) = (island.account("wfm", 50).await, island.handheld("hh-1", "Ida", 51).await);
        for text in ["WO-1", "WO-2", "WO-3", "WO-4", "WO-5"] {
            assert_eq!(island.create(&wfm, text, &content("Ida", &[1])).await.0, Outcome::Created);
        }
        let old = island.sealed_order("WO-1").await;
        island.change_of(&wfm, "WO-1", WorkOrderChange::Content { revision: 1, content: content("Ida", &[2]) }).await.unwrap();
        // An older one; one of another order; one octet more; one that is gone. WO-5 is as it was.
        island.put_order("WO-1", &old).await;
        island.put_order("WO-2", &island.sealed_order("WO-3").await).await;
        let mut edited = island.sealed_order("WO-3").await;
        *edited.body.last_mut().unwrap() ^= 1;
        island.put_order("WO-3", &edited).await;
        let delete = Damage::DeleteSealed(RowKind::WorkOrder, b"WO-4".to_vec());
        assert_eq!(damage(&database().database, &delete).await.unwrap(), 1);

        for text in ["WO-1", "WO-2", "WO-3", "WO-4"] {
            for change in [WorkOrderChange::Complete, WorkOrderChange::Content { revision: 1, content: content("Bo", &[1]) }] {
                assert!(denied(island.change_of(&wfm, text, change).await).ends_with("WorkOrder"), "{text}");
            }
            assert_eq!(denied(island.change_of(&ida, text, WorkOrderChange::Complete).await), "completeWorkOrder");
            assert_eq!(denied(island.orders().show(&ida, &id(text)).await), "showWorkOrder", "{text}");
            // The id is not free for another order either.
            assert_eq!(island.create(&wfm, text, &content("Eve", &[1])).await, (Outcome::Refused, vec![Code::IdInUse]), "{text}");
        }
        assert_eq!(island.listed(&ida, WorkOrderQuery::default()).await, ["WO-5"]);
        let mut findings = island.findings().await;
        findings.sort_unstable();
        let expected = [("WO-1", "stale"), ("WO-2", "edited"), ("WO-3", "edited"), ("WO-4", "deleted")];
        assert_eq!(findings, expected.map(|(id, finding)| (id.to_owned(), finding.to_owned())));
        assert!(!island.recorded(|event| matches!(event, Event::SecurityEvent(_)).then_some(())).await.is_empty());

        // Search columns decide nothing: the order is Ida's, whatever they say.
        kms_store_testing::execute(&database().database, "UPDATE work_order SET technician = 'eve', state = 1").await.unwrap();
        let eve = island.handheld("hh-2", "Eve", 52).await;
        assert!(island.listed(&eve, WorkOrderQuery::default()).await.is_empty());
        assert_eq!(denied(island.orders().show(&eve, &id("WO-5")).await), "showWorkOrder");
        assert_eq!(island.change_of(&ida, "WO-5", WorkOrderChange::Complete).await.unwrap().state, "completed");
    }

    async fn a_maker_has_so_many_orders_whatever_became_of_them(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let (wfm, other) = (island.account("wfm", 50).await, island.account("other", 51).await);
        let bounded = |mut server: IslandContext| {
            server.limits = Arc::new(Limits { work_orders_per_principal: 10, ..Limits::default() });
            WorkOrderService::new(Arc::new(server))
        };
        let service = bounded(island.restarted().await);
        let numbered = |from: u64, to: u64| (from..=to).map(|number| order(&format!("WO-{number}"), &content("Ida", &[1]))).collect::<Vec<_>>();
        let response = service.create(&wfm, request(), numbered(1, 12)).await.unwrap();
        let created = |response: &v1::CreateWorkOrdersResponse| response.results.iter().filter(|result| result.outcome() == Outcome::Created).count();
        assert_eq!(created(&response), 10);
        assert_eq!(outcomes(&response)[10], (Outcome::Refused, vec![Code::Exhausted]));
        assert!(response.results[11].problems[0].reason.contains("the bound `work_orders_per_principal` is 10 orders"));
        // Others have their own. Orders that end at once are never deleted either, so they count.
        assert_eq!(created(&service.create(&other, request(), numbered(20, 21)).await.unwrap()), 2);
        service.change(&wfm, request(), id("WO-1"), WorkOrderChange::Complete).await.unwrap();
        service.change(&wfm, request(), id("WO-2"), WorkOrderChange::Cancel { reason: String::new() }).await.unwrap();
        let response = service.create(&wfm, request(), numbered(11, 12)).await.unwrap();
        assert_eq!(created(&response), 0);
        let frees = content("Ida", &[1]).until.after(WorkOrder::COUNTED_MS);
        let frees = jiff::Timestamp::from_millisecond(frees.0).unwrap();
        let reason = &response.results[0].problems[0].reason;
        assert!(reason.contains(&format!("the first of them counts until {frees}")), "{reason}");

        // A week after their time they count no more. Two servers at once do not exceed the bound.
        kms_store_testing::execute(&database().database, "UPDATE work_order SET until_ms = 1").await.unwrap();
        let second = bounded(island.restarted().await);
        let (one, other) = tokio::join!(
            service.create(&wfm, request(), numbered(30, 37)),
            second.create(&wfm, request(), numbered(40, 47)),
        );
        assert_eq!(created(&one.unwrap()) + created(&other.unwrap()), 10);

        // An order that counts no more counts again when it gets another time. The account's
        // certificate has ended by then.
        clock::testing::set_ahead(9 * DAY);
        let officer = island.member(Role::Officer, "otto", Some("Otto"), 52).await;
        let mut later = content("Ida", &[1]);
        (later.from, later.until) = (later.from.after(9 * DAY), later.until.after(9 * DAY));
        let change = |revision| WorkOrderChange::Content { revision, content: later.clone() };
        let refusal = service.change(&officer, request(), id("WO-3"), change(1)).await;
        clock::testing::set_ahead(0);
        match refusal {
            Err(ServiceError::ResourceExhausted { retry_after, .. }) => assert!(retry_after.as_secs() < 7 * 86_400),
            other => panic!("{other:?}"),
        }
        // One that counts has its place already.
        service.change(&wfm, request(), id("WO-30"), change(1)).await.unwrap();
    }

    /// Audit records have a digest of each row, which has no key.
    async fn the_place_of_an_order_cannot_be_tried_out_with_the_log(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let wfm = island.account("wfm", 50).await;
        // The last field of the row.
        let salt = async |text: &str| island.sealed_order(text).await.body.last_chunk::<16>().copied().unwrap();
        for text in ["WO-1", "WO-2"] {
            island.create(&wfm, text, &content("Ida", &[1])).await;
        }
        let (one, two) = (salt("WO-1").await, salt("WO-2").await);
        assert!(one != two && one != [0; 16], "the same place");
        let change = async |revision, place: &str, meters: &[u64]| {
            let mut content = content("Ida", meters);
            content.place = Place::parse(place).unwrap();
            island.change_of(&wfm, "WO-1", WorkOrderChange::Content { revision, content }).await.unwrap();
        };
        change(1, "Harbour Street 7", &[1, 2]).await;
        assert_eq!(salt("WO-1").await, one);
        change(2, "Harbour Street 8", &[1, 2]).await;
        let other = salt("WO-1").await;
        assert!(other != one && other != two);
        change(3, "", &[1, 2]).await;
        assert!(!island.sealed_order("WO-1").await.body.windows(16).any(|octets| octets == other));
        assert_eq!(island.findings().await, []);
    }

    async fn a_clock_that_was_set_ahead_removes_no_place(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let wfm = island.account("wfm", 50).await;
        island.create(&wfm, "WO-1", &content("Ida", &[1])).await;
        assert_eq!(kms_store_testing::execute(&database().database, "DELETE FROM work_order").await.unwrap(), 1);
        let retention_pass = RetentionPass::new(island.island.clone(), Retention::DEFAULT);
        clock::testing::set_ahead(365 * DAY);
        assert_eq!(retention_pass.remove_places(IslandContext::now()).await.unwrap(), 0);
        clock::testing::set_ahead(0);
        assert_eq!(island.listed(&wfm, WorkOrderQuery::default()).await, ["WO-1"], "columns come back all the same");
        let shown = island.orders().show(&wfm, &id("WO-1")).await.unwrap();
        assert_eq!(shown.content.unwrap().place, "Harbour Street 7");
    }

    async fn places_are_removed_and_lost_columns_come_back(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        let wfm = island.account("wfm", 50).await;
        for text in ["WO-1", "WO-2"] {
            island.create(&wfm, text, &content("Ida", &[1])).await;
        }
        island.change_of(&wfm, "WO-1", WorkOrderChange::Complete).await.unwrap();
        assert_eq!(kms_store_testing::execute(&database().database, "DELETE FROM work_order").await.unwrap(), 2);
        assert!(island.listed(&wfm, WorkOrderQuery::default()).await.is_empty());
        let run = async |days: i64| {
            let retention_pass = RetentionPass::new(island.island.clone(), Retention::DEFAULT);
            retention_pass.remove_places(IslandContext::now().after(days * DAY)).await.unwrap()
        };
        assert_eq!(run(89).await, 0);
        assert_eq!(island.listed(&wfm, WorkOrderQuery::default()).await, ["WO-1", "WO-2"]);
        let place = async |text: &str| island.orders().show(&wfm, &id(text)).await.unwrap().content.unwrap().place;
        assert_eq!(place("WO-1").await, "Harbour Street 7");
        assert_eq!(run(90).await, 1, "WO-2 was over some hours later");
        assert_eq!((place("WO-1").await.as_str(), place("WO-2").await.as_str()), ("", "Harbour Street 7"));
        assert_eq!((run(91).await, run(92).await), (1, 0));
        let removed = island.recorded(|event| match event {
            Event::PlacesRemoved(event) => Some((event.days, event.work_order_ids)),
            _ => None,
        }).await;
        assert_eq!(removed, [(90, vec!["WO-1".to_owned()]), (90, vec!["WO-2".to_owned()])]);
        assert_eq!(island.findings().await, []);
    }
}
