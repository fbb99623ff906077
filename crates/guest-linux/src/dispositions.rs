//! What this process does with signals, as far as its children inherit it.

use std::{io, ptr};

use nix::libc;

/// Lets every signal do again what it does by default, unless it is handled or is `SIGPIPE`, which the runtime of
/// this program ignores for itself.
///
/// A program that is started with a signal ignored hands that on to everything that it starts: a shell's
/// background job, for one, would start terminals in which Ctrl-C does nothing. To be called before there are threads.
pub fn stop_ignoring() -> io::Result<()> {
    for signal in 1..libc::SIGRTMAX() {
        if [libc::SIGKILL, libc::SIGSTOP, libc::SIGPIPE].contains(&signal) {
            continue;
        }
        // SAFETY: both are plain data of which all zeroes is a valid value, and live for the whole call.
        #[allow(unsafe_code)]
        let (done, found) = unsafe {
            let mut found: libc::sigaction = std::mem::zeroed();
            (libc::sigaction(signal, ptr::null(), &raw mut found), found.sa_sigaction)
        };
        // Some numbers below the first real-time signal are the C library's own, and it refuses them.
        if done != 0 || found != libc::SIG_IGN {
            continue;
        }
        // SAFETY: as above; the default needs no handler, so nothing of ours runs in a signal.
        #[allow(unsafe_code)]
        let done = unsafe {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &raw const default, ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disposition(signal: i32) -> libc::sighandler_t {
        // SAFETY: as in `stop_ignoring`.
        #[allow(unsafe_code)]
        unsafe {
            let mut found: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(signal, ptr::null(), &raw mut found), 0);
            found.sa_sigaction
        }
    }

    #[test]
    fn what_was_ignored_is_not_any_more() {
        // SAFETY: ignoring a signal runs nothing of ours.
        #[allow(unsafe_code)]
        unsafe {
            libc::signal(libc::SIGINT, libc::SIG_IGN);
            libc::signal(libc::SIGQUIT, libc::SIG_IGN);
        }
        stop_ignoring().unwrap();
        assert_eq!(disposition(libc::SIGINT), libc::SIG_DFL);
        assert_eq!(disposition(libc::SIGQUIT), libc::SIG_DFL);
        assert_eq!(disposition(libc::SIGPIPE), libc::SIG_IGN, "the runtime's own");
    }
}
