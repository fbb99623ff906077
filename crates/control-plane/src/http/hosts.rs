//! The hosts that sandboxes run on.

use std::sync::Arc;

use axum::{Json, extract::State};
use wrenn_api::Host;

use super::error::{ApiError, Errors};
use crate::core::{Caller, Core};

/// The hosts of this server, and what limits machines there.
#[utoipa::path(
    get, path = "", tag = "server", operation_id = "list_hosts",
    responses((status = 200, description = "What each host's agent says of itself", body = [Host]), Errors)
)]
pub(super) async fn list(
    State(core): State<Arc<Core>>,
    _caller: Caller,
) -> Result<Json<Vec<Host>>, ApiError> {
    Ok(Json(core.hosts().await?))
}
