//! The first process of the lab, and its only service.
//!
//! ```text
//!  initramfs: modules of the disks ─► the port ─► the root disk becomes the root
//!     ─► what a host has mounted ─► the second disk, with the plan ─► modules of the plan ─► Ready
//!     ─► each program ─► all that it left behind is killed ─► files ─► Done ─► waits to be ended
//! ```
//!
//! Whatever fails before `Ready` is said to the host, and the machine ends; so does one whose first process dies,
//! because the kernel is told to start anew at a panic and QEMU to end instead.

#![allow(clippy::print_stderr, reason = "the console is where the first process of a machine speaks")]

mod machine;
mod port;
mod programs;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use rustix::system::RebootCommand;
use wrenn_lab::{
    message::{MAXIMUM, Message},
    plan::{OUTPUT, Plan},
};

use crate::port::Port;

fn main() {
    if let Err(error) = live() {
        eprintln!("wrenn-lab-init: {error:#}");
    }
    // Nobody is left who could be told that this fails.
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
}

fn live() -> Result<()> {
    let port = machine::reach_host()?;
    if let Err(error) = work(&port) {
        port.send(&Message::Failed(format!("{error:#}")))?;
    }
    // The host ends the machine when it has read the last message; before that nothing may be taken from it.
    loop {
        std::thread::park();
    }
}

fn work(port: &Port) -> Result<()> {
    let plan = machine::become_host()?;
    port.send(&Message::Ready(machine::kernel_version()?))?;
    for program in &plan.programs {
        let how = programs::run(program, &plan.environment, port)
            .with_context(|| format!("running {}", program.path.display()))?;
        port.send(&Message::Ended(how))?;
    }
    send_files(&plan, port)?;
    port.send(&Message::Done)
}

fn send_files(plan: &Plan, port: &Port) -> Result<()> {
    let is_empty = fs::read_dir(OUTPUT).with_context(|| format!("reading {OUTPUT}"))?.next().is_none();
    if is_empty {
        return Ok(());
    }
    programs::relay(
        Path::new("tar"),
        &["--create", "--sparse", "--directory", OUTPUT, "."],
        &plan.environment,
        |part| port.send(&Message::Files(part.to_vec())),
    )
    .context("packing the files that were left for the host")
}

/// How much of a stream is one message.
const PART: usize = MAXIMUM;
