//! Disks that are snapshots of the device mapper: the kernel's own copy-on-write over an image that all share.
//!
//! ```text
//!  image ── loop device, read-only ──► image, then zeros ────┐
//!                                        (one per size)      ├─► snapshot ── /dev/wrenn/INSTANCE/… ──► the machine
//!  file of the disk ── loop device ──────────────────────────┘
//!
//!  clone ──► file ── open ──► device ── settle, grow, clone of it ──► … ── close ──► file ── freeze, flatten, remove
//!                    (for a machine)                         (the machine is gone)
//! ```
//!
//! *What a disk is* is its file: a block that says which image it stands on (`description`), and behind it what the
//! kernel keeps, records and chunks that were written (`records`). It is there across pauses, agents and boots of the
//! host. The device is there for as long as there is a machine, and is made of the file again for the next one. So a
//! disk can be kept, shared by reflink, moved and counted as every other file, and has one layer: a clone of a disk is a
//! copy of its file that stands on the same image, and what is copied where the file system cannot share is what was
//! written, not the image.
//!
//! *How long a device lives* is derived from who has it open, which the kernel knows (`devices`). An image has one loop
//! device and one device for each size, for however many disks; they go with the last one of these.
//!
//! *Room.* The file is as long as the whole disk and all records would need, so that the kernel never finds it full, and
//! takes what was written. Where the host's disk is full, a write fails, and the kernel gives up the whole
//! snapshot: its guest reads errors from then on, and it cannot be saved, which is said ([`RootfsError::GivenUp`]). The file
//! then has what was flushed, and the kernel's note of it where there was room for that. What was saved before is other
//! files. Room that a guest gives back becomes a hole of the file, a chunk at a time; of
//! what is the image's alone nothing is recorded, so that it reads as the image's again.
//!
//! *What is durable when.* What a guest has flushed is in the file and on the host's disk; the kernel records a chunk
//! after its content. What a machine has written and not flushed is in the memory of the device, so a disk is settled
//! before its file is saved.

mod description;
mod devices;
mod records;
mod table;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt as _},
};

use camino::Utf8Path;
use description::{BLOCK, Description, DescriptionError, SECTOR};
use devices::{Devices, identity};
use records::{RecordsError, Standing, Written};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use table::Identity;
use wrenn_types::{DiskMib, InstanceId};
use wrenn_vmm::{DiskFormat, DiskSpec};

use super::{
    RootfsError, RootfsResult, RootfsStore, check_size,
    copy::{self, Unfinished},
    freeze_file, resolve_base,
};

/// What is copied when a guest writes to any part of it: the block of nearly every file system, so that nearly nothing
/// is copied that is not written.
const CHUNK_SECTORS: u32 = 8;

/// Why a file is not the disk that it should be.
#[derive(Debug, thiserror::Error)]
pub enum DmSnapshotError {
    /// What it says of itself.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// What the kernel has recorded in it.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// A disk is a file with what differs from an image; while it has a machine, the kernel makes a device of both.
#[derive(Debug)]
pub struct DmSnapshotStore {
    devices: Devices,
    chunk_sectors: u32,
}

/// The file of a disk, open.
struct Opened {
    file: File,
    identity: Identity,
    description: Description,
}

fn refused(path: &Utf8Path) -> impl FnOnce(DmSnapshotError) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::DmSnapshot { path, source }
}

fn described(path: &Utf8Path, made: Result<Description, DescriptionError>) -> RootfsResult<Description> {
    made.map_err(DmSnapshotError::from).map_err(refused(path))
}

impl Opened {
    fn of(path: &Utf8Path, is_writable: bool) -> RootfsResult<Self> {
        let file = File::options().read(true).write(is_writable).open(path);
        let file = file.map_err(|error| RootfsError::file("open", path, error))?;
        let identity = identity(&file, path)?;
        let read = Description::read(&file).map_err(|error| RootfsError::file("read", path, error))?;
        Ok(Self { file, identity, description: described(path, read)? })
    }

    /// Refuses a disk that the kernel has given up.
    fn refuse_given_up(&self, path: &Utf8Path) -> RootfsResult<()> {
        let standing = records::standing(&self.file, &self.description);
        match standing.map_err(DmSnapshotError::from).map_err(refused(path))? {
            Standing::New | Standing::Valid => Ok(()),
            Standing::GivenUp => Err(RootfsError::GivenUp { path: path.to_owned() }),
        }
    }

    /// The image, which has the length that it had.
    fn image(&self) -> RootfsResult<File> {
        let path = &self.description.image;
        let image = File::open(path).map_err(|error| RootfsError::file("open", path, error))?;
        let metadata = image.metadata().map_err(|error| RootfsError::file("examine", path, error))?;
        match metadata.is_file() && metadata.len() == self.description.image_bytes {
            true => Ok(image),
            false => {
                let problem = "it is not the image that the disk was made of";
                Err(RootfsError::Base { path: path.clone(), problem })
            }
        }
    }
}

/// Writes the block, and makes the file as long as the disk needs.
fn describe(file: &File, description: &Description, path: &Utf8Path) -> RootfsResult<()> {
    let block = description.encode().map_err(DmSnapshotError::from).map_err(refused(path))?;
    file.write_all_at(&block, 0)
        .and_then(|()| file.set_len(description.file_bytes()))
        .map_err(|error| RootfsError::file("write", path, error))
}

fn is_such(disk: &DiskSpec) -> RootfsResult<()> {
    match disk.format {
        DiskFormat::DmSnapshot => Ok(()),
        DiskFormat::Raw | DiskFormat::Qcow2 => {
            let problem = "it is not the file of a dm-snapshot";
            Err(RootfsError::Base { path: disk.path.clone(), problem })
        }
    }
}

impl DmSnapshotStore {
    /// The disks of an instance. Devices that there are already stay until [`RootfsStore::collect`].
    ///
    /// # Errors
    /// The kernel has not what is needed, or somebody else has the disks of this instance.
    pub fn new(instance: &InstanceId) -> RootfsResult<Self> {
        Ok(Self { devices: Devices::of(instance)?, chunk_sectors: CHUNK_SECTORS })
    }

    /// A disk that differs in nothing from an image.
    fn of_image(&self, image: &Utf8Path, disk: &Utf8Path, size: DiskMib) -> RootfsResult<()> {
        let metadata =
            std::fs::metadata(image).map_err(|error| RootfsError::file("examine the base", image, error))?;
        let bytes = metadata.len();
        check_size(image, bytes, size)?;
        if !bytes.is_multiple_of(SECTOR) || bytes == 0 {
            let problem = "its length is no multiple of 512 bytes";
            return Err(RootfsError::Base { path: image.to_owned(), problem });
        }
        let made = Description::new(image.to_owned(), bytes, size.bytes(), self.chunk_sectors);
        let description = described(disk, made)?;
        let target = Unfinished::create(disk)?;
        match fallocate(target.file(), FallocateFlags::empty(), 0, description.first_bytes()) {
            // A file system that cannot: then it is found out later whether there is room.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(RootfsError::file("take room for", disk, error.into())),
        }
        describe(target.file(), &description, disk)?;
        target.keep();
        Ok(())
    }

    /// A disk that differs in nothing from another one, which may have a machine that stands still.
    fn of_disk(&self, base: &Utf8Path, disk: &Utf8Path, size: DiskMib) -> RootfsResult<()> {
        let source = Opened::of(base, false)?;
        check_size(base, source.description.disk_bytes, size)?;
        let description = described(disk, source.description.with_size(size.bytes()))?;
        let target = self.devices.while_still(source.identity, base, || {
            source.refuse_given_up(base)?;
            let target = Unfinished::create(disk)?;
            let copied = copy::copy_content(&source.file, target.file());
            copied.map_err(|error| RootfsError::file("fill", disk, error))?;
            Ok(target)
        })?;
        describe(target.file(), &description, disk)?;
        target.keep();
        Ok(())
    }

    /// A file that has no device (any more), and that the kernel has not given up.
    fn closed(&self, disk: &DiskSpec) -> RootfsResult<Opened> {
        is_such(disk)?;
        let opened = Opened::of(&disk.path, false)?;
        self.devices.close_now(opened.identity, &disk.path)?;
        opened.refuse_given_up(&disk.path)?;
        Ok(opened)
    }
}

impl RootfsStore for DmSnapshotStore {
    fn format(&self) -> DiskFormat {
        DiskFormat::DmSnapshot
    }

    /// A disk that stands on nothing is an image, and others can stand on it.
    fn flat_format(&self) -> DiskFormat {
        DiskFormat::Raw
    }

    fn clone_disk(&self, base: &DiskSpec, disk: &Utf8Path, size: DiskMib) -> RootfsResult<DiskSpec> {
        let path = resolve_base(&base.path)?;
        match base.format {
            DiskFormat::Raw => self.of_image(&path, disk, size)?,
            DiskFormat::DmSnapshot => self.of_disk(&path, disk, size)?,
            DiskFormat::Qcow2 => {
                let problem = "a dm-snapshot stands on a plain image";
                return Err(RootfsError::Base { path, problem });
            }
        }
        Ok(DiskSpec { path: disk.to_owned(), format: DiskFormat::DmSnapshot })
    }

    fn open(&self, disk: &DiskSpec) -> RootfsResult<DiskSpec> {
        is_such(disk)?;
        let opened = Opened::of(&disk.path, true)?;
        opened.refuse_given_up(&disk.path)?;
        let image = opened.image()?;
        let path = self.devices.open(&disk.path, &opened.file, &image, &opened.description)?;
        Ok(DiskSpec { path, format: DiskFormat::Raw })
    }

    fn close(&self, disk: &Utf8Path) -> RootfsResult<()> {
        match known(disk)? {
            Some(file) => self.devices.close(file),
            None => Ok(()),
        }
    }

    fn is_open(&self, disk: &Utf8Path) -> RootfsResult<bool> {
        known(disk)?.map_or(Ok(false), |file| self.devices.is_open(file))
    }

    fn settle(&self, disk: &DiskSpec) -> RootfsResult<()> {
        is_such(disk)?;
        known(&disk.path)?.map_or(Ok(()), |file| self.devices.settle(file, &disk.path))
    }

    fn grow(&self, disk: &DiskSpec, size: DiskMib) -> RootfsResult<()> {
        is_such(disk)?;
        let opened = Opened::of(&disk.path, true)?;
        check_size(&disk.path, opened.description.disk_bytes, size)?;
        if size.bytes() == opened.description.disk_bytes {
            return Ok(());
        }
        let larger = described(&disk.path, opened.description.with_size(size.bytes()))?;
        let image = opened.image()?;
        describe(&opened.file, &larger, &disk.path)?;
        let grown = self.devices.grow(opened.identity, &image, &larger);
        if grown.is_err() {
            let block = opened.description.encode().map_err(DmSnapshotError::from);
            let block = block.map_err(refused(&disk.path))?;
            // The file stays as long as it is: that is a hole.
            opened
                .file
                .write_all_at(&block, 0)
                .map_err(|error| RootfsError::file("write", &disk.path, error))?;
        }
        grown
    }

    fn freeze(&self, disk: &DiskSpec, layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        self.closed(disk)?;
        freeze_file(&disk.path, layer)?;
        Ok(DiskSpec { path: layer.to_owned(), format: DiskFormat::DmSnapshot })
    }

    fn flatten(&self, disk: &DiskSpec, _: &[DiskSpec], layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        let source = self.closed(disk)?;
        let image = source.image()?;
        let written = records::read(&source.file, &source.description);
        let written = written.map_err(DmSnapshotError::from).map_err(refused(&disk.path))?;
        let target = Unfinished::create(layer)?;
        copy::copy_content(&image, target.file())
            .and_then(|_| target.file().set_len(source.description.disk_bytes))
            .and_then(|()| put_on_top(&source, &written, target.file()))
            .map_err(|error| RootfsError::file("fill", layer, error))?;
        freeze_file(layer, layer)?;
        target.keep();
        self.remove(&disk.path)?;
        Ok(DiskSpec { path: layer.to_owned(), format: DiskFormat::Raw })
    }

    fn remove(&self, disk: &Utf8Path) -> RootfsResult<()> {
        if let Some(file) = known(disk)? {
            self.devices.close_now(file, disk)?;
        }
        match std::fs::remove_file(disk) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(RootfsError::file("remove", disk, error))
            }
            _ => Ok(()),
        }
    }

    fn collect(&self) -> RootfsResult<usize> {
        self.devices.collect()
    }
}

/// Which file it is; none when it is not there.
fn known(path: &Utf8Path) -> RootfsResult<Option<Identity>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(Identity(metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RootfsError::file("examine", path, error)),
    }
}

/// The size of a disk as its guest sees it.
#[cfg(test)]
pub(super) fn disk_bytes(path: &Utf8Path) -> RootfsResult<u64> {
    Ok(Opened::of(path, false)?.description.disk_bytes)
}

/// Copies the chunks that were written into a copy of the image. One of zeros becomes a hole.
fn put_on_top(source: &Opened, written: &[Written], target: &File) -> io::Result<()> {
    let chunk = source.description.chunk_bytes();
    let mut buffer = vec![0; usize::try_from(chunk).map_err(io::Error::other)?];
    for Written { disk_chunk, file_chunk } in written {
        let (from, to) = (BLOCK + file_chunk * chunk, disk_chunk * chunk);
        // The last chunk may reach beyond the end of the disk.
        let length = chunk.min(source.description.disk_bytes - to);
        let content = &mut buffer[..usize::try_from(length).map_err(io::Error::other)?];
        source.file.read_exact_at(content, from)?;
        if content.iter().any(|byte| *byte != 0) {
            target.write_all_at(content, to)?;
            continue;
        }
        match fallocate(target, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, to, length) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => target.write_all_at(content, to)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
