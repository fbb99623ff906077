//! An agent that is killed is followed by one that knows who the guest is.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod harness;

use std::{
    fs::File,
    process::{Command, Stdio},
};

use harness::Agent;
use http::Request;

fn start(file: &File) -> Agent {
    let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--handover"])
        .stdin(file.try_clone().unwrap())
        .stderr(Stdio::inherit());
    Agent::start_command(command)
}

#[tokio::test]
async fn the_next_agent_has_the_token_and_the_environment() {
    let file = tempfile::tempfile().unwrap();
    let agent = start(&file);
    let body = r#"{"accessToken":"secret","envVars":{"FROM":"the host"},"defaultUser":"root"}"#;
    assert_eq!(agent.send(Request::post("/init"), body).await.status, 204);
    let first = agent.pid();
    // Dropping it kills it, as a bug or a lack of memory would.
    drop(agent);

    let agent = start(&file);
    assert_ne!(agent.pid(), first);
    assert_eq!(agent.get("/envs").await.status, 401);
    let known = agent.send(Request::get("/envs").header("x-access-token", "secret"), "").await;
    assert_eq!(known.status, 200);
    assert_eq!(known.json()["FROM"], "the host");
}
