//! What a snapshot is for, its key, and the manifest that records both. Pure.

use std::fmt;

use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use wrenn_types::{DiskMib, Shape};
use wrenn_vmm::{DiskFormat, VmmIdentity};

use super::{SnapshotStoreError, SnapshotStoreResult, digest::Digest};

/// The format that this program writes and reads. It is raised too when something else than the [`Subject`]
/// changes what a snapshot holds: the kernel's command line, what a template runs before it is saved, or whether its disk
/// stands on something.
const FORMAT: u32 = 4;
/// How many hexadecimal digits a key has: 128 bits.
const KEY_DIGITS: usize = 32;
/// The manifest's name in the directory of its snapshot.
pub(crate) const FILE_NAME: &str = "manifest.json";

/// Everything that a warm snapshot depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Id of the bundle of kernel and initramfs.
    pub guest: String,
    /// Id of the template's image.
    pub image: String,
    /// The program that runs it.
    pub vmm: VmmIdentity,
    /// CPUs and memory.
    pub shape: Shape,
    /// Size of the template machine's disk; clones have this size or more.
    pub disk: DiskMib,
    /// Format of that disk.
    pub disk_format: DiskFormat,
}

/// A hash of a [`Subject`]: the name of its directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotKey(String);

/// Size and digest of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// The apparent size.
    pub bytes: u64,
    /// SHA-256, in the form that the field of the manifest names.
    pub digest: Digest,
}

/// `manifest.json`. Every field of it is checked, against what is asked for or against the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format of all this.
    pub format: u32,
    /// The key of `subject`.
    pub key: SnapshotKey,
    /// What the snapshot is for.
    pub subject: Subject,
    /// The guest's memory; a digest of blocks.
    pub memory: FileRecord,
    /// The devices; a plain SHA-256.
    pub state: FileRecord,
    /// The frozen disk; a digest of blocks.
    pub disk: FileRecord,
}

impl SnapshotKey {
    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key in the name of a file of the store, if it is one.
    pub(crate) fn from_name(digits: &str) -> Option<Self> {
        let is_key =
            digits.len() == KEY_DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        is_key.then(|| Self(digits.to_owned()))
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Subject {
    /// The key. The fields are hashed in the order of their declaration, as JSON, which keeps them apart.
    #[must_use]
    pub fn key(&self) -> SnapshotKey {
        let text = serde_json::to_vec(&(FORMAT, self)).expect("plain data is always JSON");
        SnapshotKey(Digest::of_bytes(&text).as_str()[..KEY_DIGITS].to_owned())
    }
}

impl Manifest {
    pub(crate) fn new(subject: Subject, memory: FileRecord, state: FileRecord, disk: FileRecord) -> Self {
        Self { format: FORMAT, key: subject.key(), subject, memory, state, disk }
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("plain data is always JSON");
        text.push(b'\n');
        text
    }

    /// Reads the text of the file at `path`, which is only named in errors.
    pub(super) fn parse(text: &str, path: &Utf8Path) -> SnapshotStoreResult<Self> {
        /// What every format has.
        #[derive(Deserialize)]
        struct AnyFormat {
            format: u32,
        }
        let invalid = |source| SnapshotStoreError::Manifest { path: path.to_owned(), source };
        let found = serde_json::from_str::<AnyFormat>(text).map_err(invalid)?.format;
        if found != FORMAT {
            return Err(SnapshotStoreError::Format { path: path.to_owned(), found, known: FORMAT });
        }
        serde_json::from_str(text).map_err(invalid)
    }

    /// Refuses a snapshot of something else, by the name of what differs.
    pub(super) fn check(&self, wanted: &Subject, path: &Utf8Path) -> SnapshotStoreResult<()> {
        let (recorded, memory_bytes) = (&self.subject, wanted.shape.memory.bytes());
        refuse_other_program((&recorded.vmm, &recorded.guest), (&wanted.vmm, &wanted.guest), path)?;
        refuse_difference(
            path,
            [
                ("image", recorded.image.clone(), wanted.image.clone()),
                (
                    "number of CPUs",
                    recorded.shape.vcpus.get().to_string(),
                    wanted.shape.vcpus.get().to_string(),
                ),
                ("size of memory", recorded.shape.memory.bytes().to_string(), memory_bytes.to_string()),
                ("size of the memory file", self.memory.bytes.to_string(), memory_bytes.to_string()),
                ("size of disk", recorded.disk.get().to_string(), wanted.disk.get().to_string()),
                ("format of disk", text(recorded.disk_format), text(wanted.disk_format)),
                ("key", self.key.to_string(), wanted.key().to_string()),
            ],
        )
    }
}

/// Refuses what another VMM, or another one of its versions, machines, CPU models or accelerators, or another
/// guest bundle was saved with, by the name of what differs. Where an earlier version recorded of the host's CPU only
/// that it was that, it is taken for the one that there is. `path` is only named.
pub(crate) fn refuse_other_program(
    (recorded, recorded_guest): (&VmmIdentity, &str),
    (wanted, wanted_guest): (&VmmIdentity, &str),
    path: &Utf8Path,
) -> SnapshotStoreResult<()> {
    let recorded = recorded.clone().with_processor_of(wanted);
    refuse_difference(
        path,
        [
            ("guest bundle", recorded_guest.to_owned(), wanted_guest.to_owned()),
            ("VMM", recorded.name.clone(), wanted.name.clone()),
            ("VMM version", recorded.version.clone(), wanted.version.clone()),
            ("machine", recorded.machine.clone(), wanted.machine.clone()),
            ("CPU model", recorded.cpu_model.clone(), wanted.cpu_model.clone()),
            ("accelerator", text(recorded.accelerator), text(wanted.accelerator)),
        ],
    )
}

/// Of fields with what is recorded and what is wanted, names the first that differs.
pub(crate) fn refuse_difference<const N: usize>(
    path: &Utf8Path,
    fields: [(&'static str, String, String); N],
) -> SnapshotStoreResult<()> {
    match fields.into_iter().find(|(_, recorded, wanted)| recorded != wanted) {
        None => Ok(()),
        Some((field, recorded, wanted)) => {
            Err(SnapshotStoreError::Mismatch { path: path.to_owned(), field, recorded, wanted })
        }
    }
}

fn text(value: impl fmt::Debug) -> String {
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use wrenn_types::{MemoryMib, Vcpus};
    use wrenn_vmm::Accelerator;

    use super::*;

    fn subject() -> Subject {
        Subject {
            guest: "0011223344556677".to_owned(),
            image: "8899aabbccddeeff".to_owned(),
            vmm: VmmIdentity {
                name: "fake".to_owned(),
                version: "1".to_owned(),
                machine: "none".to_owned(),
                cpu_model: "none".to_owned(),
                accelerator: Accelerator::Tcg,
            },
            shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() },
            disk: DiskMib::default(),
            disk_format: DiskFormat::Qcow2,
        }
    }

    /// The subject with each of its fields changed, one at a time, and the name of what differs.
    fn neighbours() -> Vec<(&'static str, Subject)> {
        type Change = fn(&mut Subject);
        let changes: [(&'static str, Change); 11] = [
            ("guest bundle", |it| it.guest.push('0')),
            ("image", |it| it.image.push('0')),
            ("VMM", |it| it.vmm.name.push('0')),
            ("VMM version", |it| it.vmm.version.push('0')),
            ("machine", |it| it.vmm.machine.push('0')),
            ("CPU model", |it| it.vmm.cpu_model.push('0')),
            ("accelerator", |it| it.vmm.accelerator = Accelerator::Kvm),
            ("number of CPUs", |it| it.shape.vcpus = Vcpus::new(2).unwrap()),
            ("size of memory", |it| it.shape.memory = MemoryMib::new(513).unwrap()),
            ("size of disk", |it| it.disk = DiskMib::new(1024).unwrap()),
            ("format of disk", |it| it.disk_format = DiskFormat::Raw),
        ];
        let changed = changes.map(|(field, change)| {
            let mut other = subject();
            change(&mut other);
            (field, other)
        });
        changed.to_vec()
    }

    fn manifest() -> Manifest {
        let record = |bytes| FileRecord { bytes, digest: Digest::of_bytes(b"") };
        Manifest::new(subject(), record(512 << 20), record(7), record(9))
    }

    #[test]
    fn every_field_is_part_of_the_key() {
        let mut keys: BTreeSet<SnapshotKey> = neighbours().iter().map(|(_, other)| other.key()).collect();
        keys.insert(subject().key());
        assert_eq!(keys.len(), 12);
        for key in &keys {
            assert_eq!(SnapshotKey::from_name(key.as_str()).as_ref(), Some(key));
        }
    }

    #[test]
    fn the_key_of_a_subject_does_not_change_with_the_program() {
        // A change here makes every snapshot of every host useless: raise FORMAT on purpose instead.
        assert_eq!(subject().key().as_str(), "9c2b7737a09fcf66769eed6b6752c892");
    }

    #[test]
    fn a_manifest_survives_its_text() {
        let manifest = manifest();
        let text = String::from_utf8(manifest.to_json()).unwrap();
        assert_eq!(Manifest::parse(&text, "m".into()).unwrap(), manifest);
        manifest.check(&subject(), "m".into()).unwrap();
    }

    #[test]
    fn what_differs_is_named() {
        for (differs, other) in neighbours() {
            match manifest().check(&other, "m".into()).unwrap_err() {
                SnapshotStoreError::Mismatch { field, .. } => assert_eq!(field, differs),
                error => panic!("{error:?}"),
            }
        }
        let mut moved = manifest();
        moved.key = neighbours()[0].1.key();
        assert!(moved.check(&subject(), "m".into()).unwrap_err().is_unusable());
        let mut short = manifest();
        short.memory.bytes -= 1;
        assert!(short.check(&subject(), "m".into()).unwrap_err().is_unusable());
    }

    /// What was saved before the processor had a word of its own is not lost.
    #[test]
    fn a_processor_that_was_not_named_is_the_one_there_is() {
        let of = |cpu_model: &str| {
            let vmm = VmmIdentity {
                accelerator: Accelerator::Kvm,
                cpu_model: cpu_model.to_owned(),
                ..subject().vmm
            };
            (vmm, "")
        };
        let check = |recorded: &str, wanted: &str| {
            let ((recorded, guest), (wanted, _)) = (of(recorded), of(wanted));
            refuse_other_program((&recorded, guest), (&wanted, guest), "m".into()).is_ok()
        };
        assert!(check("host", "host 0123") && check("host 0123", "host 0123"));
        assert!(!check("host 0123", "host 4567") && !check("host 0123", "host") && !check("ho", "host 0123"));
        let ((recorded, _), (present, _)) = (of("host"), of("host 0123"));
        assert_eq!(recorded.clone().with_processor_of(&present), present);
        let translated = VmmIdentity { accelerator: Accelerator::Tcg, ..recorded };
        assert_eq!(translated.clone().with_processor_of(&present), translated);
    }

    #[test]
    fn another_format_and_unknown_fields_are_refused() {
        let text = String::from_utf8(manifest().to_json()).unwrap();
        let format = format!("\"format\": {FORMAT}");
        let newer = text.replacen(&format, &format!("\"format\": {}", FORMAT + 1), 1);
        assert!(matches!(
            Manifest::parse(&newer, "m".into()),
            Err(SnapshotStoreError::Format { found, .. }) if found == FORMAT + 1
        ));
        let more = text.replacen(&format, &format!("{format}, \"colour\": 2"), 1);
        assert!(matches!(Manifest::parse(&more, "m".into()), Err(SnapshotStoreError::Manifest { .. })));
        assert!(Manifest::parse("", "m".into()).unwrap_err().is_unusable());
    }
}
