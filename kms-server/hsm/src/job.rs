//! A job of a token: work that waits in the queue for a worker, and the caller who waits for its
//! answer.

use tokio::sync::oneshot;

use crate::error::HsmError;
use crate::worker::Worker;

/// A job in the queue.
pub(crate) trait Job: Send {
    /// Its name in the metrics.
    fn name(&self) -> &'static str;

    /// Runs the job. If the session was lost and `may_retry`, it returns the error and leaves the
    /// caller without an answer.
    fn run(&mut self, worker: &Worker, may_retry: bool) -> Option<HsmError>;

    /// Answers the caller with an error.
    fn fail(self: Box<Self>, error: HsmError);
}

/// A job that answers its caller with an `R`.
pub(crate) struct JobOf<F, R> {
    pub(crate) name: &'static str,
    pub(crate) work: F,
    pub(crate) reply: Option<oneshot::Sender<Result<R, HsmError>>>,
}

impl<R: Send, F: FnMut(&Worker) -> Result<R, HsmError> + Send> Job for JobOf<F, R> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn run(&mut self, worker: &Worker, may_retry: bool) -> Option<HsmError> {
        // The call was cancelled: nobody waits for an answer.
        if self.reply.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return None;
        }
        let result = (self.work)(worker);
        match result {
            Err(error) if may_retry && error.needs_repair() => Some(error),
            result => {
                let lost = result.as_ref().err().filter(|error| error.needs_repair()).cloned();
                if let Some(reply) = self.reply.take() {
                    // The send fails if the call was cancelled meanwhile.
                    drop(reply.send(result));
                }
                lost
            }
        }
    }

    fn fail(mut self: Box<Self>, error: HsmError) {
        if let Some(reply) = self.reply.take() {
            drop(reply.send(Err(error)));
        }
    }
}
