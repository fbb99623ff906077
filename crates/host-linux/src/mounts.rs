//! Showing a file to a process that has a root of its own and runs already.
//!
//! ```text
//!  our namespace            a mount of the file, in no namespace ─┐
//!  the process's namespace  a thread enters it ───────────────────┴─► it is put over a file there ─► the thread ends
//! ```
//!
//! Paths are those of the process: they are looked up within its root, whatever links it has made there, and the last name is
//! not followed. What it has done there is its own loss.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};

use crate::process::Process;

/// Shows a file that we have open at `at`, the path of a file in the root of the process. It has the rights there that the file's
/// own mode gives it. Blocks.
///
/// # Errors
/// There is no such file there, or the process is gone.
pub fn show_in(process: &Process, file: impl AsFd, at: &Path) -> io::Result<()> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(file, "", flags)?;
    let at = at.to_owned();
    within(process, move || put(&mount, &at))
}

/// Takes away what was shown there last. What the process has open stays open. Blocks.
///
/// # Errors
/// Nothing was shown there, or the process is gone.
pub fn hide_in(process: &Process, at: &Path) -> io::Result<()> {
    let at: PathBuf = at.to_owned();
    within(process, move || Ok(unmount(&at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?))
}

fn put(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    let target = openat(CWD, at, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", &target, "", flags)?)
}

/// Does something on a thread that sees the file system as the process does.
fn within<T: Send + 'static>(
    process: &Process,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let process = process.clone();
    let entered = thread::Builder::new().name("mounts".into()).spawn(move || {
        // Root and working directory are those of all threads until this.
        unshare(CloneFlags::CLONE_FS)?;
        setns(process.as_pidfd(), CloneFlags::CLONE_NEWNS)?;
        work()
    })?;
    entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, os::fd::AsRawFd};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::process::{Exit, Spawn, Stage, find_program};

    #[tokio::test]
    #[allow(clippy::print_stderr)]
    async fn a_file_is_shown_to_a_process_that_runs() {
        let (true, Some(shell)) = (rustix::process::geteuid().is_root(), find_program("busybox")) else {
            eprintln!("skipped: this needs root, and busybox-static");
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("stage")).unwrap();
        fs::write(path("known"), "known ").unwrap();
        fs::write(path("later"), "later ").unwrap();
        let stage =
            Stage::new(path("stage"), 1 << 20).show(path("known"), "/a/known", false).place("/a/later");
        let script = format!(
            "cd {}/a; b={}; $b cat known later; $b echo x > later; $b echo .; read l; $b cat later; read l
             $b cat later; ! $b touch known; $b ls | $b wc -l; $b echo $$",
            path("stage").display(),
            shell.display()
        );
        let (input, ours) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (said, output) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let spawn = Spawn::new(&shell).args(["sh", "-c", &script]).stdin(input).stdout(output);
        let mut child = spawn.stage(stage).new_process_namespace().start().unwrap();
        let mut said = fs::File::from(said);
        let mut next = || {
            let mut line = [0; 64];
            let count = said.read(&mut line).unwrap();
            String::from_utf8_lossy(&line[..count]).into_owned()
        };
        let mut begun = String::new();
        while !begun.ends_with(".\n") {
            begun += &next();
        }
        assert_eq!(begun, "known .\n");
        let at = path("stage").join("a/later");
        let later = fs::File::open(path("later")).unwrap();
        assert!(later.as_raw_fd() > 2);
        show_in(child.process(), &later, &at).unwrap();
        rustix::io::write(&ours, b"\n").unwrap();
        assert_eq!(next(), "later ");
        hide_in(child.process(), &at).unwrap();
        assert!(hide_in(child.process(), &at).is_err(), "nothing is shown there");
        assert!(show_in(child.process(), &later, &path("nowhere")).is_err());
        rustix::io::write(&ours, b"\n").unwrap();
        let rest = tokio::task::spawn_blocking(move || {
            let mut rest = String::new();
            said.read_to_string(&mut rest).unwrap();
            rest
        });
        assert_eq!(rest.await.unwrap(), "x\n2\n1\n", "it is the first process where it is");
        assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
        assert_eq!(fs::read_dir(path("stage")).unwrap().count(), 0, "nothing of it is on the host");
        assert_eq!(fs::read_to_string(path("later")).unwrap(), "later ");
    }
}
