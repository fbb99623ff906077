//! The query of a file request.

use crate::agent::auth::FileQuery;

/// The longest query.
const MAXIMUM: usize = 16 * 1024;

/// Why a query cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryError {
    #[error("the query is longer than {MAXIMUM} bytes")]
    TooLong,
    #[error("the query is not text")]
    NotText,
    #[error("the query has '{0}' more than once")]
    Twice(&'static str),
}

/// Reads what we know of a query; other keys are passed over. A key that comes twice is refused: one value might be
/// signed and the other used.
pub(crate) fn parse(query: &str) -> Result<FileQuery, QueryError> {
    if query.len() > MAXIMUM {
        return Err(QueryError::TooLong);
    }
    let mut parsed = FileQuery::default();
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, field) = match decode(key)?.as_str() {
            "path" => ("path", &mut parsed.path),
            "username" => ("username", &mut parsed.username),
            "signature" => ("signature", &mut parsed.signature),
            "signature_expiration" => ("signature_expiration", &mut parsed.expiration),
            _ => continue,
        };
        if field.replace(decode(value)?).is_some() {
            return Err(QueryError::Twice(name));
        }
    }
    // An empty user name is none.
    parsed.username = parsed.username.filter(|name| !name.is_empty());
    Ok(parsed)
}

/// Undoes form encoding: `+` is a space, `%41` is `A`. A stray `%` stands for itself.
fn decode(text: &str) -> Result<String, QueryError> {
    decode_as(text, b' ').ok_or(QueryError::NotText)
}

/// Undoes `%41` alone; `None` if what comes of it is no text.
pub(super) fn unescape(text: &str) -> Option<String> {
    decode_as(text, b'+')
}

fn decode_as(text: &str, plus: u8) -> Option<String> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = if byte == b'%' { escape(bytes.get(at + 1), bytes.get(at + 2)) } else { None };
        match (byte, escaped) {
            (_, Some(value)) => {
                decoded.push(value);
                at += 2;
            }
            (b'+', None) => decoded.push(plus),
            (other, None) => decoded.push(other),
        }
        at += 1;
    }
    String::from_utf8(decoded).ok()
}

fn escape(high: Option<&u8>, low: Option<&u8>) -> Option<u8> {
    let digit = |byte: Option<&u8>| u8::try_from(char::from(*byte?).to_digit(16)?).ok();
    Some(digit(high)? << 4 | digit(low)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_query_is_read_as_forms_are() {
        let query =
            parse("path=%2Fa+b%2f%C3%A9&username=user&signature=v1_a%2Bb%2Fc&signature_expiration=12&x=y");
        let query = query.unwrap();
        assert_eq!(query.path.as_deref(), Some("/a b/é"));
        assert_eq!(query.username.as_deref(), Some("user"));
        assert_eq!(query.signature.as_deref(), Some("v1_a+b/c"));
        assert_eq!(query.expiration.as_deref(), Some("12"));
        assert_eq!(parse("path=100%").unwrap().path.as_deref(), Some("100%"));
        assert_eq!(parse("path=1&x=2&p%61th=1").unwrap_err(), QueryError::Twice("path"));
        assert_eq!(parse("path").unwrap().path.as_deref(), Some(""));
        assert_eq!(parse("").unwrap().path, None);
        assert_eq!(parse("path=%ff").unwrap_err(), QueryError::NotText);
        assert_eq!(parse(&"a".repeat(20_000)).unwrap_err(), QueryError::TooLong);
    }

    proptest! {
        #[test]
        fn any_query_is_read_without_panic(query in "[a-z%+&=0-9]{0,80}") {
            let _ = parse(&query);
        }

        #[test]
        fn what_was_encoded_is_what_is_read(path in ".{0,40}") {
            let encoded: String = path.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let query = parse(&format!("path={encoded}")).unwrap();
            prop_assert_eq!(query.path, Some(path));
        }
    }
}
