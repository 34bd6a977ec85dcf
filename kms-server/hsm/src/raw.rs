//! The thin layer over the PKCS#11 functions: the only `unsafe` of the server.
//!
//! The cryptoki crate loads modules, finds slots and opens sessions. This file calls a function
//! directly where the crate calls it twice (for the size first, so that some modules wrap twice),
//! lacks a feature (CKA_UNWRAP_TEMPLATE, SP 800-108 parameters) or allocates. Every function gets
//! one buffer that is large enough, so CKR_BUFFER_TOO_SMALL leaves no operation unfinished.

#![expect(unsafe_code, reason = "calls of the PKCS#11 C interface; each states why its pointers are valid")]

use std::ffi::c_void;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr;

use cryptoki_sys::*;
use kms_domain::OaepHash;
use zeroize::Zeroizing;

use crate::error::HsmError;

/// The function list of a loaded module. It lives until the process ends: modules are never
/// unloaded.
pub(crate) struct Functions {
    list: CK_FUNCTION_LIST,
    // The pointers in the list are valid as long as the library is loaded.
    _library: Pkcs11,
}

impl Functions {
    /// Loads the module of this path. It is the same image that the cryptoki crate has: the loader
    /// counts references.
    pub(crate) fn load(path: &Path) -> Result<Self, HsmError> {
        let refuse = |reason: String| HsmError::Module { module: path.display().to_string(), reason };
        // SAFETY: the operator names the module in the configuration and so trusts its
        // initialisers.
        let library = unsafe { Pkcs11::new(path) }.map_err(|error| refuse(error.to_string()))?;
        let get_function_list = *library
            .C_GetFunctionList
            .as_ref()
            .map_err(|_| refuse("it has no C_GetFunctionList, so it is no PKCS#11 module".to_owned()))?;
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: `list` is a valid place for one pointer.
        let code = unsafe { get_function_list(&mut list) };
        if code != CKR_OK || list.is_null() {
            return Err(refuse("C_GetFunctionList failed".to_owned()));
        }
        // SAFETY: after CKR_OK the pointer names a function list that lives as long as the library
        // (PKCS#11 2.40, 5.4).
        Ok(Self { list: unsafe { *list }, _library: library })
    }

    /// The mechanisms that the slot lists, also those of vendors.
    pub(crate) fn mechanisms(&self, slot: CK_SLOT_ID) -> Result<Vec<CK_MECHANISM_TYPE>, HsmError> {
        let list = self.list.C_GetMechanismList.ok_or(MISSING)?;
        let mut count = 0;
        // SAFETY: a null list asks for the count.
        check("C_GetMechanismList", unsafe { list(slot, ptr::null_mut(), &mut count) })?;
        let mut mechanisms = vec![0; length(count)];
        // SAFETY: the list has room for `count` numbers.
        check("C_GetMechanismList", unsafe { list(slot, mechanisms.as_mut_ptr(), &mut count) })?;
        mechanisms.truncate(length(count));
        Ok(mechanisms)
    }
}

/// Handle of an object. It is invalid after the session or login was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Object(CK_OBJECT_HANDLE);

/// One attribute of a template, borrowing its value.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Attribute<'a>(CK_ATTRIBUTE, PhantomData<&'a [u8]>);

impl<'a> Attribute<'a> {
    /// A CK_BBOOL.
    pub(crate) const fn flag(kind: CK_ATTRIBUTE_TYPE, value: bool) -> Self {
        let value: &'static CK_BBOOL = if value { &CK_TRUE } else { &CK_FALSE };
        Self::new(kind, ptr::from_ref(value).cast(), size_of::<CK_BBOOL>())
    }

    /// A CK_ULONG.
    pub(crate) const fn number(kind: CK_ATTRIBUTE_TYPE, value: &'a CK_ULONG) -> Self {
        Self::new(kind, ptr::from_ref(value).cast(), size_of::<CK_ULONG>())
    }

    /// An array of CK_ULONG.
    pub(crate) const fn numbers(kind: CK_ATTRIBUTE_TYPE, values: &'a [CK_ULONG]) -> Self {
        Self::new(kind, values.as_ptr().cast(), size_of_val(values))
    }

    /// Octets.
    pub(crate) const fn octets(kind: CK_ATTRIBUTE_TYPE, value: &'a [u8]) -> Self {
        Self::new(kind, value.as_ptr().cast(), value.len())
    }

    /// A template within a template (CKA_UNWRAP_TEMPLATE and the like).
    pub(crate) const fn template(kind: CK_ATTRIBUTE_TYPE, value: &'a [Attribute<'a>]) -> Self {
        Self::new(kind, value.as_ptr().cast(), size_of_val(value))
    }

    const fn new(kind: CK_ATTRIBUTE_TYPE, value: *const c_void, octets: usize) -> Self {
        Self(CK_ATTRIBUTE { type_: kind, pValue: value.cast_mut(), ulValueLen: octets as CK_ULONG }, PhantomData)
    }
}

/// A mechanism with its parameters.
#[derive(Clone, Copy)]
pub(crate) enum Mechanism<'a> {
    /// One without parameters.
    Plain(CK_MECHANISM_TYPE),
    /// CKM_AES_GCM.
    Gcm { nonce: &'a [u8; 12], aad: &'a [u8], tag_bits: CK_ULONG },
    /// CKM_ECDH1_DERIVE with the peer's uncompressed point.
    Ecdh { kdf: CK_EC_KDF_TYPE, shared: &'a [u8], public: &'a [u8] },
    /// CKM_AES_CBC_ENCRYPT_DATA with a zero IV.
    CbcEncryptData { data: &'a [u8] },
    /// CKM_SP800_108_COUNTER_KDF, AES-CMAC: 32-bit counter ‖ `fixed` ‖ 32-bit length in bits.
    CounterCmac { fixed: &'a [u8] },
    /// CKM_RSA_PKCS_OAEP, MGF1 with the same hash, empty label.
    Oaep(OaepHash),
}

impl Mechanism<'_> {
    /// Calls `call` with the C form, whose pointers are valid during the call.
    fn with<R>(&self, call: impl FnOnce(CK_MECHANISM_PTR) -> R) -> R {
        match *self {
            Self::Plain(mechanism) => {
                call(&mut CK_MECHANISM { mechanism, pParameter: ptr::null_mut(), ulParameterLen: 0 })
            }
            Self::Gcm { nonce, aad, tag_bits } => {
                let parameters = CK_GCM_PARAMS {
                    pIv: nonce.as_ptr().cast_mut(),
                    ulIvLen: nonce.len() as CK_ULONG,
                    ulIvBits: nonce.len() as CK_ULONG * 8,
                    pAAD: aad.as_ptr().cast_mut(),
                    ulAADLen: aad.len() as CK_ULONG,
                    ulTagBits: tag_bits,
                };
                with_parameters(CKM_AES_GCM, parameters, call)
            }
            Self::Ecdh { kdf, shared, public } => {
                let parameters = CK_ECDH1_DERIVE_PARAMS {
                    kdf,
                    ulSharedDataLen: shared.len() as CK_ULONG,
                    pSharedData: if shared.is_empty() { ptr::null_mut() } else { shared.as_ptr().cast_mut() },
                    ulPublicDataLen: public.len() as CK_ULONG,
                    pPublicData: public.as_ptr().cast_mut(),
                };
                with_parameters(CKM_ECDH1_DERIVE, parameters, call)
            }
            Self::CbcEncryptData { data } => {
                let parameters = CK_AES_CBC_ENCRYPT_DATA_PARAMS {
                    iv: [0; 16],
                    pData: data.as_ptr().cast_mut(),
                    length: data.len() as CK_ULONG,
                };
                with_parameters(CKM_AES_CBC_ENCRYPT_DATA, parameters, call)
            }
            Self::CounterCmac { fixed } => {
                let mut counter = CK_SP800_108_COUNTER_FORMAT { bLittleEndian: CK_FALSE, ulWidthInBits: 32 };
                let mut derived_length = CK_SP800_108_DKM_LENGTH_FORMAT {
                    dkmLengthMethod: CK_SP800_108_DKM_LENGTH_SUM_OF_KEYS,
                    bLittleEndian: CK_FALSE,
                    ulWidthInBits: 32,
                };
                let mut data = [
                    CK_PRF_DATA_PARAM {
                        type_: CK_SP800_108_ITERATION_VARIABLE,
                        pValue: ptr::from_mut(&mut counter).cast(),
                        ulValueLen: size_of::<CK_SP800_108_COUNTER_FORMAT>() as CK_ULONG,
                    },
                    CK_PRF_DATA_PARAM {
                        type_: CK_SP800_108_BYTE_ARRAY,
                        pValue: fixed.as_ptr().cast_mut().cast(),
                        ulValueLen: fixed.len() as CK_ULONG,
                    },
                    CK_PRF_DATA_PARAM {
                        type_: CK_SP800_108_DKM_LENGTH,
                        pValue: ptr::from_mut(&mut derived_length).cast(),
                        ulValueLen: size_of::<CK_SP800_108_DKM_LENGTH_FORMAT>() as CK_ULONG,
                    },
                ];
                let parameters = CK_SP800_108_KDF_PARAMS {
                    prfType: CKM_AES_CMAC,
                    ulNumberOfDataParams: data.len() as CK_ULONG,
                    pDataParams: data.as_mut_ptr(),
                    ulAdditionalDerivedKeys: 0,
                    pAdditionalDerivedKeys: ptr::null_mut(),
                };
                with_parameters(CKM_SP800_108_COUNTER_KDF, parameters, call)
            }
            Self::Oaep(hash) => {
                let (hash_algorithm, mgf) = match hash {
                    OaepHash::Sha1 => (CKM_SHA_1, CKG_MGF1_SHA1),
                    OaepHash::Sha256 => (CKM_SHA256, CKG_MGF1_SHA256),
                };
                let parameters = CK_RSA_PKCS_OAEP_PARAMS {
                    hashAlg: hash_algorithm,
                    mgf,
                    source: CKZ_DATA_SPECIFIED,
                    pSourceData: ptr::null_mut(),
                    ulSourceDataLen: 0,
                };
                with_parameters(CKM_RSA_PKCS_OAEP, parameters, call)
            }
        }
    }
}

/// A session. One thread uses it at a time: it is not `Sync`.
pub(crate) struct Session {
    functions: &'static Functions,
    inner: cryptoki::session::Session,
}

impl Session {
    /// `inner` must be open without closing on drop: a stale handle may by then belong to another
    /// session.
    pub(crate) fn new(functions: &'static Functions, inner: cryptoki::session::Session) -> Self {
        Self { functions, inner }
    }

    /// The session as the cryptoki crate has it.
    pub(crate) fn inner(&self) -> &cryptoki::session::Session {
        &self.inner
    }

    /// Closes the session; its session objects are destroyed. Only for a session whose handle was
    /// never reported as invalid.
    pub(crate) fn close(self) {
        if let Err(error) = self.inner.close() {
            tracing::debug!(%error, "closing an HSM session failed");
        }
    }

    /// Gives up a session after an error. If its handle is still valid, the session is closed;
    /// otherwise the module would keep it for ever.
    pub(crate) fn abandon(self) {
        if self.inner.get_session_info().is_ok() {
            self.close();
        }
    }

    /// Whether the user is logged in. An error counts as no: the session is lost.
    pub(crate) fn is_logged_in(&self) -> bool {
        use cryptoki::session::SessionState;
        self.inner
            .get_session_info()
            .is_ok_and(|info| matches!(info.session_state(), SessionState::RwUser | SessionState::RoUser))
    }

    /// Logs in. It is a success if the user is logged in already.
    pub(crate) fn login(&self, user: CK_USER_TYPE, pin: &[u8]) -> Result<(), HsmError> {
        let login = self.functions.list.C_Login.ok_or(MISSING)?;
        // SAFETY: the PIN is valid for its length, and modules do not write to it.
        match unsafe { login(self.handle(), user, pin.as_ptr().cast_mut(), pin.len() as CK_ULONG) } {
            CKR_USER_ALREADY_LOGGED_IN => Ok(()),
            code => check("C_Login", code),
        }
    }

    /// The objects that match.
    pub(crate) fn find(&self, template: &[Attribute<'_>]) -> Result<Vec<Object>, HsmError> {
        let list = &self.functions.list;
        let (init, next, last) = (
            list.C_FindObjectsInit.ok_or(MISSING)?,
            list.C_FindObjects.ok_or(MISSING)?,
            list.C_FindObjectsFinal.ok_or(MISSING)?,
        );
        // SAFETY: the template is valid for its length.
        check("C_FindObjectsInit", unsafe { init(self.handle(), attributes(template), template.len() as CK_ULONG) })?;
        let mut objects = Vec::new();
        let result = loop {
            let mut page = [0; 64];
            let mut count = 0;
            // SAFETY: the page has room for the number of handles given.
            let found = check("C_FindObjects", unsafe {
                next(self.handle(), page.as_mut_ptr(), page.len() as CK_ULONG, &mut count)
            });
            objects.extend(page.iter().take(length(count)).map(|handle| Object(*handle)));
            match found {
                Ok(()) if count == 0 => break Ok(()),
                Ok(()) => {}
                Err(error) => break Err(error),
            }
        };
        // SAFETY: no pointers.
        let closed = check("C_FindObjectsFinal", unsafe { last(self.handle()) });
        result.and(closed).map(|()| objects)
    }

    /// The value of an attribute, or nothing if the object has none or does not show it.
    pub(crate) fn attribute(
        &self,
        object: Object,
        kind: CK_ATTRIBUTE_TYPE,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, HsmError> {
        let get = self.functions.list.C_GetAttributeValue.ok_or(MISSING)?;
        let mut attribute = CK_ATTRIBUTE { type_: kind, pValue: ptr::null_mut(), ulValueLen: 0 };
        // SAFETY: one attribute, whose null value asks for the length.
        match unsafe { get(self.handle(), object.0, &mut attribute, 1) } {
            CKR_OK => {}
            CKR_ATTRIBUTE_SENSITIVE | CKR_ATTRIBUTE_TYPE_INVALID => return Ok(None),
            code => return check("C_GetAttributeValue", code).map(|()| None),
        }
        if attribute.ulValueLen == CK_UNAVAILABLE_INFORMATION || attribute.ulValueLen > LONGEST_ATTRIBUTE {
            return Ok(None);
        }
        let mut value = Zeroizing::new(vec![0; length(attribute.ulValueLen)]);
        attribute.pValue = value.as_mut_ptr().cast();
        // SAFETY: the value has room for the length that the module gave.
        match unsafe { get(self.handle(), object.0, &mut attribute, 1) } {
            CKR_OK => {}
            CKR_ATTRIBUTE_SENSITIVE | CKR_ATTRIBUTE_TYPE_INVALID => return Ok(None),
            code => return check("C_GetAttributeValue", code).map(|()| None),
        }
        value.truncate(length(attribute.ulValueLen));
        Ok(Some(value))
    }

    /// The value of a CK_BBOOL attribute, or nothing if the object has none.
    pub(crate) fn flag(&self, object: Object, kind: CK_ATTRIBUTE_TYPE) -> Result<Option<bool>, HsmError> {
        Ok(self.attribute(object, kind)?.and_then(|value| value.first().map(|octet| *octet != CK_FALSE)))
    }

    /// Reads CKA_VALUE into `buffer`; the value must have exactly its length.
    pub(crate) fn read_value(&self, object: Object, buffer: &mut [u8]) -> Result<(), HsmError> {
        let get = self.functions.list.C_GetAttributeValue.ok_or(MISSING)?;
        let mut attribute =
            CK_ATTRIBUTE { type_: CKA_VALUE, pValue: buffer.as_mut_ptr().cast(), ulValueLen: buffer.len() as CK_ULONG };
        // SAFETY: one attribute, whose value has room for its length.
        check("C_GetAttributeValue", unsafe { get(self.handle(), object.0, &mut attribute, 1) })?;
        if length(attribute.ulValueLen) != buffer.len() {
            return Err(HsmError::call("C_GetAttributeValue", CKR_KEY_SIZE_RANGE));
        }
        Ok(())
    }

    /// Changes attributes of an object.
    pub(crate) fn set_attributes(&self, object: Object, template: &[Attribute<'_>]) -> Result<(), HsmError> {
        let set = self.functions.list.C_SetAttributeValue.ok_or(MISSING)?;
        // SAFETY: the template is valid for its length.
        check("C_SetAttributeValue", unsafe {
            set(self.handle(), object.0, attributes(template), template.len() as CK_ULONG)
        })
    }

    /// Creates an object from its value.
    pub(crate) fn create(&self, template: &[Attribute<'_>]) -> Result<Object, HsmError> {
        let create = self.functions.list.C_CreateObject.ok_or(MISSING)?;
        let mut object = 0;
        // SAFETY: the template is valid for its length.
        check("C_CreateObject", unsafe {
            create(self.handle(), attributes(template), template.len() as CK_ULONG, &mut object)
        })?;
        Ok(Object(object))
    }

    /// Copies an object with changed attributes.
    pub(crate) fn copy(&self, object: Object, template: &[Attribute<'_>]) -> Result<Object, HsmError> {
        let copy = self.functions.list.C_CopyObject.ok_or(MISSING)?;
        let mut new = 0;
        // SAFETY: the template is valid for its length.
        check("C_CopyObject", unsafe {
            copy(self.handle(), object.0, attributes(template), template.len() as CK_ULONG, &mut new)
        })?;
        Ok(Object(new))
    }

    /// Destroys an object.
    pub(crate) fn destroy(&self, object: Object) -> Result<(), HsmError> {
        let destroy = self.functions.list.C_DestroyObject.ok_or(MISSING)?;
        // SAFETY: no pointers.
        check("C_DestroyObject", unsafe { destroy(self.handle(), object.0) })
    }

    /// Generates a secret key.
    pub(crate) fn generate(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        template: &[Attribute<'_>],
    ) -> Result<Object, HsmError> {
        let generate = self.functions.list.C_GenerateKey.ok_or(MISSING)?;
        let mut object = 0;
        // SAFETY: mechanism and template are valid during the call.
        let code = Mechanism::Plain(mechanism).with(|mechanism| unsafe {
            generate(self.handle(), mechanism, attributes(template), template.len() as CK_ULONG, &mut object)
        });
        check("C_GenerateKey", code)?;
        Ok(Object(object))
    }

    /// Generates a key pair: public, private.
    pub(crate) fn generate_pair(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        public: &[Attribute<'_>],
        private: &[Attribute<'_>],
    ) -> Result<(Object, Object), HsmError> {
        let generate = self.functions.list.C_GenerateKeyPair.ok_or(MISSING)?;
        let (mut public_object, mut private_object) = (0, 0);
        // SAFETY: mechanism and templates are valid during the call.
        let code = Mechanism::Plain(mechanism).with(|mechanism| unsafe {
            generate(
                self.handle(),
                mechanism,
                attributes(public),
                public.len() as CK_ULONG,
                attributes(private),
                private.len() as CK_ULONG,
                &mut public_object,
                &mut private_object,
            )
        });
        check("C_GenerateKeyPair", code)?;
        Ok((Object(public_object), Object(private_object)))
    }

    /// Derives a key.
    pub(crate) fn derive(
        &self,
        mechanism: &Mechanism<'_>,
        base: Object,
        template: &[Attribute<'_>],
    ) -> Result<Object, HsmError> {
        let derive = self.functions.list.C_DeriveKey.ok_or(MISSING)?;
        let mut object = 0;
        // SAFETY: mechanism and template are valid during the call.
        let code = mechanism.with(|mechanism| unsafe {
            derive(self.handle(), mechanism, base.0, attributes(template), template.len() as CK_ULONG, &mut object)
        });
        check("C_DeriveKey", code)?;
        Ok(Object(object))
    }

    /// Wraps `key` into `buffer`, in one call; gives the number of octets as the module says it.
    pub(crate) fn wrap(
        &self,
        mechanism: &Mechanism<'_>,
        wrapping_key: Object,
        key: Object,
        buffer: &mut [u8],
    ) -> Result<usize, HsmError> {
        let wrap = self.functions.list.C_WrapKey.ok_or(MISSING)?;
        let mut octets = buffer.len() as CK_ULONG;
        // SAFETY: mechanism and buffer are valid during the call; `octets` is the room of the
        // buffer.
        let code = mechanism.with(|mechanism| unsafe {
            wrap(self.handle(), mechanism, wrapping_key.0, key.0, buffer.as_mut_ptr(), &mut octets)
        });
        check("C_WrapKey", code)?;
        Ok(length(octets).min(buffer.len()))
    }

    /// Unwraps a key.
    pub(crate) fn unwrap(
        &self,
        mechanism: &Mechanism<'_>,
        unwrapping_key: Object,
        wrapped: &[u8],
        template: &[Attribute<'_>],
    ) -> Result<Object, HsmError> {
        let unwrap = self.functions.list.C_UnwrapKey.ok_or(MISSING)?;
        let mut object = 0;
        // SAFETY: mechanism, wrapped key and template are valid during the call, and modules do not
        // write to them.
        let code = mechanism.with(|mechanism| unsafe {
            unwrap(
                self.handle(),
                mechanism,
                unwrapping_key.0,
                wrapped.as_ptr().cast_mut(),
                wrapped.len() as CK_ULONG,
                attributes(template),
                template.len() as CK_ULONG,
                &mut object,
            )
        });
        check("C_UnwrapKey", code)?;
        Ok(Object(object))
    }

    /// Encrypts `data` into `buffer`, which has room for all of it and a tag.
    pub(crate) fn encrypt(
        &self,
        mechanism: &Mechanism<'_>,
        key: Object,
        data: &[u8],
        buffer: &mut [u8],
    ) -> Result<usize, HsmError> {
        let list = &self.functions.list;
        let (init, encrypt) = (list.C_EncryptInit.ok_or(MISSING)?, list.C_Encrypt.ok_or(MISSING)?);
        let mut octets = buffer.len() as CK_ULONG;
        // SAFETY: the mechanism's parameters live until the operation is done, as do data and
        // buffer.
        let code = mechanism.with(|mechanism| {
            check("C_EncryptInit", unsafe { init(self.handle(), mechanism, key.0) })?;
            check("C_Encrypt", unsafe {
                encrypt(
                    self.handle(),
                    data.as_ptr().cast_mut(),
                    data.len() as CK_ULONG,
                    buffer.as_mut_ptr(),
                    &mut octets,
                )
            })
        });
        code.map(|()| length(octets).min(buffer.len()))
    }

    /// Decrypts `data` into `buffer`, which has room for all of it.
    pub(crate) fn decrypt(
        &self,
        mechanism: &Mechanism<'_>,
        key: Object,
        data: &[u8],
        buffer: &mut [u8],
    ) -> Result<usize, HsmError> {
        let list = &self.functions.list;
        let (init, decrypt) = (list.C_DecryptInit.ok_or(MISSING)?, list.C_Decrypt.ok_or(MISSING)?);
        let mut octets = buffer.len() as CK_ULONG;
        // SAFETY: the mechanism's parameters live until the operation is done, as do data and
        // buffer.
        let code = mechanism.with(|mechanism| {
            check("C_DecryptInit", unsafe { init(self.handle(), mechanism, key.0) })?;
            check("C_Decrypt", unsafe {
                decrypt(
                    self.handle(),
                    data.as_ptr().cast_mut(),
                    data.len() as CK_ULONG,
                    buffer.as_mut_ptr(),
                    &mut octets,
                )
            })
        });
        code.map(|()| length(octets).min(buffer.len()))
    }

    /// Signs or MACs `data` into `buffer`.
    pub(crate) fn sign(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        key: Object,
        data: &[u8],
        buffer: &mut [u8],
    ) -> Result<usize, HsmError> {
        let list = &self.functions.list;
        let (init, sign) = (list.C_SignInit.ok_or(MISSING)?, list.C_Sign.ok_or(MISSING)?);
        let mut octets = buffer.len() as CK_ULONG;
        // SAFETY: mechanism, data and buffer are valid during the calls.
        let code = Mechanism::Plain(mechanism).with(|mechanism| {
            check("C_SignInit", unsafe { init(self.handle(), mechanism, key.0) })?;
            check("C_Sign", unsafe {
                sign(self.handle(), data.as_ptr().cast_mut(), data.len() as CK_ULONG, buffer.as_mut_ptr(), &mut octets)
            })
        });
        code.map(|()| length(octets).min(buffer.len()))
    }

    /// Fills `buffer` with random octets of the token.
    pub(crate) fn random(&self, buffer: &mut [u8]) -> Result<(), HsmError> {
        let generate = self.functions.list.C_GenerateRandom.ok_or(MISSING)?;
        // SAFETY: the buffer has room for its length.
        check("C_GenerateRandom", unsafe { generate(self.handle(), buffer.as_mut_ptr(), buffer.len() as CK_ULONG) })
    }

    fn handle(&self) -> CK_SESSION_HANDLE {
        self.inner.handle()
    }
}

/// A session object that is destroyed when it goes out of scope: no key outlives the call that made
/// it (I1).
pub(crate) struct Temporary<'a> {
    session: &'a Session,
    object: Object,
}

impl<'a> Temporary<'a> {
    /// Takes over `object`, a session object of `session`.
    pub(crate) fn new(session: &'a Session, object: Object) -> Self {
        Self { session, object }
    }

    /// The handle.
    pub(crate) fn object(&self) -> Object {
        self.object
    }

    /// The handle, which the caller destroys from now on.
    pub(crate) fn keep(self) -> Object {
        let object = self.object;
        std::mem::forget(self);
        object
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // A session that is lost has destroyed its objects; the next call finds that out and
        // repairs it.
        if let Err(error) = self.session.destroy(self.object) {
            tracing::debug!(%error, "destroying a session object failed");
        }
    }
}

fn with_parameters<P, R>(
    mechanism: CK_MECHANISM_TYPE,
    mut parameters: P,
    call: impl FnOnce(CK_MECHANISM_PTR) -> R,
) -> R {
    let mut mechanism = CK_MECHANISM {
        mechanism,
        pParameter: ptr::from_mut(&mut parameters).cast(),
        ulParameterLen: size_of::<P>() as CK_ULONG,
    };
    call(&mut mechanism)
}

/// `Attribute` is a transparent CK_ATTRIBUTE; the functions that take templates do not write to
/// them, except C_GetAttributeValue, which is never called with one of these.
fn attributes(template: &[Attribute<'_>]) -> CK_ATTRIBUTE_PTR {
    template.as_ptr().cast_mut().cast()
}

fn check(function: &'static str, code: CK_RV) -> Result<(), HsmError> {
    if code == CKR_OK { Ok(()) } else { Err(HsmError::call(function, code)) }
}

/// Lengths that modules give; one that does not fit fails at the next check of its use.
fn length(value: CK_ULONG) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

const MISSING: HsmError =
    HsmError::Unsupported { what: "a PKCS#11 function of version 2.40", instead: "ask its vendor for a newer module" };
const LONGEST_ATTRIBUTE: CK_ULONG = 1 << 20;
