//! Files as forms: the field `path`, then the part `file`.
//!
//! The part is passed on while it arrives, so the path must come before it. Published clients send it so.

use std::{io, sync::Arc};

use axum::extract::{
    FromRequest as _, Multipart, Request, State,
    multipart::{Field, MultipartError},
};
use bytes::Bytes;
use http::StatusCode;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::ToSchema;

use super::{
    error::{ApiError, Errors},
    extract::Id,
};
use crate::{
    core::{Caller, Core, CoreError, Place},
    guest::upload_body,
};

/// The most that `files/write` takes; `files/stream/write` and `PUT` take any size.
const WRITE_LIMIT: usize = 100 << 20;
/// Pieces on their way from the caller to the guest.
const PIECES: usize = 4;
/// The longest value of a field that is not a file.
const FIELD: usize = 8192;

/// The parts of the form, for the OpenAPI document.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its schema is used")]
pub(super) struct FileForm {
    /// Where to write. Must come before `file`.
    path: String,
    /// The user to act as.
    user: Option<String>,
    /// The contents.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// Writes a file of up to 100 MiB from a form.
#[utoipa::path(
    post, path = "/{id}/files/write", tag = "files", operation_id = "write_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses(
        (status = 204, description = "Written."),
        (status = 413, description = "The file is too large for this route.", body = wrenn_api::ErrorBody),
        Errors
    )
)]
pub(super) async fn write(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
    request: Request,
) -> Result<StatusCode, ApiError> {
    receive(&core, &caller, &id, request, Some(WRITE_LIMIT)).await
}

/// Writes a file of any size from a form.
#[utoipa::path(
    post, path = "/{id}/files/stream/write", tag = "files", operation_id = "stream_write_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses((status = 204, description = "Written."), Errors)
)]
pub(super) async fn stream_write(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
    request: Request,
) -> Result<StatusCode, ApiError> {
    receive(&core, &caller, &id, request, None).await
}

fn malformed(error: &MultipartError) -> ApiError {
    CoreError::Invalid(format!("the form cannot be read: {}", error.body_text())).into()
}

async fn receive(
    core: &Arc<Core>,
    caller: &Caller,
    id: &wrenn_types::SandboxId,
    request: Request,
    limit: Option<usize>,
) -> Result<StatusCode, ApiError> {
    let mut form = Multipart::from_request(request, core).await.map_err(|rejection| {
        ApiError::from(CoreError::Invalid(format!("the body is not a form: {}", rejection.body_text())))
    })?;
    let (mut path, mut user) = (None, None);
    loop {
        let next =
            timeout(core.bounds.body_piece, form.next_field()).await.map_err(|_| ApiError::SlowBody)?;
        let Some(field) = next.map_err(|error| malformed(&error))? else {
            return Err(CoreError::Invalid("the form has no part file".to_owned()).into());
        };
        match field.name() {
            Some("path") => path = Some(short(core, field).await?),
            Some("user" | "username") => user = Some(short(core, field).await?),
            Some("file") => {
                let path = path.ok_or_else(|| {
                    CoreError::Invalid("the field path must come before the part file".to_owned())
                })?;
                let place = Place::new(path, user)?;
                pass_on(core, caller, id, &place, field, limit).await?;
                return Ok(StatusCode::NO_CONTENT);
            }
            // What a newer client says besides is not looked at; the form skips it.
            _ => {}
        }
    }
}

async fn short(core: &Core, mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    loop {
        let piece = timeout(core.bounds.body_piece, field.chunk()).await.map_err(|_| ApiError::SlowBody)?;
        let Some(piece) = piece.map_err(|error| malformed(&error))? else { break };
        if bytes.len() + piece.len() > FIELD {
            return Err(ApiError::TooLarge { limit: FIELD });
        }
        bytes.extend_from_slice(&piece);
    }
    String::from_utf8(bytes)
        .map_err(|_| CoreError::Invalid("a field of the form is not UTF-8".to_owned()).into())
}

/// Why the part was not passed on to its end.
enum Stopped {
    TooLarge,
    Broken(String),
    Slow,
    /// The guest takes no more: its answer says why.
    Refused,
}

async fn pass_on(
    core: &Arc<Core>,
    caller: &Caller,
    id: &wrenn_types::SandboxId,
    place: &Place,
    mut field: Field<'_>,
    limit: Option<usize>,
) -> Result<(), ApiError> {
    let (pieces, passed) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    let write = core.write_file(caller, id, place, upload_body(ReceiverStream::new(passed), None));
    let pump = async move {
        let mut length = 0_usize;
        loop {
            let stopped = match timeout(core.bounds.body_piece, field.chunk()).await {
                Err(_) => Stopped::Slow,
                Ok(Err(error)) => Stopped::Broken(error.body_text()),
                Ok(Ok(None)) => return Ok(()),
                Ok(Ok(Some(piece))) => {
                    length = length.saturating_add(piece.len());
                    if limit.is_some_and(|limit| length > limit) {
                        Stopped::TooLarge
                    } else if pieces.send(Ok(piece)).await.is_ok() {
                        continue;
                    } else {
                        Stopped::Refused
                    }
                }
            };
            // The guest must not take what it has for the whole file.
            let _ = pieces.send(Err(io::Error::other("the form was broken off"))).await;
            return Err(stopped);
        }
    };
    tokio::pin!(write, pump);
    let pumped = tokio::select! {
        // A guest that answers before it has everything has refused: the rest need not come.
        written = &mut write => {
            written?;
            pump.await
        }
        pumped = &mut pump => match (pumped, write.await) {
            (Ok(()) | Err(Stopped::Refused), written) => return Ok(written?),
            (stopped, _) => stopped,
        },
    };
    match pumped {
        Ok(()) | Err(Stopped::Refused) => Ok(()),
        Err(Stopped::TooLarge) => Err(ApiError::TooLarge { limit: WRITE_LIMIT }),
        Err(Stopped::Slow) => Err(ApiError::SlowBody),
        Err(Stopped::Broken(why)) => {
            Err(CoreError::Invalid(format!("the form cannot be read: {why}")).into())
        }
    }
}
