//! Files of a guest: their contents, as streams, and the entries of its directories.

use std::fmt::Write as _;

use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientBody, full_body};
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use wrenn_api::{EntryType, FileEntry};
use wrenn_proto::filesystem as proto;

use super::{Guest, GuestError, Transport, refusal_of};

/// The largest error body that is read.
const ERROR_BODY: usize = 16 * 1024;
/// The largest listing of a directory.
const LISTING: usize = 64 << 20;

/// A file on its way out of a guest.
#[derive(Debug)]
pub(crate) struct Download {
    pub(crate) length: Option<u64>,
    pub(crate) body: Incoming,
}

impl Guest {
    /// Opens a file for reading. Whether it can be read is known before the first byte is passed on.
    pub(crate) async fn download(&self, path: &str, user: Option<&str>) -> Result<Download, GuestError> {
        let response =
            self.files(Method::GET, path, user, |request| request.body(full_body(Bytes::new()))).await?;
        let length = response.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        Ok(Download { length, body: response.into_body() })
    }

    /// Writes a file. The directories above it are made.
    pub(crate) async fn upload(
        &self,
        path: &str,
        user: Option<&str>,
        body: ClientBody,
    ) -> Result<(), GuestError> {
        let response = self
            .files(Method::POST, path, user, |request| {
                request.header(header::CONTENT_TYPE, "application/octet-stream").body(body)
            })
            .await?;
        // The answer names the file, which the caller knows; reading it frees the connection.
        let rest = Limited::new(response.into_body(), ERROR_BODY).collect().await;
        rest.map(drop).map_err(GuestError::Lost)
    }

    async fn files(
        &self,
        method: Method,
        path: &str,
        user: Option<&str>,
        finish: impl FnOnce(http::request::Builder) -> http::Result<Request<ClientBody>>,
    ) -> Result<Response<Incoming>, GuestError> {
        let mut address = format!("{}/files?path={}", self.authority(), encoded(path));
        if let Some(user) = user {
            let _ = write!(address, "&username={}", encoded(user));
        }
        let mut builder = Request::builder().method(method).uri(address);
        if let Some(headers) = builder.headers_mut() {
            // The user is in the query here.
            headers.extend(self.headers(None)?);
        }
        let request = finish(builder).map_err(|error| GuestError::Lost(Box::new(error)))?;
        let response = self.http.request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body =
            tokio::time::timeout(self.question, Limited::new(response.into_body(), ERROR_BODY).collect())
                .await;
        let message = body
            .ok()
            .and_then(Result::ok)
            .and_then(|body| serde_json::from_slice::<Sentence>(&body.to_bytes()).ok())
            .map_or_else(|| format!("the guest answered {status}"), |sentence| sentence.message);
        Err(GuestError::Refused { refusal: refusal_of(status), message })
    }

    fn filesystem(&self, user: Option<&str>) -> Result<proto::FilesystemClient<Transport>, GuestError> {
        let (transport, config) = self.transport(user)?;
        Ok(proto::FilesystemClient::new(transport, config))
    }

    /// What is at a path.
    pub(crate) async fn stat(&self, path: &str, user: Option<&str>) -> Result<FileEntry, GuestError> {
        let request = proto::StatRequest { path: path.to_owned(), ..Default::default() };
        let answer = self.filesystem(user)?.stat_with_options(request, self.question()).await?;
        entry(answer.into_owned().entry.into_option())
    }

    /// What is in a directory, `depth` levels down.
    pub(crate) async fn list_dir(
        &self,
        path: &str,
        depth: u32,
        user: Option<&str>,
    ) -> Result<Vec<FileEntry>, GuestError> {
        let request = proto::ListDirRequest { path: path.to_owned(), depth, ..Default::default() };
        let options: CallOptions = self.question().with_max_message_size(LISTING);
        let answer = self.filesystem(user)?.list_dir_with_options(request, options).await?;
        answer.into_owned().entries.into_iter().map(|found| entry(Some(found))).collect()
    }

    /// A new directory, and those above it.
    pub(crate) async fn make_dir(&self, path: &str, user: Option<&str>) -> Result<FileEntry, GuestError> {
        let request = proto::MakeDirRequest { path: path.to_owned(), ..Default::default() };
        let answer = self.filesystem(user)?.make_dir_with_options(request, self.question()).await?;
        entry(answer.into_owned().entry.into_option())
    }

    /// A new name.
    pub(crate) async fn move_entry(
        &self,
        source: &str,
        destination: &str,
        user: Option<&str>,
    ) -> Result<FileEntry, GuestError> {
        let request = proto::MoveRequest {
            source: source.to_owned(),
            destination: destination.to_owned(),
            ..Default::default()
        };
        let answer = self.filesystem(user)?.r#move_with_options(request, self.question()).await?;
        entry(answer.into_owned().entry.into_option())
    }

    /// Removes a file, or a directory and all in it.
    pub(crate) async fn remove(&self, path: &str, user: Option<&str>) -> Result<(), GuestError> {
        let request = proto::RemoveRequest { path: path.to_owned(), ..Default::default() };
        self.filesystem(user)?.remove_with_options(request, self.question()).await?;
        Ok(())
    }
}

#[derive(Deserialize)]
struct Sentence {
    message: String,
}

fn entry(info: Option<proto::EntryInfo>) -> Result<FileEntry, GuestError> {
    let info = info.ok_or_else(|| GuestError::Lost("the guest described no entry".into()))?;
    let kind = match info.r#type.as_known() {
        // A link is what its target is in this contract, and is known by having a target.
        _ if info.symlink_target.is_some() => EntryType::Symlink,
        Some(proto::FileType::FILE_TYPE_DIRECTORY) => EntryType::Directory,
        Some(proto::FileType::FILE_TYPE_SYMLINK) => EntryType::Symlink,
        _ => EntryType::File,
    };
    Ok(FileEntry {
        name: info.name,
        path: info.path,
        kind,
        size: info.size,
        mode: info.mode,
        permissions: info.permissions,
        owner: info.owner,
        group: info.group,
        modified_at: info.modified_time.as_option().map_or(0, |time| time.seconds),
        symlink_target: info.symlink_target,
    })
}

/// A value of a query, percent-encoded.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_the_query() {
        assert_eq!(encoded("/a b/ä&=+%?#"), "/a%20b/%C3%A4%26%3D%2B%25%3F%23");
    }
}
