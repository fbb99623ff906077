//! Many processes, many streams, much output: over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use connectrpc::client::{CallOptions, HttpClient};
use futures::{StreamExt, stream};
use harness::{
    Agent, Running, by_pid, by_tag, command,
    observe::{eventually, peak_memory, rounds, soaked, sockets, waits_for_room, written, zombies},
    run, shell, stdin,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use wrenn_proto::process::{
    CloseStdinRequest, ListRequest, ProcessClient, SendInputRequest, SendSignalRequest, Signal,
};

#[tokio::test]
async fn no_output_is_lost_however_fast_the_command_exits() {
    let agent = Agent::start();
    let client = agent.processes();
    let client = &client;
    let count = rounds(300, 10_000);
    let runs = stream::iter(0..count).map(|turn| async move {
        let text = format!("line {turn}");
        let seen = run(client, command(&["/bin/echo", &text])).await;
        assert_eq!(seen.text(), format!("{text}\n"));
        assert_eq!(seen.end().exit_code, 0);
    });
    runs.buffer_unordered(8).for_each(|()| async {}).await;
    let list = client.list(ListRequest::default()).await.unwrap().into_owned();
    assert!(list.processes.is_empty(), "{list:?}");
    assert_eq!(zombies(agent.pid()), 0);
    soaked("output of runs of echo", count, "each whole, each with its end");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_the_program_up() {
    const SIZE: usize = 100 << 20;
    let agent = Agent::start();
    let client = agent.processes();
    let request = command(&["/usr/bin/head", "-c", &SIZE.to_string(), "/dev/zero"]);
    let mut running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    let pid = running.seen.pid;
    // Nothing is read here until the program stands still, waiting for room.
    let mut before = u64::MAX;
    eventually(|| {
        let now = written(pid);
        let still = now == before && waits_for_room(pid);
        before = now;
        still
    })
    .await;
    assert!(before < 32 << 20, "only what sockets and pipes hold: {before}");
    let mut received = 0;
    while running.next().await.unwrap() {
        assert!(running.seen.stdout.iter().all(|byte| *byte == 0));
        received += std::mem::take(&mut running.seen.stdout).len();
    }
    assert_eq!(received, SIZE);
    assert_eq!(running.seen.end().exit_code, 0);
    let peak = peak_memory(agent.pid());
    assert!(peak < 48 << 20, "{peak}");
}

#[tokio::test]
async fn large_output_comes_whole_and_in_order() {
    let agent = Agent::start();
    let client = agent.processes();
    let seen = run(&client, shell("seq 1 400000; seq 1 1000 >&2")).await;
    let numbers = |upto: usize| (1..=upto).map(|number| format!("{number}\n")).collect::<String>();
    assert!(seen.text() == numbers(400_000));
    assert!(seen.stderr == numbers(1000).as_bytes());
}

#[tokio::test]
async fn many_processes_at_once() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let agent = Agent::start();
    let client = agent.processes();
    let client = &client;
    let count = rounds(200, 1000);
    let starts = stream::iter(0..count).map(|turn| async move {
        let mut request = command(&["/bin/sleep", "3000"]);
        request.tag = Some(format!("sleeper {turn}"));
        Running::start(client, request, CallOptions::default()).await.unwrap()
    });
    let running: Vec<_> = starts.buffer_unordered(16).collect().await;
    let list = client.list(ListRequest::default()).await.unwrap().into_owned();
    assert_eq!(list.processes.len(), count);
    let ends = stream::iter(0..count).map(|turn| async move {
        let process = by_tag(&format!("sleeper {turn}"));
        let signal = Signal::SIGNAL_SIGTERM.into();
        let request = SendSignalRequest { process: process.into(), signal, ..Default::default() };
        client.send_signal(request).await.unwrap();
    });
    ends.buffer_unordered(16).for_each(|()| async {}).await;
    for running in running {
        assert_eq!(running.finish().await.unwrap().end().status, "signal: terminated");
    }
    let list = client.list(ListRequest::default()).await.unwrap().into_owned();
    assert!(list.processes.is_empty(), "{list:?}");
    assert_eq!(zombies(agent.pid()), 0);
    soaked("processes at once", count, "all ended when told to");
}

#[tokio::test]
async fn a_hundred_streams_on_one_connection() {
    let agent = Agent::start();
    let client = ProcessClient::new(HttpClient::plaintext_http2_only(), agent.config());
    let client = &client;
    client.list(ListRequest::default()).await.unwrap();
    let before = sockets(agent.pid());
    let starts = stream::iter(0..100).map(|_| async move {
        let mut request = command(&["/bin/cat"]);
        request.stdin = Some(true);
        Running::start(client, request, CallOptions::default()).await.unwrap()
    });
    let running: Vec<_> = starts.buffer_unordered(100).collect().await;
    assert_eq!(sockets(agent.pid()), before, "it is one connection");
    // Larger than a pipe: each of them is held up in between, and none holds up another.
    let text = |pid: u32| format!("{pid} ").repeat(20_000);
    let talks = running.into_iter().map(|running| async move {
        let pid = running.seen.pid;
        let process = || by_pid(pid).into();
        let talk = async {
            let input = stdin(text(pid).as_bytes()).into();
            let request = SendInputRequest { process: process(), input, ..Default::default() };
            client.send_input(request).await.unwrap();
            let request = CloseStdinRequest { process: process(), ..Default::default() };
            client.close_stdin(request).await.unwrap();
        };
        let (seen, ()) = tokio::join!(running.finish(), talk);
        assert!(seen.unwrap().text() == text(pid));
    });
    stream::iter(talks).buffer_unordered(100).for_each(|()| async {}).await;
    assert_eq!(sockets(agent.pid()), before);
}

#[tokio::test]
async fn a_stalled_stream_does_not_hold_up_the_others_of_its_connection() {
    let agent = Agent::start();
    let client = ProcessClient::new(HttpClient::plaintext_http2_only(), agent.config());
    let stalled = Running::start(&client, command(&["/usr/bin/yes"]), CallOptions::default()).await.unwrap();
    eventually(|| waits_for_room(stalled.seen.pid)).await;
    for turn in 0..20 {
        let text = turn.to_string();
        assert_eq!(run(&client, command(&["/bin/echo", &text])).await.text(), format!("{text}\n"));
    }
    // The client goes away; the program does not, and is no longer held up.
    let pid = stalled.seen.pid;
    drop(stalled);
    let before = written(pid);
    eventually(|| written(pid) > before + (16 << 20)).await;
    let signal = Signal::SIGNAL_SIGKILL.into();
    let request = SendSignalRequest { process: by_pid(pid).into(), signal, ..Default::default() };
    client.send_signal(request).await.unwrap();
    harness::observe::gone(pid).await;
}
