//! The init role: process 1 of the guest.
//!
//! ```text
//!  kernel unpacks the initramfs: /init (this program), /modules/*.ko, /modules/order
//!    │
//!    ├─ mounts      /proc /sys /dev /dev/pts /dev/shm /run
//!    ├─ modules     in the order of /modules/order
//!    ├─ network     lo and eth0
//!    ├─ root        /dev/vda? mount it, move there, free the initramfs ── no disk: stay here
//!    ├─ cgroups     one for the processes of users
//!    └─ supervise   the agent as a child: reap, restart, power off
//! ```
//!
//! A panic here is a panic of the kernel, so there is no `unwrap`, and the agent, which speaks to the network, is
//! another process. What a guest can live without is reported on the console and passed over. A disk that is there
//! and cannot be mounted is not such a thing: the guest powers off.

mod modules;
mod mounts;
mod network;
mod root;
pub(crate) mod supervise;

use std::process::ExitCode;

use wrenn_guest_linux::uevent::Uevents;

use crate::console::{chain, say};

/// Runs as process 1. It returns only if the machine cannot be powered off, and then the kernel panics.
pub(crate) fn run() -> ExitCode {
    report("mount", mounts::mount_all());
    // Before the modules are loaded, so that no announcement of theirs is missed.
    let events = Uevents::open();
    report("load modules", modules::load_all());
    report("configure the network", network::configure());
    match root::enter(events.ok().as_ref()) {
        Ok(()) => {
            report("make cgroups", mounts::mount_cgroups());
            report("cover the boot's name", crate::names::cover_boot_id());
            supervise::run();
        }
        Err(error) => say(format_args!("cannot enter the root disk: {}", chain(&error))),
    }
    supervise::power_off()
}

fn report<E: std::error::Error>(what: &str, done: Result<(), E>) {
    if let Err(error) = done {
        say(format_args!("cannot {what}: {}", chain(&error)));
    }
}
