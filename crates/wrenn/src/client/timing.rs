//! The `Server-Timing` header: how long each phase of a call took, as the server saw it.

use http::HeaderMap;

/// One phase.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// Milliseconds, where the server says them.
    pub milliseconds: Option<f64>,
    /// What it is, where the server says it.
    pub description: Option<String>,
}

/// The phases that the headers of an answer tell, in their order. What cannot be understood is left out:
/// this is for people who look, and nothing depends on it.
#[must_use]
pub(super) fn phases(headers: &HeaderMap) -> Vec<Phase> {
    let values = headers.get_all("server-timing").into_iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(parse).collect()
}

fn parse(text: &str) -> Vec<Phase> {
    split(text, ',').into_iter().filter_map(phase).collect()
}

fn phase(text: &str) -> Option<Phase> {
    let mut parts = split(text, ';').into_iter();
    let name = parts.next()?.trim().to_owned();
    let mut phase = Phase { name, milliseconds: None, description: None };
    for part in parts {
        let Some((key, value)) = part.split_once('=') else { continue };
        let value = value.trim().trim_matches('"');
        match key.trim().to_ascii_lowercase().as_str() {
            "dur" => phase.milliseconds = value.parse().ok().filter(|number: &f64| number.is_finite()),
            "desc" => phase.description = Some(value.to_owned()),
            _ => {}
        }
    }
    (!phase.name.is_empty()).then_some(phase)
}

/// Splits at a separator that is not within double quotes.
fn split(text: &str, separator: char) -> Vec<&str> {
    let mut quoted = false;
    text.split(|c: char| {
        quoted ^= c == '"';
        c == separator && !quoted
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(name: &str, milliseconds: Option<f64>, description: Option<&str>) -> Phase {
        Phase { name: name.to_owned(), milliseconds, description: description.map(str::to_owned) }
    }

    #[test]
    fn the_usual_forms() {
        assert_eq!(
            parse("place;dur=1.5, restore;dur=40;desc=\"map, then run; go\" ,hit,;dur=3, odd;dur=fast"),
            [
                of("place", Some(1.5), None),
                of("restore", Some(40.0), Some("map, then run; go")),
                of("hit", None, None),
                of("odd", None, None),
            ]
        );
        assert_eq!(parse(""), []);
    }

    #[test]
    fn several_headers_are_one_list() {
        let mut headers = HeaderMap::new();
        headers.append("server-timing", "a;dur=1".parse().unwrap());
        headers.append("server-timing", "b;dur=2".parse().unwrap());
        assert_eq!(phases(&headers), [of("a", Some(1.0), None), of("b", Some(2.0), None)]);
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text: String) {
            for phase in parse(&text) {
                prop_assert!(!phase.name.trim().is_empty());
            }
        }
    }
}
