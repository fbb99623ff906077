//! Commands whose answer is one JSON document, and the list of processes.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use wrenn_api::{BackgroundProcess, Encoding, ExecRequest, ExecResponse, ProcessList};

use super::{
    error::{ApiError, Errors},
    extract::{Id, JsonBody, Pairs, Process},
};
use crate::{
    core::{Caller, Core, CoreError, spec::Command},
    guest::Signal,
};

/// Runs a command.
///
/// In the foreground, the answer comes when the command has ended; 16 MiB of each output are kept. A
/// command that does not end within `timeout_sec` is killed, and the answer is 504 with the code `timeout`.
/// It is killed also when the caller closes the connection. In the background, the answer is 202 as soon as
/// the command runs.
#[utoipa::path(
    post, path = "/{id}/exec", tag = "commands", operation_id = "exec",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = ExecRequest,
    responses(
        (status = 200, description = "It has ended.", body = ExecResponse),
        (status = 202, description = "It runs in the background.", body = BackgroundProcess),
        (status = 504, description = "It did not end in time and was killed.", body = wrenn_api::ErrorBody),
        Errors
    )
)]
pub(super) async fn exec(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
    JsonBody(asked): JsonBody<ExecRequest>,
) -> Result<Response, ApiError> {
    let cmd = asked.cmd.clone();
    let command = Command::try_from(asked)?;
    if command.background {
        let process = core.run_background(&caller, &id, command).await?;
        return Ok((StatusCode::ACCEPTED, Json(process)).into_response());
    }
    let finished = core.run(&caller, &id, command).await?;
    let encoding = Encoding::for_all(&[&finished.stdout.bytes, &finished.stderr.bytes]);
    let answer = ExecResponse {
        sandbox_id: id,
        cmd,
        stdout: encoding.encode(&finished.stdout.bytes),
        stderr: encoding.encode(&finished.stderr.bytes),
        exit_code: finished.end.exit_code,
        status: finished.end.status,
        duration_ms: u64::try_from(finished.duration.as_millis()).unwrap_or(u64::MAX),
        encoding,
        truncated: finished.stdout.truncated || finished.stderr.truncated,
    };
    Ok(Json(answer).into_response())
}

/// Lists the processes that were started through the API and run.
#[utoipa::path(
    get, path = "/{id}/processes", tag = "commands", operation_id = "list_processes",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 200, description = "The processes", body = ProcessList), Errors)
)]
pub(super) async fn processes(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<ProcessList>, ApiError> {
    Ok(Json(ProcessList { processes: core.processes(&caller, &id).await? }))
}

/// Ends a process and all of its group.
#[utoipa::path(
    delete, path = "/{id}/processes/{selector}", tag = "commands", operation_id = "signal_process",
    params(
        ("id" = String, Path, description = "The sandbox"),
        ("selector" = String, Path, description = "The process id, or the tag"),
        ("signal" = Option<wrenn_api::StopSignal>, Query, description = "SIGKILL when absent")
    ),
    responses((status = 204, description = "The signal was sent."), Errors)
)]
pub(super) async fn signal(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
    Process(selector): Process,
    mut pairs: Pairs,
) -> Result<StatusCode, ApiError> {
    let signal = match pairs.take("signal").as_deref() {
        None | Some("" | "SIGKILL") => Signal::Kill,
        Some("SIGTERM") => Signal::Terminate,
        Some(_) => return Err(CoreError::Invalid("signal must be SIGKILL or SIGTERM".to_owned()).into()),
    };
    core.signal(&caller, &id, &selector, signal).await?;
    Ok(StatusCode::NO_CONTENT)
}
