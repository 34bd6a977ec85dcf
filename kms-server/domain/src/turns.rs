//! Fair queuing: who is served next when many wait for one server.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;

/// Waiting items of several payers, served in turn: self-clocked fair queuing (S. J. Golestani,
/// INFOCOM 1994).
///
/// The items of one payer stay in their order. Each item has a cost. At the head of its payer's
/// lane it gets a finish: its cost plus the finish of the item before it in the lane, or plus the
/// clock if nothing of the payer waited. The clock is the finish of the item that was served last.
/// The smallest finish is served first. So payers that always wait get equal shares of the cost,
/// and a small item of an idle payer comes before a large one. No payer starves: while an item
/// waits, each other payer is served at most this item's cost and one item.
#[derive(Debug)]
pub struct Turns<P, T> {
    lanes: HashMap<P, Lane<T>>,
    /// The lane of each head, by finish; the number keeps equal ones in their order of arrival.
    heads: BTreeMap<(u64, u64), P>,
    clock: u64,
    number: u64,
    items: usize,
}

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<(u64, T)>,
    work: u64,
    head: (u64, u64),
}

/// The waiting items of one payer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Items.
    pub items: usize,
    /// The sum of their costs.
    pub work: u64,
}

impl<P, T> Default for Turns<P, T> {
    fn default() -> Self {
        Self { lanes: HashMap::new(), heads: BTreeMap::new(), clock: 0, number: 0, items: 0 }
    }
}

impl<P: Clone + Eq + Hash, T> Turns<P, T> {
    /// Nothing waits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Items that wait, of all payers.
    pub const fn len(&self) -> usize {
        self.items
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// The waiting items of this payer.
    pub fn waiting(&self, payer: &P) -> Waiting {
        self.lanes.get(payer).map(|lane| Waiting { items: lane.waiting.len(), work: lane.work }).unwrap_or_default()
    }

    /// Appends an item to those of its payer. A cost of 0 counts as 1.
    pub fn push(&mut self, payer: P, cost: u64, item: T) {
        let cost = cost.max(1);
        self.items += 1;
        match self.lanes.get_mut(&payer) {
            Some(lane) => {
                lane.work = lane.work.saturating_add(cost);
                lane.waiting.push_back((cost, item));
            }
            None => {
                let head = (self.clock.saturating_add(cost), self.number);
                self.number += 1;
                self.heads.insert(head, payer.clone());
                self.lanes.insert(payer, Lane { waiting: VecDeque::from([(cost, item)]), work: cost, head });
            }
        }
    }

    /// Removes the next item. Returns it with its payer and cost.
    pub fn pop(&mut self) -> Option<(P, u64, T)> {
        self.pop_where(|_, _| true)
    }

    /// Removes the next item among the heads of lanes for whose payer and cost `fits` is true.
    pub fn pop_where(&mut self, mut fits: impl FnMut(&P, u64) -> bool) -> Option<(P, u64, T)> {
        let lanes = &self.lanes;
        let cost_of = |payer: &P| lanes.get(payer).and_then(|lane| lane.waiting.front()).map(|(cost, _)| *cost);
        let head = self
            .heads
            .iter()
            .find(|(_, payer)| cost_of(payer).is_some_and(|cost| fits(payer, cost)))
            .map(|(head, _)| *head)?;
        let payer = self.heads.remove(&head)?;
        let lane = self.lanes.get_mut(&payer)?;
        let (cost, item) = lane.waiting.pop_front()?;
        self.items -= 1;
        self.clock = self.clock.max(head.0);
        lane.work = lane.work.saturating_sub(cost);
        match lane.waiting.front() {
            Some((next, _)) => {
                lane.head = (head.0.saturating_add(*next), self.number);
                self.number += 1;
                self.heads.insert(lane.head, payer.clone());
            }
            None => {
                self.lanes.remove(&payer);
            }
        }
        Some((payer, cost, item))
    }

    /// Whether `fits` is true for payer and cost of any head of a lane.
    pub fn any_where(&self, mut fits: impl FnMut(&P, u64) -> bool) -> bool {
        self.lanes.iter().any(|(payer, lane)| lane.waiting.front().is_some_and(|(cost, _)| fits(payer, *cost)))
    }

    /// Takes everything, in no order.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + use<P, T> {
        self.heads.clear();
        self.items = 0;
        std::mem::take(&mut self.lanes).into_values().flat_map(|lane| lane.waiting.into_iter().map(|(_, item)| item))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(turns: &mut Turns<&'static str, u32>) -> Vec<(&'static str, u32)> {
        std::iter::from_fn(|| turns.pop()).map(|(payer, _, item)| (payer, item)).collect()
    }

    #[test]
    fn a_small_item_comes_before_the_rest_of_a_flood() {
        let mut turns = Turns::new();
        (0..100).for_each(|number| turns.push("flood", 500, number));
        assert_eq!(turns.pop(), Some(("flood", 500, 0)));
        turns.push("neighbour", 1, 7);
        assert_eq!(turns.waiting(&"flood"), Waiting { items: 99, work: 99 * 500 });
        assert_eq!(order(&mut turns)[..2], [("neighbour", 7), ("flood", 1)]);
        assert!(turns.is_empty());
    }

    #[test]
    fn payers_share_by_cost() {
        let mut turns = Turns::new();
        (0..10).for_each(|number| turns.push("large", 4, number));
        (0..40).for_each(|number| turns.push("small", 1, number));
        let order = order(&mut turns);
        // At each moment both have been served nearly the same.
        let (mut large, mut small) = (0_i64, 0_i64);
        for (payer, _) in &order {
            *(if *payer == "large" { &mut large } else { &mut small }) += if *payer == "large" { 4 } else { 1 };
            assert!((large - small).abs() <= 5, "{large} {small}");
        }
    }

    #[test]
    fn who_is_passed_over_is_next() {
        let mut turns = Turns::new();
        turns.push("one", 1, 1);
        turns.push("other", 2, 2);
        assert_eq!(turns.pop_where(|payer, _| *payer != "one"), Some(("other", 2, 2)));
        assert!(turns.any_where(|payer, cost| (*payer, cost) == ("one", 1)) && !turns.any_where(|_, cost| cost > 1));
        assert_eq!(turns.pop_where(|_, cost| cost > 1), None);
        turns.push("third", 1, 3);
        assert_eq!(order(&mut turns), [("one", 1), ("third", 3)]);
    }

    #[test]
    fn draining_leaves_nothing() {
        let mut turns = Turns::new();
        (0..9).for_each(|number| turns.push(number % 2, 3, number));
        let mut drained: Vec<_> = turns.drain().collect();
        drained.sort_unstable();
        assert_eq!(drained, (0..9).collect::<Vec<_>>());
        assert_eq!((turns.len(), turns.pop()), (0, None));
    }

    proptest! {
        #[test]
        fn each_lane_keeps_its_order_and_nobody_starves(steps in proptest::collection::vec((0_u8..4, 1_u64..50, any::<bool>()), 1..200)) {
            let mut turns = Turns::new();
            let mut sent: HashMap<u8, VecDeque<(usize, u64)>> = HashMap::new();
            // What each payer was served since the head of each lane came to be its lane's head.
            let mut since: HashMap<u8, HashMap<u8, u64>> = HashMap::new();
            for (number, (payer, cost, pop)) in steps.into_iter().enumerate() {
                if !pop {
                    turns.push(payer, cost, number);
                    sent.entry(payer).or_default().push_back((number, cost));
                    continue;
                }
                let Some((served, cost, item)) = turns.pop() else { continue };
                prop_assert_eq!(sent.get_mut(&served).unwrap().pop_front(), Some((item, cost)));
                since.remove(&served);
                for (waiting, lane) in &sent {
                    let Some((_, head)) = lane.front().filter(|_| *waiting != served) else { continue };
                    let before = since.entry(*waiting).or_default().entry(served).or_default();
                    prop_assert!(*before <= *head + 50, "payer {} waited with {} while {} got {}", waiting, head, served, before);
                    *before += cost;
                }
            }
            prop_assert_eq!(turns.len(), sent.values().map(VecDeque::len).sum::<usize>());
        }
    }
}
