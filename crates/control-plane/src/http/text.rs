//! Bytes that come in pieces, as text that is never cut within a character.

/// Turns pieces of bytes into pieces of text. What is not UTF-8 becomes U+FFFD; a character that has begun
/// waits for its rest.
#[derive(Debug, Default)]
pub(crate) struct Utf8Pieces {
    begun: Vec<u8>,
}

impl Utf8Pieces {
    /// The text up to the last whole character; may be empty.
    pub(crate) fn push(&mut self, piece: &[u8]) -> String {
        let joined;
        let bytes = if self.begun.is_empty() {
            piece
        } else {
            self.begun.extend_from_slice(piece);
            joined = std::mem::take(&mut self.begun);
            &joined
        };
        let mut text = String::with_capacity(bytes.len());
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunk.invalid().is_empty() {
                continue;
            }
            let unfinished = chunks.peek().is_none()
                && std::str::from_utf8(chunk.invalid()).is_err_and(|error| error.error_len().is_none());
            if unfinished {
                self.begun = chunk.invalid().to_vec();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text
    }

    /// What was begun and never finished.
    pub(crate) fn finish(&mut self) -> Option<String> {
        let begun = std::mem::take(&mut self.begun);
        (!begun.is_empty()).then(|| String::from_utf8_lossy(&begun).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn through(bytes: &[u8], cuts: &[usize]) -> String {
        let mut pieces = Utf8Pieces::default();
        let mut text = String::new();
        let mut from = 0;
        for cut in cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect::<std::collections::BTreeSet<_>>() {
            text += &pieces.push(&bytes[from..cut]);
            from = cut;
        }
        text += &pieces.push(&bytes[from..]);
        text + &pieces.finish().unwrap_or_default()
    }

    #[test]
    fn a_character_is_never_cut() {
        let mut pieces = Utf8Pieces::default();
        assert_eq!(pieces.push("a€".as_bytes().split_at(2).0), "a");
        assert_eq!(pieces.push(&"a€".as_bytes()[2..3]), "");
        assert_eq!(pieces.push(&"a€b".as_bytes()[3..]), "€b");
        assert_eq!(pieces.finish(), None);
        assert_eq!(pieces.push(b"\xffx\xe2"), "\u{fffd}x");
        assert_eq!(pieces.finish().as_deref(), Some("\u{fffd}"));
    }

    proptest! {
        #[test]
        fn text_survives_any_cutting(text in "\\PC{0,40}", cuts: [usize; 4]) {
            prop_assert_eq!(through(text.as_bytes(), &cuts), text);
        }

        #[test]
        fn bytes_look_the_same_however_they_are_cut(bytes: Vec<u8>, cuts: [usize; 4]) {
            prop_assert_eq!(through(&bytes, &cuts), String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
