//! The one question to the host agent: where is the warm snapshot. A Connect call, which is a `POST` of JSON.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::UnixStream, time::timeout};
use wrenn_types::Shape;

/// Making a snapshot boots a machine.
const BOUND: Duration = Duration::from_secs(300);

/// A warm snapshot.
#[derive(Debug)]
pub struct Prepared {
    /// Where it is.
    pub directory: Utf8PathBuf,
    /// Whether it was there before.
    pub was_there: bool,
}

/// Has the agent make the warm snapshot of a template in a shape, if it is not there, and answers with its
/// directory.
///
/// # Errors
/// The agent cannot be asked, or has none.
pub async fn prepare_template(socket: &Utf8Path, template: &str, shape: Shape) -> Result<Prepared> {
    let question =
        json!({ "template": template, "vcpus": shape.vcpus.get(), "memoryMib": shape.memory.bytes() >> 20 });
    let request = Request::post("/hostagent.v1.HostAgentService/PrepareTemplate")
        .header(header::HOST, "agent")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(question.to_string())))?;
    let answer = timeout(BOUND, ask(socket, request)).await.context("the agent did not answer in time")??;
    let directory = answer["snapshotDir"].as_str().context("the agent named no snapshot")?;
    // In JSON a false flag may be left out.
    Ok(Prepared { directory: directory.into(), was_there: answer["wasThere"].as_bool().unwrap_or(false) })
}

async fn ask(socket: &Utf8Path, request: Request<Full<Bytes>>) -> Result<Value> {
    let stream = UnixStream::connect(socket).await.with_context(|| format!("connect to {socket}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    connection.abort();
    ensure!(
        parts.status.is_success(),
        "the agent answered {}: {}",
        parts.status,
        String::from_utf8_lossy(&body)
    );
    Ok(serde_json::from_slice(&body)?)
}
