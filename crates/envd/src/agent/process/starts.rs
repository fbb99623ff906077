//! Which threads a start may use: it has those of all that may wait for the same.
//!
//! | a start | may wait for |
//! |---|---|
//! | in `/`, of a program that is named in a directory of the system | nothing but the disk that the guest runs from |
//! | the usual: in the default directory or the home, or of a program that is searched for | those, and what the guest's own search path names |
//! | elsewhere: the request names another directory, program or search path | whatever the request names |
//!
//! So whatever does not answer that a request names, the usual starts go on; and where a home does not answer, one can
//! still start a program that looks into it.

use wrenn_proto::process::ProcessConfig;

use super::launch::DEFAULT_PATH;
use crate::agent::threads::Threads;

/// How many threads each kind has.
const ROOT: usize = 8;
const USUAL: usize = 16;
const ELSEWHERE: usize = 16;
/// How many all of them have.
pub(crate) const THREADS: usize = ROOT + USUAL + ELSEWHERE;

/// What a start may have to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Root,
    Usual,
    Elsewhere,
}

impl Reach {
    /// By what the request says, without a look at what is there: that look might be what is not answered.
    fn of(config: &ProcessConfig) -> Self {
        let directory = config.cwd.as_deref().filter(|path| !path.is_empty());
        let place = config.cmd.rsplit_once('/').map(|(place, _)| place);
        let of_the_system = |place| DEFAULT_PATH.split(':').any(|directory| directory == place);
        match (directory, place) {
            (Some(directory), _) if directory != "/" => Self::Elsewhere,
            (_, Some(place)) if !of_the_system(place) => Self::Elsewhere,
            (_, None) if config.envs.contains_key("PATH") => Self::Elsewhere,
            (Some(_), Some(_)) => Self::Root,
            (None, _) | (_, None) => Self::Usual,
        }
    }
}

/// The threads on which processes start.
#[derive(Debug)]
pub(crate) struct Starts {
    root: Threads,
    usual: Threads,
    elsewhere: Threads,
}

impl Default for Starts {
    fn default() -> Self {
        Self { root: Threads::new(ROOT), usual: Threads::new(USUAL), elsewhere: Threads::new(ELSEWHERE) }
    }
}

impl Starts {
    /// Those that such a start may use.
    pub(super) fn of(&self, config: &ProcessConfig) -> &Threads {
        match Reach::of(config) {
            Reach::Root => &self.root,
            Reach::Usual => &self.usual,
            Reach::Elsewhere => &self.elsewhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_names_says_what_its_start_may_wait_for() {
        let table = [
            ("/bin/sh", Some("/"), None, Reach::Root),
            ("/usr/bin/env", Some("/"), Some("/mnt"), Reach::Root),
            ("sh", Some("/"), None, Reach::Usual),
            ("sh", None, None, Reach::Usual),
            ("/bin/bash", None, None, Reach::Usual),
            ("/bin/bash", Some(""), Some("/mnt"), Reach::Usual),
            ("sh", None, Some("/mnt"), Reach::Elsewhere),
            ("sh", Some("/"), Some("/mnt"), Reach::Elsewhere),
            ("/bin/sh", Some("/mnt"), None, Reach::Elsewhere),
            ("/bin/sh", Some("~"), None, Reach::Elsewhere),
            ("/mnt/sh", None, None, Reach::Elsewhere),
            ("/mnt/sh", Some("/"), None, Reach::Elsewhere),
            ("/bin/../mnt/sh", None, None, Reach::Elsewhere),
            ("./sh", Some("/"), None, Reach::Elsewhere),
            ("bin/sh", None, None, Reach::Elsewhere),
            ("/sh", None, None, Reach::Elsewhere),
        ];
        for (command, directory, path, reach) in table {
            let config = ProcessConfig {
                cmd: command.to_owned(),
                cwd: directory.map(str::to_owned),
                envs: path.map(|path| ("PATH".to_owned(), path.to_owned())).into_iter().collect(),
                ..Default::default()
            };
            assert_eq!(Reach::of(&config), reach, "{command} {directory:?} {path:?}");
        }
    }
}
