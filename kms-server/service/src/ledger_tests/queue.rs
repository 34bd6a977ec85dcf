//! Acts of several principals wait in lanes of their own.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::future::join_all;
use kms_domain::{ChunkSize, PrincipalId, Role};
use kms_proto::v1::{KeysGranted, SecurityEvent, audit_record::Event};
use kms_store::{AuditFilter, Reads};
use prost::Message as _;

use crate::testing::{TestIsland, island_tests, meter};
use kms_base::bounds::Limits;
use kms_base::error::ServiceError;
use kms_ledger::{Actor, Committed, Committer, CommitterSettings, RestoreSettings, ServerAct};

type Queued = Pin<Box<dyn Future<Output = Result<Committed<()>, ServiceError>> + Send>>;

/// A writer that is held in an act, so that others wait; and the order in which they are decided
/// then.
struct Held {
    committer: Committer,
    release: std::sync::mpsc::Sender<()>,
    holding: Queued,
    decided: Arc<Mutex<Vec<(String, usize)>>>,
}

impl Held {
    async fn of(committer: &Committer) -> Self {
        let (release, released) = std::sync::mpsc::channel();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let (mut started, released) = (Some(started), Mutex::new(released));
        let again = committer.clone();
        let mut holding: Queued = Box::pin(async move {
            let act = again.act_in_test(Actor::server(ServerAct::TEST), Reads::default(), move |_| {
                if let Some(started) = started.take() {
                    started.send(()).unwrap();
                    released.lock().unwrap().recv().unwrap();
                }
                Ok(())
            });
            act.await
        });
        assert!(futures::poll!(holding.as_mut()).is_pending());
        has_started.await.unwrap();
        Self { committer: committer.clone(), release, holding, decided: Arc::default() }
    }

    /// Puts an act of so many meters into the queue.
    async fn queue(&self, principal: &PrincipalId, number: usize, meters: u64) -> Result<Queued, ServiceError> {
        let actor = Actor {
            principal: Some(principal.clone()),
            certificate_sha256: None,
            request: None,
            action: "openSession",
        };
        let reads = Reads { meters: (1..=meters).map(meter).collect(), ..Reads::default() };
        let (committer, decided, name) = (self.committer.clone(), self.decided.clone(), principal.name().to_owned());
        let mut act: Queued = Box::pin(async move {
            let act = committer.act_in_test(actor, reads, move |_| {
                decided.lock().unwrap().push((name.clone(), number));
                Ok(())
            });
            act.await
        });
        match futures::poll!(act.as_mut()) {
            std::task::Poll::Pending => Ok(act),
            std::task::Poll::Ready(outcome) => Err(outcome.unwrap_err()),
        }
    }

    /// Lets the writer go on, and gives the order in which the acts were decided.
    async fn decided(self, acts: Vec<Queued>) -> Vec<(String, usize)> {
        self.release.send(()).unwrap();
        self.holding.await.unwrap();
        join_all(acts).await.into_iter().for_each(|outcome| drop(outcome.unwrap()));
        self.decided.lock().unwrap().clone()
    }
}

fn head_end(island: &TestIsland, name: &str) -> PrincipalId {
    PrincipalId::new(island.island.name().clone(), Role::HeadEnd, name).unwrap()
}

/// A committer of its own on the island's database.
fn committer(island: &TestIsland, limits: Limits) -> Committer {
    let settings = CommitterSettings {
        policy_sha256: None,
        island: island.island.name().clone(),
        server: "bounded".to_owned(),
        chunk_size: ChunkSize::DEFAULT,
        limits: Arc::new(limits),
        restore: RestoreSettings::default(),
        silence: CommitterSettings::SILENCE,
    };
    let (seal, audit) = (island.island.committer.seal_keys(), island.island.committer.audit_keys());
    Committer::start(island.island.store.clone(), (*seal).clone(), (*audit).clone(), settings)
}

island_tests! {
    async fn one_that_floods_waits_for_itself(island) {
        let held = Held::of(&island.island.committer).await;
        let (flood, neighbour) = (head_end(&island, "flood"), head_end(&island, "neighbour"));
        let mut acts = Vec::new();
        for number in 0..60 {
            acts.push(held.queue(&flood, number, 500).await.unwrap());
        }
        for number in 0..3 {
            acts.push(held.queue(&neighbour, number, 1).await.unwrap());
        }
        let decided = held.decided(acts).await;
        // The neighbour, who came last, is first; and each one's acts keep their order.
        assert_eq!(decided[..3], [0, 1, 2].map(|number| ("neighbour".to_owned(), number)));
        assert_eq!(decided[3..], (0..60).map(|number| ("flood".to_owned(), number)).collect::<Vec<_>>());
    }

    async fn those_who_flood_share_the_writer(island) {
        let held = Held::of(&island.island.committer).await;
        let (one, other) = (head_end(&island, "one"), head_end(&island, "other"));
        let mut acts = Vec::new();
        for number in 0..20 {
            acts.push(held.queue(&one, number, 500).await.unwrap());
        }
        for number in 0..20 {
            acts.push(held.queue(&other, number, 500).await.unwrap());
        }
        let decided = held.decided(acts).await;
        for (served, (name, number)) in decided.iter().enumerate() {
            assert!(served.abs_diff(2 * number) <= 3, "act {number} of {name} is number {served}: {decided:?}");
        }
    }

    async fn one_principal_leaves_room_for_others(island) {
        let limits = Limits { acts_waiting: 8, acts_waiting_per_principal: 4, meters_in_flight_per_principal: 1_000, ..Limits::default() };
        let held = Held::of(&committer(&island, limits)).await;
        let (flood, large, neighbour) = (head_end(&island, "flood"), head_end(&island, "large"), head_end(&island, "neighbour"));
        let mut acts = Vec::new();
        let refusal = async |principal, meters| match held.queue(principal, 99, meters).await.map(drop) {
            Err(ServiceError::ResourceExhausted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        for number in 0..4 {
            acts.push(held.queue(&flood, number, 1).await.unwrap());
        }
        assert!(refusal(&flood, 1).await.contains("`acts_waiting_per_principal`"));
        // An act that waits alone is taken whatever its size.
        acts.push(held.queue(&large, 0, 2_000).await.unwrap());
        assert!(refusal(&large, 1).await.contains("`meters_in_flight_per_principal`"));
        for number in 0..3 {
            acts.push(held.queue(&neighbour, number, 1).await.unwrap());
        }
        assert!(refusal(&neighbour, 1).await.contains("`acts_waiting`"));
        assert_eq!(held.decided(acts).await.len(), 8);
    }

    async fn the_log_grows_within_a_bound_for_each_principal(island) {
        let limits = Limits { log_octets_per_principal_and_hour: 8_000, ..Limits::default() };
        let committer = committer(&island, limits);
        let write = async |name: &str, action: &'static str| {
            let actor = Actor { principal: Some(head_end(&island, name)), certificate_sha256: None, request: None, action };
            let act = committer.act_in_test(actor, Reads::default(), |view| {
                view.append(Event::KeysGranted(KeysGranted { grant_id: vec![7; 1_000].into(), ..KeysGranted::default() }));
                Ok(())
            });
            act.await.map(drop)
        };
        for _ in 0..7 {
            write("flood", "openSession").await.unwrap();
        }
        write("flood", "openSession").await.unwrap();
        let refused = write("flood", "openSession").await;
        assert!(matches!(&refused, Err(ServiceError::ResourceExhausted { reason, .. }) if reason.contains("`log_octets_per_principal_and_hour`")), "{refused:?}");
        assert!(write("flood", "protectFrame").await.is_err());
        // The reserve, which ends too; others are not concerned.
        write("flood", "continueTransfer").await.unwrap();
        write("flood", "revokeGrant").await.unwrap();
        assert!(write("flood", "continueTransfer").await.is_err());
        write("neighbour", "openSession").await.unwrap();
        let records = island.island.store.audit_page(&AuditFilter::default(), None, 1_000).await.unwrap();
        let alarms: Vec<String> = records
            .iter()
            .map(|row| kms_proto::v1::AuditRecord::decode(row.record.record.as_slice()).unwrap())
            .filter_map(|record| match record.event {
                Some(Event::SecurityEvent(SecurityEvent { kind, .. })) if kind == "log-growth" => Some(record.principal),
                _ => None,
            })
            .collect();
        assert_eq!(alarms, [head_end(&island, "flood").to_string(), head_end(&island, "flood").to_string()], "early, and at the bound");
    }
}
