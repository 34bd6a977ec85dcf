//! The PKCS#11 modules that are measured.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use serde::Serialize;

use crate::Failure;

/// A PKCS#11 module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Module {
    /// The module of this workspace.
    HsmSim,
    /// SoftHSM2, as the distribution packages it.
    Softhsm2,
}

impl Module {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::HsmSim => "hsm-sim",
            Self::Softhsm2 => "SoftHSM2",
        }
    }

    /// Where its library is.
    pub(crate) fn path(self) -> Result<PathBuf, Failure> {
        let program = env::current_exe()?;
        let beside = program.parent().ok_or("this program has no folder")?;
        let (places, hint): (Vec<PathBuf>, _) = match self {
            Self::HsmSim => (vec![beside.join("libhsm_sim.so")], "build it with `cargo build --release -p hsm-sim`"),
            Self::Softhsm2 => (
                SOFTHSM_PLACES.iter().map(PathBuf::from).collect(),
                "install it (Debian: `apt-get install softhsm2`), or leave it out with `--module hsm-sim`",
            ),
        };
        let found = places.iter().find(|place| place.exists());
        Ok(found
            .ok_or_else(|| {
                format!(
                    "{} is not in `{}`: {hint}",
                    self.name(),
                    places.first().map(|place| place.display().to_string()).unwrap_or_default()
                )
            })?
            .clone())
    }

    /// Makes a folder for its tokens, and gives the environment that a process needs to find them.
    pub(crate) fn environment(self, directory: &Path) -> Result<Vec<(&'static str, PathBuf)>, Failure> {
        let tokens = directory.join("tokens");
        fs::create_dir_all(&tokens)?;
        match self {
            Self::HsmSim => Ok(vec![("HSM_SIM_DIR", tokens)]),
            Self::Softhsm2 => {
                let configuration = directory.join("softhsm2.conf");
                fs::write(
                    &configuration,
                    format!(
                        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                        tokens.display()
                    ),
                )?;
                Ok(vec![("SOFTHSM2_CONF", configuration)])
            }
        }
    }
}

const SOFTHSM_PLACES: [&str; 3] =
    ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"];
