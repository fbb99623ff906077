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
mod tests;
