//! Vectors that circulate in open implementations of DLMS/COSEM, recomputed here with AES-GCM and
//! RFC 3394 of RustCrypto.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use aes_gcm::{
    AesGcm, KeyInit,
    aead::{Aead, Payload},
    aes::Aes128,
};
use kms_dlms::{
    AuthenticationTag, CipheredApdu, CipheredTag, HlsGmac, InitiateRequest, KeySet, KeyTransfer, Nonce, Protection,
    SecurityControl, ServiceKind, ServiceRequest,
};
use kms_domain::{SecuritySetupId, SecuritySuite, SystemTitle};
use zeroize::Zeroizing;

const EK: &str = "000102030405060708090A0B0C0D0E0F";
const AK: &str = "D0D1D2D3D4D5D6D7D8D9DADBDCDDDEDF";
const TITLE: &str = "4D4D4D0000BC614E";
const GET: &str = "C0010000080000010000FF0200";

fn hex(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

fn control(protection: Protection) -> SecurityControl {
    SecurityControl { suite: SecuritySuite::Suite0, protection, key_set: KeySet::Unicast }
}

/// AES-GCM-128 with the 12-octet tag of DLMS.
fn gcm(key: &[u8], nonce: &Nonce, plaintext: &[u8], associated_data: &[u8]) -> (Vec<u8>, AuthenticationTag) {
    let cipher = AesGcm::<Aes128, aes_gcm::aead::consts::U12, aes_gcm::aead::consts::U12>::new_from_slice(key).unwrap();
    let mut sealed = cipher.encrypt(nonce.octets().into(), Payload { msg: plaintext, aad: associated_data }).unwrap();
    let tag = sealed.split_off(plaintext.len());
    (sealed, AuthenticationTag(tag.try_into().unwrap()))
}

/// What the server does with an HSM: header, nonce and associated data from here, AES-GCM there.
fn protect(
    tag: CipheredTag,
    general_title: Option<SystemTitle>,
    sender: &str,
    control: SecurityControl,
    counter: u32,
    plain: &[u8],
) -> Vec<u8> {
    let nonce = Nonce::new(SystemTitle::parse(sender).unwrap(), counter);
    let associated_data = control.associated_data(&hex(AK), plain);
    let (content, authentication_tag) = match control.protection {
        Protection::Authenticated => (plain.to_vec(), gcm(&hex(EK), &nonce, &[], &associated_data).1),
        Protection::AuthenticatedEncrypted => gcm(&hex(EK), &nonce, plain, &associated_data),
    };
    assert!(tag.fits(plain));
    let apdu =
        CipheredApdu { tag, system_title: general_title, control, counter, content: &content, authentication_tag };
    let octets = apdu.octets().unwrap();
    assert_eq!(CipheredApdu::parse(&octets).unwrap(), apdu);
    octets
}

#[test]
fn a_get_request_authenticated_and_encrypted() {
    let tag = CipheredTag::global_for(0xC0).unwrap();
    let frame = |protection| hex::encode_upper(protect(tag, None, TITLE, control(protection), 0x0123_4567, &hex(GET)));
    assert_eq!(frame(Protection::Authenticated), "C81E1001234567C0010000080000010000FF020006725D910F9221D263877516");
    assert_eq!(
        frame(Protection::AuthenticatedEncrypted),
        "C81E3001234567411312FF935A47566827C467BC7D825C3BE4A77C3FCC056B6B"
    );
}

#[test]
fn encryption_without_authentication_is_refused() {
    let error = CipheredApdu::parse(&hex("C8122001234567411312FF935A47566827C467BC")).unwrap_err();
    assert!(error.to_string().contains("without authentication"), "{error}");
}

#[test]
fn an_initiate_request_with_its_dedicated_key() {
    let plain = "01011000112233445566778899AABBCCDDEEFF0000065F1F0400007E1F04B0";
    let request = InitiateRequest {
        dedicated_key: Some(Zeroizing::new(hex("00112233445566778899AABBCCDDEEFF"))),
        conformance: [0x00, 0x7E, 0x1F],
        longest_apdu: 0x04B0,
    };
    let octets = request.octets().unwrap();
    assert_eq!(hex::encode_upper(&octets), plain);
    assert!(InitiateRequest::parse(&octets).unwrap() == request);
    assert_eq!(ServiceRequest::parse(&octets).unwrap().kind, ServiceKind::Initiate);
    let tag = CipheredTag::global_for(0x01).unwrap();
    let frame = protect(tag, None, TITLE, control(Protection::AuthenticatedEncrypted), 0x0123_4567, &octets);
    assert_eq!(
        hex::encode_upper(frame),
        "21303001234567801302FF8A7874133D414CED25B42534D28DB0047720606B175BD52211BE6841DB204D39EE6FDB8E356855"
    );
}

#[test]
fn the_answers_to_hls_5_challenges() {
    for (sender, counter, challenge, expected) in [
        ("4D4D4D0000000001", 1, "503677524A323146", "10000000011A52FE7DD3E72748973C1E28"),
        (TITLE, 0x0123_4567, "4B35366956616759", "1001234567FE1466AFB3DBCD4F9389E2B7"),
    ] {
        let suite = SecuritySuite::Suite0;
        let associated_data = HlsGmac::control(suite).associated_data(&hex(AK), &hex(challenge));
        let nonce = Nonce::new(SystemTitle::parse(sender).unwrap(), counter);
        let answer = HlsGmac { suite, counter, tag: gcm(&hex(EK), &nonce, &[], &associated_data).1 };
        assert_eq!(hex::encode_upper(answer.octets()), expected);
        assert_eq!(HlsGmac::parse(&answer.octets()), Ok(answer));
    }
}

#[test]
fn a_whole_key_transfer() {
    let mut wrapped = [0; 24];
    aes_kw::KwAes128::new(&[0x31; 16].into()).wrap_key(&hex("A0A1A2A3A4A5A6A7A8A9AAABACADAEAF"), &mut wrapped).unwrap();
    let transfer = KeyTransfer::new(0, &wrapped).unwrap();
    let plain = transfer.action_request(SecuritySetupId::parse("0.0.43.0.2.255").unwrap(), 0xC1);
    let expected = "C301C1004000002B0002FF02010101020216000918C97E5B71207F159EDDCCB965D7DCF3FD1A14AC7F2CF25E1E";
    assert_eq!(hex::encode_upper(&plain), expected);
    let client = "4B4D534845533031";
    let title = Some(SystemTitle::parse(client).unwrap());
    let frame =
        protect(CipheredTag::GeneralGlobal, title, client, control(Protection::AuthenticatedEncrypted), 0x6C, &plain);
    assert_eq!(
        hex::encode_upper(frame),
        "DB084B4D5348455330313E300000006C16B4024AAAE66E67C1FB397E3054AA06DF99C2AE2ED92E4B1E030322514B4945BC58684154027369966C696FAF2D6C7410B0F19BD10CEC21B5"
    );

    let meter = "4142434445464748";
    let title = Some(SystemTitle::parse(meter).unwrap());
    let answer = protect(
        CipheredTag::GeneralGlobal,
        title,
        meter,
        control(Protection::AuthenticatedEncrypted),
        9,
        &hex("C701C10000"),
    );
    assert_eq!(hex::encode_upper(answer), "DB084142434445464748163000000009F80A78728C4CF7587EF736B7C01DB98A9A");
}
