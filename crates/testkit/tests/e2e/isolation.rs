//! What a sandbox can reach, with real packets. Everything outside is a namespace of the test, and every
//! address that must not answer is asked from there first.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use wrenn_testkit::uplink::{HOST_PUBLIC, INTERNET, METADATA, PORT, PRIVATE, PRIVATE_TEN};

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("isolation::the_internet_is_reached_and_nothing_else", reach),
        case("isolation::without_internet_nothing_is_reached", no_internet),
        case("isolation::by_name_only_allowed_names_are_reached", names),
        case("isolation::another_sandbox_is_not_reached", other_sandbox),
        case("isolation::the_guest_agent_asks_for_its_token", token),
    ]
}

/// Whether the guest gets an answer from there.
async fn reached(sandbox: &mut Sandbox, url: &str) -> Result<bool> {
    let line = format!("curl -s -m 2 -o /dev/null {url}");
    Ok(sandbox.shell(&line).await?["exit_code"] == 0)
}

async fn reach(context: Arc<Context>) -> Result<()> {
    let stack = context.stack();
    let mut sandbox = Sandbox::create(context.client()).await?;
    let control = SocketAddr::from((INTERNET, PORT));
    ensure!(stack.uplink().answers(control).await?, "the control answers");
    ensure!(reached(&mut sandbox, &format!("http://{INTERNET}/")).await?, "the internet is reached");
    for address in [PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC] {
        ensure!(stack.uplink().answers((address, PORT).into()).await?, "{address} answers as a control");
        ensure!(!reached(&mut sandbox, &format!("http://{address}/")).await?, "{address} is reached");
    }
    for url in ["http://169.254.0.22:49983/", "http://[fe80::1%25eth0]/", "http://[2606:4700::1111]/"] {
        ensure!(!reached(&mut sandbox, url).await?, "{url} is reached");
    }
    sandbox.destroy().await
}

async fn no_internet(context: Arc<Context>) -> Result<()> {
    let body = json!({ "allow_internet_access": false });
    let mut sandbox = Sandbox::create_with(context.client(), &body).await?;
    for address in [INTERNET, PRIVATE, METADATA, HOST_PUBLIC] {
        ensure!(!reached(&mut sandbox, &format!("http://{address}/")).await?, "{address} is reached");
    }
    sandbox.destroy().await
}

async fn names(context: Arc<Context>) -> Result<()> {
    let policy = json!({ "allow_domains": ["*.allowed.example"], "dns_servers": [INTERNET.to_string()] });
    let mut sandbox = Sandbox::create_with(context.client(), &json!({ "network": policy })).await?;
    let only_allowed = async |sandbox: &mut Sandbox| -> Result<()> {
        // The name first: until somebody has asked for it, its address is like any other.
        let said = sandbox.output("curl -sS -m 20 http://www.allowed.example/").await?;
        ensure!(said.contains("here"), "{said}");
        let elsewhere = format!("--resolve other.example:{PORT}:{INTERNET} http://other.example/");
        for url in ["http://other.example/", &format!("http://{INTERNET}/"), &elsewhere] {
            ensure!(!reached(sandbox, url).await?, "{url} is reached");
        }
        Ok(())
    };
    only_allowed(&mut sandbox).await?;
    for verb in ["/pause", "/resume"] {
        let path = sandbox.path(verb);
        sandbox.client.post(&path, &json!({})).await?.expect(200)?;
    }
    only_allowed(&mut sandbox).await?;
    let path = sandbox.path("/network");
    sandbox.client.put(&path, "{}").await?.expect(200)?;
    ensure!(reached(&mut sandbox, &format!("http://{INTERNET}/")).await?, "names do not matter any more");
    sandbox.client.put(&path, policy.to_string()).await?.expect(200)?;
    only_allowed(&mut sandbox).await?;
    sandbox.destroy().await
}

async fn other_sandbox(context: Arc<Context>) -> Result<()> {
    let stack = context.stack();
    let mut one = Sandbox::create(context.client()).await?;
    let mut other = Sandbox::create(context.client()).await?;
    let server = json!({ "cmd": "python3", "args": ["-m", "http.server", "8080"], "background": true });
    let path = other.path("/exec");
    other.client.post(&path, &server).await?.expect(202)?;
    let line = "for i in $(seq 100); do curl -s -o /dev/null http://127.0.0.1:8080/ && exit 0; sleep 0.1; done; exit 1";
    other.output(line).await?;
    // Every address by which anything of the stack's slots could be known outside.
    for veth in stack.uplink().veths().await? {
        let number: u32 = veth.trim_start_matches("wrenn-v-").parse()?;
        for address in [0x0a0b_0000 + number, 0x0a0c_0000 + 2 * number, 0x0a0c_0000 + 2 * number + 1] {
            let address = std::net::Ipv4Addr::from(address);
            for port in [8080, 49983] {
                let url = format!("http://{address}:{port}/health");
                ensure!(!reached(&mut one, &url).await?, "{url} is reached");
            }
        }
    }
    one.destroy().await?;
    other.destroy().await
}

async fn token(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let line = "curl -s -o /dev/null -w '%{http_code}' -X POST -H 'content-type: application/json' -d '{}' \
                http://127.0.0.1:49983";
    let code = sandbox.output(&format!("{line}/process.Process/List")).await?;
    ensure!(code.trim() == "401", "without the token it answers {code}");
    let record = context.stack().dir().join("agent/sandboxes").join(&sandbox.id).join("record.json");
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record)?)?;
    let token = record["access_token"].as_str().context("a token")?;
    let line = line.replace("-X POST", &format!("-X POST -H 'x-access-token: {token}'"));
    let code = sandbox.output(&format!("{line}/process.Process/List")).await?;
    ensure!(code.trim() == "200", "with the token it answers {code}");
    // What is for the host alone is refused to whoever is inside, whatever they know.
    for path in ["/init", "/snapshot/prepare", "/freeze", "/unfreeze", "/connect/1"] {
        let code = sandbox.output(&format!("{line}{path}")).await?;
        ensure!(code.trim() == "403", "{path} answers {code}");
    }
    sandbox.destroy().await
}
