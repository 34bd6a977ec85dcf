//! Plain requests that the server makes itself, to have a meter prove that it holds its keys.

use crate::{HlsGmac, Target};

impl HlsGmac {
    /// The plain action-request-normal `reply_to_HLS_authentication` (method 1 of the current
    /// association, class 15, 0.0.40.0.0.255) with this answer f(StoC) to the meter's challenge: 34
    /// octets. Invoke-id-and-priority: bits 0–3 the invoke id, 6 confirmed, 7 high priority.
    pub fn reply_to_hls_authentication(&self, invoke_id_and_priority: u8) -> Vec<u8> {
        let answer = self.octets();
        let mut request = vec![0xC3, NORMAL, invoke_id_and_priority];
        push_target(&mut request, REPLY_TO_HLS_AUTHENTICATION);
        // method-invocation-parameters: present, an octet-string of 17
        request.extend_from_slice(&[1, 0x09, 17]);
        request.extend_from_slice(&answer);
        request
    }
}

impl Target {
    /// The plain get-request-normal that reads this attribute, without selective access: 13 octets.
    /// Invoke-id-and-priority: bits 0–3 the invoke id, 6 confirmed, 7 high priority.
    pub fn get_request_normal(self, invoke_id_and_priority: u8) -> Vec<u8> {
        let mut request = vec![0xC0, NORMAL, invoke_id_and_priority];
        push_target(&mut request, self);
        request.push(0);
        request
    }
}

fn push_target(request: &mut Vec<u8>, target: Target) {
    request.extend_from_slice(&target.class_id.to_be_bytes());
    request.extend_from_slice(&target.obis);
    request.extend_from_slice(&target.member.to_be_bytes());
}

const NORMAL: u8 = 1;
const REPLY_TO_HLS_AUTHENTICATION: Target = Target { class_id: 15, obis: [0, 0, 40, 0, 0, 255], member: 1 };
