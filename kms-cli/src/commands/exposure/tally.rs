//! What the lines of an answer add up to.

use std::collections::BTreeSet;

use kms_proto::v1 as proto;

/// What was shown so far.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) lines: u64,
    pub(super) owners: u64,
    /// Slots of which a version is known, those that are open, and those that were replaced and to
    /// which the meter may go back.
    pub(super) slots: u64,
    pub(super) open: u64,
    pub(super) may_go_back: u64,
    pub(super) parties: BTreeSet<String>,
    pub(super) totals: Option<proto::ExposureTotals>,
    pub(super) incomplete: bool,
    pub(super) unreadable: Vec<proto::UnreadableOwner>,
}

impl Tally {
    /// Counts a page. The lines of an owner are on one page.
    pub(super) fn count(&mut self, page: &proto::ListExposuresResponse) {
        let owner = |key: &proto::ExposedKey| (key.meter.clone(), key.group.clone(), key.device_type.clone());
        for of_owner in page.keys.chunk_by(|one, other| owner(one) == owner(other)) {
            let slots = |reach: Option<&str>| {
                let lines = of_owner.iter().filter(|key| reach.is_none_or(|reach| key.reach == reach));
                lines.map(|key| (key.security_setup.clone(), key.key_type.clone())).collect::<BTreeSet<_>>()
            };
            let (open, replaced) = (slots(Some("open")), slots(Some("replaced")));
            self.owners += 1;
            self.slots += slots(None).len() as u64;
            self.open += open.len() as u64;
            self.may_go_back += replaced.difference(&open).count() as u64;
        }
        self.lines += page.keys.len() as u64;
        // A meter's parties are few; of other subjects there is one.
        self.parties.extend(page.keys.iter().map(|key| key.known_to.clone()));
        self.totals = self.totals.or(page.totals);
        self.incomplete |= !page.complete;
        self.unreadable.extend(page.unreadable.iter().cloned());
    }
}
