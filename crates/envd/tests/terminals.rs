//! Terminals, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use connectrpc::{ErrorCode, client::CallOptions};
use harness::{Agent, Running, as_user, by_pid, by_tag, command, keys, shell, stdin, terminal};
use wrenn_proto::process::{
    CloseStdinRequest, ConnectRequest, ConnectResponse, PTY, SendInputRequest, SendSignalRequest, Signal,
    UpdateRequest, pty,
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
    let size = pty::Size { cols: 132, rows: 50, ..Default::default() };
    let request = UpdateRequest {
        process: by_pid(running.seen.pid).into(),
        pty: PTY { size: size.into(), ..Default::default() }.into(),
        ..Default::default()
    };
    agent.processes().update(request).await.unwrap();
    assert!(running.finish().await.unwrap().screen().contains("50 132"));
}

#[tokio::test]
async fn input_is_never_dropped() {
    let agent = Agent::start();
    let mut running = open(&agent, "stty raw -echo; echo ready; head -c 300000 | md5sum").await;
    running.until(|seen| seen.screen().contains("ready")).await;
    let pid = running.seen.pid;
    let finish = tokio::spawn(running.finish());
    let bytes: Vec<u8> = (0..300_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    for piece in bytes.chunks(1000) {
        press(&agent, pid, piece).await;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bytes");
    std::fs::write(&file, &bytes).unwrap();
    let sum = harness::run(&agent.processes(), command(&["md5sum", file.to_str().unwrap()])).await;
    let sum = sum.text();
    let seen = finish.await.unwrap().unwrap();
    assert!(seen.screen().contains(sum.split(' ').next().unwrap()), "{}", seen.screen());
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
