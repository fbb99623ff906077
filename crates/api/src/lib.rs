//! The words of the public REST API: what a request may say, what an answer says, and what travels over
//! the WebSockets. Server, command line and SDK generation share these types; the OpenAPI document is made
//! from them.
//!
//! - [`sandbox`]: create, list and get.
//! - [`persist`]: pause, resume, fork, rollback, snapshot; what a sandbox may reach and when its time is over.
//! - [`exec`]: one command and its output, and the processes of a sandbox.
//! - [`metrics`]: what a sandbox has used, over time.
//! - [`files`]: entries of the guest's file system.
//! - [`stream`]: the JSON frames of `exec/stream`, `processes/{selector}/stream` and the terminal.
//! - [`template`], [`host`], [`health`]: what a sandbox starts from and runs on, and whether the server answers.
//! - [`error`]: the one envelope that every error has, and the codes in it.
//!
//! Requests tolerate unknown fields, and a field that is `null` is a field that is absent, because
//! published clients send both. A request type holds what was said, not what was checked: bounds belong to
//! the server's core, which names the field and its bounds when it refuses.
#![warn(missing_docs)]

pub mod error;
pub mod exec;
pub mod files;
pub mod health;
pub mod host;
pub mod metrics;
pub mod persist;
pub mod sandbox;
pub mod stream;
pub mod template;

pub use error::{ErrorBody, ErrorCode, ErrorDetail};
pub use exec::{
    BackgroundProcess, Encoding, ExecRequest, ExecResponse, ProcessInfo, ProcessList, StopSignal,
};
pub use files::{
    EntryType, FileEntry, FileEntryBody, FileList, ListFilesRequest, MoveFileRequest, PathRequest,
};
pub use health::Health;
pub use host::Host;
pub use metrics::{Metrics, MetricsPoint, MetricsRange};
pub use persist::{
    ForkRequest, Network, PauseRequest, ResumeRequest, RollbackRequest, SnapshotRequest, TimeoutRequest,
};
pub use sandbox::{CreateSandbox, Sandbox, SandboxStatus};
pub use template::{Template, TemplateKind};

/// The header that carries the API key on every call, WebSocket upgrades included.
pub const API_KEY_HEADER: &str = "x-api-key";
/// The header that carries the cursor of the next page of a list.
pub const NEXT_TOKEN_HEADER: &str = "x-next-token";
