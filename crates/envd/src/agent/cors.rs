//! Letting web pages of any origin talk to the agent.
//!
//! The token, not the origin, says who may do what: a page that has none gets nothing. So every answer may be read by
//! every page, and a browser that asks first (`OPTIONS` with `Access-Control-Request-Method`) is told so without a
//! token, which it cannot send along.

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};

use super::reply::{self, Body};

const METHODS: HeaderValue = HeaderValue::from_static("HEAD, GET, POST, PUT, PATCH, DELETE");
/// What a page may read of an answer beside what it always may.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "Content-Disposition, Content-Encoding, Content-Range, ETag, Location, Cache-Control, X-Content-Type-Options, \
     Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin",
);
/// For how many seconds a browser need not ask again.
const MAXIMUM_AGE: HeaderValue = HeaderValue::from_static("7200");
const PREFLIGHT_VARY: HeaderValue =
    HeaderValue::from_static("Origin, Access-Control-Request-Method, Access-Control-Request-Headers");

/// Whether a browser asks what it may do.
pub(crate) fn is_preflight<B>(request: &Request<B>) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// The answer to it: everything that it asks for.
pub(crate) fn preflight(asked: &HeaderMap) -> Response<Body> {
    let mut response = reply::empty(StatusCode::NO_CONTENT);
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    // They are named one by one, because `*` does not stand for `Authorization`.
    let named = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    headers
        .insert(header::ACCESS_CONTROL_ALLOW_HEADERS, named.unwrap_or_else(|| HeaderValue::from_static("*")));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAXIMUM_AGE);
    headers.insert(header::VARY, PREFLIGHT_VARY);
    response
}

/// Lets every page read this answer.
pub(crate) fn allow(headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
}
