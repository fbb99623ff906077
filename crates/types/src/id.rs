//! Ids: what names a sandbox, a host, a stack, a team, a template.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How many hexadecimal digits follow the prefix of a sandbox or host id.
pub const ID_DIGITS: usize = 8;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text does not have the form that the kind of id has.
    #[error("{kind} is {form}")]
    Form {
        /// What was to be parsed, with its article.
        kind: &'static str,
        /// The form it must have, in words.
        form: &'static str,
    },
}

/// A text of `ID_DIGITS` lower-case hexadecimal digits, from the system's randomness.
fn random_digits() -> String {
    let mut bytes = [0_u8; ID_DIGITS / 2];
    // The system's generator fails only where the kernel has none, and there nothing of ours can run.
    getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_digits(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal, $form:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new random id. Whoever stores it retries when it is taken.
            #[must_use]
            pub fn random() -> Self {
                Self(format!(concat!($prefix, "{}"), random_digits()))
            }

            /// The id as it is written everywhere.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                match text.strip_prefix($prefix) {
                    Some(digits) if is_digits(digits) => Ok(Self(text.to_owned())),
                    _ => Err(ParseIdError::Form { kind: $kind, form: $form }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

hex_id!(
    /// One sandbox: `sb-` and eight hexadecimal digits.
    SandboxId,
    "sb-",
    "a sandbox id",
    "sb- and 8 lower-case hexadecimal digits"
);
hex_id!(
    /// One machine with a host agent: `host-` and eight hexadecimal digits.
    HostId,
    "host-",
    "a host id",
    "host- and 8 lower-case hexadecimal digits"
);
hex_id!(
    /// Frozen memory and disk of a sandbox: `sn-` and eight hexadecimal digits.
    SnapshotId,
    "sn-",
    "a snapshot id",
    "sn- and 8 lower-case hexadecimal digits"
);
hex_id!(
    /// One file of a chain of disks: `ly-` and eight hexadecimal digits.
    LayerId,
    "ly-",
    "a layer id",
    "ly- and 8 lower-case hexadecimal digits"
);
hex_id!(
    /// One stack on a machine: what marks its processes, namespaces and directories as its own.
    InstanceId,
    "",
    "an instance id",
    "8 lower-case hexadecimal digits"
);

/// Who owns sandboxes, keys and templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TeamId(pub Uuid);

impl TeamId {
    /// A new id that sorts by its time.
    #[must_use]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for TeamId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for TeamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name of a template or a snapshot: a letter or digit, then up to 63 of letters, digits, `.`, `_`, `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

impl TemplateName {
    /// The name as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let mut bytes = text.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if first && rest && text.len() <= 64 {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseIdError::Form {
                kind: "a template name",
                form: "a letter or digit, then up to 63 letters, digits, dots, underscores and dashes",
            })
        }
    }
}

impl TryFrom<String> for TemplateName {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, ParseIdError> {
        text.parse()
    }
}

impl From<TemplateName> for String {
    fn from(name: TemplateName) -> Self {
        name.0
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_random_id_parses_as_itself() {
        let id = SandboxId::random();
        assert_eq!(id.as_str().parse::<SandboxId>().unwrap(), id);
        assert_eq!(serde_json::from_str::<SandboxId>(&format!("\"{id}\"")).unwrap(), id);
    }

    #[test]
    fn what_is_no_id_is_refused() {
        let long = "a".repeat(10_240);
        for text in [
            "",
            "../..",
            "sb-",
            "sb-../../..",
            "sb-0123456",
            "sb-012345678",
            "sb-0123456G",
            "SB-01234567",
            &long,
        ] {
            assert!(text.parse::<SandboxId>().is_err(), "{text}");
            assert!(serde_json::from_value::<SandboxId>(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn template_names() {
        for good in ["base", "minimal-ubuntu", "A.b_c-9", &"a".repeat(64)] {
            assert!(good.parse::<TemplateName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_parsed_id_can_leave_a_directory(text in ".{0,80}") {
            for parsed in [
                text.parse::<SandboxId>().map(String::from),
                text.parse::<HostId>().map(String::from),
                text.parse::<TemplateName>().map(String::from),
            ].into_iter().flatten() {
                prop_assert!(!parsed.contains('/') && !parsed.starts_with('.') && !parsed.is_empty());
            }
        }
    }
}
