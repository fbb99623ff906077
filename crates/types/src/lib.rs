//! Plain data shared by every part of Wrenn.
//!
//! - [`bounds`]: how long a host may take for a sandbox of a size.
//! - [`guest`]: what of a guest's agent is for the host alone, and must never be forwarded to it.
//! - [`id`]: the ids that people and paths see. Text from the wire becomes an id by parsing, and only
//!   an id may become part of a path, so that `../..` never gets that far.
//! - [`network`]: what a sandbox may reach.
//! - [`state`]: the states of a sandbox and the reasons for its end.
//! - [`resources`]: what a sandbox is given, each within its bounds.
//! - [`secret`]: API keys and access tokens, which never show themselves in a log.
//!
//! Nothing here does I/O, and nothing here knows a wire format other than the words themselves.
#![warn(missing_docs)]

pub mod bounds;
pub mod guest;
pub mod id;
pub mod network;
pub mod resources;
pub mod secret;
pub mod state;

pub use id::{HostId, InstanceId, LayerId, ParseIdError, SandboxId, SnapshotId, TeamId, TemplateName};
pub use network::{Cidr, DomainPattern, NetworkPolicy, ParsePolicyError};
pub use resources::{DiskMib, InactivityTimeout, MemoryMib, ResourceError, Shape, Vcpus};
pub use secret::{AccessToken, ApiKey, ParseApiKeyError};
pub use state::{EndReason, SandboxState, TimeoutAction};
