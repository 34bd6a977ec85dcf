//! The C functions of the standard. All `unsafe` code of the crate is in this folder.
//!
//! `slots`, `sessions`, `objects`, `encryption`, `messages`, `digests`, `signatures` and
//! `key_management` have the functions by the chapters of the standard; `absent` refuses the rest.
//!
//! The code here relies on what the standard asks of a caller: a pointer that is not `NULL`
//! is valid for the length that comes with it, for the time of the call. Nothing else is assumed:
//! pointers may be unaligned, input and output may be the same memory, and what they point to is
//! read once.

#![expect(unsafe_code, reason = "C calls into this folder with raw pointers")]
#![expect(non_snake_case, reason = "these are the standard's names")]

mod absent;
mod calls;
mod digests;
mod encryption;
mod key_management;
mod lists;
mod memory;
mod messages;
mod objects;
mod parameters;
mod sessions;
mod signatures;
mod slots;
mod state;

pub use lists::{C_GetFunctionList, C_GetInterface, C_GetInterfaceList};
