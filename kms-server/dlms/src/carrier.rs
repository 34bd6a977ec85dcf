//! Requests that put a key or a secret into a meter.

use crate::{ServiceKind, ServiceRequest, Target};

/// How a request would put a key or a secret into a meter, directly or in a form that this server
/// cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyCarrier {
    /// `key_transfer`, method 2 of a security setup object (class 64; `global_key_transfer` in its
    /// version 0): a key wrapped under the meter's KEK.
    KeyTransfer,
    /// In another way, by its name.
    Other(&'static str),
}

impl ServiceRequest {
    /// Whether the request, which was read from `apdu`, carries a key or a secret: the first such
    /// target counts, a `key_transfer` last.
    ///
    /// This includes more than requests that set a key at once (IEC 62056-6-2): the owner of a
    /// certificate can agree on keys, data protection (class 30) carries requests that are ciphered
    /// once more, and a script table (class 9) can call a method with parameters that were stored
    /// before.
    pub fn carries_key(&self, apdu: &[u8]) -> Option<KeyCarrier> {
        let other =
            self.targets.iter().find_map(|target| other_carrier(self.kind, *target, apdu)).map(KeyCarrier::Other);
        let transfer = || {
            self.targets
                .iter()
                .any(|target| (self.kind, target.class_id, target.member) == (ServiceKind::Action, SECURITY_SETUP, 2))
        };
        other.or_else(|| transfer().then_some(KeyCarrier::KeyTransfer))
    }
}

fn other_carrier(kind: ServiceKind, target: Target, apdu: &[u8]) -> Option<&'static str> {
    use ServiceKind::{Action, Set};
    Some(match (kind, target.class_id, target.member) {
        (Action, SECURITY_SETUP, 3) => "key_agreement",
        (Action, SECURITY_SETUP, 6) => "import_certificate",
        (Action, ASSOCIATION_LN, 2) => "change_HLS_secret",
        (Set, ASSOCIATION_LN, 0 | 7) => "the secret of an association",
        (Action, ASSOCIATION_SN, 5 | 6) => "the secret of an association",
        (Action, M_BUS_CLIENT, 7 | 8) => "the key of an M-Bus device",
        (_, DATA_PROTECTION, _) => "data protection",
        (Set, SCRIPT_TABLE, 0 | 2) if names_carrier(apdu) => "a script that may change keys",
        _ => return None,
    })
}

/// Whether the octets name one of these classes as a 16 or 32 bit number, as the action
/// specification of a script does. Also true for a value that looks like this by chance: then the
/// caller can put it into a separate script.
fn names_carrier(apdu: &[u8]) -> bool {
    let carrier =
        |class: u16| [SECURITY_SETUP, ASSOCIATION_LN, ASSOCIATION_SN, M_BUS_CLIENT, DATA_PROTECTION].contains(&class);
    let long = apdu
        .windows(3)
        .any(|octets| matches!(octets, [0x10 | 0x12, high, low] if carrier(u16::from_be_bytes([*high, *low]))));
    long || apdu
        .windows(5)
        .any(|octets| matches!(octets, [0x05 | 0x06, 0, 0, high, low] if carrier(u16::from_be_bytes([*high, *low]))))
}

const SCRIPT_TABLE: u16 = 9;
const ASSOCIATION_SN: u16 = 12;
const ASSOCIATION_LN: u16 = 15;
const DATA_PROTECTION: u16 = 30;
const SECURITY_SETUP: u16 = 64;
const M_BUS_CLIENT: u16 = 72;
