//! What the agent tells of itself and its machine, to whom, and to pages of which origin.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use connectrpc::client::CallOptions;
use harness::{Agent, Running, by_pid, command, run, shell, stdin};
use http::{Method, Request};
use wrenn_proto::process::SendInputRequest;
use wrenn_types::guest::{HOST_ONLY_PATHS, WITHOUT_TOKEN_PATHS, is_host_only};

/// Paths that are served, with the method that they are for.
const ROUTES: [(&str, &str); 16] = [
    ("GET", "/health"),
    ("POST", "/init"),
    ("POST", "/snapshot/prepare"),
    ("POST", "/freeze"),
    ("POST", "/unfreeze"),
    ("POST", "/connect/1"),
    ("GET", "/files"),
    ("POST", "/files"),
    ("GET", "/metrics"),
    ("GET", "/processes"),
    ("GET", "/envs"),
    ("POST", "/process.Process/List"),
    ("POST", "/process.Process/Start"),
    ("POST", "/filesystem.Filesystem/Stat"),
    ("POST", "/filesystem.Filesystem/WatchDir"),
    ("POST", "/nothing"),
];

#[tokio::test]
async fn every_route_asks_for_the_token_or_is_on_a_list() {
    let agent = Agent::start();
    let init = agent.send(Request::post("/init"), r#"{"accessToken":"secret"}"#).await;
    assert_eq!(init.status, 204);
    for (method, path) in ROUTES {
        let answer = agent.send(Request::builder().method(method).uri(path), "{}").await;
        let expected = match path {
            "/health" => 204,
            // Only the host gets here; a stream is no request for the guest's own services.
            "/connect/1" => 426,
            _ => 401,
        };
        assert_eq!(answer.status, expected, "{method} {path}");
        // A signature stands for the token on files only.
        let signed = format!("{path}?signature=v1_x&path=x");
        let answer = agent.send(Request::builder().method(method).uri(&signed), "{}").await;
        assert_eq!(answer.status, expected, "{method} {signed}");
        let listed = WITHOUT_TOKEN_PATHS.contains(&path) || is_host_only(path);
        assert!(listed || expected == 401, "{path}");
        assert_eq!(answer.headers["access-control-allow-origin"], "*", "{path}");
    }
}

#[tokio::test]
async fn what_looks_like_a_path_of_the_host_is_not_served_under_another_spelling() {
    let agent = Agent::start();
    for only in HOST_ONLY_PATHS {
        for path in [format!("/{only}"), only.to_uppercase(), format!("/.{only}"), format!("/%2e{only}")] {
            assert!(is_host_only(&path), "{path}");
            let answer =
                agent.send(Request::post(&path).header("content-type", "application/json"), "{}").await;
            assert_eq!(
                (answer.status.as_u16(), answer.message().as_str()),
                (404, "there is nothing at this path")
            );
        }
    }
}

#[tokio::test]
async fn a_page_of_any_origin_may_ask() {
    let agent = Agent::start();
    agent.send(Request::post("/init"), r#"{"accessToken":"secret"}"#).await;
    for path in ["/files?path=x", "/process.Process/Start", "/health", "/nothing"] {
        let asked = Request::options(path)
            .header("origin", "https://page.example")
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,x-access-token,connect-protocol-version",
            );
        let answer = agent.send(asked, "").await;
        let header = |name: &str| answer.headers[name].to_str().unwrap();
        assert_eq!(answer.status, 204, "{path}");
        assert_eq!(header("access-control-allow-origin"), "*");
        assert_eq!(header("access-control-allow-methods"), "HEAD, GET, POST, PUT, PATCH, DELETE");
        assert_eq!(
            header("access-control-allow-headers"),
            "authorization,x-access-token,connect-protocol-version"
        );
        assert_eq!(header("access-control-max-age"), "7200");
    }
    // The rest is asked as always, and the answer may be read, a refusal too.
    let page = |path: &str| Request::get(path).header("origin", "https://page.example");
    for (path, status) in [("/health", 204), ("/metrics", 401), ("/files?path=x", 401)] {
        let answer = agent.send(page(path), "").await;
        assert_eq!(
            (answer.status.as_u16(), &answer.headers["access-control-allow-origin"]),
            (status, &http::HeaderValue::from_static("*"))
        );
        let exposed = answer.headers["access-control-expose-headers"].to_str().unwrap().to_owned();
        for name in ["Location", "Cache-Control", "X-Content-Type-Options"] {
            assert!(exposed.contains(name), "{exposed}");
        }
    }
    // Without the browser's question it is a method like any other.
    assert_eq!(agent.send(Request::options("/health"), "").await.status, 405);
}

#[tokio::test]
async fn the_metrics_have_the_names_of_the_contract() {
    let agent = Agent::start();
    let number = |json: &serde_json::Value, name: &str| {
        json[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {json}"))
    };
    for _ in 0..3 {
        run(&agent.processes(), shell("true")).await;
        let answer = agent.get("/metrics").await;
        assert_eq!(
            (answer.status.as_u16(), &answer.headers["content-type"]),
            (200, &http::HeaderValue::from_static("application/json"))
        );
        let json = answer.json();
        for (smaller, larger) in [
            ("mem_used", "mem_total"),
            ("mem_cache", "mem_total"),
            ("disk_used", "disk_total"),
            ("mem_used_mib", "mem_total_mib"),
        ] {
            let (smaller, larger) = (number(&json, smaller), number(&json, larger));
            assert!(0.0 <= smaller && smaller <= larger && larger > 0.0, "{json}");
        }
        assert_eq!(json["mem_total"].as_u64().unwrap() >> 20, json["mem_total_mib"].as_u64().unwrap());
        assert_eq!(json["mem_used"].as_u64().unwrap() >> 20, json["mem_used_mib"].as_u64().unwrap());
        assert!((0.0..=100.0).contains(&number(&json, "cpu_used_pct")), "{json}");
        assert!(
            json["cpu_count"].as_u64().unwrap() >= 1 && json["ts"].as_u64().unwrap() > 1_700_000_000,
            "{json}"
        );
    }
    assert_eq!(agent.send(Request::post("/metrics"), "").await.status, 405);
}

#[tokio::test]
async fn the_environment_is_what_init_gave() {
    let agent = Agent::start();
    assert_eq!(agent.get("/envs").await.json(), serde_json::json!({}));
    agent.send(Request::post("/init"), r#"{"envVars":{"A":"b","C":"ü"}}"#).await;
    let answer = agent.get("/envs").await;
    assert_eq!(answer.json(), serde_json::json!({"A": "b", "C": "ü"}));
    assert_eq!(answer.headers["cache-control"], "no-store");
    agent.send(Request::post("/init"), r#"{"defaultUser":"root"}"#).await;
    assert_eq!(agent.get("/envs").await.json()["A"], "b", "what is absent stays");
}

#[tokio::test]
async fn processes_are_listed_with_what_they_use() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut start = command(&["/bin/cat", "-", "a\tb"]);
    start.stdin = Some(true);
    let mut cat = Running::start(&client, start, CallOptions::default()).await.unwrap();
    let input = SendInputRequest {
        process: by_pid(cat.seen.pid).into(),
        input: stdin(b"line").into(),
        ..Default::default()
    };
    client.send_input(input).await.unwrap();
    // The kernel says that a program runs a moment before it knows its command line.
    cat.until(|seen| seen.text() == "line").await;
    let json = agent.get("/processes").await.json();
    assert_eq!(json["truncated"], false);
    let listed = json["processes"].as_array().unwrap();
    let of =
        |pid: u32| listed.iter().find(|task| task["pid"] == pid).unwrap_or_else(|| panic!("{pid}: {json}"));
    let seen = of(cat.seen.pid);
    assert_eq!((&seen["ppid"], &seen["user"]), (&agent.pid().into(), &"root".into()));
    assert_eq!(seen["command"], "/bin/cat - a b");
    assert!(["S", "R"].contains(&seen["state"].as_str().unwrap()), "{seen}");
    let own = of(agent.pid());
    assert!(own["rss"].as_u64().unwrap() > 100_000 && own["threads"].as_u64().unwrap() >= 1, "{own}");
    assert!(own["cpu_ms"].is_u64() && own["started_ms"].is_u64(), "{own}");
    assert_eq!(agent.send(Request::builder().method(Method::DELETE).uri("/processes"), "").await.status, 405);
}
