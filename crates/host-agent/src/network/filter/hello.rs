//! The server name in the first message of a TLS connection (RFC 8446, RFC 6066). Pure, and for bytes from anybody.
//!
//! Nothing is decrypted. Where the true name is encrypted (ECH), the outer one counts.

/// The most that a client may send before its first message is whole.
pub(in super::super) const HELLO_LIMIT: usize = 32 * 1024;

/// What the first bytes of a connection say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Heard {
    /// Not enough yet.
    Incomplete,
    /// A whole first message, and the name in it if it has one.
    Hello(Option<String>),
    /// Not TLS.
    Other,
}

/// Looks at the first bytes of a connection.
#[must_use]
pub(in super::super) fn listen(bytes: &[u8]) -> Heard {
    // The message may be in several records, each with five bytes before it.
    let (mut rest, mut message) = (bytes, Vec::new());
    loop {
        match rest {
            [22, 3, _, high, low, data @ ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if length == 0 || length > 16 * 1024 {
                    return Heard::Other;
                }
                let present = data.len().min(length);
                message.extend(&data[..present]);
                rest = &data[present..];
            }
            [] | [22] | [22, 3, ..] if rest.len() < 5 => {}
            _ => return Heard::Other,
        }
        match message.as_slice() {
            [1, a, b, c, body @ ..] => {
                let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap_or(usize::MAX);
                if length > HELLO_LIMIT {
                    return Heard::Other;
                }
                if let Some(body) = body.get(..length) {
                    return server_name(body).map_or(Heard::Other, Heard::Hello);
                }
            }
            [] | [1, ..] => {}
            _ => return Heard::Other,
        }
        if rest.len() < 5 {
            return if bytes.len() >= HELLO_LIMIT { Heard::Other } else { Heard::Incomplete };
        }
    }
}

/// None if the message makes no sense.
fn server_name(body: &[u8]) -> Option<Option<String>> {
    let mut hello = Reader(body);
    hello.bytes(2 + 32)?;
    hello.with_length(1)?;
    hello.with_length(2)?;
    hello.with_length(1)?;
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = Reader(hello.with_length(2)?);
    let mut name = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let data = extensions.with_length(2)?;
        if kind != 0 {
            continue;
        }
        let mut list = Reader(Reader(data).with_length(2)?);
        while !list.0.is_empty() {
            let is_host = list.number(1)? == 0;
            let text = list.with_length(2)?;
            // Two names are one too many: who knows which of them a server takes.
            if !is_host || name.is_some() {
                return None;
            }
            name = Some(String::from_utf8(text.to_vec()).ok()?.to_ascii_lowercase());
        }
    }
    Some(name)
}

/// What is left of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, width: usize) -> Option<usize> {
        Some(self.bytes(width)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    fn with_length(&mut self, width: usize) -> Option<&'a [u8]> {
        let length = self.number(width)?;
        self.bytes(length)
    }
}

#[cfg(test)]
pub(in super::super) mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn with_length(width: usize, data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        [&length[4 - width..], data].concat()
    }

    /// A first message in records of at most so many bytes.
    pub(in super::super::super) fn hello(names: &[&str], record: usize) -> Vec<u8> {
        let list = names
            .iter()
            .flat_map(|name| [vec![0], with_length(2, name.as_bytes())].concat())
            .collect::<Vec<_>>();
        let mut extensions = [vec![0, 43], with_length(2, &[2, 3, 4])].concat();
        if !names.is_empty() {
            extensions.extend([vec![0, 0], with_length(2, &with_length(2, &list))].concat());
        }
        let body = [
            vec![3, 3],
            vec![7; 32],
            with_length(1, &[9; 32]),
            with_length(2, &[0x13, 1]),
            with_length(1, &[0]),
            with_length(2, &extensions),
        ]
        .concat();
        let message = [vec![1], with_length(3, &body)].concat();
        message.chunks(record).flat_map(|part| [vec![22, 3, 1], with_length(2, part)].concat()).collect()
    }

    #[test]
    fn names_are_heard() {
        for record in [7, 100, 16_000] {
            let name = |names: &[&str]| listen(&hello(names, record));
            assert_eq!(name(&["WWW.example.com"]), Heard::Hello(Some("www.example.com".to_owned())));
            assert_eq!(name(&[]), Heard::Hello(None));
            assert_eq!(name(&["a.example", "b.example"]), Heard::Other);
        }
        for other in [
            &b"GET / HTTP/1.1\r\n"[..],
            &[22, 2, 1, 0, 9],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0, 1, 2],
            &[21, 3, 1],
        ] {
            assert_eq!(listen(other), Heard::Other, "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in vec(any::<u8>(), 0..300)) {
            let _ = listen(&bytes);
            let _ = listen(&[&[22, 3, 1, 1, 0, 1, 0, 0, 250], &*bytes].concat());
        }

        #[test]
        fn what_comes_in_parts_is_waited_for(name in "[a-z]{1,20}\\.[a-z]{1,9}", record in 1_usize..200, part: prop::sample::Index) {
            let whole = hello(&[&name], record);
            prop_assert_eq!(listen(&whole), Heard::Hello(Some(name)));
            prop_assert_eq!(listen(&whole[..part.index(whole.len())]), Heard::Incomplete);
        }

        #[test]
        fn no_change_is_too_strange(at: prop::sample::Index, byte: u8) {
            let mut bytes = hello(&["a.example"], 50);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = listen(&bytes);
        }
    }
}
