//! Files of a sandbox, streamed.

use bytes::Bytes;
use futures::TryStreamExt as _;
use http::{Method, header::CONTENT_LENGTH};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio_util::io::ReaderStream;
use wrenn_api::{FileEntry, files::FileEntryBody, files::PathRequest};
use wrenn_types::SandboxId;

use super::{
    Client, ClientError,
    http::{Call, IDLE_BOUND, escape},
    path_of,
};

/// How much is read at once.
const PIECE: usize = 64 * 1024;

/// The bytes of a file that is being read.
#[derive(Debug)]
pub struct Download {
    /// How many there are, if the server knows.
    pub length: Option<u64>,
    body: Incoming,
}

impl Client {
    /// What is at a path.
    ///
    /// # Errors
    /// There is nothing.
    pub async fn stat(
        &self,
        id: &SandboxId,
        path: &str,
        user: Option<&str>,
    ) -> Result<FileEntry, ClientError> {
        let request = PathRequest { path: path.to_owned(), user: user.map(str::to_owned) };
        let call = Call::new(Method::POST, path_of(id, "/files/stat")).json(&request)?;
        Ok(self.transport.ask::<FileEntryBody>(call).await?.value.entry)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, or is not a file.
    pub async fn download(
        &self,
        id: &SandboxId,
        path: &str,
        user: Option<&str>,
    ) -> Result<Download, ClientError> {
        let response = self.transport.send(Call::new(Method::GET, file_route(id, path, user))).await?;
        let length = response.headers().get(CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Download { length, body: response.into_body() })
    }

    /// Writes a file. With a length exactly that many bytes are sent, and fewer than that are an error.
    ///
    /// # Errors
    /// It cannot be written, or the source cannot be read.
    pub async fn upload(
        &self,
        id: &SandboxId,
        path: &str,
        user: Option<&str>,
        source: impl AsyncRead + Send + 'static,
        length: Option<u64>,
    ) -> Result<(), ClientError> {
        let source = source.take(length.unwrap_or(u64::MAX));
        let frames = ReaderStream::with_capacity(source, PIECE).map_ok(Frame::data);
        let body = BodyExt::boxed_unsync(StreamBody::new(frames));
        let call = Call::new(Method::PUT, file_route(id, path, user)).stream(body, length);
        self.transport.send_stream(call).await.map(drop)
    }
}

impl Download {
    /// The next bytes; none at the end. An end before the announced length is an error.
    ///
    /// # Errors
    /// The connection broke or stands still.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        let call = || "the download of a file".to_owned();
        loop {
            match tokio::time::timeout(IDLE_BOUND, self.body.frame()).await {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_trailers) => {}
                },
                Ok(Some(Err(error))) => {
                    return Err(ClientError::Broken { call: call(), source: error.into() });
                }
                Ok(None) => return Ok(None),
                Err(_) => return Err(ClientError::Timeout { call: call(), bound: IDLE_BOUND }),
            }
        }
    }
}

fn file_route(id: &SandboxId, path: &str, user: Option<&str>) -> String {
    let user = user.map(|user| format!("&user={}", escape(user))).unwrap_or_default();
    path_of(id, &format!("/files?path={}{user}", escape(path)))
}
