//! What the control plane is told at its start.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

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
    /// A create in all. The first one of a shape boots the guest's kernel.
    pub create: Duration,
    /// A pause or a snapshot in all. All that a sandbox has in memory is written.
    pub capture: Duration,
    /// A resume or a rollback in all, and longer for each GiB that a sandbox has: one that was paused without its memory
    /// boots, and its kernel clears all of that first.
    pub resume: Duration,
    /// See there.
    pub resume_per_gib: Duration,
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
    /// A resume or a rollback of a sandbox of so many MiB.
    pub(crate) fn resume_of(&self, memory_mib: i32) -> Duration {
        let gibibytes = u32::try_from(memory_mib).unwrap_or_default().div_ceil(1024);
        self.resume + self.resume_per_gib * gibibytes
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            database_start: Duration::from_secs(30),
            database: Duration::from_secs(3),
            database_patient: Duration::from_secs(10),
            lifecycle_answer: Duration::from_secs(25),
            create: Duration::from_secs(180),
            capture: Duration::from_secs(300),
            resume: Duration::from_secs(180),
            resume_per_gib: Duration::from_secs(30),
            destroy: Duration::from_secs(60),
            host: Duration::from_secs(5),
            tunnel: Duration::from_secs(8),
            guest: Duration::from_secs(30),
            body_piece: Duration::from_secs(60),
            guest_silence: Duration::from_secs(90),
            ping: Duration::from_secs(30),
            start_grace: Duration::from_secs(10),
            host_missing: Duration::from_secs(20),
            sweep: Duration::from_secs(30),
            drain: Duration::from_secs(10),
        }
    }
}
