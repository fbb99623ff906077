//! Plain HTTP/1.1. A [`Client`] keeps one connection and asks one thing at a time; it can be cloned into
//! another that has its own.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

/// How long any one exchange may take.
const BOUND: Duration = Duration::from_secs(180);

/// The body of a request.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// A body that is there already.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// An answer with its body.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The code of an error body.
    #[must_use]
    pub fn error_code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Itself, when the status is this one.
    pub fn expect(self, status: u16) -> Result<Self> {
        if self.status.as_u16() == status {
            Ok(self)
        } else {
            bail!("expected {status}, got {}: {}", self.status, self.text())
        }
    }
}

/// One caller of a stack's API.
#[derive(Debug)]
pub struct Client {
    authority: String,
    host: String,
    key: String,
    connection: Option<SendRequest<Body>>,
}

impl Clone for Client {
    fn clone(&self) -> Self {
        Self {
            authority: self.authority.clone(),
            host: self.host.clone(),
            key: self.key.clone(),
            connection: None,
        }
    }
}

impl Client {
    /// A caller of `http://authority` with this key; an empty key is not sent.
    #[must_use]
    pub fn new(authority: &str, key: &str) -> Self {
        Self {
            authority: authority.to_owned(),
            host: authority.to_owned(),
            key: key.to_owned(),
            connection: None,
        }
    }

    /// The same at the same address, by another host name.
    #[must_use]
    pub fn calling(mut self, host: String) -> Self {
        self.host = host;
        self
    }

    /// Another one, without a key.
    #[must_use]
    pub fn without_key(&self) -> Self {
        Self { key: String::new(), ..self.clone() }
    }

    /// The host name that it sends.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Host and port.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The API key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// A connection on which nothing is under way: an answer that nobody reads to its end keeps the one that there is.
    async fn connection(&mut self) -> Result<SendRequest<Body>> {
        if let Some(mut sender) = self.connection.take()
            && sender.ready().await.is_ok()
        {
            return Ok(sender);
        }
        let stream = TcpStream::connect(&self.authority).await.context("connect to the API")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    /// Sends a request and answers as soon as the headers are there.
    pub async fn open(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<http::Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(path).header("host", &self.host);
        if !self.key.is_empty() {
            request = request.header("x-api-key", &self.key);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut sender = timeout(BOUND, self.connection()).await.context("no connection")??;
        let answer =
            timeout(BOUND, sender.send_request(request.body(body)?)).await.context("no answer")??;
        self.connection = Some(sender);
        Ok(answer)
    }

    /// Sends a request and reads the whole answer.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer> {
        let (parts, body) = self.open(method, path, headers, full(body)).await?.into_parts();
        let body = timeout(BOUND, body.collect()).await.context("the answer did not end")??.to_bytes();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    /// `GET`.
    pub async fn get(&mut self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, &[], Bytes::new()).await
    }

    /// `DELETE`.
    pub async fn delete(&mut self, path: &str) -> Result<Answer> {
        self.send(Method::DELETE, path, &[], Bytes::new()).await
    }

    /// `POST` of JSON.
    pub async fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let headers = [("content-type", "application/json")];
        self.send(Method::POST, path, &headers, serde_json::to_vec(body)?).await
    }

    /// `PATCH` with JSON.
    pub async fn patch(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let headers = [("content-type", "application/json")];
        self.send(Method::PATCH, path, &headers, serde_json::to_vec(body)?).await
    }

    /// `PUT` of bytes.
    pub async fn put(&mut self, path: &str, body: impl Into<Bytes>) -> Result<Answer> {
        self.send(Method::PUT, path, &[("content-type", "application/octet-stream")], body).await
    }
}
