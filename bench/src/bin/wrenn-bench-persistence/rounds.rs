//! The rounds of one case: product and floor take turns, so that a machine that becomes slower meanwhile is slower for
//! both.
//!
//! ```text
//!  pause ─► floors: restore to first byte, save · restore to first exec result ─► resume
//!  snapshot ─► floors: a machine of the same snapshot ─► fork ─► rollback ─► product: rollback ─► fork of 1
//! ```

use std::time::Duration;

use anyhow::{Context as _, Error, Result};
use camino::Utf8Path;
use wrenn_bench::floor::{Answered, Forked, Origin, Question};

use crate::{Bench, directory_bytes, report::Case};

impl Bench<'_> {
    /// A pause and a resume, and what a bare program needs for the same.
    pub(crate) async fn pause_and_resume(&mut self, id: &str, round: usize, case: &mut Case) -> Result<()> {
        let paused = self.api.pause(id).await;
        let is_paused = paused.is_ok();
        case.pause.add(paused);
        if !is_paused {
            return Ok(());
        }
        case.paused_bytes = directory_bytes(&self.agent)?;
        let origin = Origin::of_paused(&self.agent, &id.parse()?)?;
        let mut questions = [Question::FirstByte, Question::Command];
        // None of the two is always the first to read what was just written.
        if !round.is_multiple_of(2) {
            questions.reverse();
        }
        for question in questions {
            let ready = self.floor.prepare_from(origin.clone()).await?;
            let answered = self.floor.restore(ready, question).await;
            let took = answered.as_ref().map(|answered| answered.took);
            match question {
                Question::FirstByte => case.floor_first_byte.add(took),
                Question::Command => case.floor_resume.add(took),
            }
            let Ok(mut answered) = answered else { continue };
            if question == Question::FirstByte {
                let into = tempfile::tempdir_in(self.saved.path())?;
                let directory = utf8(&into)?;
                case.floor_pause.add(self.floor.save(&mut answered, directory).await);
            }
            self.floor.finish(answered).await?;
        }
        case.resume.add(self.api.resume_and_run(id).await);
        Ok(())
    }

    /// A snapshot of what runs, a rollback to it and a fork, and what a bare program needs for the same.
    pub(crate) async fn snapshot_and_fork(&mut self, id: &str, case: &mut Case) -> Result<()> {
        let made = match self.api.snapshot(id, "bench").await {
            Ok(made) => made,
            Err(error) => {
                case.snapshot.add(Err::<Duration, _>(error));
                return Ok(());
            }
        };
        case.snapshot.add(Ok::<_, Error>(made.took));
        case.stopped.add(Ok::<_, Error>(made.stopped));
        self.bare_fork_and_rollback(&Origin::of_snapshot(&self.agent, &made.id)?, case).await?;
        case.rollback.add(self.api.rollback_and_run(id, "bench").await);
        case.fork_one.add(self.api.fork(id, 1).await);
        self.api.forget_snapshot("bench").await
    }

    async fn bare_fork_and_rollback(&self, origin: &Origin, case: &mut Case) -> Result<()> {
        let ready = self.floor.prepare_from(origin.clone()).await?;
        // This machine stands for the sandbox: it has the same pages for itself, and has run a command.
        let mut machine = match self.floor.restore(ready, Question::Command).await {
            Ok(machine) => machine,
            Err(error) => {
                case.floor_stopped.add(Err::<Duration, _>(error.context("restore what is to be forked")));
                return Ok(());
            }
        };
        let into = tempfile::tempdir_in(self.saved.path())?;
        if let Err(error) = self.bare_fork(&mut machine, utf8(&into)?, case).await {
            case.floor_stopped.add(Err::<Duration, _>(error));
            return self.floor.finish(machine).await;
        }
        let ready = self.floor.prepare_from(origin.clone()).await?;
        let restored = self.floor.roll_back(machine, ready).await;
        case.floor_rollback.add(restored.as_ref().map(|restored| restored.took));
        match restored {
            Ok(restored) => self.floor.finish(restored).await,
            Err(_) => Ok(()),
        }
    }

    async fn bare_fork(&self, machine: &mut Answered, into: &Utf8Path, case: &mut Case) -> Result<()> {
        let ready = self.floor.prepare_fork(machine, into).await?;
        let Forked { stopped, copy } = self.floor.fork(machine, ready).await?;
        case.floor_stopped.add(Ok::<_, Error>(stopped));
        case.floor_fork.add(copy.as_ref().map(|copy| copy.took));
        match copy {
            Ok(copy) => self.floor.finish(copy).await,
            Err(_) => Ok(()),
        }
    }
}

fn utf8(directory: &tempfile::TempDir) -> Result<&Utf8Path> {
    Utf8Path::from_path(directory.path()).context("the directory is not UTF-8")
}
