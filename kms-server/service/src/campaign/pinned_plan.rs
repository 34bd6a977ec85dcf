//! The plan of a campaign as it was approved: a chain of digests over its chunks.

use std::sync::Arc;

use kms_domain::{CampaignId, PlanChain, SystemTitle};

/// The digest of the chain after each chunk of a plan, once the whole chain was verified.
#[derive(Clone)]
pub(super) struct PlanLinks {
    campaign: CampaignId,
    digests: Arc<[[u8; 32]]>,
}

impl PlanLinks {
    pub(super) fn new(campaign: CampaignId, digests: Vec<[u8; 32]>) -> Self {
        Self { campaign, digests: digests.into() }
    }

    /// Whether these octets are chunk `number` of the approved plan (I5, I6).
    pub(super) fn fits(&self, number: u64, chunk: &[u8]) -> bool {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        let before = match at.checked_sub(1) {
            None => Some(PlanChain::new(self.campaign)),
            Some(before) => self.digests.get(before).copied().map(PlanChain::from_digest),
        };
        before.is_some_and(|link| Some(link.link(chunk).digest()) == self.digests.get(at).copied())
    }
}

/// The meters of a chunk.
pub(super) fn titles_of(chunk: &[u8]) -> impl Iterator<Item = SystemTitle> {
    chunk.chunks_exact(8).filter_map(|title| SystemTitle::from_octets(title).ok())
}
