//! What sandboxes have used.

use std::sync::Arc;

use axum::{Json, extract::State};
use wrenn_api::{Metrics, MetricsRange};

use super::{
    error::{ApiError, Errors},
    extract::{Id, Pairs},
};
use crate::core::{Caller, Core, CoreError};

/// What a running or paused sandbox has used.
///
/// Ten minutes back there are two points a second, two hours back one for 30 seconds, and a day back one for five
/// minutes. There are none for the time in which it was paused. Of a sandbox that has not run yet or is gone nothing is
/// known: 404.
#[utoipa::path(
    get, path = "/{id}/metrics", tag = "sandboxes", operation_id = "get_metrics",
    params(
        ("id" = String, Path, description = "The sandbox"),
        ("range" = Option<MetricsRange>, Query, description = "How far back; `10m` when absent.")
    ),
    responses((status = 200, description = "What was measured, the oldest first", body = Metrics), Errors)
)]
pub(super) async fn metrics(
    State(core): State<Arc<Core>>,
    caller: Caller,
    Id(id): Id,
    mut pairs: Pairs,
) -> Result<Json<Metrics>, ApiError> {
    let range = pairs.take("range").map(|text| text.parse::<MetricsRange>()).transpose();
    let range = range.map_err(|error| CoreError::Invalid(error.to_string()))?;
    Ok(Json(core.metrics(&caller, &id, range.unwrap_or_default()).await?))
}
