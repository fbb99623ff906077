//! A create that is broken off at whatever moment: when it is over, nothing of it is left.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, sleep, timeout};
use wrenn_host_agent::config::OnStop;
use wrenn_host_linux::process::find_by_argument;

use super::{BOUND, Place, create, spec};

/// How many parts a create has here: one of these after another it is broken off.
const PARTS: u32 = 16;

pub(super) async fn leaves_nothing(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let registry = agent.registry();
    let host = registry.host();
    let mut lasts = Duration::ZERO;
    // The first one waits for the snapshot of the template.
    for round in ["first", "second"] {
        let begin = Instant::now();
        let whole = create(registry, spec(None)).await?;
        lasts = begin.elapsed();
        println!("the {round} create took {lasts:?}");
        registry.destroy(&whole.spec().id, None).await?;
    }
    let mut caught = 0;
    for part in 0..PARTS {
        let handle = registry.create(spec(None))?;
        let id = handle.spec().id.clone();
        let moment = lasts * part / PARTS;
        // It is the moment that matters, and not what has happened until then.
        sleep(moment).await;
        caught += u32::from(!handle.stage().is_settled());
        let destroyed = timeout(BOUND, registry.destroy(&id, None)).await;
        destroyed.with_context(|| format!("after {moment:?} of {lasts:?}"))??;
        let processes = find_by_argument("guest=")?;
        let of_it = processes.iter().filter(|found| found.argument.contains(id.as_str())).count();
        ensure!(of_it == 0, "after {moment:?}: {of_it} processes are left");
        let mut groups =
            host.limits.hierarchy().map(|groups| groups.names()).transpose()?.unwrap_or_default();
        groups.retain(|name| name.starts_with(id.as_str()));
        ensure!(groups.is_empty(), "after {moment:?}: {groups:?} are left");
        ensure!(!host.sandboxes_dir.join(id.as_str()).exists(), "after {moment:?}: its record is left");
    }
    println!("{caught} of {PARTS} were broken off; a whole create took {lasts:?}");
    ensure!(caught > PARTS / 2, "creates are over before they can be broken off: {caught}");
    let again = create(registry, spec(None)).await?;
    registry.destroy(&again.spec().id, None).await?;
    agent.stop().await;
    Ok(())
}
