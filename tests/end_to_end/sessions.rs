//! Session grants as head-ends use them.

use kms_client::{KeyType, SystemTitle, new_request_id, proto};
use kms_tests::{DevServer, TestModule, open, terms, title};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_gets_the_same_grant_wrapped_anew() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let profile = server.profile("head-end");
    let key = profile.transport_key().unwrap();
    let id = new_request_id();
    let ask = |counters| {
        let (connection, key) = (connection.clone(), &key);
        async move {
            connection
                .open_session(key, id, title(5), terms(counters), &TestModule::of_environment().open_options())
                .await
        }
    };
    let first = ask(50).await.unwrap();
    let again = ask(50).await.unwrap();
    assert_eq!(first.keys.grant_id, again.keys.grant_id);
    assert_eq!(first.audit_leaf, again.audit_leaf);
    let lease = |session: &kms_client::Session| {
        session.keys.meters[0]
            .counters
            .as_ref()
            .map(|counters| (counters.next().unwrap(), counters.remaining()))
            .unwrap()
    };
    assert_eq!(lease(&first), lease(&again));
    assert_eq!(
        first.keys.meters[0].key(KeyType::GUEK).unwrap().key.expose(),
        again.keys.meters[0].key(KeyType::GUEK).unwrap().key.expose()
    );

    // Another request under the same id is refused whole.
    let other = ask(51).await.unwrap_err();
    assert!(format!("{other:?}").contains("request_id"), "{other:?}");

    // A newer lease ends this one: the repeated request says so instead of handing out overtaken
    // counters.
    open(&connection, &profile, title(5), 50).await.unwrap();
    let overtaken = ask(50).await.unwrap_err();
    assert!(overtaken.to_string().contains("newer lease"), "{overtaken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_comes_in_chunks_and_refuses_only_what_is_not_the_head_ends() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let key = server.profile("head-end").transport_key().unwrap();
    let unknown = SystemTitle::parse("4B414DFFFFFFFFFF").unwrap();
    let meters: Vec<SystemTitle> = (0..50).map(title).chain([unknown]).collect();
    let options = TestModule::of_environment().open_options();
    let mut batch = connection.open_sessions(&key, new_request_id(), &meters, terms(10), &options);
    let (mut opened, mut refused) = (Vec::new(), Vec::new());
    while let Some(chunk) = batch.next().await.unwrap() {
        opened.extend(chunk.sessions.into_iter().flat_map(|sessions| sessions.meters).map(|meter| meter.meter));
        refused.extend(chunk.refusals);
    }
    assert_eq!(opened, meters[..50]);
    assert_eq!(refused.len(), 1);
    assert_eq!(
        (refused[0].meter.as_ref(), refused[0].code),
        (unknown.octets().as_slice(), Code::PermissionDenied as i32)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_grant_is_not_repeated_and_a_dedicated_key_is_made_once() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let key = server.profile("head-end").transport_key().unwrap();
    let id = new_request_id();
    let wanted = proto::SessionTerms { dedicated_key: true, ..terms(10) };
    let options = TestModule::of_environment().open_options();
    let ask = || connection.open_session(&key, id, title(6), wanted.clone(), &options);
    let one = ask().await.unwrap();
    // I4: the same lease with another dedicated key would be another InitiateRequest under the same
    // counter.
    assert!(ask().await.unwrap_err().to_string().contains("not made twice"));
    let two = connection.open_session(&key, new_request_id(), title(7), wanted.clone(), &options).await.unwrap();
    let dedicated =
        |session: &kms_client::Session| session.keys.meters[0].key(KeyType::DEDICATED).unwrap().key.expose().to_vec();
    assert_ne!(dedicated(&one), dedicated(&two));

    let officer = server.connect("officer-1").await;
    let request = proto::RevokeGrantRequest {
        request_id: new_request_id().octets().to_vec().into(),
        grant_id: one.keys.grant_id.octets().to_vec().into(),
        reason: "a test".to_owned(),
    };
    let revoked = officer.grants().revoke_grant(request).await.unwrap().into_inner().grant.unwrap();
    assert!(revoked.revoked_ms > 0);
    assert!(ask().await.unwrap_err().to_string().contains("revoked"));
}

/// One caller's colliding acts fail neither other callers' nor use up counters.
#[tokio::test(flavor = "multi_thread")]
async fn racing_revocations_of_one_grant_disturb_nobody() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let profile = server.profile("head-end");
    let session = open(&connection, &profile, title(8), 10).await.unwrap();
    let revoke = || {
        let mut grants = connection.grants();
        let request = proto::RevokeGrantRequest {
            request_id: new_request_id().octets().to_vec().into(),
            grant_id: session.keys.grant_id.octets().to_vec().into(),
            reason: "a test".to_owned(),
        };
        tokio::spawn(async move { grants.revoke_grant(request).await })
    };
    let racing: Vec<_> = (0..16).map(|_| revoke()).collect();
    let mut last = 0;
    for _ in 0..20 {
        let other = open(&connection, &profile, title(9), 10).await.unwrap();
        last = other.keys.meters[0].counters.as_ref().unwrap().next().unwrap();
    }
    for revoked in racing {
        revoked.await.unwrap().unwrap();
    }
    assert!(last < 1_000, "counters were used up: {last}");
}
