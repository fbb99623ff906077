//! Finding processes by what their command line says.

use std::{fs, io};

use rustix::io::Errno;

use super::Process;

/// A process whose command line carries the mark that was looked for.
#[derive(Debug, Clone)]
pub struct Found {
    /// The process.
    pub process: Process,
    /// The whole argument that begins with the mark.
    pub argument: String,
}

/// All processes of this machine with an argument that begins with `mark` (or is `mark`).
///
/// The mark is looked for in every argument but the first, which is the program's own name for itself.
/// Zombies have no arguments and are not found.
///
/// # Errors
/// `/proc` or a command line in it cannot be read, or no pidfd can be had for a process that is there. Processes that end while
/// they are looked at are left out.
pub fn find_by_argument(mark: &str) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(command_line) = command_line_of(pid)? else { continue };
        if argument_with(&command_line, mark).is_some() {
            found.extend(argument_of(pid, mark)?);
        }
    }
    Ok(found)
}

/// The process that has this number now, if it has an argument that begins with `mark`: as
/// [`find_by_argument`], for who knows where to look.
///
/// # Errors
/// No pidfd can be had for a process that is there.
pub fn argument_of(pid: u32, mark: &str) -> io::Result<Option<Found>> {
    // Hold the process first and read then: what is read while the held one lives is its own.
    let process = match Process::open(pid) {
        Ok(process) => process,
        Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let Some(command_line) = command_line_of(pid)? else { return Ok(None) };
    match argument_with(&command_line, mark) {
        Some(argument) if process.is_alive()? => Ok(Some(Found { process, argument })),
        _ => Ok(None),
    }
}

/// The command line of a process, in the form of `/proc/PID/cmdline`; none when it has ended.
fn command_line_of(pid: u32) -> io::Result<Option<Vec<u8>>> {
    unless_ended(fs::read(format!("/proc/{pid}/cmdline")))
}

/// Whatever else keeps a command line from being read is no reason to take its process for another one.
fn unless_ended<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => Ok(None),
        read => read.map(Some),
    }
}

/// The first argument after the program's name that begins with `mark`, in the form of `/proc/PID/cmdline`.
fn argument_with(command_line: &[u8], mark: &str) -> Option<String> {
    command_line
        .split(|byte| *byte == 0)
        .skip(1)
        .find(|argument| argument.starts_with(mark.as_bytes()))
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{argument_with, unless_ended};

    #[test]
    fn only_what_has_ended_has_no_command_line() {
        for (number, is_ended) in [(2, true), (3, true), (5, false), (12, false), (13, false), (24, false)] {
            let read = unless_ended::<()>(Err(io::Error::from_raw_os_error(number)));
            assert_eq!(matches!(read, Ok(None)), is_ended, "{number}");
            assert_eq!(read.is_err(), !is_ended, "{number}");
        }
    }

    #[test]
    fn a_mark_is_the_beginning_of_an_argument() {
        let line = b"/usr/bin/vmm\0-name\0guest=wrenn-a-1\0-x\0";
        assert_eq!(argument_with(line, "guest=wrenn-a-").as_deref(), Some("guest=wrenn-a-1"));
        assert_eq!(argument_with(line, "guest=wrenn-a-1").as_deref(), Some("guest=wrenn-a-1"));
        assert_eq!(argument_with(line, "wrenn-a-"), None);
        assert_eq!(argument_with(line, "/usr/bin/vmm"), None);
        assert_eq!(argument_with(b"", "guest="), None);
    }
}
