//! Terminals, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use connectrpc::{ErrorCode, client::CallOptions};
use futures::{StreamExt, stream};
use harness::{Agent, Running, as_user, by_pid, by_tag, keys, observe::gone, shell, stdin, terminal};
use wrenn_proto::process::{
    __buffa::oneof::stream_input_request,
    CloseStdinRequest, ConnectRequest, ConnectResponse, ListRequest, PTY, SendInputRequest,
    SendSignalRequest, Signal, StreamInputRequest, UpdateRequest, pty,
    stream_input_request::{DataEvent, StartEvent},
};

async fn open(agent: &Agent, script: &str) -> Running {
    let request = terminal(shell(script), 80, 24);
    Running::start(&agent.processes(), request, CallOptions::default()).await.unwrap()
}

async fn press(agent: &Agent, pid: u32, bytes: &[u8]) {
    let request =
        SendInputRequest { process: by_pid(pid).into(), input: keys(bytes).into(), ..Default::default() };
    agent.processes().send_input(request).await.unwrap();
}

async fn resize(agent: &Agent, pid: u32, cols: u32, rows: u32) {
    let size = pty::Size { cols, rows, ..Default::default() };
    let request = UpdateRequest {
        process: by_pid(pid).into(),
        pty: PTY { size: size.into(), ..Default::default() }.into(),
        ..Default::default()
    };
    agent.processes().update(request).await.unwrap();
}

#[tokio::test]
async fn a_program_sees_a_terminal_of_its_own() {
    let agent = Agent::start();
    let script = "tty; stty size; echo $TERM; echo error >&2; ps -o tty= -p $$; stat -c %u:%a $(tty)";
    let seen = open(&agent, script).await.finish().await.unwrap();
    let screen = seen.screen();
    let lines: Vec<_> = screen.split("\r\n").collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{screen}");
    assert_eq!(lines[1..4], ["24 80", "xterm-256color", "error"]);
    assert_eq!(format!("/dev/{}", lines[4].trim()), lines[0], "it is the controlling one");
    assert_eq!(lines[5], "0:620");
    assert!(seen.stdout.is_empty() && seen.stderr.is_empty());
    assert_eq!(seen.end().exit_code, 0);
    let request = terminal(shell("stat -c %U $(tty)"), 80, 24);
    let seen = harness::run_as(&agent.processes(), request, as_user("nobody")).await.unwrap();
    assert_eq!(seen.screen(), "nobody\r\n");
}

#[tokio::test]
async fn the_size_changes_while_it_runs() {
    let agent = Agent::start();
    let script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.02; done";
    let mut running = open(&agent, script).await;
    running.until(|seen| seen.screen().contains("ready")).await;
    resize(&agent, running.seen.pid, 132, 50).await;
    assert!(running.finish().await.unwrap().screen().contains("50 132"));
}

/// A MiB in which every byte occurs, and in no short period.
fn noise() -> Vec<u8> {
    (0..1_u32 << 20).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

#[tokio::test]
async fn input_is_never_dropped_whatever_its_bytes() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut running = open(&agent, "stty raw -echo; echo ready; exec cat").await;
    running.until(|seen| seen.screen().contains("ready")).await;
    let pid = running.seen.pid;
    let bytes = noise();
    let event = |event| StreamInputRequest { event: Some(event), ..Default::default() };
    let start = StartEvent { process: by_pid(pid).into(), ..Default::default() };
    let pieces = bytes.chunks(50_000).flat_map(|piece| {
        let data = DataEvent { input: keys(piece).into(), ..Default::default() };
        let data = event(stream_input_request::Event::from(data));
        [data, event(stream_input_request::Event::Keepalive(Box::default()))]
    });
    let start = event(stream_input_request::Event::from(start));
    let requests: Vec<_> = [start].into_iter().chain(pieces).collect();
    let send = async {
        client.stream_input(stream::iter(requests)).await.unwrap();
        // The size changes while output flows, and not a byte of it goes astray.
        resize(&agent, pid, 132, 50).await;
    };
    let resizes = async {
        for turn in 1..100 {
            resize(&agent, pid, turn, turn).await;
        }
    };
    let greeting = running.seen.pty.len();
    let whole = greeting + bytes.len();
    let receive = running.until(|seen| seen.pty.len() >= whole);
    let (_, (), ()) = tokio::join!(receive, send, resizes);
    assert!(running.seen.pty[greeting..] == bytes);
    signal(&agent, pid).await;
    assert_eq!(running.finish().await.unwrap().end().status, "signal: killed");
}

async fn signal(agent: &Agent, pid: u32) {
    let signal = Signal::SIGNAL_SIGKILL.into();
    let request = SendSignalRequest { process: by_pid(pid).into(), signal, ..Default::default() };
    agent.processes().send_signal(request).await.unwrap();
}

#[tokio::test]
async fn many_terminals_at_once() {
    let agent = Agent::start();
    let talks = stream::iter(0..50_u32).map(|turn| {
        let agent = &agent;
        async move {
            let mut running = open(agent, "tty; read line; echo got $line; stty size").await;
            running.until(|seen| seen.screen().contains("\r\n")).await;
            let name = running.seen.screen();
            resize(agent, running.seen.pid, 100 + turn, 50).await;
            press(agent, running.seen.pid, format!("{turn}\r").as_bytes()).await;
            let screen = running.finish().await.unwrap().screen();
            assert!(screen.contains(&format!("got {turn}\r\n50 {}\r\n", 100 + turn)), "{screen}");
            name
        }
    });
    let names: Vec<_> = talks.buffer_unordered(50).collect().await;
    assert_eq!(names.len(), 50);
    let list = agent.processes().list(ListRequest::default()).await.unwrap().into_owned();
    assert!(list.processes.is_empty(), "{list:?}");
}

#[tokio::test]
async fn who_is_left_on_a_terminal_is_hung_up() {
    let agent = Agent::start();
    // One in the group of the terminal, and one that has left it but holds the terminal open.
    let script = "exec 3<&0; sleep 3000 & echo $!; setsid sh -c 'echo $$; cat <&3; exit 0' & wait";
    let mut running = open(&agent, script).await;
    running.until(|seen| seen.screen().lines().count() == 2 && seen.screen().ends_with('\n')).await;
    let screen = running.seen.screen();
    let left: Vec<u32> = screen.lines().map(|line| line.trim().parse().unwrap()).collect();
    signal(&agent, running.seen.pid).await;
    assert_eq!(running.finish().await.unwrap().end().status, "signal: killed");
    for pid in left {
        gone(pid).await;
    }
}

#[tokio::test]
async fn keys_make_signals() {
    let agent = Agent::start();
    let mut running = open(&agent, "echo ready; exec cat").await;
    running.until(|seen| seen.screen().contains("ready")).await;
    press(&agent, running.seen.pid, b"hello\r").await;
    running.until(|seen| seen.screen().matches("hello").count() == 2).await;
    press(&agent, running.seen.pid, b"\x03").await;
    assert_eq!(running.finish().await.unwrap().end().status, "signal: interrupt");
}

#[tokio::test]
async fn a_terminal_survives_its_client() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut request = terminal(shell("echo ready; read line; echo got $line"), 80, 24);
    request.tag = Some("term".to_owned());
    let mut running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    running.until(|seen| seen.screen().contains("ready")).await;
    let pid = running.seen.pid;
    drop(running);
    let request = ConnectRequest { process: by_tag("term").into(), ..Default::default() };
    let mut again = client.connect(request).await.unwrap();
    let mut seen = harness::Seen::default();
    let first = again.message::<ConnectResponse>().await.unwrap().unwrap();
    seen.take(first.to_owned_message().event.into_option().unwrap().event.unwrap());
    press(&agent, pid, b"this\r").await;
    while let Some(message) = again.message::<ConnectResponse>().await.unwrap() {
        seen.take(message.to_owned_message().event.into_option().unwrap().event.unwrap());
    }
    assert!(seen.screen().contains("got this"));
    assert!(!seen.screen().contains("ready"), "what was said before is not said again");
    assert_eq!(seen.end().exit_code, 0);
}

#[tokio::test]
async fn a_terminal_is_no_pipe() {
    let agent = Agent::start();
    let client = agent.processes();
    let running = open(&agent, "sleep 300").await;
    let process = || by_pid(running.seen.pid).into();
    let send = SendInputRequest { process: process(), input: stdin(b"x").into(), ..Default::default() };
    assert_eq!(client.send_input(send).await.unwrap_err().code, ErrorCode::InvalidArgument);
    let close = CloseStdinRequest { process: process(), ..Default::default() };
    assert_eq!(client.close_stdin(close).await.unwrap_err().code, ErrorCode::InvalidArgument);
    let signal =
        SendSignalRequest { process: process(), signal: Signal::SIGNAL_SIGKILL.into(), ..Default::default() };
    client.send_signal(signal).await.unwrap();
    assert_eq!(running.finish().await.unwrap().end().status, "signal: killed");
    let plain = Running::start(&client, shell("sleep 300"), CallOptions::default()).await.unwrap();
    let resize = UpdateRequest {
        process: by_pid(plain.seen.pid).into(),
        pty: PTY { size: pty::Size { cols: 1, rows: 1, ..Default::default() }.into(), ..Default::default() }
            .into(),
        ..Default::default()
    };
    assert_eq!(client.update(resize).await.unwrap_err().code, ErrorCode::InvalidArgument);
    let huge = terminal(shell("true"), 70_000, 1);
    let error = harness::run_as(&client, huge, CallOptions::default()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}
