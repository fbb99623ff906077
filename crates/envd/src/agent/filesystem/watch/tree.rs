//! What the kernel's notes mean: pure, so that it can be tested with any notes at all.
//!
//! The kernel names a directory by a number, the watch descriptor. The tree says where each of them is: in which other
//! one, by which name. A path is put together when a client is told of one.
//!
//! A directory that is moved is another one from then on, as far as a client can tell: it is told that the old name is gone,
//! and what there is under the new one. So a note that a directory went away ends the watch of all of it, and a note
//! that one came begins a new one, and nothing depends on the two being told apart from other pairs.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use rustix::fs::inotify::ReadFlags;

/// How deep a directory may be; no path that the kernel takes is deeper.
const MAXIMUM_DEPTH: usize = 4096;

/// Something came to a place, or went from it.
const COMES: ReadFlags = ReadFlags::CREATE.union(ReadFlags::MOVED_TO);
const GOES: ReadFlags = ReadFlags::DELETE.union(ReadFlags::MOVED_FROM);

/// A note of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) descriptor: i32,
    pub(super) flags: ReadFlags,
    /// What it is about, within the directory; empty if it is about the directory itself.
    pub(super) name: Box<[u8]>,
}

/// What happened to a path, in the words of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Create,
    Write,
    Remove,
    Rename,
    Chmod,
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// Below the watched directory, which itself is `.`.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// Whether there is more to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Fate {
    #[default]
    GoesOn,
    /// The kernel dropped notes: what it knows of the tree is to be found out anew.
    Lost,
    /// The watched directory is not there any more.
    Ended,
}

/// Where a directory is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) above: i32,
    pub(super) name: Box<[u8]>,
}

/// What a directory is to its file system: device and inode. The number of one that is gone may be given again.
pub(super) type Inode = (u64, u64);

#[derive(Debug)]
struct Directory {
    place: Place,
    inode: Inode,
}

/// What is to be done about a place where a directory may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Follow {
    /// One came there: watch it, tell what it holds.
    New(Place),
    /// One went from there. If there is one all the same, the two changed places.
    Replaced(Place),
}

/// What a note leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) changes: Vec<Change>,
    pub(super) follow: Option<Follow>,
    /// These directories are to be watched no more.
    pub(super) release: Vec<i32>,
    pub(super) fate: Fate,
}

/// The watched directories.
#[derive(Debug)]
pub(super) struct Tree {
    root: i32,
    root_inode: Inode,
    recursive: bool,
    /// Every directory but the root.
    directories: HashMap<i32, Directory>,
    /// The same the other way round: a directory's own are next to each other.
    places: BTreeMap<Place, i32>,
}

impl Tree {
    pub(super) fn new(root: i32, root_inode: Inode, recursive: bool) -> Self {
        Self { root, root_inode, recursive, directories: HashMap::new(), places: BTreeMap::new() }
    }

    /// How many directories are watched.
    pub(super) fn len(&self) -> usize {
        self.directories.len() + 1
    }

    /// Says that the directory `descriptor` is at a place. None if that is known; else it is new there, and these are to
    /// be watched no more: what was thought to be at the place, and what was known of it at another.
    pub(super) fn put(&mut self, descriptor: i32, inode: Inode, place: Place) -> Option<Vec<i32>> {
        // A directory is never below itself; notes that say so are from two different moments.
        if self.places.get(&place) == Some(&descriptor)
            || descriptor == self.root
            || self.chain(&place).any(|above| above == descriptor)
        {
            return None;
        }
        let mut gone = self.remove(&place);
        if let Some(other) = self.directories.get(&descriptor) {
            let other = other.place.clone();
            gone.extend(self.remove(&other).into_iter().filter(|gone| *gone != descriptor));
        }
        self.places.insert(place.clone(), descriptor);
        self.directories.insert(descriptor, Directory { place, inode });
        Some(gone)
    }

    /// Which directory a watched one is.
    pub(super) fn inode(&self, descriptor: i32) -> Option<Inode> {
        if descriptor == self.root {
            return Some(self.root_inode);
        }
        self.directories.get(&descriptor).map(|directory| directory.inode)
    }

    /// The path of a watched directory; that of the root is empty.
    pub(super) fn path(&self, descriptor: i32) -> Option<PathBuf> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut here = descriptor;
        while here != self.root {
            let place = &self.directories.get(&here)?.place;
            names.push(&place.name);
            here = place.above;
            if names.len() > MAXIMUM_DEPTH {
                return None;
            }
        }
        Some(names.iter().rev().map(|name| OsStr::from_bytes(name)).collect())
    }

    /// The directories from a place upwards.
    fn chain(&self, place: &Place) -> impl Iterator<Item = i32> {
        let mut next = Some(place.above);
        std::iter::from_fn(move || {
            let here = next?;
            next = self.directories.get(&here).map(|directory| directory.place.above);
            Some(here)
        })
        .take(MAXIMUM_DEPTH)
    }

    /// Takes a note in.
    pub(super) fn take(&mut self, note: &Note) -> Outcome {
        let Note { descriptor, flags, ref name } = *note;
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Outcome { fate: Fate::Lost, ..Outcome::default() };
        }
        if descriptor != self.root && !self.directories.contains_key(&descriptor) {
            return Outcome::default();
        }
        if name.is_empty() {
            return self.take_own(descriptor, flags);
        }
        let Some(path) = self.path(descriptor) else { return Outcome::default() };
        let path = path.join(OsStr::from_bytes(name));
        let place = Place { above: descriptor, name: name.clone() };
        let changes = kinds(flags).map(|kind| Change { path: path.clone(), kind }).collect();
        let mut outcome = Outcome { changes, ..Outcome::default() };
        if self.recursive && flags.contains(ReadFlags::ISDIR) {
            if flags.intersects(COMES) {
                outcome.follow = Some(Follow::New(place));
            } else if flags.intersects(GOES) {
                outcome.release = self.remove(&place);
                outcome.follow = flags.contains(ReadFlags::MOVED_FROM).then_some(Follow::Replaced(place));
            }
        }
        outcome
    }

    /// A note about a directory itself. For all but the root the directory above has said it already.
    fn take_own(&mut self, descriptor: i32, flags: ReadFlags) -> Outcome {
        let gone = flags.intersects(ReadFlags::IGNORED | ReadFlags::UNMOUNT);
        if descriptor == self.root {
            let changes = kinds(flags).map(|kind| Change { path: PathBuf::from("."), kind }).collect();
            let ends = gone || flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF);
            let fate = if ends { Fate::Ended } else { Fate::GoesOn };
            return Outcome { changes, fate, ..Outcome::default() };
        }
        if gone && let Some(directory) = self.directories.get(&descriptor) {
            let place = directory.place.clone();
            return Outcome { release: self.remove(&place), ..Outcome::default() };
        }
        Outcome::default()
    }

    /// Forgets the directory at a place and all below it.
    fn remove(&mut self, place: &Place) -> Vec<i32> {
        let mut gone = Vec::new();
        let mut waiting: Vec<i32> = self.places.remove(place).into_iter().collect();
        while let Some(descriptor) = waiting.pop() {
            self.directories.remove(&descriptor);
            gone.push(descriptor);
            let first = Place { above: descriptor, name: [].into() };
            let below = self.places.range(first..).take_while(|(place, _)| place.above == descriptor);
            let below: Vec<Place> = below.map(|(place, _)| place.clone()).collect();
            waiting.extend(below.iter().filter_map(|place| self.places.remove(place)));
        }
        gone
    }
}

/// What a note's flags mean, in the order in which published clients are told.
fn kinds(flags: ReadFlags) -> impl Iterator<Item = Kind> {
    [
        (ReadFlags::CREATE | ReadFlags::MOVED_TO, Kind::Create),
        (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, Kind::Rename),
        (ReadFlags::ATTRIB, Kind::Chmod),
        (ReadFlags::MODIFY, Kind::Write),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF, Kind::Remove),
    ]
    .into_iter()
    .filter(move |(any, _)| flags.intersects(*any))
    .map(|(_, kind)| kind)
}

/// Whether any of the notes says that something came to a place or went from it, or that the directory above is gone: then
/// another one may have its path, and even its inode number.
pub(super) fn is_touched<'a>(place: &Place, mut notes: impl Iterator<Item = &'a Note>) -> bool {
    notes.any(|note| {
        note.descriptor == place.above
            && (note.flags.contains(ReadFlags::IGNORED)
                || note.flags.intersects(COMES.union(GOES)) && note.name == place.name)
    })
}

/// A name that a directory held at the moment from which on it was watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held<'a> {
    pub(super) name: &'a OsStr,
    /// Nothing came or went by this name since.
    pub(super) still: bool,
}

/// Which names a directory held at the moment from which on it was watched, in their order.
///
/// `listed` are the names that it held at some later moment, and `notes` all of the kernel's notes from the first moment
/// to at least that one. A name whose first note is of its coming was not there; one whose first note is of
/// its going was, whether it is listed or not; the others were there if they are listed.
pub(super) fn held_before<'a>(
    descriptor: i32,
    listed: impl Iterator<Item = &'a OsStr>,
    notes: impl Iterator<Item = &'a Note>,
) -> Vec<Held<'a>> {
    let mut came: HashMap<&OsStr, bool> = HashMap::new();
    for note in notes.filter(|note| note.descriptor == descriptor && note.flags.intersects(COMES.union(GOES)))
    {
        if !note.name.is_empty() {
            let coming = note.flags.intersects(COMES);
            came.entry(OsStr::from_bytes(&note.name)).or_insert(coming);
        }
    }
    let listed = listed.filter(|name| !came.contains_key(name)).map(|name| Held { name, still: true });
    let went = came.iter().filter(|(_, came)| !**came).map(|(name, _)| Held { name, still: false });
    let mut held: Vec<Held<'_>> = listed.chain(went).collect();
    held.sort_unstable_by_key(|held| held.name);
    held
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOT: i32 = 1;
    const INODE: Inode = (0, 0);

    fn note(descriptor: i32, flags: ReadFlags, name: &str) -> Note {
        Note { descriptor, flags, name: name.as_bytes().into() }
    }

    fn place(above: i32, name: &str) -> Place {
        Place { above, name: name.as_bytes().into() }
    }

    /// root ─ a (2) ─ b (3)
    fn tree() -> Tree {
        let mut tree = Tree::new(ROOT, INODE, true);
        assert_eq!(tree.put(2, INODE, place(ROOT, "a")), Some(vec![]));
        assert_eq!(tree.put(3, INODE, place(2, "b")), Some(vec![]));
        tree
    }

    fn told(outcome: &Outcome) -> Vec<(&str, Kind)> {
        outcome.changes.iter().map(|change| (change.path.to_str().unwrap(), change.kind)).collect()
    }

    #[test]
    fn each_note_in_the_words_of_the_contract() {
        let table = [
            (ReadFlags::CREATE, Kind::Create),
            (ReadFlags::MODIFY, Kind::Write),
            (ReadFlags::DELETE, Kind::Remove),
            (ReadFlags::MOVED_FROM, Kind::Rename),
            (ReadFlags::MOVED_TO, Kind::Create),
            (ReadFlags::ATTRIB, Kind::Chmod),
        ];
        for (flags, kind) in table {
            let outcome = tree().take(&note(3, flags, "x"));
            assert_eq!(told(&outcome), [("a/b/x", kind)]);
            assert_eq!((outcome.follow, outcome.fate), (None, Fate::GoesOn));
        }
    }

    #[test]
    fn a_directory_that_goes_is_forgotten_with_all_below_it() {
        for flags in [ReadFlags::MOVED_FROM, ReadFlags::DELETE] {
            let mut tree = tree();
            let outcome = tree.take(&note(ROOT, flags | ReadFlags::ISDIR, "a"));
            assert_eq!(outcome.release, [2, 3]);
            let replaced = Follow::Replaced(place(ROOT, "a"));
            assert_eq!(outcome.follow, (flags == ReadFlags::MOVED_FROM).then_some(replaced));
            assert_eq!(tree.len(), 1);
            assert_eq!(tree.take(&note(3, ReadFlags::MODIFY, "x")), Outcome::default());
        }
        let mut tree = tree();
        assert_eq!(tree.take(&note(3, ReadFlags::IGNORED, "")).release, [3]);
        assert_eq!(tree.len(), 2);
    }

    #[test]
    fn a_directory_is_at_one_place_and_a_place_has_one() {
        let mut tree = tree();
        tree.put(4, INODE, place(ROOT, "z"));
        assert_eq!(tree.put(4, INODE, place(ROOT, "z")), None, "known");
        assert_eq!(tree.put(2, INODE, place(3, "x")), None, "below itself");
        assert_eq!(tree.put(2, INODE, place(ROOT, "z")), Some(vec![4, 3]));
        assert_eq!(tree.path(2), Some(PathBuf::from("z")));
        assert_eq!((tree.path(3), tree.path(4), tree.len()), (None, None, 2));
    }

    #[test]
    fn only_the_root_speaks_of_itself() {
        let mut tree = tree();
        for flags in [ReadFlags::ATTRIB, ReadFlags::DELETE_SELF, ReadFlags::MOVE_SELF] {
            assert_eq!(tree.take(&note(2, flags, "")), Outcome::default());
        }
        assert_eq!(told(&tree.take(&note(ROOT, ReadFlags::ATTRIB, ""))), [(".", Kind::Chmod)]);
        let removed = tree.take(&note(ROOT, ReadFlags::DELETE_SELF, ""));
        assert_eq!((told(&removed), removed.fate), (vec![(".", Kind::Remove)], Fate::Ended));
        let moved = tree.take(&note(ROOT, ReadFlags::MOVE_SELF, ""));
        assert_eq!((told(&moved), moved.fate), (vec![(".", Kind::Rename)], Fate::Ended));
        assert_eq!(tree.take(&note(ROOT, ReadFlags::IGNORED, "")).fate, Fate::Ended);
        assert_eq!(tree.take(&note(-1, ReadFlags::QUEUE_OVERFLOW, "")).fate, Fate::Lost);
    }

    #[test]
    fn only_a_recursive_watch_follows() {
        let created = note(ROOT, ReadFlags::CREATE | ReadFlags::ISDIR, "new");
        assert_eq!(tree().take(&created).follow, Some(Follow::New(place(ROOT, "new"))));
        assert_eq!(Tree::new(ROOT, INODE, false).take(&created).follow, None);
    }

    fn notes() -> impl Strategy<Value = Note> {
        let flags = prop_oneof![
            Just(ReadFlags::CREATE | ReadFlags::ISDIR),
            Just(ReadFlags::MOVED_FROM | ReadFlags::ISDIR),
            Just(ReadFlags::MOVED_TO | ReadFlags::ISDIR),
            Just(ReadFlags::IGNORED),
            any::<u32>().prop_map(ReadFlags::from_bits_retain),
        ];
        (0..8_i32, flags, prop::collection::vec(b'a'..=b'd', 0..2))
            .prop_map(|(descriptor, flags, name)| Note { descriptor, flags, name: name.into() })
    }

    proptest! {
        #[test]
        fn any_notes_are_taken(notes in prop::collection::vec((notes(), 0..8_i32), 0..200)) {
            let mut tree = tree();
            for (note, descriptor) in notes {
                let outcome = tree.take(&note);
                for change in &outcome.changes {
                    prop_assert!(change.path.is_relative());
                    prop_assert!(change.path.components().count() <= MAXIMUM_DEPTH);
                }
                if let Some(Follow::New(place) | Follow::Replaced(place)) = outcome.follow {
                    tree.put(descriptor, INODE, place);
                }
                prop_assert!(tree.len() <= 9);
                // Both ways round are the same, and every directory has a path.
                prop_assert_eq!(tree.places.len(), tree.directories.len());
                for (descriptor, directory) in &tree.directories {
                    prop_assert_eq!(tree.places.get(&directory.place), Some(descriptor));
                    prop_assert!(tree.path(*descriptor).is_some());
                }
            }
        }

        /// A directory is a set of names that are made and removed. Watched from a moment on and listed at a later one, what
        /// it held at the first is found whatever happened in between.
        #[test]
        fn what_was_there_before_is_known(
            before in prop::collection::btree_set(0..8_u8, 0..8),
            steps in prop::collection::vec(0..8_u8, 0..40),
            listed_at in any::<prop::sample::Index>(),
        ) {
            let name = |number: u8| format!("name-{number}");
            let mut now = before.clone();
            let mut notes = Vec::new();
            let listed_at = listed_at.index(steps.len() + 1);
            let mut listed = Vec::new();
            for index in 0..=steps.len() {
                if index == listed_at {
                    listed = now.iter().map(|number| PathBuf::from(name(*number))).collect();
                }
                let Some(number) = steps.get(index) else { break };
                let flags = if now.remove(number) { ReadFlags::DELETE } else {
                    now.insert(*number);
                    ReadFlags::CREATE
                };
                notes.push(note(5, flags, &name(*number)));
                notes.push(note(6, flags, &name(number + 1)));
            }
            let held = held_before(5, listed.iter().map(|path| path.as_os_str()), notes.iter());
            let names: Vec<_> = held.iter().map(|held| PathBuf::from(held.name)).collect();
            let wanted: Vec<_> = before.iter().map(|number| PathBuf::from(name(*number))).collect();
            prop_assert_eq!(names, wanted);
            for held in held {
                let touched = steps.iter().any(|step| held.name == name(*step).as_str());
                prop_assert_ne!(held.still, touched);
            }
        }
    }
}
