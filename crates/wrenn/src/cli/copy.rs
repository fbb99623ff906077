//! `wrenn sandbox cp SOURCE DESTINATION`: one of them is `SANDBOX:PATH`, the other a local file or `-`.
//!
//! A file is streamed and never held as a whole. What is copied here is written beside its destination and renamed
//! when it is complete, so that an interrupted copy leaves what was there.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::io::AsyncRead;
use wrenn_api::EntryType;
use wrenn_types::SandboxId;

use super::{
    exec::{is_not_found, read_stdin},
    failure::Failure,
    interrupts::Interrupts,
    output::Output,
};
use crate::client::{Client, Download};

/// Flags of `sandbox cp`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A path in a sandbox is SANDBOX:PATH; a relative one starts in the user's home directory. \
- is standard input or output. For a directory: wrenn sandbox exec SANDBOX -- tar -C DIR -c . | tar -x"
)]
pub(super) struct Arguments {
    /// What to copy
    source: Place,
    /// Where to
    destination: Place,
    /// User to act as in the sandbox
    #[arg(long, short)]
    user: Option<String>,
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A file of this machine.
    Local(PathBuf),
    /// Standard input or output.
    Standard,
    /// A file of a sandbox.
    Remote { id: SandboxId, path: String },
}

/// A place that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParsePlaceError {
    #[error("a path is missing")]
    Empty,
    #[error("{0} is not a sandbox id, which is sb- and 8 hexadecimal digits; write ./{0}:… for a local file")]
    NotASandbox(String),
}

impl FromStr for Place {
    type Err = ParsePlaceError;

    fn from_str(text: &str) -> Result<Self, ParsePlaceError> {
        match text.split_once(':') {
            _ if text.is_empty() => Err(ParsePlaceError::Empty),
            _ if text == "-" => Ok(Self::Standard),
            // A slash before the colon: surely a path.
            Some((name, path)) if name.starts_with("sb-") && !name.contains('/') => match name.parse() {
                Ok(id) => Ok(Self::Remote { id, path: path.to_owned() }),
                Err(_) => Err(ParsePlaceError::NotASandbox(name.to_owned())),
            },
            _ => Ok(Self::Local(PathBuf::from(text))),
        }
    }
}

impl Arguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let mut interrupts = Interrupts::new()?;
        let user = self.user.as_deref();
        let copying = async {
            match (self.source, self.destination) {
                (Place::Remote { .. }, Place::Remote { .. }) => {
                    Err(anyhow::anyhow!("one end of a copy must be on this machine").into())
                }
                (Place::Remote { id, path }, destination) => {
                    get(client, &id, &path, user, destination, output).await
                }
                (source, Place::Remote { id, path }) => put(client, source, &id, &path, user, output).await,
                _ => Err(anyhow::anyhow!("neither end is in a sandbox; write it as SANDBOX:PATH").into()),
            }
        };
        tokio::select! {
            result = copying => result.map(|()| 0),
            // The partial file is removed when the copy is dropped.
            why = interrupts.next() => Ok(why.exit_code()),
        }
    }
}

async fn get(
    client: &Client,
    id: &SandboxId,
    path: &str,
    user: Option<&str>,
    destination: Place,
    output: Output,
) -> Result<(), Failure> {
    let mut download = client.download(id, path, user).await?;
    match destination {
        Place::Local(local) => {
            let target = if local.is_dir() { local.join(last_part(path)?) } else { local };
            let bar = progress(output, download.length, &target.display().to_string());
            let mut partial = Partial::create(&target)?;
            let copied = receive(&mut download, &mut partial.file, &bar).await;
            bar.finish_and_clear();
            let bytes = copied?;
            partial.complete()?;
            report(output, bytes, &format!("{id}:{path}"), &target.display().to_string())
        }
        _ => receive(&mut download, &mut io::stdout().lock(), &ProgressBar::hidden()).await.map(drop),
    }
}

async fn receive(
    download: &mut Download,
    to: &mut impl io::Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    let mut bytes = 0;
    while let Some(piece) = download.chunk().await? {
        to.write_all(&piece)?;
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    }
    to.flush()?;
    Ok(bytes)
}

async fn put(
    client: &Client,
    source: Place,
    id: &SandboxId,
    path: &str,
    user: Option<&str>,
    output: Output,
) -> Result<(), Failure> {
    match source {
        Place::Local(local) => {
            let metadata = fs::metadata(&local).map_err(|error| at(&local, error))?;
            if metadata.is_dir() {
                let name = local.display();
                return Err(anyhow::anyhow!(
                    "{name} is a directory; tar -C {name} -c . | wrenn sandbox exec {id} -- tar -C DIR -x copies one"
                )
                .into());
            }
            let file = tokio::fs::File::open(&local).await.map_err(|error| at(&local, error))?;
            // A pipe or a device has no length that is known before its end.
            let length = metadata.is_file().then_some(metadata.len());
            let target =
                remote_target(client, id, path, user, Some(last_part(&local.to_string_lossy())?)).await?;
            let bar = progress(output, length, &target);
            let sent =
                client.upload(id, &target, user, Metered { inner: file, bar: bar.clone() }, length).await;
            bar.finish_and_clear();
            sent?;
            report(output, bar.position(), &local.display().to_string(), &format!("{id}:{target}"))
        }
        _ => {
            let target = remote_target(client, id, path, user, None).await?;
            Ok(client.upload(id, &target, user, stdin_reader(), None).await?)
        }
    }
}

/// Our standard input, read without holding up the end of this process.
fn stdin_reader() -> impl AsyncRead + Send + 'static {
    let pieces = futures::stream::unfold(read_stdin(), async |mut pieces| {
        pieces.recv().await.map(|piece| (Ok::<_, io::Error>(piece), pieces))
    });
    tokio_util::io::StreamReader::new(Box::pin(pieces))
}

/// The path of the file in the sandbox: where a directory is meant, the file goes into it.
async fn remote_target(
    client: &Client,
    id: &SandboxId,
    path: &str,
    user: Option<&str>,
    name: Option<String>,
) -> Result<String, Failure> {
    let Some(name) = name else { return Ok(path.to_owned()) };
    if path.is_empty() {
        return Ok(name);
    }
    let is_directory = path.ends_with('/')
        || match client.stat(id, path, user).await {
            Ok(entry) => entry.kind == EntryType::Directory,
            Err(error) if is_not_found(&error) => false,
            Err(error) => return Err(error.into()),
        };
    Ok(if is_directory { format!("{}/{name}", path.trim_end_matches('/')) } else { path.to_owned() })
}

/// The name of a file in its directory.
fn last_part(path: &str) -> Result<String, Failure> {
    match Path::new(path).file_name() {
        Some(name) => Ok(name.to_string_lossy().into_owned()),
        None => Err(anyhow::anyhow!("{path:?} does not name a file").into()),
    }
}

fn at(path: &Path, error: io::Error) -> Failure {
    Failure::new(1, anyhow::Error::new(error).context(path.display().to_string()))
}

fn report(output: Output, bytes: u64, source: &str, destination: &str) -> Result<(), Failure> {
    if output.is_json() {
        output.json(&serde_json::json!({ "source": source, "destination": destination, "bytes": bytes }))?;
    }
    Ok(())
}

/// A bar for a person who watches.
fn progress(output: Output, length: Option<u64>, name: &str) -> ProgressBar {
    if !output.is_watched() || output.is_json() {
        return ProgressBar::with_draw_target(length, ProgressDrawTarget::hidden());
    }
    let form = match length {
        Some(_) => "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        None => "{msg} {spinner} {bytes} {bytes_per_sec}",
    };
    let style = ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = length.map_or_else(ProgressBar::no_length, ProgressBar::new);
    bar.with_style(style).with_message(name.to_owned())
}

/// A source that moves a bar.
struct Metered {
    inner: tokio::fs::File,
    bar: ProgressBar,
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = std::pin::Pin::new(&mut self.inner).poll_read(context, buffer);
        self.bar.inc((buffer.filled().len() - before) as u64);
        polled
    }
}

/// A file beside its destination. It is removed unless it becomes complete.
struct Partial {
    file: fs::File,
    path: PathBuf,
    target: PathBuf,
    complete: bool,
}

impl Partial {
    fn create(target: &Path) -> Result<Self, Failure> {
        let name = last_part(&target.to_string_lossy())?;
        let path = target.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = fs::File::create_new(&path).map_err(|error| at(&path, error))?;
        Ok(Self { file, path, target: target.to_owned(), complete: false })
    }

    fn complete(mut self) -> Result<(), Failure> {
        fs::rename(&self.path, &self.target).map_err(|error| at(&self.target, error))?;
        self.complete = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    use proptest::prelude::*;

    fn place(text: &str) -> Result<Place, ParsePlaceError> {
        text.parse()
    }

    #[test]
    fn places() {
        let id: SandboxId = "sb-0a1b2c3d".parse().unwrap();
        let remote = |path: &str| Ok(Place::Remote { id: id.clone(), path: path.to_owned() });
        assert_eq!(place("sb-0a1b2c3d:/etc/hosts"), remote("/etc/hosts"));
        assert_eq!(place("sb-0a1b2c3d:a:b"), remote("a:b"));
        assert_eq!(place("sb-0a1b2c3d:"), remote(""));
        assert_eq!(place("-"), Ok(Place::Standard));
        for local in ["a", "./sb-x:y", "/a:b", "c:d", "sb-0a1b2c3d", "./-"] {
            assert_eq!(place(local), Ok(Place::Local(local.into())));
        }
        assert_eq!(place("sb-1:/x"), Err(ParsePlaceError::NotASandbox("sb-1".to_owned())));
        assert_eq!(place(""), Err(ParsePlaceError::Empty));
    }

    #[test]
    fn an_incomplete_file_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("file");
        fs::write(&target, "before").unwrap();
        let mut partial = Partial::create(&target).unwrap();
        partial.file.write_all(b"half").unwrap();
        drop(partial);
        assert_eq!(fs::read_to_string(&target).unwrap(), "before");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);

        let mut partial = Partial::create(&target).unwrap();
        partial.file.write_all(b"whole").unwrap();
        partial.complete().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "whole");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn a_remote_place_is_found_whatever_its_path(path in "[^\0]{0,60}") {
            let text = format!("sb-0a1b2c3d:{path}");
            let id = "sb-0a1b2c3d".parse().unwrap();
            prop_assert_eq!(place(&text), Ok(Place::Remote { id, path }));
        }
    }
}
