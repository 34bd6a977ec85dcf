//! Tasks of campaigns, as an act sees and changes them. A mark binds each task to its campaign's
//! plan (I5, I6).

use kms_store::{Lookup, TaskKey, TaskRow};

use super::{View, not_read};
use crate::staged::StagedChange;
use kms_base::error::ServiceError;

impl View<'_, '_> {
    /// A task of a campaign. A task that was edited, or that the approved plan does not have, is
    /// like an absent one. The security officers get an event (I5, I6).
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn task(&mut self, key: TaskKey) -> Result<Option<TaskRow>, ServiceError> {
        if let Some(row) = self.staged.tasks.get(&key).or_else(|| self.draft.tasks.get(&key)) {
            return Ok(Some(row.clone()));
        }
        let row = match self.draft.read.task(key) {
            Lookup::Present(row) => row.clone(),
            Lookup::Absent => return Ok(None),
            Lookup::NotRead => {
                self.draft.missing.tasks.push(key);
                return Err(not_read());
            }
        };
        if !self.task_fits(&row)? {
            self.note_refused_row(format!(
                "a task of campaign {} for meter {} is not in the campaign's plan",
                key.campaign, key.meter
            ));
            return Ok(None);
        }
        Ok(Some(row))
    }

    /// Whether a task is as it was written, and does what was approved.
    fn task_fits(&mut self, row: &TaskRow) -> Result<bool, ServiceError> {
        let sealed = self.draft.seal.accept(&row.mark, |seal| row.mark_by(seal));
        if !sealed && !self.draft.seal.accept(&row.mark, |seal| row.former_mark_by(seal)) {
            return Ok(false);
        }
        // No head-end works on it any more.
        if row.task.state.is_final() {
            return Ok(true);
        }
        // I5: a row that is refused is on the record already.
        let Some(campaign) = unless_refused(self.campaign(row.key.campaign))? else { return Ok(false) };
        if sealed {
            return Ok(campaign.plans(&row.task.step));
        }
        // An earlier server wrote the mark, which did not bind the step: the step must follow from
        // the plan. The next write of the row binds it.
        Ok(unless_refused(self.meter(row.key.meter))?.is_some_and(|meter| campaign.plans_for(&meter, &row.task.step)))
    }

    /// Writes a task that [`Self::task`] returned. This sets its generation and mark.
    pub fn put_task(&mut self, row: TaskRow) {
        let generation = self.draft.read.task(row.key).present().map_or(0, |read| read.generation) + 1;
        self.seal_and_stage(TaskRow { generation, ..row });
    }

    /// Makes a task of the plan, and binds it to the plan. This sets its generation and mark.
    pub fn plan_task(&mut self, row: TaskRow) {
        self.seal_and_stage(TaskRow { generation: 1, ..row });
    }

    fn seal_and_stage(&mut self, row: TaskRow) {
        let mark = row.mark_by(self.draft.seal.current());
        self.stage_task(TaskRow { mark, ..row });
    }

    fn stage_task(&mut self, row: TaskRow) {
        let key = row.key;
        let before = self.staged.tasks.insert(key, row);
        self.staged.log.push(StagedChange::Task(key, before));
    }
}

/// I5: a row that was refused is on the record already, and is like an absent one here.
fn unless_refused<T>(found: Result<Option<T>, ServiceError>) -> Result<Option<T>, ServiceError> {
    match found {
        Err(ServiceError::PermissionDenied { .. }) => Ok(None),
        found => found,
    }
}
