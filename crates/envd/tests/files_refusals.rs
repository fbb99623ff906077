//! Every refusal of `/files`, and the signatures that stand for a token.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod files_place;
mod harness;

use std::{
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use files_place::{FORM, Place, form};
use harness::encode;
use http::Request;
use sha2::{Digest, Sha256};

#[tokio::test]
async fn what_cannot_be_done_is_refused_in_the_words_of_the_contract() {
    let place = Place::new();
    let agent = &place.agent;
    let root = place.path("");
    fs::create_dir(place.path("dir")).unwrap();
    fs::write(place.path("file"), "").unwrap();
    std::os::unix::fs::symlink("round", place.path("round")).unwrap();
    let (missing, dir) = (place.path("missing"), place.path("dir"));
    let octets = |uri: String| Request::post(uri).header("content-type", "application/octet-stream");
    let forms = |uri: String| Request::post(uri).header("content-type", FORM);
    let long = encode(&format!("/{}", "a/".repeat(2500)));
    let name = encode(&place.path(&"n".repeat(300)));
    let too_long = format!("path '{root}{}' cannot be: File name too long (os error 36)", "n".repeat(300));
    let round = format!("path '{root}round' cannot be: Too many levels of symbolic links (os error 40)");
    let answers = [
        // Down.
        (place.get("missing", &[]).await, 404, format!("path '{missing}' does not exist")),
        (place.get("file/x", &[]).await, 404, format!("path '{root}file/x' does not exist")),
        (place.get("dir", &[]).await, 400, format!("path '{dir}' is a directory")),
        (agent.get(&format!("/files?path={name}")).await, 400, too_long.clone()),
        (place.get("round", &[]).await, 400, round.clone()),
        (agent.get("/files?path=/dev/zero").await, 400, "path '/dev/zero' is not a regular file".to_owned()),
        (agent.get("/files?path=a%00b").await, 400, "path contains a zero byte".to_owned()),
        (agent.get(&format!("/files?path={long}")).await, 400, "path is longer than 4095 bytes".to_owned()),
        (agent.get("/files?path=~root/x").await, 400, "cannot expand user-specific home dir".to_owned()),
        (agent.get("/files?path=%ff").await, 400, "the query is not text".to_owned()),
        (agent.get("/files?path=/a&path=/b").await, 400, "the query has 'path' more than once".to_owned()),
        (agent.get(&format!("/files?path={}", "a".repeat(20_000))).await, 400, "the query is longer than 16384 bytes".to_owned()),
        (agent.get("/files?path=/x&username=nosuch").await, 401, "invalid username: 'nosuch'".to_owned()),
        (
            place.get("file", &[("accept-encoding", "identity;q=0")]).await,
            406,
            "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]".to_owned(),
        ),
        (
            place.get("file", &[("if-match", "\"other\"")]).await,
            412,
            "the file is not the one that the conditions name".to_owned(),
        ),
        // Up.
        (agent.upload(&dir, "x").await, 400, format!("path '{dir}' is a directory")),
        (agent.upload("/dev/null", "x").await, 400, "path '/dev/null' is not a regular file".to_owned()),
        (
            place.put("file/x", &[], "x").await,
            400,
            format!("path '{root}file/x' cannot be: Not a directory (os error 20)"),
        ),
        (agent.upload("a\0b", "x").await, 400, "path contains a zero byte".to_owned()),
        (
            agent.send(octets(format!("/files?path={name}")), "x").await,
            400,
            too_long.clone(),
        ),
        (place.put("round", &[], "x").await, 400, round),
        (agent.send(octets("/files?path=/x&username=nosuch".to_owned()), "x").await, 401, "invalid username: 'nosuch'".to_owned()),
        (
            agent.send(octets("/files".to_owned()), "x").await,
            400,
            "path query parameter is required for raw body upload".to_owned(),
        ),
        (
            place.put("z", &[("content-encoding", "br")], "x").await,
            400,
            "error decompressing request body: unsupported Content-Encoding: br, supported: [gzip]".to_owned(),
        ),
        (
            place.put("z", &[("content-encoding", "gzip")], "x").await,
            400,
            "error decompressing request body: it is no whole gzip stream".to_owned(),
        ),
        (
            place.put("z", &[("x-metadata-a", "x\ty")], "x").await,
            400,
            "invalid metadata: metadata value for key \"a\" contains non-printable-ASCII byte 0x09 at offset 1".to_owned(),
        ),
        (
            place.put("z", &[("x-metadata-a", &"v".repeat(5000))], "x").await,
            400,
            "invalid metadata: total metadata size 5010 exceeds 4096 bytes".to_owned(),
        ),
        (
            place.put("z", &[(&format!("x-metadata-{}", "k".repeat(247)), "v")], "x").await,
            400,
            format!("invalid metadata: metadata key \"{}\" exceeds 246 bytes", "k".repeat(247)),
        ),
        (
            agent.send(Request::post("/files?path=/x").header("content-type", "text/plain"), "x").await,
            400,
            "unsupported content type: text/plain, expected multipart/form-data or application/octet-stream".to_owned(),
        ),
        (
            agent.send(Request::post("/files?path=/x"), "x").await,
            400,
            "unsupported content type: , expected multipart/form-data or application/octet-stream".to_owned(),
        ),
        // Forms.
        (
            agent.send(Request::post("/files").header("content-type", "multipart/form-data"), "x").await,
            400,
            "no multipart boundary param in Content-Type".to_owned(),
        ),
        (
            agent.send(forms("/files".to_owned()), form(&[("file", None, b"1")])).await,
            400,
            "a file has neither a path nor a name".to_owned(),
        ),
        (
            agent.send(forms("/files".to_owned()), form(&[("other", None, b"1")])).await,
            400,
            "there is no part named 'file'".to_owned(),
        ),
        (
            agent.send(forms(place.uri("z")), form(&[("file", None, b"1"), ("file", None, b"2")])).await,
            400,
            format!(
                "you cannot upload multiple files to the same path '{root}z' in one upload request, \
                 only the first specified file was uploaded"
            ),
        ),
        (
            agent.send(forms(place.uri("half")), form(&[("file", None, b"1")])[..57].to_vec()).await,
            400,
            "the body ended early".to_owned(),
        ),
        (
            agent.send(forms(place.uri("half")), "--XXY\r\n").await,
            400,
            "malformed form: a boundary is not followed by the end of its line".to_owned(),
        ),
        (
            agent.send(forms(place.uri("half")), b"--XX\r\n\xff\r\n\r\n".to_vec()).await,
            400,
            "malformed form: the head of a part is not text".to_owned(),
        ),
        (
            agent.send(forms(place.uri("half")), format!("--XX\r\n{}", "a".repeat(20_000))).await,
            400,
            "malformed form: the head of a part is longer than 16384 bytes".to_owned(),
        ),
        // Neither.
        (agent.send(Request::delete("/files?path=/x"), "").await, 405, "method not allowed".to_owned()),
        (agent.send(Request::put("/files?path=/x"), "x").await, 405, "method not allowed".to_owned()),
    ];
    for (answer, status, message) in answers {
        assert_eq!((answer.status.as_u16(), answer.message()), (status, message));
    }
    for left in ["half", "missing"] {
        assert!(!fs::exists(place.path(left)).unwrap());
    }
}

const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";

fn sign(path: &str, operation: &str, user: &str, token: &str, expiration: Option<&str>) -> String {
    let end = expiration.map(|expiration| format!(":{expiration}")).unwrap_or_default();
    let text = format!("{path}:{operation}:{user}:{token}{end}");
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

#[tokio::test]
async fn a_signature_stands_for_the_token_on_one_path_for_one_operation() {
    assert_eq!(
        sign("hello.txt", "read", "user", TOKEN, None),
        "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E",
        "the vector of the contract"
    );
    let place = Place::new();
    let secret = format!(r#"{{"accessToken":"{TOKEN}"}}"#);
    assert_eq!(place.agent.send(Request::post("/init"), secret).await.status, 204);
    let path = place.path("a+b c/ü");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (past, soon) = ((now - 10).to_string(), (now + 600).to_string());
    let (missing, invalid) = ("missing signature query parameter", "invalid signature");
    let (expired, mismatch) =
        ("signature is already expired", "access token present in header but does not match");
    let good = |operation, user| sign(&path, operation, user, TOKEN, None);
    let until = |time: &str| sign(&path, "read", "", TOKEN, Some(time));
    let none = None::<&str>;
    // What is given for signature, user, expiration and token, and what reading says to it: nothing is yes.
    let table = [
        (None, none, None, None, Some(missing)),
        (None, none, None, Some(TOKEN), None),
        (None, none, None, Some("wrong"), Some(mismatch)),
        (Some(good("read", "")), none, None, Some("wrong"), Some(mismatch)),
        (Some("v1_wrong".to_owned()), none, None, Some(TOKEN), None),
        (Some(good("read", "")), none, None, None, None),
        (Some(good("write", "")), none, None, None, Some(invalid)),
        (Some(good("read", "root")), none, None, None, Some(invalid)),
        (Some(good("read", "root")), Some("root"), None, None, None),
        (Some(good("read", "")), Some("root"), None, None, Some(invalid)),
        (Some(sign(&path, "read", "", "other", None)), none, None, None, Some(invalid)),
        (Some(String::new()), none, None, None, Some(invalid)),
        (Some(format!("{}=", good("read", ""))), none, None, None, Some(invalid)),
        (Some(until(&soon)), none, Some(soon.as_str()), None, None),
        (Some(until(&past)), none, Some(past.as_str()), None, Some(expired)),
        // The signature comes first: of a wrong one nobody learns whether it would have expired.
        (Some("v1_wrong".to_owned()), none, Some(past.as_str()), None, Some(invalid)),
        (Some(until(&past)), none, Some(soon.as_str()), None, Some(invalid)),
        (Some(until(&soon)), none, None, None, Some(invalid)),
        (Some(good("read", "")), none, Some(soon.as_str()), None, Some(invalid)),
        (Some(until("x")), none, Some("x"), None, Some(expired)),
        (Some(until("-1")), none, Some("-1"), None, Some(expired)),
        (Some(until("")), none, Some(""), None, Some(expired)),
    ];
    fs::create_dir(place.path("a+b c")).unwrap();
    fs::write(&path, "content").unwrap();
    for (signature, user, expiration, token, refused) in table {
        let mut uri = format!("/files?path={}", encode(&path));
        let fields =
            [("signature", signature.as_deref()), ("username", user), ("signature_expiration", expiration)];
        for (name, value) in fields {
            if let Some(value) = value {
                uri.push_str(&format!("&{name}={}", encode(value)));
            }
        }
        let request = token
            .into_iter()
            .fold(Request::get(&uri), |request, token| request.header("x-access-token", token));
        let answer = place.agent.send(request, "").await;
        match refused {
            None => assert_eq!(
                (answer.status.as_u16(), answer.body.unwrap().as_ref()),
                (200, b"content".as_slice())
            ),
            Some(message) => {
                assert_eq!(answer.status, 401, "{uri}");
                let body = String::from_utf8(answer.body.unwrap().to_vec()).unwrap();
                assert_eq!(body, format!(r#"{{"code":401,"message":"{message}"}}"#), "{uri}");
            }
        }
    }
    // Up, and for a path that is not written out: what is signed is what is asked for.
    let post = async |path: &str, signature: &str| {
        let uri = format!("/files?path={}&signature={}", encode(path), encode(signature));
        place.agent.send(Request::post(uri).header("content-type", "application/octet-stream"), "new").await
    };
    assert_eq!(post(&path, &good("write", "")).await.status, 200);
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(post(&path, &good("read", "")).await.message(), invalid);
    let dotted = place.path("a+b c/../a+b c/ü");
    assert_eq!(post(&dotted, &good("write", "")).await.message(), invalid);
    assert_eq!(post(&dotted, &sign(&dotted, "write", "", TOKEN, None)).await.status, 200);
    let head = |signature: &str| {
        Request::head(format!("/files?path={}&signature={}", encode(&path), encode(signature)))
    };
    assert_eq!(place.agent.send(head(&good("read", "")), "").await.status, 200);
    assert_eq!(place.agent.send(head(&good("write", "")), "").await.status, 401);
    // No signature is good for making one file of several.
    let body = serde_json::json!({"source_paths": [path], "destination": "/x"}).to_string();
    assert_eq!(place.agent.send(Request::post("/files/compose"), body).await.status, 401);
}

/// Who signs says for whom. A name that the bearer of a link adds is no part of what was signed.
#[tokio::test]
async fn a_signature_is_for_the_user_that_was_signed() {
    let place = Place::new();
    let secret = format!(r#"{{"accessToken":"{TOKEN}","defaultUser":"nobody"}}"#);
    assert_eq!(place.agent.send(Request::post("/init"), secret).await.status, 204);
    let uri = |path: &str, operation: &str, user: Option<&str>, signed: bool| {
        let mut uri = format!("/files?path={}", encode(path));
        if signed {
            let signature = sign(path, operation, user.unwrap_or_default(), TOKEN, None);
            uri.push_str(&format!("&signature={}", encode(&signature)));
        }
        uri + &user.map(|user| format!("&username={user}")).unwrap_or_default()
    };
    // Whether it is signed, for whom, whether the token is shown, and whose the home and the new file are.
    let table = [
        (true, None, false, "/nonexistent", 65534),
        (true, Some(""), false, "/nonexistent", 65534),
        (true, Some("daemon"), false, "/usr/sbin", 1),
        (false, None, true, "/root", 0),
        (true, None, true, "/root", 0),
    ];
    for (index, (signed, user, token, home, owner)) in table.into_iter().enumerate() {
        let request = |request: http::request::Builder| {
            let request = request.header("authorization", harness::basic("root"));
            if token { request.header("x-access-token", TOKEN) } else { request }
        };
        let read = request(Request::get(uri("~/no-such-file-of-a-test", "read", user, signed)));
        let answer = place.agent.send(read, "").await;
        let message = format!("path '{home}/no-such-file-of-a-test' does not exist");
        assert_eq!((answer.status.as_u16(), answer.message()), (404, message), "{index}");

        let path = place.path(&index.to_string());
        let write = request(Request::post(uri(&path, "write", user, signed)));
        let answer = place.agent.send(write.header("content-type", "application/octet-stream"), "x").await;
        assert_eq!(answer.status, 200, "{index}");
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&path).unwrap()), owner, "{index}");
    }
}
