//! The last bytes of a text of any length.

use std::collections::VecDeque;

/// Keeps the last `limit` bytes of what is pushed.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Tail {
    pub(crate) fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit }
    }

    pub(crate) fn push(&mut self, more: &[u8]) {
        let more = &more[more.len().saturating_sub(self.limit)..];
        let over = (self.bytes.len() + more.len()).saturating_sub(self.limit);
        self.bytes.drain(..over);
        self.bytes.extend(more);
    }

    /// The last `limit` bytes of what is kept, with what is no UTF-8 replaced.
    pub(crate) fn end(&self, limit: usize) -> String {
        let end: Vec<u8> = self.bytes.iter().skip(self.bytes.len().saturating_sub(limit)).copied().collect();
        String::from_utf8_lossy(&end).into_owned()
    }

    /// What is kept, with what is no UTF-8 replaced.
    pub(crate) fn text(&self) -> String {
        let (front, back) = self.bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::Tail;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_end_of_everything(pieces in prop::collection::vec("[a-z]{0,9}", 0..9), limit in 0_usize..20) {
            let mut tail = Tail::new(limit);
            for piece in &pieces {
                tail.push(piece.as_bytes());
            }
            let all = pieces.concat();
            prop_assert_eq!(tail.text(), &all[all.len().saturating_sub(limit)..]);
            prop_assert_eq!(tail.end(3), &all[all.len().saturating_sub(limit.min(3))..]);
        }
    }
}
