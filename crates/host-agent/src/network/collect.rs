//! Finds what an earlier life left behind, and removes it.
//!
//! A slot belongs to whoever holds the lock on its lease: an agent while it has the slot, and its VMM as
//! long as that lives. So every lease that can be locked is nobody's, whichever stack made it, and every
//! lease that cannot be locked is somebody's, whatever is written in it.

use std::{collections::BTreeSet, fs, io, sync::Arc};

use futures::StreamExt as _;
use wrenn_host_linux::{lock::FileLock, netns};
use wrenn_types::InstanceId;

use super::{
    addresses::{NAMESPACE_PREFIX, OUTER_PREFIX, SLOTS_DIR, SlotNumber},
    error::SlotError,
    filter::MARK_SUFFIX,
    lease::Lease,
    making,
    uplink::{OpenUplink, Uplink},
};

/// How many slots are looked at at the same time.
const AT_ONCE: usize = 8;

/// What a collection found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Collected {
    /// Slots that nobody held any more. Nothing of them is left.
    pub(crate) removed: Vec<SlotNumber>,
    /// Slots of this instance that are still held: by a VMM of it that lives. They are as they were.
    pub(crate) held: Vec<SlotNumber>,
}

enum Found {
    Removed(SlotNumber),
    Ours(SlotNumber),
    Others,
}

/// Removes every slot that nobody holds, and the uplink's rules of `instance` if it holds none. Called at
/// the start of an agent, after it has ended the VMMs that are left of it and before `SlotPool::start`.
///
/// # Errors
/// Something could not be listed, or something of `instance` not be removed. What could be removed is.
pub(crate) async fn collect(instance: &InstanceId, uplink: &Uplink) -> Result<Collected, SlotError> {
    let uplink = Arc::new(OpenUplink::open(instance, uplink).await.map_err(SlotError::Uplink)?);
    let collected = collect_from(&uplink).await?;
    if collected.held.is_empty() {
        uplink.withdraw().await.map_err(SlotError::Uplink)?;
    }
    Ok(collected)
}

/// Removes every slot that nobody holds, and leaves the uplink's rules alone: for an agent that has begun to use slots
/// already, because somebody waits for the sandboxes that it has taken over. What is in use is locked.
///
/// # Errors
/// As [`collect`].
pub(crate) async fn collect_slots(instance: &InstanceId, uplink: &Uplink) -> Result<Collected, SlotError> {
    let uplink = Arc::new(OpenUplink::open(instance, uplink).await.map_err(SlotError::Uplink)?);
    collect_from(&uplink).await
}

async fn collect_from(uplink: &Arc<OpenUplink>) -> Result<Collected, SlotError> {
    let mut numbers = list(SLOTS_DIR, "")?;
    numbers.extend(list(netns::NAMES, NAMESPACE_PREFIX)?);
    let links = uplink.netlink.list(OUTER_PREFIX).await.map_err(SlotError::Links)?;
    numbers.extend(links.iter().filter_map(|name| number_in(name, OUTER_PREFIX)));

    let mut outcomes =
        futures::stream::iter(numbers).map(|number| look_at(Arc::clone(uplink), number)).buffered(AT_ONCE);
    let mut collected = Collected::default();
    let mut first_error = None;
    while let Some(outcome) = outcomes.next().await {
        match outcome {
            Ok(Found::Removed(number)) => collected.removed.push(number),
            Ok(Found::Ours(number)) => collected.held.push(number),
            Ok(Found::Others) => {}
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(collected), Err)
}

async fn look_at(uplink: Arc<OpenUplink>, number: SlotNumber) -> Result<Found, SlotError> {
    let path = number.lease();
    let lease = |source| SlotError::Lease { number, source };
    let lock = FileLock::try_acquire(path.as_std_path()).map_err(lease)?;
    let ours = match fs::read_to_string(&path) {
        Ok(owner) => owner == uplink.instance.as_str(),
        // Released in the meantime.
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(lease(error)),
    };
    let Some(lock) = lock else { return Ok(if ours { Found::Ours(number) } else { Found::Others }) };
    match making::dismantle(&uplink, Lease::found(number, lock)).await {
        Ok(()) => Ok(Found::Removed(number)),
        Err(error) if ours => Err(error),
        // What another stack left is no reason not to start. Whoever uses the number next tries again.
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(slot = %number, error, "what another stack left of a slot could not be removed");
            Ok(Found::Others)
        }
    }
}

fn list(path: &'static str, prefix: &str) -> Result<BTreeSet<SlotNumber>, SlotError> {
    let error = |source| SlotError::List { path, source };
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        // What has no such name is not ours to look at.
        numbers.extend(name.to_str().and_then(|name| number_in(name, prefix)));
    }
    Ok(numbers)
}

fn number_in(name: &str, prefix: &str) -> Option<SlotNumber> {
    let number = name.strip_prefix(prefix)?;
    // A slot of which nothing but its domain filter is left is one too.
    number.strip_suffix(MARK_SUFFIX).unwrap_or(number).parse().ok()
}
