//! The methods of the security setup (IEC 62056-6-2, class 64): `security_activate` and
//! `key_transfer`, as meters in the field execute them.

use crate::axdr::Data;
use crate::behaviour::{ArrayTransfer, Fault};
use crate::meter::MeterState;
use crate::xdlms::{DataAccessResult, MethodDescriptor};
use crate::{KeyId, Obis, SymmetricKey};

impl MeterState {
    /// Executes a method of a security setup; the result is an `Action-Result`.
    pub(crate) fn act_on_security_setup(&mut self, method: &MethodDescriptor, argument: Option<&Data>) -> u8 {
        if self.setup(method.instance).is_none() {
            return DataAccessResult::OBJECT_UNDEFINED.0;
        }
        match (method.method, argument) {
            (SECURITY_ACTIVATE, Some(Data::Enum(policy))) => self.security_activate(method.instance, *policy),
            (KEY_TRANSFER, Some(Data::Array(items))) => self.key_transfer(method.instance, items),
            (SECURITY_ACTIVATE | KEY_TRANSFER, _) => DataAccessResult::TYPE_UNMATCHED.0,
            _ => DataAccessResult::READ_WRITE_DENIED.0,
        }
    }

    fn security_activate(&mut self, setup: Obis, policy: u8) -> u8 {
        let Some(setup) = self.setup_mut(setup) else {
            return DataAccessResult::OBJECT_UNDEFINED.0;
        };
        match policy {
            POLICY_AUTHENTICATED => setup.accept_authenticated_only = true,
            POLICY_AUTHENTICATED_ENCRYPTED => setup.accept_authenticated_only = false,
            _ => return DataAccessResult::OTHER_REASON.0,
        }
        DataAccessResult::SUCCESS.0
    }

    fn key_transfer(&mut self, setup: Obis, items: &[Data]) -> u8 {
        match self.transfer_fault.take() {
            Some(Fault::RefusedWithoutApplying(result)) => result,
            Some(Fault::SuccessWithoutApplying) => DataAccessResult::SUCCESS.0,
            Some(Fault::AppliedButError(result)) => {
                self.apply_key_transfer(setup, items);
                result
            }
            _ => self.apply_key_transfer(setup, items),
        }
    }

    fn apply_key_transfer(&mut self, setup: Obis, items: &[Data]) -> u8 {
        if items.is_empty() {
            return DataAccessResult::TYPE_UNMATCHED.0;
        }
        let (keys, failure) = self.unwrap_items(setup, items);
        if failure.is_some() && self.config.behaviour.array == ArrayTransfer::AllOrNothing {
            return failure.unwrap_or_default();
        }
        let counter = self.config.behaviour.counter_on_new_key;
        if let Some(setup) = self.setup_mut(setup) {
            for (id, key) in keys {
                setup.install(id, key, counter);
            }
        }
        failure.unwrap_or(DataAccessResult::SUCCESS.0)
    }

    /// The keys up to the first bad item, and the `Action-Result` of that item.
    fn unwrap_items(&self, setup: Obis, items: &[Data]) -> (Vec<(KeyId, SymmetricKey)>, Option<u8>) {
        let mut keys = Vec::new();
        let Some(setup) = self.setup(setup) else {
            return (keys, Some(DataAccessResult::OBJECT_UNDEFINED.0));
        };
        let mut kek = setup.kek.current().key.clone();
        for item in items {
            let Some((id, wrapped)) = read_item(item) else {
                return (keys, Some(DataAccessResult::TYPE_UNMATCHED.0));
            };
            if matches!(id, KeyId::Vendor(number) if !setup.vendor_keys.contains_key(&number)) {
                return (keys, Some(DataAccessResult::TYPE_UNMATCHED.0));
            }
            let key = crate::security::unwrap_key(&kek, wrapped)
                .ok()
                .filter(|key| key.expose().len() == self.suite().key_length());
            let Some(key) = key else {
                return (keys, Some(self.config.behaviour.wrong_kek_result));
            };
            if id == KeyId::Master {
                // The new KEK counts at once: the following keys of the array are wrapped under it.
                kek = key.clone();
            }
            keys.push((id, key));
        }
        (keys, None)
    }
}

/// The argument of `key_transfer`: each key's id and its wrapped form.
pub fn key_transfer_argument(items: &[(KeyId, &[u8])]) -> Data {
    Data::Array(
        items
            .iter()
            .map(|(id, wrapped)| Data::Structure(vec![Data::Enum(id.id()), Data::OctetString(wrapped.to_vec())]))
            .collect(),
    )
}

/// Method 1 of the security setup.
pub const SECURITY_ACTIVATE: i8 = 1;
/// Method 2 of the security setup.
pub const KEY_TRANSFER: i8 = 2;
/// `security_policy` of version 1: authenticated requests and responses.
pub const POLICY_AUTHENTICATED: u8 = 0x24;
/// `security_policy` of version 1: authenticated and encrypted requests and responses.
pub const POLICY_AUTHENTICATED_ENCRYPTED: u8 = 0x6C;

fn read_item(item: &Data) -> Option<(KeyId, &[u8])> {
    let Data::Structure(fields) = item else {
        return None;
    };
    match fields.as_slice() {
        [Data::Enum(id), Data::OctetString(wrapped)] => Some((KeyId::from(*id), wrapped)),
        _ => None,
    }
}
