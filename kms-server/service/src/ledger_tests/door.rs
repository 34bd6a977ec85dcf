//! Acts that do not keep their word are faults of the server, and write nothing.

use std::{num::NonZeroU32, time::Duration};

use kms_authz::Action;
use kms_base::ServiceError;
use kms_domain::{
    CampaignId, CounterKey, GrantId, KeyType, KeyVersionNumber, OnNewKey, Owner, SecuritySetupId, Task, TaskStep,
    TaskWork, UnixMillis,
};
use kms_ledger::{Act, Actor, Asker, CounterOf, Decision, Never, Permit, ServerAct, View};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::{GrantRevocation, Reads, ShipmentRefusal, TaskKey, TaskRow, UploadId};

use crate::testing::{TestIsland, client_title, island_tests, meter, sample};

type Decide = fn(&Permit, &mut View<'_, '_>) -> Result<Decision<()>, ServiceError>;

/// An act that does as it is told.
struct Told {
    decide: Decide,
    each: bool,
}

impl Act for Told {
    type Answer = ();
    type Past = Never;

    fn name(&self) -> &'static str {
        "test"
    }

    fn reads(&self) -> Reads {
        Reads { meters: vec![meter(1)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(if self.each { asker.each() } else { asker.without_policy("a test") })
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        (self.decide)(permit, view)
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        match never {}
    }
}

fn event() -> Event {
    Event::MetersChanged(MetersChanged { change: "test".to_owned(), ..MetersChanged::default() })
}

fn rename(view: &mut View<'_, '_>) -> Result<(), ServiceError> {
    let mut changed = (*view.meter(meter(1))?.unwrap()).clone();
    changed.serial = "renamed".to_owned();
    view.put_meter(changed, false)
}

const UPLOAD: [u8; 16] = [4; 16];

fn plan_task(view: &mut View<'_, '_>) {
    view.plan_task(TaskRow {
        key: TaskKey { campaign: CampaignId::from_octets(&[6; 16]).unwrap(), meter: meter(1) },
        generation: 1,
        wave: 1,
        vendor: "KAM".to_owned(),
        head_end: None,
        mark: [0; 16],
        task: Task::new(TaskStep { setup: SecuritySetupId::DEFAULT, work: TaskWork::Probe, from: 0 }, UnixMillis(1)),
    });
}

fn revoke_grant(view: &mut View<'_, '_>) {
    view.revoke_grant(GrantRevocation { id: GrantId::from_octets(&[8; 16]).unwrap(), revoked: UnixMillis(1) });
}

fn put_refused_line(view: &mut View<'_, '_>) {
    view.put_refused_line(ShipmentRefusal {
        upload: UploadId(UPLOAD),
        line: 1,
        field: String::new(),
        reason: "a test".to_owned(),
    });
}

fn lease(view: &mut View<'_, '_>) -> Result<(), ServiceError> {
    let of = CounterOf {
        owner: Owner::Meter(meter(1)),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
        on_new_key: OnNewKey::Continue,
    };
    view.lease(of, NonZeroU32::MIN, UnixMillis(i64::MAX)).map(|_| ())
}

async fn serial(island: &TestIsland) -> String {
    island.island.meter(meter(1)).await.unwrap().unwrap().serial.clone()
}

island_tests! {
    async fn what_is_not_as_it_says_is_a_fault_and_writes_nothing(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let before = serial(&island).await;
        let faults: [(&str, bool, Decide); 11] = [
            ("(I2)", false, |_, view| { rename(view)?; Ok(Decision::unchanged(())) }),
            ("(I2)", false, |_, view| { rename(view)?; Ok(Decision::progress(())) }),
            ("(I2)", false, |_, view| { view.append(event()); Ok(Decision::forgotten(())) }),
            // What is on its way may change without a record, and says so.
            ("(I2)", false, |_, view| { plan_task(view); Ok(Decision::unchanged(())) }),
            ("(I2)", false, |_, view| { plan_task(view); Ok(Decision::forgotten(())) }),
            // What is neither a row nor on its way is of right all the same.
            ("(I2)", false, |_, view| { revoke_grant(view); Ok(Decision::progress(())) }),
            ("(I2)", false, |_, view| { put_refused_line(view); Ok(Decision::progress(())) }),
            ("(I2)", false, |_, view| { lease(view)?; Ok(Decision::progress(())) }),
            ("(I2)", false, |_, view| { lease(view)?; Ok(Decision::unchanged(())) }),
            ("(I2)", false, |_, view| {
                let entry = view.attempt(|view| Err::<(), _>(view.append(event()))).unwrap_err();
                rename(view)?;
                Ok(Decision::recorded(entry, ()))
            }),
            ("(I8)", true, |_, view| { rename(view)?; Ok(Decision::recorded(view.append(event()), ())) }),
        ];
        for (rule, each, decide) in faults {
            let outcome = island.island.door.act(&island.officer, None, Told { decide, each }).await;
            let Err(ServiceError::Internal(text)) = &outcome else { panic!("{rule}: {outcome:?}") };
            assert!(text.contains(rule), "{text}");
            assert_eq!(serial(&island).await, before);
        }
    }

    async fn what_is_as_it_says_is_written(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let act = Told { each: true, decide: |permit, view| {
            assert!(permit.permits(&Action::ListPrincipals, &kms_authz::Resource::Island));
            rename(view)?;
            Ok(Decision::recorded(view.append(event()), ()))
        } };
        let committed = island.island.door.act(&island.officer, None, act).await.unwrap();
        assert_eq!(committed.leaves.len(), 1);
        assert_eq!(serial(&island).await, "renamed");
    }

    /// Nothing could be recorded from then on, so health checks must not send clients here (I2).
    async fn a_writing_task_that_fails_is_told(island) {
        let committer = &island.island.committer;
        assert!(committer.is_ready());
        let act = committer.act_in_test(Actor::server(ServerAct::TEST), Reads::default(), |_| -> Result<(), ServiceError> {
            panic!("a fault in an act")
        });
        assert!(matches!(act.await, Err(ServiceError::Unavailable { .. })));
        // The act is answered before the task has ended.
        let told = async {
            while committer.is_ready() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), told).await.unwrap();
    }
}
