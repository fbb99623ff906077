//! The one task that measures all sandboxes.
//!
//! A round looks at every machine that runs: two small files of `/proc` each, and one list of links for all. What the
//! disks take is looked at every tenth second, each sandbox in its turn. A round that takes too long delays the next
//! one, and none is made up for.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use camino::Utf8Path;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use wrenn_host_linux::{
    netns::NetworkNamespace,
    usage::{self, LinkBytes, Links},
};
use wrenn_types::SandboxId;

use super::{
    Metrics,
    files::Files,
    meter::{Counters, Measured, Meter},
    series::SAMPLE_MS,
};
use crate::{
    network::addresses::OUTER_PREFIX,
    registry::Registry,
    sandbox::{Footing, Stage},
    warm::blocking,
};

/// Rounds between two looks at what a disk takes.
const DISK_ROUNDS: u64 = 20;
/// After how many milliseconds points are written to the file of a sandbox.
const SAVE_EVERY: i64 = 300_000;

/// A machine that is measured.
#[derive(Debug)]
struct Probe {
    pid: u32,
    /// When that process was started: the next one with its number is another.
    started: u64,
    meter: Meter,
    disk_bytes: u64,
    /// The rounds in which its disk is looked at.
    turn: u64,
}

/// The task, before it runs.
#[derive(Debug)]
pub struct Sampler {
    registry: Arc<Registry>,
    files: Files,
    /// None where the kernel does not say what goes through links.
    links: Option<Links>,
    probes: BTreeMap<SandboxId, Probe>,
    round: u64,
}

impl Sampler {
    /// Finds what there is to measure with; nothing is measured yet.
    ///
    /// # Errors
    /// The directory of the files cannot be made.
    pub async fn new(
        registry: Arc<Registry>,
        directory: &Utf8Path,
        uplink: &NetworkNamespace,
    ) -> std::io::Result<Self> {
        let files = Files::open(directory)?;
        let links = Links::of(uplink).await;
        if let Err(error) = &links {
            tracing::warn!(error = error as &dyn std::error::Error, "what sandboxes send is not measured");
        }
        Ok(Self { registry, files, links: links.ok(), probes: BTreeMap::new(), round: 0 })
    }

    fn metrics(&self) -> &Metrics {
        &self.registry.host().metrics
    }

    /// Reads what was measured of the sandboxes that are known by now, and removes what was of others.
    pub async fn go_on(self) -> Self {
        blocking(move || {
            let known = self.registry.all();
            for handle in &known {
                let id = &handle.spec().id;
                if let Some(saved) = self.files.read(id) {
                    self.metrics().begin_with(id, &saved);
                }
            }
            if let Err(error) = self.files.keep_only(|id| known.iter().any(|handle| handle.spec().id == *id))
            {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "series of sandboxes that are gone stay"
                );
            }
            self
        })
        .await
    }

    /// Measures until it is told to stop. Then everything is in its file.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(Duration::from_millis(SAMPLE_MS.unsigned_abs()));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self = blocking(move || {
                self.measure();
                self
            })
            .await;
        }
        blocking(move || self.save(|_| true)).await;
    }

    /// One round.
    fn measure(&mut self) {
        let mut running = Vec::new();
        let mut here = BTreeMap::new();
        for handle in self.registry.all() {
            let (id, stage) = (handle.spec().id.clone(), handle.stage());
            if stage == Stage::Stopped {
                continue;
            }
            if let Some(footing) = handle.footing() {
                running.push((id.clone(), handle.spec().shape.vcpus.get(), footing));
            }
            here.insert(id, stage);
        }
        self.probes.retain(|id, _| here.get(id).is_some_and(|stage| stage.has_guest()));
        let links = self.links.as_mut().map(|links| links.bytes(OUTER_PREFIX));
        let links = links.and_then(|links| links.ok()).unwrap_or_default();
        let at = self.metrics().now();
        let mut measured = Vec::with_capacity(running.len());
        for (id, vcpus, footing) in running {
            if let Some(found) = self.look(&id, at, vcpus, &footing, &links) {
                measured.push((id, found));
            }
        }
        self.metrics().add(at, measured);
        self.round += 1;
        for id in self.metrics().prune(|id| here.contains_key(id)) {
            if let Err(error) = self.files.remove(&id) {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "the series of a sandbox that is gone stays");
            }
        }
        self.save(|id| here.get(id) == Some(&Stage::Paused));
    }

    /// One machine. None when it is gone, or there is nothing yet to compare with.
    fn look(
        &mut self,
        id: &SandboxId,
        at: i64,
        vcpus: u32,
        footing: &Footing,
        links: &HashMap<String, LinkBytes>,
    ) -> Option<Measured> {
        let pid = footing.pid?;
        let Ok(used) = usage::of_process(pid) else {
            // Its end is noticed by its exit; here it only has no past any more.
            self.probes.remove(id);
            return None;
        };
        let is_it = |probe: &Probe| probe.pid == pid && probe.started == used.started;
        let is_new = !self.probes.get(id).is_some_and(is_it);
        if is_new {
            let turn = self.probes.len() as u64 % DISK_ROUNDS;
            let probe = Probe { pid, started: used.started, meter: Meter::default(), disk_bytes: 0, turn };
            self.probes.insert(id.clone(), probe);
        }
        let probe = self.probes.get_mut(id)?;
        if is_new || self.round % DISK_ROUNDS == probe.turn {
            let host = self.registry.host();
            // A layer may go between the look at the record and this one.
            probe.disk_bytes = host.bytes_of_layers(&footing.ledger.layers()).unwrap_or(probe.disk_bytes);
        }
        // What the uplink receives is what the sandbox sent.
        let link = links.get(&footing.slot.to_string()).copied().unwrap_or_default();
        let counters = Counters {
            cpu_micros: used.cpu_micros,
            sent_bytes: link.received,
            received_bytes: link.sent,
            memory_bytes: used.private_bytes,
            disk_bytes: probe.disk_bytes,
        };
        probe.meter.look(at, counters, vcpus)
    }

    fn save(&mut self, is_due: impl Fn(&SandboxId) -> bool) {
        for (id, saved) in self.metrics().take_unsaved(SAVE_EVERY, is_due) {
            if let Err(error) = self.files.write(&id, saved) {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "the series of a sandbox could not be kept");
            }
        }
    }
}
