//! Unpacks gzip as it comes, in pieces of any size, of one member or of many.
//!
//! ```text
//!   ┌► fixed head ─► extra ─► name ─► comment ─► sum of the head ─► packed bytes ─► sum and length ─┐
//!   │                (each only if the head says so)                                                │
//!   └──────────────────────────────── another member, or the end ◄──────────────────────────────────┘
//! ```
//!
//! One buffer and one state of the unpacker serve all members: however many there are, nothing grows.

use flate2::{Crc, Decompress, FlushDecompress, Status};

/// How much is unpacked at a time.
const UNPACKED: usize = 64 * 1024;
const HAS_SUM: u8 = 1 << 1;
const HAS_EXTRA: u8 = 1 << 2;
const HAS_NAME: u8 = 1 << 3;
const HAS_COMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0b1110_0000;

/// What came is no gzip, or not what was packed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no whole gzip stream")]
pub(crate) struct GzipError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many bytes of it have come.
    Head(usize),
    ExtraLength(usize),
    /// So many bytes of it are left.
    Extra(usize),
    Name,
    Comment,
    HeadSum(usize),
    Packed,
    Trailer(usize),
}

/// A stream that is being unpacked.
pub(crate) struct Gunzip {
    state: State,
    flags: u8,
    /// What came of a field of fixed length.
    field: [u8; 8],
    sum: Crc,
    inflate: Decompress,
    unpacked: Vec<u8>,
    /// Whether a whole member has come.
    any: bool,
}

impl std::fmt::Debug for Gunzip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Gunzip").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Gunzip {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Head(0),
            flags: 0,
            field: [0; 8],
            sum: Crc::new(),
            inflate: Decompress::new(false),
            unpacked: vec![0; UNPACKED],
            any: false,
        }
    }

    /// Takes the next piece, and hands on what comes of it.
    pub(crate) fn push<E: From<GzipError>>(
        &mut self,
        mut piece: &[u8],
        mut hand_on: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some((&byte, rest)) = piece.split_first() {
            match self.state {
                State::Packed => piece = self.inflate(piece, &mut hand_on)?,
                State::Extra(left) => {
                    let taken = left.min(piece.len());
                    piece = &piece[taken..];
                    self.state = if taken == left { self.after_extra() } else { State::Extra(left - taken) };
                }
                _ => {
                    self.state = self.byte(byte)?;
                    piece = rest;
                }
            }
        }
        Ok(())
    }

    /// Checks that the stream is whole.
    pub(crate) fn finish(&self) -> Result<(), GzipError> {
        if self.any && self.state == State::Head(0) { Ok(()) } else { Err(GzipError) }
    }

    /// Takes a byte of what is around the packed bytes.
    fn byte(&mut self, byte: u8) -> Result<State, GzipError> {
        Ok(match self.state {
            State::Head(at) => {
                let right = match at {
                    0 => byte == 0x1f,
                    1 => byte == 0x8b,
                    // The one method that there is.
                    2 => byte == 8,
                    3 => byte & RESERVED == 0,
                    // Time, effort and system do not matter.
                    _ => true,
                };
                if !right {
                    return Err(GzipError);
                }
                if at == 3 {
                    self.flags = byte;
                }
                match at {
                    9 if self.flags & HAS_EXTRA != 0 => State::ExtraLength(0),
                    9 => self.after_extra(),
                    _ => State::Head(at + 1),
                }
            }
            State::ExtraLength(0) => {
                self.field[0] = byte;
                State::ExtraLength(1)
            }
            State::ExtraLength(_) => match u16::from_le_bytes([self.field[0], byte]) {
                0 => self.after_extra(),
                length => State::Extra(length.into()),
            },
            State::Name if byte == 0 => self.after_name(),
            State::Comment if byte == 0 => self.after_comment(),
            State::HeadSum(1) => self.begin(),
            State::HeadSum(at) => State::HeadSum(at + 1),
            State::Trailer(at) => {
                self.field[at] = byte;
                if at < 7 {
                    return Ok(State::Trailer(at + 1));
                }
                let wanted = u64::from(self.sum.amount()) << 32 | u64::from(self.sum.sum());
                if u64::from_le_bytes(self.field) != wanted {
                    return Err(GzipError);
                }
                self.any = true;
                State::Head(0)
            }
            other => other,
        })
    }

    fn after_extra(&mut self) -> State {
        if self.flags & HAS_NAME != 0 { State::Name } else { self.after_name() }
    }

    fn after_name(&mut self) -> State {
        if self.flags & HAS_COMMENT != 0 { State::Comment } else { self.after_comment() }
    }

    fn after_comment(&mut self) -> State {
        if self.flags & HAS_SUM != 0 { State::HeadSum(0) } else { self.begin() }
    }

    fn begin(&mut self) -> State {
        self.inflate.reset(false);
        self.sum.reset();
        State::Packed
    }

    /// Unpacks until the piece is used up or its member ends, and returns what is left of the piece.
    fn inflate<'a, E: From<GzipError>>(
        &mut self,
        mut piece: &'a [u8],
        hand_on: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<&'a [u8], E> {
        loop {
            let (read, written) = (self.inflate.total_in(), self.inflate.total_out());
            let status = self.inflate.decompress(piece, &mut self.unpacked, FlushDecompress::None);
            let status = status.map_err(|_| GzipError)?;
            // Neither is more than the length of its buffer.
            let read = usize::try_from(self.inflate.total_in() - read).map_err(|_| GzipError)?;
            let written = usize::try_from(self.inflate.total_out() - written).map_err(|_| GzipError)?;
            piece = piece.get(read..).ok_or(GzipError)?;
            let unpacked = self.unpacked.get(..written).ok_or(GzipError)?;
            self.sum.update(unpacked);
            if written > 0 {
                hand_on(unpacked)?;
            }
            if status == Status::StreamEnd {
                self.state = State::Trailer(0);
                return Ok(piece);
            }
            // A buffer that is full may not be all that there is.
            if piece.is_empty() && written < self.unpacked.len() {
                return Ok(piece);
            }
            if read == 0 && written == 0 {
                return Err(GzipError.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, GzBuilder, write::GzEncoder};
    use proptest::prelude::*;

    use super::*;

    fn pack(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(packed: &[u8], sizes: &[usize]) -> Result<Vec<u8>, GzipError> {
        let mut gunzip = Gunzip::new();
        let mut content = Vec::new();
        let (mut rest, mut sizes) = (packed, sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
            gunzip.push(piece, |bytes| {
                content.extend_from_slice(bytes);
                Ok::<_, GzipError>(())
            })?;
            rest = after;
        }
        gunzip.finish().map(|()| content)
    }

    #[test]
    fn every_field_of_a_head() {
        for (extra, name, comment) in [(true, true, true), (true, false, false), (false, false, true)] {
            let mut builder = GzBuilder::new().mtime(1_234_567);
            if extra {
                builder = builder.extra(vec![7; 300]);
            }
            if name {
                builder = builder.filename("name");
            }
            if comment {
                builder = builder.comment("comment");
            }
            let mut encoder = builder.write(Vec::new(), Compression::best());
            encoder.write_all(b"content").unwrap();
            let packed = encoder.finish().unwrap();
            for size in 1..packed.len() {
                assert_eq!(unpack(&packed, &[size]).unwrap(), b"content");
            }
            for end in 0..packed.len() {
                assert_eq!(unpack(&packed[..end], &[9]), Err(GzipError));
            }
        }
        // A sum of the head is read over.
        let mut packed = pack(b"content");
        packed[3] |= HAS_SUM;
        packed.splice(10..10, [1, 2]);
        assert_eq!(unpack(&packed, &[3]).unwrap(), b"content");
        packed[3] |= 0x80;
        assert_eq!(unpack(&packed, &[3]), Err(GzipError));
    }

    #[test]
    fn many_members_and_much_from_little() {
        let packed = [pack(b"one"), pack(b""), pack(&vec![0; 10 << 20])].concat();
        let content = unpack(&packed, &[1000]).unwrap();
        assert_eq!(content.len(), 3 + (10 << 20));
        let junk = [packed.as_slice(), b"junk"].concat();
        assert_eq!(unpack(&junk, &[1000]), Err(GzipError));
        assert_eq!(unpack(b"", &[1]), Err(GzipError));
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked_and_what_was_changed_is_noticed(
            contents in prop::collection::vec(prop::collection::vec(0_u8..20, 0..400), 1..4),
            sizes in prop::collection::vec(1_usize..100, 1..6),
            at in any::<prop::sample::Index>(),
            change in 1_u8..=255,
        ) {
            let mut packed: Vec<u8> = contents.iter().flat_map(|content| pack(content)).collect();
            prop_assert_eq!(unpack(&packed, &sizes).unwrap(), contents.concat());
            let at = at.index(packed.len());
            packed[at] ^= change;
            // Where nothing depends on a byte it may be anything: but never does other content come of it.
            if let Ok(content) = unpack(&packed, &sizes) {
                prop_assert_eq!(content, contents.concat());
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            sizes in prop::collection::vec(1_usize..40, 1..4),
        ) {
            let packed = [&[0x1f, 0x8b, 8], bytes.as_slice()].concat();
            prop_assert_eq!(unpack(&packed, &sizes).is_ok(), unpack(&packed, &[usize::MAX]).is_ok());
            prop_assert!(unpack(&bytes, &sizes).is_err() || bytes.starts_with(&[0x1f, 0x8b]));
        }
    }
}
