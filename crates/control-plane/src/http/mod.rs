//! The public surface: it translates requests for [`crate::core`] and its answers for callers, and decides
//! nothing itself. What is sent to the host name of a sandbox's port does not come here, but to [`crate::edge`].
//!
//! ```text
//! /v1/sandboxes/…   ┐
//! /v1/capsules/…    │ one router, also under the prefix /api;
//! /v1/snapshots     │ under /api/legacy terminals speak the older dialect
//! /v1/templates     │
//! /v1/hosts         ┘
//! /health  /openapi.yaml  /docs
//! ```
//!
//! The OpenAPI document describes `/v1/sandboxes`, `/v1/snapshots` and `/v1/hosts`; the other paths are aliases of them.

mod error;
mod exec;
mod extract;
mod files;
mod hosts;
mod metrics;
mod multipart;
mod persist;
mod sandboxes;
mod server;
mod socket;
mod streams;
mod templates;
mod terminal;
mod text;

use std::{any::Any, sync::Arc};

use axum::{Extension, Json, Router, extract::DefaultBodyLimit, response::Response, routing};
use http::header;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{ApiKey, ApiKeyValue, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::{Config as SwaggerConfig, SwaggerUi};
use wrenn_api::Health;

use crate::core::Core;
pub(crate) use error::{ApiError, code_word, core_parts, log};
pub(crate) use server::{Surfaces, serve};
use terminal::Dialect;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Wrenn",
        description = "Sandboxes: microVMs to run untrusted code in. What listens in one on a port is not a route of \
            this document: it is reached by its host name, `{port}-{sandbox}.{domain}`, with the same API key."
    ),
    modifiers(&Security),
    security(("api_key" = [])),
    components(schemas(
        wrenn_api::stream::ExecClientFrame,
        wrenn_api::stream::ExecServerFrame,
        wrenn_api::stream::TerminalClientFrame,
        wrenn_api::stream::TerminalServerFrame
    )),
    tags(
        (name = "sandboxes", description = "The life of sandboxes"),
        (name = "commands", description = "Commands, processes and terminals"),
        (name = "files", description = "Files"),
        (name = "templates", description = "What sandboxes start from"),
        (name = "server", description = "The server itself")
    )
)]
struct Document;

struct Security;

impl Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key")));
        document.components.get_or_insert_default().add_security_scheme("api_key", scheme);
    }
}

fn sandbox_routes() -> OpenApiRouter<Arc<Core>> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::get, sandboxes::delete))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(metrics::metrics))
        .routes(routes!(persist::pause))
        .routes(routes!(persist::resume))
        .routes(routes!(persist::rollback))
        .routes(routes!(persist::fork))
        .routes(routes!(persist::network, persist::set_network))
        .routes(routes!(persist::set_timeout))
        .routes(routes!(exec::exec))
        .routes(routes!(exec::processes))
        .routes(routes!(exec::signal))
        .routes(routes!(streams::exec_stream))
        .routes(routes!(streams::process_stream))
        .routes(routes!(terminal::terminal))
        // The name that published clients know.
        .route("/{id}/pty", routing::get(terminal::terminal))
        .routes(routes!(files::put, files::get))
        .routes(routes!(files::read))
        .routes(routes!(files::stream_read))
        .routes(routes!(files::stat))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::move_file))
        .routes(routes!(files::remove))
        .routes(routes!(multipart::write))
        .routes(routes!(multipart::stream_write))
}

fn template_routes() -> OpenApiRouter<Arc<Core>> {
    OpenApiRouter::new()
        .routes(routes!(templates::list, templates::snapshot))
        .routes(routes!(templates::get, templates::delete))
}

fn host_routes() -> OpenApiRouter<Arc<Core>> {
    OpenApiRouter::new().routes(routes!(hosts::list))
}

fn documented() -> (Router<Arc<Core>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .nest("/v1/sandboxes", sandbox_routes())
        .nest("/v1/snapshots", template_routes())
        .nest("/v1/hosts", host_routes())
        .routes(routes!(health))
        .split_for_parts()
}

/// The OpenAPI document of the API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().1
}

/// Everything under `/v1`.
fn version_one() -> Router<Arc<Core>> {
    let (sandboxes, _) = sandbox_routes().split_for_parts();
    let (templates, _) = template_routes().split_for_parts();
    let (hosts, _) = host_routes().split_for_parts();
    Router::new()
        .nest("/v1/sandboxes", sandboxes.clone())
        .nest("/v1/capsules", sandboxes)
        .nest("/v1/hosts", hosts)
        .nest("/v1/templates", templates.clone())
        .nest("/v1/snapshots", templates)
}

/// All routes.
pub(crate) fn router(core: Arc<Core>) -> Router {
    let document = openapi();
    let yaml = document.to_yaml().unwrap_or_default();
    let current = version_one().layer(Extension(Dialect::Binary));
    let legacy = version_one().layer(Extension(Dialect::Json));
    let docs = SwaggerUi::new("/docs")
        .url("/openapi.json", document)
        .config(SwaggerConfig::from("/openapi.json").validator_url("none"));
    Router::new()
        .merge(current.clone())
        .nest("/api", current)
        .nest("/api/legacy", legacy)
        .route("/health", routing::get(health))
        .route("/api/health", routing::get(health))
        .route(
            "/openapi.yaml",
            routing::get(move || async move { ([(header::CONTENT_TYPE, "application/yaml")], yaml) }),
        )
        .merge(docs)
        .fallback(async || ApiError::Route)
        .method_not_allowed_fallback(async || ApiError::Method)
        // Each route has a limit of its own, or none where bodies pass through.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(core)
}

/// Whether the server answers.
#[utoipa::path(
    get, path = "/health", tag = "server", operation_id = "health",
    security(()),
    responses((status = 200, description = "It does.", body = Health))
)]
async fn health() -> Json<Health> {
    Json(Health { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    tracing::error!(message, "a request handler panicked");
    axum::response::IntoResponse::into_response(ApiError::Panic)
}
