//! `kms` as its users see it: what it accepts, says, writes, and exits with.

#[cfg(test)]
mod command_line;
#[cfg(test)]
mod with_server;
