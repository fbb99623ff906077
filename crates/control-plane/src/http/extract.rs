//! What handlers take from a request. Everything that can be wrong with it is an [`ApiError`].

use std::{error::Error as _, sync::Arc, time::Duration};

use axum::{
    body::{Body, to_bytes},
    extract::{FromRequest, FromRequestParts, RawPathParams, Request},
};
use http::request::Parts;
use http_body_util::LengthLimitError;
use serde::de::DeserializeOwned;
use wrenn_api::API_KEY_HEADER;
use wrenn_types::{SandboxId, TemplateName};

use super::error::ApiError;
use crate::core::{Caller, Core, CoreError};

/// The largest JSON body.
pub(crate) const JSON_LIMIT: usize = 1 << 20;
/// How long a JSON body may take to arrive.
const JSON_BOUND: Duration = Duration::from_secs(30);

impl FromRequestParts<Arc<Core>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, ApiError> {
        let shown = parts.headers.get(API_KEY_HEADER).map(http::HeaderValue::as_bytes);
        Ok(core.authenticate(shown).await?)
    }
}

/// The sandbox that the path names. What is no id at all names no sandbox, so it is not found.
#[derive(Debug)]
pub(crate) struct Id(pub(crate) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_part(parts, state, "id").await?;
        match text.parse() {
            Ok(id) => Ok(Self(id)),
            Err(form) => {
                let shown: String = text.chars().take(40).collect();
                Err(CoreError::NoSuchSandbox(format!("{shown:?} ({form})")).into())
            }
        }
    }
}

/// The template or snapshot that the path names. What is no name at all names none.
#[derive(Debug)]
pub(crate) struct Name(pub(crate) TemplateName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_part(parts, state, "name").await?;
        match text.parse() {
            Ok(name) => Ok(Self(name)),
            Err(form) => {
                let shown: String = text.chars().take(40).collect();
                Err(CoreError::NoSuchSnapshot(format!("{shown:?} ({form})")).into())
            }
        }
    }
}

/// The process that the path names, by its id or its tag.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) crate::guest::Selector);

impl<S: Send + Sync> FromRequestParts<S> for Process {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_part(parts, state, "selector").await?;
        if text.is_empty() || text.len() > 128 || text.contains('\0') {
            return Err(CoreError::Invalid("a process is named by its id or its tag".to_owned()).into());
        }
        Ok(Self(crate::guest::Selector::parse(&text)))
    }
}

async fn path_part<S: Send + Sync>(parts: &mut Parts, state: &S, name: &str) -> Result<String, ApiError> {
    let params = RawPathParams::from_request_parts(parts, state).await.map_err(|_| ApiError::Route)?;
    let found = params.iter().find(|(param, _)| *param == name);
    Ok(found.map(|(_, text)| text.to_owned()).unwrap_or_default())
}

/// A JSON body. Its content type is not looked at: what is JSON is taken as JSON.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<Core>> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &Arc<Core>) -> Result<Self, ApiError> {
        let bytes = read(request.into_body(), JSON_LIMIT, JSON_BOUND).await?;
        Ok(Self(parse_json(&bytes)?))
    }
}

/// A JSON body that may be left out, which is the same as an object without fields.
#[derive(Debug)]
pub(crate) struct OptionalJson<T>(pub(crate) T);

impl<T: DeserializeOwned + Default> FromRequest<Arc<Core>> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &Arc<Core>) -> Result<Self, ApiError> {
        let bytes = read(request.into_body(), JSON_LIMIT, JSON_BOUND).await?;
        Ok(Self(if bytes.trim_ascii().is_empty() { T::default() } else { parse_json(&bytes)? }))
    }
}

/// A value from JSON text; the error names the field.
pub(crate) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CoreError> {
    // A struct can be read from an array of its fields too, which nobody means to send.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let message = "the body is not the JSON that this route takes: it is an array, not an object";
        return Err(CoreError::Invalid(message.to_owned()));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        CoreError::Invalid(format!(
            "the body is not the JSON that this route takes: {place}{}",
            error.inner()
        ))
    })?;
    json.end().map_err(|error| CoreError::Invalid(format!("the body goes on after its JSON: {error}")))?;
    Ok(value)
}

async fn read(body: Body, limit: usize, bound: Duration) -> Result<bytes::Bytes, ApiError> {
    match tokio::time::timeout(bound, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if error.source().is_some_and(|source| source.is::<LengthLimitError>()) => {
            Err(ApiError::TooLarge { limit })
        }
        Ok(Err(error)) => Err(CoreError::Invalid(format!("the body could not be read: {error}")).into()),
        Err(_) => Err(ApiError::SlowBody),
    }
}

/// The pairs of the query, in their order.
#[derive(Debug)]
pub(crate) struct Pairs(pub(crate) Vec<(String, String)>);

impl Pairs {
    /// The last value of a name.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        let mut found = None;
        self.0.retain_mut(|(key, value)| {
            let same = key == name;
            if same {
                found = Some(std::mem::take(value));
            }
            !same
        });
        found
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Pairs {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query: axum::extract::Query<Vec<(String, String)>> =
            axum::extract::Query::try_from_uri(&parts.uri)
                .map_err(|error| CoreError::Invalid(format!("the query cannot be read: {error}")))?;
        Ok(Self(query.0))
    }
}
