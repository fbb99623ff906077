//! The JSON text frames of the WebSockets.
//!
//! `exec/stream`: the client's first frame is `start`; then it may send `stdin`, `stdin_close` and `stop`.
//! The server sends `start`, any number of `stdout` and `stderr`, and one `exit` or `error`, then closes.
//! `processes/{selector}/stream` has the same server frames and needs none from the client.
//!
//! `terminal` (also called `pty`): the client's first frame is `start` or `connect`. What is typed and what
//! is shown travels as binary frames; a client of the older dialect sends `input` frames with base64
//! instead, and is shown `output` frames with base64 where its base path is the legacy one. All output
//! precedes `exit`. The process survives the connection, and `connect` finds it again by its tag.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{error::ErrorCode, exec::Encoding};

/// What a client sends on `exec/stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecClientFrame {
    /// What to run; the first frame, and only that.
    Start(StartExec),
    /// Bytes for the command's standard input; only where `start` said `stdin`.
    Stdin {
        /// The bytes.
        data: String,
        /// How they are written; UTF-8 when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encoding: Option<Encoding>,
    },
    /// The end of the standard input.
    StdinClose,
    /// Ends the command: SIGTERM, and SIGKILL if it has not ended 3 seconds later.
    Stop,
    /// A frame of a newer client; ignored.
    #[serde(other)]
    Unknown,
}

/// What to run on `exec/stream`. The command belongs to the connection: it is killed when that goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartExec {
    /// The program.
    pub cmd: String,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// The directory to start in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment on top of the sandbox's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// The user to run as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds until the command is killed; no bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// Whether `stdin` frames will follow. Without, the command's standard input is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<bool>,
    /// How output is written in `stdout` and `stderr` frames. With UTF-8, the default, what is not UTF-8
    /// is shown as U+FFFD; base64 loses nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
}

/// What the server sends on `exec/stream` and `processes/{selector}/stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecServerFrame {
    /// It runs.
    Start {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Standard output.
    Stdout {
        /// The next piece; never cut within a character.
        data: String,
    },
    /// Standard error.
    Stderr {
        /// The next piece; never cut within a character.
        data: String,
    },
    /// It has ended. The last frame.
    Exit {
        /// The exit code; -1 when a signal ended it.
        exit_code: i32,
        /// How it ended in words, such as `signal: killed`; absent for exit code 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<String>,
    },
    /// It could not be run, or was lost. The last frame.
    Error {
        /// One sentence.
        data: String,
        /// The code that a REST answer would have.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<ErrorCode>,
    },
}

/// What a client sends on `terminal` as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalClientFrame {
    /// A new process with a terminal; only as the first frame.
    Start(StartTerminal),
    /// A process that runs already; only as the first frame.
    Connect {
        /// Its tag.
        tag: String,
    },
    /// What was typed, in base64 (the older dialect; binary frames are the newer one).
    Input {
        /// The bytes.
        data: String,
    },
    /// The terminal has a new size.
    Resize {
        /// Columns.
        cols: u32,
        /// Rows.
        rows: u32,
    },
    /// Ends the process with SIGKILL.
    Kill,
    /// The answer to a `ping` frame.
    Pong,
    /// A frame of a newer client; ignored.
    #[serde(other)]
    Unknown,
}

/// A new process with a terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartTerminal {
    /// The program, `/bin/bash` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<String>,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// Columns, 80 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cols: Option<i64>,
    /// Rows, 24 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<i64>,
    /// Environment on top of the sandbox's. `TERM` is `xterm-256color` unless it says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// The directory to start in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The user to run as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// What the server sends on `terminal` as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalServerFrame {
    /// It runs.
    Started {
        /// The name to `connect` to; begins with `pty-`.
        tag: String,
        /// Its process id in the guest.
        pid: u32,
    },
    /// What the terminal shows, in base64; only on the legacy base path.
    Output {
        /// The bytes.
        data: String,
    },
    /// It has ended. The last frame.
    Exit {
        /// The exit code; -1 when a signal ended it.
        exit_code: i32,
    },
    /// Something went wrong.
    Error {
        /// One sentence.
        data: String,
        /// Whether this is the last frame.
        fatal: bool,
        /// The code that a REST answer would have.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<ErrorCode>,
    },
    /// Every 30 seconds, so that nothing between takes the connection for dead.
    Ping,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn frames_are_the_published_ones() {
        let start: ExecClientFrame =
            serde_json::from_value(json!({"type": "start", "cmd": "ls", "args": ["-l"], "x": 1})).unwrap();
        let ExecClientFrame::Start(start) = start else { panic!("{start:?}") };
        assert_eq!((start.cmd.as_str(), start.args), ("ls", Some(vec!["-l".to_owned()])));
        for (frame, expected) in [
            (ExecServerFrame::Start { pid: 7 }, json!({"type": "start", "pid": 7})),
            (ExecServerFrame::Stdout { data: "a".into() }, json!({"type": "stdout", "data": "a"})),
            (ExecServerFrame::Exit { exit_code: 0, status: None }, json!({"type": "exit", "exit_code": 0})),
        ] {
            assert_eq!(serde_json::to_value(frame).unwrap(), expected);
        }
        assert_eq!(
            serde_json::from_value::<TerminalClientFrame>(json!({"type": "start"})).unwrap(),
            TerminalClientFrame::Start(StartTerminal::default())
        );
        assert_eq!(
            serde_json::from_value::<TerminalClientFrame>(json!({"type": "wink"})).unwrap(),
            TerminalClientFrame::Unknown
        );
        assert_eq!(serde_json::to_value(TerminalServerFrame::Ping).unwrap(), json!({"type": "ping"}));
    }
}
