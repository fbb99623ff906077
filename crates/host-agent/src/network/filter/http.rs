//! The head of an HTTP/1 request, and where its body ends (RFC 9112). Pure, and for bytes from anybody.
//!
//! A connection carries **one request**. Its head is passed on with `Connection: close`, its body as far as it
//! goes, and nothing after it: so no second request, which could be for another host, reaches a server. What can
//! be read in two ways is not read at all, as then the server might read it in the other one.

use wrenn_types::network::is_domain_name;

/// The most that a head may take.
pub(super) const HEAD_LIMIT: usize = 32 * 1024;

/// What the first bytes of a connection say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// Not enough yet.
    Incomplete,
    /// A whole head.
    Head(Head),
    /// Not a request that is plain to read.
    Other,
}

/// The head of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    /// The name that it is for, in lower case; none if it names an address.
    pub(super) name: Option<String>,
    /// How many bytes it took.
    pub(super) length: usize,
    /// What to send instead.
    pub(super) forwarded: Vec<u8>,
    /// What comes after it.
    pub(super) body: Body,
}

/// What of the bytes after a head belongs to the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// So many.
    Length(u64),
    /// As they say themselves.
    Chunks(Chunks),
}

/// Headers that are about the connection and not about the request: ours is another one.
const OF_THE_CONNECTION: [&str; 7] =
    ["connection", "keep-alive", "proxy-connection", "upgrade", "http2-settings", "te", "trailer"];

/// Looks at the first bytes of a connection.
#[must_use]
pub(super) fn listen(bytes: &[u8]) -> Heard {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let Some(end) = end else {
        let plausible = bytes.first().is_none_or(u8::is_ascii_uppercase) && bytes.len() < HEAD_LIMIT;
        return if plausible { Heard::Incomplete } else { Heard::Other };
    };
    if end + 4 > HEAD_LIMIT {
        return Heard::Other;
    }
    std::str::from_utf8(&bytes[..end])
        .ok()
        .and_then(|text| head(text, end + 4))
        .map_or(Heard::Other, Heard::Head)
}

fn head(text: &str, length: usize) -> Option<Head> {
    let mut lines = text.split("\r\n");
    let request = lines.next()?;
    let mut forwarded = format!("{request}\r\n").into_bytes();
    let (mut host, mut size, mut chunked) = (None, None, false);
    for line in lines {
        let (name, value) = line.split_once(':')?;
        let is_name = !name.is_empty() && name.bytes().all(is_token);
        // A control character, a lone carriage return or line feed among them, may end a line for somebody.
        if !is_name || value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
            return None;
        }
        let (name, value) = (name.to_ascii_lowercase(), value.trim_matches([' ', '\t']));
        match name.as_str() {
            "host" if host.is_none() => host = Some(value),
            "content-length" if size.is_none() => size = Some(decimal(value)?),
            "transfer-encoding" if !chunked && value.eq_ignore_ascii_case("chunked") => chunked = true,
            "host" | "content-length" | "transfer-encoding" => return None,
            _ => {}
        }
        if !OF_THE_CONNECTION.contains(&name.as_str()) {
            forwarded.extend(format!("{line}\r\n").bytes());
        }
    }
    let host = host?;
    let mut words = request.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_plain = words.next().is_none()
        && !method.is_empty()
        && method.bytes().all(is_token)
        && method != "CONNECT"
        && matches!(version, "HTTP/1.1" | "HTTP/1.0")
        && !target.bytes().any(|byte| byte.is_ascii_control());
    // A server takes the name in the first line rather than the one in the header, so they have to agree.
    let agrees = target.starts_with('/')
        || target == "*"
        || scheme_removed(target).is_some_and(|rest| {
            rest.split(['/', '?', '#']).next().is_some_and(|authority| authority.eq_ignore_ascii_case(host))
        });
    if !is_plain || !agrees || (chunked && (size.is_some() || version == "HTTP/1.0")) {
        return None;
    }
    forwarded.extend(b"Connection: close\r\n\r\n");
    let body = if chunked { Body::Chunks(Chunks::default()) } else { Body::Length(size.unwrap_or(0)) };
    Some(Head { name: name_of(host)?, length, forwarded, body })
}

fn scheme_removed(target: &str) -> Option<&str> {
    let (scheme, rest) = target.split_once("://")?;
    scheme.eq_ignore_ascii_case("http").then_some(rest)
}

/// The name in a `Host` header; the inner one is none where it is an address.
fn name_of(host: &str) -> Option<Option<String>> {
    let (name, port) = host.rsplit_once(':').unwrap_or((host, "80"));
    if !port.is_empty() && decimal(port).is_none_or(|port| port > u16::MAX.into()) {
        return None;
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    Some(is_domain_name(name).then(|| name.to_ascii_lowercase()))
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A number as it may be written here: without a sign.
fn decimal(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl Body {
    /// How many of the next bytes belong to it.
    ///
    /// # Errors
    /// They make no sense.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<usize, NoSense> {
        match self {
            Self::Length(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                Ok(taken)
            }
            Self::Chunks(chunks) => chunks.take(bytes),
        }
    }

    /// Whether all of it was there.
    #[must_use]
    pub(super) fn is_over(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunks(chunks) => chunks.at == At::End,
        }
    }
}

/// A body that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body of a request makes no sense")]
pub(super) struct NoSense;

/// Where in a body of chunks a reader is.
///
/// ```text
///  ┌─► size ─► its line feed ─► data ─► carriage return ─► line feed ─┐
///  └──────────────────┬───────────────────────────────────────────────┘
///                     └ 0 ─► two more, without any trailer ─► end
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Chunks {
    at: At,
    size: u64,
    digits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum At {
    #[default]
    Size,
    SizeFeed,
    Data,
    DataReturn,
    DataFeed,
    LastReturn,
    LastFeed,
    End,
}

impl Chunks {
    fn take(&mut self, bytes: &[u8]) -> Result<usize, NoSense> {
        let mut taken = 0;
        while let Some(byte) = bytes.get(taken) {
            self.at = match (self.at, byte) {
                (At::End, _) => break,
                (At::Data, _) => {
                    let rest = bytes.len() - taken;
                    let part = usize::try_from(self.size).unwrap_or(usize::MAX).min(rest);
                    self.size -= part as u64;
                    taken += part;
                    if self.size == 0 {
                        self.at = At::DataReturn;
                    }
                    continue;
                }
                // An extension of a chunk is nothing that clients send, and servers have read it in two ways.
                (At::Size, b'\r') if self.digits > 0 => At::SizeFeed,
                (At::Size, digit) if self.digits < 15 => {
                    let digit = char::from(*digit).to_digit(16).ok_or(NoSense)?;
                    self.size = self.size << 4 | u64::from(digit);
                    self.digits += 1;
                    At::Size
                }
                (At::SizeFeed, b'\n') if self.size == 0 => At::LastReturn,
                (At::SizeFeed, b'\n') => At::Data,
                (At::DataReturn, b'\r') => At::DataFeed,
                (At::DataFeed, b'\n') => {
                    self.digits = 0;
                    At::Size
                }
                (At::LastReturn, b'\r') => At::LastFeed,
                (At::LastFeed, b'\n') => At::End,
                _ => return Err(NoSense),
            };
            taken += 1;
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn heard(text: &str) -> Option<Head> {
        match listen(text.as_bytes()) {
            Heard::Head(head) => Some(head),
            Heard::Other => None,
            Heard::Incomplete => panic!("{text:?}"),
        }
    }

    #[test]
    fn the_name_is_heard() {
        for (host, name) in [
            ("Example.com", Some("example.com")),
            ("example.com.:8080", Some("example.com")),
            ("example.com:", Some("example.com")),
            ("203.0.113.10:80", None),
            ("", None),
        ] {
            let head = heard(&format!("GET / HTTP/1.1\r\nHost: {host} \r\n\r\n")).unwrap();
            assert_eq!(head.name.as_deref(), name, "{host}");
        }
        let full = heard("GET http://a.example/x HTTP/1.1\r\nhost:a.example\r\n\r\nrest").unwrap();
        assert_eq!((full.name.as_deref(), full.length), (Some("a.example"), 51));
    }

    #[test]
    fn a_connection_is_for_one_request() {
        let text = "POST /x HTTP/1.1\r\nHost: a.example\r\nConnection: keep-alive, x\r\nUpgrade: websocket\r\n\
                    Content-Length: 3\r\nX-Other: Yes\r\n\r\nabcGET / HTTP/1.1\r\n";
        let mut head = heard(text).unwrap();
        assert_eq!(
            String::from_utf8(head.forwarded).unwrap(),
            "POST /x HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\nX-Other: Yes\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(head.body.take(&text.as_bytes()[head.length..]), Ok(3));
        assert!(head.body.is_over());
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_not_read() {
        for wrong in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://a@b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET a HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT /x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1 x\r\nHost: a\r\n\r\n",
            "GET /\nx HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n",
            "get\r\n\r\n",
        ] {
            assert_eq!(heard(wrong), None, "{wrong:?}");
        }
        assert_eq!(listen(b"SSH-2.0-x\r\n"), Heard::Incomplete, "it may become a request");
        assert_eq!(listen(b"\x16\x03"), Heard::Other);
        assert_eq!(listen(&[b'A'; HEAD_LIMIT]), Heard::Other);
    }

    #[test]
    fn the_end_of_chunks_is_found() {
        let body = b"4\r\nWiki\r\n0A\r\n0123456789\r\n0\r\n\r\n";
        for step in 1..body.len() {
            let mut chunks = Body::Chunks(Chunks::default());
            let mut taken = 0;
            let all = [&body[..], b"GET / HTTP/1.1"].concat();
            while !chunks.is_over() {
                taken += chunks.take(&all[taken..(taken + step).min(all.len())]).unwrap();
            }
            assert_eq!(taken, body.len(), "{step}");
        }
        for wrong in [
            "\r\n",
            "x\r\n",
            "1;a=b\r\n",
            "1\n",
            "1\r\nab",
            "0\r\nX: y\r\n\r\n",
            "1\r\na\n",
            "0123456789abcdef\r\n",
        ] {
            assert_eq!(Chunks::default().take(wrong.as_bytes()), Err(NoSense), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in vec(any::<u8>(), 0..300), text in "[A-Z]{3} / HTTP/1.1\r\n([A-Za-z-]{1,9}:[ a-z0-9.:]{0,9}\r\n){0,5}\r\n") {
            let _ = listen(&bytes);
            let _ = listen(text.as_bytes());
            let _ = Chunks::default().take(&bytes);
        }

        /// What is sent on is read in the same way.
        #[test]
        fn what_is_forwarded_says_the_same(
            name in "[a-z]{1,9}\\.[a-z]{1,9}", others in vec("X-[A-Za-z]{1,9}: [ -~]{0,20}", 0..5), size in prop::option::of(0_u64..99),
        ) {
            let size = size.map(|size| format!("Content-Length: {size}\r\n")).unwrap_or_default();
            let others = others.iter().map(|line| format!("{line}\r\n")).collect::<String>();
            let text = format!("PUT / HTTP/1.1\r\n{others}Host: {name}\r\n{size}Connection: x\r\n\r\n");
            let head = heard(&text).unwrap();
            prop_assert_eq!(head.length, text.len());
            let again = heard(std::str::from_utf8(&head.forwarded).unwrap()).unwrap();
            prop_assert_eq!(again.name.as_deref(), Some(name.as_str()));
            prop_assert_eq!((&again.body, &again.forwarded), (&head.body, &head.forwarded));
        }
    }
}
