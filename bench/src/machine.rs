//! The machine that numbers came from.

use std::{fs, process::Command};

/// What a reader has to know to compare.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The processor.
    pub cpu: String,
    /// How many of it.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel.
    pub kernel: String,
    /// The distribution.
    pub system: String,
    /// The VMM as it calls itself.
    pub vmm: String,
    /// What runs the guest's instructions.
    pub accelerator: String,
    /// Kind of the filesystem that holds snapshots and disks.
    pub filesystem: String,
}

impl Machine {
    /// Looks at this one.
    #[must_use]
    pub fn here(vmm: String, accelerator: String, snapshots: &camino::Utf8Path) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let uname = rustix::system::uname();
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: field(&read("/proc/meminfo"), "MemTotal").and_then(kilobytes).unwrap_or(0) / 1024,
            kernel: uname.release().to_string_lossy().into_owned(),
            system: os_name(&read("/etc/os-release")).unwrap_or("unknown").to_owned(),
            vmm,
            accelerator,
            filesystem: filesystem(snapshots),
        }
    }

    /// What is said of it, each with its name.
    #[must_use]
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let Self { cpu, cores, memory_mib, kernel, system, vmm, accelerator, filesystem } = self;
        vec![
            ("processor", format!("{cores} × {cpu}")),
            ("memory", format!("{memory_mib} MiB")),
            ("system", format!("{system}, Linux {kernel}")),
            ("filesystem of snapshots", filesystem.clone()),
            ("VMM", vmm.clone()),
            ("accelerator", accelerator.clone()),
        ]
    }
}

/// How many processes wanted to run, on average of the last minute.
#[must_use]
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

/// The value of `name : value` lines, the first one.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kilobytes(value: &str) -> Option<u64> {
    value.strip_suffix("kB")?.trim().parse().ok()
}

fn os_name(text: &str) -> Option<&str> {
    text.lines().find_map(|line| Some(line.strip_prefix("PRETTY_NAME=")?.trim_matches('"')))
}

/// The kind of the filesystem that holds a directory.
#[must_use]
pub fn filesystem(path: &camino::Utf8Path) -> String {
    let output = Command::new("stat").args(["-f", "-c", "%T", path.as_str()]).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: another\nMemTotal:  2048 kB\n";
        assert_eq!(field(text, "model name"), Some("A CPU @ 2 GHz"));
        assert_eq!(field(text, "MemTotal").and_then(kilobytes), Some(2048));
        assert_eq!(field(text, "flags"), None);
        assert_eq!(os_name("ID=debian\nPRETTY_NAME=\"Debian 12\"\n"), Some("Debian 12"));
    }
}
