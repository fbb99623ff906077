//! One command and its output, and the processes of a sandbox.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_types::SandboxId;

/// How bytes are written in a JSON string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
pub enum Encoding {
    /// As they are.
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    /// Standard base64 with padding, because they are not all UTF-8.
    #[serde(rename = "base64")]
    Base64,
}

/// The text is not base64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeError(base64::DecodeError);

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the data is not standard base64")
    }
}

impl std::error::Error for DecodeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

impl Encoding {
    /// Writes bytes.
    #[must_use]
    pub fn encode(self, bytes: &[u8]) -> String {
        match self {
            Self::Utf8 => String::from_utf8_lossy(bytes).into_owned(),
            Self::Base64 => STANDARD.encode(bytes),
        }
    }

    /// Reads bytes back.
    ///
    /// # Errors
    /// [`DecodeError`] where base64 was promised and something else is there.
    pub fn decode(self, text: &str) -> Result<Vec<u8>, DecodeError> {
        match self {
            Self::Utf8 => Ok(text.as_bytes().to_vec()),
            Self::Base64 => STANDARD.decode(text).map_err(DecodeError),
        }
    }

    /// The encoding that loses nothing of any of these.
    #[must_use]
    pub fn for_all(outputs: &[&[u8]]) -> Self {
        if outputs.iter().all(|bytes| std::str::from_utf8(bytes).is_ok()) { Self::Utf8 } else { Self::Base64 }
    }
}

/// A command to run. The guest starts `cmd` itself: without a shell, unless `cmd` is one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecRequest {
    /// The program: a name that is looked for in the guest's PATH, or a path.
    #[schema(example = "/bin/sh")]
    pub cmd: String,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = json!(["-c", "echo hello"]))]
    pub args: Option<Vec<String>>,
    /// The directory to start in; the user's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment on top of the sandbox's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// The user to run as; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds until the command is killed, 30 when absent. Not for background commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86_400, example = 30)]
    pub timeout_sec: Option<i64>,
    /// What the command reads from its standard input, which then ends. Nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// How `stdin` is written; UTF-8 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_encoding: Option<Encoding>,
    /// Whether to answer 202 as soon as the command runs, and let it run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<bool>,
    /// A name for a background command, `proc-` and 8 hexadecimal digits when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResponse {
    /// Where it ran.
    #[schema(value_type = String, example = "sb-0a1b2c3d")]
    pub sandbox_id: SandboxId,
    /// The program.
    pub cmd: String,
    /// What it wrote to its standard output, in `encoding`.
    pub stdout: String,
    /// What it wrote to its standard error, in `encoding`.
    pub stderr: String,
    /// Its exit code; -1 when a signal ended it.
    pub exit_code: i32,
    /// How it ended in words, such as `signal: killed`; absent for exit code 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Milliseconds from the request to the end of the command.
    pub duration_ms: u64,
    /// How `stdout` and `stderr` are written: base64 as soon as one of them is not UTF-8.
    pub encoding: Encoding,
    /// Whether there was more output than the 16 MiB that are kept of each stream.
    #[serde(default)]
    pub truncated: bool,
}

impl ExecResponse {
    /// The bytes of the standard output.
    ///
    /// # Errors
    /// [`DecodeError`] where the server did not keep to its encoding.
    pub fn stdout_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        self.encoding.decode(&self.stdout)
    }

    /// The bytes of the standard error.
    ///
    /// # Errors
    /// [`DecodeError`] where the server did not keep to its encoding.
    pub fn stderr_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        self.encoding.decode(&self.stderr)
    }
}

/// A command that runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackgroundProcess {
    /// Where it runs.
    #[schema(value_type = String, example = "sb-0a1b2c3d")]
    pub sandbox_id: SandboxId,
    /// The program.
    pub cmd: String,
    /// Its process id in the guest.
    pub pid: u32,
    /// Its name.
    pub tag: String,
}

/// A process that was started through the API and has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProcessInfo {
    /// Its process id in the guest.
    pub pid: u32,
    /// Its name, where it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The program.
    pub cmd: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
}

/// The answer of `GET /v1/sandboxes/{id}/processes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    /// The processes.
    pub processes: Vec<ProcessInfo>,
}

/// How to end a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
pub enum StopSignal {
    /// At once.
    #[default]
    #[serde(rename = "SIGKILL")]
    Kill,
    /// Politely.
    #[serde(rename = "SIGTERM")]
    Terminate,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn published_clients_send_nulls() {
        let request: ExecRequest = serde_json::from_str(
            r#"{"cmd":"/bin/sh","args":["-c","true"],"tag":null,"envs":null,"background":false}"#,
        )
        .unwrap();
        assert_eq!((request.tag, request.envs, request.background), (None, None, Some(false)));
    }

    proptest! {
        #[test]
        fn output_survives_its_encoding(stdout: Vec<u8>, stderr: Vec<u8>) {
            let encoding = Encoding::for_all(&[&stdout, &stderr]);
            for bytes in [stdout, stderr] {
                prop_assert_eq!(encoding.decode(&encoding.encode(&bytes)).unwrap(), bytes);
            }
        }
    }
}
