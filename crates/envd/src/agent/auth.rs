//! Who may speak to the agent: the access token, signed file links, and the user that a request names.
//!
//! The token says that a request may come in at all. The user name of HTTP Basic says as whom a program runs;
//! it is a choice, not a proof, and a choice of who has shown the token. A signature stands for the token on one path, for
//! one operation, as one user.

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The header that carries the token.
pub(crate) const TOKEN_HEADER: &str = "x-access-token";
/// What a request without the right token is told. Published clients show this text.
pub(crate) const UNAUTHORIZED: &str =
    "unauthorized access, please provide a valid access token or method signing if supported";

/// An access token. Its text never appears in a log.
#[derive(Clone)]
pub(crate) struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Token(…)")
    }
}

impl Token {
    /// A token of this text; there is no empty token.
    pub(crate) fn new(text: String) -> Option<Self> {
        (!text.is_empty()).then_some(Self(text))
    }

    /// The text, for the agent that comes after this one.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }

    /// Compares in a time that does not depend on where the two differ.
    pub(crate) fn matches(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

/// What a signed link allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
}

/// What a file request may go on by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// The token, or there is none: whoever asks may choose a user.
    Token,
    /// A signature, which covers the user too: nobody but who signed has chosen one.
    Signature,
}

/// What a file request says of itself in its query.
#[derive(Debug, Clone, Default)]
pub(crate) struct FileQuery {
    pub(crate) path: Option<String>,
    pub(crate) username: Option<String>,
    pub(crate) signature: Option<String>,
    pub(crate) expiration: Option<String>,
}

/// Why a file request is refused. The texts are part of the contract.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FileAuthError {
    #[error("access token present in header but does not match")]
    WrongToken,
    #[error("missing signature query parameter")]
    MissingSignature,
    #[error("invalid signature")]
    WrongSignature,
    #[error("signature is already expired")]
    Expired,
}

/// Whether the token in the headers is the right one.
pub(crate) fn has_token(headers: &HeaderMap, token: &Token) -> bool {
    headers.get(TOKEN_HEADER).is_some_and(|given| token.matches(given.as_bytes()))
}

/// Whether a file request may go on: by the token in its header, or by a signature. `now` is in seconds.
pub(crate) fn check_file_request(
    headers: &HeaderMap,
    query: &FileQuery,
    operation: Operation,
    token: &Token,
    now: u64,
) -> Result<Proof, FileAuthError> {
    if headers.contains_key(TOKEN_HEADER) {
        return if has_token(headers, token) { Ok(Proof::Token) } else { Err(FileAuthError::WrongToken) };
    }
    let given = query.signature.as_deref().ok_or(FileAuthError::MissingSignature)?;
    let wanted = signature(query, operation, token);
    if !bool::from(wanted.as_bytes().ct_eq(given.as_bytes())) {
        return Err(FileAuthError::WrongSignature);
    }
    match &query.expiration {
        None => Ok(Proof::Signature),
        // The signature covers the text, so one that is no number was signed so, and never expires in no way.
        Some(expiration) if expiration.parse::<u64>().is_ok_and(|expiration| expiration >= now) => {
            Ok(Proof::Signature)
        }
        Some(_) => Err(FileAuthError::Expired),
    }
}

/// `v1_` and the digest of path, operation, user, token, and the expiry if there is one.
fn signature(query: &FileQuery, operation: Operation, token: &Token) -> String {
    let mut hash = Sha256::new();
    hash.update(query.path.as_deref().unwrap_or_default());
    hash.update(match operation {
        Operation::Read => ":read:",
        Operation::Write => ":write:",
    });
    hash.update(query.username.as_deref().unwrap_or_default());
    hash.update(":");
    hash.update(&token.0);
    if let Some(expiration) = &query.expiration {
        hash.update(":");
        hash.update(expiration);
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(hash.finalize()))
}

/// The user that a request names, if it names one.
pub(crate) fn basic_user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let name = decoded.split_once(':').map_or(decoded.as_str(), |(name, _)| name);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token::new("0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0".to_owned()).unwrap()
    }

    fn query() -> FileQuery {
        FileQuery {
            path: Some("hello.txt".to_owned()),
            username: Some("user".to_owned()),
            ..FileQuery::default()
        }
    }

    #[test]
    fn the_published_vector() {
        assert_eq!(
            signature(&query(), Operation::Read, &token()),
            "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"
        );
    }

    #[test]
    fn a_signature_is_checked_before_its_expiry() {
        let headers = HeaderMap::new();
        let check =
            |query: &FileQuery, operation| check_file_request(&headers, query, operation, &token(), 1000);
        let mut query = query();
        assert_eq!(check(&query, Operation::Read), Err(FileAuthError::MissingSignature));
        query.expiration = Some("999".to_owned());
        query.signature = Some("v1_nonsense".to_owned());
        assert_eq!(check(&query, Operation::Read), Err(FileAuthError::WrongSignature));
        query.signature = Some(signature(&query, Operation::Read, &token()));
        assert_eq!(check(&query, Operation::Read), Err(FileAuthError::Expired));
        query.expiration = Some("1000".to_owned());
        query.signature = Some(signature(&query, Operation::Read, &token()));
        assert_eq!(check(&query, Operation::Read), Ok(Proof::Signature));
        assert_eq!(check(&query, Operation::Write), Err(FileAuthError::WrongSignature));
    }

    #[test]
    fn a_wrong_token_is_not_saved_by_a_signature() {
        let mut headers = HeaderMap::new();
        headers.insert(TOKEN_HEADER, HeaderValue::from_static("wrong"));
        let mut query = query();
        query.signature = Some(signature(&query, Operation::Read, &token()));
        let answer = check_file_request(&headers, &query, Operation::Read, &token(), 0);
        assert_eq!(answer, Err(FileAuthError::WrongToken));
    }

    #[test]
    fn basic_names_the_user() {
        let user = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            basic_user(&headers)
        };
        assert_eq!(user("Basic dXNlcjo="), Some("user".to_owned()));
        assert_eq!(user("basic cm9vdDpzZWNyZXQ="), Some("root".to_owned()));
        assert_eq!(user("Basic Og=="), None);
        assert_eq!(user("Basic ***"), None);
        assert_eq!(user("Bearer abc"), None);
    }

    /// A request for a file; few different ones, so that two are often nearly the same.
    fn request() -> impl Strategy<Value = (Operation, FileQuery)> {
        let operation = prop_oneof![Just(Operation::Read), Just(Operation::Write)];
        let path = prop_oneof![Just(None), "[ab]{0,2}(:(read|write):?){0,2}[ab]{0,1}".prop_map(Some)];
        let user = prop_oneof![Just(None), "(read|write|a)?".prop_map(Some)];
        let expiration = prop_oneof![Just(None), "[12]?[0-9]".prop_map(Some)];
        (operation, path, user, expiration).prop_map(|(operation, path, username, expiration)| {
            (operation, FileQuery { path, username, signature: None, expiration })
        })
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(value in "[ -~]{0,60}") {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(header::AUTHORIZATION, value);
            }
            basic_user(&headers);
        }

        /// Names of users have no colon, so what is signed can be read in one way only.
        #[test]
        fn a_signature_is_good_for_what_was_signed_and_nothing_else(
            signed in request(), asked in prop::option::of(request()), now in 0..30_u64,
        ) {
            let (operation, mut query) = asked.unwrap_or_else(|| signed.clone());
            let (signed_operation, signed) = signed;
            query.signature = Some(signature(&signed, signed_operation, &token()));
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let same = signed_operation == operation
                && text(&signed.path) == text(&query.path)
                && text(&signed.username) == text(&query.username)
                && signed.expiration == query.expiration;
            let live = query.expiration.as_ref().is_none_or(|end| end.parse::<u64>().unwrap() >= now);
            let expected = match (same, live) {
                (false, _) => Err(FileAuthError::WrongSignature),
                (true, false) => Err(FileAuthError::Expired),
                (true, true) => Ok(Proof::Signature),
            };
            prop_assert_eq!(check_file_request(&HeaderMap::new(), &query, operation, &token(), now), expected);
            let other = Token::new("another".to_owned()).unwrap();
            let answer = check_file_request(&HeaderMap::new(), &query, operation, &other, now);
            prop_assert_eq!(answer, Err(FileAuthError::WrongSignature));
        }

        #[test]
        fn no_text_but_the_signature_passes(given in ".{0,60}") {
            let mut query = query();
            query.signature = Some(given);
            let answer = check_file_request(&HeaderMap::new(), &query, Operation::Read, &token(), 0);
            prop_assert_eq!(answer, Err(FileAuthError::WrongSignature));
        }
    }
}
