//! An agent, and a directory for its files.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses its part of this, and it is part of tests"
)]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
};

use bytes::Bytes;
use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use http::Request;

use crate::harness::{Agent, Answer, PATIENCE, encode};

pub(crate) struct Place {
    pub(crate) agent: Agent,
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { agent: Agent::start(), directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn uri(&self, name: &str) -> String {
        format!("/files?path={}", encode(&self.path(name)))
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Gets a file with these headers.
    pub(crate) async fn get(&self, name: &str, headers: &[(&str, &str)]) -> Answer {
        let request = headers
            .iter()
            .fold(Request::get(self.uri(name)), |request, (name, value)| request.header(*name, *value));
        self.agent.send(request, "").await
    }

    /// Sends a file with these headers.
    pub(crate) async fn put(
        &self,
        name: &str,
        headers: &[(&str, &str)],
        content: impl Into<Bytes>,
    ) -> Answer {
        let request = Request::post(self.uri(name)).header("content-type", "application/octet-stream");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        self.agent.send(request, content).await
    }

    /// A connection to the agent on which nothing waits for ever.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.agent.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

/// Bytes that do not pack.
pub(crate) fn noise(length: usize) -> Bytes {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// Bytes that pack well.
pub(crate) fn prose(length: usize) -> Bytes {
    let lines = (0_u64..).flat_map(|number| format!("line {number} of {length}\n").into_bytes());
    lines.take(length).collect()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut unpacked = Vec::new();
    MultiGzDecoder::new(bytes).read_to_end(&mut unpacked).unwrap();
    unpacked
}

/// The parts of a form with the boundary `XX`: name, file name, content.
pub(crate) fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, file_name, content) in parts {
        let file_name = file_name.map(|name| format!("; filename=\"{name}\"")).unwrap_or_default();
        let head = format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"{file_name}\r\n\r\n");
        body.extend([head.as_bytes(), content, b"\r\n"].concat());
    }
    body.extend(b"--XX--\r\n");
    body
}

pub(crate) const FORM: &str = "multipart/form-data; boundary=XX";
