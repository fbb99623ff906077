//! Root disks: how a sandbox gets one, and how a disk becomes the base of others.
//!
//! ```text
//!   template image ──clone──► disk of the template machine ──flatten──► layer in the warm snapshot
//!   (immutable)               (one writer)                              (immutable, stands on nothing)
//!                                                                        │
//!                                           clone, clone, clone …  ◄─────┘
//!                                           disks of sandboxes (one writer each) ──remove──► gone
//! ```
//!
//! A *base* is a file that never changes again: a template's image, or a layer that was frozen. A *disk*
//! has exactly one writer, its virtual machine. Both are named by a [`DiskSpec`].
//!
//! A machine takes what [`RootfsStore::open`] answers, which for most drivers is the file itself; after the machine is gone the
//! disk is closed. A base is never opened.
//!
//! Drivers:
//! - [`Qcow2Store`]: a disk is an empty overlay of 256 KiB, of which 12 KiB are written, whatever the size
//!   of the base. Needs QEMU as the VMM, and nothing of the kernel.
//! - [`FileStore`]: a disk is the bytes themselves; shared with the base where the filesystem can
//!   (reflink), else copied without its holes, and then the time depends on the base. For every VMM.
//! - [`DmSnapshotStore`]: a disk is a sparse file with what differs from the base, which all disks share as one device
//!   of the kernel. Needs the device mapper and root, and nothing of the VMM.
//!
//! *Large and small.* The size of a disk is what its guest sees, and only ever grows: it is no more than a number, in the
//! header of an overlay or of a file, or as the length of a sparse file, and a guest's kernel grows its file system while that is
//! mounted. What a disk takes of the host is another thing, and that shrinks. Machines open disks with `discard=unmap`, a
//! guest trims its file system before each snapshot, and what it gives back is no block of the host any more; a
//! flattened disk has no room for zeros at all. So there is no shrinking of a size here:
//!
//! - *An image of a template* is stored shrunk because it is made so: a file system of the size of its content and of the
//!   room that its recipe asks for, in a sparse file (`xtask/src/template.rs`). It has never been larger.
//! - *The layer of a warm snapshot and the layers of a sandbox* must not be made smaller. Memory is saved with
//!   them, in which the guest's kernel has the file system mounted: another superblock, or blocks that were moved
//!   (`resize2fs -M` does both), would be a damaged disk after the restore. It would gain nothing, since the host
//!   keeps no block for the empty part.
//! - *A pause of the disk alone* could be, as its kernel boots; the next overlay has the user's size again anyway, and what
//!   lies between are holes.
//!
//! All pass the one suite in `conformance`. Calls block on the disk and nothing else; where a copy may
//! be made, call them on a thread that may block. Nothing here takes a name from the wire: the caller
//! builds paths from parsed ids.

mod copy;
mod dm_snapshot;
mod error;
mod file;
mod flatten;
mod qcow2;
mod qcow2_header;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod own_filesystem;

use std::{
    fmt, fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::DiskMib;
use wrenn_vmm::{DiskFormat, DiskSpec};

pub(crate) use copy::copy_content;
pub use dm_snapshot::{DmSnapshotError, DmSnapshotStore};
pub use error::{RootfsError, RootfsResult};
pub use file::FileStore;
pub use qcow2::Qcow2Store;
pub use qcow2_header::HeaderError;

/// Makes root disks, and bases of root disks.
pub trait RootfsStore: fmt::Debug + Send + Sync {
    /// The format of every disk that this store makes.
    fn format(&self) -> DiskFormat;

    /// The format of what [`RootfsStore::flatten`] makes.
    fn flat_format(&self) -> DiskFormat {
        self.format()
    }

    /// Makes the disk `disk`, which must not exist, with the content of `base` and the size `size`; what
    /// lies beyond the end of the base reads as zeros. The base is only read, now and for as long as the
    /// disk exists, and must stay where it is. Symbolic links on the way to it are followed once, now: a
    /// link that is turned to another image later does not change a disk under its guest. A base may be the open disk of
    /// a machine that stands still: the clone is then what that machine has written.
    ///
    /// # Errors
    /// No file is left behind, and a file that was there before is not touched.
    /// [`RootfsError::TooSmall`] when `size` is less than the base has.
    fn clone_disk(&self, base: &DiskSpec, disk: &Utf8Path, size: DiskMib) -> RootfsResult<DiskSpec>;

    /// Makes of a disk what a machine can be given, and be given again when that one is gone. The path may lead to
    /// another file than the disk's, which only this process and the machine may use, until the disk is closed.
    ///
    /// # Errors
    /// It is not open then. [`RootfsError::InUse`] when it has a machine.
    fn open(&self, disk: &DiskSpec) -> RootfsResult<DiskSpec> {
        Ok(disk.clone())
    }

    /// Gives back what was made for the machine of a disk, which is gone: all that it has written is in the disk.
    /// Where it is stuck in the kernel, that is done when it ends. Idempotent.
    ///
    /// # Errors
    /// It is open still. What is left is collected by the next agent.
    fn close(&self, _disk: &Utf8Path) -> RootfsResult<()> {
        Ok(())
    }

    /// Whether a disk or a layer is open, and so may be written to. Of some stores only the machine knows.
    ///
    /// # Errors
    /// It cannot be told.
    fn is_open(&self, _disk: &Utf8Path) -> RootfsResult<bool> {
        Ok(false)
    }

    /// Waits until all that a machine that stands still has written to its disk is in the file: its file can then be
    /// made durable, and be a base after the machine was ended.
    ///
    /// # Errors
    /// Not all of it is. [`RootfsError::GivenUp`] when it never will be.
    fn settle(&self, _disk: &DiskSpec) -> RootfsResult<()> {
        Ok(())
    }

    /// Makes a disk larger whose machine is told by its VMM afterwards. Nothing to do where that makes it so.
    ///
    /// # Errors
    /// It has the size that it had. [`RootfsError::TooSmall`] when it is larger.
    fn grow(&self, _disk: &DiskSpec, _size: DiskMib) -> RootfsResult<()> {
        Ok(())
    }

    /// Gives back what an earlier agent had opened, and what others have left on this machine that nobody looks
    /// after. The disks of machines that live stay as they are. Answers how many disks were open.
    ///
    /// # Errors
    /// Something of this agent's own is left.
    fn collect(&self) -> RootfsResult<usize> {
        Ok(0)
    }

    /// Makes an immutable base of a disk whose machine is gone, moves it to `layer`, which must not
    /// exist unless it is the disk itself, and waits until it is durable. The disk is then no longer a
    /// disk: only clones of the layer may be written.
    ///
    /// # Errors
    /// The disk is where it was, or at `layer`, and its bytes are unchanged.
    fn freeze(&self, disk: &DiskSpec, layer: &Utf8Path) -> RootfsResult<DiskSpec>;

    /// As [`RootfsStore::freeze`], but the base stands on nothing: what it was made of may go. `layer` must not exist.
    /// What is zero takes no room where the format can say so. Takes as long as it takes to copy what is in the disk,
    /// and in what it stands on: nothing but `bases`, in any order. A header that names something else is refused, since
    /// whoever wrote the disk may have written that too.
    ///
    /// # Errors
    /// The disk is where it was, unless it stood on nothing: then as for a freeze.
    fn flatten(&self, disk: &DiskSpec, bases: &[DiskSpec], layer: &Utf8Path) -> RootfsResult<DiskSpec>;

    /// Removes a disk or a layer that nothing uses. Idempotent.
    ///
    /// # Errors
    /// [`RootfsError::File`] when it is still there.
    fn remove(&self, disk: &Utf8Path) -> RootfsResult<()> {
        match fs::remove_file(disk) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(RootfsError::file("remove", disk, error))
            }
            _ => Ok(()),
        }
    }

    /// How many bytes of the host's disk it takes itself: blocks in use, not the apparent size, and
    /// nothing of its base.
    ///
    /// # Errors
    /// [`RootfsError::File`] when it is not there.
    fn used_bytes(&self, disk: &Utf8Path) -> RootfsResult<u64> {
        let metadata = fs::metadata(disk).map_err(|error| RootfsError::file("examine", disk, error))?;
        // The unit of `st_blocks` is 512 bytes on every filesystem.
        Ok(metadata.blocks() * 512)
    }
}

/// The path of a base with every symbolic link followed: absolute, and a regular file.
fn resolve_base(base: &Utf8Path) -> RootfsResult<Utf8PathBuf> {
    let resolved =
        base.canonicalize_utf8().map_err(|error| RootfsError::file("find the base", base, error))?;
    let metadata =
        fs::metadata(&resolved).map_err(|error| RootfsError::file("examine the base", base, error))?;
    if metadata.is_file() {
        Ok(resolved)
    } else {
        Err(RootfsError::Base { path: resolved, problem: "it is not a regular file" })
    }
}

/// Refuses a disk that would cut off the end of its base.
fn check_size(base: &Utf8Path, base_bytes: u64, size: DiskMib) -> RootfsResult<()> {
    if size.bytes() < base_bytes {
        return Err(RootfsError::TooSmall { base: base.to_owned(), base_bytes, wanted_bytes: size.bytes() });
    }
    Ok(())
}

/// The part of [`RootfsStore::freeze`] that is the same for every format.
fn freeze_file(disk: &Utf8Path, layer: &Utf8Path) -> RootfsResult<()> {
    let file = fs::File::open(disk).map_err(|error| RootfsError::file("open", disk, error))?;
    file.set_permissions(fs::Permissions::from_mode(0o444))
        .map_err(|error| RootfsError::file("make read-only", disk, error))?;
    file.sync_all().map_err(|error| RootfsError::file("write to disk", disk, error))?;
    if disk != layer {
        copy::move_file(disk, layer)?;
    }
    // The name is durable only when its directory is.
    let directory = match layer.parent() {
        Some(parent) if !parent.as_str().is_empty() => parent,
        _ => Utf8Path::new("."),
    };
    fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| RootfsError::file("write to disk", directory, error))
}
