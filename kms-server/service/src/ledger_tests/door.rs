//! Acts that do not keep their word are faults of the server, and write nothing.

use kms_authz::Action;
use kms_base::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::Reads;

use crate::testing::{TestIsland, island_tests, meter, sample};

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

async fn serial(island: &TestIsland) -> String {
    island.island.meter(meter(1)).await.unwrap().unwrap().serial.clone()
}

island_tests! {
    async fn what_is_not_as_it_says_is_a_fault_and_writes_nothing(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let before = serial(&island).await;
        let faults: [(&str, bool, Decide); 5] = [
            ("(I2)", false, |_, view| { rename(view)?; Ok(Decision::unchanged(())) }),
            ("(I2)", false, |_, view| { rename(view)?; Ok(Decision::progress(())) }),
            ("(I2)", false, |_, view| { view.append(event()); Ok(Decision::forgotten(())) }),
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
}
