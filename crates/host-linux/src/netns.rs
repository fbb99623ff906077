//! Network namespaces: made with a name, entered for the length of one function.
//!
//! A namespace belongs to a thread, not to a process, and what a thread makes (a socket, a device, a
//! child process) belongs for ever to the namespace in which the thread was at that moment. So nothing
//! here moves a thread that anybody else uses: [`NetworkNamespace::run`] starts a thread, moves it, runs
//! one function on it and lets it end. There is no way back that could fail, and no worker of the
//! runtime can be left in a sandbox's namespace.
//!
//! Names are files in [`NAMES`] on which the namespace is mounted, as iproute2 does it, so that
//! `ip netns exec NAME …` works on them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::{CWD, fstatfs},
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount},
};
use tokio::sync::oneshot;

/// Where named namespaces are.
pub const NAMES: &str = "/run/netns";

/// What `statfs` calls the file system of namespaces.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Enough for a system call, a netlink socket and the start of a child process.
const STACK_BYTES: usize = 256 * 1024;

/// A network namespace that stays as long as this handle does, whatever becomes of its name.
#[derive(Debug, Clone)]
pub struct NetworkNamespace {
    file: Arc<OwnedFd>,
}

impl NetworkNamespace {
    /// The namespace in which the calling thread is.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        Ok(Self { file: Arc::new(File::open("/proc/thread-self/ns/net")?.into()) })
    }

    /// The namespace that is mounted at `path`.
    ///
    /// # Errors
    /// `NotFound` also where there is only the empty file that a namespace could be mounted on.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        #[allow(clippy::cast_sign_loss, reason = "a magic number has no sign")]
        let magic = fstatfs(&file)?.f_type as u64;
        if magic != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no namespace is mounted there"));
        }
        Ok(Self { file: Arc::new(file.into()) })
    }

    /// Makes a namespace, runs `work` in it, and names it when that went well.
    ///
    /// [`prepare_names`] has to have been called before.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken, else what the kernel said, or what `work` said. Nothing is
    /// left then.
    pub async fn create<T, E>(
        path: &Path,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<(Self, T), E>
    where
        T: Send + 'static,
        E: From<io::Error> + Send + 'static,
    {
        let path = path.to_owned();
        on_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
            let namespace = Self::current()?;
            let done = work()?;
            OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path)?;
            if let Err(error) = mount_bind("/proc/thread-self/ns/net", &path) {
                let _ = fs::remove_file(&path);
                return Err(io::Error::from(error).into());
            }
            Ok((namespace, done))
        })
        .await?
    }

    /// Runs `work` in this namespace on a thread of its own, inside the caller's runtime.
    ///
    /// When the answer is not waited for, `work` still runs to its end.
    ///
    /// # Errors
    /// The namespace could not be entered, no thread could be had, or `work` panicked.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let namespace = self.clone();
        on_thread(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
        .await?
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs `work` on a thread that is made for it and ends with it.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let runtime = tokio::runtime::Handle::current();
    let (answer, answered) = oneshot::channel();
    thread::Builder::new().name("in-netns".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        let _inside = runtime.enter();
        // Nobody may be waiting any more; the work is done all the same.
        let _ = answer.send(work());
    })?;
    answered.await.map_err(|_| io::Error::other("the thread in the namespace panicked"))
}

/// Makes [`NAMES`] a directory in which a name appears to, and disappears from, every mount namespace of
/// the machine. A name that another mount namespace kept would keep the network namespace too.
///
/// # Errors
/// What the kernel said.
pub fn prepare_names() -> io::Result<()> {
    fs::create_dir_all(NAMES)?;
    // As iproute2 locks it, so that two who come here first at the same time do not both mount it.
    let _one_at_a_time = {
        let directory = File::open(NAMES)?;
        rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive)?;
        directory
    };
    let shared = || mount_change(NAMES, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match shared() {
        // It is not a mount point yet.
        Err(rustix::io::Errno::INVAL) => {
            mount_bind_recursive(NAMES, NAMES)?;
            Ok(shared()?)
        }
        other => Ok(other?),
    }
}

/// Takes a name away. The namespace itself goes with whatever uses it last.
///
/// # Errors
/// What the kernel said; a name that is not there is no error.
pub fn remove_name(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Nothing is mounted on it, or it is not there.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match rustix::fs::unlinkat(CWD, path, rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a skipped test says so")]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    fn identity(namespace: &NetworkNamespace) -> u64 {
        rustix::fs::fstat(namespace).unwrap().st_ino
    }

    #[tokio::test]
    async fn a_named_namespace_is_entered_and_goes() {
        if !is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        prepare_names().unwrap();
        let path = PathBuf::from(format!("{NAMES}/wrenn-unit-{}", std::process::id()));
        let here = identity(&NetworkNamespace::current().unwrap());
        let (namespace, made) = NetworkNamespace::create(&path, || io::Result::Ok(7)).await.unwrap();
        assert_eq!(made, 7);
        assert_ne!(identity(&namespace), here);
        assert_eq!(identity(&NetworkNamespace::open(&path).unwrap()), identity(&namespace));
        assert_eq!(
            NetworkNamespace::create(&path, || io::Result::Ok(())).await.unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );

        let inside = namespace.run(|| identity(&NetworkNamespace::current().unwrap())).await.unwrap();
        assert_eq!(inside, identity(&namespace));
        assert_eq!(identity(&NetworkNamespace::current().unwrap()), here, "nobody else was moved");

        remove_name(&path).unwrap();
        remove_name(&path).unwrap();
        assert_eq!(NetworkNamespace::open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_failed_make_leaves_no_name() {
        if !is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        prepare_names().unwrap();
        let path = PathBuf::from(format!("{NAMES}/wrenn-unit-failed-{}", std::process::id()));
        let failed = NetworkNamespace::create(&path, || Err::<(), _>(io::Error::other("on purpose"))).await;
        assert_eq!(failed.unwrap_err().to_string(), "on purpose");
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn an_ordinary_file_is_no_namespace() {
        let path = std::env::temp_dir().join(format!("wrenn-unit-file-{}", std::process::id()));
        fs::write(&path, "").unwrap();
        assert_eq!(NetworkNamespace::open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::remove_file(&path).unwrap();
    }
}
