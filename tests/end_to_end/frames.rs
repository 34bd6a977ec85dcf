//! Frames protected and opened inside the HSM: a head-end without keys reads a meter.

use kms_client::{
    ASSOCIATE_AGAIN, Connection, new_request_id,
    proto::{
        CipheredFrame, FrameForm, FrameRefusal, PlainFrame, ProtectRequest, Purpose, UnprotectRequest,
        frame_result::Result as Outcome,
    },
};
use kms_tests::{CLIENT_TITLE, DevServer, open, title};
use meter_sim::Connection as MeterConnection;

async fn protect(
    connection: &Connection,
    purpose: Purpose,
    apdu: Vec<u8>,
    supersede_lease: bool,
) -> Result<(Vec<u8>, u32), String> {
    let frame = PlainFrame {
        meter: title(7).octets().to_vec().into(),
        client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
        form: FrameForm::Glo.into(),
        apdu: apdu.into(),
        ..PlainFrame::default()
    };
    let request = ProtectRequest {
        request_id: new_request_id().octets().to_vec().into(),
        purpose: purpose.into(),
        frames: vec![frame],
        supersede_lease,
    };
    let result = connection
        .frames()
        .protect(request)
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner()
        .results
        .remove(0);
    match result.result.unwrap() {
        Outcome::Apdu(apdu) => Ok((apdu.to_vec(), result.invocation_counter)),
        Outcome::Refusal(refusal) => Err(refusal.message),
    }
}

async fn unprotect(connection: &Connection, apdu: Vec<u8>) -> Result<Vec<u8>, String> {
    let frame =
        CipheredFrame { meter: title(7).octets().to_vec().into(), apdu: apdu.into(), ..CipheredFrame::default() };
    let request = UnprotectRequest { purpose: Purpose::Read.into(), frames: vec![frame] };
    let result = connection
        .frames()
        .unprotect(request)
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner()
        .results
        .remove(0);
    match result.result.unwrap() {
        Outcome::Apdu(apdu) => Ok(apdu.to_vec()),
        Outcome::Refusal(refusal) => Err(refusal.message),
    }
}

const GET_ENERGY: &str = "C001C100030100010800FF0200";

#[tokio::test(flavor = "multi_thread")]
async fn a_head_end_without_keys_reads_a_meter() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let meter = server.meter(7);
    let mut line = MeterConnection::pre_established(
        meter.clone(),
        1,
        meter_sim::SystemTitle::new(hex::decode(CLIENT_TITLE).unwrap().try_into().unwrap()),
    )
    .unwrap();
    let mut last = 0;
    for _ in 0..3 {
        let (request, counter) =
            protect(&connection, Purpose::Read, hex::decode(GET_ENERGY).unwrap(), false).await.unwrap();
        assert!(counter > last, "I4: counters only rise");
        last = counter;
        let answer = line.exchange(&request).expect("the meter answers");
        let plain = unprotect(&connection, answer.clone()).await.unwrap();
        assert_eq!(plain[..4], [0xC4, 0x01, 0xC1, 0x00], "{}", hex::encode(&plain));
        // A changed frame does not open.
        let mut forged = answer;
        *forged.last_mut().unwrap() ^= 1;
        assert!(unprotect(&connection, forged).await.unwrap_err().contains("does not verify"));
    }
    assert!(meter.refusals().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_reads_what_it_protects() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    // remote_disconnect of the disconnect control, asked for as reading: what the frame does
    // decides, not what the caller says.
    let disconnect = hex::decode("C301C100460000600 30AFF01010F00".replace(' ', "")).unwrap();
    let refusal = protect(&connection, Purpose::Read, disconnect.clone(), false).await.unwrap_err();
    assert!(refusal.contains("not permitted"), "{refusal}");
    protect(&connection, Purpose::Control, disconnect, false).await.unwrap();
    // A dedicated key of the caller's own choice would pass every policy by.
    let initiate = hex::decode("01011000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B0").unwrap();
    assert!(protect(&connection, Purpose::Read, initiate, false).await.unwrap_err().contains("dedicated key"));
    assert!(protect(&connection, Purpose::Read, vec![0xFF; 40], false).await.unwrap_err().contains("frames.apdu"));
}

/// f(StoC) and an authenticated-only APDU are the same computation: a request in the place of a
/// challenge would be authenticated past policy.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_not_taken_for_a_challenge() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let answer = |challenge: Vec<u8>| {
        let mut frames = connection.frames();
        let frame = PlainFrame {
            meter: title(7).octets().to_vec().into(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            hls_challenge: challenge.into(),
            ..PlainFrame::default()
        };
        let request = ProtectRequest {
            request_id: new_request_id().octets().to_vec().into(),
            purpose: Purpose::Read.into(),
            frames: vec![frame],
            supersede_lease: true,
        };
        async move { frames.protect(request).await.unwrap().into_inner().results.remove(0).result.unwrap() }
    };
    let key = "A5".repeat(16);
    let initiate = |beginning: &str, end: &str| format!("01{beginning}10{key}{end}");
    let dedicated_keys = [
        initiate("01", "0000065F1F0400007E1F04B0"),
        initiate("01", "0000065F0400007E1F04B0"),
        initiate("FF", "0000065F1F0400007E1F04B0"),
        initiate("01", "01FF00065F1F0400007E1F04B0"),
        initiate("01", "0000075F1F0400007E1F04B0"),
        initiate("01", "0000065F1F0400007E1F04B000"),
    ];
    for request in dedicated_keys {
        let refused = answer(hex::decode(&request).unwrap()).await;
        assert!(
            matches!(&refused, Outcome::Refusal(refusal) if refusal.reason == ASSOCIATE_AGAIN),
            "{request}: {refused:?}"
        );
    }
    for request in [
        "C301C10046000060030AFF01010F00",
        "C301C10046000060030AFF01010F0000000000",
        "C101C10008000001 0000FF0200 0600000000",
    ] {
        let refused = answer(hex::decode(request.replace(' ', "")).unwrap()).await;
        let again =
            |refusal: &FrameRefusal| refusal.reason == ASSOCIATE_AGAIN && refusal.code == tonic::Code::Aborted as i32;
        assert!(matches!(&refused, Outcome::Refusal(refusal) if again(refusal)), "{request}: {refused:?}");
    }
    let answered = answer(b"a-fresh-challenge".to_vec()).await;
    assert!(matches!(&answered, Outcome::Apdu(gmac) if gmac.len() == 17 && gmac[0] == 0x10), "{answered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_lease_is_not_overtaken_unless_asked() {
    let server = DevServer::start();
    let connection = server.connect("head-end").await;
    let session = open(&connection, &server.profile("head-end"), title(7), 10).await.unwrap();
    let lease = session.keys.meters[0].counters.as_ref().unwrap();
    let get = || hex::decode(GET_ENERGY).unwrap();
    assert!(protect(&connection, Purpose::Read, get(), false).await.unwrap_err().contains("live counter lease"));
    let (_, counter) = protect(&connection, Purpose::Read, get(), true).await.unwrap();
    assert!(counter > lease.next().unwrap() + lease.remaining() - 1);
}
