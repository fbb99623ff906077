//! Whether a client wants a file that is as it is: the conditions of HTTP, in the order that the standard gives them.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// What tells one state of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Validators {
    /// With its quotes.
    tag: String,
    /// In whole seconds, as dates in headers are.
    modified: Option<SystemTime>,
}

/// What the conditions of a request come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Serve,
    /// The client has the file as it is.
    NotModified,
    /// The file is not the one the client means.
    Failed,
}

impl Validators {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
        let tag = format!("\"{seconds:x}.{nanoseconds:x}-{:x}-{:x}\"", metadata.len(), metadata.ino());
        let modified =
            u64::try_from(seconds).ok().and_then(|time| UNIX_EPOCH.checked_add(Duration::from_secs(time)));
        Self { tag, modified }
    }

    /// Names them in an answer. What is encoded is not the same bytes, so its tag is a weak one.
    pub(crate) fn mark(&self, headers: &mut HeaderMap, encoded: bool) {
        let tag = if encoded { format!("W/{}", self.tag) } else { self.tag.clone() };
        if let Ok(value) = HeaderValue::try_from(tag) {
            headers.insert(header::ETAG, value);
        }
        // Dates that the format cannot hold are not named.
        let modified = self.modified.filter(|time| *time < latest());
        if let Some(Ok(value)) = modified.map(|time| HeaderValue::try_from(httpdate::fmt_http_date(time))) {
            headers.insert(header::LAST_MODIFIED, value);
        }
    }

    /// Decides on a request for the file.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Outcome {
        let tags = |name| headers.contains_key(&name).then(|| self.listed(headers, &name));
        let matched = match tags(header::IF_MATCH) {
            Some(listed) => listed.strongly,
            None => self.is_older(headers, &header::IF_UNMODIFIED_SINCE).unwrap_or(true),
        };
        if !matched {
            return Outcome::Failed;
        }
        let known = match tags(header::IF_NONE_MATCH) {
            Some(listed) => listed.weakly,
            None => self.is_older(headers, &header::IF_MODIFIED_SINCE).unwrap_or(false),
        };
        if known { Outcome::NotModified } else { Outcome::Serve }
    }

    /// Whether the range of a request is one of this state of the file.
    pub(crate) fn is_range_of(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(header::IF_RANGE) else { return true };
        let Ok(text) = value.to_str() else { return false };
        if text.starts_with('"') || text.starts_with("W/") {
            return text.trim() == self.tag;
        }
        httpdate::parse_http_date(text).is_ok_and(|time| Some(time) == self.modified)
    }

    /// Whether the file was last modified no later than the date in a header; `None` without a date.
    fn is_older(&self, headers: &HeaderMap, name: &HeaderName) -> Option<bool> {
        let date = httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok()?;
        Some(self.modified? <= date)
    }

    fn listed(&self, headers: &HeaderMap, name: &HeaderName) -> Listed {
        let mut listed = Listed { weakly: false, strongly: false };
        for value in headers.get_all(name) {
            let mut rest = value.to_str().unwrap_or_default().trim();
            if rest == "*" {
                return Listed { weakly: true, strongly: true };
            }
            while let Some((weak, tag, after)) = first_tag(rest) {
                listed.weakly |= tag == self.tag;
                listed.strongly |= !weak && tag == self.tag;
                rest = after;
            }
        }
        listed
    }
}

/// Whether a list of tags has the tag of a file, by either comparison.
#[derive(Debug)]
struct Listed {
    weakly: bool,
    strongly: bool,
}

/// The first tag of a list: whether it is weak, the tag with its quotes, and what comes after it.
fn first_tag(list: &str) -> Option<(bool, &str, &str)> {
    let list = list.trim_start_matches([' ', '\t', ',']);
    let (weak, tag) = match list.strip_prefix("W/") {
        Some(tag) => (true, tag),
        None => (false, list),
    };
    let end = tag.strip_prefix('"')?.find('"')? + 2;
    Some((weak, &tag[..end], &tag[end..]))
}

/// The end of the year 9999.
fn latest() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(253_402_300_799)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const THEN: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const LATER: &str = "Sun, 06 Nov 1994 08:49:38 GMT";

    fn validators() -> Validators {
        Validators { tag: "\"a\"".to_owned(), modified: Some(UNIX_EPOCH + Duration::from_secs(784_111_777)) }
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn every_condition() {
        use Outcome::{Failed, NotModified, Serve};
        let (match_, none) = (header::IF_MATCH, header::IF_NONE_MATCH);
        let (unmodified, modified) = (header::IF_UNMODIFIED_SINCE, header::IF_MODIFIED_SINCE);
        let table: [(&[(HeaderName, &str)], Outcome); 21] = [
            (&[], Serve),
            (&[(match_.clone(), "*")], Serve),
            (&[(match_.clone(), "\"b\", \"a\"")], Serve),
            (&[(match_.clone(), "W/\"a\"")], Failed),
            (&[(match_.clone(), "\"b\"")], Failed),
            (&[(match_.clone(), "a")], Failed),
            (&[(match_.clone(), "\"a\""), (unmodified.clone(), BEFORE)], Serve),
            (&[(unmodified.clone(), BEFORE)], Failed),
            (&[(unmodified.clone(), THEN)], Serve),
            (&[(unmodified, "yesterday")], Serve),
            (&[(none.clone(), "*")], NotModified),
            (&[(none.clone(), "\"b\",W/\"a\"")], NotModified),
            (&[(none.clone(), "\"a\"")], NotModified),
            (&[(none.clone(), "\"b\"")], Serve),
            (&[(none.clone(), "\"b\""), (modified.clone(), LATER)], Serve),
            (&[(none.clone(), "\"a\""), (modified.clone(), BEFORE)], NotModified),
            (&[(modified.clone(), LATER)], NotModified),
            (&[(modified.clone(), THEN)], NotModified),
            (&[(modified.clone(), BEFORE)], Serve),
            (&[(modified, "")], Serve),
            (&[(match_, "\"b\""), (none, "\"a\"")], Failed),
        ];
        for (pairs, outcome) in table {
            assert_eq!(validators().check(&headers(pairs)), outcome, "{pairs:?}");
        }
        for (value, is_of) in [
            ("\"a\"", true),
            ("W/\"a\"", false),
            ("\"b\"", false),
            (THEN, true),
            (LATER, false),
            ("x", false),
        ] {
            let headers = headers(&[(header::IF_RANGE, value)]);
            assert_eq!(validators().is_range_of(&headers), is_of, "{value}");
        }
        assert!(validators().is_range_of(&HeaderMap::new()));
    }

    #[test]
    fn what_an_answer_says() {
        let mut headers = HeaderMap::new();
        validators().mark(&mut headers, false);
        assert_eq!(
            (&headers["etag"], &headers["last-modified"]),
            (&"\"a\"".parse().unwrap(), &THEN.parse().unwrap())
        );
        validators().mark(&mut headers, true);
        assert_eq!(headers["etag"], "W/\"a\"");
        let far = UNIX_EPOCH + Duration::from_secs(1 << 40);
        let mut headers = HeaderMap::new();
        Validators { tag: "\"a\"".to_owned(), modified: Some(far) }.mark(&mut headers, false);
        assert!(!headers.contains_key("last-modified"));
    }

    proptest! {
        #[test]
        fn any_condition_is_read_without_panic(value in "[W/\"a, *]{0,40}") {
            let listed = validators().listed(&headers(&[(header::IF_MATCH, &value)]), &header::IF_MATCH);
            prop_assert!(listed.weakly || !listed.strongly);
            prop_assert!(!listed.weakly || value.contains("\"a\"") || value.trim() == "*");
        }
    }
}
