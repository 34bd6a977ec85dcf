//! Encryption and decryption of data, by the chapters of these names.

use cryptoki_sys::*;

use super::calls::{results, starts, transforms};

starts! {
    C_EncryptInit, cancelled by CKF_ENCRYPT: |session, mechanism, key| session.cipher_init(mechanism, key, true);
    C_DecryptInit, cancelled by CKF_DECRYPT: |session, mechanism, key| session.cipher_init(mechanism, key, false);
}

transforms! {
    C_Encrypt: |session, data, room| session.cipher(true, data, room);
    C_EncryptUpdate: |session, data, room| session.cipher_update(true, data, room);
    C_Decrypt: |session, data, room| session.cipher(false, data, room);
    C_DecryptUpdate: |session, data, room| session.cipher_update(false, data, room);
}

results! {
    C_EncryptFinal: |session, room| session.cipher_final(true, room);
    C_DecryptFinal: |session, room| session.cipher_final(false, room);
}
