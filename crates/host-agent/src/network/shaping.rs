//! How much a sandbox may send and receive: a token bucket at each end of its veth pair.
//!
//! ```text
//!  guest ═ tap0 ── eth0 [egress] ═══ [ingress] wrenn-v-N ── outside
//!            └─ agent
//! ```
//!
//! Each bucket is where packets leave a link, so that what comes too fast waits in a queue instead of being
//! lost, and TCP finds the limit by itself. Neither is on the way of the agent, whose connections to the
//! guest are not limited.

use std::num::NonZeroU64;

use super::{
    addresses::INNER,
    error::SlotError,
    making::Prepared,
    netlink::{Netlink, NetlinkError},
    policy::Bandwidth,
};

/// How much of a second may be sent at once after a silence. Timers are not exact, and a machine that is
/// busy comes late: what was not sent in that time is sent then.
const BURST_SHARE: u64 = 50;
/// How much of a second may wait in the queue.
const QUEUE_SHARE: u64 = 10;
/// Four packets of the largest size.
const SMALLEST_BURST: u64 = 4 * 1514;
/// Ten of them: TCP begins with that many.
const SMALLEST_QUEUE: u64 = 10 * 1514;
/// More than this in one place is memory and no speed.
const LARGEST: u64 = 64 << 20;

/// A token bucket, as the kernel wants to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Bytes per second.
    pub(super) rate: u64,
    /// How many bytes it holds.
    pub(super) burst: u32,
    /// How many bytes may wait for it.
    pub(super) queue: u32,
}

impl Bucket {
    /// The bucket for so many bits per second.
    pub(super) fn of(bits_per_second: NonZeroU64) -> Self {
        let rate = bits_per_second.get().div_ceil(8);
        let share =
            |part: u64, least: u64| u32::try_from((rate / part).clamp(least, LARGEST)).unwrap_or(u32::MAX);
        Self { rate, burst: share(BURST_SHARE, SMALLEST_BURST), queue: share(QUEUE_SHARE, SMALLEST_QUEUE) }
    }
}

/// Puts limits in force instead of the former ones; none where those are unknown. What does not differ is
/// not touched.
pub(super) async fn apply(
    prepared: &Prepared,
    former: Option<Bandwidth>,
    wanted: Bandwidth,
) -> Result<(), SlotError> {
    let number = prepared.lease.number();
    let link = |source| SlotError::Link { number, source };
    if former.map(|former| former.egress) != Some(wanted.egress) {
        let inside = Netlink::open(&prepared.namespace).await.map_err(link)?;
        limit(&inside, INNER, wanted.egress).await.map_err(link)?;
    }
    if former.map(|former| former.ingress) != Some(wanted.ingress) {
        limit(&prepared.uplink.netlink, &number.outer(), wanted.ingress).await.map_err(link)?;
    }
    Ok(())
}

async fn limit(netlink: &Netlink, name: &str, bits: Option<NonZeroU64>) -> Result<(), NetlinkError> {
    let index = netlink.index(name).await?;
    match bits {
        Some(bits) => netlink.set_bucket(index, Bucket::of(bits)).await,
        None => netlink.remove_bucket(index).await,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn examples() {
        let bucket = |bits| Bucket::of(NonZeroU64::new(bits).unwrap());
        assert_eq!(bucket(100_000_000), Bucket { rate: 12_500_000, burst: 250_000, queue: 1_250_000 });
        assert_eq!(bucket(1), Bucket { rate: 1, burst: 6056, queue: 15_140 });
        assert_eq!(bucket(u64::MAX).rate, 1 << 61);
    }

    proptest! {
        #[test]
        fn every_packet_fits_into_every_bucket(bits in 1..=u64::MAX) {
            let bucket = Bucket::of(NonZeroU64::new(bits).unwrap());
            prop_assert!(bucket.rate >= 1 && bucket.burst >= 1514 && bucket.queue >= bucket.burst);
            prop_assert!(u128::from(bucket.rate) * 8 >= u128::from(bits));
        }
    }
}
