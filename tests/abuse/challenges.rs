//! A10, A15: what `Protect` makes no octets of, in whatever form it comes.

use bytes::Bytes;
use kms_client::{
    Connection,
    proto::{FrameProtection, PlainFrame, Purpose, frame_result::Result as Outcome},
};
use kms_tests::DevServer;

use crate::{
    scene::{GET_ENERGY, Random, frame, protect},
    verdict::{Figure, Verdict},
};

/// An `InitiateRequest` that brings a dedicated key of the caller's choice, in all forms that
/// meters were seen to read: as a challenge, for f(StoC) authenticates it, and as an APDU.
pub(crate) async fn initiate_requests() -> Vec<Verdict> {
    let mut random = Random::of_environment("a10_initiate_requests");
    let server = DevServer::start();
    let head_end = server.connect("head-end").await;
    let mut verdicts = Vec::new();
    for (way, protections) in [("as a challenge", 1), ("as an APDU", 2)] {
        let mut passed = Vec::new();
        for (name, octets) in ENCODINGS {
            let octets = Bytes::from(hex::decode(octets).unwrap());
            for protection in
                [FrameProtection::Authenticated, FrameProtection::AuthenticatedEncrypted].into_iter().take(protections)
            {
                let plain = match way {
                    "as a challenge" => {
                        PlainFrame { apdu: Bytes::new(), hls_challenge: octets.clone(), ..frame(7, GET_ENERGY) }
                    }
                    _ => PlainFrame { apdu: octets.clone(), protection: protection.into(), ..frame(7, GET_ENERGY) },
                };
                if is_protected(&head_end, Purpose::Read, plain).await {
                    passed.push(name);
                }
            }
        }
        let figure = Figure::count(
            passed.len(),
            format!("of {} InitiateRequests with a dedicated key passed", ENCODINGS.len() * protections),
        );
        verdicts.push(
            Verdict::new("A10", format!("a dedicated key {way}"), passed.is_empty(), figure).with(passed.join(", ")),
        );
    }
    // What the filter costs: random challenges, as honest meters send them.
    let challenge =
        |octets: Vec<u8>| PlainFrame { apdu: Bytes::new(), hls_challenge: octets.into(), ..frame(8, GET_ENERGY) };
    let frames: Vec<PlainFrame> = (0..HONEST).map(|_| challenge(random.octets(16))).collect();
    let answer = head_end.frames().protect(protect(Purpose::Read, frames)).await.unwrap().into_inner();
    let refused = answer.results.iter().filter(|result| !matches!(result.result, Some(Outcome::Apdu(_)))).count();
    let figure = Figure::count(refused, format!("of {HONEST} random challenges refused"));
    // What it costs is a figure; so many that head-ends notice would be an outage.
    verdicts.push(Verdict::new("A10", "honest challenges beside it", refused < HONEST / 10, figure));
    verdicts
}

/// A `key_transfer` with a wrapped key that the server did not make for a transfer under way.
pub(crate) async fn recorded_key() -> Vec<Verdict> {
    let server = DevServer::start();
    let head_end = server.connect("head-end").await;
    let mut passed = 0;
    // GUEK, GBEK, GAK and KEK, 24 octets that somebody recorded.
    for key in 0..4 {
        let action = format!("C301C10040{}02010101020216{key:02X}0918{}", "00002B0000FF", "5A".repeat(24));
        passed += usize::from(is_protected(&head_end, Purpose::Configure, frame(9, &action)).await);
    }
    vec![Verdict::new("A15", "a recorded key in a key_transfer", passed == 0, Figure::count(passed, "of 4 protected"))]
}

async fn is_protected(connection: &Connection, purpose: Purpose, plain: PlainFrame) -> bool {
    let Ok(answer) = connection.frames().protect(protect(purpose, vec![plain])).await else { return false };
    answer.into_inner().results.iter().any(|result| matches!(result.result, Some(Outcome::Apdu(_))))
}

/// Of one InitiateRequest with the dedicated key 00112233…FF.
const ENCODINGS: [(&str, &str); 6] = [
    ("as the standard has it", "01011000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B0"),
    ("conformance tag 5F alone", "01011000112233445566778899AABBCCDDEEFF0000065F0400007E1F04B0"),
    ("presence FF", "01FF1000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B0"),
    ("response-allowed 01 FF", "01011000112233445566778899AABBCCDDEEFF01FF00065F1F0400007E1F04B0"),
    ("version 7", "01011000112233445566778899AABBCCDDEEFF0000075F1F0400007E1F04B0"),
    ("a trailing octet", "01011000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B000"),
];
const HONEST: usize = 1_000;
