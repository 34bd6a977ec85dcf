use std::num::NonZeroU32;

use kms_domain::{CounterKey, KeyType, KeyVersionNumber, Lease, RequestId, SecuritySetupId, UnixMillis};
use kms_proto::v1::{self, audit_record::Event};
use kms_store::Reads;

use super::*;
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};

/// GET of a register.
const GET: &str = "C001C100030100010800FF0200";

fn plain(number: u64, apdu: &str) -> PlainFrame {
    PlainFrame {
        meter: meter(number),
        setup: None,
        client_title: client_title(),
        protection: Protection::AuthenticatedEncrypted,
        content: PlainContent::Apdu { apdu: hex::decode(apdu).unwrap(), general: false },
    }
}

fn request() -> RequestId {
    RequestId::from_octets(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

/// The counter of one frame to meter 1, or why there is none.
async fn get(server: &Arc<Island>, caller: &Caller, supersede: bool) -> Result<u32, ServiceError> {
    let (mut outcomes, _) = FrameService::new(server.clone()).protect(caller, request(), [1; 32], Purpose::Read, vec![plain(1, GET)], supersede).await.unwrap();
    let outcome = outcomes.remove(0);
    outcome.octets.map(|_| outcome.counter)
}

/// Lends counters as a session does.
async fn lease(server: &Arc<Island>, until: UnixMillis) -> Lease {
    let of = CounterOf {
        meter: meter(1),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
    };
    let committed = server.committer.act(Actor::server("test"), Reads::default(), move |view| {
        view.append(Event::KeysGranted(v1::KeysGranted::default()));
        view.lease(of, NonZeroU32::new(100).unwrap(), until)
    });
    committed.await.unwrap().value
}

/// How often meter 1's row was written.
async fn generation(island: &TestIsland) -> u64 {
    island.island.store.meters(&[meter(1)]).await.unwrap()[0].row.generation
}

fn refused(outcome: Result<u32, ServiceError>) -> String {
    match outcome {
        Err(error @ ServiceError::FailedPrecondition { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

island_tests! {
    async fn frames_alone_are_never_refused_for_a_lease(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let another = island.another_server().await;
        let restarted = Arc::new(island.restarted().await);
        let mut last = 0;
        for server in [&island.island, &island.island, &another, &island.island, &another, &restarted] {
            let counter = get(server, &island.head_end, false).await.unwrap();
            assert!(counter > last, "I4");
            last = counter;
        }
    }

    async fn a_lease_is_known_to_the_server_that_dealt_it_with_its_end(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let server = &island.island;
        get(server, &island.head_end, false).await.unwrap();
        let written = generation(&island).await;
        // The chunk was reserved for frames: one write says that it is lent now, and the next leases write nothing.
        lease(server, UnixMillis(1)).await;
        assert_eq!(generation(&island).await, written + 1);
        let last = lease(server, Island::now().after(60_000)).await.last();
        assert_eq!(generation(&island).await, written + 1);
        assert!(refused(get(server, &island.head_end, false).await).contains("holds a live counter lease"));
        let counter = get(server, &island.head_end, true).await.unwrap();
        assert!(counter > last, "I4");
        // It is superseded now, and one that has ended is nobody's hindrance.
        assert_eq!(get(server, &island.head_end, false).await.unwrap(), counter + 1);
        lease(server, UnixMillis(1)).await;
        get(server, &island.head_end, false).await.unwrap();
        assert_eq!(generation(&island).await, written + 1);
    }

    async fn a_lease_of_another_server_is_known_and_can_be_superseded(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let (one, another) = (&island.island, island.another_server().await);
        let lent = lease(one, Island::now().after(60_000)).await;
        assert!(refused(get(&another, &island.head_end, false).await).contains("another server"));
        let counter = get(&another, &island.head_end, true).await.unwrap();
        assert!(counter > lent.last(), "I4");
        // The lease has ended for all of them, the one that dealt it included.
        let after = get(&another, &island.head_end, false).await.unwrap();
        assert!(get(one, &island.head_end, false).await.unwrap() > after, "I4");
        get(&another, &island.head_end, false).await.unwrap();
        // A lease from a chunk that another server reserved for frames.
        lease(one, UnixMillis(1)).await;
        assert!(refused(get(&another, &island.head_end, false).await).contains("supersede_lease"));
    }

    async fn a_lease_is_known_after_a_restart(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        lease(&island.island, Island::now().after(60_000)).await;
        let restarted = Arc::new(island.restarted().await);
        assert!(refused(get(&restarted, &island.head_end, false).await).contains("before its last start"));
        get(&restarted, &island.head_end, true).await.unwrap();
        get(&restarted, &island.head_end, false).await.unwrap();
    }
}
