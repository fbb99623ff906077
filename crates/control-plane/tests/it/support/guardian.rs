//! Child processes that end with the test, however it ends: a shell between waits for the end of its input,
//! which comes when this process goes, even by a signal that nobody can catch.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// A shell that keeps one program.
pub(crate) struct Guardian {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

/// Starts the program; on `stop` and at the end of the input it is ended, on `start` it is started again.
/// After the last of it the directory `$KEEP` is removed.
const SCRIPT: &str = r#"
begin() { "$@" & pid=$!; }
finish() { kill -"$SIGNAL" $pid 2>/dev/null; wait $pid; }
begin "$@"
while read -r word; do
    case $word in
        stop) finish; echo stopped ;;
        start) begin "$@"; echo started ;;
    esac
done
finish
if [ -n "$REMOVE" ]; then rm -rf "$REMOVE"; fi
"#;

impl Guardian {
    pub(crate) fn start(
        program: &str,
        arguments: &[&str],
        signal: &str,
        user: Option<u32>,
        remove: &str,
    ) -> Self {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT, "guardian", program])
            .args(arguments)
            .env("SIGNAL", signal)
            .env("REMOVE", remove)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let output = child.stdout.take().map(BufReader::new);
        Self { child, input, output }
    }

    /// The next line that the program, or the shell, says.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.as_mut().unwrap().read_line(&mut line).unwrap();
        line
    }

    /// Says a word to the shell and waits for its answer.
    pub(crate) fn say(&mut self, word: &str) {
        writeln!(self.input.as_mut().unwrap(), "{word}").unwrap();
        let answer = self.line();
        assert!(!answer.is_empty(), "the guardian has gone");
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.input.take();
        let _ = self.child.wait();
    }
}
