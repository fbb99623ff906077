//! A file to a client.
//!
//! A small file is read at once, on the same visit to a blocking thread that opened it, and what was read is its
//! length. This is also right for the files of `/proc` and `/sys`, whose stated sizes mean nothing. A large file is
//! sent piece by piece: with its length, unless it states none, and the next piece is read while one is sent.
//!
//! | asked for | answered with |
//! |---|---|
//! | nothing special | the file |
//! | `Accept-Encoding` with gzip | the file packed, unless it is short or packs badly; the wish is not an order |
//! | the same, and no identity | the file packed |
//! | one range; several | 206 and that part; 206 and `multipart/byteranges` |
//! | a range or condition, and no identity | 406: they are about the bytes as they are |
//! | conditions | 304, or 412, if they say so |

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::{
    Asker, FilesError,
    conditions::{Outcome, Validators},
    encoding, on_thread, paths,
    range::{self, Part, Wanted},
    reply::{self, Body},
    source::{self, Located, Segment},
};
use crate::agent::{outlet::Outlet, state::Identity, threads::Aside};

/// Up to this size a file is read at once.
const SMALL: u64 = 64 * 1024;
/// A shorter file is not worth packing.
const WORTH_PACKING: usize = 1024;
const KIND: &str = "application/octet-stream";
const CONDITIONS: [header::HeaderName; 6] = [
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

/// A file that was opened.
enum Content {
    Small(Bytes),
    /// A large file of known size, and what it starts with if that was asked for.
    Large(Located, u64, Vec<u8>),
    /// A large file that does not know its size; what was read of it so far comes first.
    Endless(Aside<File>, Vec<u8>),
}

struct Opened {
    content: Content,
    /// None for a file whose size and date mean nothing.
    validators: Option<Validators>,
}

/// How a file is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Never,
    IfWorthIt,
    Always,
}

/// Answers with a file.
pub(crate) async fn serve(
    path: Option<String>,
    name: Option<String>,
    identity: Arc<Identity>,
    parts: &Parts,
) -> Result<Response<Body>, FilesError> {
    let packing = packing(&parts.headers);
    let sample = packing == Ok(Packing::IfWorthIt);
    let work = move || {
        let asker = Asker::new(name, identity)?;
        let path = asker.resolve(&path.unwrap_or_default())?;
        open(&path, sample).map(|opened| (path, opened))
    };
    let (path, opened) = on_thread(work).await??;
    let packing = packing.map_err(FilesError::NotAcceptable)?;
    let headers = &parts.headers;
    let outcome = opened.validators.as_ref().map_or(Outcome::Serve, |validators| validators.check(headers));
    let mut response = match outcome {
        Outcome::Failed => return Err(FilesError::Precondition),
        Outcome::NotModified => reply::empty(StatusCode::NOT_MODIFIED),
        Outcome::Serve => {
            let outlet = parts.extensions.get::<Outlet>().cloned();
            answer(opened.content, opened.validators.as_ref(), packing, headers, outlet)?
        }
    };
    let packed = response.headers().contains_key(header::CONTENT_ENCODING);
    if let Some(validators) = &opened.validators {
        validators.mark(response.headers_mut(), packed);
    }
    describe(response.headers_mut(), &path);
    if parts.method == Method::HEAD {
        // What would be sent is not read, and its length is said nevertheless.
        response = response.map(|_| reply::empty(StatusCode::OK).into_body());
    }
    Ok(response)
}

/// What the headers of a request say of packing; the error is for a client that takes nothing we have.
fn packing(headers: &HeaderMap) -> Result<Packing, &'static str> {
    let accepted = encoding::accepted(headers);
    let plain = CONDITIONS.iter().any(|name| headers.contains_key(name));
    match (accepted.identity, accepted.gzip, plain) {
        (false, true, true) => Err("identity encoding not acceptable for Range or conditional request"),
        (false, false, _) => Err("no acceptable encoding found, supported: [gzip]"),
        (false, true, false) => Ok(Packing::Always),
        (true, true, false) => Ok(Packing::IfWorthIt),
        (true, ..) => Ok(Packing::Never),
    }
}

fn open(path: &str, sample: bool) -> Result<Opened, FilesError> {
    let failed = |error| FilesError::from_io("read", path, error);
    let do_not_block = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(do_not_block).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(FilesError::Directory(path.to_owned()));
    }
    if !metadata.is_file() {
        return Err(FilesError::NotRegular(path.to_owned()));
    }
    let size = metadata.len();
    let validators = Validators::of(&metadata);
    if size > SMALL {
        let mut start = vec![0; if sample { source::SAMPLE } else { 0 }];
        let read = std::os::unix::fs::FileExt::read_at(&file, &mut start, 0).map_err(failed)?;
        start.truncate(read);
        let content = Content::Large(Located::new(file), size, start);
        return Ok(Opened { content, validators: Some(validators) });
    }
    let mut start = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    (&file).take(SMALL + 1).read_to_end(&mut start).map_err(failed)?;
    let validators = (start.len() as u64 == size).then_some(validators);
    let all = start.len() as u64 <= SMALL;
    let content = if all { Content::Small(start.into()) } else { Content::Endless(Aside::new(file), start) };
    Ok(Opened { content, validators })
}

/// The file, or the parts of it that are asked for.
fn answer(
    content: Content,
    validators: Option<&Validators>,
    packing: Packing,
    headers: &HeaderMap,
    outlet: Option<Outlet>,
) -> Result<Response<Body>, FilesError> {
    let size = match &content {
        Content::Small(bytes) => Some(bytes.len() as u64),
        Content::Large(_, size, _) => Some(*size),
        Content::Endless(..) => None,
    };
    let asked = validators.is_none_or(|validators| validators.is_range_of(headers));
    if let Some(size) = size.filter(|_| asked && packing != Packing::Always) {
        match range::wanted(headers, size) {
            Wanted::Whole => {}
            Wanted::Unsatisfiable => return Err(FilesError::Range { size }),
            Wanted::Parts(parts) => return in_parts(content, &parts, size, outlet),
        }
    }
    let worth_it = |start: &[u8]| match packing {
        Packing::Never => false,
        Packing::IfWorthIt => start.len() >= WORTH_PACKING && source::packs_well(start),
        Packing::Always => true,
    };
    let mut packed = true;
    let mut response = match content {
        Content::Small(bytes) if worth_it(&bytes) => {
            let bytes = source::pack(&bytes).map_err(|_| FilesError::Interrupted)?;
            reply::full(StatusCode::OK, KIND, bytes)
        }
        Content::Large(file, size, start) if worth_it(&start) => {
            reply::streamed(KIND, source::packed(file, size))
        }
        Content::Endless(file, start) if worth_it(&start) => {
            reply::streamed(KIND, source::packed_to_the_end(file, start))
        }
        content => {
            packed = false;
            match content {
                Content::Small(bytes) => with_length(reply::full(StatusCode::OK, KIND, bytes), size),
                Content::Large(file, length, _) => {
                    let whole = vec![Segment::Of(Part { start: 0, length })];
                    with_length(reply::streamed(KIND, source::parts(file, whole, outlet)), size)
                }
                Content::Endless(file, start) => reply::streamed(KIND, source::to_the_end(file, start)),
            }
        }
    };
    if packed {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

/// An answer of 206: one part as it is, several with a head for each.
fn in_parts(
    content: Content,
    parts: &[Part],
    size: u64,
    outlet: Option<Outlet>,
) -> Result<Response<Body>, FilesError> {
    let mut kind = HeaderValue::from_static(KIND);
    let segments = match parts {
        [part] => vec![Segment::Of(*part)],
        parts => {
            let boundary = boundary().map_err(|_| FilesError::Interrupted)?;
            kind = HeaderValue::try_from(format!("multipart/byteranges; boundary={boundary}"))
                .map_err(|_| FilesError::Interrupted)?;
            let head = |(index, part): (usize, &Part)| {
                let line_end = if index == 0 { "" } else { "\r\n" };
                let range = part.describe(size);
                format!("{line_end}--{boundary}\r\nContent-Range: {range}\r\nContent-Type: {KIND}\r\n\r\n")
            };
            let parts = parts.iter().enumerate();
            let mut segments: Vec<Segment> = parts
                .flat_map(|(index, part)| [Segment::Text(head((index, part)).into()), Segment::Of(*part)])
                .collect();
            segments.push(Segment::Text(format!("\r\n--{boundary}--\r\n").into()));
            segments
        }
    };
    let lengths = segments.iter().map(|segment| match segment {
        Segment::Text(text) => text.len() as u64,
        Segment::Of(part) => part.length,
    });
    let length: u64 = lengths.sum();
    let response = match content {
        Content::Small(bytes) => {
            let mut all = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
            for segment in &segments {
                match segment {
                    Segment::Text(text) => all.extend_from_slice(text),
                    Segment::Of(part) => all.extend_from_slice(&cut(&bytes, *part)),
                }
            }
            reply::full(StatusCode::PARTIAL_CONTENT, KIND, all)
        }
        Content::Large(file, ..) => reply::streamed(KIND, source::parts(file, segments, outlet)),
        Content::Endless(..) => return Err(FilesError::Interrupted),
    };
    let mut response = with_length(response, Some(length));
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    if let [part] = parts {
        part.mark(response.headers_mut(), size);
    }
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

fn cut(bytes: &Bytes, part: Part) -> Bytes {
    let start = usize::try_from(part.start).unwrap_or(usize::MAX).min(bytes.len());
    let length = usize::try_from(part.length).unwrap_or(usize::MAX).min(bytes.len() - start);
    bytes.slice(start..start + length)
}

/// What does not occur in a file, however it was made.
fn boundary() -> io::Result<String> {
    let mut random = [0_u8; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("{:032x}", u128::from_ne_bytes(random)))
}

fn with_length(mut response: Response<Body>, length: Option<u64>) -> Response<Body> {
    if let Some(length) = length {
        response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    }
    response
}

fn describe(headers: &mut HeaderMap, path: &str) {
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if let Ok(value) = HeaderValue::try_from(disposition(paths::name(path))) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
}

/// `inline; filename=…`, with the name quoted, or encoded where quoting is not enough.
fn disposition(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    if name.bytes().all(plain) {
        format!("inline; filename={name}")
    } else if name.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        format!("inline; filename=\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        let encode =
            |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        format!("inline; filename*=utf-8''{}", name.bytes().map(encode).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_quoted_or_encoded() {
        assert_eq!(disposition("a.txt"), "inline; filename=a.txt");
        assert_eq!(disposition("a b\".txt"), "inline; filename=\"a b\\\".txt\"");
        assert_eq!(disposition("é\n"), "inline; filename*=utf-8''%C3%A9%0A");
    }
}
