//! A file to a client.
//!
//! A small file is read at once, on the same visit to a blocking thread that opened it, and what was read is its
//! length. This is also right for the files of `/proc` and `/sys`, whose stated sizes mean nothing. A large file is
//! sent piece by piece: with its length, unless it states none, and the next piece is read while one is sent.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
};

use bytes::Bytes;
use futures::stream::{self, Stream};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header, request::Parts};
use tokio::task::{JoinHandle, spawn_blocking};

use super::{
    Asker, FilesError, paths,
    range::{self, Part},
    reply::{self, Body},
};
use crate::agent::state::Identity;

/// Up to this size a file is read at once.
const SMALL: u64 = 64 * 1024;
/// How much of a large file is read at a time.
const PIECE: usize = 256 * 1024;
const KIND: &str = "application/octet-stream";

/// A file that was opened.
enum Opened {
    Small(Vec<u8>),
    /// A large file of known size.
    Large(File, u64),
    /// A large file that does not know its size; what was read of it so far comes first.
    Endless(File, Vec<u8>),
}

/// Answers with a file.
pub(crate) async fn serve(
    path: Option<String>,
    name: Option<String>,
    identity: Arc<Identity>,
    parts: &Parts,
) -> Result<Response<Body>, FilesError> {
    let work = move || {
        let asker = Asker::new(name, identity)?;
        let path = asker.resolve(&path.unwrap_or_default())?;
        open(&path).map(|opened| (path, opened))
    };
    let (path, opened) = spawn_blocking(work).await.map_err(|_| FilesError::Interrupted)??;
    let size = match &opened {
        Opened::Small(bytes) => Some(bytes.len() as u64),
        Opened::Large(_, size) => Some(*size),
        Opened::Endless(..) => None,
    };
    let part = size.map_or(Part::Whole, |size| range::wanted(&parts.headers, size));
    let mut response = match (opened, part) {
        (_, Part::Unsatisfiable) => return Err(FilesError::Range { size: size.unwrap_or(0) }),
        (Opened::Small(bytes), part) => reply::full(StatusCode::OK, KIND, cut(bytes.into(), part)),
        (Opened::Large(file, size), Part::Whole) => {
            with_length(reply::streamed(KIND, exactly(file, size)), size)
        }
        (Opened::Large(mut file, _), Part::Some { start, length }) => {
            file.seek(SeekFrom::Start(start)).map_err(|error| FilesError::from_io("read", &path, error))?;
            with_length(reply::streamed(KIND, exactly(file, length)), length)
        }
        (Opened::Endless(file, first), _) => reply::streamed(KIND, to_the_end(file, first)),
    };
    if let (Part::Some { start, length }, Some(size)) = (part, size) {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        range::mark(response.headers_mut(), start, length, size);
    }
    describe(response.headers_mut(), &path);
    Ok(response)
}

fn open(path: &str) -> Result<Opened, FilesError> {
    let failed = |error| FilesError::from_io("read", path, error);
    let do_not_block = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(do_not_block).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(FilesError::Directory(path.to_owned()));
    }
    if !metadata.is_file() {
        return Err(FilesError::NotRegular(path.to_owned()));
    }
    let size = metadata.len();
    if size > SMALL {
        return Ok(Opened::Large(file, size));
    }
    let mut start = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    (&file).take(SMALL + 1).read_to_end(&mut start).map_err(failed)?;
    let all = start.len() as u64 <= SMALL;
    Ok(if all { Opened::Small(start) } else { Opened::Endless(file, start) })
}

fn cut(bytes: Bytes, part: Part) -> Bytes {
    let Part::Some { start, length } = part else { return bytes };
    let start = usize::try_from(start).unwrap_or(usize::MAX).min(bytes.len());
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len() - start);
    bytes.slice(start..start + length)
}

fn with_length(mut response: Response<Body>, length: u64) -> Response<Body> {
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    response
}

/// The next `length` bytes of a file. A file that has fewer by now is an error: the client was promised them all.
fn exactly(file: File, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some((read(file, piece(length)), length)), async |state| {
        let (pending, left) = state?;
        if left == 0 {
            return None;
        }
        Some(match finish(pending).await {
            Err(error) => (Err(error), None),
            Ok((_, bytes)) if bytes.is_empty() => (Err(io::ErrorKind::UnexpectedEof.into()), None),
            Ok((file, bytes)) => {
                let left = left.saturating_sub(bytes.len() as u64);
                (Ok(bytes), Some((read(file, piece(left)), left)))
            }
        })
    })
}

/// What was read already, and everything up to the end.
fn to_the_end(file: File, first: Vec<u8>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some((Some(first), file)), async |state| {
        let (first, file) = state?;
        if let Some(first) = first {
            return Some((Ok(first.into()), Some((None, file))));
        }
        match finish(read(file, PIECE)).await {
            Err(error) => Some((Err(error), None)),
            Ok((_, bytes)) if bytes.is_empty() => None,
            Ok((file, bytes)) => Some((Ok(bytes), Some((None, file)))),
        }
    })
}

type Reading = JoinHandle<io::Result<(File, Bytes)>>;

fn piece(left: u64) -> usize {
    usize::try_from(left).unwrap_or(PIECE).min(PIECE)
}

/// Starts to read up to `length` bytes.
fn read(mut file: File, length: usize) -> Reading {
    spawn_blocking(move || {
        let mut bytes = Vec::with_capacity(length);
        (&mut file).take(length as u64).read_to_end(&mut bytes)?;
        Ok((file, bytes.into()))
    })
}

async fn finish(reading: Reading) -> io::Result<(File, Bytes)> {
    reading.await.map_err(io::Error::other)?
}

fn describe(headers: &mut HeaderMap, path: &str) {
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if let Ok(value) = HeaderValue::try_from(disposition(paths::name(path))) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
}

/// `inline; filename=…`, with the name quoted, or encoded where quoting is not enough.
fn disposition(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    if name.bytes().all(plain) {
        format!("inline; filename={name}")
    } else if name.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        format!("inline; filename=\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        let encode =
            |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        format!("inline; filename*=utf-8''{}", name.bytes().map(encode).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_quoted_or_encoded() {
        assert_eq!(disposition("a.txt"), "inline; filename=a.txt");
        assert_eq!(disposition("a b\".txt"), "inline; filename=\"a b\\\".txt\"");
        assert_eq!(disposition("é\n"), "inline; filename*=utf-8''%C3%A9%0A");
    }
}
