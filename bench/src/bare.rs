//! What a bare program says to a guest, and how it waits for the answer.
//!
//! ```text
//!  first byte   connect ─► GET /health ─► a byte              again a millisecond after each refusal
//!  command      connect ─► POST /init ─► the same connection: process.Process/Start `true` ─► it ended well
//! ```
//!
//! The second is what any restore has to do before a user's command has a result: without an identity the guest is
//! closed. The connection that it was given on is used for the command, as the product does; only if the guest has
//! closed it, another one is made.

use std::{collections::BTreeMap, io, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use wrenn_host_agent::{
    guest::{self, ENVD_PORT, Identity, IdleConnection},
    network::GuestConnector,
};
use wrenn_types::AccessToken;

/// The user of the template `base`.
const USER: &str = "user";
/// That user for HTTP Basic, without a password.
const AUTHORIZATION: &str = "Basic dXNlcjo=";
/// How long one attempt may take: the host sends a lost first packet again only after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// How long after a refusal the next attempt is made.
const PAUSE: Duration = Duration::from_millis(1);
/// How much of an answer is read.
const ANSWER_LIMIT: usize = 16 * 1024;

const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";

/// Asks `GET /health` until the first byte of an answer is there. The caller keeps the bound.
pub async fn first_byte(connector: &GuestConnector) {
    loop {
        match timeout(ATTEMPT, ask(connector)).await {
            Ok(Ok(())) => return,
            // Refused: nothing listens yet.
            Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
            Err(_) => {}
        }
    }
}

async fn ask(connector: &GuestConnector) -> io::Result<()> {
    let mut stream = connector.connect(ENVD_PORT).await?;
    stream.write_all(HEALTH).await?;
    let mut byte = [0];
    stream.read_exact(&mut byte).await.map(drop)
}

/// Makes the guest itself and runs `true` in it, until it has ended well. `token` is what the guest asks of every
/// caller, if it was saved with one. The caller keeps the bound, which is not below `bound`.
///
/// # Errors
/// The guest refuses, or `true` ends otherwise.
pub async fn command(connector: &GuestConnector, token: Option<&AccessToken>, bound: Duration) -> Result<()> {
    let idle = identify(connector, token, bound).await?;
    let stream = match idle.and_then(IdleConnection::into_usable) {
        Some(stream) => stream,
        None => connector.connect(ENVD_PORT).await.context("connect to the guest agent again")?,
    };
    run_true(stream, token).await.context("run true")
}

/// Makes the guest itself, and answers with the connection on which that was done.
///
/// # Errors
/// The guest refuses, or does not answer within `bound`.
pub async fn identify(
    connector: &GuestConnector,
    token: Option<&AccessToken>,
    bound: Duration,
) -> Result<Option<IdleConnection>> {
    let identity = Identity {
        hostname: Some("bare"),
        restored: true,
        entropy: Identity::fresh_entropy(),
        machine_id: Some(Identity::fresh_machine_id()),
        access_token: None,
        env_vars: BTreeMap::new(),
        default_user: USER,
        default_workdir: "/home/user",
        dns_servers: &[],
        disk_bytes: None,
    };
    guest::initialise(connector, &identity, token, bound).await.context("POST /init")
}

async fn run_true(stream: TcpStream, token: Option<&AccessToken>) -> Result<()> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let conversation = async {
        let (head, body) = sender.send_request(start(token)?).await?.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT).collect().await.map_err(anyhow::Error::from_boxed)?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        ensure!(head.status.is_success() && ended_well(&text), "the guest answered {}: {text}", head.status);
        Ok(())
    };
    tokio::pin!(conversation, connection);
    tokio::select! {
        biased;
        outcome = &mut conversation => outcome,
        // The guest may close it with its answer.
        _ = &mut connection => conversation.await,
    }
}

/// The request that starts `true`.
fn start(token: Option<&AccessToken>) -> Result<Request<Full<Bytes>>> {
    let message = br#"{"process":{"cmd":"true"},"stdin":false}"#;
    // One message of a Connect stream: a byte of flags, the length, the message.
    let mut body = vec![0];
    body.extend(u32::try_from(message.len())?.to_be_bytes());
    body.extend(message);
    let mut request = Request::post("/process.Process/Start")
        .header(header::HOST, "guest")
        .header(header::CONTENT_TYPE, "application/connect+json")
        .header("connect-protocol-version", "1")
        .header(header::CONNECTION, "close")
        .header(header::AUTHORIZATION, AUTHORIZATION);
    if let Some(token) = token {
        request = request.header("x-access-token", token.expose());
    }
    Ok(request.body(Full::from(body))?)
}

/// Whether a stream of events says that the process has exited by itself, and with nothing but success.
fn ended_well(stream: &str) -> bool {
    stream.contains(r#""exited":true"#) && stream.contains(r#""status":"exit status 0""#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_end_is_one() {
        let end =
            |rest: &str| format!(r#"{{"event":{{"start":{{"pid":7}}}}}}{{"event":{{"end":{{{rest}}}}}}}"#);
        assert!(ended_well(&end(r#""exited":true,"status":"exit status 0""#)));
        assert!(!ended_well(&end(r#""exitCode":1,"exited":true,"status":"exit status 1""#)));
        assert!(!ended_well(&end(r#""status":"signal: killed""#)));
        assert!(!ended_well(""));
    }

    #[test]
    fn the_token_of_the_guest_goes_with_the_request() {
        let token = AccessToken::from_stored("a-token".to_owned());
        let request = start(Some(&token)).unwrap();
        assert_eq!(request.headers()["x-access-token"], "a-token");
        assert!(!start(None).unwrap().headers().contains_key("x-access-token"));
    }
}
