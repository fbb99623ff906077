//! Which headers pass the proxy, in each direction.
//!
//! Headers of a connection end with it (RFC 9110, 7.6.1). The API key is for the proxy and goes no further: whoever
//! wrote the program in the guest would have it otherwise. What says where a request comes from is what the proxy
//! knows and never what it was told.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use wrenn_api::API_KEY_HEADER;

/// Headers that are about a connection, beside those that `Connection` names.
const OF_CONNECTIONS: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// Headers by which proxies tell where a request comes from, beside `X-Forwarded-…`.
const OF_ORIGIN: [HeaderName; 4] = [
    header::FORWARDED,
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("x-client-ip"),
    HeaderName::from_static("true-client-ip"),
];
const FORWARDED_PREFIX: &str = "x-forwarded-";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// It makes a browser forget what belongs to the whole domain, other sandboxes and the API included.
const CLEAR_SITE_DATA: HeaderName = HeaderName::from_static("clear-site-data");

/// Makes the headers of a request fit for a guest. `upgrade` is the protocol that the connection is to change to.
pub(super) fn for_guest(
    headers: &mut HeaderMap,
    host: HeaderValue,
    peer: IpAddr,
    upgrade: Option<HeaderValue>,
) {
    let takes_trailers = lists(headers, &header::TE, "trailers");
    end_with_connection(headers);
    headers.remove(API_KEY_HEADER);
    // It was answered here, as soon as the body was asked for.
    headers.remove(header::EXPECT);
    let told: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with(FORWARDED_PREFIX) || OF_ORIGIN.contains(name))
        .cloned()
        .collect();
    for name in told {
        headers.remove(name);
    }
    if let Ok(peer) = HeaderValue::from_str(&peer.to_canonical().to_string()) {
        headers.insert(FORWARDED_FOR, peer);
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    headers.insert(FORWARDED_HOST, host.clone());
    headers.insert(header::HOST, host);
    match (upgrade, takes_trailers) {
        (Some(protocol), _) => set_upgrade(headers, protocol),
        (None, true) => {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        }
        (None, false) => {}
    }
}

/// Makes the headers of an answer fit for a caller. `upgrade` is the protocol that the connection changes to.
pub(super) fn for_caller(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    end_with_connection(headers);
    headers.remove(CLEAR_SITE_DATA);
    if headers.contains_key(header::SET_COOKIE) {
        let cookies: Vec<HeaderValue> =
            headers.get_all(header::SET_COOKIE).iter().map(of_host_only).collect();
        headers.remove(header::SET_COOKIE);
        for cookie in cookies {
            headers.append(header::SET_COOKIE, cookie);
        }
    }
    if let Some(protocol) = upgrade {
        set_upgrade(headers, protocol);
    }
}

/// The protocol that the sender of these headers wants to change to, if it does.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let wants = lists(headers, &header::CONNECTION, "upgrade");
    headers.get(header::UPGRADE).filter(|_| wants).cloned()
}

fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

/// Whether one of the comma lists of a header has this word.
fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let mut values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.any(|value| value.split(',').any(|found| found.trim().eq_ignore_ascii_case(word)))
}

/// Removes what is about the connection alone.
fn end_with_connection(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A sender that names this would have its body's end mistaken.
        .filter(|name| name != header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&OF_CONNECTIONS) {
        headers.remove(name);
    }
}

/// A cookie without its `Domain`: it belongs to the host that set it, never to the domain that all sandboxes share.
fn of_host_only(cookie: &HeaderValue) -> HeaderValue {
    let is_domain = |part: &[u8]| {
        let name = part.split(|byte| *byte == b'=').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"domain")
    };
    // The first part is the name and the value, whatever the name is.
    let parts = cookie.as_bytes().split(|byte| *byte == b';').enumerate();
    let kept: Vec<&[u8]> =
        parts.filter(|(place, part)| *place == 0 || !is_domain(part)).map(|(_, part)| part).collect();
    HeaderValue::from_bytes(&kept.join(&b';')).unwrap_or_else(|_| cookie.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().unwrap();
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn sorted(headers: &HeaderMap) -> Vec<(String, String)> {
        let pair = |(name, value): (&HeaderName, &HeaderValue)| {
            (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let mut pairs: Vec<_> = headers.iter().map(pair).collect();
        pairs.sort();
        pairs
    }

    fn host() -> HeaderValue {
        HeaderValue::from_static("8000-sb-1a2b3c4d.localhost:9000")
    }

    #[test]
    fn what_a_guest_gets() {
        let mut headers = map(&[
            ("host", "other"),
            ("x-api-key", "wrn_1"),
            ("X-API-Key", "wrn_2"),
            ("authorization", "Bearer mine"),
            ("cookie", "a=b"),
            ("connection", "keep-alive, X-Mine, TE, content-length"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("proxy-authorization", "x"),
            ("proxy-connection", "x"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-prefix", "/admin"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("accept", "*/*"),
        ]);
        for_guest(&mut headers, host(), PEER, None);
        let expected = map(&[
            ("accept", "*/*"),
            ("authorization", "Bearer mine"),
            ("connection", "te"),
            ("content-length", "5"),
            ("cookie", "a=b"),
            ("host", "8000-sb-1a2b3c4d.localhost:9000"),
            ("te", "trailers"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "8000-sb-1a2b3c4d.localhost:9000"),
            ("x-forwarded-proto", "http"),
        ]);
        assert_eq!(sorted(&headers), sorted(&expected));
    }

    #[test]
    fn upgrades_pass_and_nothing_else_of_the_connection() {
        let mut headers = map(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-key", "k"),
        ]);
        let protocol = upgrade(&headers);
        assert_eq!(protocol.as_ref().unwrap(), "websocket");
        for_guest(&mut headers, host(), PEER, protocol.clone());
        assert_eq!(headers[header::CONNECTION], "upgrade");
        assert_eq!(headers[header::UPGRADE], protocol.unwrap());
        assert_eq!(headers["sec-websocket-key"], "k");
        // A word of a header alone is no upgrade.
        assert!(upgrade(&map(&[("upgrade", "websocket")])).is_none());
        assert!(upgrade(&map(&[("connection", "upgrade")])).is_none());
        assert!(upgrade(&map(&[("connection", "upgraded"), ("upgrade", "x")])).is_none());
    }

    #[test]
    fn what_a_caller_gets() {
        let mut headers = map(&[
            ("connection", "close, x-inner"),
            ("x-inner", "1"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("trailer", "x-sum"),
            ("clear-site-data", "\"*\""),
            ("set-cookie", "a=b; Domain=localhost; Path=/"),
            ("set-cookie", "domain=kept;HttpOnly; DOMAIN = .localhost ;domain"),
            ("set-cookie", "c=d"),
        ]);
        for_caller(&mut headers, None);
        let expected = map(&[
            ("set-cookie", "a=b; Path=/"),
            ("set-cookie", "domain=kept;HttpOnly"),
            ("set-cookie", "c=d"),
            ("trailer", "x-sum"),
        ]);
        assert_eq!(sorted(&headers), sorted(&expected));
    }

    proptest! {
        #[test]
        fn no_key_and_no_foreign_origin_ever_reaches_a_guest(
            pairs in proptest::collection::vec(
                ("(connection|x-api-key|x-forwarded-[a-z]{1,6}|forwarded|te|upgrade|host|[a-z]{1,8})", "[ -~]{0,20}"),
                0..20,
            ),
            named in "[ -~]{0,30}",
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs.iter().chain([&("connection".to_owned(), named)]) {
                headers.append(name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap());
            }
            let protocol = upgrade(&headers);
            for_guest(&mut headers, host(), PEER, protocol);
            prop_assert!(!headers.contains_key(API_KEY_HEADER) && !headers.contains_key(header::FORWARDED));
            let forwarded = headers.keys().filter(|name| name.as_str().starts_with(FORWARDED_PREFIX)).count();
            prop_assert_eq!(forwarded, 3);
            let hosts: Vec<HeaderValue> = headers.get_all(header::HOST).iter().cloned().collect();
            prop_assert_eq!(hosts, vec![host()]);
            prop_assert!(headers.get_all(header::CONNECTION).iter().count() <= 1);
        }

        #[test]
        fn no_cookie_is_for_the_domain(cookie in "[ -~]{0,60}") {
            let kept = of_host_only(&cookie.parse().unwrap());
            let attributes = kept.to_str().unwrap().split(';').skip(1);
            let names = attributes.map(|part| part.split('=').next().unwrap_or_default().trim());
            prop_assert_eq!(names.filter(|name| name.eq_ignore_ascii_case("domain")).count(), 0);
        }
    }
}
