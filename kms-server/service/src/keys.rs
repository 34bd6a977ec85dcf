//! What use cases of keys share: where a key comes from, which counter it has, who knows it.
//!
//! Grants, frames, transfers, groups and meters stand above these files and import from them, not
//! from each other.

pub(crate) mod counter;
pub(crate) mod exposure;
pub(crate) mod group_rotation;
pub(crate) mod recipe;
pub(crate) mod seal;
pub(crate) mod setup;
pub(crate) mod source;
pub(crate) mod token;
