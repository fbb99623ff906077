//! A real agent on a free port of the loopback interface, and clients for it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses its part of this, and it is part of tests"
)]

pub(crate) mod fuse;
pub(crate) mod mounts;
pub(crate) mod observe;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use connectrpc::{
    ConnectError,
    client::{CallOptions, ClientConfig, HttpClient},
};
use futures::stream;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use wrenn_proto::{
    filesystem::FilesystemClient,
    process::{
        __buffa::{
            oneof::{process_event::Event, process_event::data_event, process_input, process_selector},
            view::StartResponseView,
        },
        PTY, ProcessClient, ProcessConfig, ProcessInput, ProcessSelector, StartRequest, StartResponse,
        process_event::EndEvent,
        pty,
    },
};

const NOBODY: u32 = 65534;
/// No wait of a test is longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The agent. It ends with the test.
#[derive(Debug)]
pub(crate) struct Agent {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_with(&[], Stdio::inherit())
    }

    /// Starts it with more options and its own place for errors.
    pub(crate) fn start_with(options: &[&str], errors: Stdio) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        command.args(["agent", "--listen", "127.0.0.1:0"]).args(options).stdin(Stdio::null()).stderr(errors);
        Self::start_command(command)
    }

    /// Starts it as the user `nobody`, from a copy in `directory`: where it was built may be closed to others.
    pub(crate) fn start_as_nobody(directory: &Path) -> Self {
        let program = directory.join("envd");
        fs::copy(env!("CARGO_BIN_EXE_envd"), &program).unwrap();
        for path in [directory, &program] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut command = Command::new(&program);
        command.args(["agent", "--listen", "127.0.0.1:0", "--user", "nobody"]).uid(NOBODY).gid(NOBODY);
        command.current_dir("/").stdin(Stdio::null());
        Self::start_command(command)
    }

    /// Starts it by a command, which must become the agent.
    pub(crate) fn start_command(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["ready"], true);
        Self { child, address: line["address"].as_str().unwrap().parse().unwrap() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn config(&self) -> ClientConfig {
        ClientConfig::new(format!("http://{}", self.address).parse().unwrap()).json()
    }

    pub(crate) fn processes(&self) -> ProcessClient<HttpClient> {
        ProcessClient::new(HttpClient::plaintext(), self.config())
    }

    pub(crate) fn filesystem(&self) -> FilesystemClient<HttpClient> {
        FilesystemClient::new(HttpClient::plaintext(), self.config())
    }

    pub(crate) async fn send(&self, request: http::request::Builder, body: impl Into<Bytes>) -> Answer {
        self.send_body(request, Full::new(body.into()).map_err(|never| match never {}).boxed()).await
    }

    /// Sends a body in pieces, without saying how long it is.
    pub(crate) async fn send_pieces(&self, request: http::request::Builder, pieces: Vec<Bytes>) -> Answer {
        let pieces = pieces.into_iter().map(|piece| Ok(http_body::Frame::data(piece)));
        self.send_body(request, BodyExt::boxed(StreamBody::new(stream::iter(pieces)))).await
    }

    async fn send_body(
        &self,
        request: http::request::Builder,
        body: BoxBody<Bytes, std::io::Error>,
    ) -> Answer {
        let request: Request<_> = request.body(body).unwrap();
        let (mut parts, body) = request.into_parts();
        parts.uri = format!("http://{}{}", self.address, parts.uri).parse().unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http();
        let exchange = async {
            let response: Response<_> = client.request(Request::from_parts(parts, body)).await.unwrap();
            let (parts, body) = response.into_parts();
            let body = body.collect().await.map(|body| body.to_bytes()).map_err(|error| error.to_string());
            Answer { status: parts.status, headers: parts.headers, body }
        };
        tokio::time::timeout(PATIENCE, exchange).await.unwrap()
    }

    pub(crate) async fn get(&self, uri: &str) -> Answer {
        self.send(Request::get(uri), "").await
    }

    /// Calls a method as it is on the wire, as this user.
    pub(crate) async fn call(&self, method: &str, user: &str, body: impl ToString) -> Answer {
        let request = Request::post(format!("/{method}"))
            .header("content-type", "application/json")
            .header("authorization", basic(user));
        self.send(request, body.to_string()).await
    }

    pub(crate) async fn upload(&self, path: &str, content: impl Into<Bytes>) -> Answer {
        let request = Request::post(format!("/files?path={}", encode(path)));
        self.send(request.header("content-type", "application/octet-stream"), content).await
    }
}

/// The HTTP status of each code of Connect that the agent uses.
const STATUSES: [(&str, u16); 10] = [
    ("invalid_argument", 400),
    ("failed_precondition", 400),
    ("unauthenticated", 401),
    ("permission_denied", 403),
    ("not_found", 404),
    ("already_exists", 409),
    ("resource_exhausted", 429),
    ("internal", 500),
    ("unimplemented", 501),
    ("deadline_exceeded", 504),
];

impl Answer {
    /// The code and the message of a refused call, whose status must be that of its code.
    pub(crate) fn refusal(&self) -> (String, String) {
        let json = self.json();
        let code = json["code"].as_str().unwrap_or_else(|| panic!("{json}"));
        let status = STATUSES.iter().find(|(name, _)| *name == code).map(|(_, status)| *status);
        assert_eq!(status, Some(self.status.as_u16()), "{json}");
        let message = json["message"].as_str().unwrap();
        // Nothing else is told but that it is the disk that has no room.
        let is_full = ["(os error 28)", "(os error 122)"].iter().any(|end| message.ends_with(end));
        let mut told = serde_json::json!({ "code": code, "message": message });
        if is_full && code == "resource_exhausted" {
            told["details"] = serde_json::json!([{ "type": wrenn_proto::NO_SPACE_DETAIL }]);
        }
        assert_eq!(json, told);
        (code.to_owned(), message.to_owned())
    }
}

/// An HTTP answer; its body is an error if it broke off.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Result<Bytes, String>,
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(self.body.as_ref().unwrap()).unwrap()
    }

    /// The message of an error, whose code must be the status.
    pub(crate) fn message(&self) -> String {
        let json = self.json();
        assert_eq!(json["code"], self.status.as_u16());
        json["message"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn encode(path: &str) -> String {
    path.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// A request to start a command with standard input from nowhere.
pub(crate) fn command(words: &[&str]) -> StartRequest {
    StartRequest {
        process: ProcessConfig {
            cmd: words[0].to_owned(),
            args: words[1..].iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        }
        .into(),
        stdin: Some(false),
        ..Default::default()
    }
}

pub(crate) fn shell(script: &str) -> StartRequest {
    command(&["/bin/sh", "-c", script])
}

pub(crate) fn terminal(mut request: StartRequest, cols: u32, rows: u32) -> StartRequest {
    request.pty =
        PTY { size: pty::Size { cols, rows, ..Default::default() }.into(), ..Default::default() }.into();
    request
}

pub(crate) fn by_pid(pid: u32) -> ProcessSelector {
    ProcessSelector { selector: Some(process_selector::Selector::Pid(pid)), ..Default::default() }
}

pub(crate) fn by_tag(tag: &str) -> ProcessSelector {
    ProcessSelector { selector: Some(process_selector::Selector::Tag(tag.to_owned())), ..Default::default() }
}

pub(crate) fn stdin(bytes: &[u8]) -> ProcessInput {
    ProcessInput { input: Some(process_input::Input::Stdin(bytes.to_vec())), ..Default::default() }
}

pub(crate) fn keys(bytes: &[u8]) -> ProcessInput {
    ProcessInput { input: Some(process_input::Input::Pty(bytes.to_vec())), ..Default::default() }
}

pub(crate) fn as_user(name: &str) -> CallOptions {
    CallOptions::default().with_header("authorization", basic(name))
}

/// The header that names a user.
pub(crate) fn basic(name: &str) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("Basic {}", STANDARD.encode(format!("{name}:")))
}

/// What a process said until now.
#[derive(Debug, Default, Clone)]
pub(crate) struct Seen {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) pty: Vec<u8>,
    pub(crate) keepalives: usize,
    pub(crate) end: Option<EndEvent>,
}

impl Seen {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn screen(&self) -> String {
        String::from_utf8_lossy(&self.pty).into_owned()
    }

    pub(crate) fn end(&self) -> &EndEvent {
        self.end.as_ref().expect("an end")
    }

    /// Takes an event in, and checks the order: start, then data, then one end.
    pub(crate) fn take(&mut self, event: Event) {
        assert!(self.end.is_none(), "nothing comes after the end");
        assert_eq!(self.pid == 0, matches!(event, Event::Start(_)), "one start, and it comes first");
        match event {
            Event::Start(start) => self.pid = start.pid,
            Event::Data(data) => match data.output.unwrap() {
                data_event::Output::Stdout(bytes) => self.stdout.extend(bytes),
                data_event::Output::Stderr(bytes) => self.stderr.extend(bytes),
                data_event::Output::Pty(bytes) => self.pty.extend(bytes),
            },
            Event::Keepalive(_) => self.keepalives += 1,
            Event::End(end) => self.end = Some(*end),
        }
    }
}

type Body = <HttpClient as connectrpc::client::ClientTransport>::ResponseBody;

/// A process that was started, as its first client sees it.
#[derive(Debug)]
pub(crate) struct Running {
    stream: connectrpc::client::ServerStream<Body, StartResponseView<'static>>,
    pub(crate) seen: Seen,
}

impl Running {
    pub(crate) async fn start(
        client: &ProcessClient<HttpClient>,
        request: StartRequest,
        options: CallOptions,
    ) -> Result<Self, ConnectError> {
        let stream = client.start_with_options(request, options).await?;
        let mut running = Self { stream, seen: Seen::default() };
        running.next().await?;
        Ok(running)
    }

    /// Takes one more event in; false at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<bool, ConnectError> {
        let message =
            tokio::time::timeout(PATIENCE, self.stream.message::<StartResponse>()).await.unwrap()?;
        match message {
            Some(message) => {
                let event = message.to_owned_message().event.into_option().unwrap().event.unwrap();
                self.seen.take(event);
                Ok(true)
            }
            None => match self.stream.error() {
                Some(error) => Err(error.clone()),
                None => Ok(false),
            },
        }
    }

    pub(crate) async fn until(&mut self, done: impl Fn(&Seen) -> bool) -> &Seen {
        while !done(&self.seen) {
            assert!(self.next().await.unwrap(), "the stream ended: {:?}", self.seen);
        }
        &self.seen
    }

    pub(crate) async fn finish(mut self) -> Result<Seen, ConnectError> {
        while self.next().await? {}
        assert!(self.seen.end.is_some(), "a stream without an error has an end");
        Ok(self.seen)
    }
}

pub(crate) async fn run_as(
    client: &ProcessClient<HttpClient>,
    request: StartRequest,
    options: CallOptions,
) -> Result<Seen, ConnectError> {
    Running::start(client, request, options).await?.finish().await
}

pub(crate) async fn run(client: &ProcessClient<HttpClient>, request: StartRequest) -> Seen {
    run_as(client, request, CallOptions::default()).await.unwrap()
}
