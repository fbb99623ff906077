//! The program of a VMM: where it is, and what it says of itself.

use std::{io, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{io::AsyncReadExt, net::unix::pipe, task::spawn_blocking, time::timeout};
use wrenn_host_linux::process::{Child, Exit, Spawn, find_program};

use crate::{VmmError, VmmResult};

/// How long a program may take to say something of itself.
const ANSWER_BOUND: Duration = Duration::from_secs(10);
/// How much of it is read.
const ANSWER_LIMIT: u64 = 4096;

/// Finds a program, by its path or on the `PATH`.
pub(crate) fn find(wanted: &Utf8Path, remedy: &'static str) -> VmmResult<Utf8PathBuf> {
    let missing = |problem: &str| unusable(wanted, problem.to_owned(), remedy);
    let found = find_program(wanted).ok_or_else(|| missing("there is no such program"))?;
    let found = std::path::absolute(found).map_err(|_| missing("its path cannot be resolved"))?;
    Utf8PathBuf::from_path_buf(found).map_err(|_| missing("its path is no UTF-8"))
}

/// What a program prints when it is started with one argument.
pub(crate) async fn ask(
    program: &Utf8Path,
    argument: &'static str,
    remedy: &'static str,
) -> VmmResult<String> {
    let unusable = |problem: String| unusable(program, problem, remedy);
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| unusable(error.to_string()))?;
    let spawn = Spawn::new(program.as_std_path()).arg(argument).stdout(write).die_with_parent();
    let mut child = start(spawn).await.map_err(|error| unusable(error.to_string()))?;
    let asked = async {
        let mut said = Vec::new();
        let output = pipe::Receiver::from_owned_fd(read)?;
        output.take(ANSWER_LIMIT).read_to_end(&mut said).await?;
        Ok::<_, io::Error>((String::from_utf8_lossy(&said).into_owned(), child.wait().await?))
    };
    let asked = timeout(ANSWER_BOUND, asked).await;
    let problem = match asked {
        Ok(Ok((said, Exit::Code(0)))) => return Ok(said),
        Ok(Ok((_, exit))) => format!("it ended with {exit:?}"),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it did not answer {argument} within {ANSWER_BOUND:?}"),
    };
    end(child).await;
    Err(unusable(problem))
}

/// That a program cannot be used.
pub(crate) fn unusable(program: &Utf8Path, problem: String, remedy: &'static str) -> VmmError {
    VmmError::Unavailable { program: program.to_string(), problem, remedy }
}

pub(crate) async fn start(spawn: Spawn) -> io::Result<Child> {
    let started = spawn_blocking(move || spawn.start()).await.map_err(io::Error::other)?;
    started.map_err(io::Error::other)
}

/// Ends a child that is not needed any more, and reaps it.
pub(crate) async fn end(mut child: Child) {
    drop(child.kill());
    drop(child.wait().await);
}
