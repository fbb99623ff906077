//! The root disk of a machine: a chain of files, which only QEMU knows for certain, and so it is asked.
//!
//! ```text
//!  device ─► disk-2 ─► disk-1 ─► disk ─► what the headers name       nodes, as QEMU calls them
//!            overlay   overlay   file    ...
//!            written   never written again
//! ```
//!
//! A file is put on top in two steps: it is opened, alone, and then the device is turned to it
//! (`blockdev-snapshot`). One that was opened and is in no chain is from an attempt that failed, and is closed by
//! the next one; so is one that a stream has made superfluous.

use std::{num::NonZeroU64, os::fd::OwnedFd, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::{
    arguments::{DISK, DISK_DEVICE},
    disk_files::{self, Layer, Sets, name_of_set},
    machine::{Machine, START_BOUND},
    qmp::Qmp,
};
use crate::{DiskRate, DiskSpec, VmmError, VmmResult, validate};

/// The job that copies a chain into its top. There is one at a time.
const STREAM: &str = "stream";
/// How long a copying may make no progress.
const STALL_BOUND: Duration = Duration::from_secs(60);
/// How often its progress is looked at; its end is told by an event.
const LOOK: Duration = Duration::from_secs(1);

/// The largest rate that QEMU knows.
const LARGEST_RATE: u64 = 1_000_000_000_000_000;

/// The disk as QEMU has it.
#[derive(Debug, PartialEq, Eq)]
struct Disk {
    /// The node to which the device is turned.
    top: String,
    /// What the guest sees.
    bytes: u64,
    /// The files, the top first.
    chain: Vec<Utf8PathBuf>,
}

impl Disk {
    /// Finds the machine's only disk in what `query-block` says.
    fn parse(devices: &Value, sets: &Sets) -> Option<Self> {
        let inserted = devices.as_array()?.iter().map(|device| &device["inserted"]);
        let disk = inserted.into_iter().find(|inserted| inserted.is_object())?;
        let mut image = &disk["image"];
        let bytes = image["virtual-size"].as_u64()?;
        let mut chain = Vec::new();
        while let Some(name) = image["filename"].as_str() {
            chain.push(sets.path(path_of(name)?));
            image = &image["backing-image"];
        }
        let top = disk["node-name"].as_str()?.to_owned();
        (!chain.is_empty()).then_some(Self { top, bytes, chain })
    }
}

/// The path of a file: QEMU calls it so, or describes in JSON how it was opened.
fn path_of(name: &str) -> Option<Utf8PathBuf> {
    let Some(description) = name.strip_prefix("json:") else { return Some(name.into()) };
    let description: Value = serde_json::from_str(description).ok()?;
    let mut node = &description;
    while node["filename"].is_null() && node["file"].is_object() {
        node = &node["file"];
    }
    // A nested description may be flat: `file.filename`.
    let path = node["filename"].as_str().or_else(|| node["file.filename"].as_str())?;
    Some(path.into())
}

/// The names of our own nodes, in what `query-named-block-nodes` says.
fn own_nodes(nodes: &Value) -> impl Iterator<Item = &str> {
    let names = nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str());
    names.filter(|name| {
        let number = name.strip_prefix(DISK).map(|rest| rest.strip_prefix('-').unwrap_or(rest));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// A name for the next node.
fn next_node(nodes: &Value) -> String {
    let number = |name: &str| name.rsplit_once('-').and_then(|(_, number)| number.parse().ok());
    let last: u32 = own_nodes(nodes).filter_map(number).max().unwrap_or_default();
    format!("{DISK}-{}", last + 1)
}

/// The node that gives a file of a chain its format, in what `query-named-block-nodes` says.
fn node_of<'a>(nodes: &'a Value, file: &Utf8Path, sets: &Sets) -> Option<&'a str> {
    let has_format = |node: &&Value| !matches!(node["drv"].as_str(), None | Some("file" | "host_device"));
    let path = |node: &Value| node["file"].as_str().and_then(path_of).map(|name| sets.path(name));
    let is_it = |node: &&Value| path(node).is_some_and(|path| path == file);
    nodes.as_array()?.iter().filter(has_format).find(is_it)?["node-name"].as_str()
}

/// Bounds what a machine reads and writes of its disk. A QEMU that was just started bounds nothing.
pub(super) async fn set_rate(qmp: &Qmp, rate: DiskRate) -> VmmResult<()> {
    if rate.is_free() {
        return Ok(());
    }
    // It takes no larger numbers, and 0 for none.
    let number = |bound: Option<NonZeroU64>| bound.map_or(0, |bound| bound.get().min(LARGEST_RATE));
    let arguments = json!({
        "id": DISK_DEVICE, "bps": number(rate.bytes), "bps_rd": 0, "bps_wr": 0,
        "iops": number(rate.operations), "iops_rd": 0, "iops_wr": 0,
    });
    qmp.execute("block_set_io_throttle", arguments, START_BOUND).await.map(drop)
}

impl Machine {
    async fn disk(&self, operation: &'static str) -> VmmResult<Disk> {
        let sets = self.sets(operation).await?;
        let devices = self.command(operation, "query-block", Value::Null).await?;
        Disk::parse(&devices, &sets).ok_or_else(|| {
            let message = "it says nothing of a disk".to_owned();
            VmmError::Refused { command: "query-block".to_owned(), message }
        })
    }

    /// The files that it was handed.
    async fn sets(&self, operation: &'static str) -> VmmResult<Sets> {
        Ok(Sets::parse(&self.command(operation, "query-fdsets", Value::Null).await?))
    }

    async fn nodes(&self, operation: &'static str) -> VmmResult<Value> {
        self.command(operation, "query-named-block-nodes", json!({"flat": true})).await
    }

    pub(super) async fn resize(&self, bytes: u64) -> VmmResult<()> {
        const OPERATION: &str = "resize_disk";
        let disk = self.disk(OPERATION).await?;
        let present = disk.bytes;
        if bytes < present {
            let problem = format!("it has {present} bytes already, and {bytes} are fewer");
            return Err(VmmError::Spec { field: "disk", problem });
        }
        if bytes > present {
            self.command(OPERATION, "block_resize", json!({"node-name": disk.top, "size": bytes})).await?;
        }
        Ok(())
    }

    pub(super) async fn chain(&self) -> VmmResult<Vec<Utf8PathBuf>> {
        Ok(self.disk("disk_chain").await?.chain)
    }

    pub(super) async fn pivot(&self, overlay: &DiskSpec) -> VmmResult<()> {
        const OPERATION: &str = "pivot_disk";
        let disk = self.disk(OPERATION).await?;
        validate::overlay(overlay, &disk.chain[0], Some(disk.bytes))?;
        self.end_stream(OPERATION).await?;
        let nodes = self.close_unused(OPERATION, &disk.top).await?;
        let node = next_node(&nodes);
        // It may see none of the host's files: it is handed this one.
        let files = disk_files::open(&overlay.path, true)?;
        let set = self.hand_over(OPERATION, files).await?;
        let mut description = Layer::new(name_of_set(set), overlay).description();
        description["node-name"] = node.as_str().into();
        // Opened alone: what is below it is open already.
        description["backing"] = Value::Null;
        let turn = json!({"node": disk.top, "overlay": node});
        let turned = async {
            self.command(OPERATION, "blockdev-add", description).await?;
            self.command(OPERATION, "blockdev-snapshot", turn).await
        };
        match turned.await {
            // What is below it is not written any more.
            Ok(_) => self.close_superfluous(OPERATION).await,
            Err(error) => {
                // The first error is the one to tell.
                drop(self.command(OPERATION, "blockdev-del", json!({"node-name": node})).await);
                drop(self.take_back(OPERATION, set).await);
                Err(error)
            }
        }
    }

    /// Hands QEMU descriptors of a file, each with a note; under which number it knows the file.
    pub(super) async fn hand_over(
        &self,
        operation: &'static str,
        files: Vec<(String, OwnedFd)>,
    ) -> VmmResult<u64> {
        let mut set = None;
        for (note, file) in files {
            let mut arguments = json!({"opaque": note});
            if let Some(set) = set {
                arguments["fdset-id"] = set;
            }
            let answer = self.command_with(operation, "add-fd", arguments, file).await?;
            set = Some(answer["fdset-id"].clone());
        }
        set.and_then(|set| set.as_u64()).ok_or_else(|| {
            let message = "it does not say under which number".to_owned();
            VmmError::Refused { command: "add-fd".to_owned(), message }
        })
    }

    /// Has QEMU close what it was handed and does not need any more. One whose guest stands still closes it when that runs and
    /// this is asked for again.
    ///
    /// What is removed on the host frees no room before it is closed here, and what can still be written counts as written.
    pub(super) async fn close_superfluous(&self, operation: &'static str) -> VmmResult<()> {
        let sets = self.sets(operation).await?;
        let chain = if self.has_disk { self.disk(operation).await?.chain } else { Vec::new() };
        for known in sets.superfluous(&chain) {
            let which = json!({"fdset-id": known.set, "fd": known.number});
            match self.command(operation, "remove-fd", which).await {
                // It is gone already.
                Ok(_) | Err(VmmError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Has QEMU close a file that it was handed, once it does not use it.
    pub(super) async fn take_back(&self, operation: &'static str, set: u64) -> VmmResult<()> {
        self.command(operation, "remove-fd", json!({"fdset-id": set})).await.map(drop)
    }

    pub(super) async fn stream(&self, base: &Utf8Path) -> VmmResult<()> {
        const OPERATION: &str = "stream_disk";
        match self.stream_ended(OPERATION).await {
            // What an earlier call began and nobody waited for: what is still to do is seen below.
            Ok(()) | Err(VmmError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        let disk = self.disk(OPERATION).await?;
        let at = validate::below_the_top(&disk.chain, base)?;
        if at > 1 {
            let base = &disk.chain[at];
            let nodes = self.nodes(OPERATION).await?;
            let Some(node) = node_of(&nodes, base, &self.sets(OPERATION).await?) else {
                let message = format!("it says nothing of {base}");
                return Err(VmmError::Refused { command: "query-named-block-nodes".to_owned(), message });
            };
            let copy = json!({
                "job-id": STREAM, "device": disk.top, "base-node": node, "backing-file": base,
                "auto-dismiss": false,
            });
            self.command(OPERATION, "block-stream", copy).await?;
            self.stream_ended(OPERATION).await?;
        }
        self.close_unused(OPERATION, &disk.top).await.map(drop)
    }

    /// Waits for the end of a stream, if there is one, and forgets it.
    async fn stream_ended(&self, operation: &'static str) -> VmmResult<()> {
        let mut facts = self.facts();
        let (mut progress, mut since) = (None, Instant::now());
        loop {
            facts.borrow_and_update();
            let jobs = self.command(operation, "query-jobs", Value::Null).await?;
            let Some(job) = jobs.as_array().into_iter().flatten().find(|job| job["id"] == STREAM) else {
                return Ok(());
            };
            if job["status"] == "concluded" {
                self.command(operation, "job-dismiss", json!({"id": STREAM})).await?;
                return match job["error"].as_str() {
                    Some(error) => {
                        let message = error.to_owned();
                        Err(VmmError::Refused { command: "block-stream".to_owned(), message })
                    }
                    None => Ok(()),
                };
            }
            let now = job["current-progress"].as_u64();
            if progress != now {
                (progress, since) = (now, Instant::now());
            } else if since.elapsed() > STALL_BOUND {
                drop(self.command(operation, "job-cancel", json!({"id": STREAM})).await);
                return Err(VmmError::Timeout { operation, bound: STALL_BOUND });
            }
            // Whether it was the event or only time to look again does not matter.
            drop(timeout(LOOK, facts.changed()).await);
        }
    }

    /// Ends a stream that is under way. What it has copied stays copied.
    async fn end_stream(&self, operation: &'static str) -> VmmResult<()> {
        match self.command(operation, "job-cancel", json!({"id": STREAM})).await {
            // There is none, or it has come to its end.
            Ok(_) | Err(VmmError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        match self.stream_ended(operation).await {
            Err(VmmError::Refused { .. }) => Ok(()),
            other => other,
        }
    }

    /// Closes what is open and in no chain; answers with the nodes that there were.
    async fn close_unused(&self, operation: &'static str, top: &str) -> VmmResult<Value> {
        let nodes = self.nodes(operation).await?;
        for node in own_nodes(&nodes).filter(|node| *node != top) {
            match self.command(operation, "blockdev-del", json!({"node-name": node})).await {
                // It is in use, as most of them are.
                Ok(_) | Err(VmmError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.close_superfluous(operation).await?;
        Ok(nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_read_from_what_qemu_says() {
        let described = r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/d/one"}}"#;
        let devices = json!([
            {"device": "none", "removable": true},
            {"device": "", "inserted": {"node-name": "disk-3", "image": {
                "filename": "/d/two", "virtual-size": 4096,
                "backing-image": {"filename": described, "backing-image": {"filename": "/d/base"}},
            }}},
        ]);
        let chain = ["/d/two", "/d/one", "/d/base"].map(Utf8PathBuf::from).to_vec();
        let disk = Disk { top: "disk-3".to_owned(), bytes: 4096, chain };
        assert_eq!(Disk::parse(&devices, &Sets::default()), Some(disk));
        assert_eq!(Disk::parse(&json!([]), &Sets::default()), None);
        assert_eq!(Disk::parse(&json!({"error": 1}), &Sets::default()), None);
        assert_eq!(path_of(r#"json:{"driver":"raw","file.filename":"/d"}"#), Some("/d".into()));
        assert_eq!(path_of("json:{"), None);
    }

    #[test]
    fn nodes_are_known_by_name_and_by_file() {
        let nodes = json!([
            {"node-name": "disk-10", "drv": "qcow2", "file": "/d/top"},
            {"node-name": "#block172", "drv": "file", "file": "/d/base"},
            {"node-name": "#block064", "drv": "raw", "file": "/d/base"},
            {"node-name": "disk-9", "drv": "qcow2", "file": "/d/one"},
            {"node-name": "disk", "drv": "qcow2", "file": "/d/zero"},
            {"node-name": "diskette-1", "drv": "qcow2", "file": "/x"},
        ]);
        assert_eq!(own_nodes(&nodes).collect::<Vec<_>>(), ["disk-10", "disk-9", "disk"]);
        assert_eq!(next_node(&nodes), "disk-11");
        assert_eq!(next_node(&json!([{"node-name": "disk"}])), "disk-1");
        assert_eq!(node_of(&nodes, "/d/base".into(), &Sets::default()), Some("#block064"));
        assert_eq!(node_of(&nodes, "/d/none".into(), &Sets::default()), None);
    }
}
