//! A chain of qcow2 files, perhaps with a plain file at its bottom, written as one qcow2 file that stands on nothing.
//!
//! ```text
//!  cluster  0        1                 2 …                    then, as the guest's clusters come        at the end
//!           header   reference count   first-level table      data, data, …, their second-level table   reference count
//!                    table                                    data, …, the next such table              blocks
//! ```
//!
//! What a guest sees in a cluster of its disk is in the first file from the top that has something to say of it; below
//! the bottom there are zeros. A cluster that is all zero is not written, so the file is as large as what is in it.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt,
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_vmm::{DiskFormat, DiskSpec, qcow2};

use super::{
    RootfsError, RootfsResult,
    qcow2_header::{self, CLUSTER, Contents},
};
use crate::snapshot_store::files::next_block_with_data;

/// Entries of a table of either level in one cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// How many clusters a block of reference counts of 16 bits speaks of.
const COUNTED: u64 = CLUSTER / 2;
/// Where in a file, in an entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an entry: nobody else refers to that cluster, so it may be written in place.
const ONLY_ONE: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// A chain that does not end is a circle.
const DEEPEST: usize = 256;

/// What a file has to say of a cluster of the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saying {
    /// Nothing: ask the one below.
    Nothing,
    /// It is all zero, whatever is below.
    Zero,
    /// It is at this offset.
    At(u64),
}

impl Saying {
    /// What an entry of a second-level table says; none when it is one that we never have.
    fn of(entry: u64) -> Option<Self> {
        let offset = entry & OFFSET;
        match entry {
            _ if entry & COMPRESSED != 0 || !offset.is_multiple_of(CLUSTER) => None,
            _ if entry & ZERO != 0 => Some(Self::Zero),
            _ if offset == 0 => Some(Self::Nothing),
            _ => Some(Self::At(offset)),
        }
    }
}

/// One file of a chain.
#[derive(Debug)]
struct Layer {
    path: Utf8PathBuf,
    file: File,
    map: Map,
}

#[derive(Debug)]
enum Map {
    /// Everything is where it is; holes are zero.
    Plain { length: u64, next_data: Option<u64> },
    /// The first-level table, and the second-level table that is looked at.
    Tables { first: Vec<u64>, second: Option<Vec<u64>> },
}

/// Writes what a guest sees in the disk at `top`, which stands on nothing but `bases`, into an empty file.
///
/// # Errors
/// `path_into` is only named.
pub(super) fn flatten(
    top: &Utf8Path,
    bases: &[DiskSpec],
    into: &File,
    path_into: &Utf8Path,
) -> RootfsResult<()> {
    let (mut chain, virtual_bytes) = open_chain(top, bases)?;
    let mut output = Output::begin(into, virtual_bytes);
    let clusters = virtual_bytes.div_ceil(CLUSTER);
    let mut buffer = vec![0; in_memory(CLUSTER)];
    for number in 0..clusters.div_ceil(ENTRIES) {
        let mut has_any = false;
        for layer in &mut chain {
            has_any |= layer.go_to(number)?;
        }
        if !has_any {
            continue;
        }
        for cluster in number * ENTRIES..((number + 1) * ENTRIES).min(clusters) {
            if read(&mut chain, cluster, &mut buffer)? {
                output.put(cluster, &buffer).map_err(|error| RootfsError::file("write", path_into, error))?;
            }
        }
    }
    output.end().map_err(|error| RootfsError::file("write", path_into, error))
}

fn open_chain(top: &Utf8Path, bases: &[DiskSpec]) -> RootfsResult<(Vec<Layer>, u64)> {
    let (mut chain, mut size) = (Vec::new(), None);
    let mut next = Some((top.to_owned(), DiskFormat::Qcow2));
    while let Some((path, format)) = next.take() {
        if chain.len() == DEEPEST {
            return Err(RootfsError::Base { path, problem: "it is at the end of a chain that does not end" });
        }
        let failed = |error| RootfsError::file("read", &path, error);
        let file = File::open(&path).map_err(failed)?;
        let map = match format {
            DiskFormat::Raw | DiskFormat::DmSnapshot => {
                Map::Plain { length: file.metadata().map_err(failed)?.len(), next_data: Some(0) }
            }
            DiskFormat::Qcow2 => {
                let mut start = Vec::new();
                (&file).take(CLUSTER).read_to_end(&mut start).map_err(failed)?;
                let contents = qcow2_header::contents(&start)
                    .map_err(|source| RootfsError::Header { path: path.clone(), source })?;
                let Contents { virtual_bytes, table, entries, backing } = contents;
                size = size.or(Some(virtual_bytes));
                next = backing.map(|named| known(&path, named, bases)).transpose()?;
                Map::Tables { first: read_table(&file, table, entries.into()).map_err(failed)?, second: None }
            }
        };
        chain.push(Layer { path, file, map });
    }
    Ok((chain, size.unwrap_or_default()))
}

/// The base that a header names, if it may.
fn known(
    path: &Utf8Path,
    (below, format): (Utf8PathBuf, DiskFormat),
    bases: &[DiskSpec],
) -> RootfsResult<(Utf8PathBuf, DiskFormat)> {
    match qcow2::named(bases, &below).filter(|base| base.format == format) {
        Some(base) => Ok((base.path.clone(), base.format)),
        None => {
            let problem = "its header names something that it does not stand on";
            Err(RootfsError::Base { path: path.to_owned(), problem })
        }
    }
}

/// Reads a cluster of the guest's disk; whether there is anything but zeros in it.
fn read(chain: &mut [Layer], cluster: u64, buffer: &mut [u8]) -> RootfsResult<bool> {
    for layer in chain {
        let failed = |error| RootfsError::file("read", &layer.path, error);
        match layer.map.saying(&layer.file, cluster).map_err(failed)? {
            None => {
                let problem = "its tables name a cluster in a way that is never used here";
                return Err(RootfsError::Base { path: layer.path.clone(), problem });
            }
            Some(Saying::Nothing) => {}
            Some(Saying::Zero) => return Ok(false),
            Some(Saying::At(offset)) => {
                read_or_zero(&layer.file, offset, buffer).map_err(failed)?;
                // A row of bytes against itself, one byte on: all are as the first.
                return Ok(buffer[0] != 0 || buffer[1..] != buffer[..buffer.len() - 1]);
            }
        }
    }
    Ok(false)
}

impl Layer {
    /// Looks at the part of the guest's disk that second-level tables of this number speak of; whether there may be
    /// something.
    fn go_to(&mut self, number: u64) -> RootfsResult<bool> {
        match &mut self.map {
            Map::Plain { length, .. } => Ok(number * ENTRIES * CLUSTER < *length),
            Map::Tables { first, second } => {
                let entry = usize::try_from(number).ok().and_then(|number| first.get(number));
                let offset = entry.copied().unwrap_or_default() & OFFSET;
                *second = None;
                if offset != 0 {
                    let table = read_table(&self.file, offset, ENTRIES);
                    *second = Some(table.map_err(|error| RootfsError::file("read", &self.path, error))?);
                }
                Ok(second.is_some())
            }
        }
    }
}

impl Map {
    /// What is said of a cluster in the part that was gone to. Clusters are asked for in ascending order.
    fn saying(&mut self, file: &File, cluster: u64) -> io::Result<Option<Saying>> {
        let position = cluster * CLUSTER;
        match self {
            Self::Plain { length, next_data } => {
                if next_data.is_some_and(|next| next < position) {
                    *next_data = next_block_with_data(file, position, *length, CLUSTER)?;
                }
                let is_there = *next_data == Some(position) && position < *length;
                Ok(Some(if is_there { Saying::At(position) } else { Saying::Zero }))
            }
            Self::Tables { second: None, .. } => Ok(Some(Saying::Nothing)),
            Self::Tables { second: Some(table), .. } => {
                let at = in_memory(cluster % ENTRIES);
                Ok(Saying::of(table.get(at).copied().unwrap_or_default()))
            }
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
struct Output<'a> {
    file: &'a File,
    virtual_bytes: u64,
    first: Vec<u64>,
    /// The number and the content of the second-level table that is being filled.
    second: Option<(u64, Vec<u64>)>,
    /// Where the next cluster is put.
    next: u64,
}

impl<'a> Output<'a> {
    fn begin(file: &'a File, virtual_bytes: u64) -> Self {
        let entries = virtual_bytes.div_ceil(CLUSTER).div_ceil(ENTRIES);
        let table_clusters = entries.div_ceil(ENTRIES);
        let first = vec![0; in_memory(entries)];
        Self { file, virtual_bytes, first, second: None, next: (2 + table_clusters) * CLUSTER }
    }

    fn take(&mut self) -> u64 {
        let taken = self.next;
        self.next += CLUSTER;
        taken
    }

    /// Puts the content of a cluster of the guest's disk. Clusters come in ascending order.
    fn put(&mut self, cluster: u64, content: &[u8]) -> io::Result<()> {
        let number = cluster / ENTRIES;
        if self.second.as_ref().is_some_and(|(current, _)| *current != number) {
            self.end_table()?;
        }
        let at = self.take();
        self.file.write_all_at(content, at)?;
        let (_, table) = self.second.get_or_insert_with(|| (number, vec![0; in_memory(ENTRIES)]));
        table[in_memory(cluster % ENTRIES)] = at | ONLY_ONE;
        Ok(())
    }

    fn end_table(&mut self) -> io::Result<()> {
        let Some((number, table)) = self.second.take() else { return Ok(()) };
        let at = self.take();
        self.file.write_all_at(&to_bytes(&table), at)?;
        self.first[in_memory(number)] = at | ONLY_ONE;
        Ok(())
    }

    /// Writes what leads to the clusters. The header comes last: without it the file is none.
    fn end(mut self) -> io::Result<()> {
        self.end_table()?;
        self.file.write_all_at(&to_bytes(&self.first), 2 * CLUSTER)?;
        let used = self.next / CLUSTER;
        let blocks = count_blocks(used);
        let counts: Vec<u8> = (0..used + blocks).flat_map(|_| 1_u16.to_be_bytes()).collect();
        self.file.write_all_at(&counts, self.next)?;
        let starts: Vec<u64> = (0..blocks).map(|block| self.next + block * CLUSTER).collect();
        if starts.len() as u64 > ENTRIES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the table of reference counts is full"));
        }
        self.file.write_all_at(&to_bytes(&starts), CLUSTER)?;
        self.file.set_len(self.next + blocks * CLUSTER)?;
        let header = qcow2_header::alone(self.virtual_bytes, 2 * CLUSTER).map_err(io::Error::other)?;
        self.file.write_all_at(&header, 0)
    }
}

/// How many blocks of reference counts a file needs that has so many clusters without them: they are counted too.
fn count_blocks(used: u64) -> u64 {
    // Each block has room for itself and this many others.
    used.div_ceil(COUNTED - 1)
}

fn to_bytes(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

fn read_table(file: &File, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; in_memory(entries * 8)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.chunks_exact(8).map(|it| u64::from_be_bytes(std::array::from_fn(|at| it[at]))).collect())
}

/// Fills the buffer; what lies behind the end of the file is zero.
fn read_or_zero(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                return Ok(());
            }
            Ok(read) => {
                offset += read as u64;
                buffer = &mut buffer[read..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How many there are of something that is in memory.
fn in_memory(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_qemu_means() {
        assert_eq!(Saying::of(0), Some(Saying::Nothing));
        assert_eq!(Saying::of(ONLY_ONE | (5 * CLUSTER)), Some(Saying::At(5 * CLUSTER)));
        assert_eq!(Saying::of(5 * CLUSTER), Some(Saying::At(5 * CLUSTER)));
        assert_eq!(Saying::of(ZERO), Some(Saying::Zero));
        assert_eq!(Saying::of(ONLY_ONE | (5 * CLUSTER) | ZERO), Some(Saying::Zero), "kept for later");
        assert_eq!(Saying::of(COMPRESSED | (5 * CLUSTER)), None);
        assert_eq!(Saying::of(ONLY_ONE | 512), None);
    }

    #[test]
    fn all_clusters_are_counted() {
        for used in [1, 2, COUNTED - 2, COUNTED - 1, COUNTED, COUNTED + 1, 2 * COUNTED - 3, 1 << 30] {
            let blocks = count_blocks(used);
            assert!((blocks - 1) * COUNTED < used + blocks && used + blocks <= blocks * COUNTED, "{used}");
        }
    }
}
