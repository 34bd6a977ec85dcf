//! The repetition of calls, as the server asks for it.

use std::time::Duration;

use kms_domain::RequestId;
use tonic::Status;

use crate::ServerError;

/// The rules for repeating a call. It is repeated only if the server was unavailable, after the
/// time that the server asked for (google.rpc.RetryInfo). The caller sends the same request id each
/// time, so that the server executes the request once.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// The largest number of attempts, from 1.
    pub attempts: u32,
    /// The delay before the second attempt, if the server names none. It doubles each time.
    pub first_delay: Duration,
    /// The longest delay. If the server asks for a longer one, the call fails at once.
    pub longest_delay: Duration,
}

impl RetryPolicy {
    /// One attempt.
    pub const NEVER: Self = Self { attempts: 1, first_delay: Duration::ZERO, longest_delay: Duration::ZERO };

    /// Makes the call until it succeeds, fails for good, or the attempts are used up.
    ///
    /// # Errors
    /// The last attempt's error.
    pub async fn run<T, Call>(&self, mut call: impl FnMut() -> Call) -> Result<T, ServerError>
    where
        Call: Future<Output = Result<T, Status>>,
    {
        let mut attempt = 1;
        loop {
            let error = match call().await {
                Ok(result) => return Ok(result),
                Err(status) => ServerError::from(status),
            };
            let Some(delay) = self.delay_after(attempt, &error) else { return Err(error) };
            tokio::time::sleep(delay).await;
            attempt += 1;
        }
    }

    /// The time to wait after a failed attempt (numbered from 1); `None`: do not try again.
    pub fn delay_after(&self, attempt: u32, error: &ServerError) -> Option<Duration> {
        if attempt >= self.attempts || !error.is_unavailable() {
            return None;
        }
        let doubled = self.first_delay.saturating_mul(1 << (attempt - 1).min(16)).min(self.longest_delay);
        match error.retry_after() {
            Some(asked) if asked > self.longest_delay => None,
            Some(asked) => Some(asked),
            // Between half of the delay and all of it, so that callers that failed together do not
            // come back together.
            None => Some(doubled.mul_f64(0.5 + 0.5 * random_fraction())),
        }
    }
}

impl Default for RetryPolicy {
    /// Five attempts within about half a minute.
    fn default() -> Self {
        Self { attempts: 5, first_delay: Duration::from_millis(200), longest_delay: Duration::from_secs(10) }
    }
}

/// A new request id: a UUID version 7 (RFC 9562).
pub fn new_request_id() -> RequestId {
    loop {
        // Only a UUID of zeros is refused. A version 7 UUID is never all zeros.
        if let Ok(id) = RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()) {
            return id;
        }
    }
}

fn random_fraction() -> f64 {
    let mut octets = [0; 4];
    // Without randomness the delay is the shortest, which does no harm.
    let _ = aws_lc_rs::rand::fill(&mut octets);
    f64::from(u32::from_be_bytes(octets)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tonic::Code;
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn unavailable(delay: Option<Duration>) -> Status {
        Status::with_error_details(Code::Unavailable, "not now", ErrorDetails::with_retry_info(delay))
    }

    #[tokio::test]
    async fn calls_are_repeated_only_while_the_server_is_unavailable() {
        let calls = Cell::new(0);
        let policy =
            RetryPolicy { attempts: 3, first_delay: Duration::from_millis(1), longest_delay: Duration::from_millis(2) };
        let result = policy
            .run(|| {
                calls.set(calls.get() + 1);
                let attempt = calls.get();
                async move { if attempt < 3 { Err(unavailable(Some(Duration::from_millis(1)))) } else { Ok(attempt) } }
            })
            .await;
        assert_eq!(result.unwrap(), 3);
        calls.set(0);
        let refused = policy
            .run(|| {
                calls.set(calls.get() + 1);
                async { Err::<(), _>(Status::permission_denied("no")) }
            })
            .await;
        assert!(refused.unwrap_err().is_refused() && calls.get() == 1);
    }

    #[test]
    fn the_servers_delay_is_kept_and_too_long_a_one_ends_the_attempts() {
        let policy = RetryPolicy::default();
        let asked = |delay| ServerError::from(unavailable(delay));
        assert_eq!(policy.delay_after(1, &asked(Some(Duration::from_secs(3)))), Some(Duration::from_secs(3)));
        assert_eq!(policy.delay_after(1, &asked(Some(Duration::from_secs(11)))), None);
        assert_eq!(policy.delay_after(5, &asked(Some(Duration::from_secs(1)))), None);
        let own = policy.delay_after(2, &ServerError::from(Status::unavailable("no details"))).unwrap();
        assert!((Duration::from_millis(200)..=Duration::from_millis(400)).contains(&own), "{own:?}");
    }
}
