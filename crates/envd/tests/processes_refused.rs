//! What the process service refuses and in which words, and what it survives.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    process::Stdio,
};

use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, HttpClient},
};
use futures::stream;
use harness::{
    Agent, PATIENCE, Running, as_user, by_pid, by_tag, command, keys, observe::zombies, run_as, shell, stdin,
    terminal,
};
use proptest::{collection::vec, prelude::*};
use wrenn_proto::process::{
    __buffa::oneof::stream_input_request,
    CloseStdinRequest, ConnectRequest, ConnectResponse, ListRequest, PTY, ProcessClient, ProcessInput,
    ProcessSelector, SendInputRequest, SendSignalRequest, Signal, StartRequest, StreamInputRequest,
    UpdateRequest, pty,
    stream_input_request::{DataEvent, StartEvent},
};

#[tokio::test]
async fn what_cannot_start_is_refused_in_the_words_of_the_contract() {
    let agent = Agent::start();
    let client = agent.processes();
    let with = |change: &dyn Fn(&mut wrenn_proto::process::ProcessConfig)| {
        let mut request = command(&["/bin/true"]);
        change(request.process.get_or_insert_default());
        request
    };
    let nothing = CallOptions::default;
    let table = vec![
        (
            with(&|config| config.cwd = Some("/nowhere".to_owned())),
            nothing(),
            ErrorCode::InvalidArgument,
            "cwd '/nowhere' does not exist",
        ),
        (
            with(&|config| config.cwd = Some("/etc/passwd".to_owned())),
            nothing(),
            ErrorCode::InvalidArgument,
            "cwd '/etc/passwd' is not a directory",
        ),
        (with(&|_| {}), as_user("nosuch"), ErrorCode::Unauthenticated, "invalid username: 'nosuch'"),
        (
            with(&|config| config.cwd = Some("/root".to_owned())),
            as_user("nobody"),
            ErrorCode::InvalidArgument,
            "cwd '/root' cannot be entered: Permission denied (os error 13)",
        ),
        (
            with(&|config| config.cmd = "no-such-command".to_owned()),
            nothing(),
            ErrorCode::InvalidArgument,
            "exec: \"no-such-command\": executable file not found in $PATH",
        ),
        (
            with(&|config| config.cmd = "/no/such".to_owned()),
            nothing(),
            ErrorCode::InvalidArgument,
            "fork/exec /no/such: No such file or directory (os error 2)",
        ),
        (
            with(&|config| config.cmd = "/etc/passwd".to_owned()),
            nothing(),
            ErrorCode::InvalidArgument,
            "fork/exec /etc/passwd: Permission denied (os error 13)",
        ),
        (
            with(&|config| config.cmd = String::new()),
            nothing(),
            ErrorCode::InvalidArgument,
            "command is empty",
        ),
        (
            with(&|config| config.args = vec!["a\0b".to_owned()]),
            nothing(),
            ErrorCode::InvalidArgument,
            "the command, an argument or a variable contains a zero byte",
        ),
        (
            with(&|config| {
                config.envs.insert("A=B".to_owned(), "c".to_owned());
            }),
            nothing(),
            ErrorCode::InvalidArgument,
            "invalid environment variable name 'A=B'",
        ),
        (
            with(&|config| config.cwd = Some("a\0b".to_owned())),
            nothing(),
            ErrorCode::InvalidArgument,
            "cwd: path contains a zero byte",
        ),
        (
            with(&|config| config.cwd = Some(format!("/{}", "x/".repeat(3000)))),
            nothing(),
            ErrorCode::InvalidArgument,
            "cwd: path is longer than 4095 bytes",
        ),
        (
            with(&|config| config.args = vec!["x".repeat(200_000)]),
            nothing(),
            ErrorCode::InvalidArgument,
            "fork/exec /bin/true: Argument list too long",
        ),
        (StartRequest::default(), nothing(), ErrorCode::InvalidArgument, "no process"),
        (
            with(&|_| {}),
            nothing().with_header("connect-timeout-ms", "soon"),
            ErrorCode::InvalidArgument,
            "connect-timeout-ms: \"soon\" is no number",
        ),
        (
            StartRequest { tag: Some("x".repeat(257)), ..with(&|_| {}) },
            nothing(),
            ErrorCode::InvalidArgument,
            "tag is longer than 256 bytes",
        ),
        (
            terminal(with(&|_| {}), 70_000, 24),
            nothing(),
            ErrorCode::InvalidArgument,
            "terminal size is too large",
        ),
        (
            terminal(with(&|config| config.cwd = Some("/nowhere".to_owned())), 80, 24),
            nothing(),
            ErrorCode::InvalidArgument,
            "cwd '/nowhere' does not exist",
        ),
    ];
    for (request, options, code, message) in table {
        let error = run_as(&client, request, options).await.unwrap_err();
        let said = error.message.clone().unwrap_or_default();
        assert_eq!(error.code, code, "{said}");
        assert!(said.starts_with(message), "{said:?} is not {message:?}");
    }
    assert!(client.list(ListRequest::default()).await.unwrap().into_owned().processes.is_empty());
    assert_eq!(zombies(agent.pid()), 0);
}

/// The calls that name a process.
const CALLS: [&str; 7] =
    ["Connect", "Update", "SendInput", "StreamInput", "SendSignal", "CloseStdin", "StreamInput, later"];

async fn call(
    client: &ProcessClient<HttpClient>,
    method: &str,
    process: ProcessSelector,
) -> Result<(), ConnectError> {
    let process = || process.clone().into();
    let event = |event| StreamInputRequest { event: Some(event), ..Default::default() };
    let start = || {
        let start = StartEvent { process: process(), ..Default::default() };
        event(stream_input_request::Event::from(start))
    };
    match method {
        "Connect" => {
            let request = ConnectRequest { process: process(), ..Default::default() };
            let mut stream = client.connect(request).await?;
            let first = stream.message::<ConnectResponse>().await?;
            match (first, stream.error()) {
                (None, Some(error)) => Err(error.clone()),
                _ => Ok(()),
            }
        }
        "Update" => {
            let size = pty::Size { cols: 1, rows: 1, ..Default::default() };
            let pty = PTY { size: size.into(), ..Default::default() }.into();
            let request = UpdateRequest { process: process(), pty, ..Default::default() };
            client.update(request).await.map(|_| ())
        }
        "SendInput" => {
            let request =
                SendInputRequest { process: process(), input: stdin(b"x").into(), ..Default::default() };
            client.send_input(request).await.map(|_| ())
        }
        "StreamInput" => client.stream_input(stream::iter(vec![start()])).await.map(|_| ()),
        "StreamInput, later" => {
            let keepalive = event(stream_input_request::Event::Keepalive(Box::default()));
            client.stream_input(stream::iter(vec![keepalive, start()])).await.map(|_| ())
        }
        "SendSignal" => {
            let signal = Signal::SIGNAL_SIGTERM.into();
            let request = SendSignalRequest { process: process(), signal, ..Default::default() };
            client.send_signal(request).await.map(|_| ())
        }
        _ => {
            let request = CloseStdinRequest { process: process(), ..Default::default() };
            client.close_stdin(request).await.map(|_| ())
        }
    }
}

#[tokio::test]
async fn a_process_that_is_not_there() {
    let agent = Agent::start();
    let client = agent.processes();
    for method in CALLS {
        let table = [
            (by_pid(999_999_999), ErrorCode::NotFound, "process with pid 999999999 not found"),
            (by_pid(1), ErrorCode::NotFound, "process with pid 1 not found"),
            (by_pid(0), ErrorCode::NotFound, "process with pid 0 not found"),
            (by_pid(u32::MAX), ErrorCode::NotFound, "process with pid 4294967295 not found"),
            (by_tag("nobody"), ErrorCode::NotFound, "process with tag nobody not found"),
            (by_tag(""), ErrorCode::NotFound, "process with tag  not found"),
            (ProcessSelector::default(), ErrorCode::InvalidArgument, "no process is named"),
        ];
        for (process, code, message) in table {
            let error = call(&client, method, process).await.unwrap_err();
            assert_eq!((error.code, error.message.as_deref()), (code, Some(message)), "{method}");
        }
    }
}

#[tokio::test]
async fn input_and_signals_that_make_no_sense() {
    let agent = Agent::start();
    let client = agent.processes();
    let start = async |request| Running::start(&client, request, CallOptions::default()).await.unwrap();
    let plain = start(shell("sleep 3000")).await;
    let screen = start(terminal(shell("sleep 3000"), 80, 24)).await;
    let mut request = command(&["/bin/sleep", "3000"]);
    request.stdin = Some(true);
    let fed = start(request).await;

    let input = async |pid, input: Option<ProcessInput>| {
        let request =
            SendInputRequest { process: by_pid(pid).into(), input: input.into(), ..Default::default() };
        client.send_input(request).await.unwrap_err()
    };
    let (plain, screen, fed) = (plain.seen.pid, screen.seen.pid, fed.seen.pid);
    let closed = "stdin not enabled or closed";
    let wants_terminal = "the process has a terminal: send its input as pty";
    let no_terminal = "the process has no terminal";
    let table = [
        (plain, Some(stdin(b"x")), ErrorCode::Internal, closed),
        (plain, Some(keys(b"x")), ErrorCode::InvalidArgument, no_terminal),
        (fed, Some(keys(b"x")), ErrorCode::InvalidArgument, no_terminal),
        (screen, Some(stdin(b"x")), ErrorCode::InvalidArgument, wants_terminal),
        (plain, None, ErrorCode::InvalidArgument, "no input"),
        (plain, Some(ProcessInput::default()), ErrorCode::InvalidArgument, "no input"),
    ];
    for (pid, what, code, message) in table {
        let error = input(pid, what).await;
        assert_eq!((error.code, error.message.as_deref()), (code, Some(message)));
    }
    for pid in [plain, fed] {
        let error = call(&client, "Update", by_pid(pid)).await.unwrap_err();
        assert_eq!((error.code, error.message.as_deref()), (ErrorCode::InvalidArgument, Some(no_terminal)));
    }
    let error = call(&client, "CloseStdin", by_pid(screen)).await.unwrap_err();
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::InvalidArgument, Some(wants_terminal)));
    // Closing twice is no error; writing afterwards is.
    for _ in 0..2 {
        call(&client, "CloseStdin", by_pid(fed)).await.unwrap();
    }
    let error = input(fed, Some(stdin(b"x"))).await;
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::Internal, Some(closed)));

    // One that closed its input by itself.
    let mut request = shell("exec <&-; echo closed; sleep 3000");
    request.stdin = Some(true);
    let mut deaf = start(request).await;
    deaf.until(|seen| seen.text() == "closed\n").await;
    let error = input(deaf.seen.pid, Some(stdin(b"x"))).await;
    let broken = "cannot write to the process: Broken pipe (os error 32)";
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::Internal, Some(broken)));

    let size = pty::Size { cols: 80, rows: 70_000, ..Default::default() };
    let pty = PTY { size: size.into(), ..Default::default() }.into();
    let request = UpdateRequest { process: by_pid(screen).into(), pty, ..Default::default() };
    let error = client.update(request).await.unwrap_err();
    let large = "terminal size is too large";
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::InvalidArgument, Some(large)));

    let data = DataEvent { input: stdin(b"x").into(), ..Default::default() };
    let request =
        StreamInputRequest { event: Some(stream_input_request::Event::from(data)), ..Default::default() };
    let error = client.stream_input(stream::iter(vec![request])).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert_eq!(error.message.as_deref(), Some("the first message must name a process"));

    for number in [0, 1, 2, 19, 64, -1, i32::MAX] {
        let request = SendSignalRequest {
            process: by_pid(plain).into(),
            signal: buffa::EnumValue::from(number),
            ..Default::default()
        };
        let error = client.send_signal(request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unimplemented);
        assert_eq!(error.message, Some(format!("invalid signal: {number}")));
    }
    let list = client.list(ListRequest::default()).await.unwrap().into_owned();
    assert_eq!(list.processes.len(), 4, "none of this ended any");
    for pid in [plain, screen, fed, deaf.seen.pid] {
        let signal = Signal::SIGNAL_SIGKILL.into();
        let request = SendSignalRequest { process: by_pid(pid).into(), signal, ..Default::default() };
        client.send_signal(request).await.unwrap();
    }
}

/// An agent whose complaints are kept, because a panic in a task would otherwise go unnoticed.
struct Watched {
    agent: Agent,
    errors: tempfile::NamedTempFile,
}

impl Watched {
    fn start() -> Self {
        let errors = tempfile::NamedTempFile::new().unwrap();
        Self { agent: Agent::start_with(&[], Stdio::from(errors.reopen().unwrap())), errors }
    }

    /// It answers, and nothing in it panicked.
    fn is_well(&self) {
        let request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let answer = exchange(self.agent.address, request, true);
        assert!(answer.starts_with(b"HTTP/1.1 204"), "{}", String::from_utf8_lossy(&answer));
        let errors = fs::read_to_string(self.errors.path()).unwrap();
        assert!(!errors.contains("panicked"), "{errors}");
    }
}

/// Sends bytes, says that there are no more if there is no other end to them, and reads until the agent closes.
fn exchange(address: SocketAddr, bytes: &[u8], ends: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The agent may answer and close before it has read all.
    let _ = stream.write_all(bytes);
    if !ends {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    answer
}

/// The body of an answer in HTTP/1.1, whole.
fn body(head: &str, rest: &[u8]) -> Vec<u8> {
    if !head.contains("transfer-encoding: chunked") {
        return rest.to_vec();
    }
    let (mut body, mut rest) = (Vec::new(), rest);
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n").expect("the length of a chunk");
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        if length == 0 {
            assert_eq!(&rest[line..], b"\r\n\r\n", "nothing comes after the end");
            return body;
        }
        body.extend(&rest[line + 2..line + 2 + length]);
        rest = &rest[line + 4 + length..];
    }
}

/// Whatever was asked, a stream in answer to it is made of whole frames, and the one that ends it is the last and the
/// only one of its kind.
fn check_stream(answer: &[u8]) {
    let end = memchr::memmem::find(answer, b"\r\n\r\n").expect("the end of the head") + 4;
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    if !head.starts_with("http/1.1 200") || !head.contains("content-type: application/connect+") {
        return;
    }
    let body = body(&head, &answer[end..]);
    let (mut rest, mut ended) = (body.as_slice(), false);
    while !rest.is_empty() {
        assert!(!ended, "a frame after the end: {rest:?}");
        let length = u32::from_be_bytes(rest[1..5].try_into().unwrap()) as usize;
        let (frame, after) = rest.split_at(5 + length);
        match frame[0] {
            0 => {}
            2 => {
                ended = true;
                serde_json::from_slice::<serde_json::Value>(&frame[5..]).unwrap();
            }
            flags => panic!("a frame with the flags {flags}"),
        }
        rest = after;
    }
    assert!(ended, "a stream without an end: {head}{body:?}");
}

/// One frame of the Connect protocol, whose length may be a lie.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        vec(any::<u8>(), 0..64),
        r#"\{"(process|pty|tag|stdin|input|signal)":[\{\["a-z0-9:,\]\}]{0,20}\}"#
            .prop_map(String::into_bytes),
    ];
    let flags = prop_oneof![Just(0_u8), Just(2), any::<u8>()];
    (flags, payload, proptest::option::weighted(0.2, any::<u32>())).prop_map(|(flags, payload, lie)| {
        let length = lie.unwrap_or_else(|| u32::try_from(payload.len()).unwrap());
        [[flags].as_slice(), &length.to_be_bytes(), &payload].concat()
    })
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        Just("process.Process/List"),
        Just("process.Process/Start"),
        Just("process.Process/Connect"),
        Just("process.Process/Update"),
        Just("process.Process/StreamInput"),
        Just("process.Process/SendInput"),
        Just("process.Process/SendSignal"),
        Just("process.Process/CloseStdin"),
        Just("process.Process/Nothing"),
        Just("filesystem.Filesystem/Stat"),
        Just("filesystem.Filesystem/Move"),
        Just("filesystem.Filesystem/GetWatcherEvents"),
    ];
    let kind = prop_oneof![
        Just("application/connect+json"),
        Just("application/connect+proto"),
        Just("application/json"),
        Just("application/proto"),
        Just("application/grpc"),
        Just("text/plain"),
    ];
    let encoding = prop_oneof![
        4 => Just(""),
        1 => Just("connect-content-encoding: gzip\r\n"),
        1 => Just("content-encoding: gzip\r\n"),
        1 => Just("connect-timeout-ms: 99999999999999999999\r\n"),
        1 => Just("keepalive-ping-interval: 4294967295\r\n"),
    ];
    let body = prop_oneof![vec(any::<u8>(), 0..200), vec(frame(), 0..4).prop_map(|frames| frames.concat()),];
    (method, kind, encoding, body).prop_map(|(method, kind, encoding, body)| {
        let length = body.len();
        let head = format!(
            "POST /{method} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\n\
             connect-protocol-version: 1\r\n{encoding}content-length: {length}\r\n\r\n"
        );
        [head.as_bytes(), &body].concat()
    })
}

#[test]
fn any_bytes_are_answered_and_survived() {
    let watched = Watched::start();
    let address = watched.agent.address;
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config.clone(), |(request in request())| {
        let answer = exchange(address, &request, true);
        prop_assert!(answer.starts_with(b"HTTP/1.1 "), "{:?}", String::from_utf8_lossy(&answer));
        check_stream(&answer);
        watched.is_well();
    });
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    proptest!(config, |(bytes in vec(any::<u8>(), 0..300), second: bool)| {
        let bytes = if second { [preface.as_slice(), &bytes].concat() } else { bytes };
        exchange(address, &bytes, false);
        watched.is_well();
    });
    let peak = harness::observe::peak_memory(watched.agent.pid());
    assert!(peak < 64 << 20, "a length that is a lie costs no memory: {peak}");
}

#[test]
fn any_start_request_is_run_or_refused() {
    let watched = Watched::start();
    let client = watched.agent.processes();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() };
    let text = || prop_oneof![2 => ".{0,12}", 1 => "[a-z/~.]{0,8}", 1 => Just("/".to_owned())];
    let cmd = prop_oneof![1 => Just("/bin/true".to_owned()), 1 => Just("true".to_owned()), 1 => text().prop_map(|text| format!("/nowhere/{text}"))];
    let strategy = (
        cmd,
        vec(text(), 0..4),
        vec((text(), text()), 0..3),
        proptest::option::of(text()),
        proptest::option::of(text()),
        proptest::option::of((any::<u32>(), 0..70_000_u32)),
        proptest::option::of(prop_oneof![Just("root".to_owned()), Just("nobody".to_owned()), ".{0,5}"]),
    );
    proptest!(config, |((cmd, args, envs, cwd, tag, size, user) in strategy)| {
        let mut request = command(&[&cmd]);
        let process = request.process.get_or_insert_default();
        (process.args, process.cwd) = (args, cwd);
        process.envs = envs.into_iter().collect();
        request.tag = tag;
        if let Some((cols, rows)) = size {
            request = terminal(request, cols, rows);
        }
        let options = user.map_or_else(CallOptions::default, |user| as_user(&user));
        match runtime.block_on(run_as(&client, request, options)) {
            Ok(seen) => prop_assert!(seen.end().exited || seen.end().exit_code == -1),
            Err(error) => prop_assert!(
                matches!(error.code, ErrorCode::InvalidArgument | ErrorCode::Unauthenticated),
                "{error:?}"
            ),
        }
        watched.is_well();
    });
    let list = runtime.block_on(client.list(ListRequest::default())).unwrap().into_owned();
    assert!(list.processes.is_empty(), "{list:?}");
    assert_eq!(zombies(watched.agent.pid()), 0);
}
