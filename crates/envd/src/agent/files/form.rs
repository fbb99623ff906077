//! Reads `multipart/form-data` as it comes, in pieces of any size.
//!
//! ```text
//!   preamble ──delimiter──► line end ──┬─ CRLF ──► head ──empty line──► content ──┐
//!                              ▲       └─ "--" ──► epilogue                       │
//!                              └───────────────────delimiter─────────────────────┘
//! ```
//!
//! What is kept between pieces is one head, whose size has a limit, and how much of a delimiter the last piece ended
//! with. Content is handed on from where it lies.

use memchr::memmem::Finder;

/// The longest head of a part.
const MAXIMUM_HEAD: usize = 16 * 1024;
/// The longest boundary, by the standard.
const MAXIMUM_BOUNDARY: usize = 70;

/// Why a form cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FormError {
    #[error("no multipart boundary param in Content-Type")]
    NoBoundary,
    #[error("malformed form: a boundary is not followed by the end of its line")]
    Boundary,
    #[error("malformed form: the head of a part is longer than {MAXIMUM_HEAD} bytes")]
    HeadTooLong,
    #[error("malformed form: the head of a part is not text")]
    HeadNotText,
}

/// What the head of a part says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) name: Option<String>,
    pub(crate) file_name: Option<String>,
}

/// Who takes the parts of a form.
pub(crate) trait Parts {
    type Error: From<FormError>;
    fn begin(&mut self, head: Head) -> Result<(), Self::Error>;
    fn content(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
    fn end(&mut self) -> Result<(), Self::Error>;
}

/// A form that is being read.
#[derive(Debug)]
pub(crate) struct Form {
    delimiter: Vec<u8>,
    finder: Finder<'static>,
    state: State,
    /// How much of a delimiter the last piece ended with; only in states that look for one.
    begun: usize,
    /// What there is of a line end or of a head.
    held: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    LineEnd,
    Head,
    Content,
    Epilogue,
}

impl Form {
    /// A form, from its `Content-Type`.
    pub(crate) fn new(content_type: &str) -> Result<Self, FormError> {
        let boundary = parameters(content_type).find(|(name, _)| name == "boundary").map(|(_, value)| value);
        let boundary = boundary
            .filter(|text| (1..=MAXIMUM_BOUNDARY).contains(&text.len()))
            .ok_or(FormError::NoBoundary)?;
        let delimiter = [b"\r\n--", boundary.as_slice()].concat();
        let finder = Finder::new(&delimiter).into_owned();
        // The first delimiter is at the start of a line because it is at the start of everything.
        Ok(Self { delimiter, finder, state: State::Preamble, begun: 2, held: Vec::new() })
    }

    /// Takes the next piece.
    pub(crate) fn push<P: Parts>(&mut self, mut piece: &[u8], parts: &mut P) -> Result<(), P::Error> {
        while !piece.is_empty() {
            piece = match self.state {
                State::Preamble | State::Content => self.until_delimiter(piece, parts)?,
                State::LineEnd => self.line_end(piece)?,
                State::Head => self.head(piece, parts)?,
                State::Epilogue => return Ok(()),
            };
        }
        Ok(())
    }

    /// Whether the last delimiter has come.
    pub(crate) fn is_complete(&self) -> bool {
        self.state == State::Epilogue
    }

    /// Hands on what comes before a delimiter, and returns what comes after it.
    fn until_delimiter<'a, P: Parts>(
        &mut self,
        piece: &'a [u8],
        parts: &mut P,
    ) -> Result<&'a [u8], P::Error> {
        let content = self.state == State::Content;
        if self.begun > 0 {
            let missing = &self.delimiter[self.begun..];
            let length = missing.len().min(piece.len());
            if piece[..length] == missing[..length] {
                self.begun += length;
                if self.begun == self.delimiter.len() {
                    self.found(parts)?;
                }
                return Ok(&piece[length..]);
            }
            // It was none, and no other begins inside of it: only its first byte is a carriage return.
            let begun = std::mem::take(&mut self.begun);
            if content {
                parts.content(&self.delimiter[..begun])?;
            }
        }
        if let Some(at) = self.finder.find(piece) {
            if content && at > 0 {
                parts.content(&piece[..at])?;
            }
            self.found(parts)?;
            return Ok(&piece[at + self.delimiter.len()..]);
        }
        let tail = piece.len() - piece.len().min(self.delimiter.len() - 1);
        let begins = piece[tail..].iter().rposition(|byte| *byte == b'\r').map(|at| tail + at);
        let end = begins.filter(|at| self.delimiter.starts_with(&piece[*at..])).unwrap_or(piece.len());
        self.begun = piece.len() - end;
        if content && end > 0 {
            parts.content(&piece[..end])?;
        }
        Ok(&[])
    }

    fn found<P: Parts>(&mut self, parts: &mut P) -> Result<(), P::Error> {
        let content = self.state == State::Content;
        (self.state, self.begun) = (State::LineEnd, 0);
        if content { parts.end() } else { Ok(()) }
    }

    /// What comes after a delimiter: blanks and the end of the line, or two dashes and the end of the form.
    fn line_end<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], FormError> {
        let (&byte, rest) = piece.split_first().ok_or(FormError::Boundary)?;
        match (self.held.as_slice(), byte) {
            ([], b'-' | b'\r') => self.held.push(byte),
            ([], b' ' | b'\t') => {}
            (b"-", b'-') => {
                self.held.clear();
                self.state = State::Epilogue;
            }
            // The end of this line is kept: with the next it makes an empty line, should there be no head at all.
            (b"\r", b'\n') => {
                self.held.push(byte);
                self.state = State::Head;
            }
            _ => return Err(FormError::Boundary),
        }
        Ok(rest)
    }

    fn head<'a, P: Parts>(&mut self, piece: &'a [u8], parts: &mut P) -> Result<&'a [u8], P::Error> {
        const END: &[u8] = b"\r\n\r\n";
        let before = self.held.len();
        let taken = piece.len().min(MAXIMUM_HEAD + END.len() - before.min(MAXIMUM_HEAD));
        self.held.extend_from_slice(&piece[..taken]);
        let search = before.saturating_sub(END.len() - 1);
        let Some(at) = memchr::memmem::find(&self.held[search..], END).map(|at| search + at) else {
            return if self.held.len() > MAXIMUM_HEAD {
                Err(FormError::HeadTooLong.into())
            } else {
                Ok(&piece[taken..])
            };
        };
        let used = at + END.len() - before;
        let head =
            std::str::from_utf8(&self.held[..at]).map_err(|_| FormError::HeadNotText).and_then(read_head);
        self.held.clear();
        self.state = State::Content;
        parts.begin(head?)?;
        Ok(&piece[used..])
    }
}

/// Reads the lines of a head. Only one of them matters.
fn read_head(text: &str) -> Result<Head, FormError> {
    let lines = text.split("\r\n").filter_map(|line| line.split_once(':'));
    let mut lines = lines.filter(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"));
    let Some((_, value)) = lines.next() else { return Ok(Head::default()) };
    let mut head = Head::default();
    let mut encoded = None;
    for (name, value) in parameters(value) {
        let field = match name.as_str() {
            "name" => &mut head.name,
            "filename" => &mut head.file_name,
            "filename*" => &mut encoded,
            _ => continue,
        };
        field.get_or_insert(String::from_utf8(value).map_err(|_| FormError::HeadNotText)?);
    }
    // The encoded form, where there is one, is the better one.
    if let Some(name) = encoded.as_deref().and_then(extended) {
        head.file_name = Some(name);
    }
    Ok(head)
}

/// Undoes `utf-8''a%20b`.
fn extended(value: &str) -> Option<String> {
    let mut fields = value.splitn(3, '\'');
    let (set, _, text) = (fields.next()?, fields.next()?, fields.next()?);
    set.eq_ignore_ascii_case("utf-8").then(|| super::query::unescape(text)).flatten()
}

/// The parameters of a header's value, names in lower case. A value may be quoted, and then a backslash quotes what
/// would end it or mean something; elsewhere it is a backslash, as some send paths of another system.
fn parameters(value: &str) -> impl Iterator<Item = (String, Vec<u8>)> {
    let mut rest = value.as_bytes();
    rest = &rest[memchr::memchr(b';', rest).unwrap_or(rest.len())..];
    std::iter::from_fn(move || {
        loop {
            rest = rest.strip_prefix(b";")?;
            let end = rest.iter().position(|byte| b"=;".contains(byte)).unwrap_or(rest.len());
            let name = String::from_utf8_lossy(&rest[..end]).trim().to_ascii_lowercase();
            let Some(after) = rest[end..].strip_prefix(b"=") else {
                rest = &rest[end..];
                continue;
            };
            let value;
            (value, rest) = one_value(after.trim_ascii_start());
            return Some((name, value));
        }
    })
}

/// A value, and what comes after it from the next semicolon on.
fn one_value(text: &[u8]) -> (Vec<u8>, &[u8]) {
    let (value, rest) = match text.strip_prefix(b"\"") {
        None => {
            let end = memchr::memchr(b';', text).unwrap_or(text.len());
            (text[..end].trim_ascii_end().to_vec(), &text[end..])
        }
        Some(mut quoted) => {
            let mut value = Vec::new();
            while let Some((&byte, after)) = quoted.split_first() {
                quoted = after;
                match (byte, quoted.first()) {
                    (b'"', _) => break,
                    (b'\\', Some(&next)) if b"()<>@,;:\\\"/[]?=".contains(&next) => {
                        value.push(next);
                        quoted = &quoted[1..];
                    }
                    _ => value.push(byte),
                }
            }
            (value, quoted)
        }
    };
    (value, &rest[memchr::memchr(b';', rest).unwrap_or(rest.len())..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, PartialEq, Eq, Clone)]
    struct Seen {
        parts: Vec<(Head, Vec<u8>)>,
        open: bool,
    }

    impl Parts for Seen {
        type Error = FormError;

        fn begin(&mut self, head: Head) -> Result<(), FormError> {
            assert!(!self.open);
            self.open = true;
            self.parts.push((head, Vec::new()));
            Ok(())
        }

        fn content(&mut self, bytes: &[u8]) -> Result<(), FormError> {
            assert!(self.open && !bytes.is_empty());
            self.parts.last_mut().unwrap().1.extend(bytes);
            Ok(())
        }

        fn end(&mut self) -> Result<(), FormError> {
            assert!(self.open);
            self.open = false;
            Ok(())
        }
    }

    fn read(body: &[u8], sizes: &[usize]) -> Result<(Seen, bool), FormError> {
        let mut form = Form::new("multipart/form-data; boundary=XX")?;
        let mut seen = Seen::default();
        let (mut rest, mut sizes) = (body, sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
            form.push(piece, &mut seen)?;
            assert!(form.held.len() <= MAXIMUM_HEAD + 4);
            rest = after;
        }
        Ok((seen, form.is_complete()))
    }

    fn head(name: &str, file_name: Option<&str>) -> Head {
        Head { name: Some(name.to_owned()), file_name: file_name.map(str::to_owned) }
    }

    #[test]
    fn parts_are_the_same_however_they_come() {
        let body = "preamble\r\n--XX \t\r\nContent-Disposition: form-data; name=\"file\"; filename=\"ü/b.txt\"\r\n\
                    Content-Type: text/plain\r\n\r\none\r\n--X\r\n\r\r\n--XX\r\ncontent-disposition: form-data; name=b\r\n\r\n\
                    \r\n--XX\r\n\r\nno head\r\n--XX--\r\nepilogue\r\n--XX\r\n";
        let expected = vec![
            (head("file", Some("ü/b.txt")), b"one\r\n--X\r\n\r".to_vec()),
            (head("b", None), Vec::new()),
            (Head::default(), b"no head".to_vec()),
        ];
        for size in 1..body.len() + 1 {
            let (seen, complete) = read(body.as_bytes(), &[size]).unwrap();
            assert!(complete && !seen.open);
            assert_eq!(seen.parts, expected, "in pieces of {size}");
        }
        for end in 0..body.find("--XX--").unwrap() + 5 {
            assert!(!read(&body.as_bytes()[..end], &[7]).unwrap().1, "after {end} bytes");
        }
    }

    #[test]
    fn what_is_no_form_is_refused() {
        assert_eq!(read(b"--XXY\r\n", &[3]).unwrap_err(), FormError::Boundary);
        assert_eq!(read(b"--XX-Y\r\n", &[3]).unwrap_err(), FormError::Boundary);
        assert_eq!(read(b"--XX\r\n\xff\r\n\r\n", &[3]).unwrap_err(), FormError::HeadNotText);
        let endless = [b"--XX\r\n".to_vec(), vec![b'a'; 2 * MAXIMUM_HEAD]].concat();
        for size in [1, 1000, 100_000] {
            assert_eq!(read(&endless, &[size]).unwrap_err(), FormError::HeadTooLong);
        }
        for kind in
            ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\"\""]
        {
            assert_eq!(Form::new(kind).unwrap_err(), FormError::NoBoundary);
        }
        assert_eq!(Form::new(&format!("x; boundary={}", "b".repeat(71))).unwrap_err(), FormError::NoBoundary);
        assert!(Form::new("multipart/form-data; charset=utf-8; Boundary=\"a b\"").is_ok());
    }

    #[test]
    fn names_of_files() {
        let file_name = |parameter: &str| {
            read_head(&format!("Content-Disposition: form-data; name=\"file\"; {parameter}"))
                .unwrap()
                .file_name
        };
        let table = [
            ("filename=a", Some("a")),
            ("FileName = \"a;b=c\" ; x", Some("a;b=c")),
            (r#"filename="a\"b\\c""#, Some(r#"a"b\c"#)),
            (r#"filename="C:\dir\file""#, Some(r"C:\dir\file")),
            ("filename=\"a%22b\"", Some("a%22b")),
            ("filename=\"open", Some("open")),
            ("filename=x; filename*=UTF-8''%C3%BC%20b", Some("ü b")),
            ("filename=x; filename*=latin1''%FC", Some("x")),
            ("filename=x; filename*=utf-8''%FC", Some("x")),
            ("filename", None),
            ("", None),
        ];
        for (parameter, name) in table {
            assert_eq!(file_name(parameter).as_deref(), name, "{parameter}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic_and_alike_in_any_pieces(
            body in prop::collection::vec(
                prop_oneof![
                    Just(b"\r\n--XX".to_vec()), Just(b"\r\n".to_vec()), Just(b"--".to_vec()), Just(b"\r".to_vec()),
                    Just(b"Content-Disposition: form-data; name=\"file\"; filename=".to_vec()),
                    prop::collection::vec(any::<u8>(), 0..8),
                ],
                0..24,
            ),
            sizes in prop::collection::vec(1_usize..40, 1..6),
        ) {
            let body = body.concat();
            prop_assert_eq!(read(&body, &sizes), read(&body, &[usize::MAX]));
        }

        #[test]
        fn what_is_sent_is_what_is_read(
            parts in prop::collection::vec(("[a-z/ ü]{1,9}", prop::collection::vec(any::<u8>(), 0..300)), 0..5),
            sizes in prop::collection::vec(1_usize..200, 1..6),
        ) {
            prop_assume!(parts.iter().all(|(_, content)| memchr::memmem::find(content, b"\r\n--XX").is_none()));
            let mut body = Vec::new();
            for (name, content) in &parts {
                let head = format!("--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
                body.extend([head.as_bytes(), content, b"\r\n"].concat());
            }
            body.extend(b"--XX--\r\n");
            let (seen, complete) = read(&body, &sizes).unwrap();
            prop_assert!(complete);
            let expected: Vec<_> =
                parts.iter().map(|(name, content)| (head("file", Some(name)), content.clone())).collect();
            prop_assert_eq!(seen.parts, expected);
        }

        #[test]
        fn any_head_is_read_without_panic(text in ".{0,80}") {
            let _ = read_head(&format!("Content-Disposition: {text}"));
            let _ = Form::new(&text);
        }
    }
}
