//! What keeps a sandbox: pause, resume, fork, rollback; and what it may reach, and when its time is over.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderName, StatusCode};
use wrenn_api::{
    ForkRequest, Network, PauseRequest, ResumeRequest, RollbackRequest, Sandbox, TimeoutRequest,
};
use wrenn_types::InactivityTimeout;

use super::{
    error::{ApiError, Errors},
    extract::{Id, JsonBody, OptionalJson},
    sandboxes::phase_timing,
};
use crate::core::{Caller, Change, Core, CoreError, Forking, Litter, Verb};

type Shared = State<Arc<Core>>;

fn answer(change: Change) -> Response {
    match change {
        Change::Done { sandbox, phases } if phases.is_empty() => Json(sandbox).into_response(),
        Change::Done { sandbox, phases } => {
            let headers = [(HeaderName::from_static("server-timing"), phase_timing(&phases))];
            (headers, Json(sandbox)).into_response()
        }
        Change::UnderWay { sandbox } => (StatusCode::ACCEPTED, Json(sandbox)).into_response(),
    }
}

/// Pauses a sandbox: its memory and its disk are saved, or its disk alone, and it stops running.
///
/// To pause a paused one is no error, and changes nothing. One that cannot be paused goes on running.
#[utoipa::path(
    post, path = "/{id}/pause", tag = "sandboxes", operation_id = "pause_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = Option<PauseRequest>,
    responses(
        (status = 200, description = "It is paused.", body = Sandbox),
        (status = 202, description = "It is still pausing.", body = Sandbox),
        Errors
    )
)]
pub(super) async fn pause(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    OptionalJson(asked): OptionalJson<PauseRequest>,
) -> Result<Response, ApiError> {
    let verb = Verb::Pause { disk_only: !asked.memory.unwrap_or(true) };
    Ok(answer(core.change(&caller, &id, verb).await?))
}

/// Brings a paused sandbox back, with every process where it was. One that was paused without its memory boots: its
/// files are there, its token and environment are the same, and no process is.
///
/// To resume a running one is no error. One that cannot be resumed stays paused.
#[utoipa::path(
    post, path = "/{id}/resume", tag = "sandboxes", operation_id = "resume_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = Option<ResumeRequest>,
    responses(
        (status = 200, description = "It runs. The header Server-Timing says how long each step took.",
            body = Sandbox, headers(("server-timing" = String, description = "Steps and their milliseconds"))),
        (status = 202, description = "It is still resuming.", body = Sandbox),
        Errors
    )
)]
pub(super) async fn resume(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    OptionalJson(asked): OptionalJson<ResumeRequest>,
) -> Result<Response, ApiError> {
    let timeout = asked.timeout_sec.map(InactivityTimeout::new).transpose().map_err(CoreError::from)?;
    let verb = Verb::Resume { timeout, automatic: false };
    Ok(answer(core.change(&caller, &id, verb).await?))
}

/// Puts a sandbox back to a snapshot, in place: it keeps its id and forgets what happened since.
#[utoipa::path(
    post, path = "/{id}/rollback", tag = "sandboxes", operation_id = "rollback_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = RollbackRequest,
    responses(
        (status = 200, description = "It runs.", body = Sandbox),
        (status = 202, description = "It is still resuming.", body = Sandbox),
        Errors
    )
)]
pub(super) async fn rollback(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(asked): JsonBody<RollbackRequest>,
) -> Result<Response, ApiError> {
    let snapshot = core.snapshot_for(&caller, &id, &asked.snapshot).await?;
    Ok(answer(core.change(&caller, &id, Verb::Rollback { snapshot }).await?))
}

/// Makes copies of a running or paused sandbox, which goes on as it was. One that is paused without its memory has to
/// be resumed first.
///
/// Each copy goes on from the same moment, with an id, a token and randomness of its own. Either all copies come
/// up, or none is left and the error says why. If it takes more than 25 seconds, the answer is 202 with those that
/// there are so far.
#[utoipa::path(
    post, path = "/{id}/fork", tag = "sandboxes", operation_id = "fork_sandbox",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = Option<ForkRequest>,
    responses(
        (status = 201, description = "All of them run.", body = Vec<Sandbox>),
        (status = 202, description = "They are still being made.", body = Vec<Sandbox>),
        Errors
    )
)]
pub(super) async fn fork(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    OptionalJson(asked): OptionalJson<ForkRequest>,
) -> Result<(StatusCode, Json<Vec<Sandbox>>), ApiError> {
    Ok(match core.fork(&caller, &id, Litter::try_from(asked)?).await? {
        Forking::Done(children) => (StatusCode::CREATED, Json(children)),
        Forking::UnderWay(children) => (StatusCode::ACCEPTED, Json(children)),
    })
}

/// What a sandbox may reach.
#[utoipa::path(
    get, path = "/{id}/network", tag = "sandboxes", operation_id = "get_network",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 200, description = "All of it, defaults included", body = Network), Errors)
)]
pub(super) async fn network(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Network>, ApiError> {
    Ok(Json(core.network(&caller, &id).await?))
}

/// Changes what a running or paused sandbox may reach. What is left out gets its default.
#[utoipa::path(
    put, path = "/{id}/network", tag = "sandboxes", operation_id = "set_network",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = Network,
    responses((status = 200, description = "It is in force.", body = Network), Errors)
)]
pub(super) async fn set_network(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(asked): JsonBody<Network>,
) -> Result<Json<Network>, ApiError> {
    Ok(Json(core.set_network(&caller, &id, asked).await?))
}

/// Changes when the time of a running or paused sandbox is over, and what happens then.
#[utoipa::path(
    patch, path = "/{id}/timeout", tag = "sandboxes", operation_id = "set_timeout",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = TimeoutRequest,
    responses((status = 200, description = "It is in force.", body = Sandbox), Errors)
)]
pub(super) async fn set_timeout(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(asked): JsonBody<TimeoutRequest>,
) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(core.set_timeout(&caller, &id, asked).await?))
}
