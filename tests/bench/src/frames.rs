//! Frames protected and opened inside the HSM, for head-ends that hold no keys. Simulated meters
//! with the keys of their shipment check the first, and make what is opened by the second.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use bytes::Bytes;
use kms_client::proto::{
    CipheredFrame, FrameForm, FrameResult, PlainFrame, ProtectRequest, Purpose, UnprotectRequest,
    frame_result::Result as Outcome,
};
use meter_sim::{Connection as Line, Meter, MeterConfig, SystemTitle, config::SecuritySetupConfig};
use serde::Deserialize;

use crate::{
    Failure,
    island::{Island, request_id, title},
    measure::{Random, Run},
};

/// The head-end's requests.
pub(crate) struct Frames<'a> {
    island: &'a Island,
    /// Every meter has a number up to this one.
    meters: u64,
    turn: Cell<u64>,
    /// Ciphered answers of simulated meters.
    answers: Vec<CipheredFrame>,
}

impl<'a> Frames<'a> {
    /// Has a request to every simulated meter protected, and takes their answers. `devices` is the
    /// plaintext list of their vendor; their numbers begin with `first`.
    pub(crate) async fn prepare(island: &'a Island, meters: u64, first: u64, devices: &[u8]) -> Result<Self, Failure> {
        let mut frames = Self { island, meters, turn: Cell::new(0), answers: Vec::new() };
        let mut lines = Vec::new();
        for device in devices.split(|octet| *octet == b'\n').filter(|line| !line.is_empty()) {
            let device: Device = serde_json::from_slice(device)?;
            let setup = device.security_setups.into_iter().next().ok_or("the device has no security setup")?;
            let meter = Meter::new(MeterConfig::ordinary(device.system_title, device.security_suite, setup))?;
            lines.push(Line::pre_established(
                meter,
                MANAGEMENT_CLIENT,
                SystemTitle::new(island.head_end.client_title.octets()),
            )?);
        }
        let numbers: Vec<u64> = (first..).take(lines.len()).collect();
        for (result, (number, line)) in
            frames.protected(&numbers).await?.into_iter().zip(numbers.iter().zip(&mut lines))
        {
            let answer = line
                .exchange(&octets(result)?)
                .ok_or_else(|| format!("simulated meter {number} did not accept the protected frame"))?;
            frames.answers.push(CipheredFrame {
                meter: title(*number).to_vec().into(),
                apdu: answer.into(),
                ..CipheredFrame::default()
            });
        }
        // A GET response with data: the frame was opened, and opened right.
        let opened = frames.opened(frames.answers.clone()).await?;
        for result in opened {
            if !octets(result)?.starts_with(&[0xC4, 0x01]) {
                return Err("a meter's answer was not opened to a GET response".into());
            }
        }
        Ok(frames)
    }

    /// Protects frames for random meters, so many in a call.
    pub(crate) async fn protect(&self, lanes: usize, size: usize, time: Duration) -> Result<Run, Failure> {
        let random = RefCell::new(Random::new(3));
        let call = || {
            let numbers = random.borrow_mut().distinct(size, self.meters);
            async move {
                let results = self.protected(&numbers).await?;
                let count = results.len() as u64;
                results.into_iter().try_for_each(|result| octets(result).map(drop))?;
                Ok(Some(count))
            }
        };
        self.island.load.in_flight(lanes, time, call).await
    }

    /// Opens frames of simulated meters, so many in a call.
    pub(crate) async fn unprotect(&self, lanes: usize, size: usize, time: Duration) -> Result<Run, Failure> {
        let call = || {
            let turn = usize::try_from(self.turn.get()).unwrap_or_default();
            let frames: Vec<CipheredFrame> =
                self.answers.iter().cycle().skip(turn * size % self.answers.len().max(1)).take(size).cloned().collect();
            async move {
                let results = self.opened(frames).await?;
                let count = results.len() as u64;
                results.into_iter().try_for_each(|result| octets(result).map(drop))?;
                Ok(Some(count))
            }
        };
        self.island.load.in_flight(lanes, time, call).await
    }

    async fn protected(&self, numbers: &[u64]) -> Result<Vec<FrameResult>, Failure> {
        let client_title: Bytes = self.island.head_end.client_title.octets().to_vec().into();
        let frame = |number: &u64| PlainFrame {
            meter: title(*number).to_vec().into(),
            client_title: client_title.clone(),
            form: FrameForm::Glo.into(),
            apdu: Bytes::from_static(&GET_ENERGY),
            ..PlainFrame::default()
        };
        // The meters have live leases from the grants before.
        let request = ProtectRequest {
            request_id: request_id(),
            purpose: Purpose::Read.into(),
            frames: numbers.iter().map(frame).collect(),
            supersede_lease: true,
        };
        Ok(self.island.head_end.connection(self.next())?.frames().protect(request).await?.into_inner().results)
    }

    async fn opened(&self, frames: Vec<CipheredFrame>) -> Result<Vec<FrameResult>, Failure> {
        let request = UnprotectRequest { purpose: Purpose::Read.into(), frames };
        Ok(self.island.head_end.connection(self.next())?.frames().unprotect(request).await?.into_inner().results)
    }

    fn next(&self) -> u64 {
        self.turn.replace(self.turn.get() + 1)
    }
}

fn octets(result: FrameResult) -> Result<Bytes, Failure> {
    match result.result {
        Some(Outcome::Apdu(octets)) => Ok(octets),
        Some(Outcome::Refusal(refusal)) => Err(format!("a frame was refused: {}", refusal.message).into()),
        None => Err("a frame without a result".into()),
    }
}

/// A device of the vendor's plaintext list.
#[derive(Deserialize)]
struct Device {
    system_title: SystemTitle,
    security_suite: meter_sim::SecuritySuite,
    security_setups: Vec<SecuritySetupConfig>,
}

/// GET of the active energy register, 1.0.1.8.0.255 attribute 2.
const GET_ENERGY: [u8; 13] = [0xC0, 0x01, 0xC1, 0x00, 0x03, 0x01, 0x00, 0x01, 0x08, 0x00, 0xFF, 0x02, 0x00];
const MANAGEMENT_CLIENT: u16 = 1;
