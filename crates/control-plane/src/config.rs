//! What the control plane is told at its start.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use wrenn_types::{DiskMib, MemoryMib, bounds};

use crate::edge::ProxyDomain;

/// The flags of `wrenn control-plane`.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// The address to serve the public API on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// The PostgreSQL database, for example postgres:///wrenn?host=/run/postgresql.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
    /// The Unix socket of the host agent.
    #[arg(long)]
    pub agent_socket: PathBuf,
    /// Where to write the API key that is made when the database has no team yet (mode 0600).
    #[arg(long)]
    pub first_key_file: Option<PathBuf>,
    /// The domain of host names by which ports of sandboxes are reached, PORT-SANDBOX.DOMAIN; without one they are not.
    #[arg(long, env = "WRENN_PROXY_DOMAIN", value_name = "DOMAIN")]
    pub proxy_domain: Option<ProxyDomain>,
    /// How long things may take.
    #[arg(skip)]
    pub bounds: Bounds,
}

/// Every wait has a bound, and these are they.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// A database that is still starting, at our own start.
    pub database_start: Duration,
    /// One statement of a request.
    pub database: Duration,
    /// One statement of a task that nobody waits for, or whose loss would cost more than a wait.
    pub database_patient: Duration,
    /// A create, a delete, a pause and so on until the answer is 202. Published clients give up after 30 seconds.
    pub lifecycle_answer: Duration,
    /// A create, a pause, a snapshot, a resume or a rollback in all. Absent: as long as a host may take for a sandbox of its
    /// size ([`wrenn_types::bounds`]).
    pub host_work: Option<Duration>,
    /// A destroy in all.
    pub destroy: Duration,
    /// A short question to the host agent.
    pub host: Duration,
    /// A tunnel until it is open.
    pub tunnel: Duration,
    /// A short question to a guest.
    pub guest: Duration,
    /// The next piece of a body, from a caller or from a guest.
    pub body_piece: Duration,
    /// Silence of a guest in the middle of a stream that should carry a keepalive more often.
    pub guest_silence: Duration,
    /// Silence in both directions of a connection to a port of a guest, before an answer or in the middle of it. A time in
    /// which a long poll has surely been answered.
    pub port_silence: Duration,
    /// How often a client of a stream is told that the connection still lives.
    pub ping: Duration,
    /// How long an intent may take to reach its host: a younger one that the host does not know of yet may be on
    /// its way.
    pub start_grace: Duration,
    /// The absence of a host until its sandboxes are called missing.
    pub host_missing: Duration,
    /// The time between comparisons of a host with the database, which only repair.
    pub sweep: Duration,
    /// Requests in flight when the server stops.
    pub drain: Duration,
}

impl Bounds {
    /// A create, a resume or a rollback of a sandbox of that size.
    pub(crate) fn bring_up(&self, size: Size) -> Duration {
        self.host_work.unwrap_or_else(|| bounds::bring_up(size.memory, size.disk))
    }

    /// A pause or a snapshot of a sandbox of that size.
    pub(crate) fn capture(&self, size: Size) -> Duration {
        self.host_work.unwrap_or_else(|| bounds::capture(size.memory, size.disk))
    }

    /// A snapshot of a sandbox with whichever memory and the usual disk, and a fork's children from it. An unfinished one
    /// that is older has lost its maker.
    pub(crate) fn making(&self) -> Duration {
        let size = Size::of(i32::MAX, None);
        self.capture(size) + self.bring_up(size) + self.start_grace
    }
}

/// What of a sandbox decides how long things take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) memory: MemoryMib,
    pub(crate) disk: DiskMib,
}

impl Size {
    /// From the MiB of memory and disk that the database has. A number out of bounds is taken for the largest; a disk that is
    /// left to the host is that of most hosts.
    pub(crate) fn of(memory_mb: i32, disk_mb: Option<i32>) -> Self {
        let disk = disk_mb.map_or_else(|| Ok(DiskMib::default()), |mib| DiskMib::new(mib.into()));
        Self {
            memory: MemoryMib::new(memory_mb.into()).unwrap_or(MemoryMib::LARGEST),
            disk: disk.unwrap_or(DiskMib::LARGEST),
        }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            database_start: Duration::from_secs(30),
            database: Duration::from_secs(3),
            database_patient: Duration::from_secs(10),
            lifecycle_answer: Duration::from_secs(25),
            host_work: None,
            destroy: Duration::from_secs(60),
            host: Duration::from_secs(5),
            tunnel: Duration::from_secs(8),
            guest: Duration::from_secs(30),
            body_piece: Duration::from_secs(60),
            guest_silence: Duration::from_secs(90),
            port_silence: Duration::from_secs(3600),
            ping: Duration::from_secs(30),
            start_grace: Duration::from_secs(10),
            host_missing: Duration::from_secs(20),
            sweep: Duration::from_secs(30),
            drain: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_sandbox_has_more_time_than_a_small_one_and_an_unknown_one_the_most() {
        let bounds = Bounds::default();
        let sizes = [Size::of(512, None), Size::of(4096, Some(20_480)), Size::of(65_536, Some(1_048_576))];
        for (less, more) in sizes.iter().zip(&sizes[1..]) {
            assert!(bounds.bring_up(*less) < bounds.bring_up(*more));
            assert!(bounds.capture(*less) < bounds.capture(*more));
        }
        assert_eq!(Size::of(0, Some(-1)), sizes[2]);
        assert_eq!(Size::of(4096, None), sizes[1]);
        assert!(bounds.making() > bounds.capture(sizes[1]) + bounds.bring_up(sizes[1]));
        let short = Bounds { host_work: Some(Duration::from_secs(2)), ..Bounds::default() };
        assert_eq!(short.bring_up(sizes[2]), Duration::from_secs(2));
    }
}
