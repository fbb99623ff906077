//! A child process in its own session, user and cgroup.
//!
//! # Why not fork
//!
//! The child shares the agent's memory until it runs its program (`CLONE_VM | CLONE_VFORK`), so that starting a
//! program costs no copying of page tables, however much memory the agent uses. `CLONE_INTO_CGROUP` makes it
//! be born in its cgroup: there is no moment at which it runs outside. `CLONE_PIDFD` gives a descriptor that
//! names exactly this process, whatever happens to its number.
//!
//! ```text
//! agent thread ──clone3──┬─(waits)──────────────────────────► reads the report ──► pidfd, or the step that failed
//!                        └─ child: signals, session, terminal, stdio, oom score, priorities, groups,
//!                                  gid, uid, directory, descriptors, execve ── failed ──► writes the report, exits
//! ```
//!
//! # What the child may do
//!
//! It runs in the memory of a program with other threads, whose locks may be held. So it makes system calls and
//! nothing else: no allocation, no panic, no lock, and nothing of libc that keeps state. In particular it calls
//! the kernel's `setuid` and not libc's, which would try to change the user of all threads. All that it needs is
//! prepared before. Signals are blocked around the clone and handlers are reset in the child, so no handler of
//! the agent ever runs in it.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::LazyLock,
};

use nix::libc;
use rustix::{
    io::Errno,
    process::{Pid, WaitId, WaitIdOptions, waitid},
};

/// The user that a child becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User number.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
}

/// What to run and how.
#[derive(Debug)]
pub struct Program<'a> {
    /// The paths to try, in order, until one can be run.
    pub candidates: &'a [CString],
    /// The arguments, the name first.
    pub arguments: &'a [CString],
    /// The whole environment, as `NAME=value`.
    pub environment: &'a [CString],
    /// Where to run it.
    pub directory: &'a CStr,
    /// Who to become; nobody else if absent.
    pub identity: Option<&'a Identity>,
    /// Standard input, output and error. None may itself be descriptor 0, 1 or 2.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal that shall become the controlling one.
    pub terminal: bool,
    /// How readily the kernel kills it when memory is short. Best effort.
    pub oom_score: Option<i16>,
    /// The directory of the cgroup v2 in which it is born.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A process that runs.
#[derive(Debug)]
pub struct Spawned {
    /// Its number.
    pub pid: Pid,
    /// A descriptor that becomes readable when it exits.
    pub pidfd: OwnedFd,
}

/// The steps of a start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Preparing the call, or the call itself.
    Clone = 1,
    /// Starting a session.
    Session,
    /// Taking the controlling terminal.
    Terminal,
    /// Putting standard input, output and error in place.
    Stdio,
    /// Taking the supplementary groups.
    Groups,
    /// Taking the primary group.
    Gid,
    /// Becoming the user.
    Uid,
    /// Entering the directory.
    Directory,
    /// Running the program.
    Execute,
}

/// Why a program does not run: the step that failed, with the kernel's reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot start a process: {step:?}")]
pub struct SpawnError {
    /// What failed.
    pub step: Step,
    /// Why.
    #[source]
    pub errno: Errno,
}

/// Everything the child reads, and the one thing it writes.
struct Orders {
    candidates: *const *const c_char,
    candidate_count: usize,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    directory: *const c_char,
    identity: *const Identity,
    stdio: [RawFd; 3],
    terminal: bool,
    ignored: u64,
    oom_score: *const u8,
    oom_score_length: usize,
    failed_step: u8,
    failed_errno: c_int,
}

const CLEAR_SIGNAL_HANDLERS: u64 = 0x1_0000_0000;
const INTO_CGROUP: u64 = 0x2_0000_0000;
const HIGHEST_SIGNAL: c_int = 64;
const IOPRIO_WHO_PROCESS: c_int = 1;
/// Class "best effort", level 4: what a process without a priority of its own has by its niceness.
const IOPRIO_BEST_EFFORT_4: c_int = 2 << 13 | 4;
const STACK: usize = 32 * 1024;

/// The kernel's `struct clone_args`.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Starts a program. It returns when the program runs, or when it is certain that it does not.
///
/// The calling thread waits until then, so do not call it on a thread that others depend on: a directory or
/// program on a dead network file system can take for ever.
pub fn spawn(program: &Program<'_>) -> Result<Spawned, SpawnError> {
    let refused = |errno| SpawnError { step: Step::Clone, errno };
    if program.stdio.iter().any(|descriptor| descriptor.as_raw_fd() <= 2) || program.arguments.is_empty() {
        return Err(refused(Errno::INVAL));
    }
    let candidates: Vec<_> = program.candidates.iter().map(|path| path.as_ptr()).collect();
    let arguments = null_terminated(program.arguments);
    let environment = null_terminated(program.environment);
    let oom_score = program.oom_score.map(|score| score.to_string()).unwrap_or_default();
    let mut orders = Orders {
        candidates: candidates.as_ptr(),
        candidate_count: candidates.len(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        directory: program.directory.as_ptr(),
        identity: program.identity.map_or(ptr::null(), ptr::from_ref),
        stdio: program.stdio.map(|descriptor| descriptor.as_raw_fd()),
        terminal: program.terminal,
        ignored: *IGNORED,
        oom_score: oom_score.as_ptr(),
        oom_score_length: oom_score.len(),
        failed_step: 0,
        failed_errno: 0,
    };
    let (pid, pidfd) = clone_child(&mut orders, program.cgroup).map_err(refused)?;
    // SAFETY: the child is gone from this memory (it runs its program or exited), so nobody else writes; it
    // wrote through a pointer that the compiler does not know of, hence volatile.
    #[allow(unsafe_code)]
    let (step, errno) = unsafe {
        (
            ptr::read_volatile(&raw const orders.failed_step),
            ptr::read_volatile(&raw const orders.failed_errno),
        )
    };
    match Step::from_report(step) {
        None => Ok(Spawned { pid, pidfd }),
        Some(step) => {
            // It exits by itself; only its entry in the process table is left.
            while let Err(Errno::INTR) =
                waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), WaitIdOptions::EXITED)
            {}
            Err(SpawnError { step, errno: Errno::from_raw_os_error(errno) })
        }
    }
}

impl Step {
    fn from_report(report: u8) -> Option<Self> {
        const ALL: [Step; 9] = [
            Step::Clone,
            Step::Session,
            Step::Terminal,
            Step::Stdio,
            Step::Groups,
            Step::Gid,
            Step::Uid,
            Step::Directory,
            Step::Execute,
        ];
        ALL.into_iter().find(|step| *step as u8 == report)
    }
}

/// The signals that this process ignores: SIGPIPE, as the Rust runtime has it, and what it was started with, for
/// example SIGINT if a shell put it in the background. Nobody here changes that later, so it is asked once.
static IGNORED: LazyLock<u64> =
    LazyLock::new(|| (1..=HIGHEST_SIGNAL).filter(|signal| is_ignored(*signal)).map(bit).sum());

fn is_ignored(signal: c_int) -> bool {
    let mut current = SignalAction::default();
    let nothing = ptr::null::<SignalAction>();
    // SAFETY: it asks only, and the kernel writes to a structure of its own layout.
    #[allow(unsafe_code)]
    let answer =
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, nothing, &raw mut current, size_of::<u64>()) };
    answer == 0 && current.handler == libc::SIG_IGN
}

/// The kernel's `struct sigaction`. The C library's call is no use here: it denies that some signals exist, which
/// may be ignored all the same. All zeros is the default.
#[repr(C)]
#[derive(Default)]
struct SignalAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Makes the child and waits until it has left this memory.
fn clone_child(orders: &mut Orders, cgroup: Option<BorrowedFd<'_>>) -> Result<(Pid, OwnedFd), Errno> {
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let mut pidfd: RawFd = -1;
    let mut flags = CLEAR_SIGNAL_HANDLERS;
    for flag in [libc::CLONE_VM, libc::CLONE_VFORK, libc::CLONE_PIDFD] {
        flags |= u64::from(flag.unsigned_abs());
    }
    if cgroup.is_some() {
        flags |= INTO_CGROUP;
    }
    let arguments = CloneArguments {
        flags,
        pidfd: (&raw mut pidfd).addr() as u64,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: stack.as_mut_ptr().addr() as u64,
        stack_size: STACK as u64,
        cgroup: cgroup.map_or(0, |cgroup| u64::from(cgroup.as_raw_fd().unsigned_abs())),
        ..CloneArguments::default()
    };

    // SAFETY: `everything` and `before` are valid for writes for the whole call, and blocking signals of this
    // thread has no other effect. clone3 gets a structure of the size that it is told; the child gets a stack of
    // its own that lives until the parent continues, which CLONE_VFORK delays until the child has left this
    // memory. The child runs `child`, which never returns and keeps to the rules of the module documentation.
    #[allow(unsafe_code)]
    let answer = unsafe {
        let mut everything: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut everything);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const everything, &raw mut before);
        let answer = clone3(&raw const arguments, orders);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        answer
    };
    if answer < 0 {
        return Err(Errno::from_raw_os_error(i32::try_from(-answer).unwrap_or(libc::EINVAL)));
    }
    let pid = i32::try_from(answer).ok().and_then(Pid::from_raw).ok_or(Errno::CHILD)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    #[allow(unsafe_code)]
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((pid, pidfd))
}

/// The system call itself: the parent gets its answer, the child calls [`child`] on its own stack.
///
/// # Safety
///
/// As in [`clone_child`]: the arguments name a stack that outlives the child's use of it, and `orders` too.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
unsafe fn clone3(arguments: *const CloneArguments, orders: *mut Orders) -> i64 {
    let mut answer = libc::SYS_clone3;
    // SAFETY: the kernel clobbers rcx, r11 and rax only. The child never leaves the assembly but by the call,
    // with its stack pointer at the (16-byte aligned) top of the new stack, as the calling convention wants.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {orders}",
            "call {child}",
            "ud2",
            "2:",
            orders = in(reg) orders,
            child = in(reg) child as unsafe extern "C" fn(*mut Orders) -> !,
            inlateout("rax") answer,
            in("rdi") arguments,
            in("rsi") size_of::<CloneArguments>(),
            // Not `lateout`: what the child reads after the call must not be placed here.
            out("rcx") _,
            out("r11") _,
        );
    }
    answer
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("write the clone3 call for this architecture");

/// The child's part. See the module documentation for what it may do.
///
/// # Safety
///
/// Only to be called in a child made by [`clone3`], with orders whose pointers are valid.
#[allow(unsafe_code)]
unsafe extern "C" fn child(orders: *mut Orders) -> ! {
    // SAFETY: the parent waits, so these are the only uses of `orders` and of what it points to, all of which the
    // parent keeps alive. Everything called here is a bare system call.
    unsafe {
        let (step, errno) = prepare_and_execute(&*orders);
        ptr::write_volatile(&raw mut (*orders).failed_errno, errno);
        ptr::write_volatile(&raw mut (*orders).failed_step, step as u8);
        libc::syscall(libc::SYS_exit_group, 127);
    }
    loop {
        std::hint::spin_loop();
    }
}

/// Does every step; comes back only with the one that failed.
///
/// # Safety
///
/// As [`child`].
#[allow(unsafe_code)]
unsafe fn prepare_and_execute(orders: &Orders) -> (Step, c_int) {
    // SAFETY: see `child`; every pointer given to the kernel is one that the parent prepared.
    unsafe {
        let errno = || *libc::__errno_location();
        // An ignored signal stays ignored across execve.
        for signal in (1..=HIGHEST_SIGNAL).filter(|signal| orders.ignored & bit(*signal) != 0) {
            let default = SignalAction::default();
            let nothing = ptr::null_mut::<SignalAction>();
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, nothing, size_of::<u64>());
        }

        if libc::syscall(libc::SYS_setsid) < 0 {
            return (Step::Session, errno());
        }
        if orders.terminal && libc::syscall(libc::SYS_ioctl, orders.stdio[0], libc::TIOCSCTTY, 0) < 0 {
            return (Step::Terminal, errno());
        }
        for (target, source) in [(0, orders.stdio[0]), (1, orders.stdio[1]), (2, orders.stdio[2])] {
            if libc::syscall(libc::SYS_dup3, source, target, 0) < 0 {
                return (Step::Stdio, errno());
            }
        }
        if orders.oom_score_length > 0 {
            set_oom_score(orders);
        }
        // Whatever priorities the agent has, a program gets the usual ones. Best effort, as the score above.
        libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, 0);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_4);
        if let Some(identity) = orders.identity.as_ref() {
            let (uid, gid) = (identity.uid, identity.gid);
            if libc::syscall(libc::SYS_setgroups, identity.groups.len(), identity.groups.as_ptr()) < 0 {
                return (Step::Groups, errno());
            }
            if libc::syscall(libc::SYS_setresgid, gid, gid, gid) < 0 {
                return (Step::Gid, errno());
            }
            if libc::syscall(libc::SYS_setresuid, uid, uid, uid) < 0 {
                return (Step::Uid, errno());
            }
        }
        if libc::syscall(libc::SYS_chdir, orders.directory) < 0 {
            return (Step::Directory, errno());
        }
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        let no_signals: u64 = 0;
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const no_signals,
            0_usize,
            size_of::<u64>(),
        );
        (Step::Execute, execute(orders))
    }
}

/// Writes the score; a guest without /proc has no use for one.
///
/// # Safety
///
/// As [`child`].
#[allow(unsafe_code)]
unsafe fn set_oom_score(orders: &Orders) {
    // SAFETY: a constant path and a buffer of the length that is given.
    unsafe {
        let path = c"/proc/self/oom_score_adj".as_ptr();
        let file = libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_WRONLY | libc::O_CLOEXEC, 0);
        if file >= 0 {
            libc::syscall(libc::SYS_write, file, orders.oom_score, orders.oom_score_length);
            libc::syscall(libc::SYS_close, file);
        }
    }
}

/// Tries the candidates as execvp does: what is not there is passed over, and a refusal is remembered.
///
/// # Safety
///
/// As [`child`].
#[allow(unsafe_code)]
unsafe fn execute(orders: &Orders) -> c_int {
    let mut answer = libc::ENOENT;
    for index in 0..orders.candidate_count {
        // SAFETY: the index is below the count, and the arrays end with a null pointer.
        let errno = unsafe {
            let path = *orders.candidates.add(index);
            libc::syscall(libc::SYS_execve, path, orders.arguments, orders.environment);
            *libc::__errno_location()
        };
        match errno {
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
            libc::EACCES => answer = libc::EACCES,
            other => return other,
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, pipe},
        os::fd::AsFd,
    };

    use super::*;

    fn strings<const N: usize>(list: [&str; N]) -> Vec<CString> {
        list.map(|text| CString::new(text).unwrap()).to_vec()
    }

    fn run(candidates: &[CString], script: &str, identity: Option<&Identity>) -> Result<String, SpawnError> {
        let null = File::open("/dev/null").unwrap();
        let (mut reader, writer) = pipe().unwrap();
        let arguments = strings(["sh", "-c", script]);
        let program = Program {
            candidates,
            arguments: &arguments,
            environment: &strings(["A=1", "PATH=/usr/bin:/bin"]),
            directory: c"/",
            identity,
            stdio: [null.as_fd(), writer.as_fd(), writer.as_fd()],
            terminal: false,
            oom_score: Some(100),
            cgroup: None,
        };
        let spawned = spawn(&program)?;
        drop(writer);
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        let status = waitid(WaitId::PidFd(spawned.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0), "{output}");
        Ok(output)
    }

    #[test]
    fn a_program_runs_with_what_it_was_given_and_nothing_else() {
        let script = "echo $A $PWD; ls /proc/self/fd | wc -l; cat /proc/self/oom_score_adj; \
                      sed -n 's/Sig\\(Ign\\|Blk\\):\t//p' /proc/self/status";
        let output = run(&strings(["/nowhere/sh", "/bin/sh"]), script, None).unwrap();
        let mut lines = output.lines();
        assert_eq!(lines.next(), Some("1 /"));
        assert_eq!(lines.next(), Some("4"), "`ls` itself opens one descriptor beside the three");
        assert_eq!(lines.next(), Some("100"));
        let mut mask = || u64::from_str_radix(lines.next().unwrap(), 16).unwrap();
        assert_eq!(mask(), 0, "no signal is blocked");
        assert_eq!(mask() & (1 << (libc::SIGPIPE - 1)), 0, "a broken pipe kills");
    }

    #[test]
    fn the_user_and_all_groups_change() {
        let identity = Identity { uid: 1234, gid: 1235, groups: vec![1235, 27] };
        let output = run(
            &strings(["/bin/sh"]),
            "id -u; id -g; id -G; grep ^CapEff /proc/self/status",
            Some(&identity),
        );
        assert_eq!(output.unwrap(), "1234\n1235\n1235 27\nCapEff:\t0000000000000000\n");
    }

    #[test]
    fn a_start_that_fails_says_where() {
        let missing = run(&strings(["/nowhere/sh"]), "", None).unwrap_err();
        assert_eq!(missing, SpawnError { step: Step::Execute, errno: Errno::NOENT });
        let refused = run(&strings(["/etc/passwd", "/nowhere/sh"]), "", None).unwrap_err();
        assert_eq!(refused, SpawnError { step: Step::Execute, errno: Errno::ACCESS });
        let nobody = Identity { uid: 65534, gid: 65534, groups: vec![65534] };
        let program_of = |directory, stdio: [BorrowedFd<'_>; 3]| {
            spawn(&Program {
                candidates: &strings(["/bin/true"]),
                arguments: &strings(["true"]),
                environment: &[],
                directory,
                identity: Some(&nobody),
                stdio,
                terminal: false,
                oom_score: None,
                cgroup: None,
            })
        };
        let null = File::open("/dev/null").unwrap();
        let stdio = [null.as_fd(); 3];
        assert_eq!(program_of(c"/nowhere", stdio).unwrap_err().step, Step::Directory);
        let standard = std::io::stdin();
        let low = program_of(c"/", [standard.as_fd(), null.as_fd(), null.as_fd()]).unwrap_err();
        assert_eq!(low, SpawnError { step: Step::Clone, errno: Errno::INVAL });
    }

    /// A program never runs as somebody else than was asked for, also not with some groups too many.
    #[test]
    fn who_cannot_become_the_user_starts_nothing() {
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        let table = [
            (CapabilitySet::empty(), None),
            (CapabilitySet::SETGID, Some(Step::Groups)),
            (CapabilitySet::SETUID, Some(Step::Uid)),
        ];
        for (missing, step) in table {
            let attempt = move || {
                let mut sets = capabilities(None).unwrap();
                sets.effective -= missing;
                set_capabilities(None, sets).unwrap();
                let identity = Identity { uid: 1234, gid: 1235, groups: vec![1235, 27] };
                run(&strings(["/bin/sh"]), "id -u", Some(&identity))
            };
            // What a thread gives up it gives up for itself.
            let outcome = std::thread::spawn(attempt).join().unwrap();
            let expected = step.map(|step| SpawnError { step, errno: Errno::PERM });
            assert_eq!(outcome, expected.map_or_else(|| Ok("1234\n".to_owned()), Err));
        }
    }

    #[test]
    fn many_threads_at_once() {
        let candidates = strings(["/bin/sh"]);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let candidates = &candidates;
                scope.spawn(move || {
                    for turn in 0..20 {
                        let script = format!("echo {thread} {turn}");
                        assert_eq!(run(candidates, &script, None).unwrap(), format!("{thread} {turn}\n"));
                    }
                });
            }
        });
    }
}
