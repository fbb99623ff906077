//! `POST /files/compose`: one file out of several, in their order, without sending them again.
//!
//! The whole is made beside its destination and then takes its place, so that a destination is what it was until it is
//! whole. Then the parts are removed.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{OpenOptionsExt, fchown},
    path::Path,
    sync::Arc,
};

use bytes::BytesMut;
use http::{Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;

use super::{
    Asker, FilesError, next_frame, on_thread,
    reply::{self, Body},
    sink::Written,
};
use crate::{
    agent::{metadata::Metadata, state::Identity},
    tree,
};

/// The longest request.
const MAXIMUM_BODY: usize = 4 << 20;
/// The most parts of one file.
const MAXIMUM_SOURCES: usize = 10_000;

#[derive(Debug, Deserialize)]
struct Request {
    #[serde(default)]
    source_paths: Vec<String>,
    #[serde(default)]
    destination: String,
    username: Option<String>,
}

/// Makes one file of several.
pub(super) async fn serve(
    name: Option<String>,
    identity: Arc<Identity>,
    body: &mut Incoming,
) -> Result<Response<Body>, FilesError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = next_frame(body).await? {
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > MAXIMUM_BODY {
            return Err(FilesError::Request(format!("request body is longer than {MAXIMUM_BODY} bytes")));
        }
        bytes.extend_from_slice(&data);
    }
    let request = parse(&bytes)?;
    let name = request.username.clone().filter(|name| !name.is_empty()).or(name);
    let work = move || compose(&Asker::new(name, identity)?, &request);
    let written = on_thread(work).await??;
    let written = serde_json::to_vec(&written).map_err(|_| FilesError::Interrupted)?;
    Ok(reply::full(StatusCode::OK, "application/json", written))
}

fn parse(bytes: &[u8]) -> Result<Request, FilesError> {
    let request: Request = serde_json::from_slice(bytes)
        .map_err(|error| FilesError::Request(format!("invalid request body: {error}")))?;
    let problem = if request.source_paths.is_empty() {
        "source_paths must not be empty"
    } else if request.source_paths.len() > MAXIMUM_SOURCES {
        "source_paths are too many"
    } else if request.destination.is_empty() {
        "destination is required"
    } else {
        return Ok(request);
    };
    Err(FilesError::Request(problem.to_owned()))
}

fn compose(asker: &Asker, request: &Request) -> Result<Written, FilesError> {
    let destination = asker.resolve(&request.destination)?;
    let mut sources = Vec::with_capacity(request.source_paths.len());
    for given in &request.source_paths {
        let source = asker.resolve(given)?;
        if source == destination {
            let problem = format!("source path {given:?} cannot be the same as destination");
            return Err(FilesError::Request(problem));
        }
        match fs::metadata(&source) {
            Err(error) if tree::is_absent(&error) => return Err(FilesError::NoSource(given.clone())),
            Err(error) => return Err(FilesError::from_io("read", &source, error)),
            Ok(metadata) if !metadata.is_file() => {
                return Err(FilesError::Request(format!("source path is not a regular file: {given}")));
            }
            Ok(_) => sources.push(source),
        }
    }
    let (uid, gid) = (asker.user.uid, asker.user.gid);
    let failed = |error| FilesError::from_io("write", &destination, error);
    let parent = Path::new(&destination).parent().unwrap_or_else(|| Path::new("/"));
    tree::make_directories(parent, uid, gid).map_err(failed)?;
    let (mut whole, mut beside) = beside(&destination).map_err(failed)?;
    fchown(&whole, Some(uid), Some(gid)).map_err(failed)?;
    for source in &sources {
        let read = |error| FilesError::from_io("read", source, error);
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut part = File::options().read(true).custom_flags(flags).open(source).map_err(read)?;
        // In the kernel, where the file system can.
        io::copy(&mut part, &mut whole).map_err(failed)?;
    }
    fs::rename(&beside.path, &destination).map_err(failed)?;
    beside.moved = true;
    for source in &sources {
        // The whole is there; a part that stays is only in the way.
        let _ = fs::remove_file(source);
    }
    Ok(Written::new(destination, Metadata::new()))
}

/// A file that goes unless it took the place of another.
struct Beside {
    path: String,
    moved: bool,
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.moved {
            // There is nobody left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn beside(destination: &str) -> io::Result<(File, Beside)> {
    let mut random = [0_u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let directory = &destination[..destination.rfind('/').map_or(0, |at| at + 1)];
    let path = format!("{directory}.compose-{:016x}", u64::from_ne_bytes(random));
    let file = File::options().write(true).create_new(true).mode(0o666).open(&path)?;
    Ok((file, Beside { path, moved: false }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_request_is_read_without_panic(text in "[{}\\[\\]\":,a-z_]{0,60}|\\PC{0,40}") {
            if let Ok(request) = parse(text.as_bytes()) {
                prop_assert!(!request.source_paths.is_empty() && !request.destination.is_empty());
            }
        }
    }
}
