//! Plain HTTP with an API key.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client as Pool, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    pub(crate) key: String,
    pool: Pool<HttpConnector, Body>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The code of an error; the envelope must be the published one.
    #[track_caller]
    pub(crate) fn code(&self) -> String {
        let json = self.json();
        assert!(json["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
        json["error"]["code"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

impl Client {
    pub(crate) fn new(address: SocketAddr, key: String) -> Self {
        Self { address, key, pool: Pool::builder(TokioExecutor::new()).build_http() }
    }

    pub(crate) fn at(&self, address: SocketAddr) -> Self {
        Self::new(address, self.key.clone())
    }

    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_owned(), ..self.clone() }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> http::request::Builder {
        let builder = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        if self.key.is_empty() { builder } else { builder.header("X-API-Key", &self.key) }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub(crate) async fn try_send(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        let bound = Duration::from_secs(60);
        tokio::time::timeout(bound, self.pool.request(request)).await.expect("an answer within a minute")
    }

    pub(crate) async fn whole(&self, request: Request<Body>) -> Answer {
        let response = self.send(request).await;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.whole(self.request(Method::GET, path).body(full("")).unwrap()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.whole(self.request(Method::DELETE, path).body(full("")).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }

    pub(crate) async fn post_bytes(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        self.whole(request.body(full(body)).unwrap()).await
    }

    /// Runs a shell line and answers its whole output.
    #[track_caller]
    pub(crate) fn shell(&self, id: &str, line: &str) -> impl Future<Output = Answer> {
        let body = serde_json::json!({ "cmd": "/bin/sh", "args": ["-c", line] });
        let path = format!("/v1/sandboxes/{id}/exec");
        async move { self.post(&path, body).await }
    }
}
