//! API keys and access tokens: random, and never shown by `Debug`.

use std::{fmt, str::FromStr};

/// The text is not of the form of an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an API key is wrn_ and 32 lower-case hexadecimal digits")]
pub struct ParseApiKeyError;

fn random_hex<const N: usize>() -> String {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a caller of the public API shows: `wrn_` and 32 hexadecimal digits, 128 random bits.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A new key.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("wrn_{}", random_hex::<16>()))
    }

    /// The whole key, to be shown once or hashed.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The first ten characters, by which a person tells keys apart.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.0[..10]
    }
}

impl FromStr for ApiKey {
    type Err = ParseApiKeyError;

    fn from_str(text: &str) -> Result<Self, ParseApiKeyError> {
        let digits = text.strip_prefix("wrn_").ok_or(ParseApiKeyError)?;
        if digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseApiKeyError)
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", self.prefix())
    }
}

/// What envd asks of every caller: 256 random bits, made per sandbox.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken(String);

impl AccessToken {
    /// A new token.
    #[must_use]
    pub fn random() -> Self {
        Self(random_hex::<32>())
    }

    /// A token that was stored or sent before.
    #[must_use]
    pub fn from_stored(text: String) -> Self {
        Self(text)
    }

    /// The token itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// How a token is kept in a file that only its owner may read: `#[serde(with = "wrenn_types::secret::stored")]`.
/// There is no other way to serialise one, so that none gets into an answer or a log by accident.
pub mod stored {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::AccessToken;

    /// Writes the token itself.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(token: &AccessToken, serializer: S) -> Result<S::Ok, S::Error> {
        token.0.serialize(serializer)
    }

    /// Reads a token.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AccessToken, D::Error> {
        String::deserialize(deserializer).map(AccessToken)
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_parse_and_hide() {
        let key = ApiKey::random();
        assert_eq!(key.expose().len(), 36);
        assert_eq!(key.expose().parse::<ApiKey>().unwrap(), key);
        assert!(!format!("{key:?}").contains(&key.expose()[10..]));
        for bad in ["", "wrn_", "wrn_xyz", &key.expose().to_uppercase(), &format!("{}0", key.expose())] {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad}");
        }
    }
}
