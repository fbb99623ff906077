//! What the kernel's notes mean: pure, so that it can be tested with any notes at all.
//!
//! The kernel names a directory by a number, the watch descriptor, which stays with the directory wherever it moves.
//! So the tree is kept as the kernel sees it: each directory knows the one above it and its own name there, and
//! a path is put together when a client is told of one. A directory that moves is one change, whatever it holds.
//!
//! ```text
//!  MOVED_FROM a ──► remembered ──┬── MOVED_TO b, same cookie ──► the directory is called b now
//!                                └── MOVE_SELF of it first ────► it left: it is watched no more
//! ```
//!
//! The kernel writes these three in that order, so what left and what merely moved is never a guess.

use std::{collections::HashMap, ffi::OsStr, os::unix::ffi::OsStrExt, path::PathBuf};

use rustix::fs::inotify::ReadFlags;

/// How deep a directory may be; no path that the kernel takes is deeper.
const MAXIMUM_DEPTH: usize = 4096;
/// How many directories may be on their way at once. Beyond that the oldest are taken for gone.
const MAXIMUM_DEPARTURES: usize = 1024;

/// A note of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) descriptor: i32,
    pub(super) flags: ReadFlags,
    pub(super) cookie: u32,
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) above: i32,
    pub(super) name: Box<[u8]>,
}

/// What a note leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) changes: Vec<Change>,
    /// Here a directory came to be, which is to be watched too.
    pub(super) follow: Option<Place>,
    /// These directories are to be watched no more.
    pub(super) release: Vec<i32>,
    pub(super) fate: Fate,
}

/// The watched directories.
#[derive(Debug)]
pub(super) struct Tree {
    root: i32,
    recursive: bool,
    /// Every directory but the root.
    directories: HashMap<i32, Place>,
    departures: Vec<(u32, Place)>,
}

impl Tree {
    pub(super) fn new(root: i32, recursive: bool) -> Self {
        Self { root, recursive, directories: HashMap::new(), departures: Vec::new() }
    }

    /// How many directories are watched.
    pub(super) fn len(&self) -> usize {
        self.directories.len() + 1
    }

    /// Says that the directory `descriptor` is at a place. True if it was not known before.
    pub(super) fn put(&mut self, descriptor: i32, place: Place) -> bool {
        // A directory is never below itself; notes that say so are from two different moments.
        if descriptor == self.root || self.chain(&place).any(|above| above == descriptor) {
            return false;
        }
        self.directories.insert(descriptor, place).is_none()
    }

    /// The path of something in a directory, unless the directory is not known.
    pub(super) fn path(&self, place: &Place) -> Option<PathBuf> {
        let mut names = vec![&*place.name];
        let mut above = place.above;
        while above != self.root {
            let place = self.directories.get(&above)?;
            names.push(&place.name);
            above = place.above;
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
            next = self.directories.get(&here).map(|place| place.above);
            Some(here)
        })
        .take(MAXIMUM_DEPTH)
    }

    fn at(&self, place: &Place) -> Option<i32> {
        self.directories.iter().find(|(_, other)| *other == place).map(|(descriptor, _)| *descriptor)
    }

    /// Takes a note in.
    pub(super) fn take(&mut self, note: &Note) -> Outcome {
        let Note { descriptor, flags, cookie, ref name } = *note;
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Outcome { fate: Fate::Lost, ..Outcome::default() };
        }
        if descriptor != self.root && !self.directories.contains_key(&descriptor) {
            return Outcome::default();
        }
        if name.is_empty() {
            return self.take_own(descriptor, flags);
        }
        let place = Place { above: descriptor, name: name.clone() };
        let Some(path) = self.path(&place) else { return Outcome::default() };
        let changes = kinds(flags).map(|kind| Change { path: path.clone(), kind }).collect();
        let mut outcome = Outcome { changes, ..Outcome::default() };
        if self.recursive && flags.contains(ReadFlags::ISDIR) {
            if flags.contains(ReadFlags::MOVED_FROM) {
                self.depart(cookie, place);
            } else if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                if flags.contains(ReadFlags::MOVED_TO) {
                    self.arrive(cookie, &place);
                }
                outcome.follow = Some(place);
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
        if gone {
            self.directories.remove(&descriptor);
        } else if flags.contains(ReadFlags::MOVE_SELF)
            && let Some(place) = self.directories.get(&descriptor)
            && let Some(index) = self.departures.iter().position(|(_, from)| from == place)
        {
            self.departures.remove(index);
            return Outcome { release: self.remove(descriptor), ..Outcome::default() };
        }
        Outcome::default()
    }

    fn depart(&mut self, cookie: u32, place: Place) {
        if self.at(&place).is_some() {
            if self.departures.len() == MAXIMUM_DEPARTURES {
                self.departures.remove(0);
            }
            self.departures.push((cookie, place));
        }
    }

    fn arrive(&mut self, cookie: u32, place: &Place) {
        let Some(index) = self.departures.iter().position(|(other, _)| *other == cookie) else { return };
        let (_, from) = self.departures.remove(index);
        if let Some(descriptor) = self.at(&from) {
            self.put(descriptor, place.clone());
        }
    }

    /// Forgets a directory and all below it.
    fn remove(&mut self, top: i32) -> Vec<i32> {
        let below = |place: &Place| self.chain(place).any(|above| above == top);
        let mut gone: Vec<i32> =
            self.directories.iter().filter(|(_, place)| below(place)).map(|(below, _)| *below).collect();
        gone.push(top);
        for descriptor in &gone {
            self.directories.remove(descriptor);
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
    let comes = ReadFlags::CREATE | ReadFlags::MOVED_TO;
    let goes = ReadFlags::DELETE | ReadFlags::MOVED_FROM;
    let mut came: HashMap<&OsStr, bool> = HashMap::new();
    for note in notes.filter(|note| note.descriptor == descriptor && note.flags.intersects(comes | goes)) {
        if !note.name.is_empty() {
            let coming = note.flags.intersects(comes);
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

    fn note(descriptor: i32, flags: ReadFlags, cookie: u32, name: &str) -> Note {
        Note { descriptor, flags, cookie, name: name.as_bytes().into() }
    }

    fn place(above: i32, name: &str) -> Place {
        Place { above, name: name.as_bytes().into() }
    }

    /// root ─ a (2) ─ b (3)
    fn tree() -> Tree {
        let mut tree = Tree::new(ROOT, true);
        assert!(tree.put(2, place(ROOT, "a")));
        assert!(tree.put(3, place(2, "b")));
        tree
    }

    fn told(outcome: &Outcome) -> Vec<(&str, Kind)> {
        outcome.changes.iter().map(|change| (change.path.to_str().unwrap(), change.kind)).collect()
    }

    const FROM: ReadFlags = ReadFlags::MOVED_FROM.union(ReadFlags::ISDIR);
    const TO: ReadFlags = ReadFlags::MOVED_TO.union(ReadFlags::ISDIR);

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
            let outcome = tree().take(&note(3, flags, 0, "x"));
            assert_eq!(told(&outcome), [("a/b/x", kind)]);
            assert_eq!((outcome.follow, outcome.fate), (None, Fate::GoesOn));
        }
    }

    #[test]
    fn a_directory_that_moves_takes_what_it_holds_with_it() {
        let mut tree = tree();
        assert_eq!(told(&tree.take(&note(ROOT, FROM, 7, "a"))), [("a", Kind::Rename)]);
        let arrival = tree.take(&note(ROOT, TO, 7, "c"));
        assert_eq!(told(&arrival), [("c", Kind::Create)]);
        assert_eq!(arrival.follow, Some(place(ROOT, "c")));
        assert!(!tree.put(2, place(ROOT, "c")), "it is known");
        assert_eq!(tree.take(&note(2, ReadFlags::MOVE_SELF, 0, "")), Outcome::default());
        assert_eq!(told(&tree.take(&note(3, ReadFlags::MODIFY, 0, "x"))), [("c/b/x", Kind::Write)]);
    }

    #[test]
    fn a_directory_that_leaves_is_watched_no_more() {
        let mut tree = tree();
        tree.take(&note(ROOT, FROM, 7, "a"));
        let mut gone = tree.take(&note(2, ReadFlags::MOVE_SELF, 0, "")).release;
        gone.sort_unstable();
        assert_eq!(gone, [2, 3]);
        assert_eq!(tree.len(), 1);
        assert_eq!(tree.take(&note(3, ReadFlags::MODIFY, 0, "x")), Outcome::default());
    }

    #[test]
    fn two_directories_that_change_places() {
        let mut tree = tree();
        tree.put(4, place(ROOT, "z"));
        for step in [
            note(ROOT, FROM, 1, "a"),
            note(ROOT, TO, 1, "z"),
            note(2, ReadFlags::MOVE_SELF, 0, ""),
            note(ROOT, FROM, 2, "z"),
            note(ROOT, TO, 2, "a"),
            note(4, ReadFlags::MOVE_SELF, 0, ""),
        ] {
            assert!(tree.take(&step).release.is_empty());
        }
        // Which of the two the second move was of is only known when the place is looked at, as `follow` asks for.
        tree.put(2, place(ROOT, "z"));
        tree.put(4, place(ROOT, "a"));
        assert_eq!(told(&tree.take(&note(3, ReadFlags::MODIFY, 0, "x"))), [("z/b/x", Kind::Write)]);
        assert_eq!(told(&tree.take(&note(4, ReadFlags::MODIFY, 0, "x"))), [("a/x", Kind::Write)]);
    }

    #[test]
    fn only_the_root_speaks_of_itself() {
        let mut tree = tree();
        assert_eq!(tree.take(&note(2, ReadFlags::ATTRIB, 0, "")), Outcome::default());
        assert_eq!(tree.take(&note(2, ReadFlags::DELETE_SELF, 0, "")), Outcome::default());
        tree.take(&note(3, ReadFlags::IGNORED, 0, ""));
        assert_eq!(tree.len(), 2);
        assert_eq!(told(&tree.take(&note(ROOT, ReadFlags::ATTRIB, 0, ""))), [(".", Kind::Chmod)]);
        let removed = tree.take(&note(ROOT, ReadFlags::DELETE_SELF, 0, ""));
        assert_eq!((told(&removed), removed.fate), (vec![(".", Kind::Remove)], Fate::Ended));
        let moved = tree.take(&note(ROOT, ReadFlags::MOVE_SELF, 0, ""));
        assert_eq!((told(&moved), moved.fate), (vec![(".", Kind::Rename)], Fate::Ended));
        assert_eq!(tree.take(&note(ROOT, ReadFlags::IGNORED, 0, "")).fate, Fate::Ended);
        assert_eq!(tree.take(&note(-1, ReadFlags::QUEUE_OVERFLOW, 0, "")).fate, Fate::Lost);
    }

    #[test]
    fn only_a_recursive_watch_follows() {
        let created = note(ROOT, ReadFlags::CREATE | ReadFlags::ISDIR, 0, "new");
        assert_eq!(tree().take(&created).follow, Some(place(ROOT, "new")));
        assert_eq!(Tree::new(ROOT, false).take(&created).follow, None);
    }

    fn notes() -> impl Strategy<Value = Note> {
        let flags = prop_oneof![
            Just(ReadFlags::CREATE | ReadFlags::ISDIR),
            Just(FROM),
            Just(TO),
            Just(ReadFlags::MOVE_SELF),
            Just(ReadFlags::IGNORED),
            any::<u32>().prop_map(ReadFlags::from_bits_retain),
        ];
        (0..8_i32, flags, 0..4_u32, prop::collection::vec(b'a'..=b'd', 0..2)).prop_map(
            |(descriptor, flags, cookie, name)| Note { descriptor, flags, cookie, name: name.into() },
        )
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
                if let Some(place) = outcome.follow {
                    tree.put(descriptor, place);
                }
                prop_assert!(tree.len() <= 9 && tree.departures.len() <= MAXIMUM_DEPARTURES);
                // No directory is below itself: every chain comes to an end.
                for place in tree.directories.values() {
                    prop_assert!(tree.chain(place).count() <= tree.len());
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
                notes.push(note(5, flags, 0, &name(*number)));
                notes.push(note(6, flags, 0, &name(number + 1)));
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
