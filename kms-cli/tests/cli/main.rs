//! `kms` as its users see it: what it accepts, says, writes, and exits with.

#[cfg(test)]
mod command_line;
#[cfg(test)]
mod with_server;
#[cfg(test)]
mod work_order_mock;
#[cfg(test)]
mod work_orders;
