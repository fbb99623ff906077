//! What a sandbox may reach and when its time is over: parsed here, and changed while it is there.
//!
//! ```text
//! row: new settings, `settings_pending`, generation + 1 ──► host is told ──► row: not pending
//!                        ▲                                     │ refuses, or does not answer
//!                        └── the sweep tells it again ◄── row: old settings, still pending
//! ```
//!
//! A host is always told all settings of the row as it is, so to tell it twice, or late, does no harm.

use std::{net::Ipv4Addr, num::NonZeroU64, sync::Arc};

use jiff::Timestamp;
use serde_json::json;
use wrenn_api::{Network, Sandbox, TimeoutRequest};
use wrenn_types::{
    InactivityTimeout, NetworkPolicy, SandboxId, SandboxState, TeamId, TimeoutAction,
    network::{DNS_SERVERS_LIMIT, ENTRIES_LIMIT},
};

use super::{Caller, Core, CoreError, busy::Busy, lifecycle::public, persist::wrong_state};
use crate::{
    host::{Deadline, HostError, Refusal, Settings},
    store::SandboxRow,
};

/// The word that takes a deadline away.
const NEVER: &str = "never";
const MBPS: std::ops::RangeInclusive<i64> = 0..=100_000;
const BITS: u64 = 1_000_000;
/// How often a change is tried again when somebody was faster.
const ATTEMPTS: usize = 16;

/// A deadline that lies ahead, or none.
pub(crate) fn parse_deadline(text: &str, now: Timestamp) -> Result<Option<Timestamp>, CoreError> {
    if text == NEVER {
        return Ok(None);
    }
    let at: Timestamp = text.parse().map_err(|_| {
        CoreError::Invalid(
            "deadline must be a time in RFC 3339, such as 2030-01-01T00:00:00Z, or never".to_owned(),
        )
    })?;
    if at <= now {
        return Err(CoreError::Invalid(format!("deadline: {at} has passed already")));
    }
    Ok(Some(at))
}

/// A deadline and what is done then. An action without a time would never be done.
pub(crate) fn with_action(
    at: Option<Timestamp>,
    action: Option<TimeoutAction>,
) -> Result<Option<Deadline>, CoreError> {
    match (at, action) {
        (Some(at), action) => Ok(Some(Deadline { at, action: action.unwrap_or_default() })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(CoreError::Invalid("deadline_action needs a deadline".to_owned())),
    }
}

fn entries<T, E: std::fmt::Display>(
    field: &str,
    texts: Option<Vec<String>>,
    limit: usize,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<Vec<T>, CoreError> {
    let texts = texts.unwrap_or_default();
    if texts.len() > limit {
        return Err(CoreError::Invalid(format!("network.{field} can have at most {limit} entries")));
    }
    let parsed = texts.iter().map(|text| parse(text));
    parsed.collect::<Result<_, _>>().map_err(|error| CoreError::Invalid(format!("network.{field}: {error}")))
}

fn rate(field: &str, given: Option<i64>) -> Result<Option<NonZeroU64>, CoreError> {
    let mbps = given.unwrap_or(0);
    match u64::try_from(mbps) {
        Ok(number) if MBPS.contains(&mbps) => Ok(NonZeroU64::new(number * BITS)),
        _ => Err(CoreError::Invalid(format!(
            "network.{field} must be between {} and {}, not {mbps}",
            MBPS.start(),
            MBPS.end()
        ))),
    }
}

/// What a sandbox may reach. Two words about the internet that contradict each other are refused.
pub(crate) fn parse_network(asked: Network, internet: Option<bool>) -> Result<NetworkPolicy, CoreError> {
    if let (Some(one), Some(other)) = (asked.allow_internet_access, internet)
        && one != other
    {
        let message = "allow_internet_access and network.allow_internet_access contradict each other";
        return Err(CoreError::Invalid(message.to_owned()));
    }
    let server = |text: &str| match text.parse::<Ipv4Addr>() {
        Ok(address) => Ok(address),
        Err(_) => Err(format!("{:?} is not an IPv4 address", text.chars().take(40).collect::<String>())),
    };
    Ok(NetworkPolicy {
        internet: asked.allow_internet_access.or(internet).unwrap_or(true),
        allow_cidrs: entries("allow_cidrs", asked.allow_cidrs, ENTRIES_LIMIT, str::parse)?,
        deny_cidrs: entries("deny_cidrs", asked.deny_cidrs, ENTRIES_LIMIT, str::parse)?,
        allow_domains: entries("allow_domains", asked.allow_domains, ENTRIES_LIMIT, str::parse)?,
        deny_domains: entries("deny_domains", asked.deny_domains, ENTRIES_LIMIT, str::parse)?,
        dns_servers: entries("dns_servers", asked.dns_servers, DNS_SERVERS_LIMIT, server)?,
        egress_bits_per_second: rate("egress_mbps", asked.egress_mbps)?,
        ingress_bits_per_second: rate("ingress_mbps", asked.ingress_mbps)?,
    })
}

/// A policy in the words of the API, nothing left out.
pub(crate) fn show_network(policy: &NetworkPolicy) -> Network {
    fn texts<T: ToString>(entries: &[T]) -> Option<Vec<String>> {
        Some(entries.iter().map(T::to_string).collect())
    }
    let mbps = |rate: Option<NonZeroU64>| {
        let mbps = rate.map_or(0, |rate| rate.get() / BITS);
        Some(i64::try_from(mbps).unwrap_or(i64::MAX))
    };
    Network {
        allow_internet_access: Some(policy.internet),
        allow_cidrs: texts(&policy.allow_cidrs),
        deny_cidrs: texts(&policy.deny_cidrs),
        allow_domains: texts(&policy.allow_domains),
        deny_domains: texts(&policy.deny_domains),
        dns_servers: texts(&policy.dns_servers),
        egress_mbps: mbps(policy.egress_bits_per_second),
        ingress_mbps: mbps(policy.ingress_bits_per_second),
    }
}

/// Other settings and whether it resumes by itself, of those that a row has.
type NewSettings = (Settings, bool);

/// What a request changes. Pure: what is left out stays.
fn changed(row: &SandboxRow, asked: &TimeoutRequest, now: Timestamp) -> Result<NewSettings, CoreError> {
    let mut settings = row.settings();
    if let Some(seconds) = asked.timeout_sec {
        settings.timeout = InactivityTimeout::new(seconds)?;
    }
    settings.on_timeout = asked.on_timeout.unwrap_or(settings.on_timeout);
    let before = settings.deadline;
    let at = match asked.deadline.as_deref() {
        Some(text) => parse_deadline(text, now)?,
        None => before.map(|deadline| deadline.at),
    };
    let kept = before.filter(|_| at.is_some()).map(|deadline| deadline.action);
    let action = asked.deadline_action.or(kept);
    settings.deadline = with_action(at, action)?;
    Ok((settings, asked.auto_resume.unwrap_or(row.auto_resume)))
}

impl Core {
    /// What a sandbox may reach.
    pub(crate) async fn network(&self, caller: &Caller, id: &SandboxId) -> Result<Network, CoreError> {
        Ok(show_network(&self.row(caller.team, id).await?.network.0))
    }

    /// Changes what a sandbox may reach, and answers once that is in force.
    pub(crate) async fn set_network(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        asked: Network,
    ) -> Result<Network, CoreError> {
        let policy = parse_network(asked, None)?;
        let details = json!({ "network": policy });
        let (core, team, name) = (Arc::clone(self), caller.team, id.clone());
        let row = self.settings_task(caller, id, "network", details, async move {
            let with = |row: &SandboxRow| {
                Ok((Settings { network: policy.clone(), ..row.settings() }, row.auto_resume))
            };
            core.change_settings(team, &name, with).await
        });
        Ok(show_network(&row.await?.network.0))
    }

    /// Changes when the time of a sandbox is over, and answers once that is in force.
    pub(crate) async fn set_timeout(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        asked: TimeoutRequest,
    ) -> Result<Sandbox, CoreError> {
        let details = json!({ "timeout": asked });
        let (core, team, name) = (Arc::clone(self), caller.team, id.clone());
        let row = self.settings_task(caller, id, "timeout", details, async move {
            core.change_settings(team, &name, |row| changed(row, &asked, Timestamp::now())).await
        });
        public(&row.await?)
    }

    /// Runs a change as a task of its own: it does not end with its caller.
    async fn settings_task(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        action: &'static str,
        details: serde_json::Value,
        change: impl Future<Output = Result<SandboxRow, CoreError>> + Send + 'static,
    ) -> Result<SandboxRow, CoreError> {
        let (core, caller, id) = (Arc::clone(self), caller.clone(), id.clone());
        let task = self.tasks.spawn(async move { core.audited(&caller, &id, action, details, change).await });
        task.await.map_err(CoreError::Task)?
    }

    async fn change_settings(
        self: &Arc<Self>,
        team: TeamId,
        id: &SandboxId,
        with: impl Fn(&SandboxRow) -> Result<NewSettings, CoreError>,
    ) -> Result<SandboxRow, CoreError> {
        for _ in 0..ATTEMPTS {
            let before = self.row(team, id).await?;
            if !matches!(before.state(), SandboxState::Running | SandboxState::Paused) {
                return Err(wrong_state(id, &before));
            }
            let (settings, auto_resume) = with(&before)?;
            let _busy = Busy::begin(self, id.clone());
            let intent = self.store.intend_settings(&before, &settings, auto_resume).await?;
            let Some(intent) = intent else { continue };
            self.routes.forget(id);
            return match self.apply_settings(&intent).await {
                Ok(row) => Ok(row),
                Err(error) => {
                    self.take_back(&intent, &before).await;
                    Err(error)
                }
            };
        }
        Err(CoreError::TooMany("too many change this sandbox at once"))
    }

    /// Puts the settings of before back into the row. Its host may have heard of the others, so it is told again.
    async fn take_back(&self, intent: &SandboxRow, before: &SandboxRow) {
        let store = self.store.with_bound(self.bounds.database_patient);
        let back = store.intend_settings(intent, &before.settings(), before.auto_resume).await;
        let told = match back {
            Ok(Some(row)) => self.apply_settings(&row).await.map(drop),
            Ok(None) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = told {
            tracing::info!(
                id = intent.id,
                error = &error as &dyn std::error::Error,
                "the settings of a sandbox are told to its host later"
            );
        }
    }

    /// Tells a host the settings of a row. Where a newer intent has overtaken this one on the way, they are told
    /// again with that one's generation.
    pub(super) async fn apply_settings(&self, row: &SandboxRow) -> Result<SandboxRow, CoreError> {
        let id: SandboxId = row.id.parse().map_err(super::lifecycle::malformed)?;
        let mut row = row.clone();
        loop {
            match self.host.update(&id, row.generation, &row.settings()).await {
                Ok(()) => {
                    let applied = self.store.settings_applied(&id, row.generation).await?;
                    if let Some(row) = applied {
                        return Ok(row);
                    }
                }
                Err(HostError::Refused { refusal: Refusal::State, message }) => {
                    let now = self.store.sandbox_of_host(&id).await?;
                    if now.is_some_and(|now| now.generation == row.generation) {
                        return Err(HostError::Refused { refusal: Refusal::State, message }.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
            // Each turn has a newer generation, so somebody else gets on.
            let now = self.store.sandbox_of_host(&id).await?;
            row = now.ok_or_else(|| CoreError::NoSuchSandbox(id.to_string()))?;
            if row.state().is_final() || row.state() == SandboxState::Stopping {
                return Err(wrong_state(&id, &row));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_parsed_and_shown() {
        let policy = parse_network(Network::default(), None).unwrap();
        assert_eq!(policy, NetworkPolicy::simple(true));
        assert_eq!(parse_network(Network::default(), Some(false)).unwrap(), NetworkPolicy::simple(false));
        let list = |entries: &[&str]| Some(entries.iter().map(|entry| (*entry).to_owned()).collect());
        let asked = Network {
            allow_internet_access: Some(true),
            allow_cidrs: list(&["203.0.113.0/24"]),
            deny_cidrs: list(&["203.0.113.7/32"]),
            allow_domains: list(&["example.com", "*.example.org"]),
            deny_domains: list(&[]),
            dns_servers: list(&["9.9.9.9"]),
            egress_mbps: Some(10),
            ingress_mbps: Some(0),
        };
        let policy = parse_network(asked.clone(), Some(true)).unwrap();
        assert_eq!(policy.egress_bits_per_second, NonZeroU64::new(10_000_000));
        assert_eq!(policy.ingress_bits_per_second, None);
        assert_eq!(show_network(&policy), asked);

        let base = Network::default();
        for (wrong, name) in [
            (Network { allow_cidrs: list(&["10.0.0.1/8"]), ..base.clone() }, "allow_cidrs"),
            (Network { deny_cidrs: list(&["::/0"]), ..base.clone() }, "deny_cidrs"),
            (Network { allow_domains: list(&["a b"]), ..base.clone() }, "allow_domains"),
            (Network { dns_servers: list(&["dns.example"]), ..base.clone() }, "dns_servers"),
            (Network { dns_servers: list(&["1.1.1.1"; 4]), ..base.clone() }, "dns_servers"),
            (Network { deny_domains: list(&["a.example"; 257]), ..base.clone() }, "deny_domains"),
            (Network { egress_mbps: Some(-1), ..base.clone() }, "egress_mbps"),
            (Network { ingress_mbps: Some(i64::MAX), ..base.clone() }, "ingress_mbps"),
            (Network { allow_internet_access: Some(false), ..base }, "contradict"),
        ] {
            let refused = parse_network(wrong, Some(true)).unwrap_err();
            assert!(refused.to_string().contains(name), "{refused}");
        }
    }

    #[test]
    fn deadlines_lie_ahead() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let later = Timestamp::from_second(1_800_000_060).unwrap();
        assert_eq!(parse_deadline("never", now).unwrap(), None);
        assert_eq!(parse_deadline(&later.to_string(), now).unwrap(), Some(later));
        assert_eq!(parse_deadline("2027-01-15T09:01:00+01:00", now).unwrap(), Some(later));
        for wrong in ["", "tomorrow", "2027-01-15", "2027-01-15T08:01:00", "2027-01-15T08:00:00Z"] {
            let refused = parse_deadline(wrong, now).unwrap_err();
            assert!(refused.to_string().starts_with("deadline"), "{refused}");
        }
        let kill = Some(TimeoutAction::Kill);
        assert_eq!(
            with_action(Some(later), kill).unwrap(),
            Some(Deadline { at: later, action: TimeoutAction::Kill })
        );
        assert!(with_action(None, kill).is_err());
    }
}
