//! What sandboxes may reach and when their time is over.

use connectrpc::ConnectError;
use http::Method;
use serde_json::{Value, json};
use wrenn_proto::hostagent::v1::TimeoutAction;

use super::support::{
    World,
    agent::QUIET,
    client::{Answer, full},
    eventually,
};

async fn send(world: &World, method: Method, path: &str, body: &Value) -> Answer {
    let request = world.client.request(method, path).body(full(body.to_string())).unwrap();
    world.client.whole(request).await
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, code: &str, names: &str) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{}", answer.text());
    assert!(answer.text().contains(names), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_says_it_all() {
    let world = World::new().await;
    let body = json!({
        "timeout_sec": 60, "on_timeout": "kill", "deadline": "2100-01-01T00:00:00Z", "deadline_action": "kill",
        "auto_resume": true, "allow_internet_access": true,
        "network": {
            "allow_cidrs": ["203.0.113.0/24"], "deny_cidrs": ["203.0.113.9"], "allow_domains": ["*.Example.com"],
            "deny_domains": ["bad.example.com"], "dns_servers": ["9.9.9.9"], "egress_mbps": 5,
        },
    });
    let created = world.client.post("/v1/sandboxes", body).await;
    assert_eq!(created.status, 201, "{}", created.text());
    let created = created.json();
    for (field, value) in [
        ("on_timeout", json!("kill")),
        ("deadline", json!("2100-01-01T00:00:00Z")),
        ("deadline_action", json!("kill")),
        ("auto_resume", json!(true)),
    ] {
        assert_eq!(created[field], value, "{field}");
    }
    let asked = world.agent.creates().pop().unwrap();
    assert_eq!(asked.on_timeout, TimeoutAction::TIMEOUT_ACTION_KILL);
    let deadline = asked.deadline.as_option().unwrap();
    assert_eq!(
        (deadline.at_ms, deadline.action.as_known()),
        (4_102_444_800_000, Some(TimeoutAction::TIMEOUT_ACTION_KILL))
    );
    let network = asked.network.as_option().unwrap();
    assert!(network.internet);
    assert_eq!(network.allow_cidrs, ["203.0.113.0/24"]);
    assert_eq!(network.deny_cidrs, ["203.0.113.9/32"]);
    assert_eq!(network.allow_domains, ["*.example.com"]);
    assert_eq!(network.deny_domains, ["bad.example.com"]);
    assert_eq!(network.dns_servers, ["9.9.9.9"]);
    assert_eq!((network.egress_bits_per_second, network.ingress_bits_per_second), (5_000_000, 0));

    // Without a word about it, what has been idle for long is kept.
    let plain = world.client.post("/v1/sandboxes", json!({"timeout_sec": 60})).await.json();
    assert_eq!((&plain["on_timeout"], &plain["deadline"]), (&json!("pause"), &Value::Null));
    let asked = world.agent.creates().pop().unwrap();
    assert_eq!(asked.on_timeout, TimeoutAction::TIMEOUT_ACTION_PAUSE);
    assert_eq!(asked.deadline.as_option().map(|deadline| deadline.at_ms), Some(0));

    for (body, names) in [
        (json!({"on_timeout": "explode"}), "on_timeout"),
        (json!({"deadline": "tomorrow"}), "deadline"),
        (json!({"deadline": "2001-01-01T00:00:00Z"}), "passed"),
        (json!({"deadline_action": "kill"}), "deadline"),
        (json!({"network": {"allow_cidrs": ["10.0.0.1/8"]}}), "allow_cidrs"),
        (json!({"network": {"allow_domains": ["1.2.3.4"]}}), "allow_domains"),
        (json!({"network": {"dns_servers": ["::1"]}}), "dns_servers"),
        (json!({"network": {"egress_mbps": -1}}), "egress_mbps"),
        (json!({"network": {"allow_internet_access": false}, "allow_internet_access": true}), "contradict"),
        (json!({"network": "all"}), "network"),
    ] {
        let answer = world.client.post("/v1/sandboxes", body).await;
        assert_refused(&answer, 400, "invalid_request", names);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_change_while_it_runs_and_while_it_is_paused() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let (network, timeout) = (format!("/v1/sandboxes/{id}/network"), format!("/v1/sandboxes/{id}/timeout"));
    let shown = world.client.get(&network).await.json();
    assert_eq!((&shown["allow_internet_access"], &shown["allow_cidrs"]), (&json!(true), &json!([])));

    let answer = send(&world, Method::PUT, &network, &json!({"deny_cidrs": ["203.0.113.0/24"]})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["deny_cidrs"]), (200, &json!(["203.0.113.0/24"])));
    assert_eq!(world.client.get(&network).await.json(), answer.json());
    let told = world.agent.updates().pop().unwrap();
    assert_eq!(told.network.as_option().unwrap().deny_cidrs, ["203.0.113.0/24"]);
    assert_eq!(told.generation, 2);

    assert_eq!(world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await.status, 200);
    let body = json!({"timeout_sec": 90, "on_timeout": "kill", "deadline": "2100-01-01T00:00:00Z"});
    let answer = send(&world, Method::PATCH, &timeout, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let changed = answer.json();
    assert_eq!((&changed["status"], &changed["timeout_sec"]), (&json!("paused"), &json!(90)));
    assert_eq!((&changed["on_timeout"], &changed["deadline_action"]), (&json!("kill"), &json!("pause")));
    let told = world.agent.updates().pop().unwrap();
    assert_eq!(
        (told.timeout_seconds, told.deadline.as_option().unwrap().at_ms),
        (Some(90), 4_102_444_800_000)
    );
    assert_eq!(told.network.as_option().unwrap().deny_cidrs, ["203.0.113.0/24"], "a host is told everything");
    // What is left out stays, and a deadline can be taken away.
    let answer =
        send(&world, Method::PATCH, &timeout, &json!({"deadline": "never", "auto_resume": true})).await;
    let changed = answer.json();
    assert_eq!((&changed["timeout_sec"], &changed["deadline"]), (&json!(90), &Value::Null));
    // Now a request brings it back.
    assert_eq!(world.client.shell(&id, "echo awake").await.json()["stdout"], "awake\n");

    let answer = send(&world, Method::PUT, &network, &json!({"allow_internet_access": false})).await;
    assert_eq!(answer.json()["deny_cidrs"], json!([]), "what is left out gets its default");
    assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["allow_internet_access"], false);
    for (method, path, body) in [
        (Method::PUT, &network, json!({"allow_cidrs": ["x"]})),
        (Method::PATCH, &timeout, json!({"timeout_sec": -1})),
        (Method::PATCH, &timeout, json!({"deadline": "x"})),
    ] {
        assert_refused(&send(&world, method, path, &body).await, 400, "invalid_request", "");
    }
    assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    let answer = send(&world, Method::PUT, &network, &json!({})).await;
    assert_refused(&answer, 409, "invalid_state", "stopped");
    let answer = send(&world, Method::PUT, "/v1/sandboxes/sb-00000000/network", &json!({})).await;
    assert_refused(&answer, 404, "not_found", "sb-00000000");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_not_told_is_told_later() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let network = format!("/v1/sandboxes/{id}/network");
    let closed = json!({"allow_internet_access": false});

    // Refused: nothing has changed, and the row says so.
    world.agent.faults(|faults| faults.update = Some(ConnectError::internal("nft failed")));
    assert_refused(&send(&world, Method::PUT, &network, &closed).await, 502, "agent_error", "nft failed");
    assert_eq!(world.client.get(&network).await.json()["allow_internet_access"], true);
    // Whatever it has made of it, it is told again what is so.
    world.agent.faults(|faults| faults.update = None);
    let told = world.agent.updates().len();
    eventually("the host is told", async || world.agent.updates().len() > told).await;
    assert!(world.agent.updates().pop().unwrap().network.as_option().unwrap().internet);

    // A control plane that dies before it has told: what was asked for comes into force.
    sqlx::query(
        r#"UPDATE sandboxes SET settings_pending = true, generation = generation + 1, allow_internet_access = false,
           network = '{"internet": false}' WHERE id = $1"#,
    )
    .bind(&id)
    .execute(&world.database().await)
    .await
    .unwrap();
    eventually("the host is told", async || {
        !world.agent.updates().pop().unwrap().network.as_option().unwrap().internet
    })
    .await;
    eventually("nothing is left to tell", async || {
        let pending = "SELECT count(*) FROM sandboxes WHERE settings_pending";
        sqlx::query_scalar::<_, i64>(pending).fetch_one(&world.database().await).await.unwrap() == 0
    })
    .await;
    // Many changes at once: one of them is what is in force, in the row and at the host.
    let changes = (0..8_u8).map(|number| {
        let (world, network) = (&world, &network);
        async move {
            let body = json!({"deny_cidrs": [format!("203.0.113.{number}")]});
            send(world, Method::PUT, network, &body).await
        }
    });
    for answer in futures::future::join_all(changes).await {
        assert!([200, 503].contains(&answer.status.as_u16()), "{}", answer.text());
    }
    eventually("row and host agree", async || {
        let told = world.agent.updates().pop().unwrap();
        let told = told.network.as_option().unwrap().deny_cidrs.clone();
        world.client.get(&network).await.json()["deny_cidrs"] == json!(told)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_was_met_is_over() {
    let mut world = World::new().await;
    // A row holds microseconds, a host milliseconds.
    let deadline = json!({"deadline": "2100-01-01T00:00:00.123456Z"});
    let met = 4_102_444_800_123;
    let created = world.client.post("/v1/sandboxes", deadline.clone()).await.json();
    let id = created["id"].as_str().unwrap().to_owned();
    let (path, timeout) = (format!("/v1/sandboxes/{id}"), format!("/v1/sandboxes/{id}/timeout"));
    let show = async |world: &World| world.client.get(&path).await.json();
    assert_eq!(show(&world).await["deadline"], "2100-01-01T00:00:00.123456Z");

    world.agent.meet_deadline(&id, met);
    eventually("it is paused", async || show(&world).await["status"] == "paused").await;
    let shown = show(&world).await;
    assert_eq!((&shown["deadline"], &shown["deadline_action"]), (&Value::Null, &Value::Null));

    // Neither a change of something else nor a fork repeats it.
    assert_eq!(send(&world, Method::PATCH, &timeout, &json!({"timeout_sec": 90})).await.status, 200);
    assert_eq!(world.agent.updates().pop().unwrap().deadline.as_option().unwrap().at_ms, 0);
    let forked = world.client.post(&format!("{path}/fork"), json!({})).await;
    assert_eq!((forked.status.as_u16(), &forked.json()[0]["deadline"]), (201, &Value::Null));
    assert_eq!(world.agent.creates().pop().unwrap().deadline.as_option().unwrap().at_ms, 0);

    // Another one is not touched by what the host still says of the last.
    let later = json!({"deadline": "2100-01-01T00:00:00.124Z"});
    assert_eq!(send(&world, Method::PATCH, &timeout, &later).await.json()["deadline"], later["deadline"]);
    tokio::time::sleep(QUIET).await;
    let resumed = world.client.post(&format!("{path}/resume"), json!({})).await;
    assert_eq!((resumed.status.as_u16(), &resumed.json()["deadline"]), (200, &later["deadline"]));

    // One that passes while it is paused is over too, and what is asked for next is done.
    assert_eq!(world.client.post(&format!("{path}/pause"), json!({})).await.status, 200);
    world.agent.meet_deadline(&id, met + 1);
    eventually("there is none", async || show(&world).await["deadline"].is_null()).await;
    assert_eq!(world.client.post(&format!("{path}/resume"), json!({})).await.status, 200);

    // A pause that somebody asked for may be what meets it.
    send(&world, Method::PATCH, &timeout, &deadline).await;
    world.agent.faults(|faults| faults.hold_pauses = true);
    let (client, pause) = (world.client.clone(), format!("{path}/pause"));
    let pausing = tokio::spawn(async move { client.post(&pause, json!({})).await });
    eventually("a pause has begun", async || show(&world).await["status"] == "pausing").await;
    world.agent.meet_deadline(&id, met);
    world.agent.release();
    let paused = pausing.await.unwrap();
    assert_eq!((&paused.json()["status"], &paused.json()["deadline"]), (&json!("paused"), &Value::Null));

    // What nobody saw is found.
    assert_eq!(world.client.post(&format!("{path}/resume"), json!({})).await.status, 200);
    send(&world, Method::PATCH, &timeout, &later).await;
    world.agent.go_away().await;
    world.agent.meet_deadline(&id, met + 1);
    world.agent.serve();
    eventually("it is paused", async || show(&world).await["status"] == "paused").await;
    assert_eq!(show(&world).await["deadline"], Value::Null);
}
