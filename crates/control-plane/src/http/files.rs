//! Files: contents as streams, entries as JSON.
//!
//! Contents pass through in pieces, and nothing here holds more than a few of them. When one side breaks in
//! the middle, so does the other: a length that was announced is not reached, or the last chunk never comes,
//! and nobody takes the part for the whole.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use wrenn_api::{FileEntryBody, FileList, ListFilesRequest, MoveFileRequest, PathRequest};

use super::{
    error::{ApiError, Errors},
    extract::{Id, JsonBody, Pairs},
};
use crate::{
    core::{Caller, Core, CoreError, Place},
    guest::{Download, Pieces, upload_body},
};

type Shared = State<Arc<Core>>;

fn place(mut pairs: Pairs) -> Result<Place, CoreError> {
    let path =
        pairs.take("path").ok_or_else(|| CoreError::Invalid("path is missing in the query".to_owned()))?;
    let user = pairs.take("user").or_else(|| pairs.take("username"));
    Place::new(path, user)
}

fn place_of(request: PathRequest) -> Result<Place, CoreError> {
    Place::new(request.path, request.user)
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Writes a file of any size. The directories above it are made.
#[utoipa::path(
    put, path = "/{id}/files", tag = "files", operation_id = "put_file",
    params(
        ("id" = String, Path, description = "The sandbox"),
        ("path" = String, Query, description = "Where to write"),
        ("user" = Option<String>, Query, description = "The user to act as")
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 204, description = "Written."),
        (status = 507, description = "The sandbox's disk is full.", body = wrenn_api::ErrorBody),
        Errors
    )
)]
pub(super) async fn put(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    pairs: Pairs,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let place = place(pairs)?;
    let pieces = Pieces::new(body, core.bounds.body_piece);
    core.write_file(&caller, &id, &place, upload_body(pieces, announced(&headers))).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a file of any size.
#[utoipa::path(
    get, path = "/{id}/files", tag = "files", operation_id = "get_file",
    params(
        ("id" = String, Path, description = "The sandbox"),
        ("path" = String, Query, description = "What to read"),
        ("user" = Option<String>, Query, description = "The user to act as")
    ),
    responses(
        (status = 200, description = "The contents", body = Vec<u8>, content_type = "application/octet-stream"),
        Errors
    )
)]
pub(super) async fn get(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    pairs: Pairs,
) -> Result<Response, ApiError> {
    let place = place(pairs)?;
    let download = core.read_file(&caller, &id, &place).await?;
    Ok(contents(&core, download))
}

/// Reads a file of any size.
#[utoipa::path(
    post, path = "/{id}/files/read", tag = "files", operation_id = "read_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = PathRequest,
    responses(
        (status = 200, description = "The contents", body = Vec<u8>, content_type = "application/octet-stream"),
        Errors
    )
)]
pub(super) async fn read(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<PathRequest>,
) -> Result<Response, ApiError> {
    let download = core.read_file(&caller, &id, &place_of(request)?).await?;
    Ok(contents(&core, download))
}

/// Reads a file of any size; the same as `files/read`.
#[utoipa::path(
    post, path = "/{id}/files/stream/read", tag = "files", operation_id = "stream_read_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = PathRequest,
    responses(
        (status = 200, description = "The contents", body = Vec<u8>, content_type = "application/octet-stream"),
        Errors
    )
)]
pub(super) async fn stream_read(
    core: Shared,
    caller: Caller,
    id: Id,
    request: JsonBody<PathRequest>,
) -> Result<Response, ApiError> {
    read(core, caller, id, request).await
}

fn contents(core: &Core, download: Download) -> Response {
    let pieces = Pieces::new(download.body, core.bounds.body_piece);
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    // What a guest wrote is shown by no browser as a page of ours.
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(length) = download.length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    response
}

/// What is at a path.
#[utoipa::path(
    post, path = "/{id}/files/stat", tag = "files", operation_id = "stat_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = PathRequest,
    responses((status = 200, description = "The entry", body = FileEntryBody), Errors)
)]
pub(super) async fn stat(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<PathRequest>,
) -> Result<Json<FileEntryBody>, ApiError> {
    Ok(Json(FileEntryBody { entry: core.stat(&caller, &id, &place_of(request)?).await? }))
}

/// What is in a directory.
#[utoipa::path(
    post, path = "/{id}/files/list", tag = "files", operation_id = "list_files",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = ListFilesRequest,
    responses((status = 200, description = "The entries", body = FileList), Errors)
)]
pub(super) async fn list(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<ListFilesRequest>,
) -> Result<Json<FileList>, ApiError> {
    let place = Place::new(request.path, request.user)?;
    let entries = core.list_files(&caller, &id, &place, request.depth.unwrap_or(1)).await?;
    Ok(Json(FileList { entries }))
}

/// Makes a directory, and those above it. A directory that is there already is a conflict.
#[utoipa::path(
    post, path = "/{id}/files/mkdir", tag = "files", operation_id = "make_directory",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = PathRequest,
    responses((status = 200, description = "The directory", body = FileEntryBody), Errors)
)]
pub(super) async fn mkdir(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<PathRequest>,
) -> Result<Json<FileEntryBody>, ApiError> {
    Ok(Json(FileEntryBody { entry: core.make_dir(&caller, &id, &place_of(request)?).await? }))
}

/// Moves a file or a directory.
#[utoipa::path(
    post, path = "/{id}/files/move", tag = "files", operation_id = "move_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = MoveFileRequest,
    responses((status = 200, description = "The entry at its new path", body = FileEntryBody), Errors)
)]
pub(super) async fn move_file(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<MoveFileRequest>,
) -> Result<Json<FileEntryBody>, ApiError> {
    let source = Place::new(request.source, request.user)?;
    let entry = core.move_file(&caller, &id, &source, &request.destination).await?;
    Ok(Json(FileEntryBody { entry }))
}

/// Removes a file, or a directory and all in it.
#[utoipa::path(
    post, path = "/{id}/files/remove", tag = "files", operation_id = "remove_file",
    params(("id" = String, Path, description = "The sandbox")),
    request_body = PathRequest,
    responses((status = 204, description = "Removed."), Errors)
)]
pub(super) async fn remove(
    State(core): Shared,
    caller: Caller,
    Id(id): Id,
    JsonBody(request): JsonBody<PathRequest>,
) -> Result<StatusCode, ApiError> {
    core.remove_file(&caller, &id, &place_of(request)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
