//! Which files the machines of this host may write to, as the kernel has it.

use std::{collections::BTreeSet, fs, io, os::unix::fs::MetadataExt};

use camino::Utf8Path;
use rustix::io::Errno;
use wrenn_host_linux::process::find_by_argument;

/// A file, whatever its names: device and inode.
type Identity = (u64, u64);

/// Files that are open for writing.
#[derive(Debug, Default)]
pub(super) struct Written(BTreeSet<Identity>);

impl Written {
    /// The files that processes with such an argument have open for writing, now. A process that ends meanwhile has
    /// none.
    ///
    /// # Errors
    /// `/proc` cannot be read: then nothing is known.
    pub(super) fn by(mark: &str) -> io::Result<Self> {
        let mut files = BTreeSet::new();
        for found in find_by_argument(mark)? {
            let process = format!("/proc/{}", found.process.pid());
            let listed = match fs::read_dir(format!("{process}/fd")) {
                Ok(listed) => listed,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            for entry in listed {
                let descriptor = match entry {
                    Ok(entry) => entry.file_name(),
                    Err(error) if is_gone(&error) => break,
                    Err(error) => return Err(error),
                };
                let descriptor = descriptor.to_string_lossy();
                // One that was closed meanwhile is open for nothing.
                let Ok(about) = fs::read_to_string(format!("{process}/fdinfo/{descriptor}")) else {
                    continue;
                };
                if may_write(&about)
                    && let Ok(file) = fs::metadata(format!("{process}/fd/{descriptor}"))
                {
                    files.insert((file.dev(), file.ino()));
                }
            }
        }
        Ok(Self(files))
    }

    /// Whether a file is among them; one that is not there is not.
    pub(super) fn contains(&self, path: &Utf8Path) -> bool {
        fs::metadata(path).is_ok_and(|file| self.0.contains(&(file.dev(), file.ino())))
    }
}

fn is_gone(error: &io::Error) -> bool {
    // ESRCH, of a process that has ended since its directory was opened.
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

/// Whether the content of a file of `/proc/PID/fdinfo` is of a descriptor that can be written to: the two lowest bits
/// of the flags, which are octal, are those of `open`. What cannot be read is taken for one.
fn may_write(about: &str) -> bool {
    const WAYS: u32 = 0o3;
    let flags = about.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & WAYS != 0)
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        fs::File,
        io::Read as _,
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// A process with an argument, which has a file open for writing until it is ended.
    pub(in crate::scrub) struct Writer(Child);

    impl Writer {
        pub(in crate::scrub) fn start(mark: &str, path: &Utf8Path) -> Self {
            let file = File::options().write(true).open(path).unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "echo >&2; read line", mark]);
            let command = command.stdin(Stdio::piped()).stdout(file).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            // A process that was just started has no arguments yet.
            child.stderr.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self(child)
        }

        pub(in crate::scrub) fn end(mut self) {
            drop(self.0.stdin.take());
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn flags_are_octal() {
        assert!(may_write("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"));
        assert!(may_write("pos:\t0\nflags:\t0100001\n"));
        assert!(!may_write("pos:\t0\nflags:\t0100000\nmnt_id:\t1\n"));
        assert!(!may_write("flags:\t02100010\n"), "no way to write is in the second digit");
        assert!(may_write("") && may_write("flags:\tx\n"));
    }

    #[test]
    fn a_file_is_written_while_a_process_of_the_mark_has_it_open() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| camino::Utf8PathBuf::from_path_buf(directory.path().join(name)).unwrap();
        let mark = format!("guest={}-", at("mark"));
        for name in ["written", "another", "read"] {
            File::create(at(name)).unwrap();
        }
        let writer = Writer::start(&format!("{mark}one"), &at("written"));
        let other = Writer::start("guest=of-another", &at("another"));
        let written = Written::by(&mark).unwrap();
        assert!(written.contains(&at("written")));
        fs::hard_link(at("written"), at("second name")).unwrap();
        assert!(written.contains(&at("second name")));
        for not in ["another", "read", "missing"] {
            assert!(!written.contains(&at(not)), "{not}");
        }
        writer.end();
        other.end();
        assert!(!Written::by(&mark).unwrap().contains(&at("written")));
    }
}
