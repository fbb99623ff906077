//! The names and the tables of devices: text, and nothing done.
//!
//! ```text
//!  disk     wrenn-INSTANCE-disk-DEVICE-INODE           snapshot of ─┐   the file of the disk
//!                                                                   ▼          │ loop device
//!  image    wrenn-INSTANCE-image-DEVICE-INODE-SECTORS  image, then zeros up to the size of the disk
//!                                                        │ loop device, read-only: one for all sizes
//!                                                                  └ loop device of a file that is one hole
//! ```
//!
//! A file is named by what it is, device and inode, and not by where it lies: a disk that is frozen is moved.

use std::fmt;

use wrenn_host_linux::{block_device::DeviceNumber, device_mapper::Target};
use wrenn_types::InstanceId;

use super::description::Description;

/// What all names of devices begin with, whosever they are.
const MARK: &str = "wrenn-";

/// A file, whatever its names: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity(pub(super) u64, pub(super) u64);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}", self.0, self.1)
    }
}

/// What a device of this driver is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Disk,
    Image,
}

/// The names of one instance's devices.
#[derive(Debug, Clone)]
pub(super) struct Names {
    instance: InstanceId,
}

impl Names {
    pub(super) fn of(instance: &InstanceId) -> Self {
        Self { instance: instance.clone() }
    }

    pub(super) fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// Of the disk that is this file.
    pub(super) fn disk(&self, file: Identity) -> String {
        format!("{MARK}{}-disk-{file}", self.instance)
    }

    /// Of what a disk of so many sectors differs from.
    pub(super) fn image(&self, file: Identity, sectors: u64) -> String {
        format!("{}{sectors}", self.images(file))
    }

    /// What the names of an image of every size begin with.
    pub(super) fn images(&self, file: Identity) -> String {
        format!("{MARK}{}-image-{file}-", self.instance)
    }
}

/// Whose device a name is, and what; none of another program's.
pub(super) fn owner(name: &str) -> Option<(InstanceId, Kind)> {
    let (instance, rest) = name.strip_prefix(MARK)?.split_once('-')?;
    let (kind, parts) = match rest.split_once('-')? {
        ("disk", file) => (Kind::Disk, file.split('-').count() == 2),
        ("image", file) => (Kind::Image, file.split('-').count() == 3),
        _ => return None,
    };
    parts.then_some((instance.parse().ok()?, kind))
}

/// The table of what a disk differs from: the image, whose loop device this is, and then zeros, which have one if there
/// are any. The kernel's own target for zeros would do, but a disk over one that takes no discards takes none either,
/// and that one does not before Linux 6.2.
pub(super) fn image(
    device: DeviceNumber,
    zeros: Option<DeviceNumber>,
    description: &Description,
) -> Vec<Target> {
    let linear =
        |start, sectors, device| Target { start, sectors, kind: "linear", parameters: format!("{device} 0") };
    let image = linear(0, description.image_sectors(), device);
    let rest = description.disk_sectors() - description.image_sectors();
    let zeros = zeros.map(|zeros| linear(image.sectors, rest, zeros));
    [image].into_iter().chain(zeros).collect()
}

/// The table of a disk: what it differs from, and the loop device of its file. It lasts (`P`); a full file fails one
/// write instead of all (`O`); what a guest gives back becomes a hole in the file.
pub(super) fn disk(image: DeviceNumber, file: DeviceNumber, description: &Description) -> Vec<Target> {
    let parameters = format!("{image} {file} PO {} 1 discard_zeroes_cow", description.chunk_sectors);
    vec![Target { start: 0, sectors: description.disk_sectors(), kind: "snapshot", parameters }]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOP: DeviceNumber = DeviceNumber { major: 7, minor: 3 };
    const IMAGE: DeviceNumber = DeviceNumber { major: 253, minor: 0 };

    fn of(disk_mib: u64) -> Description {
        Description::new("/i".into(), 600 << 20, disk_mib << 20, 8).unwrap()
    }

    fn text(table: &[Target]) -> Vec<String> {
        table.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_disk_is_its_image_and_then_zeros() {
        let zeros = DeviceNumber { major: 7, minor: 4 };
        assert_eq!(text(&image(LOOP, None, &of(600))), ["0 1228800 linear 7:3 0"]);
        let larger = image(LOOP, Some(zeros), &of(1024));
        assert_eq!(text(&larger), ["0 1228800 linear 7:3 0", "1228800 868352 linear 7:4 0"]);
        let disk = disk(IMAGE, LOOP, &of(1024));
        assert_eq!(text(&disk), ["0 2097152 snapshot 253:0 7:3 PO 8 1 discard_zeroes_cow"]);
    }

    #[test]
    fn a_name_says_whose_and_what_it_is() {
        let instance: InstanceId = "0123abcd".parse().unwrap();
        let names = Names::of(&instance);
        let file = Identity(0xfd00, u64::MAX);
        let (disk, image) = (names.disk(file), names.image(file, u64::MAX));
        assert_eq!(disk, "wrenn-0123abcd-disk-fd00-ffffffffffffffff");
        assert_eq!(image, "wrenn-0123abcd-image-fd00-ffffffffffffffff-18446744073709551615");
        assert!(image.starts_with(&names.images(file)) && image.len() < 128);
        assert_eq!(owner(&disk), Some((instance.clone(), Kind::Disk)));
        assert_eq!(owner(&image), Some((instance, Kind::Image)));
        for other in
            ["vg0-root", "wrenn-x-disk-1-2", "wrenn-0123abcd-disk-1", "wrenn-0123abcd-other-1-2", "wrenn-"]
        {
            assert_eq!(owner(other), None, "{other}");
        }
        assert_ne!(names.images(Identity(1, 2)), names.images(Identity(1, 23)));
        assert!(!names.image(Identity(1, 23), 5).starts_with(&names.images(Identity(1, 2))));
    }
}
