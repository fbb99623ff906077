//! Disks that are damaged, and disks that are full.

use std::{os::unix::fs::FileExt as _, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use wrenn_host_agent::{
    config::OnStop,
    sandbox::{Handle, RequestError, Stage, queue::Verb, record},
    snapshots::Extent,
};
use wrenn_types::SnapshotId;

use super::{BOUND, KEEPER, KEPT, Place, create, end_of, pause, resume, run, snapshot, spec};

/// A small file system at a path, given back when it is dropped.
struct Small(Utf8PathBuf);

impl Small {
    fn mount(path: &Utf8Path, mebibytes: u32) -> Result<Self> {
        std::fs::create_dir(path)?;
        let options = format!("size={mebibytes}m,mode=700");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "small", path.as_str()])
            .status()?;
        ensure!(mounted.success(), "mount: {mounted}");
        Ok(Self(path.to_owned()))
    }

    /// Takes all the room that is left, to the last byte.
    fn fill(&self) -> Result<Utf8PathBuf> {
        let path = self.0.join("ballast");
        let mut ballast = std::fs::File::create(&path)?;
        let filled = std::io::copy(&mut std::io::repeat(1), &mut ballast);
        ensure!(filled.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull), "it is full");
        Ok(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l", self.0.as_str()]).status();
    }
}

pub(super) async fn full_host(place: Arc<Place>) -> Result<()> {
    // Layers and snapshots are on a disk of their own, records are not.
    std::fs::create_dir(place.path().join("agent"))?;
    let disks = Small::mount(&place.path().join("agent/disks"), 64)?;
    let saved = Small::mount(&place.path().join("agent/snapshots"), 64)?;
    let outcome = full_disks(&place, &disks, &saved).await;
    if outcome.is_err() {
        // Before the disks go.
        place.agent(OnStop::Destroy).await?.stop().await;
    }
    outcome
}

async fn full_disks(place: &Place, disks: &Small, saved: &Small) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let kept = run(&handle, KEEPER).await?;
    run(&handle, "head -c 2000000 /dev/urandom > /root/data; (cd /root; sha256sum data) > /root/sum; sync")
        .await?;
    let check = "cd /root && echo 3 > /proc/sys/vm/drop_caches && sha256sum --check --quiet sum";

    // No room for what is saved: it goes on, and is paused when there is room.
    for verb in [Verb::Pause(Extent::Machine), Verb::Snapshot { into: SnapshotId::random() }] {
        let ballast = saved.fill()?;
        match handle.request(verb.clone(), None).await {
            Err(RequestError::Failed(error)) => ensure!(error.is_no_space(), "{verb:?}: {error:?}"),
            other => bail!("{verb:?} on a disk that is full: {other:?}"),
        }
        ensure!(handle.stage() == Stage::Running, "{verb:?}: {:?}", handle.stage());
        ensure!(run(&handle, KEPT).await? == kept, "what ran runs on");
        std::fs::remove_file(ballast)?;
        run(&handle, check).await?;
    }
    pause(&handle).await?;
    // No room for a disk: it stays paused, and comes back when there is room.
    let ballast = disks.fill()?;
    match handle.request(Verb::Resume { timeout: None }, None).await {
        Err(RequestError::Failed(error)) => ensure!(error.is_no_space(), "{error:?}"),
        other => bail!("a resume on a disk that is full: {other:?}"),
    }
    ensure!(handle.stage() == Stage::Paused, "{:?}", handle.stage());
    std::fs::remove_file(ballast)?;
    resume(&handle).await?;
    ensure!(run(&handle, KEPT).await? == kept, "what ran runs on");
    run(&handle, check).await?;

    // No room for what the guest writes: it is told so, and nobody else is.
    let other = create(agent.registry(), spec(None)).await?;
    let ballast = disks.fill()?;
    let line = "head -c 30000000 /dev/urandom > /root/more && sync /root/more";
    let (code, said) = end_of(&handle, line, "/dev/shm").await?;
    ensure!(code != "0", "30 MB were written to a disk that is full: {said}");
    let (code, said) = end_of(&handle, "(cd /root; sha256sum data); cat /tmp/kept", "/dev/shm").await?;
    ensure!(code == "0" && said.contains("data"), "it goes on: {code}, {said}");
    ensure!(handle.stage() == Stage::Running && other.stage() == Stage::Running, "both run");
    std::fs::remove_file(ballast)?;
    run(&other, "echo this > /root/that && sync && cat /root/that").await?;
    for handle in [handle, other] {
        agent.registry().destroy(&handle.spec().id, None).await?;
    }
    agent.stop().await;
    Ok(())
}

/// Waits until the layers below the top of a disk have their digests, and answers with the layers.
async fn sealed(place: &Place, handle: &Handle) -> Result<Vec<Utf8PathBuf>> {
    let agent = place.path().canonicalize_utf8()?.join("agent");
    let record = record::read(&agent.join("sandboxes"), &handle.spec().id);
    let layers = record.context("it has a record")?.layers;
    let top = usize::from(handle.stage() == Stage::Running);
    let end = tokio::time::Instant::now() + BOUND;
    while !layers[top..].iter().all(|layer| agent.join("digests").join(layer.as_str()).exists()) {
        ensure!(tokio::time::Instant::now() < end, "some of {layers:?} have no digest");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(layers.iter().map(|layer| agent.join("disks").join(layer.as_str())).collect())
}

/// Turns a bit of the last data in a file, and answers where.
fn flip_in_data(path: &Utf8Path) -> Result<u64> {
    let bytes = std::fs::read(path)?;
    let at = bytes.iter().rposition(|byte| *byte != 0).context("it has data")?;
    // As the owner of all files may, whatever their mode.
    let file = std::fs::File::options().write(true).open(path)?;
    file.write_all_at(&[bytes[at] ^ 1], at as u64)?;
    Ok(at as u64)
}

pub(super) async fn damaged_layer(place: Arc<Place>) -> Result<()> {
    let mut agent = place.agent(OnStop::Leave).await?;
    let mut handle = create(agent.registry(), spec(None)).await?;
    let id = handle.spec().id.clone();
    let check = "cd /root && echo 3 > /proc/sys/vm/drop_caches && sha256sum --check --quiet sums";
    for round in 0..3 {
        let line = format!(
            "head -c 1000000 /dev/urandom > /root/{round}; (cd /root; sha256sum ?) > /root/sums; sync"
        );
        run(&handle, &line).await?;
        if round == 1 {
            // What lies below the top gets its digest while the machine runs, and does not change after that.
            snapshot(&handle).await?;
            let layers = sealed(&place, &handle).await?;
            ensure!(layers.len() == 3, "one for the resume and one for the snapshot: {layers:?}");
        } else {
            pause(&handle).await?;
            sealed(&place, &handle).await?;
            resume(&handle).await?;
        }
        run(&handle, check).await?;
    }
    pause(&handle).await?;
    let layers = sealed(&place, &handle).await?;
    ensure!(agent.registry().host().scrub.counted().digests == layers.len() as u64, "{layers:?}");
    for (number, layer) in layers.iter().enumerate() {
        let refused = async |handle: &Handle| -> Result<()> {
            for _ in 0..2 {
                let error = match handle.request(Verb::Resume { timeout: None }, None).await {
                    Ok(_) => bail!("a damaged layer came up: {layer}"),
                    Err(error) => format!("{:#}", anyhow::Error::new(error)),
                };
                ensure!(error.contains(layer.as_str()), "{layer}: {error}");
                ensure!(handle.stage() == Stage::Paused, "it stays paused");
            }
            Ok(())
        };
        flip_in_data(layer)?;
        refused(&handle).await?;
        if number == 0 {
            // It is no less a sandbox for the next agent.
            agent.stop().await;
            agent = place.agent(OnStop::Leave).await?;
            handle = agent.registry().get(&id).context("it is known")?;
            refused(&handle).await?;
        }
        flip_in_data(layer)?;
        let (whole, file) = (std::fs::read(layer)?, std::fs::File::options().write(true).open(layer)?);
        file.set_len(whole.len() as u64 - 1)?;
        refused(&handle).await?;
        std::fs::write(layer, whole)?;
    }
    resume(&handle).await?;
    run(&handle, check).await?;
    agent.registry().destroy(&id, None).await?;
    agent.stop().await;
    Ok(())
}
