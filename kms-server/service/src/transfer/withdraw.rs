//! Withdrawing transfers before their end.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{Outcome, RequestId, SystemTitle, TransferId};
use kms_store::Reads;

use super::{
    TransferService,
    error::{denied, refused},
    record::{Advances, refuse_all},
    rows::{extend_by_tasks, own_meter},
    step::{Decided, DecidedStep, StepAnswer},
    task::tell_task,
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

impl TransferService {
    /// Withdraws transfers. A key that has left stays a candidate (I3).
    ///
    /// # Errors
    /// Errors that concern all meters: the caller or the database.
    #[boxed]
    pub async fn withdraw(
        &self,
        caller: &Caller,
        request: RequestId,
        transfers: Vec<(SystemTitle, TransferId)>,
        reason: String,
    ) -> Result<Vec<StepAnswer>, ServiceError> {
        let known = self.meters(transfers.iter().map(|(meter, _)| *meter)).await?;
        let mut reads = Reads { meters: transfers.iter().map(|(meter, _)| *meter).collect(), ..Reads::default() };
        extend_by_tasks(&mut reads, known.values());
        let committed = self.island.door.act(caller, Some(request), Withdraw { transfers, reason, reads }).await?;
        self.paid_by(caller).answer(committed.value).await
    }
}

/// Transfers that a caller withdraws.
struct Withdraw {
    transfers: Vec<(SystemTitle, TransferId)>,
    reason: String,
    reads: Reads,
}

impl Withdraw {
    fn withdraw(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        title: SystemTitle,
        id: TransferId,
        advances: &mut Advances,
    ) -> Result<DecidedStep, ServiceError> {
        let mut meter = own_meter(view, title)?;
        let own = meter.class.head_end.as_ref() == Some(&permit.principal().id);
        if !permit.permits(&Action::WithdrawTransfer { own }, &Resource::Meters(&meter.class)) {
            return Err(denied(title));
        }
        let changed = Arc::make_mut(&mut meter);
        let transfer = changed.transfer.clone();
        changed.withdraw_transfer(id, view.now()).map_err(|error| refused(&error))?;
        view.put_meter(changed.clone(), false)?;
        if let Some(transfer) = transfer {
            advances.push(&meter, &transfer, Outcome::Withdrawn.name(), 0, &[]);
            tell_task(view, &transfer, meter.title, Outcome::Withdrawn, &self.reason)?;
        }
        Ok(DecidedStep::over(meter, Outcome::Withdrawn, Vec::new()))
    }
}

impl Act for Withdraw {
    type Answer = Vec<Decided>;
    // The row of a withdrawn transfer says that it has ended.
    type Past = Never;

    fn name(&self) -> &'static str {
        "withdrawTransfer"
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<Decided>>, ServiceError> {
        let mut advances = Advances::because(self.reason.clone());
        let mut decided: Vec<Decided> = Vec::with_capacity(self.transfers.len());
        for (title, id) in &self.transfers {
            let withdrawn = advances.attempt(view, |view, advances| self.withdraw(permit, view, *title, *id, advances));
            decided.push((*title, withdrawn));
        }
        refuse_all(view, &decided);
        advances.record(view);
        Ok(Decision::of(view.entry(), decided))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<Decided>, ServiceError> {
        match never {}
    }
}
