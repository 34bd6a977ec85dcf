//! What an act comes to, and whether it is on the record (I2).

/// That an event was appended to an act: by [`super::View::append`] alone.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub(super) ());

/// What an act decided. Rows, keys and rights are written by a decision that is recorded, and by no
/// other: what an act has staged against its word fails it (I2).
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
    /// What is on its way, and nobody's key or right: octets of a shipment that was not imported,
    /// and tasks in hand.
    Progress,
    /// Nothing.
    Unchanged,
    /// Nothing, and the request is decided on anew when it comes again.
    Forgotten,
}

impl<T> Decision<T> {
    /// It changed something, as this entry of the audit log says.
    pub const fn recorded(_entry: Entry, answer: T) -> Self {
        Self { answer, kind: Kind::Recorded }
    }

    /// It is recorded if there is an entry; else it changed nothing, and its request is remembered.
    pub fn of(entry: Option<Entry>, answer: T) -> Self {
        if entry.is_some() { Self { answer, kind: Kind::Recorded } } else { Self::unchanged(answer) }
    }

    /// It moved what is on its way and nobody's key or right: octets of a shipment that was not
    /// imported, tasks in hand. The log has no entry of that.
    pub const fn progress(answer: T) -> Self {
        Self { answer, kind: Kind::Progress }
    }

    /// It changed nothing.
    pub const fn unchanged(answer: T) -> Self {
        Self { answer, kind: Kind::Unchanged }
    }

    /// It changed nothing, and everything in it was refused: the same request is decided on anew
    /// when it comes again.
    pub const fn forgotten(answer: T) -> Self {
        Self { answer, kind: Kind::Forgotten }
    }

    /// What the caller gets.
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
