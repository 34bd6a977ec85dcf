//! The functions that begin, continue and end an operation of a session, in the same steps for each
//! kind.

use aws_lc_rs::digest;
use cryptoki_sys::*;

use crate::buffer::{Buffer, Output, Room};
use crate::cipher::CipherOperation;
use crate::crypto::digest::Hash;
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters};
use crate::message::MessageOperation;
use crate::session::{DigestOperation, Operations, Session};
use crate::signature::SignatureOperation;
use crate::template::Item;

/// Takes the answer of a step that ends the operation. The operation stays only if the step has
/// done nothing yet.
fn settle<T>(slot: &mut Option<T>, step: impl FnOnce(&mut T) -> Result<Output>) -> Result<Output> {
    let operation = slot.as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?;
    let answer = step(operation);
    match &answer {
        Ok(output) if !output.is_data() => {}
        // An operation that still requires the PIN waits for it.
        Err(Rv(CKR_USER_NOT_LOGGED_IN)) => {}
        _ => *slot = None,
    }
    answer
}

/// Takes the answer of a step in the middle: an error ends the operation.
fn continue_with<T, A>(slot: &mut Option<T>, step: impl FnOnce(&mut T) -> Result<A>) -> Result<A> {
    let operation = slot.as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?;
    let answer = step(operation);
    if answer.is_err() {
        *slot = None;
    }
    answer
}

impl Session {
    /// C_EncryptInit and C_DecryptInit.
    pub(crate) fn cipher_init(&self, mechanism: &Mechanism<'_>, key: CK_OBJECT_HANDLE, encrypt: bool) -> Result<()> {
        let mut operations = self.operations();
        let slot = operations.cipher(encrypt);
        if slot.is_some() {
            return fail(CKR_OPERATION_ACTIVE);
        }
        *slot = Some(CipherOperation::new(self.object(key, CKR_KEY_HANDLE_INVALID)?, mechanism, encrypt)?);
        Ok(())
    }

    /// C_Encrypt and C_Decrypt.
    pub(crate) fn cipher(&self, encrypt: bool, data: &[u8], room: Room) -> Result<Output> {
        settle(self.operations().cipher(encrypt), |operation| operation.all(data, room))
    }

    /// C_EncryptUpdate and C_DecryptUpdate.
    pub(crate) fn cipher_update(&self, encrypt: bool, data: &[u8], room: Room) -> Result<Output> {
        continue_with(self.operations().cipher(encrypt), |operation| operation.update(data, room))
    }

    /// C_EncryptFinal and C_DecryptFinal.
    pub(crate) fn cipher_final(&self, encrypt: bool, room: Room) -> Result<Output> {
        settle(self.operations().cipher(encrypt), |operation| operation.finish(room))
    }

    /// C_SignInit and C_VerifyInit.
    pub(crate) fn signature_init(&self, mechanism: &Mechanism<'_>, key: CK_OBJECT_HANDLE, sign: bool) -> Result<()> {
        let mut operations = self.operations();
        let slot = operations.signature(sign);
        if slot.is_some() {
            return fail(CKR_OPERATION_ACTIVE);
        }
        *slot = Some(SignatureOperation::new(self.object(key, CKR_KEY_HANDLE_INVALID)?, mechanism, sign)?);
        Ok(())
    }

    /// C_Sign.
    pub(crate) fn sign(&self, data: &[u8], room: Room) -> Result<Output> {
        settle(self.operations().signature(true), |operation| operation.sign(data, room))
    }

    /// C_SignUpdate and C_VerifyUpdate.
    pub(crate) fn signature_update(&self, sign: bool, data: &[u8]) -> Result<()> {
        continue_with(self.operations().signature(sign), |operation| operation.update(data))
    }

    /// C_SignFinal.
    pub(crate) fn sign_final(&self, room: Room) -> Result<Output> {
        settle(self.operations().signature(true), |operation| operation.sign_final(room))
    }

    /// C_Verify.
    pub(crate) fn verify(&self, data: &[u8], signature: &[u8]) -> Result<()> {
        let operation = self.operations().signature(false).take();
        operation.ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?.verify(data, signature)
    }

    /// C_VerifyFinal.
    pub(crate) fn verify_final(&self, signature: &[u8]) -> Result<()> {
        let operation = self.operations().signature(false).take();
        operation.ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?.verify_final(signature)
    }

    /// C_DigestInit.
    pub(crate) fn digest_init(&self, mechanism: &Mechanism<'_>) -> Result<()> {
        let mut operations = self.operations();
        if operations.digest.is_some() {
            return fail(CKR_OPERATION_ACTIVE);
        }
        let hash = Hash::from_mechanism(mechanism.kind).ok_or(Rv(CKR_MECHANISM_INVALID))?;
        if !matches!(mechanism.parameters, Parameters::None) {
            return fail(CKR_MECHANISM_PARAM_INVALID);
        }
        operations.digest = Some(DigestOperation { context: digest::Context::new(hash.algorithm()), in_parts: false });
        Ok(())
    }

    /// C_Digest.
    pub(crate) fn digest(&self, data: &[u8], room: Room) -> Result<Output> {
        settle(&mut self.operations().digest, |operation| {
            if operation.in_parts {
                return fail(CKR_OPERATION_NOT_INITIALIZED);
            }
            if let Some(answer) = room.settle(operation.context.algorithm().output_len()) {
                return Ok(answer);
            }
            operation.context.update(data);
            Ok(Output::Data(Buffer::copy_of(operation.context.clone().finish().as_ref())))
        })
    }

    /// C_DigestUpdate.
    pub(crate) fn digest_update(&self, data: &[u8]) -> Result<()> {
        continue_with(&mut self.operations().digest, |operation| {
            operation.context.update(data);
            operation.in_parts = true;
            Ok(())
        })
    }

    /// C_DigestKey.
    pub(crate) fn digest_key(&self, key: CK_OBJECT_HANDLE) -> Result<()> {
        let key = self.object(key, CKR_KEY_HANDLE_INVALID)?;
        self.digest_update(key.secret(CKR_KEY_INDIGESTIBLE)?.bytes())
    }

    /// C_DigestFinal.
    pub(crate) fn digest_final(&self, room: Room) -> Result<Output> {
        settle(&mut self.operations().digest, |operation| {
            if let Some(answer) = room.settle(operation.context.algorithm().output_len()) {
                return Ok(answer);
            }
            Ok(Output::Data(Buffer::copy_of(operation.context.clone().finish().as_ref())))
        })
    }

    /// C_MessageEncryptInit and C_MessageDecryptInit.
    pub(crate) fn message_init(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        key: CK_OBJECT_HANDLE,
        encrypt: bool,
    ) -> Result<()> {
        let mut operations = self.operations();
        let slot = operations.message(encrypt);
        if slot.is_some() {
            return fail(CKR_OPERATION_ACTIVE);
        }
        *slot = Some(MessageOperation::new(self.object(key, CKR_KEY_HANDLE_INVALID)?, mechanism, encrypt)?);
        Ok(())
    }

    /// One step of a message operation; an error in one message leaves the operation for the next.
    pub(crate) fn message<A>(&self, encrypt: bool, step: impl FnOnce(&mut MessageOperation) -> Result<A>) -> Result<A> {
        step(self.operations().message(encrypt).as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?)
    }

    /// C_MessageEncryptFinal and C_MessageDecryptFinal.
    pub(crate) fn message_final(&self, encrypt: bool) -> Result<()> {
        let operation = self.operations().message(encrypt).take();
        operation.map(|_| ()).ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))
    }

    /// C_FindObjectsInit.
    pub(crate) fn find_init(&self, template: &[Item<'_>]) -> Result<()> {
        self.token.refresh()?;
        let mut operations = self.operations();
        if operations.find.is_some() {
            return fail(CKR_OPERATION_ACTIVE);
        }
        let found = self.token.objects.collect(|object| object.matches(template));
        let visible: Vec<_> =
            found.into_iter().filter(|(_, object)| self.sees(object)).map(|(handle, _)| handle).collect();
        operations.find = Some(visible.into_iter());
        Ok(())
    }

    /// C_FindObjects.
    pub(crate) fn find(&self, limit: usize) -> Result<Vec<CK_OBJECT_HANDLE>> {
        let mut operations = self.operations();
        let found = operations.find.as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?;
        Ok(found.take(limit).collect())
    }

    /// C_FindObjectsFinal.
    pub(crate) fn find_final(&self) -> Result<()> {
        self.operations().find.take().map(|_| ()).ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))
    }

    /// C_SessionCancel.
    pub(crate) fn cancel(&self, flags: CK_FLAGS) {
        let mut operations = self.operations();
        let wanted = |flag| flags & flag != 0;
        operations.find = operations.find.take().filter(|_| !wanted(CKF_FIND_OBJECTS));
        operations.encrypt = operations.encrypt.take().filter(|_| !wanted(CKF_ENCRYPT));
        operations.decrypt = operations.decrypt.take().filter(|_| !wanted(CKF_DECRYPT));
        operations.digest = operations.digest.take().filter(|_| !wanted(CKF_DIGEST));
        operations.sign = operations.sign.take().filter(|_| !wanted(CKF_SIGN));
        operations.verify = operations.verify.take().filter(|_| !wanted(CKF_VERIFY));
        operations.message_encrypt = operations.message_encrypt.take().filter(|_| !wanted(CKF_MESSAGE_ENCRYPT));
        operations.message_decrypt = operations.message_decrypt.take().filter(|_| !wanted(CKF_MESSAGE_DECRYPT));
    }

    /// C_Login with CKU_CONTEXT_SPECIFIC: the operations that wait for the PIN can continue.
    pub(crate) fn authenticate(&self, pin: &[u8]) -> Result<()> {
        let mut operations = self.operations();
        let Operations { encrypt, decrypt, sign, .. } = &mut *operations;
        let mut waiting: Vec<&mut bool> = Vec::new();
        waiting.extend(encrypt.as_mut().map(|operation| &mut operation.locked).filter(|locked| **locked));
        waiting.extend(decrypt.as_mut().map(|operation| &mut operation.locked).filter(|locked| **locked));
        waiting.extend(sign.as_mut().map(|operation| &mut operation.locked).filter(|locked| **locked));
        if waiting.is_empty() {
            return fail(CKR_OPERATION_NOT_INITIALIZED);
        }
        self.token.authenticate(pin)?;
        waiting.into_iter().for_each(|locked| *locked = false);
        Ok(())
    }
}

impl Operations {
    fn cipher(&mut self, encrypt: bool) -> &mut Option<CipherOperation> {
        if encrypt { &mut self.encrypt } else { &mut self.decrypt }
    }

    fn signature(&mut self, sign: bool) -> &mut Option<SignatureOperation> {
        if sign { &mut self.sign } else { &mut self.verify }
    }

    fn message(&mut self, encrypt: bool) -> &mut Option<MessageOperation> {
        if encrypt { &mut self.message_encrypt } else { &mut self.message_decrypt }
    }
}
