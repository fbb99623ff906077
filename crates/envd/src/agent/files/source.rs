//! Pieces of an open file, as they are or packed, while a client takes them.
//!
//! Each piece is read, and packed, on a thread that may block, and the next one already while one is sent.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    mem,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::stream::{self, Stream};
use tokio::task::{JoinHandle, spawn_blocking};

use super::range::Part;

/// How much is read at a time.
const PIECE: usize = 256 * 1024;
/// The first level that makes a code for what it packs: the one below it gains nothing on text that hardly repeats.
const LEVEL: u32 = 2;
/// How much packed content makes a piece.
const PACKED_PIECE: usize = 64 * 1024;
/// How much is packed to see whether it is worth it.
pub(super) const SAMPLE: usize = 16 * 1024;

/// A part of an answer.
#[derive(Debug, Clone)]
pub(super) enum Segment {
    Text(Bytes),
    Of(Part),
}

/// Buffers of one answer, used again when they have been sent.
#[derive(Debug, Default)]
struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    fn take(self: &Arc<Self>) -> Buffer {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Buffer { bytes: free.unwrap_or_else(|| vec![0; PIECE]), length: 0, pool: Arc::clone(self) }
    }
}

/// A buffer that goes back to its pool.
#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(mem::take(&mut self.bytes));
    }
}

/// A file that is read part by part.
struct Reader {
    file: File,
    segments: VecDeque<Segment>,
    pool: Arc<Pool>,
}

impl Reader {
    /// The next piece; `None` at the end. A file that has fewer bytes by now is an error: the client was promised all.
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        let part = match self.segments.front_mut() {
            None => return Ok(None),
            Some(Segment::Text(text)) => {
                let text = mem::take(text);
                self.segments.pop_front();
                return Ok(Some(text));
            }
            Some(Segment::Of(part)) => part,
        };
        let mut buffer = self.pool.take();
        let room = usize::try_from(part.length).unwrap_or(PIECE).min(PIECE);
        while buffer.length < room {
            let read =
                self.file.read_at(&mut buffer.bytes[buffer.length..room], part.start + buffer.length as u64);
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => buffer.length += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        part.start += room as u64;
        part.length -= room as u64;
        if part.length == 0 {
            self.segments.pop_front();
        }
        Ok(Some(Bytes::from_owner(buffer)))
    }
}

/// What yields one piece after the other, and may block for each.
trait Pieces: Send + 'static {
    fn next(&mut self) -> io::Result<Option<Bytes>>;
}

impl Pieces for Reader {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        Self::next(self)
    }
}

/// What was read already, and everything up to the end.
struct Endless {
    file: File,
    first: Vec<u8>,
}

impl Pieces for Endless {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if !self.first.is_empty() {
            return Ok(Some(mem::take(&mut self.first).into()));
        }
        let mut bytes = Vec::with_capacity(PIECE);
        (&self.file).take(PIECE as u64).read_to_end(&mut bytes)?;
        Ok((!bytes.is_empty()).then(|| bytes.into()))
    }
}

/// What is packed as it is read.
struct Packed<S> {
    source: S,
    /// None after the end.
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl<S: Pieces> Pieces for Packed<S> {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        while let Some(encoder) = &mut self.encoder {
            let Some(piece) = self.source.next()? else {
                let end = self.encoder.take().map(GzEncoder::finish).transpose()?;
                return Ok(end.map(Bytes::from));
            };
            encoder.write_all(&piece)?;
            if encoder.get_ref().len() >= PACKED_PIECE {
                let packed = mem::replace(encoder.get_mut(), Vec::with_capacity(PACKED_PIECE));
                return Ok(Some(packed.into()));
            }
        }
        Ok(None)
    }
}

/// Parts of a file, and text between them.
pub(super) fn parts(file: File, segments: Vec<Segment>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    ahead(Reader { file, segments: segments.into(), pool: Arc::default() })
}

/// The start of a file up to `length`, packed.
pub(super) fn packed(file: File, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let segments = [Segment::Of(Part { start: 0, length })].into();
    let source = Reader { file, segments, pool: Arc::default() };
    ahead(Packed { source, encoder: Some(encoder()) })
}

/// What was read of a file, and everything up to its end.
pub(super) fn to_the_end(file: File, first: Vec<u8>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    ahead(Endless { file, first })
}

/// The same, packed.
pub(super) fn packed_to_the_end(file: File, first: Vec<u8>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    ahead(Packed { source: Endless { file, first }, encoder: Some(encoder()) })
}

/// Packs what is at hand.
pub(super) fn pack(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = encoder();
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Whether it is worth to pack what starts like this: what is packed already only gets longer.
pub(super) fn packs_well(start: &[u8]) -> bool {
    let sample = &start[..start.len().min(SAMPLE)];
    pack(sample).is_ok_and(|packed| packed.len() < sample.len() / 8 * 7)
}

/// Fast rather than small: a guest's processor time is its user's.
fn encoder() -> GzEncoder<Vec<u8>> {
    GzEncoder::new(Vec::with_capacity(PACKED_PIECE), Compression::new(LEVEL))
}

type Reading<S> = JoinHandle<io::Result<(S, Option<Bytes>)>>;

/// Asks for the next piece while one is sent.
fn ahead<S: Pieces>(source: S) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(read(source)), async |reading: Option<Reading<S>>| {
        match reading?.await.map_err(io::Error::other).flatten() {
            Err(error) => Some((Err(error), None)),
            Ok((_, None)) => None,
            Ok((source, Some(piece))) => Some((Ok(piece), Some(read(source)))),
        }
    })
}

fn read<S: Pieces>(mut source: S) -> Reading<S> {
    spawn_blocking(move || {
        let piece = source.next()?;
        Ok((source, piece))
    })
}
