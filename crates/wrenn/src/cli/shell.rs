//! `wrenn sandbox shell`: our terminal becomes one in the sandbox.
//!
//! Our terminal is raw meanwhile: every key goes there, Ctrl-C too. It is set back on every way out of here, a
//! panic included, because the setting is held by a value that sets it back when it is dropped.
//! As with ssh, Enter, `~`, `.` gives up a connection that does not answer any more.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write as _},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use wrenn_api::stream::StartTerminal;
use wrenn_types::SandboxId;

use super::{
    exec::{self, exit_code, read_stdin},
    failure::{Failure, OF_COMMAND},
    interrupts::Interrupts,
    output::Output,
};
use crate::client::{Client, TerminalEvent, TerminalInput};

/// What a terminal sends for the end of input.
const END_OF_INPUT: u8 = 4;

/// Flags of `sandbox shell`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// User to run as
    #[arg(long, short)]
    user: Option<String>,
    /// Directory to start in
    #[arg(long, short = 'w')]
    cwd: Option<String>,
    /// Variable of its environment: NAME=VALUE, or NAME to pass on the value it has here
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = exec::variable)]
    env: Vec<exec::Variable>,
    /// Return to a terminal that was left, by its tag
    #[arg(long, value_name = "TAG", conflicts_with_all = ["user", "cwd", "env", "command"])]
    connect: Option<String>,
    /// Which sandbox
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// A command instead of the shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Arguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let failed = |error: io::Error| Failure::new(OF_COMMAND, error);
        let mut interrupts = Interrupts::new().map_err(failed)?;
        let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
        let mut terminal = match &self.connect {
            Some(tag) => client.connect_terminal(&self.id, tag).await,
            None => client.terminal(&self.id, self.start()).await,
        }
        .map_err(Failure::of_command)?;
        let input = terminal.input();

        let raw = RawTerminal::enter().map_err(failed)?;
        let mut typing = std::pin::pin!(pass_on(&input, raw.is_some()));
        let mut tag = None;
        let left = loop {
            tokio::select! {
                event = terminal.next() => match event {
                    Ok(TerminalEvent::Started { tag: started, .. }) => {
                        tag = Some(started);
                        // It may have changed since the request was made, or belong to an earlier connection.
                        send_size(&input).await;
                    }
                    Ok(TerminalEvent::Output(bytes)) => show(&bytes).map_err(failed)?,
                    Ok(TerminalEvent::Warning(text)) => output.note(&format!("{text}\r")),
                    Ok(TerminalEvent::Exited(code)) => break Left::Exited(code),
                    Err(error) => break Left::Failed(Failure::of_command(error)),
                },
                _ = resized.recv() => send_size(&input).await,
                why = interrupts.next() => break Left::Behind(why.exit_code()),
                () = &mut typing => break Left::Behind(0),
            }
        };
        // From here on the terminal is as it was, so that what is printed looks as it should.
        drop(raw);
        match left {
            Left::Exited(code) => Ok(exit_code(code, None)),
            Left::Failed(failure) => Err(failure),
            Left::Behind(code) => {
                if let Some(tag) = tag {
                    let id = &self.id;
                    output.note(&format!("left; `wrenn sandbox shell {id} --connect {tag}` returns to it"));
                }
                Ok(code)
            }
        }
    }

    fn start(&self) -> StartTerminal {
        let size = size();
        let mut envs: BTreeMap<String, String> =
            std::env::var("TERM").ok().map(|term| ("TERM".to_owned(), term)).into_iter().collect();
        envs.extend(self.env.iter().map(exec::Variable::pair));
        StartTerminal {
            cmd: self.command.first().cloned(),
            args: self.command.get(1..).map(<[String]>::to_vec).filter(|args| !args.is_empty()),
            cols: size.map(|(cols, _)| cols.into()),
            rows: size.map(|(_, rows)| rows.into()),
            envs: Some(envs),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
        }
    }
}

/// How the shell was left.
enum Left {
    Exited(i32),
    Failed(Failure),
    /// It runs on.
    Behind(u8),
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Columns and rows of our terminal, if we have one.
fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

async fn send_size(input: &TerminalInput) {
    if let Some((cols, rows)) = size() {
        // If the connection is gone, the next event says so.
        let _ = input.resize(cols.into(), rows.into()).await;
    }
}

/// Passes on what is typed; ends only when the person gives up the connection.
async fn pass_on(input: &TerminalInput, from_terminal: bool) {
    let mut pieces = read_stdin();
    let mut escape = Escape::new();
    while let Some(piece) = pieces.recv().await {
        let (bytes, give_up) = if from_terminal { escape.filter(&piece) } else { (piece.to_vec(), false) };
        if !bytes.is_empty() && input.write(&bytes).await.is_err() {
            break;
        }
        if give_up {
            return;
        }
    }
    // The end of a file or a pipe is told as a person would.
    let _ = input.write(&[END_OF_INPUT]).await;
    std::future::pending().await
}

/// Our terminal in raw mode, until this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// None if our standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If the terminal is gone there is nothing to set back.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Finds Enter, `~`, `.` in what is typed. A `~` after Enter is held back until it is known what follows.
///
/// ```text
///   Line start ──~──► Tilde ──.──► give up
///      ▲  │ other       │ other: the ~ and the other are passed on
///  CR,LF  ▼             ▼
///   Within a line ◄─────┘
/// ```
struct Escape {
    state: EscapeState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EscapeState {
    LineStart,
    Tilde,
    Within,
}

impl Escape {
    fn new() -> Self {
        Self { state: EscapeState::LineStart }
    }

    /// What to pass on, and whether to give up after it.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            match (self.state, byte) {
                (EscapeState::LineStart, b'~') => self.state = EscapeState::Tilde,
                (EscapeState::Tilde, b'.') => return (passed, true),
                (state, byte) => {
                    if state == EscapeState::Tilde {
                        passed.push(b'~');
                    }
                    // Two of them are one, as with ssh.
                    if !(state == EscapeState::Tilde && byte == b'~') {
                        passed.push(byte);
                    }
                    let ends_line = matches!(byte, b'\r' | b'\n');
                    self.state = if ends_line { EscapeState::LineStart } else { EscapeState::Within };
                }
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn typed(pieces: &[&str]) -> (String, bool) {
        let mut escape = Escape::new();
        let mut all = String::new();
        for piece in pieces {
            let (passed, give_up) = escape.filter(piece.as_bytes());
            all.push_str(std::str::from_utf8(&passed).unwrap());
            if give_up {
                return (all, true);
            }
        }
        (all, false)
    }

    #[test]
    fn only_at_the_start_of_a_line() {
        assert_eq!(typed(&["~."]), (String::new(), true));
        assert_eq!(typed(&["ls\r", "~", ".rest"]), ("ls\r".to_owned(), true));
        assert_eq!(typed(&["cd ~.\r"]), ("cd ~.\r".to_owned(), false));
        assert_eq!(typed(&["~/bin\r"]), ("~/bin\r".to_owned(), false));
        assert_eq!(typed(&["~~.\r"]), ("~.\r".to_owned(), false));
    }

    proptest! {
        #[test]
        fn without_a_tilde_nothing_changes(text in "[^~]{0,50}") {
            prop_assert_eq!(typed(&[&text]), (text, false));
        }

        #[test]
        fn pieces_do_not_matter(text in "[a~.\r]{0,30}", cut in 0_usize..30) {
            let cut = cut.min(text.len());
            prop_assert_eq!(typed(&[&text[..cut], &text[cut..]]), typed(&[&text]));
        }
    }
}
