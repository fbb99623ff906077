//! Pieces of an open file, as they are or packed, while a client takes them.
//!
//! ```text
//!               it is in memory: sent from there, or read where it is sent
//!              ┌───────────┐
//!              ▼           │     it is not, or is to be packed
//!   ┌───► at hand ─────────┴──────────────────────────────────┐
//!   │                                                         ▼
//!   └── the next one did not have to be waited for ── asked for ahead ──┐
//!                                                         ▲             │ it had
//!                                                         └─────────────┘
//! ```
//!
//! What is waited for is waited for on a thread that may block, and the next piece is asked for already while one is
//! sent. To hand a piece over costs more than to copy it, so that what the kernel has in memory is never handed over.
//! A connection that can send it from there ([`Outlet`]) does; for others a file of any length in the cache comes out
//! of one buffer, which stays in that of the processor.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSliceMut, Read, Write},
    mem,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::stream::{self, Stream};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::{medium::Medium, on_thread, range::Part};
use crate::agent::{
    outlet::{LARGEST, Outlet},
    threads::{Aside, Job},
};

/// How much is read at a time.
const PIECE: usize = 256 * 1024;
/// How far apart the bytes are that are read to see whether a piece is in memory: what the kernel reads ahead at a time.
const SAMPLED: usize = 128 * 1024;
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

/// A file, and where its bytes are.
#[derive(Debug)]
pub(super) struct Located {
    file: Arc<Aside<File>>,
    medium: Medium,
}

impl Located {
    /// Asks the file system, which may block.
    pub(super) fn new(file: File) -> Self {
        let medium = Medium::of(&file);
        Self { file: Arc::new(Aside::new(file)), medium }
    }
}

/// A file that is read part by part.
struct Reader {
    file: Located,
    segments: VecDeque<Segment>,
    pool: Arc<Pool>,
    /// Where the file may be sent without being read, if there is such a place.
    outlet: Option<Outlet>,
}

impl Reader {
    fn new(file: Located, segments: Vec<Segment>, outlet: Option<Outlet>) -> Self {
        Self { file, segments: segments.into(), pool: Arc::default(), outlet }
    }

    /// The next piece as a promise, if there is a place for it and it is in memory.
    fn promised(&mut self) -> Option<Bytes> {
        let (outlet, Some(Segment::Of(part))) = (self.outlet.as_ref()?, self.segments.front()) else {
            return None;
        };
        let length = usize::try_from(part.length).unwrap_or(LARGEST).min(LARGEST);
        if self.file.medium != Medium::Memory && !is_in_memory(self.file.file.get().ok()?, part.start, length)
        {
            return None;
        }
        let promised = outlet.promise(&self.file.file, part.start, length);
        self.advance(length);
        Some(promised)
    }

    /// Takes so many bytes off the part that is read.
    fn advance(&mut self, length: usize) {
        let Some(Segment::Of(part)) = self.segments.front_mut() else { return };
        part.start += length as u64;
        part.length -= length as u64;
        if part.length == 0 {
            self.segments.pop_front();
        }
    }

    /// The next piece, read by what reads into a buffer from an offset on, some of it at least. A file that has fewer
    /// bytes by now is an error: the client was promised all.
    fn piece(
        &mut self,
        mut read: impl FnMut(&File, &mut [u8], u64) -> io::Result<usize>,
    ) -> io::Result<Option<Bytes>> {
        let part = match self.segments.front_mut() {
            None => return Ok(None),
            Some(Segment::Text(text)) => {
                let text = mem::take(text);
                self.segments.pop_front();
                return Ok(Some(text));
            }
            Some(Segment::Of(part)) => part,
        };
        let (file, mut buffer) = (self.file.file.get()?, self.pool.take());
        let room = usize::try_from(part.length).unwrap_or(PIECE).min(PIECE);
        buffer.length = loop {
            match read(file, &mut buffer.bytes[..room], part.start) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.advance(buffer.length);
        Ok(Some(Bytes::from_owner(buffer)))
    }
}

/// Whether a part of a file is in memory, as far as a few bytes of it tell: pages come in groups, and go in them. Where
/// they tell too much, whoever sends it waits for a local disk; others give no byte without waiting.
fn is_in_memory(file: &File, start: u64, length: usize) -> bool {
    let last = length.saturating_sub(1);
    (0..last).step_by(SAMPLED).chain([last]).all(|at| {
        let mut byte = [0];
        preadv2(file, &mut [IoSliceMut::new(&mut byte)], start + at as u64, ReadWriteFlags::NOWAIT) == Ok(1)
    })
}

/// What there is without waiting.
enum AtHand {
    Piece(Bytes),
    End,
    /// The next piece has to be waited for.
    Nothing,
}

impl From<Option<Bytes>> for AtHand {
    fn from(piece: Option<Bytes>) -> Self {
        piece.map_or(Self::End, Self::Piece)
    }
}

/// What yields one piece after the other.
trait Pieces: Send + 'static {
    /// The next piece, or none at the end. It may block.
    fn next(&mut self) -> io::Result<Option<Bytes>>;

    /// The next piece if that takes no more than a copy.
    fn at_hand(&mut self) -> io::Result<AtHand> {
        Ok(AtHand::Nothing)
    }
}

impl Pieces for Reader {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        self.piece(|file, buffer, offset| file.read_at(buffer, offset))
    }

    fn at_hand(&mut self) -> io::Result<AtHand> {
        if let Some(promised) = self.promised() {
            return Ok(AtHand::Piece(promised));
        }
        if self.file.medium == Medium::Memory {
            return self.next().map(AtHand::from);
        }
        let piece = self.piece(|file, buffer, offset| {
            let read = preadv2(file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT);
            // What a file system cannot do without waiting, or at all, is tried again by who may wait.
            read.map_err(
                |error| if error == Errno::INTR { error.into() } else { io::ErrorKind::WouldBlock.into() },
            )
        });
        match piece {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(AtHand::Nothing),
            other => other.map(AtHand::from),
        }
    }
}

/// What was read already, and everything up to the end.
struct Endless {
    file: Aside<File>,
    first: Vec<u8>,
}

impl Pieces for Endless {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if !self.first.is_empty() {
            return Ok(Some(mem::take(&mut self.first).into()));
        }
        let mut bytes = Vec::with_capacity(PIECE);
        self.file.get()?.take(PIECE as u64).read_to_end(&mut bytes)?;
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
pub(super) fn parts(
    file: Located,
    segments: Vec<Segment>,
    outlet: Option<Outlet>,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    ahead(Reader::new(file, segments, outlet))
}

/// The start of a file up to `length`, packed.
pub(super) fn packed(file: Located, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let source = Reader::new(file, vec![Segment::Of(Part { start: 0, length })], None);
    ahead(Packed { source, encoder: Some(encoder()) })
}

/// What was read of a file, and everything up to its end.
pub(super) fn to_the_end(file: Aside<File>, first: Vec<u8>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    ahead(Endless { file, first })
}

/// The same, packed.
pub(super) fn packed_to_the_end(
    file: Aside<File>,
    first: Vec<u8>,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
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

/// What a job leaves: who does the next, the piece, and whether there was any waiting for it.
type Outcome<S> = io::Result<(S, Option<Bytes>, Waited)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    Yes,
    No,
}

/// Where the next piece comes from.
enum State<S: Pieces> {
    /// Perhaps it is at hand.
    AtHand(S),
    /// It was asked for.
    Ahead(Job<Outcome<S>>),
}

fn ahead<S: Pieces>(source: S) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(State::AtHand(source)), async |state: Option<State<S>>| {
        let reading = match state? {
            State::Ahead(reading) => reading,
            State::AtHand(mut source) => match source.at_hand() {
                Err(error) => return Some((Err(error), None)),
                Ok(AtHand::End) => return None,
                Ok(AtHand::Piece(piece)) => return Some((Ok(piece), Some(State::AtHand(source)))),
                Ok(AtHand::Nothing) => read(source),
            },
        };
        match reading.await.map_err(io::Error::from).flatten() {
            Err(error) => Some((Err(error), None)),
            Ok((_, None, _)) => None,
            Ok((source, Some(piece), Waited::No)) => Some((Ok(piece), Some(State::AtHand(source)))),
            Ok((source, Some(piece), Waited::Yes)) => Some((Ok(piece), Some(State::Ahead(read(source))))),
        }
    })
}

fn read<S: Pieces>(mut source: S) -> Job<Outcome<S>> {
    on_thread(move || match source.at_hand()? {
        AtHand::Piece(piece) => Ok((source, Some(piece), Waited::No)),
        AtHand::End => Ok((source, None, Waited::No)),
        AtHand::Nothing => {
            let piece = source.next()?;
            Ok((source, piece, Waited::Yes))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use futures::{FutureExt, StreamExt, TryStreamExt};
    use proptest::prelude::*;

    use super::*;
    use crate::agent::outlet::First;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    fn file_of(directory: &str, content: &[u8]) -> Located {
        let mut file = tempfile::tempfile_in(directory).unwrap();
        file.write_all(content).unwrap();
        Located::new(file)
    }

    fn noise(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect()
    }

    fn part(start: usize, length: usize) -> Segment {
        Segment::Of(Part { start: start as u64, length: length as u64 })
    }

    #[test]
    fn a_file_in_memory_is_never_waited_for() {
        let content = noise(2 * PIECE + 7);
        let source = file_of("/dev/shm", &content);
        let pieces = parts(source, vec![part(0, content.len())], None).try_concat_now();
        assert_eq!(pieces.unwrap().unwrap(), content);
    }

    #[test]
    fn what_is_in_memory_is_promised_where_it_can_be_and_nothing_else() {
        let content = noise(LARGEST + 7);
        for directory in ["/dev/shm", "/var/tmp"] {
            let (outlet, text) = (Outlet::default(), Segment::Text(Bytes::from_static(b"text")));
            let segments = vec![part(0, content.len()), text, part(1, 2)];
            let pieces = parts(file_of(directory, &content), segments, Some(outlet.clone()));
            let pieces: Vec<Bytes> = pieces.try_collect().now_or_never().unwrap().unwrap();
            let lengths = pieces.iter().map(Bytes::len);
            assert_eq!(lengths.collect::<Vec<_>>(), [LARGEST, 7, 4, 2], "{directory}");
            for (index, piece) in pieces.iter().enumerate() {
                let first = outlet.first(&[IoSlice::new(piece)]).unwrap();
                let promised = First::StandIn { written: 0, left: piece.len() };
                assert_eq!(first, (index != 2).then_some(promised));
            }
        }
    }

    /// What a stream yields if it never waits.
    trait Now {
        fn try_concat_now(self) -> Option<io::Result<Vec<u8>>>;
    }

    impl<S: Stream<Item = io::Result<Bytes>>> Now for S {
        fn try_concat_now(self) -> Option<io::Result<Vec<u8>>> {
            self.map_ok(|piece| piece.to_vec()).try_concat().now_or_never()
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_after_what_there_is() {
        for directory in ["/dev/shm", "/var/tmp"] {
            let source = file_of(directory, b"short");
            runtime().block_on(async {
                let mut pieces = std::pin::pin!(parts(source, vec![part(0, PIECE)], None));
                assert_eq!(pieces.next().await.unwrap().unwrap(), "short");
                let error = pieces.next().await.unwrap().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                assert!(pieces.next().await.is_none());
            });
        }
    }

    /// Has pieces of which some have to be waited for. Each is its place.
    struct Sometimes {
        waits: VecDeque<bool>,
        place: u8,
    }

    impl Pieces for Sometimes {
        fn next(&mut self) -> io::Result<Option<Bytes>> {
            let piece = self.waits.pop_front().map(|_| Bytes::copy_from_slice(&[self.place]));
            self.place += 1;
            Ok(piece)
        }

        fn at_hand(&mut self) -> io::Result<AtHand> {
            if self.waits.front() == Some(&true) {
                Ok(AtHand::Nothing)
            } else {
                self.next().map(AtHand::from)
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn parts_come_as_they_were_asked_for(
            asked in prop::collection::vec((0..3 * PIECE, 1..2 * PIECE, any::<bool>()), 1..4),
            disk in any::<bool>(),
        ) {
            let content = noise(5 * PIECE);
            let (mut segments, mut wanted) = (Vec::new(), Vec::new());
            for (start, length, text) in asked {
                if text {
                    segments.push(Segment::Text(Bytes::from_static(b"text")));
                    wanted.extend_from_slice(b"text");
                }
                segments.push(part(start, length));
                wanted.extend_from_slice(&content[start..start + length]);
            }
            let source = file_of(if disk { "/var/tmp" } else { "/dev/shm" }, &content);
            let all = parts(source, segments, None).map_ok(|piece| piece.to_vec()).try_concat();
            prop_assert!(runtime().block_on(all).unwrap() == wanted);
        }

        #[test]
        fn pieces_keep_their_order_whichever_are_waited_for(waits in prop::collection::vec(any::<bool>(), 0..20)) {
            let count = waits.len();
            let source = Sometimes { waits: waits.into(), place: 0 };
            let all = ahead(source).map_ok(|piece| piece.to_vec()).try_concat();
            let places: Vec<u8> = (0..).take(count).collect();
            prop_assert_eq!(runtime().block_on(all).unwrap(), places);
        }
    }
}
