//! A memory of this process is served as Firecracker's is, and compared with the simplest thing that says what it should hold.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, IoSlice, Write as _},
    mem::MaybeUninit,
    os::{
        fd::AsRawFd as _,
        unix::{fs::FileExt as _, net::UnixStream},
    },
    sync::atomic::AtomicBool,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;
use wrenn_host_linux::{
    process::{Child, Exit, Process, Spawn},
    userfaultfd::{Userfaultfd, arena::Arena},
};

use super::{
    Pager, PagerProgram, SOCKET, ServedMemory, TEST_VARIABLE, Wanted,
    regions::{Region, Regions},
    serve::{Record, Server},
    source::Source,
    state::{Counts, NAME, State, StateReader},
    working_set::{self, Ahead, WorkingSet},
};
use crate::{
    ExitReason,
    pages::{PagesWriter, SavedPages, Zeros},
};

const PAGE: usize = 4096;
const PAGES: usize = 400;
/// How many there are, as a working set numbers them.
const LAST: u32 = 400;
const BYTES: u64 = (PAGE * PAGES) as u64;
/// Where in a page a guest writes.
const WRITTEN: usize = 100;
/// How long anything may take.
const BOUND: Duration = Duration::from_secs(30);
/// What makes the program of this test play a VMM.
const VMM_VARIABLE: &str = "WRENN_TEST_VMM";

/// What a page holds: a byte everywhere, and another one where a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content(u8, u8);

impl Content {
    const ZERO: Self = Self(0, 0);

    fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.0; PAGE];
        bytes[WRITTEN] = self.1;
        bytes
    }

    fn of(bytes: &[u8]) -> Self {
        let content = Self(bytes[0], bytes[WRITTEN]);
        assert_eq!(content.bytes(), bytes);
        content
    }
}

/// What the pages of a memory are.
type Model = Vec<Content>;

/// A base in which there is every kind of page.
fn base_model() -> Model {
    let content = |page: usize| match page % 5 {
        0 => Content::ZERO,
        kind => Content(u8::try_from(page % 251).unwrap(), u8::try_from(kind).unwrap()),
    };
    (0..PAGES).map(content).collect()
}

struct World {
    path: Utf8PathBuf,
    base: Utf8PathBuf,
    _directory: TempDir,
}

impl World {
    fn new() -> Self {
        Self::over(&base_model())
    }

    fn over(model: &Model) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().to_owned();
        let base = path.join("base");
        let file = File::create_new(&base).unwrap();
        file.set_len(BYTES).unwrap();
        for (page, content) in model.iter().enumerate().filter(|(_, content)| **content != Content::ZERO) {
            file.write_all_at(&content.bytes(), (page * PAGE) as u64).unwrap();
        }
        Self { path, base, _directory: directory }
    }

    /// Saves pages over the base, and answers what the memory then is.
    fn save_over(&self, name: &str, pages: &BTreeMap<usize, Content>) -> (Utf8PathBuf, Model) {
        let (path, mut model) = (self.path.join(name), base_model());
        let mut writer =
            PagesWriter::create(&path, BYTES, u32::try_from(PAGE).unwrap(), Zeros::Told).unwrap();
        for (page, content) in pages {
            writer.push(*page as u64, &mut content.bytes()).unwrap();
            model[*page] = *content;
        }
        writer.finish().unwrap();
        (path, model)
    }

    fn wanted(&self, name: &str, pages: Option<&Utf8Path>) -> Wanted {
        Wanted {
            user: None,
            name: name.to_owned(),
            run_dir: self.path.clone(),
            base: self.base.clone(),
            pages: pages.map(Utf8Path::to_owned),
            bytes: BYTES,
            working_set: self.path.join("working-set"),
            control_group: None,
        }
    }
}

/// What is between a memory that was saved and its base.
fn saved_pages(path: &Utf8Path) -> BTreeMap<usize, Content> {
    let mut found = BTreeMap::new();
    let saved = SavedPages::open(path, BYTES).unwrap();
    let copied = saved.copy_to(|offset, bytes| {
        let first = usize::try_from(offset).unwrap() / PAGE;
        found.extend((first..).zip(bytes.chunks(PAGE).map(Content::of)));
        Ok(())
    });
    copied.unwrap();
    found
}

fn difference(model: &Model, base: &Model) -> BTreeMap<usize, Content> {
    let differs = |page: &usize| model[*page] != base[*page];
    (0..PAGES).filter(differs).map(|page| (page, model[page])).collect()
}

/// What a memory is of which this was saved.
fn over_base(saved: &BTreeMap<usize, Content>) -> Model {
    let mut model = base_model();
    saved.iter().for_each(|(page, content)| model[*page] = *content);
    model
}

/// A process that is there until this is dropped.
struct Stand(Child);

impl Stand {
    fn new() -> Self {
        Self(Spawn::new("sleep").arg("1000").start().unwrap())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.0.kill().unwrap();
    }
}

/// A memory in two parts, of which the second comes first.
fn regions(address: u64) -> Vec<Region> {
    let half = BYTES / 2;
    vec![
        Region { address: address + half, bytes: half, offset: 0 },
        Region { address, bytes: half, offset: half },
    ]
}

/// Where a page is in an arena that has such parts.
fn place(page: usize) -> usize {
    (page + PAGES / 2) % PAGES * PAGE
}

/// Serves an arena while something is done with it. Answers with what that answers.
fn serving<T>(
    world: &World,
    pages: Option<&Utf8Path>,
    (ahead, record): (Vec<u32>, Option<Record>),
    arena: &Arena,
    work: impl FnOnce(&StateReader) -> T,
) -> T {
    let source = Source::open(&world.base, pages, BYTES).unwrap();
    let state = State::create(&world.path.join(NAME), PAGES as u64, PAGE as u64).unwrap();
    let saved = source.saved().map(|saved| saved.file().as_raw_fd());
    state.set_descriptors(source.base().as_raw_fd(), saved);
    let vmm = Stand::new();
    let server = Server {
        memory: Userfaultfd::from_received(arena.descriptor().try_clone_to_owned().unwrap()),
        regions: Regions::new(regions(arena.address()), BYTES, PAGE as u64).unwrap(),
        source,
        state,
        vmm: vmm.0.process().clone(),
        ahead: Ahead::new(ahead),
        record,
    };
    std::thread::scope(|threads| {
        threads.spawn(|| {
            if let Err(error) = server.run() {
                // Whoever waits for a page would wait for ever.
                let _ = writeln!(std::io::stderr(), "the pager ended: {error:?}");
                std::process::abort();
            }
        });
        let reader = StateReader::open(&world.path).unwrap();
        // Whoever saves a memory before anybody has touched it comes before its regions are written down.
        while reader.regions(BYTES).is_err() {
            std::thread::yield_now();
        }
        let done = work(&reader);
        drop(vmm);
        done
    })
}

fn read(arena: &Arena, page: usize) -> Content {
    Content(arena.read(place(page)), arena.read(place(page) + WRITTEN))
}

#[derive(Debug, Clone)]
enum Step {
    Read(usize),
    Write(usize, u8),
    Remove(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    prop_oneof![
        3 => page.clone().prop_map(Step::Read),
        3 => (page.clone(), prop_oneof![Just(0_u8), any::<u8>()]).prop_map(|(page, byte)| Step::Write(page, byte)),
        1 => (page, 1_usize..60).prop_map(|(page, count)| Step::Remove(page, count)),
    ]
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![Just(Content::ZERO), (any::<u8>(), any::<u8>()).prop_map(|(one, other)| Content(one, other))]
}

fn take(arena: &Arena, model: &mut Model, step: &Step) {
    match *step {
        Step::Read(page) => assert_eq!(read(arena, page), model[page], "page {page}"),
        Step::Write(page, byte) => {
            arena.write(place(page) + WRITTEN, byte);
            model[page].1 = byte;
        }
        Step::Remove(first, count) => {
            // What lies together in the process.
            let half = PAGES / 2;
            let count = count.min(half - first % half);
            arena.remove(place(first), count * PAGE).unwrap();
            model[first..first + count].fill(Content::ZERO);
        }
    }
}

fn save(world: &World, name: &str) -> BTreeMap<usize, Content> {
    let this = Process::open(std::process::id()).unwrap();
    let memory = ServedMemory::open(&this, &this, &world.path, &world.base).unwrap();
    let into = world.path.join(name);
    memory.save(&into, &AtomicBool::new(false)).unwrap();
    saved_pages(&into)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn a_memory_is_what_it_should_be_and_is_saved_as_that(
        saved in prop::collection::btree_map(0..PAGES, content(), 0..80),
        ahead in prop::collection::vec(0..LAST, 0..200),
        steps in prop::collection::vec(step(), 0..120),
        later in prop::collection::vec(step(), 0..40),
    ) {
        let world = World::new();
        let (pages, mut model) = world.save_over("pages", &saved);
        let arena = Arena::new(PAGE * PAGES).unwrap();
        serving(&world, Some(&pages), (ahead, None), &arena, |_| {
            // Nobody needs the name any more.
            std::fs::remove_file(&pages).unwrap();
            steps.iter().for_each(|step| take(&arena, &mut model, step));
            let saved = save(&world, "first");
            assert_eq!(over_base(&saved), model);
            // One that is saved goes on, and can be saved again.
            later.iter().for_each(|step| take(&arena, &mut model, step));
            let saved = save(&world, "second");
            assert_eq!(over_base(&saved), model);
            (0..PAGES).for_each(|page| assert_eq!(read(&arena, page), model[page], "page {page}"));
            // Every page is there now, and what is saved is what differs and nothing else.
            assert_eq!(save(&world, "third"), difference(&model, &base_model()));
        });
        // What was saved is served in its turn.
        let arena = Arena::new(PAGE * PAGES).unwrap();
        serving(&world, Some(&world.path.join("second")), (Vec::new(), None), &arena, |_| {
            (0..PAGES).rev().for_each(|page| assert_eq!(read(&arena, page), model[page], "page {page}"));
        });
    }
}

#[test]
fn a_page_that_became_zero_is_saved_as_zero() {
    let world = World::new();
    let (pages, model) = world.save_over("pages", &BTreeMap::from([(7, Content(9, 9)), (8, Content::ZERO)]));
    let arena = Arena::new(PAGE * PAGES).unwrap();
    serving(&world, Some(&pages), Default::default(), &arena, |_| {
        for page in [1, 7] {
            (0..PAGE).for_each(|at| arena.write(place(page) + at, 0));
        }
        assert_eq!(read(&arena, 2), model[2]);
        arena.remove(place(3), PAGE).unwrap();
        let zeros = [1, 3, 7, 8].map(|page| (page, Content::ZERO));
        assert_eq!(save(&world, "saved"), BTreeMap::from(zeros));
    });
}

#[test]
fn threads_that_touch_and_remove_as_they_like_find_their_pages() {
    const THREADS: usize = 8;
    let world = World::new();
    let model = base_model();
    let arena = Arena::new(PAGE * PAGES).unwrap();
    let ahead: Vec<u32> = (0..LAST).filter(|page| page % 3 == 0).collect();
    let counts = serving(&world, None, (ahead, None), &arena, |state| {
        std::thread::scope(|threads| {
            for thread in 0..THREADS {
                let (arena, model) = (&arena, &model);
                threads.spawn(move || {
                    // A number that jumps about, and is the same each time.
                    let mut number = thread as u64 + 1;
                    let mut own: BTreeMap<usize, Content> = BTreeMap::new();
                    for _ in 0..4000 {
                        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let random = usize::try_from(number >> 33).unwrap();
                        // Even pages are everybody's, to be read; of the others each thread has its own.
                        let page = random % PAGES;
                        if page.is_multiple_of(2) {
                            assert_eq!(read(arena, page), model[page], "page {page}");
                            continue;
                        }
                        if page / 2 % THREADS != thread {
                            continue;
                        }
                        let now = own.entry(page).or_insert(model[page]);
                        match random / PAGES % 3 {
                            0 => {
                                arena.remove(place(page), PAGE).unwrap();
                                *now = Content::ZERO;
                            }
                            1 => {
                                now.1 = random.to_le_bytes()[0];
                                arena.write(place(page) + WRITTEN, now.1);
                            }
                            _ => assert_eq!(read(arena, page), *now, "page {page}"),
                        }
                    }
                });
            }
        });
        state.settle().unwrap();
        state.counts().unwrap()
    });
    assert!(counts.faults > 0 && counts.removals > 100, "{counts:?}");
}

#[test]
fn the_first_pages_are_recorded_and_placed_ahead_the_next_time() {
    let world = World::new();
    let model = base_model();
    let path = world.path.join("working-set");
    let touched: Vec<usize> = vec![30, 31, 32, 7, 8, 399, 31, 7, 200];
    let touch = |arena: &Arena| touched.iter().for_each(|page| assert_eq!(read(arena, *page), model[*page]));
    let arena = Arena::new(PAGE * PAGES).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let record = Record { file: file.try_clone().unwrap(), after: Vec::new() };
    let counts = serving(&world, None, (Vec::new(), Some(record)), &arena, |state| {
        touch(&arena);
        state.settle().unwrap();
        state.counts().unwrap()
    });
    assert_eq!(counts, Counts { faults: 7, ahead: 0, removals: 0 });
    let recorded = || working_set::decode(&std::fs::read(&path).unwrap(), PAGES as u64).unwrap();
    let first = recorded();
    assert_eq!(first, WorkingSet { pages: vec![30, 31, 32, 7, 8, 399, 200], is_whole: false });
    // Its VMM was there for a moment: the next one goes on with it.
    let arena = Arena::new(PAGE * PAGES).unwrap();
    let record = Record { file, after: first.pages.clone() };
    serving(&world, None, (first.pages.clone(), Some(record)), &arena, |state| {
        for page in [8, 9, 31, 10] {
            assert_eq!(read(&arena, page), model[page]);
        }
        state.settle().unwrap();
    });
    let second = recorded();
    assert_eq!(second.pages, [&first.pages[..], &[9, 10]].concat());
    let arena = Arena::new(PAGE * PAGES).unwrap();
    let counts = serving(&world, None, (first.pages, None), &arena, |state| {
        while state.counts().unwrap().ahead < 7 {
            std::thread::yield_now();
        }
        touch(&arena);
        state.counts().unwrap()
    });
    assert_eq!(counts, Counts { faults: 0, ahead: 7, removals: 0 });
}

/// Not a test: what plays a VMM, which has this variable: it does what it is told over its standard input.
#[test]
fn plays_a_vmm() {
    let Some(socket) = std::env::var_os(VMM_VARIABLE) else { return };
    let arena = Arena::new(PAGE * PAGES).unwrap();
    let mut told =
        BufReader::new(UnixStream::from(rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).unwrap()));
    let mut line = String::new();
    while told.read_line(&mut line).unwrap() > 0 {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let answer = match words[0] {
            "connect" => {
                let connection = UnixStream::connect(&socket).unwrap();
                let mut list = regions(arena.address());
                match words[1] {
                    "whole" => {}
                    "half" => drop(list.pop()),
                    other => panic!("{other}"),
                }
                let list: Vec<_> = list
                    .iter()
                    .map(|region| {
                        let mut sent = serde_json::to_value(region).unwrap();
                        sent["page_size"] = PAGE.into();
                        sent
                    })
                    .collect();
                let json = serde_json::to_vec(&list).unwrap();
                let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut room);
                let descriptors = [arena.descriptor()];
                assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
                sendmsg(&connection, &[IoSlice::new(&json)], &mut control, SendFlags::empty()).unwrap();
                std::mem::forget(connection);
                0
            }
            "read" => usize::from(arena.read(place(number(1)))),
            "write" => {
                arena.write(place(number(1)) + WRITTEN, u8::try_from(number(2)).unwrap());
                0
            }
            "remove" => {
                arena.remove(place(number(1)), PAGE * number(2)).unwrap();
                0
            }
            other => panic!("{other}"),
        };
        writeln!(told.get_mut(), "{answer}").unwrap();
        line.clear();
    }
}

/// A process that plays a VMM.
struct Played {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Played {
    fn start(world: &World) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(BOUND)).unwrap();
        let spawn = Spawn::new("/proc/self/exe")
            .args(["--exact", "pager::tests::plays_a_vmm", "--nocapture"])
            .env(VMM_VARIABLE, world.path.join(SOCKET).as_str())
            .stdin(theirs);
        Self { child: spawn.start().unwrap(), control: BufReader::new(ours) }
    }

    /// Tells it to do something, and waits until it has.
    fn tell(&mut self, line: &str) -> usize {
        self.send(line);
        let mut answer = String::new();
        self.control.read_line(&mut answer).unwrap();
        answer.trim().parse().unwrap()
    }

    fn send(&mut self, line: &str) {
        writeln!(self.control.get_mut(), "{line}").unwrap();
    }

    async fn ended(&mut self) -> Exit {
        tokio::time::timeout(BOUND, self.child.wait()).await.unwrap().unwrap()
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        drop(self.child.kill());
    }
}

/// The kernel sends both signals at once.
fn is_end_by_pager(exit: Exit) -> bool {
    matches!(exit, Exit::Signal(9 | 1))
}

fn program() -> PagerProgram {
    let arguments = ["--exact", "pager::process::tests::becomes_a_pager", "--nocapture"];
    PagerProgram {
        program: "/proc/self/exe".into(),
        arguments: arguments.map(Into::into).to_vec(),
        environment: vec![(TEST_VARIABLE.into(), "1".into())],
    }
}

/// A pager and a VMM that has connected to it.
async fn bound_pair(world: &World, name: &str, pages: Option<&Utf8Path>) -> (Pager, Played) {
    let vmm = Played::start(world);
    let mut pager = Pager::begin(&program(), world.wanted(name, pages)).await.unwrap();
    pager.bind(&program(), vmm.child.process()).await.unwrap();
    (pager, vmm)
}

async fn gone(pager: &Pager) {
    tokio::time::timeout(BOUND, pager.watch().ended()).await.unwrap();
}

#[tokio::test]
async fn a_process_serves_another_one_confined_and_ends_with_it() {
    let world = World::new();
    let (pages, model) = world.save_over("pages", &BTreeMap::from([(5, Content(77, 1)), (6, Content::ZERO)]));
    let name = format!("confined{}", std::process::id());
    let (mut pager, mut vmm) = bound_pair(&world, &name, Some(&pages)).await;
    vmm.tell("connect whole");
    for page in [5, 6, 7, 399, 0, 200, 199] {
        assert_eq!(vmm.tell(&format!("read {page}")), usize::from(model[page].0), "page {page}");
    }
    pager.is_connected();
    assert!(!world.path.join(SOCKET).exists());
    let of_process =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", pager.process().pid())).unwrap();
    let status = of_process("status");
    let user = 0x7700_0000 + pager.process().pid();
    let is_nobody = status.contains("Uid:\t65534\t65534\t65534\t65534");
    assert!(is_nobody || status.contains(&format!("Uid:\t{user}\t{user}\t{user}\t{user}")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    // Of the test's program it is a thread that serves.
    let threads = std::fs::read_dir(format!("/proc/{}/task", pager.process().pid())).unwrap();
    let of_threads =
        threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let is_confined = |status: &String| status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2");
    assert_eq!(of_threads.filter(is_confined).count(), 1);
    let limits = of_process("limits");
    assert!(limits.contains("Max processes             0"), "{limits}");
    // The next owner finds it.
    let found = Pager::find(&name, &world.path).unwrap().unwrap();
    assert_eq!(found.process().pid(), pager.process().pid());
    let mut found = found;
    found.let_go();
    // It is saved from outside, across processes.
    vmm.tell("write 9 42");
    vmm.tell("remove 11 2");
    let memory = ServedMemory::open(vmm.child.process(), pager.process(), &world.path, &world.base).unwrap();
    let into = world.path.join("saved");
    memory.save(&into, &AtomicBool::new(false)).unwrap();
    let mut now = model.clone();
    (now[9].1, now[11], now[12]) = (42, Content::ZERO, Content::ZERO);
    let saved = saved_pages(&into);
    assert_eq!(saved, difference(&now, &base_model()));
    // Another base is none.
    let other = World::over(&model);
    ServedMemory::open(vmm.child.process(), pager.process(), &world.path, &other.base).unwrap_err();
    drop(std::mem::replace(&mut vmm.control, BufReader::new(UnixStream::pair().unwrap().0)));
    assert_eq!(vmm.ended().await, Exit::Code(0));
    gone(&pager).await;
    assert_eq!(pager.watch().verdict().await, None, "it ended because its VMM had");
    assert!(Pager::find(&name, &world.path).unwrap().is_none());
    let recorded = std::fs::read(world.path.join("working-set")).unwrap();
    let recorded = working_set::decode(&recorded, PAGES as u64).unwrap();
    assert_eq!(recorded.pages, [5, 6, 7, 399, 0, 200, 199, 9]);
}

#[tokio::test]
async fn a_vmm_whose_pager_is_killed_is_gone_too() {
    let world = World::new();
    let (pager, mut vmm) = bound_pair(&world, "killed", None).await;
    vmm.tell("connect whole");
    vmm.tell("read 1");
    pager.process().kill().unwrap();
    assert!(is_end_by_pager(vmm.ended().await));
    assert_eq!(pager.watch().verdict().await, Some(ExitReason::Pager { said: String::new() }));
}

#[tokio::test]
async fn a_pager_that_cannot_go_on_says_why() {
    for (connect, then, why) in [("connect half", "", "Length"), ("connect whole", "read 3", "Read")] {
        let world = World::new();
        let (pager, mut vmm) = bound_pair(&world, "why", None).await;
        if !then.is_empty() {
            // A base that became shorter.
            File::options().write(true).open(&world.base).unwrap().set_len(0).unwrap();
        }
        vmm.send(connect);
        if !then.is_empty() {
            vmm.send(then);
        }
        assert!(is_end_by_pager(vmm.ended().await), "{why}");
        match pager.watch().verdict().await {
            Some(ExitReason::Pager { said }) => assert!(said.contains(why), "{said}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_pager_whose_vmm_never_comes_does_not_stay() {
    let world = World::new();
    let (pager, mut vmm) = bound_pair(&world, "early", None).await;
    vmm.child.kill().unwrap();
    gone(&pager).await;
    assert_eq!(pager.watch().verdict().await, None);
    assert_eq!(vmm.ended().await, Exit::Signal(9));
    // Who started it is gone.
    let vmm = Played::start(&world);
    let mut pager = Pager::begin(&program(), world.wanted("early", None)).await.unwrap();
    pager.bind(&program(), vmm.child.process()).await.unwrap();
    let (watch, mut vmm) = (pager.watch(), vmm);
    pager.is_connected();
    tokio::time::timeout(BOUND, watch.ended()).await.unwrap();
    assert!(is_end_by_pager(vmm.ended().await));
}

#[tokio::test]
async fn a_large_memory_is_served_too() {
    const LARGE: u64 = 64 << 30;
    let world = World::new();
    File::options().write(true).open(&world.base).unwrap().set_len(LARGE).unwrap();
    let vmm = Played::start(&world);
    let wanted = Wanted { bytes: LARGE, ..world.wanted("large", None) };
    let mut pager = Pager::begin(&program(), wanted).await.unwrap();
    pager.bind(&program(), vmm.child.process()).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_a_reason() {
    let world = World::new();
    std::fs::write(world.path.join("pages"), "no pages").unwrap();
    for (base, pages, why) in [("nowhere", None, "nowhere"), ("base", Some("pages"), "pages")] {
        let vmm = Played::start(&world);
        let mut wanted = world.wanted("refused", None);
        wanted.base = world.path.join(base);
        wanted.pages = pages.map(|pages| world.path.join(pages));
        let mut pager = Pager::begin(&program(), wanted).await.unwrap();
        let error = pager.bind(&program(), vmm.child.process()).await.unwrap_err();
        let text = format!("{error:?}");
        assert!(text.contains("Prepare") && text.contains(why), "{text}");
        assert!(vmm.child.process().is_alive().unwrap());
    }
}
