//! How much harm a frame could do to a meter.

use crate::frame::{CosemTarget, FrameService};

/// How much harm a frame could do to a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Criticality {
    /// Nothing beyond its purpose.
    Ordinary,
    /// Switch supply, or make the meter do so later.
    SupplyControl,
    /// Change keys, certificates, passwords or access rights.
    SecuritySetup,
    /// Change the firmware.
    ImageTransfer,
}

impl Criticality {
    /// The values that can do harm.
    pub const CRITICAL: [Self; 3] = [Self::SupplyControl, Self::SecuritySetup, Self::ImageTransfer];

    /// The criticality of a service on an object. Source: DLMS UA 1000-1 (Blue Book), interface
    /// classes. A class that can run a script which switches supply counts as one that switches it.
    pub const fn of(service: FrameService, target: Option<&CosemTarget>) -> Self {
        let Some(target) = target else { return Self::Ordinary };
        if target.class_id == 30 {
            // Data protection carries a request that cannot be read here, even in a get-request.
            return Self::SecuritySetup;
        }
        if !matches!(service, FrameService::Set | FrameService::Action) {
            return Self::Ordinary;
        }
        match (target.class_id, target.member) {
            // reply_to_HLS_authentication: every association begins with it.
            (15, 1) if matches!(service, FrameService::Action) => Self::Ordinary,
            // Association SN and LN, security setup.
            (12 | 15 | 64, _) => Self::SecuritySetup,
            // M-Bus client, from data_send on: raw data to the child (a valve, say), and its keys.
            (72, 6..) if matches!(service, FrameService::Action) => Self::SecuritySetup,
            (18, _) => Self::ImageTransfer,
            // Script table, schedule, activity calendar, register monitor, single action schedule,
            // parameter monitor, sensor manager, arbitrator, disconnect control, limiter; account,
            // credit, charge and token gateway of prepayment.
            (9 | 10 | 20 | 21 | 22 | 65 | 67 | 68 | 70 | 71 | 111..=113 | 115, _) => Self::SupplyControl,
            _ => Self::Ordinary,
        }
    }

    /// The name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::SupplyControl => "supply-control",
            Self::SecuritySetup => "security-setup",
            Self::ImageTransfer => "image-transfer",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_harm_is_told_by_class_and_member() {
        use Criticality::{ImageTransfer, Ordinary, SecuritySetup, SupplyControl};
        let of = |service, class_id, member| {
            Criticality::of(service, Some(&CosemTarget { class_id, obis: [0, 0, 96, 3, 0, 255], member }))
        };
        for (class_id, member, expected) in [
            (70, 1, SupplyControl),
            (64, 2, SecuritySetup),
            (18, 4, ImageTransfer),
            (9, 1, SupplyControl),
            (72, 7, SecuritySetup),
        ] {
            assert_eq!(of(FrameService::Action, class_id, member), expected, "{class_id}");
        }
        for (class_id, member) in [(15, 1), (3, 1), (72, 1)] {
            assert_eq!(of(FrameService::Action, class_id, member), Ordinary, "{class_id}");
        }
        assert_eq!(of(FrameService::Set, 71, 3), SupplyControl);
        assert_eq!(of(FrameService::Get, 70, 2), Ordinary);
        assert_eq!(of(FrameService::Get, 30, 2), SecuritySetup);
    }
}
