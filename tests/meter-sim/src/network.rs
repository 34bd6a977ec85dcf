//! The network between client and meter, with its faults.

use std::time::Duration;

use tokio::time::sleep;

use crate::Connection;
use crate::behaviour::Fault;
use crate::meter::HeldRequest;

/// The answers to one request: none, one, or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// The APDUs that arrive at the client, in order.
    pub answers: Vec<Vec<u8>>,
    /// Whether the connection ends afterwards.
    pub closes: bool,
}

impl Connection {
    /// Executes one request like [`Connection::exchange`], with the faults that the meter's script
    /// has for it. Delays take real time of the runtime's clock.
    pub async fn deliver(&mut self, apdu: &[u8]) -> Delivery {
        let kind = self.request_kind(apdu);
        let (faults, number) = {
            let mut state = self.meter().lock();
            (state.count_request(kind), state.exchanges)
        };
        let mut delivery = self.deliver_one(apdu, &faults, number).await;
        let due: Vec<HeldRequest> =
            self.meter().lock().held.extract_if(.., |held| held.until_exchange <= number).collect();
        for held in due {
            let answer = self.exchange(&held.apdu);
            if held.answered {
                delivery.answers.extend(answer);
            }
        }
        delivery
    }

    async fn deliver_one(&mut self, apdu: &[u8], faults: &[Fault], number: u64) -> Delivery {
        let mut delivery = Delivery::default();
        for fault in faults {
            match fault {
                Fault::LoseRequest => return delivery,
                Fault::PowerCycleBefore => {
                    self.meter().power_cycle();
                    return delivery;
                }
                Fault::HoldRequest(later) | Fault::HoldRequestAndAnswer(later) => {
                    self.meter().lock().held.push(HeldRequest {
                        apdu: apdu.to_vec(),
                        until_exchange: number + u64::from((*later).max(1)),
                        answered: matches!(fault, Fault::HoldRequestAndAnswer(_)),
                    });
                    return delivery;
                }
                Fault::DelayRequest(milliseconds) => {
                    sleep(Duration::from_millis((*milliseconds).into())).await;
                }
                Fault::AppliedButError(_) | Fault::RefusedWithoutApplying(_) | Fault::SuccessWithoutApplying => {
                    self.meter().lock().transfer_fault = Some(fault.clone());
                }
                _ => {}
            }
        }
        let before = self.previous_answer.clone();
        delivery.answers.extend(self.exchange(apdu));
        // The fault is for this request only, whether or not it was a key_transfer.
        self.meter().lock().transfer_fault = None;
        for fault in faults {
            match fault {
                Fault::LoseAnswer => delivery.answers.clear(),
                Fault::PowerCycleBeforeAnswer => {
                    self.meter().power_cycle();
                    delivery.answers.clear();
                }
                Fault::PowerCycleAfter => self.meter().power_cycle(),
                Fault::CloseConnection => {
                    delivery.answers.clear();
                    delivery.closes = true;
                }
                Fault::DelayAnswer(milliseconds) => {
                    sleep(Duration::from_millis((*milliseconds).into())).await;
                }
                Fault::DuplicateRequest => delivery.answers.extend(self.exchange(apdu)),
                Fault::DuplicateAnswer => delivery.answers.extend(delivery.answers.clone()),
                Fault::WrongAnswer(answer) => delivery.answers = vec![answer.0.clone()],
                Fault::RepeatPreviousAnswer => {
                    delivery.answers = before.iter().cloned().collect();
                }
                Fault::CorruptAnswer(from_end) => {
                    if let Some(byte) =
                        delivery.answers.last_mut().and_then(|answer| answer.iter_mut().rev().nth((*from_end).into()))
                    {
                        *byte ^= 1;
                    }
                }
                _ => {}
            }
        }
        delivery
    }
}
