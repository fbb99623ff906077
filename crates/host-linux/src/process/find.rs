//! Finding processes by what their command line says.

use std::{fs, io};

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
/// `/proc` cannot be read, or no pidfd can be had for a process that is there. Processes that end while
/// they are looked at are left out.
pub fn find_by_argument(mark: &str) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(command_line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
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
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let Ok(command_line) = fs::read(format!("/proc/{pid}/cmdline")) else { return Ok(None) };
    match argument_with(&command_line, mark) {
        Some(argument) if process.is_alive()? => Ok(Some(Found { process, argument })),
        _ => Ok(None),
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
    use super::argument_with;

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
