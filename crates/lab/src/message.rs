//! What the machine says: messages in a stream of bytes, one kind and one length before each.
//!
//! ```text
//!  Ready ─► for each program: (Output | ErrorOutput)* ─► Ended ─► … ─► Files* ─► Done
//!  Failed, instead of anything, is the last one: the machine could not do what it is there for
//! ```
//!
//! The host trusts the machine with nothing but this stream: a length that no message has ends the reading.

use thiserror::Error;

/// The longest content of a message, in bytes. What is longer is sent in parts.
pub const MAXIMUM: usize = 1 << 16;
/// A byte for the kind, four for the length, big-endian.
const HEAD: usize = 5;

/// What the machine says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Everything is mounted and loaded; programs start now. Holds the kernel's version.
    Ready(String),
    /// A part of what a program wrote to its standard output.
    Output(Vec<u8>),
    /// A part of what it wrote to its standard error.
    ErrorOutput(Vec<u8>),
    /// A program has ended.
    Ended(Exit),
    /// A part of a tar archive of the files that were left for the host.
    Files(Vec<u8>),
    /// Nothing comes any more.
    Done,
    /// The machine cannot go on, and why.
    Failed(String),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// As a shell says it in one number: a signal is 128 and its number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// What is not a stream of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A kind that no message has.
    #[error("there is no message of the kind {0}")]
    Kind(u8),
    /// A length that no message has.
    #[error("a message of {0} bytes is too long")]
    Length(u32),
    /// A content that the kind does not have.
    #[error("the content of a message of the kind {0} cannot be read")]
    Content(u8),
}

const READY: u8 = 1;
const OUTPUT: u8 = 2;
const ERROR_OUTPUT: u8 = 3;
const ENDED: u8 = 4;
const FILES: u8 = 5;
const DONE: u8 = 6;
const FAILED: u8 = 7;

const BY_CODE: u8 = 0;
const BY_SIGNAL: u8 = 1;

impl Message {
    /// As bytes. A content beyond [`MAXIMUM`] is cut off.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let exit;
        let (kind, content): (u8, &[u8]) = match self {
            Self::Ready(version) => (READY, version.as_bytes()),
            Self::Output(bytes) => (OUTPUT, bytes),
            Self::ErrorOutput(bytes) => (ERROR_OUTPUT, bytes),
            Self::Ended(how) => {
                exit = match *how {
                    Exit::Code(code) => [BY_CODE, code],
                    Exit::Signal(signal) => [BY_SIGNAL, signal],
                };
                (ENDED, &exit)
            }
            Self::Files(bytes) => (FILES, bytes),
            Self::Done => (DONE, &[]),
            Self::Failed(why) => (FAILED, why.as_bytes()),
        };
        let content = content.get(..MAXIMUM).unwrap_or(content);
        let length = u32::try_from(content.len()).unwrap_or(0);
        let mut bytes = Vec::with_capacity(HEAD + content.len());
        bytes.push(kind);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(content);
        bytes
    }

    fn decode(kind: u8, content: &[u8]) -> Result<Self, Malformed> {
        let text = || String::from_utf8_lossy(content).into_owned();
        Ok(match (kind, content) {
            (READY, _) => Self::Ready(text()),
            (OUTPUT, _) => Self::Output(content.to_vec()),
            (ERROR_OUTPUT, _) => Self::ErrorOutput(content.to_vec()),
            (ENDED, &[BY_CODE, code]) => Self::Ended(Exit::Code(code)),
            (ENDED, &[BY_SIGNAL, signal]) => Self::Ended(Exit::Signal(signal)),
            (FILES, _) => Self::Files(content.to_vec()),
            (DONE, []) => Self::Done,
            (FAILED, _) => Self::Failed(text()),
            (ENDED | DONE, _) => return Err(Malformed::Content(kind)),
            _ => return Err(Malformed::Kind(kind)),
        })
    }
}

/// Takes bytes as they come and gives messages.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How many of them were part of messages that were given.
    used: usize,
}

impl Decoder {
    /// Takes more bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or none until more bytes are fed.
    ///
    /// # Errors
    /// This is no stream of messages, and nothing more can be read from it.
    pub fn next_message(&mut self) -> Result<Option<Message>, Malformed> {
        let left = self.bytes.get(self.used..).unwrap_or_default();
        let Some((&[kind, a, b, c, d], rest)) = left.split_first_chunk::<HEAD>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > MAXIMUM {
            return Err(Malformed::Length(length));
        }
        let Some(content) = rest.get(..size) else { return Ok(None) };
        let message = Message::decode(kind, content)?;
        self.used += HEAD + size;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = Message> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            ".{0,20}".prop_map(Message::Ready),
            bytes().prop_map(Message::Output),
            bytes().prop_map(Message::ErrorOutput),
            any::<u8>().prop_map(|code| Message::Ended(Exit::Code(code))),
            any::<u8>().prop_map(|signal| Message::Ended(Exit::Signal(signal))),
            bytes().prop_map(Message::Files),
            Just(Message::Done),
            ".{0,20}".prop_map(Message::Failed),
        ]
    }

    proptest! {
        #[test]
        fn messages_come_back_however_the_stream_is_cut(
            messages in proptest::collection::vec(message(), 0..20),
            step in 1_usize..700,
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for part in stream.chunks(step) {
                decoder.feed(part);
                while let Some(message) = decoder.next_message().unwrap() {
                    found.push(message);
                }
            }
            prop_assert_eq!(found, messages);
        }

        #[test]
        fn no_stream_panics_or_goes_on_for_ever(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            let mut count = 0;
            while let Ok(Some(_)) = decoder.next_message() {
                count += 1;
                prop_assert!(count * HEAD <= bytes.len());
            }
        }
    }

    #[test]
    fn what_no_message_is_is_refused() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            decoder.next_message().unwrap_err()
        };
        assert_eq!(refused(&[2, 0, 1, 0, 1]), Malformed::Length(65537));
        assert_eq!(refused(&[9, 0, 0, 0, 0]), Malformed::Kind(9));
        assert_eq!(refused(&[6, 0, 0, 0, 1, 0]), Malformed::Content(6));
        assert_eq!(refused(&[4, 0, 0, 0, 2, 7, 0]), Malformed::Content(4));
    }

    #[test]
    fn a_content_that_is_too_long_is_cut_off_and_can_be_read() {
        let mut decoder = Decoder::default();
        decoder.feed(&Message::Output(vec![7; MAXIMUM + 1]).encode());
        assert_eq!(decoder.next_message(), Ok(Some(Message::Output(vec![7; MAXIMUM]))));
    }

    #[test]
    fn a_signal_is_a_number_as_shells_say_it() {
        assert_eq!((Exit::Code(101).code(), Exit::Signal(9).code()), (101, 137));
    }
}
