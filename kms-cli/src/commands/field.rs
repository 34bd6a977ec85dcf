//! `kms field`: this machine as a handheld. The work is in `kms_client::field`.

use std::{
    fs,
    io::{self, BufRead, IsTerminal as _, Read as _},
    path::{Path, PathBuf},
};

use kms_client::field::{Device, EnrolmentCode, EnrolmentServer, Pin};
use serde_json::json;
use zeroize::Zeroizing;

use crate::{
    arguments::field::{FieldCommand, PinSource},
    context::Context,
    failure::Failure,
    json, output,
    output::facts,
    progress::waiting,
};

pub(crate) async fn run(command: FieldCommand, context: &Context) -> Result<(), Failure> {
    match command {
        FieldCommand::Enrol { server, code, server_name, new_profile, pin } => {
            let server = EnrolmentServer::parse(&server, server_name.as_deref())?;
            let code = EnrolmentCode::parse(&typed_code(code)?)?;
            let name = new_profile.unwrap_or_else(|| code.name().to_owned());
            let directory = context.state().profile_directory(&name);
            if Device::is_in(&directory) || directory.join("profile.toml").exists() {
                return Err(Failure::failed(format!(
                    "`{}` exists and is not overwritten: choose another --new-profile",
                    directory.display()
                )));
            }
            let pin = new_pin(&pin)?;
            let enrolling = Device::enrol(directory, &server, &code, &pin);
            let device = waiting("enrolling", enrolling).await?;
            show(&device, &format!("\nNext:\n  kms --profile {name} field status\n"), context);
            Ok(())
        }
        FieldCommand::Status { pin } => {
            let device = unlock(&pin, context)?;
            let next = if device.is_renewal_due() { renew_it(&device_name(context)?) } else { String::new() };
            show(&device, &next, context);
            Ok(())
        }
        FieldCommand::Renew { pin } => {
            let mut device = unlock(&pin, context)?;
            if !device.is_renewal_due() {
                show(&device, "\nnot renewed: the second half of its validity has not begun\n", context);
                return Ok(());
            }
            waiting("renewing", device.renew()).await?;
            show(&device, "", context);
            Ok(())
        }
    }
}

/// The next step, for the profile that is shown and not the default one.
fn renew_it(profile: &str) -> String {
    format!("\nrenew it: kms --profile {profile} field renew\n")
}

fn show(device: &Device, next: &str, context: &Context) {
    let end = device.certificate_not_after_ms().unwrap_or_default();
    let (directory, due) = (device.directory().display().to_string(), device.is_renewal_due());
    context.output.show(
        || {
            json!({
                "handheld": device.handheld(),
                "technician": device.technician(),
                "assurance": device.assurance().name(),
                "server": device.server(),
                "certificate_not_after": json::time(end),
                "renewal_due": due,
                "directory": directory,
            })
        },
        || {
            let named = [
                ("handheld", device.handheld().to_owned()),
                ("technician", device.technician().to_owned()),
                ("assurance", device.assurance().name().to_owned()),
                ("server", device.server().to_owned()),
                ("certificate until", output::time(end)),
                ("folder", directory.clone()),
            ];
            format!("{}{next}", facts(named))
        },
    );
}

/// The device of `--profile`.
fn unlock(source: &PinSource, context: &Context) -> Result<Device, Failure> {
    let directory = device_directory(context)?;
    Ok(Device::unlock(directory, &pin("PIN: ", source)?)?)
}

/// The profile of the device.
fn device_name(context: &Context) -> Result<String, Failure> {
    let name = context.global.profile.clone().or_else(|| context.state().default_profile());
    name.ok_or_else(|| Failure::usage("no handheld is selected: give --profile NAME"))
}

fn device_directory(context: &Context) -> Result<PathBuf, Failure> {
    let name = device_name(context)?;
    let directory = context.state().profile_directory(&name);
    if Device::is_in(&directory) {
        return Ok(directory);
    }
    Err(Failure::usage(format!("the profile `{name}` is no handheld: enrol one with `kms field enrol`")))
}

/// The code of the argument, or for `-` the one that is typed or piped.
fn typed_code(code: String) -> Result<Zeroizing<String>, Failure> {
    let code = Zeroizing::new(code);
    if code.as_str() != "-" {
        return Ok(code);
    }
    let asked = io::stdin().is_terminal();
    if asked {
        eprint!("One-time code: ");
    }
    let read = read_code(io::stdin().lock(), asked);
    read.map_err(|error| Failure::failed(format!("cannot read the code from standard input: {error}")))
}

/// The first line that a person types, or all that a pipe has.
fn read_code(input: impl BufRead, one_line: bool) -> io::Result<Zeroizing<String>> {
    let mut code = Zeroizing::new(String::with_capacity(LONGEST_LINE));
    let mut input = input.take(LONGEST_LINE as u64);
    if one_line {
        input.read_line(&mut code)?
    } else {
        input.read_to_string(&mut code)?
    };
    Ok(code)
}

/// A PIN that is set: typed twice.
fn new_pin(source: &PinSource) -> Result<Pin, Failure> {
    if source.pin_file.is_some() {
        return pin("", source);
    }
    let (first, again) = (typed_pin("New PIN, better four words than six digits: ")?, typed_pin("The same again: ")?);
    if first != again {
        return Err(Failure::usage("the two PINs differ: nothing was done"));
    }
    Ok(Pin::new(&first)?)
}

fn pin(prompt: &str, source: &PinSource) -> Result<Pin, Failure> {
    let text = match &source.pin_file {
        Some(path) => pin_of(path)?,
        None => typed_pin(prompt)?,
    };
    Ok(Pin::new(&text)?)
}

fn typed_pin(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage("no terminal to ask for the PIN: add --pin-file FILE"));
    }
    let typed = rpassword::prompt_password(prompt);
    typed.map(Zeroizing::new).map_err(|error| Failure::failed(format!("cannot read the PIN: {error}")))
}

/// The first line of a file, which nobody else may read; a pipe has no such mode.
fn pin_of(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let refuse = |error: io::Error| Failure::failed(format!("cannot read the PIN from `{}`: {error}", path.display()));
    let file = fs::File::open(path).map_err(refuse)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let metadata = file.metadata().map_err(refuse)?;
        let mode = metadata.permissions().mode() & 0o777;
        if metadata.is_file() && mode & 0o077 != 0 {
            return Err(Failure::failed(format!(
                "`{0}` can be read by other users (mode {mode:04o}): `chmod 600 {0}`",
                path.display()
            )));
        }
    }
    let mut text = Zeroizing::new(String::with_capacity(LONGEST_LINE));
    file.take(LONGEST_LINE as u64).read_to_string(&mut text).map_err(refuse)?;
    let length = text.find(['\r', '\n']).unwrap_or(text.len());
    text.truncate(length);
    Ok(text)
}

/// More than a PIN or a code has.
const LONGEST_LINE: usize = 1_024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_renewal_is_of_the_profile_that_is_shown() {
        assert!(renew_it("h-17").contains("kms --profile h-17 field renew"));
    }

    #[test]
    fn a_typed_code_is_one_line_and_a_piped_one_is_everything() {
        let typed = b"h-17/7H2K\nthe next answer\n";
        assert_eq!(read_code(&typed[..], true).unwrap().as_str(), "h-17/7H2K\n");
        assert_eq!(read_code(&b"h-17/7H2K\n-9ABC\n"[..], false).unwrap().as_str(), "h-17/7H2K\n-9ABC\n");
    }
}
