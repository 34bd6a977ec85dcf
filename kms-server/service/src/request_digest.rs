//! The digest that binds a request id to its content.

use aws_lc_rs::digest;

/// SHA-256 over the parts of a request, each with its length before it: what must be the same when
/// the request's id comes again.
pub fn request_digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    let mut value = [0; 32];
    value.copy_from_slice(context.finish().as_ref());
    value
}
