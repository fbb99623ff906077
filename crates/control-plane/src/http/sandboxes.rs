//! Sandboxes: create, list, get, delete, ping.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderName, HeaderValue, StatusCode};
use jiff::Timestamp;
use wrenn_api::{CreateSandbox, NEXT_TOKEN_HEADER, Sandbox};
use wrenn_types::SandboxState;

use super::{
    error::{ApiError, Errors},
    extract::{Id, JsonBody, Pairs},
};
use crate::{
    core::{Caller, Core, CoreError, Creation, Deletion, Listed, spec},
    host::Phase,
    store::Cursor,
};

/// The most sandboxes of one page.
const PAGE: u32 = 1000;

type Shared = State<Arc<Core>>;

/// Creates a sandbox.
///
/// Answers when the sandbox can run commands. If that takes more than 25 seconds, as the first create of a
/// new shape may, the answer is 202 with the status `starting`.
#[utoipa::path(
    post, path = "", tag = "sandboxes", operation_id = "create_sandbox",
    request_body = CreateSandbox,
    responses(
        (status = 201, description = "It runs. The header Server-Timing says how long each step took.",
            body = Sandbox, headers(("server-timing" = String, description = "Steps and their milliseconds"))),
        (status = 202, description = "It is still starting.", body = Sandbox),
        Errors
    )
)]
pub(super) async fn create(
    State(core): Shared,
    caller: Caller,
    JsonBody(asked): JsonBody<CreateSandbox>,
) -> Result<Response, ApiError> {
    let spec = spec::Spec::try_from(asked)?;
    let begin = std::time::Instant::now();
    match core.create(&caller, spec).await? {
        Creation::Running { sandbox, phases, database } => {
            let timing = server_timing(&phases, database, begin.elapsed());
            let headers = [(HeaderName::from_static("server-timing"), timing)];
            Ok((StatusCode::CREATED, headers, Json(sandbox)).into_response())
        }
        Creation::Starting { sandbox } => Ok((StatusCode::ACCEPTED, Json(sandbox)).into_response()),
    }
}

fn server_timing(phases: &[Phase], database: Duration, total: Duration) -> HeaderValue {
    let named = |name: &str, duration| Phase { name: name.to_owned(), duration };
    let mut phases = phases.to_vec();
    phases.extend([named("database", database), named("total", total)]);
    phase_timing(&phases)
}

/// The value of the header Server-Timing.
pub(super) fn phase_timing(phases: &[Phase]) -> HeaderValue {
    let mut text = String::new();
    for phase in phases {
        // A name on this header is a token: letters, digits and a few signs.
        let name: String =
            phase.name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect();
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{name};dur={:.3}", phase.duration.as_secs_f64() * 1e3);
    }
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("total"))
}

/// Lists sandboxes, newest first.
///
/// Without `limit` all that match are in the answer. With it, the header `X-Next-Token` holds the cursor of
/// the next page, if there is one.
#[utoipa::path(
    get, path = "", tag = "sandboxes", operation_id = "list_sandboxes",
    params(
        ("status" = Option<String>, Query,
            description = "Only these states: one word, or several with commas between. \
                When absent, all but `stopped` and `error`."),
        ("metadata.{name}" = Option<String>, Query,
            description = "Only sandboxes whose metadata has this value for `name`; may be repeated."),
        ("limit" = Option<u32>, Query, description = "At most so many, 1 to 1000."),
        ("cursor" = Option<String>, Query, description = "The `X-Next-Token` of the page before.")
    ),
    responses(
        (status = 200, description = "The sandboxes", body = Vec<Sandbox>,
            headers(("x-next-token" = String, description = "The cursor of the next page"))),
        Errors
    )
)]
pub(super) async fn list(State(core): Shared, caller: Caller, pairs: Pairs) -> Result<Response, ApiError> {
    let page = core.list(&caller, listed(pairs)?).await?;
    let mut response = Json(page.sandboxes).into_response();
    if let Some(next) = page.next {
        let token = HeaderValue::try_from(write_cursor(&next))
            .map_err(|error| CoreError::Invalid(format!("cursor: {error}")))?;
        response.headers_mut().insert(HeaderName::from_static(NEXT_TOKEN_HEADER), token);
    }
    Ok(response)
}

fn listed(mut pairs: Pairs) -> Result<Listed, CoreError> {
    let limit = pairs.take("limit").map(|text| {
        let limit = text.parse().ok().filter(|limit| (1..=PAGE).contains(limit));
        limit.ok_or_else(|| CoreError::Invalid(format!("limit must be between 1 and {PAGE}")))
    });
    let after = pairs.take("cursor").or_else(|| pairs.take("next_token")).map(|token| {
        read_cursor(&token).ok_or_else(|| CoreError::Invalid("cursor is not one of ours".to_owned()))
    });
    let mut listed = Listed { limit: limit.transpose()?, after: after.transpose()?, ..Listed::default() };
    for (name, value) in pairs.0 {
        if name == "status" {
            for word in value.split(',').filter(|word| !word.is_empty()) {
                let state = SandboxState::from_word(word).ok_or_else(|| {
                    CoreError::Invalid(format!("status: {word:?} is no state of a sandbox"))
                })?;
                listed.states.push(state);
            }
        } else if let Some(key) = name.strip_prefix("metadata.") {
            listed.metadata.insert(key.to_owned(), value);
        }
    }
    if listed.metadata.values().any(|value| value.contains('\0'))
        || listed.metadata.keys().any(|key| key.contains('\0'))
    {
        return Err(CoreError::Invalid("metadata must not contain NUL".to_owned()));
    }
    Ok(listed)
}

fn write_cursor(cursor: &Cursor) -> String {
    URL_SAFE_NO_PAD.encode(format!("{} {}", cursor.created_at.as_microsecond(), cursor.id))
}

fn read_cursor(token: &str) -> Option<Cursor> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (time, id) = text.split_once(' ')?;
    let created_at = Timestamp::from_microsecond(time.parse().ok()?).ok()?;
    Some(Cursor { created_at, id: id.parse().ok()? })
}

/// One sandbox. After a delete its status is `stopped`.
#[utoipa::path(
    get, path = "/{id}", tag = "sandboxes", operation_id = "get_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 200, description = "The sandbox", body = Sandbox), Errors)
)]
pub(super) async fn get(State(core): Shared, caller: Caller, Id(id): Id) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(core.get(&caller, &id).await?))
}

/// Destroys a sandbox. To destroy it again is no error.
#[utoipa::path(
    delete, path = "/{id}", tag = "sandboxes", operation_id = "delete_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 202, description = "It is still being destroyed."),
        Errors
    )
)]
pub(super) async fn delete(State(core): Shared, caller: Caller, Id(id): Id) -> Result<StatusCode, ApiError> {
    Ok(match core.delete(&caller, &id).await? {
        Deletion::Done => StatusCode::NO_CONTENT,
        Deletion::Stopping => StatusCode::ACCEPTED,
    })
}

/// Moves the inactivity clock of a sandbox to now.
#[utoipa::path(
    post, path = "/{id}/ping", tag = "sandboxes", operation_id = "ping_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 204, description = "Done."), Errors)
)]
pub(super) async fn ping(State(core): Shared, caller: Caller, Id(id): Id) -> Result<StatusCode, ApiError> {
    core.ping(&caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use wrenn_types::SandboxId;

    fn pairs(query: &[(&str, &str)]) -> Pairs {
        Pairs(query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn filters_of_a_list() {
        let listed = listed(pairs(&[
            ("status", "running,paused"),
            ("status", "error"),
            ("metadata.a", "1"),
            ("metadata.b.c", "2"),
            ("limit", "7"),
            ("unknown", "x"),
        ]))
        .unwrap();
        assert_eq!(listed.states, [SandboxState::Running, SandboxState::Paused, SandboxState::Error]);
        let expected = BTreeMap::from([("a".into(), "1".into()), ("b.c".into(), "2".into())]);
        assert_eq!((listed.metadata, listed.limit), (expected, Some(7)));
        for wrong in [
            ("limit", "0"),
            ("limit", "1001"),
            ("limit", "x"),
            ("cursor", "x"),
            ("cursor", "../.."),
            ("status", "gone"),
            ("metadata.a", "\0"),
        ] {
            assert!(super::listed(pairs(&[wrong])).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn cursors_come_back() {
        let created_at = Timestamp::from_microsecond(1_800_000_000_123_456).unwrap();
        let cursor = Cursor { created_at, id: SandboxId::random() };
        assert_eq!(read_cursor(&write_cursor(&cursor)), Some(cursor));
    }

    #[test]
    fn timings_are_tokens_and_milliseconds() {
        let phases = [Phase { name: "clone disk".into(), duration: Duration::from_micros(1500) }];
        let value = server_timing(&phases, Duration::from_millis(2), Duration::from_millis(40));
        assert_eq!(value, "clone-disk;dur=1.500, database;dur=2.000, total;dur=40.000");
    }
}
