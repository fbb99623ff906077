//! The record of a sandbox on disk: what a new agent needs to take it over, or to collect it.
//!
//! It is there before the machine is started and goes after everything else is gone. A change replaces the
//! whole file, durably, before what it announces is done:
//!
//! ```text
//!  before …                          the record says                    found by a new agent
//!  the machine is started            machine, layers                    lives: adopted; else collected
//!  a capture begins                  capture: snapshot, next layer      no such snapshot: goes on as it was
//!  a pause's machine is ended        paused                             paused; a machine that lives is ended
//!  a resumed machine is started      paused, machine, new top layer     paused: the machine is ended, the layer goes
//!  a resumed machine is answered for machine, obsolete: the snapshot    adopted; the snapshot goes
//!  a rolled back machine is started  former, machine, new top layer     former, which goes on; the machine is ended
//!  it is answered for                machine                            adopted
//!  a saved sandbox is deleted        obsolete: the snapshot             the snapshot goes, and then the record
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wrenn_types::{AccessToken, DiskMib, InstanceId, LayerId, SandboxId, Shape, SnapshotId, TemplateName};

use super::{Settings, deadline, machine::Maker};
use crate::snapshots::BaseKey;

mod ledger;

pub use ledger::Ledger;

/// The name of the file in the sandbox's directory.
const FILE: &str = "record.json";
/// Under which it is written before it replaces the former one.
const FRESH: &str = "record.json.new";
/// The format that this program writes and reads.
pub const FORMAT: u32 = 2;

/// What is on disk of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this format.
    pub format: u32,
    /// The sandbox.
    pub id: SandboxId,
    /// The newest generation of the control plane's.
    pub generation: u64,
    /// The stack that it belongs to.
    pub instance: InstanceId,
    /// The template that it began from, by the name that was asked for.
    pub template: TemplateName,
    /// CPUs and memory.
    pub shape: Shape,
    /// Size of the root disk.
    pub disk: DiskMib,
    /// What its guest asks of every caller.
    #[serde(with = "wrenn_types::secret::stored")]
    pub access_token: AccessToken,
    /// Environment of every process in it.
    pub environment: BTreeMap<String, String>,
    /// Who runs what has no user of its own.
    pub default_user: String,
    /// Where.
    pub default_workdir: String,
    /// What its guest is told that its machine id is; none was kept of a sandbox of an earlier version.
    #[serde(default)]
    pub machine_id: Option<String>,
    /// What can be changed.
    pub settings: Settings,
    /// The moment of the last deadline at which it was paused, until it gets another one.
    #[serde(default)]
    pub deadline_met: Option<Timestamp>,
    /// When it first ran.
    pub started_at: Option<Timestamp>,
    /// What its memory differs from.
    pub base: BaseKey,
    /// Its disk above the base's, top first.
    pub layers: Vec<LayerId>,
    /// The machine, from before it is started until after it has ended.
    pub machine: Option<MachineRecord>,
    /// What it is saved as. While this is here, it is the sandbox, whatever machine there is.
    pub paused: Option<PausedRecord>,
    /// A capture that is under way.
    pub capture: Option<CaptureRecord>,
    /// The machine that another one is to take the place of. While this is here, it is the sandbox.
    #[serde(default)]
    pub former: Option<FormerRecord>,
    /// What it was saved as before it was brought back or given up, until that is deleted.
    #[serde(default)]
    pub obsolete: Option<SnapshotId>,
}

/// How the machine of a sandbox is found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The layer on which it was started: with the sandbox's id it names the process, and its directory.
    pub name: LayerId,
    /// The number of its network slot.
    pub slot: u16,
    /// Whether its guest has become itself; one that has not is half-made.
    pub up: bool,
    /// What it was made with. An older record does not say; its machine was made with what made its base.
    #[serde(default)]
    pub maker: Option<Maker>,
}

/// A machine that stands still while another one is made in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerRecord {
    /// How it is found again.
    pub machine: MachineRecord,
    /// As [`Record::layers`] of this machine.
    pub layers: Vec<LayerId>,
    /// As [`Record::base`] of this machine.
    pub base: BaseKey,
}

/// What a paused sandbox is saved as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausedRecord {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Since when.
    pub at: Timestamp,
}

/// A capture that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRecord {
    /// What it becomes.
    pub snapshot: SnapshotId,
    /// Whether the machine ends after it.
    pub pause: bool,
    /// The layer on which the machine goes on, if it does.
    pub next_layer: Option<LayerId>,
}

impl Record {
    /// Notes that a sandbox that is paused has met its deadline, if that asked for no more and has passed.
    pub fn meet_deadline(&mut self, now: Timestamp) {
        deadline::meet(&mut self.settings, &mut self.deadline_met, now);
    }

    /// Every layer that may be in use: those of the disk, the one that is to come, and those of a machine that
    /// may go on.
    pub fn layers_in_use(&self) -> impl Iterator<Item = &LayerId> {
        let next = self.capture.iter().filter_map(|capture| capture.next_layer.as_ref());
        self.layers.iter().chain(next).chain(self.former.iter().flat_map(|former| &former.layers))
    }

    /// Every base that may be in use.
    pub fn bases_in_use(&self) -> impl Iterator<Item = &BaseKey> {
        std::iter::once(&self.base).chain(self.former.as_ref().map(|former| &former.base))
    }

    /// Another machine is made: it is not the sandbox before that is said ([`Record::settle`]). A machine that is
    /// there, and is the sandbox, can be gone back to until then.
    pub fn begin_machine(&mut self, machine: MachineRecord, base: BaseKey, layers: Vec<LayerId>) {
        let base = std::mem::replace(&mut self.base, base);
        let layers = std::mem::replace(&mut self.layers, layers);
        let before = self.machine.replace(machine).filter(|before| before.up);
        self.former = before.map(|machine| FormerRecord { machine, layers, base });
    }

    /// The machine that was made last is the sandbox. What it was made from is to be deleted.
    pub fn settle(&mut self) {
        self.give_up();
        self.former = None;
    }

    /// What it is saved as is the sandbox no more, and is to be deleted.
    pub fn give_up(&mut self) {
        self.obsolete = self.paused.take().map(|paused| paused.snapshot);
    }

    /// Makes the former machine, if there is one, that of the sandbox again.
    pub fn go_back(&mut self) {
        if let Some(FormerRecord { machine, layers, base }) = self.former.take() {
            (self.machine, self.layers, self.base) = (Some(machine), layers, base);
        }
    }
}

/// A record could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A step of the file system.
    #[error("could not {operation} {path}")]
    File {
        /// The step.
        operation: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk took too long.
    #[error("could not {operation} {path} within {bound:?}")]
    Timeout {
        /// What was to be done.
        operation: &'static str,
        /// With which file.
        path: Utf8PathBuf,
        /// How long it may take.
        bound: Duration,
    },
}

impl RecordError {
    /// Whether the disk was full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        let Self::File { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

fn failed(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::File { operation, path, source }
}

/// The directory of one sandbox, named by its id and readable by its owner only. Its record is in it.
#[derive(Debug)]
pub struct SandboxDir {
    path: Utf8PathBuf,
    /// How many writes were given up. Each may still be at work on its new file, so the next has another name for it.
    given_up: AtomicU64,
}

/// A record that was written, durably or not, and has not its name yet.
#[derive(Debug)]
struct Fresh {
    path: Utf8PathBuf,
    place: Utf8PathBuf,
}

impl Fresh {
    fn put_in_place(self) -> Result<(), RecordError> {
        fs::rename(&self.path, &self.place).map_err(failed("put into place", &self.place))
    }
}

impl SandboxDir {
    /// Makes the directory below `parent` and writes the record, durably.
    ///
    /// # Errors
    /// The step that failed; nothing is left then.
    pub fn create(parent: &Utf8Path, record: &Record) -> Result<Self, RecordError> {
        let path = parent.join(record.id.as_str());
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed("make", &path))?;
        let dir = Self::at(path);
        if let Err(error) = dir.write(record) {
            // The first error is the one to tell; what is left is collected at the next start.
            let _ = fs::remove_dir_all(&dir.path);
            return Err(error);
        }
        Ok(dir)
    }

    /// Puts a record in the place of the former one, durably.
    ///
    /// # Errors
    /// The step that failed; the former one is there then.
    pub fn write(&self, record: &Record) -> Result<(), RecordError> {
        self.replace(record, true)
    }

    fn at(path: Utf8PathBuf) -> Self {
        Self { path, given_up: AtomicU64::new(0) }
    }

    fn replace(&self, record: &Record, durably: bool) -> Result<(), RecordError> {
        self.write_fresh(record, durably)?.put_in_place()
    }

    fn write_fresh(&self, record: &Record, durably: bool) -> Result<Fresh, RecordError> {
        let fresh = match self.given_up.load(Ordering::SeqCst) {
            0 => self.path.join(FRESH),
            number => self.path.join(format!("{FRESH}.{number}")),
        };
        let place = self.path.join(FILE);
        let text = serde_json::to_vec(record).map_err(io::Error::other).map_err(failed("write", &place))?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&fresh).map_err(failed("make", &fresh))?;
        file.write_all(&text).map_err(failed("write", &fresh))?;
        // Without this a power cut could leave a machine's files with no record of them. Processes do not
        // survive one, so the directory's own entry may follow later.
        if durably {
            file.sync_data().map_err(failed("sync", &fresh))?;
        }
        Ok(Fresh { path: fresh, place })
    }

    /// The directory of a sandbox that an earlier agent made.
    fn found(path: Utf8PathBuf) -> Left {
        let dir = Self::at(path);
        Left { record: dir.read(), dir }
    }

    /// None if there is none yet, or if a power cut has emptied it. Its name is given when it is whole, so a part of
    /// one is damage.
    fn read(&self) -> Result<Option<Record>, RecordError> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let path = self.path.join(FILE);
        let unusable = |source: serde_json::Error| failed("understand", &path)(source.into());
        let wrong = |why: String| failed("use", &path)(io::Error::other(why));
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        // A note is not synced before it gets its name, so that a power cut may keep the name and lose the content. It
        // is never that of a paused sandbox, and no machine survives a power cut.
        if text.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let Format { format } = serde_json::from_slice(&text).map_err(unusable)?;
        if format != FORMAT {
            return Err(wrong(format!("it has format {format}, and this program reads format {FORMAT}")));
        }
        let record: Record = serde_json::from_slice(&text).map_err(unusable)?;
        if self.path.file_name() != Some(record.id.as_str()) {
            return Err(wrong(format!("it is that of {}", record.id)));
        }
        Ok(Some(record))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Removes it and all that is in it.
    ///
    /// # Errors
    /// Why something is still there.
    pub fn remove(&self) -> Result<(), RecordError> {
        fs::remove_dir_all(&self.path).map_err(failed("remove", &self.path))
    }
}

/// What was found of a sandbox at the start of an agent.
#[derive(Debug)]
pub struct Left {
    /// Its directory.
    pub dir: SandboxDir,
    /// Its record; none if it was not written yet, or if a power cut has emptied it.
    pub record: Result<Option<Record>, RecordError>,
}

/// The record of a sandbox that is there.
#[must_use]
pub fn read(parent: &Utf8Path, id: &SandboxId) -> Option<Record> {
    SandboxDir::found(parent.join(id.as_str())).record.ok().flatten()
}

/// The directories of sandboxes below `parent`. A name that is no id is none of ours and is left alone.
///
/// # Errors
/// When the directory cannot be read.
pub fn left_behind(parent: &Utf8Path) -> Result<Vec<Left>, RecordError> {
    let mut found = Vec::new();
    for entry in parent.read_dir_utf8().map_err(failed("read", parent))? {
        let entry = entry.map_err(failed("read", parent))?;
        if entry.file_name().parse::<SandboxId>().is_err() {
            continue;
        }
        found.push(SandboxDir::found(entry.path().to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record() -> Record {
        Record {
            format: FORMAT,
            id: SandboxId::random(),
            generation: 3,
            instance: InstanceId::random(),
            template: "base".parse().unwrap(),
            shape: Shape { vcpus: Default::default(), memory: Default::default() },
            disk: DiskMib::default(),
            access_token: AccessToken::random(),
            environment: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            default_user: "user".to_owned(),
            default_workdir: "/home/user".to_owned(),
            machine_id: Some("0a".repeat(16)),
            settings: Settings {
                timeout: Default::default(),
                on_timeout: Default::default(),
                deadline: None,
                network: wrenn_types::NetworkPolicy::simple(true),
            },
            deadline_met: None,
            started_at: Some(Timestamp::UNIX_EPOCH),
            base: format!("{}.{}", "0".repeat(32), "1".repeat(16)).parse().unwrap(),
            layers: vec![LayerId::random()],
            machine: Some(MachineRecord { name: LayerId::random(), slot: 7, up: true, maker: None }),
            paused: None,
            capture: None,
            former: None,
            obsolete: None,
        }
    }

    #[test]
    fn a_machine_that_is_replaced_can_be_gone_back_to_until_the_new_one_is_the_sandbox() {
        let before = record();
        let machine = MachineRecord { name: LayerId::random(), slot: 8, up: false, maker: None };
        let base: BaseKey = format!("{}.{}", "2".repeat(32), "3".repeat(16)).parse().unwrap();
        let layers = vec![machine.name.clone(), LayerId::random()];
        let mut during = before.clone();
        during.begin_machine(machine.clone(), base.clone(), layers.clone());
        assert!(
            before.layers.iter().chain(&layers).all(|layer| during.layers_in_use().any(|used| used == layer))
        );
        assert!([&before.base, &base].iter().all(|base| during.bases_in_use().any(|used| used == *base)));
        let text = serde_json::to_vec(&during).unwrap();
        assert_eq!(serde_json::from_slice::<Record>(&text).unwrap(), during, "the next agent reads it");
        let mut back = during.clone();
        back.go_back();
        assert_eq!(back, before);
        during.settle();
        assert_eq!((during.machine.as_ref(), &during.base, &during.layers), (Some(&machine), &base, &layers));
        let settled = during.clone();
        during.go_back();
        assert_eq!(during, settled, "there is nothing to go back to any more");
    }

    #[test]
    fn what_is_saved_or_half_made_is_no_machine_to_go_back_to() {
        for machine in
            [None, Some(MachineRecord { name: LayerId::random(), slot: 7, up: false, maker: None })]
        {
            let mut record = Record { machine, ..record() };
            let (base, next) = (record.base.clone(), LayerId::random());
            record.begin_machine(
                MachineRecord { name: next.clone(), slot: 8, up: false, maker: None },
                base,
                vec![next],
            );
            assert_eq!(record.former, None);
        }
    }

    #[test]
    fn a_record_of_an_agent_that_knew_no_former_machine_is_read() {
        let record = record();
        let mut value = serde_json::to_value(&record).unwrap();
        value.as_object_mut().unwrap().remove("former").unwrap();
        assert_eq!(serde_json::from_value::<Record>(value).unwrap(), record);
    }

    #[test]
    fn what_is_written_is_found_and_goes() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let record = record();
        let dir = SandboxDir::create(parent, &record).unwrap();
        fs::create_dir(parent.join("something else")).unwrap();
        let left = left_behind(parent).unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].record.as_ref().unwrap().as_ref(), Some(&record));
        dir.remove().unwrap();
        assert!(left_behind(parent).unwrap().is_empty());
    }

    #[test]
    fn a_second_sandbox_of_the_same_id_is_refused_and_harms_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let record = record();
        let _dir = SandboxDir::create(parent, &record).unwrap();
        assert!(SandboxDir::create(parent, &record).is_err());
        assert_eq!(read(parent, &record.id), Some(record.clone()));
    }

    #[test]
    fn a_change_replaces_the_whole_record() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let mut record = record();
        let dir = SandboxDir::create(parent, &record).unwrap();
        record.paused = Some(PausedRecord { snapshot: SnapshotId::random(), at: Timestamp::UNIX_EPOCH });
        record.environment.clear();
        dir.write(&record).unwrap();
        assert_eq!(read(parent, &record.id), Some(record.clone()));
        assert!(!format!("{record:?}").contains(record.access_token.expose()));
    }

    #[test]
    fn what_was_not_written_yet_is_no_damage_and_everything_else_is() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let record = record();
        let dir = SandboxDir::create(parent, &record).unwrap();
        let path = dir.path().join(FILE);
        let found = || left_behind(parent).unwrap().pop().unwrap().record;
        let text = fs::read_to_string(&path).unwrap();
        let other = Record { id: SandboxId::random(), ..record };
        for (damaged, why) in [
            (text[..text.len() - 1].to_owned(), "understand"),
            (text.replace("\"format\":2", "\"format\":1"), "use"),
            (serde_json::to_string(&other).unwrap(), "use"),
        ] {
            fs::write(&path, damaged).unwrap();
            let error = found().unwrap_err().to_string();
            assert_eq!(error, format!("could not {why} {path}"));
        }
        for emptied in [Vec::new(), vec![0; text.len()]] {
            fs::write(&path, emptied).unwrap();
            assert_eq!(found().unwrap(), None);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(found().unwrap(), None);
    }
}
