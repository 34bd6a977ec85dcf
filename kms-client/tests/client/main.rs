//! The client through its public interface: the worked vector of the guide, everything that must be
//! refused, and sessions with a server that breaks off, and the relay of transfers.

#[cfg(test)]
mod documented;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod relay;
#[cfg(test)]
mod sessions;
#[cfg(test)]
mod support;
#[cfg(test)]
mod vector;
