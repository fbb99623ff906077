//! What the events of a QEMU have told so far.
//!
//! Events are folded into a few facts, and whoever waits for one waits on a `watch` channel: there is no
//! queue of events that could run over because a guest causes many.

use serde_json::Value;

/// How far a migration (which saves or loads a machine) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Migration {
    UnderWay,
    Completed,
    Failed,
}

/// Why the guest does not run any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset the machine: it rebooted, or its kernel panicked, or the CPU faulted thrice.
    Reset,
    /// Somebody on the host asked QEMU to end: by a command or by a signal.
    Host,
    /// The guest did one of the former two while nobody listened.
    Unseen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Facts {
    pub(super) migration: Option<Migration>,
    pub(super) shutdown: Option<Shutdown>,
    /// How often a job has come into another state.
    pub(super) job_changes: u64,
    /// Nothing more will come: the connection is gone.
    pub(super) disconnected: bool,
}

impl Facts {
    /// Takes in one event; says whether it changed anything.
    pub(super) fn take_in(&mut self, event: &str, data: &Value) -> bool {
        let before = *self;
        match event {
            "MIGRATION" => {
                self.migration = Some(match data["status"].as_str() {
                    Some("completed") => Migration::Completed,
                    Some("failed" | "cancelled") => Migration::Failed,
                    _ => Migration::UnderWay,
                });
            }
            "JOB_STATUS_CHANGE" => self.job_changes += 1,
            // The first one counts: a machine that has shut down can still be told to quit.
            "SHUTDOWN" if self.shutdown.is_none() => {
                self.shutdown = Some(match (data["guest"].as_bool(), data["reason"].as_str()) {
                    (Some(true), Some("guest-reset")) => Shutdown::Reset,
                    (Some(true), _) => Shutdown::PoweredOff,
                    _ => Shutdown::Host,
                });
            }
            _ => {}
        }
        *self != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_become_facts() {
        let mut facts = Facts::default();
        assert!(!facts.take_in("RTC_CHANGE", &json!({"offset": 1})));
        assert!(facts.take_in("MIGRATION", &json!({"status": "setup"})));
        assert!(!facts.take_in("MIGRATION", &json!({"status": "active"})));
        assert!(facts.take_in("MIGRATION", &json!({"status": "completed"})));
        assert_eq!(facts.migration, Some(Migration::Completed));
        assert!(facts.take_in("JOB_STATUS_CHANGE", &json!({"id": "stream", "status": "running"})));
        assert!(facts.take_in("SHUTDOWN", &json!({"guest": true, "reason": "guest-reset"})));
        assert!(!facts.take_in("SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"})));
        assert_eq!(facts.shutdown, Some(Shutdown::Reset));
    }
}
