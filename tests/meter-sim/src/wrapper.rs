//! The DLMS wrapper for TCP (IEC 62056-4-7): `0001 ‖ source port ‖ destination port ‖ length ‖
//! APDU`, two bytes each, big endian.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// An APDU with its addresses. An APDU has at most 65,535 bytes, so a frame is bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The sender's port: the client SAP in requests.
    pub source: u16,
    /// The receiver's port: the logical device in requests, 1 for the management device.
    pub destination: u16,
    /// The APDU.
    pub apdu: Vec<u8>,
}

impl Frame {
    /// Reads a frame; `None` if the peer closed the connection between two frames. Another version
    /// is `InvalidData`, an end in the middle `UnexpectedEof`.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut first = [0];
        if stream.read(&mut first).await? == 0 {
            return Ok(None);
        }
        let mut rest = [0; 7];
        stream.read_exact(&mut rest).await?;
        let [version_high] = first;
        let [version_low, s1, s2, d1, d2, l1, l2] = rest;
        if u16::from_be_bytes([version_high, version_low]) != VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the wrapper's version is not 1"));
        }
        let length = u16::from_be_bytes([l1, l2]);
        let mut apdu = vec![0; length.into()];
        stream.read_exact(&mut apdu).await?;
        Ok(Some(Self { source: u16::from_be_bytes([s1, s2]), destination: u16::from_be_bytes([d1, d2]), apdu }))
    }

    /// Writes the frame. An APDU of more than 65,535 bytes is `InvalidInput`.
    pub async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let length = u16::try_from(self.apdu.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the APDU is longer than a wrapper frame"))?;
        let mut bytes = Vec::with_capacity(HEADER_LENGTH + self.apdu.len());
        for field in [VERSION, self.source, self.destination, length] {
            bytes.extend(field.to_be_bytes());
        }
        bytes.extend(&self.apdu);
        stream.write_all(&bytes).await?;
        stream.flush().await
    }

    /// The frame that answers this one with `apdu`.
    pub fn answer(&self, apdu: Vec<u8>) -> Self {
        Self { source: self.destination, destination: self.source, apdu }
    }
}

const VERSION: u16 = 1;
const HEADER_LENGTH: usize = 8;
