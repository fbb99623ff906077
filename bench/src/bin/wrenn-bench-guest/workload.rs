//! What an agent is made to do. Every function does one thing once and says how long it took.

use std::{
    fmt::Write as _,
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    framing::{Frames, output_length},
    wire::Connection,
};

/// Files are this, again and again.
const BLOCK: usize = 1 << 20;
/// The content of one small file.
const SMALL: &[u8] = b"A small file, as there are many of them in a directory of sources or of packages.\n";
const BOUNDARY: &str = "a-line-that-is-in-no-file";

/// What files hold.
#[derive(Debug)]
pub(crate) struct Content {
    block: Vec<u8>,
}

impl Content {
    /// Hexadecimal digits of hashes: text, of which a compressor can make half, and no less.
    #[must_use]
    pub(crate) fn new() -> Self {
        let mut block = String::with_capacity(BLOCK);
        let mut counter = 0_u64;
        while block.len() < BLOCK {
            for byte in Sha256::digest(counter.to_le_bytes()) {
                let _ = write!(block, "{byte:02x}");
            }
            counter += 1;
        }
        block.truncate(BLOCK);
        Self { block: block.into_bytes() }
    }

    /// The pieces of a file of so many bytes.
    pub(crate) fn pieces(&self, length: u64) -> impl Iterator<Item = &[u8]> {
        let mut left = length;
        std::iter::from_fn(move || {
            let piece = &self.block[..usize::try_from(left).unwrap_or(BLOCK).min(BLOCK)];
            left -= piece.len() as u64;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Whether these bytes are in the file at an offset.
    #[must_use]
    pub(crate) fn holds(&self, offset: u64, mut bytes: &[u8]) -> bool {
        let mut at = usize::try_from(offset % BLOCK as u64).unwrap_or_default();
        while !bytes.is_empty() {
            let length = bytes.len().min(BLOCK - at);
            if bytes[..length] != self.block[at..at + length] {
                return false;
            }
            bytes = &bytes[length..];
            at = 0;
        }
        true
    }
}

/// A program to run, as a request that is ready to be sent.
#[derive(Debug)]
pub(crate) struct Program {
    request: Vec<u8>,
}

impl Program {
    /// Makes the request.
    #[must_use]
    pub(crate) fn new(command: &str, arguments: &[&str]) -> Self {
        let message = json!({ "process": { "cmd": command, "args": arguments }, "stdin": false });
        let message = message.to_string();
        let mut body = vec![0];
        body.extend((u32::try_from(message.len()).unwrap_or_default()).to_be_bytes());
        body.extend(message.as_bytes());
        let headers = "Connect-Protocol-Version: 1\r\n";
        Self {
            request: request("POST", "/process.Process/Start", "application/connect+json", headers, &body),
        }
    }

    /// Runs it, to the end of the answer, and says how long that took and how much came out.
    ///
    /// # Errors
    /// It did not end well, or the stream did not.
    pub(crate) fn run(&self, connection: &mut Connection) -> Result<(Duration, u64)> {
        let begin = Instant::now();
        connection.send(&self.request)?;
        let (mut frames, mut output, mut ended, mut over) = (Frames::default(), 0, false, false);
        connection.answer(200, |bytes| {
            frames.take(bytes, |message, last| {
                over |= last;
                if let Some(length) = output_length(message) {
                    output += length;
                } else {
                    let message: Value = serde_json::from_slice(message).context("a message is JSON")?;
                    ensure!(message["error"].is_null(), "the stream failed: {message}");
                    let end = &message["event"]["end"];
                    ended |= end["exited"] == true && end["error"].is_null();
                }
                Ok(())
            })
        })?;
        let took = begin.elapsed();
        ensure!(over && frames.is_empty(), "the stream has no end");
        ensure!(ended, "the program did not end well");
        Ok((took, output))
    }
}

/// Runs a program that writes so many bytes to its standard output, and counts them.
///
/// # Errors
/// As for [`Program::run`], and where fewer or more came.
pub(crate) fn output(connection: &mut Connection, bytes: u64) -> Result<Duration> {
    let program = Program::new("/usr/bin/head", &["-c", &bytes.to_string(), "/dev/zero"]);
    let (took, came) = program.run(connection)?;
    ensure!(came == bytes, "{came} of {bytes} bytes of output came");
    Ok(took)
}

/// Writes a file.
///
/// # Errors
/// Anything but a 200.
pub(crate) fn upload(
    connection: &mut Connection,
    path: &str,
    content: &Content,
    bytes: u64,
) -> Result<Duration> {
    let head = head("POST", &format!("/files?path={path}"), "application/octet-stream", "", bytes);
    let begin = Instant::now();
    connection.send(&head)?;
    for piece in content.pieces(bytes) {
        connection.send(piece)?;
    }
    connection.answer(200, |_| Ok(()))?;
    Ok(begin.elapsed())
}

/// How a file is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is; what comes is compared with what it should be.
    Identity,
    /// Compressed; that it is, is looked at, and nothing else.
    Gzip,
}

/// Reads a file.
///
/// # Errors
/// Anything but a 200 with that file.
pub(crate) fn download(
    connection: &mut Connection,
    path: &str,
    content: &Content,
    bytes: u64,
    encoding: Encoding,
) -> Result<Duration> {
    let accepted = match encoding {
        Encoding::Identity => "Accept-Encoding: identity\r\n",
        Encoding::Gzip => "Accept-Encoding: gzip\r\n",
    };
    let request = request("GET", &format!("/files?path={path}"), "", accepted, b"");
    let begin = Instant::now();
    connection.send(&request)?;
    let mut came = 0;
    let head = connection.answer(200, |piece| {
        ensure!(encoding == Encoding::Gzip || content.holds(came, piece), "other bytes came back at {came}");
        came += piece.len() as u64;
        Ok(())
    })?;
    let took = begin.elapsed();
    match encoding {
        Encoding::Identity => ensure!(!head.compressed && came == bytes, "{came} of {bytes} bytes came"),
        Encoding::Gzip => ensure!(head.compressed && came > 0, "it came as it is"),
    }
    Ok(took)
}

/// Writes small files, one after the other, several in one request where `together` is more than one.
///
/// # Errors
/// Anything but a 200.
pub(crate) fn small_files(
    connection: &mut Connection,
    directory: &str,
    numbers: Range<usize>,
    together: usize,
) -> Result<Duration> {
    let numbers: Vec<usize> = numbers.collect();
    let requests: Vec<_> = numbers.chunks(together).map(|batch| small_request(directory, batch)).collect();
    let begin = Instant::now();
    for request in requests {
        connection.send(&request)?;
        connection.answer(200, |_| Ok(()))?;
    }
    Ok(begin.elapsed())
}

fn small_request(directory: &str, numbers: &[usize]) -> Vec<u8> {
    if let [number] = numbers {
        let path = format!("/files?path={directory}/file-{number}");
        return request("POST", &path, "application/octet-stream", "", SMALL);
    }
    let mut body = Vec::new();
    for number in numbers {
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; \
             filename=\"{directory}/file-{number}\"\r\nContent-Type: application/octet-stream\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(SMALL);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    request("POST", "/files", &format!("multipart/form-data; boundary={BOUNDARY}"), "", &body)
}

/// Lists a directory that holds so many files.
///
/// # Errors
/// Anything but a 200 with as many entries.
pub(crate) fn list(connection: &mut Connection, directory: &str, files: usize) -> Result<Duration> {
    let body = json!({ "path": directory, "depth": 1 }).to_string();
    let request = request("POST", "/filesystem.Filesystem/ListDir", "application/json", "", body.as_bytes());
    let begin = Instant::now();
    connection.send(&request)?;
    let mut answer = Vec::new();
    connection.answer(200, |piece| {
        answer.extend_from_slice(piece);
        Ok(())
    })?;
    let took = begin.elapsed();
    let answer: Value = serde_json::from_slice(&answer).context("a list is JSON")?;
    let entries = answer["entries"].as_array().map_or(0, Vec::len);
    ensure!(entries == files, "{entries} of {files} files are listed");
    Ok(took)
}

fn request(method: &str, path: &str, kind: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let mut request = head(method, path, kind, headers, body.len() as u64);
    request.extend_from_slice(body);
    request
}

fn head(method: &str, path: &str, kind: &str, headers: &str, length: u64) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: guest\r\n{headers}");
    if !kind.is_empty() {
        let _ = write!(head, "Content-Type: {kind}\r\nContent-Length: {length}\r\n");
    }
    head.push_str("\r\n");
    head.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_block_again_and_again() {
        let content = Content::new();
        let bytes = content.pieces(BLOCK as u64 * 2 + 5).collect::<Vec<_>>().concat();
        assert_eq!(bytes.len(), BLOCK * 2 + 5);
        assert!(content.holds(0, &bytes));
        assert!(content.holds(BLOCK as u64 - 1, &bytes[BLOCK - 1..BLOCK + 3]));
        assert!(!content.holds(1, &bytes[..64]));
        assert_eq!(content.pieces(0).count(), 0);
    }

    #[test]
    fn several_small_files_are_parts_of_one_request() {
        let one = String::from_utf8(small_request("/d", &[7])).unwrap();
        assert!(one.starts_with("POST /files?path=/d/file-7 HTTP/1.1\r\n"), "{one}");
        let two = String::from_utf8(small_request("/d", &[7, 8])).unwrap();
        assert_eq!(two.matches("filename=\"/d/file-").count(), 2);
        assert!(two.ends_with(&format!("--{BOUNDARY}--\r\n")));
        let (head, body) = two.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
    }
}
