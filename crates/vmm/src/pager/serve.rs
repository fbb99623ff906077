//! The loop of a pager: what happens to the memory, and what is done about it.
//!
//! ```text
//!  Removed ─► noted: zero from now on; the thread goes on when the event is read
//!  Fault   ─► taken away before? ─ yes ─► zeros
//!             └ no ─► the page of the snapshot, else of the base ─► placed
//!                                                                     ├ is there already: whoever waits tries again
//!                                                                     └ the memory is being changed: the same, after
//!                                                                       that event was read
//!  nothing ─► the next pages of the working set, until they are all there
//! ```
//!
//! Nothing is put aside: a fault that cannot be served now is thrown away, and comes again as another event, because its thread is
//! woken. So however many there are, and in whatever order, the pager has no more than it was made with.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    thread::yield_now,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use wrenn_host_linux::{
    process::Process,
    userfaultfd::{Buffer, Event, PlaceError, Userfaultfd},
};

use super::{
    regions::Regions,
    source::Source,
    state::{Marks, Phase, State},
    working_set::{Ahead, Recorder},
};
use crate::VmmError;

/// How many pages are placed at once that nobody waits for yet: so long may somebody have to wait who comes then.
const AHEAD: usize = 64;
/// How long after its first page a guest is still beginning.
pub(super) const RECORDED: Duration = Duration::from_secs(10);
/// How long a VMM may take to be gone whose memory is.
const GONE_BOUND: Duration = Duration::from_secs(10);

/// Why a pager cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Events cannot be read or waited for.
    #[error("could not learn what happens to the memory")]
    Events(#[source] std::io::Error),
    /// The VMM, or somebody in it, does something to the memory that nobody asked for.
    #[error("something unexpected happened to the memory: event {0}")]
    Unexpected(u8),
    /// Somebody waits for a page that is not the guest's.
    #[error("a fault at {0:#x}, where no memory of the guest is")]
    Outside(u64),
    /// A page could not be read.
    #[error("could not read page {page}")]
    Read {
        /// Which page.
        page: u64,
        /// Why.
        #[source]
        source: VmmError,
    },
    /// A page could not be placed.
    #[error("could not place page {page}")]
    Place {
        /// Which page.
        page: u64,
        /// Why.
        #[source]
        source: PlaceError,
    },
}

/// Everything that a pager has. It alone changes any of it.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) memory: Userfaultfd,
    pub(super) regions: Regions,
    pub(super) source: Source,
    pub(super) state: State,
    pub(super) vmm: Process,
    pub(super) ahead: Ahead,
    pub(super) record: Option<Record>,
}

/// Where the order of the first pages goes, if it is recorded.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) file: File,
    /// What was recorded of it before.
    pub(super) after: Vec<u32>,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placed {
    Yes,
    /// Not now.
    NotNow,
    /// There is no memory any more.
    Gone,
}

/// Whether there is something to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    There,
    Gone,
}

impl Server {
    /// Serves until the VMM is gone.
    pub(super) fn run(self) -> Result<(), ServeError> {
        self.state.serve(&self.regions);
        let (page_bytes, pages) = (rustix::param::page_size(), self.regions.pages());
        let recorder = self.record.map(|Record { file, after }| Recording {
            file,
            recorder: Recorder::after(&after, pages),
            end: Instant::now() + RECORDED,
        });
        let mut working = Working {
            memory: self.memory,
            regions: self.regions,
            source: self.source,
            state: self.state,
            vmm: self.vmm,
            ahead: self.ahead,
            recorder,
            placed: Marks::new(pages),
            content: vec![0; page_bytes * AHEAD],
            page_bytes,
        };
        working.serve()?;
        if let Some(recording) = working.recorder.take() {
            recording.finish(false);
        }
        working.state.set_phase(Phase::Done);
        Ok(())
    }
}

/// The order of the first pages, and where it is to be kept.
#[derive(Debug)]
struct Recording {
    file: File,
    recorder: Recorder,
    end: Instant,
}

impl Recording {
    /// Writes it. It is a hint: what cannot be written is not there the next time.
    fn finish(self, is_whole: bool) {
        drop(self.file.write_all_at(&self.recorder.encode(is_whole), 0));
    }
}

#[derive(Debug)]
struct Working {
    memory: Userfaultfd,
    regions: Regions,
    source: Source,
    state: State,
    vmm: Process,
    ahead: Ahead,
    recorder: Option<Recording>,
    /// Pages that were placed, or about to be.
    placed: Marks,
    /// Room for what is placed at once.
    content: Vec<u8>,
    page_bytes: usize,
}

impl Working {
    fn serve(&mut self) -> Result<(), ServeError> {
        let mut buffer = Buffer::default();
        loop {
            let (has_event, has_ended) = self.wait()?;
            if has_ended {
                return Ok(());
            }
            let memory = match has_event {
                true => self.take_in(&mut buffer)?,
                false => self.place_ahead()?,
            };
            if memory == Memory::Gone {
                return self.vmm_is_gone();
            }
            if self.recorder.as_ref().is_some_and(|recording| Instant::now() >= recording.end)
                && let Some(recording) = self.recorder.take()
            {
                recording.finish(true);
            }
        }
    }

    /// Waits until there is something to do: whether something happened to the memory, and whether the VMM has ended.
    fn wait(&self) -> Result<(bool, bool), ServeError> {
        let recorded = self.recorder.as_ref().map(|recording| recording.end);
        let bound = match self.ahead.is_done() {
            false => Some(Duration::ZERO),
            true => recorded.map(|end| end.saturating_duration_since(Instant::now())),
        };
        wait_for(&self.memory, &self.vmm, bound).map_err(ServeError::Events)
    }

    /// Reads what has happened and does what is to be done about it.
    fn take_in(&mut self, buffer: &mut Buffer) -> Result<Memory, ServeError> {
        self.state.begin();
        let events = self.memory.read(buffer).map_err(ServeError::Events)?;
        // First what is zero from now on: a fault that came in the same moment may be one of that page, later.
        for event in events.clone() {
            match event {
                Event::Fault(_) => {}
                Event::Removed(start, end) => {
                    for (first, end) in self.regions.pages_between(start, end) {
                        self.state.remove(first, end);
                    }
                }
                Event::Other(number) => return Err(ServeError::Unexpected(number)),
            }
        }
        for event in events {
            if let Event::Fault(address) = event
                && self.fault(address)? == Placed::Gone
            {
                return Ok(Memory::Gone);
            }
        }
        self.state.end();
        Ok(Memory::There)
    }

    fn fault(&mut self, address: u64) -> Result<Placed, ServeError> {
        let page = self.regions.page(address).ok_or(ServeError::Outside(address))?;
        self.state.count_fault();
        if self.placed.set(page)
            && let Some(recording) = &mut self.recorder
        {
            recording.recorder.push(page);
        }
        let placed = self.place(page, 1)?;
        if placed == Placed::NotNow {
            self.wake(page)?;
            // Whoever changes the memory has to have a turn.
            yield_now();
        }
        Ok(placed)
    }

    /// Places the next pages that nobody has asked for yet.
    fn place_ahead(&mut self) -> Result<Memory, ServeError> {
        let Some((first, count)) = self.ahead.next(AHEAD as u64) else { return Ok(Memory::There) };
        let mut page = first;
        while page < first + count {
            let is_wanted =
                |marks: &Marks, state: &State, page| !marks.is_set(page) && !state.is_removed(page);
            if !is_wanted(&self.placed, &self.state, page) {
                page += 1;
                continue;
            }
            let follow = (page..first + count).take_while(|page| is_wanted(&self.placed, &self.state, *page));
            let (_, together) = self.regions.address(page).unwrap_or_default();
            let pages = (follow.count() as u64).min(together).max(1);
            for page in page..page + pages {
                self.placed.set(page);
            }
            match self.place(page, pages)? {
                Placed::Yes => self.state.count_ahead(pages),
                // They come when they are asked for.
                Placed::NotNow => {}
                Placed::Gone => return Ok(Memory::Gone),
            }
            page += pages;
        }
        Ok(Memory::There)
    }

    /// Puts pages in a row where they belong, which is one piece of the process.
    fn place(&mut self, mut page: u64, mut pages: u64) -> Result<Placed, ServeError> {
        let length = |pages: u64| usize::try_from(pages).unwrap_or(usize::MAX) * self.page_bytes;
        if self.state.is_removed(page) {
            self.content[..length(pages)].fill(0);
        } else {
            let read = self.source.read(page, &mut self.content[..length(pages)]);
            read.map_err(|source| ServeError::Read { page, source })?;
        }
        let mut from = 0;
        while pages > 0 {
            let (address, _) = self.regions.address(page).ok_or(ServeError::Outside(page))?;
            let content = &self.content[from..from + length(pages)];
            let placed = match is_zero(content) {
                true => self.memory.zero(address, content.len() as u64),
                false => self.memory.copy(address, content),
            };
            let bytes = match placed {
                Ok(bytes) => bytes,
                Err(PlaceError::Exists) => {
                    self.wake(page)?;
                    self.page_bytes as u64
                }
                Err(PlaceError::Changing) => return Ok(Placed::NotNow),
                Err(PlaceError::Gone) => return Ok(Placed::Gone),
                Err(source) => return Err(ServeError::Place { page, source }),
            };
            let done = (bytes / self.page_bytes as u64).clamp(1, pages);
            (page, pages, from) = (page + done, pages - done, from + length(done));
        }
        Ok(Placed::Yes)
    }

    /// Has whoever waits for a page ask again.
    fn wake(&self, page: u64) -> Result<(), ServeError> {
        let (address, _) = self.regions.address(page).ok_or(ServeError::Outside(page))?;
        self.memory.wake(address, self.page_bytes as u64).map_err(ServeError::Events)
    }

    /// The memory went first, as it does: the process is gone a moment later.
    fn vmm_is_gone(&self) -> Result<(), ServeError> {
        let mut ends = [PollFd::from_borrowed_fd(self.vmm.pidfd(), PollFlags::IN)];
        let gone = retried(|| poll(&mut ends, Some(&timespec(GONE_BOUND))));
        match gone.map_err(ServeError::Events)? {
            0 => Err(ServeError::Events(std::io::ErrorKind::TimedOut.into())),
            _ => Ok(()),
        }
    }
}

fn wait_for(memory: &Userfaultfd, vmm: &Process, bound: Option<Duration>) -> std::io::Result<(bool, bool)> {
    let mut both = [
        PollFd::from_borrowed_fd(memory.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(vmm.pidfd(), PollFlags::IN),
    ];
    retried(|| poll(&mut both, bound.map(timespec).as_ref()))?;
    let [memory, vmm] = both.map(|polled| polled.revents());
    if memory.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
        return Err(std::io::Error::other("the memory cannot be watched"));
    }
    Ok((memory.contains(PollFlags::IN), !vmm.is_empty()))
}

pub(super) fn timespec(bound: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(bound.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: bound.subsec_nanos().into(),
    }
}

/// A signal is no reason to do something else.
pub(super) fn retried<T>(mut call: impl FnMut() -> Result<T, Errno>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other.map_err(Into::into),
        }
    }
}

fn is_zero(content: &[u8]) -> bool {
    let (words, rest) = content.as_chunks::<{ size_of::<u64>() }>();
    rest.iter().all(|byte| *byte == 0) && words.iter().all(|word| u64::from_ne_bytes(*word) == 0)
}
