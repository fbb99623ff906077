//! The follower against real directories: what it tells, taken together, is what is there.

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
