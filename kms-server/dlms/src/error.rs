//! The one error of reading DLMS octets.

/// Octets that are not valid DLMS, or that this server does not support. The text never repeats
/// their content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DlmsError {
    /// The octets end within a field.
    #[error("{what}: the octets end too early")]
    Short {
        /// The field.
        what: &'static str,
    },
    /// Octets follow the end.
    #[error("{what}: {count} octets follow its end")]
    Trailing {
        /// What ended.
        what: &'static str,
        /// How many octets follow.
        count: usize,
    },
    /// A value that is not valid.
    #[error("{what}: {reason}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl DlmsError {
    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }
}
