//! What of a guest's agent is for the host alone.
//!
//! The agent listens on one port for two kinds of callers: clients of the sandbox, who come through the edge, and the
//! host itself. Both come from the same address, the guest's gateway, so the agent cannot tell them apart; the edge
//! can, and it must never forward a request of a client to one of these paths. It answers 404 instead.
//!
//! | path | what it does |
//! |---|---|
//! | `/init` | makes the guest itself: token, clock, randomness, names |
//! | `/snapshot/…` | stops every process and closes the guest until the next `/init` |
//! | `/freeze`, `/unfreeze` | stops every process for a while |
//! | `/connect/…` | a stream to a port of the guest's loopback interface, without a token |
//! | the others | what published agents have under these names; ours has not, and never will for clients |

/// The port on which the agent listens.
pub const AGENT_PORT: u16 = 49983;

/// Paths of the agent that only the host may ask for. One that ends in `/` stands for all that begin with it.
pub const HOST_ONLY_PATHS: [&str; 10] = [
    "/init",
    "/snapshot/",
    "/freeze",
    "/unfreeze",
    "/connect/",
    "/fsfreeze",
    "/fsthaw",
    "/collapse",
    "/upgrade",
    "/debug/",
];

/// Paths that need no access token: the agent answers the first to anybody, and the second to who has a signature.
pub const WITHOUT_TOKEN_PATHS: [&str; 2] = ["/health", "/files"];

/// Whether only the host may ask for this path, given as it stands in the request, without the query.
///
/// The agent compares paths byte by byte and decodes nothing. This is stricter: it looks through percent signs,
/// letter case and doubled slashes, so that it does not matter whether something between the edge and the agent
/// tidies paths up.
#[must_use]
pub fn is_host_only(path: &str) -> bool {
    let path = tidy(path);
    HOST_ONLY_PATHS.iter().any(|only| match only.strip_suffix('/') {
        Some(stem) => path.strip_prefix(stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        None => path == *only,
    })
}

/// The path in its plainest form: decoded once, in lower case, without empty or dotted segments.
fn tidy(path: &str) -> String {
    let decoded = String::from_utf8_lossy(&decode(path.as_bytes())).to_ascii_lowercase();
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split(['/', '\\']) {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    format!("/{}", segments.join("/"))
}

fn decode(path: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        let (byte, left) = match rest {
            [b'%', high, low, left @ ..] => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, left),
                _ => (*first, tail),
            },
            _ => (*first, tail),
        };
        decoded.push(byte);
        rest = left;
    }
    decoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_host_alone_may_ask_for_these() {
        for path in [
            "/init",
            "/init/",
            "//init",
            "/INIT",
            "/%69nit",
            "/x/../init",
            "/./init",
            "/snapshot/prepare",
            "/snapshot",
            "/connect/8080",
            "/connect",
            "/freeze",
            "/unfreeze",
        ] {
            assert!(is_host_only(path), "{path}");
        }
        for path in
            ["/", "/health", "/files", "/initial", "/snapshots", "/process.Process/Start", "/files/init"]
        {
            assert!(!is_host_only(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_has_an_answer(path in ".{0,100}") {
            let _ = is_host_only(&path);
        }

        #[test]
        fn no_decoration_hides_a_path(
            index in 0..HOST_ONLY_PATHS.len(),
            slashes in "/{0,3}",
            escaped in any::<bool>(),
        ) {
            let only = HOST_ONLY_PATHS[index];
            let path = match escaped {
                false => only.to_owned(),
                true => format!("/{}", only[1..].bytes().map(|byte| format!("%{byte:02X}")).collect::<String>()),
            };
            let path = format!("{slashes}{path}");
            prop_assert!(is_host_only(&path), "{}", path);
        }
    }
}
