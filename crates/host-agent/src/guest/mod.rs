//! The agent's own questions to a guest: is envd there, may it become itself, will it hold still to be saved.
//!
//! Everything else that is said to a guest goes through the tunnel and is none of the agent's business; how a
//! tunnel gets to a port is in [`loopback`].
//! Nothing that the guest answers is trusted: the status is looked at, the body is bounded and only ever
//! shown to a person.

pub mod loopback;

use std::{collections::BTreeMap, future::poll_fn, io, time::Duration};

use base64::Engine as _;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use wrenn_types::AccessToken;

use crate::{network::GuestConnector, sandbox::record::Record};

/// The port of the guest agent.
pub const ENVD_PORT: u16 = 49983;

/// How long one attempt to connect waits before the next is made. A lost first packet would otherwise
/// be sent again only after a whole second.
const CONNECT_ATTEMPT: Duration = Duration::from_millis(250);
/// How long a connection may have been idle to be used again; the guest agent keeps one ten times as long.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How much longer than its own bound a guest may take to answer.
const ANSWER_GRACE: Duration = Duration::from_secs(2);
/// How much later than the host's a guest's clock may seem to be when it has just been set. What it seems to be is what it
/// is, and how long the answer took besides.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(20);
/// How often a clock that seems later is set once more.
const CLOCK_CORRECTIONS: usize = 5;
/// What a guest says its clock is: nanoseconds since 1970.
const CLOCK_HEADER: &str = "x-wrenn-clock";
/// How much of an answer is read.
const ANSWER_LIMIT: usize = 16 * 1024;

/// A guest that did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Nothing answered in time.
    #[error("the guest agent did not answer within {bound:?}")]
    Silent {
        /// How long it was waited for.
        bound: Duration,
        /// What the last attempt met.
        #[source]
        last: Option<io::Error>,
    },
    /// The conversation broke.
    #[error("the conversation with the guest agent broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It answered with an error.
    #[error("the guest agent refused {call}: {status}: {message}")]
    Refused {
        /// What was asked.
        call: &'static str,
        /// What it answered with.
        status: StatusCode,
        /// The beginning of what it said.
        message: String,
    },
}

/// What a guest is told, so that it is itself: the body of `POST /init`, together with the time at which it is sent.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity<'a> {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<&'a str>,
    /// Whether it comes from a snapshot: nobody is at the other end of the connections that it knows, and it breaks them
    /// off. One that goes on where it was keeps them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub restored: bool,
    /// Fresh randomness, as base64.
    pub entropy: String,
    /// 32 hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// What it asks of every caller from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<&'a str>,
    /// Environment of every process.
    pub env_vars: BTreeMap<String, String>,
    /// Who runs what has no user of its own.
    pub default_user: &'a str,
    /// Where.
    pub default_workdir: &'a str,
    /// Name servers.
    pub dns_servers: &'a [std::net::Ipv4Addr],
    /// The size of the root disk, where it is not that of the snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}

impl<'a> Identity<'a> {
    /// What a sandbox is by its record, with fresh randomness; without what only a restore changes.
    #[must_use]
    pub fn of(record: &'a Record, dns_servers: &'a [std::net::Ipv4Addr]) -> Self {
        Self {
            hostname: Some(record.id.as_str()),
            restored: false,
            entropy: Self::fresh_entropy(),
            machine_id: None,
            access_token: None,
            env_vars: variables(record),
            default_user: &record.default_user,
            default_workdir: &record.default_workdir,
            dns_servers,
            disk_bytes: None,
        }
    }
}

/// The environment of every process of a sandbox: what says that it is one and which, under the names that programs of
/// either kind look for, and over that what its owner gave.
fn variables(record: &Record) -> BTreeMap<String, String> {
    let known =
        [("SANDBOX", "true"), ("SANDBOX_ID", record.id.as_str()), ("TEMPLATE_ID", record.template.as_str())];
    let named = |prefix: &'static str| {
        known.into_iter().map(move |(name, value)| (format!("{prefix}_{name}"), value.to_owned()))
    };
    named("E2B").chain(named("WRENN")).chain(record.environment.clone()).collect()
}

impl Identity<'_> {
    /// 64 bytes of the host's randomness as they travel.
    #[must_use]
    pub fn fresh_entropy() -> String {
        let mut bytes = [0_u8; 64];
        getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
        base64::engine::general_purpose::STANDARD.encode(bytes)
    }

    /// A machine id that nobody had before.
    #[must_use]
    pub fn fresh_machine_id() -> String {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A connection to the guest agent. Attempts are repeated until `bound` is over: a machine that boots
/// refuses or swallows the first ones.
async fn connect(connector: &GuestConnector, bound: Duration) -> Result<TcpStream, GuestError> {
    let end = Instant::now() + bound;
    let mut last = None;
    loop {
        let attempt =
            timeout_at(end.min(Instant::now() + CONNECT_ATTEMPT), connector.connect(ENVD_PORT)).await;
        match attempt {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => {
                last = Some(error);
                // A refusal comes at once, so the next attempt waits for the rest of this one's time.
                let pause = Instant::now() + Duration::from_millis(10);
                tokio::time::sleep_until(pause.min(end)).await;
            }
            Err(_) => {}
        }
        if Instant::now() >= end {
            return Err(GuestError::Silent { bound, last });
        }
    }
}

/// A connection to the guest agent on which nothing is under way: the next request may be sent on it.
#[derive(Debug)]
pub struct IdleConnection {
    stream: TcpStream,
    since: Instant,
}

impl IdleConnection {
    /// The connection, unless it has been idle for so long that the guest may be about to close it, or it has
    /// been closed, or the guest has said something on it that nobody asked for.
    #[must_use]
    pub fn into_usable(self) -> Option<TcpStream> {
        let quiet =
            matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        (quiet && self.since.elapsed() < IDLE_LIMIT).then_some(self.stream)
    }
}

/// What a guest answered well.
#[derive(Debug)]
struct Answer {
    headers: HeaderMap,
    /// The connection, if it was neither to be closed nor is closed.
    idle: Option<IdleConnection>,
}

/// Asks one thing on a connection of its own, and waits for the end of the answer.
async fn ask(
    connector: &GuestConnector,
    call: &'static str,
    request: Request<Full<bytes::Bytes>>,
    bound: Duration,
) -> Result<Answer, GuestError> {
    let end = Instant::now() + bound;
    let stream = connect(connector, bound).await?;
    ask_on(stream, call, request, end, bound).await
}

/// Asks one thing on this connection. `bound` is what `end` comes from.
async fn ask_on(
    stream: TcpStream,
    call: &'static str,
    request: Request<Full<bytes::Bytes>>,
    end: Instant,
    bound: Duration,
) -> Result<Answer, GuestError> {
    let keep = !request.headers().contains_key(header::CONNECTION);
    let exchange = async {
        let broken = |error: hyper::Error| GuestError::Broken(Box::new(error));
        let (mut sender, mut connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let conversation = async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let (head, body) = answer.into_parts();
            let body = match Limited::new(body, ANSWER_LIMIT).collect().await {
                // What a program printed beyond that is nobody's loss.
                Err(error) if !error.is::<LengthLimitError>() => return Err(GuestError::Broken(error)),
                body => body,
            };
            if head.status.is_success() {
                return Ok(head.headers);
            }
            let message = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned());
            Err(GuestError::Refused { call, status: head.status, message: message.unwrap_or_default() })
        };
        tokio::pin!(conversation);
        let (outcome, open) = tokio::select! {
            biased;
            outcome = &mut conversation => (outcome, true),
            // The connection may end first when the guest closes it with its answer.
            _ = poll_fn(|context| connection.poll_without_shutdown(context)) => (conversation.await, false),
        };
        outcome.map(|headers| {
            let parts = connection.into_parts();
            let idle = keep && open && parts.read_buf.is_empty();
            let idle = idle.then(|| IdleConnection { stream: parts.io.into_inner(), since: Instant::now() });
            Answer { headers, idle }
        })
    };
    // Boxed: a conversation of HTTP is large, and would make the future of every create as large.
    timeout_at(end, Box::pin(exchange)).await.unwrap_or(Err(GuestError::Silent { bound, last: None }))
}

fn request(method: &str, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path).header(header::HOST, "guest")
}

/// Waits until the guest agent answers.
///
/// # Errors
/// [`GuestError::Silent`] when it has not within `bound`.
pub async fn wait_until_healthy(connector: &GuestConnector, bound: Duration) -> Result<(), GuestError> {
    let end = Instant::now() + bound;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let request = request("GET", "/health").header(header::CONNECTION, "close");
        let request = request.body(Full::default()).expect("a constant request is valid");
        match timeout(left, ask(connector, "GET /health", request, left)).await {
            Ok(Err(GuestError::Broken(_))) if Instant::now() < end => {}
            Ok(outcome) => return outcome.map(drop),
            Err(_) => return Err(GuestError::Silent { bound, last: None }),
        }
    }
}

/// Gives a guest its identity. When it answers well, the guest is itself: clock set, generator reseeded,
/// token in force. The connection is answered for the next request: the first one of a user then finds the
/// way into the guest open.
///
/// The time that is sent is that of sending, and not of the attempts to connect before. How long it is on its way is
/// seen in the answer, which says what the clock then is; where that is too late, as on a host that is busy, the time is
/// sent once more on the same connection, whose way is short by then.
///
/// # Errors
/// [`GuestError::Refused`] when the guest could not become itself: it must not be used then.
pub async fn initialise(
    connector: &GuestConnector,
    identity: &Identity<'_>,
    token: Option<&AccessToken>,
    bound: Duration,
) -> Result<Option<IdleConnection>, GuestError> {
    let end = Instant::now() + bound;
    let stream = connect(connector, bound).await?;
    let told = token.map(AccessToken::expose);
    let mut answer = ask_on(stream, "POST /init", init(identity, told)?, end, bound).await?;
    for _ in 0..CLOCK_CORRECTIONS {
        if !seems_wrong(&answer.headers, jiff::Timestamp::now()) {
            return Ok(answer.idle);
        }
        let Some(IdleConnection { stream, .. }) = answer.idle else { return Ok(None) };
        let request = init(&serde_json::Map::new(), identity.access_token.or(told))?;
        answer = ask_on(stream, "POST /init", request, end, bound).await?;
    }
    if seems_wrong(&answer.headers, jiff::Timestamp::now()) {
        tracing::warn!("the clock of a guest may be late: its answers take too long to know");
    }
    Ok(answer.idle)
}

/// A request that makes a guest what this says, with the time as it is now.
fn init(what: &impl Serialize, token: Option<&str>) -> Result<Request<Full<bytes::Bytes>>, GuestError> {
    #[derive(Serialize)]
    struct Body<'a, T: Serialize> {
        #[serde(flatten)]
        what: &'a T,
        timestamp: String,
    }
    let body = Body { what, timestamp: jiff::Timestamp::now().to_string() };
    let body = serde_json::to_vec(&body).map_err(|error| GuestError::Broken(Box::new(error)))?;
    let mut request = request("POST", "/init").header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        request = request.header("x-access-token", token);
    }
    request.body(Full::from(body)).map_err(|error| GuestError::Broken(Box::new(error)))
}

/// Whether the clock of a guest that answered so, just `now`, may be further from the host's than it should be. One that
/// says nothing of it is not asked again.
fn seems_wrong(headers: &HeaderMap, now: jiff::Timestamp) -> bool {
    let told = headers.get(CLOCK_HEADER).and_then(|told| told.to_str().ok()?.parse::<i128>().ok());
    told.is_some_and(|told| now.as_nanosecond().abs_diff(told) > CLOCK_TOLERANCE.as_nanos())
}

/// Makes a guest stand still before it is saved: its processes are frozen, its file systems written, its free
/// blocks given back, and it answers nothing until the next [`initialise`].
///
/// # Errors
/// The guest could not be made to stand still within `bound`; it goes on as before then.
pub async fn prepare(
    connector: &GuestConnector,
    token: Option<&AccessToken>,
    bound: Duration,
) -> Result<(), GuestError> {
    let limit = serde_json::json!({ "limitMs": u32::try_from(bound.as_millis()).unwrap_or(u32::MAX) });
    let mut request = request("POST", "/snapshot/prepare")
        .header(header::CONNECTION, "close")
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        request = request.header("x-access-token", token.expose());
    }
    let request =
        request.body(Full::from(limit.to_string())).map_err(|error| GuestError::Broken(Box::new(error)))?;
    // The guest keeps its own bound, and has a moment to say that it was too short.
    ask(connector, "POST /snapshot/prepare", request, bound + ANSWER_GRACE).await.map(drop)
}

/// Runs a program in the guest and waits until it has ended, well or not: what it leaves in the guest's
/// memory is what it is run for.
///
/// # Errors
/// The guest did not answer in time, or would not start anything.
pub async fn exercise(
    connector: &GuestConnector,
    user: &str,
    program: &[&str],
    bound: Duration,
) -> Result<(), GuestError> {
    let [command, arguments @ ..] = program else { return Ok(()) };
    let message = serde_json::json!({ "process": { "cmd": command, "args": arguments }, "stdin": false });
    let message = message.to_string();
    let length = u32::try_from(message.len()).map_err(|error| GuestError::Broken(Box::new(error)))?;
    // One message of a Connect stream: a byte of flags, the length, the message.
    let mut body = vec![0];
    body.extend(length.to_be_bytes());
    body.extend(message.as_bytes());
    let credentials = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
    let request = request("POST", "/process.Process/Start")
        .header(header::CONTENT_TYPE, "application/connect+json")
        .header("connect-protocol-version", "1")
        .header(header::CONNECTION, "close")
        .header(header::AUTHORIZATION, format!("Basic {credentials}"))
        .body(Full::from(body))
        .map_err(|error| GuestError::Broken(Box::new(error)))?;
    ask(connector, "process.Process/Start", request, bound).await.map(drop)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn says(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::HeaderName::from_static(CLOCK_HEADER), text.parse().unwrap())])
    }

    #[test]
    fn the_time_goes_with_what_is_said() {
        let identity = Identity {
            hostname: None,
            restored: true,
            entropy: String::new(),
            machine_id: None,
            access_token: None,
            env_vars: BTreeMap::new(),
            default_user: "user",
            default_workdir: "/",
            dns_servers: &[],
            disk_bytes: None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = |request: Request<Full<bytes::Bytes>>| {
            let body = runtime.block_on(request.into_body().collect()).unwrap().to_bytes();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()
        };
        let whole = body(init(&identity, Some("token")).unwrap());
        assert_eq!((&whole["restored"], &whole["defaultUser"]), (&true.into(), &"user".into()));
        let time: jiff::Timestamp = whole["timestamp"].as_str().unwrap().parse().unwrap();
        assert!(jiff::Timestamp::now().duration_since(time).as_secs() < 60);
        let same = body(init(&Identity { restored: false, ..identity }, None).unwrap());
        assert_eq!(same.get("restored"), None);
        let time = body(init(&serde_json::Map::new(), None).unwrap());
        assert_eq!(time.as_object().unwrap().keys().collect::<Vec<_>>(), ["timestamp"]);
    }

    proptest! {
        #[test]
        fn a_clock_is_right_within_the_tolerance(
            now in 0..4_000_000_000_000_000_000_i128, off in -100_000_000..100_000_000_i128,
        ) {
            let now = jiff::Timestamp::from_nanosecond(now).unwrap();
            let told = now.as_nanosecond() + off;
            prop_assert_eq!(seems_wrong(&says(&told.to_string()), now), off.abs() > 20_000_000);
        }

        #[test]
        fn whatever_a_guest_says_is_a_time_or_nothing(told in "[ -~]{0,60}|-?[0-9]{0,60}") {
            if let Ok(value) = told.parse::<http::HeaderValue>() {
                let mut headers = HeaderMap::new();
                headers.insert(CLOCK_HEADER, value);
                seems_wrong(&headers, jiff::Timestamp::UNIX_EPOCH);
            }
            prop_assert!(!seems_wrong(&HeaderMap::new(), jiff::Timestamp::UNIX_EPOCH));
        }
    }
}
