//! Time as a value: this crate has no clock.

/// A moment: milliseconds since 1970-01-01T00:00:00Z (Unix time, without leap seconds).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// The moment this many milliseconds later; stops at the end of the range.
    pub const fn after(self, milliseconds: i64) -> Self {
        Self(self.0.saturating_add(milliseconds))
    }
}
