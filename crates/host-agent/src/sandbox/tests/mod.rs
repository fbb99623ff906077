//! Any order of any verbs, by many at once, with whatever fails, ends in a legal state: the real drivers, records
//! and stores against a model, on a host whose machines, guests and slots are played.
//!
//! ```text
//!  steps ─► World: agent, fake machines, played guests ─► what was told, what is seen ─┐
//!    └────► Model (pure): what may be                                                  ┴─► equal?
//! ```
//!
//! After each step every sandbox is settled, its record says so, its one machine runs on the layers that the
//! record names and holds what was written last, its guest is itself and open, what it may reach is what it is said to,
//! and no layer that has a digest has changed. A destroy ends in half a minute whatever is under way. At the end
//! everything is deleted, and nothing is left.

mod cases;
mod clocks;
mod ends;
mod guest;
mod held;
mod lives;
mod model;
mod overtaking;
mod plans;
mod refusals;
mod settings;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use futures::future::join_all;
use proptest::{prelude::*, test_runner::TestRunner};
use tokio::time::timeout;
use wrenn_types::{SandboxId, SnapshotId};
use wrenn_vmm::{ExitReason, fake::Step as Vm};

use self::{
    guest::{Call, Manner},
    model::{Ask, Content, Model, State, Told, Trouble},
    plans::{End, Fault, Plan, Step, steps},
    settings::Known,
    world::{CONTENT, Control, Disks, Ground, Ran, World, spec},
};
use crate::{
    network::Policy,
    registry::Registry,
    sandbox::{Handle, RequestError, Stage, driver::chain, queue::Verb, record},
    scrub::below_tops,
    snapshot_store::SnapshotStoreError,
    snapshots::{Extent, Look, Progress, SealProgress, Snapshots},
    warm::blocking,
};

/// In no case does an answer take longer: the longest bound of what is done, several times.
const BOUND: Duration = Duration::from_secs(3600);
/// Whatever is under way, a destroy takes no longer: published clients give up after half a minute.
const DESTROY_BOUND: Duration = Duration::from_secs(30);
/// How long a command of a machine may take before it is answered with an error.
const COMMAND_BOUND: Duration = Duration::from_secs(10);
/// A sandbox with a timeout may be idle for so long, which is more than all that hangs in a case. Its deadline is as far.
const IDLE_SECONDS: i64 = 86_400;

/// What a case knows beside what the model does.
#[derive(Default)]
struct Notes {
    model: Model,
    written: u64,
    /// Who may be saved without standing still: nobody else can be made of that.
    unprepared: BTreeSet<SandboxId>,
    /// Whose records may be old.
    unrecorded: BTreeSet<SandboxId>,
    settings: Known,
}

type Answer = Pin<Box<dyn Future<Output = Told>>>;

/// One thing that is asked for, and its answer.
struct Asked {
    id: Option<(SandboxId, Ask)>,
    deletes: Option<SnapshotId>,
    answer: Answer,
}

/// What was asked of a sandbox or of the store, and what was told.
type Answered = (Option<(SandboxId, Ask)>, Option<SnapshotId>, Told);

fn choose<T: Clone>(number: u8, of: impl Iterator<Item = T>) -> Option<T> {
    let all = of.collect::<Vec<_>>();
    all.get(usize::from(number).checked_rem(all.len())?).cloned()
}

impl Notes {
    fn ask(&mut self, registry: &Registry, control: &Control, plan: &Plan) -> Vec<Asked> {
        let sandbox = |number| choose(number, self.model.sandboxes.keys().cloned());
        let saved = |number| choose(number, self.model.snapshots.keys().cloned());
        let asked = match plan {
            Plan::Create => Some((SandboxId::random(), Ask::Create)),
            Plan::CreateFrom(from) => saved(*from).map(|from| (SandboxId::random(), Ask::CreateFrom(from))),
            Plan::Pause(one) => sandbox(*one).map(|id| (id, Ask::Pause(Extent::Machine))),
            Plan::PauseDisk(one) => sandbox(*one).map(|id| (id, Ask::Pause(Extent::Disk))),
            Plan::Resume(one) => sandbox(*one).map(|id| (id, Ask::Resume)),
            Plan::Snapshot(one) => sandbox(*one).map(|id| (id, Ask::Snapshot(SnapshotId::random()))),
            Plan::Deepen(one) => {
                let Some(id) = sandbox(*one) else { return Vec::new() };
                let asks = (0..10).map(|_| (id.clone(), Ask::Snapshot(SnapshotId::random())));
                return asks.map(|asked| ask_one(registry, control, asked)).collect();
            }
            Plan::Rollback(one, to) => sandbox(*one).and_then(|id| {
                let own = self.model.snapshots.iter().filter(|(_, (of, _))| *of == id);
                let to = choose(*to, own.map(|(snapshot, _)| snapshot.clone()));
                to.map(|to| (id, Ask::Rollback(to)))
            }),
            Plan::Timeout(one, kill) => sandbox(*one).map(|id| (id, Ask::Update(settings::timeout(*kill)))),
            Plan::Deadline(one, kill) => sandbox(*one).map(|id| (id, Ask::Update(settings::deadline(*kill)))),
            Plan::Network(one, number) => {
                sandbox(*one).map(|id| (id, Ask::Update(settings::network(*number))))
            }
            Plan::Destroy(one) => sandbox(*one).map(|id| (id, Ask::Destroy)),
            Plan::Delete(one) => {
                let Some(snapshot) = saved(*one) else { return Vec::new() };
                let (store, id) = (registry.host().snapshots.clone(), snapshot.clone());
                let answer = async move {
                    if blocking(move || store.delete(&id)).await.is_ok() { Told::Done } else { Told::Failed }
                };
                return vec![Asked { id: None, deletes: Some(snapshot), answer: Box::pin(answer) }];
            }
        };
        asked.map(|asked| ask_one(registry, control, asked)).into_iter().collect()
    }

    /// Writes something new into each machine that runs.
    fn write(&mut self, world: &World<'_>) {
        for (id, states) in &mut self.model.sandboxes {
            let [machine] = &world.machines(id)[..] else { continue };
            if !matches!(states.first(), Some(State::Up(_))) {
                continue;
            }
            self.written += 1;
            assert!(world.fake.write_page(machine, CONTENT, self.written));
            assert!(world.fake.write_disk(machine, self.written));
            *states = [State::Up(Content { memory: self.written, disk: self.written })].into();
        }
    }

    fn arm(&mut self, world: &World<'_>, fault: Fault) -> Trouble {
        let sandbox = |number| choose(number, self.model.sandboxes.keys().cloned());
        match fault {
            Fault::Fails(step) => world.fake.fail_next(step),
            Fault::Unanswered(step) => world.fake.lose_answer(step),
            Fault::Hangs(step) => world.fake.delay(step, 10 * BOUND),
            Fault::Slow(step) => world.fake.delay(step, COMMAND_BOUND),
            Fault::Crashes(step) => world.fake.crash_after(step),
            Fault::Guest(call, manner) => world.guests.fail_next(call, manner),
            Fault::DiskFull(after) => world.control.fill_disk_after(Some(after.into())),
            Fault::NoSlot => world.numbers.refuse(true),
            Fault::Record(one, after) => {
                if let Some(id) = sandbox(one) {
                    world.control.obstruct_after(after.into(), obstacle(world, &id));
                    self.unrecorded.insert(id);
                }
            }
            Fault::Dies(one) => {
                if let Some(id) = sandbox(one) {
                    for machine in world.machines(&id) {
                        world.fake.end(&machine, ExitReason::GuestPanic);
                    }
                }
            }
        }
        if matches!(fault, Fault::Guest(Call::Prepare, _)) {
            self.unprepared.extend(self.model.sandboxes.keys().cloned());
        }
        Trouble { any: true, deadly: matches!(fault, Fault::Crashes(_) | Fault::Dies(_)) }
    }

    fn learn(&mut self, asked: &[Answered], trouble: Trouble) -> Result<(), String> {
        let deleted: BTreeSet<_> = asked.iter().filter_map(|(_, deletes, _)| deletes.clone()).collect();
        let mut by_sandbox = BTreeMap::<_, Vec<_>>::new();
        for (id, ask, told) in
            asked.iter().filter_map(|(asked, _, told)| asked.as_ref().map(|(id, ask)| (id, ask, told)))
        {
            by_sandbox.entry(id.clone()).or_default().push((ask.clone(), *told));
        }
        for id in self.model.sandboxes.keys() {
            by_sandbox.entry(id.clone()).or_default();
        }
        for (id, asked) in by_sandbox {
            let trouble = Trouble { any: trouble.any || self.unprepared.contains(&id), ..trouble };
            self.model.answered(&id, &asked, trouble, &deleted)?;
            self.settings.answered(&id, &asked);
        }
        for (_, deletes, told) in asked {
            let Some(id) = deletes else { continue };
            match told {
                Told::Done => drop(self.model.snapshots.remove(id)),
                _ => {
                    if let Some((_, saved)) = self.model.snapshots.get_mut(id) {
                        saved.certain = false;
                    }
                }
            }
        }
        Ok(())
    }

    /// Before each machine that was made or let run, its record was on disk and what that allows in force.
    fn look_back(&self, world: &World<'_>) -> Result<(), String> {
        for ran in world.take_ran() {
            let Ran { id, in_force, recorded } = &ran;
            let recorded = recorded.as_ref().ok_or_else(|| format!("{id} ran before it had a record"))?;
            let wanted = Policy::resolve(recorded, &[]).map_err(|error| error.to_string())?;
            // The record of one that could not be written is older than what was put in force.
            let is_old = self.unrecorded.contains(id) && in_force.is_some();
            if in_force.as_ref() != Some(&wanted) && !is_old {
                return Err(format!("{id} ran before its policy was in force: {ran:?}"));
            }
        }
        Ok(())
    }

    /// Looks at everything, when nothing is under way.
    async fn look(&mut self, world: &World<'_>, registry: &Registry) -> Result<(), String> {
        self.look_back(world)?;
        let mut paused = BTreeSet::new();
        for id in self.model.sandboxes.keys().cloned().collect::<Vec<_>>() {
            let handle = registry.get(&id);
            let status = handle.as_ref().map(|handle| handle.status());
            let stage = status.as_ref().map_or(Stage::Stopped, |status| status.stage);
            let seen_status = status.clone();
            let machines = world.machines(&id);
            let record = record::read(&registry.host().sandboxes_dir, &id);
            let seen = match (stage, &machines[..]) {
                (Stage::Running, [machine]) => {
                    let (memory, disk) =
                        (world.fake.read_page(machine, CONTENT), world.fake.read_disk(machine));
                    let token = registry.get(&id).map(|handle| handle.spec().access_token.clone());
                    let is = world.guests.look(machine).zip(token);
                    let open = is.is_some_and(|(it, token)| !it.closed && it.is(id.as_str(), token.expose()));
                    if !open || world.fake.is_running(machine) != Some(true) {
                        return Err(format!(
                            "the guest of {id} is not itself: {:?}",
                            world.guests.look(machine)
                        ));
                    }
                    let record = record.ok_or_else(|| format!("{id} has no record"))?;
                    let host = registry.host();
                    let mut files: Vec<_> =
                        record.layers.iter().map(|it| host.snapshots.layer_path(it)).collect();
                    let base = host.snapshots.base(&record.base).ok().flatten().ok_or("no base")?;
                    let chain = world.fake.disk_files(machine);
                    // Without layers a disk stands on nothing.
                    files.extend(host.has_layers().then_some(base.disk.path));
                    if host.has_layers() && chain.last() != files.last() {
                        return Err(format!("{id} runs on {chain:?}, of which not all is the stack's"));
                    }
                    if !self.unrecorded.contains(&id) {
                        // It may name layers that are in the top one by now.
                        let named = chain.iter().take_while(|file| file.starts_with(world.at("agent")));
                        if files.first() != chain.first() || !named.into_iter().all(|it| files.contains(it)) {
                            return Err(format!("{id} runs on {chain:?}, and its record says {files:?}"));
                        }
                        if record.paused.is_some() || record.capture.is_some() {
                            return Err(format!("{id} runs, and its record says {record:?}"));
                        }
                    }
                    State::Up(Content {
                        memory: memory.unwrap_or_default(),
                        disk: disk.ok_or_else(|| format!("{id} has no disk that can be read"))?,
                    })
                }
                (Stage::Paused, []) => {
                    let saved = status.and_then(|status| status.paused).ok_or("paused as nothing")?.snapshot;
                    let record = record.ok_or_else(|| format!("{id} has no record"))?;
                    let recorded = record.paused.as_ref().map(|paused| &paused.snapshot) == Some(&saved);
                    let old = self.unrecorded.contains(&id);
                    if !recorded || !old && (record.machine.is_some() || record.capture.is_some()) {
                        return Err(format!("{id} is paused as {saved}, and its record says {record:?}"));
                    }
                    paused.insert(saved);
                    State::Paused(Content::default())
                }
                (Stage::Stopped, []) if record.is_none() => State::Absent,
                other => return Err(format!("{id} is {other:?}, and its record says {record:?}")),
            };
            if let Some(status) = seen_status.filter(|_| seen != State::Absent) {
                let record = record::read(&registry.host().sandboxes_dir, &id);
                let record = record.filter(|_| !self.unrecorded.contains(&id));
                let footing = handle.as_ref().and_then(Handle::footing);
                let in_force = footing.and_then(|footing| world.in_force(footing.slot));
                self.settings.seen(&id, &status, record.as_ref(), in_force)?;
            }
            self.model.seen(&id, seen)?;
            if seen == State::Absent {
                self.settings.forget(&id);
            }
        }
        let store = registry.host().snapshots.clone();
        let all = blocking(move || store.all()).await.map_err(|error| error.to_string())?;
        let there: BTreeMap<_, _> = all.into_iter().collect();
        for id in &paused {
            there.get(id).and_then(|it| it.as_ref().ok()).ok_or_else(|| format!("{id} cannot be resumed"))?;
        }
        for id in there.keys().filter(|id| !paused.contains(*id)) {
            let Some((_, saved)) = self.model.snapshots.get_mut(id) else {
                return Err(format!("snapshot {id} is nobody's"));
            };
            saved.certain = true;
        }
        for (id, (_, saved)) in &self.model.snapshots {
            if saved.certain && !matches!(there.get(id), Some(Ok(_))) {
                return Err(format!("snapshot {id} is {:?}", there.get(id)));
            }
        }
        self.model.snapshots.retain(|_, (_, saved)| saved.certain);
        let (store, sandboxes) = (registry.host().snapshots.clone(), registry.host().sandboxes_dir.clone());
        blocking(move || scrub(&store, &sandboxes)).await
    }
}

/// Takes the digest of each layer of which nothing is to change any more, and reads all those that have one: nobody
/// writes to a layer that has a digest.
fn scrub(store: &Snapshots, sandboxes: &Utf8Path) -> Result<(), String> {
    let told = |error: SnapshotStoreError| chain(&error);
    let frozen = below_tops(sandboxes).map_err(told)?;
    for layer in store.layers_without_digest(frozen).map_err(told)? {
        let mut sealing =
            store.begin_seal(&layer).map_err(told)?.ok_or_else(|| format!("{layer} is gone"))?;
        let sealed = store.seal(&mut sealing, u64::MAX).map_err(told)?;
        if !matches!(sealed, SealProgress::Sealed(_)) {
            return Err(format!("the digest of {layer} is {sealed:?}"));
        }
    }
    for part in store.parts().map_err(told)? {
        if let Look::Contents(mut reading) = store.look(&part).map_err(told)? {
            while let Progress::More(_) = reading.read(u64::MAX).map_err(told)? {}
        }
    }
    Ok(())
}

/// What stands in the way of a new record of a sandbox, where it is.
fn obstacle(world: &World<'_>, id: &SandboxId) -> Utf8PathBuf {
    world.at("sandboxes").join(id.as_str()).join("record.json.new")
}

fn ask_one(registry: &Registry, control: &Control, (id, ask): (SandboxId, Ask)) -> Asked {
    let verb = match &ask {
        Ask::Create | Ask::CreateFrom(_) | Ask::Destroy => None,
        Ask::Pause(extent) => Some(Verb::Pause(*extent)),
        Ask::Resume => Some(Verb::Resume { timeout: None }),
        Ask::Snapshot(into) => Some(Verb::Snapshot { into: into.clone() }),
        Ask::Rollback(to) => Some(Verb::Rollback { to: to.clone() }),
        Ask::Update(update) => Some(Verb::Update(update.clone())),
    };
    let handle = match &ask {
        Ask::Create => registry.create(spec(id.clone(), None)).ok(),
        Ask::CreateFrom(from) => registry.create(spec(id.clone(), Some(from.clone()))).ok(),
        _ => registry.get(&id),
    };
    let destroy = ask == Ask::Destroy;
    let control = control.clone();
    let whose = format!("{id} {ask:?}");
    let answer = async move {
        let Some(handle) = handle else { return if destroy { Told::Done } else { Told::Denied } };
        match verb {
            Some(verb) => match handle.request(verb, None).await {
                Ok(_) => Told::Done,
                Err(RequestError::Failed(error)) => {
                    control.say(format!("{whose}: {}", chain(error.as_ref())));
                    Told::Failed
                }
                Err(RequestError::Denied(_)) => Told::Denied,
            },
            None if destroy => {
                if handle.destroy(wrenn_types::EndReason::Requested, None).is_err() {
                    return Told::Denied;
                }
                // It overtakes whatever else is asked.
                match timeout(DESTROY_BOUND, handle.stopped()).await {
                    Ok(_) => Told::Done,
                    Err(_) => Told::Late,
                }
            }
            None => match handle.settled().await.end {
                Some(end) => {
                    control.say(format!("{whose}: {}", end.message));
                    Told::Failed
                }
                None => Told::Done,
            },
        }
    };
    Asked { id: Some((id, ask)), deletes: None, answer: Box::pin(answer) }
}

/// What became of an agent.
enum Ended {
    Killed,
    Stopped,
    /// All steps were taken.
    Done,
}

/// Runs one agent until it ends; `steps` are those that are left.
async fn life(world: &World<'_>, notes: &mut Notes, steps: &mut &[Step]) -> Result<Ended, String> {
    let registry = world.agent().await;
    quiet().await;
    notes.look(world, &registry).await.map_err(|error| format!("at the start: {error}"))?;
    while let Some((step, rest)) = steps.split_first() {
        *steps = rest;
        notes.write(world);
        let trouble = step.fault.map(|fault| notes.arm(world, fault)).unwrap_or_default();
        if let End::Kill(after) = step.end {
            world.control.kill_after(after.into());
        }
        let mut asked = Vec::new();
        let mut answers = Vec::new();
        for plan in &step.plans {
            for one in notes.ask(&registry, &world.control, plan) {
                let told = std::rc::Rc::new(std::cell::Cell::new(Told::Nothing));
                asked.push((one.id, one.deletes, std::rc::Rc::clone(&told)));
                answers.push(async move { told.set(one.answer.await) });
            }
        }
        let killed = tokio::select! {
            biased;
            () = world.control.killed() => true,
            all = timeout(BOUND, join_all(answers)) => {
                all.map_err(|_| format!("no answer to all of {:?} within {BOUND:?}", step.plans))?;
                false
            }
        };
        let asked: Vec<_> = asked.into_iter().map(|(id, deletes, told)| (id, deletes, told.get())).collect();
        let kills = matches!(step.end, End::Kill(_));
        if !killed {
            quiet().await;
        }
        notes.learn(&asked, trouble).map_err(|error| format!("{step:?}: {error}"))?;
        notes.look_back(world).map_err(|error| format!("{step:?}: {error}"))?;
        world.calm();
        if kills {
            return Ok(Ended::Killed);
        }
        // What did not go on is tried again.
        tokio::time::sleep(Duration::from_secs(10)).await;
        notes.look(world, &registry).await.map_err(|error| format!("after {step:?}: {error}"))?;
        match step.end {
            End::Stop => {
                let closed = timeout(BOUND, registry.close(crate::config::OnStop::Leave)).await;
                closed.map_err(|_| "the agent does not stop".to_owned())?;
                return Ok(Ended::Stopped);
            }
            End::Idle => {
                tokio::time::sleep(Duration::from_secs(90_000)).await;
                quiet().await;
                notes.model.slept(|id, state| notes.settings.slept(id, state));
                notes.look(world, &registry).await.map_err(|error| format!("after a long time: {error}"))?;
            }
            End::GoOn | End::Kill(_) => {}
        }
    }
    let ids = notes.model.sandboxes.keys().cloned().collect::<Vec<_>>();
    let all = join_all(ids.iter().map(|id| registry.destroy(id, None)));
    let ends = timeout(DESTROY_BOUND, all).await.map_err(|_| "a destroy takes too long".to_owned())?;
    ends.into_iter().collect::<Result<Vec<_>, _>>().map_err(|denied| denied.to_string())?;
    for id in notes.model.snapshots.keys() {
        registry.host().snapshots.delete(id).map_err(|error| error.to_string())?;
    }
    Ok(Ended::Done)
}

/// Waits until nothing is under way: the clock goes on only then.
async fn quiet() {
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// Runs a case to its end.
fn run(ground: &Ground, disks: Disks, all: &[Step]) -> Result<(), String> {
    let mut steps = all;
    let world = World::with(ground, disks);
    let mut notes = Notes::default();
    loop {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().map_err(|error| error.to_string())?;
        let ended = runtime.block_on(async {
            let ended = life(&world, &mut notes, &mut steps).await;
            world.keep_time();
            ended
        });
        let ended = ended.map_err(|error| format!("{error}; what was said: {:#?}", world.control.said()))?;
        if let Ended::Killed = ended {
            // Nothing that the agent's end drops reaches a machine.
            world.fake.lose_owners();
        }
        drop(runtime);
        if let Ended::Done = ended {
            break;
        }
    }
    if all.iter().any(|step| step.fault == Some(Fault::Fails(Vm::Stop))) {
        // What a machine that did not end may still use is left to the next start.
        world.collect();
    }
    let remains = world.remains();
    if remains.is_empty() { Ok(()) } else { Err(format!("this is left: {remains:?}")) }
}

#[test]
fn any_order_of_any_verbs_with_any_fault_ends_in_a_legal_state() {
    let ground = Ground::new();
    let mut config = ProptestConfig { max_shrink_time: 20_000, ..ProptestConfig::default() };
    // What fails becomes a case below, whose steps can be read.
    config.failure_persistence = None;
    let soak = std::env::var_os("WRENN_SOAK").is_some();
    if soak {
        config.cases = 4000;
    }
    let cases = config.cases;
    // Layered ones, the default, have more that can go wrong.
    let disks = prop_oneof![2 => Just(Disks::Layered), 1 => Just(Disks::Plain)];
    let outcome = TestRunner::new(config)
        .run(&(disks, steps()), |(disks, steps)| run(&ground, disks, &steps).map_err(TestCaseError::fail));
    if let Err(error) = outcome {
        panic!("{error}");
    }
    if soak {
        soaked(cases);
    }
}

#[expect(clippy::print_stdout, reason = "the full count of a long test is told so")]
fn soaked(cases: u32) {
    println!(
        "soak: orders of verbs of played sandboxes with faults and kills, {cases}, random seeds, each legal"
    );
}
