//! Who may do what: tokens, signatures, `/init`, `/health`, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use connectrpc::client::CallOptions;
use harness::{Agent, command, encode, run_as};
use http::Request;
use sha2::{Digest, Sha256};
use wrenn_proto::process::ListRequest;

const UNAUTHORIZED: &str =
    "unauthorized access, please provide a valid access token or method signing if supported";

async fn secured() -> Agent {
    let agent = Agent::start();
    let answer = agent.send(Request::post("/init"), r#"{"accessToken":"secret"}"#).await;
    assert_eq!(answer.status, 204, "{answer:?}");
    agent
}

#[tokio::test]
async fn health_needs_nothing_and_names_the_version() {
    let agent = secured().await;
    let answer = agent.get("/health").await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.headers["x-wrenn-envd-version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(agent.send(Request::delete("/health"), "").await.status, 405);
}

#[tokio::test]
async fn a_token_is_needed_once_there_is_one() {
    let agent = secured().await;
    let client = agent.processes();
    let error = client.list(ListRequest::default()).await.unwrap_err();
    assert_eq!(error.code, connectrpc::ErrorCode::Unauthenticated, "{error:?}");
    let plain = Request::post("/process.Process/List").header("content-type", "application/json");
    let answer = agent.send(plain, "{}").await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (401, UNAUTHORIZED));
    let with = |token: &'static str| CallOptions::default().with_header("x-access-token", token);
    client.list_with_options(ListRequest::default(), with("secret")).await.unwrap();
    assert!(client.list_with_options(ListRequest::default(), with("Secret")).await.is_err());
    assert!(
        client.list_with_options(ListRequest::default(), with("secret ")).await.is_ok(),
        "trimmed by HTTP"
    );
    let seen = run_as(&client, command(&["/bin/echo", "hi"]), with("secret")).await.unwrap();
    assert_eq!(seen.text(), "hi\n");
}

#[tokio::test]
async fn init_needs_the_current_token() {
    let agent = secured().await;
    let answer = agent.send(Request::post("/init"), r#"{"accessToken":"other"}"#).await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (401, UNAUTHORIZED));
    let wrong = Request::post("/init").header("x-access-token", "wrong");
    for request in [Request::post("/init"), wrong] {
        let answer = agent.send(request, "{}").await;
        assert_eq!((answer.status.as_u16(), answer.message().as_str()), (401, UNAUTHORIZED));
    }
    let proven = Request::post("/init").header("x-access-token", "secret");
    assert_eq!(agent.send(proven, r#"{"accessToken":"other"}"#).await.status, 204);
    let proven = Request::post("/init").header("x-access-token", "secret");
    assert_eq!(agent.send(proven, "{}").await.status, 401, "it is another one now");
    assert_eq!(agent.send(Request::post("/init"), r#"{"accessToken":"other"}"#).await.status, 204);
}

#[tokio::test]
async fn init_refuses_what_it_does_not_understand() {
    let agent = Agent::start();
    let table = [
        ("{", "the body is not what it must be: EOF while parsing an object at line 1 column 1"),
        ("[]", "the body is not an object"),
        (r#"{"entropy":"x"}"#, "entropy is not 32 to 256 bytes in base64"),
        (r#"{"hostname":"a b"}"#, "hostname is not a host name"),
        (r#"{"machineId":"x"}"#, "machineId is not 32 lower case hexadecimal digits"),
        (r#"{"envVars":{"A=B":"c"}}"#, "envVars has a name or value that no environment can hold"),
        (r#"{"defaultWorkdir":"x"}"#, "defaultWorkdir is not an absolute path"),
        (r#"{"timestamp":"1960-01-01T00:00:00Z"}"#, "timestamp is before 1970"),
    ];
    for (body, message) in table {
        let answer = agent.send(Request::post("/init"), body).await;
        assert_eq!((answer.status.as_u16(), answer.message().as_str()), (400, message), "{body}");
    }
    let huge = format!(r#"{{"hostname":"{}"}}"#, "a".repeat(2 << 20));
    let answer = agent.send(Request::post("/init"), huge).await;
    let too_large = "the body is too large or ended early";
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (413, too_large));
    let answer = agent.get("/init").await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (405, "method not allowed"));
    assert_eq!(agent.send(Request::post("/init"), "").await.status, 204);
}

#[tokio::test]
async fn files_take_the_token_or_a_signature() {
    let agent = secured().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file").to_str().unwrap().to_owned();
    let link = |operation: &str, expiration: Option<&str>| {
        let mut text = format!("{path}:{operation}::secret");
        let mut query = format!("/files?path={}", encode(&path));
        if let Some(expiration) = expiration {
            text += &format!(":{expiration}");
            query += &format!("&signature_expiration={expiration}");
        }
        let signature = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)));
        format!("{query}&signature={}", encode(&signature))
    };
    let plain = format!("/files?path={}", encode(&path));
    let upload = |uri: String| Request::post(uri).header("content-type", "application/octet-stream");
    assert_eq!(agent.send(upload(plain.clone()), "x").await.message(), "missing signature query parameter");
    assert_eq!(agent.send(upload(link("read", None)), "x").await.message(), "invalid signature");
    assert_eq!(agent.send(upload(link("write", None)), "hello").await.status, 200);
    assert_eq!(agent.get(&link("read", None)).await.body.unwrap(), "hello");
    assert_eq!(agent.get(&link("read", Some("99999999999"))).await.status, 200);
    let late = agent.get(&link("read", Some("1000"))).await;
    assert_eq!(late.json(), serde_json::json!({"code": 401, "message": "signature is already expired"}));
    let token = Request::get(plain.clone()).header("x-access-token", "secret");
    assert_eq!(agent.send(token, "").await.status, 200);
    let wrong = agent.send(Request::get(link("read", None)).header("x-access-token", "wrong"), "").await;
    assert_eq!(wrong.message(), "access token present in header but does not match");
}

#[tokio::test]
async fn what_is_not_there_is_an_error_and_not_a_crash() {
    let agent = Agent::start();
    let json = |uri: &str| Request::post(uri).header("content-type", "application/json");
    assert_eq!(agent.send(json("/nothing"), "{}").await.status, 404);
    assert_eq!(agent.send(json("/process.Process/Nothing"), "{}").await.status, 404);
    assert_eq!(agent.send(json("/process.Process/List"), "{").await.status, 400);
    assert!(agent.get("/process.Process/List").await.status.is_client_error());
    let huge = format!(r#"{{"path":"{}"}}"#, "a".repeat(5 << 20));
    let answer = agent.send(json("/filesystem.Filesystem/Stat"), huge).await;
    assert!(answer.status.is_client_error(), "{:?}", answer.status);
    assert_eq!(agent.get("/health").await.status, 204);
}
