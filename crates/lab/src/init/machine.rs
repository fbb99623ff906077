//! Making a machine out of a kernel: modules, disks, mounts.

use std::{
    collections::BTreeMap,
    ffi::CStr,
    fs::{self, File, OpenOptions},
    io::Read as _,
    os::{fd::AsFd as _, unix::fs::symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{Resource, Rlimit, setrlimit},
};
use wrenn_lab::plan::{FILE, INPUT, OUTPUT, Plan};

use crate::{port::Port, programs};

/// Where the initramfs has its modules.
const MODULES: &str = "/modules";
/// The disks, in the order in which the host attached them.
const ROOT_DISK: &str = "/dev/vda";
const INPUT_DISK: &str = "/dev/vdb";
const NEW_ROOT: &str = "/newroot";
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";
/// How many files a program may have open.
const OPEN_FILES: u64 = 524_288;
/// How long the kernel may take to present the port after its driver is there.
const PORT_BOUND: Duration = Duration::from_secs(60);
/// How long to wait before a port is opened again that is not ready.
const PORT_PAUSE: Duration = Duration::from_millis(1);

/// What a host has mounted: kind, place, options. In this order.
const MOUNTS: [(&str, &str, Option<&CStr>); 8] = [
    ("proc", "/proc", None),
    ("sysfs", "/sys", None),
    ("devtmpfs", "/dev", None),
    ("devpts", "/dev/pts", Some(c"mode=0620,gid=5,ptmxmode=0666")),
    ("tmpfs", "/dev/shm", Some(c"mode=1777")),
    ("tmpfs", "/run", Some(c"mode=0755")),
    ("cgroup2", CONTROL_GROUPS, None),
    ("tracefs", "/sys/kernel/tracing", None),
];

/// Loads what the disks and the port need, and opens the port. From here on the host can be told what fails.
pub(crate) fn reach_host() -> Result<Port> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None).context("mounting /dev")?;
    // Watched from before the driver is loaded, so that the port's appearance cannot be missed.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .context("watching /dev")?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE).context("watching /dev")?;
    load_initial_modules()?;
    let mut events = File::from(watch);
    let end = Instant::now() + PORT_BOUND;
    loop {
        let mut pause = PORT_BOUND;
        if let Some(path) = find_port()? {
            match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => return Ok(Port::new(file)),
                // Its file appears a moment before the driver knows it: nobody tells when.
                Err(error)
                    if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) && Instant::now() < end =>
                {
                    pause = PORT_PAUSE;
                }
                Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "there is no port to the host");
        let mut watched = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
        poll(&mut watched, Some(&Timespec::try_from(left.min(pause))?)).context("watching /dev")?;
        // Which file it was is seen by looking; the events only wake.
        let _ = events.read(&mut [0; 4096]);
    }
}

fn load_initial_modules() -> Result<()> {
    let order = Path::new(MODULES).join("order");
    let order = fs::read_to_string(&order).with_context(|| format!("reading {}", order.display()))?;
    for name in order.lines() {
        let path = Path::new(MODULES).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("loading {name}"))?;
    }
    Ok(())
}

/// The machine has one such port, so whichever is there is the one.
fn find_port() -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/dev").context("reading /dev")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vport") {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Makes the rest of a host, and says what is to be done on it.
pub(crate) fn become_host() -> Result<Plan> {
    mount(ROOT_DISK, NEW_ROOT, "ext4", MountFlags::NOATIME, None).context("mounting the root disk")?;
    std::env::set_current_dir(NEW_ROOT).context("entering the root disk")?;
    mount_move(".", "/").context("moving the root disk to the root")?;
    rustix::process::chroot(".").context("entering the root disk")?;
    std::env::set_current_dir("/").context("entering the root")?;
    for (kind, place, options) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
        mount(kind, place, kind, MountFlags::empty(), options)
            .with_context(|| format!("mounting {place}"))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = Path::new("/dev").join(name);
        symlink(target, &link).with_context(|| format!("making {}", link.display()))?;
    }
    delegate_controllers()?;
    // The kernel gives its first process few. Services of a host may have so many.
    let files = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, files).context("allowing many open files")?;
    rustix::system::sethostname(b"lab").context("setting the name of the machine")?;

    fs::create_dir_all(INPUT).with_context(|| format!("making {INPUT}"))?;
    mount(INPUT_DISK, INPUT, "ext4", MountFlags::RDONLY, None).context("mounting the disk of the plan")?;
    let file = Path::new(INPUT).join(FILE);
    let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    let plan: Plan = serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?;
    bind(&plan.binds)?;
    fs::create_dir_all(OUTPUT).with_context(|| format!("making {OUTPUT}"))?;

    programs::help("ip", &["link", "set", "lo", "up"])?;
    if !plan.modules.is_empty() {
        let mut arguments = vec!["--all"];
        arguments.extend(plan.modules.iter().map(String::as_str));
        programs::help("modprobe", &arguments)?;
    }
    Ok(plan)
}

/// Lets groups below the root have every controller that the kernel has.
fn delegate_controllers() -> Result<()> {
    let root = Path::new(CONTROL_GROUPS);
    let there = fs::read_to_string(root.join("cgroup.controllers")).context("reading the controllers")?;
    let wanted: Vec<String> = there.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write(root.join("cgroup.subtree_control"), wanted.join(" ")).context("delegating the controllers")
}

fn bind(binds: &BTreeMap<String, PathBuf>) -> Result<()> {
    for (name, place) in binds {
        if name.contains('/') || !place.is_absolute() {
            bail!("the plan binds {name:?} to {}", place.display());
        }
        fs::create_dir_all(place).with_context(|| format!("making {}", place.display()))?;
        mount_bind(Path::new(INPUT).join(name), place)
            .with_context(|| format!("binding {}", place.display()))?;
    }
    Ok(())
}

pub(crate) fn kernel_version() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
    Ok(text.trim().to_owned())
}
