//! The edge: from a host name to a port of a sandbox.
//!
//! ```text
//! Host: {port}-{sandbox}.{domain}
//!   │ address: whose request is it?         the API's ──► crate::http
//!   │ API key ─► team; the sandbox is the team's, or there is none
//!   │ headers: those of the connection, the key and foreign X-Forwarded-… end here
//!   ▼
//! core ── is it paused, and asks to be resumed? once, for all who need it
//!   │ guest::ports: a pooled tunnel, or a new one
//!   ▼
//! the program in the guest ──► its answer, piece by piece
//!                          ──► or 101: bytes in both directions (upgrade)
//! ```
//!
//! - [`address`]: host names. [`headers`]: what passes. Both are pure.
//! - [`refusal`]: what is told when there is no answer of a guest.
//! - [`silence`]: how long nothing may be said, and how an answer ends. [`upgrade`]: WebSockets and the like.
//!
//! Nothing is buffered or compressed, and no body has a limit: pieces are passed on as they come, and whoever does not read
//! is not written to. Heads are bounded. When a sandbox is paused or killed, its connections are cut in the middle.
//!
//! A key in a header is the only way in, so a page in a browser cannot call a port by itself: it would need a cookie, and a
//! cookie for the domain would be sent to the programs of every sandbox below it. The port of the guest's agent is
//! none for callers. `X-Forwarded-…` says what this server has seen and nothing that it was told, not even by a front that
//! ends TLS: it knows of none.

mod address;
mod headers;
mod refusal;
mod silence;
mod upgrade;

use std::{net::IpAddr, sync::Arc};

use axum::body::Body;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use wrenn_api::API_KEY_HEADER;
use wrenn_types::{SandboxId, guest::AGENT_PORT};

use crate::{core::Core, guest::Outgoing};
use address::{Address, Addressee, addressee};
pub use address::{ParseProxyDomainError, ProxyDomain};
use refusal::Refusal;
use silence::{Answer, Ending, Silence, Upload};

/// The proxy to the ports of all sandboxes.
#[derive(Debug, Clone)]
pub(crate) struct Edge {
    core: Arc<Core>,
    domain: ProxyDomain,
}

/// A request that is the proxy's.
#[derive(Debug)]
pub(crate) struct Called {
    /// What it names; absent when that is nothing.
    address: Option<Address>,
    /// The host name as the caller wrote it.
    host: HeaderValue,
}

impl Edge {
    pub(crate) fn new(core: Arc<Core>, domain: ProxyDomain) -> Self {
        Self { core, domain }
    }

    /// Whether a request is the proxy's, and whom it calls; the others are the API's.
    pub(crate) fn called<B>(&self, request: &Request<B>) -> Option<Called> {
        // A whole address in the request line is what counts (RFC 9112, 3.2.2).
        let named = request.uri().authority().and_then(|name| HeaderValue::from_str(name.as_str()).ok());
        let hosts: Vec<&HeaderValue> = match &named {
            Some(name) => vec![name],
            None => request.headers().get_all(header::HOST).iter().collect(),
        };
        let calls = |host: &&HeaderValue| match addressee(host.as_bytes(), &self.domain) {
            Addressee::Api => None,
            Addressee::Malformed => Some(Called { address: None, host: (*host).clone() }),
            Addressee::Port(address) => Some(Called { address: Some(address), host: (*host).clone() }),
        };
        let called = hosts.iter().find_map(calls)?;
        // Two names are one too many: which of them counts would be anybody's guess.
        if hosts.len() > 1 { Some(Called { address: None, ..called }) } else { Some(called) }
    }

    /// Answers a request that is the proxy's.
    pub(crate) async fn answer(
        &self,
        called: Called,
        request: Request<Body>,
        peer: IpAddr,
    ) -> Response<Body> {
        let Called { address, host } = called;
        let answered = match &address {
            Some(address) => Box::pin(self.forward(address, host, request, peer)).await,
            None => Err(Refusal::Malformed(self.domain.to_string())),
        };
        answered.unwrap_or_else(|refusal| refusal.response(address.as_ref()))
    }

    async fn forward(
        &self,
        address: &Address,
        host: HeaderValue,
        mut request: Request<Body>,
        peer: IpAddr,
    ) -> Result<Response<Body>, Refusal> {
        if request.method() == Method::CONNECT {
            return Err(Refusal::Tunnel);
        }
        if address.port.get() == AGENT_PORT {
            return Err(Refusal::AgentPort);
        }
        let shown = request.headers().get(API_KEY_HEADER).map(HeaderValue::as_bytes);
        let caller = self.core.authenticate(shown).await?;

        let protocol = headers::upgrade(request.headers());
        let from_caller = protocol.as_ref().map(|_| hyper::upgrade::on(&mut request));
        let silence = Silence::new(self.core.bounds.port_silence);
        let is_head = request.method() == Method::HEAD;
        let (mut parts, body) = request.into_parts();
        headers::for_guest(&mut parts.headers, host, peer, protocol);
        let path = parts.uri.into_parts().path_and_query.ok_or(Refusal::Path)?;
        let body = Body::new(Upload { body, silence: silence.clone() });
        let outgoing = Outgoing::new(parts.method, path, parts.headers, body);
        let response = tokio::select! {
            sent = self.core.send_to_port(&caller, &address.id, address.port, &outgoing) => sent?,
            () = silence.too_long() => return Err(Refusal::Silence),
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.upgrade(&address.id, from_caller, response, silence);
        }
        Ok(self.pass_on(&address.id, response, is_head, silence))
    }

    /// The answer of a guest, for a caller.
    fn pass_on(
        &self,
        id: &SandboxId,
        response: Response<Incoming>,
        is_head: bool,
        silence: Silence,
    ) -> Response<Body> {
        let (mut parts, body) = response.into_parts();
        let ending =
            if is_head || is_framed(&parts) { Ending::Framed } else { Ending::Connection(self.runs(id)) };
        headers::for_caller(&mut parts.headers, None);
        let mut passed = Response::new(Body::new(Answer::new(body, ending, silence)));
        *passed.status_mut() = parts.status;
        *passed.headers_mut() = parts.headers;
        passed
    }

    /// Changes the protocol of both connections to what they agreed on.
    fn upgrade(
        &self,
        id: &SandboxId,
        caller: Option<OnUpgrade>,
        mut response: Response<Incoming>,
        silence: Silence,
    ) -> Result<Response<Body>, Refusal> {
        let protocol = headers::upgrade(response.headers());
        let (Some(caller), Some(protocol)) = (caller, protocol) else { return Err(Refusal::Upgrade) };
        let guest = hyper::upgrade::on(&mut response);
        let (core, runs) = (Arc::clone(&self.core), self.runs(id));
        self.core.tasks().spawn(async move {
            tokio::select! {
                () = core.stopping() => {}
                () = async {
                    match guest.await {
                        Ok(guest) => upgrade::carry(caller, guest, silence, || runs).await,
                        Err(error) => tracing::debug!(
                            error = &error as &dyn std::error::Error, "a guest did not take up an upgrade"
                        ),
                    }
                } => {}
            }
        });
        let (mut parts, _) = response.into_parts();
        headers::for_caller(&mut parts.headers, Some(protocol));
        let mut passed = Response::new(Body::empty());
        *passed.status_mut() = parts.status;
        *passed.headers_mut() = parts.headers;
        Ok(passed)
    }

    /// Whether the sandbox still runs, once somebody wants to know.
    fn runs(&self, id: &SandboxId) -> BoxFuture<'static, bool> {
        let (core, id) = (Arc::clone(&self.core), id.clone());
        Box::pin(async move { core.runs(&id).await })
    }
}

/// Whether the end of an answer's body is known by anything but the end of its connection.
fn is_framed(answer: &http::response::Parts) -> bool {
    let has_none = matches!(answer.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    // Where a coding is named, the last one is `chunked`, or the HTTP client has not taken it for the end of a body.
    let chunked = answer.headers.get_all(header::TRANSFER_ENCODING).iter().next_back();
    let chunked = chunked.is_some_and(|coding| coding.as_bytes().to_ascii_lowercase().ends_with(b"chunked"));
    has_none || chunked || answer.headers.contains_key(header::CONTENT_LENGTH)
}
