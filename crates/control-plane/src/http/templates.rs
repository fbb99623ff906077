//! What sandboxes start from: templates of the platform, and snapshots that teams make.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderName, StatusCode};
use wrenn_api::{SnapshotRequest, Template, TemplateKind};

use super::{
    error::{ApiError, Errors},
    extract::{JsonBody, Name, Pairs},
    sandboxes::phase_timing,
};
use crate::{
    core::{Caller, Core, CoreError, Order, Snapshotting},
    host::Phase,
};

type Shared = State<Arc<Core>>;

fn kind(pairs: &mut Pairs) -> Result<Option<TemplateKind>, CoreError> {
    match pairs.take("type").as_deref() {
        None | Some("") => Ok(None),
        Some("base") => Ok(Some(TemplateKind::Base)),
        Some("snapshot") => Ok(Some(TemplateKind::Snapshot)),
        Some(_) => Err(CoreError::Invalid("type must be base or snapshot".to_owned())),
    }
}

fn flag(pairs: &mut Pairs, name: &str) -> Result<bool, CoreError> {
    match pairs.take(name).as_deref() {
        None | Some("" | "false" | "False" | "0") => Ok(false),
        // Some clients write the words of their language.
        Some("true" | "True" | "1") => Ok(true),
        Some(_) => Err(CoreError::Invalid(format!("{name} must be true or false"))),
    }
}

/// Lists what sandboxes can start from: the platform's templates and the team's snapshots.
#[utoipa::path(
    get, path = "", tag = "templates", operation_id = "list_templates",
    params(("type" = Option<String>, Query, description = "Only `base` or only `snapshot`.")),
    responses((status = 200, description = "The templates", body = Vec<Template>), Errors)
)]
pub(super) async fn list(
    State(core): Shared,
    caller: Caller,
    mut pairs: Pairs,
) -> Result<Json<Vec<Template>>, ApiError> {
    let kind = kind(&mut pairs)?;
    Ok(Json(core.templates(&caller, kind).await?))
}

/// Makes a snapshot of a running or paused sandbox, which goes on as it was.
///
/// The snapshot is a template from then on. A name that a snapshot of the team has already is refused with 409, or,
/// with `overwrite`, goes to the new one once that is there. If it takes more than 25 seconds, the answer is 202
/// with the sandbox, in the status `snapshotting`.
#[utoipa::path(
    post, path = "", tag = "templates", operation_id = "create_snapshot",
    params(("overwrite" = Option<bool>, Query, description = "Replace the snapshot that has the name.")),
    request_body = SnapshotRequest,
    responses(
        (status = 201, description = "The snapshot. The header Server-Timing says how long the sandbox stood still.",
            body = Template, headers(("server-timing" = String, description = "`stopped` in milliseconds"))),
        (status = 202, description = "It is still being made.", body = wrenn_api::Sandbox),
        Errors
    )
)]
pub(super) async fn snapshot(
    State(core): Shared,
    caller: Caller,
    mut pairs: Pairs,
    JsonBody(asked): JsonBody<SnapshotRequest>,
) -> Result<Response, ApiError> {
    let order = Order::new(asked, flag(&mut pairs, "overwrite")?)?;
    Ok(match core.snapshot(&caller, order).await? {
        Snapshotting::Done { template, stopped } => {
            let timing = phase_timing(&[Phase { name: "stopped".to_owned(), duration: stopped }]);
            let headers = [(HeaderName::from_static("server-timing"), timing)];
            (StatusCode::CREATED, headers, Json(template)).into_response()
        }
        Snapshotting::UnderWay(sandbox) => (StatusCode::ACCEPTED, Json(sandbox)).into_response(),
    })
}

/// One template or snapshot.
#[utoipa::path(
    get, path = "/{name}", tag = "templates", operation_id = "get_snapshot",
    params(("name" = String, Path, description = "Its name, or the id of a snapshot")),
    responses((status = 200, description = "It", body = Template), Errors)
)]
pub(super) async fn get(
    State(core): Shared,
    caller: Caller,
    Name(name): Name,
) -> Result<Json<Template>, ApiError> {
    Ok(Json(core.template(&caller, &name).await?))
}

/// Deletes a snapshot. What was made from it goes on.
#[utoipa::path(
    delete, path = "/{name}", tag = "templates", operation_id = "delete_snapshot",
    params(("name" = String, Path, description = "The name or the id of the snapshot")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 403, description = "It is a template of the platform.", body = wrenn_api::ErrorBody),
        Errors
    )
)]
pub(super) async fn delete(
    State(core): Shared,
    caller: Caller,
    Name(name): Name,
) -> Result<StatusCode, ApiError> {
    core.delete_snapshot(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_query() {
        let pairs = |name: &str, value: &str| Pairs(vec![(name.to_owned(), value.to_owned())]);
        assert!(flag(&mut pairs("overwrite", "true"), "overwrite").unwrap());
        assert!(!flag(&mut pairs("other", "true"), "overwrite").unwrap());
        assert!(flag(&mut pairs("overwrite", "yes"), "overwrite").is_err());
        assert_eq!(kind(&mut pairs("type", "snapshot")).unwrap(), Some(TemplateKind::Snapshot));
        assert_eq!(kind(&mut pairs("type", "")).unwrap(), None);
        assert!(kind(&mut pairs("type", "other")).is_err());
    }
}
