//! The nonce watcher, through the PKCS#11 interface: what is encrypted twice under one nonce is
//! found.

mod common;

use common::{Mechanism, Template, Token, folder};
use hsm_sim::Notes;

#[test]
fn a_nonce_that_protects_two_contents_is_found_whatever_object_it_was_used_with() {
    common::watch_nonces("nonces");
    let token = Token::fresh("watched");
    let (module, session) = (token.module, token.session);
    let key = |value: u8| module.create(session, &Template::aes(&[value; 16])).unwrap();
    let [first, twin, other] = [key(1), key(1), key(2)];
    let encrypt = |key, iv: u8, aad: &[u8], data: &[u8]| {
        module.encrypt(session, &Mechanism::gcm(&[iv; 12], aad, 96), key, data).unwrap()
    };
    let notes = || Notes::read(&folder().join("nonces")).unwrap();

    let sealed = encrypt(first, 1, b"aad", b"one");
    encrypt(twin, 1, b"aad", b"one");
    encrypt(other, 1, b"aad", b"another key");
    encrypt(first, 2, b"aad", b"another nonce");
    module.decrypt(session, &Mechanism::gcm(&[1; 12], b"aad", 96), first, &sealed).unwrap();
    assert!(module.decrypt(session, &Mechanism::gcm(&[1; 12], b"other aad", 96), first, &sealed).is_err());
    assert_eq!(notes(), Notes { nonces: 3, repeated: Vec::new() });

    // Other plaintext, other associated data, and the boundary between them: each is another
    // content.
    for (number, (aad, data)) in
        [(b"aad".as_slice(), b"two".as_slice()), (b"other", b"one"), (b"aado", b"ne"), (b"", b"")]
            .into_iter()
            .enumerate()
    {
        encrypt(twin, 10, b"aad", b"one");
        encrypt(first, 10, aad, data);
        assert!(notes().repeated.len() > number, "{:?}", notes());
    }
    assert!(std::fs::read_to_string(folder().join("nonces/violations")).unwrap().lines().count() >= 4);
}
