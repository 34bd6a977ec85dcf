//! Nonces that served two messages, over all meters of a test.

use std::collections::HashMap;

use crate::inspect::{NonceKey, NonceUse};
use crate::{Meter, SymmetricKey, SystemTitle};

/// A nonce that served two different messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepeatedNonce {
    /// The first use.
    pub first: NonceUse,
    /// A later use with another tag.
    pub second: NonceUse,
}

impl RepeatedNonce {
    /// Finds the nonces that served two different messages in any of `meters`, by key *value*: two
    /// meters with equal keys are one counter domain.
    pub fn find(meters: &[Meter]) -> Vec<Self> {
        let mut values: Vec<SymmetricKey> = Vec::new();
        let mut first_uses: HashMap<(usize, SystemTitle, u32), NonceUse> = HashMap::new();
        let mut repeated = Vec::new();
        for meter in meters {
            let mut numbers: HashMap<NonceKey, usize> = HashMap::new();
            for nonce_use in meter.nonce_log() {
                let number = *numbers.entry(nonce_use.key).or_insert_with(|| {
                    let Some(value) = meter.nonce_key_for_inspection(nonce_use.key) else {
                        return usize::MAX;
                    };
                    let known = values.iter().position(|known| *known == value);
                    known.unwrap_or_else(|| {
                        values.push(value);
                        values.len() - 1
                    })
                });
                let nonce = (number, nonce_use.sender, nonce_use.counter);
                let first = first_uses.entry(nonce).or_insert(nonce_use);
                if first.tag != nonce_use.tag {
                    repeated.push(Self { first: *first, second: nonce_use });
                }
            }
        }
        repeated
    }
}
