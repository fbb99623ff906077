//! What the machine must offer, and what to do where it does not.

use std::{
    env,
    ffi::OsStr,
    fs::{self, OpenOptions},
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

/// Capabilities without which no namespace, TAP device or mount can be made, with their bit numbers.
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// Installing packages and making images needs root.
pub(crate) fn require_root(what: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    bail!("{what} needs root: run the same command as root, for example with `sudo -E`");
}

/// Running sandboxes needs root with its capabilities, and TAP devices.
pub(crate) fn require_sandboxes() -> Result<()> {
    require_root("running sandboxes (network namespaces, TAP devices)")?;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status);
    if !missing.is_empty() {
        bail!(
            "root lacks {} here, which network namespaces and TAP devices need: in a container, start it with \
             `--privileged`, or with `--cap-add` for each of them and `--device /dev/net/tun`",
            missing.join(" and ")
        );
    }
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound && !Path::new("/sys/class/misc/tun").exists() => {
            bail!(
                "/dev/net/tun is missing, and so is the kernel's TUN/TAP driver, which connects sandboxes to the network: \
             load it with `modprobe tun`"
            )
        }
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "/dev/net/tun is missing, though the kernel has the driver: make it with \
             `mkdir -p /dev/net && mknod /dev/net/tun c 10 200`; in a container, start it with `--device /dev/net/tun`"
        ),
        Err(error) => bail!(
            "/dev/net/tun cannot be opened ({error}): in a container, start it with `--device /dev/net/tun`"
        ),
    }
}

/// Where a program is on such a `PATH`.
pub(crate) fn on_path(program: &str, path: &OsStr, is_program: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    env::split_paths(path).map(|directory| directory.join(program)).find(|place| is_program(place))
}

/// Whether that is a file which can be started.
pub(crate) fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn missing_capabilities(status: &str) -> Vec<&'static str> {
    let Some(effective) = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
    else {
        // Not said: then the first use tells.
        return Vec::new();
    };
    CAPABILITIES.iter().filter(|(_, bit)| effective & (1 << bit) == 0).map(|(name, _)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_a_file_that_can_be_started() {
        let home = tempfile::tempdir().unwrap();
        let place = |name: &str| home.path().join(name).join("program");
        fs::create_dir_all(place("directory")).unwrap();
        for (name, mode) in [("text", 0o644), ("first", 0o755), ("second", 0o755)] {
            fs::create_dir(home.path().join(name)).unwrap();
            fs::write(place(name), "").unwrap();
            fs::set_permissions(place(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let found = |names: &[&str]| {
            let path = env::join_paths(names.iter().map(|name| home.path().join(name))).unwrap();
            on_path("program", &path, is_program)
        };
        assert_eq!(found(&["nowhere", "directory", "text", "first", "second"]), Some(place("first")));
        assert_eq!(found(&["directory", "text"]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn names_the_capabilities_that_are_missing() {
        assert_eq!(missing_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"), Vec::<&str>::new());
        // What a container gets by default.
        assert_eq!(missing_capabilities("CapEff:\t00000000a80425fb\n"), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert_eq!(missing_capabilities(""), Vec::<&str>::new());
    }
}
