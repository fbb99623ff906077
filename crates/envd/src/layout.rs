//! Names that init and the agent share.

/// The line on the console that tells the host that the agent listens.
pub(crate) const READY_LINE: &str = "wrenn-guest ready";
/// Where the unified cgroup hierarchy is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";
/// The cgroup in which the processes of users are born.
pub(crate) const USER_CGROUP: &str = "/sys/fs/cgroup/user";
