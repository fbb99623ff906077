//! A body to a file, and what becomes of half a file.
//!
//! The bytes go straight to the file that was named, in the order create, chown, write: whoever watches the directory
//! sees those three and nothing else, so there is no temporary file and no rename. A file whose body did not come
//! whole, or did not fit on the disk, is removed ([`Partial`]): nobody shall take half a file for a file.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use futures::stream::{Stream, StreamExt};
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use multer::Multipart;
use serde::Serialize;
use tokio::task::{JoinHandle, spawn_blocking};

use super::{
    Asker, FilesError, paths,
    reply::{self, Body},
};
use crate::{agent::state::Identity, tree};

/// How many files one body may hold.
const MAXIMUM_FILES: usize = 10_000;

/// What a client is told of each file that it sent.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    name: String,
    r#type: &'static str,
}

/// Writes a body to the file, or files, that it is meant for.
pub(crate) async fn serve(
    path: Option<String>,
    name: Option<String>,
    identity: Arc<Identity>,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Response<Body>, FilesError> {
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        return Err(FilesError::Encoding(String::from_utf8_lossy(encoding.as_bytes()).into_owned()));
    }
    let asker = spawn_blocking(move || Asker::new(name, identity)).await;
    let asker = asker.map_err(|_| FilesError::Interrupted)??;
    let path = path.filter(|path| !path.is_empty());
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let pieces = BodyDataStream::new(body);
    let written = match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "multipart/form-data" => multipart(&asker, path, kind, pieces).await?,
        "application/octet-stream" => {
            let path =
                path.ok_or_else(|| FilesError::Request("path is needed for this content type".to_owned()))?;
            vec![
                write(
                    &asker,
                    asker.resolve(&path)?,
                    pieces.map(|piece| piece.map_err(|_| FilesError::BodyEnded)),
                )
                .await?,
            ]
        }
        other => return Err(FilesError::Request(format!("content type '{other}' is not supported"))),
    };
    let written = serde_json::to_vec(&written).map_err(|_| FilesError::Interrupted)?;
    Ok(reply::full(StatusCode::OK, "application/json", written))
}

async fn multipart(
    asker: &Asker,
    path: Option<String>,
    kind: &str,
    pieces: impl Stream<Item = Result<Bytes, hyper::Error>> + Send,
) -> Result<Vec<Written>, FilesError> {
    let boundary = multer::parse_boundary(kind).map_err(|error| FilesError::Request(error.to_string()))?;
    let mut parts = Multipart::new(pieces, boundary);
    let mut seen = HashSet::new();
    let mut written = Vec::new();
    while let Some(part) = parts.next_field().await.map_err(|error| part_error(&error))? {
        if part.name() != Some("file") {
            continue;
        }
        let target = path.as_deref().or_else(|| part.file_name()).filter(|name| !name.is_empty());
        let target =
            target.ok_or_else(|| FilesError::Request("a file has neither a path nor a name".to_owned()))?;
        let target = asker.resolve(target)?;
        if !seen.insert(target.clone()) {
            return Err(FilesError::Request(format!("path '{target}' is given twice")));
        }
        if seen.len() > MAXIMUM_FILES {
            return Err(FilesError::Request(format!("more than {MAXIMUM_FILES} files")));
        }
        let pieces = part.map(|piece| piece.map_err(|error| part_error(&error)));
        written.push(write(asker, target, pieces).await?);
    }
    if written.is_empty() {
        return Err(FilesError::Request("there is no part named 'file'".to_owned()));
    }
    Ok(written)
}

fn part_error(error: &multer::Error) -> FilesError {
    match error {
        multer::Error::IncompleteStream
        | multer::Error::IncompleteFieldData { .. }
        | multer::Error::IncompleteHeaders
        | multer::Error::StreamReadFailed(_) => FilesError::BodyEnded,
        other => FilesError::Request(other.to_string()),
    }
}

/// Writes all pieces to a file. One piece is written while the next one comes in.
async fn write(
    asker: &Asker,
    path: String,
    pieces: impl Stream<Item = Result<Bytes, FilesError>>,
) -> Result<Written, FilesError> {
    let (user, target) = (asker.user.clone(), path.clone());
    let create = move || {
        Partial::create(target, user.uid, user.gid, |parent| {
            tree::make_directories(parent, user.uid, user.gid)
        })
    };
    let (mut partial, file) = spawn_blocking(create).await.map_err(|_| FilesError::Interrupted)??;
    let mut writing: Option<JoinHandle<io::Result<()>>> = None;
    let file = Arc::new(file);
    let mut pieces = std::pin::pin!(pieces);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        finish(writing.take(), &path).await?;
        if !piece.is_empty() {
            let file = Arc::clone(&file);
            writing = Some(spawn_blocking(move || (&*file).write_all(&piece)));
        }
    }
    finish(writing.take(), &path).await?;
    partial.keep();
    let name = paths::name(&path).to_owned();
    Ok(Written { path, name, r#type: "file" })
}

async fn finish(writing: Option<JoinHandle<io::Result<()>>>, path: &str) -> Result<(), FilesError> {
    match writing {
        None => Ok(()),
        Some(writing) => writing
            .await
            .map_err(|_| FilesError::Interrupted)?
            .map_err(|error| FilesError::from_io("write", path, error)),
    }
}

/// A file that is being written. Unless it is kept it is removed, also when the request is given up in the middle.
#[derive(Debug)]
struct Partial {
    path: String,
    device: u64,
    inode: u64,
    kept: bool,
}

impl Partial {
    /// Makes or empties the file and gives it to the user.
    fn create(
        path: String,
        uid: u32,
        gid: u32,
        make_parents: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<(Self, File), FilesError> {
        let failed = |error| FilesError::from_io("write", &path, error);
        let do_not_block = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let open = || {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o666).custom_flags(do_not_block);
            options.open(&path)
        };
        if fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
            return Err(FilesError::NotRegular(path));
        }
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_parents(Path::new(&path).parent().unwrap_or_else(|| Path::new("/"))).map_err(failed)?;
                open().map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        let metadata = file.metadata().map_err(failed)?;
        let partial = Self { device: metadata.dev(), inode: metadata.ino(), kept: false, path: path.clone() };
        fchown(&file, Some(uid), Some(gid)).map_err(failed)?;
        Ok((partial, file))
    }

    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Behind a link it is the file itself that must go; and only it, should somebody have put another in its place.
        let Ok(path) = fs::canonicalize(&self.path) else { return };
        let same = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode);
        if fs::metadata(&path).is_ok_and(same) {
            // There is nobody left to tell; the file system may have become read-only.
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(path: &Path) -> Result<(Partial, File), FilesError> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Partial::create(path.to_str().unwrap().to_owned(), uid, gid, |parent| fs::create_dir_all(parent))
    }

    #[test]
    fn half_a_file_goes_and_a_whole_one_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let (partial, mut file) = create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(partial);
        assert!(!path.exists());
        assert!(path.parent().unwrap().exists());
        let (mut partial, _) = create(&path).unwrap();
        partial.keep();
        drop(partial);
        assert!(path.exists());
    }

    #[test]
    fn what_took_its_place_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let (partial, _file) = create(&path).unwrap();
        fs::rename(&path, directory.path().join("elsewhere")).unwrap();
        fs::write(&path, "another").unwrap();
        drop(partial);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
    }

    #[test]
    fn what_is_no_file_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(create(directory.path()), Err(FilesError::Directory(_))));
        assert!(matches!(create(Path::new("/dev/null")), Err(FilesError::NotRegular(_))));
        assert!(matches!(create(Path::new("/dev/null/x")), Err(FilesError::Request(_))));
    }
}
