//! A watched directory, or tree of directories: the kernel's notes, and what has to be done for there to be more.
//!
//! A directory that comes to be in a tree is watched from the moment on that its note is read. What it held by then is
//! found by a listing, and told as if it were created now. In between nothing gets lost and nothing is told twice:
//!
//! ```text
//!   mkdir d      d/one made     watch(d)    d/two made      list(d): one, two
//!  ────┴──────────────┴────────────┴────────────┴──────────────────┴──────────► time
//!                                               note: two created
//! ```
//!
//! The kernel makes notes and answers listings under one lock of the directory. So all notes that were written by the time
//! of the listing are read first, and a name that a note says has come is left to that note ([`held_before`]).
//!
//! A path is only a guess at which directory a note is about: it may have moved since, or one above it. So a directory is
//! opened in the one above it, if that is still the one that was watched, and is left alone if a later note is about its
//! name: then that note, or the one of where it went, sees to it. If one above moved, its notes are read first ([`Look::Later`]).

use std::{
    collections::VecDeque,
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};

use super::{
    super::mounts::{Mount, mount_of},
    inotify::Inotify,
    tree::{Change, Fate, Follow, Inode, Kind, Note, Place, Tree, held_before, is_touched},
};

/// How many directories one watch may be of. The kernel keeps about a kilobyte for each.
const MAXIMUM_DIRECTORIES: usize = 65_536;
/// How many notes may wait here while new directories are looked into.
const MAXIMUM_NOTES: usize = 262_144;
/// How often to look for a directory that moves on whenever it is looked for.
const ROUNDS: usize = 16;
/// How often to look at a tree anew that changes so fast that the kernel cannot note it all.
const ATTEMPTS: usize = 3;

/// What to watch.
#[derive(Debug, Clone)]
pub(super) struct Order {
    /// As the client knows it: absolute, and possibly through links.
    pub(super) root: PathBuf,
    pub(super) recursive: bool,
    pub(super) network: bool,
}

/// Why a directory cannot be watched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::agent::filesystem) enum FollowError {
    #[error("there is no room for another watcher")]
    Instances,
    #[error("there are too many directories to watch")]
    Directories,
    #[error("the directory changes faster than it can be watched")]
    TooFast,
    #[error("is on a network file system")]
    Network,
    #[error(transparent)]
    System(Errno),
}

/// Why a client is not told everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::agent::filesystem) enum Loss {
    #[error("events were lost: more happened at once than could be noted")]
    Kernel,
    #[error("events were lost: they were not taken in time")]
    Slow,
    #[error("events will be missing: not every directory can be watched")]
    Directories,
}

/// What there is to tell.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    Change(Change),
    Lost(Loss),
    /// The watched directory is gone. Nothing comes after this.
    Ended,
}

/// What is at a place.
enum Look {
    At(OwnedFd),
    /// Nothing, or nothing that is to be watched.
    Nothing,
    /// It cannot be said yet.
    Later,
}

/// Owned by one watch, and used by one thread at a time: it may block.
#[derive(Debug)]
pub(super) struct Follower {
    order: Order,
    inotify: Inotify,
    tree: Tree,
    notes: VecDeque<Note>,
    /// Directories to look into when the notes are read that say where they are now.
    later: Vec<Follow>,
    ended: bool,
    /// Counts the descriptors that this has had.
    generation: u64,
}

impl Follower {
    /// Begins to watch. Everything that happens from the return on is told.
    pub(super) fn open(order: Order) -> Result<Self, FollowError> {
        for _ in 0..ATTEMPTS {
            let mut follower = Self::look(order.clone())?;
            // What happened while the tree was looked at brings the tree up to date and is told to nobody.
            let mut lost = None;
            follower.advance(&mut |news| match news {
                News::Change(_) | News::Ended => {}
                News::Lost(loss) => lost = Some(loss),
            });
            match lost {
                None => return Ok(follower),
                Some(Loss::Directories) => return Err(FollowError::Directories),
                Some(Loss::Kernel | Loss::Slow) => {}
            }
        }
        Err(FollowError::TooFast)
    }

    fn look(order: Order) -> Result<Self, FollowError> {
        let inotify = Inotify::new().map_err(|error| match error {
            Errno::MFILE | Errno::NFILE => FollowError::Instances,
            other => FollowError::System(other),
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let directory = openat(CWD, &order.root, flags, Mode::empty()).map_err(FollowError::System)?;
        if !order.network && mount_of(&directory).map_err(FollowError::System)? == Mount::Network {
            return Err(FollowError::Network);
        }
        let root = inotify.watch(&directory).map_err(|error| match error {
            Errno::NOSPC => FollowError::Directories,
            other => FollowError::System(other),
        })?;
        let inode = inode(&directory).map_err(FollowError::System)?;
        let tree = Tree::new(root, inode, order.recursive);
        let (notes, later) = (VecDeque::new(), Vec::new());
        let mut follower = Self { order, inotify, tree, notes, later, ended: false, generation: 0 };
        if follower.order.recursive {
            for entry in list(&directory).map_err(FollowError::System)? {
                if entry.is_directory {
                    let place = Place { above: root, name: entry.name.to_bytes().into() };
                    let followed = follower.follow(Follow::New(place), &mut |_| {});
                    followed.map_err(|loss| match loss {
                        Loss::Directories => FollowError::Directories,
                        Loss::Kernel | Loss::Slow => FollowError::TooFast,
                    })?;
                }
            }
        }
        Ok(follower)
    }

    /// A descriptor that is readable whenever there is something to tell.
    pub(super) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.inotify.duplicate()
    }

    /// Which of its descriptors that is.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the watched directory is gone.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether [`Self::pump`] has something to do.
    pub(super) fn has_notes(&self) -> bool {
        !self.ended && (!self.notes.is_empty() || self.inotify.has_notes())
    }

    /// Tells everything that happened until now.
    pub(super) fn pump(&mut self, tell: &mut dyn FnMut(News)) {
        if self.ended {
            return;
        }
        let mut lost = false;
        self.advance(&mut |news| {
            lost |= matches!(news, News::Lost(Loss::Kernel));
            tell(news);
        });
        if lost && !self.ended {
            // Which directories came and went is among what was lost.
            match Self::open(self.order.clone()) {
                Ok(fresh) => *self = Self { generation: self.generation + 1, ..fresh },
                Err(_) => {
                    self.ended = true;
                    tell(News::Ended);
                }
            }
        }
    }

    /// As [`Self::pump`], but after a loss the tree is not what it was.
    fn advance(&mut self, tell: &mut dyn FnMut(News)) {
        if let Err(end) = self.read_notes() {
            return tell(end);
        }
        for _ in 0..ROUNDS {
            // Not what is noted meanwhile: whoever waits for this must not wait for others to be quiet.
            if let Err(end) = self.work_off(self.notes.len(), tell) {
                return tell(end);
            }
            for follow in std::mem::take(&mut self.later) {
                if let Err(loss) = self.follow(follow, tell) {
                    tell(News::Lost(loss));
                }
            }
            if self.later.is_empty() {
                return;
            }
            // The kernel moves a directory a moment before it notes that.
            std::thread::yield_now();
            if let Err(end) = self.read_notes() {
                return tell(end);
            }
        }
        // A directory above the watched one was moved: there is no path to what is new in it.
        if !std::mem::take(&mut self.later).is_empty() {
            tell(News::Lost(Loss::Directories));
        }
    }

    fn read_notes(&mut self) -> Result<(), News> {
        match self.inotify.read(&mut self.notes) {
            Ok(()) if self.notes.len() <= MAXIMUM_NOTES => Ok(()),
            _ => Err(News::Lost(Loss::Kernel)),
        }
    }

    /// Takes this many notes.
    fn work_off(&mut self, count: usize, tell: &mut dyn FnMut(News)) -> Result<(), News> {
        for _ in 0..count {
            let Some(note) = self.notes.pop_front() else { break };
            let outcome = self.tree.take(&note);
            for change in outcome.changes {
                tell(News::Change(change));
            }
            for descriptor in outcome.release {
                self.inotify.release(descriptor);
            }
            if let Some(follow) = outcome.follow
                && let Err(loss) = self.follow(follow, tell)
            {
                tell(News::Lost(loss));
            }
            match outcome.fate {
                Fate::GoesOn if self.notes.len() > MAXIMUM_NOTES => return Err(News::Lost(Loss::Kernel)),
                Fate::GoesOn => {}
                Fate::Lost => return Err(News::Lost(Loss::Kernel)),
                Fate::Ended => {
                    self.ended = true;
                    return Err(News::Ended);
                }
            }
        }
        Ok(())
    }

    /// Watches the directory at a place, and all below it, and tells what they hold.
    fn follow(&mut self, follow: Follow, tell: &mut dyn FnMut(News)) -> Result<(), Loss> {
        let mut complete = Ok(());
        let mut waiting = vec![follow];
        while let Some(follow) = waiting.pop() {
            let (Follow::New(place) | Follow::Replaced(place)) = &follow;
            let look = self.look_at(place);
            if self.read_notes().is_err() {
                return Err(Loss::Kernel);
            }
            if is_touched(place, self.notes.iter()) {
                continue;
            }
            let directory = match look {
                Ok(Look::At(directory)) => directory,
                Ok(Look::Nothing) => continue,
                Ok(Look::Later) => {
                    self.later.push(follow);
                    continue;
                }
                Err(_) => {
                    complete = Err(Loss::Directories);
                    continue;
                }
            };
            if self.tree.len() >= MAXIMUM_DIRECTORIES {
                return Err(Loss::Directories);
            }
            let watched = self.inotify.watch(&directory).and_then(|it| Ok((it, inode(&directory)?)));
            let (descriptor, inode) = match watched {
                Ok(watched) => watched,
                // Removed since it was opened.
                Err(Errno::NOENT) => continue,
                Err(Errno::NOSPC) => return Err(Loss::Directories),
                Err(_) => {
                    complete = Err(Loss::Directories);
                    continue;
                }
            };
            let Some(path) = self.tree.path(place.above).map(|it| it.join(OsStr::from_bytes(&place.name)))
            else {
                continue;
            };
            let Some(gone) = self.tree.put(descriptor, inode, place.clone()) else { continue };
            for descriptor in gone {
                self.inotify.release(descriptor);
            }
            if matches!(follow, Follow::Replaced(_)) {
                tell(News::Change(Change { path: path.clone(), kind: Kind::Create }));
            }
            let Ok(listed) = list(&directory) else { continue };
            if self.read_notes().is_err() {
                return Err(Loss::Kernel);
            }
            let names = listed.iter().map(|entry| OsStr::from_bytes(entry.name.to_bytes()));
            for held in held_before(descriptor, names, self.notes.iter()) {
                let path = path.join(held.name);
                tell(News::Change(Change { path: path.clone(), kind: Kind::Create }));
                // What came and went since then has notes of its own.
                if !held.still {
                    continue;
                }
                let bytes = held.name.as_bytes();
                let found = listed.binary_search_by(|entry| entry.name.to_bytes().cmp(bytes));
                let Some(entry) = found.ok().and_then(|index| listed.get(index)) else { continue };
                if entry.is_directory {
                    waiting.push(Follow::New(Place { above: descriptor, name: bytes.into() }));
                } else if has_content(&directory, entry) {
                    tell(News::Change(Change { path, kind: Kind::Write }));
                }
            }
        }
        complete
    }

    /// Opens what is at a place.
    fn look_at(&self, place: &Place) -> Result<Look, Errno> {
        let Some(above) = self.tree.path(place.above) else { return Ok(Look::Nothing) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let above = match openat(CWD, self.order.root.join(above), flags, Mode::empty()) {
            Ok(above) => above,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Look::Later),
            Err(error) => return Err(error),
        };
        if self.tree.inode(place.above) != Some(inode(&above)?) {
            return Ok(Look::Later);
        }
        let directory = match openat(&above, &*place.name, flags | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Look::Nothing),
            Err(error) => return Err(error),
        };
        Ok(match mount_of(&directory)? {
            Mount::Local => Look::At(directory),
            Mount::Network if self.order.network => Look::At(directory),
            Mount::Network | Mount::Kernel => Look::Nothing,
        })
    }
}

fn inode(directory: impl AsFd) -> Result<Inode, Errno> {
    let stat = rustix::fs::fstat(directory)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// A name in a directory.
struct Entry {
    name: CString,
    is_directory: bool,
}

/// What a directory holds, in the order of the names.
fn list(directory: impl AsFd) -> Result<Vec<Entry>, Errno> {
    let directory = directory.as_fd();
    let mut entries = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(_) => FileType::Unknown,
            },
            known => known,
        };
        entries.push(Entry { name: name.to_owned(), is_directory: kind.is_dir() });
    }
    entries.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

/// Whether this is a file with something in it: whoever waits for a file to be written was not told when it was.
fn has_content(directory: impl AsFd, entry: &Entry) -> bool {
    statat(directory, &entry.name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_file() && stat.st_size > 0)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs::{self, File},
    };

    use proptest::prelude::*;

    use super::*;

    struct Watched {
        directory: tempfile::TempDir,
        follower: Follower,
    }

    impl Watched {
        fn new(recursive: bool) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("root")).unwrap();
            fs::create_dir(directory.path().join("outside")).unwrap();
            let root = directory.path().join("root");
            let follower = Follower::open(Order { root, recursive, network: false }).unwrap();
            Self { directory, follower }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.directory.path().join("root").join(path)
        }

        fn outside(&self, path: &str) -> PathBuf {
            self.directory.path().join("outside").join(path)
        }

        fn news(&mut self) -> Vec<News> {
            let mut all = Vec::new();
            while self.follower.has_notes() {
                self.follower.pump(&mut |news| all.push(news));
            }
            all
        }

        fn told(&mut self) -> Vec<(String, Kind)> {
            let change = |news| match news {
                News::Change(change) => (change.path.to_str().unwrap().to_owned(), change.kind),
                other => panic!("{other:?}"),
            };
            self.news().into_iter().map(change).collect()
        }
    }

    fn all(told: &[(&str, Kind)]) -> Vec<(String, Kind)> {
        told.iter().map(|(path, kind)| ((*path).to_owned(), *kind)).collect()
    }

    use Kind::{Create, Remove, Rename, Write};

    #[test]
    fn what_a_new_directory_held_already_is_told_once() {
        let mut watched = Watched::new(true);
        fs::create_dir_all(watched.at("a/b/c")).unwrap();
        fs::write(watched.at("a/b/full"), "content").unwrap();
        fs::write(watched.at("a/empty"), "").unwrap();
        let wanted = [
            ("a", Create),
            ("a/b", Create),
            ("a/empty", Create),
            ("a/b/c", Create),
            ("a/b/full", Create),
            ("a/b/full", Write),
        ];
        assert_eq!(watched.told(), all(&wanted));
        fs::write(watched.at("a/b/c/new"), "").unwrap();
        assert_eq!(watched.told(), all(&[("a/b/c/new", Create)]));
    }

    #[test]
    fn names_are_taken_for_what_they_were_then() {
        let mut watched = Watched::new(true);
        for name in ["one", "two"] {
            fs::create_dir(watched.at("a")).unwrap();
            File::create(watched.at("a").join(name)).unwrap();
            fs::rename(watched.at("a"), watched.at(&format!("was-{name}"))).unwrap();
        }
        fs::create_dir(watched.at("a")).unwrap();
        let wanted = [
            ("a", Create),
            ("a", Rename),
            ("was-one", Create),
            ("was-one/one", Create),
            ("a", Create),
            ("a", Rename),
            ("was-two", Create),
            ("was-two/two", Create),
            ("a", Create),
        ];
        assert_eq!(watched.told(), all(&wanted));
    }

    #[test]
    fn a_directory_below_one_that_moved_is_found() {
        let mut watched = Watched::new(true);
        fs::create_dir(watched.at("a")).unwrap();
        watched.told();
        fs::create_dir(watched.at("a/sub")).unwrap();
        fs::rename(watched.at("a"), watched.at("b")).unwrap();
        fs::create_dir_all(watched.at("a/sub")).unwrap();
        watched.told();
        fs::write(watched.at("b/sub/x"), "").unwrap();
        fs::write(watched.at("a/sub/y"), "").unwrap();
        assert_eq!(watched.told(), all(&[("b/sub/x", Create), ("a/sub/y", Create)]));
    }

    #[test]
    fn what_leaves_is_watched_no_more_and_what_comes_is() {
        let mut watched = Watched::new(true);
        fs::create_dir_all(watched.at("a/b")).unwrap();
        watched.told();
        fs::rename(watched.at("a"), watched.outside("a")).unwrap();
        fs::write(watched.outside("a/b/x"), "").unwrap();
        assert_eq!(watched.told(), all(&[("a", Rename)]));
        assert_eq!(watched.follower.tree.len(), 1);
        fs::rename(watched.outside("a"), watched.at("c")).unwrap();
        assert_eq!(watched.told(), all(&[("c", Create), ("c/b", Create), ("c/b/x", Create)]));
    }

    #[test]
    fn two_directories_change_places() {
        let mut watched = Watched::new(true);
        fs::create_dir_all(watched.at("a/x")).unwrap();
        fs::create_dir_all(watched.at("b/y")).unwrap();
        watched.told();
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(CWD, watched.at("a"), CWD, watched.at("b"), flags).unwrap();
        let wanted = [
            ("a", Rename),
            ("b", Create),
            ("b", Rename),
            ("b", Create),
            ("b/x", Create),
            ("a", Create),
            ("a/y", Create),
        ];
        assert_eq!(watched.told(), all(&wanted));
        fs::write(watched.at("a/y/1"), "").unwrap();
        fs::write(watched.at("b/x/2"), "").unwrap();
        assert_eq!(watched.told(), all(&[("a/y/1", Create), ("b/x/2", Create)]));
    }

    #[test]
    fn the_end_of_the_watched_directory_is_told() {
        let mut watched = Watched::new(false);
        fs::write(watched.at("x"), "").unwrap();
        fs::remove_dir_all(watched.at("")).unwrap();
        let change = |path: &str, kind| News::Change(Change { path: path.into(), kind });
        let wanted = [change("x", Create), change("x", Remove), change(".", Remove), News::Ended];
        assert_eq!(watched.news(), wanted);
        let mut watched = Watched::new(true);
        fs::rename(watched.at(""), watched.outside("root")).unwrap();
        assert_eq!(watched.news(), [change(".", Rename), News::Ended]);
    }

    #[test]
    fn more_than_the_kernel_can_note_is_told_as_a_loss() {
        let mut watched = Watched::new(true);
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        fs::create_dir_all(watched.at("deep/deeper")).unwrap();
        let one = watched.at("one");
        for _ in 0..limit / 2 + 10 {
            File::create(&one).unwrap();
            fs::remove_file(&one).unwrap();
        }
        let news = watched.news();
        assert_eq!(news.iter().filter(|news| matches!(news, News::Lost(Loss::Kernel))).count(), 1);
        assert!(news.len() <= limit + 10);
        fs::write(watched.at("deep/deeper/new"), "").unwrap();
        assert_eq!(watched.told(), all(&[("deep/deeper/new", Create)]));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Directory(String),
        File(String),
        Remove(String),
        Move(String, String),
        Out(String),
        In(String),
        Pump,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let path = || prop::collection::vec("[abc]", 1..4).prop_map(|names| names.join("/"));
        let step = prop_oneof![
            4 => path().prop_map(Step::Directory),
            3 => path().prop_map(Step::File),
            2 => path().prop_map(Step::Remove),
            3 => (path(), path()).prop_map(|(from, to)| Step::Move(from, to)),
            1 => path().prop_map(Step::Out),
            1 => path().prop_map(Step::In),
            3 => Just(Step::Pump),
        ];
        prop::collection::vec(step, 0..40)
    }

    /// What a client knows who believes all that it is told.
    #[derive(Debug, Default)]
    struct Believed(BTreeSet<PathBuf>);

    impl Believed {
        fn take(&mut self, news: News) {
            let News::Change(Change { path, kind }) = news else { panic!("{news:?}") };
            match kind {
                Kind::Write | Kind::Chmod => {}
                Kind::Create => assert!(self.0.insert(path.clone()), "{path:?} was told twice"),
                Kind::Remove => assert!(self.0.remove(&path), "{path:?} was not told"),
                Kind::Rename => {
                    assert!(self.0.contains(&path), "{path:?} was not told");
                    self.0.retain(|other| !other.starts_with(&path));
                }
            }
        }
    }

    fn walk(top: &std::path::Path, below: PathBuf, found: &mut BTreeMap<PathBuf, bool>) {
        for entry in fs::read_dir(top.join(&below)).unwrap() {
            let entry = entry.unwrap();
            let (path, is_directory) = (below.join(entry.file_name()), entry.file_type().unwrap().is_dir());
            found.insert(path.clone(), is_directory);
            if is_directory {
                walk(top, path, found);
            }
        }
    }

    proptest! {
        /// Whatever is done to a tree, and however late the notes are read: what is told, taken together, is what is there, and
        /// every directory is watched under the name that it has.
        #[test]
        fn what_is_told_is_what_is(steps in steps()) {
            let mut watched = Watched::new(true);
            let mut believed = Believed::default();
            let mut outside = 0;
            for step in steps {
                // Most of what chance makes up is not possible; what happens then is nothing.
                match step {
                    Step::Directory(path) => drop(fs::create_dir_all(watched.at(&path))),
                    Step::File(path) => drop(fs::write(watched.at(&path), "x")),
                    Step::Remove(path) => {
                        let path = watched.at(&path);
                        let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
                    }
                    // Of what is moved onto something else only the move is told, so that is not done here.
                    Step::Move(from, to) => {
                        if !watched.at(&to).exists() {
                            drop(fs::rename(watched.at(&from), watched.at(&to)));
                        }
                    }
                    Step::Out(path) => {
                        outside += 1;
                        drop(fs::rename(watched.at(&path), watched.outside(&outside.to_string())));
                    }
                    Step::In(path) => {
                        let from = watched.outside(&outside.to_string());
                        if !watched.at(&path).exists() {
                            drop(fs::rename(from, watched.at(&path)));
                        }
                    }
                    Step::Pump => watched.news().into_iter().for_each(|news| believed.take(news)),
                }
            }
            watched.news().into_iter().for_each(|news| believed.take(news));
            let mut there = BTreeMap::new();
            walk(&watched.at(""), PathBuf::new(), &mut there);
            prop_assert_eq!(believed.0.iter().collect::<Vec<_>>(), there.keys().collect::<Vec<_>>());
            let directories = || there.iter().filter(|(_, is_directory)| **is_directory).map(|(path, _)| path);
            prop_assert_eq!(watched.follower.tree.len(), directories().count() + 1);
            for directory in directories() {
                fs::write(watched.at("").join(directory).join("probe"), "").unwrap();
                let probe = directory.join("probe").to_str().unwrap().to_owned();
                prop_assert_eq!(watched.told(), [(probe, Create)]);
            }
        }
    }
}
