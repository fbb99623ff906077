//! Giving up system calls: a filter of the kernel's (seccomp) that lets a thread do what it needs, and nothing else.
//!
//! What is not on the list fails with `EPERM`, so that a library which can do without goes on. A call of another
//! architecture's numbers ends the process: nothing that is meant well makes one.

use std::io;

use nix::libc;

use crate::userfaultfd;

/// A system call that may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    number: libc::c_long,
    /// Which argument has to have which value; any if none. Of the value only the lower half is looked at, which is
    /// all that the kernel looks at where it takes an `int`.
    only: Option<(u32, u32)>,
}

impl Call {
    /// A new socket, if it is one of IPv4.
    pub const IPV4_SOCKET: Self =
        Self { number: libc::SYS_socket, only: Some((0, libc::AF_INET.cast_unsigned())) };

    const fn any(number: libc::c_long) -> Self {
        Self { number, only: None }
    }
}

/// To use sockets, pipes and events that are there, or that come from them.
pub const OF_SOCKETS: &[Call] = &[
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_readv),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_recvfrom),
    Call::any(libc::SYS_recvmsg),
    Call::any(libc::SYS_sendto),
    Call::any(libc::SYS_sendmsg),
    Call::any(libc::SYS_close),
    Call::any(libc::SYS_shutdown),
    Call::any(libc::SYS_bind),
    Call::any(libc::SYS_connect),
    Call::any(libc::SYS_accept4),
    Call::any(libc::SYS_getsockname),
    Call::any(libc::SYS_getpeername),
    Call::any(libc::SYS_getsockopt),
    Call::any(libc::SYS_setsockopt),
    Call::any(libc::SYS_fcntl),
    Call::any(libc::SYS_epoll_ctl),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_pwait2),
    #[expect(clippy::cast_possible_truncation, reason = "the number of the request has 32 bits")]
    Call { number: libc::SYS_ioctl, only: Some((1, libc::FIONBIO as u32)) },
];

/// To have memory and locks, random numbers among it, and to end.
pub const OF_MEMORY: &[Call] = &[
    Call::any(libc::SYS_brk),
    Call::any(libc::SYS_mmap),
    Call::any(libc::SYS_munmap),
    Call::any(libc::SYS_mremap),
    Call::any(libc::SYS_mprotect),
    Call::any(libc::SYS_madvise),
    Call::any(libc::SYS_futex),
    Call::any(libc::SYS_getrandom),
    Call::any(libc::SYS_gettid),
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_rt_sigaction),
    Call::any(libc::SYS_rt_sigreturn),
    Call::any(libc::SYS_sigaltstack),
    Call::any(libc::SYS_exit),
    Call::any(libc::SYS_exit_group),
];

/// To know the time and to wait.
pub const OF_TIME: &[Call] = &[
    Call::any(libc::SYS_clock_gettime),
    Call::any(libc::SYS_clock_nanosleep),
    Call::any(libc::SYS_gettimeofday),
    Call::any(libc::SYS_restart_syscall),
    Call::any(libc::SYS_sched_yield),
];

/// To be sent a memory over a socket that is listened to, to serve its page faults from files that are open, and to write
/// to those that are.
pub const OF_PAGING: &[Call] = &[
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_pread64),
    Call::any(libc::SYS_pwrite64),
    Call::any(libc::SYS_accept4),
    Call::any(libc::SYS_getsockopt),
    Call::any(libc::SYS_recvmsg),
    Call::any(libc::SYS_sendto),
    Call::any(libc::SYS_close),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll),
    Call::any(libc::SYS_ppoll),
    Call { number: libc::SYS_ioctl, only: Some((1, userfaultfd::COPY)) },
    Call { number: libc::SYS_ioctl, only: Some((1, userfaultfd::ZEROPAGE)) },
    Call { number: libc::SYS_ioctl, only: Some((1, userfaultfd::WAKE)) },
];

/// The numbers by which the kernel knows this architecture (`linux/audit.h`).
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Where the parts of `struct seccomp_data` are.
pub(crate) const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
pub(crate) const ARGUMENTS_AT: u32 = 16;

pub(crate) const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
pub(crate) const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
pub(crate) const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

pub(crate) fn instruction(code: u32, k: u32, if_equal: u8, else_: u8) -> libc::sock_filter {
    #[expect(clippy::cast_possible_truncation, reason = "all codes have 16 bits")]
    libc::sock_filter { code: code as u16, jt: if_equal, jf: else_, k }
}

/// The program of a filter. Each call is a block of its own that either allows or falls through, so that no jump is
/// long. Pure.
fn program(calls: &[Call]) -> Vec<libc::sock_filter> {
    let verdict = |verdict| instruction(RETURN, verdict, 0, 0);
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE_AT, 0, 0),
        instruction(JUMP_IF_EQUAL, ARCHITECTURE, 1, 0),
        verdict(libc::SECCOMP_RET_KILL_PROCESS),
    ];
    for call in calls {
        program.push(instruction(LOAD, NUMBER_AT, 0, 0));
        // No number of a call is negative, and none is as large as that.
        let number = u32::try_from(call.number).unwrap_or(u32::MAX);
        match call.only {
            None => program.push(instruction(JUMP_IF_EQUAL, number, 0, 1)),
            Some((argument, value)) => {
                program.push(instruction(JUMP_IF_EQUAL, number, 0, 3));
                // Little endian: the lower half comes first.
                program.push(instruction(LOAD, ARGUMENTS_AT + 8 * argument, 0, 0));
                program.push(instruction(JUMP_IF_EQUAL, value, 0, 1));
            }
        }
        program.push(verdict(libc::SECCOMP_RET_ALLOW));
    }
    program.push(verdict(libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()));
    program
}

/// Lets the calling thread, and every thread and process that it makes, make no other calls than these, for ever. The
/// thread can gain no privileges any more, which the kernel asks for.
///
/// # Errors
/// The kernel has no such filters.
pub fn allow_only(calls: &[Call]) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let mut program = program(calls);
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies `length` instructions from the vector, which lives until after the call, and keeps no
    // pointer. What the filter forbids fails with an error, as any call may.
    #[allow(unsafe_code)]
    let outcome = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        net::{TcpListener, UdpSocket},
        os::unix::net::UnixDatagram,
    };

    use super::*;

    #[test]
    fn a_thread_can_do_what_it_is_allowed_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let confined = std::thread::spawn(move || {
            let status = File::open("/proc/thread-self/status").unwrap();
            allow_only(&[OF_SOCKETS, OF_MEMORY, OF_TIME, &[Call::IPV4_SOCKET]].concat()).unwrap();
            let denied = |outcome: io::Error| assert_eq!(outcome.kind(), io::ErrorKind::PermissionDenied);
            denied(File::open("/etc/hostname").unwrap_err());
            denied(UnixDatagram::unbound().unwrap_err());
            denied(UdpSocket::bind("[::1]:0").unwrap_err());
            denied(nix::unistd::pipe().unwrap_err().into());
            denied(nix::sys::signal::kill(nix::unistd::getpid(), None).unwrap_err().into());
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            assert!(vec![1_u8; 32 << 20].iter().all(|byte| *byte == 1));
            let stream = std::net::TcpStream::connect(address).unwrap();
            let accepted = listener.accept().unwrap();
            drop((socket, stream, accepted));
            io::read_to_string(status).unwrap()
        });
        let status = confined.join().unwrap();
        assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
        // Another thread has lost nothing.
        File::open("/etc/hostname").unwrap();
    }

    /// What the kernel would do, for the few instructions that there are.
    fn verdict(program: &[libc::sock_filter], data: &[u8]) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) {
                LOAD => {
                    let place = usize::try_from(step.k).unwrap();
                    loaded = u32::from_ne_bytes(data[place..place + 4].try_into().unwrap());
                }
                JUMP_IF_EQUAL => at += usize::from(if loaded == step.k { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("{other}"),
            }
        }
    }

    fn data(number: i32, architecture: u32, first: u64, second: u64) -> Vec<u8> {
        let mut data = [number.to_ne_bytes(), architecture.to_ne_bytes()].concat();
        for part in [0, first, second, 0, 0, 0, 0] {
            data.extend(part.to_ne_bytes());
        }
        data
    }

    #[test]
    fn every_call_has_the_verdict_that_the_list_says() {
        let calls = [OF_SOCKETS, OF_MEMORY, OF_TIME, &[Call::IPV4_SOCKET]].concat();
        let program = program(&calls);
        for number in -2..1024_i32 {
            for (first, second) in [(0, 0), (2, 0), (2 << 32, 0x5421), (10, 0x5421), (1 << 32 | 2, 0x5411)] {
                let is_allowed = |call: &Call| {
                    let argument = |which| if which == 0 { first } else { second };
                    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
                    let fits = call.only.is_none_or(|(which, value)| argument(which) as u32 == value);
                    call.number == i64::from(number) && fits
                };
                let wanted = match calls.iter().any(is_allowed) {
                    true => libc::SECCOMP_RET_ALLOW,
                    false => libc::SECCOMP_RET_ERRNO | 1,
                };
                let data = |architecture| data(number, architecture, first, second);
                assert_eq!(verdict(&program, &data(ARCHITECTURE)), wanted, "{number} {first} {second}");
                let strange = verdict(&program, &data(ARCHITECTURE ^ 1));
                assert_eq!(strange, libc::SECCOMP_RET_KILL_PROCESS);
            }
        }
    }
}
