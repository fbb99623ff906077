//! The process service, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{collections::HashMap, time::Duration};

use connectrpc::{ErrorCode, client::CallOptions};
use futures::stream;
use harness::{
    Agent, Running, as_user, by_pid, by_tag, command,
    observe::{eventually, gone, runs},
    run, run_as, shell, stdin,
};
use wrenn_proto::process::{
    __buffa::oneof::stream_input_request,
    CloseStdinRequest, ConnectRequest, ConnectResponse, ListRequest, SendInputRequest, SendSignalRequest,
    Signal, StreamInputRequest,
    stream_input_request::{DataEvent, StartEvent},
};

#[tokio::test]
async fn output_that_is_no_text_is_not_touched() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut request = shell(r"printf '\377\000\303'; read line; printf '\251'");
    request.stdin = Some(true);
    let mut running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    // A letter comes in two pieces.
    running.until(|seen| seen.stdout == [0xff, 0x00, 0xc3]).await;
    let input = stdin(b"\n").into();
    let request = SendInputRequest { process: by_pid(running.seen.pid).into(), input, ..Default::default() };
    client.send_input(request).await.unwrap();
    assert_eq!(running.finish().await.unwrap().stdout, [0xff, 0x00, 0xc3, 0xa9]);
}

#[tokio::test]
async fn every_way_to_end() {
    let agent = Agent::start();
    let client = agent.processes();
    let table = [
        ("exit 0", 0, true, "exit status 0", false),
        ("exit 7", 7, true, "exit status 7", true),
        ("kill -KILL $$", -1, false, "signal: killed", true),
        ("kill -TERM $$", -1, false, "signal: terminated", true),
        ("kill -PIPE $$", -1, false, "signal: broken pipe", true),
    ];
    for (script, code, exited, status, error) in table {
        let seen = run(&client, shell(script)).await;
        let end = seen.end();
        assert_eq!((end.exit_code, end.exited, end.status.as_str()), (code, exited, status), "{script}");
        assert_eq!(end.error.as_deref(), error.then_some(status), "{script}");
    }
}

#[tokio::test]
async fn a_grandchild_that_keeps_the_output_open_does_not_delay_the_end() {
    let agent = Agent::start();
    let client = agent.processes();
    let start = std::time::Instant::now();
    let seen = run(&client, shell("sleep 300 & echo $!; head -c 50000 /dev/zero")).await;
    assert!(start.elapsed() < Duration::from_secs(20));
    let (pid, zeros) = seen.stdout.split_at(seen.stdout.len() - 50_000);
    assert!(zeros.iter().all(|byte| *byte == 0));
    let pid: u32 = std::str::from_utf8(pid).unwrap().trim().parse().unwrap();
    assert!(runs(pid), "it was left in the background and goes on");

    // One that never stops writing ends neither the stream late nor itself by a broken pipe.
    let seen = run(&client, shell("yes & echo pid $!")).await;
    let noisy = seen.text();
    let noisy = noisy.lines().find_map(|line| line.strip_prefix("pid ")).unwrap().parse().unwrap();
    assert_eq!(seen.end().exit_code, 0);
    assert!(runs(noisy));
    run(&client, shell(&format!("kill -KILL {pid} {noisy}"))).await;
    gone(pid).await;
    gone(noisy).await;
}

#[tokio::test]
async fn a_time_limit_kills_the_whole_group() {
    let agent = Agent::start();
    let client = agent.processes();
    // The agent's own clock, not the client's.
    let options = CallOptions::default().with_header("connect-timeout-ms", "700");
    let script = "sleep 300 & echo $!; sleep 300";
    let mut running = Running::start(&client, shell(script), options).await.unwrap();
    running.until(|seen| seen.stdout.ends_with(b"\n")).await;
    let child: u32 = running.seen.text().trim().parse().unwrap();
    let leader = running.seen.pid;
    let error = running.finish().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error:?}");
    assert_eq!(error.message.as_deref(), Some("the time limit of this command has passed"));
    gone(leader).await;
    gone(child).await;
}

#[tokio::test]
async fn a_time_limit_of_nothing_is_none() {
    let agent = Agent::start();
    for limit in ["0", "-1"] {
        let options = CallOptions::default().with_header("connect-timeout-ms", limit);
        let seen = run_as(&agent.processes(), command(&["/bin/echo", "done"]), options).await.unwrap();
        assert_eq!(seen.text(), "done\n");
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_neither_its_process_nor_its_time_limit() {
    let agent = Agent::start();
    let client = agent.processes();
    let running =
        Running::start(&client, shell("seq 1 1000000; sleep 300"), CallOptions::default()).await.unwrap();
    let free = running.seen.pid;
    drop(running);
    let options = CallOptions::default().with_timeout(Duration::from_millis(500));
    let running = Running::start(&client, shell("sleep 300"), options).await.unwrap();
    let limited = running.seen.pid;
    drop(running);
    gone(limited).await;
    assert!(runs(free));
    signal(&agent, free, Signal::SIGNAL_SIGKILL).await.unwrap();
    gone(free).await;
}

async fn signal(agent: &Agent, pid: u32, signal: Signal) -> Result<(), connectrpc::ConnectError> {
    let request =
        SendSignalRequest { process: by_pid(pid).into(), signal: signal.into(), ..Default::default() };
    agent.processes().send_signal(request).await.map(|_| ())
}

#[tokio::test]
async fn signals_reach_the_group() {
    let agent = Agent::start();
    let client = agent.processes();
    let script = "trap 'echo bye; exit 3' TERM; sh -c 'echo $$; exec sleep 300' & wait";
    let mut running = Running::start(&client, shell(script), CallOptions::default()).await.unwrap();
    running.until(|seen| seen.stdout.ends_with(b"\n")).await;
    let child: u32 = running.seen.text().trim().parse().unwrap();
    let pid = running.seen.pid;
    signal(&agent, pid, Signal::SIGNAL_SIGTERM).await.unwrap();
    let seen = running.finish().await.unwrap();
    assert!(seen.text().ends_with("bye\n"));
    assert_eq!(seen.end().exit_code, 3);
    gone(child).await;
    let error = signal(&agent, pid, Signal::SIGNAL_SIGTERM).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(error.message.as_deref(), Some(format!("process with pid {pid} not found").as_str()));
}

#[tokio::test]
async fn what_was_killed_is_gone_when_the_answer_comes() {
    let agent = Agent::start();
    let client = agent.processes();
    for _ in 0..20 {
        let sleep = command(&["/bin/sleep", "300"]);
        let running = Running::start(&client, sleep, CallOptions::default()).await.unwrap();
        signal(&agent, running.seen.pid, Signal::SIGNAL_SIGKILL).await.unwrap();
        // Not even a zombie, to which `kill -0` would say that it is there.
        assert!(!std::fs::exists(format!("/proc/{}", running.seen.pid)).unwrap());
        let error = signal(&agent, running.seen.pid, Signal::SIGNAL_SIGKILL).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
    }
}

#[tokio::test]
async fn standard_input() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut request = command(&["/bin/cat"]);
    request.stdin = None;
    request.tag = Some("cat".to_owned());
    let running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    let send = async |bytes: &[u8]| {
        let request = SendInputRequest {
            process: by_tag("cat").into(),
            input: stdin(bytes).into(),
            ..Default::default()
        };
        client.send_input(request).await.map(|_| ())
    };
    send(b"one ").await.unwrap();
    let large = vec![b'x'; 1 << 20];
    let event = |event| StreamInputRequest { event: Some(event), ..Default::default() };
    let start = StartEvent { process: by_tag("cat").into(), ..Default::default() };
    let data = DataEvent { input: stdin(&large).into(), ..Default::default() };
    let requests = vec![
        event(stream_input_request::Event::from(start)),
        event(stream_input_request::Event::from(data)),
        event(stream_input_request::Event::Keepalive(Box::default())),
    ];
    let finish = tokio::spawn(running.finish());
    client.stream_input(stream::iter(requests)).await.unwrap();
    send(b" three").await.unwrap();
    let close = CloseStdinRequest { process: by_tag("cat").into(), ..Default::default() };
    client.close_stdin(close).await.unwrap();
    let seen = finish.await.unwrap().unwrap();
    assert_eq!(seen.end().exit_code, 0);
    assert!(seen.stdout == [b"one ".as_slice(), &large, b" three"].concat());

    // From nowhere: the end is there at once, and there is nothing to write to.
    assert_eq!(run(&client, command(&["/bin/cat"])).await.text(), "");
    let running = Running::start(&client, shell("sleep 300"), CallOptions::default()).await.unwrap();
    let request = SendInputRequest {
        process: by_pid(running.seen.pid).into(),
        input: stdin(b"x").into(),
        ..Default::default()
    };
    let error = client.send_input(request).await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_deref()),
        (ErrorCode::Internal, Some("stdin not enabled or closed"))
    );
    signal(&agent, running.seen.pid, Signal::SIGNAL_SIGKILL).await.unwrap();
}

#[tokio::test]
async fn input_that_nobody_reads_does_not_outlive_the_process() {
    let agent = Agent::start();
    let client = agent.processes();
    // The grandchild holds the pipe open and reads nothing.
    let mut request = shell("exec 3<&0; sleep 300 <&3 & echo $!; exec sleep 300");
    request.stdin = Some(true);
    let mut running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    running.until(|seen| seen.stdout.ends_with(b"\n")).await;
    let child: u32 = running.seen.text().trim().parse().unwrap();
    let pid = running.seen.pid;
    let request = SendInputRequest {
        process: by_pid(pid).into(),
        input: stdin(&vec![0; 1 << 20]).into(),
        ..Default::default()
    };
    let end = async {
        let pipe = std::fs::File::open(format!("/proc/{pid}/fd/0")).unwrap();
        eventually(|| rustix::io::ioctl_fionread(&pipe).unwrap() >= 65_536).await;
        let leader = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        // The leader alone, and not its group.
        rustix::process::kill_process(leader, rustix::process::Signal::TERM).unwrap();
    };
    let (sent, seen, ()) = tokio::join!(client.send_input(request), running.finish(), end);
    assert_eq!(sent.unwrap_err().code, ErrorCode::Internal);
    assert_eq!(seen.unwrap().end().status, "signal: terminated");
    run(&client, shell(&format!("kill {child}"))).await;
}

#[tokio::test]
async fn connecting_while_it_runs_and_after_its_end() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut request = shell("read line; echo got $line; exit 5");
    request.stdin = Some(true);
    request.tag = Some("job".to_owned());
    let running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    let pid = running.seen.pid;
    let connect = async || {
        let request = ConnectRequest { process: by_tag("job").into(), ..Default::default() };
        client.connect(request).await.unwrap()
    };
    let mut second = connect().await;
    let mut seen = harness::Seen::default();
    let first = second.message::<ConnectResponse>().await.unwrap().unwrap();
    seen.take(first.to_owned_message().event.into_option().unwrap().event.unwrap());
    let input = SendInputRequest {
        process: by_pid(pid).into(),
        input: stdin(b"this\n").into(),
        ..Default::default()
    };
    client.send_input(input).await.unwrap();
    while let Some(message) = second.message::<ConnectResponse>().await.unwrap() {
        seen.take(message.to_owned_message().event.into_option().unwrap().event.unwrap());
    }
    assert_eq!((seen.pid, seen.text().as_str(), seen.end().exit_code), (pid, "got this\n", 5));
    assert_eq!(running.finish().await.unwrap().text(), "got this\n");

    let mut late = connect().await;
    let mut seen = harness::Seen::default();
    while let Some(message) = late.message::<ConnectResponse>().await.unwrap() {
        seen.take(message.to_owned_message().event.into_option().unwrap().event.unwrap());
    }
    assert_eq!((seen.pid, seen.text().as_str(), seen.end().exit_code), (pid, "", 5));
}

#[tokio::test]
async fn the_list_tells_what_runs() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut request = command(&["/bin/sleep", "300"]);
    request.tag = Some("sleeper".to_owned());
    let running = Running::start(&client, request, CallOptions::default()).await.unwrap();
    let list = client.list(ListRequest::default()).await.unwrap().into_owned();
    assert_eq!(list.processes.len(), 1);
    assert_eq!(list.processes[0].pid, running.seen.pid);
    assert_eq!(list.processes[0].tag.as_deref(), Some("sleeper"));
    assert_eq!(list.processes[0].config.as_option().unwrap().args, ["300"]);
    signal(&agent, running.seen.pid, Signal::SIGNAL_SIGKILL).await.unwrap();
    assert_eq!(running.finish().await.unwrap().end().status, "signal: killed");
}

#[tokio::test]
async fn a_quiet_process_keeps_its_stream_alive() {
    let agent = Agent::start();
    let client = agent.processes();
    let options = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let mut request = shell("read line; echo done");
    request.stdin = Some(true);
    let start = std::time::Instant::now();
    let mut running = Running::start(&client, request, options).await.unwrap();
    running.until(|seen| seen.keepalives == 2).await;
    assert!(start.elapsed() >= Duration::from_secs(2), "not more often than asked for");
    let input = stdin(b"\n").into();
    let request = SendInputRequest { process: by_pid(running.seen.pid).into(), input, ..Default::default() };
    client.send_input(request).await.unwrap();
    assert_eq!(running.finish().await.unwrap().text(), "done\n");
}

#[tokio::test]
async fn the_environment_has_layers() {
    let agent = Agent::start();
    let body = r#"{"envVars":{"GLOBAL":"from init","BOTH":"from init"},"defaultUser":"root"}"#;
    assert_eq!(agent.send(http::Request::post("/init"), body).await.status, 204);
    let client = agent.processes();
    let mut request = shell("echo $GLOBAL, $BOTH, $HOME, $USER, $LOGNAME, $PWD; umask");
    request.process.get_or_insert_default().envs =
        HashMap::from([("BOTH".to_owned(), "from the request".to_owned())]).into_iter().collect();
    let seen = run(&client, request).await;
    assert_eq!(seen.text(), "from init, from the request, /root, root, root, /root\n0022\n");
    let again = run(&client, shell("echo $BOTH")).await;
    assert_eq!(again.text(), "from init\n", "what one command was given does not leak into the next");
}

#[tokio::test]
async fn programs_run_as_the_user_that_is_named() {
    let agent = Agent::start();
    let script =
        "id -un; id -gn; echo $HOME $USER; grep CapEff /proc/self/status; cat /proc/self/oom_score_adj";
    let seen = run_as(&agent.processes(), shell(script), as_user("nobody")).await.unwrap();
    assert_eq!(seen.text(), "nobody\nnogroup\n/nonexistent nobody\nCapEff:\t0000000000000000\n100\n");
    let seen = run_as(&agent.processes(), shell("id -G; pwd"), as_user("nobody")).await.unwrap();
    assert_eq!(seen.text(), "65534\n/\n", "no group of the agent is kept");
}
