//! What a sandbox may reach and when it ends, from the wire.

use std::num::NonZeroU64;

use connectrpc::ConnectError;
use jiff::Timestamp;
use wrenn_proto::hostagent::v1 as wire;
use wrenn_types::{
    InactivityTimeout, NetworkPolicy, TimeoutAction,
    network::{DNS_SERVERS_LIMIT, ENTRIES_LIMIT},
};

use super::invalid;
use crate::sandbox::{Deadline, Update};

/// None where nothing is said.
pub(super) fn action(given: Option<wire::TimeoutAction>) -> Option<TimeoutAction> {
    match given? {
        wire::TimeoutAction::TIMEOUT_ACTION_PAUSE => Some(TimeoutAction::Pause),
        wire::TimeoutAction::TIMEOUT_ACTION_KILL => Some(TimeoutAction::Kill),
        wire::TimeoutAction::TIMEOUT_ACTION_UNSPECIFIED => None,
    }
}

/// None for the deadline that says never. One that has passed on its way is one still: what it asks for is done at
/// once. Whether it was met already is known to the sandbox.
pub(super) fn deadline(given: &wire::Deadline) -> Result<Option<Deadline>, ConnectError> {
    if given.at_ms == 0 {
        return Ok(None);
    }
    let at = Timestamp::from_millisecond(given.at_ms).map_err(invalid)?;
    Ok(Some(Deadline { at, action: action(given.action.as_known()).unwrap_or_default() }))
}

fn parsed<T>(texts: &[String], limit: usize) -> Result<Vec<T>, ConnectError>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    if texts.len() > limit {
        return Err(invalid(format!("a list of a network policy has at most {limit} entries")));
    }
    texts.iter().map(|text| text.parse().map_err(invalid)).collect()
}

pub(super) fn network(given: wire::NetworkPolicy) -> Result<NetworkPolicy, ConnectError> {
    Ok(NetworkPolicy {
        internet: given.internet,
        allow_cidrs: parsed(&given.allow_cidrs, ENTRIES_LIMIT)?,
        deny_cidrs: parsed(&given.deny_cidrs, ENTRIES_LIMIT)?,
        allow_domains: parsed(&given.allow_domains, ENTRIES_LIMIT)?,
        deny_domains: parsed(&given.deny_domains, ENTRIES_LIMIT)?,
        dns_servers: parsed(&given.dns_servers, DNS_SERVERS_LIMIT)?,
        egress_bits_per_second: NonZeroU64::new(given.egress_bits_per_second),
        ingress_bits_per_second: NonZeroU64::new(given.ingress_bits_per_second),
    })
}

pub(super) fn update(given: wire::UpdateSandboxRequest) -> Result<Update, ConnectError> {
    let timeout = given.timeout_seconds.map(|seconds| InactivityTimeout::new(seconds.into()));
    Ok(Update {
        timeout: timeout.transpose().map_err(invalid)?,
        on_timeout: given.on_timeout.and_then(|given| action(given.as_known())),
        deadline: given.deadline.into_option().map(|given| deadline(&given)).transpose()?,
        network: given.network.into_option().map(network).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_says_when_and_what() {
        let now = Timestamp::now().as_millisecond();
        let asked = |at_ms, action: wire::TimeoutAction| {
            let given = wire::Deadline { at_ms, action: action.into(), ..Default::default() };
            deadline(&given).unwrap().map(|deadline| (deadline.at.as_millisecond(), deadline.action))
        };
        let (pause, kill) =
            (wire::TimeoutAction::TIMEOUT_ACTION_PAUSE, wire::TimeoutAction::TIMEOUT_ACTION_KILL);
        assert_eq!(asked(0, pause), None, "never");
        for at in [now + 60_000, now - 60_000] {
            assert_eq!(asked(at, pause), Some((at, TimeoutAction::Pause)));
            assert_eq!(asked(at, kill), Some((at, TimeoutAction::Kill)));
        }
        let unsaid = wire::TimeoutAction::TIMEOUT_ACTION_UNSPECIFIED;
        assert_eq!(asked(now, unsaid), Some((now, TimeoutAction::Pause)));
    }
}
