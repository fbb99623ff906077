//! Making a process.
//!
//! `std::process::Command` with a `pre_exec` hook forks: the kernel copies the page tables of the whole
//! parent, which the parent then pays for again with a page fault at each write. With 256 MiB in use, on one
//! slow core, a start takes 9 ms that way and 1 ms this way, and only the former grows with the parent
//! (`a_large_parent_does_not_slow_a_start` in the tests shows both). Here the child is made by `clone` with `CLONE_VM | CLONE_VFORK`: it borrows the parent's memory, and the calling thread
//! sleeps until the child has executed its program or has given up. Only where the child changes its user
//! is the memory copied (`CLONE_VFORK` alone), because a change of user marks the shared memory, and with it
//! the parent, as not dumpable.
//!
//! # What the child may do
//! Between `clone` and `execve` the child runs with a borrowed memory, next to threads of the parent that
//! may hold any lock. So it allocates nothing, takes no lock, panics nowhere and calls nothing but thin
//! system call wrappers; everything it needs was prepared before, in [`Plan`].

use std::{
    ffi::{CString, OsStr, OsString, c_char, c_int, c_void},
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    ptr,
    sync::{LazyLock, mpsc},
};

use nix::libc;

use super::{
    Child, Jail, Process, SpawnError, Stage, Step, WaitIdOptions,
    jail::{Layout, drop_bounding_set, no_new_privileges},
    opens::Held,
    reap,
};

/// A process to be made. The environment is empty and the standard streams are `/dev/null` unless given;
/// no other descriptor of the parent reaches it than those in [`Spawn::keep_open`].
#[derive(Debug)]
pub struct Spawn {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    namespace: Option<PathBuf>,
    user: Option<(u32, u32)>,
    bind_mounts: Vec<(PathBuf, PathBuf)>,
    jail: Option<Jail>,
    stage: Option<Stage>,
    is_first: bool,
    holds_opens: bool,
    new_session: bool,
    control_group: Option<OwnedFd>,
    keep_open: Vec<OwnedFd>,
    streams: [Option<OwnedFd>; 3],
    current_dir: Option<PathBuf>,
    die_with_parent: bool,
    oom_score_adj: Option<i16>,
    core_dump: bool,
}

impl Spawn {
    /// A process that will run `program`, looked up on this process's `PATH` unless it holds a slash.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            namespace: None,
            user: None,
            bind_mounts: Vec::new(),
            jail: None,
            stage: None,
            is_first: false,
            holds_opens: false,
            new_session: false,
            control_group: None,
            keep_open: Vec::new(),
            streams: [None, None, None],
            current_dir: None,
            die_with_parent: false,
            oom_score_adj: None,
            core_dump: true,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment, which is empty at first.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.into()));
        self
    }

    /// The network namespace in which it runs (`/run/netns/…`).
    #[must_use]
    pub fn network_namespace(mut self, path: impl Into<PathBuf>) -> Self {
        self.namespace = Some(path.into());
        self
    }

    /// The user and group as which it runs, with no other group.
    #[must_use]
    pub fn user(mut self, user: u32, group: u32) -> Self {
        self.user = Some((user, group));
        self
    }

    /// Mounts `from` over `to`, seen by this process alone: it gets a mount namespace of its own.
    #[must_use]
    pub fn private_bind_mount(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.bind_mounts.push((from.into(), to.into()));
        self
    }

    /// Confines it: to a root of its own, as a user of its own, with no capabilities and no way to have more rights. It
    /// has a network of its own, in which there is nothing, unless it is in a namespace that is given. Its working directory is
    /// the root unless one in there is given. Its program is one that the jail shows.
    #[must_use]
    pub fn jail(mut self, jail: Jail) -> Self {
        self.user = Some((jail.user(), jail.user()));
        self.jail = Some(jail);
        self
    }

    /// Gives it a file system of its own over a directory, and an empty network as [`Spawn::jail`] does. It keeps all its
    /// rights.
    #[must_use]
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stage = Some(stage);
        self
    }

    /// Makes it the first process of a new namespace of processes, which ends with it.
    #[must_use]
    pub fn new_process_namespace(mut self) -> Self {
        self.is_first = true;
        self
    }

    /// Has the files that a process in a jail opens for reading and writing opened by whoever takes [`Child::take_opens`]. The
    /// process waits until they are answered.
    #[must_use]
    pub fn hold_opens(mut self) -> Self {
        self.holds_opens = true;
        self
    }

    /// Makes it the leader of a new session, so that no terminal and no process group of ours reaches it.
    #[must_use]
    pub fn new_session(mut self) -> Self {
        self.new_session = true;
        self
    }

    /// The control group in which it is from before its program runs: the file `cgroup.procs` of it, opened for
    /// writing (`crate::cgroup::Group::entrance`).
    #[must_use]
    pub fn control_group(mut self, entrance: OwnedFd) -> Self {
        self.control_group = Some(entrance);
        self
    }

    /// A descriptor that it inherits under the number that it has here.
    #[must_use]
    pub fn keep_open(mut self, descriptor: impl Into<OwnedFd>) -> Self {
        self.keep_open.push(descriptor.into());
        self
    }

    /// Its standard input.
    #[must_use]
    pub fn stdin(mut self, file: impl Into<OwnedFd>) -> Self {
        self.streams[0] = Some(file.into());
        self
    }

    /// Its standard output.
    #[must_use]
    pub fn stdout(mut self, file: impl Into<OwnedFd>) -> Self {
        self.streams[1] = Some(file.into());
        self
    }

    /// Its standard error.
    #[must_use]
    pub fn stderr(mut self, file: impl Into<OwnedFd>) -> Self {
        self.streams[2] = Some(file.into());
        self
    }

    /// Its working directory; else this process's.
    #[must_use]
    pub fn current_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.current_dir = Some(path.into());
        self
    }

    /// The kernel kills it when this process dies, however that happens.
    #[must_use]
    pub fn die_with_parent(mut self) -> Self {
        self.die_with_parent = true;
        self
    }

    /// From -1000 (never killed when memory is short) to 1000 (killed first).
    #[must_use]
    pub fn oom_score_adj(mut self, score: i16) -> Self {
        self.oom_score_adj = Some(score);
        self
    }

    /// It writes no core dump when it crashes: one holds what it knew, and fills a disk.
    #[must_use]
    pub fn no_core_dump(mut self) -> Self {
        self.core_dump = false;
        self
    }

    /// Makes the process. Returns when its program runs.
    ///
    /// This blocks the calling thread for as long as the kernel needs to execute the program, about a
    /// millisecond: in async code, call it from `spawn_blocking`.
    ///
    /// # Errors
    /// By step; whatever was made is gone.
    pub fn start(self) -> Result<Child, SpawnError> {
        if !self.die_with_parent {
            return start_here(self);
        }
        // The kernel means the parent *thread*, so it has to be one that lives as long as the process.
        let (answer, answered) = mpsc::sync_channel(1);
        let program = self.program.display().to_string();
        let lost = || SpawnError::Clone {
            program,
            source: io::Error::other("the thread that makes children is gone"),
        };
        match &*PARENT {
            Ok(parent) => {
                if parent.send(Box::new(move || drop(answer.send(start_here(self))))).is_err() {
                    return Err(lost());
                }
                answered.recv().unwrap_or_else(|_| Err(lost()))
            }
            Err(_) => Err(lost()),
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that is the parent of all children that die with this process.
static PARENT: LazyLock<io::Result<mpsc::Sender<Job>>> = LazyLock::new(|| {
    let (jobs, queue) = mpsc::channel::<Job>();
    let run = move || queue.into_iter().for_each(|job| job());
    std::thread::Builder::new().name("parent".into()).spawn(run)?;
    Ok(jobs)
});

/// The executable file that a shell would run for `name`: a path as it is, else the first on the `PATH`.
#[must_use]
pub fn find_program(name: impl AsRef<Path>) -> Option<PathBuf> {
    let name = name.as_ref();
    let is_program = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    if name.as_os_str().as_bytes().contains(&b'/') {
        return is_program(name).then(|| name.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| is_program(path))
}

/// A list of texts as `execve` takes it: pointers, and a null at the end.
struct Strings {
    pointers: Vec<*const c_char>,
    /// What the pointers point into. The texts stay where they are when this is moved.
    _texts: Vec<CString>,
}

impl Strings {
    fn new(texts: Vec<CString>) -> Self {
        Self {
            pointers: texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect(),
            _texts: texts,
        }
    }
}

/// All that the child needs, in the form in which the kernel takes it.
struct Plan {
    program: CString,
    arguments: Strings,
    environment: Strings,
    namespace: Option<OwnedFd>,
    user: Option<(u32, u32)>,
    bind_mounts: Vec<(CString, CString)>,
    layout: Option<Layout>,
    is_jailed: bool,
    is_first: bool,
    held: Option<Held>,
    new_session: bool,
    control_group: Option<OwnedFd>,
    keep_open: Vec<OwnedFd>,
    /// All above 2, so that arranging one never overwrites another.
    streams: [OwnedFd; 3],
    current_dir: Option<CString>,
    parent_pid: Option<libc::pid_t>,
    oom_score: Option<CString>,
    core_dump: bool,
    report: *mut Report,
}

/// What the child says when it gives up: written by it alone, read by the parent after it is gone.
#[derive(Clone, Copy)]
struct Report {
    step: u8,
    errno: c_int,
}

fn start_here(spawn: Spawn) -> Result<Child, SpawnError> {
    let name = spawn.program.display().to_string();
    let failed = |source| SpawnError::Clone { program: name.clone(), source };
    let ground = Ground::new().map_err(failed)?;
    let plan = plan(spawn, &name, ground.report())?;
    let (pid, pidfd) = clone_child(&plan, &ground).map_err(failed)?;
    // SAFETY: the report lies in a mapping that `ground` keeps; the child, its only other user, has executed
    // its program or exited, because `CLONE_VFORK` does not return before.
    #[allow(unsafe_code)]
    let report = unsafe { ptr::read_volatile(ground.report()) };
    match Step::ALL.into_iter().find(|step| *step as u8 == report.step) {
        None => {
            let mut child = Child::new(pid, pidfd);
            if let Some(held) = plan.held {
                match held.listener() {
                    Ok(opens) => child.opens = Some(opens),
                    Err(source) => {
                        drop(child.kill());
                        drop(reap(child.process(), WaitIdOptions::EXITED));
                        return Err(failed(source));
                    }
                }
            }
            Ok(child)
        }
        Some(step) => {
            // It is exiting: this waits for microseconds, and there is nothing to do about a failure.
            drop(reap(&Process::from_pidfd(pid, pidfd), WaitIdOptions::EXITED));
            Err(SpawnError::Step { program: name, step, source: io::Error::from_raw_os_error(report.errno) })
        }
    }
}

fn plan(spawn: Spawn, name: &str, report: *mut Report) -> Result<Plan, SpawnError> {
    let program = find_program(&spawn.program)
        .or_else(|| spawn.program.to_str().is_some_and(|p| p.contains('/')).then(|| spawn.program.clone()))
        .ok_or_else(|| SpawnError::NoProgram(name.to_owned()))?;
    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(|_| SpawnError::Nul(name.to_owned()));
    let open =
        |path: &Path, write: bool| {
            fs::OpenOptions::new().read(true).write(write).open(path).map(OwnedFd::from).map_err(|source| {
                SpawnError::Open { program: name.to_owned(), path: path.to_owned(), source }
            })
        };
    let mut arguments = vec![text(spawn.program.as_os_str())?];
    for argument in &spawn.arguments {
        arguments.push(text(argument)?);
    }
    let mut environment = Vec::with_capacity(spawn.environment.len());
    for (variable, value) in spawn.environment {
        let mut entry = variable.into_vec();
        entry.push(b'=');
        entry.extend(value.into_vec());
        environment.push(text(OsStr::from_bytes(&entry))?);
    }
    let mut bind_mounts = Vec::with_capacity(spawn.bind_mounts.len());
    for (from, to) in &spawn.bind_mounts {
        bind_mounts.push((text(from.as_os_str())?, text(to.as_os_str())?));
    }
    let layout = match (&spawn.jail, &spawn.stage) {
        (Some(jail), _) => Some(jail.layout()),
        (None, stage) => stage.as_ref().map(Stage::layout),
    };
    let layout = layout.transpose().map_err(|(path, source)| SpawnError::Open {
        program: name.to_owned(),
        path,
        source,
    })?;
    let held = spawn.holds_opens.then(Held::new).transpose();
    let held = held.map_err(|source| SpawnError::Clone { program: name.to_owned(), source })?;
    let stream = |given: Option<OwnedFd>| {
        let stream = given.map_or_else(|| open(Path::new("/dev/null"), true), Ok)?;
        above_standard(stream).map_err(|source| SpawnError::Clone { program: name.to_owned(), source })
    };
    let [input, output, error] = spawn.streams;
    Ok(Plan {
        program: text(program.as_os_str())?,
        arguments: Strings::new(arguments),
        environment: Strings::new(environment),
        namespace: spawn.namespace.map(|path| open(&path, false)).transpose()?,
        user: spawn.user,
        bind_mounts,
        layout,
        is_jailed: spawn.jail.is_some(),
        is_first: spawn.is_first,
        held,
        new_session: spawn.new_session,
        control_group: spawn.control_group,
        keep_open: spawn.keep_open,
        streams: [stream(input)?, stream(output)?, stream(error)?],
        current_dir: spawn.current_dir.map(|path| text(path.as_os_str())).transpose()?,
        parent_pid: spawn.die_with_parent.then(|| nix::unistd::getpid().as_raw()),
        oom_score: spawn.oom_score_adj.map(|score| text(OsStr::new(&score.to_string()))).transpose()?,
        core_dump: spawn.core_dump,
        report,
    })
}

/// The same file under a number above 2. Only a process that was started without standard streams has
/// files of its own at the lower numbers.
fn above_standard(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    if descriptor.as_raw_fd() > 2 {
        return Ok(descriptor);
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(&descriptor, 3)?)
}

/// The child's stack, with a guard page below it and its report above it:
///
/// ```text
///  │ guard │ stack … ◄── grows down │ report │
/// ```
///
/// The page of the report is shared even where the memory is copied.
struct Ground {
    base: *mut c_void,
}

const PAGE: usize = 4096;
const STACK: usize = 64 * 1024;
const GROUND: usize = PAGE + STACK + PAGE;

impl Ground {
    fn new() -> io::Result<Self> {
        // SAFETY: new mappings at an address that the kernel chooses; the second replaces one page of the
        // first, which is ours and which nobody uses yet.
        #[allow(unsafe_code)]
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
            let base = libc::mmap(ptr::null_mut(), GROUND, protection, private, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let ground = Self { base };
            if libc::mprotect(base, PAGE, libc::PROT_NONE) != 0 {
                return Err(io::Error::last_os_error());
            }
            let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let report = ground.report().cast::<c_void>();
            if libc::mmap(report, PAGE, protection, shared, -1, 0) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(ground)
        }
    }

    fn report(&self) -> *mut Report {
        self.stack_top().cast()
    }

    /// Where the stack begins: it grows down from here, and the report lies above.
    fn stack_top(&self) -> *mut c_void {
        self.base.wrapping_byte_add(PAGE + STACK)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the child that used it has its own memory by now or is gone.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.base, GROUND);
        }
    }
}

fn clone_child(plan: &Plan, ground: &Ground) -> io::Result<(u32, OwnedFd)> {
    let share = if plan.user.is_some() { 0 } else { libc::CLONE_VM };
    let first = if plan.is_first { libc::CLONE_NEWPID } else { 0 };
    let flags = share | first | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: c_int = -1;
    // SAFETY: `child_main` gets a pointer to `plan`, which outlives the child's use of it because this thread
    // sleeps until the child has executed its program or exited. The stack is mapped, aligned to a page and
    // not used by anybody else. All signals are blocked from before the clone until after it: no handler of
    // the parent runs in the child, which shares its memory; the child resets the handlers before it unblocks.
    // With `CLONE_VM` the child also shares this thread's `errno`, which nobody looks at while it runs.
    #[allow(unsafe_code)]
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut before = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        let argument = ptr::from_ref(plan).cast_mut().cast::<c_void>();
        let pid = libc::clone(child_main, ground.stack_top(), flags, argument, &raw mut pidfd);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        match u32::try_from(pid) {
            Ok(pid) => Ok((pid, OwnedFd::from_raw_fd(pidfd))),
            Err(_) => Err(error),
        }
    }
}

/// The child's first and only function. It never returns to anything of the parent's.
extern "C" fn child_main(argument: *mut c_void) -> c_int {
    // SAFETY: `clone_child` passes a pointer to a `Plan` that lives until this process executes its program
    // or exits; what is called is `prepare_and_execute`, which keeps the rules of this module.
    #[allow(unsafe_code)]
    unsafe {
        let plan = &*argument.cast_const().cast::<Plan>();
        let (step, errno) = prepare_and_execute(plan);
        ptr::write_volatile(plan.report, Report { step: step as u8, errno });
        libc::_exit(127)
    }
}

/// Does every step; returns only when one has failed, with its number.
///
/// # Safety
/// Only in a fresh child with all signals blocked; see the module for what may be called here.
#[allow(unsafe_code)]
unsafe fn prepare_and_execute(plan: &Plan) -> (Step, c_int) {
    // SAFETY: only system call wrappers that are async-signal-safe are called (`setgroups`, `setresgid` and
    // `setresuid` as bare system calls: the C library's functions would change the parent's threads too); they
    // get pointers into `plan`, which is alive, and descriptors that it holds. `?`-like returns allocate nothing.
    unsafe {
        macro_rules! must {
            ($step:ident, $call:expr) => {
                if $call < 0 {
                    return (Step::$step, *libc::__errno_location());
                }
            };
        }
        // What is ignored stays ignored over an exec, and Rust ignores SIGPIPE: back to the default, all.
        // The numbers that the C library keeps for itself answer with an error, which is right.
        let mut default = std::mem::zeroed::<libc::sigaction>();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=64 {
            libc::sigaction(signal, &raw const default, ptr::null_mut());
        }
        if plan.new_session {
            must!(NewSession, libc::setsid());
        }
        if let Some(group) = &plan.control_group {
            // Zero is whoever writes it. It is a process of its own by now, though its memory is the parent's: what it
            // allocates from here on counts for the group, and what the parent allocates does not.
            must!(EnterControlGroup, libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1));
        }
        if let Some(namespace) = &plan.namespace {
            must!(EnterNetworkNamespace, libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET));
        } else if plan.layout.is_some() {
            must!(EnterNetworkNamespace, libc::unshare(libc::CLONE_NEWNET));
        }
        if !plan.bind_mounts.is_empty() {
            must!(NewMountNamespace, libc::unshare(libc::CLONE_NEWNS));
            let (none, nothing) = (c"none".as_ptr(), ptr::null::<c_void>());
            let private = libc::MS_REC | libc::MS_PRIVATE;
            must!(NewMountNamespace, libc::mount(none, c"/".as_ptr(), ptr::null(), private, nothing));
            for (from, to) in &plan.bind_mounts {
                let bind = libc::MS_BIND | libc::MS_REC;
                must!(BindMount, libc::mount(from.as_ptr(), to.as_ptr(), ptr::null(), bind, nothing));
            }
        }
        if let Some(score) = &plan.oom_score {
            let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            must!(SetOomScore, file);
            let bytes = score.as_bytes();
            must!(SetOomScore, libc::write(file, bytes.as_ptr().cast(), bytes.len()));
        }
        if !plan.core_dump {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            must!(ForbidCoreDump, libc::setrlimit(libc::RLIMIT_CORE, &raw const none));
        }
        must!(ArrangeDescriptors, close_all_on_execute());
        for (number, stream) in (0..).zip(&plan.streams) {
            must!(ArrangeDescriptors, libc::dup2(stream.as_raw_fd(), number));
        }
        for kept in &plan.keep_open {
            must!(ArrangeDescriptors, keep_on_execute(kept.as_raw_fd()));
        }
        if let Some(layout) = &plan.layout {
            must!(EnterJail, layout.enter());
        }
        if plan.is_jailed {
            must!(DropRights, drop_bounding_set());
        }
        if let Some((user, group)) = plan.user {
            must!(ChangeUser, libc::syscall(libc::SYS_setgroups, 0_usize, ptr::null::<libc::gid_t>()));
            must!(ChangeUser, libc::syscall(libc::SYS_setresgid, group, group, group));
            must!(ChangeUser, libc::syscall(libc::SYS_setresuid, user, user, user));
        }
        if plan.is_jailed {
            must!(DropRights, no_new_privileges());
        }
        if let Some(held) = &plan.held {
            must!(HoldOpens, held.install());
        }
        if let Some(directory) = &plan.current_dir {
            must!(ChangeDirectory, libc::chdir(directory.as_ptr()));
        }
        // After the change of user, which would undo it.
        if let Some(parent) = plan.parent_pid {
            must!(DieWithParent, libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
            if libc::getppid() != parent {
                return (Step::DieWithParent, libc::ESRCH);
            }
        }
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        must!(ResetSignals, libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()));
        libc::execve(
            plan.program.as_ptr(),
            plan.arguments.pointers.as_ptr(),
            plan.environment.pointers.as_ptr(),
        );
        (Step::Execute, *libc::__errno_location())
    }
}

/// Marks every descriptor above the standard ones to be closed at the exec: also those that somebody
/// forgot to mark, and those that our own parent left to us.
///
/// # Safety
/// Only in the child, whose table of descriptors is a copy.
#[allow(unsafe_code)]
unsafe fn close_all_on_execute() -> libc::c_long {
    // SAFETY: no pointers; the table is the child's own.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }
}

/// Lets one descriptor pass the exec.
///
/// # Safety
/// As [`close_all_on_execute`].
#[allow(unsafe_code)]
unsafe fn keep_on_execute(descriptor: RawFd) -> c_int {
    // SAFETY: no pointers; the table is the child's own.
    unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) }
}
