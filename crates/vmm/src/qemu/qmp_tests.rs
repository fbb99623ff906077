use std::io::{Read, Write};

use proptest::prelude::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;
use crate::qemu::facts::{Migration, Shutdown};

const BOUND: Duration = Duration::from_secs(5);

/// A connection, and the end that QEMU would have.
fn pair() -> (Qmp, net::UnixStream) {
    let (ours, theirs) = net::UnixStream::pair().unwrap();
    (Qmp::over(ours).unwrap(), theirs)
}

fn request(peer: &mut net::UnixStream) -> Value {
    let mut line = Vec::new();
    let mut byte = [0; 1];
    while byte != *b"\n" {
        peer.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    serde_json::from_slice(&line).unwrap()
}

#[tokio::test]
async fn answers_find_their_command_in_any_order() {
    let (qmp, mut peer) = pair();
    let peer = tokio::task::spawn_blocking(move || {
        writeln!(peer, r#"{{"QMP": {{"version": {{}}, "capabilities": []}}}}"#).unwrap();
        let (first, second) = (request(&mut peer), request(&mut peer));
        writeln!(peer, r#"{{"event": "STOP", "data": {{}}}}"#).unwrap();
        writeln!(peer, r#"{{"id": {}, "error": {{"class": "GenericError", "desc": "no"}}}}"#, second["id"])
            .unwrap();
        writeln!(peer, r#"{{"id": {}, "return": {{"n": 1}}}}"#, first["id"]).unwrap();
        (first, peer)
    });
    let first = qmp.execute("one", json!({"a": 1}), BOUND);
    let second = qmp.execute("two", Value::Null, BOUND);
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first.unwrap(), json!({"n": 1}));
    assert!(matches!(second, Err(VmmError::Refused { message, .. }) if message == "no"));
    let (sent, _) = peer.await.unwrap();
    assert_eq!((&sent["execute"], &sent["arguments"]), (&json!("one"), &json!({"a": 1})));
}

#[tokio::test]
async fn a_descriptor_goes_with_its_command() {
    let (qmp, peer) = pair();
    let peer = tokio::task::spawn_blocking(move || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1024];
        let mut into = [io::IoSliceMut::new(&mut bytes)];
        let count = recvmsg(&peer, &mut into, &mut ancillary, RecvFlags::empty()).unwrap().bytes;
        let mut text = String::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                for descriptor in descriptors {
                    std::fs::File::from(descriptor).read_to_string(&mut text).unwrap();
                }
            }
        }
        let sent: Value = serde_json::from_slice(&bytes[..count]).unwrap();
        writeln!(&peer, r#"{{"id": {}, "return": {{}}}}"#, sent["id"]).unwrap();
        text
    });
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"state").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    qmp.execute_with("getfd", json!({"fdname": "state"}), file.into(), BOUND).await.unwrap();
    assert_eq!(peer.await.unwrap(), "state");
}

#[tokio::test]
async fn silence_is_bounded_and_an_end_is_told_at_once() {
    let (qmp, peer) = pair();
    let bound = Duration::from_millis(20);
    let silent = qmp.execute("query-status", Value::Null, bound).await;
    assert!(matches!(silent, Err(VmmError::Timeout { operation: "query-status", .. })), "{silent:?}");

    let waits = qmp.execute("query-status", Value::Null, BOUND);
    let ends = async { drop(peer) };
    let (ended, ()) = tokio::join!(waits, ends);
    assert!(matches!(ended, Err(VmmError::Connection { .. })), "{ended:?}");
    qmp.facts().wait_for(|facts| facts.disconnected).await.unwrap();
    let after = qmp.execute("query-status", Value::Null, BOUND).await;
    assert!(matches!(after, Err(VmmError::Connection { .. })), "{after:?}");
}

#[tokio::test]
async fn events_reach_those_who_wait() {
    let (qmp, mut peer) = pair();
    let mut facts = qmp.facts();
    for line in [
        r#"{"event": "MIGRATION", "data": {"status": "setup"}}"#,
        "no json at all",
        r#"{"event": 7}"#,
        r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#,
        r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#,
    ] {
        writeln!(peer, "{line}").unwrap();
    }
    let facts = facts.wait_for(|facts| facts.shutdown.is_some()).await.unwrap();
    assert_eq!((facts.migration, facts.shutdown), (Some(Migration::Completed), Some(Shutdown::PoweredOff)));
}

#[tokio::test]
async fn a_line_without_an_end_closes_the_connection() {
    let (qmp, mut peer) = pair();
    let flood = tokio::task::spawn_blocking(move || {
        let chunk = vec![b'a'; 64 * 1024];
        // Fails once the reader has gone away, which is what is wanted.
        while peer.write_all(&chunk).is_ok() {
            if peer.take_error().is_err() {
                break;
            }
        }
    });
    qmp.facts().wait_for(|facts| facts.disconnected).await.unwrap();
    drop(qmp);
    flood.await.unwrap();
}

proptest! {
    /// However the bytes arrive, the lines are the same.
    #[test]
    fn lines_do_not_depend_on_chunks(text in "[a-c\n]{0,60}", cuts in prop::collection::vec(1_usize..9, 1..30)) {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        let mut rest = text.as_bytes();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            lines.push(now);
            while let Some(line) = lines.next_line() { found.extend(line); }
            rest = later;
        }
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        prop_assert_eq!(found, &text.as_bytes()[..complete]);
        prop_assert_eq!(lines.buffer, &text.as_bytes()[complete..]);
    }

    #[test]
    fn no_line_makes_the_parser_panic(line in ".{0,80}") {
        parse(line.as_bytes());
    }
}
