use std::time::Instant;

use camino::Utf8Path;
use proptest::prelude::*;
use tokio::{net::UnixListener, sync::oneshot};

use super::*;
use crate::firecracker::requests::{InstanceState, Vm, VmState};

const BOUND: Duration = Duration::from_secs(5);
const DONE: &[u8] = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

/// A server that answers each request on each connection with the next of these, and closes after an empty one.
struct Played {
    api: Api,
    received: tokio::task::JoinHandle<Vec<String>>,
    connections: tokio::sync::watch::Receiver<usize>,
    _directory: tempfile::TempDir,
}

fn play(connections: Vec<Vec<&'static [u8]>>) -> Played {
    let directory = tempfile::tempdir().unwrap();
    let socket = Utf8Path::from_path(directory.path()).unwrap().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let (counter, counted) = tokio::sync::watch::channel(0);
    let received = tokio::spawn(async move {
        let mut all = Vec::new();
        for replies in connections {
            let (mut stream, _) = listener.accept().await.unwrap();
            counter.send_modify(|count| *count += 1);
            for reply in replies {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap();
                if length == 0 {
                    break;
                }
                all.push(String::from_utf8_lossy(&request[..length]).into_owned());
                // Cut anywhere: the client puts it together again.
                for part in reply.chunks(7) {
                    if stream.write_all(part).await.is_err() {
                        break;
                    }
                }
            }
        }
        all
    });
    Played { api: Api::at(socket), received, connections: counted, _directory: directory }
}

/// A reply of the length that it says.
fn reply(status: u16, body: &str) -> &'static [u8] {
    let length = body.len();
    let reply = format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{body}");
    Box::leak(reply.into_bytes().into_boxed_slice())
}

async fn pause(api: &Api) -> VmmResult<()> {
    api.send(&Vm { state: VmState::Paused }, BOUND).await
}

#[tokio::test]
async fn requests_follow_each_other_on_one_connection() {
    let info =
        r#"{"app_name": "Firecracker", "id": "wrenn-a", "state": "Not started", "vmm_version": "1.17.0"}"#;
    let info = reply(200, info);
    let played = play(vec![vec![DONE, info, DONE]]);
    played.api.connect().await.unwrap();
    pause(&played.api).await.unwrap();
    let told = played.api.info(BOUND).await.unwrap();
    assert_eq!(told, InstanceInfo { id: "wrenn-a".to_owned(), state: InstanceState::NotStarted });
    pause(&played.api).await.unwrap();
    let received = played.received.await.unwrap();
    assert_eq!(*played.connections.borrow(), 1);
    assert!(received[0].starts_with("PATCH /vm HTTP/1.1\r\n"), "{}", received[0]);
    assert!(received[0].ends_with("Content-Length: 18\r\n\r\n{\"state\":\"Paused\"}"), "{}", received[0]);
    assert!(
        received[1].starts_with("GET / HTTP/1.1\r\n") && received[1].ends_with("\r\n\r\n"),
        "{}",
        received[1]
    );
}

#[tokio::test]
async fn a_refusal_is_told_in_its_words_and_the_connection_goes_on() {
    let refused = reply(400, r#"{"fault_message": "The kernel\u0007 is bad."}"#);
    let nameless = reply(500, "oops");
    let played = play(vec![vec![refused, nameless, DONE]]);
    let error = pause(&played.api).await.unwrap_err();
    let told = matches!(&error, VmmError::Refused { command, message }
        if command == "PATCH /vm" && message == "The kernel is bad.");
    assert!(told, "{error:?}");
    let error = pause(&played.api).await.unwrap_err();
    assert!(matches!(&error, VmmError::Refused { message, .. } if message.contains("500")), "{error:?}");
    pause(&played.api).await.unwrap();
    assert_eq!(*played.connections.borrow(), 1);
}

#[tokio::test]
async fn what_is_no_reply_ends_the_connection_and_not_the_next_one() {
    let two_lengths = b"HTTP/1.1 200 \r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab";
    let long = b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n";
    let cut = b"HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\nabc";
    let more = b"HTTP/1.1 204 \r\n\r\nHTTP/1.1 204 \r\n\r\n";
    let chunked = b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n";
    let early = b"HTTP/1.1 100 Continue\r\n\r\n";
    let endless: &[u8] = Box::leak(vec![b'a'; HEAD_LIMIT + 100].into_boxed_slice());
    for reply in [b"garbage\r\n\r\n".as_slice(), b"", cut, two_lengths, long, more, chunked, early, endless] {
        let played = play(vec![vec![reply], vec![DONE]]);
        let error = pause(&played.api).await.unwrap_err();
        let text = String::from_utf8_lossy(&reply[..reply.len().min(80)]);
        assert!(matches!(error, VmmError::Connection { .. }), "{text}: {error:?}");
        pause(&played.api).await.unwrap();
        assert_eq!(*played.connections.borrow(), 2, "{text}");
    }
}

#[tokio::test]
async fn silence_is_bounded_and_what_comes_late_is_no_reply_to_the_next_request() {
    let directory = tempfile::tempdir().unwrap();
    let socket = Utf8Path::from_path(directory.path()).unwrap().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let (go_on, gone_on) = oneshot::channel();
    let server = tokio::spawn(async move {
        let (mut silent, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = silent.read(&mut request).await.unwrap();
        gone_on.await.unwrap();
        // Nobody is there to read it.
        drop(silent.write_all(b"HTTP/1.1 500 \r\n\r\n").await);
        let (mut next, _) = listener.accept().await.unwrap();
        let _ = next.read(&mut request).await.unwrap();
        next.write_all(DONE).await.unwrap();
    });
    let api = Api::at(socket);
    let bound = Duration::from_millis(20);
    let begin = Instant::now();
    let silent = api.send(&Vm { state: VmState::Paused }, bound).await;
    assert!(matches!(silent, Err(VmmError::Timeout { operation: "PATCH /vm", .. })), "{silent:?}");
    assert!(begin.elapsed() < BOUND);
    go_on.send(()).unwrap();
    pause(&api).await.unwrap();
    server.await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_told_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let api = Api::at(Utf8Path::from_path(directory.path()).unwrap().join("nobody"));
    let error = pause(&api).await.unwrap_err();
    assert!(
        matches!(&error, VmmError::Connection { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
}

proptest! {
    #[test]
    fn a_reply_is_whole_when_its_last_byte_is_there(status in 200_u16..600, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = format!("HTTP/1.1 {status} \r\nServer: x\r\ncontent-length:{}\r\n\r\n", body.len()).into_bytes();
        bytes.extend(&body);
        for length in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..length]).unwrap(), None);
        }
        prop_assert_eq!(decode(&bytes).unwrap(), Some(Reply { status, body }));
        bytes.push(0);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn nothing_makes_the_decoder_panic(text in "(HTTP/1.1 )?[ -~\r\n]{0,60}(\r\n\r\n)?[ -~]{0,20}") {
        drop(decode(text.as_bytes()));
    }

    #[test]
    fn a_reason_is_bounded_text(message in ".{0,3000}") {
        let body = serde_json::to_vec(&serde_json::json!({"fault_message": message})).unwrap();
        let reason = reason(400, &body);
        prop_assert!(reason.chars().count() <= REASON_LIMIT && !reason.contains(char::is_control));
    }
}
