//! What comes back from an agent, taken apart as it arrives: heads and chunks of HTTP/1.1, frames of Connect. Pure.
//!
//! ```text
//!  bytes ──► Head ──► Chunks (or a length) ──► Frames ──► one JSON message each
//! ```
//!
//! Nothing is decoded that need not be: what is measured is the agent, and this runs on the same processors.

use anyhow::{Context as _, Result, bail, ensure};

/// No line between chunks is longer.
const LINE_LIMIT: usize = 256;
/// No frame is longer: agents send 32 KiB of output at once.
const FRAME_LIMIT: usize = 8 << 20;
/// The flag of the last frame of a stream.
const LAST: u8 = 2;

/// The head of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// The status.
    pub(crate) status: u16,
    /// How the end of the body is told.
    pub(crate) body: Length,
    /// The body is compressed.
    pub(crate) compressed: bool,
}

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    /// So many bytes.
    Known(u64),
    /// By a last chunk.
    Chunked,
}

impl Head {
    /// Reads a head, and says how many bytes it had; none while there is more to come.
    ///
    /// # Errors
    /// It is none, or its body could not be told from what follows it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
        let text = std::str::from_utf8(&bytes[..end]).context("a head is text")?;
        let mut lines = text.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 "));
        let status = status.and_then(|line| line.get(..3)).context("a head begins with a status")?;
        let status = status.parse().context("a status is a number")?;
        let mut head = Self { status, body: Length::Known(0), compressed: false };
        for line in lines {
            let (name, value) = line.split_once(':').context("a header has a colon")?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    head.body = Length::Known(value.parse().context("a length is a number")?);
                }
                "transfer-encoding" => {
                    ensure!(value.eq_ignore_ascii_case("chunked"), "the body is sent as {value}");
                    head.body = Length::Chunked;
                }
                "content-encoding" => head.compressed = !value.eq_ignore_ascii_case("identity"),
                "connection" => ensure!(!value.eq_ignore_ascii_case("close"), "the agent hangs up"),
                _ => {}
            }
        }
        Ok(Some((head, end + 4)))
    }
}

/// A body in chunks, however it is cut.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    state: Chunk,
    line: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    #[default]
    Size,
    Data(u64),
    AfterData,
    Trailer,
    Over,
}

impl Chunks {
    /// The last chunk has been seen, and all that belongs to it.
    #[must_use]
    pub(crate) fn is_over(&self) -> bool {
        self.state == Chunk::Over
    }

    /// Takes bytes until the body ends, and says how many. What they hold goes to `sink`.
    ///
    /// # Errors
    /// They are no chunks, or those of `sink`.
    pub(crate) fn take(&mut self, bytes: &[u8], mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<usize> {
        let mut rest = bytes;
        while !rest.is_empty() && self.state != Chunk::Over {
            if let Chunk::Data(left) = self.state {
                let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                sink(&rest[..length])?;
                rest = &rest[length..];
                let left = left - length as u64;
                self.state = if left == 0 { Chunk::AfterData } else { Chunk::Data(left) };
                continue;
            }
            let (part, ended) = match rest.iter().position(|byte| *byte == b'\n') {
                Some(end) => (&rest[..=end], true),
                None => (rest, false),
            };
            self.line.extend_from_slice(part.get(..LINE_LIMIT.min(part.len())).unwrap_or_default());
            ensure!(self.line.len() < LINE_LIMIT, "a line between chunks is too long");
            rest = &rest[part.len()..];
            if ended {
                self.state = after_line(self.state, &self.line)?;
                self.line.clear();
            }
        }
        Ok(bytes.len() - rest.len())
    }
}

fn after_line(state: Chunk, line: &[u8]) -> Result<Chunk> {
    let line = std::str::from_utf8(line).context("a line between chunks is text")?.trim_end();
    Ok(match state {
        Chunk::Size => {
            let size = line.split(';').next().unwrap_or_default().trim();
            match u64::from_str_radix(size, 16).context("the size of a chunk")? {
                0 => Chunk::Trailer,
                size => Chunk::Data(size),
            }
        }
        Chunk::AfterData if line.is_empty() => Chunk::Size,
        Chunk::AfterData => bail!("a chunk is longer than it said"),
        _ if line.is_empty() => Chunk::Over,
        _ => Chunk::Trailer,
    })
}

/// Frames of a Connect stream, however they are cut: a byte of flags, four of length, a message.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    held: Vec<u8>,
}

impl Frames {
    /// Takes bytes. Each frame that is whole goes to `sink`: its message, and whether it is the last.
    ///
    /// # Errors
    /// A frame is too long, or those of `sink`.
    pub(crate) fn take(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(&[u8], bool) -> Result<()>,
    ) -> Result<()> {
        self.held.extend_from_slice(bytes);
        let mut rest = self.held.as_slice();
        while let Some((&[flags, a, b, c, d], message)) = rest.split_first_chunk() {
            let length = usize::try_from(u32::from_be_bytes([a, b, c, d]))?;
            ensure!(length <= FRAME_LIMIT, "a frame of {length} bytes");
            let Some((message, after)) = message.split_at_checked(length) else { break };
            sink(message, flags & LAST != 0)?;
            rest = after;
        }
        let used = self.held.len() - rest.len();
        self.held.drain(..used);
        Ok(())
    }

    /// Nothing is left of a frame that never became whole.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// How many bytes of output the message of a process brings; none if it is about something else.
///
/// The base64 is measured and not decoded.
#[must_use]
pub(crate) fn output_length(message: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"stdout\":";
    /// It is at the beginning, behind `{"event":{"data":{`, or not there.
    const WITHIN: usize = 96;
    let beginning = &message[..message.len().min(WITHIN)];
    let after = beginning.windows(NAME.len()).position(|window| window == NAME)? + NAME.len();
    let open = after + message[after..].iter().position(|byte| *byte == b'"')?;
    let close = message.iter().rposition(|byte| *byte == b'"').filter(|close| *close > open)?;
    let text = &message[open + 1..close];
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').take(2).count();
    Some(((text.len() / 4 * 3).saturating_sub(padding)) as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunked(pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            bytes.extend_from_slice(piece);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        bytes
    }

    fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for message in messages {
            bytes.push(0);
            bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(message);
        }
        bytes
    }

    #[test]
    fn heads_say_how_their_body_ends() {
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Encoding: gzip\r\n\r\nbody";
        let (head, length) = Head::parse(text).unwrap().unwrap();
        assert_eq!(head, Head { status: 200, body: Length::Known(12), compressed: true });
        assert_eq!(&text[length..], b"body");
        let (head, _) =
            Head::parse(b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: Chunked\r\n\r\n").unwrap().unwrap();
        assert_eq!((head.status, head.body), (404, Length::Chunked));
        assert_eq!(Head::parse(b"HTTP/1.1 204 No Content\r\n").unwrap(), None);
        assert!(Head::parse(b"SSH-2.0\r\n\r\n").is_err());
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").is_err());
    }

    #[test]
    fn output_is_measured_and_not_decoded() {
        assert_eq!(output_length(br#"{"event":{"data":{"stdout":"aGVsbG8="}}}"#), Some(5));
        assert_eq!(output_length(br#"{"event": {"data": {"stdout": "aGVsbG8h"}}}"#), Some(6));
        assert_eq!(output_length(br#"{"event":{"end":{"exited":true}}}"#), None);
        assert_eq!(output_length(br#"{"event":{"data":{"stdout":"#), None);
    }

    proptest! {
        #[test]
        fn chunks_do_not_depend_on_how_they_are_cut(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in 1_usize..30,
        ) {
            let mut bytes = chunked(&pieces);
            let whole = bytes.len();
            bytes.extend_from_slice(b"HTTP/1.1 200");
            let (mut chunks, mut body, mut taken) = (Chunks::default(), Vec::new(), 0);
            for part in bytes.chunks(cut) {
                taken += chunks.take(part, |data| { body.extend_from_slice(data); Ok(()) }).unwrap();
            }
            prop_assert!(chunks.is_over());
            prop_assert_eq!(taken, whole);
            prop_assert_eq!(body, pieces.concat());
        }

        #[test]
        fn frames_do_not_depend_on_how_they_are_cut(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in 1_usize..30,
        ) {
            let (mut frames, mut got) = (Frames::default(), Vec::new());
            for part in framed(&messages).chunks(cut) {
                frames.take(part, |message, last| { got.push((message.to_vec(), last)); Ok(()) }).unwrap();
            }
            prop_assert!(frames.is_empty());
            prop_assert_eq!(got, messages.into_iter().map(|message| (message, false)).collect::<Vec<_>>());
        }

        #[test]
        fn nonsense_is_an_error_or_waits_for_more(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Head::parse(&bytes);
            let _ = output_length(&bytes);
            let mut length = 0;
            let taken = Chunks::default().take(&bytes, |data| { length += data.len(); Ok(()) });
            prop_assert!(length <= bytes.len());
            prop_assert!(taken.is_err() || taken.is_ok_and(|taken| taken <= bytes.len()));
            let _ = Frames::default().take(&bytes, |_, _| Ok(()));
        }
    }
}
