//! What a caller may ask for: requests become commands here, or are refused by the name of a field.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use wrenn_api::{CreateSandbox, Encoding, ExecRequest, stream::StartExec, stream::StartTerminal};
use wrenn_types::{DiskMib, InactivityTimeout, MemoryMib, TemplateName, Vcpus};

use super::{CoreError, settings};
use crate::{guest::Launch, host::Settings};

/// The template of a create that names none.
const DEFAULT_TEMPLATE: &str = "base";
const METADATA_KEYS: usize = 20;
const METADATA_LENGTH: usize = 64;
/// Names that published servers keep for themselves.
const RESERVED_METADATA: [&str; 4] = ["kernel_version", "vmm_version", "agent_version", "envd_version"];
const ENVIRONMENT_BYTES: usize = 128 * 1024;
const COMMAND_BYTES: usize = 4096;
const ARGUMENT_BYTES: usize = 512 * 1024;
const USER_BYTES: usize = 64;
const TAG_BYTES: usize = 128;
/// The longest path that Linux takes.
const PATH_BYTES: usize = 4096;
const EXEC_SECONDS: std::ops::RangeInclusive<i64> = 1..=86_400;
const EXEC_DEFAULT: Duration = Duration::from_secs(30);
const TERMINAL_CELLS: std::ops::RangeInclusive<i64> = 1..=1000;

/// A sandbox that can be asked of a host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spec {
    pub(crate) template: TemplateName,
    /// Absent where the caller leaves it to the template or the snapshot.
    pub(crate) vcpus: Option<Vcpus>,
    pub(crate) memory: Option<MemoryMib>,
    pub(crate) disk: Option<DiskMib>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) settings: Settings,
    pub(crate) auto_resume: bool,
}

impl TryFrom<CreateSandbox> for Spec {
    type Error = CoreError;

    fn try_from(asked: CreateSandbox) -> Result<Self, CoreError> {
        let template = asked.template.as_deref().unwrap_or(DEFAULT_TEMPLATE);
        let metadata = asked.metadata.unwrap_or_default();
        check_metadata(&metadata)?;
        let deadline = asked.deadline.as_deref().map(|text| settings::parse_deadline(text, Timestamp::now()));
        let settings = Settings {
            network: settings::parse_network(asked.network.unwrap_or_default(), asked.allow_internet_access)?,
            timeout: asked.timeout_sec.map(InactivityTimeout::new).transpose()?.unwrap_or_default(),
            on_timeout: asked.on_timeout.unwrap_or_default(),
            deadline: settings::with_action(deadline.transpose()?.flatten(), asked.deadline_action)?,
        };
        Ok(Self {
            template: template.parse().map_err(|error| CoreError::Invalid(format!("template: {error}")))?,
            vcpus: asked.vcpus.map(Vcpus::new).transpose()?,
            memory: asked.memory_mb.map(MemoryMib::new).transpose()?,
            disk: asked.disk_size_mb.map(DiskMib::new).transpose()?,
            metadata,
            environment: check_environment(asked.envs)?,
            settings,
            auto_resume: asked.auto_resume.unwrap_or(false),
        })
    }
}

fn is_name(name: &str) -> bool {
    (1..=METADATA_LENGTH).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Whether these may be a sandbox's metadata.
pub(crate) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), CoreError> {
    if metadata.len() > METADATA_KEYS {
        return Err(CoreError::Invalid(format!("metadata can have at most {METADATA_KEYS} names")));
    }
    for (name, value) in metadata {
        if !is_name(name) {
            return Err(CoreError::Invalid(
                "a name in metadata is 1 to 64 letters, digits, dots, underscores and dashes".to_owned(),
            ));
        }
        if RESERVED_METADATA.contains(&name.as_str()) {
            return Err(CoreError::Invalid(format!("metadata: the name {name} is reserved")));
        }
        if value.len() > METADATA_LENGTH || value.contains('\0') {
            return Err(CoreError::Invalid(format!(
                "metadata: the value of {name} must be at most {METADATA_LENGTH} bytes, without NUL"
            )));
        }
    }
    Ok(())
}

/// Whether these may be variables of a sandbox.
pub(crate) fn check_environment(
    environment: Option<BTreeMap<String, String>>,
) -> Result<BTreeMap<String, String>, CoreError> {
    let environment = environment.unwrap_or_default();
    let bytes: usize = environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if bytes > ENVIRONMENT_BYTES {
        return Err(CoreError::Invalid(format!("envs can be at most {ENVIRONMENT_BYTES} bytes together")));
    }
    for (name, value) in &environment {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(CoreError::Invalid(
                "a name in envs must not be empty and not contain =, and nothing in envs contains NUL"
                    .to_owned(),
            ));
        }
    }
    Ok(environment)
}

fn check_text(field: &str, text: &str, most: usize) -> Result<(), CoreError> {
    if text.is_empty() || text.len() > most || text.contains('\0') {
        return Err(CoreError::Invalid(format!("{field} must be 1 to {most} bytes, without NUL")));
    }
    Ok(())
}

/// A path that can be asked of a guest. An empty one would be the working directory there, and never what
/// was meant.
pub(crate) fn check_path(field: &str, path: &str) -> Result<(), CoreError> {
    check_text(field, path, PATH_BYTES)
}

/// A user that can be asked of a guest.
pub(crate) fn check_user(user: Option<&str>) -> Result<(), CoreError> {
    match user {
        Some(user) if user.contains(':') => {
            Err(CoreError::Invalid("user must not contain a colon".to_owned()))
        }
        Some(user) => check_text("user", user, USER_BYTES),
        None => Ok(()),
    }
}

/// A tag, which must not look like a process id.
pub(crate) fn check_tag(tag: &str) -> Result<(), CoreError> {
    check_text("tag", tag, TAG_BYTES)?;
    if tag.bytes().all(|b| b.is_ascii_digit()) {
        return Err(CoreError::Invalid("tag must not be a number".to_owned()));
    }
    Ok(())
}

fn check_seconds(given: i64) -> Result<Duration, CoreError> {
    match u64::try_from(given) {
        Ok(seconds) if EXEC_SECONDS.contains(&given) => Ok(Duration::from_secs(seconds)),
        _ => Err(out_of_bounds("timeout_sec", &EXEC_SECONDS, given)),
    }
}

fn out_of_bounds(field: &str, bounds: &std::ops::RangeInclusive<i64>, given: i64) -> CoreError {
    CoreError::Invalid(format!(
        "{field} must be between {} and {}, not {given}",
        bounds.start(),
        bounds.end()
    ))
}

/// The size of a terminal.
pub(crate) fn check_cells(cols: i64, rows: i64) -> Result<(u32, u32), CoreError> {
    let check = |field, given: i64| match u32::try_from(given) {
        Ok(cells) if TERMINAL_CELLS.contains(&given) => Ok(cells),
        _ => Err(out_of_bounds(field, &TERMINAL_CELLS, given)),
    };
    Ok((check("cols", cols)?, check("rows", rows)?))
}

struct Parts {
    cmd: String,
    args: Option<Vec<String>>,
    envs: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
    user: Option<String>,
}

fn check_launch(parts: Parts) -> Result<Launch, CoreError> {
    check_text("cmd", &parts.cmd, COMMAND_BYTES)?;
    let args = parts.args.unwrap_or_default();
    if args.iter().map(|arg| arg.len() + 1).sum::<usize>() > ARGUMENT_BYTES {
        return Err(CoreError::Invalid(format!("args can be at most {ARGUMENT_BYTES} bytes together")));
    }
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(CoreError::Invalid("args must not contain NUL".to_owned()));
    }
    if let Some(cwd) = &parts.cwd {
        check_path("cwd", cwd)?;
    }
    check_user(parts.user.as_deref())?;
    Ok(Launch {
        cmd: parts.cmd,
        args,
        envs: check_environment(parts.envs)?,
        cwd: parts.cwd,
        user: parts.user,
        ..Launch::default()
    })
}

/// A command whose end is waited for, or that runs on.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub(crate) launch: Launch,
    pub(crate) stdin: Option<Vec<u8>>,
    pub(crate) timeout: Duration,
    pub(crate) background: bool,
}

impl TryFrom<ExecRequest> for Command {
    type Error = CoreError;

    fn try_from(asked: ExecRequest) -> Result<Self, CoreError> {
        let background = asked.background.unwrap_or(false);
        if background && asked.stdin.is_some() {
            return Err(CoreError::Invalid("stdin is not for background commands".to_owned()));
        }
        let timeout = asked.timeout_sec.map(check_seconds).transpose()?.unwrap_or(EXEC_DEFAULT);
        if let Some(tag) = &asked.tag {
            check_tag(tag)?;
        }
        let encoding = asked.stdin_encoding.unwrap_or(Encoding::Utf8);
        let stdin = asked.stdin.map(|stdin| encoding.decode(&stdin)).transpose();
        let stdin = stdin.map_err(|error| CoreError::Invalid(format!("stdin: {error}")))?;
        let parts =
            Parts { cmd: asked.cmd, args: asked.args, envs: asked.envs, cwd: asked.cwd, user: asked.user };
        let mut launch = check_launch(parts)?;
        launch.tag = asked.tag;
        launch.stdin = stdin.is_some();
        Ok(Self { launch, stdin, timeout, background })
    }
}

/// A command on a WebSocket.
pub(crate) fn check_stream(asked: StartExec) -> Result<(Launch, Option<Duration>, Encoding), CoreError> {
    let timeout = asked.timeout_sec.map(check_seconds).transpose()?;
    let parts =
        Parts { cmd: asked.cmd, args: asked.args, envs: asked.envs, cwd: asked.cwd, user: asked.user };
    let mut launch = check_launch(parts)?;
    launch.stdin = asked.stdin.unwrap_or(false);
    Ok((launch, timeout, asked.encoding.unwrap_or_default()))
}

/// A process with a terminal.
pub(crate) fn check_terminal(asked: StartTerminal) -> Result<Launch, CoreError> {
    let size = check_cells(asked.cols.unwrap_or(80), asked.rows.unwrap_or(24))?;
    let mut envs = asked.envs.unwrap_or_default();
    envs.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    let parts = Parts {
        cmd: asked.cmd.unwrap_or_else(|| "/bin/bash".to_owned()),
        args: asked.args,
        envs: Some(envs),
        cwd: asked.cwd,
        user: asked.user,
    };
    let mut launch = check_launch(parts)?;
    launch.terminal = Some(size);
    Ok(launch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(request: CreateSandbox) -> String {
        Spec::try_from(request).unwrap_err().to_string()
    }

    #[test]
    fn defaults_of_a_create() {
        let spec = Spec::try_from(CreateSandbox::default()).unwrap();
        assert_eq!(spec.template.as_str(), "base");
        assert_eq!((spec.vcpus, spec.memory, spec.settings.timeout.get()), (None, None, 0));
        assert!(spec.settings.network.internet && spec.disk.is_none() && !spec.auto_resume);
        assert_eq!(spec.settings.on_timeout, wrenn_types::TimeoutAction::Pause);
        assert!(spec.settings.deadline.is_none());
    }

    #[test]
    fn every_number_is_bounded_by_name() {
        let base = CreateSandbox::default();
        for wrong in [0, -1, i64::MIN, i64::MAX] {
            assert!(refused(CreateSandbox { vcpus: Some(wrong), ..base.clone() }).starts_with("vcpus must"));
            assert!(
                refused(CreateSandbox { memory_mb: Some(wrong), ..base.clone() })
                    .starts_with("memory_mb must")
            );
            assert!(
                refused(CreateSandbox { disk_size_mb: Some(wrong), ..base.clone() })
                    .starts_with("disk_size_mb must")
            );
        }
        for wrong in [-1, i64::MAX] {
            assert!(
                refused(CreateSandbox { timeout_sec: Some(wrong), ..base.clone() })
                    .starts_with("timeout_sec must")
            );
        }
    }

    #[test]
    fn metadata_is_bounded() {
        let with = |name: &str, value: &str| CreateSandbox {
            metadata: Some(BTreeMap::from([(name.to_owned(), value.to_owned())])),
            ..CreateSandbox::default()
        };
        assert!(Spec::try_from(with("a.b_c-1", "any ä text")).is_ok());
        for (name, value) in [
            ("", "v"),
            ("a b", "v"),
            (&*"n".repeat(65), "v"),
            ("n", &*"v".repeat(65)),
            ("kernel_version", "1"),
            ("n", "\0"),
        ] {
            assert!(refused(with(name, value)).contains("metadata"), "{name}={value}");
        }
        let many = (0..21).map(|number| (format!("n{number}"), String::new())).collect();
        refused(CreateSandbox { metadata: Some(many), ..CreateSandbox::default() });
    }

    #[test]
    fn commands_are_bounded() {
        let base = ExecRequest { cmd: "true".to_owned(), ..ExecRequest::default() };
        assert_eq!(Command::try_from(base.clone()).unwrap().timeout, EXEC_DEFAULT);
        for wrong in [
            ExecRequest { cmd: String::new(), ..base.clone() },
            ExecRequest { cmd: "a\0b".to_owned(), ..base.clone() },
            ExecRequest { timeout_sec: Some(0), ..base.clone() },
            ExecRequest { timeout_sec: Some(86_401), ..base.clone() },
            ExecRequest { timeout_sec: Some(-1), ..base.clone() },
            ExecRequest { cwd: Some(String::new()), ..base.clone() },
            ExecRequest { user: Some("a:b".to_owned()), ..base.clone() },
            ExecRequest { tag: Some("17".to_owned()), ..base.clone() },
            ExecRequest { args: Some(vec!["\0".to_owned()]), ..base.clone() },
            ExecRequest { args: Some(vec!["a".repeat(ARGUMENT_BYTES)]), ..base.clone() },
            ExecRequest { envs: Some(BTreeMap::from([("A=B".to_owned(), String::new())])), ..base.clone() },
            ExecRequest {
                stdin: Some("!".to_owned()),
                stdin_encoding: Some(Encoding::Base64),
                ..base.clone()
            },
            ExecRequest { stdin: Some(String::new()), background: Some(true), ..base },
        ] {
            assert!(matches!(Command::try_from(wrong.clone()), Err(CoreError::Invalid(_))), "{wrong:?}");
        }
    }
}
