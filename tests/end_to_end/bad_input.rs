//! Malformed, oversized and unauthorised requests: named, refused, never fatal.

use kms_client::{new_request_id, proto};
use kms_tests::{CLIENT_TITLE, DevServer, terms, title};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_field_is_named() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let good = proto::OpenSessionRequest {
        request_id: new_request_id().octets().to_vec().into(),
        meter: title(0).octets().to_vec().into(),
        terms: Some(terms(1)),
    };
    let with = |edit: &dyn Fn(&mut proto::OpenSessionRequest)| {
        let mut request = good.clone();
        edit(&mut request);
        request
    };
    let cases: Vec<(&str, proto::OpenSessionRequest)> = vec![
        ("request_id", with(&|request| request.request_id = vec![1; 15].into())),
        ("request_id", with(&|request| request.request_id = vec![0; 16].into())),
        ("meter", with(&|request| request.meter = vec![1; 9].into())),
        ("meter", with(&|request| request.meter = vec![0; 8].into())),
        ("terms", with(&|request| request.terms = None)),
        ("terms.purpose", with(&|request| request.terms.as_mut().unwrap().purpose = 0)),
        ("terms.purpose", with(&|request| request.terms.as_mut().unwrap().purpose = 99)),
        (
            "terms.security_setup",
            with(&|request| request.terms.as_mut().unwrap().security_setup = vec![0, 0, 42, 0, 0, 255].into()),
        ),
        (
            "terms.key_types[1]",
            with(&|request| request.terms.as_mut().unwrap().key_types = vec!["GUEK".to_owned(), "GEUK".to_owned()]),
        ),
        (
            "terms.key_types[1]",
            with(&|request| request.terms.as_mut().unwrap().key_types = vec!["GUEK".to_owned(), "GUEK".to_owned()]),
        ),
        ("terms.client_title", with(&|request| request.terms.as_mut().unwrap().client_title = vec![1; 7].into())),
        ("terms.counters", with(&|request| request.terms.as_mut().unwrap().counters = 1_000_001)),
        ("terms.lifetime_seconds", with(&|request| request.terms.as_mut().unwrap().lifetime_seconds = u32::MAX)),
    ];
    for (field, request) in cases {
        let status = connection.grants().open_session(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        assert!(status.message().starts_with(&format!("{field}:")), "{field}: {}", status.message());
    }
    // The connection and the server are as before.
    connection.grants().open_session(good).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_bounded_and_their_members_named() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let ask = |meters: Vec<Vec<u8>>| {
        let mut grants = connection.grants();
        let request = proto::OpenSessionsRequest {
            request_id: new_request_id().octets().to_vec().into(),
            meters: meters.into_iter().map(Into::into).collect(),
            terms: Some(terms(1)),
            first_chunk: 0,
        };
        async move { grants.open_sessions(request).await.map(|_| ()).unwrap_err() }
    };
    let good = title(0).octets().to_vec();
    for (meters, expected) in [
        (Vec::new(), "meters: 0 meters"),
        (vec![good.clone(), vec![1]], "meters[1]:"),
        (vec![good.clone(), good.clone()], "occurs twice"),
        (
            (1..=10_001_u64).map(|number| number.to_be_bytes().to_vec()).collect(),
            "10001 meters; a request has 1 to 10000",
        ),
    ] {
        let status = ask(meters).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(expected), "{expected}: {}", status.message());
    }
    // Larger than any message that is taken.
    let status = ask(vec![vec![7; 64]; 1_000_000]).await;
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_never_tells_whether_a_meter_exists() {
    let server = DevServer::start();
    let handheld = server.connect("handheld").await;
    let head_end = server.connect("head-end").await;
    let ask = |connection: &kms_client::Connection, meter: Vec<u8>| {
        let mut grants = connection.grants();
        let request = proto::OpenSessionRequest {
            request_id: new_request_id().octets().to_vec().into(),
            meter: meter.into(),
            terms: Some(proto::SessionTerms { client_title: Default::default(), ..terms(1) }),
        };
        async move { grants.open_session(request).await.unwrap_err() }
    };
    let unknown = hex::decode("4B414DFFFFFFFFFF").unwrap();
    let (known_refused, unknown_refused) =
        (ask(&handheld, title(0).octets().to_vec()).await, ask(&handheld, unknown.clone()).await);
    assert_eq!((known_refused.code(), unknown_refused.code()), (Code::PermissionDenied, Code::PermissionDenied));
    let without_title = |status: &tonic::Status, title: &str| status.message().replace(title, "TITLE");
    assert_eq!(
        without_title(&known_refused, &title(0).to_string()),
        without_title(&unknown_refused, "4B414DFFFFFFFFFF")
    );
    assert_eq!(ask(&head_end, unknown).await.code(), Code::PermissionDenied);
}

/// Counters are allocated under a client title to the principal that it is registered for, in every
/// call that allocates some (I4).
#[tokio::test(flavor = "multi_thread")]
async fn nobody_counts_under_a_client_title_that_is_not_his() {
    let server = DevServer::start();
    let head_end = server.connect("head-end").await;
    let request_id = || new_request_id().octets().to_vec().into();
    let meter = || bytes::Bytes::from(title(0).octets().to_vec());
    let own = || bytes::Bytes::from(hex::decode(CLIENT_TITLE).unwrap());
    // The handheld's, nobody's, and the meter's own, under which the meter itself counts.
    for stolen in ["4D4D4D00000000F1", "4D4D4D00000000EE", &title(0).to_string()] {
        let title = || bytes::Bytes::from(hex::decode(stolen).unwrap());
        let wanted = || Some(proto::SessionTerms { client_title: title(), ..terms(1) });
        let one = proto::OpenSessionRequest { request_id: request_id(), meter: meter(), terms: wanted() };
        assert_eq!(head_end.grants().open_session(one).await.unwrap_err().code(), Code::PermissionDenied, "{stolen}");
        let batch = proto::OpenSessionsRequest {
            request_id: request_id(),
            meters: vec![meter()],
            terms: wanted(),
            first_chunk: 0,
        };
        let refused = match head_end.grants().open_sessions(batch).await {
            Err(status) => status,
            Ok(answers) => answers.into_inner().message().await.unwrap_err(),
        };
        assert_eq!(refused.code(), Code::PermissionDenied, "{stolen}");
        let frame = proto::PlainFrame {
            meter: meter(),
            client_title: title(),
            form: proto::FrameForm::Glo.into(),
            apdu: hex::decode("C001C100030100010800FF0200").unwrap().into(),
            ..Default::default()
        };
        let frames = |frame| proto::ProtectRequest {
            request_id: request_id(),
            purpose: proto::Purpose::Read.into(),
            frames: vec![frame],
            supersede_lease: true,
        };
        let result =
            head_end.frames().protect(frames(frame.clone())).await.unwrap().into_inner().results.remove(0).result;
        let Some(proto::frame_result::Result::Refusal(refusal)) = result else {
            panic!("{stolen}: a frame was protected")
        };
        assert_eq!(refusal.code, Code::PermissionDenied as i32, "{stolen}: {}", refusal.message);
        // It was the title that was refused: under its own the head-end may.
        let result = head_end
            .frames()
            .protect(frames(proto::PlainFrame { client_title: own(), ..frame }))
            .await
            .unwrap()
            .into_inner()
            .results
            .remove(0)
            .result;
        assert!(matches!(result, Some(proto::frame_result::Result::Apdu(_))), "{result:?}");
    }
    // Nor does another principal get the title of the head-end.
    let handheld = server.connect("handheld").await;
    let stolen = proto::OpenSessionRequest { request_id: request_id(), meter: meter(), terms: Some(terms(1)) };
    let refused = handheld.grants().open_session(stolen).await.unwrap_err();
    assert!(refused.code() == Code::PermissionDenied && refused.message().contains("client title"), "{refused}");
    let name = kms_client::PrincipalId::parse("urn:meterkms:dev:head-end:second").unwrap();
    let request = kms_client::KeyRequest::generate(&name).unwrap();
    let add = proto::AddPrincipalRequest {
        request_id: request_id(),
        principal: name.to_string(),
        certificate_request: request.certificate_request().to_vec().into(),
        client_titles: vec![own()],
        ..Default::default()
    };
    let refused = server.connect("officer-1").await.principals().add_principal(add).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
}
