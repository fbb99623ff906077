//! The bytes of header and table: pure functions. All numbers are little-endian.
//!
//! ```text
//! header   0 magic   8 version  12 page size  16 memory size  24 runs  32 pages with content  40 digest  72
//! run      0 first page         8 pages       12 kind (0 zero, 1 content)                               16
//! ```

use sha2::{Digest as _, Sha256};

pub(super) const HEADER: usize = 72;
const DIGESTED: usize = 40;
const RUN: usize = 16;
const MAGIC: [u8; 8] = *b"WRNPAGES";
const VERSION: u32 = 1;
/// Page sizes of the machines that there are.
const PAGE_SIZES: std::ops::RangeInclusive<u32> = 4096..=65536;

/// What a page is that differs from the base's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Content,
}

/// Pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) pages: u32,
    pub(super) kind: Kind,
}

/// Why a file does not hold pages that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("it holds no pages: its beginning is another one, or it was not finished")]
    Magic,
    #[error("its format has version {0}, and version {VERSION} is known")]
    Version(u32),
    #[error("a page of {0} bytes is none")]
    PageSize(u32),
    #[error("it is of a memory of {0} bytes, which are no whole pages")]
    MemorySize(u64),
    #[error("it is of a memory of {found} bytes, and the base has {wanted}")]
    OtherMemory { found: u64, wanted: u64 },
    #[error("it has {found} bytes, and {wanted} by its header")]
    Length { found: u64, wanted: u64 },
    #[error("header and table do not have the digest that they had when they were written")]
    Digest,
    #[error("run {0} is empty")]
    EmptyRun(usize),
    #[error("run {0} begins before the end of the one before it")]
    Overlap(usize),
    #[error("run {0} goes beyond the end of the memory")]
    OutOfRange(usize),
    #[error("run {run} is of the unknown kind {kind}")]
    Kind { run: usize, kind: u32 },
    #[error("its runs have {found} pages with content, and its header says {wanted}")]
    ContentPages { found: u64, wanted: u64 },
}

/// What a header says, checked for itself and against the length of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) page_bytes: u32,
    pub(super) memory_bytes: u64,
    runs: u64,
    content_pages: u64,
    digest: [u8; 32],
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER], file_bytes: u64) -> Result<Self, FormatError> {
        if bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = u32::from_le_bytes(part(bytes, 8));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let header = Self {
            page_bytes: u32::from_le_bytes(part(bytes, 12)),
            memory_bytes: u64::from_le_bytes(part(bytes, 16)),
            runs: u64::from_le_bytes(part(bytes, 24)),
            content_pages: u64::from_le_bytes(part(bytes, 32)),
            digest: part(bytes, DIGESTED),
        };
        if !header.page_bytes.is_power_of_two() || !PAGE_SIZES.contains(&header.page_bytes) {
            return Err(FormatError::PageSize(header.page_bytes));
        }
        if !header.memory_bytes.is_multiple_of(u64::from(header.page_bytes)) {
            return Err(FormatError::MemorySize(header.memory_bytes));
        }
        // What is longer than a file can be is certainly not this one.
        let wanted = header.file_bytes().unwrap_or(u64::MAX);
        if wanted != file_bytes {
            return Err(FormatError::Length { found: file_bytes, wanted });
        }
        Ok(header)
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.page_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.memory_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.runs.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.content_pages.to_le_bytes());
        bytes[DIGESTED..].copy_from_slice(&self.digest);
        bytes
    }

    fn with_digest(mut self, table: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(&self.encode()[..DIGESTED]);
        hash.update(table);
        self.digest = hash.finalize().into();
        self
    }

    fn file_bytes(&self) -> Option<u64> {
        self.table_bytes()?.checked_add(self.table_offset()?)
    }

    fn table_offset(&self) -> Option<u64> {
        self.content_pages.checked_add(1)?.checked_mul(u64::from(self.page_bytes))
    }

    fn table_bytes(&self) -> Option<u64> {
        self.runs.checked_mul(RUN as u64)
    }

    /// Where the table is, and how long it is: within the file.
    pub(super) fn table(&self) -> (u64, u64) {
        (self.table_offset().unwrap_or(u64::MAX), self.table_bytes().unwrap_or_default())
    }

    /// Takes the table in.
    pub(super) fn runs(&self, table: &[u8]) -> Result<Vec<Run>, FormatError> {
        if self.with_digest(table).digest != self.digest {
            return Err(FormatError::Digest);
        }
        let memory_pages = self.memory_bytes / u64::from(self.page_bytes);
        let (mut end, mut content) = (0, 0);
        let mut runs = Vec::with_capacity(table.len() / RUN);
        for (at, bytes) in table.chunks_exact(RUN).enumerate() {
            let kind = match u32::from_le_bytes(part(bytes, 12)) {
                0 => Kind::Zero,
                1 => Kind::Content,
                kind => return Err(FormatError::Kind { run: at, kind }),
            };
            let (first, pages) = (u64::from_le_bytes(part(bytes, 0)), u32::from_le_bytes(part(bytes, 8)));
            if pages == 0 {
                return Err(FormatError::EmptyRun(at));
            }
            if first < end {
                return Err(FormatError::Overlap(at));
            }
            end = first.saturating_add(u64::from(pages));
            if end > memory_pages {
                return Err(FormatError::OutOfRange(at));
            }
            if kind == Kind::Content {
                content += u64::from(pages);
            }
            runs.push(Run { first, pages, kind });
        }
        if content != self.content_pages {
            return Err(FormatError::ContentPages { found: content, wanted: self.content_pages });
        }
        Ok(runs)
    }
}

/// The runs of a memory, as they are found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Runs {
    runs: Vec<Run>,
    pub(super) content_pages: u64,
    pub(super) zero_pages: u64,
}

impl Runs {
    /// Takes the next page that differs, of a higher number than all before it.
    pub(super) fn push(&mut self, page: u64, kind: Kind) {
        match kind {
            Kind::Zero => self.zero_pages += 1,
            Kind::Content => self.content_pages += 1,
        }
        match self.runs.last_mut() {
            Some(last)
                if last.kind == kind
                    && last.first + u64::from(last.pages) == page
                    && last.pages < u32::MAX =>
            {
                last.pages += 1;
            }
            _ => self.runs.push(Run { first: page, pages: 1, kind }),
        }
    }

    /// Header and table of a file with these.
    pub(super) fn encode(&self, memory_bytes: u64, page_bytes: u32) -> ([u8; HEADER], Vec<u8>) {
        let mut table = Vec::with_capacity(self.runs.len() * RUN);
        for run in &self.runs {
            table.extend(run.first.to_le_bytes());
            table.extend(run.pages.to_le_bytes());
            table.extend(u32::from(run.kind == Kind::Content).to_le_bytes());
        }
        let header = Header {
            page_bytes,
            memory_bytes,
            runs: self.runs.len() as u64,
            content_pages: self.content_pages,
            digest: [0; 32],
        };
        (header.with_digest(&table).encode(), table)
    }
}

/// The bytes of a field; the callers' offsets are within.
fn part<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    std::array::from_fn(|at| bytes[offset + at])
}
