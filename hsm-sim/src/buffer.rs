//! Bytes that may be secret, and the answers of functions that fill a caller's buffer.

use core::ops::{Deref, DerefMut};

use smallvec::SmallVec;
use zeroize::Zeroize;

/// Bytes that are overwritten before their memory is freed. Up to 64 bytes need no heap allocation.
#[derive(Default, Clone)]
pub(crate) struct Buffer(SmallVec<[u8; INLINE]>);

impl Buffer {
    /// A copy of `bytes`.
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        Self(SmallVec::from_slice(bytes))
    }

    /// `length` zeros.
    pub(crate) fn zeros(length: usize) -> Self {
        Self(SmallVec::from_elem(0, length))
    }

    /// Appends a copy of `bytes`. When the bytes must move to a larger place, the old place is
    /// overwritten.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        if self.0.len() + bytes.len() > self.0.capacity() {
            let mut larger = SmallVec::with_capacity((self.0.len() + bytes.len()).max(2 * self.0.len()));
            larger.extend_from_slice(&self.0);
            self.0.zeroize();
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
    }

    /// Keeps the first `length` bytes and overwrites the others.
    pub(crate) fn truncate(&mut self, length: usize) {
        if let Some(rest) = self.0.get_mut(length..) {
            rest.zeroize();
        }
        self.0.truncate(length);
    }

    /// Overwrites and removes everything.
    pub(crate) fn clear(&mut self) {
        self.truncate(0);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

/// The room that the caller offers for the answer (PKCS#11 section 5.2). Without a buffer the
/// caller asks for the length.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Room {
    /// The caller gave no buffer.
    Query,
    /// The caller's buffer has room for this number of bytes.
    Bytes(usize),
}

impl Room {
    /// The answer if the caller only asks for the length, which is `needed`, or if `needed` bytes
    /// do not fit. `None`: do the work.
    pub(crate) fn settle(self, needed: usize) -> Option<Output> {
        match self {
            Self::Query => Some(Output::Length(needed)),
            Self::Bytes(available) if available < needed => Some(Output::TooSmall(needed)),
            Self::Bytes(_) => None,
        }
    }
}

/// The answer of a function that fills a caller's buffer.
pub(crate) enum Output {
    /// The length that was asked for.
    Length(usize),
    /// The bytes.
    Data(Buffer),
    /// The buffer is too small: this number of bytes is needed. The operation stays active.
    TooSmall(usize),
}

impl Output {
    /// Whether the work was done, so that the operation ends.
    pub(crate) fn is_data(&self) -> bool {
        matches!(self, Self::Data(_))
    }
}

const INLINE: usize = 64;
