//! The files of a disk: those that QEMU opens by their paths, and those that it is handed and that have no names
//! where it is.
//!
//! ```text
//!  confined   every layer is opened by us ─► -add-fd ─► /dev/fdset/N, with the path as a note for whoever asks later
//!             what a layer stands on is told, and not read in its header
//!  else       the path of the top; what it stands on is read in its header, by QEMU
//! ```
//!
//! A header can be written by a VMM that was broken into. So what a confined one is handed is one of the files of which the
//! caller says that the disk may stand on them, with the format that the caller says.

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};

use crate::{DiskFormat, DiskSpec, VmmError, VmmResult, files::cannot, qcow2};

/// A file of a disk, as QEMU is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    name: String,
    format: DiskFormat,
    is_device: bool,
}

/// The files of a disk, the top first.
#[derive(Debug)]
pub(super) struct DiskFiles {
    layers: Vec<Layer>,
    /// What it stands on is told: nothing is read in a header.
    is_whole: bool,
    handed: Vec<Handed>,
}

/// An open file that QEMU inherits.
#[derive(Debug)]
struct Handed {
    descriptor: OwnedFd,
    set: u32,
    note: String,
}

impl DiskFiles {
    /// Those that QEMU opens itself.
    pub(super) fn by_path(disk: &DiskSpec) -> Self {
        let layers = vec![Layer::new(disk.path.to_string(), disk)];
        Self { layers, is_whole: false, handed: Vec::new() }
    }

    /// Those that QEMU is handed. The top can be written, and what lies below it cannot.
    pub(super) fn handed(disk: &DiskSpec, bases: &[DiskSpec]) -> VmmResult<Self> {
        let (mut layers, mut handed) = (Vec::new(), Vec::new());
        for (set, file) in (1..).zip(chain(disk, bases)?) {
            layers.push(Layer::new(name_of_set(set), &file));
            for (note, descriptor) in open(&file.path, set == 1)? {
                let set = u32::try_from(set).unwrap_or(u32::MAX);
                handed.push(Handed { descriptor, set, note });
            }
        }
        Ok(Self { layers, is_whole: true, handed })
    }

    /// What QEMU is told of them.
    pub(super) fn description(&self, node: &str) -> Value {
        let mut below = self.is_whole.then_some(Value::Null);
        for (at, layer) in self.layers.iter().enumerate().rev() {
            let mut described = layer.description();
            if let (DiskFormat::Qcow2, Some(below)) = (layer.format, below) {
                described["backing"] = below;
            }
            if at == 0 {
                described["node-name"] = node.into();
                return described;
            }
            below = Some(described);
        }
        Value::Null
    }

    /// The values of `-add-fd` for the files that it is handed.
    pub(super) fn options(&self) -> impl Iterator<Item = String> {
        self.handed.iter().map(|Handed { descriptor, set, note }| {
            // In an option a comma is told by two.
            let note = note.replace(',', ",,");
            format!("fd={},set={set},opaque={note}", descriptor.as_raw_fd())
        })
    }

    /// The files that it is handed.
    pub(super) fn into_handed(self) -> impl Iterator<Item = OwnedFd> {
        self.handed.into_iter().map(|handed| handed.descriptor)
    }
}

impl Layer {
    pub(super) fn new(name: String, file: &DiskSpec) -> Self {
        let is_device = fs::metadata(&file.path).is_ok_and(|file| file.file_type().is_block_device());
        Self { name, format: file.format, is_device }
    }

    /// What QEMU is told of it alone. The format is told and never guessed from the content, which a guest can write.
    pub(super) fn description(&self) -> Value {
        let driver = match self.format {
            // The latter was refused before.
            DiskFormat::Raw | DiskFormat::DmSnapshot => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        let kind = if self.is_device { "host_device" } else { "file" };
        let file = json!({"driver": kind, "filename": self.name, "discard": "unmap"});
        json!({"driver": driver, "discard": "unmap", "file": file})
    }
}

/// The name by which QEMU opens what it was handed.
pub(super) fn name_of_set(set: u64) -> String {
    format!("/dev/fdset/{set}")
}

/// What is noted of a descriptor before its path: whether the file can be written through it.
const WRITTEN: &str = "write ";
const READ: &str = "read ";

/// Opens a file as often as QEMU may need it: it looks for a descriptor with the rights that it wants. With each, what is to be
/// noted of it.
pub(super) fn open(path: &Utf8Path, is_written: bool) -> VmmResult<Vec<(String, OwnedFd)>> {
    let rights: &[(&str, bool)] =
        if is_written { &[(WRITTEN, true), (READ, false)] } else { &[(READ, false)] };
    let open = |(note, write): &(&str, bool)| {
        let file = File::options().read(true).write(*write).open(path)?;
        Ok((format!("{note}{path}"), OwnedFd::from(file)))
    };
    rights.iter().map(open).collect::<Result<_, _>>().map_err(cannot("open", path))
}

/// The top and what it stands on, as the headers say and `bases` allow.
fn chain(disk: &DiskSpec, bases: &[DiskSpec]) -> VmmResult<Vec<DiskSpec>> {
    let mut chain = vec![disk.clone()];
    let mut top = disk;
    while top.format == DiskFormat::Qcow2
        && let Some(header) = qcow2::header(&top.path).map_err(cannot("open", &top.path))?
        && let Some(below) = header.backing_file
    {
        let known = qcow2::named(bases, &below).filter(|base| !chain.contains(base));
        top = known.ok_or_else(|| {
            let problem = format!("{} says that it stands on {below}, and may not", top.path);
            VmmError::Spec { field: "disk", problem }
        })?;
        chain.push(top.clone());
    }
    Ok(chain)
}

/// What QEMU was handed, from what it says to `query-fdsets`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sets(Vec<Descriptor>);

/// A descriptor, and what was noted of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) set: u64,
    pub(super) number: u64,
    note: String,
}

impl Descriptor {
    /// The file of a disk that it is of, and whether that can be written through it.
    fn file(&self) -> Option<(&Utf8Path, bool)> {
        let read = self.note.strip_prefix(READ).map(|path| (path.into(), false));
        read.or_else(|| self.note.strip_prefix(WRITTEN).map(|path| (path.into(), true)))
    }
}

impl Sets {
    pub(super) fn parse(answer: &Value) -> Self {
        let mut found = Vec::new();
        for set in answer.as_array().into_iter().flatten() {
            for file in set["fds"].as_array().into_iter().flatten() {
                if let (Some(set), Some(number)) = (set["fdset-id"].as_u64(), file["fd"].as_u64()) {
                    let note = file["opaque"].as_str().unwrap_or_default().to_owned();
                    found.push(Descriptor { set, number, note });
                }
            }
        }
        Self(found)
    }

    /// The path of what QEMU calls so.
    pub(super) fn path(&self, name: Utf8PathBuf) -> Utf8PathBuf {
        let mut known = self.0.iter().filter(|known| name_of_set(known.set) == name);
        known.find_map(Descriptor::file).map_or(name, |(path, _)| path.to_owned())
    }

    /// What is not needed for a disk of these files, of which the first is written.
    pub(super) fn superfluous<'a>(
        &'a self,
        files: &'a [Utf8PathBuf],
    ) -> impl Iterator<Item = &'a Descriptor> {
        self.0.iter().filter(|known| match known.file() {
            Some((path, true)) => files.first().is_none_or(|top| top != path),
            Some((path, false)) => !files.iter().any(|file| file == path),
            None => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(path: &Utf8Path, below: &str) -> DiskSpec {
        let mut bytes = vec![0; 200];
        bytes[..4].copy_from_slice(&crate::qcow2::MAGIC);
        bytes[7] = 3;
        bytes[15] = 112;
        bytes[19] = u8::try_from(below.len()).unwrap();
        bytes[112..112 + below.len()].copy_from_slice(below.as_bytes());
        fs::write(path, &bytes).unwrap();
        DiskSpec { path: path.to_owned(), format: DiskFormat::Qcow2 }
    }

    #[test]
    fn a_disk_stands_on_what_it_may_stand_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| Utf8Path::from_path(directory.path()).unwrap().join(name);
        // The bytes of the base are a guest's: they pretend to be a layer.
        let base = DiskSpec { format: DiskFormat::Raw, ..qcow2(&path("base"), "/etc/shadow") };
        let middle = qcow2(&path("middle"), base.path.as_str());
        let top = qcow2(&path("top"), middle.path.as_str());
        let bases = [base.clone(), middle.clone()];
        assert_eq!(chain(&top, &bases).unwrap(), [top.clone(), middle.clone(), base.clone()]);
        assert_eq!(chain(&base, &[]).unwrap(), std::slice::from_ref(&base));
        let alone = qcow2(&path("alone"), "");
        assert_eq!(chain(&alone, &[]).unwrap(), std::slice::from_ref(&alone));

        for (disk, bases) in [
            (&top, &bases[..1]),
            (&qcow2(&path("hostile"), "/etc/shadow"), &bases[..]),
            (&qcow2(&path("other"), path("another-sandbox").as_str()), &bases[..]),
        ] {
            let refused = chain(disk, bases);
            assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{refused:?}");
        }
        let round = qcow2(&path("round"), path("round").as_str());
        assert!(chain(&round, std::slice::from_ref(&round)).is_err(), "it has an end");

        let files = DiskFiles::handed(&top, &bases).unwrap();
        let options: Vec<String> = files.options().collect();
        assert_eq!(options.len(), 4, "the top can be had for writing and for reading");
        assert!(options[3].ends_with(&format!(",set=3,opaque=read {}", base.path)), "{options:?}");
        let described = files.description("disk");
        assert_eq!(described["node-name"], "disk");
        assert_eq!(described["backing"]["backing"]["driver"], "raw");
        assert_eq!(described["backing"]["backing"]["file"]["filename"], "/dev/fdset/3");
        assert!(described["backing"]["backing"].get("backing").is_none());
        for (at, file) in files.into_handed().enumerate() {
            let flags = rustix::fs::fcntl_getfl(&file).unwrap();
            assert_eq!(flags.contains(rustix::fs::OFlags::RDWR), at == 0, "the top alone is written");
        }
        let described = DiskFiles::handed(&alone, &[]).unwrap().description("disk");
        assert!(
            described["backing"].is_null() && described.get("backing").is_some(),
            "its header is not read"
        );
        assert!(DiskFiles::by_path(&top).description("disk").get("backing").is_none());
    }

    #[test]
    fn what_was_handed_is_known_by_its_note() {
        let said = json!([
            {"fdset-id": 2, "fds": [{"fd": 9, "opaque": "write /d/two"}, {"fd": 10, "opaque": "read /d/two"}]},
            {"fdset-id": 3, "fds": [{"fd": 7, "opaque": "write /d/one"}, {"fd": 8, "opaque": "read /d/one"}]},
            {"fdset-id": 7, "fds": [{"fd": 11, "opaque": "state"}]},
            {"fdset-id": 8, "fds": [{"fd": 12}]},
        ]);
        let sets = Sets::parse(&said);
        assert_eq!(sets.path("/dev/fdset/2".into()), "/d/two");
        assert_eq!(sets.path("/dev/fdset/22".into()), "/dev/fdset/22");
        assert_eq!(sets.path("/d/one".into()), "/d/one");
        let numbers = |files: &[&str]| {
            let files: Vec<Utf8PathBuf> = files.iter().map(|file| (*file).into()).collect();
            sets.superfluous(&files).map(|known| known.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&["/d/two", "/d/one"]), [7, 11, 12], "the top alone is written");
        assert_eq!(numbers(&["/d/one"]), [9, 10, 11, 12]);
        assert_eq!(Sets::parse(&json!({})), Sets::default());
    }
}
