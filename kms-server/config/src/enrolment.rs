//! `[enrolment]`: the listener for devices that have no certificate yet.

use std::net::SocketAddr;

use serde::Deserialize;

/// `[enrolment]`: a listener that takes no client certificate and enrols handhelds. Without this
/// section there is none.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolmentSection {
    /// Address and port.
    pub listen: SocketAddr,
    /// `HOST:PORT` of the ordinary listener, as devices reach it. Default: the host at which a
    /// device reached this listener, with the port of `listen` outside this section.
    pub server: Option<String>,
}

impl EnrolmentSection {
    /// Host and port of `server`.
    pub fn server(&self) -> Option<(&str, u16)> {
        let (host, port) = self.server.as_deref()?.rsplit_once(':')?;
        Some((host, port.parse().ok()?)).filter(|(host, _)| !host.is_empty())
    }

    /// Checks what belongs together.
    ///
    /// # Errors
    /// `server` is not HOST:PORT.
    pub(crate) fn check(&self) -> Result<(), String> {
        match &self.server {
            Some(server) if self.server().is_none() => {
                Err(format!("[enrolment] server: `{server}` is not HOST:PORT, as devices reach the ordinary listener"))
            }
            _ => Ok(()),
        }
    }
}
