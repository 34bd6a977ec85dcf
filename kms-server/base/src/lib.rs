//! What every layer of the server needs: the error that use cases return and its gRPC status,
//! bounds, metrics, the clock, and files that are replaced as a whole.

pub mod bounds;
pub mod clock;
mod conversions;
pub mod error;
pub mod files;
mod metrics;
mod repetition;
pub mod status;

pub use bounds::{Bound, Limits};
pub use error::ServiceError;
pub use metrics::{FrameDirection, Metrics, is_server_error, metrics, status_name};
pub use repetition::{Repetition, Seldom};
