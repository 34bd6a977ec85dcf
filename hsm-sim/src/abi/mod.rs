//! The C functions of the standard. All `unsafe` code of the crate is in this folder.
//!
//! What the standard asks of a caller is what the code here relies on: a pointer that is not `NULL`
//! is valid for the length that comes with it, for the time of the call. Nothing else is assumed:
//! pointers may be unaligned, input and output may be the same memory, and what they point to is
//! read once.

#![expect(unsafe_code, reason = "C calls into this folder with raw pointers")]
#![expect(non_snake_case, reason = "these are the standard's names")]

mod functions;
mod lists;
mod memory;
mod parameters;
mod state;

pub use lists::{C_GetFunctionList, C_GetInterface, C_GetInterfaceList};
