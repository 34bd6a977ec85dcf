//! How an act ends, and whether it is on the record (I2).

/// The proof that an act has recorded an event: only [`crate::View::append`] makes it.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub(super) ());

/// How an act ends. Only a recorded decision writes rows, keys and rights: an act that has staged
/// more than its decision allows fails (I2).
#[derive(Clone, Debug)]
pub struct Decision<T> {
    answer: T,
    kind: Kind,
}

/// What an act may have staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Anything.
    Recorded,
    /// No key and no right: octets of a shipment that was not imported yet, and tasks.
    Progress,
    /// Nothing.
    Unchanged,
    /// Nothing, and the request is decided on anew when it comes again.
    Forgotten,
}

impl<T> Decision<T> {
    /// It changed something, and has recorded it.
    pub const fn recorded(_entry: Entry, answer: T) -> Self {
        Self { answer, kind: Kind::Recorded }
    }

    /// Recorded if there is an entry. If not, it changed nothing, and its request is remembered.
    pub fn of(entry: Option<Entry>, answer: T) -> Self {
        if entry.is_some() { Self { answer, kind: Kind::Recorded } } else { Self::unchanged(answer) }
    }

    /// It changed no key and no right: only octets of a shipment that was not imported yet, or
    /// tasks. The log has no entry of that.
    pub const fn progress(answer: T) -> Self {
        Self { answer, kind: Kind::Progress }
    }

    /// It changed nothing.
    pub const fn unchanged(answer: T) -> Self {
        Self { answer, kind: Kind::Unchanged }
    }

    /// It changed nothing, and everything in it was refused. If the same request comes again, it is
    /// decided on anew.
    pub const fn forgotten(answer: T) -> Self {
        Self { answer, kind: Kind::Forgotten }
    }

    /// The answer for the caller.
    pub const fn answer(&self) -> &T {
        &self.answer
    }

    /// Whether it is on the record.
    pub fn is_recorded(&self) -> bool {
        self.kind == Kind::Recorded
    }

    /// Whether its request is not remembered.
    pub fn is_forgotten(&self) -> bool {
        self.kind == Kind::Forgotten
    }

    /// The same with another answer.
    pub fn map<U>(self, answer: impl FnOnce(T) -> U) -> Decision<U> {
        Decision { answer: answer(self.answer), kind: self.kind }
    }

    pub(super) fn into_parts(self) -> (T, Kind) {
        (self.answer, self.kind)
    }
}
