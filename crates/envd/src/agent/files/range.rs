//! Which part of a file a client wants.

use http::{HeaderMap, HeaderValue, header};

/// The part of a file that is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    /// From `start` on, `length` bytes, at least one.
    Some {
        start: u64,
        length: u64,
    },
    /// Nothing of what is asked for is there.
    Unsatisfiable,
}

/// Reads the `Range` header for a file of `size` bytes. What is not understood, and more than one range, means the
/// whole file, as the standard allows.
pub(crate) fn wanted(headers: &HeaderMap, size: u64) -> Part {
    let value = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    value.and_then(|value| parse(value, size)).unwrap_or(Part::Whole)
}

fn parse(value: &str, size: u64) -> Option<Part> {
    let (first, last) = value.strip_prefix("bytes=")?.trim().split_once('-')?;
    if first.is_empty() {
        let length = last.parse::<u64>().ok()?.min(size);
        return Some(part(size - length, size));
    }
    let start = first.parse::<u64>().ok()?;
    let end = match last {
        "" => size,
        last => {
            let last = last.parse::<u64>().ok()?;
            if last < start {
                return None;
            }
            size.min(last.saturating_add(1))
        }
    };
    Some(part(start, end))
}

fn part(start: u64, end: u64) -> Part {
    match end.checked_sub(start) {
        None | Some(0) => Part::Unsatisfiable,
        Some(length) => Part::Some { start, length },
    }
}

/// Says in an answer which part it is.
pub(crate) fn mark(headers: &mut HeaderMap, start: u64, length: u64, size: u64) {
    let last = start.saturating_add(length).saturating_sub(1);
    if let Ok(value) = HeaderValue::try_from(format!("bytes {start}-{last}/{size}")) {
        headers.insert(header::CONTENT_RANGE, value);
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
        let some = |start, length| Part::Some { start, length };
        let table = [
            ("bytes=0-0", some(0, 1)),
            ("bytes=2-5", some(2, 4)),
            ("bytes=2-", some(2, 8)),
            ("bytes=-3", some(7, 3)),
            ("bytes=-99", some(0, 10)),
            ("bytes=5-99", some(5, 5)),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("bytes=x-", Part::Whole),
        ];
        for (value, part) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_static(value));
            assert_eq!(wanted(&headers, 10), part, "{value}");
        }
        assert_eq!(wanted(&HeaderMap::new(), 10), Part::Whole);
    }

    proptest! {
        #[test]
        fn a_part_is_inside_the_file(value in "bytes=[0-9]{0,21}-[0-9]{0,21}", size in any::<u64>()) {
            if let Some(Part::Some { start, length }) = parse(&value, size) {
                prop_assert!(length > 0);
                prop_assert!(start.checked_add(length).is_some_and(|end| end <= size));
            }
        }
    }
}
