//! Files as HTTP knows them: packed, in parts, on conditions, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod files_place;
mod harness;

use std::fs;

use bytes::Bytes;
use files_place::{FORM, Place, form, gunzip, gzip, noise, prose};
use http::Request;
use serde_json::json;

const GZIP: (&str, &str) = ("content-encoding", "gzip");

#[tokio::test]
async fn a_packed_body_is_unpacked() {
    let place = Place::new();
    for (name, content) in [("empty", Bytes::new()), ("small", prose(100)), ("large", prose(5 << 20))] {
        let answer = place.put(name, &[GZIP], gzip(&content)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(place.read(name) == content, "{name}");
    }
    // Of several members, in pieces of one byte, whose ends fall wherever they fall.
    let members = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
    let pieces = members.iter().map(|byte| Bytes::copy_from_slice(&[*byte])).collect();
    let request = Request::post(place.uri("members")).header("content-type", "application/octet-stream");
    let answer = place.agent.send_pieces(request.header("content-encoding", "GZIP"), pieces).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(place.read("members"), b"one two");
    // A form.
    let names = [place.path("a"), place.path("b")];
    let content = prose(1 << 20);
    let body = gzip(&form(&[("file", Some(&names[0]), &content), ("file", Some(&names[1]), b"b")]));
    let request = Request::post("/files").header("content-type", FORM).header("content-encoding", "gzip");
    assert_eq!(place.agent.send(request, body).await.status, 200);
    assert!(place.read("a") == content && place.read("b") == b"b");
}

#[tokio::test]
async fn what_is_packed_badly_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let good = gzip(&noise(1 << 20));
    let mut wrong_sum = good.clone();
    let at = wrong_sum.len() - 6;
    wrong_sum[at] ^= 1;
    let mut damaged = good.clone();
    damaged[500_000..500_100].fill(0xff);
    let bodies = [
        ("nothing", Vec::new()),
        ("no gzip", b"hello".to_vec()),
        ("half a head", good[..5].to_vec()),
        ("half", good[..good.len() / 2].to_vec()),
        ("no end", good[..good.len() - 1].to_vec()),
        ("wrong sum", wrong_sum),
        ("damaged", damaged),
        ("more after it", [good.as_slice(), b"trailing"].concat()),
    ];
    for (name, body) in bodies {
        let answer = place.put("file", &[GZIP], body).await;
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
        assert_eq!(answer.message(), "error decompressing request body: it is no whole gzip stream");
        assert!(!fs::exists(place.path("file")).unwrap(), "{name}");
    }
}

#[tokio::test]
async fn an_answer_is_packed_if_that_is_asked_for_and_worth_it() {
    let place = Place::new();
    let contents = [
        ("empty", Bytes::new(), false),
        ("short", prose(1000), false),
        ("small", prose(20_000), true),
        ("large", prose(3 << 20), true),
        ("small-noise", noise(20_000), false),
        ("large-noise", noise(3 << 20), false),
    ];
    for (name, content, worth_it) in contents {
        fs::write(place.path(name), &content).unwrap();
        for (accept, wanted, forced) in [
            ("gzip, deflate", true, false),
            ("gzip;q=0.5", true, false),
            ("deflate, br", false, false),
            ("gzip;q=0", false, false),
            ("*", false, false),
            ("gzip, identity;q=0", true, true),
            ("*, identity;q=0", true, true),
        ] {
            let answer = place.get(name, &[("accept-encoding", accept)]).await;
            assert_eq!(
                (answer.status.as_u16(), &answer.headers["vary"]),
                (200, &"Accept-Encoding".parse().unwrap())
            );
            let packed = answer.headers.get("content-encoding").is_some_and(|value| value == "gzip");
            assert_eq!(packed, forced || wanted && worth_it, "{name} for {accept}");
            let length = answer.headers.get("content-length").map(|value| value.to_str().unwrap().to_owned());
            let body = answer.body.unwrap();
            if packed {
                assert!(length.is_none_or(|length| length == body.len().to_string()));
                assert!(gunzip(&body) == content, "{name} for {accept}");
                assert!(!worth_it || body.len() < content.len() / 2);
            } else {
                assert_eq!(length, Some(content.len().to_string()), "{name} for {accept}");
                assert!(body == content);
            }
        }
        for accept in ["identity;q=0", "*;q=0", "br, *;q=0"] {
            let answer = place.get(name, &[("accept-encoding", accept)]).await;
            assert_eq!(answer.status, 406);
            assert_eq!(
                answer.message(),
                "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]"
            );
        }
        // A part is a part of the bytes as they are.
        let answer =
            place.get(name, &[("accept-encoding", "gzip, identity;q=0"), ("range", "bytes=0-1")]).await;
        assert_eq!(answer.status, 406);
        assert!(answer.message().contains("not acceptable for Range or conditional request"));
    }
    let part = place.get("large", &[("accept-encoding", "gzip"), ("range", "bytes=10-19")]).await;
    assert_eq!((part.status.as_u16(), part.headers.get("content-encoding")), (206, None));
    // Without a size of its own.
    let symbols = place.agent.get("/files?path=/proc/kallsyms").await.body.unwrap();
    let request = Request::get("/files?path=/proc/kallsyms").header("accept-encoding", "gzip");
    let packed = place.agent.send(request, "").await;
    assert_eq!(packed.headers["content-encoding"], "gzip");
    assert!(gunzip(&packed.body.unwrap()) == symbols);
}

#[tokio::test]
async fn up_packed_and_down_packed_is_the_same() {
    let place = Place::new();
    let content = [prose(1 << 20), noise(1 << 20), prose(100)].concat();
    assert_eq!(place.put("file", &[GZIP], gzip(&content)).await.status, 200);
    let answer = place.get("file", &[("accept-encoding", "gzip")]).await;
    assert_eq!(answer.headers["content-encoding"], "gzip");
    assert!(gunzip(&answer.body.unwrap()) == content);
}

#[tokio::test]
async fn parts_of_a_file() {
    let place = Place::new();
    for (name, length) in [("small", 1000_usize), ("large", 1_000_000)] {
        let content = noise(length);
        fs::write(place.path(name), &content).unwrap();
        let get = async |range: &str| place.get(name, &[("range", range)]).await;
        let answer = get("bytes=10-19").await;
        assert_eq!(answer.status, 206);
        assert_eq!(answer.headers["content-range"].to_str().unwrap(), format!("bytes 10-19/{length}"));
        assert_eq!(answer.headers["content-length"], "10");
        assert_eq!(answer.body.unwrap(), content.slice(10..20));
        assert!(get("bytes=500-").await.body.unwrap() == content.slice(500..));
        assert!(get("bytes=-7").await.body.unwrap() == content.slice(length - 7..));
        let beyond = get("bytes=1000000-").await;
        assert_eq!(beyond.status, 416);
        assert_eq!(beyond.headers["content-range"].to_str().unwrap(), format!("bytes */{length}"));
        for whole in ["nonsense", "bytes=5-2", "bytes=0-,0-", "lines=1-2"] {
            let answer = get(whole).await;
            assert_eq!(answer.status, 200, "{whole}");
            assert!(answer.body.unwrap() == content);
        }
        // Several.
        let answer = get("bytes=0-4, 100-199,-3").await;
        assert_eq!((answer.status.as_u16(), answer.headers.get("content-range")), (206, None));
        let kind = answer.headers["content-type"].to_str().unwrap().to_owned();
        let boundary = kind.strip_prefix("multipart/byteranges; boundary=").unwrap();
        let length_said: usize = answer.headers["content-length"].to_str().unwrap().parse().unwrap();
        let mut wanted = Vec::new();
        for (index, (first, last)) in [(0, 4), (100, 199), (length - 3, length - 1)].into_iter().enumerate() {
            let start = if index == 0 { "" } else { "\r\n" };
            wanted.extend(
                format!(
                    "{start}--{boundary}\r\nContent-Range: bytes {first}-{last}/{length}\r\n\
                     Content-Type: application/octet-stream\r\n\r\n"
                )
                .bytes(),
            );
            wanted.extend_from_slice(&content[first..=last]);
        }
        wanted.extend(format!("\r\n--{boundary}--\r\n").bytes());
        let body = answer.body.unwrap();
        assert_eq!((body.len(), body.as_ref()), (length_said, wanted.as_slice()));
    }
    fs::write(place.path("empty"), "").unwrap();
    let empty = place.get("empty", &[("range", "bytes=0-99")]).await;
    assert_eq!((empty.status.as_u16(), &empty.headers["content-length"]), (200, &"0".parse().unwrap()));
}

#[tokio::test]
async fn conditions() {
    let place = Place::new();
    for (name, length) in [("small", 3000), ("large", 300_000)] {
        fs::write(place.path(name), prose(length)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(784_111_777);
        fs::File::options().write(true).open(place.path(name)).unwrap().set_modified(time).unwrap();
        let first = place.get(name, &[]).await;
        assert_eq!(first.headers["last-modified"], "Sun, 06 Nov 1994 08:49:37 GMT");
        let tag = first.headers["etag"].to_str().unwrap().to_owned();
        assert!(tag.starts_with('"') && tag.ends_with('"'));
        let (before, then) = ("Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:37 GMT");
        let range = ("range", "bytes=0-9");
        let table: [(&[(&str, &str)], u16); 13] = [
            (&[("if-none-match", &tag)], 304),
            (&[("if-none-match", "\"other\"")], 200),
            (&[("if-modified-since", then)], 304),
            (&[("if-modified-since", before)], 200),
            (&[("if-match", &tag)], 200),
            (&[("if-match", "\"other\"")], 412),
            (&[("if-unmodified-since", before)], 412),
            (&[("if-unmodified-since", then)], 200),
            (&[range, ("if-range", &tag)], 206),
            (&[range, ("if-range", "\"other\"")], 200),
            (&[range, ("if-range", then)], 206),
            (&[range, ("if-range", before)], 200),
            (&[range, ("if-none-match", &tag)], 304),
        ];
        for (headers, status) in table {
            let answer = place.get(name, headers).await;
            assert_eq!(answer.status.as_u16(), status, "{headers:?}");
            if status == 304 {
                assert_eq!(answer.headers["etag"], tag.as_str());
                assert!(answer.body.unwrap().is_empty());
            } else if status == 412 {
                assert_eq!(answer.json()["code"], 412);
            }
        }
        // The tag of a packed answer is good for asking again, and for no range.
        let packed = place.get(name, &[("accept-encoding", "gzip")]).await;
        let weak = packed.headers["etag"].to_str().unwrap();
        assert_eq!(
            (weak, packed.headers["content-encoding"].to_str().unwrap()),
            (format!("W/{tag}").as_str(), "gzip")
        );
        assert_eq!(
            place.get(name, &[("accept-encoding", "gzip"), ("if-none-match", weak)]).await.status,
            304
        );
        assert_eq!(place.get(name, &[range, ("if-range", weak)]).await.status, 200);
        fs::write(place.path(name), "new").unwrap();
        assert_eq!(place.get(name, &[("if-none-match", &tag)]).await.status, 200);
    }
    let status = place.agent.get("/files?path=/proc/self/status").await;
    assert_eq!((status.headers.get("etag"), status.headers.get("last-modified")), (None, None));
}

#[tokio::test]
async fn head_says_what_get_would() {
    let place = Place::new();
    for (name, length) in [("small", 3000_usize), ("large", 300_000)] {
        fs::write(place.path(name), prose(length)).unwrap();
        let get = place.get(name, &[]).await;
        let head = place.agent.send(Request::head(place.uri(name)), "").await;
        assert_eq!((head.status.as_u16(), head.body.unwrap().len()), (200, 0));
        let named = ["content-length", "etag", "last-modified", "content-disposition", "accept-ranges"];
        for header in named {
            assert_eq!(head.headers[header], get.headers[header], "{header}");
        }
        let part = Request::head(place.uri(name)).header("range", "bytes=0-9");
        let part = place.agent.send(part, "").await;
        assert_eq!((part.status.as_u16(), &part.headers["content-length"]), (206, &"10".parse().unwrap()));
    }
    assert_eq!(place.agent.send(Request::head(place.uri("missing")), "").await.status, 404);
}

#[tokio::test]
async fn one_file_of_several() {
    let place = Place::new();
    let compose = async |body: serde_json::Value| {
        let request = Request::post("/files/compose").header("content-type", "application/json");
        place.agent.send(request, body.to_string()).await
    };
    let big = noise(5 << 20);
    for (name, content) in [("1", big.clone()), ("2", Bytes::new()), ("3", prose(10))] {
        fs::write(place.path(name), content).unwrap();
    }
    let whole = place.path("new/whole");
    let sources = [place.path("1"), place.path("2"), place.path("3")];
    let answer = compose(json!({"source_paths": sources, "destination": whole, "username": "nobody"})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json(), json!({"path": whole, "name": "whole", "type": "file"}));
    assert!(place.read("new/whole") == [big, prose(10)].concat());
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&whole).unwrap()), 65534);
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&fs::metadata(&whole).unwrap()) & 0o777, 0o644);
    assert!(sources.iter().all(|source| !fs::exists(source).unwrap()));
    assert_eq!(fs::read_dir(place.path("new")).unwrap().count(), 1);

    fs::write(place.path("part"), "part").unwrap();
    fs::create_dir(place.path("dir")).unwrap();
    let (part, dir, missing) = (place.path("part"), place.path("dir"), place.path("missing"));
    let table = [
        (json!({"destination": whole}), 400, "source_paths must not be empty".to_owned()),
        (json!({"source_paths": [], "destination": whole}), 400, "source_paths must not be empty".to_owned()),
        (json!({"source_paths": [part]}), 400, "destination is required".to_owned()),
        (
            json!({"source_paths": [part], "destination": part}),
            400,
            format!("source path \"{part}\" cannot be the same as destination"),
        ),
        (
            json!({"source_paths": [dir], "destination": whole}),
            400,
            format!("source path is not a regular file: {dir}"),
        ),
        (
            json!({"source_paths": [part, missing], "destination": whole}),
            404,
            format!("source file not found: {missing}"),
        ),
        (
            json!({"source_paths": [part], "destination": whole, "username": "nosuch"}),
            401,
            "invalid username: 'nosuch'".to_owned(),
        ),
        (json!({"source_paths": [part], "destination": dir}), 400, format!("path '{dir}' is a directory")),
    ];
    let before = place.read("new/whole");
    for (body, status, message) in table {
        let answer = compose(body).await;
        assert_eq!((answer.status.as_u16(), answer.message()), (status, message));
    }
    let answer = place.agent.send(Request::post("/files/compose"), "{").await;
    assert!(answer.status == 400 && answer.message().starts_with("invalid request body: "));
    assert_eq!(place.agent.get("/files/compose").await.status, 405);
    assert!(place.read("new/whole") == before && place.read("part") == b"part");
}
