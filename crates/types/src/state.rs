//! The states of a sandbox.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life. The words are the public ones, and clients know no others.
///
/// ```text
/// pending ─► starting ─► running ◄─► paused ─► hibernated      (through pausing, resuming, snapshotting)
///                 │          │
///                 ▼          ▼
///               error     stopping ─► stopped                  missing: its host does not answer
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// Accepted, not yet given to a host.
    Pending,
    /// A host is bringing it up.
    Starting,
    /// It answers.
    Running,
    /// Its memory and disk are being saved.
    Pausing,
    /// Saved, and not running.
    Paused,
    /// Being saved while it stays.
    Snapshotting,
    /// Coming back from paused.
    Resuming,
    /// Paused, with its layers in object storage.
    Hibernated,
    /// Being destroyed.
    Stopping,
    /// Gone, by request or by itself.
    Stopped,
    /// Its host has not been heard of.
    Missing,
    /// It never came up, or cannot be brought back.
    Error,
}

impl SandboxState {
    /// Every state, in the order of the declaration.
    pub const ALL: [Self; 12] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Snapshotting,
        Self::Resuming,
        Self::Hibernated,
        Self::Stopping,
        Self::Stopped,
        Self::Missing,
        Self::Error,
    ];

    /// The public word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Snapshotting => "snapshotting",
            Self::Resuming => "resuming",
            Self::Hibernated => "hibernated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Missing => "missing",
            Self::Error => "error",
        }
    }

    /// The state of a public word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Whether nothing can follow.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Stopped | Self::Error)
    }
}

impl fmt::Display for SandboxState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What becomes of a sandbox whose clock has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutAction {
    /// It is paused, and can be resumed.
    #[default]
    Pause,
    /// It is destroyed.
    Kill,
}

/// Why a sandbox is not there any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// A caller asked for it.
    Requested,
    /// Nothing happened in it for as long as its timeout says.
    Inactivity,
    /// Its deadline has passed.
    Deadline,
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The virtual machine monitor died.
    VmmCrash,
    /// It needed more of the host's memory than it may have, and the host's kernel ended it.
    Oom,
    /// It never came up.
    StartFailed,
    /// The host agent stopped, or found it without an owner at its start.
    AgentStopped,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Requested => "it was destroyed by request",
            Self::Inactivity => "nothing happened in it for as long as its timeout says",
            Self::Deadline => "its deadline has passed",
            Self::GuestShutdown => "the guest powered itself off",
            Self::GuestPanic => "the guest's kernel panicked",
            Self::VmmCrash => "the virtual machine monitor died",
            Self::Oom => "it needed more of the host's memory than it may have",
            Self::StartFailed => "it did not come up",
            Self::AgentStopped => "the host agent stopped",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_wire() {
        for state in SandboxState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
            assert_eq!(SandboxState::from_word(state.as_str()), Some(state));
        }
        assert_eq!(SandboxState::from_word("Running"), None);
    }
}
