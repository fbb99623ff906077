//! A body to the file, or the files, that it is meant for.
//!
//! ```text
//!            gathered, 256 KiB at a time          one job at a time, on a thread that may block
//!   body ──► while the job before runs   ──────►  (gunzip) ──► (form) ──► file
//!     │
//!     └────► the rest of a body that is a file in memory, as it comes ──► file
//! ```
//!
//! A slow client holds no thread: a job runs only on what has come. A body that is one batch is one job, and what
//! cannot be written is noticed one batch later. What unpacks to far more than it was fills the disk at worst.
//!
//! Where the first job has found that writing is nothing but copying, there are no more jobs: what comes is written
//! out of the one buffer that it was received into, before that is used again.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body::Body as _;
use hyper::body::Incoming;

use super::{
    Asker, FilesError,
    encoding::{self, Encoding},
    form::{Form, Head, Parts},
    gunzip::Gunzip,
    next_frame, on_thread,
    reply::{self, Body},
    sink::{Sink, Written},
};
use crate::agent::{
    metadata::{self, Metadata},
    state::Identity,
    threads::Aside,
};

/// How many files one body may hold, and how long their paths may be in all: they are kept until the answer.
const MAXIMUM_FILES: usize = 100_000;
const MAXIMUM_NAMES: usize = 8 << 20;
/// How much of a body one job gets, about: the last piece of it is taken whole.
const BATCH: usize = 256 * 1024;

/// Writes a body to the file, or files, that it is meant for.
pub(crate) async fn serve(
    path: Option<String>,
    name: Option<String>,
    identity: Arc<Identity>,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Response<Body>, FilesError> {
    let encoding = encoding::of_request(headers).map_err(FilesError::Encoding)?;
    let metadata = metadata::from_headers(headers).map_err(FilesError::Metadata)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let path = path.filter(|path| !path.is_empty());
    let form = match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "application/octet-stream" if path.is_none() => {
            return Err(FilesError::Request(
                "path query parameter is required for raw body upload".to_owned(),
            ));
        }
        "application/octet-stream" => None,
        form if form.starts_with("multipart/") => Some(Form::new(kind)?),
        _ => return Err(FilesError::ContentType(kind.to_owned())),
    };
    let expected =
        (encoding == Encoding::Identity && form.is_none()).then(|| body.size_hint().exact()).flatten();
    let start = move || {
        let files = Files {
            asker: Asker::new(name, identity)?,
            path,
            expected,
            metadata,
            seen: HashSet::new(),
            names: 0,
            current: None,
            written: Vec::new(),
        };
        let gunzip = (encoding == Encoding::Gzip).then(Gunzip::new);
        Ok(Receiver { gunzip, target: Target { form, files } })
    };
    let attempted = body.size_hint().exact();
    let written = receive(start, body).await.map_err(|error| match error {
        FilesError::NoSpace(None) => FilesError::NoSpace(attempted),
        other => other,
    })?;
    let written = serde_json::to_vec(&written).map_err(|_| FilesError::Interrupted)?;
    Ok(reply::full(StatusCode::OK, "application/json", written))
}

/// Moves a body to its receiver, which is made on a thread that may block and stays on such threads.
async fn receive(
    start: impl FnOnce() -> Result<Receiver, FilesError> + Send + 'static,
    body: &mut Incoming,
) -> Result<Vec<Written>, FilesError> {
    let (mut batch, mut more) = gather(body).await?;
    if !more {
        let work = move || start()?.take(batch)?.finish();
        return on_thread(work).await?;
    }
    let mut job = on_thread(move || start()?.take(batch));
    loop {
        (batch, more) = gather(body).await?;
        let receiver = job.await??;
        if !more {
            let work = move || receiver.take(batch)?.finish();
            return on_thread(work).await?;
        }
        if receiver.only_copies() {
            return copy(receiver, batch, body).await;
        }
        job = on_thread(move || receiver.take(batch));
    }
}

/// Writes what has come of a body, and what is still to come, to a file in memory.
async fn copy(
    receiver: Receiver,
    batch: Vec<Bytes>,
    body: &mut Incoming,
) -> Result<Vec<Written>, FilesError> {
    let mut receiver = Aside::new(receiver);
    let copying = async {
        for piece in batch {
            receiver.get_mut()?.push(&piece)?;
        }
        while let Some(frame) = next_frame(body).await? {
            if let Ok(data) = frame.into_data() {
                receiver.get_mut()?.push(&data)?;
            }
        }
        Ok(())
    };
    let copied: Result<(), FilesError> = copying.await;
    let receiver = receiver.into_inner()?;
    // Half a file is gone before anybody is told of it.
    let work = move || copied.and_then(|()| receiver.finish());
    on_thread(work).await?
}

/// Some pieces of a body, and whether there are more.
async fn gather(body: &mut Incoming) -> Result<(Vec<Bytes>, bool), FilesError> {
    let (mut batch, mut length) = (Vec::new(), 0);
    while length < BATCH {
        let Some(frame) = next_frame(body).await? else { return Ok((batch, false)) };
        if let Ok(data) = frame.into_data() {
            length += data.len();
            batch.push(data);
        }
    }
    Ok((batch, true))
}

/// What a body is moved to: its target, and what unpacks it on the way.
#[derive(Debug)]
struct Receiver {
    gunzip: Option<Gunzip>,
    target: Target,
}

impl Receiver {
    fn take(mut self, batch: Vec<Bytes>) -> Result<Self, FilesError> {
        for piece in batch {
            self.push(&piece)?;
        }
        Ok(self)
    }

    fn push(&mut self, piece: &[u8]) -> Result<(), FilesError> {
        match &mut self.gunzip {
            None => self.target.take(piece),
            Some(gunzip) => gunzip.push(piece, |unpacked| self.target.take(unpacked)),
        }
    }

    /// Whether all that is still to come is copied into one file, and nothing else happens to it.
    fn only_copies(&self) -> bool {
        let target = &self.target;
        self.gunzip.is_none()
            && target.form.is_none()
            && target.files.current.as_ref().is_some_and(Sink::is_in_memory)
    }

    fn finish(self) -> Result<Vec<Written>, FilesError> {
        if let Some(gunzip) = &self.gunzip {
            gunzip.finish()?;
        }
        self.target.finish()
    }
}

/// The one file, or the form and its files.
#[derive(Debug)]
struct Target {
    form: Option<Form>,
    files: Files,
}

impl Target {
    fn take(&mut self, bytes: &[u8]) -> Result<(), FilesError> {
        match &mut self.form {
            Some(form) => form.push(bytes, &mut self.files),
            None => {
                self.files.begin_only()?;
                self.files.content(bytes)
            }
        }
    }

    fn finish(mut self) -> Result<Vec<Written>, FilesError> {
        match &self.form {
            Some(form) if !form.is_complete() => return Err(FilesError::BodyEnded),
            Some(_) => {}
            None => {
                self.files.begin_only()?;
                self.files.end()?;
            }
        }
        if self.files.written.is_empty() {
            return Err(FilesError::Request("there is no part named 'file'".to_owned()));
        }
        Ok(self.files.written)
    }
}

/// The files of one body.
#[derive(Debug)]
struct Files {
    asker: Asker,
    /// The path in the query, which names the file whatever a part says.
    path: Option<String>,
    /// How long the body is, where the body is the file.
    expected: Option<u64>,
    metadata: Metadata,
    seen: HashSet<String>,
    /// The length of all paths.
    names: usize,
    /// The one that is being written; none while something comes that is no file.
    current: Option<Sink>,
    written: Vec<Written>,
}

impl Files {
    /// Begins the file that the body is, unless it has begun.
    fn begin_only(&mut self) -> Result<(), FilesError> {
        match (&self.current, &self.path) {
            (None, Some(path)) => self.open(&path.clone()),
            _ => Ok(()),
        }
    }

    fn open(&mut self, path: &str) -> Result<(), FilesError> {
        let path = self.asker.resolve(path)?;
        self.names += path.len();
        if self.seen.len() >= MAXIMUM_FILES || self.names > MAXIMUM_NAMES {
            return Err(FilesError::Request(format!("more than {MAXIMUM_FILES} files")));
        }
        if !self.seen.insert(path.clone()) {
            return Err(FilesError::Twice(path));
        }
        self.current = Some(Sink::create(path, &self.asker.user, self.expected)?);
        Ok(())
    }
}

impl Parts for Files {
    type Error = FilesError;

    fn begin(&mut self, head: Head) -> Result<(), FilesError> {
        if head.name.as_deref() != Some("file") {
            return Ok(());
        }
        let path = self.path.clone().or(head.file_name).filter(|path| !path.is_empty());
        let path =
            path.ok_or_else(|| FilesError::Request("a file has neither a path nor a name".to_owned()))?;
        self.open(&path)
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), FilesError> {
        self.current.as_mut().map_or(Ok(()), |sink| sink.write(bytes))
    }

    fn end(&mut self) -> Result<(), FilesError> {
        if let Some(sink) = self.current.take() {
            self.written.push(sink.finish(&self.metadata)?);
        }
        Ok(())
    }
}
