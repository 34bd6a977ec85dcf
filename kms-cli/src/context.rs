//! What a command works with: the client profile, the connection to the server, and the output.

use kms_client::{Connection, Profile, StateDirectory};

use crate::{
    arguments::GlobalArguments,
    failure::Failure,
    output::{self, Output},
    progress,
};

/// What every command needs.
pub(crate) struct Context {
    pub(crate) global: GlobalArguments,
    pub(crate) output: Output,
}

impl Context {
    /// The folder of `--state`.
    pub(crate) fn state(&self) -> StateDirectory {
        StateDirectory::new(&self.global.state)
    }

    /// The profile of `--profile`, KMS_PROFILE or the state folder's default.
    pub(crate) fn profile(&self) -> Result<Profile, Failure> {
        let state = self.state();
        let folder = self.global.state.display();
        let Some(name) = self.global.profile.clone().or_else(|| state.default_profile()) else {
            let names = state.profile_names();
            return Err(Failure::usage(if names.is_empty() {
                format!(
                    "no profile in `{folder}`: start a server with `kms-dev`, get a profile from an officer, or name the folder with --state"
                )
            } else {
                format!(
                    "no profile is selected: give --profile NAME, or write a name into `{folder}/default-profile`; profiles: {}",
                    names.join(", ")
                )
            }));
        };
        state.profile(&name).map_err(|error| {
            let names = state.profile_names();
            if names.contains(&name) || names.is_empty() {
                error.into()
            } else {
                Failure::usage(format!("no profile `{name}` in `{folder}`; profiles: {}", names.join(", ")))
            }
        })
    }

    /// The server of the profile, connected.
    pub(crate) async fn connect(&self) -> Result<Connection, Failure> {
        let profile = self.profile()?;
        // In time: a certificate that has ended can only be replaced by other people.
        if let Some(warning) = profile
            .certificate_not_after_ms()
            .and_then(|end| output::ends_soon(end, jiff::Timestamp::now().as_millisecond()))
        {
            eprintln!("warning: your certificate {warning}: renew it with `kms principal renew`");
        }
        Ok(progress::waiting(&format!("connecting to {}", profile.server()), Connection::connect(&profile)).await?)
    }
}
