//! Any verbs in any order by many callers at once, with a host that fails now and then and pauses by itself, and a
//! control plane that dies in the middle: in the end everything is where its host says, and can be deleted.

use std::sync::atomic::{AtomicUsize, Ordering};

use connectrpc::ConnectError;
use http::{Method, StatusCode};
use serde_json::json;
use wrenn_proto::hostagent::v1::SandboxState as Host;

use super::support::{
    World,
    client::{Client, full},
    eventually,
};

/// Numbers without a pattern, the same ones for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Sandboxes that come and go while it storms.
#[derive(Default)]
struct Others(std::sync::Mutex<Vec<String>>);

impl Others {
    /// So many at most: each is a process of its own.
    const MOST: usize = 5;

    fn add(&self, answer: &serde_json::Value) {
        let children = answer.as_array().into_iter().flatten();
        let made = children.chain([answer]).filter_map(|one| one["id"].as_str());
        self.0.lock().unwrap().extend(made.map(ToOwned::to_owned));
    }

    fn is_full(&self) -> bool {
        self.0.lock().unwrap().len() >= Self::MOST
    }

    /// One of them, for a verb like any other.
    fn choose(&self, dice: &mut Dice) -> Option<String> {
        let others = self.0.lock().unwrap();
        let sides = u64::try_from(others.len()).unwrap();
        (sides > 0).then(|| others[usize::try_from(dice.roll(sides)).unwrap()].clone())
    }

    /// One of them, to be deleted.
    fn take(&self) -> Option<String> {
        self.0.lock().unwrap().pop()
    }
}

/// One verb of one caller. What it answers must be one of the answers that there are, and what it must not be is
/// a failure of the server itself.
async fn one_call(
    client: &Client,
    id: &str,
    others: &Others,
    dice: &mut Dice,
) -> Option<(String, StatusCode, String)> {
    let name = format!("name-{}", dice.roll(3));
    let chosen = if dice.roll(4) == 0 { others.choose(dice) } else { None };
    let id = chosen.as_deref().unwrap_or(id);
    let base = format!("/v1/sandboxes/{id}");
    let (method, path, body) = match dice.roll(14) {
        10 | 11 if !others.is_full() => {
            let template = if dice.roll(2) == 0 { "base".to_owned() } else { name };
            (Method::POST, "/v1/sandboxes".to_owned(), json!({ "template": template }))
        }
        12 if !others.is_full() => (Method::POST, format!("{base}/fork"), json!({ "count": 2 })),
        10..=13 => {
            let id = others.take().unwrap_or_else(|| "sb-00000000".to_owned());
            (Method::DELETE, format!("/v1/sandboxes/{id}"), json!({}))
        }
        0 | 1 => (Method::POST, format!("{base}/pause"), json!({ "memory": dice.roll(2) == 0 })),
        2 | 3 => (Method::POST, format!("{base}/resume"), json!({})),
        4 => {
            let path = format!("/v1/snapshots?overwrite={}", dice.roll(2) == 0);
            (Method::POST, path, json!({ "sandbox_id": id, "name": name }))
        }
        5 => (Method::POST, format!("{base}/rollback"), json!({ "snapshot": name })),
        6 => (
            Method::PUT,
            format!("{base}/network"),
            json!({ "deny_cidrs": [format!("203.0.113.{}", dice.roll(9))] }),
        ),
        7 => (Method::PATCH, format!("{base}/timeout"), json!({ "timeout_sec": dice.roll(900) })),
        8 => (Method::POST, format!("{base}/exec"), json!({ "cmd": "true" })),
        _ => (Method::DELETE, format!("/v1/snapshots/{name}"), json!({})),
    };
    let request = client.request(method.clone(), &path).body(full(body.to_string())).unwrap();
    // The server may be killed on the way.
    let response = client.try_send(request).await.ok()?;
    let status = response.status();
    let text = http_body_util::BodyExt::collect(response.into_body()).await.ok()?.to_bytes();
    if path == "/v1/sandboxes" || path.ends_with("/fork") {
        others.add(&serde_json::from_slice(&text).unwrap_or_default());
    }
    Some((format!("{method} {path}"), status, String::from_utf8_lossy(&text).into_owned()))
}

async fn chaos(world: &World, ids: &[String], dice: &mut Dice) {
    let error = (dice.roll(3) == 0).then(|| ConnectError::internal("it failed on the host"));
    let which = dice.roll(5);
    world.agent.faults(|faults| match which {
        0 => faults.pause = error,
        1 => faults.resume = error,
        2 => faults.snapshot = error,
        3 => faults.update = error,
        _ => faults.delete_snapshot = error,
    });
    let id = &ids[usize::try_from(dice.roll(ids.len() as u64)).unwrap()];
    if dice.roll(2) == 0 && world.agent.state(id) == Some(Host::SANDBOX_STATE_RUNNING) {
        world.agent.pause_if_running(id);
    }
    tokio::time::sleep(std::time::Duration::from_millis(15)).await;
}

/// A few storms, or many where a test stands for a longer run.
#[allow(clippy::print_stdout, reason = "what a longer run has shown is read from its output")]
async fn storms(sample: u64, kills: bool) {
    let soak = std::env::var_os("WRENN_SOAK").is_some();
    let count = if soak { 40 } else { sample };
    for seed in 1..=count {
        storm(seed, kills).await;
    }
    if soak {
        let kills = if kills { " and deaths of the control plane" } else { "" };
        println!(
            "soak: verbs in any order{kills}, {count}, seeds 1 to {count}, each ended where its host says"
        );
    }
}

async fn storm(seed: u64, kills: bool) {
    let mut world = World::new().await;
    let ids = [world.sandbox().await, world.sandbox().await];
    let others = Others::default();
    for round in 0..if kills { 2 } else { 1 } {
        let left = AtomicUsize::new(6);
        let callers = (0..6_u64).map(|caller| {
            let (client, ids, others, left) = (world.client.clone(), &ids, &others, &left);
            async move {
                let mut dice = Dice(seed.wrapping_mul(977).wrapping_add(caller * 31 + round * 7 + 1));
                for _ in 0..12 {
                    let id = &ids[usize::try_from(dice.roll(2)).unwrap()];
                    let Some((call, status, text)) = one_call(&client, id, others, &mut dice).await else {
                        break;
                    };
                    let known = [200, 201, 202, 204, 404, 409, 502, 503];
                    assert!(known.contains(&status.as_u16()), "seed {seed}: {call}: {status} {text}");
                }
                left.fetch_sub(1, Ordering::Relaxed);
            }
        });
        let trouble = async {
            let mut dice = Dice(seed + round + 1);
            while left.load(Ordering::Relaxed) > 0 {
                chaos(&world, &ids, &mut dice).await;
            }
        };
        if kills {
            // It dies while they are at it.
            let bound = std::time::Duration::from_millis(400 + seed % 500);
            let all = async { tokio::join!(futures::future::join_all(callers), trouble) };
            let _ = tokio::time::timeout(bound, all).await;
            world.kill_and_start().await;
        } else {
            tokio::join!(futures::future::join_all(callers), trouble);
        }
    }
    world.agent.faults(|faults| *faults = super::support::agent::Faults::default());

    for id in &ids {
        eventually(&format!("seed {seed}: {id} is where its host says"), async || {
            let row = world.client.get(&format!("/v1/sandboxes/{id}")).await.json();
            match world.agent.state(id) {
                Some(Host::SANDBOX_STATE_RUNNING) => row["status"] == "running",
                Some(Host::SANDBOX_STATE_PAUSED) => row["status"] == "paused",
                _ => false,
            }
        })
        .await;
        let network = world.client.get(&format!("/v1/sandboxes/{id}/network")).await.json();
        eventually(&format!("seed {seed}: what is in force is what {id} says"), async || {
            let told = world.agent.updates().into_iter().rfind(|update| update.sandbox_id == *id);
            told.is_none_or(|told| {
                json!(told.network.as_option().unwrap().deny_cidrs) == network["deny_cidrs"]
            })
        })
        .await;
        let resumed = world.client.post(&format!("/v1/sandboxes/{id}/resume"), json!({})).await;
        assert_eq!(resumed.status, 200, "seed {seed}: {}", resumed.text());
        assert_eq!(world.client.shell(id, "echo here").await.json()["stdout"], "here\n");
    }
    // Those that came and did not go are where their host says, and it has no others.
    let listed = async || {
        let listed = world.client.get("/v1/sandboxes").await.json();
        let of = |row: &serde_json::Value| (row["id"].as_str().unwrap().to_owned(), row["status"].clone());
        listed.as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    eventually(&format!("seed {seed}: all are where their host says"), async || {
        let listed = listed().await;
        let is_so = |(id, status): &(String, serde_json::Value)| match world.agent.state(id) {
            Some(Host::SANDBOX_STATE_RUNNING) => status == "running",
            Some(Host::SANDBOX_STATE_PAUSED) => status == "paused",
            _ => false,
        };
        listed.iter().all(is_so) && listed.len() == world.agent.sandboxes().len()
    })
    .await;
    for (id, _) in listed().await {
        assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    }
    assert!(world.agent.sandboxes().is_empty());
    if !kills {
        // With a control plane that died, what it was making goes only after the bound of its making.
        eventually(&format!("seed {seed}: every snapshot has a name"), async || {
            let listed = world.client.get("/v1/snapshots?type=snapshot").await.json();
            let mut listed: Vec<String> =
                listed.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect();
            listed.sort();
            listed == world.agent.snapshots()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_verbs_in_any_order() {
    storms(2, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_verbs_and_a_control_plane_that_dies() {
    storms(1, true).await;
}
