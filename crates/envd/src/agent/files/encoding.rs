//! Which encodings of a body a client sends and takes: `gzip`, or none.

use http::{HeaderMap, header};

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Identity,
    Gzip,
}

/// What a client takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// The client takes gzip, and would not rather have the bytes as they are.
    pub(crate) gzip: bool,
    pub(crate) identity: bool,
}

/// Reads `Accept-Encoding`. The bytes as they are can always be sent, unless a client says that they cannot.
pub(crate) fn accepted(headers: &HeaderMap) -> Accepted {
    let (mut gzip, mut identity, mut any) = (None, None, None);
    for value in headers.get_all(header::ACCEPT_ENCODING) {
        // What is no text names no encoding.
        for item in value.to_str().unwrap_or_default().split(',') {
            let (name, quality) = with_quality(item);
            let field = match name.to_ascii_lowercase().as_str() {
                "gzip" | "x-gzip" => &mut gzip,
                "identity" => &mut identity,
                "*" => &mut any,
                _ => continue,
            };
            field.get_or_insert(quality);
        }
    }
    let no_identity = identity.or(any) == Some(0.0);
    // A wildcard takes gzip too, but is no wish for it.
    let gzip = gzip.or_else(|| any.filter(|_| no_identity)).unwrap_or(0.0);
    let wish = identity.or(any).unwrap_or(0.0);
    Accepted { gzip: gzip > 0.0 && gzip >= wish, identity: !no_identity }
}

/// A name, and its quality: from 0 to 1, which it also is where none is given or it cannot be read.
fn with_quality(item: &str) -> (&str, f32) {
    let mut fields = item.split(';').map(str::trim);
    let name = fields.next().unwrap_or_default();
    let quality = fields.find_map(|field| field.strip_prefix("q=").or_else(|| field.strip_prefix("Q=")));
    let quality =
        quality.and_then(|quality| quality.parse::<f32>().ok()).filter(|quality| quality.is_finite());
    (name, quality.map_or(1.0, |quality| quality.clamp(0.0, 1.0)))
}

/// Reads `Content-Encoding`; the error is the encoding that is not known.
pub(crate) fn of_request(headers: &HeaderMap) -> Result<Encoding, String> {
    let mut values = headers.get_all(header::CONTENT_ENCODING).iter();
    let Some(value) = values.next() else { return Ok(Encoding::Identity) };
    let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
    match text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        _ if values.next().is_some() => Err(text),
        "" | "identity" => Ok(Encoding::Identity),
        "gzip" | "x-gzip" => Ok(Encoding::Gzip),
        _ => Err(text),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_clients_take() {
        let table = [
            // header, gzip, identity
            ("", false, true),
            ("gzip", true, true),
            ("gzip, deflate", true, true),
            ("gzip, deflate, br, zstd", true, true),
            ("GZIP", true, true),
            ("x-gzip", true, true),
            ("deflate, br", false, true),
            ("identity", false, true),
            ("gzip;q=0", false, true),
            ("gzip;q=0, *", false, true),
            ("gzip;q=0.5", true, true),
            ("gzip; q=0.5, identity", false, true),
            ("gzip;q=0.5, identity;q=0.1", true, true),
            ("*", false, true),
            ("*;q=1, gzip;q=0.5", false, true),
            ("identity;q=0", false, false),
            ("identity;q=0, gzip", true, false),
            ("identity;q=0, *", true, false),
            ("identity;q=0.0, *;q=0.1", true, false),
            ("*;q=0", false, false),
            ("*;q=0, gzip", true, false),
            ("*;q=0, identity", false, true),
            ("br, *;q=0", false, false),
            ("gzip;q=nan", true, true),
            (";;,,=", false, true),
        ];
        for (value, gzip, identity) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(value));
            assert_eq!(accepted(&headers), Accepted { gzip, identity }, "{value:?}");
        }
        assert_eq!(accepted(&HeaderMap::new()), Accepted { gzip: false, identity: true });
    }

    #[test]
    fn what_clients_send() {
        let read = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(value));
            of_request(&headers)
        };
        assert_eq!(of_request(&HeaderMap::new()), Ok(Encoding::Identity));
        assert_eq!(read(""), Ok(Encoding::Identity));
        assert_eq!(read("Identity"), Ok(Encoding::Identity));
        assert_eq!(read(" GZip "), Ok(Encoding::Gzip));
        assert_eq!(read("br"), Err("br".to_owned()));
        assert_eq!(read("gzip, gzip"), Err("gzip, gzip".to_owned()));
    }

    proptest! {
        #[test]
        fn a_wish_for_any_encoding_is_read_without_panic(value in "[gzipdenty*;q=0-9., ]{0,60}") {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_str(&value).unwrap());
            let accepted = accepted(&headers);
            if accepted.gzip {
                prop_assert!(value.contains("gzip") || value.contains('*'));
            }
            if !accepted.identity {
                prop_assert!(value.contains("identity") || value.contains('*'));
            }
        }
    }
}
