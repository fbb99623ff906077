//! What every driver tells the guest's kernel. Pure.

/// The kernel's command line: how a panic and a reboot become a reset of the machine (`reset`), and what is of this driver
/// (`own`) or of this machine (`more`) alone.
///
/// With `panic=-1` a panic is a reboot at once.
///
/// The second line leaves out what a guest of one user has no use for and pays for at every start of a
/// program: groups of sessions for fairness, records of pressure and of audits, and the security modules
/// that Debian starts with no policy.
///
/// Memory is cleared when it is freed, and so not again when it is taken: as much work, and what a guest has
/// freed is zero in its snapshots, where zeros cost nothing and tell nobody what was there.
pub(crate) fn command_line(reset: &[&str], own: &[String], more: &[String]) -> String {
    const CONSOLE: [&str; 3] = ["console=ttyS0", "quiet", "panic=-1"];
    const LEFT_OUT: [&str; 4] = ["noautogroup", "psi=0", "audit=0", "lsm=landlock,yama"];
    const CLEARED: [&str; 2] = ["init_on_free=1", "init_on_alloc=0"];
    let common = CONSOLE.iter().chain(reset).chain(&LEFT_OUT).chain(&CLEARED).copied();
    common.chain(own.iter().chain(more).map(String::as_str)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::command_line;

    #[test]
    fn what_is_added_comes_last() {
        let line = command_line(&["reboot=k", "x"], &["own".to_owned()], &["a=1".to_owned(), "b".to_owned()]);
        assert!(line.starts_with("console=ttyS0 quiet panic=-1 reboot=k x noautogroup "), "{line}");
        assert!(line.ends_with(" init_on_alloc=0 own a=1 b"), "{line}");
    }
}
