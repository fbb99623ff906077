//! Which parts of a file a client wants.

use http::{HeaderMap, HeaderValue, header};

/// The most parts that one answer has.
const MAXIMUM_PARTS: usize = 64;

/// What of a file is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    Whole,
    /// At least one part, and all of them together no longer than the file.
    Parts(Vec<Part>),
    /// Nothing of what is asked for is there.
    Unsatisfiable,
}

/// From `start` on, `length` bytes, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) length: u64,
}

/// Reads the `Range` header for a file of `size` bytes. What is not understood means the whole file, as the standard
/// allows, and so does more than a whole file in parts.
pub(crate) fn wanted(headers: &HeaderMap, size: u64) -> Wanted {
    let value = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    value.and_then(|value| parse(value, size)).unwrap_or(Wanted::Whole)
}

fn parse(value: &str, size: u64) -> Option<Wanted> {
    // Some clients ask for the start of everything, to have no more than that; of nothing, nothing is the whole.
    if size == 0 {
        return None;
    }
    let mut parts = Vec::new();
    let mut total = 0_u64;
    let mut given = 0;
    for range in value.strip_prefix("bytes=")?.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        given += 1;
        if given > MAXIMUM_PARTS {
            return None;
        }
        if let Some(part) = one(range, size)? {
            total = total.saturating_add(part.length);
            parts.push(part);
        }
    }
    match parts.is_empty() {
        true if given == 0 => None,
        true => Some(Wanted::Unsatisfiable),
        false => (total <= size).then_some(Wanted::Parts(parts)),
    }
}

/// Reads one range. The outer `None` is for what is no range, the inner one for a range of which nothing is there.
#[expect(clippy::option_option, reason = "the two are not the same")]
fn one(range: &str, size: u64) -> Option<Option<Part>> {
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        let length = number(last)?.min(size);
        return Some(part(size - length, size));
    }
    let start = number(first)?;
    let end = match last {
        "" => size,
        last => {
            let last = number(last)?;
            if last < start {
                return None;
            }
            size.min(last.saturating_add(1))
        }
    };
    Some(part(start, end))
}

/// Digits and nothing else; a number that is too large is as large as can be.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

fn part(start: u64, end: u64) -> Option<Part> {
    let length = end.checked_sub(start).filter(|length| *length > 0)?;
    Some(Part { start, length })
}

impl Part {
    /// Which part this is of a file of `size` bytes, as `Content-Range` says it.
    pub(crate) fn describe(self, size: u64) -> String {
        let last = self.start.saturating_add(self.length).saturating_sub(1);
        format!("bytes {}-{last}/{size}", self.start)
    }

    /// Says so in an answer.
    pub(crate) fn mark(self, headers: &mut HeaderMap, size: u64) {
        if let Ok(value) = HeaderValue::try_from(self.describe(size)) {
            headers.insert(header::CONTENT_RANGE, value);
        }
    }
}

/// Says in a refusal how long the file is.
pub(crate) fn mark_unsatisfiable(headers: &mut HeaderMap, size: u64) {
    if let Ok(value) = HeaderValue::try_from(format!("bytes */{size}")) {
        headers.insert(header::CONTENT_RANGE, value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_a_range() {
        let some = |parts: &[(u64, u64)]| {
            Wanted::Parts(parts.iter().map(|&(start, length)| Part { start, length }).collect())
        };
        let table = [
            ("bytes=0-0", some(&[(0, 1)])),
            ("bytes=2-5", some(&[(2, 4)])),
            ("bytes=2-", some(&[(2, 8)])),
            ("bytes=-3", some(&[(7, 3)])),
            ("bytes=-99", some(&[(0, 10)])),
            ("bytes=5-99", some(&[(5, 5)])),
            ("bytes=5-99999999999999999999999", some(&[(5, 5)])),
            ("bytes=0-1,3-4", some(&[(0, 2), (3, 2)])),
            ("bytes= 0-1 , -2,, 20-", some(&[(0, 2), (8, 2)])),
            ("bytes=10-", Wanted::Unsatisfiable),
            ("bytes=-0", Wanted::Unsatisfiable),
            ("bytes=10-11,99-", Wanted::Unsatisfiable),
            ("bytes=0-,0-", Wanted::Whole),
            ("bytes=", Wanted::Whole),
            ("bytes=5-2", Wanted::Whole),
            ("bytes=0-1,x", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
            ("bytes=x-", Wanted::Whole),
        ];
        for (value, wanted_parts) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_static(value));
            assert_eq!(wanted(&headers, 10), wanted_parts, "{value}");
            assert_eq!(wanted(&headers, 0), Wanted::Whole, "{value} of nothing");
        }
        assert_eq!(wanted(&HeaderMap::new(), 10), Wanted::Whole);
        let many = format!("bytes={}", "0-0,".repeat(MAXIMUM_PARTS + 1));
        assert_eq!(parse(&many, 1000), None);
        assert_eq!(Part { start: 2, length: 3 }.describe(10), "bytes 2-4/10");
    }

    proptest! {
        #[test]
        fn parts_are_inside_the_file_and_no_more_than_it(
            value in "(bytes=)?([0-9]{0,21}-[0-9]{0,21}[ ,]{0,2}){0,5}",
            size in prop_oneof![any::<u64>(), 0_u64..100],
        ) {
            if let Some(Wanted::Parts(parts)) = parse(&value, size) {
                prop_assert!(!parts.is_empty());
                let mut total = 0_u64;
                for part in parts {
                    prop_assert!(part.length > 0);
                    prop_assert!(part.start.checked_add(part.length).is_some_and(|end| end <= size));
                    total += part.length;
                }
                prop_assert!(total <= size);
            }
        }
    }
}
