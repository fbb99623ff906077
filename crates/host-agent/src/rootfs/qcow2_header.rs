//! Headers of qcow2 files, and the bytes of an empty overlay: pure functions after QEMU's `docs/interop/qcow2.txt`.
//!
//! ```text
//! cluster  0        1                 2                 3 …
//!          header   reference count   reference count   first-level table: all zero, so that every
//!          + base   table: one entry  block: a 1 for    read goes to the base
//!                   for cluster 2     each cluster
//! ```
//!
//! A cluster has 64 KiB. Everything that is zero stays a hole in the file.

use camino::Utf8PathBuf;
use wrenn_vmm::{
    DiskFormat,
    qcow2::{Fields, HEADER_LENGTH, LONGEST_NAME, MAGIC, NoHeader, VERSION},
};

const CLUSTER_BITS: u32 = 16;
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// One entry of the first-level table leads to a cluster of 8-byte entries, each for one cluster.
const BYTES_PER_FIRST_LEVEL_ENTRY: u64 = CLUSTER / 8 * CLUSTER;
/// Reference counts have 2 to the power of this many bits.
const REFERENCE_COUNT_ORDER: u32 = 4;
/// A block of 16-bit counts speaks of this many clusters. We never need a second one: QEMU adds them.
const CLUSTERS_PER_BLOCK: u64 = CLUSTER / 2;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;

/// QEMU's own bound for a first-level table of 32 MiB.
const LARGEST_VIRTUAL_BYTES: u64 = (32 << 20) / 8 * BYTES_PER_FIRST_LEVEL_ENTRY;

/// What an overlay is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overlay<'a> {
    /// The size that the guest sees.
    pub(super) virtual_bytes: u64,
    /// The base, as an absolute path: anything else would be looked for beside the overlay, or taken for
    /// the name of a protocol.
    pub(super) backing_file: &'a str,
    /// The base's format, so that it is never guessed.
    pub(super) backing_format: DiskFormat,
}

/// A file: its length, and what in it is not zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    /// The length in bytes.
    pub(super) length: u64,
    /// The pieces, in ascending order, none touching another.
    pub(super) pieces: Vec<Piece>,
}

/// Bytes at a place of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where they begin.
    pub(super) offset: u64,
    /// The bytes.
    pub(super) bytes: Vec<u8>,
}

/// Why a header cannot be written, or is not one that we use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The path of the base is not one that can stand in a header.
    #[error(
        "the path of the base must be absolute, without control characters and of at most {LONGEST_NAME} bytes: {0:?}"
    )]
    BackingFile(String),
    /// The size is not one that a disk can have.
    #[error("{0} bytes is not a whole number of sectors up to 2 PiB")]
    Size(u64),
    /// There is none that is read here.
    #[error(transparent)]
    NoHeader(NoHeader),
    /// QEMU did not close it, found a fault in it, or used a feature that we never ask for.
    #[error("features {0:#x} are set: it was not closed cleanly, is damaged, or was not made here")]
    Features(u64),
    /// It says something that no file says that was made here.
    #[error("its header names {0} that is not used here")]
    Foreign(&'static str),
}

/// The file of an empty overlay.
pub(super) fn empty_overlay(overlay: &Overlay<'_>) -> Result<Image, HeaderError> {
    let name = overlay.backing_file;
    if !name.starts_with('/') || name.len() > LONGEST_NAME || name.contains(|c: char| c.is_control()) {
        return Err(HeaderError::BackingFile(name.to_owned()));
    }
    let entries = first_level_entries(overlay.virtual_bytes)?;
    let table_clusters = (u64::from(entries) * 8).div_ceil(CLUSTER);
    let clusters = 3 + table_clusters;
    // The bound on the size keeps the table under 513 clusters, far from a second block of counts.
    debug_assert!(clusters <= CLUSTERS_PER_BLOCK);

    let counts = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    Ok(Image {
        length: clusters * CLUSTER,
        pieces: vec![
            Piece {
                offset: 0,
                bytes: header(
                    overlay.virtual_bytes,
                    Some((overlay.backing_file, overlay.backing_format)),
                    (entries, 3 * CLUSTER),
                ),
            },
            Piece { offset: CLUSTER, bytes: (2 * CLUSTER).to_be_bytes().to_vec() },
            Piece { offset: 2 * CLUSTER, bytes: counts },
        ],
    })
}

/// The header of a file that stands on nothing, whose first-level table is at `table`.
pub(super) fn alone(virtual_bytes: u64, table: u64) -> Result<Vec<u8>, HeaderError> {
    let entries = first_level_entries(virtual_bytes)?;
    Ok(header(virtual_bytes, None, (entries, table)))
}

/// How many entries the first-level table of a disk has, if a disk can have that size.
fn first_level_entries(virtual_bytes: u64) -> Result<u32, HeaderError> {
    let error = HeaderError::Size(virtual_bytes);
    if virtual_bytes == 0 || !virtual_bytes.is_multiple_of(512) || virtual_bytes > LARGEST_VIRTUAL_BYTES {
        return Err(error);
    }
    u32::try_from(virtual_bytes.div_ceil(BYTES_PER_FIRST_LEVEL_ENTRY)).map_err(|_| error)
}

/// A header; `table` is how many entries the first-level table has, and where it is.
fn header(virtual_bytes: u64, backing: Option<(&str, DiskFormat)>, table: (u32, u64)) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some((_, format)) = backing {
        put_extension(&mut extensions, EXTENSION_BACKING_FORMAT, format_name(format));
    }
    put_extension(&mut extensions, EXTENSION_FEATURE_NAMES, &feature_names());
    put_extension(&mut extensions, EXTENSION_END, &[]);
    let name = backing.map_or(&[][..], |(name, _)| name.as_bytes());
    let name_at = if backing.is_some() { u64::from(HEADER_LENGTH) + extensions.len() as u64 } else { 0 };
    let (first_level_entries, first_level_at) = table;

    let mut bytes = Vec::with_capacity(1024);
    bytes.extend(MAGIC);
    put_u32(&mut bytes, VERSION);
    put_u64(&mut bytes, name_at); // where the base's name is
    put_u32(&mut bytes, length_u32(name));
    put_u32(&mut bytes, CLUSTER_BITS);
    put_u64(&mut bytes, virtual_bytes);
    put_u32(&mut bytes, 0); // not encrypted
    put_u32(&mut bytes, first_level_entries);
    put_u64(&mut bytes, first_level_at); // where the first-level table is
    put_u64(&mut bytes, CLUSTER); // where the reference count table is
    put_u32(&mut bytes, 1); // its clusters
    put_u32(&mut bytes, 0); // no internal snapshots
    put_u64(&mut bytes, 0); // and no table of them
    put_u64(&mut bytes, 0); // incompatible features
    put_u64(&mut bytes, 0); // compatible features
    put_u64(&mut bytes, 0); // autoclear features
    put_u32(&mut bytes, REFERENCE_COUNT_ORDER);
    put_u32(&mut bytes, HEADER_LENGTH);
    debug_assert_eq!(bytes.len(), HEADER_LENGTH as usize);
    bytes.extend(extensions);
    bytes.extend(name);
    bytes
}

fn format_name(format: DiskFormat) -> &'static [u8] {
    match format {
        // The latter is the base of none, which was said before.
        DiskFormat::Raw | DiskFormat::DmSnapshot => b"raw",
        DiskFormat::Qcow2 => b"qcow2",
    }
}

/// The table by which an older QEMU names a feature that it does not know.
fn feature_names() -> Vec<u8> {
    const INCOMPATIBLE: u8 = 0;
    const COMPATIBLE: u8 = 1;
    const AUTOCLEAR: u8 = 2;
    let names: [(u8, u8, &[u8]); 8] = [
        (INCOMPATIBLE, 0, b"dirty bit"),
        (INCOMPATIBLE, 1, b"corrupt bit"),
        (INCOMPATIBLE, 2, b"external data file"),
        (INCOMPATIBLE, 3, b"compression type"),
        (INCOMPATIBLE, 4, b"extended L2 entries"),
        (COMPATIBLE, 0, b"lazy refcounts"),
        (AUTOCLEAR, 0, b"bitmaps"),
        (AUTOCLEAR, 1, b"raw external data"),
    ];
    let mut bytes = Vec::with_capacity(names.len() * 48);
    for (kind, bit, name) in names {
        bytes.extend([kind, bit]);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(48), 0);
    }
    bytes
}

fn put_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    put_u32(bytes, kind);
    put_u32(bytes, length_u32(data));
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn put_u32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend(value.to_be_bytes());
}

fn put_u64(bytes: &mut Vec<u8>, value: u64) {
    bytes.extend(value.to_be_bytes());
}

/// The length of something that is known to be short.
fn length_u32(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("names and extensions are checked to be short")
}

/// The size that a guest sees, read from the start of a file that QEMU closed cleanly.
pub(super) fn virtual_bytes(start: &[u8]) -> Result<u64, HeaderError> {
    let fields = Fields::parse(start).map_err(HeaderError::NoHeader)?;
    if fields.features == 0 { Ok(fields.virtual_bytes) } else { Err(HeaderError::Features(fields.features)) }
}

/// Where the content of a file is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    /// The size that a guest sees.
    pub(super) virtual_bytes: u64,
    /// Where the first-level table is.
    pub(super) table: u64,
    /// How many entries it has.
    pub(super) entries: u32,
    /// What is below, and its format.
    pub(super) backing: Option<(Utf8PathBuf, DiskFormat)>,
}

/// Reads the first cluster of a file that QEMU closed cleanly.
pub(super) fn contents(start: &[u8]) -> Result<Contents, HeaderError> {
    let virtual_bytes = virtual_bytes(start)?;
    let word = |offset| field(start, offset).map(u32::from_be_bytes);
    let long = |offset| field(start, offset).map(u64::from_be_bytes);
    for (offset, used, what) in
        [(20, CLUSTER_BITS, "a size of clusters"), (32, 0, "an encryption"), (60, 0, "a snapshot inside")]
    {
        if word(offset)? != used {
            return Err(HeaderError::Foreign(what));
        }
    }
    let (entries, table) = (word(36)?, long(40)?);
    if u64::from(entries) > LARGEST_VIRTUAL_BYTES / BYTES_PER_FIRST_LEVEL_ENTRY {
        return Err(HeaderError::Foreign("a size"));
    }
    let (name_at, name_length) = (long(8)?, word(16)?);
    let backing = if name_length == 0 {
        None
    } else {
        let begin = usize::try_from(name_at).unwrap_or(usize::MAX);
        let name = start.get(begin..begin.saturating_add(name_length as usize));
        let name = std::str::from_utf8(name.ok_or(HeaderError::NoHeader(NoHeader::Short))?);
        let name = name.ok().filter(|name| name.starts_with('/'));
        let name = name.ok_or(HeaderError::Foreign("a file below"))?;
        Some((Utf8PathBuf::from(name), backing_format(start)?))
    };
    Ok(Contents { virtual_bytes, table, entries, backing })
}

/// The format of what is below, which is never guessed.
fn backing_format(start: &[u8]) -> Result<DiskFormat, HeaderError> {
    let mut at = u32::from_be_bytes(field(start, 100)?) as usize;
    loop {
        let kind = u32::from_be_bytes(field(start, at)?);
        let length = u32::from_be_bytes(field(start, at + 4)?) as usize;
        if kind == EXTENSION_END {
            return Err(HeaderError::Foreign("a file below without a format"));
        }
        let data = start.get(at + 8..(at + 8).saturating_add(length));
        let data = data.ok_or(HeaderError::NoHeader(NoHeader::Short))?;
        if kind == EXTENSION_BACKING_FORMAT {
            let known = [DiskFormat::Raw, DiskFormat::Qcow2];
            let format = known.into_iter().find(|format| format_name(*format) == data);
            return format.ok_or(HeaderError::Foreign("a format below"));
        }
        at += 8 + length.next_multiple_of(8);
    }
}

fn field<const N: usize>(start: &[u8], offset: usize) -> Result<[u8; N], HeaderError> {
    let bytes = start.get(offset..offset.saturating_add(N));
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(HeaderError::NoHeader(NoHeader::Short))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_be_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    /// Walks the header extensions up to the end mark: (kind, data), and where they stop.
    fn extensions(bytes: &[u8]) -> (Vec<(u32, &[u8])>, usize) {
        let (mut found, mut at) = (Vec::new(), HEADER_LENGTH as usize);
        loop {
            let (kind, length) = (u32_at(bytes, at), u32_at(bytes, at + 4) as usize);
            if kind == EXTENSION_END {
                return (found, at + 8);
            }
            found.push((kind, &bytes[at + 8..at + 8 + length]));
            at += 8 + length.next_multiple_of(8);
        }
    }

    proptest! {
        #[test]
        fn every_overlay_is_consistent(
            sectors in 1_u64..=LARGEST_VIRTUAL_BYTES / 512,
            name in "/[a-zA-Z0-9 :._/é-]{0,500}",
            qcow2 in any::<bool>(),
        ) {
            let backing_format = if qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
            let overlay = Overlay { virtual_bytes: sectors * 512, backing_file: &name, backing_format };
            let image = empty_overlay(&overlay).unwrap();
            let header = &image.pieces[0].bytes;
            prop_assert_eq!(virtual_bytes(header).unwrap(), overlay.virtual_bytes);

            // The base's name and format are those that were given, and lie within the first cluster.
            let (found, end) = extensions(header);
            let (start, length) = (usize::try_from(u64_at(header, 8)).unwrap(), u32_at(header, 16) as usize);
            prop_assert_eq!(&header[start..start + length], name.as_bytes());
            prop_assert_eq!((start, start + length), (end, header.len()));
            prop_assert!(header.len() as u64 <= CLUSTER);
            let format: &[u8] = if qcow2 { b"qcow2" } else { b"raw" };
            prop_assert!(found.contains(&(EXTENSION_BACKING_FORMAT, format)));

            let wanted = Contents {
                virtual_bytes: overlay.virtual_bytes,
                table: 3 * CLUSTER,
                entries: u32_at(header, 36),
                backing: Some((Utf8PathBuf::from(&name), backing_format)),
            };
            prop_assert_eq!(contents(header).unwrap(), wanted.clone());
            let alone = alone(overlay.virtual_bytes, 2 * CLUSTER).unwrap();
            prop_assert_eq!(contents(&alone).unwrap(), Contents { table: 2 * CLUSTER, backing: None, ..wanted });

            // The first-level table covers the disk, with no entry too many, and ends with the file.
            let entries = u64::from(u32_at(header, 36));
            prop_assert!(entries * BYTES_PER_FIRST_LEVEL_ENTRY >= overlay.virtual_bytes);
            prop_assert!((entries - 1) * BYTES_PER_FIRST_LEVEL_ENTRY < overlay.virtual_bytes);
            let table = u64_at(header, 40);
            prop_assert_eq!((table + entries * 8).next_multiple_of(CLUSTER), image.length);
            prop_assert!(image.pieces.iter().all(|piece| piece.offset + piece.bytes.len() as u64 <= table));

            // Each cluster of the file is counted exactly once.
            let counts_at = u64::from_be_bytes(image.pieces[1].bytes[..].try_into().unwrap());
            prop_assert_eq!(u64_at(header, 48), image.pieces[1].offset);
            prop_assert_eq!(counts_at, image.pieces[2].offset);
            let counts: Vec<u16> = image.pieces[2].bytes.chunks(2).map(|it| u16::from_be_bytes([it[0], it[1]])).collect();
            prop_assert!(counts.iter().all(|count| *count == 1));
            prop_assert_eq!(counts.len() as u64 * CLUSTER, image.length);
        }

        #[test]
        fn no_start_of_a_file_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = virtual_bytes(&bytes);
            let mut marked = [&MAGIC[..], &VERSION.to_be_bytes()].concat();
            marked.extend(bytes);
            let _ = virtual_bytes(&marked);
            let _ = contents(&marked);
        }
    }

    #[test]
    fn a_base_must_be_an_absolute_path() {
        for name in ["", "base", "nbd:host:1", "json:{}", "./base", "/a\nb", "/a\0b"] {
            let overlay =
                Overlay { virtual_bytes: 1 << 30, backing_file: name, backing_format: DiskFormat::Raw };
            assert_eq!(empty_overlay(&overlay), Err(HeaderError::BackingFile(name.to_owned())));
        }
        let long = format!("/{}", "x".repeat(LONGEST_NAME));
        let overlay =
            Overlay { virtual_bytes: 1 << 30, backing_file: &long, backing_format: DiskFormat::Raw };
        assert!(matches!(empty_overlay(&overlay), Err(HeaderError::BackingFile(_))));
    }

    #[test]
    fn a_size_must_be_one_that_qemu_takes() {
        for size in [0, 511, 513, LARGEST_VIRTUAL_BYTES + 512, u64::MAX] {
            let overlay =
                Overlay { virtual_bytes: size, backing_file: "/base", backing_format: DiskFormat::Raw };
            assert_eq!(empty_overlay(&overlay), Err(HeaderError::Size(size)));
        }
    }

    #[test]
    fn what_is_not_a_clean_header_is_refused_by_name() {
        let overlay =
            Overlay { virtual_bytes: 1 << 30, backing_file: "/base", backing_format: DiskFormat::Raw };
        let good = empty_overlay(&overlay).unwrap().pieces.remove(0).bytes;
        assert_eq!(virtual_bytes(&good[..20]), Err(HeaderError::NoHeader(NoHeader::Short)));
        assert_eq!(virtual_bytes(&[0; 104]), Err(HeaderError::NoHeader(NoHeader::Format)));
        let mut version_two = good.clone();
        version_two[7] = 2;
        assert_eq!(virtual_bytes(&version_two), Err(HeaderError::NoHeader(NoHeader::Format)));
        let mut dirty = good;
        dirty[79] = 1;
        assert_eq!(virtual_bytes(&dirty), Err(HeaderError::Features(1)));
    }
}
